"""Reproduce tables and figures of arXiv 2502.11026 by one command.

    python -m experiments.reproduce table7                      # with a small model, on two cores
    python -m experiments.reproduce table7 size=paper dry=true  # what it would take at the paper's size
    python -m experiments.reproduce table4 table7 out=results trainer.max_steps=4

The items are in `experiments/items.py`. Each row of a table is one run per seed, in a folder of its own below `folder`,
which is named after its command. A finished run is not repeated and an unfinished one resumes, so after any
interruption the same command continues. Runs share the annotation cache, unless their seconds are compared. If a run
fails, the others continue, and the table shows its error.

Settings: size=small or paper; dry=true prints the commands and what each run takes; folder=<where the runs are>;
jobs=<runs at once>; out=<folder of the results>; seeds=0,1,2 replaces those of the item. All other words with = are
overrides of train.py in each row.

`results-<size>.json` has a record per cell, and the table between two marks in the item's README.md is made from it.
"""

import hashlib
import json
import math
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.items import ITEMS, Column, Item, Row, Size
from var.utils.signals import end_with_parent

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "size": "small", "dry": "false", "folder": "runs/reproduce", "jobs": "1", "out": str(ROOT / "experiments"),
    "seeds": "",
}  # fmt: skip
OWN = ("seed", "runs", "init")  # overrides that the driver sets
TAIL = 3  # lines of a failed run's output in the table


@dataclass(frozen=True)
class Stage:
    """A command whose result is a JSON file."""

    folder: Path
    """Its own folder."""
    command: tuple[str, ...]
    """The script and its arguments. `{model}` is the run of the stage before."""
    after: "Stage | None" = None
    """The stage that has to be finished before."""
    pattern: str = "runs/*/summary.json"
    """Where its result is, below `folder`."""

    @property
    def result(self) -> Path | None:
        """The JSON file that it has written, or None if it is not finished."""
        return next(iter(self.folder.glob(self.pattern)), None)

    @property
    def arguments(self) -> list[str]:
        """The command, with the folder of the run before."""
        if self.after is None:
            return list(self.command)
        found = self.after.result
        return [word.replace("{model}", str(found.parent) if found else "<its run>") for word in self.command]

    def run(self) -> str:
        """Run the command unless it is finished. Return why it failed, or an empty text."""
        if self.result is not None:
            return ""
        if self.after is not None and (reason := self.after.run()):
            return reason
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{Path(self.command[0]).stem}.log"
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, *self.arguments],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # it saves, and the next start resumes it
            ).returncode
        if done == 0 and self.result is not None:
            return ""
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"status {done}: {' '.join(lines[-TAIL:])[-300:]}"


@dataclass
class Cell:
    """A number of a table, with everything that it depends on."""

    row: str
    column: str
    value: float | None = None
    se: float | None = None
    """Standard error: over seeds if there are several, else over prompts."""
    n: int = 0
    """Runs."""
    seeds: list[int] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    """The names of the runs' folders, which are hashes of their configurations."""
    commands: list[str] = field(default_factory=list)
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    """Why a run failed."""


def make_stages(size: Size, row: Row, seed: int, folder: Path, overrides: Sequence[str]) -> list[Stage]:
    """Return the stages of a row for one seed: a training run and, if there is one, its evaluation."""
    assert row.words is not None
    before, words = None, [*size.words, *row.words, f"seed={seed}", *overrides]
    if row.init is not None:
        first = next(other for other in size.rows if other.label == row.init)
        before = make_stages(size, first, seed, folder, overrides)[0]
        words.append("init={model}")
    # A changed command has another folder, so that no result of an earlier one is taken for it.
    command = hashlib.sha256(repr([words, size.evaluation, before and before.folder]).encode()).hexdigest()[:8]
    own = folder / f"{make_name(row.label)}-seed{seed}-{command}"
    words += [f"runs={own}/runs", *([f"annotation_cache={own}/annotations"] if size.timed else [])]
    stages = [Stage(own, ("train.py", *words), before)]
    if size.evaluation is not None:
        command = ("eval.py", "init={model}", *size.evaluation, f"out={own}/evals")
        stages.append(Stage(own, command, stages[0], "evals/*/result.json"))
    return stages


def make_name(label: str) -> str:
    """Return a label as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def read_number(path: str, results: Sequence[Path]) -> tuple[float, float | None] | None:
    """Return a number and its standard error from the results of a row's stages; None if it does not apply."""
    file, _, keys = path.rpartition(": ")
    value: Any = json.loads(results[1 if file == "evaluation" else 0].read_text())
    for key in keys.split("."):
        value = value[key]
    if value is None:
        return None
    return (float(value["mean"]), float(value["se"])) if isinstance(value, dict) else (float(value), None)


def fill(row: Row, column: Column, stages: Sequence[tuple[int, Sequence[Stage]]], failed: str) -> Cell:
    """Return the cell of a row and a column, from its stages of each seed."""
    cell = Cell(row.label, column.title, failed=failed)
    found = []
    for seed, several in stages:
        results = [stage.result for stage in several]
        if not all(results):
            continue
        done = [result for result in results if result is not None]
        try:
            if (number := read_number(column.path, done)) is not None:
                found.append(number)
        except (KeyError, TypeError, ValueError) as error:
            cell.failed = cell.failed or f"{column.path} is not in the result ({type(error).__name__}: {error})"
            continue
        summary = json.loads(done[0].read_text())
        cell.seeds.append(seed)
        cell.runs.append(done[0].parent.name)
        cell.commands += [shlex.join(["python", *filter(_is_portable, stage.command)]) for stage in several]
        cell.commit, cell.versions = summary["commit"], summary["versions"]
    if found and not cell.failed:
        values = [value * column.scale for value, _ in found]
        cell.n, cell.value = len(found), sum(values) / len(values)
        if len(found) > 1:
            spread = sum((value - cell.value) ** 2 for value in values) / (len(values) - 1)
            cell.se = math.sqrt(spread / len(values))
        elif found[0][1] is not None:
            cell.se = found[0][1] * column.scale
    return cell


def _is_portable(word: str) -> bool:
    """Return whether a word of a command is not a place on this machine."""
    return word.partition("=")[0] not in ("runs", "annotation_cache", "cache", "out")


def write_table(item: Item, size: Size, cells: Sequence[Cell]) -> str:
    """Return a table in Markdown: our columns, then the paper's."""
    columns = [column.title for column in size.columns] + [f"paper: {name}" for name in item.paper_columns]
    lines = [f"| run | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    known = {(cell.row, cell.column): cell for cell in cells}
    for row in size.rows:
        ours = [show(known.get((row.label, column.title)), column) for column in size.columns]
        theirs = [*row.paper, *["–"] * (len(item.paper_columns) - len(row.paper))]
        lines.append(f"| {row.label} | {' | '.join([*ours, *theirs])} |")
    seeds = sorted({seed for cell in cells for seed in cell.seeds})
    failures = list(dict.fromkeys(f"- {cell.row} failed. {cell.failed}" for cell in cells if cell.failed))
    over = "Errors are over seeds." if len(seeds) > 1 else "Errors are over prompts."
    note = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}. {over}"
    words = [*size.words, *(word for row in size.rows for word in row.words or ())]
    assumed = "; ".join(list_assumptions(words))
    footnote = ["", f"Assumptions where the paper leaves it open: {assumed}."] if assumed else []
    return "\n".join([*lines, "", note, *footnote, *([""] if failures else []), *failures])


def show(cell: Cell | None, column: Column) -> str:
    """Return a cell as text."""
    if cell is None or cell.failed or cell.value is None:
        return "failed" if cell is not None and cell.failed else "–"
    text = f"{cell.value:.{column.digits}f}"
    return (text if cell.se is None else f"{text} ± {cell.se:.{column.digits}f}").replace("-", "−")


def list_assumptions(words: Sequence[str]) -> list[str]:
    """Return what the paper leaves open, from `# assumption:` in the experiments and losses that overrides select."""
    found, files = list[str](), list[Path]()

    def read(group: str, name: str) -> None:
        path = ROOT / "conf" / group / f"{name}.yaml"
        if not path.exists() or path in files:
            return
        files.append(path)
        for default in yaml.safe_load(path.read_text()).get("defaults", []):
            if isinstance(default, str) and default != "_self_":
                read(group, default)
            elif isinstance(default, dict):
                for place, chosen in default.items():
                    if place.split("/")[-1] == "loss":
                        read("loss", chosen)
        found.extend(re.findall(r"# assumption: (.*)", path.read_text()))

    for word in words:
        group, _, names = word.partition("=")
        if group in ("experiment", "loss"):
            for name in names.strip("[]").split(","):
                read(group, name)
    return found


def insert(text: str, name: str, table: str) -> str:
    """Return the text of a README with the table between its two marks."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text:
        return text
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def reproduce(name: str, settings: dict[str, str], overrides: Sequence[str]) -> list[Cell]:
    """Run what is missing of an item, write its results, and return them."""
    item = ITEMS[name]
    if (size := item.sizes.get(settings["size"])) is None:
        raise SystemExit(f"{name} has no size={settings['size']}; choose one of {', '.join(item.sizes)}")
    seeds = tuple(map(int, settings["seeds"].split(","))) if settings["seeds"] else size.seeds
    folder = Path(settings["folder"]).resolve() / settings["size"] / name
    rows = {
        row.label: [(seed, make_stages(size, row, seed, folder, overrides)) for seed in seeds]
        for row in size.rows
        if row.words is not None
    }
    if size.timed and settings["jobs"] != "1":
        raise SystemExit(f"{name} compares seconds, so its runs follow each other. Remove jobs={settings['jobs']}")
    if settings["dry"] == "true":
        for stages in rows.values():
            for _, several in stages:
                show_dry(several)
        return []
    work = [(label, several[-1]) for label, stages in rows.items() for _, several in stages]
    reasons = dict[str, str]()
    for later in (False, True):  # rows that others continue are finished first, so that no run is started twice
        now = [(label, stage) for label, stage in work if _continues(size, label) == later]
        with ThreadPoolExecutor(int(settings["jobs"])) as pool:
            for (label, stage), reason in zip(now, pool.map(lambda one: one[1].run(), now), strict=True):
                print(f"{name}, {label}: {reason or 'done'} ({stage.folder})", flush=True)
                reasons[label] = reasons.get(label) or reason
    cells = [
        fill(row, column, rows[row.label], reasons[row.label])
        for row in size.rows if row.words is not None for column in size.columns
    ]  # fmt: skip
    publish(name, item, size, settings, cells)
    return cells


def _continues(size: Size, label: str) -> bool:
    return next(row.init is not None for row in size.rows if row.label == label)


def publish(name: str, item: Item, size: Size, settings: dict[str, str], cells: Sequence[Cell]) -> None:
    """Write results.json, put the table into the README, and print it."""
    out = Path(settings["out"]) / name
    out.mkdir(parents=True, exist_ok=True)
    records = [asdict(cell) for cell in cells]
    (out / f"results-{settings['size']}.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    table = write_table(item, size, cells)
    readme = out / "README.md"
    if readme.exists():
        text = readme.read_text()
        if (changed := insert(text, f"{name} {settings['size']}", table)) == text and table not in text:
            print(f"{readme} has no mark <!-- {name} {settings['size']} -->, so the table is not in it")
        readme.write_text(changed)
    print(f"\n{item.title}\n\n{table}\n")


def show_dry(stages: Sequence[Stage]) -> None:
    """Print the commands of a row, and what its training run would take."""
    for stage in stages:
        print(shlex.join(["python", *stage.arguments]))
    done = subprocess.run(
        [sys.executable, *stages[0].arguments, "debug=dry"], cwd=ROOT, capture_output=True, text=True, errors="replace"
    )
    lines = (done.stdout or done.stderr).strip().splitlines()
    print("\n".join(f"    {line}" for line in lines[: 12 if done.returncode == 0 else 20]), flush=True)


def parse(words: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the items, the settings, and the overrides in the words of a command line."""
    names, settings, overrides = list[str](), dict(SETTINGS), list[str]()
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in settings:
            settings[key] = value
        elif equals and key in OWN:
            raise SystemExit(f"{word}: the driver sets {key}. " + ("Use seeds=" if key == "seed" else "Remove it"))
        elif equals:
            overrides.append(word)
        elif word == "all":
            names += ITEMS
        elif word in ITEMS:
            names.append(word)
        else:
            raise SystemExit(f"{word} is not an item. Choose of {', '.join(ITEMS)} or all")
    for key, allowed in {"size": ("small", "paper"), "dry": ("true", "false")}.items():
        if settings[key] not in allowed:
            raise SystemExit(f"{key}={settings[key]}: must be one of {', '.join(allowed)}")
    if settings["seeds"] and not all(seed.isdecimal() for seed in settings["seeds"].split(",")):
        raise SystemExit(f"seeds={settings['seeds']}: must be numbers, as in seeds=0,1,2")
    if not settings["jobs"].isdecimal() or not int(settings["jobs"]):
        raise SystemExit(f"jobs={settings['jobs']}: must be a number of 1 or more")
    if not names:
        raise SystemExit(f"Name one or more of {', '.join(ITEMS)}, or all")
    return names, settings, overrides


def main(words: Sequence[str]) -> None:
    """Reproduce the items that are named."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    names, settings, overrides = parse(words)
    failed = [cell for name in names for cell in reproduce(name, settings, overrides) if cell.failed]
    if failed:
        raise SystemExit(f"{len({cell.row for cell in failed})} rows failed; see the table")


def read_results(folder: Path) -> Iterator[tuple[str, Path, list[Cell]]]:
    """Yield (size, README, cells) for the results in an item's folder."""
    for path in sorted(folder.glob("results-*.json")):
        cells = [Cell(**record) for record in json.loads(path.read_text())]
        yield path.stem.removeprefix("results-"), folder / "README.md", cells


if __name__ == "__main__":
    main(sys.argv[1:])
