"""Complete optimizer steps of TRL's trainers on a tiny model, in float32."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import pretrained
from var.data.chat import Chat
from var.losses.dft import DFT
from var.losses.dpo import DPO
from var.losses.ipo import IPO
from var.losses.sft import SFT
from var.models.packing import pack
from var.models.policy import Policy

pytestmark = pytest.mark.peer

TRIPLES = [
    ("hi", "hello there", "no"),
    ("what is 2 + 2?", "4", "it is 5, or is it not?"),
    ("a", "bcd", "b c d e f g"),
]  # prompt, better, worse


@pytest.fixture
def folders(tiny_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return the folders of a policy and of its reference, which differ."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy", tiny_folder


def make_settings(tmp_path: Path, **options: Any) -> dict[str, Any]:
    """Return TRL's settings for one step on the CPU."""
    return dict(
        output_dir=str(tmp_path / "trl"), max_steps=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        max_grad_norm=1e9, save_strategy="no", disable_tqdm=True, max_length=None, gradient_checkpointing=False,
        **options,
    )  # fmt: skip


def train_one_step(trainer: Any) -> tuple[float, float]:
    """Return the loss and the gradient norm of the trainer's step."""
    trainer.train()
    first = trainer.state.log_history[0]
    return first["loss"], first["grad_norm"]


def compute_norm(policy: Policy) -> float:
    """Return the norm of the policy's gradient."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None]))


def add_padding(tokenizer: Any) -> Any:
    """Return a copy of the tokenizer with a padding token, which the trainers use."""
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = "<end>"
    return padded


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_step_equals_trl(folders, tokenizer, tmp_path, kind):
    """The same texts through TRL's tokenization, padding and models: loss and gradient norm of three pairs."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    records = [
        {name: [{"role": roles[name], "content": text}] for name, text in zip(roles, texts, strict=True)}
        for texts in TRIPLES
    ]
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folders[0]),
        ref_model=AutoModelForCausalLM.from_pretrained(folders[1]),
        args=DPOConfig(**make_settings(tmp_path, loss_type=[kind], beta=0.2, per_device_train_batch_size=3)),
        train_dataset=Dataset.from_list(records),
        processing_class=add_padding(tokenizer),
    )
    theirs = train_one_step(trainer)
    chat = Chat(tokenizer)
    rows = [
        chat.encode(record["prompt"], text)
        for record, texts in zip(records, TRIPLES, strict=True)
        for text in texts[1:]
    ]
    batch = pack([row.ids for row in rows], [row.start for row in rows], global_sequences=6.0)
    policy, reference = (Policy(pretrained(folder, tmp_path).load()) for folder in folders)
    with torch.no_grad():
        batch = replace(batch, reference_logps=reference(batch))
    loss = DPO(beta=0.2) if kind == "sigmoid" else IPO(beta=0.2, reduction="mean")
    value, _ = loss(policy(batch), batch)
    value.backward()
    assert (value.item(), compute_norm(policy)) == pytest.approx(theirs, rel=2e-5)


@pytest.mark.parametrize(("kind", "loss"), [("nll", SFT()), ("dft", DFT())])
def test_accumulated_sft_step_equals_trl(folders, tokenizer, tmp_path, kind, loss):
    """TRL divides by the unmasked labels of both micro-batches, whose token counts differ much. Our two micro-batches
    have that divisor each, and their losses add up."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    chat = Chat(tokenizer)
    texts = [("hi", "a"), ("what is 2 + 2?", "it is four, as far as I can tell you"), ("a", "bc"), ("bb", "def gh")]
    rows = [chat.encode([{"role": "user", "content": p}], text) for p, text in texts]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "loss_type": kind}
    options["dataset_kwargs"] = {"skip_prepare_dataset": True}
    records = [{"input_ids": r.ids, "labels": [-100] * r.start + r.ids[r.start :]} for r in rows]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folders[0]),
        args=SFTConfig(**make_settings(tmp_path, **options)),
        train_dataset=Dataset.from_list(records),
        processing_class=add_padding(tokenizer),
    )  # fmt: skip
    theirs = train_one_step(trainer)
    policy = Policy(pretrained(folders[0], tmp_path).load())
    step = {"global_tokens": float(sum(len(r.ids) - r.start for r in rows)), "global_sequences": 4.0}
    total = 0.0
    for micro in (rows[:2], rows[2:]):
        batch = pack([r.ids for r in micro], [r.start for r in micro], **step)
        value, _ = loss(policy(batch), batch)
        value.backward()
        total += value.item()
    assert total == pytest.approx(theirs[0], abs=1e-6)
    assert compute_norm(policy) == pytest.approx(theirs[1], rel=2e-5)
