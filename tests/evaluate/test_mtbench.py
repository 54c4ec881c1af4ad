"""MT-Bench's pairs against a real server on this machine: verdicts, orders, failures, and runs that go on."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import numpy as np
import pytest

from tests.helpers.servers import Broken, completion, served, shown
from tests.helpers.servers import client as plain
from var.evaluate.judges.base import Pair, rates
from var.evaluate.judges.mtbench import TEMPLATE, MTBench
from var.utils.errors import UserError


def pair(id: str, answer: str = "<answer good>", opponent: str = "<answer bad>", **rest) -> Pair:
    return Pair(id, rest.pop("subset", None), rest.pop("seed", 0),
                ({"role": "user", "content": f"question {id}"},), answer, opponent, **rest)  # fmt: skip


@pytest.fixture
def client(tmp_path):
    return partial(plain, folder=tmp_path, retries=3, concurrency=8)


def fair(body, before=0):
    """The better one by its name, whatever its place."""
    order = {"<answer bad>": 0, "<answer fair>": 1, "<answer good>": 2}
    a, b = (order[one] for one in shown(body))
    return completion("They differ. " + ("[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"))


def nothing(done: int) -> None: ...


# --- what is asked and read


def test_a_fair_judge_is_heard_in_both_orders(client):
    pairs = [
        pair("a"), pair("b", "<answer bad>", "<answer good>"), pair("c", "<answer fair>", "<answer fair>"),
        pair("d", "<answer good>", "<answer fair>", subset="h", seed=3),
    ]  # fmt: skip
    done = []
    with served(fair) as server:
        judge = MTBench(client=client(server.base_url))
        judge.check()
        found = judge(pairs, done.append)
    assert found.outcomes == ["win", "loss", "tie", "win"]
    assert found.scores.tolist() == [1.0, 0.0, 0.5, 1.0]
    assert sum(done) == 4  # pairs, though eight games
    assert (found.facts["games"], found.facts["inconsistent"], found.facts["errors"]) == (8, 0, {})
    assert found.facts["first_shown_wins"] == 0.5
    game = found.games[7]
    assert game == {
        "id": "d", "subset": "h", "seed": 3, "order": "opponent first", "prompt": game["prompt"], "verdict": "B",
        "error": None, "text": "They differ. [[B]]", "usage": completion("")["usage"],
    }  # fmt: skip
    assert len({one["prompt"] for one in found.games}) == 7  # c's two orders are one prompt
    assert found.facts["usage"]["tokens_in"] == 70
    json.dumps([found.facts, found.games], allow_nan=False)


def test_the_request_is_the_protocols(client):
    with served(fair) as server:
        MTBench(client=client(server.base_url))([pair("a")], nothing)
    first = min(server.bodies, key=lambda body: shown(body)[0] != "<answer good>")
    assert {key: first[key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "judge", "temperature": 0, "max_tokens": 2048,
    }  # fmt: skip
    assert set(first) == {"model", "temperature", "max_tokens", "messages"}
    system, user = first["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert all(f"[[{letter}]]" in system["content"] for letter in "ABC")
    assert user["content"].index("question a") < user["content"].index("good") < user["content"].index("bad")


def test_a_request_field_can_be_left_out_and_another_put_in(client):
    request = {"temperature": None, "max_tokens": None, "max_completion_tokens": 9}
    with served(fair) as server:
        MTBench(client=client(server.base_url), request=request)([pair("a")], nothing)
    assert set(server.bodies[0]) == {"model", "max_completion_tokens", "messages"}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (completion("A is better."), "no verdict"),
        (completion("[[A]], or rather [[B]]"), "several verdicts"),
        (completion("[[D]] [A] [[a]]"), "no verdict"),
        (completion("I would say", finish="length"), "cut off"),
    ],
)
def test_a_reply_without_one_kind_of_verdict_is_an_error_and_never_a_tie(client, reply, kind):
    with served(lambda body, before: reply) as server:
        found = MTBench(client=client(server.base_url))([pair("a")], nothing)
    assert found.outcomes == ["error"]
    assert math.isnan(found.scores[0])
    assert found.facts["errors"] == {kind: 2}
    assert found.facts["reason"].startswith("1 of 1 pairs are in error")
    assert rates(found, [pair("a")])["all"]["win_rate"] is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion(None), "no text in the reply {'choices': [{'index': 0,"),
        ({"choices": []}, "no text in the reply {'choices': []}"),
        ({"detail": "overloaded"}, "no text in the reply {'detail': 'overloaded'}"),
        ({"error": "busy"}, "busy"),
    ],
)
def test_a_reply_without_words_is_a_failure_and_asked_again_by_the_next_run(client, reply, reason):
    sick = True
    with served(lambda body, before: reply if sick else completion("[[C]]")) as server:
        found = MTBench(client=client(server.base_url, retries=0))([pair("a")], nothing)
        assert (found.outcomes, found.facts["errors"]) == (["error"], {"failed": 2})
        assert found.facts["first_failure"].startswith(reason)
        sick = False
        assert MTBench(client=client(server.base_url))([pair("a")], nothing).outcomes == ["tie"]
        assert len(server.bodies) == 4


def test_half_a_surrogate_pair_in_a_reply_can_be_written(client):
    with served(lambda body, before: completion("[[C]] \ud83d")) as server:
        found = MTBench(client=client(server.base_url))([pair("a")], nothing)
    assert [game["text"] for game in found.games] == ["[[C]] ?"] * 2
    with served(lambda body, before: Broken(400, text='{"detail": "\\ud83d"}')) as server:
        found = MTBench(client=client(server.base_url, model="other"))([pair("a")], nothing)
    assert found.facts["first_failure"] == "400: ?"


def test_the_same_verdict_twice_is_one_verdict(client):
    with served(lambda body, before: completion("[[C]] ... so: [[C]]", finish="length")) as server:
        found = MTBench(client=client(server.base_url))([pair("a")], nothing)
    assert found.outcomes == ["tie"]


def test_one_game_in_error_makes_the_pair_an_error(client):
    def half(body, before):
        return fair(body) if shown(body)[0] == "<answer good>" else completion("no idea")

    with served(half) as server:
        found = MTBench(client=client(server.base_url), max_errors=0.5)([pair("a"), pair("b")], nothing)
    assert found.outcomes == ["error", "error"]
    assert found.facts["errors"] == {"no verdict": 2}


def test_a_judge_that_always_prefers_the_first_gives_ties_and_is_seen(client):
    pairs = [pair(str(i)) for i in range(10)]
    with served(lambda body, before: completion("[[A]]")) as server:
        found = MTBench(client=client(server.base_url))(pairs, nothing)
    assert found.outcomes == ["tie"] * 10
    assert (found.facts["inconsistent"], found.facts["first_shown_wins"]) == (10, 1.0)


def test_a_win_and_a_tie_are_a_win_by_the_papers_rule_only(client):
    def tie_in_the_second_order(body, before):
        return completion("[[A]]" if shown(body)[0] == "<answer good>" else "[[C]]")

    with served(tie_in_the_second_order) as server:
        for rule, expected in (("paper", "win"), ("mtbench", "tie")):
            found = MTBench(client=client(server.base_url), rule=rule)([pair("a")], nothing)
            assert found.outcomes == [expected]
            assert found.facts["inconsistent"] == 1


def test_random_order_is_one_game_whose_order_follows_from_the_content(client):
    pairs = [pair(str(i)) for i in range(40)] + [pair("0", seed=1)]
    with served(fair) as server:
        found = MTBench(client=client(server.base_url), orders="random")(pairs, nothing)
        again = MTBench(client=client(server.base_url), orders="random")(pairs[::-1], nothing)
    assert found.outcomes == ["win"] * 41
    orders = [game["order"] for game in found.games]
    assert 10 < orders.count("answer first") < 30
    assert [game["order"] for game in again.games][::-1] == orders
    assert orders[0] == orders[40]
    assert len(server.bodies) == 40  # the other seed's answer is the same text, so it is the same question


def test_a_conversation_and_braces_reach_the_judge_as_they_are(client):
    prompt = ({"role": "system", "content": "Be brief {answer_a}"}, {"role": "user", "content": "Hi"},
              {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"})  # fmt: skip
    odd = Pair("a", None, 0, prompt, "<answer {question} {answer_b} {0} \\1>", "<answer bad>")
    with served(lambda body, before: completion("[[C]]")) as server:
        MTBench(client=client(server.base_url))([odd], nothing)
    text = server.bodies[0]["messages"][1]["content"]
    assert "[System]\nBe brief {answer_a}\n\n[User]\nHi\n\n[Assistant]\nHello\n\n[User]\nBye" in text
    assert "<answer {question} {answer_b} {0} \\1>" in text


def test_a_template_of_ones_own_is_asked_and_its_hash_is_a_fact(client, tmp_path):
    (tmp_path / "mine.txt").write_text("{question}: {answer_a} or {answer_b}? Say [[A]], [[B]] or [[C]].")
    with served(fair) as server:
        mine = MTBench(client=client(server.base_url), template=str(tmp_path / "mine.txt"))
        mine.check()
        found = mine([pair("a")], nothing)
    assert found.outcomes == ["win"]
    assert [message["role"] for message in server.bodies[0]["messages"]] == ["user"]
    assert found.facts["template"] == mine.identity["template"] != TEMPLATE.hash
    assert MTBench(client=mine.client).identity["template"] == TEMPLATE.hash


def test_settings_that_cannot_be_are_refused(client):
    for wrong in ({"max_errors": 1.5}, {"rule": "best"}, {"orders": "first"}):
        with pytest.raises(UserError, match=r"judge\."):
            MTBench(client=client("http://127.0.0.1:1/v1"), **wrong)
    with pytest.raises(UserError, match=r"none\.txt cannot be used"):
        MTBench(client=client("http://127.0.0.1:1/v1"), template="none.txt").check()


def test_the_identity_changes_with_what_a_verdict_depends_on(client):
    def identity(**rest):
        return json.dumps(MTBench(client=client("http://127.0.0.1:1/v1"), **rest).identity, sort_keys=True)

    assert len({identity(), identity(rule="mtbench"), identity(orders="random"), identity(request={})}) == 4
    assert identity() == identity(max_errors=0.5)


# --- a server that fails


def test_a_server_that_is_slow_busy_and_broken_is_asked_until_it_answers(client):
    whole = json.dumps(completion("They differ. [[A]]"))
    first = [Broken(429), Broken(500), Broken(text="{"), Broken(text="<html>"), Broken(text=whole, cut=20), Broken(503)]

    def at_first(body, before):
        number = int(re.search(r"question (\d+)", body["messages"][1]["content"])[1])
        if before == 0 and number < len(first):
            return first[number]
        return Broken(text=json.dumps(fair(body)), slow=0.2) if number == 6 else fair(body)

    pairs = [pair(str(i)) for i in range(8)]
    with served(at_first) as server:
        found = MTBench(client=client(server.base_url))(pairs, nothing)
    assert found.outcomes == ["win"] * 8
    assert len(server.bodies) == 16 + 2 * len(first)


def test_a_game_that_fails_after_all_retries_is_an_error_with_the_reason(client):
    def never(body, before):
        return Broken(500, text='{"error": {"message": "out of memory"}}') if "question b" in str(body) else fair(body)

    pairs = [pair("a"), pair("b")]
    with served(never) as server:
        found = MTBench(client=client(server.base_url, retries=1), max_errors=0.5)(pairs, nothing)
    assert found.outcomes == ["win", "error"]
    assert found.facts["errors"] == {"failed": 2}
    assert found.facts["first_failure"]
    assert found.games[2]["text"] == found.facts["first_failure"]
    assert rates(found, pairs)["all"]["win_rate"] == 100.0


def test_a_second_run_asks_nothing_and_says_the_same(client):
    pairs = [pair(str(i), "<answer good>" if i % 3 else "<answer bad>", "<answer fair>") for i in range(12)]
    with served(fair) as server:
        judge = MTBench(client=client(server.base_url))
        assert judge.describe(pairs).startswith("24 calls")
        first = judge(pairs, nothing)
        assert len(server.bodies) == 24
        second = MTBench(client=client(server.base_url))
        assert "24 cached" in second.describe(pairs)
        done = []
        again = second(pairs, done.append)
        assert second(pairs, nothing).facts["usage"]["cached"] == again.facts["usage"]["cached"] == 24
        assert len(server.bodies) == 24
    assert sum(done) == 12
    assert again.outcomes == first.outcomes
    np.testing.assert_equal(again.scores, first.scores)
    assert again.games == first.games  # usage too: a table can be made again without the server


def test_a_killed_run_goes_on_where_it_was(client, tmp_path):
    """A process of its own is killed when six of its replies are kept; the next one asks only for the rest."""

    def slowly(body, before):
        return Broken(text=json.dumps(fair(body)), slow=0.05)

    with served(slowly) as server:
        program = f"""
            from var.evaluate.judges.base import Pair
            from var.evaluate.judges.mtbench import MTBench
            from var.utils.http_client import Client
            pairs = [Pair(str(i), None, 0, ({{"role": "user", "content": f"question {{i}}"}},),
                          "<answer good>", "<answer bad>") for i in range(20)]
            client = Client(base_url={server.base_url!r}, model="judge", api_key_env=None, retries=3, timeout=20.0,
                            concurrency=2, cache={str(tmp_path)!r})
            MTBench(client=client)(pairs, lambda done: print(done, flush=True))
        """
        code = textwrap.dedent(program)
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(3):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.2)  # what was under way reaches the server and nobody else
        before = len(server.bodies)
        assert before < 40
        pairs = [pair(str(i)) for i in range(20)]
        judge = MTBench(client=client(server.base_url))
        found = judge(pairs, nothing)
        assert found.outcomes == ["win"] * 20
        assert found.facts["usage"]["cached"] >= 6
        assert len(server.bodies) - before == 40 - found.facts["usage"]["cached"]
