"""The driver of the paper's tables: what it runs, what it writes, and that an interruption changes nothing."""

import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import reproduce
from experiments.cells import (
    PAPER,
    Cell,
    draw,
    fill,
    insert,
    list_assumptions,
    read_results,
    write_item,
    write_paper_table,
    write_table,
)
from experiments.estimates import list_downloads
from experiments.items import ITEMS, PAPER_ITEMS
from experiments.items.base import Column, Command, Item, Row, Table, evaluate, metric, record, select, summary, train
from experiments.items.hha import read_wins, share
from experiments.jobs import DONE, ROOT, Job, Runner, list_jobs, share_devices
from experiments.overrides import route
from experiments.stored import restore
from tests.helpers.models import saved, tiny_model

SFT = Row(label="SFT", stages={"train": train("experiment=x", "loss=sft"), "reward": evaluate("prompts=2")})
VAR = Row(label="SFT+VAR", stages={"train": train("experiment=x", "loss=var", "init={SFT}")})
BASE = Row(label="Base", stages={"reward": evaluate("prompts=2")})
GAIN = Column(title="gain", read=summary("validation.reward.gain"))
TABLE = Table(rows=(BASE, SFT, VAR), columns=(GAIN, Column(title="ess", read=summary("ess"), digits=2)))


def make_jobs(row: Row, base: Path, seed: int = 0, table: Table = TABLE, **more: Any) -> dict[str, Job]:
    return list_jobs(table, row, seed, base, more.get("overrides", {}))


def finish(job: Job, name: str = "run", **values: Any) -> None:
    """Write the result of a job."""
    path = job.folder / job.command.result.replace("*", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"commit": "c", "versions": {}, **values}))
    (job.folder / DONE).write_text('{"seconds": 2.0}')


def test_jobs_of_a_row_follow_those_that_they_need(tmp_path: Path) -> None:
    jobs = make_jobs(VAR, tmp_path, seed=3)
    first = jobs["train"].needs["SFT"]
    assert first.words[:4] == ["train.py", "experiment=x", "loss=sft", "seed=3"]
    assert "init=<SFT>" in jobs["train"].words
    finish(first, "sft-run")
    assert f"init={first.folder}/runs/sft-run" in jobs["train"].words
    assert jobs["train"].result is None
    assert jobs["train"].portable == ["python", *["train.py", "experiment=x", "loss=var", "init=sft-run", "seed=3"]]


def test_evaluation_without_a_training_run_has_no_initial_model(tmp_path: Path) -> None:
    base, own = make_jobs(BASE, tmp_path)["reward"], make_jobs(SFT, tmp_path)
    assert [word for word in base.words if word.startswith("init=")] == []
    assert "init=<run>" in own["reward"].words
    assert own["reward"].needs == {"run": own["train"]}
    assert [job.name for job in own["reward"].in_order()] == ["train-sft", "eval"]


def test_result_of_another_command_is_not_taken(tmp_path: Path) -> None:
    job = make_jobs(SFT, tmp_path)["train"]
    finish(job)
    assert job.result is not None
    longer = {("train", SFT.stages["train"]): ["trainer.max_steps=4"]}
    for other in (
        make_jobs(SFT, tmp_path, seed=1),
        make_jobs(SFT, tmp_path, overrides=longer),
        make_jobs(SFT, tmp_path, table=replace(TABLE, timed="train")),
    ):
        assert other["train"].result is None
    placed = {("train", SFT.stages["train"]): ["data.folder=/home/me/hha", "model.path=models/x"]}
    assert make_jobs(SFT, tmp_path, overrides=placed)["train"].portable[-2:] == [
        "data.folder=<path>",
        "model.path=models/x",
    ]
    # a changed run changes the folder of what continues it
    names = {
        make_jobs(VAR, tmp_path, overrides=more)["train"].folder
        for more in ({}, {("train", SFT.stages["train"]): ["trainer.max_steps=4"]})
    }
    assert len(names) == 2


def test_result_counts_only_after_its_command_has_ended(tmp_path: Path) -> None:
    job = make_jobs(SFT, tmp_path)["train"]
    finish(job)
    (job.folder / DONE).unlink()
    assert job.result is None


def test_timed_runs_have_their_own_annotations(tmp_path: Path) -> None:
    caches = set()
    for seed in (0, 1):
        words = make_jobs(SFT, tmp_path, seed, replace(TABLE, timed="train"))["train"].words
        caches.update(word for word in words if word.startswith("annotation_cache="))
    assert len(caches) == 2


def test_row_that_runs_once_serves_all_seeds(tmp_path: Path) -> None:
    judge = Row(label="judge", shown=False, once=True, stages={"train": train("loss=bradley_terry")})
    row = Row(label="VAR", stages={"reward": evaluate("reward.path={judge}")})
    table = Table(rows=(row, judge), columns=(), seeds=(0, 1))
    needed = [make_jobs(row, tmp_path, seed, table)["reward"].needs["judge"] for seed in (0, 1)]
    assert needed[0].folder == needed[1].folder


def fill_cell(row: Row, column: Column, jobs: dict[tuple[str, int], Job], failed: str = "", **more: Any) -> Cell:
    return fill(more.get("table", TABLE), row, column, jobs, more.get("seeds", (0, 1, 2)), failed)


def test_result_without_a_number_does_not_stop_the_driver(tmp_path: Path) -> None:
    """A judged evaluation with too many errors has no win rate, and one without verdicts has no fractions."""
    empty = {"win_rate": None, "se_prompts": None, "win": 0, "tie": 0, "loss": 0}
    job = make_jobs(SFT, tmp_path, 0)["train"]
    finish(job, "run0", win_rates={"average": None, "subsets": {"facts": empty}})
    jobs = {("SFT", 0): job}
    rate, part = Column(title="rate", read=read_wins()), share("facts", "win", "train")
    absent, failed = (fill_cell(SFT, column, jobs, seeds=(0,)) for column in (rate, part))
    assert (absent.value, absent.n, absent.failed) == (None, 0, "")
    assert failed.failed == "facts win cannot be read (ZeroDivisionError: float division by zero)"


def test_cell_has_the_mean_over_seeds_and_its_error(tmp_path: Path) -> None:
    jobs = {}
    for seed, gain in enumerate((0.1, 0.2, 0.6)):
        jobs["SFT", seed] = make_jobs(SFT, tmp_path, seed)["train"]
        values = {"validation": {"reward": {"gain": {"mean": gain, "se": 9.0}}}, "ess": None}
        finish(jobs["SFT", seed], f"run{seed}", **values)
    cell = fill_cell(SFT, GAIN, jobs)
    assert cell.value == pytest.approx(0.3)
    assert cell.se == pytest.approx((0.14 / 2 / 3) ** 0.5)
    assert (cell.n, cell.seeds, cell.runs, cell.seconds) == (3, [0, 1, 2], ["run0", "run1", "run2"], 6.0)
    assert cell.commands[1] == "python train.py experiment=x loss=sft seed=1"
    assert str(tmp_path) not in json.dumps(asdict(cell))
    assert fill_cell(SFT, GAIN, jobs, seeds=(0,)).se == 9.0  # over prompts
    absent = fill_cell(SFT, TABLE.columns[1], jobs)
    assert (absent.value, absent.failed) == (None, "")
    failed = fill_cell(VAR, GAIN, {}, "status 1: no data")
    text = write_table(TABLE, [cell, absent, failed], "small")
    assert "| SFT | 0.300 ± 0.153 | – |" in text
    assert "| SFT+VAR | failed | – |" in text
    assert "3 seeds; errors are over seeds." in text
    assert text.endswith("- SFT+VAR failed. status 1: no data")


def test_ratio_is_taken_at_each_seed(tmp_path: Path) -> None:
    column = Column(title="time / SFT's", read=summary("seconds"), ratio_to="SFT")
    jobs = {}
    for seed, (own, divisor) in enumerate(((2.0, 1.0), (8.0, 2.0))):
        for row, value in ((SFT, divisor), (VAR, own)):
            jobs[row.label, seed] = make_jobs(row, tmp_path, seed)["train"]
            finish(jobs[row.label, seed], seconds=value)
    cell = fill_cell(VAR, column, jobs, seeds=(0, 1))
    assert (cell.value, cell.se) == (3.0, 1.0)


def test_readers(tmp_path: Path) -> None:
    result = tmp_path / "summary.json"
    result.write_text(json.dumps({"a": {"b": {"mean": 2.0, "se_prompts": 0.5}}, "part": [], "text": "x"}))
    assert summary("a.b", scale=10)(result, SFT) == (20.0, 5.0)
    assert summary("text")(result, SFT) == "x"
    (tmp_path / "metrics.csv").write_text("step,validation/reward,validation/reward_se\n0,0.5,0.1\n4,,\n4,0.7,0.2\n")
    assert metric("validation/reward", 4)(result, SFT) == (0.7, 0.2)
    assert metric("validation/reward", 8)(result, SFT) is None
    records = [{"world": "a", "seed": i, "x": float(i)} for i in range(3)] + [{"world": "b", "seed": 0, "x": 9.0}]
    result.write_text(json.dumps({"part": records}))
    row = Row(label="row", where={"world": "a"})
    mean, error = record("part", "x")(result, row)
    assert (mean, error) == (1.0, pytest.approx((1 / 3) ** 0.5))
    assert record("part", "x", world="b")(result, Row(label="r")) == 9.0
    with pytest.raises(KeyError):
        record("part", "x", world="c")(result, Row(label="r"))


def test_select_hides_rows_that_are_only_continued() -> None:
    rows = select((SFT, VAR), "SFT+VAR")
    assert [(row.label, row.shown) for row in rows] == [("SFT+VAR", True), ("SFT", False)]
    assert "SFT |" not in write_table(Table(rows=rows, columns=(GAIN,)), [], "small")


def test_assumptions_are_those_of_the_experiments_and_losses() -> None:
    found = list_assumptions(["experiment=[table4,frontier]", "loss=var_own", "seed=1"])
    assert any("GRPO" in text for text in found)  # table4's own
    assert any("OffsetBias" in text for text in found)  # table1's, which it is based on
    assert sum("averaged over tokens" in text for text in found) == 1  # var's, named by table1 and by var_own
    assert list_assumptions(["loss=sft"]) == []
    row = Row(label="VAR", stages={"train": train("experiment=[table4,frontier]", "loss=var_own")})
    table, cells = Table(rows=(row,), columns=(GAIN,)), [Cell(table="", row="VAR", column="gain")]
    small, paper = (write_table(table, cells, size) for size in ("small", "paper"))
    assert "averaged over tokens" in small
    assert "GRPO" not in small
    assert "GRPO" in paper


def test_content_replaces_what_is_between_its_marks() -> None:
    text = "a\n<!-- t small -->\nold\n<!-- end of t small -->\nb\n"
    assert insert(text, "t small", "new") == "a\n<!-- t small -->\nnew\n<!-- end of t small -->\nb\n"
    assert insert("a\n", "t small", "new") == "a\n"
    with pytest.raises(ValueError, match="is not followed by <!-- end of t small -->"):
        insert("a\n<!-- t small -->\nold\nb\n", "t small", "new")


def test_words_are_items_settings_and_overrides() -> None:
    assert reproduce.parse(["table7", "size=paper", "loss.temperature=2"])[0] == ["table7"]
    _, settings, overrides = reproduce.parse(["all", "jobs=2", "trainer.max_steps=4", "~loss.x"])
    assert (settings["jobs"], overrides) == ("2", ["trainer.max_steps=4", "~loss.x"])
    for words, message in (
        (["table0"], "table0 is not an item"),
        (["table7", "seed=3"], "Use seeds="),
        (["table7", "dry=True"], "must be one of true, false"),
        (["table7", "jobs=0"], "jobs=0"),
        (["table7", "tflops=x"], "tflops=x"),
        (["size=small"], "Name one or more"),
    ):
        with pytest.raises(SystemExit, match=message):
            reproduce.parse(words)


def test_overrides_go_where_their_key_is() -> None:
    stages = [("train", train("data=hha", "loss=var")), ("reward", evaluate("data=hha", "reward=sentiment"))]
    words = ["data.folder=x", "trainer.max_steps=3", "reward:prompts=5"]
    routed = route(stages, words)
    assert routed[stages[0]] == ["data.folder=x", "trainer.max_steps=3"]
    assert routed[stages[1]] == ["data.folder=x", "reward:prompts=5".partition(":")[2]]
    with pytest.raises(SystemExit) as found:
        route(stages, ["trainer.max_stepz=3", "judged=no"])
    assert "data.folder= is needed" in str(found.value)
    assert "trainer.max_stepz=3: no command has this key" in str(found.value)
    with pytest.raises(SystemExit, match=r"trainer\.max_steps"):
        route(stages, ["data.folder=x", "trainer.max_steps=many"])


@pytest.mark.parametrize("size", ["small", pytest.param("paper", marks=pytest.mark.long)])
def test_every_command_of_every_item_composes(size: str) -> None:
    """Also those that a command line has to complete, with data that is not here."""
    stages = [
        stage
        for item in ITEMS.values()
        for table in item.sizes.get(size, ())
        for row in table.rows
        for stage in row.stages.items()
    ]
    folders = {name for name, command in stages if "data=hha" in " ".join(command.words)}
    assert folders
    more = ["chat:data.path=x"] if size == "small" else []
    route(list(dict.fromkeys(stages)), ["data.folder=x", "benchmarks.folder=x", *more])


def test_every_item_has_both_sizes_and_columns_of_its_stages() -> None:
    assert len(PAPER_ITEMS) == 15
    for name, item in ITEMS.items():
        assert set(item.sizes) == ({"small", "paper"} if name in PAPER_ITEMS else {"small"})
        for table in (table for tables in item.sizes.values() for table in tables):
            names = [row.name for row in table.rows if row.shown]
            assert len(names) == len(set(names))
            for column in table.columns:
                assert any(column.stage in row.stages for row in table.rows), column.title
            for row in table.rows:  # what they need exists
                list_jobs(table, row, 0, Path("x"), {})


def test_rows_and_columns_at_the_papers_size_are_the_papers() -> None:
    known = yaml.safe_load(PAPER.read_text())
    for name, paper in known.items():
        (table,) = ITEMS[name].sizes["paper"]
        rows = [row.name.replace("-Instruct", "") for row in table.rows if row.shown]
        if name not in ("table8", "table9"):
            assert rows == list(paper["rows"]), name
        if name in ("table1", "table2", "table5", "table6", "table7"):
            assert [column.title for column in table.columns] == paper["columns"], name
        for row in paper["rows"].values():
            assert len(row) == len(paper["columns"]), name


def test_jobs_at_once_share_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert share_devices(2) == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "1,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert share_devices(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert share_devices(1) == [{}]


def program(text: str, *words: str, result: str = "result.json") -> Command:
    return Command(("-c", text), words, result)


WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1], 'result.json').write_text('{}')"


def test_runner_runs_what_is_missing_once(tmp_path: Path) -> None:
    count = f"{WRITE}; pathlib.Path(sys.argv[1], 'count').open('a').write('x')"
    shared = Row(label="shared", stages={"train": program(count, "{own}")})
    rows = [Row(label=f"row {i}", stages={"reward": program(WRITE, "{own}", f"{i}", "{shared}")}) for i in range(4)]
    table = Table(rows=(shared, *rows), columns=())
    jobs = [list_jobs(table, row, 0, tmp_path, {})["reward"] for row in rows]
    for _ in range(2):
        runner = Runner(3)
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(runner.run, jobs)) == [""] * 4
    assert (jobs[0].needs["shared"].folder / "count").read_text() == "x"
    assert all(job.result for job in jobs)


@pytest.mark.parametrize("timed", ["train", ""])
def test_interrupted_run_starts_again_if_it_is_timed(timed: str, tmp_path: Path) -> None:
    table = Table(rows=(row := Row(label="a", stages={"train": program(WRITE, "{own}")}),), columns=(), timed=timed)
    job = list_jobs(table, row, 0, tmp_path, {})["train"]
    for name in ("runs", "annotations"):
        (job.folder / name).mkdir(parents=True)
    (job.folder / "seconds.txt").write_text("100.0\n")
    assert Runner().run(job) == ""
    assert [(job.folder / name).exists() for name in ("runs", "annotations")] == [not timed] * 2
    assert (job.seconds < 100) == bool(timed)


RUN = """
import json, pathlib, sys
run = pathlib.Path(sys.argv[1], "runs", "a")
(run / "model").mkdir(parents=True)
(run / "model" / "weights").write_text("large")
gain = {"validation": {"reward": {"gain": {"mean": float(sys.argv[2]), "se": 0.1}}}}
(run / "summary.json").write_text(json.dumps({"folder": str(run.resolve()), **gain}))
"""


@pytest.fixture
def stored_item(monkeypatch: pytest.MonkeyPatch) -> Item:
    """An item whose runs are stored, of two rows with two seeds."""
    run = "import sys; exec(sys.argv.pop(1))"
    rows = tuple(
        Row(
            label=f"row {i}",
            stages={"train": program(run, RUN, "{own}", f"{i}.{{seed}}", result="runs/*/summary.json")},
        )
        for i in range(2)
    )
    item = Item(title="t", sizes={"small": (Table(rows=rows, columns=(GAIN,), seeds=(1, 2), stored=True),)})
    monkeypatch.setitem(ITEMS, "test", item)
    return item


def test_tables_are_made_from_stored_runs(stored_item: Item, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reproduce.main(["test", f"folder={tmp_path}/first", f"out={tmp_path}/out"])
    out = tmp_path / "out" / "test"
    results, archive = (out / "results-small.json").read_bytes(), (out / "runs-small.tar.xz").read_bytes()
    assert not list((tmp_path / "first").rglob("weights"))
    for name in ("summary.json", DONE):  # no places on this machine
        with tarfile.open(out / "runs-small.tar.xz") as found:
            member = next(member for member in found if member.name.endswith(name))
            assert str(tmp_path).encode() not in found.extractfile(member).read()  # type: ignore[union-attr]
    capsys.readouterr()
    again = ["test", f"folder={tmp_path}/second", f"out={tmp_path}/out"]
    reproduce.main([*again, "stored=true"])
    assert "started" not in capsys.readouterr().out
    assert (out / "results-small.json").read_bytes() == results
    assert (out / "runs-small.tar.xz").read_bytes() == archive
    (tmp_path / "second" / "small").rename(tmp_path / "elsewhere")
    reproduce.main(again)
    assert capsys.readouterr().out.count("started") == 4


def test_stored_runs_do_not_replace_finished_ones(stored_item: Item, tmp_path: Path) -> None:
    reproduce.main(["test", f"folder={tmp_path}", f"out={tmp_path}/out"])
    path = next((tmp_path / "small").glob("*/runs/a/summary.json"))
    path.write_text(json.dumps({"validation": {"reward": {"gain": {"mean": 7.0}}}}))
    reproduce.main(["test", f"folder={tmp_path}", f"out={tmp_path}/out", "stored=true"])
    assert json.loads(path.read_text())["validation"]["reward"]["gain"]["mean"] == 7.0


def test_rows_with_missing_runs_are_left_out_if_nothing_is_started(stored_item: Item, tmp_path: Path) -> None:
    first, second = stored_item.sizes["small"][0].rows
    for row, seed in ((first, 1), (first, 2), (second, 1)):
        job = list_jobs(stored_item.sizes["small"][0], row, seed, tmp_path / "small", {})["train"]
        assert Runner().run(job) == ""
    reproduce.main(["test", f"folder={tmp_path}", f"out={tmp_path}/out", "start=false"])
    (cell,) = next(read_results(tmp_path / "out" / "test"))[1]
    assert (cell.row, cell.seeds, cell.value) == ("row 0", [1, 2], pytest.approx(0.15))


def test_stored_runs_are_continued_by_no_other() -> None:
    """Their models are removed."""
    stored, needed = set(), set()
    for item in ITEMS.values():
        for table in item.sizes["small"]:
            for row in table.rows:
                jobs = list_jobs(table, row, 0, Path("x"), {})
                needed |= {one.folder for job in jobs.values() for one in job.needs.values()}
                if table.stored:
                    stored |= {job.folder for job in jobs.values()}
    assert stored
    assert not stored & needed


def test_archive_keeps_runs_that_are_not_here(stored_item: Item, tmp_path: Path) -> None:
    reproduce.main(["test", f"folder={tmp_path}/first", f"out={tmp_path}/out", "seeds=1"])
    reproduce.main(["test", f"folder={tmp_path}/second", f"out={tmp_path}/out", "seeds=2"])
    reproduce.main(["test", f"folder={tmp_path}/third", f"out={tmp_path}/out", "start=false"])
    cells = next(read_results(tmp_path / "out" / "test"))[1]
    assert [(cell.row, cell.seeds) for cell in cells] == [("row 0", [1, 2]), ("row 1", [1, 2])]


def test_hostile_archive_writes_only_results_of_its_jobs(stored_item: Item, tmp_path: Path) -> None:
    job = list_jobs(stored_item.sizes["small"][0], stored_item.sizes["small"][0].rows[0], 1, tmp_path / "small", {})
    folder = job["train"].folder.name
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        for name in (f"{folder}/../../summary.json", f"{folder}/runs/a/train.py", "other/done.json", "/summary.json"):
            archive.addfile(tarfile.TarInfo(name))
    restore(tmp_path / "a.tar.xz", job.values())
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.xz"]


def test_command_runs_while_others_wait_for_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once. Both rows that come first need a slow command, and the third does not."""
    slow = Row(label="slow", shown=False, stages={"train": program(f"import time; time.sleep(5); {WRITE}", "{own}")})
    rows = [Row(label=f"row {i}", stages={"reward": program(WRITE, "{own}", f"{i}", "{slow}")}) for i in range(2)]
    free = Row(label="free", stages={"reward": program(WRITE, "{own}", "free")})
    item = Item(title="t", sizes={"small": (Table(rows=(slow, *rows, free), columns=()),)})
    monkeypatch.setitem(ITEMS, "test", item)
    reproduce.main(["test", "jobs=2", f"folder={tmp_path}", f"out={tmp_path}/out"])
    done = sorted((tmp_path / "small").glob(f"*/{DONE}"), key=lambda path: path.stat().st_mtime)
    assert ["free" in path.read_text() for path in done] == [True, False, False, False]
    assert "sleep" in done[1].read_text()


def test_error_while_results_are_written_starts_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first item fails to be published while a command of the second one runs. Two more of its commands wait."""
    slow = f"import time; time.sleep(5); {WRITE}"
    rows = [Row(label=f"row {i}", stages={"train": program(slow if i else WRITE, "{own}", str(i))}) for i in range(4)]
    for name, several in (("first", rows[:1]), ("second", rows[1:])):
        item = Item(title="t", sizes={"small": (Table(rows=tuple(several), columns=()),)})
        monkeypatch.setitem(ITEMS, name, item)

    def fail(*_: Any) -> None:
        while len(list((tmp_path / "small").glob("*/output.log"))) < 2:  # the second item's first command has not begun
            time.sleep(0.01)
        raise ZeroDivisionError

    folders = [f"folder={tmp_path}", f"out={tmp_path}/out"]
    reproduce.main(["first", *folders])  # threads start in any order, so a command of the second item could run before
    monkeypatch.setattr(reproduce, "publish", fail)
    with pytest.raises(ZeroDivisionError):
        reproduce.main(["first", "second", *folders])
    assert len(list((tmp_path / "small").glob(f"*/{DONE}"))) == 2


def test_column_may_pool_the_seeds(tmp_path: Path) -> None:
    def read(paths: Any, row: Row) -> tuple[float, float] | None:
        values = [json.loads(path.read_text())["x"] for path in paths]
        return None if values == [0.0] else (max(values), 0.5)

    jobs = {}
    for seed, value in enumerate((1.0, 4.0, 0.0)):
        jobs["SFT", seed] = make_jobs(SFT, tmp_path, seed)["train"]
        finish(jobs["SFT", seed], x=value)
    hidden = Column(title="largest", pool=read, shown=False)
    cell = fill_cell(SFT, hidden, jobs, seeds=(0, 1))
    assert (cell.value, cell.se, cell.n, cell.seeds) == (4.0, 0.5, 2, [0, 1])
    assert fill_cell(SFT, hidden, jobs, seeds=(2,)).value is None
    assert "largest" not in write_table(Table(rows=(SFT,), columns=(hidden, GAIN)), [cell], "small")
    pooled = Column(title="all", pool=lambda paths, row, others: (len(paths), json.loads(others[0].read_text())["x"]))
    cell = fill(TABLE, SFT, pooled, jobs, (0, 1), "", [jobs["SFT", 2]])
    assert (cell.value, cell.se, cell.n, cell.seeds, len(cell.commands)) == (2, 0.0, 2, [0, 1], 3)
    failed = fill_cell(SFT, Column(title="y", pool=lambda paths, row: [][0]), jobs)
    assert failed.failed == "y cannot be read (IndexError: list index out of range)"


def test_failed_command_fails_what_needs_it(tmp_path: Path) -> None:
    bad = Row(label="bad", stages={"train": program("raise SystemExit('no such data')", "{own}")})
    row = Row(label="row", stages={"reward": program(WRITE, "{own}", "{bad}")})
    silent = Row(label="silent", stages={"train": program("", "{own}")})
    table = Table(rows=(bad, row, silent), columns=())
    jobs = [*list_jobs(table, row, 0, tmp_path, {}).values(), *list_jobs(table, silent, 0, tmp_path, {}).values()]
    reasons = list(map(Runner().run, jobs))
    assert reasons[0] == "bad failed: status 1: no such data"
    assert reasons[1].startswith("status 0")  # it has written no result


def test_failed_row_is_in_the_table_and_others_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Row(label="bad", stages={"train": program("raise SystemExit('no such data')", "{own}")})
    good = Row(label="good", stages={"train": program(WRITE.replace("{}", '{"x": 0.5}'), "{own}")})
    column = Column(title="x", read=summary("x"), panel="x")
    item = Item(title="t", sizes={"small": (Table(rows=(bad, good), columns=(column,)),)})
    monkeypatch.setitem(ITEMS, "test", item)
    with pytest.raises(SystemExit, match="1 rows failed"):
        reproduce.main(["test", f"folder={tmp_path}", f"out={tmp_path}/out"])
    ((_, cells),) = read_results(tmp_path / "out" / "test")
    assert [(cell.value, cell.failed) for cell in cells] == [(None, "status 1: no such data"), (0.5, "")]
    assert (tmp_path / "out" / "test" / "test-small.png").stat().st_size > 1000


def test_figures_have_lines_or_bars(tmp_path: Path) -> None:
    rows = (Row(label="a"), Row(label="b"))
    lines = tuple(Column(title=f"at {x}", read=summary("x"), panel="y", x=x) for x in (2, 4))
    bars = tuple(Column(title=f"bar {x}", read=summary("x"), panel="z") for x in (2, 4))
    table = Table(rows=rows, columns=lines + bars)
    cells = [Cell("", row.label, column.title, value=1.0, se=0.1) for row in rows for column in table.columns]
    named = Column(title="path", read=summary("x"), panel="y", x="at 2")
    curves = replace(table, columns=(*lines, named))
    draw(curves, [*cells, Cell("", "a", "path", value=2.0, se=0.1)], tmp_path / "figure.png")
    draw(curves, [Cell("", "a", "path", value=2.0, se=0.1)], tmp_path / "figure.png")  # its x is missing
    draw(table, cells[:-1], tmp_path / "figure.png")
    first = (tmp_path / "figure.png").read_bytes()
    draw(table, cells, tmp_path / "figure.png")
    assert first != (tmp_path / "figure.png").read_bytes()


def test_downloads_have_their_licences() -> None:
    found = list_downloads(train("experiment=table2", "model=qwen2.5-3b", "loss=var"))
    assert "not commercial" in found["Qwen/Qwen2.5-3B"]
    assert found["NCSOFT/offsetbias"] == "bsd-3-clause"
    assert "gated" in list_downloads(train("experiment=table1"))["meta-llama/Llama-3.2-1B"]
    assert list_downloads(train("experiment=frontier")) == {}


@pytest.mark.parametrize("name", ITEMS)
def test_published_tables_are_made_from_their_results(name: str) -> None:
    folder = ROOT / "experiments" / name
    text = (folder / "README.md").read_text()
    for size, cells in read_results(folder):
        assert f"<!-- {name} {size} -->" in text
        assert insert(text, f"{name} {size}", write_item(name, ITEMS[name], size, cells)) == text
        assert not [cell for cell in cells if cell.failed]
    if paper := write_paper_table(name):
        assert "<!-- arXiv 2502.11026 -->" in text
        assert insert(text, "arXiv 2502.11026", paper) == text


def miniature(model: Path, folder: Path, data: Path) -> list[str]:
    """Return overrides that make every item small: each goes to the commands that have its key."""
    return [
        f"model.path={model}", "train:trainer.max_steps=2", "data.validation_prompts=4", "data.source.problems=24",
        "train:data.limit=40", "generate.max_new_tokens=32", "data.on_template_change=count", f"data.folder={data}",
        "prompts=2", "seeds=0", "reward.max_length=4096",
        "variance:generate.responses=4", "variance:generate.max_new_tokens=200", "variance:data.source.problems=8",
        f"benchmarks.folder={data}", "benchmarks.limit=2", "benchmarks.max_new_tokens=4",
        f"chat:data.path={data}/chat.jsonl",
        *(f"{key}={folder}/{key}" for key in ("folder", "out", "cache", "annotation_cache")),
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", ITEMS)
def test_miniature_of_every_item_runs_end_to_end(name: str, real_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in real_data.iterdir():
        (data / path.name).symlink_to(path)
    answers = [{"text": text, "score": score} for text, score in (("yes", 0.9), ("no", 0.1))]
    rows = [{"id": str(i), "prompt": f"question {i}", "ordered": True, "responses": answers} for i in range(3)]
    (data / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = saved(tmp_path / "model", tiny_model(max_position_embeddings=8192))  # it reads bytes
    words = list_words(name, model, tmp_path, data)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.reproduce", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ((size, cells),) = read_results(tmp_path / "out" / name)
    assert size == "small"
    assert all(cell.commands and cell.seconds > 0 for cell in cells)
    tables = ITEMS[name].sizes["small"]
    expected = sum(column.stage in row.stages for t in tables for row in t.rows if row.shown for column in t.columns)
    assert len(cells) == expected
    with_values = {(cell.table, cell.row) for cell in cells if cell.value is not None}
    assert with_values == {(cell.table, cell.row) for cell in cells}  # Figure 2 has columns after the last step
    figures = sum(any(column.panel for column in table.columns) for table in tables)
    assert len(list((tmp_path / "out" / name).glob("*.png"))) == figures


def list_words(name: str, *places: Path) -> list[str]:
    """Return the words of an item's miniature, without overrides of which none of its commands has the key."""
    words = miniature(*places)
    stages = [stage for t in ITEMS[name].sizes["small"] for row in t.rows for stage in row.stages.items()]
    try:
        route(list(dict.fromkeys(stages)), reproduce.parse([name, *words])[2], dry=True)
    except SystemExit as error:
        absent = re.findall(r"^(.*): no command has this key", str(error), re.M)
        words = [word for word in words if word not in absent]
    return [name, *words]


@pytest.mark.long
def test_killed_driver_gives_the_same_results(tiny_folder: Path, tmp_path: Path) -> None:
    """Killed three times at random; only the seconds differ."""
    draw_time, place = random.Random(0), tmp_path / "place"
    words = list_words("table2", tiny_folder, place, tmp_path)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "experiments.reproduce", *words], cwd=ROOT)

    def read() -> list[dict[str, Any]]:
        records = json.loads((place / "out" / "table2" / "results-small.json").read_text())
        return [{key: value for key, value in entry.items() if key != "seconds"} for entry in records]

    assert start().wait() == 0
    straight = read()
    place.rename(tmp_path / "straight")
    for _ in range(3):
        process = start()
        time.sleep(draw_time.uniform(5, 30))
        process.kill()
        process.wait()
    assert start().wait() == 0  # waits for the commands that a killed driver left
    assert read() == straight


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["submitit_local"])
def test_commands_run_by_a_launcher_of_hydra(launcher: str, tiny_folder: Path, tmp_path: Path) -> None:
    """As on SLURM: each command is a job that the launcher starts. eval.py and train.py have the same keys for it."""
    words = list_words("table2", tiny_folder, tmp_path, tmp_path)
    command = [sys.executable, "-m", "experiments.reproduce", f"launcher={launcher}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ((_, cells),) = read_results(tmp_path / "out" / "table2")
    assert all(cell.value is not None for cell in cells)
