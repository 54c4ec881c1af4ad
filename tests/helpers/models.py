"""Tiny models that several test files need: LoRA adapters, reward models, and the values of a model card."""

from pathlib import Path
from typing import Any

import torch

from tests.conftest import spread, tiny_config

CARD = {
    "base": "tiny/base", "loss": "var", "name": "tiny-var", "doc": "var.losses.var", "version": "0.1.0",
    "table": "| reward | 0.1 | 0.9 |", "data": "arithmetic", "plan": "0123456789abcdef", "reward": "exact",
    "steps": 3, "seed": 0,
}  # fmt: skip


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
