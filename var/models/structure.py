"""The parts of a transformers model: blocks, head, positions, tied weights, and the names of weights in files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from var.config.run_files import read_mapping
from var.utils.errors import UserError, brief

INDEX = "model.safetensors.index.json"  # lists the weights of a model in several files

Shapes = dict[str, tuple[int, ...] | None]  # the shapes of weights, or None, by name


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device. Buffers keep their values: those of rotary embeddings are in no file."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter stays the same object
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def untied_weights(model: Any) -> dict[str, Any]:
    """Return the weights of a model without those that are tied to another weight."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {name: weight for name, weight in model.state_dict().items() if name not in tied}


def blocks(model: Any) -> Iterator[torch.nn.Module]:
    """Return the layers of a transformers model, which are sharded and compiled one by one."""
    names = set(model._no_split_modules or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def read_index(path: Path) -> dict[str, str]:
    """Return the file of each weight, from the index of a model.

    Raise UserError if it is damaged, or names a file of another folder, which the hash of the weights would not cover.
    """
    index = read_mapping(path)
    names = index.get("weight_map")
    files = names.values() if isinstance(names, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in files) or "metadata" not in index:
        raise UserError(
            f"{path}: expected metadata, and weight_map from names of weights to names of files in this folder. "
            "Restore this file."
        )
    return names  # type: ignore[return-value]


def open_weights(file: Path) -> Any:
    """Open a .safetensors file, without reading its weights. Raise UserError if it is damaged."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is damaged, or not a .safetensors file ({brief(error)}). Restore it.") from error


def read_weight_shapes(folder: Path, adapter: bool = False) -> Shapes | None:
    """Return the weights in the files of a folder by name; None if the files are not on this machine.

    A shape is None if only the index is on this machine. adapter: read those of a LoRA adapter, without the prefix that
    peft adds.
    """
    shapes: Shapes = {}
    for file in folder.glob("adapter_model.safetensors" if adapter else "*.safetensors"):
        with open_weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118  it is not a mapping
                shapes[name.removeprefix("base_model.model.")] = tuple(weights.get_slice(name).get_shape())
    if not shapes and not adapter and (folder / INDEX).exists():
        return dict.fromkeys(read_index(folder / INDEX))
    return shapes or None


def check_saved_parts(folder: Path, model: Any) -> None:
    """Raise a UserError if an adapter lists a part of the model as its own and has no weights of it.

    peft would keep that part of the base in silence.
    """
    config = read_mapping(folder / "adapter_config.json")
    names = read_weight_shapes(folder, adapter=True) or {}
    for part in config.get("modules_to_save") or ():
        present = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{part}")]
        if any(not any(name.startswith(f"{place}.") for name in names) for place in present):
            raise UserError(
                f"the adapter {folder} does not fit its base {config.get('base_model_name_or_path')}: its "
                f"modules_to_save list {part}, of which its file has no weights."
            )


def build_meta_scorer(config: Any, typed: str) -> Any:
    """Build a sequence classifier with one label on the meta device."""
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"{typed}: transformers has no sequence classifier for {config.model_type}.") from error


def list_head(model: Any) -> Shapes:
    """Return the weights of a classifier outside its base model, with their shapes."""
    prefix = f"{model.base_model_prefix}."
    return {name: tuple(w.shape) for name, w in model.state_dict().items() if not name.startswith(prefix)}


def list_positions(model: Any) -> Iterator[tuple[int, str]]:
    """Yield the longest sequence that a model has positions for, with its reason. Some models have no such limit."""
    config = model.config.get_text_config()
    if (table := getattr(config, "max_position_embeddings", None)) is None:
        return
    for name, module in model.named_modules():  # RoBERTa and its kind count positions from the padding token's id
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            table = module.num_embeddings - module.padding_idx - 1
    yield table, f"has {table} positions"
