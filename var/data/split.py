"""Draw the rows that a run uses, and split them into validation, development and training prompts."""

import numpy as np

from var.data.rows import Rows
from var.data.settings import DataSettings
from var.utils.errors import UserError


def draw(rows: Rows, settings: DataSettings) -> Rows:
    """Return the first `limit` rows, or all rows of `sample` distinct prompts that are drawn by `seed`, in order.

    The draw does not depend on the order of the rows. Raise UserError if they have fewer prompts.
    """
    if settings.sample is None:
        return rows.head(settings.limit)
    prompts = np.unique(rows.keys)
    if settings.sample > len(prompts):
        raise UserError(f"data.sample={settings.sample}: the data has {len(prompts)} distinct prompts. Lower it.")
    drawn = prompts[np.random.default_rng([settings.seed, 1]).permutation(len(prompts))[: settings.sample]]
    return rows.select(np.flatnonzero(np.isin(rows.keys, drawn)))


def split(rows: Rows, settings: DataSettings, development: int = 0) -> tuple[Rows, Rows, Rows]:
    """Return rows of the validation prompts, of `development` further prompts, and all rows of the others.

    The draw is over distinct prompts, by `settings.seed`. The first two have one row per prompt.
    """
    prompts, first = np.unique(rows.keys, return_index=True)
    reserved = settings.validation_prompts + development
    if reserved >= len(prompts):
        raise UserError(
            f"data.validation_prompts={settings.validation_prompts}"
            + (f" and the {development} development prompts that the loss requires" if development else "")
            + f" would leave none of the {len(prompts)} distinct prompts for training. Lower them."
        )
    order = np.random.default_rng(settings.seed).permutation(len(prompts))
    validation, developing = np.split(order[:reserved], [settings.validation_prompts])

    train = rows.select(np.flatnonzero(~np.isin(rows.keys, prompts[order[:reserved]])))
    return rows.select(np.sort(first[validation])), rows.select(np.sort(first[developing])), train
