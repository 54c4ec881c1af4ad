"""Tabular policies: they start at π_ref, and only shared parameters move prompts without data."""

import pytest
import torch
from torch.testing import assert_close

from experiments.tabular.few import SharedPolicy
from var.testbed.policies import TablePolicy


@pytest.mark.parametrize("kind", [TablePolicy, SharedPolicy])
def test_a_policy_starts_at_the_reference(small, kind):
    """To the last bit, and a critic's values are 0. Forward returns one row's tokens after the other's."""
    policy = kind(small, critic=True)
    assert_close(policy.logps(), small.logps, rtol=0, atol=0)
    prompts, responses = torch.tensor([2, 0]), torch.tensor([1, 14])  # 2 tokens, 3 tokens
    logps, values = policy(prompts, responses)
    assert_close(logps.detach(), torch.cat([small.token_logps[2, 1, :2], small.token_logps[0, 14]]), rtol=0, atol=0)
    assert_close(values.detach(), torch.zeros(5).double())
    assert kind(small)(prompts, responses)[1] is None


def test_shared_parameters_move_prompts_without_data_and_a_table_does_not(small):
    for kind, moves in ((TablePolicy, False), (SharedPolicy, True)):
        policy = kind(small)
        policy(torch.tensor([0, 1]), torch.tensor([3, 4]))[0].sum().backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.1 * parameter.grad
        assert bool((policy.logps()[0] != small.logps[0]).any())
        assert bool((policy.logps()[2:] != small.logps[2:]).any()) == moves
