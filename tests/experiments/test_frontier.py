"""The frontier study: every objective trains, none lies above π*'s frontier."""

import math

import pytest

from experiments.tabular import frontier
from experiments.tabular import methods as methods_of_studies
from experiments.tabular.methods import METHODS
from experiments.tabular.worlds import draw_world
from var.requirements import SequenceScores, find
from var.testbed.methods import list_losses, load_loss

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def tiny():
    """4 prompts, 7 responses of up to 2 tokens."""
    return draw_world(1, prompts=4, letters=2, tokens=2, overlap=0.6)


def test_every_loss_is_a_method_except_reward_models():
    others = set(list_losses()) - {method.loss for method in METHODS}
    assert all(find(load_loss(name).requires, SequenceScores) for name in others)
    assert len(BY_NAME) == len(METHODS)


def test_an_unlisted_loss_becomes_a_method_at_its_own_settings(monkeypatch):
    monkeypatch.setattr(methods_of_studies, "LISTED", (BY_NAME["sft"],))
    names = [method.name for method in methods_of_studies.list_others()]
    assert {"var", "dpo", "grpo"} <= set(names)
    assert not {"sft", "bradley_terry"} & set(names)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_objective_trains_and_none_is_above_the_frontier(tiny, method):
    for value in method.values:
        record = frontier.run(tiny, method, value, steps=3, sequences=48, rate=0.1, seed=0)[-1]
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
        assert record["regret"] > -1e-9
        assert record["kl_policy_reference"] > 0


def test_the_table_has_the_limit_and_shows_which_policies_still_move(tiny):
    """At π* the regret is 0. DPO with certain labels moves when trained for longer, InfoNCA does not."""
    chosen = [BY_NAME["dpo"], BY_NAME["infonca, β = 1"], BY_NAME["dapo"]]
    records = frontier.make_table(world=tiny, methods=chosen, steps=256, sequences=256)
    limit = [r for r in records if r["regime"] == "limit"]
    assert frontier.measure(tiny, tiny.optimum(0.5), 0.5)["regret"] == pytest.approx(0, abs=1e-9)
    assert [r["reward"] for r in limit] == sorted((r["reward"] for r in limit), reverse=True)
    moved = {
        r["method"]: r["kl_policy_reference_of_twice"] - r["kl_policy_reference"]
        for r in records
        if r.get("kl_policy_reference_of_twice") is not None
    }
    assert moved["dpo"] > 0.05 > abs(moved["infonca, β = 1"])
    assert [r["step"] for r in records if r["method"] == "dapo"] == [4, 8, 16, 32, 64, 128, 256]
