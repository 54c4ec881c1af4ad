"""Write models and adapters in Hugging Face form."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from var.data.chat import Chat
from var.models.card import write_card
from var.models.lora import HEAD, has_adapter
from var.models.structure import open_weights
from var.utils.console import warn
from var.utils.errors import UserError, brief
from var.utils.files import name_partial, remove, remove_partials, synchronize, synchronize_folder


def export(
    model: Any, chat: Chat, folder: Path, card: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> None:
    """Write the model, or only its adapter if it has one, with tokenizer, chat template and model card.

    The files are synced, and replace those of an earlier export. state is the gathered state of a sharded model.
    """
    remove_partials(folder)
    partial = name_partial(folder)
    if has_adapter(model):
        save_adapter(model, partial, state)
    else:
        if model.can_generate():
            ends = sorted(chat.end_tokens, key=lambda token: (token != chat.end_token, token))
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
            model.generation_config = valid_generation_config(model.generation_config)
        attention = model.config._attn_implementation
        model.config._attn_implementation = "sdpa"  # only this project knows `packed`
        save_model(model, partial, state)
        model.config._attn_implementation = attention
    chat.tokenizer.save_pretrained(partial)
    write_card(partial, card, folder)
    synchronize(partial)
    remove(folder)
    partial.replace(folder)
    synchronize_folder(folder.parent)


def read_dtype(folder: Path) -> torch.dtype:
    """Return the floating-point dtype of most weights in the files of a folder."""
    sizes = Counter[str]()
    for file in folder.glob("*.safetensors"):
        with open_weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118  it is not a mapping
                weight = weights.get_slice(name)
                sizes[weight.get_dtype()] += math.prod(weight.get_shape())
    if not sizes:
        raise UserError(f"{folder}: its .safetensors files have no weights. Restore them.")
    kinds = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
    return kinds.get(sizes.most_common(1)[0][0], torch.float32)


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
    """Write a transformers model, with the weights in `state` if given, in files of at most 5 GB."""
    dtype = None if state is None else str(next(iter(state.values())).dtype).removeprefix("torch.")
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")  # it empties `state`
    if dtype is not None:  # the model's own was written
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _reset_modes(folder, folder / "config.json")


def save_adapter(model: Any, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write the model's adapter as peft does, with the weights in `state` if given."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    if model.peft_config["default"].modules_to_save:  # the head of a reward model
        complete = model.state_dict() if state is None else state
        weights |= {name: weight for name, weight in complete.items() if name.startswith(f"{HEAD}.")}
    folder.mkdir(parents=True)
    named = {f"base_model.model.{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    _reset_modes(folder, folder / "adapter_config.json")


def _reset_modes(folder: Path, plain_file: Path) -> None:
    """Give weights the mode of a plain file: safetensors writes through a temporary file, with mode 0600."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(plain_file, file)
