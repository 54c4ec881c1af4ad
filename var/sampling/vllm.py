"""Sample with vLLM in this process."""

import gc
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from var.data.chat import Chat
from var.data.rows import Message
from var.sampling.base import Sampling, _seed, _short, decode
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VLLM:
    """The reference's weights in vLLM, in this process; tested beside a stand-in for vLLM alone, for want of a GPU.

    The engine stays loaded from call to call, until `release`. Each prompt has a seed of its own tokens, to which vLLM
    adds the response's number: the same text whatever else is sampled, but for what batching does to the rounding.
    It is not the text that Transformers draws, so the store keeps them apart. gpu_memory_utilization: share of each
    GPU. max_model_len: tokens of the longest prompt with its response; None: the model's own, whose cache may not fit.
    """

    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    _engine: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1 or self.tensor_parallel_size < 1:
            raise UserError("sampler: gpu_memory_utilization is in (0, 1] and tensor_parallel_size at least 1")

    def identity(self, reference: Any) -> dict[str, Any]:
        if reference.pretrained.base is not None:
            raise UserError(
                f"sampler=vllm loads whole models, and {reference.pretrained.folder} is an adapter; "
                "sampler=transformers merges it into its base"
            )
        return {"reference": reference.identity, "sampler": "vllm"}

    def check(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("sampler=vllm needs an extra: pip install -e '.[vllm]'")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "sampler=vllm runs in one process, with sampler.tensor_parallel_size GPUs. Fill the store by "
                "annotate.py without torchrun, then train"
            )

    def __call__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[tuple[str, bool]]]:
        from vllm import SamplingParams

        chat, encoded = reference.pretrained.chat, [reference.pretrained.chat.prompt(prompt) for prompt in prompts]
        drawn = [
            SamplingParams(
                n=sampling.responses, temperature=sampling.temperature, top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens, seed=_short(_seed(sampling.seed, [ids])),
                stop_token_ids=[chat.end_token], ignore_eos=True, detokenize=False,
            )  # nothing but the template's end token ends a response, as in `sample`
            for ids in encoded
        ]  # fmt: skip
        outputs = self._load(reference).generate([{"prompt_token_ids": ids} for ids in encoded], drawn, use_tqdm=False)
        advance(len(prompts))
        ended = [[_until_end(chat, list(one.token_ids)) for one in output.outputs] for output in outputs]
        return [[(decode(chat, ids), finished) for ids, finished in several] for several in ended]

    def _load(self, reference: Any) -> Any:
        from vllm import LLM

        pretrained = reference.pretrained
        dtype = str(reference.autocast).removeprefix("torch.") if reference.autocast else pretrained.dtype
        key = f"{pretrained.folder} {dtype}"
        if key not in self._engine:
            self.release()
            self._engine[key] = LLM(
                model=str(pretrained.folder), dtype=dtype, generation_config="vllm",
                trust_remote_code=pretrained.trust_remote_code, max_model_len=self.max_model_len,
                gpu_memory_utilization=self.gpu_memory_utilization, tensor_parallel_size=self.tensor_parallel_size,
            )  # fmt: skip
        return self._engine[key]

    def release(self) -> None:
        if self._engine:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self._engine.clear()
            gc.collect()
            cleanup_dist_env_and_memory()


def _until_end(chat: Chat, ids: list[int]) -> tuple[list[int], bool]:
    """Sampled tokens up to the end token, and whether there is one."""
    finished = chat.end_token in ids
    return (ids[: ids.index(chat.end_token)] if finished else ids), finished
