"""Saved LoRA adapters as models: merging gives peft's results, and the fingerprint covers adapter and base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.models import CARD, pretrained, save_lora, tiny_model
from var.models.export import export
from var.models.files import find_model
from var.models.packing import pack
from var.models.policy import Policy
from var.rewards.classifier import Classifier
from var.utils.errors import UserError

pytest.importorskip("peft")
IDS = torch.tensor([[256, 1, 2, 3, 4, 5]])


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A saved adapter of the tiny model."""
    save_lora(tmp_path / "a", tiny_folder)
    return tmp_path / "a"


def change_config(folder: Path, **values: Any) -> None:
    """Change values of an adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_merged_model_gives_pefts_logits(tiny_folder: Path, tmp_path: Path):
    own = save_lora(tmp_path / "a", tiny_folder)
    model = pretrained(tmp_path / "a", tmp_path, attention="packed").load()
    model.set_attn_implementation("sdpa")
    assert_close(logits(model), logits(own), rtol=0, atol=2e-5)
    assert (logits(model) - logits(tiny_model(attention="sdpa"))).abs().max() > 0.1
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert len(model.state_dict()) == len(tiny_model().state_dict())
    assert not model.training


def test_merged_model_trains_packed_with_all_its_weights(folder: Path, tmp_path: Path):
    model = pretrained(folder, tmp_path, gradient_checkpointing=True).load()
    assert model.config._attn_implementation == "packed"
    assert model.is_gradient_checkpointing
    assert all(parameter.requires_grad for parameter in model.parameters())
    Policy(model.train())(pack([[256, 1, 2, 3], [256, 5, 6]], [2, 1])).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_merged_model_is_exported_without_its_adapter(folder: Path, tmp_path: Path):
    start = pretrained(folder, tmp_path)
    model = start.load()
    export(model, start.chat, tmp_path / "out", CARD)
    again = pretrained(tmp_path / "out", tmp_path)
    assert again.base is None
    for name, value in again.load().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_fingerprint_covers_adapter_settings_and_base(folder: Path, tiny_folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    first = pretrained(folder, cache).weights
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert pretrained(copy, cache).weights == first
    seen = {first, pretrained(tiny_folder, cache).weights}
    save_lora(tmp_path / "other", tiny_folder, seed=2)
    seen.add(pretrained(tmp_path / "other", cache).weights)
    change_config(copy, lora_alpha=16)
    seen.add(pretrained(copy, cache).weights)
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    change_config(copy, lora_alpha=8, base_model_name_or_path=str(base))
    seen.add(pretrained(copy, cache).weights)
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"][3] += 1e-6
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    seen.add(pretrained(copy, cache).weights)
    assert len(seen) == 6
    plain = pretrained(tiny_folder, cache)
    assert pretrained(folder, cache).fingerprint == {**plain.fingerprint, "weights": first}


def test_tokenizer_of_the_adapter_takes_precedence(folder: Path, tmp_path: Path):
    assert pretrained(folder, tmp_path).chat.tokenizer.chat_template == TEMPLATE
    other = TEMPLATE + "{# other #}"
    assert pretrained(folder, tmp_path, chat_template=other).chat.tokenizer.chat_template == other
    byte_tokenizer(TEMPLATE + " ").save_pretrained(folder)
    assert pretrained(folder, tmp_path).chat.tokenizer.chat_template == TEMPLATE + " "


def test_meta_model_is_the_bases(folder: Path, tmp_path: Path):
    meta = pretrained(folder, tmp_path).build_meta()
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in tiny_model().parameters())


def test_scorer_on_a_language_models_adapter_starts_at_zero(folder: Path, tmp_path: Path):
    scorer = pretrained(folder, tmp_path).load_scorer(new_head=True)
    policy = pretrained(folder, tmp_path).load()
    assert torch.count_nonzero(scorer.score.weight) == 0
    for name, value in scorer.model.state_dict().items():
        assert torch.equal(value, policy.model.state_dict()[name])


@pytest.mark.parametrize("modules", ["all-linear", ["embed_tokens", "q_proj"]])  # a scorer has no tied head
def test_adapter_of_a_scorer_includes_its_head(tiny_folder: Path, tmp_path: Path, modules: Any):
    own = save_lora(tmp_path / "a", tiny_folder, scorer=True, target_modules=modules)
    scorer = pretrained(tmp_path / "a", tmp_path).load_scorer()
    scorer.set_attn_implementation("sdpa")
    assert torch.count_nonzero(scorer.score.weight) > 0
    assert_close(logits(scorer), logits(own), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=r"does not fit its base .*on one side only, for example .*score"):
        pretrained(tmp_path / "a", tmp_path).load()
    with pytest.raises(UserError, match=r"is the adapter of a reward model\. Use that of a language model"):
        find_model(str(tmp_path / "a"))


def test_adapter_of_a_reward_model_scores_as_in_peft(tiny_folder: Path, tmp_path: Path):
    """reward=classifier on the adapter's folder, on the folder of its run, and with the adapter's own tokenizer."""
    own = save_lora(tmp_path / "run" / "model", tiny_folder, scorer=True)
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
    assert reward.fingerprint["weights"] == pretrained(tmp_path / "run" / "model", tmp_path / "cache").weights
    byte_tokenizer(TEMPLATE + " ").save_pretrained(tmp_path / "run" / "model")
    assert Classifier(path=str(tmp_path / "run"), cache=str(tmp_path)).fingerprint["template"][0] == TEMPLATE + " "


def test_adapter_of_a_language_model_is_rejected_as_reward(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"expected an adapter of a reward model \(task_type SEQ_CLS\), got CAUSAL_LM"):
        Classifier(path=str(folder), cache=str(tmp_path)).fingerprint  # noqa: B018


def test_adapter_of_an_adapter_adds_to_both(folder: Path, tiny_folder: Path, tmp_path: Path):
    second = save_lora(tmp_path / "b", tiny_folder, seed=2)
    change_config(tmp_path / "b", base_model_name_or_path=str(folder))
    plain, first, both = (
        dict(pretrained(path, tmp_path).load().named_parameters()) for path in (tiny_folder, folder, tmp_path / "b")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    alone = dict(second.merge_and_unload().named_parameters())[name]
    assert_close(both[name] - first[name], alone - plain[name], rtol=0, atol=1e-6)


def test_missing_peft_raises_with_the_command(
    folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("var.models.pretrained.importlib.util.find_spec", lambda name: None)
    for use in (lambda files: files.weights, lambda files: files.chat, lambda files: files.load()):
        with pytest.raises(UserError) as error:
            use(pretrained(folder, tmp_path))
        assert str(error.value) == f"{folder} is an adapter, which needs an extra: pip install -e '.[adapters]'"
    assert pretrained(tiny_folder, tmp_path).base is None


def test_missing_base_raises(folder: Path, tmp_path: Path):
    for name in ("./absent", None):
        change_config(folder, base_model_name_or_path=name)
        with pytest.raises(UserError, match=r"base_model_name_or_path='(\./absent)?' is not a folder"):
            _ = pretrained(folder, tmp_path).weights
    change_config(folder, base_model_name_or_path="nobody/nothing", revision="v2")
    base = pretrained(folder, tmp_path).base
    assert base is not None
    assert (base.path, base.revision) == ("nobody/nothing", "v2")


def test_adapter_of_another_type_is_rejected(folder: Path, tmp_path: Path):
    change_config(folder, peft_type="PROMPT_TUNING")
    with pytest.raises(UserError, match="is an adapter of type PROMPT_TUNING, and only LORA is supported"):
        _ = pretrained(folder, tmp_path).weights


@pytest.mark.parametrize(
    "change", [lambda key: key.replace("layers.1", "layers.7"), lambda key: None if "layers.1" in key else key]
)
def test_adapter_that_fits_partly_is_rejected(folder: Path, tmp_path: Path, change: Any):
    """peft warns at most, and the other weights of the adapter would have no effect."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    save_file({change(key): value for key, value in state.items() if change(key)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit its base .* weights exist on one side only"):
        pretrained(folder, tmp_path).load()


def test_adapter_of_another_size_is_rejected(tiny_folder: Path, tmp_path: Path):
    wide = tmp_path / "wide"
    tiny_model(attention="sdpa", hidden_size=64).save_pretrained(wide)
    save_lora(tmp_path / "a", wide)
    change_config(tmp_path / "a", base_model_name_or_path=str(tiny_folder))
    with pytest.raises(UserError, match=r"does not fit its base .*size mismatch"):
        pretrained(tmp_path / "a", tmp_path).load()


def test_adapter_of_embeddings_merges_only_if_they_are_untied(tiny_folder: Path, tmp_path: Path):
    """Merged into a tied tensor it would change the head too, which peft's own model does not."""
    save_lora(tmp_path / "a", tiny_folder, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match="adapts the embeddings or the head, which are tied in its base"):
        pretrained(tmp_path / "a", tmp_path).load()
    tiny_model(attention="sdpa", tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    own = save_lora(tmp_path / "b", tmp_path / "untied", target_modules=["embed_tokens", "lm_head"])
    model = pretrained(tmp_path / "b", tmp_path).load()
    model.set_attn_implementation("sdpa")
    assert_close(logits(model), logits(own), rtol=0, atol=2e-5)


def test_find_model_accepts_an_adapters_folder(folder: Path, tiny_folder: Path, tmp_path: Path):
    assert find_model(str(folder)) == folder
    save_lora(tmp_path / "run" / "model", tiny_folder)
    assert find_model(str(tmp_path / "run")) == tmp_path / "run" / "model"


def test_adapter_of_the_default_model_finds_its_package(smollm2: Path, folder: Path, tmp_path: Path):
    change_config(folder, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct")
    base = pretrained(folder, smollm2.parents[1], name="smollm2-135m").base
    assert base is not None
    assert (base.folder / "model.safetensors").exists()
