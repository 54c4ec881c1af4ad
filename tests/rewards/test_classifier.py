"""Classifiers as reward models: a score is the response's own in any batch, OffsetBias-RM's recipe, what is refused."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.conftest import TEMPLATE, byte_tokenizer, tiny_config, tiny_model
from var.problems import UserError
from var.rewards.classifier import Classifier

ASK = [{"role": "user", "content": "ab"}]
LLAMA3 = (  # the form of Llama 3's own: the first message brings the BOS, every message ends with the end token
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<' + m['role'] + '>' + '\n\n' "
    "+ m['content'] | trim + '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\n\n' }}{% endif %}"
)


def spread(model: Any) -> Any:
    """Weights so large that scores differ by their order."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


def decoder() -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    return spread(LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=0)))


def encoder() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return spread(
        RobertaForSequenceClassification(RobertaConfig(vocab_size=264, num_labels=1, pad_token_id=1, **sizes))
    )


def folder(path: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(path)
    (tokenizer or byte_tokenizer(TEMPLATE)).save_pretrained(path)
    return str(path)


def scored(classifier: Classifier, texts: list[str]) -> torch.Tensor:
    return torch.tensor(classifier([ASK] * len(texts), texts, [None] * len(texts)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-5)])
@pytest.mark.parametrize("build", [decoder, encoder])
def test_a_score_does_not_depend_on_batch_order_or_neighbours(build: Any, dtype: str, tolerance: float, tmp_path: Path):
    """One at a time, all at once, backwards and beside others. Over 20 models of each type on the CPU the largest
    difference was 1e-6 in fp32 and 3e-7 in bf16, of scores with a standard deviation of 1."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 60))) for _ in range(12)]
    path = folder(tmp_path / "rm", build())

    def rm(tokens: int) -> Classifier:
        return Classifier(path=path, dtype=dtype, tokens=tokens, device="cpu", cache=str(tmp_path))

    alone = scored(rm(1), texts)
    assert alone.std() > 0.1
    for other in (scored(rm(8192), texts), scored(rm(8192), texts[::-1]).flip(0), scored(rm(90), texts)):
        assert_close(other, alone, rtol=0, atol=tolerance)
    beside = scored(rm(8192), ["x" * 90, texts[0], "zz"])
    assert_close(beside[1], alone[0], rtol=0, atol=tolerance)


def adding_bos() -> Any:
    """A tokenizer as Llama 3's: it adds the BOS itself where it is not told otherwise."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(LLAMA3)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return tokenizer


def test_offsetbias_rms_recipe(tmp_path: Path):
    """The model card's: the pipeline's raw logit of the template's text without its BOS, which the tokenizer adds."""
    from transformers import pipeline

    path = folder(tmp_path / "rm", decoder(), adding_bos())
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "2"},
    ]
    responses = ["four", "", " a longer answer "]
    judge = pipeline("text-classification", model=path, tokenizer=path, device="cpu", function_to_apply="none")
    expected = []
    for response in responses:
        text = judge.tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": response}], tokenize=False)
        assert text.startswith("<bos>")
        expected.append(judge(text.replace("<bos>", ""), batch_size=1)[0]["score"])
    classifier = Classifier(path=path, device="cpu", cache=str(tmp_path))
    found = classifier([talk] * 3, responses, [None] * 3)
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=2e-6)
    assert max(expected) - min(expected) > 0.1
    assert any(abs(score) > 1 or score < 0 for score in expected)  # no sigmoid
    assert classifier.encode(talk, "four").count(256) == 1


def test_bfloat16_loads_and_stays_near(tmp_path: Path):
    """As OffsetBias-RM is run: weights of 8 bits, a score with more digits than they hold."""
    path = folder(tmp_path / "rm", decoder(), adding_bos())
    half = Classifier(path=path, dtype="bfloat16", device="cpu", cache=str(tmp_path))
    scores = scored(half, ["four", "five", "no"])
    assert {p.dtype for p in half._scorer.parameters()} == {torch.bfloat16}
    full = scored(Classifier(path=path, device="cpu", cache=str(tmp_path)), ["four", "five", "no"])
    assert_close(scores, full, rtol=0, atol=0.1)
    assert (scores != scores.bfloat16().float()).any()


# --- what stands under reward.path


def test_a_finished_runs_folder_is_its_model(tmp_path: Path):
    path = folder(tmp_path / "runs" / "one" / "model", decoder())
    (tmp_path / "runs" / "one" / "config.yaml").write_text("")
    run, model = (Classifier(path=p, device="cpu", cache=str(tmp_path)) for p in (str(Path(path).parent), path))
    assert run.identity == model.identity
    assert torch.equal(scored(run, ["x", "yz"]), scored(model, ["x", "yz"]))


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_language_models_folder_is_an_error_before_anything_is_scored(inside: str, tmp_path: Path):
    model = tiny_model()
    model.config._attn_implementation = "sdpa"
    folder(tmp_path / "run" / inside, model)
    classifier = Classifier(path=str(tmp_path / "run"), cache=str(tmp_path))
    for ask in (lambda: classifier.identity, lambda: scored(classifier, ["x"])):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value) == (
            f"reward.path={tmp_path / 'run'} is a language model (LlamaForCausalLM), which gives no score; a reward "
            "model is a sequence classifier with one label, as loss=bradley_terry trains it"
        )


def test_two_labels_are_told_by_the_identity(tmp_path: Path):
    from transformers import LlamaForSequenceClassification

    path = folder(tmp_path / "rm", LlamaForSequenceClassification(tiny_config(num_labels=2)))
    with pytest.raises(UserError, match="has 2 labels; a reward model has one"):
        Classifier(path=path, cache=str(tmp_path)).identity  # noqa: B018


def test_a_head_that_is_not_in_the_folder_is_an_error(tmp_path: Path):
    """transformers fills it at random and warns: scores that mean nothing, and others each time."""
    from safetensors.torch import load_file, save_file

    path = folder(tmp_path / "rm", decoder())
    weights = load_file(Path(path) / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, Path(path) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: score\.weight"):
        scored(Classifier(path=path, cache=str(tmp_path)), ["x"])
