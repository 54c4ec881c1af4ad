"""A tiny random model and train.py on it, so that the notebooks, and the tests, run in seconds on any machine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import var

ROOT = Path(var.__file__).parent.parent
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SIZES = dict(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=256, eos_token_id=257,
)  # fmt: skip


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Every byte is a token, so that lengths are known by hand; <bos> 256, <end> 257, role marks are one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"], chat_template=template,
    )  # fmt: skip


def model(folder: Path) -> Path:
    """A Llama of two layers with random weights and a token for each byte, in Hugging Face form."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def train(place: Path, *overrides: str, path: Path = ROOT / "examples") -> Path:
    """`python train.py` on the tiny model, everything it writes under `place`; returns the run's folder.

    path: where Python finds what a `_target_` names, as PYTHONPATH says it.
    """
    folder = place / "tiny"
    if not folder.exists():
        model(folder)
    command = [
        sys.executable, str(ROOT / "train.py"), *overrides, f"model.path={folder}", "trainer.accelerator=cpu",
        f"annotation_cache={place / 'store'}", f"cache={place / 'cache'}", f"runs={place / 'runs'}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return max((place / "runs").glob("*/summary.json"), key=lambda file: file.stat().st_mtime_ns).parent
