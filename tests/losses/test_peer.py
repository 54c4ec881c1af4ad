"""Beside TRL: its own loss code on given log-probabilities, and whole steps of its trainers on a tiny model."""

import copy
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers.models import pretrained
from tests.losses.conftest import value_and_gradient
from var.data.chat import Chat
from var.losses.dpo import DPO
from var.losses.ipo import IPO
from var.losses.sft import SFT
from var.models.packing import pack
from var.models.policy import Policy

pytestmark = pytest.mark.peer

LENGTHS = [4, 2, 1, 5, 3, 3, 6, 2]  # of pairs, better and worse in turn; no two pairs are alike
TRIPLES = [
    ("hi", "hello there", "no"),
    ("what is 2 + 2?", "4", "it is 5, or is it not?"),
    ("a", "bcd", "b c d e f g"),
]  # prompt, better, worse


# --- on given log-probabilities, in float64


def trl_loss(kind: str, logps: Tensor, reference: Tensor, beta: float, smoothing: float) -> Tensor:
    """TRL's DPOTrainer._compute_loss, log-probabilities standing in for its models. Both [N], of LENGTHS."""
    from trl.trainer.dpo_trainer import DPOTrainer

    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    order = [*range(0, len(LENGTHS), 2), *range(1, len(LENGTHS), 2)]  # TRL: all better ones, then all worse ones
    mask = torch.stack([(torch.arange(8) > 0) & (torch.arange(8) <= LENGTHS[i]) for i in order]).long()

    def model(values: Tensor) -> Any:
        rows = [
            torch.cat([values[starts[i] : starts[i] + LENGTHS[i]], values.new_zeros(7 - LENGTHS[i])]) for i in order
        ]
        zeros = torch.zeros(len(order), 7)
        return lambda **_: SimpleNamespace(
            log_probs=torch.stack(rows), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
        )

    nothing = torch.nn.Module()
    nothing.is_gradient_checkpointing = False  # type: ignore[assignment]
    trainer = SimpleNamespace(
        model=nothing, ref_model=model(reference),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl",
        loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=smoothing, use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), _tp_size=1, _total_train_tokens=0,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {"completion_mask": mask, "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask)}
    return DPOTrainer._compute_loss(trainer, model(logps), inputs, False)


def given(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return tuple(-4 * torch.rand(sum(LENGTHS), dtype=torch.float64) ** 2 for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(
    ("kind", "smoothing", "ours"),
    [
        ("sigmoid", 0.0, lambda beta: DPO(beta=beta)),
        ("sigmoid", 0.3, lambda beta: DPO(beta=beta)),  # TRL's sigmoid ignores label_smoothing
        ("ipo", 0.0, lambda beta: IPO(beta=beta, reduction="mean")),
    ],
)
def test_dpo_and_ipo_are_trls(batch_of, kind, smoothing, ours, beta, seed):
    logps, reference = given(seed)
    batch = batch_of(LENGTHS, reference_logps=reference)
    mine = value_and_gradient(lambda x: ours(beta)(x, batch)[0], logps)
    theirs = value_and_gradient(lambda x: trl_loss(kind, x, reference, beta, smoothing), logps)
    assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_conservative_dpo_by_trls_robust_dpo(batch_of, smoothing):
    """TRL has no cDPO. Its `robust` is ((1 − ε) l(m) − ε l(−m))/(1 − 2ε) where cDPO is (1 − ε) l(m) + ε l(−m), l the
    logistic loss: cDPO = (1 − 2ε) robust + 2ε l(−m), and l(−m) is `sigmoid` at −β."""
    logps, reference = given(7)
    batch = batch_of(LENGTHS, reference_logps=reference)

    def theirs(x: Tensor) -> Tensor:
        robust = trl_loss("robust", x, reference, 0.5, smoothing)
        return (1 - 2 * smoothing) * robust + 2 * smoothing * trl_loss("sigmoid", x, reference, -0.5, 0.0)

    mine = value_and_gradient(lambda x: DPO(beta=0.5, label_smoothing=smoothing)(x, batch)[0], logps)
    assert_close(mine, value_and_gradient(theirs, logps), rtol=1e-12, atol=1e-14)


# --- whole steps of its trainers, in float32


@pytest.fixture
def folders(tiny_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A policy and its reference, which differ."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy", tiny_folder


def settings(tmp_path: Path, **options: Any) -> dict[str, Any]:
    return dict(
        output_dir=str(tmp_path / "trl"), max_steps=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        max_grad_norm=1e9, save_strategy="no", disable_tqdm=True, max_length=None, gradient_checkpointing=False,
        **options,
    )  # fmt: skip


def logged(trainer: Any) -> tuple[float, float]:
    """Loss and gradient norm of the one step."""
    trainer.train()
    first = trainer.state.log_history[0]
    return first["loss"], first["grad_norm"]


def norm_of(policy: Policy) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None]))


def with_padding(tokenizer: Any) -> Any:
    """A copy, for the trainers pad."""
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = "<end>"
    return padded


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_a_step_of_trls_dpo_trainer(folders, tokenizer, tmp_path, kind):
    """The same texts through its tokenisation, padding and models: loss and gradient norm of three pairs."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    records = [
        {"prompt": said("user", p), "chosen": said("assistant", a), "rejected": said("assistant", b)}
        for p, a, b in TRIPLES
    ]
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folders[0]),
        ref_model=AutoModelForCausalLM.from_pretrained(folders[1]),
        args=DPOConfig(**settings(tmp_path, loss_type=[kind], beta=0.2, per_device_train_batch_size=3)),
        train_dataset=Dataset.from_list(records),
        processing_class=with_padding(tokenizer),
    )
    theirs = logged(trainer)
    chat = Chat(tokenizer)
    rows = [chat.encode(said("user", p), text) for p, *both in TRIPLES for text in both]
    batch = pack([row.ids for row in rows], [row.start for row in rows], global_sequences=6.0)
    policy, reference = (Policy(pretrained(folder, tmp_path).load()) for folder in folders)
    with torch.no_grad():
        batch = replace(batch, reference_logps=reference(batch))
    loss = DPO(beta=0.2) if kind == "sigmoid" else IPO(beta=0.2, reduction="mean")
    value, _ = loss(policy(batch), batch)
    value.backward()
    assert (value.item(), norm_of(policy)) == pytest.approx(theirs, rel=2e-5)


def test_a_step_of_trls_sft_trainer_with_two_accumulated_micro_batches(folders, tokenizer, tmp_path):
    """Divisor: the unmasked labels of both micro-batches, whose token counts differ much. Ours: the same divisor in
    each, and the two shares add up."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    chat = Chat(tokenizer)
    texts = [("hi", "a"), ("what is 2 + 2?", "it is four, as far as I can tell you"), ("a", "bc"), ("bb", "def gh")]
    rows = [chat.encode([{"role": "user", "content": p}], text) for p, text in texts]
    records = [{"input_ids": r.ids, "labels": [-100] * r.start + r.ids[r.start :]} for r in rows]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folders[0]),
        args=SFTConfig(
            **settings(
                tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                dataset_kwargs={"skip_prepare_dataset": True},
            )
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=with_padding(tokenizer),
    )  # fmt: skip
    theirs = logged(trainer)
    policy = Policy(pretrained(folders[0], tmp_path).load())
    step = {"global_tokens": float(sum(len(r.ids) - r.start for r in rows)), "global_sequences": 4.0}
    total = 0.0
    for micro in (rows[:2], rows[2:]):
        batch = pack([r.ids for r in micro], [r.start for r in micro], **step)
        value, _ = SFT()(policy(batch), batch)
        value.backward()
        total += value.item()
    assert total == pytest.approx(theirs[0], abs=1e-6)
    assert norm_of(policy) == pytest.approx(theirs[1], rel=2e-5)
