"""Paths of KL and reward: how they are read, and the two limits that need no training."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.cells import read_results
from experiments.flipped import FlippedNumber
from experiments.hero import PANELS
from experiments.items import ITEMS
from experiments.items.base import Row
from experiments.items.methods import DEFAULT_RATE, METHODS, RATES, TUNED
from experiments.items.paths import (
    along,
    limit,
    pool,
    read_paths,
    read_right,
    read_times,
    read_within,
    trace_best_of,
    trace_optimum,
    within,
)
from experiments.items.reward_kl import RATES_TITLE, TUNING_TITLE
from experiments.jobs import ROOT

ALL = np.arange(1), np.arange(2)


@pytest.mark.parametrize(
    ("kl", "distance", "expected"),
    [
        ([0, 1, 2], 1.5, 0.45),  # between two evaluations
        ([0, 1, 2], 3.0, 0.6),  # it never leaves
        ([0, 3, 1], 2.0, 0.6),  # it has come back
        ([0, 3, 4], 1.5, 0.2),  # between the reference and the first evaluation
        ([0, 3, 1], 0.6, 0.14),  # a fifth of the way to the first evaluation, where it leaves for good
    ],
)
def test_reward_is_read_where_the_path_leaves_for_good(kl: list[float], distance: float, expected: float) -> None:
    path = np.array(kl, dtype=float), np.array([0.1, 0.3, 0.6])
    assert read_within(path, distance) == pytest.approx(expected)


def write_evaluations(folder: Path, kl: list[list[float]], reward: list[list[float]]) -> Path:
    """Write a run's evaluations, of two answers to each of two prompts, and return the path of its summary."""
    folder.mkdir()
    steps = [{"step": i, "reward": [[r, r] for r in row]} for i, row in enumerate(reward)]
    for record, row in zip(steps[1:], kl, strict=True):
        record["kl"] = [[k - 0.5, k + 0.5] for k in row]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
    return folder / "summary.json"


def test_path_of_training_is_the_mean_over_seeds_and_prompts(tmp_path: Path) -> None:
    paths = [
        write_evaluations(tmp_path / "a", [[1.0, 3.0]], [[0.0, 0.2], [0.4, 0.6]]),
        write_evaluations(tmp_path / "b", [[2.0, 2.0]], [[0.0, 0.2], [0.8, 1.0]]),
    ]
    row = Row(label="a")
    found = read_paths(paths, row)
    assert found.kl.shape == (2, 2, 2)
    kl, reward = found.mean(np.arange(2), np.arange(2))
    assert (kl.tolist(), reward.tolist()) == ([0, 2], pytest.approx([0.1, 0.7]))
    kl, reward = found.mean(np.array([1, 1]), np.array([0, 0]))
    assert (kl.tolist(), reward.tolist()) == ([0, 2], pytest.approx([0.0, 0.8]))
    mean, error = within(1.0).pool(paths, row)  # type: ignore[misc]
    assert mean == pytest.approx(0.4)
    assert 0.05 < error < 0.2
    assert limit(1.0).pool(paths, row) is None  # type: ignore[misc]
    assert [column.pool(paths, row) is None for column in along(2, "at step 18")] == [True, True]  # type: ignore[misc]
    assert along(1, "at step 9")[1].pool(paths, row)[0] == pytest.approx(0.7)  # type: ignore[misc,index]


def test_best_of_n_is_the_mean_over_all_choices() -> None:
    rewards = np.array([[0.1, 0.9, 0.4, 0.4], [1.0, 0.0, 0.0, 0.2]])
    kl, reward = trace_best_of(rewards).mean(*ALL)
    for n in (1, 2):
        expected = np.mean([max(chosen) for row in rewards for chosen in itertools.combinations(row, n)])
        assert reward[n - 1] == pytest.approx(expected)
    assert kl.tolist() == pytest.approx([0, np.log(2) - 0.5])


def test_optimum_is_exact_where_every_answer_is_drawn_once() -> None:
    """Four answers of equal probability: the softmax of r/λ, and its KL from the uniform distribution."""
    rewards = np.array([[0.0, 0.5, 1.0, 0.2], [0.3, 0.3, 0.3, 0.3]])
    kl, reward = trace_optimum(rewards).mean(*ALL)
    weights = np.exp(rewards / 0.3)
    weights /= weights.sum(1, keepdims=True)
    exact = (weights * np.log(4 * weights)).sum(1).mean()
    assert read_within((kl, reward), exact) == pytest.approx((weights * rewards).sum(1).mean(), abs=2e-3)
    assert (kl[0], reward[0]) == (0, pytest.approx(rewards.mean()))
    assert np.all(np.diff(kl) >= 0)
    assert reward[-1] == pytest.approx((1.0 + 0.3) / 2)


def test_errors_are_those_of_prompts_for_one_seed(tmp_path: Path) -> None:
    """The error of a mean over 64 prompts: the standard deviation over √64."""
    draw = np.random.default_rng(0)
    reward = draw.normal(size=64).tolist()
    path = write_evaluations(tmp_path / "a", [[1.0] * 64], [[0.0] * 64, reward])
    _, error = pool(lambda path: float(path[1][-1]))([path], Row(label="a"))  # type: ignore[misc]
    assert error == pytest.approx(np.std(reward) / 8, rel=0.1)


def test_path_over_time_is_on_the_line_between_evaluations(tmp_path: Path) -> None:
    paths = [
        write_evaluations(tmp_path / "a", [[1.0, 3.0], [2.0, 6.0]], [[0.0, 0.2], [0.4, 0.6], [0.8, 0.6]]),
        write_evaluations(tmp_path / "b", [[2.0, 2.0], [4.0, 4.0]], [[0.0, 0.2], [0.8, 1.0], [0.8, 1.0]]),
    ]
    clocks = [tmp_path / name / "summary.json" for name in ("fast", "slow")]
    for clock, seconds in zip(clocks, ((10, 40), (11, 30)), strict=True):  # the faster run of each step counts
        clock.parent.mkdir()
        lines = ["step,loss,throughput/seconds", f"1,0.5,{seconds[0]}", f"2,0.4,{seconds[1]}", "3,0.4,"]
        (clock.parent / "metrics.csv").write_text("\n".join(lines) + "\n")
    found = read_times((5, 20, 30, 31))(paths, Row(label="a"), clocks)
    assert found.kl[0, :3].tolist() == [[0.5, 1.5], [1.5, 4.5], [2.0, 6.0]]
    assert found.reward[1, :3] == pytest.approx(np.array([[0.4, 0.6], [0.8, 1.0], [0.8, 1.0]]))
    assert np.isnan(found.reward[:, 3]).all()


def test_right_answers_are_counted_whatever_the_reward_was(tmp_path: Path) -> None:
    answers = {"before": {"texts": ["it is 4", "5"]}, "after": {"texts": ["2 + 2 = 4", "4"]}}
    record = {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4", **answers}
    (tmp_path / "samples.jsonl").write_text(json.dumps(record) + "\n")
    assert read_right([tmp_path / "summary.json"], Row(label="a")).reward.tolist() == [[[0.5], [1.0]]]


def test_flipped_rewards_are_a_fraction_that_the_text_decides() -> None:
    prompts, texts = (
        [[{"role": "user", "content": "How much is 2 + 2?"}]] * 4000,
        [f"Try {n}: it is 4" for n in range(4000)],
    )
    reward = FlippedNumber(rate=0.1)
    scores = np.array(reward(prompts, texts, ["4"] * 4000))
    assert 0.085 < np.mean(scores == 0) < 0.115
    assert reward(prompts[:2], texts[:2], ["5"] * 2) == [1 - scores[0], 1 - scores[1]]
    assert FlippedNumber(rate=0.2).fingerprint != reward.fingerprint
    assert FlippedNumber(rate=0.0)(prompts[:2], texts[:2], ["4"] * 2) == [1, 1]


def test_tuned_values_are_the_best_of_their_tables() -> None:
    """λ or β at the default learning rate, and then the learning rate, among all that were tried with it."""
    found: dict[str, dict[str, dict[str, float]]] = {TUNING_TITLE: {}, RATES_TITLE: {}}
    for _, cells in read_results(ROOT / "experiments" / "reward_kl"):
        for cell in cells:
            if cell.table in found and cell.column == "reward within 2 nats":
                method, value = cell.row.rsplit(", ", 1)
                found[cell.table].setdefault(method, {})[value] = float(cell.value or 0)
    if not found[RATES_TITLE]:
        assert not RATES
        return
    tuned = {method for method in found[RATES_TITLE] if not METHODS[method][1] or method in found[TUNING_TITLE]}
    assert tuned == set(RATES)  # of a method with λ or β, both tables are needed
    for method in RATES:
        _, key, _ = METHODS[method]
        rates = dict(found[RATES_TITLE][method])
        if key:
            own = found[TUNING_TITLE][method]
            best = max(own, key=own.__getitem__)
            assert best == f"{key.split('.')[-1]} = {TUNED[method]:g}"
            rates[f"learning rate = {DEFAULT_RATE:g}"] = own[best]
        assert max(rates, key=rates.__getitem__) == f"learning rate = {RATES[method]:g}"


def test_rows_of_the_readmes_figure_are_those_of_the_items() -> None:
    for name, (title, rows) in PANELS.items():
        table = next(table for table in ITEMS[name].sizes["small"] if table.title == title)
        assert set(rows) <= {row.label for row in table.rows}
