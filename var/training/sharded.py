"""Sharded checkpoints of torch.distributed, read without running anything that they name.

torch unpickles their `.metadata`, and the values in their shards that are not tensors, without a check.
"""

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from var.utils.errors import UserError, brief

PLAIN = "meta.pt"  # Lightning's file for all that is not sharded
CLASSES = {  # what torch writes in `.metadata`, by module
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
}  # fmt: skip


class ShardingStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, which reads checkpoints as data only."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore model and optimizers, and return the rest of the checkpoint. Nothing that it names is run."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return super().load_checkpoint(path, weights_only=True)
        model, module = self.model, self.lightning_module
        assert model is not None
        assert module is not None
        state = read_shards({"state_dict": get_model_state_dict(model)}, path)
        model.load_state_dict(state["state_dict"], strict=module.strict_loading)
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            state = read_shards({key: get_optimizer_state_dict(model, optimizer)}, path)
            set_optimizer_state_dict(
                model, optimizer, optim_state_dict=state[key], options=StateDictOptions(cpu_offload=True)
            )
        content: dict[str, Any] = torch.load(path / PLAIN, weights_only=True)
        return content


def read_shards(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Read the values of a state from a sharded checkpoint, in place, and return the state. All ranks must call it.

    Raise UserError if the checkpoint is damaged, of another model, or has a pickle of other than plain values.
    """
    try:
        load(state, storage_reader=Reader(checkpoint), planner=Planner())
    except CheckpointException as error:  # it has the errors of all ranks, with their tracebacks
        reasons = {brief(reason[0]) for reason in error.failures.values()}
        raise UserError(
            f"{checkpoint} cannot be read: it is damaged, of another model, or a pickle that names objects other than "
            f"tensors and plain values. No code in it was executed. ({'; '.join(sorted(reasons))})"
        ) from error
    return state


def read_metadata(checkpoint: Path) -> Metadata:
    """Return the metadata of a sharded checkpoint. Raise UnpicklingError if it names other objects than torch's."""
    with (checkpoint / ".metadata").open("rb") as file:
        found: Metadata = _MetadataUnpickler(file).load()
    return found


class Reader(FileSystemReader):
    """Reads shards. Metadata of one rank alone, which this project does not write, is not read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked metadata."""
        return read_metadata(Path(self.path))


class Planner(DefaultLoadPlanner):
    """Places what a reader has read."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Place a value that is not a tensor. Raise UnpicklingError for other objects than plain values."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # torch's own method loads all that is pickled
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads what torch.distributed.checkpoint writes, and rejects everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class, if it is one that torch.distributed.checkpoint writes."""
        if (module, name) == ("builtins", "getattr"):
            return _get_member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (dtype or name in CLASSES.get(module, ())):  # a dotted name would also reach a module's imports
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _get_member(kind: Any, name: str) -> enum.Enum:
    """Return a member of an enumeration, as which some versions of Python 3.11 pickle it: getattr(class, name)."""
    if not (isinstance(kind, enum.EnumType) and isinstance(name, str) and name in kind.__members__):
        raise pickle.UnpicklingError("builtins.getattr")
    return kind[name]
