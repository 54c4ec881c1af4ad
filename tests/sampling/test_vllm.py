"""vLLM, replaced by a fake that takes the arguments of the real one, and its signatures, read from its sources.

The last test compares the recorded signatures with vLLM's sources, which needs neither CUDA nor an installation: unzip
a wheel and set VAR_VLLM to the folder that contains `vllm/`.
"""

import ast
import importlib.machinery
import importlib.util
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.engines import SIGNATURES, Engine, sampling_params
from tests.helpers.models import pretrained
from var.models.frozen import FrozenModel
from var.sampling import vllm as vllm_module
from var.sampling.base import Sample, Sampling
from var.sampling.local import Transformers
from var.sampling.vllm import DTYPES, VLLM, engine_environment
from var.utils.errors import UserError

SAMPLING = Sampling(responses=2, temperature=0.7, top_p=0.9, max_new_tokens=8, batch=6, batch_tokens=4096, seed=0)
PROMPTS = [[{"role": "user", "content": text}] for text in ("ab", "a longer one", "c")]

VERSION = "0.33.0"  # the wheel that the following names were read from


@pytest.fixture
def reference(tiny_folder: Path, tmp_path: Path) -> FrozenModel:
    return FrozenModel(pretrained(tiny_folder, tmp_path), "cpu")


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the package by a fake, outside a launcher; return one entry per engine that was stopped."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = ModuleType("vllm")
    module.__dict__.update(
        LLM=Engine, SamplingParams=sampling_params, __spec__=importlib.machinery.ModuleSpec("vllm", None)
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("loaded", "asked", "stopped"):
        monkeypatch.setattr(Engine, name, [])
    return Engine.stopped


def test_vllm_gets_weights_tokens_and_settings(reference: FrozenModel):
    sampler = VLLM(gpu_memory_utilization=0.5, tensor_parallel_size=2, max_model_len=64)
    sampler.check()
    done: list[int] = []
    sampler(reference, PROMPTS, SAMPLING, done.append)
    assert done == [3]
    assert Engine.loaded == [
        {
            "model": str(reference.pretrained.folder), "dtype": "float32", "generation_config": "vllm",
            "trust_remote_code": False, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 2, "max_model_len": 64,
        }
    ]  # fmt: skip
    chat = reference.pretrained.chat
    assert [prompt["prompt_token_ids"] for prompt, _ in Engine.asked] == [chat.prompt(prompt) for prompt in PROMPTS]
    assert Engine.asked[0][0]["prompt_token_ids"].count(256) == 1  # one BOS
    params = Engine.asked[0][1]
    assert vars(params) == {
        "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 8, "seed": params.seed,
        "stop_token_ids": [chat.end_token], "ignore_eos": True, "detokenize": False,
    }  # fmt: skip


def test_tokens_end_at_the_first_end_token(reference: FrozenModel):
    """By hand: the first response is truncated after 8 tokens, the second is one token and the first end token.

    Neither of the two bytes is a character. At the end of a truncated response they may begin a character.
    """
    reference.pretrained.chat.__dict__["end_tokens"] = frozenset({257, 99})
    expected = [Sample("", False, (98,) * 8), Sample("\ufffd", True, (97, 99))]
    assert VLLM()(reference, PROMPTS, SAMPLING) == [expected] * 3
    assert Engine.asked[0][1].stop_token_ids == [99, 257]


def test_seed_depends_on_the_prompt_and_not_on_its_place(reference: FrozenModel):
    for sampling, prompts in ((SAMPLING, PROMPTS), (SAMPLING, PROMPTS[::-1]), (replace(SAMPLING, seed=1), PROMPTS)):
        VLLM()(reference, prompts, sampling)
    seeds = [params.seed for _, params in Engine.asked]
    assert seeds[:3] == seeds[5:2:-1]
    assert len(set(seeds[:3] + seeds[6:])) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_engine_is_loaded_once_until_it_is_released(reference: FrozenModel, vllm: list[str]):
    sampler = VLLM()
    sampler.release()
    assert vllm == []
    sampler(reference, PROMPTS[:1], SAMPLING)
    sampler(reference, PROMPTS[1:], SAMPLING)
    assert len(Engine.loaded) == 1
    sampler.release()
    assert vllm == ["stopped"]
    sampler(FrozenModel(reference.pretrained, "cpu", torch.bfloat16), PROMPTS[:1], SAMPLING)
    assert [settings["dtype"] for settings in Engine.loaded] == ["float32", "bfloat16"]
    sampler(reference, PROMPTS[:1], SAMPLING)  # another model replaces the one before
    assert (len(Engine.loaded), vllm) == (3, ["stopped", "stopped"])


def test_release_keeps_the_process_group_of_the_job(reference: FrozenModel, tmp_path: Path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sampler = VLLM()
        sampler(reference, PROMPTS[:1], SAMPLING)
        sampler.release()
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,7", "7"), ("GPU-a,GPU-b", "GPU-b")])
def test_engine_of_a_rank_sees_only_its_gpu(visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch):
    """An engine with the launcher's variables would wait for the store of torchrun's agent."""
    launcher = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    before = dict(os.environ)
    with engine_environment():
        assert launcher.keys() & os.environ.keys() == set()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ == before


def test_fingerprint_differs_from_transformers(reference: FrozenModel):
    fingerprint = VLLM().fingerprint(reference)
    assert fingerprint != Transformers().fingerprint(reference)
    assert fingerprint["reference"] == reference.fingerprint
    assert VLLM(gpu_memory_utilization=0.5).fingerprint(reference) == fingerprint


def test_weights_that_vllm_would_not_sample_from_are_rejected(reference: FrozenModel, monkeypatch: pytest.MonkeyPatch):
    def check(**changes: Any) -> str:
        for name, value in changes.items():
            monkeypatch.setitem(reference.pretrained.__dict__, name, value)
        with pytest.raises(UserError) as error:
            VLLM().fingerprint(reference)
        return str(error.value)

    assert "vLLM does not compute in model.dtype=float64" in check(dtype="float64")
    assert "model.quantization=nf4, but vLLM would sample from the weights without" in check(quantization="nf4")
    assert "is an adapter, which vLLM does not merge" in check(base=reference.pretrained)


@pytest.mark.parametrize(
    ("sampler", "sampling", "message"),
    [
        (VLLM(max_model_len=20), {}, "sampler.max_model_len: 20, but the longest prompt with its response has "),
        (VLLM(), {"max_new_tokens": 1024}, "the model's max_position_embeddings: 1024, but the longest prompt with"),
        (VLLM(), {"temperature": 0.001}, "temperature: vLLM takes 0 and 0.01 to 2, got 0.001"),
        (VLLM(), {"temperature": 2.5}, "temperature: vLLM takes 0 and 0.01 to 2, got 2.5"),
    ],
)
def test_sampling_that_vllm_would_change_is_rejected(
    sampler: VLLM, sampling: dict[str, Any], message: str, reference: FrozenModel
):
    with pytest.raises(UserError, match="cannot sample this") as error:
        sampler(reference, PROMPTS, replace(SAMPLING, **sampling))
    assert message in str(error.value)
    assert Engine.loaded == []


def test_processes_and_settings_that_cannot_work_are_rejected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    VLLM().check()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(UserError) as error:
        VLLM(tensor_parallel_size=4).check()
    assert "sampler.tensor_parallel_size: 4, but each of 2 processes has one GPU" in str(error.value)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING: 0, but the engine needs its own process" in str(error.value)
    for wrong in ({"gpu_memory_utilization": 0.0}, {"gpu_memory_utilization": 1.5}, {"tensor_parallel_size": 0}):
        with pytest.raises(UserError, match="gpu_memory_utilization must be in"):
            VLLM(**wrong)


def test_missing_package_raises_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        VLLM().check()
    assert str(error.value) == "sampler=vllm needs an extra: pip install -e '.[vllm]'"


def find_sources() -> Path | None:
    """Return the folder `vllm` of an unzipped wheel or of an installation, without importing it."""
    if folder := os.environ.get("VAR_VLLM"):
        return Path(folder) / "vllm"
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def read_names(tree: ast.Module, owner: str, method: str | None) -> set[str]:
    """Return the parameters of a method, or the fields, methods and attributes of a class."""
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    functions = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    if method is not None:
        return {argument.arg for argument in (*functions[method].args.args, *functions[method].args.kwonlyargs)}
    fields = {n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    attributes = {
        node.attr for node in ast.walk(found) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return fields | attributes | functions.keys()


def test_recorded_signatures_are_those_of_vllm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "vllm")
    folder = find_sources()
    if folder is None:
        pytest.skip("vLLM is not installed, and VAR_VLLM does not name the folder of an unzipped wheel")
    for (file, owner, method), names in SIGNATURES.items():
        assert names <= read_names(ast.parse((folder / file).read_text()), owner, method), (file, owner, method)
    (dtypes,) = re.findall(r"^ModelDType = Literal\[(.*)\]", (folder / "config" / "model.py").read_text(), re.M)
    assert set(DTYPES) <= set(ast.literal_eval(f"[{dtypes}]"))
    source = (folder / "sampling_params.py").read_text()
    assert "_MAX_TEMP = 1e-2" in source
    variables = (folder / "envs.py").read_text()
    assert "VLLM_WORKER_MULTIPROC_METHOD" in variables
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in variables
