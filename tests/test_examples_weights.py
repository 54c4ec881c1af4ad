"""The examples that train on exported weights give this project's curve, or in expectation its gradient."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.helpers.cli import check_run, write_rows, write_to
from tests.helpers.runs import ROOT, column, curve, run_folder

EXAMPLES = ROOT / "examples"
STEPS = 6


@pytest.fixture
def exported(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[float]]:
    """Return a file of weights in the order of a run's first epoch, and the run's losses."""
    monkeypatch.syspath_prepend(EXAMPLES)
    rows = write_rows(tmp_path / "rows.jsonl", prompts=14)
    own = [
        f"model.path={tiny_folder}", *write_to(tmp_path), "trainer.accelerator=cpu", "data=files", f"data.path={rows}",
        "data.validation_prompts=2", "data.micro_batch=2", "data.global_batch=4", "eval=off", "reward=exact_number",
        "loss=var_prompt", "loss.estimator.baseline=zero", "loss.temperature=0.5", "optim.schedule.kind=constant",
        "optim.schedule.warmup=0", "trainer.precision=32-true", f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=1", "model.learning_rate=1e-3",
    ]  # fmt: skip
    check_run("train.py", *own)
    check_run("annotate.py", *own, f"export={tmp_path}/weights.parquet")
    folder = run_folder(tmp_path / "runs")
    with np.load(folder / "plan.npz") as plan:
        order = plan["micro"].flatten()
    path = tmp_path / "ordered.parquet"
    Dataset.from_parquet(str(tmp_path / "weights.parquet")).select(order).to_parquet(str(path))
    return path, column(curve(folder), "train/loss")


def test_plain_torch_gives_the_same_curve(
    exported: tuple[Path, list[float]], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import weights_torch

    path, losses = exported
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda rows, batch, shuffle, collate_fn: loader(
            rows, batch, shuffle=False, collate_fn=collate_fn
        ),
    )  # fmt: skip
    weights_torch.main(str(path), str(tiny_folder), str(tmp_path / "out"), batch=4, learning_rate=1e-3, epochs=1)
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("loss")]
    assert printed[:STEPS] == pytest.approx(losses, abs=6e-5)
    assert np.ptp(losses) > 1  # their weights differ


@pytest.mark.peer
def test_trl_gives_the_same_curve(
    exported: tuple[Path, list[float]], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weights_trl

    path, losses = exported
    monkeypatch.setattr(
        weights_trl.WeightedSFTTrainer, "_get_train_sampler", lambda self, *_: torch.utils.data.SequentialSampler(
            self.train_dataset
        ),
    )  # fmt: skip
    trainer = weights_trl.make_trainer(
        str(path), str(tiny_folder), output_dir=str(tmp_path / "trl"), max_steps=STEPS, logging_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, lr_scheduler_type="constant",
        adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer.train()
    found = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert found == pytest.approx(losses, abs=6e-5)


def test_chats_are_repeated_in_proportion_to_the_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import weights_chat

    prompt = [{"role": "user", "content": "x"}]
    weights = {"a": 0.0, "b": 0.25, "c": 1.0, "d": 2.75}
    rows = [{"prompt": prompt, "response": text, "weight": w} for text, w in weights.items()] * 400
    (tmp_path / "weights.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights_chat.main(tmp_path / "weights.jsonl", tmp_path / "chats.jsonl")
    chats = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert all(chat[:1] == prompt and chat[1]["role"] == "assistant" for chat in chats)
    counts = Counter(chat[1]["content"] for chat in chats)
    assert (counts["a"], counts["c"]) == (0, 400)
    assert counts["b"] / 400 == pytest.approx(0.25, abs=0.07)
    assert counts["d"] / 400 == pytest.approx(2.75, abs=0.07)
