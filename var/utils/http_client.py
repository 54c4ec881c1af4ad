"""Send many requests to an HTTP endpoint: concurrency, retries, costs, and a cache of replies on disk."""

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from var.utils.errors import UserError
from var.utils.extras import import_extra
from var.utils.files import replace_surrogates

CHARACTERS_PER_TOKEN = 4  # roughly, in English
MAX_UNANSWERED = 32  # consecutive requests without an answer, after which the endpoint is considered down

Reply = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A request that failed after all retries."""

    reason: str  # the message of the last error


@dataclass
class Usage:
    """Totals of one `Client`."""

    asked: int = 0  # requests sent, including failed ones, without retries
    cached: int = 0  # requests that were answered before, or equal another request of the same call
    failed: int = 0  # requests without a usable reply
    retried: int = 0
    tokens_in: int = 0  # prompt tokens, as counted by the server
    tokens_out: int = 0  # completion tokens, as counted by the server
    cost: float = 0.0  # in the currency of the client's prices


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client of an OpenAI-compatible endpoint, or of any server that answers a JSON object with a JSON object.

    A request is retried after a timeout, a rate limit (429), a server error (5xx), a lost connection, or a reply that
    is not a JSON object. The wait is the server's Retry-After, or the openai client's exponential back-off.
    """

    base_url: str  # address of the server, to which the path of a request is appended
    model: str  # sent with every request
    api_key_env: str | None = "OPENAI_API_KEY"  # the environment variable with the key; None: no key is needed
    concurrency: int = 8  # maximum number of pending requests
    timeout: float = 120.0  # seconds to wait for a reply
    retries: int = 8  # maximum per request
    price_in: float = 0.0  # per million prompt tokens
    price_out: float = 0.0  # per million completion tokens
    max_cost: float | None = None  # after this cost, this client sends no further request; pending ones are awaited
    cache: str = "~/.cache/var-align"  # folder of replies.sqlite: the first reply to each request, at any temperature
    usage: Usage = field(default_factory=Usage, compare=False, init=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"client.base_url={self.base_url}: expected an address with http:// or https://")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise UserError(
                "client: concurrency must be at least 1, retries at least 0 and timeout more than 0 seconds"
            )
        if min(self.price_in, self.price_out, self.max_cost or 0.0) < 0:
            raise UserError("client: price_in, price_out and max_cost must be at least 0")
        if self.max_cost is not None and self.price_in == self.price_out == 0:
            raise UserError("client.max_cost needs prices. Set client.price_in and client.price_out")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What replies depend on as far as a client can know. No server reports a hash of its weights."""
        return {"base_url": self.base_url.rstrip("/"), "model": self.model}

    def check(self) -> None:
        """Raise a `UserError` if the openai package or the key is missing."""
        import_extra("openai", "endpoint", "an endpoint")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise UserError(
                f"{self.base_url} needs a key, but {self.api_key_env} is not set in the environment. Set it, or if the "
                "server needs no key, set api_key_env=null of this client (judge.client.api_key_env, "
                "reward.client.api_key_env, …)"
            )

    def ask(
        self,
        bodies: Sequence[Mapping[str, Any]],
        path: str = "/chat/completions",
        advance: Callable[[int], None] = lambda done: None,
        find_fault: Callable[[Reply], str | None] = lambda reply: None,
        version: str = "",
    ) -> list[Reply | Failure]:
        """Return the reply to each request body, in order.

        {"model": model, **body} is sent to base_url + path. Cached requests are not sent, and equal bodies are sent
        once. Each reply is cached as soon as it arrives, so a killed process loses none. Failures are not cached.

        Args:
            bodies: JSON objects.
            path: Appended to base_url.
            advance: Called with the number of bodies that were answered or failed.
            find_fault: Returns why a reply is unusable, or None. An unusable reply becomes a `Failure` without a retry.
            version: Version of the model behind the address. The cache keeps versions apart.
        """
        keys = [self._hash_request(body, path, version) for body in bodies]
        copies = Counter(keys)
        replies: dict[bytes, Reply | Failure] = {}
        with self._open_cache() as cache:
            for key in copies:
                if (text := _read_reply(cache, key)) is not None:
                    replies[key] = json.loads(text)
            missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in replies}
            self.usage.cached += len(bodies) - len(missing)
            if cached := sum(copies[key] for key in replies):
                advance(cached)

            def receive(key: bytes, reply: Reply | Failure) -> None:
                replies[key] = reply
                if not isinstance(reply, Failure):
                    if (reason := find_fault(reply)) is None:
                        cache.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(reply)))
                    else:
                        replies[key] = Failure(reason)
                    self._add_usage(reply)
                self.usage.failed += isinstance(replies[key], Failure)
                advance(copies[key])

            if missing:
                self.check()
                _run(self._send(missing, self.base_url.rstrip("/") + path, receive))
        return [replies[key] for key in keys]

    def estimate(self, bodies: Sequence[Mapping[str, Any]], tokens_out: int, path: str = "/chat/completions") -> str:
        """Return a sentence with the number of requests, and the tokens and cost of those that are not cached.

        `tokens_out` is the maximum number of tokens of one reply.
        """
        distinct = {self._hash_request(body, path): body for body in bodies}
        with self._open_cache() as cache:
            missing = [body for key, body in distinct.items() if _read_reply(cache, key) is None]
        tokens_in = sum(len(json.dumps(body, ensure_ascii=False)) for body in missing) // CHARACTERS_PER_TOKEN
        longest = tokens_out * len(missing)
        cached = f" ({len(distinct) - len(missing)} cached)" if len(missing) < len(distinct) else ""
        cost = (
            f", cost at most {self._compute_cost(tokens_in, longest):,.2f}" if self.price_in or self.price_out else ""
        )
        return f"{len(distinct)} calls{cached}, about {tokens_in:,} tokens in and at most {longest:,} out{cost}"

    async def _send(
        self, missing: Mapping[bytes, Mapping[str, Any]], url: str, receive: Callable[[bytes, Reply | Failure], None]
    ) -> None:
        """Send requests concurrently, and call `receive` with each reply as it arrives."""
        import httpx2
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        for name in ("openai", "httpx2"):  # they would log a line per request
            logging.getLogger(name).setLevel(logging.WARNING)
        todo = iter(missing.items())
        done = unanswered = 0

        async def count_retry(request: httpx2.Request) -> None:
            self.usage.retried += request.headers.get("x-stainless-retry-count", "0") != "0"

        async def check_content(response: httpx2.Response) -> None:
            """Raise a decoding error for an invalid reply, so that the openai client retries the request."""
            if response.is_success:
                await response.aread()
                if (reason := _find_invalid_content(response.content)) is not None:
                    raise httpx2.DecodingError(reason, request=response.request)

        async def work(client: AsyncOpenAI) -> None:
            nonlocal done, unanswered
            limit = float("inf") if self.max_cost is None else self.max_cost
            while self.usage.cost < limit and (item := next(todo, None)) is not None:
                key, body = item
                self.usage.asked += 1
                reply, answered = await self._request(client, url, {"model": self.model, **body})
                done += 1
                receive(key, reply)
                unanswered = 0 if answered else unanswered + 1
                if unanswered == MAX_UNANSWERED and isinstance(reply, Failure):
                    raise UserError(
                        f"{url}: {unanswered} consecutive requests failed after {self.retries} retries each, the last "
                        f"with: {reply.reason}. {len(missing) - done} of {len(missing)} requests were not sent. "
                        "Replies are cached; the same command sends only the missing requests"
                    )

        async with AsyncOpenAI(
            base_url=self.base_url, api_key=os.environ[self.api_key_env] if self.api_key_env else "none",
            timeout=self.timeout, max_retries=self.retries,
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [count_retry], "response": [check_content]}),
        ) as client:  # fmt: skip
            await asyncio.gather(*(work(client) for _ in range(min(self.concurrency, len(missing)))))
        if done < len(missing):
            raise UserError(
                f"client.max_cost={self.max_cost:g} is reached: {self.usage.cost:.2f} spent, and {len(missing) - done} "
                f"of {len(missing)} requests to {url} were not sent. Replies are cached; raise client.max_cost, and "
                "the same command sends only the missing requests"
            )

    async def _request(self, client: Any, url: str, body: Mapping[str, Any]) -> tuple[Reply | Failure, bool]:
        """Return the reply to one request, and whether the server answered it (a rejection is an answer)."""
        import httpx2
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            response = await client.post(url, cast_to=httpx2.Response, body=body)
        except APITimeoutError:
            return Failure(f"no reply in {self.timeout:g} seconds"), False
        except APIConnectionError as error:
            return Failure(str(error.__cause__) or type(error.__cause__).__name__), False
        except APIStatusError as error:
            reason = f"{error.status_code}: {_get_message(error)}"
            if error.status_code == 401:
                key = f"the key in {self.api_key_env}" if self.api_key_env else "a request without a key"
                raise UserError(f"{url} rejects {key}: {reason}") from None
            if error.status_code == 404:  # every other request would fail too
                raise UserError(
                    f"{url} does not exist or does not serve model {self.model}: {reason}. Check client.base_url and "
                    "client.model"
                ) from None
            return Failure(reason), 400 <= error.status_code < 500 and error.status_code != 429
        return response.json(), True

    def _add_usage(self, reply: Reply) -> None:
        """Add the tokens that the server reports to `usage`."""
        tokens_in, tokens_out = count_tokens(reply, "prompt_tokens"), count_tokens(reply, "completion_tokens")
        self.usage.tokens_in += tokens_in
        self.usage.tokens_out += tokens_out
        self.usage.cost += self._compute_cost(tokens_in, tokens_out)
        if self.max_cost is not None and tokens_in + tokens_out == 0:
            raise UserError(f"{self.base_url} does not report token usage, so client.max_cost cannot be enforced")

    def _compute_cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def _hash_request(self, body: Mapping[str, Any], path: str, version: str = "") -> bytes:
        content = [self.base_url.rstrip("/"), path, {"model": self.model, **body}, version]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()

    @contextmanager
    def _open_cache(self) -> Iterator[sqlite3.Connection]:
        """Open the database of replies. Several processes may read and write it at the same time."""
        file = Path(self.cache).expanduser() / "replies.sqlite"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # autocommit: each reply is on disk at once; check_same_thread: see _run, which waits for its thread
            connection = sqlite3.connect(file, timeout=60.0, isolation_level=None, check_same_thread=False)
            with closing(connection) as cache:
                cache.execute("PRAGMA journal_mode=WAL")
                cache.execute("PRAGMA synchronous=NORMAL")
                cache.execute("CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT) WITHOUT ROWID")
                yield cache
        except (sqlite3.Error, FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"client.cache={self.cache}: cannot open {file}: {error}. Set client.cache to another folder"
            ) from error


def get_text(reply: Mapping[str, Any]) -> str | None:
    """Return the text of a chat completion, or None if it has none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return None
    return replace_surrogates(content) if isinstance(content, str) else None


def find_missing_text(reply: Mapping[str, Any]) -> str | None:
    """Return a reason if a chat completion has no text, else None. For `Client.ask(find_fault=…)`."""
    return None if get_text(reply) is not None else f"no text in the reply {str(reply)[:120]}"


def count_items(advance: Callable[[int], None], size: int) -> Callable[[int], None]:
    """Return a function that counts requests, and calls `advance` with the completed items of `size` requests each."""
    seen = 0

    def count(done: int) -> None:
        nonlocal seen
        before, seen = seen, seen + done
        if items := seen // size - before // size:
            advance(items)

    return count


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, in another thread if this one has a running event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(coroutine)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, coroutine).result()


def _read_reply(cache: sqlite3.Connection, key: bytes) -> str | None:
    row = cache.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def count_tokens(reply: Mapping[str, Any], name: str) -> int:
    """Return a count of the reply's `usage`, or 0 if it is missing. Some servers write it as text."""
    try:
        return int(reply["usage"][name])
    except (LookupError, TypeError, ValueError, OverflowError):
        return 0


def _find_invalid_content(content: bytes) -> str | None:
    """Return why the body of a successful response is not a reply, else None. Some gateways send errors as 200."""
    try:
        reply = json.loads(content)
    except ValueError:
        return f"the reply is not JSON: {content[:60].decode(errors='replace')!r}"
    if not isinstance(reply, dict):
        return f"the reply is not a JSON object: {str(reply)[:60]!r}"
    error = reply.get("error")
    return str(error.get("message", error) if isinstance(error, dict) else error) if error else None


def _get_message(error: Any) -> str:
    """Return the server's message, in the form of OpenAI, of FastAPI, or as plain text."""
    body = error.body
    message = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
    return str(message or body or error.message)[:300]
