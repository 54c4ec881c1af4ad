"""Sample with vLLM, whose engine runs in a process of its own."""

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from var.data.chat import Chat
from var.sampling.base import Advance, Prompts, Sample, Samples, Sampling, derive_server_seed, ignore_progress
from var.utils.errors import Problems, UserError
from var.utils.extras import name_install

DTYPES = ("float32", "float16", "bfloat16")

# Set by launchers. With them, torch would make an engine's own group wait for the processes of this job.
LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
            "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VLLM:
    """Sample with the reference's weights in vLLM, which stays loaded until `release`. Not tested on a GPU.

    Each process of a job has an engine on its own GPU. A process that is alone can spread its engine over several GPUs.

    Each prompt has a seed derived from its tokens, to which vLLM adds the number of the response. The text does not
    depend on the other prompts, except through rounding. It differs from the text that Transformers samples, so the
    annotation cache stores the two separately.

    Attributes:
        gpu_memory_utilization: Fraction of the memory of each GPU.
        tensor_parallel_size: GPUs that hold one model. Above 1, there can be only one process.
        max_model_len: Tokens of the longest prompt with its response. None is the model's limit, whose key-value cache
            may not fit into memory.
    """

    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    _engine: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1 or self.tensor_parallel_size < 1:
            raise UserError("sampler: gpu_memory_utilization must be in (0, 1] and tensor_parallel_size at least 1.")

    def fingerprint(self, reference: Any) -> dict[str, Any]:
        """Return what the text depends on. Raises a UserError if vLLM cannot sample from these weights."""
        pretrained, advice = reference.pretrained, "Use sampler=transformers."
        if pretrained.base is not None:
            raise UserError(
                f"sampler=vllm: {pretrained.folder} is an adapter, which vLLM does not merge into its base. {advice}"
            )
        if pretrained.quantization:
            raise UserError(
                f"sampler=vllm: model.quantization={pretrained.quantization}, but vLLM would sample from the weights "
                f"without quantization. {advice}"
            )
        if self._dtype(reference) not in DTYPES:
            raise UserError(f"sampler=vllm: vLLM does not compute in model.dtype={pretrained.dtype}. {advice}")
        return {"reference": reference.fingerprint, "sampler": "vllm", "version": 2}

    def check(self) -> None:
        """Raise a UserError if vLLM is not installed, or cannot have the processes and GPUs that it would need."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError(f"sampler=vllm needs an extra: {name_install('vllm')}")
        problems = Problems("sampler=vllm cannot run here")
        if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1 and self.tensor_parallel_size > 1:
            problems.add(
                "sampler.tensor_parallel_size",
                f"{self.tensor_parallel_size}, but each of {world} processes has one GPU. Set it to 1, or start one "
                "process: eval.py with devices=1, or annotate.py without torchrun before training.",
            )
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            problems.add("VLLM_ENABLE_V1_MULTIPROCESSING", "0, but the engine needs its own process. Unset it.")
        problems.check()

    def __call__(
        self, reference: Any, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress
    ) -> Samples:
        """Return K samples per prompt, in order."""
        from vllm import SamplingParams

        chat, encoded = reference.pretrained.chat, [reference.pretrained.chat.prompt(prompt) for prompt in prompts]
        self._check_request(reference, max(map(len, encoded)) + sampling.max_new_tokens, sampling.temperature)
        params = [
            SamplingParams(
                n=sampling.responses, temperature=sampling.temperature, top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens, seed=derive_server_seed(sampling.seed, [ids]),
                stop_token_ids=sorted(chat.end_tokens), ignore_eos=True, detokenize=False,
            )  # the same end tokens as in `sample`
            for ids in encoded
        ]  # fmt: skip
        outputs = self._load(reference).generate([{"prompt_token_ids": ids} for ids in encoded], params, use_tqdm=False)
        advance(len(prompts))
        return [[read_response(chat, list(one.token_ids)) for one in output.outputs] for output in outputs]

    def _check_request(self, reference: Any, longest: int, temperature: float) -> None:
        """Raise a UserError for what vLLM rejects or changes: it raises low temperatures and truncates responses."""
        problems = Problems("sampler=vllm cannot sample this")
        limit = self.max_model_len or getattr(reference.pretrained.config, "max_position_embeddings", None)
        if limit and longest > limit:
            key = "sampler.max_model_len" if self.max_model_len else "the model's max_position_embeddings"
            problems.add(
                key, f"{limit}, but the longest prompt with its response has {longest} tokens. Set fewer max_new_tokens"
                f"{' or a larger limit' if self.max_model_len else ''}.",
            )  # fmt: skip
        if 0 < temperature < 0.01 or temperature > 2:
            problems.add("temperature", f"vLLM takes 0 and 0.01 to 2, got {temperature}")
        problems.check()

    def _dtype(self, reference: Any) -> str:
        return str(reference.autocast).removeprefix("torch.") if reference.autocast else reference.pretrained.dtype

    def _load(self, reference: Any) -> Any:
        from vllm import LLM

        pretrained, dtype = reference.pretrained, self._dtype(reference)
        key = f"{pretrained.folder} {dtype}"
        if key not in self._engine:
            self.release()
            gc.collect()
            torch.cuda.empty_cache()  # another process can use only what this one has returned
            with engine_environment():
                self._engine[key] = LLM(
                    model=str(pretrained.folder), dtype=dtype, generation_config="vllm",
                    trust_remote_code=pretrained.trust_remote_code, max_model_len=self.max_model_len,
                    gpu_memory_utilization=self.gpu_memory_utilization, tensor_parallel_size=self.tensor_parallel_size,
                )  # fmt: skip
        return self._engine[key]

    def release(self) -> None:
        """End the engine's process. The next call loads it again.

        vLLM's own `cleanup_dist_env_and_memory` would also end the process group of this job.
        """
        while self._engine:
            _, engine = self._engine.popitem()
            engine.llm_engine.engine_core.shutdown()


@contextmanager
def engine_environment() -> Iterator[None]:
    """Hide the launcher's variables from an engine that starts, and show it only this process's GPU if there are more.

    An engine takes the first GPUs that it sees. Its process keeps the environment in which it was started.
    """
    changes: dict[str, str | None] = {}
    if "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ:
        changes["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a forked process cannot use CUDA after this one has
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available():
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = torch.cuda.current_device()
        changes["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    changes |= {name: None for name in os.environ if name in LAUNCHER or name.startswith("TORCHELASTIC_")}
    before = {name: os.environ.get(name) for name in changes}
    _set_variables(changes)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def read_response(chat: Chat, ids: list[int]) -> Sample:
    """Return the sample of an engine's tokens, up to the first end token."""
    length = next((n for n, token in enumerate(ids, 1) if token in chat.end_tokens), len(ids))
    return Sample.of(chat, ids[:length])
