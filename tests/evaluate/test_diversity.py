"""Words, repetition and diversity, each counted by hand; and the same policies on as many words."""

import math
import random

import numpy as np
import pytest

from var.evaluate.diversity import among, describe, distinct, ngrams, repetition, words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is: **42**.", ["the", "answer", "is", "42"]),
        ("don't\n\tstop", ["don", "t", "stop"]),
        ("3.14 x_1", ["3", "14", "x", "1"]),
        ("你好，世界！GPT4好", ["你", "好", "世", "界", "gpt4", "好"]),
        ("ありがとう", list("ありがとう")),
        ("हिन्दी में", ["हिन्दी", "में"]),  # its marks do not part a word
        ("한국어 문장", ["한국어", "문장"]),  # Korean writes spaces
        ("Ünï ÉCOLE", ["ünï", "école"]),
        ("  …!? 🙂", []),
    ],
)
def test_words(text, found):
    assert words(text) == found


def test_ngrams_are_as_many_as_fit():
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a"], 2) == []


def test_repetition_by_hand():
    """a b c d a b c d: five runs of four words, abcd twice, so 1 − 4/5. Pairs: seven, ab bc cd twice: 1 − 4/7."""
    assert repetition("a b c d a b c d") == pytest.approx(0.2)
    assert repetition("a b c d a b c d", n=2) == pytest.approx(3 / 7)
    assert repetition("one two three four") == 0
    assert repetition("no " * 100) == pytest.approx(1 - 1 / 97)
    assert math.isnan(repetition("one two three"))


def test_diversity_among_a_prompts_answers_by_hand():
    """{a, b, ab} and {a, c, ac}: 1 of 5 shared, 0.8. With {a, b, ab} again: (0.8 + 0 + 0.8)/3."""
    assert among(["a b", "a c"]) == pytest.approx(0.8)
    assert among(["a b", "A c!", "a, b"]) == pytest.approx(1.6 / 3)
    assert among(["a b", "b a"]) == pytest.approx(0.5)  # {a, b} of {a, b, ab, ba}
    assert among(["", "  "]) == 0
    assert among(["42", ""]) == 1
    assert math.isnan(among(["42"]))


def test_answers_are_described_with_errors_clustered_by_prompt():
    """Repetitions 0.2, 0 | 0, absent: mean of three 0.2/3; diversity 1 − 7/8 of {a b c d, ab bc cd (da)} and 1."""
    texts = [["a b c d a b c d", "a b c d"], ["e f g h", " "]]
    told = describe(texts, np.array([[False, True], [True, True]]))
    assert told["repetition"]["mean"] == pytest.approx(0.2 / 3)
    assert told["diversity"] == pytest.approx({"mean": (1 / 8 + 1) / 2, "se": 7 / 16})
    assert (told["too_short"], told["cut"], told["empty"]) == (1, 0.25, 0.25)


def test_one_answer_a_prompt_has_no_diversity_and_short_ones_no_repetition():
    told = describe([["4"], ["5"]], np.array([[True], [True]]))
    assert told == {
        "repetition": {"mean": None, "se": None}, "too_short": 2, "diversity": None, "cut": 0.0, "empty": 0.0,
    }  # fmt: skip


def test_distinct_by_hand():
    """Three words of each: a a b has 2 of 3 words and both pairs; c c c has 1 of 3 and 1 of 2."""
    told = distinct({"one": [["a a b"]], "other": [["c c c"]]})
    assert told["one"] == {"words": 3, "distinct-1": pytest.approx(2 / 3), "distinct-2": 1.0}
    assert told["other"] == {"words": 3, "distinct-1": pytest.approx(1 / 3), "distinct-2": 0.5}


def test_pairs_of_words_do_not_cross_answers():
    told = distinct({"one": [["a b", "c d"], ["a b", "c d"]]})
    assert told["one"] == {"words": 8, "distinct-1": 0.5, "distinct-2": 0.5}
    assert distinct({"one": [["a"], ["b"]]})["one"] == {"words": 2, "distinct-1": 1.0, "distinct-2": None}


def test_one_that_only_talks_longer_is_as_distinct():
    """Both draw from the same 300 words, one writes five times as much: its own share is half, beside the other it is
    the same."""
    draw = random.Random(0)

    def answers(size: int) -> list[list[str]]:
        return [[" ".join(f"w{draw.randrange(300)}" for _ in range(size)) for _ in range(2)] for _ in range(20)]

    short, long = answers(10), answers(50)
    alone = [distinct({"x": texts})["x"]["distinct-1"] for texts in (short, long)]
    assert alone[0] > 2 * alone[1]
    beside = distinct({"short": short, "long": long})
    assert beside["short"]["words"] == beside["long"]["words"] == 400
    assert beside["long"]["distinct-1"] == pytest.approx(beside["short"]["distinct-1"], abs=0.05)


def test_windows_follow_the_seed_and_reach_every_part_of_an_answer():
    """Ten words beside one: which of the ten is read depends on the seed, and each of them is reached."""
    texts = {"long": [[" ".join("abcdefghij")] * 400], "short": [["z"] * 400]}
    told = distinct(texts)
    assert told == distinct(texts)
    assert told["long"]["distinct-1"] == 10 / 400
    some = {"long": [["a b c"] * 3], "short": [["z"] * 3]}
    assert len({distinct(some, seed=seed)["long"]["distinct-1"] for seed in range(40)}) == 3


def test_policies_must_answer_the_same_places():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        distinct({"one": [["a"], ["b"]], "other": [["a"]]})
