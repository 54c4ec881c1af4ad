"""GRPO, Dr. GRPO, DAPO: advantages, each side of the clip, the KL term and the three divisors, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds, loss_and_gradient
from var.losses.grpo import GRPO
from var.requirements import OldLogps, ReferenceLogps, Rewards, Rollout
from var.utils.errors import UserError

# two groups: of two responses (2 tokens, 1) and of three (1, 2, 1)
LENGTHS, GROUP, REWARDS = [2, 1, 1, 2, 1], [0, 0, 1, 1, 1], [3.0, 1.0, 0.0, 0.0, 3.0]
RATIOS = [1.5, 0.5, 0.5, 2.0, 0.9, 1.1, 1.1]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -0.5]
# advantages over the deviation: ±A in the first group, −B, −B, 2B in the second
A, B = 1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(3) + 1e-4)
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def of_all(loss, batch_of, **extra):
    old = torch.tensor(LOGPS).double() - torch.tensor(RATIOS, dtype=torch.float64).log()
    batch = batch_of(LENGTHS, **{"group": GROUP, "rewards": torch.tensor(REWARDS), "old_logps": old, **extra})
    return loss_and_gradient(loss, batch, LOGPS)


def by_hand(a, b, divisor):
    """−ρA of each token where the clip leaves it free, 0 where it does not; over its divisor."""
    free = torch.tensor([0.0, -0.5 * a, 0.0, 2 * b, 0.9 * b, 1.1 * b, -2.2 * b], dtype=torch.float64)
    return free / torch.tensor(divisor, dtype=torch.float64)


def test_grpo_by_hand(batch_of):
    """Rewards 3, 1: mean 2, deviation √2, advantages ±A; 0, 0, 3: mean 1, deviation √(6/2), advantages −B, −B, 2B.

    A > 0: ρ = 1.5 is clipped at 1.3, 0.5 is not; A < 0: 0.5 is clipped at 0.8, 2 is not. Means over a sequence's
    tokens: −(1.3 + 0.5)A/2, 0.8A, 2B, (0.9 + 1.1)B/2, −2.2B: together −0.1A + 0.8B, over 5 sequences.
    """
    value, gradient, metrics = of_all(GRPO(beta=0.0, **CLIP), batch_of)
    assert value == pytest.approx((-0.1 * A + 0.8 * B) / 5, rel=1e-12)
    assert_close(gradient, by_hand(A, B, [10, 10, 5, 5, 10, 10, 5]), rtol=1e-12, atol=0)
    assert metrics == pytest.approx(
        {"nll": 13 / 7, "reward/mean": 1.4, "groups/without_signal": 0.0, "ratio/mean": 7.6 / 7, "ratio/clipped": 2 / 7}
    )


def test_a_mean_over_the_steps_tokens_by_hand(batch_of):
    """The tokens' sum, −1.8A + 0.8A + 2B + 2B − 2.2B = −A + 1.8B, over the 14 tokens of the step."""
    value, gradient, _ = of_all(GRPO(beta=0.0, normalize="token", **CLIP), batch_of, global_tokens=14.0)
    assert value == pytest.approx((-A + 1.8 * B) / 14, rel=1e-12)
    assert_close(gradient, by_hand(A, B, [14.0] * 7), rtol=1e-12, atol=0)


def test_dr_grpo_by_hand(batch_of):
    """Advantages 1, −1 and −1, −1, 2; −1 + 1.8 = 0.8 over 6 sequences of the step times 10 tokens."""
    loss = GRPO(beta=0.0, scale="none", normalize="constant", length=10, **CLIP)
    value, gradient, _ = of_all(loss, batch_of, global_sequences=6.0)
    assert value == pytest.approx(0.8 / 60, rel=1e-12)
    assert_close(gradient, by_hand(1.0, 1.0, [60.0] * 7), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_the_kl_term_by_hand(batch_of, normalize):
    """Equal rewards: A = 0 and what is left is β(e^d − d − 1). e^d = 2: 1 − log 2, with the gradient 1 − e^d = −1;
    e^d = 1/2: log 2 − 1/2, with 1/2. The ratio, 3, does not enter. A sequence of one token, e^d = 2; one of two, both.
    """
    logps = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    log2 = math.log(2)
    batch = batch_of(
        [1, 2], group=[0, 0], rewards=torch.tensor([0.5, 0.5]), old_logps=logps.detach() - math.log(3),
        reference_logps=logps.detach() + torch.tensor([log2, log2, -log2], dtype=torch.float64),
    )  # fmt: skip
    loss, metrics = GRPO(beta=0.3, normalize=normalize)(logps, batch)
    loss.backward()
    up, down = 1 - log2, log2 - 0.5
    if normalize == "sequence":
        expected, gradient = 0.3 * (up + (up + down) / 2) / 2, [-0.15, -0.075, 0.0375]
    else:
        expected, gradient = 0.3 * (2 * up + down) / 3, [-0.1, -0.1, 0.05]
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert_close(logps.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(metrics["kl"].total) == pytest.approx(2 * up + down, rel=1e-12)
    assert metrics["groups/without_signal"] == (1.0, 1.0)


def test_a_small_kl_is_not_rounded_away():
    """float32, d = 1e-4: e^d − d − 1 = d²/2 + d³/6 = 5.00017e-9, of which exp(d) − 1 − d would keep no digit."""
    from var.losses.common import kl_estimate
    from var.models.packing import pack

    batch = pack([[0, 1]], [1], reference_logps=torch.tensor([1e-4]))
    assert kl_estimate(torch.zeros(1), batch).item() == pytest.approx(5.00017e-9, rel=2e-3)


@pytest.mark.parametrize("options", [{}, {"normalize": "token"}, {"normalize": "constant", "length": 7}])
def test_micro_batches_of_whole_groups_add_up(batch_of, options):
    """Two micro-batches, a group each, with the step's divisors, are the whole."""
    loss = GRPO(beta=0.2, **options)
    torch.manual_seed(0)
    logps, old, reference = (-torch.rand(7).double() for _ in range(3))

    def value(sequences, tokens, group):
        batch = batch_of(
            LENGTHS[sequences], group=group, rewards=torch.tensor(REWARDS[sequences]), old_logps=old[tokens],
            reference_logps=reference[tokens], global_tokens=7.0, global_sequences=5.0,
        )  # fmt: skip
        return loss(logps[tokens], batch)[0]

    whole = value(slice(0, 5), slice(0, 7), GROUP)
    first, second = value(slice(0, 2), slice(0, 3), [0, 0]), value(slice(2, 5), slice(3, 7), [0, 0, 0])
    assert_close(first + second, whole, rtol=1e-14, atol=0)
    assert abs(first - second) > 1e-3


def test_groups_without_signal_are_counted_and_give_no_gradient(batch_of):
    """The second group's rewards are all 0.1, no binary fraction: one group of two; their gradient is rounding."""
    rewards = torch.tensor([3.0, 1.0, 0.1, 0.1, 0.1])
    _, gradient, metrics = of_all(GRPO(beta=0.0), batch_of, rewards=rewards)
    assert metrics["groups/without_signal"] == pytest.approx(0.5)
    assert gradient[3:].abs().max() < 1e-12 < gradient[1].abs()


def test_a_group_of_one_says_what_to_set(batch_of):
    with pytest.raises(UserError) as error:
        of_all(GRPO(beta=0.0), batch_of, group=[0, 0, 1, 1, 2])
    assert str(error.value) == (
        "this loss compares the responses to one prompt, and generate.responses=1 leaves nothing to compare; "
        "set generate.responses to 2 or more"
    )


def test_needs_the_reference_where_it_has_a_kl_term():
    rollout = {Rollout, Rewards, OldLogps}
    assert kinds(GRPO(beta=0.0)) == rollout
    assert kinds(GRPO(beta=0.01)) == rollout | {ReferenceLogps}


NUMBERS = "loss.beta is β ≥ 0, loss.clip_low lies in (0, 1] and loss.clip_high is > 0"
CHOICES = "loss.scale is std or none, and loss.normalize is sequence, token or constant"
LENGTH = (
    "loss.length is the divisor of loss.normalize=constant, ≥ 1 there (generate.max_new_tokens, say), and null with "
    "any other"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, NUMBERS), ({"beta": math.nan}, NUMBERS), ({"clip_low": 0.0}, NUMBERS),
        ({"clip_low": 1.1}, NUMBERS), ({"clip_high": 0.0}, NUMBERS), ({"clip_high": math.nan}, NUMBERS),
        ({"scale": "batch"}, CHOICES), ({"normalize": "mean"}, CHOICES),
        ({"normalize": "constant"}, LENGTH), ({"length": 20}, LENGTH), ({"normalize": "constant", "length": 0}, LENGTH),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_is_allowed(options, message):
    with pytest.raises(UserError) as error:
        GRPO(**options)
    assert str(error.value) == message
