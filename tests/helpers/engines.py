"""A fake of vLLM's engine, which takes the arguments of the real one (tests/sampling/test_vllm.py compares them)."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.runs import ROOT

# Arguments that we pass and attributes that we read, by file, class and method. LLM passes others on to EngineArgs.
SIGNATURES = {
    ("entrypoints/llm.py", "LLM", "__init__"): {
        "model", "dtype", "trust_remote_code", "gpu_memory_utilization", "tensor_parallel_size",
    },
    ("engine/arg_utils.py", "EngineArgs", None): {"generation_config", "max_model_len"},
    ("entrypoints/llm.py", "LLM", "generate"): {"prompts", "sampling_params", "use_tqdm"},
    ("sampling_params.py", "SamplingParams", None): {
        "n", "temperature", "top_p", "max_tokens", "seed", "stop_token_ids", "ignore_eos", "detokenize",
    },
    ("inputs/llm.py", "TokensPrompt", None): {"prompt_token_ids"},
    ("outputs.py", "RequestOutput", None): {"outputs"},
    ("outputs.py", "CompletionOutput", None): {"token_ids"},
    ("entrypoints/llm.py", "LLM", None): {"llm_engine"},
    ("v1/engine/llm_engine.py", "LLMEngine", None): {"engine_core"},
    ("v1/engine/core_client.py", "EngineCoreClient", None): {"shutdown"},
}  # fmt: skip
LLM_ARGUMENTS = (
    SIGNATURES["entrypoints/llm.py", "LLM", "__init__"] | SIGNATURES["engine/arg_utils.py", "EngineArgs", None]
)
SAMPLING_ARGUMENTS = SIGNATURES["sampling_params.py", "SamplingParams", None]


class Engine:
    """A fake of vllm.LLM: `generate` takes token ids and SamplingParams per prompt, and returns n outputs per prompt.

    The first response of a prompt is truncated; response k > 0 has k tokens and the end token.
    """

    loaded: list[dict[str, Any]] = []  # noqa: RUF012
    asked: list[Any] = []  # noqa: RUF012
    stopped: list[str] = []  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        assert settings.keys() <= LLM_ARGUMENTS
        self.loaded.append(settings)
        self.environment = dict(os.environ)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.stopped.append("stopped")))

    def generate(self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
        assert use_tqdm is False
        assert len(prompts) == len(sampling_params)
        self.asked.extend(zip(prompts, sampling_params, strict=True))
        return [
            SimpleNamespace(outputs=[self._one(p, s, k) for k in range(s.n)]) for p, s in self.asked[-len(prompts) :]
        ]

    @staticmethod
    def _one(prompt: Any, params: Any, k: int) -> Any:
        ids = [97] * k + params.stop_token_ids if k else [98] * params.max_tokens
        return SimpleNamespace(token_ids=tuple(ids))


class SeededEngine(Engine):
    """Answers with a letter by the seed of the request, and the end token. It is killed in a call, if VAR_KILL says so.

    VAR_KILL: the number of the call, and a file that is written then, so that it happens once.
    """

    def generate(self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
        number, _, mark = os.environ.get("VAR_KILL", "").partition(" ")
        self.calls = getattr(self, "calls", 0) + 1
        if number and self.calls == int(number) and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), 9)
        return super().generate(prompts, sampling_params, use_tqdm)

    @staticmethod
    def _one(prompt: Any, params: Any, k: int) -> Any:
        return SimpleNamespace(token_ids=(48 + params.seed % 10, *params.stop_token_ids))


def sampling_params(**options: Any) -> SimpleNamespace:
    """Return what vllm.SamplingParams holds."""
    assert options.keys() <= SAMPLING_ARGUMENTS
    return SimpleNamespace(**options)


def install_engine(folder: Path) -> str:
    """Write a package `vllm` with SeededEngine to a folder. Return PYTHONPATH for processes that import it."""
    (folder / "vllm").mkdir(parents=True)
    names = "SeededEngine as LLM, sampling_params as SamplingParams"
    (folder / "vllm" / "__init__.py").write_text(f"from tests.helpers.engines import {names}\n")
    return f"{folder}{os.pathsep}{ROOT}"
