"""The client of endpoints beside a real local server: what fails is retried, what came is kept."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.server import Broken, completion, served
from var.problems import UserError
from var.remote import Client, Failure

BODIES = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(6)]


def client(url: str, folder: Path, **options: Any) -> Client:
    usual = {"timeout": 5.0, "retries": 3, "api_key_env": None}
    return Client(base_url=url, model="judge", cache=str(folder), **{**usual, **options})


def said(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def echo(body: dict[str, Any], before: int) -> Any:
    return completion(body["messages"][0]["content"])


def test_replies_stand_in_order_and_are_never_asked_twice(tmp_path: Path):
    with served(echo) as server:
        asked = client(server.base_url, tmp_path, price_in=1e5, price_out=2e5)
        assert [said(reply) for reply in asked.ask([*BODIES, BODIES[0]])] == [
            *(f"question {i}" for i in range(6)),
            "question 0",
        ]
        assert len(server.bodies) == 6
        assert (asked.usage.tokens_in, asked.usage.tokens_out) == (60, 30)
        assert asked.usage.cost == pytest.approx(60 * 0.1 + 30 * 0.2)
        again = client(server.base_url, tmp_path)
        again.ask(BODIES)
        assert (len(server.bodies), again.usage.asked, again.usage.cached) == (6, 0, 6)
        assert "0 calls of judge (6 answered before)" in again.estimate(BODIES, 100)


@pytest.mark.parametrize(
    "fault",
    [
        Broken(status=429, text="{}"), Broken(status=500, text="{}"), Broken(text='{"choices": ['),
        Broken(text="<html>"), Broken(text='{"choices": []}      ', cut=5), Broken(text="{}", slow=1.0),
        Broken(text="[1]"),
    ],
    ids=["rate limit", "server error", "broken JSON", "HTML", "cut off", "slow", "no object"],
)  # fmt: skip
def test_a_fault_is_asked_again(fault: Broken, tmp_path: Path):
    with served(lambda body, before: fault if before == 0 else echo(body, before)) as server:
        replies = client(server.base_url, tmp_path, timeout=0.7).ask(BODIES)
    assert [said(reply) for reply in replies] == [f"question {i}" for i in range(6)]
    assert len(server.bodies) == 12


def test_what_fails_for_good_is_a_failure_and_asked_again_by_the_next_call(tmp_path: Path):
    def reply(body: dict[str, Any], before: int) -> Any:
        return Broken(status=400, text='{"error": {"message": "too long"}}') if "3" in str(body) else echo(body, before)

    with served(reply) as server:
        asked = client(server.base_url, tmp_path)
        replies = asked.ask(BODIES)
        assert isinstance(replies[3], Failure)
        assert "too long" in replies[3].reason
        assert [isinstance(r, Failure) for r in replies].count(True) == asked.usage.failed == 1
        assert len(server.bodies) == 6  # what the server says is wrong is not asked again
        client(server.base_url, tmp_path).ask(BODIES)
        assert len(server.bodies) == 7


def test_a_reply_that_stays_malformed_is_a_failure_in_bounded_tries(tmp_path: Path):
    with served(lambda body, before: Broken(text="nonsense")) as server:
        (reply,) = client(server.base_url, tmp_path).ask(BODIES[:1])
    assert isinstance(reply, Failure)
    assert len(server.bodies) == 4


def test_a_wrong_key_stops_at_once(tmp_path: Path):
    with (
        served(lambda body, before: Broken(status=401, text="{}")) as server,
        pytest.raises(UserError, match="refuses the key"),
    ):
        client(server.base_url, tmp_path, concurrency=1).ask(BODIES)
    assert len(server.bodies) == 1


def test_a_missing_key_is_told_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="SOME_KEY is not set"):
        client("http://127.0.0.1:9", tmp_path, api_key_env="SOME_KEY").ask(BODIES)


def test_it_stops_above_max_cost_and_keeps_what_came(tmp_path: Path):
    with served(echo) as server:
        asked = client(server.base_url, tmp_path, concurrency=1, price_in=1e5, max_cost=2.0)  # 1 a call
        with pytest.raises(UserError, match="max_cost"):
            asked.ask(BODIES)
        assert len(server.bodies) == 2
        client(server.base_url, tmp_path).ask(BODIES)
        assert len(server.bodies) == 6


def test_it_works_inside_a_running_loop(tmp_path: Path):
    async def notebook(url: str) -> Any:
        return client(url, tmp_path).ask(BODIES[:1])

    with served(echo) as server:
        assert said(asyncio.run(notebook(server.base_url))[0]) == "question 0"


def test_no_more_than_concurrency_are_asked_at_once(tmp_path: Path):
    import threading

    lock, now, most = threading.Lock(), 0, 0

    def reply(body: dict[str, Any], before: int) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        import time

        time.sleep(0.05)
        with lock:
            now -= 1
        return echo(body, before)

    with served(reply) as server:
        client(server.base_url, tmp_path, concurrency=2).ask(BODIES)
    assert most == 2
