"""RLOO: the KL penalty in the reward, the baseline of the group's others, and one clipped ratio a sequence, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.losses.conftest import kinds
from var.losses.rloo import RLOO
from var.requirements import OldLogps, ReferenceLogps, Rewards, Rollout
from var.utils.errors import UserError

# two groups: of three responses (2 tokens, 1, 1) and of two (2, 1)
LENGTHS, GROUP, REWARDS = [2, 1, 1, 2, 1], [0, 0, 0, 1, 1], [4.0, 1.0, 2.0, 0.0, 4.0]
LOGPS = [-1.0, -2.0, -4.0, -3.0, -1.0, -1.5, -0.5]
RATIOS = [1.25, 1.6, 0.5, 0.5, 1.5, 2.0, 1.1]  # of tokens; of sequences 2, 0.5, 0.5, 3, 1.1
OLD_OVER_REFERENCE = [1.0, 1.0, 0.0, -2.0, 0.5, -0.5, 2.0]  # log-ratios; of sequences 2, 0, −2, 0, 2


def given(batch_of, tokens=slice(0, 7), sequences=slice(0, 5), group=GROUP, **extra):
    logps = torch.tensor(LOGPS, dtype=torch.float64)[tokens].requires_grad_(True)
    old = logps.detach() - torch.tensor(RATIOS, dtype=torch.float64).log()[tokens]
    reference = old - torch.tensor(OLD_OVER_REFERENCE, dtype=torch.float64)[tokens]
    rewards = torch.tensor(REWARDS)[sequences]
    numbers = {"rewards": rewards, "old_logps": old, "reference_logps": reference, "global_sequences": 5.0, **extra}
    return logps, batch_of(LENGTHS[sequences], group=group, **numbers)


def test_loss_and_gradient_by_hand(batch_of):
    """β = 1/2: rewards less penalty 3, 1, 3 | 0, 3. Less the mean of the others: 1, −2, 1 | −3, 3.

    A > 0: ρ = 2 is clipped at 1.2, 0.5 is not; A < 0: 0.5 is clipped at 0.8, 3 is not. −1.2 + 1.6 − 0.5 + 9 − 3.3 =
    5.6 over 5 sequences. Gradient of a sequence's every token: −ρA/5, or 0 where it is clipped.
    """
    logps, batch = given(batch_of)
    loss, metrics = RLOO(beta=0.5)(logps, batch)
    loss.backward()
    assert loss.item() == pytest.approx(1.12, rel=1e-12)
    expected = torch.tensor([0, 0, 0, -0.5, 9, 9, -3.3], dtype=torch.float64) / 5
    assert_close(logps.grad, expected, rtol=1e-12, atol=0)
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    log_odds = [math.log(r) + d for r, d in zip(RATIOS, OLD_OVER_REFERENCE, strict=True)]  # log π_θ − log π_ref
    assert means == pytest.approx(
        {
            "nll": 13 / 7, "reward/mean": 2.2, "kl": sum(math.exp(-d) + d - 1 for d in log_odds) / 7,
            "groups/without_signal": 0.0, "ratio/mean": 7.1 / 5, "ratio/clipped": 0.4,
        }
    )  # fmt: skip


def test_without_kl_it_needs_no_reference(batch_of):
    """Rewards 4, 1, 2 | 0, 4: advantages 2.5, −2, −0.5 | −4, 4: −1.2·2.5 + 1.6 + 0.8·0.5 + 12 − 4.4 = 6.6."""
    logps, batch = given(batch_of, reference_logps=None)
    loss, metrics = RLOO(beta=0.0)(logps, batch)
    assert loss.item() == pytest.approx(6.6 / 5, rel=1e-12)
    assert "kl" not in metrics


def test_on_its_own_samples_it_is_reinforce(batch_of):
    """ρ = 1 everywhere: the gradient of a sequence's every token is −A/5, advantages as by hand above."""
    logps, batch = given(batch_of, old_logps=torch.tensor(LOGPS, dtype=torch.float64))
    loss, metrics = RLOO(beta=0.0)(logps, batch)
    loss.backward()
    expected = -torch.tensor([2.5, 2.5, -2, -0.5, -4, -4, 4], dtype=torch.float64) / 5
    assert_close(logps.grad, expected, rtol=1e-12, atol=0)
    assert metrics["ratio/clipped"].total == 0


def test_micro_batches_of_whole_groups_add_up(batch_of):
    loss = RLOO(beta=0.5)
    parts = [
        loss(*given(batch_of, slice(0, 4), slice(0, 3), [0, 0, 0]))[0],
        loss(*given(batch_of, slice(4, 7), slice(3, 5), [0, 0]))[0],
    ]
    assert sum(parts).item() == pytest.approx(1.12, rel=1e-12)
    assert parts[0].item() == pytest.approx(-0.1 / 5, rel=1e-12)


def test_a_group_of_one_says_what_to_set(batch_of):
    with pytest.raises(UserError, match=r"generate\.responses=1 leaves nothing to compare"):
        RLOO()(*given(batch_of, group=[0, 0, 0, 1, 2]))


def test_needs_the_reference_where_it_has_a_kl_term():
    rollout = {Rollout, Rewards, OldLogps}
    assert kinds(RLOO(beta=0.0)) == rollout
    assert kinds(RLOO(beta=0.01)) == rollout | {ReferenceLogps}


@pytest.mark.parametrize("options", [{"beta": -0.1}, {"beta": math.nan}, {"clip": 0.0}, {"clip": 1.5}])
def test_wrong_settings_say_what_is_allowed(options):
    with pytest.raises(UserError) as error:
        RLOO(**options)
    assert str(error.value) == "loss.beta is β ≥ 0 and loss.clip lies in (0, 1]"
