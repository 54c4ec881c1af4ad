"""Read finished runs, evaluations and testbed tables from folders, and list the folders that cannot be read."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

import numpy as np
import pandas as pd

from var.config.run_dir import DEVICES, ELSEWHERE
from var.config.run_files import TABLE_LIMIT, check_size, read_json, read_yaml
from var.utils.files import replace_surrogates
from var.utils.locks import ERROR, find_holder
from var.utils.statistics import Estimate
from var.utils.visible import visible

UNFINISHED = {".hydra", "metrics.csv", "checkpoints", "plan.npz", "train.log"}  # a run writes these before its summary
# what a damaged file may raise
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
RENAMED = {  # earlier names in summary.json and metrics.csv; both the earlier and the present name are read
    "cut": "truncated",
    "groups without signal": "zero_variance_groups",
    "groups without signal, left out": "zero_variance_groups_skipped",
    "rollout/cut": "rollout/truncated",
    "rows_skipped_by_adapter": "records_skipped",
    "throughput/share_waiting_for_data": "throughput/waiting_for_data",
    "train/groups/without_signal": "train/groups/zero_variance",
}
EVALUATION = ("eval.reward", "eval.sampling", "reward@eval.reward")  # what the results of validation depend on
SWEEP_FILES = ("multirun.yaml", "optimization_results.yaml")  # Hydra's, next to the runs of a sweep
MEASURES = {  # the columns of the tables, and where summary.json has them
    "steps": "steps",
    "reward before": "validation.reward.before",
    "reward after": "validation.reward.after",
    "gain, paired": "validation.reward.gain",
    "win rate": "validation.win_rate",
    "judge's win rate": "validation.judge.win_rate",
    "accuracy before": "validation.accuracy.before",
    "accuracy after": "validation.accuracy.after",
    "KL, nats": "validation.kl",
    "length before": "validation.length.before",
    "length after": "validation.length.after",
    "truncation rate": "validation.truncated.after",
    "ESS/n": "ess",
    "tokens/s": "tokens_per_second",
}


def read_rate(verdicts: Any, rate: str = "win_rate", error: str = "se_prompts") -> Estimate:
    """Return a judge's win rate in percent; NaN if there is none."""
    return Estimate.from_json({"mean": look_up(verdicts, rate), "se": look_up(verdicts, error)})


def drop_missing(measures: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Omit results without a finite mean."""
    return {name: value for name, value in measures.items() if math.isfinite(value.mean)}


def look_up(record: Any, path: str) -> Any:
    """Return the value at a dotted path of nested mappings; None if there is none."""
    for key in path.split("."):
        record = (record or {}).get(key)
    return record


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and the leaves of nested mappings. A list is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from flatten(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def is_seed(key: str) -> bool:
    """Return whether a dotted key is a seed. Runs of one configuration may differ in seeds."""
    return key.rpartition(".")[2] == "seed"


def affects_result(key: str) -> bool:
    """Return whether the results of a run depend on a dotted key. Folders, loggers and devices do not change them."""
    key, devices = key.lstrip("+~"), [f"trainer.{name}" for name in DEVICES]
    return key.startswith(EVALUATION) or (key.split(".")[0] not in ELSEWHERE and key not in devices)


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The record of a finished run in its folder. Curves, samples and the plan are read on first use."""

    folder: Path
    summary: dict[str, Any]  # the content of summary.json
    settings: dict[str, Any]  # the configuration by dotted keys, without the keys that results do not depend on
    measures: dict[str, Estimate]  # the results by the column names of the tables

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read summary.json. Raises an error of UNREADABLE if it is not the summary of a run."""
        summary = read_record(folder / "summary.json")
        settings = {key: value for key, value in flatten(summary["config"]) if affects_result(key)}
        if summary.get("changes"):  # such a run is not one of several that differ in seeds only
            settings["changes"] = json.dumps(summary["changes"], sort_keys=True)
        summary["title"], summary["steps"], (summary.get("hashes") or {}).keys()
        return cls(folder, summary, settings, read_measures(summary))

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @cached_property
    def key(self) -> str:
        """A string that is equal for runs that differ in seeds only. A null key equals a missing key."""
        settings = {k: v for k, v in self.settings.items() if v is not None and not is_seed(k)}
        return json.dumps(settings, sort_keys=True)

    @cached_property
    def seeds(self) -> str:
        """All seeds of the configuration, as a string."""
        return json.dumps({k: v for k, v in self.settings.items() if is_seed(k)}, sort_keys=True)

    @cached_property
    def overrides(self) -> list[str]:
        """The command-line overrides that affect the results, without seeds."""
        try:
            lines = read_yaml(self.folder / ".hydra" / "overrides.yaml")
        except (OSError, ValueError):
            return []
        if not isinstance(lines, list):
            return []
        keys = [(replace_surrogates(str(line)), str(line).partition("=")[0]) for line in lines]
        return [line for line, key in keys if not is_seed(key) and affects_result(key)]

    @cached_property
    def curves(self) -> dict[str, pd.Series]:
        """The finite values of each metric in metrics.csv, indexed by step. Damaged values are skipped.

        The KL, which is not logged before training, is 0 at step 0, where the policy is the reference.
        """
        try:
            path = check_size(self.folder / "metrics.csv", TABLE_LIMIT)
            logged = pd.read_csv(path, index_col=False, float_precision="round_trip", on_bad_lines="skip")
            logged = logged.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
            by_step = logged.groupby("step").last().rename(columns=RENAMED)
        except UNREADABLE:
            return {}
        by_step.index = by_step.index.astype(int)
        curves = {str(name): values.dropna() for name, values in by_step.items() if values.notna().any()}
        if "validation/kl" in curves:
            curves["validation/kl"] = pd.concat([pd.Series({0: 0.0}), curves["validation/kl"].drop(0, errors="ignore")])
        return curves

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The records of samples.jsonl: one per validation prompt, with the answers before and after training."""
        return list(read_json_lines(self.folder / "samples.jsonl"))

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """The records of batches.jsonl: one per row of the first micro-batches, with its weight."""
        return list(read_json_lines(self.folder / "batches.jsonl"))

    @cached_property
    def plan(self) -> dict[str, np.ndarray]:
        """The arrays of plan.npz; empty if it is missing or damaged.

        micro [M, W] has the sequences of each micro-batch, padded with -1; tokens [M] their response tokens; row [n]
        the training row of each sequence; weight [n] its weight, if the loss has weights.
        """
        try:
            path = check_size(self.folder / "plan.npz", TABLE_LIMIT)
            with ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > TABLE_LIMIT:
                    raise ValueError("it is too large when it is decompressed")
            with np.load(path) as file:
                return dict(file)
        except (*UNREADABLE, EOFError, BadZipFile, ZlibError):
            return {}

    @property
    def weights(self) -> np.ndarray:
        """The weights of the sequences in the plan, in no order; empty if the plan has no weights."""
        if "weight" not in self.plan or "micro" not in self.plan:
            return np.zeros(0)
        sequences = np.unique(self.plan["micro"])
        weights: np.ndarray = self.plan["weight"][sequences[sequences >= 0]]
        return weights


def read_measures(summary: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return the results in a summary by the column names of the tables. Missing results are omitted."""
    measures = {name: Estimate.from_json(look_up(summary, path)) for name, path in MEASURES.items()}
    measures["judge's win rate"] = read_rate(look_up(summary, "validation.judge")).scale(0.01)
    seconds = summary.get("seconds") or {}
    return drop_missing(measures | {f"seconds {stage}": Estimate.from_json(spent) for stage, spent in seconds.items()})


def read_record(path: Path) -> Any:
    """Read JSON, replace characters that UTF-8 cannot encode, and rename earlier names."""
    text = replace_surrogates(json.dumps(read_json(path), ensure_ascii=False))
    return json.loads(text, object_hook=lambda pairs: {RENAMED.get(key, key): value for key, value in pairs.items()})


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file up to the first damaged line; none if it is missing or too large."""
    with suppress(OSError, ValueError, RecursionError), check_size(path, TABLE_LIMIT).open(errors="replace") as file:
        for line in file:
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


@dataclass(frozen=True, eq=False)
class EvaluationRecord:
    """The record that eval.py leaves in its folder."""

    folder: Path
    result: dict[str, Any]  # the content of result.json
    parts: dict[str, dict[str, Estimate]]  # by subset or average over subsets, then by the column names of the tables

    @classmethod
    def read(cls, folder: Path) -> "EvaluationRecord":
        """Read result.json. Raises an error of UNREADABLE if it is not a result of eval.py."""
        result = read_record(folder / "result.json")
        verdicts = {**(look_up(result, "win_rates.subsets") or {}), "all": look_up(result, "win_rates.all")}
        gains = look_up(result, "against_reference.reward") or {}
        parts = {}
        model = result["model"]
        averages = {f"average, {k}": v for k, v in model["averages"].items() if len(v["of"]) > 1}
        for name, part in (model["subsets"] | averages).items():
            measures = {name: Estimate.from_json(part.get(name)) for name in ("reward", "second_reward")}
            measures["gain, paired"] = Estimate.from_json(look_up(gains, f"{name}.gain"))
            measures["KL, nats"] = Estimate.from_json(part.get("kl"))
            measures["length"] = Estimate.from_json(part.get("length"))
            measures["win rate, %"] = read_rate(verdicts.get(name))
            parts[name] = drop_missing(measures)
        controlled = read_rate(look_up(result, "win_rates.facts"), "lc_win_rate", "lc_se")
        if measures := drop_missing({"win rate, %, length-controlled": controlled}):
            parts["all judged pairs"] = measures
        return cls(folder, result, parts)

    @property
    def title(self) -> str:
        """The evaluation's title, or the name of its folder."""
        return replace_surrogates(str(self.result.get("title", self.folder.name)))

    @property
    def rewards(self) -> dict[str, Any]:
        """The name of each reward and what its numbers depend on."""
        return look_up(self.result, "depends_on.rewards") or {}

    @property
    def verdicts(self) -> dict[str, Any]:
        """Win, tie, loss, error, win_rate and se_prompts over all judged pairs; empty without a judge."""
        return look_up(self.result, "win_rates.all") or {}

    def by_prompt(self, reward: str) -> dict[tuple[str, str], float]:
        """Read answers.jsonl and return the mean reward of the model's answers by (subset, prompt)."""
        means = {}
        for record in read_json_lines(self.folder / "answers.jsonl"):
            key = (record["subset"], json.dumps(record["prompt"], sort_keys=True))
            means[key] = float(np.mean([answer[reward] for answer in record["model"]]))
        return means


@dataclass
class Found:
    """The content of the folders that were given to a report."""

    runs: list[RunRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)  # the tables.json files of experiments.tabular
    problems: list[str] = field(default_factory=list)  # one line per folder that is skipped, with the reason

    def __bool__(self) -> bool:
        return bool(self.runs or self.evaluations or self.tables)


def read_tables(folder: Path) -> dict[str, Any]:
    """Read tables.json. Raises an error of UNREADABLE if experiments.tabular did not write it."""
    tables: dict[str, Any] = read_record(folder / "tables.json")
    for record in tables.get("partition", ()):
        record["world"], record["estimator"], record["size"], record["relative_variance"]
    return tables


def describe_unfinished(folder: Path) -> str:
    """Return what became of a run without a summary: it is running, can be resumed, or failed at its start."""
    if holder := find_holder(folder):
        return f"running, in {holder}."
    names = [path.stem.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*.ckpt")]
    steps = [int(name) for name in names if name.isdecimal()]
    place = f"after step {max(steps)}" if steps else "before its first checkpoint"
    again = "resumes it" if steps else "starts it again"
    if (file := folder / ERROR).is_file():
        with file.open(errors="replace") as text:
            reason = " ".join(text.read(2000).split())[:300]
        return f"failed {place}: {visible(reason)} The same command {again}."
    return f"stopped {place}. The same command {again}."


def find_records(places: list[Path]) -> Found:
    """Read the runs, evaluations and tables in these folders and below them, each once, sorted by name."""
    found, seen = Found(), set[Path]()
    readers: dict[str, tuple[Callable[[Path], Any], list[Any]]] = {
        "summary.json": (RunRecord.read, found.runs),
        "result.json": (EvaluationRecord.read, found.evaluations),
        "tables.json": (read_tables, found.tables),
    }

    def add_unreadable(error: OSError) -> None:
        found.problems.append(f"{error.filename}: cannot be read ({type(error).__name__}: {error})")

    for place in places:
        if not place.is_dir():
            if place.name not in SWEEP_FILES:
                found.problems.append(f"{place}: {'not a folder' if place.exists() else 'no such folder'}")
            continue
        for path, inner, files in os.walk(place, followlinks=True, onerror=add_unreadable):
            folder, names = Path(path), {*inner, *files}
            record = next((name for name in readers if name in names), None)
            visited = (real := folder.resolve()) in seen
            seen.add(real)
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            if visited or record or names & UNFINISHED:
                inner.clear()
            if visited:
                continue
            if record:
                reader, records = readers[record]
                try:
                    records.append(reader(folder))
                except UNREADABLE as error:
                    found.problems.append(f"{folder}: cannot use {record} ({type(error).__name__}: {error})")
            elif names & UNFINISHED:
                found.problems.append(f"{folder}: {describe_unfinished(folder)}")
            elif not inner:
                found.problems.append(f"{folder}: no run, no evaluation")
    return found
