"""Reproduce tables and figures of arXiv 2502.11026, and the project's own comparisons, by one command.

    python -m experiments.reproduce table7                      # with a small model, on two cores
    python -m experiments.reproduce table7 size=paper dry=true  # what it would take at the paper's size
    python -m experiments.reproduce table1 data.folder=<folder of HHA files> reward:prompts=8
    python -m experiments.reproduce all jobs=2                  # all of the paper
    python -m experiments.reproduce reward_kl jobs=2            # the project's own: reward against KL

The items are declared in `experiments/items`. Each row of a table is one training run per seed and what evaluates it.
Each command has a folder of its own, which is named after it, so that items share their runs. A finished command is not
repeated and an unfinished one resumes: after any interruption the same command continues. Runs share the annotation
cache, unless their seconds are compared. If a command fails, the others continue, and the table shows its error.

Settings: size=small or paper; dry=true prints the commands and what they take; folder=<where the commands run>;
jobs=<commands at once, which share the GPUs>; out=<folder of the results>; seeds=0,1,2 replaces those of the item;
launcher=slurm (or another launcher of Hydra) runs each command there; tflops=<of a GPU> is for the hours in dry=true;
stored=true does not repeat runs whose results are in `runs-<size>.tar.xz` in the item's folder; start=false starts no
command, and writes the rows whose runs have finished or are in that archive.

All other words with = are overrides. Each goes to every command that has its key, or, with the name of a stage before
it (train:…, reward:…), to that stage alone.

`results-<size>.json` has a record per cell, and the tables between two marks in the item's README.md and the figures
are made from it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])  # as a script

from experiments.cells import Cell, fill, publish
from experiments.items import ITEMS, PAPER_ITEMS
from experiments.items.base import Command, Table
from experiments.jobs import ROOT, Job, Runner, list_jobs
from experiments.overrides import route
from experiments.stored import name_archive, restore, store

SETTINGS = {
    "size": "small", "dry": "false", "folder": "runs/reproduce", "jobs": "1", "out": str(ROOT / "experiments"),
    "seeds": "", "launcher": "", "tflops": "125", "stored": "false", "start": "true",
}  # fmt: skip
OWN = ("seed", "runs", "init")  # overrides that the driver sets
Work = dict[tuple[str, str, str, int], Job]
"""Jobs by the table's title, the row's name, the stage and the seed."""


def list_work(
    name: str, settings: Mapping[str, str], words: Mapping[tuple[str, Command], Sequence[str]]
) -> tuple[tuple[Table, ...], Work]:
    """Return the tables of an item with their seeds, and all their jobs."""
    item, folder = ITEMS[name], Path(settings["folder"]).resolve() / settings["size"]
    if settings["size"] not in item.sizes:
        raise SystemExit(f"{name} has no size={settings['size']}; choose one of {', '.join(item.sizes)}")
    work = Work()
    for table in item.sizes[settings["size"]]:
        for row in (row for row in table.rows if row.shown):  # hidden ones run if others need them
            for seed in select_seeds(table, settings):
                for stage, job in list_jobs(table, row, seed, folder, words).items():
                    work[table.title, row.name, stage, seed] = job
    return item.sizes[settings["size"]], work


def select_seeds(table: Table, settings: Mapping[str, str]) -> tuple[int, ...]:
    """Return the seeds of a table: its own, or those of the command line. Studies on the testbed have their own."""
    trains = any("train" in row.stages for row in table.rows)
    return tuple(map(int, settings["seeds"].split(","))) if settings["seeds"] and trains else table.seeds


def run_items(
    names: Sequence[str], settings: Mapping[str, str], words: Mapping[tuple[str, Command], Sequence[str]]
) -> Iterator[tuple[str, list[Cell]]]:
    """Run what is missing of items and write their results. Yield each item's name and cells when it is finished.

    Items share the jobs at once. Those whose seconds are compared run alone, after the others.
    """
    launcher = "slurm" if settings["launcher"] == "submitit_slurm" else settings["launcher"]  # with the run's devices
    found = {name: list_work(name, settings, words) for name in names}
    if settings["stored"] == "true" or settings["start"] == "false":
        for name, (_, work) in found.items():
            restore(name_archive(Path(settings["out"]) / name, settings["size"]), work.values())
    if settings["start"] == "false":
        for name, (tables, work) in found.items():
            yield name, write(name, tables, work, dict.fromkeys(work, ""), settings)
        return
    timed = [name for name in names if any(table.timed for table in found[name][0])]
    for several, count in (([name for name in names if name not in timed], int(settings["jobs"])), (timed, 1)):
        runner, pool = Runner(count, launcher), ThreadPoolExecutor(sum(len(found[name][1]) for name in several) or 1)
        try:
            # seed by seed, so that the seconds of all rows are measured at several times
            for name in several:
                found[name] = (found[name][0], dict(sorted(found[name][1].items(), key=lambda item: item[0][3])))
            started = {name: [pool.submit(runner.run, job) for job in found[name][1].values()] for name in several}
            for name, futures in started.items():
                tables, work = found[name]
                reasons = dict(zip(work, (future.result() for future in futures), strict=True))
                yield name, write(name, tables, work, reasons, settings)
        finally:
            runner.stop()
            pool.shutdown(cancel_futures=True)


def write(
    name: str,
    tables: Sequence[Table],
    work: Work,
    reasons: Mapping[tuple[str, str, str, int], str],
    settings: Mapping[str, str],
) -> list[Cell]:
    """Write the results of an item and return them. reasons: why jobs failed, or "".

    Rows are left out if some of their jobs have neither finished nor failed.
    """
    cells = []
    for table in tables:
        seeds = select_seeds(table, settings)
        for row in (row for row in table.rows if row.shown):
            for column in (column for column in table.columns if column.stage in row.stages):
                jobs = {
                    (other, seed): job
                    for (title, other, stage, seed), job in work.items()
                    if (title, stage) == (table.title, column.stage)
                }
                own = [(table.title, row.name, column.stage, seed) for seed in seeds]
                others = [(table.title, row.name, column.second_stage, seed) for seed in seeds if column.second_stage]
                failed = next((reason for key in (*own, *others) if (reason := reasons[key])), "")
                if failed or all(work[key].result for key in (*own, *others)):
                    cells.append(fill(table, row, column, jobs, seeds, failed, [work[key] for key in others]))
    publish(name, ITEMS[name], settings["size"], cells, Path(settings["out"]))
    if stored := [job for job in work.values() if job.stored]:
        store(name_archive(Path(settings["out"]) / name, settings["size"]), stored)
    return cells


def parse(words: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the items, the settings, and the overrides in the words of a command line."""
    names, settings, overrides = list[str](), dict(SETTINGS), list[str]()
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in settings:
            settings[key] = value
        elif equals and key in OWN:
            raise SystemExit(f"{word}: the driver sets {key}. " + ("Use seeds=" if key == "seed" else "Remove it"))
        elif equals or word.startswith("~"):
            overrides.append(word)
        elif word == "all":
            names += PAPER_ITEMS
        elif word in ITEMS:
            names.append(word)
        else:
            raise SystemExit(f"{word} is not an item. Choose of {', '.join(ITEMS)} or all")
    boolean = ("true", "false")
    for key, allowed in {"size": ("small", "paper"), "dry": boolean, "stored": boolean, "start": boolean}.items():
        if settings[key] not in allowed:
            raise SystemExit(f"{key}={settings[key]}: must be one of {', '.join(allowed)}")
    if settings["seeds"] and not all(seed.isdecimal() for seed in settings["seeds"].split(",")):
        raise SystemExit(f"seeds={settings['seeds']}: must be numbers, as in seeds=0,1,2")
    if not settings["jobs"].isdecimal() or not int(settings["jobs"]):
        raise SystemExit(f"jobs={settings['jobs']}: must be a number of 1 or more")
    try:
        float(settings["tflops"])
    except ValueError:
        raise SystemExit(f"tflops={settings['tflops']}: must be a number") from None
    if not names:
        raise SystemExit(f"Name one or more of {', '.join(ITEMS)}, or all")
    return list(dict.fromkeys(names)), settings, overrides


def main(words: Sequence[str]) -> None:
    """Reproduce the items that are named."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    names, settings, overrides = parse(words)
    tables = [table for name in names for table in ITEMS[name].sizes.get(settings["size"], ())]
    stages = dict.fromkeys(chain.from_iterable(row.stages.items() for table in tables for row in table.rows))
    routed = route(list(stages), overrides, dry=settings["dry"] == "true")
    if settings["dry"] == "true":
        from experiments.estimates import show

        work = {name: list(list_work(name, settings, routed)[1].values()) for name in names}
        show(work, float(settings["tflops"]))
        return
    failed = [(name, cell.row) for name, cells in run_items(names, settings, routed) for cell in cells if cell.failed]
    if failed:
        raise SystemExit(f"{len(set(failed))} rows failed; see the table")


if __name__ == "__main__":
    main(sys.argv[1:])
