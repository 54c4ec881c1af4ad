"""Checks that all losses, or the losses of one family, share: divisors, requirements, settings and shared errors."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch.testing import assert_close

from tests.helpers.losses import VALUE_FIT, double, make_batch, value_and_gradient
from tests.helpers.runs import ROOT
from var.losses.alol import ALoL
from var.losses.apo import APO
from var.losses.bradley_terry import BradleyTerry
from var.losses.dft import DFT
from var.losses.dpo import DPO
from var.losses.dpo_norm import DPONorm
from var.losses.dro import DRO
from var.losses.exo import EXO
from var.losses.grpo import GRPO
from var.losses.hinge import Hinge
from var.losses.infonca import InfoNCA
from var.losses.ipo import IPO
from var.losses.iw_sft import IWSFT
from var.losses.kto import KTO
from var.losses.nca import NCA
from var.losses.orpo import ORPO
from var.losses.ppo import PPO
from var.losses.rgold import RGOLD
from var.losses.rlol import RLoL
from var.losses.rloo import RLOO
from var.losses.robust import Robust
from var.losses.rpo import RPO
from var.losses.sft import SFT
from var.losses.simpo import SimPO
from var.losses.trajectory_balance import TrajectoryBalance
from var.losses.var import VAR
from var.losses.var_online import VAROnline
from var.losses.wbc import WBC
from var.losses.weighted import Weighted
from var.models.packing import Packed
from var.requirements import Rewards
from var.utils.errors import UserError
from var.weights.estimators import Global, InBatch

LOSSES = [
    SFT(), SFT(normalize="sequence"), Weighted(), Weighted(normalize="sequence"),
    VAR(estimator=Global(), temperature_unit="reward"),
    WBC(), RGOLD(), RLoL(), RLoL(ratio="token"), DFT(), DFT(anchor=0.5), IWSFT(),
    ALoL(value=VALUE_FIT), ALoL(value=VALUE_FIT, ratio="token"), ALoL(value=VALUE_FIT, ratio="none", clip=None),
    ALoL(value=VALUE_FIT, ratio="none", clip=None, beta=0.75),
    DPO(beta=0.5), APO(beta=0.5, kind="down"), DPONorm(beta=2.0), EXO(beta=0.5, label_smoothing=0.25), Hinge(beta=0.5),
    IPO(beta=0.5, reduction="mean"), IPO(beta=0.5, reduction="sum"), ORPO(beta=0.5),
    Robust(beta=0.5, label_smoothing=0.25), RPO(beta=0.5, alpha=0.25), SimPO(beta=2.0, gamma=0.5),
    KTO(beta=0.5, desirable_weight=1.5), InfoNCA(beta=0.5, temperature=0.5), NCA(beta=0.5, temperature=0.5),
    DRO(temperature=0.5), *(TrajectoryBalance(temperature=0.5, alpha=alpha) for alpha in (0.0, 0.5, 1.0)),
    GRPO(beta=0.2), GRPO(beta=0.2, normalize="token"), GRPO(beta=0.2, normalize="constant", length=7),
    RLOO(beta=0.5), PPO(beta=0.5, gamma=0.9), VAROnline(temperature=2.0, drop_zero_variance=False),
    VAROnline(temperature=2.0, baseline=True),
]  # fmt: skip

UNCLIPPED = [
    RLoL(clip=None), RLoL(ratio="token", clip=None), ALoL(value=VALUE_FIT, clip=None, clamp=False, draw="all"),
    GRPO(beta=30.0, clip_high=1e6), PPO(clip_value=math.inf), APO(beta=2.0), IPO(beta=2.0),
]  # fmt: skip

# Three pairs, or a group of four and a group of two. Every field that a loss may require is present. The mean of
# mismatched_logps − mismatched_reference_logps, which KTO takes per micro-batch, is 0.375 in each group.
LENGTHS = [2, 1, 1, 2, 3, 1]
BY_TOKEN = {
    "logps": [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -0.5, -0.25, -2.0, -0.75],
    "reference_logps": [-2.0, -3.0, -4.5, -1.0, -2.0, -2.5, -0.25, -0.5, -1.0, -1.0],
    "old_logps": [-1.5, -2.0, -4.25, -2.5, -1.25, -1.5, -0.5, -0.5, -1.75, -1.25],
    "values": [0.5, 1.0, -0.5, 0.25, 0.75, -1.0, 0.0, 0.5, 1.5, 1.0],
    "old_values": [0.25, 1.0, -0.25, 0.5, 0.5, -1.5, 0.5, 0.5, 1.0, 1.25],
}
BY_SEQUENCE = {
    "rewards": [0.5, 2.0, 0.0, 1.0, 1.5, 0.25],
    "weights": [0.5, 2.0, 1.0, 0.25, 1.5, 0.75],
    "advantages": [1.5, 0.25, -2.0, 0.5, 1.0, -0.5],
    "mismatched_logps": [-3.0, -4.0, -5.0, -6.0, -2.0, -2.5],
    "mismatched_reference_logps": [-3.5, -5.0, -4.0, -7.0, -2.25, -3.0],
}
DESIRABLE = [True, True, False, False, True, False]


def make_parts(first: int, last: int, group: list[int]) -> tuple[torch.Tensor, Packed]:
    """Return log-probabilities and the batch of the sequences from `first` to `last`, with the divisors of all six."""
    begin, end = sum(LENGTHS[:first]), sum(LENGTHS[:last])
    fields = {name: double(values[begin:end]) for name, values in BY_TOKEN.items()}
    fields |= {name: double(values[first:last]) for name, values in BY_SEQUENCE.items()}
    logps = fields.pop("logps")
    divisors = {"global_tokens": 10.0, "global_sequences": 6.0, "global_groups": 2.0}
    return logps, make_batch(LENGTHS[first:last], group, desirable=DESIRABLE[first:last], **fields, **divisors)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_losses_and_metrics_of_micro_batches_add_up(loss):
    """The divisors are those of the optimizer step, so the losses of two micro-batches sum to that of one. Nothing in a
    sequence's loss depends on sequences outside its pair or group."""
    complete, metrics = loss(*make_parts(0, 6, [0, 0, 0, 0, 1, 1]))
    first, first_metrics = loss(*make_parts(0, 4, [0, 0, 0, 0]))
    second, second_metrics = loss(*make_parts(4, 6, [0, 0]))
    assert (first + second).item() == pytest.approx(complete.item(), rel=1e-14)
    assert first != second
    for name, (total, number) in metrics.items():
        parts = (first_metrics[name], second_metrics[name])
        assert float(sum(part.total for part in parts)) == pytest.approx(float(total), rel=1e-14)
        assert float(sum(part.number for part in parts)) == float(number)


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (Weighted(), ["weights"]),
        (WBC(), ["rewards"]),
        (ALoL(value=VALUE_FIT), ["advantages", "reference_logps"]),
        (KTO(), ["mismatched_logps"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_gradient_flows_through_weights(loss, names):
    """Also not through A-LoL's ratio and KTO's reference point."""
    logps, batch = make_parts(0, 6, [0, 0, 0, 0, 1, 1])
    for name in names:
        getattr(batch, name).requires_grad_(True)
    loss(logps.requires_grad_(True), batch)[0].backward()
    assert logps.grad is not None
    assert all(getattr(batch, name).grad is None for name in names)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (DPO(beta=0.37), math.log(2)), (DPO(beta=0.37, label_smoothing=0.3), math.log(2)), (IPO(beta=0.1), 25.0),
        (APO(kind="zero"), 1.0), (APO(kind="down"), 1.0), (KTO(desirable_weight=1.5, undesirable_weight=0.5), 0.5),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_loss_at_the_reference(loss, value):
    """Policy = reference: margins are exactly 0. IPO is (1/(2β))², KTO half the mean weight."""
    torch.manual_seed(0)
    logps, same = -torch.rand(10), torch.zeros(6)
    fields = {"reference_logps": logps, "mismatched_logps": same, "mismatched_reference_logps": same}
    assert loss(logps, make_batch(LENGTHS, desirable=DESIRABLE, **fields))[0].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "logps", "value", "gradient"),
    [
        # log σ(−1e4) is −1e4, not −∞. The gradient there is −β per pair.
        (DPO(beta=1.0), [-1e4, 0.0], 1e4, [-1.0, 1.0]),
        # The slope in the margin tends to −β ε/(1 − 2ε) = −0.5 · 0.25/0.5, not to 0.
        (Robust(beta=0.5, label_smoothing=0.25), [0.0, -1e5], -25000.0, [-0.25, 0.25]),
        # The policy is certain of the wrong answer, KL −log ε, or of the right one, −log(1 − ε). There is no 0 · ∞.
        (EXO(beta=1.0, label_smoothing=0.1), [-1e4, 0.0], -math.log(0.1), [0.0, 0.0]),
        (EXO(beta=1.0, label_smoothing=0.1), [0.0, -1e4], -math.log(0.9), [0.0, 0.0]),
    ],
    ids=["dpo", "robust", "exo_wrong", "exo_right"],
)
def test_large_margin_has_the_exact_loss_and_gradient_in_float32(loss, logps, value, gradient):
    batch = make_batch([1, 1], reference_logps=[0.0, 0.0])
    found = value_and_gradient(lambda x: loss(x, batch)[0], torch.tensor(logps))
    assert_close(found, (torch.tensor(value), torch.tensor(gradient)))


@pytest.mark.parametrize("shift", [30.0, 89.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("loss", [*LOSSES, *UNCLIPPED], ids=lambda loss: type(loss).__name__)
def test_extreme_log_ratios_in_float32_equal_float64(loss, sign, shift):
    """Each token of a pair's better or of its worse responses is `shift` nats more or less likely than under the
    reference and the sampling policy. What exceeds float32 is finite and huge, with the right sign."""
    for part in ([1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]):
        logps, batch = make_parts(0, 6, [0, 0, 0, 0, 1, 1])
        moved = sign * shift * torch.tensor(part)[batch.sequence]
        logps = logps + moved.clamp(max=0)
        fields = {name: getattr(batch, name) - moved.clamp(min=0) for name in ("reference_logps", "old_logps")}
        exact = replace(batch, **fields)
        rounded = exact._with(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
        expected = value_and_gradient(lambda x, batch=exact: loss(x, batch)[0], logps)
        found = value_and_gradient(lambda x, batch=rounded: loss(x, batch)[0], logps.float())
        metrics = loss(logps.float(), rounded)[1]
        assert all(math.isfinite(mean.total) for mean in metrics.values())
        for single, exact_one in zip(found, expected, strict=True):
            assert bool(single.isfinite().all())
            huge = exact_one.abs() > 1e34
            assert bool(((single[huge] * exact_one[huge].sign()) > 1e33).all())
            assert_close(single[~huge].double(), exact_one[~huge], rtol=2e-5, atol=1e-6 * shift)


ROLLOUT = "Rollout Rewards OldLogps"


REQUIREMENTS = [
    (SFT(), ""), (Weighted(), "WeightColumn"), (WBC(), "Rewards"), (RGOLD(), "Rewards"),
    (RLoL(), "Rewards ReferenceLogps"),
    (ALoL(value=VALUE_FIT), "Rewards Advantages ReferenceLogps"),
    (ALoL(value=VALUE_FIT, ratio="token"), "Rewards Advantages ReferenceLogps"),
    (ALoL(value=VALUE_FIT, ratio="none", clip=None), "Rewards Advantages"),
    (ALoL(value=VALUE_FIT, ratio="none", clip=None, beta=0.75), "Rewards Advantages ReferenceLogps"),
    *((kind(), "Pairs ReferenceLogps") for kind in (DPO, APO, DPONorm, EXO, Hinge, IPO, Robust, RPO)),
    (SimPO(), "Pairs"), (ORPO(), "Pairs"),
    (KTO(), "Desirable ReferenceLogps MismatchedLogps"),
    (KTO(threshold=0.0), "Rewards Desirable ReferenceLogps MismatchedLogps"),
    (InfoNCA(), "Groups Rewards ReferenceLogps"), (NCA(), "Groups Rewards ReferenceLogps"),
    (TrajectoryBalance(), "Groups Rewards ReferenceLogps"), (DRO(), "Rewards ReferenceLogps TokenValues"),
    (DFT(), ""), (IWSFT(), "ReferenceLogps"),
    (VAROnline(), "Rollout Rewards"),
    (GRPO(beta=0.0), ROLLOUT), (GRPO(beta=0.01), f"{ROLLOUT} ReferenceLogps"),
    (RLOO(beta=0.0), ROLLOUT), (RLOO(beta=0.01), f"{ROLLOUT} ReferenceLogps"),
    (PPO(beta=0.0), f"{ROLLOUT} TokenValues"), (PPO(beta=0.01), f"{ROLLOUT} TokenValues ReferenceLogps"),
]  # fmt: skip


def test_every_configured_loss_is_in_the_lists() -> None:
    """A reward model's loss has no log-probabilities; tests/losses/test_bradley_terry.py tests it."""
    files = [OmegaConf.load(path) for path in (ROOT / "conf" / "loss").glob("*.yaml") if path.stem != "custom"]
    configured = {get_class(cfg._target_) for cfg in files if "_target_" in cfg} - {BradleyTerry}
    assert {type(loss) for loss in LOSSES} == configured
    assert {type(loss) for loss, _ in REQUIREMENTS} == configured - {VAR}  # VAR: tests/losses/test_var.py


@pytest.mark.parametrize(("loss", "names"), REQUIREMENTS, ids=lambda value: type(value).__name__)
def test_requirements_follow_from_the_settings(loss, names):
    assert {type(requirement).__name__ for requirement in loss.requires} == set(names.split())


@pytest.mark.parametrize("loss", [GRPO(), RLOO(), VAROnline()], ids=lambda loss: type(loss).__name__)
def test_group_of_one_response_is_an_error(loss):
    with pytest.raises(UserError) as error:
        loss(*make_parts(0, 6, [0, 0, 0, 0, 1, 2]))
    assert str(error.value) == (
        "generate.responses=1: this loss compares the responses to a prompt, and there is nothing to compare. Set "
        "generate.responses to 2 or more."
    )


@pytest.mark.parametrize("loss", [WBC(), RGOLD(), RLoL()], ids=lambda loss: type(loss).__name__)
def test_rewards_that_are_weights_must_not_be_negative(loss):
    """The provider of rewards checks them before training: a loss would have to wait for the device."""
    assert Rewards(nonnegative=True) in loss.requires


NORMALIZE = "loss.normalize must be token or sequence, got mean"
RATIO = (
    "loss.ratio must be sequence, token or none. loss.clip must be above 0 or null. With loss.ratio=none it must be "
    "null."
)
TEMPERATURE = "loss.beta and loss.temperature must be above 0"
CLIP = "loss.beta must be at least 0 and loss.clip in (0, 1]"
LENGTH = (
    "loss.length is the divisor of loss.normalize=constant. Set it to at least 1 there (for example "
    "generate.max_new_tokens), and otherwise to null."
)
BAD_BETA: list[dict[str, Any]] = [{"beta": 0.0}, {"beta": -1.0}, {"beta": math.nan}]
INVALID: list[tuple[type, list[dict[str, Any]], str]] = [
    *((kind, [{"normalize": "mean"}], NORMALIZE) for kind in (SFT, Weighted, VAR, VAROnline)),
    *(
        (VAR, [{"temperature": value}], f"loss.temperature must be above 0, got {value}. For λ → ∞ use loss=sft.")
        for value in (0.0, math.nan)
    ),
    (VAR, [{"temperature_unit": "std"}], "loss.temperature_unit must be reward or sd, got std"),
    (
        VAR, [{"estimator": InBatch(), "roulette": True, "min_weight": weight} for weight in (0.0, 1.0)],
        "loss.roulette=true needs weights that do not depend on the micro-batch, as those of loss=var_grouped "
        "or var_prompt",
    ),
    (
        VAR, [{"roulette": True}],
        "loss.roulette=true has no effect with loss.min_weight=0. Set loss.min_weight=1.",
    ),
    (
        VAR, [{"min_weight": -0.1}, {"estimator": InBatch(), "min_weight": 0.1}],
        "loss.min_weight must be at least 0, and 0 with an in-batch estimator, whose micro-batches are fixed",
    ),
    (VAROnline, [{"temperature": 0.0}], "loss.temperature must be above 0, got 0.0"),
    (VAROnline, [{"temperature": math.nan}], "loss.temperature must be above 0, got nan"),
    *(
        (RGOLD, [{"floor": floor}], f"loss.floor must be in [0, 1), got {floor}. For weight 1 per token use loss=wbc.")
        for floor in (-0.1, 1.0, math.nan)
    ),
    (
        RLoL, [{"ratio": "none"}, {"ratio": "none", "clip": None}],
        "loss.ratio must be sequence or token here. Without a ratio this is loss=wbc.",
    ),
    (RLoL, [{"clip": -0.1}], RATIO),
    (ALoL, [{"ratio": "group"}, {"clip": 0.0}, {"clip": math.nan}, {"ratio": "none", "clip": 0.9}], RATIO),
    (
        ALoL,
        [
            {"beta": 0.1}, {"beta": 0.1, "ratio": "token"},
            {"beta": -0.1, "ratio": "none", "clip": None}, {"beta": math.nan, "ratio": "none", "clip": None},
        ],
        "loss.beta must be at least 0, and 0 unless loss.ratio=none",
    ),
    (ALoL, [{"draw": "some"}], "loss.draw must be all, uniform or priority, got some"),
    (
        ALoL, [{"draw": "uniform", "clamp": False}],
        "loss.clamp=false has no effect with loss.draw=uniform, which draws only A > 0",
    ),
    (
        DPO, [*BAD_BETA, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}],
        "loss.beta must be above 0 and loss.label_smoothing in [0, 0.5)",
    ),
    (
        EXO, [*BAD_BETA, {"label_smoothing": 0.5}, {"label_smoothing": 0.0}],
        "loss.beta must be above 0 and loss.label_smoothing in (0, 0.5)",
    ),
    (
        Robust, [*BAD_BETA, {"label_smoothing": 0.5}, {"label_smoothing": 0.0}],
        "loss.beta must be above 0 and loss.label_smoothing in (0, 0.5). For 0 use loss=dpo.",
    ),
    (APO, [*BAD_BETA, {"kind": "up"}], "loss.beta must be above 0 and loss.kind zero or down"),
    *((kind, BAD_BETA, "loss.beta must be above 0") for kind in (DPONorm, Hinge)),
    (IPO, [*BAD_BETA, {"reduction": "token"}], "loss.beta must be above 0 and loss.reduction sum or mean"),
    (ORPO, BAD_BETA, "loss.beta must be above 0. For 0 use loss=sft with data.responses=chosen."),
    (
        RPO, [*BAD_BETA, {"alpha": 0.0}, {"alpha": math.nan}],
        "loss.beta and loss.alpha must be above 0. For α = 0 use loss=dpo.",
    ),
    (SimPO, [*BAD_BETA, {"gamma": -0.1}, {"gamma": math.nan}], "loss.beta must be above 0 and loss.gamma at least 0"),
    (
        KTO, [*BAD_BETA, {"desirable_weight": 0.0}, {"undesirable_weight": math.nan}],
        "loss.beta, loss.desirable_weight and loss.undesirable_weight must be above 0",
    ),
    *((kind, [*BAD_BETA, {"temperature": 0.0}], TEMPERATURE) for kind in (InfoNCA, NCA)),
    (
        TrajectoryBalance, [{"temperature": 0.0}, {"alpha": -0.1}, {"alpha": 1.1}, {"alpha": math.nan}],
        "loss.temperature must be above 0 and loss.alpha in [0, 1]",
    ),
    (
        DRO, [{"temperature": 0.0}, {"value_weight": 0.0}, {"value_weight": math.nan}],
        "loss.temperature and loss.value_weight must be above 0",
    ),
    (DFT, [{"anchor": -0.1}], "loss.anchor must be at least 0, got -0.1"),
    (
        IWSFT, [{"exponent": 0.0}, {"largest": 0.5}, {"largest": math.nan}, {"largest": math.inf}],
        "loss.exponent must be above 0, and loss.largest at least 1 and finite. For weight 1 use loss=sft.",
    ),
    (
        GRPO,
        [
            {"beta": -0.1}, {"beta": math.nan}, {"clip_low": 0.0}, {"clip_low": 1.1}, {"clip_high": 0.0},
            {"clip_high": math.nan},
        ],
        "loss.beta must be at least 0, loss.clip_low in (0, 1] and loss.clip_high above 0",
    ),
    (
        GRPO, [{"scale": "batch"}, {"normalize": "mean"}],
        "loss.scale must be std or none, and loss.normalize sequence, token or constant",
    ),
    (GRPO, [{"normalize": "constant"}, {"length": 20}, {"normalize": "constant", "length": 0}], LENGTH),
    *((kind, [{"beta": -0.1}, {"beta": math.nan}, {"clip": 0.0}, {"clip": 1.5}], CLIP) for kind in (RLOO, PPO)),
    (
        PPO, [{"gamma": 0.0}, {"gamma": 1.1}, {"lam": -0.1}, {"lam": 1.1}],
        "loss.gamma must be in (0, 1] and loss.lam in [0, 1]",
    ),
    (
        PPO, [{"clip_value": 0.0}, {"value_weight": 0.0}, {"value_weight": math.nan}],
        "loss.clip_value and loss.value_weight must be above 0. For no bound use loss.clip_value=.inf.",
    ),
]  # fmt: skip
REQUIRED_SETTINGS = {VAR: {"estimator": Global(), "temperature_unit": "reward"}, ALoL: {"value": VALUE_FIT}}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [(kind, options, message) for kind, several, message in INVALID for options in several],
)
def test_invalid_settings_are_errors(kind, options, message):
    with pytest.raises(UserError) as error:
        kind(**{**REQUIRED_SETTINGS.get(kind, {}), **options})
    assert str(error.value) == message
