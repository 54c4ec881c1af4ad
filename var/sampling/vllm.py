"""Sample with vLLM in this process."""

import gc
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

from var.data.chat import Chat
from var.sampling.base import Advance, Prompts, Sampling, Texts, decode, derive_server_seed, ignore_progress
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VLLM:
    """Sample with the reference's weights in vLLM, which stays loaded until `release`. Not tested on a GPU.

    Each prompt has a seed derived from its tokens, to which vLLM adds the number of the response. The text does not
    depend on the other prompts, except through rounding. It differs from the text that Transformers samples, so the
    annotation cache stores the two separately.

    Attributes:
        gpu_memory_utilization: Fraction of the memory of each GPU.
        tensor_parallel_size: GPUs that hold one model.
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
        """Return what the text depends on. Raises a UserError if the reference is an adapter."""
        if reference.pretrained.base is not None:
            raise UserError(
                f"sampler=vllm: {reference.pretrained.folder} is an adapter, which vLLM does not merge into its base. "
                "Use sampler=transformers."
            )
        return {"reference": reference.fingerprint, "sampler": "vllm"}

    def check(self) -> None:
        """Raise a UserError if vLLM is not installed or if there is more than one process."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError("sampler=vllm needs an extra: pip install -e '.[vllm]'")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "sampler=vllm runs in one process, with sampler.tensor_parallel_size GPUs. Run annotate.py without "
                "torchrun first, then train."
            )

    def __call__(
        self, reference: Any, prompts: Prompts, sampling: Sampling, advance: Advance = ignore_progress
    ) -> Texts:
        """Return K texts per prompt, in order."""
        from vllm import SamplingParams

        chat, encoded = reference.pretrained.chat, [reference.pretrained.chat.prompt(prompt) for prompt in prompts]
        params = [
            SamplingParams(
                n=sampling.responses, temperature=sampling.temperature, top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens, seed=derive_server_seed(sampling.seed, [ids]),
                stop_token_ids=[chat.end_token], ignore_eos=True, detokenize=False,
            )  # only the template's end token ends a response, as in `sample`
            for ids in encoded
        ]  # fmt: skip
        outputs = self._load(reference).generate([{"prompt_token_ids": ids} for ids in encoded], params, use_tqdm=False)
        advance(len(prompts))
        return [[read_response(chat, list(one.token_ids)) for one in output.outputs] for output in outputs]

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
        """Free the engine. The next call loads it again."""
        if self._engine:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self._engine.clear()
            gc.collect()
            cleanup_dist_env_and_memory()


def read_response(chat: Chat, ids: list[int]) -> tuple[str, bool]:
    """Return the text of sampled tokens before the end token, and whether there is an end token."""
    finished = chat.end_token in ids
    return decode(chat, ids[: ids.index(chat.end_token)] if finished else ids), finished
