"""The prompts of an evaluation: distinct ones of one or more data sets, with the subset of each."""

import importlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from var.config.saved import find_variables
from var.config.schema import pick_fields
from var.data.read import Source, read
from var.data.rows import Rows, concatenate
from var.data.settings import DataSettings
from var.data.split import draw, split
from var.utils.console import say, warn
from var.utils.errors import Problems, UserError, brief


@dataclass(frozen=True)
class Prompts:
    """P prompts, those of each data set after one another."""

    rows: Rows
    """One row per prompt."""
    labels: np.ndarray
    """[P] the subset of each row."""
    subsets: dict[str, list[str]]
    """The subsets of each data set, by its name."""


def read_prompts(cfg: DictConfig, cache: Path) -> Prompts:
    """Read the prompts of `data` and `more`: the held-out ones if held_out says so, at most `prompts` per subset."""
    parts, labels = dict[str, Rows](), dict[str, np.ndarray]()
    for part in (cfg.data, *cfg.more.values()):
        settings = DataSettings(**pick_fields(DataSettings, part))
        rows = read(instantiate(part.source), cache)
        if rows.description:
            say(f"{part.name}: {rows.description}")
        if rows.left_out:
            say(f"{part.name}: {rows.left_out} records of the data set are skipped")
        rows = draw(rows, settings)
        held_out = part.name in cfg.held_out if isinstance(cfg.held_out, ListConfig) else cfg.held_out
        if held_out:
            rows = split(rows, settings)[0]
        subsets = np.array([subset or part.name for subset in rows.texts("subset")])
        chosen = draw_prompts(rows, subsets, cfg.prompts, cfg.seed)
        kind = "held-out prompts" if held_out else "prompts, held out or not"
        advice = "; held_out=false uses all" if held_out else ""
        counts = ", ".join(f"{name} {count}" for name, count in sorted(Counter(subsets[chosen].tolist()).items()))
        distinct = len(np.unique(rows.keys))
        repeated = f"; {len(rows) - distinct} rows repeat an earlier prompt" if distinct < len(rows) else ""
        say(f"{part.name}: {len(chosen)} of {distinct} {kind} ({counts}{repeated}){advice}")
        parts[part.name], labels[part.name] = rows.select(chosen), subsets[chosen]
    problems = Problems("the data sets are not distinct", shown=5)
    for what, names in (
        ("subset", [set(subsets.tolist()) for subsets in labels.values()]),
        ("row id", [set(rows.texts("id")) for rows in parts.values()]),
    ):
        for name, count in Counter(chain(*names)).items():
            if count > 1:
                problems.add(f"{what} {name}", f"is in {count} data sets")
    problems.check("Results are labeled by subset and row id, so evaluate these data sets one by one.")
    return Prompts(
        concatenate(list(parts.values())),
        np.concatenate(list(labels.values())),
        {name: np.unique(subsets).tolist() for name, subsets in labels.items()},
    )


def warn_of_trained_prompts(prompts: Prompts, trained: Mapping[str, Any], cache: Path) -> None:
    """Warn if prompts are also training prompts of the run with this configuration, but for case and spaces."""
    if not trained["data"]:
        return
    try:
        if unknown := find_variables(trained["data"], "data"):
            raise UserError(f"{unknown[0]} came from the environment, and was not saved")
        settings = DataSettings(**pick_fields(DataSettings, OmegaConf.create(trained["data"])))
        rows = draw(read(_build_source(trained["data"]["source"]), cache), settings)
        rows = split(rows, settings)[2]
    except Exception as error:  # of another version's configuration, or of data that has moved
        say(f"Not compared with the run's training prompts, which cannot be read: {brief(error)}")
        return
    texts = np.unique(prompts.rows.facts["text"])
    shared = np.intersect1d(texts, rows.facts["text"])
    if len(shared):
        warn(
            f"{len(shared)} of {len(texts)} prompts are also training prompts of this run, but for case and spaces. "
            "held_out=true evaluates only the validation split."
        )


def _build_source(config: Mapping[str, Any]) -> Source:
    """Build a data source of this package. A run's folder may come from a stranger, and could name any function."""
    name = str(config["_target_"])
    module, _, kind = name.rpartition(".")
    found = getattr(importlib.import_module(module), kind) if re.fullmatch(r"var\.data\.sources\.\w+", module) else None
    if not (isinstance(found, type) and found.__module__ == module and hasattr(found, "records")):
        raise UserError(f"{name} is not a data source of this package")
    source: Source = found(**{key: value for key, value in config.items() if key != "_target_"})
    return source


def draw_prompts(rows: Rows, labels: np.ndarray, prompts: int | None, seed: int) -> np.ndarray:
    """Return row indices [n], one per distinct prompt; at most `prompts` per subset, by a seeded shuffle."""
    first = np.sort(np.unique(rows.keys, return_index=True)[1])
    if prompts is None:
        return first
    shuffled = np.random.default_rng(seed).permutation(first)
    return np.sort(np.concatenate([shuffled[labels[shuffled] == name][:prompts] for name in np.unique(labels)]))
