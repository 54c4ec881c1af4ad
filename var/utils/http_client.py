"""Send many requests to an HTTP endpoint: concurrency, retries, costs, and cached replies."""

import asyncio
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from var.utils.api_key import check_address, read_key
from var.utils.completions import count_tokens
from var.utils.console import say
from var.utils.errors import UserError
from var.utils.extras import import_extra
from var.utils.reply_cache import Reply, ReplyCache, open_cache

CHARACTERS_PER_TOKEN = 4  # roughly, in English
MAX_UNANSWERED = 32  # consecutive requests without an answer, after which the endpoint is considered down


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
    is not a JSON object (see `BoundedClient` for its bounds). The wait is the server's Retry-After of at most 120
    seconds, or the openai client's exponential back-off. Redirects are errors. Processes that share a cache send the
    same request once.
    """

    base_url: str  # address of the server, to which the path of a request is appended
    model: str  # sent with every request
    # The environment variable with the key. None: no key is sent. auto: OPENAI_API_KEY to OpenAI, and none to others.
    api_key_env: str | None = "auto"
    concurrency: int = 8  # maximum number of pending requests
    timeout: float = 120.0  # seconds for one try of a request, from the connection to the last byte of the reply
    retries: int = 8  # maximum per request
    price_in: float = 0.0  # per million prompt tokens
    price_out: float = 0.0  # per million completion tokens
    max_cost: float | None = None  # after this cost, this client sends no further request; pending ones are awaited
    cache: str = "~/.cache/var-align"  # folder of replies.sqlite: the first reply to each request, at any temperature
    usage: Usage = field(default_factory=Usage, compare=False, init=False)

    def __post_init__(self) -> None:
        check_address("client.base_url", self.base_url)
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
        try:
            self._read_key()
        except UserError as error:
            raise UserError(
                f"{self.base_url} needs a key, but {error}. If the server needs no key, set api_key_env=null of this "
                "client (judge.client.api_key_env, reward.client.api_key_env, …)"
            ) from None
        if self.api_key_env == "auto" and not self._is_openai and os.environ.get("OPENAI_API_KEY"):
            _say_once(
                f"{self.base_url}: OPENAI_API_KEY is not sent to this server. If it needs a key, set api_key_env of "
                "this client to the name of the key's variable."
            )

    @property
    def _is_openai(self) -> bool:
        """Whether the server is OpenAI's, to which alone OpenAI's variables belong."""
        address = urlsplit(self.base_url)
        return address.scheme == "https" and f".{address.hostname}".endswith(".openai.com")

    @property
    def _key_name(self) -> str | None:
        """The environment variable with the key; None: no key is sent."""
        if self.api_key_env == "auto":
            return "OPENAI_API_KEY" if self._is_openai else None
        return self.api_key_env

    def _read_key(self) -> str | None:
        return None if self._key_name is None else read_key(self._key_name)

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
                if (cached := cache.get(key)) is not None:
                    replies[key] = cached
            missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in replies}
            self.usage.cached += len(bodies) - len(missing)
            if known := sum(copies[key] for key in replies):
                advance(known)

            def receive(key: bytes, reply: Reply | Failure) -> None:
                replies[key] = reply
                if not isinstance(reply, Failure):
                    if (reason := find_fault(reply)) is None:
                        cache.put(key, reply)
                    else:
                        replies[key] = Failure(reason)
                    self._add_usage(reply)
                self.usage.failed += isinstance(replies[key], Failure)
                advance(copies[key])

            def reuse(key: bytes) -> bool:
                """Return whether another process has received the reply meanwhile."""
                if (reply := cache.get(key)) is None:
                    return False
                replies[key] = reply
                self.usage.cached += 1
                advance(copies[key])
                return True

            if missing:
                self.check()
                _run(self._send(missing, self.base_url.rstrip("/") + path, cache, reuse, receive))
        return [replies[key] for key in keys]

    def estimate(self, bodies: Sequence[Mapping[str, Any]], tokens_out: int, path: str = "/chat/completions") -> str:
        """Return a sentence with the number of requests, and the tokens and cost of those that are not cached.

        `tokens_out` is the maximum number of tokens of one reply.
        """
        distinct = {self._hash_request(body, path): body for body in bodies}
        with self._open_cache() as cache:
            missing = [body for key, body in distinct.items() if cache.get(key) is None]
        tokens_in = sum(len(json.dumps(body, ensure_ascii=False)) for body in missing) // CHARACTERS_PER_TOKEN
        longest = tokens_out * len(missing)
        cached = f" ({len(distinct) - len(missing)} cached)" if len(missing) < len(distinct) else ""
        cost = (
            f", cost at most {self._compute_cost(tokens_in, longest):,.2f}" if self.price_in or self.price_out else ""
        )
        return f"{len(distinct)} calls{cached}, about {tokens_in:,} tokens in and at most {longest:,} out{cost}"

    async def _send(
        self,
        missing: Mapping[bytes, Mapping[str, Any]],
        url: str,
        cache: ReplyCache,
        reuse: Callable[[bytes], bool],
        receive: Callable[[bytes, Reply | Failure], None],
    ) -> None:
        """Send requests concurrently, and call `receive` with each reply as it arrives."""
        import httpx2
        from openai import AsyncOpenAI, Omit

        from var.utils.bounded_http import BoundedClient

        for name in ("openai", "httpx2"):  # they would log a line per request
            logging.getLogger(name).setLevel(logging.WARNING)
        todo = iter(missing.items())
        done = unanswered = 0

        async def count_retry(request: httpx2.Request) -> None:
            self.usage.retried += request.headers.get("x-stainless-retry-count", "0") != "0"

        async def work(client: AsyncOpenAI) -> None:
            nonlocal done, unanswered
            limit = float("inf") if self.max_cost is None else self.max_cost
            while self.usage.cost < limit and (item := next(todo, None)) is not None:
                key, body = item
                async with cache.claim(key):
                    done += 1
                    if reuse(key):
                        continue
                    self.usage.asked += 1
                    reply, answered = await self._request(client, url, {"model": self.model, **body})
                    receive(key, reply)
                unanswered = 0 if answered else unanswered + 1
                if unanswered == MAX_UNANSWERED and isinstance(reply, Failure):
                    raise UserError(
                        f"{url}: {unanswered} consecutive requests failed after {self.retries} retries each, the last "
                        f"with: {reply.reason}. {len(missing) - done} of {len(missing)} requests were not sent. "
                        "Replies are cached; the same command sends only the missing requests"
                    )

        key = self._read_key()
        own: Any = {} if self._is_openai else {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        async with AsyncOpenAI(
            base_url=self.base_url, api_key=key or "none", timeout=self.timeout, max_retries=self.retries,
            default_headers=own, http_client=BoundedClient(self.timeout, key, event_hooks={"request": [count_retry]}),
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
            if error.status_code in (301, 302, 303, 307, 308):
                raise UserError(
                    f"{url} redirects to {error.response.headers.get('location', '')[:200]!r}. Redirects are not "
                    "followed, because prompts and keys would reach another server. Set client.base_url to the address "
                    "that answers"
                ) from None
            if error.status_code == 401:
                key = f"the key in {self._key_name}" if self._key_name else "a request without a key"
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

    def _open_cache(self) -> AbstractContextManager[ReplyCache]:
        return open_cache(Path(self.cache).expanduser())


@cache
def _say_once(text: str) -> None:
    say(text)


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


def _get_message(error: Any) -> str:
    """Return the server's message, in the form of OpenAI, of FastAPI, or as plain text."""
    body = error.body
    message = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
    return str(message or body or error.message)[:300]
