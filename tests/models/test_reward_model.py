"""RewardModel: a score does not depend on the other sequences of the batch, and is the one of transformers alone."""

import random
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import var.models.attention  # noqa: F401  registers the packed attention
from tests.helpers.models import decoder, encoder, score_alone
from var.models.packing import whole
from var.models.reward_model import RewardModel
from var.utils.errors import UserError

draw = random.Random(0)
IDS = [[draw.randrange(1, 256) for _ in range(draw.randint(1, 14))] for _ in range(8)]


@torch.no_grad()
def score(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Return the scores of a RewardModel that packs, if the model is a decoder."""
    if hasattr(model, "score"):
        model.set_attn_implementation("packed")
    scorer = RewardModel(model)
    assert scorer.packed == hasattr(model, "score")
    return scorer(whole(rows))


@pytest.mark.parametrize(("build", "tolerance"), [(decoder, 1e-12), (encoder, 1e-6)])
def test_score_does_not_depend_on_batch_and_order(build: Any, tolerance: float):
    """A reward model's score depends on batch size and padding in reward-bench #137 and trl #422.

    An encoder's score is float32: 1e-6 of a score of order 1.
    """
    model = build().double()
    expected = torch.stack([score_alone(model, row) for row in IDS])
    assert expected.std() > 0.1
    order = draw.sample(range(8), 8)
    single = torch.cat([score(model, [row]) for row in IDS])
    shuffled = score(model, [IDS[i] for i in order])[torch.tensor(order).argsort()]
    for scores in (single, score(model, IDS), shuffled):
        assert_close(scores.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "more"), [("bloom", {"n_head": 4}), ("qwen3_next", {"layer_types": ["linear_attention"] * 2})]
)
def test_model_that_mixes_packed_sequences_is_rejected(kind: str, more: dict[str, Any]):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1}
    config = AutoConfig.for_model(kind, **sizes, **more)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="packed")
    with pytest.raises(UserError, match="Only models with plain attention can be packed"):
        RewardModel(model)


@pytest.mark.parametrize("pad", [None, 9])
def test_score_is_read_before_trailing_pad_tokens(pad: int | None):
    """If pad is the end token, at the token before it, as transformers' own forward trained the head."""
    model = decoder().double()
    model.config.pad_token_id = pad
    rows = [[1, 2, 9], [3, 9, 4, 9, 9], [5, 6], [9, 9], [9]]
    expected = torch.stack([score_alone(model, row) for row in rows])
    assert_close(score(model, rows), expected, rtol=0, atol=1e-12)


def test_float32_score_does_not_depend_on_its_batch():
    """reward-bench #137 in the arithmetic of runs; the difference is rounding, 1e-6 of 1."""
    model = decoder()
    single = torch.cat([score(model, [row]) for row in IDS])
    assert_close(score(model, IDS), single, rtol=0, atol=1e-6)


def test_head_computes_in_float32_over_bfloat16_weights():
    """The last step of a score is not rounded to 8 bits: it has more digits than bfloat16 can represent."""
    scores = score(decoder().bfloat16(), IDS)
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()
