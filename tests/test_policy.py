"""Scorer and Classifier: a score is a sequence's own, whatever stands beside it, as transformers computes it alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import var.logprobs  # noqa: F401  registers the packed attention
from tests.conftest import TEMPLATE, byte_tokenizer, tiny_config
from var.packing import whole
from var.policy import Scorer
from var.problems import UserError
from var.rewards.classifier import Classifier

draw = random.Random(0)
IDS = [[draw.randrange(1, 256) for _ in range(draw.randint(1, 14))] for _ in range(8)]
ASK = [{"role": "user", "content": "ab"}]


def decoder(labels: int = 1) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=labels, pad_token_id=0))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


def encoder() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """transformers' own forward of one sequence."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0]


def folder(path: Path, model: Any, template: str | None = TEMPLATE) -> str:
    model.save_pretrained(path)
    byte_tokenizer(template).save_pretrained(path)
    return str(path)


def scored(classifier: Classifier, texts: list[str]) -> list[float]:
    return classifier([ASK] * len(texts), texts, [None] * len(texts))


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
    scorer = Scorer(model)
    assert scorer.packed == (build is decoder)
    with torch.no_grad():
        single = torch.cat([scorer(whole([row])) for row in IDS])
        together = scorer(whole(IDS))
        order = draw.sample(range(8), 8)
        mixed = scorer(whole([IDS[i] for i in order]))
    for scores in (single, together, mixed[torch.tensor(order).argsort()]):
        assert_close(scores.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pad", [None, 9])
def test_a_sequence_that_ends_with_the_pad_token_is_read_where_transformers_reads_it(pad: int | None):
    """Where pad is the end token, at the token before it: so the head was trained, by transformers' own forward."""
    model = decoder().double()
    model.config.pad_token_id = pad
    rows = [[1, 2, 9], [3, 9, 4, 9, 9], [5, 6], [9, 9], [9]]
    expected = torch.stack([alone(model, row) for row in rows])
    model.set_attn_implementation("packed")
    with torch.no_grad():
        assert_close(Scorer(model)(whole(rows)), expected, rtol=0, atol=1e-12)


def test_a_score_in_fp32_does_not_depend_on_its_batch():
    """reward-bench #137: batch of 1 = batch of 8 in the arithmetic that runs use; the rest is rounding, 1e-6 of 1."""
    model = decoder()
    model.set_attn_implementation("packed")
    with torch.no_grad():
        single = torch.cat([Scorer(model)(whole([row])) for row in IDS])
        assert_close(Scorer(model)(whole(IDS)), single, rtol=0, atol=1e-6)


def test_the_head_is_fp32_over_bfloat16_weights():
    """A score's last step is not rounded to 8 bits: it has more digits than bfloat16 can hold."""
    model = decoder().bfloat16()
    model.set_attn_implementation("packed")
    with torch.no_grad():
        scores = Scorer(model)(whole(IDS))
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()


def test_whole_sequences_by_hand():
    batch = whole([[5, 6], [7]])
    assert (batch.input_ids.tolist(), batch.position_ids.tolist()) == ([5, 6, 7], [0, 1, 0])
    assert [tuple(s)[:2] for s in batch.segments] == [(0, 2), (2, 3)]
    assert (len(batch), len(batch.target)) == (2, 0)


@pytest.mark.parametrize("build", [decoder, encoder])
def test_a_classifier_scores_the_rendered_conversation(build: Any, tmp_path: Path):
    """By hand: the template's text, no token added, the logit; the same in one batch and in many."""
    model = build()
    path = folder(tmp_path / "rm", model)
    texts = ["x", "yz", "", "longer text", "x"]
    tokenizer = byte_tokenizer()
    rows = [tokenizer(f"<bos><user>ab<end><assistant>{t}<end>", add_special_tokens=False)["input_ids"] for t in texts]
    expected = [float(alone(model, row)) for row in rows]
    for tokens in (8192, 20, 1):
        classifier = Classifier(path=path, tokens=tokens, device="cpu", cache=str(tmp_path))
        assert_close(torch.tensor(scored(classifier, texts)), torch.tensor(expected), rtol=0, atol=2e-6)
        assert classifier.encode(ASK, "x") == rows[0]
    assert classifier._scorer.packed == (build is decoder)


def test_no_template_is_an_error_that_names_the_setting(tmp_path: Path):
    """An RM used with the wrong template: RLHFlow's and others' scores mean nothing then, OpenRLHF #693."""
    path = folder(tmp_path / "rm", decoder(), template=None)
    with pytest.raises(UserError, match=r"has no chat template.*set reward\.chat_template"):
        scored(Classifier(path=path, cache=str(tmp_path)), ["x"])
    given = Classifier(path=path, chat_template=TEMPLATE, device="cpu", cache=str(tmp_path))
    assert len(scored(given, ["x"])) == 1
    assert given.identity["template"] == TEMPLATE


def test_two_labels_are_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="has 2 labels; a reward model has one"):
        scored(Classifier(path=folder(tmp_path / "rm", decoder(labels=2)), cache=str(tmp_path)), ["x"])


def test_two_bos_are_an_error(tmp_path: Path):
    """Two BOS in the reward model's input: YangRui2015/Generalizable-Reward-Model #6."""
    path = folder(tmp_path / "rm", decoder(), template="{{ bos_token }}" + TEMPLATE)
    with pytest.raises(UserError, match=r"two BOS tokens \(<bos>\) at the start: the reward model's template"):
        scored(Classifier(path=path, cache=str(tmp_path)), ["x"])


def test_two_bos_do_not_come_of_a_tokenizer_that_adds_one(tmp_path: Path):
    from tokenizers.processors import TemplateProcessing

    path = folder(tmp_path / "rm", decoder())
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    tokenizer.save_pretrained(path)
    classifier = Classifier(path=path, cache=str(tmp_path))
    assert classifier._tokenizer("x")["input_ids"][0] == 256  # it does add one, when asked to
    assert classifier.encode(ASK, "x").count(256) == 1


def test_responses_too_long_are_an_error_with_their_number(tmp_path: Path):
    classifier = Classifier(path=folder(tmp_path / "rm", decoder()), max_length=9, device="cpu", cache=str(tmp_path))
    assert len(scored(classifier, ["xy"])) == 1  # 6 of the prompt, 2 and the end token
    with pytest.raises(UserError, match=r"2 responses are longer than reward\.max_length=9 tokens"):
        scored(classifier, ["xyz", "xy", "wxyz"])


def test_the_identity_tells_weights_dtype_and_template(tmp_path: Path):
    """What the store's key takes of it: reward-bench #137 found scores that differ by dtype."""
    one, other = decoder(), decoder()
    other.score.weight.data += 1e-3
    first = Classifier(path=folder(tmp_path / "a", one), cache=str(tmp_path))
    second = Classifier(path=folder(tmp_path / "b", other), cache=str(tmp_path))
    same = Classifier(path=folder(tmp_path / "c", one), cache=str(tmp_path))
    half = Classifier(path=first.path, dtype="bfloat16", cache=str(tmp_path))
    assert first.identity == same.identity
    assert first.identity["weights"] != second.identity["weights"]
    assert first.identity != half.identity
