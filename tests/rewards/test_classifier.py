"""Classifiers as reward models: a score is the response's own in any batch, OffsetBias-RM's recipe, what is refused."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.models import decoder, encoder, saved, score_alone, spread
from var.rewards.classifier import Classifier
from var.utils.errors import UserError

ASK = [{"role": "user", "content": "ab"}]
LLAMA3 = (  # the form of Llama 3's own: the first message brings the BOS, every message ends with the end token
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<' + m['role'] + '>' + '\n\n' "
    "+ m['content'] | trim + '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\n\n' }}{% endif %}"
)


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return spread(
        RobertaForSequenceClassification(RobertaConfig(vocab_size=264, num_labels=1, pad_token_id=1, **sizes))
    )


def classifier(folder: Path, **options: Any) -> Classifier:
    return Classifier(path=str(folder), **{"device": "cpu", "cache": str(folder.parent / "cache"), **options})


def scored(reward: Classifier, texts: list[str]) -> torch.Tensor:
    return torch.tensor(reward([ASK] * len(texts), texts, [None] * len(texts)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [decoder, roberta])
def test_a_score_does_not_depend_on_batch_order_or_neighbours(build: Any, dtype: str, tmp_path: Path):
    """One at a time, all at once, backwards and beside others. Over 20 models of each type on the CPU the largest
    difference was 1e-6 in fp32 and 3e-7 in bf16, of scores with a standard deviation of 1."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 60))) for _ in range(12)]
    path = saved(tmp_path / "rm", build())
    each, some, whole = (classifier(path, dtype=dtype, tokens=tokens) for tokens in (1, 90, 8192))
    single = scored(each, texts)
    assert single.std() > 0.1
    for other in (scored(whole, texts), scored(whole, texts[::-1]).flip(0), scored(some, texts)):
        assert_close(other, single, rtol=0, atol=1e-5)
    beside = scored(whole, ["x" * 90, texts[0], "zz"])
    assert_close(beside[1], single[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [decoder, encoder, roberta])
def test_a_classifier_scores_the_rendered_conversation(build: Any, tmp_path: Path):
    """By hand: the template's text, no token added, the logit; the same in one batch and in many."""
    model = build()
    path = saved(tmp_path / "rm", model)
    texts = ["x", "yz", "", "longer text", "x"]
    tokenizer = byte_tokenizer()
    rows = [tokenizer(f"<bos><user>ab<end><assistant>{t}<end>", add_special_tokens=False)["input_ids"] for t in texts]
    expected = [float(score_alone(model, row)) for row in rows]
    for tokens in (8192, 20, 1):
        reward = classifier(path, tokens=tokens)
        assert_close(scored(reward, texts), torch.tensor(expected), rtol=0, atol=2e-6)
        assert reward.encode(ASK, "x") == rows[0]
    assert reward._scorer.packed == (build is decoder)


def adding_bos(template: str = LLAMA3) -> Any:
    """A tokenizer as Llama 3's: it adds the BOS itself where it is not told otherwise."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return tokenizer


def test_offsetbias_rms_recipe(tmp_path: Path):
    """The model card's: the pipeline's raw logit of the template's text without its BOS, which the tokenizer adds."""
    from transformers import pipeline

    path = saved(tmp_path / "rm", decoder(), adding_bos())
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "2"},
    ]
    responses = ["four", "", " a longer answer "]
    judge = pipeline(
        "text-classification", model=str(path), tokenizer=str(path), device="cpu", function_to_apply="none"
    )
    expected = []
    for response in responses:
        text = judge.tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": response}], tokenize=False)
        assert text.startswith("<bos>")
        expected.append(judge(text.replace("<bos>", ""), batch_size=1)[0]["score"])
    reward = classifier(path)
    found = reward([talk] * 3, responses, [None] * 3)
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=2e-6)
    assert max(expected) - min(expected) > 0.1
    assert any(abs(score) > 1 or score < 0 for score in expected)  # no sigmoid
    assert reward.encode(talk, "four").count(256) == 1


def test_bfloat16_loads_and_stays_near(tmp_path: Path):
    """As OffsetBias-RM is run: weights of 8 bits, a score with more digits than they hold."""
    path = saved(tmp_path / "rm", decoder(), adding_bos())
    half = classifier(path, dtype="bfloat16")
    scores = scored(half, ["four", "five", "no"])
    assert {p.dtype for p in half._scorer.parameters()} == {torch.bfloat16}
    full = scored(classifier(path), ["four", "five", "no"])
    assert_close(scores, full, rtol=0, atol=0.1)
    assert (scores != scores.bfloat16().float()).any()


def test_no_template_is_an_error_that_names_the_setting(tmp_path: Path):
    """An RM used with the wrong template: RLHFlow's and others' scores mean nothing then, OpenRLHF #693."""
    path = saved(tmp_path / "rm", decoder(), byte_tokenizer(template=None))
    with pytest.raises(UserError, match=r"has no chat template.*set reward\.chat_template"):
        scored(classifier(path), ["x"])
    given = classifier(path, chat_template=TEMPLATE)
    assert len(scored(given, ["x"])) == 1
    assert given.identity["template"] == TEMPLATE


def test_two_bos_are_an_error(tmp_path: Path):
    """Two BOS in the reward model's input: YangRui2015/Generalizable-Reward-Model #6."""
    path = saved(tmp_path / "rm", decoder(), byte_tokenizer("{{ bos_token }}" + TEMPLATE))
    with pytest.raises(UserError, match=r"two BOS tokens \(<bos>\) at the start: the reward model's template"):
        scored(classifier(path), ["x"])


def test_two_bos_do_not_come_of_a_tokenizer_that_adds_one(tmp_path: Path):
    reward = classifier(saved(tmp_path / "rm", decoder(), adding_bos(TEMPLATE)))
    assert reward._tokenizer("x")["input_ids"][0] == 256  # it does add one, when asked to
    assert reward.encode(ASK, "x").count(256) == 1


def test_responses_too_long_are_an_error_with_their_number(tmp_path: Path):
    reward = classifier(saved(tmp_path / "rm", decoder()), max_length=9)
    assert len(scored(reward, ["xy"])) == 1  # 6 of the prompt, 2 and the end token
    with pytest.raises(UserError, match=r"2 responses are longer than reward\.max_length=9 tokens"):
        scored(reward, ["xyz", "xy", "wxyz"])


def test_the_identity_tells_weights_dtype_and_template(tmp_path: Path):
    """What the store's key takes of it: reward-bench #137 found scores that differ by dtype."""
    one, other = decoder(), decoder()
    other.score.weight.data += 1e-3
    first = classifier(saved(tmp_path / "a", one))
    second = classifier(saved(tmp_path / "b", other))
    same = classifier(saved(tmp_path / "c", one))
    half = classifier(tmp_path / "a", dtype="bfloat16")
    assert first.identity == same.identity
    assert first.identity["weights"] != second.identity["weights"]
    assert first.identity != half.identity


# --- what stands under reward.path


def test_a_finished_runs_folder_is_its_model(tmp_path: Path):
    path = saved(tmp_path / "runs" / "one" / "model", decoder())
    (tmp_path / "runs" / "one" / "config.yaml").write_text("")
    run, model = (classifier(folder) for folder in (path.parent, path))
    assert run.identity == model.identity
    assert torch.equal(scored(run, ["x", "yz"]), scored(model, ["x", "yz"]))


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_language_models_folder_is_an_error_before_anything_is_scored(inside: str, tmp_path: Path):
    saved(tmp_path / "run" / inside)
    reward = classifier(tmp_path / "run")
    for ask in (lambda: reward.identity, lambda: scored(reward, ["x"])):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value) == (
            f"reward.path={tmp_path / 'run'} is a language model (LlamaForCausalLM), which gives no score; a reward "
            "model is a sequence classifier with one label, as loss=bradley_terry trains it"
        )


def test_two_labels_are_an_error_before_anything_is_scored(tmp_path: Path):
    path = saved(tmp_path / "rm", decoder(labels=2))
    for ask in (lambda one: one.identity, lambda one: scored(one, ["x"])):
        with pytest.raises(UserError, match="has 2 labels; a reward model has one"):
            ask(classifier(path))


def test_a_head_that_is_not_in_the_folder_is_an_error(tmp_path: Path):
    """transformers fills it at random and warns: scores that mean nothing, and others each time."""
    from safetensors.torch import load_file, save_file

    path = saved(tmp_path / "rm", decoder())
    weights = load_file(path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: score\.weight"):
        scored(classifier(path), ["x"])
