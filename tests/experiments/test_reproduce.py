"""The driver of the paper's tables: what it runs, what it writes, and that an interruption changes nothing."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from experiments import reproduce
from experiments.items import ITEMS, Column, Item, Row, Size
from experiments.reproduce import (
    ROOT,
    Stage,
    fill,
    insert,
    list_assumptions,
    make_stages,
    parse,
    read_results,
    write_table,
)

SIZE = Size(
    words=("experiment=x",),
    rows=(
        Row(label="SFT", words=("loss=sft",)),
        Row(label="SFT + VAR", words=("loss=var",), init="SFT", paper=("1.5",)),
    ),
    columns=(Column(title="gain", path="validation.reward.gain"), Column(title="ess", path="ess", digits=2)),
    evaluation=("judge=reward",),
)
ITEM = Item(title="a table", paper_columns=("gain",), sizes={"small": SIZE})


def finish(stage: Stage, name: str, **values: Any) -> None:
    """Write the result of a stage."""
    run = stage.folder / "runs" / name
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"commit": "c", "versions": {}, **values}))


def test_stages_of_a_row_follow_each_other(tmp_path: Path) -> None:
    train, evaluation = make_stages(SIZE, SIZE.rows[1], 3, tmp_path, ["a=1"])
    assert train.after is not None
    assert train.after.command[:5] == ("train.py", "experiment=x", "loss=sft", "seed=3", "a=1")
    assert "init=<its run>" in train.arguments
    finish(train.after, "sft-run")
    assert f"init={train.after.folder}/runs/sft-run" in train.arguments
    assert train.result is None
    finish(train, "var-run")
    assert evaluation.arguments[:2] == ["eval.py", f"init={train.folder}/runs/var-run"]


def test_result_of_another_command_is_not_taken(tmp_path: Path) -> None:
    row = SIZE.rows[0]
    short = make_stages(SIZE, row, 0, tmp_path, ["trainer.max_steps=4"])[0]
    finish(short, "run")
    assert short.result is not None
    assert make_stages(SIZE, row, 0, tmp_path, [])[0].result is None
    assert (
        make_stages(replace(SIZE, words=("experiment=y",)), row, 0, tmp_path, ["trainer.max_steps=4"])[0].result is None
    )
    first, other = (make_stages(replace(SIZE, timed=True), row, seed, tmp_path, [])[0] for seed in (0, 1))
    caches = {word for stage in (first, other) for word in stage.arguments if word.startswith("annotation_cache=")}
    assert len(caches) == 2  # so that sampling counts in each


def test_cell_has_the_mean_over_seeds_and_its_error(tmp_path: Path) -> None:
    row, stages = SIZE.rows[0], []
    for seed, gain in enumerate((0.1, 0.2, 0.6)):
        train = make_stages(SIZE, row, seed, tmp_path, [])[0]
        finish(train, f"run{seed}", validation={"reward": {"gain": {"mean": gain, "se": 9.0}}}, ess=None)
        stages.append((seed, [train]))
    cell = fill(row, SIZE.columns[0], stages, "")
    assert cell.value == pytest.approx(0.3)
    assert cell.se == pytest.approx((0.14 / 2 / 3) ** 0.5)
    assert (cell.n, cell.seeds, cell.runs) == (3, [0, 1, 2], ["run0", "run1", "run2"])
    assert cell.commands[1] == "python train.py experiment=x loss=sft seed=1"
    assert str(tmp_path) not in json.dumps(asdict(cell))
    assert fill(row, SIZE.columns[0], stages[:1], "").se == 9.0  # over prompts
    absent = fill(row, SIZE.columns[1], stages, "")
    assert (absent.value, absent.failed) == (None, "")
    failed = fill(SIZE.rows[1], SIZE.columns[0], [], "status 1: no data")
    table = write_table(ITEM, SIZE, [cell, absent, failed])
    assert "| SFT | 0.300 ± 0.153 | – | – |" in table
    assert "| SFT + VAR | failed | – | 1.5 |" in table
    assert table.endswith("- SFT + VAR failed. status 1: no data")


def test_assumptions_are_those_of_the_experiments_and_losses() -> None:
    found = list_assumptions(["experiment=[table4,frontier]", "loss=var_own", "seed=1"])
    assert any("GRPO" in text for text in found)  # table4's own
    assert any("OffsetBias" in text for text in found)  # table1's, which it is based on
    assert sum("averaged over tokens" in text for text in found) == 1  # var's, named by table1 and by var_own
    assert list_assumptions(["loss=sft"]) == []


def test_table_replaces_what_is_between_its_marks() -> None:
    text = "a\n<!-- t small -->\nold\n<!-- end of t small -->\nb\n"
    assert insert(text, "t small", "new") == "a\n<!-- t small -->\nnew\n<!-- end of t small -->\nb\n"
    assert insert("a\n", "t small", "new") == "a\n"


def test_words_are_items_settings_and_overrides() -> None:
    assert parse(["table7", "size=paper", "loss.temperature=2"])[0] == ["table7"]
    _, settings, overrides = parse(["all", "jobs=2", "trainer.max_steps=4"])
    assert (settings["jobs"], overrides) == ("2", ["trainer.max_steps=4"])
    with pytest.raises(SystemExit, match="table0 is not an item"):
        parse(["table0"])
    with pytest.raises(SystemExit, match="Use seeds="):
        parse(["table7", "seed=3"])
    with pytest.raises(SystemExit, match="must be one of true, false"):
        parse(["table7", "dry=True"])
    with pytest.raises(SystemExit, match="jobs=0"):
        parse(["table7", "jobs=0"])
    with pytest.raises(SystemExit, match="Name one or more"):
        parse(["size=small"])


def test_failed_row_is_in_the_table_and_others_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(
        words=(), rows=(Row(label="bad", words=("loss=none",)), Row(label="good", words=())), columns=SIZE.columns[:1]
    )
    monkeypatch.setitem(ITEMS, "test", Item(title="t", paper_columns=(), sizes={"small": size}))
    good = make_stages(size, size.rows[1], 0, tmp_path / "small" / "test", [])[0]
    finish(good, "run", validation={"reward": {"gain": {"mean": 0.5, "se": 0.1}}})
    with pytest.raises(SystemExit, match="1 rows failed"):
        reproduce.main(["test", f"folder={tmp_path}", f"out={tmp_path}/out"])
    ((_, _, cells),) = read_results(tmp_path / "out" / "test")
    assert [bool(cell.failed) for cell in cells] == [True, False]
    assert "loss" in cells[0].failed
    assert cells[1].value == 0.5


@pytest.mark.parametrize("name", ITEMS)
def test_published_tables_are_made_from_their_results(name: str) -> None:
    for size, readme, cells in read_results(ROOT / "experiments" / name):
        text = readme.read_text()
        assert f"<!-- {name} {size} -->" in text
        assert insert(text, f"{name} {size}", write_table(ITEMS[name], ITEMS[name].sizes[size], cells)) == text


MINIATURE = [
    "data=arithmetic", "data.source.problems=24", "data.validation_prompts=4", "generate.max_new_tokens=6",
    "eval.sampling.max_new_tokens=6", "trainer.max_steps=2", "data.on_template_change=count", "reward=near_number",
    "strategy=auto",
]  # fmt: skip


@pytest.mark.long
def test_killed_driver_gives_the_same_results(tiny_folder: Path, tmp_path: Path) -> None:
    """Killed twice at a random time; seconds and commands differ, as folders do."""
    draw = random.Random(0)

    def command(name: str) -> list[str]:
        places = [f"{key}={tmp_path}/{name}/{key}" for key in ("folder", "out", "cache", "annotation_cache")]
        own = [*MINIATURE, f"model.path={tiny_folder}", *places]
        return [sys.executable, "-m", "experiments.reproduce", "table7", *own]

    def start(name: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command(name), cwd=ROOT, env=environment)

    assert start("straight").wait() in (0, 1)
    for _ in range(2):
        process = start("killed")
        time.sleep(draw.uniform(5, 25))
        process.kill()
        process.wait()
        time.sleep(3)  # its run ends with it, and saves
    assert start("killed").wait() in (0, 1)
    found = []
    for name in ("straight", "killed"):
        records = json.loads((tmp_path / name / "out" / "table7" / "results-small.json").read_text())
        found.append([{k: v for k, v in record.items() if k != "commands"} for record in records])
    assert found[0] == found[1]
    assert sum(record["value"] is not None for record in found[0]) > 10
