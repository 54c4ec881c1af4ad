"""The client of endpoints beside a real server: what fails is asked again, what came is kept, what is wrong is told."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.server import Broken, completion, served
from tests.server import client as plain
from var.utils.errors import UserError
from var.utils.http_client import DEAD, Client, Failure

BODIES = [{"messages": [{"role": "user", "content": f"question {i}"}], "temperature": 0} for i in range(6)]


client = partial(plain, timeout=5.0, retries=3)


def echo(body: dict[str, Any], before: int) -> Any:
    return completion(body["messages"][0]["content"])


def said(replies: list[Any]) -> list[str]:
    return [reply["choices"][0]["message"]["content"] for reply in replies]


QUESTIONS = [f"question {i}" for i in range(6)]


def test_replies_stand_in_the_order_of_the_bodies_and_equal_ones_are_asked_once(tmp_path: Path):
    def later(body: dict[str, Any], before: int) -> Any:
        slow = 0.2 if "question 0" in str(body) else 0.0
        return Broken(text=json.dumps(echo(body, before)), slow=slow)

    with served(later) as server:
        one = client(server.base_url, tmp_path)
        done: list[int] = []
        assert said(one.ask([*BODIES, BODIES[1]], advance=done.append)) == [*QUESTIONS, "question 1"]
    assert sorted(done) == [1, 1, 1, 1, 1, 2]
    assert len(server.bodies) == 6
    assert {"model": "judge", **BODIES[0]} in server.bodies
    assert set(server.paths) == {"/v1/chat/completions"}
    assert (one.usage.asked, one.usage.cached, one.usage.failed, one.usage.retried) == (6, 1, 0, 0)


def test_what_was_answered_is_never_asked_again(tmp_path: Path):
    with served(echo) as server:
        first = client(server.base_url, tmp_path).ask(BODIES[:4])
        again = client(f"{server.base_url}/", tmp_path, concurrency=1)
        done: list[int] = []
        assert again.ask(BODIES, advance=done.append)[:4] == first
        assert done == [4, 1, 1]
        assert len(server.bodies) == 6
        assert (again.usage.asked, again.usage.cached, again.usage.tokens_in) == (2, 4, 20)
        client(server.base_url, tmp_path, model="other").ask(BODIES[:1])
        client(server.base_url, tmp_path).ask(BODIES[:1], path="/other")
        client(server.base_url, tmp_path).ask([{**BODIES[0], "temperature": 1}])
        client(server.base_url, tmp_path).ask(BODIES[:1], version="2")
        assert len(server.bodies) == 10
        assert server.paths[7] == "/v1/other"


FAULTS = {
    "busy": Broken(429), "error": Broken(500), "overloaded": Broken(503), "broken JSON": Broken(text='{"choices": ['),
    "HTML": Broken(text="<html>"), "cut off": Broken(text=json.dumps(completion("no")), cut=20),
    "no object": Broken(text="[1]"), "closed": Broken(drop=True), "slow": Broken(text="{}", slow=0.6),
    "an error with status 200": Broken(text='{"error": {"message": "busy"}}'),
    "an error in words": Broken(text='{"error": "overloaded"}'),
}  # fmt: skip


def test_each_fault_is_asked_again(tmp_path: Path):
    find_faults = list(FAULTS.values())
    bodies = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(len(find_faults))]

    def at_first(body: dict[str, Any], before: int) -> Any:
        return find_faults[int(body["messages"][0]["content"])] if before == 0 else echo(body, before)

    with served(at_first) as server:
        one = client(server.base_url, tmp_path, timeout=0.4, concurrency=10)
        assert said(one.ask(bodies)) == [str(i) for i in range(len(find_faults))]
    assert len(server.bodies) == 2 * len(find_faults)
    assert (one.usage.asked, one.usage.retried, one.usage.failed) == (len(find_faults), len(find_faults), 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("error", "500: Error code: 500"), ("broken JSON", "the reply is no JSON: '{\"choices\": ['"),
        ("HTML", "the reply is no JSON: '<html>'"), ("no object", "the reply is no JSON object: '[1]'"),
        ("slow", "no reply in 0.4 seconds"), ("an error with status 200", "busy"),
        ("an error in words", "overloaded"),
        ("cut off", "peer closed connection without sending complete message body"),
        ("closed", "Server disconnected without sending a response."),
    ],
)  # fmt: skip
def test_what_fails_in_every_try_is_a_failure_with_its_reason(name: str, reason: str, tmp_path: Path):
    with served(lambda body, before: FAULTS[name]) as server:
        one = client(server.base_url, tmp_path, timeout=0.4, retries=1)
        (reply,) = one.ask(BODIES[:1])
    assert isinstance(reply, Failure)
    assert reply.reason.startswith(reason)
    assert len(server.bodies) == 2
    assert (one.usage.asked, one.usage.failed, one.usage.retried) == (1, 1, 1)


def test_no_server_is_a_failure_too(tmp_path: Path):
    (reply,) = client("http://127.0.0.1:9/v1", tmp_path, retries=0).ask(BODIES[:1])
    assert reply == Failure("All connection attempts failed")


@pytest.mark.parametrize("words", ['{"error": {"message": "too long"}}', '{"detail": "too long"}', "too long"])
def test_a_body_that_the_server_refuses_is_asked_once_and_again_by_the_next_call(words: str, tmp_path: Path):
    def reply(body: dict[str, Any], before: int) -> Any:
        return Broken(400, words) if "question 3" in str(body) else echo(body, before)

    with served(reply) as server:
        replies = client(server.base_url, tmp_path).ask(BODIES)
        assert replies[3] == Failure("400: too long")
        assert said(replies[:3] + replies[4:]) == QUESTIONS[:3] + QUESTIONS[4:]
        assert len(server.bodies) == 6
        client(server.base_url, tmp_path).ask(BODIES)
        assert len(server.bodies) == 7


def test_a_reply_of_no_use_is_a_failure_that_is_not_kept(tmp_path: Path):
    def useless(reply: dict[str, Any]) -> str | None:
        return "no 3 please" if "question 3" in str(reply) else None

    with served(echo) as server:
        one = client(server.base_url, tmp_path)
        assert one.ask(BODIES, accept=useless)[3] == Failure("no 3 please")
        assert (one.usage.failed, one.usage.tokens_in, len(server.bodies)) == (1, 60, 6)
        client(server.base_url, tmp_path).ask(BODIES)
        assert len(server.bodies) == 7


def test_a_servers_retry_after_is_waited_for(tmp_path: Path):
    """0.9 seconds; the openai client's own first wait is at most 0.5."""

    def busy(body: dict[str, Any], before: int) -> Any:
        return Broken(429, retry_after=0.9) if before == 0 else echo(body, before)

    with served(busy) as server:
        client(server.base_url, tmp_path).ask(BODIES[:1])
    assert server.times[1] - server.times[0] >= 0.9


@pytest.mark.parametrize(
    ("status", "words"), [(401, "refuses the key in no variable: 401: no"), (404, "has no model judge: 404: no")]
)
def test_what_no_body_can_mend_stops_at_once(status: int, words: str, tmp_path: Path):
    with served(lambda body, before: Broken(status, '{"error": {"message": "no"}}')) as server:
        with pytest.raises(UserError, match=words):
            client(server.base_url, tmp_path, concurrency=1).ask(BODIES)
        assert len(server.bodies) == 1


def test_an_endpoint_that_is_down_is_not_asked_for_all(tmp_path: Path):
    """The first four are answered and kept; then 32 in a row fail, and the other 14 of 50 are not asked."""
    bodies = [{"n": i} for i in range(50)]

    def dying(body: dict[str, Any], before: int) -> Any:
        return {"said": "yes"} if body["n"] < 4 else Broken(503 if body["n"] % 2 else 429)

    with served(dying) as server:
        one = client(server.base_url, tmp_path, retries=0, concurrency=1)
        with pytest.raises(UserError, match=f"{DEAD} requests in a row failed.*503.*14 of 50 are not asked"):
            one.ask(bodies)
        assert len(server.bodies) == 4 + DEAD
        assert client(server.base_url, tmp_path).ask(bodies[:4]) == [{"said": "yes"}] * 4
        assert len(server.bodies) == 4 + DEAD


def test_refused_bodies_do_not_count_as_an_endpoint_that_is_down(tmp_path: Path):
    with served(lambda body, before: Broken(400)) as server:
        replies = client(server.base_url, tmp_path).ask([{"n": i} for i in range(DEAD + 8)])
    assert all(isinstance(reply, Failure) for reply in replies)
    assert len(server.bodies) == DEAD + 8


def test_as_many_are_under_way_as_the_concurrency_allows(tmp_path: Path):
    with served(lambda body, before: Broken(text="{}", slow=0.2)) as server:
        client(server.base_url, tmp_path, concurrency=3).ask([{"n": i} for i in range(9)])
    assert server.peak == 3


def test_the_key_is_the_environments_and_no_other_server_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("MY_KEY", "mine")
    with served(echo) as server:
        client(server.base_url, tmp_path, api_key_env="MY_KEY").ask(BODIES[:1])
        client(server.base_url, tmp_path, api_key_env=None).ask(BODIES[1:2])
    assert server.keys == ["Bearer mine", "Bearer none"]


def test_a_missing_key_or_package_is_told_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "")
    with served(echo) as server:
        keyless = client(server.base_url, tmp_path, api_key_env="MY_KEY")
        for ask in (keyless.check, lambda: keyless.ask(BODIES)):
            with pytest.raises(UserError, match=r"MY_KEY is not set in the environment.*judge\.client\.api_key_env"):
                ask()
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(UserError) as error:
            client(server.base_url, tmp_path).check()
        assert str(error.value) == "an endpoint is asked by an extra: pip install -e '.[endpoint]'"
    assert server.bodies == []


def test_what_was_answered_needs_no_key_and_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with served(echo) as server:
        client(server.base_url, tmp_path).ask(BODIES)
    monkeypatch.delenv("MY_KEY", raising=False)
    assert said(client(server.base_url, tmp_path, api_key_env="MY_KEY").ask(BODIES)) == QUESTIONS


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"base_url": "127.0.0.1:8000"}, "client.base_url=127"), ({"concurrency": 0}, "concurrency is at least 1"),
        ({"retries": -1}, "retries at least 0"), ({"timeout": 0.0}, "timeout more than 0"),
        ({"price_in": -1.0}, "at least 0"), ({"max_cost": -1.0, "price_in": 1.0}, "at least 0"),
        ({"max_cost": 1.0}, "set client.price_in and client.price_out"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_errors(wrong: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        Client(**{"base_url": "http://127.0.0.1:9/v1", "model": "judge", **wrong})


# --- what it costs


def test_the_cost_is_that_of_the_replies_own_tokens(tmp_path: Path):
    """10 tokens in and 5 out a reply: six cost 60·3e-6 + 30·10e-6 = 0.00048."""
    with served(echo) as server:
        one = client(server.base_url, tmp_path, price_in=3.0, price_out=10.0)
        one.ask(BODIES)
        one.ask(BODIES)  # kept replies cost nothing
    assert (one.usage.tokens_in, one.usage.tokens_out) == (60, 30)
    assert one.usage.cost == pytest.approx(0.00048)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": "12", "completion_tokens": "3"}, (12, 3)), ({"prompt_tokens": "many"}, (0, 0)), ([], (0, 0)),
        ([1], (0, 0)), ("12", (0, 0)), ({"prompt_tokens": None, "completion_tokens": 3.0}, (0, 3)), (None, (0, 0)),
    ],
)  # fmt: skip
def test_tokens_that_are_counted_in_another_way_are_read_or_none(usage: Any, tokens: tuple[int, int], tmp_path: Path):
    with served(lambda body, before: {**completion("yes"), "usage": usage}) as server:
        one = client(server.base_url, tmp_path)
        assert said(one.ask(BODIES[:1])) == ["yes"]
    assert (one.usage.tokens_in, one.usage.tokens_out) == tokens


def test_max_cost_stops_it_and_what_came_is_kept(tmp_path: Path):
    """A reply costs 1: at 2 of 3 asked one by one, two are asked; the next process goes on where it was."""
    with served(echo) as server:
        dear = {"price_in": 1e5, "max_cost": 2.0, "concurrency": 1}
        with pytest.raises(UserError, match=r"max_cost=2 is reached: 2.00, with 4 of 6 calls to .* left"):
            client(server.base_url, tmp_path, **dear).ask(BODIES)
        assert len(server.bodies) == 2
        one = client(server.base_url, tmp_path, **dear)
        assert said(one.ask(BODIES[:4])) == QUESTIONS[:4]
        assert (one.usage.cost, len(server.bodies)) == (2.0, 4)


def test_what_is_under_way_at_max_cost_still_comes(tmp_path: Path):
    with served(lambda body, before: Broken(text=json.dumps(echo(body, before)), slow=0.1)) as server:
        one = client(server.base_url, tmp_path, price_in=1e5, max_cost=1.0, concurrency=3)
        with pytest.raises(UserError, match=r"reached: 3\.00"):
            one.ask(BODIES)
        assert len(server.bodies) == 3
        client(server.base_url, tmp_path).ask(BODIES[:3])
        assert len(server.bodies) == 3


def test_max_cost_is_refused_where_the_server_counts_no_tokens(tmp_path: Path):
    with (
        served(lambda body, before: {"rewards": [1.0]}) as server,
        pytest.raises(UserError, match="does not say how many tokens it used"),
    ):
        client(server.base_url, tmp_path, price_in=1.0, max_cost=1.0).ask(BODIES)


def test_the_estimate_counts_calls_tokens_and_cost(tmp_path: Path):
    """Each body is a JSON text of 88 characters, 22 tokens: 5 left are 110 tokens in and 5·200 = 1,000 out."""
    bodies = [{"text": "x" * 68, "n": i} for i in range(6)]
    assert len(json.dumps(bodies[0])) == 88
    with served(lambda body, before: {"said": "yes"}) as server:
        one = client(server.base_url, tmp_path)
        assert one.estimate(bodies, 200) == "6 calls, about 132 tokens in and 1,200 out"
        one.ask(bodies[:1])
        dear = client(server.base_url, tmp_path, price_in=100.0, price_out=1000.0)
        assert dear.estimate([*bodies, bodies[5]], 200) == (
            "6 calls (1 answered before), about 110 tokens in and 1,000 out, at most 1.01"
        )
        assert len(server.bodies) == 1


# --- processes, threads and loops


def test_it_runs_inside_a_running_loop(tmp_path: Path):
    async def notebook(url: str) -> Any:
        return client(url, tmp_path).ask(BODIES)

    with served(echo) as server:
        assert said(asyncio.run(notebook(server.base_url))) == QUESTIONS


def test_threads_may_share_a_client_and_processes_a_cache(tmp_path: Path):
    with served(echo) as server:
        one, other = client(server.base_url, tmp_path), client(server.base_url, tmp_path)
        found: list[Any] = []
        threads = [threading.Thread(target=lambda c=c: found.append(said(c.ask(BODIES)))) for c in (one, other, one)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [QUESTIONS] * 3


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_loses_no_reply(sign: signal.Signals, tmp_path: Path):
    """Four of twenty replies came before it is stopped; the next process asks for the rest alone."""

    stopped = threading.Event()

    def holding(body: dict[str, Any], before: int) -> Any:
        if body["n"] >= 6:
            stopped.wait(60)
        return {"said": "yes"}

    with served(holding) as server:
        program = f"""
            import signal
            from var.utils.http_client import Client
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
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
        one = client(server.base_url, tmp_path)
        assert one.ask([{"n": i} for i in range(20)]) == [{"said": "yes"}] * 20
    assert one.usage.cached >= 4
    assert one.usage.asked == 20 - one.usage.cached


def test_replies_that_cannot_be_kept_are_an_error_with_the_place(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with served(echo) as server:
        with pytest.raises(UserError, match=r"cannot be kept in .*file/replies\.sqlite.*client\.cache"):
            client(server.base_url, tmp_path / "file").ask(BODIES)
        (tmp_path / "replies.sqlite").write_text("no database " * 100)
        with pytest.raises(UserError, match="file is not a database"):
            client(server.base_url, tmp_path).ask(BODIES)
    assert server.bodies == []


def test_no_request_writes_a_line_into_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO), served(echo) as server:
        client(server.base_url, tmp_path).ask(BODIES)
    assert caplog.records == []


def test_the_identity_is_the_address_and_the_model():
    one = Client(base_url="http://127.0.0.1:9/v1/", model="judge", concurrency=3)
    assert one.identity == {"base_url": "http://127.0.0.1:9/v1", "model": "judge"}
