"""Classifiers as reward models: batching, the recipe of OffsetBias-RM, and invalid models."""

import random
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.models import DATED, decoder, encoder, saved, score_alone, set_clock, spread
from var.data.clock import fix_today
from var.rewards.classifier import PROBE, Classifier
from var.utils.errors import UserError

ASK = [{"role": "user", "content": "ab"}]
LLAMA3 = (  # like Llama 3's: the first message starts with BOS, and every message ends with the end token
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<' + m['role'] + '>' + '\n\n' "
    "+ m['content'] | trim + '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\n\n' }}{% endif %}"
)


def make_roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return spread(
        RobertaForSequenceClassification(RobertaConfig(vocab_size=264, num_labels=1, pad_token_id=1, **sizes))
    )


def make_classifier(folder: Path, **options: Any) -> Classifier:
    return Classifier(path=str(folder), **{"device": "cpu", "cache": str(folder.parent / "cache"), **options})


def score(reward: Classifier, texts: list[str]) -> torch.Tensor:
    return torch.tensor(reward([ASK] * len(texts), texts, [None] * len(texts)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [decoder, make_roberta])
def test_score_does_not_depend_on_the_batch(build: Any, dtype: str, tmp_path: Path):
    """Over 20 models of each type on the CPU, the largest difference was 1e-6 in fp32 and 3e-7 in bf16.

    The scores had a standard deviation of 1.
    """
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 60))) for _ in range(12)]
    path = saved(tmp_path / "rm", build())
    each, some, all_at_once = (make_classifier(path, dtype=dtype, tokens=tokens) for tokens in (1, 90, 8192))
    single = score(each, texts)
    assert single.std() > 0.1
    for other in (score(all_at_once, texts), score(all_at_once, texts[::-1]).flip(0), score(some, texts)):
        assert_close(other, single, rtol=0, atol=1e-5)
    others = score(all_at_once, ["x" * 90, texts[0], "zz"])
    assert_close(others[1], single[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [decoder, encoder, make_roberta])
def test_classifier_scores_the_rendered_conversation(build: Any, tmp_path: Path):
    model = build()
    path = saved(tmp_path / "rm", model)
    texts = ["x", "yz", "", "longer text", "x"]
    tokenizer = byte_tokenizer()
    rows = [tokenizer(f"<bos><user>ab<end><assistant>{t}<end>", add_special_tokens=False)["input_ids"] for t in texts]
    expected = [float(score_alone(model, row)) for row in rows]
    for tokens in (8192, 20, 1):
        reward = make_classifier(path, tokens=tokens)
        assert_close(score(reward, texts), torch.tensor(expected), rtol=0, atol=2e-6)
        assert reward.encode(ASK, "x") == rows[0]
    assert reward._scorer.packed == (build is decoder)


def make_bos_tokenizer(template: str = LLAMA3) -> Any:
    """Return a tokenizer that adds a BOS by default, like Llama 3's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return tokenizer


def test_scores_equal_the_recipe_of_offsetbias_rm(tmp_path: Path):
    """Its model card removes the BOS from the rendered text, since the pipeline's tokenizer adds it."""
    from transformers import pipeline

    path = saved(tmp_path / "rm", decoder(), make_bos_tokenizer())
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
    reward = make_classifier(path)
    found = reward([talk] * 3, responses, [None] * 3)
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=2e-6)
    assert max(expected) - min(expected) > 0.1
    assert any(abs(score) > 1 or score < 0 for score in expected)  # no sigmoid
    assert reward.encode(talk, "four").count(256) == 1


def test_bfloat16_scores_are_close_to_float32(tmp_path: Path):
    """OffsetBias-RM runs in bfloat16. The score has more digits than the weights."""
    path = saved(tmp_path / "rm", decoder(), make_bos_tokenizer())
    half = make_classifier(path, dtype="bfloat16")
    scores = score(half, ["four", "five", "no"])
    assert {p.dtype for p in half._scorer.parameters()} == {torch.bfloat16}
    full = score(make_classifier(path), ["four", "five", "no"])
    assert_close(scores, full, rtol=0, atol=0.1)
    assert (scores != scores.bfloat16().float()).any()


def test_missing_template_is_an_error(tmp_path: Path):
    """With a wrong template, scores are meaningless: OpenRLHF #693."""
    path = saved(tmp_path / "rm", decoder(), byte_tokenizer(template=None))
    with pytest.raises(UserError, match=r"has no chat template.*Set reward\.chat_template"):
        score(make_classifier(path), ["x"])
    given = make_classifier(path, chat_template=TEMPLATE)
    assert len(score(given, ["x"])) == 1
    assert given.fingerprint["template"] == [TEMPLATE, {}, None, {"bos_token": "<bos>"}]


def test_template_with_two_bos_is_an_error(tmp_path: Path):
    """Two BOS in the reward model's input: YangRui2015/Generalizable-Reward-Model #6."""
    path = saved(tmp_path / "rm", decoder(), byte_tokenizer("{{ bos_token }}" + TEMPLATE))
    with pytest.raises(UserError, match=r"two BOS tokens \(<bos>\) at the start: the reward model's template"):
        score(make_classifier(path), ["x"])


def test_tokenizer_that_adds_bos_does_not_duplicate_it(tmp_path: Path):
    reward = make_classifier(saved(tmp_path / "rm", decoder(), make_bos_tokenizer(TEMPLATE)))
    assert reward._tokenizer("x")["input_ids"][0] == 256  # it adds one by default
    assert reward.encode(ASK, "x").count(256) == 1


def test_overlong_responses_are_an_error(tmp_path: Path):
    reward = make_classifier(saved(tmp_path / "rm", decoder()), max_length=9)
    assert len(score(reward, ["xy"])) == 1  # 6 of the prompt, 2 and the end token
    with pytest.raises(UserError, match=r"cannot score \(2\):\n.*more than reward\.max_length=9"):
        score(reward, ["xyz", "xy", "wxyz"])


def test_fingerprint_depends_on_weights_and_dtype(tmp_path: Path):
    """Scores differ by dtype: reward-bench #137."""
    one, other = decoder(), decoder()
    other.score.weight.data += 1e-3
    first = make_classifier(saved(tmp_path / "a", one))
    second = make_classifier(saved(tmp_path / "b", other))
    same = make_classifier(saved(tmp_path / "c", one))
    half = make_classifier(tmp_path / "a", dtype="bfloat16")
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint["weights"] != second.fingerprint["weights"]
    assert first.fingerprint != half.fingerprint


# --- reward.path


def test_folder_of_a_run_is_its_model(tmp_path: Path):
    path = saved(tmp_path / "runs" / "one" / "model", decoder())
    (tmp_path / "runs" / "one" / "config.yaml").write_text("")
    run, model = (make_classifier(folder) for folder in (path.parent, path))
    assert run.fingerprint == model.fingerprint
    assert torch.equal(score(run, ["x", "yz"]), score(model, ["x", "yz"]))


@pytest.mark.parametrize("name", ["max_length", "tokens"])
def test_limit_below_one_token_is_an_error(name: str, tmp_path: Path):
    with pytest.raises(UserError, match=rf"^second_reward\.{name}=0: must be at least 1"):
        make_classifier(tmp_path, key="second_reward", **{name: 0})


def test_template_reads_the_date_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is part of the fingerprint: otherwise scores of different days would be mixed in the cache."""
    folder = saved(tmp_path / "rm", make_roberta(), byte_tokenizer(DATED))
    kept = tmp_path / "date.txt"
    kept.write_text("2026-11-29")
    set_clock(monkeypatch, date(2026, 11, 30))
    other = make_classifier(folder)
    assert "30 Nov 2026" in other._render(PROBE, "a")
    fix_today(kept)
    resumed, fixed = make_classifier(folder), make_classifier(folder, date="2026-11-29")
    assert "29 Nov 2026" in resumed._render(PROBE, "a")
    assert resumed.fingerprint == fixed.fingerprint != other.fingerprint
    with pytest.raises(UserError, match=r"^reward\.date: expected a date"):
        _ = make_classifier(folder, date="today").fingerprint


@pytest.mark.parametrize("inside", ["", "model"])
def test_language_model_is_an_error(inside: str, tmp_path: Path):
    saved(tmp_path / "run" / inside)
    reward = make_classifier(tmp_path / "run")
    for ask in (lambda: reward.fingerprint, lambda: score(reward, ["x"])):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value) == (
            f"reward.path={tmp_path / 'run'}: expected a sequence classifier with one label, got a language "
            "model (LlamaForCausalLM). loss=bradley_terry trains a classifier."
        )


def test_classifier_with_two_labels_is_an_error(tmp_path: Path):
    path = saved(tmp_path / "rm", decoder(labels=2))
    for ask in (lambda one: one.fingerprint, lambda one: score(one, ["x"])):
        with pytest.raises(UserError, match="expected a classifier with one label, got 2"):
            ask(make_classifier(path))


def test_messages_name_the_key_of_the_reward():
    """Each reward knows where it was set: as eval.reward, as a member of an ensemble, or as the reward of a judge."""
    from hydra.utils import instantiate

    from tests.helpers.runs import composed

    cfg = composed(
        "reward=ensemble", "+reward@reward.members.a=classifier", "reward.members.a.path=x", "+judge@eval.judge=reward",
        "+reward@eval.reward=classifier", "eval.reward.path=y",
    )  # fmt: skip
    assert instantiate(cfg.eval.reward).key == "eval.reward"
    assert instantiate(cfg.reward).members["a"].key == "reward.members.a"
    assert instantiate(cfg.eval.judge).reward.members["a"].key == "reward.members.a"
    assert Classifier(path="z").key == "reward"
