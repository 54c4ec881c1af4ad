"""conf/model: the sizes are the published ones, and each shipped chat template can be trained on."""

import re
from functools import cache
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers.runs import ROOT, composed

FOLDER = ROOT / "conf" / "model"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem[0] != "_" and path.stem != "hub")

PUBLISHED = {  # parameters, with a tied head counted once: `safetensors.total` on the hub's model pages
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b-int4": 32_763_876_352,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3.2-1b-instruct": 1_235_814_400,
    "llama3.2-3b-instruct": 3_212_749_824,
    "llama3.1-8b-instruct": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "smollm3-3b": 3_075_098_624,
    "olmo2-1b-sft": 1_484_916_736,
    "olmo2-7b-sft": 7_298_617_344,
    "gemma3-1b-instruct": 999_885_952,
    "mistral-small-24b-instruct": 23_572_403_200,
}
HEADS = dict.fromkeys(("smollm2-135m", "qwen2.5-0.5b", "llama3.2-1b", "llama3.2-1b-instruct"), 64)  # else 128
HEADS["gemma3-1b-instruct"] = 256

ROPE = {  # θ, and the scaling factor of Llama 3
    "smollm2": (1e5, None),
    "qwen2.5": (1e6, None),
    "llama2": (1e4, None),
    "llama3.1": (5e5, 8.0),
    "llama3.2": (5e5, 32.0),
    "qwen3": (1e6, None),
    "smollm3": (5e6, None),
    "olmo2": (5e5, None),
    "mistral": (1e8, None),
}

# Models whose tokenizer has no template: its BOS, its EOS, and the token that ends a turn in our template.
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
LLAMA_2 = ("<s>", "</s>", "</s>")
TEMPLATED = {
    "llama3.2-1b": LLAMA_3,
    "llama3.2-3b": LLAMA_3,
    "llama3.1-8b": LLAMA_3,
    "llama2-7b": LLAMA_2,
    "llama2-13b": LLAMA_2,
}


@cache
def load(name: str) -> DictConfig:
    config: DictConfig = composed(f"model={name}").model
    return config


def turns(roles: str) -> list[dict[str, str]]:
    """Return messages with distinct texts, for example system, user and assistant for `sua`."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": f" word-{i}\n of {role} "} for i, role in enumerate(roles)]


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    bos, eos, end = TEMPLATED[name]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", bos, eos, end]))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token=bos,
        eos_token=eos,
        chat_template=load(name).chat_template,
    )


def render(name: str, messages: list[dict[str, str]], reply: bool = False) -> str:
    text = tokenizer(name).apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    assert isinstance(text, str)
    return text


def test_all_configs_are_covered():
    assert len(NAMES) == 25
    assert set(NAMES) == set(PUBLISHED)
    assert {name for name in NAMES if load(name).chat_template} == set(TEMPLATED)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_complete_and_sets_no_unknown_key(name):
    config = load(name)
    assert not OmegaConf.missing_keys(config)
    assert set(config) == {"name", *OmegaConf.load(FOLDER / "_base.yaml")}
    assert config.name == name
    quantized = name.endswith("int4")
    assert (config.dtype, config.quantization) == (("bfloat16", "nf4") if quantized else ("float32", None))
    assert config.trust_remote_code is False


@pytest.mark.parametrize("name", NAMES)
def test_architecture_has_the_published_number_of_parameters(name):
    sizes: Any = OmegaConf.to_container(load(name).architecture, resolve=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert set(sizes) <= set(type(model.config)().to_dict())  # for_model accepts a misspelled key silently
    assert sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]) == HEADS.get(name, 128)
    rope = model.config.rope_parameters
    if name.startswith("gemma3"):
        assert {kind: own["rope_theta"] for kind, own in rope.items()} == {
            "sliding_attention": 1e4,
            "full_attention": 1e6,
        }
        assert model.config.layer_types[:6] == [*["sliding_attention"] * 5, "full_attention"]
        return
    assert set(sizes["rope_parameters"]) <= set(rope)
    assert (rope["rope_theta"], rope.get("factor")) == ROPE[name.split("-")[0]]
    assert rope["rope_type"] == ("llama3" if name.startswith("llama3") else "default")


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.removesuffix("-instruct") in NAMES and name.endswith("-instruct")]
)
def test_instruct_version_has_the_architecture_of_its_base(name):
    assert load(name).architecture == load(name.removesuffix("-instruct")).architecture


@pytest.mark.parametrize("name", NAMES)
def test_memory_in_the_comment_is_16_bytes_per_parameter(name):
    stated = re.findall(r"16 bytes per parameter: (\d+) GB", (FOLDER / f"{name}.yaml").read_text())
    assert stated == ([] if PUBLISHED[name] < 2e9 or load(name).quantization else [f"{PUBLISHED[name] * 16 / 1e9:.0f}"])


@pytest.mark.parametrize("family", [LLAMA_3, LLAMA_2])
def test_family_shares_one_template(family):
    assert len({load(name).chat_template for name in TEMPLATED if TEMPLATED[name] == family}) == 1


@pytest.mark.parametrize("roles", ["u", "su", "uau", "suau", "uauau", "uu"])
@pytest.mark.parametrize("name", TEMPLATED)
def test_prompt_is_a_prefix_and_the_answer_ends_with_the_end_token(name, roles):
    bos, _, end = TEMPLATED[name]
    *prompt, answer = turns(roles + "a")
    opened = render(name, prompt, reply=True)
    full = render(name, [*prompt, answer])
    space = " " if TEMPLATED[name] == LLAMA_2 else ""  # as in Meta's template: "[/INST] answer"
    assert full == opened + space + answer["content"] + end
    assert full.count(bos) == 1
    assert full.startswith(bos)
    for text, messages in ((opened, prompt), (full, [*prompt, answer])):
        places = [text.find(message["content"]) for message in messages]
        assert -1 not in places
        assert places == sorted(places)
    answers = [message["content"] for message in [*prompt, answer] if message["role"] == "assistant"]
    assert all(content + end in full for content in answers)


@pytest.mark.parametrize("name", TEMPLATED)
def test_adding_turns_keeps_the_text_before_them(name):
    """A trained answer is part of the context of the next turn."""
    messages = turns("suauaua")
    texts = [render(name, messages[:n]) for n in (3, 5, 7)]
    assert texts[1].startswith(texts[0])
    assert texts[2].startswith(texts[1])


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize("name", [name for name in TEMPLATED if TEMPLATED[name] == LLAMA_3])
def test_llama_3_by_hand(name):
    assert render(name, CONVERSATION, reply=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("name", [name for name in TEMPLATED if TEMPLATED[name] == LLAMA_2])
def test_llama_2_by_hand(name):
    assert render(name, CONVERSATION, reply=True) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello.</s>[INST] Bye [/INST]"
    )


@pytest.mark.parametrize("name", [name for name in TEMPLATED if TEMPLATED[name] == LLAMA_2])
def test_llama_2_template_rejects_unsupported_roles(name):
    with pytest.raises(TemplateError, match=r"a system message into the user's turn after it, and none follows"):
        render(name, turns("us"))
    with pytest.raises(TemplateError, match=r"the roles system, user and assistant, not tool"):
        render(name, [{"role": "tool", "content": "42"}])
