"""An HTTP endpoint that is asked many things at once: retries, bounded concurrency, costs, replies kept on disk."""

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from var.utils.errors import UserError
from var.utils.files import encodable

CHARACTERS = 4  # of a token, roughly, in English


DEAD = 32  # requests in a row that got no answer in all their tries: the endpoint is down


Reply = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """What the endpoint did not give, after all retries."""

    reason: str


@dataclass
class Usage:
    """What one Client asked so far. asked: bodies sent, the failed ones too; cached: bodies that needed no request;
    retried: further tries; cost: in the unit of the prices."""

    asked: int = 0
    cached: int = 0
    failed: int = 0
    retried: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Client:
    """An OpenAI-compatible endpoint, or any that takes a JSON object by POST and replies with one.

    api_key_env: the environment variable that holds the key; None: the server wants none. concurrency: requests at
    once. timeout: seconds that a request waits for its reply. retries: of a request that timed out, was refused (429)
    or failed (5xx, connection, a reply that is no JSON object), after the server's Retry-After or the openai client's
    own back-off. price_in, price_out: of a million tokens. max_cost: of one process; at it nothing more is asked, and
    what is under way still comes. Replies are kept in <cache>/replies.sqlite, the first one to each body, also at
    temperature > 0.
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
    usage: Usage = field(default_factory=Usage, compare=False, init=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"client.base_url={self.base_url}: an address starts with http:// or https://")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise UserError("client: concurrency is at least 1, retries at least 0 and timeout more than 0 seconds")
        if min(self.price_in, self.price_out, self.max_cost or 0.0) < 0:
            raise UserError("client: price_in, price_out and max_cost are at least 0")
        if self.max_cost is not None and self.price_in == self.price_out == 0:
            raise UserError("client.max_cost is kept by the prices: set client.price_in and client.price_out too")

    @property
    def identity(self) -> dict[str, Any]:
        """What replies depend on, as far as it can be known from outside: no server says what its weights are."""
        return {"base_url": self.base_url.rstrip("/"), "model": self.model}

    def check(self) -> None:
        """A missing package or key is told before anything is asked."""
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise UserError("an endpoint is asked by an extra: pip install -e '.[endpoint]'") from error
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise UserError(
                f"{self.base_url} wants a key, and {self.api_key_env} is not set in the environment. Set it, or "
                "api_key_env=null of this client (judge.client.api_key_env, reward.client.api_key_env, …) where the "
                "server wants none"
            )

    def ask(
        self,
        bodies: Sequence[Mapping[str, Any]],
        path: str = "/chat/completions",
        advance: Callable[[int], None] = lambda done: None,
        accept: Callable[[Reply], str | None] = lambda reply: None,
        version: str = "",
    ) -> list[Reply | Failure]:
        """The reply to each body, in order; {"model": model, **body} is sent to base_url + path.

        What was answered before is not asked again, and equal bodies are asked once. Each reply is on disk as soon as
        it came, so a killed run loses none; failures are not kept. accept: why a reply is of no use, None where it
        is; such a reply is a failure at once. advance: called with the number of bodies that got a reply or failed.
        version: of what is behind the address; under another one everything is asked anew.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._ask(bodies, path, advance, accept, version)
        with ThreadPoolExecutor(1) as pool:  # a notebook's loop is running, and a thread has one
            return pool.submit(self._ask, bodies, path, advance, accept, version).result()

    def estimate(self, bodies: Sequence[Mapping[str, Any]], tokens_out: int, path: str = "/chat/completions") -> str:
        """What asking will take: 132 calls (40 answered before), about 80,000 tokens in and 66,000 out, at most 0.42.

        tokens_out: the most that one reply can have. The calls are all, tokens and cost those of what is left to ask.
        """
        whole = {self._key(body, path): body for body in bodies}
        with self._kept() as kept:
            rest = [body for key, body in whole.items() if _read(kept, key) is None]
        tokens_in = sum(len(json.dumps(body, ensure_ascii=False)) for body in rest) // CHARACTERS
        longest = tokens_out * len(rest)
        before = f" ({len(whole) - len(rest)} answered before)" if len(rest) < len(whole) else ""
        cost = f", at most {self._cost(tokens_in, longest):,.2f}" if self.price_in or self.price_out else ""
        return f"{len(whole)} calls{before}, about {tokens_in:,} tokens in and {longest:,} out{cost}"

    def _ask(
        self,
        bodies: Sequence[Mapping[str, Any]],
        path: str,
        advance: Callable[[int], None],
        accept: Callable[[Reply], str | None],
        version: str,
    ) -> list[Reply | Failure]:
        keys = [self._key(body, path, version) for body in bodies]
        times = Counter(keys)
        replies: dict[bytes, Reply | Failure] = {}
        with self._kept() as kept:
            for key in times:
                if (text := _read(kept, key)) is not None:
                    replies[key] = json.loads(text)
            missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in replies}
            self.usage.cached += len(bodies) - len(missing)
            if known := sum(times[key] for key in replies):
                advance(known)

            def take(key: bytes, reply: Reply | Failure) -> None:
                replies[key] = reply
                if not isinstance(reply, Failure):
                    if (reason := accept(reply)) is None:
                        kept.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(reply)))
                    else:
                        replies[key] = Failure(reason)
                    self._count(reply)
                self.usage.failed += isinstance(replies[key], Failure)
                advance(times[key])

            if missing:
                self.check()
                asyncio.run(self._send(missing, self.base_url.rstrip("/") + path, take))
        return [replies[key] for key in keys]

    async def _send(
        self, missing: Mapping[bytes, Mapping[str, Any]], url: str, take: Callable[[bytes, Reply | Failure], None]
    ) -> None:
        import httpx2
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        for name in ("openai", "httpx2"):  # or the log has a line for each request
            logging.getLogger(name).setLevel(logging.WARNING)
        todo = iter(missing.items())
        done = silent = 0

        async def count(request: httpx2.Request) -> None:
            self.usage.retried += request.headers.get("x-stainless-retry-count", "0") != "0"

        async def whole(response: httpx2.Response) -> None:
            """A reply that is no JSON object is a broken connection to the openai client, which then tries again."""
            if response.is_success:
                await response.aread()
                if (reason := _broken(response.content)) is not None:
                    raise httpx2.DecodingError(reason, request=response.request)

        async def work(client: AsyncOpenAI) -> None:
            nonlocal done, silent
            while self._affordable and (item := next(todo, None)) is not None:
                key, body = item
                self.usage.asked += 1
                reply, heard = await self._one(client, url, {"model": self.model, **body})
                done += 1
                take(key, reply)
                silent = 0 if heard else silent + 1
                if silent == DEAD and isinstance(reply, Failure):
                    raise UserError(
                        f"{url} does not answer: {silent} requests in a row failed in all their {self.retries + 1} "
                        f"tries, the last with: {reply.reason}. {len(missing) - done} of {len(missing)} are not asked; "
                        "what was answered is kept, and the same command asks only the rest"
                    )

        async with AsyncOpenAI(
            base_url=self.base_url, api_key=os.environ[self.api_key_env] if self.api_key_env else "none",
            timeout=self.timeout, max_retries=self.retries,
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [count], "response": [whole]}),
        ) as client:  # fmt: skip
            await asyncio.gather(*(work(client) for _ in range(min(self.concurrency, len(missing)))))
        if done < len(missing):
            raise UserError(
                f"client.max_cost={self.max_cost:g} is reached: {self.usage.cost:.2f}, with {len(missing) - done} of "
                f"{len(missing)} calls to {url} left. What was answered is kept: raise client.max_cost, and the same "
                "command asks only the rest"
            )

    async def _one(self, client: Any, url: str, body: Mapping[str, Any]) -> tuple[Reply | Failure, bool]:
        """The reply, and whether the server said anything that was meant for this request."""
        import httpx2
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            response = await client.post(url, cast_to=httpx2.Response, body=body)
        except APITimeoutError:
            return Failure(f"no reply in {self.timeout:g} seconds"), False
        except APIConnectionError as error:
            return Failure(str(error.__cause__) or type(error.__cause__).__name__), False
        except APIStatusError as error:
            reason = f"{error.status_code}: {_message(error)}"
            if error.status_code == 401:
                raise UserError(f"{url} refuses the key in {self.api_key_env or 'no variable'}: {reason}") from None
            if error.status_code == 404:  # no body will fare better
                raise UserError(
                    f"{url} is not there, or has no model {self.model}: {reason}. Look at client.base_url and "
                    "client.model"
                ) from None
            return Failure(reason), 400 <= error.status_code < 500 and error.status_code != 429
        return response.json(), True

    @property
    def _affordable(self) -> bool:
        return self.max_cost is None or self.usage.cost < self.max_cost

    def _count(self, reply: Reply) -> None:
        """Tokens as the server counts them; a server that counts none costs none."""
        into, out = _tokens(reply, "prompt_tokens"), _tokens(reply, "completion_tokens")
        self.usage.tokens_in += into
        self.usage.tokens_out += out
        self.usage.cost += self._cost(into, out)
        if self.max_cost is not None and into + out == 0:
            raise UserError(f"{self.base_url} does not say how many tokens it used, so client.max_cost cannot be kept")

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def _key(self, body: Mapping[str, Any], path: str, version: str = "") -> bytes:
        content = [self.base_url.rstrip("/"), path, {"model": self.model, **body}, version]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()

    @contextmanager
    def _kept(self) -> Iterator[sqlite3.Connection]:
        """The replies on disk, which several processes may read and write at once."""
        file = Path(self.cache).expanduser() / "replies.sqlite"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(file, timeout=60.0, isolation_level=None)) as kept:  # each reply by itself
                kept.execute("PRAGMA journal_mode=WAL")
                kept.execute("PRAGMA synchronous=NORMAL")
                kept.execute("CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT) WITHOUT ROWID")
                yield kept
        except (sqlite3.Error, FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"replies cannot be kept in {file}: {error}; give another folder: client.cache=…"
            ) from error


def written(reply: Mapping[str, Any]) -> str | None:
    """The text of a chat completion; None where there is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return None
    return encodable(content) if isinstance(content, str) else None


def grouped(advance: Callable[[int], None], size: int) -> Callable[[int], None]:
    """`advance` for items that take `size` bodies each: it is told of items that are done, not of bodies."""
    seen = 0

    def counted(done: int) -> None:
        nonlocal seen
        before, seen = seen, seen + done
        if items := seen // size - before // size:
            advance(items)

    return counted


def _read(kept: sqlite3.Connection, key: bytes) -> str | None:
    row = kept.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def wordless(reply: Mapping[str, Any]) -> str | None:
    """Why a reply without words is not worth keeping, for `ask`'s accept; None of one with them."""
    return None if written(reply) is not None else f"no text in the reply {str(reply)[:120]}"


def _tokens(reply: Mapping[str, Any], name: str) -> int:
    """A count of the reply's `usage`; some servers write it as text, or none."""
    try:
        return int(reply["usage"][name])
    except (LookupError, TypeError, ValueError, OverflowError):
        return 0


def _broken(content: bytes) -> str | None:
    """Why the body of a successful answer is no reply; some gateways send their errors in one."""
    try:
        reply = json.loads(content)
    except ValueError:
        return f"the reply is no JSON: {content[:60].decode(errors='replace')!r}"
    if not isinstance(reply, dict):
        return f"the reply is no JSON object: {str(reply)[:60]!r}"
    error = reply.get("error")
    return str(error.get("message", error) if isinstance(error, dict) else error) if error else None


def _message(error: Any) -> str:
    """The server's own words: OpenAI's form, FastAPI's, or the text as it is."""
    body = error.body
    told = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
    return str(told or body or error.message)[:300]
