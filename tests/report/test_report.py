"""Test report.py: reading runs and evaluations, and writing tables, figures and pages."""

import contextlib
import csv
import html.parser
import io
import json
import logging
import math
import random
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from tests.helpers.cli import run
from tests.helpers.run_folders import write_evaluation, write_run
from var.report import figures, tables
from var.report.groups import Group, group_runs
from var.report.page import compute_level, find_reward_range, find_warnings, render_page
from var.report.read import RunRecord, find_records
from var.report.write import write_pages, write_report
from var.utils.console import warn
from var.utils.statistics import Estimate


def report(*arguments: str | Path) -> str:
    """Run report.py and return what it prints."""
    done = run("report.py", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- reading


def test_folders_without_a_finished_run_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    write_evaluation(tmp_path / "runs" / "deeper" / "e")
    (tmp_path / "runs" / "started" / ".hydra").mkdir(parents=True)
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "early").mkdir()
    (tmp_path / "runs" / "early" / "train.log").write_text("Data: a.jsonl")
    write_run(tmp_path / "runs" / "truncated")
    (tmp_path / "runs" / "truncated" / "summary.json").write_text('{"title": "tiny')
    write_run(tmp_path / "runs" / "other")
    (tmp_path / "runs" / "other" / "summary.json").write_text("[1]")
    (tmp_path / "file").write_text("")
    (tmp_path / "multirun.yaml").write_text("")  # of a sweep, in `runs/*`
    places = ("runs", "runs/a", "nowhere", "file", "multirun.yaml")
    found = find_records([tmp_path / place for place in places])
    assert [run.name for run in found.runs] == ["a"]  # once, although its folder is given twice
    assert [evaluation.folder.name for evaluation in found.evaluations] == ["e"]
    problems = {Path(line.split(": ")[0]).name: line.split(": ", 1)[1] for line in found.problems}
    assert problems["started"] == "stopped before its first checkpoint. The same command starts it again."
    assert problems["early"] == problems["started"]
    assert problems["empty"] == "no run, no evaluation"
    assert problems["truncated"].startswith("cannot use summary.json (JSONDecodeError")
    assert problems["other"].startswith("cannot use summary.json (TypeError")
    assert problems["nowhere"] == "no such folder"
    assert problems["file"] == "not a folder"
    assert len(found.problems) == 7


def test_nothing_to_report_is_one_error_with_all_problems(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("report.py", f"{tmp_path}/empty", "--out", f"{tmp_path}/out")
    assert done.returncode == 1
    error = f"Error: nothing to report: no finished run, no evaluation\n  {tmp_path}/empty: no run, no evaluation\n"
    assert done.stderr == error
    assert not (tmp_path / "out").exists()


def test_earlier_names_of_summary_keys_are_read(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", data_report={"groups without signal": 4}) / "summary.json"
    path.write_text(path.read_text().replace('"truncated"', '"cut"'))
    (one,) = find_records([tmp_path]).runs
    assert one.measures["truncation rate"] == Estimate(0.1, None)
    assert one.summary["data"]["zero_variance_groups"] == 4


def test_curves_keep_what_precedes_a_truncated_line(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a") / "metrics.csv"
    path.write_text(path.read_text() + "3,0.1234567890123456789,inf,0.\n4,\0\0\0")
    (one,) = find_records([tmp_path]).runs
    assert one.curves["train/loss"].to_dict() == {1: 2.0, 2: 1.0, 3: 0.1234567890123456789}
    assert list(one.curves["train/weight/ess"].index) == [1, 2]
    path.write_text("")
    assert find_records([tmp_path]).runs[0].curves == {}


def test_kl_is_zero_before_training(tmp_path: Path) -> None:
    """A run logs the KL from the first evaluation after a step."""
    (write_run(tmp_path / "a") / "metrics.csv").write_text("step,validation/kl\n0,\n12,1.5\n24,2.0\n")
    (one,) = find_records([tmp_path]).runs
    assert one.curves["validation/kl"].to_dict() == {0: 0.0, 12: 1.5, 24: 2.0}


# --- groups


def test_runs_that_differ_in_seeds_are_averaged_over_seeds(tmp_path: Path) -> None:
    """Average 0.2, 0.3 and 0.7: the mean is 0.4, and the standard error √0.07 / √3 = 0.152753."""
    for seed, after in enumerate((0.2, 0.3, 0.7)):
        write_run(tmp_path / f"a{seed}", "loss.temperature=1", seed=seed, after=after)
    write_run(tmp_path / "b", "loss.temperature=2", after=0.5)
    notes: list[str] = []
    groups, common = group_runs(find_records([tmp_path]).runs, notes)
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("loss.temperature=1", 3),
        ("loss.temperature=2", 1),
    ]
    assert (common, notes) == ([], [])
    mean, error = groups[0].measures["reward after"]
    assert mean == pytest.approx(0.4)
    assert error == pytest.approx(math.sqrt(0.07 / 3))
    assert groups[1].measures["reward after"] == Estimate(0.5, 0.03)  # of the single run, clustered by prompt
    losses = groups[0].curve("train/loss")
    assert list(losses.index) == [1, 2]
    assert list(losses["mean"]) == pytest.approx([2.0, 2.0])
    assert losses["se"][2] == pytest.approx(1 / math.sqrt(3))


def test_repeated_run_is_used_once(tmp_path: Path) -> None:
    for name in ("a", "a-2"):
        write_run(tmp_path / name, "loss.temperature=1", after=0.2)
    notes: list[str] = []
    (group,), _ = group_runs(find_records([tmp_path]).runs, notes)
    assert [run.name for run in group.runs] == ["a-2"]
    assert notes == [f"{tmp_path}/a: same configuration and seeds as {tmp_path}/a-2. It is not used in any mean."]


def test_labels_omit_overrides_that_all_runs_share(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "loss.kind=x", "loss.temperature=1")
    write_run(tmp_path / "b", "loss.kind=x", "loss.temperature=2")
    groups, common = group_runs(find_records([tmp_path]).runs, [])
    assert common == ["loss.kind=x"]
    assert [group.label for group in groups] == ["loss.temperature=1", "loss.temperature=2"]


def test_label_starts_with_the_rarest_override(tmp_path: Path) -> None:
    """Labels are shortened in figures, and still distinguish the configurations."""
    for name, kind, own in (("a", "x", 1), ("b", "x", 2), ("c", "y", 3)):
        write_run(tmp_path / name, f"loss.kind={kind}", f"loss.temperature={own}")
    groups, _ = group_runs(find_records([tmp_path]).runs, [])
    assert [group.label for group in groups] == [
        "loss.temperature=1 loss.kind=x", "loss.temperature=2 loss.kind=x", "loss.kind=y loss.temperature=3",
    ]  # fmt: skip


def test_equal_command_lines_are_labeled_by_their_settings(tmp_path: Path) -> None:
    for name, rate in (("a", 1), ("b", 2)):
        write_run(tmp_path / name, "loss.temperature=1")
        path = tmp_path / name / "summary.json"
        summary = json.loads(path.read_text())
        summary["config"]["rate"] = rate
        path.write_text(json.dumps(summary))
    groups, _ = group_runs(find_records([tmp_path]).runs, [])
    assert [group.label for group in groups] == ["rate=1", "rate=2"]


# --- differences


def compare(tmp_path: Path, a: list[list[float]], b: list[list[float]], **other: Any) -> dict[str, list[Any]]:
    """Return the rows of the comparison of two runs with these rewards. other: keys of the second summary."""
    for name, answers in (("a", a), ("b", b)):
        after = float(np.mean(answers))
        write_run(tmp_path / name, f"loss.name={name}", after=after, answers=answers, **(other if name == "b" else {}))
    groups, _ = group_runs(find_records([tmp_path]).runs, [])
    return {row[0]: row[1:] for row in rows_of(tables.compare_groups(*groups))}


def test_difference_is_paired_by_prompt_if_prompts_are_equal(tmp_path: Path) -> None:
    """Average the differences 0.1, 0.3 and 0.2: the mean is 0.2, and the standard error 0.1 / √3."""
    rows = compare(tmp_path, [[0.0, 0.2], [0.4, 0.4], [0.9, 0.9]], [[0.2, 0.2], [0.7, 0.7], [1.1, 1.1]])
    _, _, difference, pairing = rows["reward after"]
    assert pairing == "paired by 3 prompts"
    assert difference == pytest.approx((0.2, 0.1 / math.sqrt(3)))
    assert rows["KL, nats"][3] == "unpaired"
    assert rows["KL, nats"][2].se == pytest.approx(math.hypot(0.2, 0.2))
    assert rows["steps"][3] == "no standard error"


def test_different_prompts_are_not_paired(tmp_path: Path) -> None:
    _, _, difference, pairing = compare(tmp_path, [[0.0], [0.4]], [[0.2], [0.7], [1.1]])["reward after"]
    assert pairing == "unpaired"
    assert difference.se == pytest.approx(math.hypot(0.03, 0.03))


def test_different_rewards_are_not_compared(tmp_path: Path) -> None:
    config = {"seed": 0, "loss": {"name": "b"}, "reward": {"_target_": "other"}}
    rows = compare(tmp_path, [[0.0], [0.4]], [[0.2], [0.7]], config=config)
    for name in ("reward before", "reward after", "gain, paired", "win rate"):
        assert rows[name][2:] == [None, "rewards differ"]
    assert rows["length after"][3] == "paired by 2 prompts"


def test_labels_have_the_names_of_files(tmp_path: Path) -> None:
    """As long as these are different."""
    for i, (one, other) in enumerate((("/a/x.jsonl", "/b/y.jsonl"), ("/a/x.jsonl", "/b/x.jsonl"))):
        write_run(tmp_path / f"{i}" / "a", f"loss.file={one}")
        write_run(tmp_path / f"{i}" / "b", f"loss.file={other}")
        groups, _ = group_runs(find_records([tmp_path / f"{i}"]).runs, [])
        names = ["x.jsonl", "y.jsonl"] if i == 0 else [one, other]
        assert [group.label for group in groups] == [f"loss.file={name}" for name in names]


def test_other_validation_reward_is_another_configuration(tmp_path: Path) -> None:
    """Settings of `eval` are not part of a run's name. Those of its reward and sampling decide its results."""
    config = {"seed": 0, "reward": {"_target_": "near"}, "reward_scale": "raw"}
    own = {"reward": {"_target_": "exact"}, "every_n_steps": 3, "sampling": {"responses": 2}}
    write_run(tmp_path / "a", "loss.name=a", config={**config, "eval": {"reward": None, "every_n_steps": 9}})
    write_run(tmp_path / "b", "loss.name=a", config={**config, "seed": 1, "eval": own})
    write_run(tmp_path / "c", "loss.name=a", config={**config, "seed": 1, "eval": {"reward": None}})
    groups, _ = group_runs(find_records([tmp_path]).runs, [])
    assert [[run.name for run in group.runs] for group in groups] == [["a", "c"], ["b"]]
    row = next(row for row in rows_of(tables.compare_groups(*groups)) if row[0] == "reward after")
    assert row[3:] == [None, "rewards differ"]


def test_z_scores_with_other_moments_are_not_compared(tmp_path: Path) -> None:
    """Each run's z-score has the moments of its own training rewards."""
    for name, scale in (("a", "zscore(mean=0.4, sd=0.374)"), ("b", "zscore(mean=0.9, sd=0.1)")):
        config = {"loss": {"name": name}, "reward": {"_target_": "near"}, "reward_scale": "zscore"}
        write_run(tmp_path / name, f"loss.name={name}", config=config, data_report={"reward": {"scale": scale}})
    groups, _ = group_runs(find_records([tmp_path]).runs, [])
    rows = {row[0]: row[3:] for row in rows_of(tables.compare_groups(*groups))}
    assert rows["reward after"] == [None, "rewards differ"]
    assert rows["length after"][1] == "paired by 3 prompts"


def test_equal_seeds_are_paired(tmp_path: Path) -> None:
    """Average the differences 0.1 and 0.3: the mean is 0.2, and the standard error 0.1."""
    for seed, (a, b) in enumerate(((0.2, 0.3), (0.5, 0.8))):
        write_run(tmp_path / f"a{seed}", "loss.name=a", seed=seed, after=a)
        write_run(tmp_path / f"b{seed}", "loss.name=b", seed=seed, after=b)
    groups, _ = group_runs(find_records([tmp_path]).runs, [])
    row = next(row for row in rows_of(tables.compare_groups(*groups)) if row[0] == "reward after")
    assert row[3] == pytest.approx((0.2, 0.1))
    assert row[4] == "paired by 2 seeds"


def test_only_differing_keys_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "loss.kind=x", "loss.temperature=1", seed=1)
    write_run(tmp_path / "b", "loss.kind=x", "loss.temperature=2", "loss.floor=3", seed=2)
    groups, _ = group_runs(find_records([tmp_path]).runs, [])
    assert rows_of(tables.compare_settings(groups)) == [["loss.temperature", "1", "2"], ["loss.floor", None, "3"]]


def test_evaluations_are_paired_over_common_prompts(tmp_path: Path) -> None:
    """Average the differences 0.1, 0.3 and 0.2 of three prompts, each a mean over seeds, as 0.2 ± 0.1 / √3.

    Only the first evaluation has the fourth prompt.
    """
    write_evaluation(tmp_path / "a", [[0.0, 0.2], [0.4], [0.9], [5.0]])
    write_evaluation(tmp_path / "b", [[0.2], [0.6, 0.8], [1.1]])
    printed = report(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    row = "| reward, hard | 0.467 ± 0.233 | 0.667 ± 0.260 | 0.200 ± 0.058 | 3 |"
    assert "## Differences between the evaluations" in printed
    assert row in printed
    write_evaluation(tmp_path / "c", [[0.2], [0.6], [1.1]], reward="another")
    assert "Differences between" not in report(tmp_path / "a", tmp_path / "c", "--out", tmp_path / "out")


def test_length_controlled_win_rate_has_its_own_row(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "a")
    result = json.loads((folder / "result.json").read_text())
    result["win_rates"]["facts"] = {"win_rate": 50.0, "lc_win_rate": 44.44, "lc_se": 2.5}
    (folder / "result.json").write_text(json.dumps(result))
    printed = report(folder, "--out", tmp_path / "out")
    assert "| win rate, %, length-controlled |" in printed
    assert "| one on 100% of it | all judged pairs | – | – | – | – | 44.4 ± 2.5 |" in printed


# --- tables


def table(columns: list[str], *rows: list[Any]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns, dtype=object)


def rows_of(frame: pd.DataFrame) -> list[list[Any]]:
    return frame.to_numpy().tolist()


AWKWARD = table(["run", "reward after", "n"], ["a_b|50%{x}$y\\z~#&^", Estimate(-0.123456789, 0.01), None])


def test_markdown_escapes_column_separators() -> None:
    assert tables.to_markdown(AWKWARD).splitlines()[2] == r"| `a_b\|50%{x}$y\z~#&^` | -0.123 ± 0.010 | – |"


def test_markdown_escapes_html_in_data() -> None:
    hostile = table(["evaluation", "subset"], ["<b>a</b>\nb", "<i>"])
    assert tables.to_markdown(hostile, code=False).splitlines()[2] == r"| \<b>a\</b> b | \<i> |"


def test_latex_uses_booktabs_and_is_escaped() -> None:
    latex = tables.to_latex(AWKWARD)
    assert latex.startswith("\\begin{tabular}{lrr}\n\\toprule\nrun & reward after & n \\\\\n\\midrule\n")
    name = r"a\_b\textbar{}50\%\{x\}\$y\textbackslash{}z\textasciitilde{}\#\&\textasciicircum{}"
    assert rf"\texttt{{{name}}} & $-0.123 \pm 0.010$ & -- \\" in latex
    assert latex.endswith("\\bottomrule\n\\end{tabular}\n")


def test_csv_has_unrounded_numbers() -> None:
    (row,) = csv.DictReader(io.StringIO(tables.to_csv(AWKWARD)))
    assert row == {"run": "a_b|50%{x}$y\\z~#&^", "reward after": "-0.123456789", "reward after, se": "0.01", "n": ""}


def test_decimals_depend_on_the_measure() -> None:
    """Take the measure from the column, or from the row if columns are configurations."""
    kl = Estimate(1.23456, None)
    by_column = table(["run", "KL, nats", "reward"], ["loss=a", kl, Estimate(0.5, 0.1)])
    by_row = table(["", "loss=a"], ["KL, nats", kl], ["steps", Estimate(56.0, None)])
    assert tables.to_markdown(by_column, code=False).splitlines()[2] == "| loss=a | 1.23 | 0.500 ± 0.100 |"
    lines = tables.to_markdown(by_row, code=False).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["1.23", "56"]


# --- pages


class BalancedParser(html.parser.HTMLParser):
    """Collect the tags and the text of a page, and fail on a tag that is not closed correctly."""

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


def test_hostile_text_is_escaped_and_page_is_self_contained(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=http://x/y onerror=alert(2)>\"'&{{ 7919 * 6841 }}{% if %}{# #}\udcff"
    write_run(
        tmp_path / "a<b>", f"loss.name={evil.replace('=', ':')[:20]}", text=evil, data_report={evil: {"<i>": evil}},
        title=evil, versions={evil: evil}, hashes={evil: evil},
    )  # fmt: skip
    (tmp_path / "a<b>" / "train.log").write_text(f"[2026-01-01 00:00:00,000][of][WARNING] - {evil[:-1]}\n")
    samples = json.loads((tmp_path / "a<b>" / "samples.jsonl").read_text().splitlines()[0])
    samples |= {"id": evil, "answer": evil, "prompt": [{"role": evil, "content": evil}]}
    (tmp_path / "a<b>" / "samples.jsonl").write_text(json.dumps(samples) + "\n")
    records = [{"micro_batch": 0, "id": evil, "prompt": evil, "response": evil, "weight": 1.0, "reward": None}]
    (tmp_path / "a<b>" / "batches.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report(tmp_path, "--out", tmp_path / "out")
    content = (tmp_path / "out" / "pages" / "a<b>.html").read_text()
    parser = BalancedParser()
    parser.feed(content)
    parser.close()
    assert parser.open == []
    assert not {tag for tag, _ in parser.tags} & {"script", "img", "iframe", "link", "i", "b"}
    attributes = {name for _, of_tag in parser.tags for name in of_tag}
    assert not any(name.startswith("on") or name in ("src", "href", "style") for name in attributes)
    assert "url(" not in content
    assert "@import" not in content
    assert "".join(parser.words).count("<script>alert(1)</script>") >= 18
    assert "".join(parser.words).count("{{ 7919 * 6841 }}{% if %}{# #}") >= 18
    assert str(7919 * 6841) not in content
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "pages/a%3Cb%3E.html" in markdown


def test_page_has_warnings_results_and_inputs(tmp_path: Path) -> None:
    health = {"ess": 0.5, "largest": 60.0, "length_correlation": -0.5}
    report = {"zero_variance_groups_skipped": 4, "weights": health}
    write_run(tmp_path / "a", "loss.temperature=1", data_report=report, skipped_steps=3, dirty=True, text="seventeen")
    (one,) = find_records([tmp_path]).runs
    warnings = "\n".join(find_warnings(one))
    assert "3 steps were skipped: their loss" in warnings
    assert "under 0.25 of the sequences at 1 of 2 logged steps, first 0.20 at step 1" in warnings
    assert "The largest weight is 60 times the mean" in warnings
    assert "Weights are correlated with response length: -0.50" in warnings
    assert "The code had uncommitted changes" in warnings
    parser = BalancedParser()
    parser.feed(render_page(one))
    words = " ".join(" ".join(parser.words).split())
    for expected in (
        "seventeen",
        "What does not train zero-variance groups skipped 4",
        "loss.temperature=1",
        "validation reward",
        "0.300 ± 0.030",
        "hash of plan",
        "2.13",
        "Reward of answers to validation prompts: ",
    ):
        assert expected in words
    assert "prefers-color-scheme: dark" in render_page(one)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parser.tags
    assert [tag for tag, _ in parser.tags].count("svg") == 4  # three curves and the weights


def test_level_of_a_reward_is_its_quarter_of_the_range() -> None:
    samples: list[Any] = [{"before": {"rewards": [0.0, float("nan")]}, "after": {"rewards": [8.0, None]}}, {}]
    assert find_reward_range(samples) == (0.0, 8.0)
    levels = [compute_level(reward, (0.0, 8.0)) for reward in (0.0, 1.9, 2.0, 5.9, 8.0, None, float("nan"))]
    assert levels == [0, 0, 1, 2, 3, 0, 0]
    assert compute_level(1.0, (1.0, 1.0)) == 0


def test_page_has_the_warnings_of_the_log(tmp_path: Path) -> None:
    """Read them from the log that Hydra writes. The warnings of libraries have the names of their loggers."""
    folder = write_run(tmp_path / "a")
    log = logging.FileHandler(folder / "train.log")
    log.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    logging.getLogger().addHandler(log)
    try:
        warn("one row weighs it all")
        logging.getLogger("some.library").warning("old API")
        logging.getLogger("some.library").info("hello")
        warn("one row weighs it all")
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
    (one,) = find_records([tmp_path]).runs
    assert find_warnings(one)[-2:] == ["one row weighs it all", "some.library: old API"]


def test_page_omits_sections_whose_files_are_missing(tmp_path: Path) -> None:
    """Show the micro-batches of the plan if there is no batches.jsonl, and no section without a plan."""
    write_run(tmp_path / "a")
    (one,) = find_records([tmp_path]).runs
    np.testing.assert_array_equal(one.weights, [0.5, 2.0, 0.5])
    assert '<tr><th>0</th><td class="number">3</td><td>9, 7</td><td>0.500, 0.500</td></tr>' in render_page(one)
    for name in ("plan.npz", "samples.jsonl", "metrics.csv"):
        (tmp_path / "a" / name).unlink()
    (bare,) = find_records([tmp_path]).runs
    assert "<h2>Results</h2>" in render_page(bare)
    assert not any(
        f"<h2>{title}</h2>" in render_page(bare) for title in ("Curves", "Weights", "Answers before and after training")
    )
    for damaged in (b"PK", b"", b"PK\x03\x04garbage"):
        (tmp_path / "a" / "plan.npz").write_bytes(damaged)
        assert find_records([tmp_path]).runs[0].plan == {}


def test_page_of_a_run_with_a_long_name_is_written(tmp_path: Path) -> None:
    """The name of a folder may have 255 bytes, which leaves none for .html."""
    write_run(tmp_path / ("r" * 255), "loss=x")
    notes: list[str] = []
    ((_, page),) = write_pages(find_records([tmp_path]).runs, tmp_path / "pages", notes)
    assert page.is_file()
    assert (page.stem[:151], len(page.stem), notes) == ("r" * 151, 160, [])


def test_pages_of_equally_named_runs_are_numbered(tmp_path: Path) -> None:
    for place in ("x", "y", "z"):
        write_run(tmp_path / place / "a", f"loss.place={place}", **({"data": "none"} if place == "z" else {}))
    notes: list[str] = []
    written = write_pages(find_records([tmp_path]).runs, tmp_path / "pages", notes)
    assert [(run.folder.parent.name, path.name) for run, path in written] == [("x", "a.html"), ("y", "a-2.html")]
    assert "loss.place=y" in (tmp_path / "pages" / "a-2.html").read_text()
    assert [note.split(" (")[0] for note in notes] == [f"{tmp_path}/z/a: no page, because its files are inconsistent"]


# --- damaged files


def test_damaged_file_affects_only_what_reads_it(tmp_path: Path) -> None:
    """Omit only the figure of lengths if a length is text, and only a page if its own content is damaged."""
    runs = tmp_path / "runs"
    write_run(runs / "good", "loss.temperature=1")
    write_run(runs / "lengths", "loss.temperature=2")
    lines = [{"id": 1, "prompt": "?", "after": {"texts": ["a"], "rewards": [1], "lengths": ["x"]}}]
    (runs / "lengths" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run(runs / "sides", "loss.temperature=3")
    (runs / "sides" / "samples.jsonl").write_text(
        '{"id": 1, "prompt": "?", "before": "<b>", "after": {"texts": "a"}}\n'
    )
    write_run(runs / "plan", "loss.temperature=4")
    (runs / "plan" / "plan.npz").write_bytes(b"")
    write_run(runs / "hashes", "loss.temperature=5", hashes="x")
    write_run(runs / "title", "loss.temperature=6", title=7)
    write_run(runs / "overrides", "loss.temperature=7")
    (runs / "overrides" / ".hydra" / "overrides.yaml").write_text("3\n")
    tables_of = {"list": "[]", "partial": '{"partition": [{"world": "w"}]}', "words": '{"partition": 3}'}
    for name, content in tables_of.items():
        (runs / name).mkdir()
        (runs / name / "tables.json").write_text(content)
    printed = report(runs, "--out", tmp_path / "out")
    for name in tables_of:
        assert f"Skipped: {runs}/{name}: cannot use tables.json" in printed
    assert f"Skipped: {runs}/hashes: cannot use summary.json (AttributeError" in printed
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert markdown.startswith("# 6 runs, 6 configurations, 0 evaluations")
    assert "figures/lengths.png: not drawn, because files of its runs are inconsistent" in markdown
    figures_drawn = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures_drawn == {"cost", "curves", "frontier", "verdicts", "weights"}
    pages = {path.stem for path in (tmp_path / "out" / "pages").iterdir()}
    assert pages == {"good", "lengths", "plan", "title", "overrides"}


def test_title_may_be_a_number(tmp_path: Path) -> None:
    write_run(tmp_path / "a", title=7)
    assert "| `7` |" in report(tmp_path / "a", "--out", tmp_path / "out")


def test_evaluations_with_inconsistent_answers_are_not_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, [[0.1], [0.2]])
    (tmp_path / "b" / "answers.jsonl").write_text('{"subset": "hard"}\n')
    assert "## Evaluations" in report(tmp_path, "--out", tmp_path / "out")
    assert (
        "the answers.jsonl files of the evaluations are inconsistent (KeyError"
        in (tmp_path / "out" / "report.md").read_text()
    )


# --- complete reports


def test_report_has_tables_figures_and_pages(tmp_path: Path) -> None:
    for temperature in (1, 2):
        for seed in range(2):
            name = f"t{temperature}-{seed}"
            write_run(
                tmp_path / "runs" / name, f"loss.temperature={temperature}", seed=seed, after=0.1 * temperature + seed
            )
    write_evaluation(tmp_path / "evals" / "e")
    (tmp_path / "runs" / "started" / "checkpoints").mkdir(parents=True)
    records = [
        {"world": "w", "estimator": "grouped", "size": 2**k, "seed": s, "relative_variance": (1 + s) / 2**k}
        for k in (1, 2)
        for s in (0, 1)
    ]
    (tmp_path / "tabular").mkdir()
    (tmp_path / "tabular" / "tables.json").write_text(json.dumps({"partition": records}))
    out = tmp_path / "out"
    places = tmp_path / "runs", tmp_path / "evals", tmp_path / "tabular"
    printed = report(*places, "--out", out, "--format", "svg", "--pages", "3")
    drawn = ("cost", "curves", "frontier", "lengths", "variance", "verdicts", "weights")
    assert sorted(path.stem for path in (out / "figures").iterdir()) == list(drawn)
    markdown = (out / "report.md").read_text()
    assert markdown.startswith("# 4 runs, 2 configurations, 1 evaluations")
    for name in drawn:
        assert f"(figures/{name}.svg)" in markdown
    assert "3 of 4 runs have a page" in markdown
    assert "## Skipped (1)" in markdown
    assert "| `loss.temperature=2` | 2 | 2 ± 0 | 0.100 ± 0.000 | 0.700 ± 0.500 |" in markdown
    assert "| one on 100% of it | hard | 0.500 ± 0.200 | 0.250 ± 0.050 | 1.00 | 12.0 ± 1.5 |" in markdown
    runs_table = list(csv.DictReader((out / "tables" / "runs.csv").open()))
    assert [float(row["reward after"]) for row in runs_table] == pytest.approx([0.1, 1.1, 0.2, 1.2])
    assert {"configurations", "difference", "settings", "evaluations"} == {p.stem for p in out.glob("tables/*.tex")}
    assert "started: stopped before its first checkpoint" in printed


def test_only_the_best_of_many_configurations_are_drawn(tmp_path: Path) -> None:
    draw = random.Random(0)
    order = draw.sample(range(70), 70)
    for place, temperature in enumerate(order):
        write_run(tmp_path / "runs" / f"{place:02d}", f"loss.temperature={temperature}", after=temperature / 100)
    read = set()
    curves = RunRecord.curves.func
    with mock.patch.object(RunRecord, "curves", property(lambda self: read.add(self.name) or curves(self))):
        report(tmp_path / "runs", "--out", tmp_path / "out", "--shown", "3", "--pages", "0")
    assert {order[int(name)] for name in read} == {67, 68, 69}
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "50 of 70 rows; tables/configurations.csv has all." in markdown
    assert "the 3 of 70 configurations with the highest reward" in markdown
    assert markdown.index("`loss.temperature=69`") < markdown.index("`loss.temperature=68`")
    assert len(list(csv.DictReader((tmp_path / "out" / "tables" / "configurations.csv").open()))) == 70


def make_group(label: str, before: float, curves: dict[str, dict[int, float]], path: Path) -> Group:
    measures = {"reward before": Estimate(before), "reward after": Estimate(0.5), "KL, nats": Estimate(2.0)}
    run = RunRecord(path, {"validation": {}}, {}, measures)
    run.__dict__["curves"] = {name: pd.Series(values) for name, values in curves.items()}
    return Group(label, [run])


def draw_on_mock(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    """Let figures draw on a mock, and return it."""
    panel = mock.MagicMock()
    monkeypatch.setattr(figures, "draw", lambda _, panels, *__, **___: contextlib.nullcontext([panel] * panels))
    return panel


def test_frontier_has_each_path_and_each_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = draw_on_mock(monkeypatch)
    path = {"validation/kl": {0: 0.0, 10: 1.0, 20: 2.0}, "validation/reward": {0: 0.1, 10: 0.4, 20: 0.5}}
    groups = [
        make_group("a", 0.1, path, tmp_path),
        make_group("b", 0.3, {}, tmp_path),
        make_group("c", 0.1, {}, tmp_path),
    ]
    assert figures.draw_frontier(groups, tmp_path / "x.png")
    stars = [call.args[1] for call in panel.plot.call_args_list if call.args[2:] == ("*",)]
    assert stars == [0.1, 0.3]
    paths = [call.args for call in panel.plot.call_args_list if len(call.args) == 2]
    assert [part.tolist() for part in paths[0]] == [[0.0, 1.0, 2.0], [0.1, 0.4, 0.5]]


def test_long_curves_are_smoothed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = draw_on_mock(monkeypatch)
    noisy = {step: float(step % 2) for step in range(400)}
    groups = [make_group("a", 0.1, {"train/loss": noisy, "validation/kl": {0: 0.0, 9: 1.0}}, tmp_path)]
    assert figures.draw_curves(groups, tmp_path / "x.png")
    raw, smooth, kl = (call.args[0] for call in panel.plot.call_args_list)
    assert raw.tolist() == list(noisy.values())
    assert smooth.iloc[50:350].between(0.45, 0.55).all()
    assert kl.to_dict() == {0: 0.0, 9: 1.0}


def test_runs_without_results_have_no_figures(tmp_path: Path) -> None:
    empty = Group("a", [RunRecord(tmp_path, {"validation": {}}, {}, {})])
    for draw in (figures.draw_curves, figures.draw_frontier, figures.draw_lengths, figures.draw_weights):
        assert not draw([empty], tmp_path / "x.png")
    assert not figures.draw_verdicts([], [empty], tmp_path / "x.png")
    assert not figures.draw_variance([{}], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["![x](http://tracker/i.png)", r"\![x](http://tracker)", "<img src=x>", "a|b", "`x`"])
def test_images_and_markup_in_names_stay_text_in_markdown(text, tmp_path):
    table = pd.DataFrame([[text, text]], columns=["", text], dtype=object)
    for line in tables.to_markdown(table, code=False).splitlines():
        assert not re.search(r"(?<!\\)(\\\\)*(\[|<|`)", line)
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    write_run(tmp_path / "runs" / "a", title=text)
    write_evaluation(tmp_path / "runs" / f"b {text.replace('/', ' ')}", [[0.1]])
    write_report(find_records([tmp_path / "runs"]), tmp_path / "report", "png", 8, 0)
    without_code = re.sub("`[^`\n]*`", "", (tmp_path / "report" / "report.md").read_text())
    assert not re.search(r"\[x\]\(http", without_code)


def test_formulas_in_names_stay_text_in_csv():
    names = ["=HYPERLINK(A1)", "+1", "-1", "@x", "\t=1", "\n=1", "a\r=1"]
    table = pd.DataFrame([[name, -0.5, Estimate(-0.5, 0.1)] for name in names], columns=["=a", "b", "c"], dtype=object)
    rows = list(csv.reader(io.StringIO(tables.to_csv(table), newline="")))
    assert rows[0] == ["'=a", "b", "c", "c, se"]
    assert [row[0] for row in rows[1:]] == [*(f"'{name}" for name in names[:-1]), "a =1"]
    assert all(row[1:] == ["-0.5", "-0.5", "0.1"] for row in rows[1:])
