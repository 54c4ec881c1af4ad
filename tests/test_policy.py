"""RewardModel: a score is a sequence's own, whatever stands beside it, as transformers computes it alone."""

import random
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import var.models.attention  # noqa: F401  registers the packed attention
from tests.conftest import spread, tiny_config
from var.models.packing import whole
from var.models.reward_model import RewardModel
from var.utils.errors import UserError

draw = random.Random(0)
IDS = [[draw.randrange(1, 256) for _ in range(draw.randint(1, 14))] for _ in range(8)]


def decoder(labels: int = 1) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    return spread(LlamaForSequenceClassification(tiny_config(num_labels=labels, pad_token_id=0)))


def encoder() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    return spread(BertForSequenceClassification(config))


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """transformers' own forward of one sequence."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0]


@pytest.mark.parametrize("build", [decoder, encoder])
def test_a_score_is_that_of_the_sequence_alone_whatever_batch_and_order(build: Any):
    """An RM's score depends on batch size and padding: reward-bench #137, trl #422. Batch of 1 = batch of 8 in float64.

    The encoder's path returns fp32: 1e-6 of a score of order 1.
    """
    model = build().double()
    expected = torch.stack([alone(model, row) for row in IDS])
    assert expected.std() > 0.1
    tolerance = 1e-12 if build is decoder else 1e-6
    if build is decoder:
        model.set_attn_implementation("packed")
    scorer = RewardModel(model)
    assert scorer.packed == (build is decoder)
    with torch.no_grad():
        single = torch.cat([scorer(whole([row])) for row in IDS])
        together = scorer(whole(IDS))
        order = draw.sample(range(8), 8)
        mixed = scorer(whole([IDS[i] for i in order]))
    for scores in (single, together, mixed[torch.tensor(order).argsort()]):
        assert_close(scores.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "more"), [("bloom", {"n_head": 4}), ("qwen3_next", {"layer_types": ["linear_attention"] * 2})]
)
def test_a_reward_model_that_reads_its_neighbours_is_an_error(kind: str, more: dict[str, Any]):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1}
    config = AutoConfig.for_model(kind, **sizes, **more)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="packed")
    with pytest.raises(UserError, match="sequences can only be packed for plain attention"):
        RewardModel(model)


@pytest.mark.parametrize("pad", [None, 9])
def test_a_sequence_that_ends_with_the_pad_token_is_read_where_transformers_reads_it(pad: int | None):
    """Where pad is the end token, at the token before it: so the head was trained, by transformers' own forward."""
    model = decoder().double()
    model.config.pad_token_id = pad
    rows = [[1, 2, 9], [3, 9, 4, 9, 9], [5, 6], [9, 9], [9]]
    expected = torch.stack([alone(model, row) for row in rows])
    model.set_attn_implementation("packed")
    with torch.no_grad():
        assert_close(RewardModel(model)(whole(rows)), expected, rtol=0, atol=1e-12)


def test_a_score_in_fp32_does_not_depend_on_its_batch():
    """reward-bench #137: batch of 1 = batch of 8 in the arithmetic that runs use; the rest is rounding, 1e-6 of 1."""
    model = decoder()
    model.set_attn_implementation("packed")
    with torch.no_grad():
        single = torch.cat([RewardModel(model)(whole([row])) for row in IDS])
        assert_close(RewardModel(model)(whole(IDS)), single, rtol=0, atol=1e-6)


def test_the_head_is_fp32_over_bfloat16_weights():
    """A score's last step is not rounded to 8 bits: it has more digits than bfloat16 can hold."""
    model = decoder().bfloat16()
    model.set_attn_implementation("packed")
    with torch.no_grad():
        scores = RewardModel(model)(whole(IDS))
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()


def test_whole_sequences_by_hand():
    batch = whole([[5, 6], [7]])
    assert (batch.input_ids.tolist(), batch.position_ids.tolist()) == ([5, 6, 7], [0, 1, 0])
    assert [tuple(s)[:2] for s in batch.segments] == [(0, 2), (2, 3)]
    assert (len(batch), len(batch.target)) == (2, 0)
