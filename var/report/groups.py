"""Group runs that differ in seeds only, and average their results over seeds."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from var.report.read import RunRecord, is_seed
from var.utils.statistics import Estimate, estimate_mean


@dataclass(frozen=True)
class Group:
    """Runs that share one configuration and differ in seeds."""

    label: str  # the overrides that distinguish this configuration from the others
    runs: list[RunRecord]  # one per combination of seeds

    @cached_property
    def measures(self) -> dict[str, Estimate]:
        """The results of a single run, or the mean over runs with its standard error over seeds."""
        if len(self.runs) == 1:
            return self.runs[0].measures
        names = dict.fromkeys(name for run in self.runs for name in run.measures)
        means = {name: [run.measures[name].mean for run in self.runs if name in run.measures] for name in names}
        return {name: estimate_mean(np.array(values)) for name, values in means.items()}

    @property
    def outcome(self) -> float:
        """The value that groups are sorted by: reward, else accuracy after training; -inf without both."""
        final = self.measures.get("reward after") or self.measures.get("accuracy after")
        return final.mean if final else -math.inf

    def curve(self, name: str) -> pd.DataFrame:
        """Return the columns `mean` and `se` of a metric, indexed by the steps that all runs logged."""
        curves = pd.concat([r.curves.get(name, pd.Series(dtype=float)) for r in self.runs], axis=1, join="inner")
        return pd.DataFrame({"mean": curves.mean(axis=1), "se": curves.sem(axis=1)})


def group_runs(runs: list[RunRecord], notes: list[str]) -> tuple[list[Group], list[str]]:
    """Group runs by configuration, in order, and return the groups and the overrides that all of them share.

    Groups are labeled by the overrides in which they differ. If runs have equal seeds too, only the last one is used,
    and a line about the others is appended to `notes`.
    """
    by_key: dict[str, dict[str, RunRecord]] = {}
    for run in runs:
        by_seeds = by_key.setdefault(run.key, {})
        if (earlier := by_seeds.get(run.seeds)) is not None:
            notes.append(f"{earlier.folder}: same configuration and seeds as {run.folder}. It is not used in any mean.")
        by_seeds[run.seeds] = run
    groups = [list(by_seeds.values()) for by_seeds in by_key.values()]
    overrides = [group[0].overrides for group in groups]
    shared = [line for line in overrides[0] if all(line in lines for lines in overrides)] if overrides else []
    counts = Counter(line for lines in overrides for line in set(lines))  # labels start with the rarest override
    own = [sorted((line for line in lines if line not in shared), key=lambda line: counts[line]) for lines in overrides]
    labels, short = ([" ".join(map(show, lines)) for lines in own] for show in (str, _shorten))
    if len(set(short)) == len(set(labels)):
        labels = short
    if len(groups) == 1:
        labels = [str(groups[0][0].summary["title"])]
    if len(set(labels)) < len(labels):  # equal command lines: a file that they name has changed between the runs
        first = [group[0].settings for group in groups]
        keys = [key for key in find_differing_keys(first) if not is_seed(key)]
        for i, label in enumerate(labels):
            if labels.count(label) > 1 or not label:
                settings = " ".join(f"{key}={first[i].get(key)}" for key in keys[:4])
                labels[i] = f"{label} {settings}".strip()
    return [Group(label or "default", group) for label, group in zip(labels, groups, strict=True)], shared


def _shorten(line: str) -> str:
    """Return an override whose value is a path in another folder with the last part of the path."""
    key, _, value = line.partition("=")
    return f"{key}={Path(value).name}" if re.match(r"(~|\.{0,2})/[^\[{,]+$", value) else line


def find_differing_keys(several: list[dict[str, Any]]) -> list[str]:
    """Return the keys whose values are not equal in all settings. A missing key equals null."""
    keys = dict.fromkeys(key for settings in several for key in settings)
    return [key for key in keys if any(settings.get(key) != several[0].get(key) for settings in several)]
