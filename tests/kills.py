"""Kill runs at random events, resume them with the same command, and compare them with uninterrupted runs.

    python -m tests.kills --kills 300

Runs with several losses are killed by SIGKILL: in one process, on two ranks (one or both are killed), and as jobs of a
sweep (a worker, the sweep's process, or all of its processes are killed). Each must end with the weights, metrics.csv,
summary and files of an uninterrupted run, to the last bit, and leave no process behind. The table shows the number of
kills per stage. The script stops at the first difference and keeps that run's folder.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from pathlib import Path

from tests.helpers.killed_runs import (
    LOSSES,
    SAMPLED,
    SELDOM,
    STAGES,
    Job,
    check_outcome,
    find_stage,
    kill_randomly,
    list_options,
)
from tests.helpers.killing import Attempt, Driver
from tests.helpers.models import saved

CHAIN = 5  # kills per run, at most
RUNS = {"var_sampled": SAMPLED, "grpo": LOSSES["grpo"], "dpo": LOSSES["dpo"], **LOSSES}


@dataclass(frozen=True)
class Configuration:
    """How runs are started and killed."""

    fraction: float
    """The fraction of all kills."""
    variants: Sequence[Sequence[str]]
    """The first words of the command, per variant."""
    whom: Sequence[str]
    """Which processes a kill ends, as in Watch. It is drawn for each kill."""


CONFIGURATIONS = {
    "one process": Configuration(2 / 3, [[]], ["self"]),
    "two ranks": Configuration(
        1 / 5, [["trainer.devices=2", f"strategy={name}"] for name in ("ddp", "fsdp")], ["self", "self", "all"]
    ),
    "sweep": Configuration(
        2 / 15, [["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"]], ["self", "parent", "all"]
    ),
}
Counts = Counter[tuple[str, str]]
"""Kills by configuration and stage."""


def main() -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="number of kills (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed with which the events are drawn (default: 0)")
    arguments = parser.parse_args()
    folder, counts = Path(tempfile.mkdtemp(prefix="kills-")), Counts()
    try:
        kill_runs(arguments.kills, arguments.seed, folder, counts)
    except AssertionError as error:
        print(f"\n{error}\n\n{make_table(counts)}\n\nThis run differs. Its folder is in {folder}.")
        return 1
    shutil.rmtree(folder)
    print(f"\n{make_table(counts)}\n\n{counts.total()} kills. All runs ended as the uninterrupted ones.")
    return 0


def kill_runs(kills: int, seed: int, folder: Path, counts: Counts) -> None:
    """Kill runs of all configurations, and assert that each ends as an uninterrupted one.

    Args:
        kills: the number of kills.
        seed: of the draw of the events.
        folder: an empty folder.
        counts: receives the kills.
    """
    driver = Driver(folder)
    try:
        base = list_options(saved(folder / "tiny"), folder)
        for name, configuration in CONFIGURATIONS.items():
            kill_configuration(name, round(kills * configuration.fraction), seed, driver, base, counts)
    finally:
        driver.close()


def kill_configuration(name: str, kills: int, seed: int, driver: Driver, base: list[str], counts: Counts) -> None:
    """Kill runs of one configuration, one after the other.

    Args:
        name: the configuration.
        kills: the number of kills.
        seed: of the draw of the events.
        driver: starts the runs.
        base: the overrides of all runs.
        counts: receives the kills.
    """
    configuration, draw, folder = CONFIGURATIONS[name], random.Random(seed), driver.log.parent / name
    variants = list(product(([], SELDOM), configuration.variants, RUNS.items()))
    complete = list[Attempt]()  # uninterrupted, one per variant
    for number, (more, words, (loss, options)) in enumerate(cycle(variants)):
        left = kills - sum(count for (configured, _), count in counts.items() if configured == name)
        if left <= 0:
            return
        unbroken = Job(
            driver, folder / f"straight-{number % len(variants)}", [*words, *base, f"loss={loss}", *options, *more]
        )
        if number < len(variants):
            complete.append(unbroken.finish())
        job = replace(unbroken, root=folder / f"killed-{number}")
        attempts = kill_randomly(job, complete[number % len(variants)], draw, min(CHAIN, left), configuration.whom)
        check_outcome(job, unbroken, attempts, every=3 if more else 1)
        shutil.rmtree(job.root)
        stages = [find_stage(attempt.stopped) for attempt in attempts if attempt.stopped is not None]
        counts.update((name, stage) for stage in stages)
        print(" ".join([name, *words, loss, *more]), "killed in", ", ".join(stages) or "no stage", flush=True)


def make_table(counts: Counts) -> str:
    """Return a table of the kills: one row per stage, one column per configuration."""
    lines = [["stage", *CONFIGURATIONS, "all"]]
    for stage in STAGES:
        row = [counts[name, stage] for name in CONFIGURATIONS]
        lines.append([stage, *map(str, row), str(sum(row))])
    sums = [sum(count for (name, _), count in counts.items() if name == column) for column in CONFIGURATIONS]
    lines.append(["all", *map(str, sums), str(counts.total())])
    return "\n".join(f"{first:12}" + "".join(f"{cell:>13}" for cell in cells) for first, *cells in lines)


if __name__ == "__main__":
    sys.exit(main())
