"""Write a trained model in Hugging Face form with its model card."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var.data.chat import Chat
from var.models import lora as adapters
from var.utils.console import warn
from var.utils.errors import brief

CARD = """---
base_model: {base}
library_name: transformers
tags: [alignment, {loss}]
---

# {name}

{base}, aligned by `{loss}` ({doc}) with [VAR](https://arxiv.org/abs/2502.11026)'s codebase var-align {version}.

| | before | after |
| --- | --- | --- |
{table}

- data: {data}, hash of the plan `{plan}`
- reward: {reward}
- trained for {steps} optimiser steps, seed {seed}
- chat template: in `chat_template.jinja`; use it as it is, the model was trained with it

The whole configuration is in `config.yaml` beside this card.
"""


def valid_generation_config(generation: Any) -> Any:
    """A model's settings for generating; its tokens alone where transformers reads the others and would not write
    them."""
    from transformers import GenerationConfig

    try:
        generation.validate(strict=True)
    except ValueError as error:
        warn(f"the model's own generation_config contradicts itself, and is exported without it: {brief(error)}")
        tokens = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**{name: token for name, token in tokens.items() if token is not None and token != -1})
    return generation


def export(
    policy_model: Any, chat: Chat, folder: Path, card: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> None:
    """Write the model, or the adapter that it carries, in Hugging Face form with tokenizer, chat template and a model
    card that says how it was made."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if adapters.adapted(policy_model):
        adapters.save(policy_model, partial, state)
    else:
        if policy_model.can_generate():
            policy_model.generation_config.eos_token_id = chat.end_token
            policy_model.generation_config = valid_generation_config(policy_model.generation_config)
        attention = policy_model.config._attn_implementation
        policy_model.config._attn_implementation = "sdpa"  # `packed` is known to this project alone
        policy_model.save_pretrained(partial, state_dict=state)
        policy_model.config._attn_implementation = attention
    chat.tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(CARD.format(**card))
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
