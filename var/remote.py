"""HTTP endpoints that are asked many things at once: an LLM judge, a reward model, a policy behind a server."""

import asyncio
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from var.problems import UserError

CHARACTERS = 4  # of a token, about; for estimates alone


@dataclass(frozen=True)
class Failure:
    """What an endpoint did not give, after all retries."""

    reason: str


@dataclass
class Usage:
    """What a client asked of its endpoint; `cached` are replies that were on disk. cost: in the unit of its prices."""

    asked: int = 0
    cached: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Client:
    """An OpenAI-compatible endpoint, or any that takes and gives JSON.

    api_key_env: the environment variable that holds the key; None: the server wants none. timeout: seconds a request.
    retries: of a request that timed out, was refused (429), failed (5xx, connection) or came back malformed, with the
    openai package's back-off. price_in, price_out: of a million tokens. max_cost: stop above it. Replies are kept
    in <cache>/replies.sqlite as they come, so that a killed run loses none and nothing is asked twice.
    """

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 8
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    cache: str = "~/.cache/var-align"
    usage: Usage = field(default_factory=Usage, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise UserError("an endpoint's concurrency is ≥ 1, its timeout > 0 and its retries ≥ 0")

    @property
    def identity(self) -> dict[str, Any]:
        """What replies depend on; the weights behind a server cannot be hashed."""
        return {"base_url": self.base_url, "model": self.model}

    def check(self) -> None:
        """A missing package or key is told before anything is asked."""
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise UserError("an endpoint needs an extra: pip install -e '.[endpoint]'") from error
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise UserError(
                f"the endpoint {self.base_url} wants a key and {self.api_key_env} is not set in the environment; set "
                "it, name another variable by api_key_env, or api_key_env=null where the server wants none"
            )

    def ask(
        self,
        bodies: Sequence[Mapping[str, Any]],
        path: str = "/chat/completions",
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[dict[str, Any] | Failure]:
        """The reply to each body, in order; equal bodies are asked once, and those answered before not at all.

        Failures are not kept: the same call asks only for them again. UserError: a wrong key; max_cost is reached.
        """
        self.check()
        keys = [self._key(path, body) for body in bodies]
        with self._replies() as replies:
            found: dict[str, dict[str, Any] | Failure] = {}
            for key in dict.fromkeys(keys):
                if (row := replies.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()) is not None:
                    found[key] = json.loads(row[0])
            known = sum(key in found for key in keys)
            self.usage.cached += known
            advance(known)
            wanted = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
            times = {key: keys.count(key) for key in wanted}

            def arrived(key: str, reply: dict[str, Any] | Failure) -> None:
                found[key] = reply
                if isinstance(reply, Failure):
                    self.usage.failed += 1
                else:
                    self._count(reply)
                    with replies:
                        replies.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(reply)))
                advance(times[key])

            if wanted:
                _finish(self._ask(wanted, path, arrived))
        return [found[key] for key in keys]

    def estimate(self, bodies: Sequence[Mapping[str, Any]], tokens_out: int, path: str = "/chat/completions") -> str:
        """What asking will take at most, for the reader to see before the first call."""
        wanted = {self._key(path, body): body for body in bodies}
        with self._replies() as replies:
            fresh = [
                body
                for key, body in wanted.items()
                if replies.execute("SELECT 1 FROM replies WHERE key = ?", (key,)).fetchone() is None
            ]
        into = sum(len(json.dumps(body, ensure_ascii=False)) for body in fresh) // CHARACTERS
        out = tokens_out * len(fresh)
        cost = (into * self.price_in + out * self.price_out) / 1e6
        return (
            f"{len(fresh)} calls of {self.model} ({len(wanted) - len(fresh)} answered before), about {into:,} tokens "
            f"in and at most {out:,} out, {cost:.2f} at most"
        )

    async def _ask(self, wanted: Mapping[str, Mapping[str, Any]], path: str, arrived: Callable[..., None]) -> None:
        from openai import AsyncOpenAI

        key = os.environ[self.api_key_env] if self.api_key_env is not None else "none"
        places = asyncio.Semaphore(self.concurrency)
        async with AsyncOpenAI(
            base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.retries
        ) as client:
            stopped = asyncio.Event()

            async def one(key: str, body: Mapping[str, Any]) -> None:
                async with places:
                    if stopped.is_set():
                        return
                    if self.max_cost is not None and self.usage.cost >= self.max_cost:
                        stopped.set()
                        raise UserError(
                            f"{self.base_url} has cost {self.usage.cost:.2f} of max_cost={self.max_cost}, with "
                            f"{self.usage.asked} calls; what it answered is kept. Raise max_cost to go on"
                        )
                    arrived(key, await self._one(client, path, {"model": self.model, **body}, stopped))

            tasks = [asyncio.ensure_future(one(key, body)) for key, body in wanted.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(
        self, client: Any, path: str, body: Mapping[str, Any], stopped: asyncio.Event
    ) -> dict[str, Any] | Failure:
        import openai

        reason = ""
        for _ in range(self.retries + 1):  # of malformed replies; the client itself retries what failed
            self.usage.asked += 1
            try:
                reply = await client.post(path, body=body, cast_to=object)
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                stopped.set()
                raise UserError(f"{self.base_url} refuses the key in {self.api_key_env}: {str(error)[:300]}") from error
            except openai.APIStatusError as error:
                return Failure(f"HTTP {error.status_code}: {str(error)[:300]}")
            except openai.APIConnectionError as error:
                return Failure(f"{type(error).__name__}: {error.__cause__ or error}")
            except (ValueError, openai.OpenAIError) as error:
                reason = f"malformed reply: {error}"
                continue
            if isinstance(reply, dict):
                return reply
            reason = f"malformed reply: {str(reply)[:100]!r}"
        return Failure(reason)

    def _count(self, reply: Mapping[str, Any]) -> None:
        told = reply.get("usage")
        told = told if isinstance(told, Mapping) else {}
        into, out = int(told.get("prompt_tokens") or 0), int(told.get("completion_tokens") or 0)
        self.usage.tokens_in += into
        self.usage.tokens_out += out
        self.usage.cost += (into * self.price_in + out * self.price_out) / 1e6

    def _key(self, path: str, body: Mapping[str, Any]) -> str:
        text = json.dumps([self.base_url, path, {"model": self.model, **body}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @contextmanager
    def _replies(self) -> Iterator[sqlite3.Connection]:
        folder = Path(self.cache).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(folder / "replies.sqlite", timeout=60, check_same_thread=False)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            yield connection


def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, inside a notebook's running loop too."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
