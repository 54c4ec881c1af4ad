"""Sampling: K responses a prompt from a policy, as text and as they stopped; the same seeds give the same text."""

import gc
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from var.adapters import adapter_off
from var.data.chat import Chat
from var.data.rows import Message
from var.logprobs import attention
from var.problems import Problems, UserError
from var.remote import Client, Failure, grouped, wordless, written


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled. temperature 1 and top_p 1 draw from the policy itself, as the method assumes.

    responses: K a prompt. max_new_tokens: a response that reaches it is cut, which is counted. batch, batch_tokens:
    sequences, and their tokens with padding, at once at most, but for one prompt's K, which stay together; for speed
    and memory, the text depends on them by rounding alone.
    """

    responses: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch: int
    batch_tokens: int
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
        """What the text depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch", "batch_tokens")}

    def batches(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Neighbours among prompts of so many tokens, in ascending order, that are answered at once."""
        begin = 0
        for end, length in enumerate(lengths, 1):
            sequences = (end - begin) * self.responses
            if end - begin > 1 and (
                sequences > self.batch or sequences * (length + self.max_new_tokens) > self.batch_tokens
            ):
                yield slice(begin, end - 1)
                begin = end - 1
        if begin < len(lengths):
            yield slice(begin, len(lengths))


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

    Prompts are batched by length, so little is padded; each is read once for its K responses, and a response that has
    ended leaves the batch. A response has random numbers of its own, by seed, prompt and number among the K: what
    else is sampled beside it changes its text by rounding at most.
    """
    k = sampling.responses
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), encoded[i]))
    responses: list[list[tuple[list[int], bool]]] = [[] for _ in encoded]
    training = model.training
    model.eval()
    with attention(model, "sdpa"):
        for some in sampling.batches([len(encoded[i]) for i in order]):
            batch = order[some]
            sampled = _continued(model, [encoded[i] for i in batch], sampling, chat.end_token)
            for i, at in zip(batch, range(0, len(sampled), k), strict=True):
                responses[i] = sampled[at : at + k]
            advance(len(batch))
    model.train(training)
    return responses


def _continued(model: Any, prompts: list[list[int]], sampling: Sampling, end: int) -> list[tuple[list[int], bool]]:
    """K (tokens, finished) of each prompt, prompt by prompt, all at once. Padding stands on the left."""
    k, most, width, device = sampling.responses, sampling.max_new_tokens, max(map(len, prompts)), model.device
    numbers = [np.random.default_rng(_seed(sampling.seed, prompt)).random((k, most)) for prompt in prompts]
    draws = torch.from_numpy(np.concatenate(numbers)).to(device)  # [B·K, most], in double precision
    weight = model.get_output_embeddings().weight
    head = weight.to(torch.promote_types(weight.dtype, torch.float32))  # logits as the engine scores them
    cache = DynamicCache(config=model.config)

    def logits(tokens: Tensor, mask: Tensor) -> Tensor:
        """[rows, V] after the last of `tokens` [rows, n], the newest of those that `mask` counts."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
        with torch.autocast(device.type, enabled=False):
            return torch.nn.functional.linear(out.last_hidden_state[:, -1].to(head.dtype), head)

    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    padded = torch.tensor([[end] * (width - len(ids)) + ids for ids in prompts], device=device)
    scores = logits(padded, mask).repeat_interleave(k, 0)
    cache.batch_repeat_interleave(k)
    mask, live = mask.repeat_interleave(k, 0), torch.arange(len(prompts) * k, device=device)
    texts: list[list[int]] = [[] for _ in live]
    finished = [False] * len(live)
    for at in range(most):
        tokens = choose(scores, draws[live, at], sampling)
        going = tokens != end
        for row, token, goes in zip(live.tolist(), tokens.tolist(), going.tolist(), strict=True):
            texts[row] += [token] * goes
            finished[row] = not goes
        if not going.all():
            rows = going.nonzero()[:, 0]
            tokens, mask, live = tokens[rows], mask[rows], live[rows]
            cache.batch_select_indices(rows)
        if not len(live) or at + 1 == most:
            break
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        scores = logits(tokens[:, None], mask)
    return list(zip(texts, finished, strict=True))


def choose(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """[rows] tokens of logits [rows, V], each by one number in [0, 1): where the cumulative probability passes it.

    In double precision: in fp32 the sum over a large vocabulary would shift the odds of its last tokens.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    odds = (logits.double() / sampling.temperature).softmax(-1)
    tokens = None
    if sampling.top_p < 1:
        odds, tokens = odds.sort(dim=-1, descending=True)
        odds = odds.where(odds.cumsum(-1) - odds < sampling.top_p, 0.0)
    sums = odds.cumsum(-1)
    place = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return (place if tokens is None else tokens.gather(-1, place))[:, 0]


def _seed(seed: int, content: Any) -> int:
    """Of the content: the same prompt draws the same text, wherever in the run it is sampled."""
    return int.from_bytes(hashlib.sha256(repr((seed, content)).encode()).digest()[:6], "little")


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
    """The reference itself, as it scores."""

    def identity(self, reference: Any) -> dict[str, Any]:
        return {"reference": reference.identity, "version": 2}

    def check(self) -> None:
        pass

    def __call__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[tuple[str, bool]]]:
        model = reference.policy.model
        with reference.precision(), adapter_off(model):
            return sample(model, reference.pretrained.chat, prompts, sampling, advance)

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
        replies = self.client.ask(bodies, advance=grouped(advance, k), accept=wordless, version=self.version)
        problems = Problems(f"{self.client.base_url} left responses out", shown=5)
        for at, reply in enumerate(replies):
            if isinstance(reply, Failure):
                problems.add(f"prompt {prompts[at // k][-1]['content'][:60]!r}", reply.reason)
        problems.check(
            f"{len(replies) - len(problems.found)} of {len(replies)} came and are kept: the same command asks only "
            "for the rest."
        )
        came = [reply for reply in replies if not isinstance(reply, Failure)]
        texts = [(written(reply) or "", reply["choices"][0].get("finish_reason") == "stop") for reply in came]
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


def _until_end(chat: Chat, ids: list[int]) -> tuple[list[int], bool]:
    """Sampled tokens up to the end token, and whether there is one."""
    finished = chat.end_token in ids
    return (ids[: ids.index(chat.end_token)] if finished else ids), finished


def _text(chat: Chat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids, skip_special_tokens=True))


def _short(seed: int) -> int:
    """Servers read a seed as a signed number of 32 bits."""
    return seed % 2**31
