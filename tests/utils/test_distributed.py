"""Processes and devices: each process binds its own GPU first, and ranks wait long enough for each other."""

from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.helpers.runs import composed
from var.rewards.classifier import Classifier
from var.training import run as run_module
from var.training.run import Run
from var.utils.distributed import bind_device, process_group
from var.utils.errors import UserError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that pretends that this process has a local rank and sees some GPUs. It returns bound ones."""
    bound = list[str]()

    def pretend(count: int, local_rank: int | None = None) -> list[str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", bound.append)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        return bound

    return pretend


@pytest.mark.parametrize(
    ("count", "local_rank", "device"),
    [(8, 3, "cuda:3"), (8, None, "cuda:0"), (1, 3, "cuda:0"), (0, 3, "cpu")],
    ids=["several", "no launcher", "each process sees its own", "none"],
)
def test_process_binds_the_gpu_of_its_local_rank(gpus, count, local_rank, device):
    bound = gpus(count, local_rank)
    assert bind_device() == device
    assert bound == ([] if device == "cpu" else [device])
    assert Classifier(path="x")._device == device
    assert Classifier(path="x", device="cpu")._device == "cpu"


def test_more_processes_than_gpus_are_an_error(gpus):
    gpus(2, 2)
    with pytest.raises(UserError, match=r"^3 or more processes were started on this machine, and 2 GPUs are visible\."):
        bind_device()


def test_run_binds_its_gpu_before_anything_is_built(gpus, tiny_folder, tmp_path, monkeypatch):
    """The reward and the reference are made afterwards, so whatever they load on "cuda" is on this GPU."""
    bound, seen = gpus(4, 2), list[list[str]]()
    real = run_module.instantiate
    monkeypatch.setattr(
        run_module, "instantiate", lambda *words, **named: seen.append([*bound]) or real(*words, **named)
    )
    card = ("trainer.accelerator=gpu", "trainer.devices=1", "trainer.device_memory=80GiB")
    cfg = composed(f"model.path={tiny_folder}", *card)
    run = Run.compose(cfg, tmp_path)
    assert seen
    assert all(devices == ["cuda:2"] for devices in seen)
    assert run.annotator.reference.device == torch.device("cuda:2")


def test_ranks_wait_for_a_day(monkeypatch):
    """Another rank may annotate for hours. A single process joins no group."""
    joined = list[dict[str, Any]]()
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **named: joined.append(named))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: joined.append({}))
    with process_group():
        assert joined == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with process_group():
        assert joined == [{"timeout": timedelta(days=1)}]
    assert len(joined) == 2, "left at the end"
