"""Tiny models that several test files need: language models, LoRA adapters, reward models, and a model card."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from notebooks.tiny import SIZES, TEMPLATE, byte_tokenizer

DATED = TEMPLATE.replace("{% for", "{{ '<system>' + strftime_now('%d %b %Y') + '<end>' }}{% for", 1)
"""A template that begins with the current date, as that of Llama 3.1."""

CARD = {
    "base": "tiny/base", "origin": "tiny/base at commit 3f1", "license": "apache-2.0", "loss": "var",
    "name": "tiny-var", "version": "0.1.0", "table": "| reward | 0.1 | 0.9 |", "data": "arithmetic",
    "data_license": "mit", "plan": "0123456789abcdef", "reward": "`exact`", "steps": 3, "seed": 0,
    "parts": {"loss": {"_target_": "var.losses.var.VAR", "temperature": 0.25}}, "dtype": "float32",
    "quantization": None, "changes": "",
}  # fmt: skip


def tiny_config(**options: Any) -> Any:
    """Return the configuration of a Llama of two layers."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **options})


def spread(model: Any) -> Any:
    """Enlarge the weights, so that log-probabilities are far from uniform and scores differ; return the model."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "packed", **options: Any) -> Any:
    """Return a random Llama of two layers."""
    from transformers import LlamaForCausalLM

    import var.models.attention  # noqa: F401  registers the packed attention

    torch.manual_seed(seed)
    return spread(LlamaForCausalLM(tiny_config(attn_implementation=attention, **options)).to(dtype))


def tiny_gpt2(positions: int) -> Any:
    """Return a random GPT-2 of one layer, which has a fixed number of positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4, n_positions=positions))


def saved(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    """Save a model (default: the tiny one) with the byte tokenizer in Hugging Face form; return its folder."""
    (model or tiny_model()).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def set_clock(monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    """Let templates read a day as the current date."""

    class Clock(date):
        @classmethod
        def today(cls) -> date:
            return day

    monkeypatch.setattr("var.data.clock.date", Clock)
    monkeypatch.setattr("var.data.clock._today", None)


def save_two_ends(folder: Path) -> Path:
    """Save a tiny model with a second end token, <stop> (261), as the chat models of several families have.

    The template ends messages with <end> (257). The tokenizer's eos_token is <stop>, and generation_config.json names
    both.
    """
    from transformers import GenerationConfig

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    saved(folder, tokenizer=tokenizer)
    GenerationConfig(eos_token_id=[257, 261]).save_pretrained(folder)
    return folder


def pretrained(path: Path | str, cache: Path, **more: Any) -> Any:
    """Return the Pretrained of a saved tiny model. `more` replaces its fields."""
    from var.models.pretrained import Pretrained

    fields = dict(
        name="tiny", path=str(path), revision=None, chat_template=None, dtype="float32", attention="packed",
        trust_remote_code=False, gradient_checkpointing=False, architecture={}, cache=str(cache),
    )  # fmt: skip
    return Pretrained(**{**fields, **more})


def save_lora(folder: Path, base: Path, seed: int = 1, scorer: bool = False, **options: Any) -> Any:
    """Save a LoRA with nonzero A and B for the model in `base`; return peft's own model."""
    import peft
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


def decoder(labels: int = 1) -> Any:
    """Return a random Llama that scores sequences."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    return spread(LlamaForSequenceClassification(tiny_config(num_labels=labels, pad_token_id=0)))


def encoder() -> Any:
    """Return a random BERT that scores sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    return spread(BertForSequenceClassification(config))


def score_alone(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the score of one sequence by transformers' own forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0]
