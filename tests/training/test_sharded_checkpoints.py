"""Sharded checkpoints: nothing in them is unpickled without a check, and those of earlier versions are read."""

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from tests.helpers.runs import assert_identical, fit
from var.training.checkpoints import checkpoints, read_checkpoint
from var.training.sharded import ShardingStrategy
from var.utils.errors import UserError


class Bait:
    """An object that creates a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return open, (str(self.made), "w")


def poison(checkpoint: Path, made: Path) -> None:
    """Replace the values in a checkpoint that are not tensors by a pickle with the bait."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    content = io.BytesIO()
    torch.save(Bait(made), content)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    kinds, places = metadata.state_dict_metadata, metadata.storage_data
    values = [index for index in places if isinstance(kinds[index.fqn], BytesStorageMetadata)]
    assert values
    for index in values:
        shard = checkpoint / places[index].relative_path
        places[index] = replace(places[index], offset=shard.stat().st_size, length=len(content.getvalue()))
        with shard.open("ab") as file:
            file.write(content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoint.with_suffix(".sha256").unlink()  # a stranger would write others


@pytest.fixture
def sharded(options: list[str]) -> list[str]:
    """Return the overrides of a run on one process whose checkpoints are sharded."""
    more = ["strategy=fsdp", "trainer.devices=1", "trainer.precision=32-true", "trainer.checkpoint_every_n_steps=2"]
    return [*options, *more, "data.micro_batch=2", "data.global_batch=4", "optim.schedule.kind=constant"]


@pytest.fixture(autouse=True)
def no_group() -> Any:
    """End the process group that a run leaves."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_values_in_shards_are_not_unpickled(resume, sharded, tmp_path):
    fit(sharded, tmp_path / "run", "trainer.max_steps=2")
    (checkpoint,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.is_dir()
    poison(checkpoint, tmp_path / "made")
    more, target = ([], "run") if resume == "auto" else ([f"resume={checkpoint}"], "other")
    with pytest.raises(UserError, match=r"step-2\.ckpt cannot be read: it is damaged, .* No code in it was executed"):
        fit(sharded, tmp_path / target, "trainer.max_steps=4", *more)
    assert not (tmp_path / "made").exists(), "untrusted code ran"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
def test_one_bit_of_a_sharded_checkpoint_is_noticed(name, sharded, tmp_path, capsys):
    expected = fit(sharded, tmp_path / "straight", "trainer.max_steps=4")
    fit(sharded, tmp_path / "run", "trainer.max_steps=4")
    file = tmp_path / "run" / "checkpoints" / "step-4.ckpt" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    resumed = fit(sharded, tmp_path / "run", "trainer.max_steps=4")
    assert "The run resumes from step-2.ckpt instead." in capsys.readouterr().out.replace("\n", " ")
    assert_identical(expected, resumed, "step", "train/loss")


def test_imports_of_torchs_modules_are_not_called(tmp_path):
    """A dotted name such as os.system reaches what an allowed module imports."""
    made, module = tmp_path / "made", "torch.distributed.checkpoint.metadata"
    command = f"touch {made}"
    texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, "os.system", command)]
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / ".metadata").write_bytes(b"\x80\x04%b%b\x93%b\x85R." % tuple(texts))
    torch.save({"global_step": 3, "loops": {}}, tmp_path / "evil" / "meta.pt")
    with pytest.raises(UserError, match="evil is not a checkpoint of a run"):
        read_checkpoint(tmp_path / "evil")
    assert not made.exists(), "untrusted code ran"


def test_checkpoint_that_lightnings_strategy_wrote_resumes(sharded, tmp_path, monkeypatch):
    """Versions before this one used Lightning's own strategy. Its files are the same."""
    straight = fit(sharded, tmp_path / "straight", "trainer.max_steps=4")
    with monkeypatch.context() as patch:
        patch.setattr("var.training.run.ShardingStrategy", ModelParallelStrategy)
        fit(sharded, tmp_path / "run", "trainer.max_steps=2")
    read, real = list[Any](), ShardingStrategy.load_checkpoint
    monkeypatch.setattr(ShardingStrategy, "load_checkpoint", lambda *a, **b: read.append(a) or real(*a, **b))
    resumed = fit(sharded, tmp_path / "run", "trainer.max_steps=4")
    assert len(read) == 1
    assert_identical(straight, resumed, "step", "train/loss")


def test_checkpoint_of_deepspeed_is_an_error(options, tmp_path):
    """DeepSpeed would unpickle its files."""
    (tmp_path / "checkpoints" / "step-2.ckpt").mkdir(parents=True)
    with pytest.raises(UserError, match="strategy=deepspeed cannot resume"):
        fit(options, tmp_path, "strategy=deepspeed")
