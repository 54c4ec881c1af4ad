"""Scorers: a head that is in no file is rejected in every form, and scores equal transformers' own padded forward."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.models import decoder, pretrained, save_lora, saved, tiny_model
from var.models.attention import list_lengths
from var.rewards.base import check_texts
from var.rewards.classifier import Classifier
from var.rewards.ensemble import Ensemble
from var.utils.errors import UserError

ASK = [{"role": "user", "content": "ab"}]
TEXTS = ["x", "yz", "", "a longer text", "x!"]
SMALL = {"vocab_size": 264, "num_labels": 1, "pad_token_id": 0}


def make(kind: str, **more: Any) -> Any:
    """Return a random classifier of a family whose heads have other names."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    narrow = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else wide
    if kind == "qwen2":
        narrow["num_key_value_heads"] = 2
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **{**SMALL, **narrow, **more}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


def reward(folder: Path, **more: Any) -> Classifier:
    return Classifier(path=str(folder), device="cpu", cache=str(folder.parent / "cache"), **more)


def score(scorer: Any, texts: list[str] = TEXTS) -> torch.Tensor:
    return torch.tensor(scorer([ASK] * len(texts), texts, [None] * len(texts)))


def edit_weights(folder: Path, change: Any, file: str = "model.safetensors") -> None:
    """Rewrite the weights in a folder."""
    weights = change(load_file(folder / file))
    save_file(weights, folder / file, metadata={"format": "pt"})


def without(*parts: str) -> Any:
    return lambda weights: {name: w for name, w in weights.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("llama", "score.weight"), ("qwen2", "score.weight"), ("gpt2", "score.weight"), ("bert", "classifier.bias"),
        ("bert", "classifier"), ("roberta", "classifier.dense.weight"), ("modernbert", "head.dense.weight"),
        ("distilbert", "pre_classifier"),
    ],
)  # fmt: skip
def test_head_in_no_file_is_rejected_before_scoring(kind: str, head: str, tmp_path: Path):
    more = {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2} if kind == "distilbert" else {}
    path = saved(tmp_path / "rm", make(kind, **more))
    assert reward(path).fingerprint
    edit_weights(path, without(head))
    with pytest.raises(UserError, match=rf"^reward\.path=.*it lacks weights \({head}"):
        reward(path).fingerprint  # noqa: B018


def test_head_under_the_name_of_another_library_is_rejected(tmp_path: Path):
    path = saved(tmp_path / "rm", decoder())
    edit_weights(path, lambda weights: {n.replace("score.", "v_head."): w for n, w in weights.items()})
    with pytest.raises(UserError, match=r"lacks weights \(score\.weight\)"):
        reward(path).fingerprint  # noqa: B018


def test_missing_layer_is_rejected(tmp_path: Path):
    """Also of a language model: transformers would initialize it at random."""
    for name, model in (("rm", decoder()), ("lm", tiny_model())):
        edit_weights(saved(tmp_path / name, model), without("layers.1.mlp.up_proj"))
    for load in (lambda: score(reward(tmp_path / "rm")), pretrained(tmp_path / "lm", tmp_path).load):
        with pytest.raises(UserError, match=r"lacks weights \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
            load()


def test_missing_head_of_a_sharded_model_is_rejected(tmp_path: Path):
    path = tmp_path / "rm"
    decoder().save_pretrained(path, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(path)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["score.weight"]
    expected = score(reward(path))
    assert len(set(content["weight_map"].values())) > 1
    edit_weights(path, without("score."), file)
    with pytest.raises(UserError, match=r"lacks weights \(score\.weight\)"):  # the index still lists it
        reward(path).fingerprint  # noqa: B018
    del content["weight_map"]["score.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lacks weights \(score\.weight\)"):
        reward(path).fingerprint  # noqa: B018
    assert expected.std() > 0


def test_missing_head_of_a_run_is_rejected(tmp_path: Path):
    path = saved(tmp_path / "run" / "model", decoder())
    edit_weights(path, without("score."))
    with pytest.raises(UserError, match=rf"^reward\.path={path}: it lacks weights"):
        reward(tmp_path / "run").fingerprint  # noqa: B018


@pytest.mark.long
def test_missing_head_of_a_4_bit_model_is_rejected(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    base = saved(tmp_path / "base", make("llama", hidden_size=128, intermediate_size=256))
    model = pretrained(base, tmp_path, quantization="nf4").load_scorer()
    model.config._attn_implementation = "sdpa"
    path = saved(tmp_path / "rm", model)
    assert_close(score(reward(path)), score(reward(base)), rtol=0, atol=2)
    edit_weights(path, without("score."))
    with pytest.raises(UserError, match=r"lacks weights \(score\.weight\)"):
        reward(path).fingerprint  # noqa: B018
    lm = saved(tmp_path / "lm", tiny_model(hidden_size=128, intermediate_size=256))
    with pytest.raises(UserError, match=r"lacks weights \(score\.weight\)"):
        pretrained(lm, tmp_path, quantization="nf4").load_scorer()


def test_only_training_starts_with_a_new_head(tiny_folder: Path, tmp_path: Path):
    files = pretrained(tiny_folder, tmp_path)
    assert not files.load_scorer(new_head=True).score.weight.any()
    with pytest.raises(UserError, match=r"model\.path=.*lacks weights \(score\.weight\)"):
        files.load_scorer()
    trained = pretrained(saved(tmp_path / "rm", decoder()), tmp_path).load_scorer(new_head=True)
    assert torch.equal(trained.score.weight, decoder().score.weight)  # a head that exists is never replaced


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_adapter_without_its_head_is_rejected(kind: str, tmp_path: Path):
    """A base with the head of its own needs none in the adapter."""
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base", make(kind))
    save_lora(tmp_path / "rm", base, scorer=True, target_modules=["q_proj"] if kind == "llama" else ["query"])
    assert score(reward(tmp_path / "rm")).std() > 0
    edit_weights(tmp_path / "rm", without("score", "classifier"), "adapter_model.safetensors")
    with pytest.raises(UserError, match="its modules_to_save list"):
        reward(tmp_path / "rm").fingerprint  # noqa: B018  before anything is computed
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "rm"))
    config.modules_to_save = None
    config.save_pretrained(str(tmp_path / "rm"))
    assert score(reward(tmp_path / "rm")).std() > 0
    edit_weights(base, without("score", "classifier"))
    with pytest.raises(UserError, match=r"lacks weights \((score|classifier)\."):
        reward(tmp_path / "rm").fingerprint  # noqa: B018


def test_two_labels_are_rejected(tiny_folder: Path, tmp_path: Path):
    """In the model's own config, and in the head of an adapter, whose config does not say."""
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="expected a classifier with one label, got 2"):
        reward(saved(tmp_path / "two", decoder(labels=2))).fingerprint  # noqa: B018
    save_lora(tmp_path / "rm", tiny_folder, scorer=True)
    edit_weights(
        tmp_path / "rm", lambda weights: {n: w.repeat(2, 1) if "score" in n else w for n, w in weights.items()},
        "adapter_model.safetensors",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"does not fit its base.*size mismatch for .*score"):
        reward(tmp_path / "rm").fingerprint  # noqa: B018


# --- padding, positions, vocabulary


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_equal_a_padded_batch_of_transformers(kind: str, side: str, tmp_path: Path):
    """Whatever the tokenizer's padding and truncation sides are: texts are scored without padding."""
    model, tokenizer = make(kind), byte_tokenizer()
    tokenizer.padding_side = tokenizer.truncation_side = side
    tokenizer.pad_token = "<system>"
    model.config.pad_token_id = tokenizer.pad_token_id
    path = saved(tmp_path / "rm", model, tokenizer)
    found = reward(path)
    rows = [found.encode(ASK, text) for text in TEXTS]
    if kind == "bert":
        tokenizer.padding_side = "right"  # the head of an encoder is read at the first token
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
        ).logits
    assert_close(score(found), expected[:, 0], rtol=0, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("kind", "positions", "most"), [("bert", 32, 32), ("gpt2", 32, 32), ("roberta", 34, 32), ("llama", 32, 32)]
)
def test_max_length_is_held_against_the_positions(kind: str, positions: int, most: int, tmp_path: Path):
    pad = {"pad_token_id": 1} if kind == "roberta" else {}
    name = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    path = saved(tmp_path / "rm", make(kind, **{name: positions, **pad}))
    assert reward(path).fingerprint["max_length"] == most
    longest = "x" * (most - 7)
    assert torch.isfinite(score(reward(path), [longest])).all()
    with pytest.raises(UserError, match=rf"^second_reward\.max_length={most + 1}: .* has {most} positions"):
        reward(path, max_length=most + 1, key="second_reward").fingerprint  # noqa: B018
    overlong = [(ASK, longest, None), (ASK, longest + "x", None), (ASK, longest + "xy", None)]
    with pytest.raises(UserError) as error:
        check_texts(Ensemble(members={"a": reward(path, key="reward.members.a")}), overlong)
    assert f"it has {most + 1} tokens with its prompt, more than reward.members.a.max_length={most}" in str(error.value)
    assert "They are 2 of 3" in str(error.value)


def test_sliding_window_does_not_limit_a_packed_reward_model(tmp_path: Path):
    path = saved(tmp_path / "rm", make("mistral", sliding_window=16, num_key_value_heads=2))
    assert list(list_lengths(reward(path)._config)) == []
    text = "x" * 40
    packed = score(reward(path), [text, "yes"])
    model = make("mistral", sliding_window=16, num_key_value_heads=2)
    ids = torch.tensor(
        [byte_tokenizer().apply_chat_template([*ASK, {"role": "assistant", "content": text}])["input_ids"]]
    )
    with torch.no_grad():
        assert_close(packed[:1].float(), model(ids).logits[0].float(), atol=1e-5, rtol=0)


def add_token(tokenizer: Any, token: str = "<turn>", special: bool = True) -> Any:
    tokenizer.add_tokens([token], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_token_beyond_the_embeddings_is_rejected(special: bool, tmp_path: Path):
    """If the chat template writes it or a text contains it; a token that is never used is not an error."""
    size = len(byte_tokenizer())
    template = TEMPLATE.replace("<assistant>", "<turn>").replace("'<' + m['role'] + '>'", "'<turn>'")
    for name, tokenizer in (("unused", add_token(byte_tokenizer(), special=special)),
                            ("written", add_token(byte_tokenizer(template), special=special))):  # fmt: skip
        saved(tmp_path / name / "rm", make("llama", vocab_size=size), tokenizer)
        saved(tmp_path / name / "lm", tiny_model(vocab_size=size), tokenizer)
    what = rf"token '<turn>', id {size}: the chat template writes it\nSet %s\.chat_template"
    with pytest.raises(UserError, match=rf"^reward\.path=.*has {size} embeddings[^\n]*\n  {what % 'reward'}"):
        reward(tmp_path / "written" / "rm").fingerprint  # noqa: B018
    for name in ("fingerprint", "chat"):
        with pytest.raises(UserError, match=what % "model"):
            getattr(pretrained(tmp_path / "written" / "lm", tmp_path), name)
    assert pretrained(tmp_path / "unused" / "lm", tmp_path).fingerprint
    scorer = reward(tmp_path / "unused" / "rm")
    assert score(scorer).std() > 0
    if special:  # control tokens in text are read as ordinary text
        assert score(scorer, ["x", "a <turn> b"]).isfinite().all()
        return
    with pytest.raises(UserError, match=rf"token '<turn>', id {size}, is beyond the {size} embeddings of reward"):
        score(scorer, ["x", "a <turn> b"])


def test_tokenizer_of_another_model_is_rejected(tmp_path: Path):
    path = saved(tmp_path / "rm", make("llama", vocab_size=100, pad_token_id=0))
    with pytest.raises(UserError, match="This tokenizer belongs to another model"):
        reward(path).fingerprint  # noqa: B018


def test_padded_vocabulary_is_not_an_error(tmp_path: Path):
    assert reward(saved(tmp_path / "rm", make("llama", vocab_size=300))).fingerprint
    assert pretrained(saved(tmp_path / "lm", tiny_model(vocab_size=300)), tmp_path).fingerprint


def test_architecture_describes_only_its_repository(tmp_path: Path):
    """Another reward.path is measured by its own config."""
    path = saved(tmp_path / "rm", decoder())
    sizes = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 2, "vocab_size": 8000}
    described = Classifier(path="NCSOFT/rm", repository="NCSOFT/rm", architecture=sizes, cache=str(tmp_path))
    other = reward(path, repository="NCSOFT/rm", architecture=sizes)
    assert other.measure_memory() == reward(path).measure_memory()
    assert (described.measure_memory() or 0) > 100 * (other.measure_memory() or 0)
