"""MT-Bench's pairs against a real server on this machine: verdicts, orders, failures, and cached replies."""

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest

from tests.helpers import judges
from tests.helpers.judges import ignore, pair
from tests.helpers.servers import Broken, client, completion, served, shown
from var.evaluate.judges.base import compute_rates, explain_missing_rate
from var.evaluate.judges.mtbench import MTBench, combine_games
from var.utils.errors import UserError


def quality(id: str, answer: str = "good", opponent: str = "bad", **fields):
    """Return a pair of answers of these qualities."""
    return pair(id, answer=f"<answer {answer}>", opponent=f"<answer {opponent}>", **fields)


@pytest.fixture
def mtbench(tmp_path):
    def build(url: str = "http://127.0.0.1:1/v1", options: dict | None = None, **settings) -> MTBench:
        of_client = {"retries": 3, "concurrency": 8, **(options or {})}
        return MTBench(client=client(url, tmp_path, **of_client), **settings)

    return build


@pytest.fixture
def play(tmp_path):
    return partial(judges.play, MTBench, tmp_path)


def fair(body, before=0):
    """Prefer the better answer by its name, in either order."""
    order = {"<answer bad>": 0, "<answer fair>": 1, "<answer good>": 2}
    a, b = (order[answer] for answer in shown(body))
    return completion("They differ. " + ("[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"))


# --- the rule


@pytest.mark.parametrize(
    ("first", "second", "paper", "mtbench_rule"),
    [
        ("win", "win", "win", "win"),
        ("win", "tie", "win", "tie"),
        ("tie", "tie", "tie", "tie"),
        ("win", "loss", "tie", "tie"),
        ("tie", "loss", "loss", "tie"),
        ("loss", "loss", "loss", "loss"),
    ],
)
def test_two_games_make_an_outcome_by_either_rule(first, second, paper, mtbench_rule):
    for games in ([first, second], [second, first]):
        assert combine_games(games, "paper") == paper
        assert combine_games(games, "mtbench") == mtbench_rule


@pytest.mark.parametrize("rule", ["paper", "mtbench"])
def test_one_game_is_the_outcome_and_one_error_is_an_error(rule):
    outcomes = ["win", "tie", "loss", "error"]
    assert [combine_games([one], rule) for one in outcomes] == outcomes
    for other in outcomes:
        assert combine_games(["error", other], rule) == combine_games([other, "error"], rule) == "error"


@pytest.mark.parametrize(("first", "second"), itertools.product(("win", "tie", "loss"), repeat=2))
def test_rule_is_symmetric(first, second):
    other = {"win": "loss", "tie": "tie", "loss": "win"}
    for rule in ("paper", "mtbench"):
        assert combine_games([other[first], other[second]], rule) == other[combine_games([first, second], rule)]


# --- requests and replies


def test_both_orders_of_each_pair_are_judged(mtbench):
    pairs = [
        quality("a"), quality("b", "bad", "good"), quality("c", "fair", "fair"),
        quality("d", "good", "fair", subset="h", seed=3),
    ]  # fmt: skip
    done = []
    with served(fair) as server:
        judge = mtbench(server.base_url)
        judge.check()
        found = judge(pairs, done.append)
    assert found.outcomes == ["win", "loss", "tie", "win"]
    assert found.scores.tolist() == [1.0, 0.0, 0.5, 1.0]
    assert sum(done) == 4  # pairs, not games
    assert (found.facts["games"], found.facts["inconsistent"], found.facts["errors"]) == (8, 0, {})
    assert found.facts["first_shown_wins"] == 0.5
    game = found.games[7]
    assert game == {
        "id": "d", "subset": "h", "seed": 3, "order": "opponent first", "prompt": game["prompt"], "verdict": "B",
        "error": None, "text": "They differ. [[B]]", "usage": completion("")["usage"],
    }  # fmt: skip
    assert len({one["prompt"] for one in found.games}) == 7  # c's two orders have the same prompt
    assert found.facts["usage"]["tokens_in"] == 70
    json.dumps([found.facts, found.games], allow_nan=False)


def test_request_follows_the_protocol(play):
    _, bodies = play(fair, [quality("a")])
    first = min(bodies, key=lambda body: shown(body)[0] != "<answer good>")
    assert {key: first[key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "judge", "temperature": 0, "max_tokens": 2048,
    }  # fmt: skip
    assert set(first) == {"model", "temperature", "max_tokens", "messages"}
    system, user = first["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert all(f"[[{letter}]]" in system["content"] for letter in "ABC")
    assert user["content"].index("question a") < user["content"].index("good") < user["content"].index("bad")


def test_request_fields_can_be_replaced(play):
    request = {"temperature": None, "max_tokens": None, "max_completion_tokens": 9}
    _, bodies = play(fair, [quality("a")], request=request)
    assert set(bodies[0]) == {"model", "max_completion_tokens", "messages"}


@pytest.mark.parametrize(
    "think",
    [
        lambda verdict: completion(f"<think>[[A]]? No, [[B]]? Or [[C]]</think>\n\n{verdict}"),
        lambda verdict: completion(f"[[A]] or [[B]]</think>{verdict}"),
        lambda verdict: completion(verdict, reasoning={"reasoning_content": "[[A]] or [[B]]"}),
    ],
)
def test_verdict_after_the_reasoning_counts(play, think):
    found = play(lambda body, before: think(fair(body)["choices"][0]["message"]["content"]), [quality("a")])[0]
    assert (found.outcomes, found.facts["errors"]) == (["win"], {})


@pytest.mark.parametrize(
    "reply",
    [
        completion("<think>They differ. [[A]]", finish="length"),
        completion(None, finish="length", reasoning={"reasoning_content": "They differ. [[A]]"}),
    ],
)
def test_reply_that_ends_inside_its_reasoning_has_no_verdict(mtbench, reply):
    """The second judgement reads it from the cache."""
    with served(lambda body, before: reply) as server:
        for _ in range(2):
            found = mtbench(server.base_url)([quality("a")], ignore)
            assert (found.outcomes, found.facts["errors"]) == (["error"], {"unfinished reasoning": 2})
        assert len(server.bodies) == 2
    reason = explain_missing_rate(compute_rates(found, [quality("a")])["all"], found.facts)
    assert "Games in error: 2 unfinished reasoning" in reason
    assert "Raise judge.request.max_tokens" in reason


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (completion("A is better."), "no verdict"),
        (completion("[[A]], or rather [[B]]"), "several verdicts"),
        (completion("[[D]] [A] [[a]]"), "no verdict"),
        (completion("I would say", finish="length"), "truncated"),
    ],
)
def test_reply_without_one_verdict_is_an_error(play, reply, kind):
    found = play(lambda body, before: reply, [quality("a")])[0]
    assert found.outcomes == ["error"]
    assert math.isnan(found.scores[0])
    assert found.facts["errors"] == {kind: 2}
    assert found.facts["reason"].startswith("1 of 1 pairs are in error")
    assert compute_rates(found, [quality("a")])["all"]["win_rate"] is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion(None), "no text in the reply {'choices': [{'index': 0,"),
        ({"choices": []}, "no text in the reply {'choices': []}"),
        ({"detail": "overloaded"}, "no text in the reply {'detail': 'overloaded'}"),
        ({"error": "busy"}, "busy"),
    ],
)
def test_reply_without_text_fails_and_is_asked_again(mtbench, reply, reason):
    sick = True
    with served(lambda body, before: reply if sick else completion("[[C]]")) as server:
        found = mtbench(server.base_url, {"retries": 0})([quality("a")], ignore)
        assert (found.outcomes, found.facts["errors"]) == (["error"], {"failed": 2})
        assert found.facts["first_failure"].startswith(reason)
        sick = False
        assert mtbench(server.base_url)([quality("a")], ignore).outcomes == ["tie"]
        assert len(server.bodies) == 4


def test_lone_surrogate_in_a_reply_can_be_written(play):
    found = play(lambda body, before: completion("[[C]] \ud83d"), [quality("a")])[0]
    assert [game["text"] for game in found.games] == ["[[C]] ?"] * 2
    broken = Broken(400, text='{"detail": "\\ud83d"}')
    found = play(lambda body, before: broken, [quality("a")], options={"model": "other"})[0]
    assert found.facts["first_failure"] == "400: ?"


def test_repeated_verdict_counts_once(play):
    found = play(lambda body, before: completion("[[C]] ... so: [[C]]", finish="length"), [quality("a")])[0]
    assert found.outcomes == ["tie"]


def test_one_game_in_error_makes_the_pair_an_error(play):
    def half(body, before):
        return fair(body) if shown(body)[0] == "<answer good>" else completion("no idea")

    found = play(half, [quality("a"), quality("b")], max_errors=0.5)[0]
    assert found.outcomes == ["error", "error"]
    assert found.facts["errors"] == {"no verdict": 2}


def test_position_bias_gives_ties_and_is_reported(play):
    pairs = [quality(str(i)) for i in range(10)]
    found = play(lambda body, before: completion("[[A]]"), pairs)[0]
    assert found.outcomes == ["tie"] * 10
    assert (found.facts["inconsistent"], found.facts["first_shown_wins"]) == (10, 1.0)


def test_rule_of_the_paper_counts_win_and_tie_as_win(play):
    def tie_in_the_second_order(body, before):
        return completion("[[A]]" if shown(body)[0] == "<answer good>" else "[[C]]")

    for rule, expected in (("paper", "win"), ("mtbench", "tie")):
        found = play(tie_in_the_second_order, [quality("a")], rule=rule)[0]
        assert found.outcomes == [expected]
        assert found.facts["inconsistent"] == 1


def test_random_order_follows_from_the_content(mtbench):
    pairs = [quality(str(i)) for i in range(40)] + [quality("0", seed=1)]
    with served(fair) as server:
        found = mtbench(server.base_url, orders="random")(pairs, ignore)
        again = mtbench(server.base_url, orders="random")(pairs[::-1], ignore)
    assert found.outcomes == ["win"] * 41
    orders = [game["order"] for game in found.games]
    assert 10 < orders.count("answer first") < 30
    assert [game["order"] for game in again.games][::-1] == orders
    assert orders[0] == orders[40]
    assert len(server.bodies) == 40  # the other seed has the same answer, so it is the same request


def test_own_template_is_used_and_its_hash_stored(play, mtbench, tmp_path):
    (tmp_path / "mine.txt").write_text("{question}: {answer_a} or {answer_b}? Say [[A]], [[B]] or [[C]].")
    template = str(tmp_path / "mine.txt")
    found, bodies = play(fair, [quality("a")], template=template)
    assert found.outcomes == ["win"]
    assert [message["role"] for message in bodies[0]["messages"]] == ["user"]
    assert (
        found.facts["template"]
        == mtbench(template=template).fingerprint["template"]
        != mtbench().fingerprint["template"]
    )


def test_invalid_settings_are_rejected(mtbench):
    for wrong in ({"max_errors": 1.5}, {"rule": "best"}, {"orders": "first"}):
        with pytest.raises(UserError, match=r"judge\."):
            mtbench(**wrong)
    with pytest.raises(UserError, match=r"none\.txt cannot be used"):
        mtbench(template="none.txt").check()


def test_fingerprint_has_every_setting_of_a_verdict(mtbench):
    def fingerprint(**settings):
        return json.dumps(mtbench(**settings).fingerprint, sort_keys=True)

    assert len({fingerprint(), fingerprint(rule="mtbench"), fingerprint(orders="random"), fingerprint(request={})}) == 4
    assert fingerprint() == fingerprint(max_errors=0.5)


# --- a server that fails


def test_failed_game_is_an_error_with_its_reason(play):
    def never(body, before):
        return Broken(500, text='{"error": {"message": "out of memory"}}') if "question b" in str(body) else fair(body)

    pairs = [quality("a"), quality("b")]
    found = play(never, pairs, options={"retries": 1}, max_errors=0.5)[0]
    assert found.outcomes == ["win", "error"]
    assert found.facts["errors"] == {"failed": 2}
    assert found.facts["first_failure"]
    assert found.games[2]["text"] == found.facts["first_failure"]
    assert compute_rates(found, pairs)["all"]["win_rate"] == 100.0


def test_second_run_sends_no_requests(mtbench):
    pairs = [quality(str(i), "good" if i % 3 else "bad", "fair") for i in range(12)]
    with served(fair) as server:
        judge = mtbench(server.base_url)
        assert judge.describe(pairs).startswith("24 calls")
        first = judge(pairs, ignore)
        assert len(server.bodies) == 24
        second = mtbench(server.base_url)
        assert "24 cached" in second.describe(pairs)
        done = []
        again = second(pairs, done.append)
        assert second(pairs, ignore).facts["usage"]["cached"] == again.facts["usage"]["cached"] == 24
        assert len(server.bodies) == 24
    assert sum(done) == 12
    assert again.outcomes == first.outcomes
    np.testing.assert_equal(again.scores, first.scores)
    assert again.games == first.games  # including usage
