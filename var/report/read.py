"""Finished runs, evaluations and tables of the enumerable world, found under folders; what is none of them is named."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import yaml

from var.config.run_dir import DEVICES, ELSEWHERE

Curve = tuple[list[int], list[float]]  # optimiser steps, values

SAFE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # yaml.safe_load's is Python, ten times slower
BEGUN = {".hydra", "metrics.csv", "checkpoints", "plan.npz"}  # what a run leaves before its summary
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)


class Estimate(NamedTuple):
    """A mean and its standard error; None where there is none."""

    mean: float
    se: float | None = None


def estimate(value: Any) -> Estimate | None:
    """Of a number, or of {mean, se} as summary.json has it (result.json: se_prompts); None of what is not known."""
    if isinstance(value, Mapping):
        error = value.get("se", value.get("se_prompts"))
        found = Estimate(float(value["mean"]), None if error is None else float(error))
    elif value is None:
        return None
    else:
        found = Estimate(float(value))
    if not math.isfinite(found.mean):
        return None
    return found if found.se is not None and math.isfinite(found.se) else Estimate(found.mean)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves of nested mappings; a list is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from flat(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def is_seed(key: str) -> bool:
    """Whether a dotted key is one of the seeds, in which runs of one configuration may differ."""
    return key.rpartition(".")[2] == "seed"


def is_elsewhere(key: str) -> bool:
    """Whether what a run computes does not depend on it: a folder, a logger, the devices."""
    return key.split(".")[0].lstrip("+~") in ELSEWHERE or key in [f"trainer.{name}" for name in DEVICES]


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run's folder. Its summary is read at once; curves, samples and plan when they are asked for.

    settings: the configuration by dotted keys, without what nothing depends on. measures: what came out.
    """

    folder: Path
    summary: dict[str, Any]
    settings: dict[str, Any]
    measures: dict[str, Estimate]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """One of UNREADABLE where the summary is no run's."""
        summary = json.loads((folder / "summary.json").read_text())
        settings = {key: value for key, value in flat(summary["config"]) if not is_elsewhere(key)}
        summary["title"], summary["steps"], (summary.get("hashes") or {}).keys()
        return cls(folder, summary, settings, measured(summary))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def key(self) -> str:
        """The same for runs that differ in seeds alone; a key that is null is as one that is not there."""
        settings = {k: v for k, v in self.settings.items() if v is not None and not is_seed(k)}
        return json.dumps(settings, sort_keys=True)

    @cached_property
    def seeds(self) -> str:
        return json.dumps({k: v for k, v in self.settings.items() if is_seed(k)}, sort_keys=True)

    @cached_property
    def overrides(self) -> list[str]:
        """Of its command line, those on which the result depends, seeds aside."""
        try:
            lines = SAFE((self.folder / ".hydra" / "overrides.yaml").read_text()).get_single_data() or []
        except (OSError, ValueError, yaml.YAMLError):
            return []
        if not isinstance(lines, list):
            return []
        keys = [(str(line), str(line).partition("=")[0]) for line in lines]
        return [line for line, key in keys if not is_seed(key) and not is_elsewhere(key)]

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Of metrics.csv: each metric's finite values and their steps."""
        out: dict[str, Curve] = {}
        try:
            with (self.folder / "metrics.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    for name, value in row.items():
                        if name and name != "step" and value and math.isfinite(number := float(value)):
                            steps, values = out.setdefault(name, ([], []))
                            steps.append(int(row["step"]))
                            values.append(number)
        except UNREADABLE:
            pass  # a line that a full disk cut; what stood before it is kept
        return out

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Of samples.jsonl: a record a held-out prompt, with the answers before and after."""
        return list(_lines(self.folder / "samples.jsonl"))

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """Of batches.jsonl: the rows of the first micro-batches, with their weights."""
        return list(_lines(self.folder / "batches.jsonl"))

    @cached_property
    def plan(self) -> dict[str, np.ndarray]:
        """Of plan.npz: micro [M, W] sequences or -1, tokens [M], row [n], and weight [n] where the loss has weights."""
        try:
            with np.load(self.folder / "plan.npz") as file:
                return dict(file)
        except (*UNREADABLE, EOFError, BadZipFile, ZlibError):
            return {}

    @property
    def weights(self) -> np.ndarray:
        """Of the sequences that train, unsorted; empty where the plan holds none."""
        if "weight" not in self.plan or "micro" not in self.plan:
            return np.zeros(0)
        members = np.unique(self.plan["micro"])
        weights: np.ndarray = self.plan["weight"][members[members >= 0]]
        return weights


def measured(summary: Mapping[str, Any]) -> dict[str, Estimate]:
    """By the names that tables have for them; what a run has not measured is not there."""
    validation = summary["validation"]
    reward, accuracy = validation.get("reward") or {}, validation.get("accuracy") or {}
    length, judge = validation.get("length") or {}, validation.get("judge") or {}
    percent = None
    if judge.get("win_rate") is not None:
        error = judge.get("se_prompts")
        percent = Estimate(judge["win_rate"] / 100, None if error is None else error / 100)
    found = {
        "steps": estimate(summary["steps"]),
        "reward before": estimate(reward.get("before")),
        "reward after": estimate(reward.get("after")),
        "gain, paired": estimate(reward.get("gain")),
        "win rate": estimate(validation.get("win_rate")),
        "judge's win rate": percent,
        "accuracy before": estimate(accuracy.get("before")),
        "accuracy after": estimate(accuracy.get("after")),
        "KL, nats": estimate(validation.get("kl")),
        "length before": estimate(length.get("before")),
        "length after": estimate(length.get("after")),
        "truncation rate": estimate((validation.get("truncated") or {}).get("after")),
        "ESS/n": estimate(summary.get("ess")),
        "tokens/s": estimate(summary.get("tokens_per_second")),
        **{f"s of {stage}": estimate(spent) for stage, spent in (summary.get("seconds") or {}).items()},
    }
    return {name: value for name, value in found.items() if value is not None}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON-lines file that may be missing, or cut in its last line."""
    if path.exists():
        with path.open(errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    return
                if isinstance(record, dict):
                    yield record


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, each with seeds of its own."""

    label: str
    runs: list[Run]

    @cached_property
    def measures(self) -> dict[str, Estimate]:
        """Of one run, its own. Of several: the mean of those that have it, its standard error over them."""
        if len(self.runs) == 1:
            return self.runs[0].measures
        names = dict.fromkeys(name for run in self.runs for name in run.measures)
        return {name: over([r.measures[name].mean for r in self.runs if name in r.measures]) for name in names}

    @property
    def outcome(self) -> float:
        """What sorts groups: the reward after training, a reward model's accuracy; -inf where there is neither."""
        found = self.measures.get("reward after") or self.measures.get("accuracy after")
        return found.mean if found else -math.inf

    def curve(self, name: str) -> tuple[list[int], list[Estimate]]:
        """A metric at the steps that all runs logged."""
        curves = [dict(zip(*run.curves.get(name, ([], [])), strict=True)) for run in self.runs]
        steps = sorted(set.intersection(*map(set, curves)))
        return steps, [over([curve[step] for curve in curves]) for step in steps]


def over(values: list[float]) -> Estimate:
    """Mean of independent draws, and its standard error where there are several."""
    several = len(values) > 1
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if several else None)


def grouped(runs: list[Run], notes: list[str]) -> tuple[list[Group], list[str]]:
    """Groups in the runs' order, labelled by the overrides in which they differ, and the overrides that all share.

    Of runs alike in seeds too, the last one counts; `notes` tells of the others.
    """
    members: dict[str, dict[str, Run]] = {}
    for run in runs:
        same = members.setdefault(run.key, {})
        if (twin := same.get(run.seeds)) is not None:
            notes.append(f"{twin.folder} has the configuration and seeds of {run.folder}, and counts in no mean")
        same[run.seeds] = run
    several = [list(same.values()) for same in members.values()]
    told = [group[0].overrides for group in several]
    common = [line for line in told[0] if all(line in lines for lines in told)] if told else []
    often = Counter(line for lines in told for line in set(lines))  # what is a configuration's own stands first
    labels = [" ".join(sorted((s for s in lines if s not in common), key=lambda s: often[s])) for lines in told]
    if len(several) == 1:
        labels = [str(several[0][0].summary["title"])]
    if len(set(labels)) < len(labels):  # alike on the command line: the files that it names have changed between them
        first = [group[0].settings for group in several]
        keys = [key for key in differing(first) if not is_seed(key)]
        for i, label in enumerate(labels):
            if labels.count(label) > 1 or not label:
                told_too = " ".join(f"{key}={first[i].get(key)}" for key in keys[:4])
                labels[i] = f"{label} {told_too}".strip()
    return [Group(label or "default", group) for label, group in zip(labels, several, strict=True)], common


def differing(several: list[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all; one that is not there is as null."""
    keys = dict.fromkeys(key for settings in several for key in settings)
    return [key for key in keys if any(settings.get(key) != several[0].get(key) for settings in several)]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A folder of eval.py's. parts: of each subset, and of averages over several, what the model's answers measure."""

    folder: Path
    result: dict[str, Any]
    parts: dict[str, dict[str, Estimate]]

    @classmethod
    def read(cls, folder: Path) -> "Evaluation":
        """One of UNREADABLE where the result is none of eval.py's."""
        result = json.loads((folder / "result.json").read_text())
        rates = result.get("win_rates") or {}
        games = {**(rates.get("subsets") or {}), "all": rates.get("all") or {}}
        gains = (result.get("against_reference") or {}).get("reward") or {}
        parts = {}
        model = result["model"]
        averages = {f"average, {k}": v for k, v in model["averages"].items() if len(v["of"]) > 1}
        for name, found in (model["subsets"] | averages).items():
            game = games.get(name) or {}
            of = {
                **{key: estimate(found.get(key)) for key in ("reward", "second_reward")},
                "gain, paired": estimate((gains.get(name) or {}).get("gain")),
                "KL, nats": estimate(found.get("kl")),
                "length": estimate(found.get("length")),
                "win rate, %": _rate(game.get("win_rate"), game.get("se_prompts")),
            }
            parts[name] = {key: value for key, value in of.items() if value is not None}
        facts = rates.get("facts") or {}
        if (controlled := _rate(facts.get("lc_win_rate"), facts.get("lc_se"))) is not None:
            parts["all judged pairs"] = {"win rate, %, length-controlled": controlled}
        return cls(folder, result, parts)

    @property
    def rewards(self) -> dict[str, Any]:
        """Each reward's name and what its numbers depend on."""
        return (self.result.get("depends_on") or {}).get("rewards") or {}

    def by_prompt(self, reward: str) -> dict[tuple[str, str], float]:
        """Of answers.jsonl: (subset, prompt) and the mean reward of the model's answers to it."""
        means = {}
        for record in _lines(self.folder / "answers.jsonl"):
            key = (record["subset"], json.dumps(record["prompt"], sort_keys=True))
            means[key] = over([answer[reward] for answer in record["model"]]).mean
        return means

    @property
    def verdicts(self) -> dict[str, Any]:
        """Over all pairs: win, tie, loss, error, win_rate, se_prompts; empty without a judge."""
        return (self.result.get("win_rates") or {}).get("all") or {}


def _rate(mean: Any, error: Any) -> Estimate | None:
    return None if mean is None else estimate({"mean": mean, "se": error})


@dataclass
class Found:
    """What stands under the folders that were asked for. problems: what is left out, and why."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.runs or self.evaluations or self.tables)


def read_tables(folder: Path) -> dict[str, Any]:
    """One of UNREADABLE where tables.json is none of python -m experiments.tabular's."""
    tables: dict[str, Any] = json.loads((folder / "tables.json").read_text())
    for record in tables.get("partition", ()):
        record["world"], record["estimator"], record["size"], record["relative_variance"]
    return tables


def find(places: list[Path]) -> Found:
    """Runs, evaluations and tables at these folders or anywhere under them, each once, in the order of their names."""
    found, seen = Found(), set[tuple[int, int]]()
    readers = {
        "summary.json": (Run.read, found.runs), "result.json": (Evaluation.read, found.evaluations),
        "tables.json": (read_tables, found.tables),
    }  # fmt: skip

    def visit(folder: Path) -> None:
        stat = folder.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            return
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir() for entry in entries}
        for name, (reader, into) in readers.items():
            if name in names:
                try:
                    into.append(reader(folder))  # type: ignore[operator,attr-defined]
                except UNREADABLE as error:
                    found.problems.append(f"{folder}: its {name} cannot be used ({type(error).__name__}: {error})")
                return
        if names.keys() & BEGUN:
            found.problems.append(f"{folder}: not finished; the command that began it goes on with it")
            return
        inner = [name for name, is_folder in sorted(names.items()) if is_folder and not name.startswith(".")]
        for name in inner:
            enter(folder / name)
        if not inner:
            found.problems.append(f"{folder}: no run, no evaluation")

    def enter(folder: Path) -> None:
        try:
            visit(folder)
        except UNREADABLE as error:
            found.problems.append(f"{folder}: cannot be read ({type(error).__name__}: {error})")

    for place in places:
        if place.is_dir():
            enter(place)
        else:
            found.problems.append(f"{place}: " + ("a file, no folder" if place.exists() else "there is no such folder"))
    return found
