"""Arena-Hard 0.1: five verdicts in two orders, by hand, and against a real server on this machine."""

import json
import math
from functools import partial

import numpy as np
import pytest

from tests.helpers import judges
from tests.helpers.judges import pair
from tests.helpers.servers import Broken, client, completion, shown
from var.evaluate.judges.arena_hard import COUNTS, ArenaHard, bootstrap_mean
from var.evaluate.judges.base import compute_rates
from var.utils.errors import UserError


@pytest.fixture
def play(tmp_path):
    return partial(judges.play, ArenaHard, tmp_path)


def scripted(**games: tuple[str, str]):
    """Return a reply function; games: per question the verdicts with our answer first and second."""

    def reply(body, before):
        ((first, second),) = (both for id, both in games.items() if f"question {id}." in body["messages"][1]["content"])
        return completion(f"My answer would be … so [[{first if shown(body)[0] == '<answer ours>' else second}]]")

    return reply


@pytest.fixture
def found(play):
    verdicts = {"a": ("A>>B", "B>>A"), "b": ("A>>B", "A>B"), "c": ("A=B", "B=A"), "d": ("B>A", "A>B")}
    return play(scripted(**verdicts), [pair(id) for id in "abcd"])[0]


def test_two_games_by_hand(found):
    """a: clearly ours, twice: six ones. b: clearly ours, then slightly theirs: 1, 1, 1, 0. c: equal twice. d: slightly
    theirs, twice. All counts: 6 + 3 + 1 + 0 of 6 + 4 + 2 + 2: 10/14. A pair's score is the mean of its own."""
    assert found.scores.tolist() == [1.0, 0.75, 0.5, 0.0]
    assert found.outcomes == ["win", "win", "tie", "loss"]
    assert found.facts["win_rate"] == pytest.approx(1000 / 14)
    assert found.facts["inconsistent"] == 1  # b
    assert found.facts["first_shown_wins"] == pytest.approx(4 / 6)  # a's first, b's both, d's second
    assert [game["verdict"] for game in found.games[:3]] == ["A>>B", "B>>A", "A>>B"]
    overall = compute_rates(found, [pair(id) for id in "abcd"])["all"]
    assert (overall["win_rate"], overall["mean_score"]) == (pytest.approx(1000 / 14), 0.5625)
    sums = 6 - 60 / 14, 3 - 40 / 14, 1 - 20 / 14, -20 / 14
    assert overall["se_prompts"] == pytest.approx(100 * math.sqrt(4 / 3 * sum(s**2 for s in sums)) / 14)
    json.dumps([found.facts, found.games], allow_nan=False)


def test_quantiles_are_those_of_all_counts(found):
    counts = np.array([1.0] * 6 + [1.0, 1.0, 1.0, 0.0] + [0.5, 0.5] + [0.0, 0.0])
    low, high = bootstrap_mean(counts, 100, 0)
    assert (found.facts["win_rate_5"], found.facts["win_rate_95"]) == (100 * low, 100 * high)
    assert 40 < 100 * low < 1000 / 14 < 100 * high < 95


def test_bootstrap_has_the_spread_of_a_mean():
    """The mean of 200 zeros and 200 ones has sd 1/40, so the quantiles are ½ ∓ 1.645/40. The seed sets the draws."""
    counts = np.tile([0.0, 1.0], 200)
    low, high = bootstrap_mean(counts, 4000, 0)
    assert (low, high) == (pytest.approx(0.5 - 1.645 / 40, abs=0.004), pytest.approx(0.5 + 1.645 / 40, abs=0.004))
    assert bootstrap_mean(counts, 50, 1) == bootstrap_mean(counts, 50, 1) != bootstrap_mean(counts, 50, 2)
    assert bootstrap_mean(np.ones(7), 10, 0) == (1.0, 1.0)


def test_labels_are_symmetric():
    """A>B and B<A mean the same; A>B and B>A are opposites."""
    turned = str.maketrans("AB<>", "BA<>")
    mirrored = str.maketrans("<>", "><")
    for label, counts in COUNTS.items():
        assert [1 - count for count in counts] == COUNTS[label.translate(turned)]
        assert [1 - count for count in counts] == COUNTS[label.translate(mirrored)]
    assert sorted(map(len, COUNTS.values())) == [1] * 6 + [3] * 4


def test_verdict_after_the_reasoning_counts(play):
    def reply(body, before):
        verdict = "[[A>>B]]" if shown(body)[0] == "<answer ours>" else "[[B>A]]"
        return completion(f"<think>[[A=B]] at first, [[B>>A]] then</think>{verdict}")

    found = play(reply, [pair("a")])[0]
    assert (found.scores.tolist(), found.counts) == ([1.0], [[1.0] * 4])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[[A>>>B]]", "no verdict"),
        ("[[A>B]] [[A>>B]]", "several verdicts"),
        ("A>B", "no verdict"),
        ("[[A]]", "no verdict"),
    ],
)
def test_game_without_one_known_label_is_an_error(play, text, kind):
    """One game of `a` is in error, so the pair is, though its other game has a verdict; b is not affected."""

    def reply(body, before):
        odd = "question a." in str(body) and shown(body)[0] == "<answer ours>"
        return completion(text if odd else "[[A>B]]" if shown(body)[0] == "<answer ours>" else "[[B>A]]")

    found = play(reply, [pair("a"), pair("b")], max_errors=0.5)[0]
    assert found.outcomes == ["error", "win"]
    assert math.isnan(found.scores[0])
    assert found.facts["errors"] == {kind: 1}
    assert found.facts["win_rate"] == found.facts["win_rate_5"] == 100.0


def test_above_max_errors_there_is_no_win_rate(play):
    found = play(lambda body, before: Broken(400, text='{"error": {"message": "no such model"}}'), [pair("a")])[0]
    assert found.facts["errors"] == {"failed": 2}
    assert "no such model" in found.facts["first_failure"]
    assert found.facts["reason"].startswith("1 of 1 pairs are in error")
    assert found.facts["win_rate"] is found.facts["win_rate_5"] is found.facts["win_rate_95"] is None


def test_request_follows_the_protocol(play):
    _, bodies = play(scripted(a=("A>B", "B>A")), [pair("a")])
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"]) == (0, 4096)
    system = bodies[0]["messages"][0]["content"]
    assert all(f"[[{label}]]" in system for label in ("A>>B", "A>B", "A=B", "B>A", "B>>A"))
    assert sorted(map(shown, bodies)) == [
        ("<answer ours>", "<answer theirs>"), ("<answer theirs>", "<answer ours>"),
    ]  # fmt: skip


def test_invalid_settings_are_rejected(tmp_path):
    for wrong in ({"max_errors": -0.1}, {"bootstraps": 0}):
        with pytest.raises(UserError, match=r"judge\."):
            ArenaHard(client=client("http://127.0.0.1:1/v1", tmp_path), **wrong)
