"""Runs that are killed at random events, resume with the same command, and are compared with an uninterrupted one."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.cli import read_summary, write_rows, write_to
from tests.helpers.killing import Attempt, Driver
from tests.helpers.runs import curve, run_folder

SELDOM = ("trainer.log_every_n_steps=2", "trainer.checkpoint_every_n_steps=3")
STEPS = ["data.micro_batch=2", "data.global_batch=4", "trainer.max_steps=5"]
PAIRS = ["data.micro_batch=1", "data.global_batch=2", "trainer.max_steps=5"]
LOSSES = {
    "sft": ["data.micro_batch=2", "data.global_batch=4", "trainer.epochs=1"],
    "var_grouped": [*STEPS, "trainer.precision=64-true"],
    "dpo": PAIRS,
    "bradley_terry": PAIRS,
    "grpo": PAIRS,
}
# The reference samples the responses that train, and more of them to estimate Z(x).
SAMPLED = [*STEPS, "data.responses=sampled", "generate.max_new_tokens=40", "loss.estimator.candidates=2"]

# The stages of a run, in order. An event belongs to the first stage whose pattern matches.
STAGES = {
    "reading": r"/cache/rows/",
    "tokenizing": r"/cache/sequences/",
    "sampling": r"/store/responses/|^run sampling.*annotate\.annotator",
    "annotation": r"/store/.|/cache/(hashes|keys)|/tmp/var-annotations|annotate\.annotator",
    "planning": r"plan\.npz|batches\.jsonl",
    "training": r"^step |metrics\.csv|training\.(module|rollout)( < config\.entry)?$",
    "checkpoint": r"^load |/checkpoints|step-\d+\.|last\.ckpt| exported$",
    "evaluation": r"(samples|evaluations)\.jsonl|training\.validation",
    "export": r"/model[./]|/model$",
    "other": "",
}


@dataclass(frozen=True)
class Job:
    """A command and the folder in which it resumes."""

    driver: Driver
    root: Path
    options: list[str]
    command: str = "train.py"

    def start(self, **stop: Any) -> Attempt:
        """Run the command until it ends or is stopped."""
        folders = write_to(self.root)[: 2 if self.command == "eval.py" else 3]
        return self.driver.start(self.command, [*self.options, *folders], self.root, **stop)

    def finish(self) -> Attempt:
        """Run the command to its end."""
        done = self.start()
        assert done.code == 0, done.printed
        return done

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return run_folder(self.root / "runs")

    @property
    def folders(self) -> dict[str, Path]:
        """The folders of all runs of a sweep, by name."""
        found = (self.root / "runs").glob("[!.]*/")
        return {path.name: path for path in found}


def list_options(model: Path, folder: Path) -> list[str]:
    """Return the overrides of a run without its loss: 12 prompts with two responses, at most 6 epochs."""
    path = write_rows(folder / "rows.jsonl", prompts=12, seed=3)
    return [
        f"model.path={model}", "data=files", f"data.path={path}", "reward=exact_number",
        "reward._target_=tests.helpers.rewards.Distinct", "trainer.accelerator=cpu", "trainer.epochs=6",
        "trainer.log_every_n_steps=1", "trainer.checkpoint_every_n_steps=1", "data.validation_prompts=2",
        "eval.sampling.responses=2", "eval.sampling.max_new_tokens=3", "generate.responses=2",
        "generate.max_new_tokens=4", "optim.optimizer.lr=1e-2",
    ]  # fmt: skip


def find_stage(event: str) -> str:
    """Return the stage of an event."""
    return next(stage for stage, pattern in STAGES.items() if re.search(pattern, event))


def draw_events(log: Sequence[tuple[int, str]], draw: random.Random, number: int) -> list[int]:
    """Return the indices of random events in order.

    Each stage has the same probability, and so has each group of consecutive equal events within it.

    Args:
        log: the events, as in Attempt.
        draw: the generator.
        number: how many to draw.
    """
    stages = dict[str, list[list[int]]]()
    for (_, event), group in groupby(range(len(log)), key=log.__getitem__):
        stages.setdefault(find_stage(event), []).append(list(group))
    return sorted(draw.choice(draw.choice(draw.choice(list(stages.values())))) for _ in range(number))


def kill_randomly(
    job: Job, complete: Attempt, draw: random.Random, kills: int, whom: Sequence[str] = ("self",)
) -> list[Attempt]:
    """Start the same command again and again, killed at most this many times, until it ends.

    The events are drawn from those of an uninterrupted run. A resumed run passes those that follow the last kill.

    Args:
        job: the command.
        complete: the uninterrupted run.
        draw: draws the events.
        kills: the number of kills.
        whom: which processes can be killed, as in Watch.
    """
    attempts, last = list[Attempt](), 0
    for chosen in draw_events(complete.log, draw, kills):
        process, event = complete.log[chosen]
        random_names = r"(?<=/tmp)\w{8}(?=/)|[0-9a-f]{32}(?=\\\.(partial|arrow))"
        on = re.sub(random_names, r"\\w*", f"^{re.escape(event)}$")
        at = sum(number == process and re.search(on, text) is not None for number, text in complete.log[last:chosen])
        shared = re.search("/(cache|store)/", event)  # any process can be the one that writes it
        stop = {"on": on, "at": at + 1, "process": None if shared else process, "whom": draw.choice(whom)}
        attempts.append(job.start(**stop))
        last = chosen
        if not attempts[-1].killed:
            assert attempts[-1].code == 0, describe(attempts)
            break
    attempts.append(job.start())
    assert attempts[-1].code == 0, describe(attempts)
    return attempts


def check_outcome(job: Job, straight: Job, attempts: list[Attempt], every: int = 1) -> None:
    """Assert that attempts resumed where earlier ones were killed, and that the outcome is that of a straight run.

    An attempt resumes at most `every` steps before the last step of the attempt before it.
    """
    reached = 0
    for attempt in attempts:
        steps = sum(event.startswith("step ") for event in attempt.events)
        if steps and "-m" not in job.options:
            found = re.search(r"Resuming from .*step-(\d+)", attempt.printed)
            start = int(found[1]) if found else 0
            late = f"{reached} steps were done, and it resumed from {start}; {describe(attempts)}"
            assert start >= reached - every, late
            reached = start + steps - (attempt.killed and attempt.place.startswith("step "))
    assert job.folders.keys() == straight.folders.keys(), describe(attempts)
    for run, folder in job.folders.items():
        outcome, expected = read_outcome(folder), read_outcome(straight.folders[run])
        for name in outcome:
            assert outcome[name] == expected[name], f"{name} of {run} differs; {describe(attempts)}"


def read_outcome(folder: Path) -> dict[str, Any]:
    """Return what a run leaves behind, without times and paths."""
    summary = read_summary(folder)
    for name in (
        "folder", "tokens_per_second", "computed", "seconds_of_stages", "seconds", "seconds_of_earlier_attempts",
        "peak_memory", "config", "commit", "dirty",
    ):  # fmt: skip
        summary.pop(name, None)
    with np.load(folder / "plan.npz") as file:
        plan = {name: file[name].tolist() for name in file}
    return {
        "weights": (folder / "model" / "model.safetensors").read_bytes(),
        "curve": [{k: v for k, v in row.items() if not k.startswith("throughput/")} for row in curve(folder)],
        "summary": summary,
        **{
            name: path.read_text() if (path := folder / f"{name}.jsonl").exists() else None
            for name in ("samples", "evaluations")
        },
        "plan": plan,
        "figure is complete": (folder / "plots" / "curves.png").read_bytes()[-8:-4] == b"IEND",
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").glob("*")),
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "checkpoints" not in p.parts),
    }


def describe(attempts: list[Attempt]) -> str:
    """Return the exit status and the last event of each attempt, and the output of the last one."""
    lines = [f"{a.code} at {len(a.events)}: {a.stopped or a.place}" for a in attempts]
    return "\n".join([*lines, attempts[-1].printed])
