"""Servers that are broken or hostile: what the HTTP client bounds, rejects and removes from replies."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.servers import Broken, client, completion, served
from var.utils.errors import UserError
from var.utils.http_client import Failure

BODY = {"messages": [{"role": "user", "content": "?"}]}
KEY = "sk-5ec7e75ec7e7/judge+key="


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)


def ask(reply: Any, folder: Path, **options: Any) -> Any:
    """Return the only reply of a server, with a key and without retries."""
    with served(lambda body, before: reply) as server:
        return client(server.base_url, folder, **{"retries": 0, "api_key_env": "MY_KEY", **options}).ask([BODY])[0]


def test_timeout_bounds_a_reply_that_arrives_slowly(tmp_path: Path) -> None:
    """A byte every 50 ms: no single wait is long."""
    start = time.monotonic()
    slow = Broken(text=json.dumps(completion("x" * 400)), drip=0.05)
    assert ask(slow, tmp_path, timeout=0.6) == Failure("no reply in 0.6 seconds")
    assert time.monotonic() - start < 5


def test_long_reply_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var.utils.bounded_http.MAX_BYTES", 2**20)
    assert ask(completion("x" * 2**20), tmp_path) == Failure("the reply is longer than 1 MiB")
    assert ask(completion("x" * 2**19), tmp_path) == completion("x" * 2**19)


def test_compressed_reply_is_a_failure(tmp_path: Path) -> None:
    """Half a megabyte would be gigabytes."""
    packed = Broken(data=gzip.compress(json.dumps(completion("x")).encode()), headers={"Content-Encoding": "gzip"})
    with served(lambda body, before: packed) as server:
        (reply,) = client(server.base_url, tmp_path, retries=0).ask([BODY])
    assert reply == Failure("the reply is compressed (gzip), although the request does not allow it")
    assert server.headers[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize("depth", [101, 100_000])
def test_nested_reply_is_a_failure(depth: int, tmp_path: Path) -> None:
    reply = ask(Broken(text='{"a":' + "[" * depth + "]" * depth + "}"), tmp_path)
    assert isinstance(reply, Failure)
    assert reply.reason.startswith("the reply is JSON of more than 100 nested" if depth == 101 else "the reply is not")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int, tmp_path: Path) -> None:
    with served(lambda body, before: completion("stolen")) as other:
        place = f"{other.base_url}/chat/completions?key={KEY}"
        with pytest.raises(UserError, match=r"redirects to .*\[API key\].*Set client\.base_url"):
            ask(Broken(status, headers={"Location": place}), tmp_path)
    assert other.bodies == []


def test_long_retry_after_is_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai client would not retry after more than 120 seconds."""
    monkeypatch.setattr("var.utils.bounded_http.MAX_WAIT", 0.5)
    for busy in (
        Broken(429, retry_after=3600), Broken(503, retry_after="Wed, 21 Oct 2099 07:28:00 GMT"),
        Broken(429, headers={"retry-after-ms": "3600000"}),
    ):  # fmt: skip
        with served(lambda body, before, busy=busy: completion("yes") if before else busy) as server:
            (reply,) = client(server.base_url, tmp_path / str(busy.retry_after), retries=1).ask([BODY])
        assert reply == completion("yes")
        assert 0.4 < server.times[1] - server.times[0] < 5


@pytest.mark.parametrize("name", ["Content-Type", "Retry-After", "X-Request-Id"])
@pytest.mark.parametrize("status", [200, 400])
def test_headers_may_hold_any_bytes(name: str, status: int, tmp_path: Path) -> None:
    broken = Broken(status, json.dumps(completion("yes")), headers={name: "\xff\xfe; charset=\xe9"})
    reply = ask(broken, tmp_path)
    assert reply == completion("yes") if status == 200 else isinstance(reply, Failure)


# --- keys


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (f"{KEY}\n", "character 27 of 27"), (f"{KEY}\r\n", "character 27 of 28"), (f"'{KEY}'\n", "character 1 of"),
        (f"schlüssel-{KEY}", "character 5 of"), (f"{KEY} {KEY}", "character 27 of"), (f'"{KEY}', "character 1 of"),
    ],
)  # fmt: skip
def test_invalid_key_is_an_error_that_does_not_show_it(
    value: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with served(lambda body, before: completion("yes")) as server:
        judge = client(server.base_url, tmp_path, api_key_env="MY_KEY")
        for act in (judge.check, lambda: judge.ask([BODY])):
            with pytest.raises(UserError, match="MY_KEY in the environment is not an API key") as error:
                act()
            assert words in str(error.value)
            assert "5ec7e7" not in str(error.value)
    assert server.bodies == []


def echo(status: int) -> Broken:
    """Return a reply with the request's header, in different forms of JSON."""
    words = {"authorization": f"Bearer {KEY}", "x": 1}
    text = json.dumps({"error": {"message": str(words)}} if status >= 400 else {**completion("a"), "echo": words})
    escaped = {200: text.replace("sk-", "\\u0073k-"), 400: text, 500: text.replace("/", "\\/")}
    return Broken(status, escaped.get(status, text), headers={"x-request-id": KEY})


@pytest.mark.parametrize("status", [200, 400, 500])
def test_key_that_a_server_returns_is_removed(status: int, tmp_path: Path) -> None:
    reply = ask(echo(status), tmp_path)
    assert KEY not in str(reply)
    assert "[API key]" in str(reply)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("status", [401, 404])
def test_key_is_removed_from_errors(status: int, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        ask(echo(status), tmp_path)
    assert KEY not in str(error.value)


def test_short_key_is_a_placeholder_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's users write EMPTY, which is a word of ordinary text."""
    monkeypatch.setenv("MY_KEY", "EMPTY")
    assert ask(completion("The box is EMPTY"), tmp_path) == completion("The box is EMPTY")


def test_openai_key_and_organization_stay_with_openai(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"{name}-{KEY}")
    assert ask(completion("yes"), tmp_path / "auto", api_key_env="auto") == completion("yes")
    assert "OPENAI_API_KEY is not sent to this server. If it needs a key, set api_key_env" in capsys.readouterr().out
    with served(lambda body, before: completion("yes")) as server:
        client(server.base_url, tmp_path, api_key_env="auto").ask([BODY])
        client(server.base_url, tmp_path / "named", api_key_env="OPENAI_API_KEY").ask([BODY])
    assert server.keys == ["Bearer none", f"Bearer OPENAI_API_KEY-{KEY}"]
    assert not any(name in header for header in server.headers for name in ("openai-organization", "openai-project"))
    for url, name in (
        ("https://api.openai.com/v1", "OPENAI_API_KEY"), ("https://eu.api.openai.com/v1", "OPENAI_API_KEY"),
        ("http://api.openai.com/v1", None), ("https://api.openai.com.evil.org/v1", None), ("https://xopenai.com", None),
    ):  # fmt: skip
        assert client(url, tmp_path, api_key_env="auto")._key_name == name


@pytest.mark.parametrize(
    "url",
    ["http://user:KEY@host/v1", "http://KEY@host/v1", "http://host/v1?api-key=KEY", "http://host/#KEY", "http://[KEY/"],
)
def test_address_with_a_secret_is_rejected_without_showing_it(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"client\.base_url") as error:
        client(url, tmp_path)
    assert "KEY" not in str(error.value)
