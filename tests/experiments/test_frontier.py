"""Every objective of the package where its optimum is known: which reach π*, which do not, and none lies above it."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import experiments.tabular.__main__ as command
from experiments.tabular import few, frontier, stability
from var.config.check import FOLDER
from var.testbed.methods import METHODS, Method, load, train
from var.testbed.policies import Table, every_row
from var.testbed.world import draw

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def tiny():
    """4 prompts, 7 answers of up to 2 tokens."""
    return draw(1, prompts=4, letters=2, tokens=2, overlap=0.6)


def end(world, name, value, steps=300, sequences=512):
    return frontier.records(world, BY_NAME[name], value, steps=steps, sequences=sequences, rate=0.05, seed=0)[-1]


def test_every_loss_file_is_there_but_the_reward_models():
    files = {file.stem for file in (Path(FOLDER) / "loss").glob("*.yaml")}
    assert files - {method.loss for method in METHODS} == {"bradley_terry"}
    assert len(BY_NAME) == len(METHODS)


@pytest.mark.parametrize("name", ["var", "var_prompt", "var_global"])
def test_with_exact_weights_vars_fixed_point_is_the_optimum(small, name):
    """The expectation over π_ref's answers in one batch, through the loss file: KL(π* ‖ π_θ) < 1e-4, either way."""
    temperature = 0.7
    rows = every_row(small, (small.optimum(temperature) - small.logps).exp())
    policy = Table(small)
    train(policy, small, load(name), itertools.repeat(rows), steps=400, rate=0.1)
    found = small.summary(policy.logps(), temperature)
    assert max(found["kl_optimum_policy"], found["kl_policy_optimum"]) < 1e-4


def test_half_the_weight_in_the_exponent_is_another_optimum(small):
    """The same test could fail: at λ = 1.4 the end is far from π* of 0.7."""
    rows = every_row(small, (small.optimum(1.4) - small.logps).exp())
    policy = Table(small)
    train(policy, small, load("var"), itertools.repeat(rows), steps=400, rate=0.1)
    assert small.summary(policy.logps(), 0.7)["kl_optimum_policy"] > 0.05


@pytest.mark.parametrize(
    ("name", "value", "within"),
    [
        ("rloo", 1.0, 2e-3),
        ("ppo", 1.0, 2e-3),
        ("infonca, β = 1", 1.0, 2e-3),
        ("infonca, β = 0.1", 10.0, 2e-3),
        ("dpo, Bradley-Terry labels", 1.0, 1e-2),
        ("var_global", 1.0, 1e-2),
    ],
)
def test_these_reach_the_optimum_of_their_own_temperature(tiny, name, value, within):
    """From samples: λ is β of RLOO, of PPO and of DPO on labels drawn by the reward, αβ of InfoNCA."""
    found = end(tiny, name, value)
    assert found["temperature"] == pytest.approx(1.0)
    assert max(found["kl_optimum_policy"], found["kl_policy_optimum"]) < within


def test_grpos_kl_term_pulls_by_the_forward_divergence():
    """The gradient of e^d − d − 1 on the policy's own samples is that of KL(π_ref ‖ π): for one token the end is
    π(y) = β' π_ref(y) / (c − r(y)), not π*; β' = β K/(K − 1), for the group's mean holds the row itself."""
    world = draw(2, prompts=3, letters=3, tokens=1, overlap=0.6)
    found = Table(world)
    method = BY_NAME["dr_grpo, β > 0"]
    rows = frontier.stream(world, method, 1.0, found, 1024, torch.Generator().manual_seed(0))
    train(found, world, method.build(1.0), rows, steps=400, rate=0.05)
    beta, (low, high) = 8 / 7, (world.rewards.amax(1), world.rewards.amax(1) + 100)
    for _ in range(60):
        c = (low + high) / 2
        above = (beta * world.logps.exp() / (c[:, None] - world.rewards)).sum(1) > 1
        low, high = torch.where(above, c, low), torch.where(above, high, c)
    expected = beta * world.logps.exp() / (c[:, None] - world.rewards)
    assert_close(found.logps().exp(), expected, rtol=0, atol=0.01)
    assert (world.optimum(1.0).exp() - expected).abs().max() > 0.02


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_objective_trains_and_none_passes_the_frontier(tiny, method):
    for value in method.values:
        record = frontier.records(tiny, method, value, steps=3, sequences=48, rate=0.1, seed=0)[-1]
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
        assert record["regret"] > -1e-9
        assert record["kl_policy_reference"] > 0


def test_the_table_has_the_limit_and_says_what_still_moves(tiny):
    """On the limit the regret is 0; DPO on sure labels still moves when trained for longer, InfoNCA does not."""
    chosen = [BY_NAME["dpo"], BY_NAME["infonca, β = 1"], BY_NAME["dapo"]]
    records = frontier.table(world=tiny, methods=chosen, steps=256, sequences=256)
    limit = [r for r in records if r["regime"] == "limit"]
    assert frontier.numbers(tiny, tiny.optimum(0.5), 0.5)["regret"] == pytest.approx(0, abs=1e-9)
    assert [r["reward"] for r in limit] == sorted((r["reward"] for r in limit), reverse=True)
    moved = {
        r["method"]: r["kl_policy_reference_of_twice"] - r["kl_policy_reference"]
        for r in records
        if r.get("kl_policy_reference_of_twice") is not None
    }
    assert moved["dpo"] > 0.05 > abs(moved["infonca, β = 1"])
    assert [r["step"] for r in records if r["method"] == "dapo"] == [4, 8, 16, 32, 64, 128, 256]


def test_few_rows_tell_a_weight_from_none():
    """Two worlds of 64 prompts: exact weights serve new prompts, SFT hardly moves; online by the count of rewards."""
    names = ["sft", "weighted, exact Z", "rejection sampling", "var", "rloo"]
    chosen = [BY_NAME[name] for name in names]
    found = few.table(
        methods=chosen, seeds=(0, 1), make=lambda seed: draw(seed, prompts=64, letters=2, tokens=2, overlap=0.4)
    )
    by_name = {r["method"]: r for r in found}
    assert next(iter(by_name)) == "π_ref"
    assert by_name["π_ref"]["gain"] == 0
    assert by_name["weighted, exact Z"]["gain"] > 0.05 + by_name["sft"]["gain"]
    assert by_name["sft"]["evaluations"] == 0
    assert by_name["var"]["evaluations"] == 8 * by_name["rejection sampling"]["evaluations"] == 8 * 4 * 32
    assert by_name["rloo"]["evaluations"] <= 128 < by_name["rloo, more rollouts"]["evaluations"]


@pytest.fixture(scope="module")
def curves():
    world = draw(0, prompts=64, letters=2, tokens=3, overlap=0.3, offset=2.0, mismatch=4.0)
    chosen = [m for m in stability.STABLE if m.name in ("var_grouped", "alol_ref_free, A unclamped", "dpo")]
    return stability.table(world=world, methods=chosen, steps=120, rate=0.05, every=2)


def rows_of(curves, name):
    return [r for r in curves if r["method"] == name]


def test_vars_loss_is_never_negative_and_stays_between_its_bound_and_its_start(curves):
    rows = rows_of(curves, "var_grouped")
    losses = [r["loss"] for r in rows]
    assert min(losses) >= rows[0]["bound"] > 0
    assert max(losses) == losses[0]
    assert rows[-1]["chosen"] > rows[0]["chosen"]


def test_negative_coefficients_send_a_loss_below_zero_without_end(curves):
    losses = [r["loss"] for r in rows_of(curves, "alol_ref_free, A unclamped")]
    assert losses[-1] < losses[len(losses) // 2] < -1
    assert losses[len(losses) // 2] - losses[-1] > 1


def test_the_better_answers_fall_under_dpo(curves):
    rows = rows_of(curves, "dpo")
    assert rows[-1]["chosen"] < rows[0]["chosen"] - 0.5
    assert rows[-1]["loss"] < rows[0]["loss"] == pytest.approx(math.log(2))


def test_the_command_writes_tables_and_figures(tmp_path, monkeypatch, curves, tiny):
    """A part that runs later leaves the others' tables; means over seeds; errors beside their numbers."""
    made = {
        "frontier": frontier.table(world=tiny, methods=[BY_NAME["sft"]], steps=4, sequences=32),
        "stability": curves,
        "few": [{"method": "a", "seed": s, "value": 1.0, "lost": float(s), "lost_error": 0.25} for s in (1, 2)],
    }
    monkeypatch.setattr(
        command, "import_module", lambda name: type("M", (), {"table": staticmethod(lambda: made[name.split(".")[-1]])})
    )
    for only in ("frontier,few", "stability"):
        monkeypatch.setattr(sys, "argv", ["tabular", str(tmp_path), "--only", only])
        command.main()
    assert {p.name for p in tmp_path.iterdir()} == {"tables.md", "tables.json", "frontier.png", "stability.png"}
    assert list(json.loads((tmp_path / "tables.json").read_text())) == ["frontier", "few", "stability"]
    text = (tmp_path / "tables.md").read_text()
    assert "| method | value | lost |\n| --- | --- | --- |\n| a | 1.000 | 1.500 ± 0.250 |\n" in text
    assert all(p.stat().st_size < 200_000 for p in tmp_path.iterdir() if p.suffix == ".png")


def test_a_part_that_does_not_exist_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tabular", "--only", "fixed,fronteer"])
    with pytest.raises(SystemExit):
        command.main()
    assert "not fronteer" in capsys.readouterr().err


def test_a_method_without_a_file_or_with_a_setting_unknown_is_refused():
    with pytest.raises(FileNotFoundError):
        Method(name="none", loss="none").build()
    with pytest.raises(Exception, match="temprature"):
        load("var", temprature=1.0)
