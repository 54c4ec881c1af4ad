"""A tiny random model, and train.py on it, so that notebooks and tests run in seconds on any machine."""

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
    """Return a tokenizer in which every byte is a token, so that lengths are easy to count.

    <bos> is 256, <end> is 257, and each role marker is a single token.
    """
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


def save_model(folder: Path) -> Path:
    """Save a two-layer Llama with random weights and the byte tokenizer in Hugging Face format; return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def train(place: Path, *overrides: str, path: Path = ROOT / "examples") -> Path:
    """Run `python train.py` on the tiny model and return the run's folder.

    place: the folder for everything that the run writes.
    overrides: Hydra overrides, and other arguments of train.py.
    path: the PYTHONPATH, where Python finds the classes that a `_target_` names.
    """
    folder = place / "tiny"
    if not folder.exists():
        save_model(folder)
    command = [
        sys.executable, str(ROOT / "train.py"), *overrides, f"model.path={folder}", "trainer.accelerator=cpu",
        f"annotation_cache={place / 'annotations'}", f"cache={place / 'cache'}", f"runs={place / 'runs'}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return max((place / "runs").glob("*/summary.json"), key=lambda file: file.stat().st_mtime_ns).parent
