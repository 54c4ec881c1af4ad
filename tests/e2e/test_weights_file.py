"""`annotate.py export=`: the weights that train, in a file that other trainers read."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from tests.helpers.cli import check_error, check_run, spawn, write_rows, write_to
from tests.helpers.runs import ROOT, run_folder, write_lines

pytestmark = pytest.mark.e2e


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Return the overrides of a run on ten prompts with two responses each."""
    rows = write_rows(tmp_path / "rows.jsonl", prompts=10)
    return [
        f"model.path={tiny_folder}", *write_to(tmp_path), "trainer.accelerator=cpu", "data=files", f"data.path={rows}",
        "data.validation_prompts=2", "data.micro_batch=4", "data.global_batch=4", "eval=off", "reward=exact_number",
    ]  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    table = datasets.Dataset.from_parquet(str(path)) if path.suffix else datasets.load_from_disk(str(path))
    return list(table)


def test_weights_are_those_that_train(own: list[str], tmp_path: Path) -> None:
    paths = [tmp_path / "out" / name for name in ("weights.parquet", "weights.jsonl", "weights")]
    for path in paths:
        assert f"Wrote 16 responses with weights to {path}." in check_run(
            "annotate.py", *own, "loss=var_prompt", "loss.estimator.baseline=zero", "loss.temperature=0.5",
            f"export={path}",
        )  # fmt: skip
    records = read(paths[0])
    assert read(paths[1]) == records == read(paths[2])
    card = (paths[2] / "README.md").read_text()
    assert "16 responses" in card
    assert '"temperature": 0.5' in card
    check_run("train.py", *own, "loss=var_prompt", "loss.estimator.baseline=zero", "loss.temperature=0.5")
    lines = (run_folder(tmp_path / "runs") / "batches.jsonl").read_text().splitlines()
    trained = {(line["id"], line["response"]): line for line in map(json.loads, lines)}
    by_response = {(record["id"], record["response"]): record for record in records}
    assert len(trained) > 4
    for key, line in trained.items():
        names = ("weight", "reward", "prompt")
        assert [line[name] for name in names] == [by_response[key][name] for name in names]
    assert np.mean([record["weight"] for record in records]) == pytest.approx(1)
    assert all(record["reference_logp"] < 0 and record["response_ids"] for record in records)


def test_partition_of_a_group_is_that_of_its_rewards(own: list[str], tmp_path: Path) -> None:
    """log w = r/λ − log Z, so that log Z − log Σ e^{r/λ} is the same for all rows."""
    path = tmp_path / "weights.jsonl"
    check_run(
        "annotate.py", *own, "loss=var_grouped", "loss.temperature_unit=reward", "loss.temperature=0.5",
        f"export={path}",
    )  # fmt: skip
    records = read(path)
    assert [record["log_partition"] is None for record in records] == [not record["weight"] for record in records]
    kept = [record for record in records if record["weight"]]
    rest = []
    for record in kept:
        group = [other["reward"] for other in records if other["id"] == record["id"]]
        rest.append(record["log_partition"] - np.log(np.exp(np.array(group) / 0.5).sum()))
    assert len(rest) > 2
    assert np.ptp(rest) < 1e-9


@pytest.mark.parametrize("words", [["loss=var_roulette"], ["loss=var_value", "loss.estimator.cap=1.01"]])
def test_changed_weights_have_no_partition(own: list[str], tmp_path: Path, words: list[str]) -> None:
    """Roulette raises small weights, and a cap lowers large ones. Neither is exp(r/λ)/Z."""
    path = tmp_path / "weights.jsonl"
    check_run(
        "annotate.py", *own, *words, "loss.temperature_unit=reward", "loss.temperature=0.5", "reward=near_number",
        f"export={path}",
    )  # fmt: skip
    records = read(path)
    changed = (min if "roulette" in words[0] else max)(record["weight"] for record in records if record["weight"])
    for record in records:
        assert (record["log_partition"] is None) == (record["weight"] in (0, changed))
    assert any(record["weight"] == changed for record in records)


def test_invalid_export_is_rejected_before_annotation(own: list[str], tmp_path: Path) -> None:
    (tmp_path / "there.parquet").write_text("mine")
    for words, message in (
        (["loss=var_grouped", f"export={tmp_path}/there.parquet"], "exists; choose another name, or remove it"),
        (["loss=var_grouped", f"export={tmp_path}/x.csv"], "name a file that ends in .parquet or .jsonl"),
        (["loss=dpo", f"export={tmp_path}/x.jsonl"], "has no weights to write"),
        (["loss=var_online", f"export={tmp_path}/x.jsonl"], "has no weights to write"),
        (["loss=var", "reference=live", f"export={tmp_path}/x.jsonl"], "these weights are computed in each step"),
        (["loss=var", "export=3"], "expected the name of a file or a folder, got 3"),
    ):
        check_error(message, *own, *words, command="annotate.py")
    assert (tmp_path / "there.parquet").read_text() == "mine"
    data = write_lines(
        tmp_path / "names.jsonl",
        [
            {
                "id": f"r{i}", "prompt": [{"role": "user", "content": f"x{i}", "name": "Ann"}],
                "responses": ["1", f"b{i}"], "answer": "1",
            }
            for i in range(6)
        ],
    )  # fmt: skip
    printed = check_error(
        "rows with more than text", *own, "loss=var_grouped", f"data.path={data}", f"export={tmp_path}/x.jsonl",
        "data.on_template_change=count", command="annotate.py",
    )  # fmt: skip
    assert "its prompt has name" in printed
    assert not list((tmp_path / "store").rglob("*.arrow"))
    check_error("export: expected settings or null, got", *own, f"export={tmp_path}/x.jsonl", command="train.py")


def test_weight_with_the_reference_in_it_has_no_partition(own: list[str], tmp_path: Path) -> None:
    path = tmp_path / "weights.jsonl"
    words = ["export.push_to_hub=me/x", f"export={path}"]  # train.py's key has no effect here
    check_run("annotate.py", *own, "loss=var", "reward=near_number", *words)
    records = read(path)
    assert {record["log_partition"] for record in records} == {None}
    assert any(record["weight"] for record in records)


@pytest.mark.long
def test_one_of_several_ranks_writes(own: list[str], tmp_path: Path) -> None:
    path = tmp_path / "weights.jsonl"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "annotate.py"))
    process = spawn(*launcher, *own, "loss=var_prompt", "trainer.devices=2", "data.global_batch=8", f"export={path}")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(read(path)) == 16
