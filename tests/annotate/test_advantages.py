"""Advantages, and hidden states of prompts: V(x) is fitted on development prompts, cached, and subtracted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tests.helpers.annotators import ROWS, SAMPLING, RowSource, make_sequences, policy_is_loaded, split_tokens
from var.annotate.advantages import ProvideAdvantages
from var.annotate.annotator import Annotator
from var.annotate.base import TrainingSet
from var.annotate.prompt_features import prompt_features
from var.annotate.responses import sample_responses
from var.annotate.value_fit import fit_value_head, predict_values
from var.data.read import read
from var.data.row import Row
from var.data.settings import DataSettings
from var.requirements import Advantages, ValueFit
from var.rewards.dataset_score import Score
from var.rewards.scale import Scale
from var.utils.errors import UserError

UNSCALED = Scale()
VALUE = ValueFit(
    development_prompts=2, epochs=3, learning_rate=1e-2, heads=4, batch=2, lowest=0.0, largest=200.0, seed=0
)
SETTINGS = DataSettings(
    responses="all", max_length=128, overlong="error", on_template_change="error", validation_prompts=0, limit=None,
    micro_batch=1, global_batch=1, last_micro_batch="keep", last_step="keep", seed=0,
)  # fmt: skip


def estimate_values(
    annotator: Annotator, value: ValueFit = VALUE, development: tuple[Row, ...] = ROWS[:2], scale: Scale = UNSCALED,
    sampling: Any = SAMPLING, reward: float = 1000.0,
) -> np.ndarray:  # fmt: skip
    """Return V(x) for the prompt of each sequence of the last four rows: reward minus advantage."""
    data = TrainingSet(annotator, sampling, scale, SETTINGS, live=False)
    data.development = read(RowSource(development), annotator.cache)
    _, data.sequences = make_sequences(annotator, ROWS[2:])
    data.rewards = torch.full((len(data.sequences),), reward, dtype=torch.float64)
    provider = ProvideAdvantages(Advantages(value=value, draw="all"))
    assert provider.select(data).tolist() == list(range(5))
    return (reward - provider.advantages).numpy()


def test_values_are_those_of_a_head_fitted_on_the_mean_rewards(make, alone):
    """The mean reward, on the run's scale, of the reference's own responses to the development prompts."""
    annotator = make()
    estimate_values(annotator)
    assert annotator.computed == {"Sampling candidates": 2, "Scoring candidates": 4, "Values": 4}
    texts = sample_responses(annotator, read(RowSource(ROWS[:2]), annotator.cache), SAMPLING)
    raw = np.array([
        annotator.reward([row.prompt] * 2, [sample.text for sample in several], [row.answer] * 2)
        for row, several in zip(ROWS, texts, strict=False)
    ])  # fmt: skip
    _, sequences = make_sequences(annotator, ROWS[2:])
    for scale in (Scale(), Scale(kind="sigmoid")):
        means = torch.from_numpy(np.array(scale(raw)).mean(1)).float()
        states = [alone.states(annotator.chat.prompt(row.prompt)) for row in ROWS[:2]]
        head = fit_value_head(VALUE, states, means)
        found = estimate_values(annotator, scale=scale)
        for i in range(len(sequences)):
            expected = predict_values(head, [alone.states(split_tokens(sequences, i)[0])])
            assert_allclose(found[i], expected[0], rtol=1e-4)
    found = estimate_values(annotator)
    assert found[2] == found[3]  # two responses to one prompt
    assert len(set(found.tolist())) == 4
    assert_allclose(estimate_values(annotator, reward=300.0), found, rtol=1e-12)


def test_values_are_cached_by_head_development_prompts_and_sampling(make):
    found = estimate_values(make())
    again = make(annotate="error")
    assert estimate_values(again).tolist() == found.tolist()
    assert again.computed == {}
    assert not policy_is_loaded(again)
    other = make()
    estimate_values(other, replace(VALUE, seed=1))
    estimate_values(other, development=ROWS[1:2])
    estimate_values(other, sampling=replace(SAMPLING, seed=5))
    assert other.computed["Values"] == 12
    for mean in (0.50001, 0.50002):  # any other rewards that V is fitted on, as of a row whose answer was corrected
        estimate_values(other, scale=Scale(kind="zscore", mean=mean))
    assert other.computed["Values"] == 20


def test_values_need_a_reward_that_scores_text(make):
    with pytest.raises(UserError, match=r"reward=score reads only the data's own"):
        estimate_values(make(Score()))


def test_features_are_the_last_and_the_mean_hidden_state_of_the_prompt(make, alone):
    """[G, 2H] with H = 32, one row per group."""
    annotator = make()
    _, sequences = make_sequences(annotator)
    found = prompt_features(annotator, sequences)
    assert found.shape == (6, 64)
    assert found.dtype == np.float32
    for i in range(len(sequences)):
        states = alone.states(split_tokens(sequences, i)[0])
        assert_allclose(found[sequences.group[i]], torch.cat([states[-1], states.mean(0)]), atol=1e-4)
