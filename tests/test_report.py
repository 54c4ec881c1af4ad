"""report.py: runs and evaluations in, tables, figures and pages out, and what is no run told by name."""

import csv
import html.parser
import io
import json
import logging
import math
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.e2e.test_commands import run
from var.report import figures, tables
from var.report.page import page, warnings
from var.report.read import Estimate, Group, Run, find, grouped
from var.report.tables import Table
from var.report.write import write_pages
from var.utils.console import warn


def fake(
    folder: Path, *overrides: str, seed: int = 0, after: float = 0.3, answers: list[list[float]] | None = None,
    text: str = "4", facts: dict[str, Any] | None = None, **top: Any,
) -> Path:  # fmt: skip
    """A run's folder as train.py leaves it, as far as reports read it. answers: rewards after, of each prompt."""
    loss = {key.removeprefix("loss."): value for key, value in (line.split("=") for line in overrides)}
    (folder / ".hydra").mkdir(parents=True)
    lines = "".join(f"- {line}\n" for line in [*overrides, f"seed={seed}", f"runs={folder.parent}"])
    (folder / ".hydra" / "overrides.yaml").write_text(lines)
    mean = {"mean": 0.1, "se": 0.02}
    summary = {
        "title": "tiny, arithmetic, var", "folder": str(folder), "reward": after, "steps": 2, "skipped_steps": 0,
        "validation": {
            "reward": {"before": mean, "after": {"mean": after, "se": 0.03}, "gain": {"mean": after - 0.1, "se": 0.04}},
            "length": {"before": {"mean": 9.0, "se": 1.0}, "after": {"mean": 7.0, "se": 1.0}},
            "truncated": {"before": 0.0, "after": 0.1},
            "kl": {"mean": 10 * after, "se": 0.2}, "win_rate": {"mean": 0.6, "se": 0.02},
            "judge": {"win": 5, "tie": 1, "loss": 2, "error": 0, "win_rate": 62.5, "se_prompts": 10.0, "reason": None},
        },
        "tokens_per_second": 100.0, "ess": 0.5, "data": {"rows": 8, **(facts or {})},
        "seconds": {"annotating": 1.0, "training": 2.0, "evaluating": 3.0},
        "hashes": {"plan": "p", "weights": "w"}, "seeds": {"run": seed}, "versions": {"torch": "2.13"},
        "config": {"seed": seed, "runs": str(folder.parent), "loss": loss, "trainer": {"ess_warning": 0.25}}, **top,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "metrics.csv").open("w") as file:
        file.write("step,train/loss,train/weight/ess,validation/reward,validation/reward_se\n")
        file.write(f"0,,,0.1,0.02\n1,2.0,0.2,,\n2,{1.0 + seed},0.6,{after},0.03\n")
    answers = answers or [[after, after]] * 3
    with (folder / "samples.jsonl").open("w") as file:
        for i, rewards in enumerate(answers):
            side = {"texts": [text] * len(rewards), "lengths": [1] * len(rewards)}
            record = {"id": f"r{i}", "prompt": [{"role": "user", "content": f"{i}?"}], "answer": "4"}
            before, later = side | {"rewards": [0.1] * len(rewards)}, side | {"rewards": rewards}
            file.write(json.dumps({**record, "before": before, "after": later}) + "\n")
    np.savez(
        folder / "plan.npz", micro=np.array([[2, 0], [1, -1]]), tokens=np.array([3, 1]), row=np.array([7, 8, 9]),
        weight=np.array([0.5, 2.0, 0.5]),
    )  # fmt: skip
    return folder


def fake_evaluation(folder: Path, answers: list[list[float]] | None = None, reward: str = "one") -> Path:
    """answers: rewards of each prompt's answers."""
    part = {
        "reward": {"mean": 0.5, "se_seeds": 0.1, "se_prompts": 0.2}, "kl": {"mean": 1.0, "se_prompts": None},
        "length": {"mean": 12.0, "se": 1.5},
    }  # fmt: skip
    game = {"win": 3, "tie": 2, "loss": 1, "error": 0, "win_rate": 50.0, "se_prompts": 9.0}
    result = {
        "title": "one on 100% of it", "model": {"subsets": {"hard": part}, "averages": {}},
        "against_reference": {"reward": {"hard": {"gain": {"mean": 0.25, "se_prompts": 0.05}}}},
        "win_rates": {"subsets": {}, "all": game},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(
        json.dumps(result | {"depends_on": {"rewards": {"reward": {"program": reward}}}})
    )
    with (folder / "answers.jsonl").open("w") as file:
        for i, rewards in enumerate(answers or []):
            record = {"subset": "hard", "prompt": f"{i}?", "model": [{"text": "x", "reward": r} for r in rewards]}
            file.write(json.dumps(record) + "\n")
    return folder


def reported(*arguments: str | Path) -> str:
    """What report.py prints."""
    done = run("report.py", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what is found


def test_what_is_no_finished_run_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    fake(tmp_path / "runs" / "a")
    fake_evaluation(tmp_path / "runs" / "deeper" / "e")
    (tmp_path / "runs" / "begun" / ".hydra").mkdir(parents=True)
    (tmp_path / "runs" / "empty").mkdir()
    fake(tmp_path / "runs" / "cut")
    (tmp_path / "runs" / "cut" / "summary.json").write_text('{"title": "tiny')
    fake(tmp_path / "runs" / "other")
    (tmp_path / "runs" / "other" / "summary.json").write_text("[1]")
    (tmp_path / "file").write_text("")
    found = find([tmp_path / "runs", tmp_path / "runs" / "a", tmp_path / "nowhere", tmp_path / "file"])
    assert [run.name for run in found.runs] == ["a"]  # once, though asked for twice
    assert [one.folder.name for one in found.evaluations] == ["e"]
    told = {Path(line.split(": ")[0]).name: line.split(": ", 1)[1] for line in found.problems}
    assert told["begun"].startswith("not finished")
    assert told["empty"] == "no run, no evaluation"
    assert told["cut"].startswith("its summary.json cannot be used (JSONDecodeError")
    assert told["other"].startswith("its summary.json cannot be used (TypeError")
    assert told["nowhere"] == "there is no such folder"
    assert told["file"] == "a file, no folder"
    assert len(found.problems) == 6


def test_nothing_to_report_is_one_error_that_says_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("report.py", f"{tmp_path}/empty", "--out", f"{tmp_path}/out")
    assert done.returncode == 1
    told = f"Error: nothing to report: no finished run, no evaluation\n  {tmp_path}/empty: no run, no evaluation\n"
    assert done.stderr == told
    assert not (tmp_path / "out").exists()


# --- groups


def test_seeds_of_one_configuration_are_one_row_with_the_error_over_them(tmp_path: Path) -> None:
    """0.2, 0.3, 0.7: mean 0.4, standard deviation √0.07, over √3: 0.152753."""
    for seed, after in enumerate((0.2, 0.3, 0.7)):
        fake(tmp_path / f"a{seed}", "loss.temperature=1", seed=seed, after=after)
    fake(tmp_path / "b", "loss.temperature=2", after=0.5)
    notes: list[str] = []
    groups, common = grouped(find([tmp_path]).runs, notes)
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("loss.temperature=1", 3),
        ("loss.temperature=2", 1),
    ]
    assert (common, notes) == ([], [])
    mean, error = groups[0].measures["reward after"]
    assert mean == pytest.approx(0.4)
    assert error == pytest.approx(math.sqrt(0.07 / 3))
    assert groups[1].measures["reward after"] == Estimate(0.5, 0.03)  # one run: its own, by prompt
    steps, losses = groups[0].curve("train/loss")
    assert steps == [1, 2]
    assert [value.mean for value in losses] == pytest.approx([2.0, 2.0])
    assert losses[1].se == pytest.approx(1 / math.sqrt(3))


def test_a_run_that_comes_twice_counts_once(tmp_path: Path) -> None:
    for name in ("a", "a-2"):
        fake(tmp_path / name, "loss.temperature=1", after=0.2)
    notes: list[str] = []
    (group,), _ = grouped(find([tmp_path]).runs, notes)
    assert [run.name for run in group.runs] == ["a-2"]
    assert notes == [f"{tmp_path}/a has the configuration and seeds of {tmp_path}/a-2, and counts in no mean"]


def test_labels_are_what_differs_and_the_rest_is_told_once(tmp_path: Path) -> None:
    fake(tmp_path / "a", "loss.kind=x", "loss.temperature=1")
    fake(tmp_path / "b", "loss.kind=x", "loss.temperature=2")
    groups, common = grouped(find([tmp_path]).runs, [])
    assert common == ["loss.kind=x"]
    assert [group.label for group in groups] == ["loss.temperature=1", "loss.temperature=2"]


def test_a_label_begins_with_what_is_its_own(tmp_path: Path) -> None:
    """So that it tells configurations apart where it is cut."""
    for name, kind, own in (("a", "x", 1), ("b", "x", 2), ("c", "y", 3)):
        fake(tmp_path / name, f"loss.kind={kind}", f"loss.temperature={own}")
    groups, _ = grouped(find([tmp_path]).runs, [])
    assert [group.label for group in groups] == [
        "loss.temperature=1 loss.kind=x", "loss.temperature=2 loss.kind=x", "loss.kind=y loss.temperature=3",
    ]  # fmt: skip


def test_configurations_alike_on_the_command_line_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    for name, rate in (("a", 1), ("b", 2)):
        fake(tmp_path / name, "loss.temperature=1")
        path = tmp_path / name / "summary.json"
        summary = json.loads(path.read_text())
        summary["config"]["rate"] = rate
        path.write_text(json.dumps(summary))
    groups, _ = grouped(find([tmp_path]).runs, [])
    assert [group.label for group in groups] == ["rate=1", "rate=2"]


# --- two configurations side by side


def apart(tmp_path: Path, a: list[list[float]], b: list[list[float]], **other: Any) -> dict[str, list[Any]]:
    for name, answers in (("a", a), ("b", b)):
        after = float(np.mean(answers))
        fake(tmp_path / name, f"loss.name={name}", after=after, answers=answers, **(other if name == "b" else {}))
    groups, _ = grouped(find([tmp_path]).runs, [])
    return {str(row[0]): row[1:] for row in tables.outcomes_apart(*groups).rows}


def test_a_difference_is_paired_where_the_prompts_are_the_same(tmp_path: Path) -> None:
    """Differences by prompt 0.1, 0.3, 0.2: mean 0.2, standard deviation 0.1, over √3."""
    told = apart(tmp_path, [[0.0, 0.2], [0.4, 0.4], [0.9, 0.9]], [[0.2, 0.2], [0.7, 0.7], [1.1, 1.1]])
    _, _, difference, how = told["reward after"]
    assert how == "paired by 3 prompts"
    assert difference == pytest.approx((0.2, 0.1 / math.sqrt(3)))
    assert told["KL, nats"][3] == "unpaired"
    assert told["KL, nats"][2].se == pytest.approx(math.hypot(0.2, 0.2))
    assert told["steps"][3] == "not known"


def test_other_prompts_are_not_paired(tmp_path: Path) -> None:
    _, _, difference, how = apart(tmp_path, [[0.0], [0.4]], [[0.2], [0.7], [1.1]])["reward after"]
    assert how == "unpaired"
    assert difference.se == pytest.approx(math.hypot(0.03, 0.03))


def test_rewards_of_different_kinds_are_not_compared(tmp_path: Path) -> None:
    config = {"seed": 0, "loss": {"name": "b"}, "reward": {"_target_": "other"}}
    told = apart(tmp_path, [[0.0], [0.4]], [[0.2], [0.7]], config=config)
    for name in ("reward before", "reward after", "gain, paired", "win rate"):
        assert told[name][2:] == [None, "rewards differ"]
    assert told["length after"][3] == "paired by 2 prompts"


def test_seeds_that_are_the_same_are_paired(tmp_path: Path) -> None:
    """Differences by seed 0.1 and 0.3: mean 0.2, standard error 0.1."""
    for seed, (a, b) in enumerate(((0.2, 0.3), (0.5, 0.8))):
        fake(tmp_path / f"a{seed}", "loss.name=a", seed=seed, after=a)
        fake(tmp_path / f"b{seed}", "loss.name=b", seed=seed, after=b)
    groups, _ = grouped(find([tmp_path]).runs, [])
    row = next(row for row in tables.outcomes_apart(*groups).rows if row[0] == "reward after")
    assert row[3] == pytest.approx((0.2, 0.1))
    assert row[4] == "paired by 2 seeds"


def test_only_the_keys_that_differ_are_told(tmp_path: Path) -> None:
    fake(tmp_path / "a", "loss.kind=x", "loss.temperature=1", seed=1)
    fake(tmp_path / "b", "loss.kind=x", "loss.temperature=2", "loss.floor=3", seed=2)
    groups, _ = grouped(find([tmp_path]).runs, [])
    assert tables.settings_apart(groups).rows == [["loss.temperature", "1", "2"], ["loss.floor", None, "3"]]


def test_two_evaluations_are_paired_by_the_prompts_of_both(tmp_path: Path) -> None:
    """Differences 0.1, 0.3, 0.2 of three prompts, each a mean over seeds; the fourth has no other. 0.2, 0.1 over √3."""
    fake_evaluation(tmp_path / "a", [[0.0, 0.2], [0.4], [0.9], [5.0]])
    fake_evaluation(tmp_path / "b", [[0.2], [0.6, 0.8], [1.1]])
    told = reported(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    row = "| reward, hard | 0.467 ± 0.233 | 0.667 ± 0.260 | 0.200 ± 0.058 | 3 |"
    assert "## What differs between the evaluations" in told
    assert row in told
    fake_evaluation(tmp_path / "c", [[0.2], [0.6], [1.1]], reward="another")
    assert "What differs between" not in reported(tmp_path / "a", tmp_path / "c", "--out", tmp_path / "out")


def test_a_length_controlled_win_rate_has_a_line_of_its_own(tmp_path: Path) -> None:
    folder = fake_evaluation(tmp_path / "a")
    result = json.loads((folder / "result.json").read_text())
    result["win_rates"]["facts"] = {"win_rate": 50.0, "lc_win_rate": 44.44, "lc_se": 2.5}
    (folder / "result.json").write_text(json.dumps(result))
    told = reported(folder, "--out", tmp_path / "out")
    assert "| win rate, %, length-controlled |" in told
    assert "| one on 100% of it | all judged pairs | – | – | – | – | 44.4 ± 2.5 |" in told


# --- tables


AWKWARD = Table(["run", "reward after", "n"], [["a_b|50%{x}$y\\z~#&^", Estimate(-0.123456789, 0.01), None]])


def test_markdown_keeps_a_row_a_row() -> None:
    assert AWKWARD.markdown().splitlines()[2] == r"| `a_b\|50%{x}$y\z~#&^` | -0.123 ± 0.010 | – |"


def test_markdown_has_no_tag_of_the_datas() -> None:
    table = Table(["evaluation", "subset"], [["<b>a</b>\nb", "<i>"]], code=False)
    assert table.markdown().splitlines()[2] == r"| \<b>a\</b> b | \<i> |"


def test_latex_is_booktabs_and_escaped() -> None:
    latex = AWKWARD.latex()
    assert latex.startswith("\\begin{tabular}{lrr}\n\\toprule\nrun & reward after & n \\\\\n\\midrule\n")
    name = r"a\_b\textbar{}50\%\{x\}\$y\textbackslash{}z\textasciitilde{}\#\&\textasciicircum{}"
    assert rf"\texttt{{{name}}} & $-0.123 \pm 0.010$ & -- \\" in latex
    assert latex.endswith("\\bottomrule\n\\end{tabular}\n")


def test_csv_has_the_raw_numbers() -> None:
    (row,) = csv.DictReader(io.StringIO(AWKWARD.csv()))
    assert row == {"run": "a_b|50%{x}$y\\z~#&^", "reward after": "-0.123456789", "reward after, se": "0.01", "n": ""}


def test_a_number_has_the_digits_of_what_it_measures() -> None:
    """By its column, or, where columns are configurations, by its row."""
    columns = Table(["run", "KL, nats", "reward"], [["loss=a", Estimate(1.23456), Estimate(0.5, 0.1)]], code=False)
    by_row = Table(["", "loss=a"], [["KL, nats", Estimate(1.23456)], ["steps", Estimate(56.0)]], code=False)
    assert columns.markdown().splitlines()[2] == "| loss=a | 1.23 | 0.500 ± 0.100 |"
    assert [line.split("|")[2].strip() for line in by_row.markdown().splitlines()[2:]] == ["1.23", "56"]


# --- pages


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that is not closed where it should be, and keeps the text and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.words = list[str](), list[tuple[str, dict[str, str | None]]](), list[str]()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_markup_in_data_stays_text_on_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=http://x/y onerror=alert(2)>\"'&\udcff"
    fake(
        tmp_path / "a<b>", f"loss.name={evil.replace('=', ':')[:20]}", text=evil, facts={evil: {"<i>": evil}},
        title=evil, versions={evil: evil}, hashes={evil: evil},
    )  # fmt: skip
    (tmp_path / "a<b>" / "train.log").write_text(f"[2026-01-01 00:00:00,000][of][WARNING] - {evil[:-1]}\n")
    records = [{"micro_batch": 0, "id": evil, "prompt": evil, "response": evil, "weight": 1.0, "reward": None}]
    (tmp_path / "a<b>" / "batches.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reported(tmp_path, "--out", tmp_path / "out")
    content = (tmp_path / "out" / "pages" / "a<b>.html").read_text()
    seen = Balanced()
    seen.feed(content)
    seen.close()
    assert seen.open == []
    assert not {tag for tag, _ in seen.tags} & {"script", "img", "iframe", "link", "i", "b"}
    assert not any(name.startswith("on") or name in ("src", "href") for _, given in seen.tags for name in given)
    assert "url(" not in content
    assert "@import" not in content
    assert "".join(seen.words).count("<script>alert(1)</script>") >= 10
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "pages/a%3Cb%3E.html" in markdown


def test_a_page_tells_what_trained_what_came_out_and_what_to_beware_of(tmp_path: Path) -> None:
    facts = {"groups without signal, left out": 4, "weights": {"ess": 0.5, "largest": 60.0, "length_correlation": -0.5}}
    fake(tmp_path / "a", "loss.temperature=1", facts=facts, skipped_steps=3, dirty=True, text="seventeen")
    (one,) = find([tmp_path]).runs
    told = "\n".join(warnings(one))
    assert "3 steps were left out: their loss" in told
    assert "under 0.25 of the sequences at 1 of 2 logged steps, first 0.20 at step 1" in told
    assert "One response weighs 60 times the mean" in told
    assert "Weights follow response length: correlation -0.50" in told
    assert "groups without signal, left out: 4." in told
    assert "The code was not the commit's" in told
    seen = Balanced()
    seen.feed(page(one))
    words = " ".join(seen.words)
    for expected in ("seventeen", "loss.temperature=1", "validation reward", "0.300 ± 0.030", "hash of plan", "2.13"):
        assert expected in words
    assert "prefers-color-scheme: dark" in page(one)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in seen.tags
    assert [tag for tag, _ in seen.tags].count("svg") == 4  # three curves, and the weights


def test_what_was_warned_of_in_training_stands_on_the_page(tmp_path: Path) -> None:
    """By way of the log that Hydra keeps in a run's folder; libraries' warnings with their names."""
    folder = fake(tmp_path / "a")
    log = logging.FileHandler(folder / "train.log")
    log.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    logging.getLogger().addHandler(log)
    try:
        warn("one row weighs it all")
        logging.getLogger("some.library").warning("old API")
        logging.getLogger("some.library").info("hello")
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
    (one,) = find([tmp_path]).runs
    assert warnings(one)[-2:] == ["one row weighs it all", "some.library: old API"]


def test_micro_batches_are_told_from_what_the_folder_has(tmp_path: Path) -> None:
    """The plan alone: rows by number, with their weights; none at all: the page does without."""
    fake(tmp_path / "a")
    (one,) = find([tmp_path]).runs
    np.testing.assert_array_equal(one.weights, [0.5, 2.0, 0.5])
    assert "<tr><th>0</th><td class=whole>3</td><td>9, 7</td><td>0.500, 0.500</td></tr>" in page(one)
    for name in ("plan.npz", "samples.jsonl", "metrics.csv"):
        (tmp_path / "a" / name).unlink()
    (bare,) = find([tmp_path]).runs
    assert "<h2>What came out</h2>" in page(bare)
    assert not any(f"<h2>{title}</h2>" in page(bare) for title in ("Curves", "Weights", "Answers before and after"))
    for damaged in (b"PK", b"", b"PK\x03\x04garbage"):
        (tmp_path / "a" / "plan.npz").write_bytes(damaged)
        assert find([tmp_path]).runs[0].plan == {}


def test_runs_of_one_name_have_a_page_each_and_one_that_does_not_fit_together_none(tmp_path: Path) -> None:
    for place in ("x", "y", "z"):
        fake(tmp_path / place / "a", f"loss.place={place}", **({"data": "none"} if place == "z" else {}))
    notes: list[str] = []
    written = write_pages(find([tmp_path]).runs, tmp_path / "pages", notes)
    assert [(run.folder.parent.name, path.name) for run, path in written] == [("x", "a.html"), ("y", "a-2.html")]
    assert "loss.place=y" in (tmp_path / "pages" / "a-2.html").read_text()
    assert [note.split(" (")[0] for note in notes] == [f"{tmp_path}/z/a: no page, as its files do not fit together"]


# --- files that are damaged


def test_a_damaged_file_is_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    """Lengths that are words take the figure of lengths and no other; what only a page reads takes the page."""
    runs = tmp_path / "runs"
    fake(runs / "good", "loss.temperature=1")
    fake(runs / "lengths", "loss.temperature=2")
    lines = [{"id": 1, "prompt": "?", "after": {"texts": ["a"], "rewards": [1], "lengths": ["x"]}}]
    (runs / "lengths" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fake(runs / "sides", "loss.temperature=3")
    (runs / "sides" / "samples.jsonl").write_text(
        '{"id": 1, "prompt": "?", "before": "<b>", "after": {"texts": "a"}}\n'
    )
    fake(runs / "plan", "loss.temperature=4")
    (runs / "plan" / "plan.npz").write_bytes(b"")
    fake(runs / "hashes", "loss.temperature=5", hashes="x")
    fake(runs / "title", "loss.temperature=6", title=7)
    fake(runs / "overrides", "loss.temperature=7")
    (runs / "overrides" / ".hydra" / "overrides.yaml").write_text("3\n")
    tables_of = {"list": "[]", "partial": '{"partition": [{"world": "w"}]}', "words": '{"partition": 3}'}
    for name, content in tables_of.items():
        (runs / name).mkdir()
        (runs / name / "tables.json").write_text(content)
    told = reported(runs, "--out", tmp_path / "out")
    for name in tables_of:
        assert f"Left out: {runs}/{name}: its tables.json cannot be used" in told
    assert f"Left out: {runs}/hashes: its summary.json cannot be used (AttributeError" in told
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert markdown.startswith("# 6 runs, 6 configurations, 0 evaluations")
    assert "figures/lengths.png: not drawn, as files of its runs do not fit together" in markdown
    figures_drawn = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures_drawn == {"cost", "curves", "frontier", "verdicts", "weights"}
    pages = {path.stem for path in (tmp_path / "out" / "pages").iterdir()}
    assert pages == {"good", "lengths", "plan", "title", "overrides"}


def test_a_single_run_whose_title_is_a_number_is_reported(tmp_path: Path) -> None:
    fake(tmp_path / "a", title=7)
    assert "| `7` |" in reported(tmp_path / "a", "--out", tmp_path / "out")


def test_evaluations_whose_answers_do_not_fit_are_reported_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fake_evaluation(tmp_path / name, [[0.1], [0.2]])
    (tmp_path / "b" / "answers.jsonl").write_text('{"subset": "hard"}\n')
    assert "## Evaluations" in reported(tmp_path, "--out", tmp_path / "out")
    assert "answers.jsonl do not fit together (KeyError" in (tmp_path / "out" / "report.md").read_text()


# --- the whole


def test_a_report_has_its_tables_figures_and_pages(tmp_path: Path) -> None:
    for temperature in (1, 2):
        for seed in range(2):
            name = f"t{temperature}-{seed}"
            fake(tmp_path / "runs" / name, f"loss.temperature={temperature}", seed=seed, after=0.1 * temperature + seed)
    fake_evaluation(tmp_path / "evals" / "e")
    (tmp_path / "runs" / "begun" / "checkpoints").mkdir(parents=True)
    records = [
        {"world": "w", "estimator": "grouped", "size": 2**k, "seed": s, "relative_variance": (1 + s) / 2**k}
        for k in (1, 2)
        for s in (0, 1)
    ]
    (tmp_path / "tabular").mkdir()
    (tmp_path / "tabular" / "tables.json").write_text(json.dumps({"partition": records}))
    out = tmp_path / "out"
    places = tmp_path / "runs", tmp_path / "evals", tmp_path / "tabular"
    told = reported(*places, "--out", out, "--format", "svg", "--pages", "3")
    drawn = ("cost", "curves", "frontier", "lengths", "variance", "verdicts", "weights")
    assert sorted(path.stem for path in (out / "figures").iterdir()) == list(drawn)
    markdown = (out / "report.md").read_text()
    assert markdown.startswith("# 4 runs, 2 configurations, 1 evaluations")
    for name in drawn:
        assert f"(figures/{name}.svg)" in markdown
    assert "3 of 4 runs have a page" in markdown
    assert "## Left out (1)" in markdown
    assert "| `loss.temperature=2` | 2 | 2 ± 0 | 0.100 ± 0.000 | 0.700 ± 0.500 |" in markdown
    assert "| one on 100% of it | hard | 0.500 ± 0.200 | 0.250 ± 0.050 | 1.00 | 12.0 ± 1.5 |" in markdown
    runs_table = list(csv.DictReader((out / "tables" / "runs.csv").open()))
    assert [float(row["reward after"]) for row in runs_table] == pytest.approx([0.1, 1.1, 0.2, 1.2])
    assert {"configurations", "difference", "settings", "evaluations"} == {p.stem for p in out.glob("tables/*.tex")}
    assert "begun: not finished" in told


def test_of_many_configurations_the_best_are_drawn_and_only_their_curves_read(tmp_path: Path) -> None:
    draw = random.Random(0)
    order = draw.sample(range(70), 70)
    for place, temperature in enumerate(order):
        fake(tmp_path / "runs" / f"{place:02d}", f"loss.temperature={temperature}", after=temperature / 100)
    read = set()
    curves = Run.curves.func
    with mock.patch.object(Run, "curves", property(lambda self: read.add(self.name) or curves(self))):
        reported(tmp_path / "runs", "--out", tmp_path / "out", "--shown", "3", "--pages", "0")
    assert {order[int(name)] for name in read} == {67, 68, 69}
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "50 of 70 rows; tables/configurations.csv has all." in markdown
    assert "the 3 of 70 configurations with the highest reward" in markdown
    assert markdown.index("`loss.temperature=69`") < markdown.index("`loss.temperature=68`")
    assert len(list(csv.DictReader((tmp_path / "out" / "tables" / "configurations.csv").open()))) == 70


def test_nothing_measured_is_nothing_drawn(tmp_path: Path) -> None:
    empty = Group("a", [Run(tmp_path, {"validation": {}}, {}, {})])
    for draw in (figures.curves, figures.frontier, figures.lengths, figures.weights):
        assert not draw([empty], tmp_path / "x.png")
    assert not figures.verdicts([], [empty], tmp_path / "x.png")
    assert not figures.variance([{}], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
