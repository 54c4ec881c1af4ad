"""LoRA adapters, made by peft on tiny random models: merged they are what peft computes, known by content."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.conftest import TEMPLATE, byte_tokenizer, pretrained, tiny_model
from tests.test_pretrained import CARD
from var.models.export import export
from var.models.packing import pack
from var.models.policy import Policy
from var.models.pretrained import find_model
from var.rewards.classifier import Classifier
from var.utils.errors import UserError

peft = pytest.importorskip("peft")
IDS = torch.tensor([[256, 1, 2, 3, 4, 5]])


def adapter(folder: Path, base: Path, seed: int = 1, scorer: bool = False, **options: Any) -> Any:
    """A LoRA of nonzero A and B on the model in `base`, saved as peft saves it; returns peft's own model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    model = kind.from_pretrained(base, **({"num_labels": 1, "pad_token_id": 257} if scorer else {}))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1, **options}
    task = "SEQ_CLS" if scorer else "CAUSAL_LM"
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task, **settings))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_the_merged_model_gives_pefts_own_logits(tiny_folder: Path, tmp_path: Path):
    own = adapter(tmp_path / "a", tiny_folder)
    model = pretrained(tmp_path / "a", tmp_path, attention="packed").load()
    model.set_attn_implementation("sdpa")
    assert_close(logits(model), logits(own), rtol=0, atol=2e-5)
    assert (logits(model) - logits(tiny_model(attention="sdpa"))).abs().max() > 0.1
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert len(model.state_dict()) == len(tiny_model().state_dict())
    assert not model.training


def test_the_merged_model_is_used_as_any_other(tiny_folder: Path, tmp_path: Path):
    """By the policy, in packed form, and with all of its weights to train."""
    adapter(tmp_path / "a", tiny_folder)
    model = pretrained(tmp_path / "a", tmp_path, gradient_checkpointing=True).load()
    assert model.config._attn_implementation == "packed"
    assert model.is_gradient_checkpointing
    assert all(parameter.requires_grad for parameter in model.parameters())
    Policy(model.train())(pack([[256, 1, 2, 3], [256, 5, 6]], [2, 1])).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_the_merged_model_is_exported_whole(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    start = pretrained(tmp_path / "a", tmp_path)
    model = start.load()
    export(model, start.chat, tmp_path / "out", CARD)
    again = pretrained(tmp_path / "out", tmp_path)
    assert again.base is None
    for name, value in again.load().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_identity_follows_adapter_settings_and_base(tiny_folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    adapter(tmp_path / "a", tiny_folder)
    first = pretrained(tmp_path / "a", cache).weights
    assert pretrained(shutil.copytree(tmp_path / "a", tmp_path / "copy"), cache).weights == first
    seen = {first, pretrained(tiny_folder, cache).weights}
    adapter(tmp_path / "other", tiny_folder, seed=2)
    seen.add(pretrained(tmp_path / "other", cache).weights)
    config = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    (tmp_path / "copy" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    seen.add(pretrained(tmp_path / "copy", cache).weights)
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "copy" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    seen.add(pretrained(tmp_path / "copy", cache).weights)
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"][3] += 1e-6
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    seen.add(pretrained(tmp_path / "copy", cache).weights)
    assert len(seen) == 6
    plain = pretrained(tiny_folder, cache)
    assert pretrained(tmp_path / "a", cache).identity == {**plain.identity, "weights": first}


def test_the_tokenizer_is_the_adapters_if_it_has_one(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    assert pretrained(tmp_path / "a", tmp_path).chat.tokenizer.chat_template == TEMPLATE
    assert pretrained(tmp_path / "a", tmp_path, chat_template="x").chat.tokenizer.chat_template == "x"
    byte_tokenizer(TEMPLATE + " ").save_pretrained(tmp_path / "a")
    assert pretrained(tmp_path / "a", tmp_path).chat.tokenizer.chat_template == TEMPLATE + " "


def test_the_meta_model_is_the_bases(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    meta = pretrained(tmp_path / "a", tmp_path).meta()
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in tiny_model().parameters())


def test_a_scorer_on_a_language_models_adapter_starts_at_zero(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    scorer = pretrained(tmp_path / "a", tmp_path).load_scorer()
    policy = pretrained(tmp_path / "a", tmp_path).load()
    assert torch.count_nonzero(scorer.score.weight) == 0
    for name, value in scorer.model.state_dict().items():
        assert torch.equal(value, policy.model.state_dict()[name])


@pytest.mark.parametrize("modules", ["all-linear", ["embed_tokens", "q_proj"]])  # it has no tied head to change
def test_a_scorers_adapter_brings_its_head(tiny_folder: Path, tmp_path: Path, modules: Any):
    own = adapter(tmp_path / "a", tiny_folder, scorer=True, target_modules=modules)
    scorer = pretrained(tmp_path / "a", tmp_path).load_scorer()
    scorer.set_attn_implementation("sdpa")
    assert torch.count_nonzero(scorer.score.weight) > 0
    assert_close(logits(scorer), logits(own), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=r"does not fit its base .*on one side only, as .*score"):
        pretrained(tmp_path / "a", tmp_path).load()
    with pytest.raises(UserError, match="is a reward model's adapter, and a run starts from a language model"):
        find_model(str(tmp_path / "a"))


def test_a_reward_models_adapter_scores_as_peft_does(tiny_folder: Path, tmp_path: Path):
    """reward=classifier on the adapter's folder, on a run's that holds one, and with the adapter's own tokenizer."""
    own = adapter(tmp_path / "run" / "model", tiny_folder, scorer=True)
    ask = [{"role": "user", "content": "ab"}]
    texts = ["c", "a longer answer", ""]
    scores = []
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        reward = Classifier(path=str(path), cache=str(tmp_path / "cache"))
        scores.append(reward([ask] * 3, texts, [None] * 3))
        ids = [torch.tensor([reward.encode(ask, text)]) for text in texts]
    with torch.no_grad():
        plain = [own(input_ids=one).logits.item() for one in ids]
    assert scores[0] == scores[1] == pytest.approx(plain, abs=2e-5)
    assert len({round(score, 4) for score in plain}) == 3
    assert reward.identity["weights"] == pretrained(tmp_path / "run" / "model", tmp_path / "cache").weights
    byte_tokenizer(TEMPLATE + " ").save_pretrained(tmp_path / "run" / "model")
    assert Classifier(path=str(tmp_path / "run"), cache=str(tmp_path)).identity["template"] == TEMPLATE + " "


def test_a_language_models_adapter_gives_no_score(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    with pytest.raises(UserError, match=r"an adapter for CAUSAL_LM\. Choose an adapter"):
        Classifier(path=str(tmp_path / "a"), cache=str(tmp_path)).identity  # noqa: B018


def test_an_adapter_of_an_adapter_is_added_to_both(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    second = adapter(tmp_path / "b", tiny_folder, seed=2)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    (tmp_path / "b" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "a")})
    )
    plain, first, both = (
        dict(pretrained(path, tmp_path).load().named_parameters())
        for path in (tiny_folder, tmp_path / "a", tmp_path / "b")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    alone = dict(second.merge_and_unload().named_parameters())[name]
    assert_close(both[name] - first[name], alone - plain[name], rtol=0, atol=1e-6)


def test_a_pickled_adapter_is_refused(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "a" / "adapter_model.bin")
    for ask in (lambda one: one.weights, lambda one: one.load()):
        with pytest.raises(UserError, match=r"a holds no \.safetensors; pickled weights are not read"):
            ask(pretrained(tmp_path / "a", tmp_path))


def test_without_peft_it_says_how_to_get_it(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter(tmp_path / "a", tiny_folder)
    monkeypatch.setattr("var.models.pretrained.importlib.util.find_spec", lambda name: None)
    for ask in (lambda one: one.weights, lambda one: one.chat, lambda one: one.load()):
        with pytest.raises(UserError) as error:
            ask(pretrained(tmp_path / "a", tmp_path))
        assert str(error.value) == f"{tmp_path / 'a'} is an adapter, which needs an extra: pip install -e '.[adapters]'"
    assert pretrained(tiny_folder, tmp_path).base is None


def test_an_adapter_whose_base_is_not_here_is_told(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for name in ("./absent", None):
        file.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(UserError, match=r"names its base as base_model_name_or_path='(\./absent)?', which is no"):
            _ = pretrained(tmp_path / "a", tmp_path).weights
    file.write_text(json.dumps({**config, "base_model_name_or_path": "nobody/nothing", "revision": "v2"}))
    base = pretrained(tmp_path / "a", tmp_path).base
    assert base is not None
    assert (base.path, base.revision) == ("nobody/nothing", "v2")


def test_an_adapter_of_another_kind_is_refused(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PROMPT_TUNING"}))
    with pytest.raises(UserError, match="is an adapter of type PROMPT_TUNING; LORA is read"):
        _ = pretrained(tmp_path / "a", tmp_path).weights


@pytest.mark.parametrize(
    "change", [lambda key: key.replace("layers.1", "layers.7"), lambda key: None if "layers.1" in key else key]
)
def test_an_adapter_that_fits_in_part_is_refused(tiny_folder: Path, tmp_path: Path, change: Any):
    """peft warns at most, and the rest of the adapter would do nothing."""
    adapter(tmp_path / "a", tiny_folder)
    file = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(file)
    save_file({change(key): value for key, value in state.items() if change(key)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit its base .* of its weights are on one side only"):
        pretrained(tmp_path / "a", tmp_path).load()


def test_an_adapter_of_another_size_is_refused(tiny_folder: Path, tmp_path: Path):
    wide = tmp_path / "wide"
    tiny_model(attention="sdpa", hidden_size=64).save_pretrained(wide)
    adapter(tmp_path / "a", wide)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tiny_folder)}))
    with pytest.raises(UserError, match=r"does not fit its base .*size mismatch"):
        pretrained(tmp_path / "a", tmp_path).load()


def test_an_adapter_of_tied_embeddings_is_refused_and_of_untied_ones_read(tiny_folder: Path, tmp_path: Path):
    """Merged into the one tensor it would change the head too, which peft's own model leaves alone."""
    adapter(tmp_path / "a", tiny_folder, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match="adapts one of embeddings and head, which its base holds as one tensor"):
        pretrained(tmp_path / "a", tmp_path).load()
    tiny_model(attention="sdpa", tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    own = adapter(tmp_path / "b", tmp_path / "untied", target_modules=["embed_tokens", "lm_head"])
    model = pretrained(tmp_path / "b", tmp_path).load()
    model.set_attn_implementation("sdpa")
    assert_close(logits(model), logits(own), rtol=0, atol=2e-5)


def test_init_takes_an_adapters_folder(tiny_folder: Path, tmp_path: Path):
    adapter(tmp_path / "a", tiny_folder)
    assert find_model(str(tmp_path / "a")) == tmp_path / "a"
    adapter(tmp_path / "run" / "model", tiny_folder)
    assert find_model(str(tmp_path / "run")) == tmp_path / "run" / "model"


def test_an_adapter_of_the_packaged_default_finds_it(smollm2: Path, tmp_path: Path, tiny_folder: Path):
    adapter(tmp_path / "a", tiny_folder)
    file = tmp_path / "a" / "adapter_config.json"
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    base = pretrained(tmp_path / "a", smollm2.parents[1], name="smollm2-135m").base
    assert base is not None
    assert (base.folder / "model.safetensors").exists()
