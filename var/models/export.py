"""Write models and adapters in Hugging Face form, and an exported model with its model card."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var.data.chat import Chat
from var.models.lora import has_adapter
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
- trained for {steps} optimizer steps, seed {seed}
- chat template: in `chat_template.jinja`; use it unchanged, the model was trained with it

The complete configuration is in `config.yaml` next to this card.
"""


def export(
    model: Any, chat: Chat, folder: Path, card: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> None:
    """Write the model, or only its adapter if it has one, with tokenizer, chat template and model card.

    The files replace those of an earlier export. state is the gathered state of a sharded model.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if has_adapter(model):
        save_adapter(model, partial, state)
    else:
        if model.can_generate():
            model.generation_config.eos_token_id = chat.end_token
            model.generation_config = valid_generation_config(model.generation_config)
        attention = model.config._attn_implementation
        model.config._attn_implementation = "sdpa"  # only this project knows `packed`
        save_model(model, partial, state)
        model.config._attn_implementation = attention
    chat.tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(CARD.format(**card))
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)


def valid_generation_config(generation: Any) -> Any:
    """Return a generation config that transformers can write: only its special tokens if its settings contradict."""
    from transformers import GenerationConfig

    try:
        generation.validate(strict=True)
    except ValueError as error:
        warn(f"the model's generation_config contradicts itself and is not exported: {brief(error)}")
        tokens = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**{name: token for name, token in tokens.items() if token is not None and token != -1})
    return generation


def save_model(model: Any, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write a transformers model, with the weights in `state` if given."""
    model.save_pretrained(folder, state_dict=state)
    _reset_modes(folder, folder / "config.json")


def save_adapter(model: Any, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write the model's adapter as peft does, with the weights in `state` if given."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    folder.mkdir(parents=True)
    named = {f"base_model.model.{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    _reset_modes(folder, folder / "adapter_config.json")


def _reset_modes(folder: Path, plain_file: Path) -> None:
    """Give weights the mode of a plain file: safetensors writes through a temporary file, with mode 0600."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(plain_file, file)
