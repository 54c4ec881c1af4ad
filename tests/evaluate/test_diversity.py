"""Words, repetition and diversity, counted by hand, and policies compared on equally many words."""

import math
import random

import numpy as np
import pytest

from var.evaluate.diversity import (
    describe_texts,
    list_ngrams,
    measure_distinct,
    measure_diversity,
    measure_repetition,
    split_words,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The answer is: **42**.", ["the", "answer", "is", "42"]),
        ("don't\n\tstop", ["don", "t", "stop"]),
        ("3.14 x_1", ["3", "14", "x", "1"]),
        ("你好，世界！GPT4好", ["你", "好", "世", "界", "gpt4", "好"]),
        ("ありがとう", list("ありがとう")),
        ("हिन्दी में", ["हिन्दी", "में"]),  # its marks do not separate words
        ("한국어 문장", ["한국어", "문장"]),  # Korean has spaces
        ("Ünï ÉCOLE", ["ünï", "école"]),
        ("  …!? 🙂", []),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


def test_ngrams():
    assert list_ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert list_ngrams(["a"], 2) == []


def test_repetition_by_hand():
    """a b c d a b c d: five runs of four words, abcd twice, so 1 − 4/5. Pairs: seven, ab bc cd twice: 1 − 4/7."""
    assert measure_repetition("a b c d a b c d") == pytest.approx(0.2)
    assert measure_repetition("a b c d a b c d", n=2) == pytest.approx(3 / 7)
    assert measure_repetition("one two three four") == 0
    assert measure_repetition("no " * 100) == pytest.approx(1 - 1 / 97)
    assert math.isnan(measure_repetition("one two three"))


def test_diversity_by_hand():
    """{a, b, ab} and {a, c, ac}: 1 of 5 shared, 0.8. With {a, b, ab} again: (0.8 + 0 + 0.8)/3."""
    assert measure_diversity(["a b", "a c"]) == pytest.approx(0.8)
    assert measure_diversity(["a b", "A c!", "a, b"]) == pytest.approx(1.6 / 3)
    assert measure_diversity(["a b", "b a"]) == pytest.approx(0.5)  # {a, b} of {a, b, ab, ba}
    assert measure_diversity(["", "  "]) == 0
    assert measure_diversity(["42", ""]) == 1
    assert math.isnan(measure_diversity(["42"]))


def test_answers_are_described_with_clustered_errors():
    """Repetitions 0.2, 0 | 0, none: mean of three 0.2/3; diversity 1 − 7/8 of {a b c d, ab bc cd (da)} and 1."""
    texts = [["a b c d a b c d", "a b c d"], ["e f g h", " "]]
    result = describe_texts(texts, np.array([[False, True], [True, True]]))
    assert result["repetition"]["mean"] == pytest.approx(0.2 / 3)
    assert result["diversity"] == pytest.approx({"mean": (1 / 8 + 1) / 2, "se": 7 / 16})
    assert (result["too_short"], result["truncated"], result["empty"]) == (1, 0.25, 0.25)


def test_single_short_answers_have_no_diversity_and_no_repetition():
    assert describe_texts([["4"], ["5"]], np.array([[True], [True]])) == {
        "repetition": {"mean": None, "se": None}, "too_short": 2, "diversity": None, "truncated": 0.0, "empty": 0.0,
    }  # fmt: skip


def test_distinct_by_hand():
    """Three words each: a a b has 2 of 3 words and both pairs; c c c has 1 of 3 and 1 of 2."""
    result = measure_distinct({"one": [["a a b"]], "other": [["c c c"]]})
    assert result["one"] == {"words": 3, "distinct-1": pytest.approx(2 / 3), "distinct-2": 1.0}
    assert result["other"] == {"words": 3, "distinct-1": pytest.approx(1 / 3), "distinct-2": 0.5}


@pytest.mark.parametrize(
    ("texts", "words", "pairs"), [([["a b", "c d"], ["a b", "c d"]], 8, 0.5), ([["a"], ["b"]], 2, None)]
)
def test_word_pairs_do_not_cross_answers(texts, words, pairs):
    expected = {"words": words, "distinct-1": 0.5 if pairs else 1.0, "distinct-2": pairs}
    assert measure_distinct({"one": texts})["one"] == expected


def test_longer_answers_from_the_same_words_are_as_distinct():
    """Both draw from the same 300 words, one writes five times as much. Alone its fraction is half; compared on equally
    many words it is the same."""
    draw = random.Random(0)

    def sample(size: int) -> list[list[str]]:
        return [[" ".join(f"w{draw.randrange(300)}" for _ in range(size)) for _ in range(2)] for _ in range(20)]

    short, long = sample(10), sample(50)
    alone = [measure_distinct({"x": texts})["x"]["distinct-1"] for texts in (short, long)]
    assert alone[0] > 2 * alone[1]
    both = measure_distinct({"short": short, "long": long})
    assert both["short"]["words"] == both["long"]["words"] == 400
    assert both["long"]["distinct-1"] == pytest.approx(both["short"]["distinct-1"], abs=0.05)


def test_windows_follow_the_seed_and_reach_every_word():
    """With one word against ten, the seed decides which of the ten is read, and each of them can be."""
    texts = {"long": [[" ".join("abcdefghij")] * 400], "short": [["z"] * 400]}
    result = measure_distinct(texts)
    assert result == measure_distinct(texts)
    assert result["long"]["distinct-1"] == 10 / 400
    some = {"long": [["a b c"] * 3], "short": [["z"] * 3]}
    assert len({measure_distinct(some, seed=seed)["long"]["distinct-1"] for seed in range(40)}) == 3


def test_policies_must_answer_the_same_prompts():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        measure_distinct({"one": [["a"], ["b"]], "other": [["a"]]})
