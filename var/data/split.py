"""Split rows into validation, development and training prompts."""

import numpy as np

from var.data.rows import Rows
from var.data.settings import DataSettings
from var.utils.errors import UserError


def split(rows: Rows, settings: DataSettings, develop: int = 0) -> tuple[Rows, Rows, Rows]:
    """Rows of the held-out prompts and of `develop` further ones, one a prompt, and all rows of the others."""
    prompts, first = np.unique(rows.keys, return_index=True)
    if settings.validation_prompts + develop >= len(prompts):
        raise UserError(
            f"data.validation_prompts={settings.validation_prompts}"
            + (f" and loss.value.development_prompts={develop}" if develop else "")
            + f" holds out all of the {len(prompts)} distinct prompts; lower it"
        )
    order = np.random.default_rng(settings.seed).permutation(len(prompts))
    held, developing = np.split(order[: settings.validation_prompts + develop], [settings.validation_prompts])

    def only(which: np.ndarray) -> Rows:
        inside = np.isin(rows.keys, prompts[which])
        return rows.select(np.sort(first[inside[first]]))

    train = rows.select(np.flatnonzero(~np.isin(rows.keys, prompts[order[: len(held) + develop]])))
    return only(held), only(developing), train
