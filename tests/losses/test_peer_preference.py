"""Preference losses compared with TRL's loss code on given log-probabilities in float64: values and gradients."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from tests.helpers.losses import make_batch, value_and_gradient
from var.losses.apo import APO
from var.losses.dpo import DPO
from var.losses.dpo_norm import DPONorm
from var.losses.exo import EXO
from var.losses.hinge import Hinge
from var.losses.infonca import InfoNCA
from var.losses.ipo import IPO
from var.losses.kto import KTO
from var.losses.nca import NCA
from var.losses.orpo import ORPO
from var.losses.robust import Robust
from var.losses.rpo import RPO
from var.losses.simpo import SimPO

pytestmark = pytest.mark.peer

LENGTHS = [4, 2, 1, 5, 3, 3, 6, 2]  # of pairs, the better response first. No two pairs are alike.
PAIR_TOKENS = [6, 6, 6, 8]
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


@pytest.fixture(autouse=True)
def compute_in_float64(monkeypatch):
    """Use float64 only. TRL makes scalars in the default dtype (EXO's ε) and casts to float32 (ORPO's log-odds)."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw_logps(seed: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N] of the policy and of the reference."""
    torch.manual_seed(seed)
    return tuple(-4 * torch.rand(sum(LENGTHS)) ** 2 for _ in range(2))  # type: ignore[return-value]


def assert_equal(ours: Any, theirs: Any, logps: Tensor) -> None:
    """Compare the values and gradients of two functions at `logps`."""
    assert_close(value_and_gradient(ours, logps), value_and_gradient(theirs, logps), rtol=1e-12, atol=1e-14)


def average_over_pairs(function: Any, *values: Tensor) -> Tensor:
    """Return the mean of a function of lengths and values [N] over micro-batches of one pair."""
    pairs = zip(*(value.split(PAIR_TOKENS) for value in values), strict=True)
    return torch.stack([function(LENGTHS[2 * i : 2 * i + 2], *pair) for i, pair in enumerate(pairs)]).mean()


def pad(values: Tensor, lengths: list[int], order: list[int]) -> Tensor:
    """Return `values` [N] as [B, longest], with the sequences in this order."""
    rows = values.split(lengths)
    return pad_sequence([rows[i] for i in order], batch_first=True)


def make_response_mask(lengths: list[int], order: list[int]) -> Tensor:
    """Return [B, 1 + longest]: one prompt token, then the response."""
    return pad_sequence([torch.tensor([0] + [1] * lengths[i]) for i in order], batch_first=True)


def order_by_side(lengths: list[int]) -> list[int]:
    """Return TRL's order of sequences: all better ones, then all worse ones."""
    return [*range(0, len(lengths), 2), *range(1, len(lengths), 2)]


def make_logp_model(rows: Tensor) -> Any:
    """Return a model whose log-probabilities per token TRL reads."""
    zeros = torch.zeros(rows.shape)
    return lambda **_: SimpleNamespace(
        log_probs=rows, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
    )


def make_logit_model(rows: Tensor) -> Any:
    """Return a model with two tokens, whose logits give token 0 the log-probabilities `rows` [B, longest]."""
    logits = torch.stack([rows, (-rows.clamp(max=-1e-9).expm1()).log()], -1)
    last = logits.new_zeros(len(rows), 1, 2)
    return lambda *_, **__: SimpleNamespace(logits=torch.cat([logits, last], 1))


def make_trainer(**options: Any) -> Any:
    """Return the attributes that DPOTrainer._compute_loss and KTOTrainer._compute_loss both read."""
    nothing: Any = torch.nn.Module()
    nothing.is_gradient_checkpointing = False
    return SimpleNamespace(
        model=nothing, aux_loss_enabled=False, precompute_ref_logps=False, accelerator=ACCELERATOR, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), _total_train_tokens=0,
        _metrics={"train": defaultdict(list)}, **options,
    )  # fmt: skip


# Pairs with a reference


def trl_dpo(kinds: dict[str, float], logps: Tensor, reference: Tensor, lengths: list[int], **options: Any) -> Tensor:
    """Return DPOTrainer._compute_loss with log-probabilities in place of models. `kinds` are weighted loss types."""
    from trl.trainer.dpo_trainer import DPOTrainer

    order = order_by_side(lengths)
    trainer = make_trainer(
        ref_model=make_logp_model(pad(reference, lengths, order)), ld_alpha=None, f_divergence_type="reverse_kl",
        loss_types=list(kinds), loss_weights=list(kinds.values()), use_weighting=False,
        **{"label_smoothing": 0.0, **options},
    )  # fmt: skip
    mask = make_response_mask(lengths, order)
    inputs = {"completion_mask": mask, "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask)}
    return DPOTrainer._compute_loss(trainer, make_logp_model(pad(logps, lengths, order)), inputs, False)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(
    ("kind", "smoothing", "ours"),
    [
        ("sigmoid", 0.0, lambda beta: DPO(beta=beta)),
        ("sigmoid", 0.3, lambda beta: DPO(beta=beta)),  # TRL's sigmoid ignores label_smoothing
        ("ipo", 0.0, lambda beta: IPO(beta=beta, reduction="mean")),
        ("robust", 0.1, lambda beta: Robust(beta=beta, label_smoothing=0.1)),
        ("robust", 0.4, lambda beta: Robust(beta=beta, label_smoothing=0.4)),
        ("hinge", 0.0, lambda beta: Hinge(beta=beta)),
        ("sigmoid_norm", 0.0, lambda beta: DPONorm(beta=beta)),
        ("exo_pair", 0.001, lambda beta: EXO(beta=beta, label_smoothing=0.001)),
        ("exo_pair", 0.3, lambda beta: EXO(beta=beta, label_smoothing=0.3)),
        ("apo_zero", 0.0, lambda beta: APO(beta=beta, kind="zero")),
        ("apo_down", 0.0, lambda beta: APO(beta=beta, kind="down")),
    ],
)
def test_pair_losses_with_a_reference_equal_trl(kind, smoothing, ours, beta, seed):
    logps, reference = draw_logps(seed)
    batch = make_batch(LENGTHS, reference_logps=reference)

    def theirs(x: Tensor) -> Tensor:
        return trl_dpo({kind: 1.0}, x, reference, LENGTHS, beta=beta, label_smoothing=smoothing)

    assert_equal(lambda x: ours(beta)(x, batch)[0], theirs, logps)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_conservative_dpo_follows_from_trl_robust_dpo(smoothing):
    """TRL has no cDPO. Its `robust` is ((1 − ε) l(m) − ε l(−m))/(1 − 2ε) and cDPO is (1 − ε) l(m) + ε l(−m), where l is
    the logistic loss. So cDPO = (1 − 2ε) robust + 2ε l(−m), and l(−m) is `sigmoid` at −β."""
    logps, reference = draw_logps(7)
    batch = make_batch(LENGTHS, reference_logps=reference)

    def theirs(x: Tensor) -> Tensor:
        robust = trl_dpo({"robust": 1.0}, x, reference, LENGTHS, beta=0.5, label_smoothing=smoothing)
        flipped = trl_dpo({"sigmoid": 1.0}, x, reference, LENGTHS, beta=-0.5)
        return (1 - 2 * smoothing) * robust + 2 * smoothing * flipped

    assert_equal(lambda x: DPO(beta=0.5, label_smoothing=smoothing)(x, batch)[0], theirs, logps)


@pytest.mark.parametrize("seed", range(3))
def test_rpo_equals_trl_sigmoid_with_sft_pair_by_pair(seed):
    """TRL's `sft` divides by the chosen tokens of the micro-batch. If that is one pair, this is the paper's NLL. Over
    all pairs at once it weights long chosen responses more, and differs."""
    logps, reference = draw_logps(seed)
    batch = make_batch(LENGTHS, reference_logps=reference)

    def ours(x: Tensor) -> Tensor:
        return RPO(beta=0.3, alpha=0.7)(x, batch)[0]

    def compute_theirs(lengths: list[int], x: Tensor, y: Tensor) -> Tensor:
        return trl_dpo({"sigmoid": 1.0, "sft": 0.7}, x, y, lengths, beta=0.3)

    assert_equal(ours, lambda x: average_over_pairs(compute_theirs, x, reference), logps)
    assert abs(compute_theirs(LENGTHS, logps, reference) - ours(logps)) > 1e-3


# Groups: TRL has pairs, which are the limit of unbounded rewards


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "ours"), [("nca_pair", NCA), ("sigmoid", InfoNCA)])
def test_groups_of_two_equal_trl_pairs_in_the_limit(kind, ours, seed):
    """At a reward gap of 1e3 α the target is exactly 1 and 0."""
    logps, reference = draw_logps(seed)
    batch = make_batch(
        LENGTHS, reference_logps=reference, group=[0, 0, 1, 1, 2, 2, 3, 3], global_groups=4.0,
        rewards=torch.tensor([5.0, -5.0, 9.0, -1.0, 10.0, 0.0, 0.0, -10.0]),
    )  # fmt: skip
    loss = ours(beta=0.7, temperature=0.01)
    assert_equal(lambda x: loss(x, batch)[0], lambda x: trl_dpo({kind: 1.0}, x, reference, LENGTHS, beta=0.7), logps)


# Pairs without a reference


def trl_batch(lengths: list[int], order: list[int]) -> dict[str, Tensor]:
    """Return a collated batch of one prompt token and token 0, as the trainers without a reference read it."""
    mask = make_response_mask(lengths, order)
    attended = mask.clone()
    attended[:, 0] = 1
    zeros = torch.zeros_like(mask)
    inputs = {"input_ids": zeros, "labels": zeros.masked_fill(mask == 0, -100), "attention_mask": attended}
    half = len(order) // 2
    return {
        f"{side}_{name}": value[rows]
        for name, value in inputs.items()
        for side, rows in (("chosen", slice(half)), ("rejected", slice(half, None)))
    }


def trl_without_reference(trainer_class: Any, logps: Tensor, lengths: list[int], **options: Any) -> Tensor:
    """Return the trainer's get_batch_loss_metrics, with log-probabilities in place of a model."""
    order = order_by_side(lengths)
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, is_encoder_decoder=False, aux_loss_enabled=False, padding_value=0, pad_token_id=0,
        concatenated_inputs=trainer_class.concatenated_inputs, get_batch_logps=trainer_class.get_batch_logps, **options,
    )  # fmt: skip
    for name in ("concatenated_forward", "odds_ratio_loss", "cpo_loss"):
        if hasattr(trainer_class, name):
            setattr(trainer, name, getattr(trainer_class, name).__get__(trainer))
    model = make_logit_model(pad(logps, lengths, order))
    return trainer_class.get_batch_loss_metrics(trainer, model, trl_batch(lengths, order))[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.1, 0.5), (3.0, 0.0)])
def test_simpo_equals_trl(beta, gamma, seed):
    """CPOTrainer's `simpo` without its NLL. Its γ is the paper's and ours."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logps, _ = draw_logps(seed)
    options = dict(loss_type="simpo", beta=beta, simpo_gamma=gamma, cpo_alpha=0.0, alpha=0.0, label_smoothing=0.0)
    assert_equal(
        lambda x: SimPO(beta=beta, gamma=gamma)(x, make_batch(LENGTHS))[0],
        lambda x: trl_without_reference(CPOTrainer, x, LENGTHS, **options),
        logps,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_orpo_equals_trl_pair_by_pair(beta, seed):
    """TRL's NLL covers all tokens that the model predicts, also those of the prompt. With one prompt token they are
    those of the response. In a micro-batch of one pair its divisor is the chosen response's length, as is ours."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logps, _ = draw_logps(seed)

    def compute_theirs(lengths: list[int], x: Tensor) -> Tensor:
        return trl_without_reference(ORPOTrainer, x, lengths, beta=beta)

    ours = ORPO(beta=beta)
    assert_equal(lambda x: ours(x, make_batch(LENGTHS))[0], lambda x: average_over_pairs(compute_theirs, x), logps)


# Single responses


def trl_kto(logps: Tensor, reference: Tensor, mismatched: Tensor, desirable: Tensor, **options: Any) -> Tensor:
    """Return KTOTrainer._compute_loss. `mismatched` [2, N]: log-probabilities per token of other sequences' responses,
    here of the same lengths, by the policy and by the reference."""
    from trl.trainer.kto_trainer import KTOTrainer

    order = list(range(len(LENGTHS)))
    mask = make_response_mask(LENGTHS, order)

    def model(own: Tensor, other: Tensor) -> Any:
        """Return a model. TRL marks the pass over mismatched responses by its input ids, here 1."""

        def forward(input_ids: Tensor, **_: Any) -> Any:
            return make_logp_model(pad(other if bool(input_ids.any()) else own, LENGTHS, order))()

        return forward

    trainer = make_trainer(ref_model=model(reference, mismatched[1]), calculate_KL=True, loss_type="kto", **options)
    trainer._compute_kl_logps = KTOTrainer._compute_kl_logps.__get__(trainer)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {f"KL_{name}": value for name, value in inputs.items()} | {"label": desirable}
    inputs["KL_input_ids"] = torch.ones_like(mask)
    return KTOTrainer._compute_loss(trainer, model(logps, mismatched[0]), inputs, False)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_kto_equals_trl(beta, seed):
    """With seeds 0 and 1 the reference point is above 0, with 2 and 3 it is clamped."""
    logps, reference = draw_logps(seed)
    mismatched = torch.stack(draw_logps(seed + 100)).sort(0, descending=seed < 2).values
    desirable = torch.tensor([True, False, False, True, True, False, True, False])
    weights = dict(beta=beta, desirable_weight=1.3, undesirable_weight=0.6)
    sums = [torch.stack([row.sum() for row in values.split(LENGTHS)]) for values in mismatched]
    batch = make_batch(
        LENGTHS, reference_logps=reference, desirable=desirable, mismatched_logps=sums[0],
        mismatched_reference_logps=sums[1],
    )  # fmt: skip
    loss = KTO(**weights)
    assert (float(loss(logps, batch)[1]["kl"].total) > 0) == (seed < 2)
    assert_equal(lambda x: loss(x, batch)[0], lambda x: trl_kto(x, reference, mismatched, desirable, **weights), logps)
