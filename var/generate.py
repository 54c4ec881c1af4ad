"""Sampling: K responses a prompt from a policy, as text and as they stopped; the same seeds give the same text."""

import gc
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from var.data.chat import Chat
from var.data.rows import Message
from var.logprobs import attention
from var.problems import Problems, UserError
from var.remote import Client, Failure, grouped, written


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled. temperature 1 and top_p 1 draw from the policy itself, as the method assumes.

    responses: K a prompt. max_new_tokens: a response that reaches it is cut, which is counted. batch: sequences at
    once; it changes speed and, as the seed is drawn per batch, the text.
    """

    responses: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.responses < 1 or self.max_new_tokens < 1 or self.batch < self.responses:
            raise UserError("generate: responses and max_new_tokens are at least 1, batch at least responses")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError("generate: temperature is ≥ 0 (0 is greedy) and top_p in (0, 1]")
        if self.temperature == 0 and self.responses > 1:
            raise UserError("generate: at temperature 0 all responses of a prompt are one; set responses to 1")

    @property
    def identity(self) -> dict[str, Any]:
        return asdict(self)


def sample(
    model: Any,
    chat: Chat,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[tuple[str, bool]]]:
    """K (text, finished) for each prompt, in order, the text without the end token; it may be empty."""
    encoded = [chat.prompt(prompt) for prompt in prompts]
    return [
        [(_text(chat, ids), finished) for ids, finished in several]
        for several in sample_tokens(model, chat, encoded, sampling, advance)
    ]


@torch.inference_mode()
def sample_tokens(
    model: Any,
    chat: Chat,
    encoded: Sequence[list[int]],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[tuple[list[int], bool]]]:
    """K (tokens, finished) for each encoded prompt, in order, without the end token.

    Prompts are batched by length, so little is padded; padding stands on the left, by transformers' own masks.
    """
    tokenizer, k = chat.tokenizer, sampling.responses
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), encoded[i]))
    responses: list[list[tuple[list[int], bool]]] = [[] for _ in encoded]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else chat.end_token
    device = model.device
    step = sampling.batch // k
    training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    options: dict[str, Any] = {"do_sample": False} if sampling.temperature == 0 else {
        "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0,
    }  # fmt: skip
    with attention(model, "sdpa"), _own_settings(model), torch.random.fork_rng(devices):
        for begin in range(0, len(order), step):
            batch = order[begin : begin + step]
            width = max(len(encoded[i]) for i in batch)
            rows = [[pad] * (width - len(encoded[i])) + encoded[i] for i in batch]
            mask = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch]
            torch.manual_seed(_seed(sampling.seed, [encoded[i] for i in batch]))
            out = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                num_return_sequences=k,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=chat.end_token,
                pad_token_id=pad,
                **options,
            )[:, width:].tolist()
            for at, i in enumerate(batch):
                for row in out[at * k : (at + 1) * k]:
                    responses[i].append(_until_end(chat, row))
            advance(len(batch))
    model.train(training)
    return responses


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Within, the model's generation_config counts for nothing: a repetition penalty would draw from another policy."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _seed(seed: int, batch: list[Any]) -> int:
    """Of the batch's content: the same prompts draw the same text, wherever in the run they are sampled."""
    return int.from_bytes(hashlib.sha256(repr((seed, batch)).encode()).digest()[:6], "little")


class Sampler(Protocol):
    """Where the reference's responses come from. `reference` is var.annotate.fill.Reference."""

    def identity(self, reference: Any) -> dict[str, Any]:
        """What its text depends on, beside the sampling."""
        ...

    def check(self) -> None:
        """What the user can mend, before anything is sampled."""
        ...

    def __call__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[tuple[str, bool]]]:
        """K (text, finished) for each prompt, in order, the text without the end token; it may be empty."""
        ...

    def release(self) -> None:
        """Let go of what was loaded for it; the next call loads it again."""
        ...


@dataclass(frozen=True, kw_only=True)
class Transformers:
    """The reference as it scores, by transformers' generate."""

    def identity(self, reference: Any) -> dict[str, Any]:
        return {"reference": reference.identity}

    def check(self) -> None:
        pass

    def __call__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[tuple[str, bool]]]:
        with reference.precision():
            return sample(reference.policy.model, reference.pretrained.chat, prompts, sampling, advance)

    def release(self) -> None:
        pass  # the model is the reference's, which lets it go itself


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
        return [[(_text(chat, ids), finished) for ids, finished in several] for several in ended]

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


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server that has the reference, asked for one response a request, each with a seed of its own.

    The server renders the messages itself, and nobody checks that its weights and template are those of `model=`: the
    responses are scored by the local reference as if they were its own. request: further fields of the body, as
    {top_k: -1} where the server's defaults bend the draws; one that is null is left out. version: any text that tells
    one state of the server's model from another. A server without seeds gives other texts to the same seed, but what
    it gave once is kept.
    """

    client: Client
    request: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def identity(self, reference: Any) -> dict[str, Any]:
        return {**self.client.identity, "request": dict(self.request), "version": self.version}

    def check(self) -> None:
        self.client.check()

    def __call__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[tuple[str, bool]]]:
        k = sampling.responses
        bodies = [self._body(prompt, draw, sampling) for prompt in prompts for draw in range(k)]
        replies = self.client.ask(bodies, advance=grouped(advance, k), accept=_wordless, version=self.version)
        problems = Problems(f"{self.client.base_url} left responses out", shown=5)
        for at, reply in enumerate(replies):
            if isinstance(reply, Failure):
                problems.add(f"prompt {prompts[at // k][-1]['content'][:60]!r}", reply.reason)
        problems.check(
            f"{len(replies) - len(problems.found)} of {len(replies)} came and are kept: the same command asks only "
            "for the rest."
        )
        choices = [reply["choices"][0] for reply in replies if not isinstance(reply, Failure)]
        texts = [(choice["message"]["content"], choice.get("finish_reason") == "stop") for choice in choices]
        return [texts[at : at + k] for at in range(0, len(texts), k)]

    def _body(self, prompt: Sequence[Message], draw: int, sampling: Sampling) -> dict[str, Any]:
        turns = [(message["role"], message["content"]) for message in prompt]
        body = {
            "messages": list(prompt), "temperature": sampling.temperature, "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens, "seed": _short(_seed(sampling.seed, [turns, draw])),
        }  # fmt: skip
        return {key: value for key, value in {**body, **self.request}.items() if value is not None}

    def release(self) -> None:
        pass


def _wordless(reply: dict[str, Any]) -> str | None:
    return None if written(reply) is not None else f"no text in the reply {str(reply)[:120]}"


def _until_end(chat: Chat, ids: list[int]) -> tuple[list[int], bool]:
    """Sampled tokens up to the end token, and whether there is one."""
    finished = chat.end_token in ids
    return (ids[: ids.index(chat.end_token)] if finished else ids), finished


def _text(chat: Chat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids, skip_special_tokens=True))


def _short(seed: int) -> int:
    """Servers read a seed as a signed number of 32 bits."""
    return seed % 2**31
