"""An HTTP client that trusts no server: bounded time and size, no redirects, and no API key in what it returns."""

import asyncio
import json
import time
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from var.utils.api_key import redact

MAX_BYTES = 16 * 2**20  # of a reply
MAX_DEPTH = 100  # of nested JSON; Python's own limit depends on the caller
MAX_WAIT = 120.0  # seconds; the openai client would give up on a longer Retry-After


class BoundedClient(httpx2.AsyncClient):
    """A client whose requests fail after `seconds` in total, and with a `DecodingError` for an unusable reply.

    A reply is unusable if it is longer than MAX_BYTES, compressed, or, if it is a success, not a JSON object.
    Redirects are returned and not followed. `key` is removed from replies, headers and errors. A Retry-After above
    MAX_WAIT becomes MAX_WAIT. `options` are those of httpx2.AsyncClient.
    """

    def __init__(self, seconds: float, key: str | None, **options: Any) -> None:
        limits = httpx2.Limits()  # none: a request that waits for a connection would spend its seconds
        super().__init__(headers={"Accept-Encoding": "identity"}, follow_redirects=False, limits=limits, **options)
        self._seconds, self._key = seconds, key

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request and return the complete response. Raise a RequestError if there is none."""
        try:
            async with asyncio.timeout(self._seconds):
                response = await super().send(request, **{**options, "stream": True})
                async with aclosing(response):
                    content = await _read(response)
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no reply in {self._seconds:g} seconds", request=request) from None
        except httpx2.RequestError as error:
            error.args = (redact(str(error), self._key),)
            raise
        text = redact(_normalize(content.decode("utf-8-sig", errors="replace")), self._key)
        if response.is_success and (reason := _find_invalid_content(text)):
            raise httpx2.DecodingError(reason, request=request)
        headers = {
            name: redact(value, self._key).encode("ascii", "replace").decode()
            for name, value in response.headers.items()
        }
        if _read_wait(headers) > MAX_WAIT:
            headers.pop("retry-after-ms", None)
            headers["retry-after"] = f"{MAX_WAIT:g}"
        return httpx2.Response(response.status_code, headers=headers, content=text.encode(), request=request)


async def _read(response: httpx2.Response) -> bytes:
    """Return the body. A compressed one is rejected, because a few bytes of it may be gigabytes."""
    if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
        raise httpx2.DecodingError(f"the reply is compressed ({encoding[:20]}), although the request does not allow it")
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > MAX_BYTES:
            raise httpx2.DecodingError(f"the reply is longer than {MAX_BYTES // 2**20} MiB")
    return bytes(content)


def _normalize(text: str) -> str:
    r"""Return JSON without needless escapes, such as \u0073 for s, in which a key would be overlooked."""
    try:
        return json.dumps(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _read_wait(headers: dict[str, str]) -> float:
    """Return the seconds that a response asks to wait, or 0."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
    try:
        return parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    except (KeyError, ValueError, OverflowError):
        return 0.0


def _find_invalid_content(text: str) -> str | None:
    """Return why the body of a successful response is not a reply, else None. Some gateways send errors as 200."""
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError):
        return f"the reply is not JSON: {text[:60]!r}"
    if not isinstance(reply, dict):
        return f"the reply is not a JSON object: {str(reply)[:60]!r}"
    level: list[Any] = [reply]
    for _ in range(MAX_DEPTH):
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
        level = [item for item in level if isinstance(item, dict | list)]
    if level:
        return f"the reply is JSON of more than {MAX_DEPTH} nested levels"
    error = reply.get("error")
    return str(error.get("message", error) if isinstance(error, dict) else error) if error else None
