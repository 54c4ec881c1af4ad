"""The HTTP client against a real server: retries, cache, costs and errors."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.servers import Broken, completion, served
from tests.helpers.servers import client as make_client
from var.utils.errors import UserError
from var.utils.http_client import MAX_UNANSWERED, Client, Failure

QUESTIONS = [f"question {i}" for i in range(6)]
BODIES = [{"messages": [{"role": "user", "content": question}], "temperature": 0} for question in QUESTIONS]

connect = partial(make_client, timeout=5.0, retries=3)


def echo(body: dict[str, Any], before: int) -> Any:
    return completion(body["messages"][0]["content"])


def get_texts(replies: list[Any]) -> list[str]:
    return [reply["choices"][0]["message"]["content"] for reply in replies]


def test_replies_keep_order_and_equal_bodies_are_sent_once(tmp_path: Path):
    def reply(body: dict[str, Any], before: int) -> Any:
        return Broken(text=json.dumps(echo(body, before)), slow=0.2 if "question 0" in str(body) else 0.0)

    with served(reply) as server:
        client = connect(server.base_url, tmp_path)
        done: list[int] = []
        assert get_texts(client.ask([*BODIES, BODIES[1]], advance=done.append)) == [*QUESTIONS, "question 1"]
    assert sorted(done) == [1, 1, 1, 1, 1, 2]
    assert len(server.bodies) == 6
    assert {"model": "judge", **BODIES[0]} in server.bodies
    assert set(server.paths) == {"/v1/chat/completions"}
    assert (client.usage.asked, client.usage.cached, client.usage.failed, client.usage.retried) == (6, 1, 0, 0)


def test_cached_requests_are_not_sent_again(tmp_path: Path):
    with served(echo) as server:
        first = connect(server.base_url, tmp_path).ask(BODIES[:4])
        again = connect(f"{server.base_url}/", tmp_path, concurrency=1)
        done: list[int] = []
        assert again.ask(BODIES, advance=done.append)[:4] == first
        assert done == [4, 1, 1]
        assert len(server.bodies) == 6
        assert (again.usage.asked, again.usage.cached, again.usage.tokens_in) == (2, 4, 20)
        connect(server.base_url, tmp_path, model="other").ask(BODIES[:1])
        connect(server.base_url, tmp_path).ask(BODIES[:1], path="/other")
        connect(server.base_url, tmp_path).ask([{**BODIES[0], "temperature": 1}])
        connect(server.base_url, tmp_path).ask(BODIES[:1], version="2")
        assert len(server.bodies) == 10
        assert server.paths[7] == "/v1/other"


FAULTS = {
    "429": (Broken(429), "429: Error code: 429"), "500": (Broken(500), "500: Error code: 500"),
    "503": (Broken(503), "503: Error code: 503"),
    "partial JSON": (Broken(text='{"choices": ['), "the reply is not JSON: '{\"choices\": ['"),
    "HTML": (Broken(text="<html>"), "the reply is not JSON: '<html>'"),
    "list": (Broken(text="[1]"), "the reply is not a JSON object: '[1]'"),
    "truncated": (Broken(text="{}" * 20, cut=20), "peer closed connection without sending complete message body"),
    "closed": (Broken(drop=True), "Server disconnected without sending a response."),
    "slow": (Broken(text="{}", slow=0.6), "no reply in 0.4 seconds"),
    "error object with status 200": (Broken(text='{"error": {"message": "busy"}}'), "busy"),
    "error text with status 200": (Broken(text='{"error": "overloaded"}'), "overloaded"),
}  # fmt: skip


def test_each_fault_is_retried(tmp_path: Path):
    bodies = [{"messages": [{"role": "user", "content": name}]} for name in FAULTS]

    def reply(body: dict[str, Any], before: int) -> Any:
        return FAULTS[body["messages"][0]["content"]][0] if before == 0 else echo(body, before)

    with served(reply) as server:
        client = connect(server.base_url, tmp_path, timeout=0.4, concurrency=10)
        assert get_texts(client.ask(bodies)) == list(FAULTS)
    assert len(server.bodies) == 2 * len(FAULTS)
    assert (client.usage.asked, client.usage.retried, client.usage.failed) == (len(FAULTS), len(FAULTS), 0)


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_fault_in_every_try_is_a_failure_with_a_reason(fault: Broken, reason: str, tmp_path: Path):
    with served(lambda body, before: fault) as server:
        client = connect(server.base_url, tmp_path, timeout=0.4, retries=1)
        (reply,) = client.ask(BODIES[:1])
    assert isinstance(reply, Failure)
    assert reply.reason.startswith(reason)
    assert len(server.bodies) == 2
    assert (client.usage.asked, client.usage.failed, client.usage.retried) == (1, 1, 1)


def test_unreachable_server_is_a_failure(tmp_path: Path):
    (reply,) = connect("http://127.0.0.1:9/v1", tmp_path, retries=0).ask(BODIES[:1])
    assert reply == Failure("All connection attempts failed")


@pytest.mark.parametrize("words", ['{"error": {"message": "too long"}}', '{"detail": "too long"}', "too long"])
def test_rejected_request_is_not_retried_but_sent_by_next_call(words: str, tmp_path: Path):
    def reply(body: dict[str, Any], before: int) -> Any:
        return Broken(400, words) if "question 3" in str(body) else echo(body, before)

    with served(reply) as server:
        replies = connect(server.base_url, tmp_path).ask(BODIES)
        assert replies[3] == Failure("400: too long")
        assert get_texts(replies[:3] + replies[4:]) == QUESTIONS[:3] + QUESTIONS[4:]
        assert len(server.bodies) == 6
        connect(server.base_url, tmp_path).ask(BODIES)
        assert len(server.bodies) == 7


def test_unusable_reply_is_a_failure_and_not_cached(tmp_path: Path):
    def find_fault(reply: dict[str, Any]) -> str | None:
        return "no 3 please" if "question 3" in str(reply) else None

    with served(echo) as server:
        client = connect(server.base_url, tmp_path)
        assert client.ask(BODIES, find_fault=find_fault)[3] == Failure("no 3 please")
        assert (client.usage.failed, client.usage.tokens_in, len(server.bodies)) == (1, 60, 6)
        connect(server.base_url, tmp_path).ask(BODIES)
        assert len(server.bodies) == 7


def test_retry_after_header_is_respected(tmp_path: Path):
    """0.9 seconds; the openai client's own first wait is at most 0.5."""

    def busy(body: dict[str, Any], before: int) -> Any:
        return Broken(429, retry_after=0.9) if before == 0 else echo(body, before)

    with served(busy) as server:
        connect(server.base_url, tmp_path).ask(BODIES[:1])
    assert server.times[1] - server.times[0] >= 0.9


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "rejects a request without a key: 401: no"), (404, "does not serve model judge: 404: no")],
)
def test_wrong_key_or_address_stops_at_once(status: int, words: str, tmp_path: Path):
    with served(lambda body, before: Broken(status, '{"error": {"message": "no"}}')) as server:
        with pytest.raises(UserError, match=words):
            connect(server.base_url, tmp_path, concurrency=1).ask(BODIES)
        assert len(server.bodies) == 1


def test_endpoint_that_is_down_stops_early(tmp_path: Path):
    """The first 4 of 50 requests are answered and cached, the next 32 fail, and the other 14 are not sent."""
    bodies = [{"n": i} for i in range(50)]

    def dying(body: dict[str, Any], before: int) -> Any:
        return {"said": "yes"} if body["n"] < 4 else Broken(503 if body["n"] % 2 else 429)

    with served(dying) as server:
        client = connect(server.base_url, tmp_path, retries=0, concurrency=1)
        with pytest.raises(UserError, match=f"{MAX_UNANSWERED} consecutive requests.*503.*14 of 50 requests were not"):
            client.ask(bodies)
        assert len(server.bodies) == 4 + MAX_UNANSWERED
        assert connect(server.base_url, tmp_path).ask(bodies[:4]) == [{"said": "yes"}] * 4
        assert len(server.bodies) == 4 + MAX_UNANSWERED


def test_rejected_requests_do_not_count_as_unanswered(tmp_path: Path):
    with served(lambda body, before: Broken(400)) as server:
        replies = connect(server.base_url, tmp_path).ask([{"n": i} for i in range(MAX_UNANSWERED + 8)])
    assert all(isinstance(reply, Failure) for reply in replies)
    assert len(server.bodies) == MAX_UNANSWERED + 8


def test_concurrency_bounds_pending_requests(tmp_path: Path):
    with served(lambda body, before: Broken(text="{}", slow=0.2)) as server:
        connect(server.base_url, tmp_path, concurrency=3).ask([{"n": i} for i in range(9)])
    assert server.peak == 3


def test_key_comes_from_the_named_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("MY_KEY", "mine")
    with served(echo) as server:
        connect(server.base_url, tmp_path, api_key_env="MY_KEY").ask(BODIES[:1])
        connect(server.base_url, tmp_path, api_key_env=None).ask(BODIES[1:2])
    assert server.keys == ["Bearer mine", "Bearer none"]


def test_missing_key_or_package_is_an_error_before_any_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "")
    with served(echo) as server:
        keyless = connect(server.base_url, tmp_path, api_key_env="MY_KEY")
        for ask in (keyless.check, lambda: keyless.ask(BODIES)):
            with pytest.raises(UserError, match=r"MY_KEY is not set in the environment.*judge\.client\.api_key_env"):
                ask()
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(UserError) as error:
            connect(server.base_url, tmp_path).check()
        assert str(error.value) == "an endpoint needs an extra: pip install -e '.[endpoint]'"
    assert server.bodies == []


def test_cached_replies_need_no_key_and_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with served(echo) as server:
        connect(server.base_url, tmp_path).ask(BODIES)
    monkeypatch.delenv("MY_KEY", raising=False)
    assert get_texts(connect(server.base_url, tmp_path, api_key_env="MY_KEY").ask(BODIES)) == QUESTIONS


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"base_url": "127.0.0.1:8000"}, "client.base_url: .*got 127"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"retries": -1}, "retries at least 0"), ({"timeout": 0.0}, "timeout more than 0"),
        ({"price_in": -1.0}, "at least 0"), ({"max_cost": -1.0, "price_in": 1.0}, "at least 0"),
        ({"max_cost": 1.0}, "Set client.price_in and client.price_out"),
    ],
)  # fmt: skip
def test_invalid_settings_are_errors(wrong: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        Client(**{"base_url": "http://127.0.0.1:9/v1", "model": "judge", **wrong})


# --- costs


def test_cost_is_computed_from_reported_tokens(tmp_path: Path):
    """10 tokens in and 5 out per reply: six cost 60·3e-6 + 30·10e-6 = 0.00048."""
    with served(echo) as server:
        client = connect(server.base_url, tmp_path, price_in=3.0, price_out=10.0)
        client.ask(BODIES)
        client.ask(BODIES)  # cached replies cost nothing
    assert (client.usage.tokens_in, client.usage.tokens_out) == (60, 30)
    assert client.usage.cost == pytest.approx(0.00048)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": "12", "completion_tokens": "3"}, (12, 3)), ({"prompt_tokens": "many"}, (0, 0)), ([], (0, 0)),
        ([1], (0, 0)), ("12", (0, 0)), ({"prompt_tokens": -12, "completion_tokens": 3}, (0, 3)),
        ({"prompt_tokens": 10**400, "completion_tokens": -1}, (10**9, 0)),
        ({"prompt_tokens": None, "completion_tokens": 3.0}, (0, 3)), (None, (0, 0)),
    ],
)  # fmt: skip
def test_unusual_token_counts_are_read_or_zero(usage: Any, tokens: tuple[int, int], tmp_path: Path):
    with served(lambda body, before: {**completion("yes"), "usage": usage}) as server:
        client = connect(server.base_url, tmp_path)
        assert get_texts(client.ask(BODIES[:1])) == ["yes"]
    assert (client.usage.tokens_in, client.usage.tokens_out) == tokens


def test_max_cost_stops_requests_and_keeps_replies(tmp_path: Path):
    """A reply costs 1 and requests are sent one by one: two are sent, and the next process sends the others."""
    with served(echo) as server:
        options = {"price_in": 1e5, "max_cost": 2.0, "concurrency": 1}
        with pytest.raises(
            UserError, match=r"max_cost=2 is reached: 2.00 spent, and 4 of 6 requests to .* were not sent"
        ):
            connect(server.base_url, tmp_path, **options).ask(BODIES)
        assert len(server.bodies) == 2
        client = connect(server.base_url, tmp_path, **options)
        assert get_texts(client.ask(BODIES[:4])) == QUESTIONS[:4]
        assert (client.usage.cost, len(server.bodies)) == (2.0, 4)


def test_pending_requests_are_awaited_at_max_cost(tmp_path: Path):
    with served(lambda body, before: Broken(text=json.dumps(echo(body, before)), slow=0.1)) as server:
        client = connect(server.base_url, tmp_path, price_in=1e5, max_cost=1.0, concurrency=3)
        with pytest.raises(UserError, match=r"reached: 3\.00 spent"):
            client.ask(BODIES)
        assert len(server.bodies) == 3
        connect(server.base_url, tmp_path).ask(BODIES[:3])
        assert len(server.bodies) == 3


def test_negative_usage_does_not_defeat_max_cost(tmp_path: Path):
    """A reply of −10 tokens in and 10 out would cost nothing. It costs 1."""
    usage = {"prompt_tokens": -10, "completion_tokens": 10}
    with served(lambda body, before: {**completion("yes"), "usage": usage}) as server:
        client = connect(server.base_url, tmp_path, price_in=1e5, price_out=1e5, max_cost=2.0, concurrency=1)
        with pytest.raises(UserError, match=r"max_cost=2 is reached"):
            client.ask(BODIES)
    assert len(server.bodies) == 2


def test_max_cost_needs_reported_tokens(tmp_path: Path):
    with (
        served(lambda body, before: {"rewards": [1.0]}) as server,
        pytest.raises(UserError, match="does not report token usage"),
    ):
        connect(server.base_url, tmp_path, price_in=1.0, max_cost=1.0).ask(BODIES)


def test_estimate_counts_calls_tokens_and_cost(tmp_path: Path):
    """Each body is a JSON text of 88 characters, 22 tokens: 5 missing ones are 110 tokens in and 5·200 = 1,000 out."""
    bodies = [{"text": "x" * 68, "n": i} for i in range(6)]
    assert len(json.dumps(bodies[0])) == 88
    with served(lambda body, before: {"said": "yes"}) as server:
        client = connect(server.base_url, tmp_path)
        assert client.estimate(bodies, 200) == "6 calls, about 132 tokens in and at most 1,200 out"
        client.ask(bodies[:1])
        priced = connect(server.base_url, tmp_path, price_in=100.0, price_out=1000.0)
        assert priced.estimate([*bodies, bodies[5]], 200) == (
            "6 calls (1 cached), about 110 tokens in and at most 1,000 out, cost at most 1.01"
        )
        assert len(server.bodies) == 1


# --- processes, threads and loops


def test_client_works_inside_a_running_event_loop(tmp_path: Path):
    async def notebook(url: str) -> Any:
        return connect(url, tmp_path).ask(BODIES)

    with served(echo) as server:
        assert get_texts(asyncio.run(notebook(server.base_url))) == QUESTIONS


def test_threads_share_a_client_and_its_cache(tmp_path: Path):
    with served(echo) as server:
        client, other = connect(server.base_url, tmp_path), connect(server.base_url, tmp_path)
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda c: get_texts(c.ask(BODIES)), (client, other, client))) == [QUESTIONS] * 3


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_stopped_process_loses_no_reply(sign: signal.Signals, tmp_path: Path):
    """Four of twenty replies arrive before the process is stopped. The next process sends only the others."""
    stopped = threading.Event()

    def reply(body: dict[str, Any], before: int) -> Any:
        if body["n"] >= 6:
            stopped.wait(60)
        return {"said": "yes"}

    with served(reply) as server:
        program = f"""
            import signal
            from var.utils.http_client import Client
            signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
            client = Client(base_url={server.base_url!r}, model="judge", api_key_env=None, concurrency=2,
                            cache={str(tmp_path)!r})
            client.ask([{{"n": i}} for i in range(20)], advance=lambda done: print(done, flush=True))
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(4):
            assert process.stdout.readline()
        process.send_signal(sign)
        process.communicate()
        stopped.set()
        assert process.returncode != 0
        client = connect(server.base_url, tmp_path)
        assert client.ask([{"n": i} for i in range(20)]) == [{"said": "yes"}] * 20
    assert client.usage.cached >= 4
    assert client.usage.asked == 20 - client.usage.cached


def test_unusable_cache_folder_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with served(echo) as server:
        with pytest.raises(UserError, match=r"client\.cache=.*cannot use .*file/replies\.sqlite.*Set client\.cache"):
            connect(server.base_url, tmp_path / "file").ask(BODIES)
        (tmp_path / "replies.sqlite").write_text("no database " * 100)
        with pytest.raises(UserError, match="file is not a database"):
            connect(server.base_url, tmp_path).ask(BODIES)
    assert server.bodies == []


def test_requests_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO), served(echo) as server:
        connect(server.base_url, tmp_path).ask(BODIES)
    assert caplog.records == []


def test_fingerprint_is_address_and_model():
    client = Client(base_url="http://127.0.0.1:9/v1/", model="judge", concurrency=3)
    assert client.fingerprint == {"base_url": "http://127.0.0.1:9/v1", "model": "judge"}
