"""Repetition within answers and diversity between answers, counted in words.

Policies that are optimized hard for a reward become narrow: the same phrases in every answer, the same answer in every
draw, loops that end at the token limit. These numbers do not say whether an answer is good.
"""

import itertools
import math
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from var.utils.statistics import estimate_by_prompt

Texts = Sequence[Sequence[str]]  # [P][S], the S answers to each of P prompts

# Thai, Lao, Burmese, Khmer, kana and CJK ideographs are written without spaces.
NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+")


def split_words(text: str) -> list[str]:
    """Return the runs of letters, marks and digits in lower case; all other characters separate words.

    In scripts without spaces each character is a word. "don't" is two words and 你好 two.
    """
    return WORD.findall("".join(map(_blank_separator, text)).lower())


@cache
def _blank_separator(character: str) -> str:
    return character if unicodedata.category(character)[0] in "LMN" else " "


def list_ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return the runs of n words in order; none if there are fewer words."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def measure_repetition(text: str, n: int = 4) -> float:
    """Return 1 − distinct/total of a text's n-grams: 0 if none occurs twice, NaN if there are fewer than n words."""
    ngrams = list_ngrams(split_words(text), n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def measure_diversity(texts: Sequence[str]) -> float:
    """Return the mean Jaccard distance between the answers to one prompt, as sets of words and word pairs, in [0, 1].

    It is 0 if all answers are equal (empty ones too) and NaN for a single answer.
    """
    sets = [{*list_ngrams(words, 1), *list_ngrams(words, 2)} for words in map(split_words, texts)]
    distances = [1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in itertools.combinations(sets, 2)]
    return sum(distances) / len(distances) if distances else math.nan


def describe_texts(texts: Texts, finished: np.ndarray) -> dict[str, Any]:
    """Return repetition and diversity of a policy's answers, clustered by prompt, and their defects.

    finished: [P, S] bool. too_short: number of answers with fewer than four words, which have no repetition. diversity:
    between the answers to a prompt, null if S = 1. truncated: fraction of answers that ended at the token limit.
    empty: fraction of answers that hold only white space.
    """
    repetition = np.array([[measure_repetition(text) for text in answers] for answers in texts])
    empty = np.array([[not text.strip() for text in answers] for answers in texts])
    diversity = np.array([[measure_diversity(answers)] for answers in texts])
    return {
        "repetition": estimate_by_prompt(repetition).to_json(),
        "too_short": int(np.isnan(repetition).sum()),
        "diversity": None if repetition.shape[1] == 1 else estimate_by_prompt(diversity).to_json(),
        "truncated": float(1 - finished.mean()),
        "empty": float(empty.mean()),
    }


def measure_distinct(policies: Mapping[str, Texts], seed: int = 0) -> dict[str, Any]:
    """Return distinct-n, the fraction of distinct n-grams (Li et al., arXiv 1510.03055), of several policies.

    The fraction falls as a text grows, so all policies are measured on equally many words: at each prompt and seed,
    every policy contributes a window as long as its shortest answer there, at a position drawn by `seed`. Compare the
    numbers of one call only. words: number of words per policy. A fraction is null if no window has n words.
    """
    windows: dict[str, list[list[str]]] = {name: [] for name in policies}
    draw = random.Random(seed)
    for prompt in zip(*policies.values(), strict=True):
        for answers in zip(*prompt, strict=True):
            words = [split_words(text) for text in answers]
            size = min(map(len, words))
            position = draw.random()  # the same for all policies, so that equal answers give equal windows
            for name, answer in zip(policies, words, strict=True):
                start = int(position * (len(answer) - size + 1))
                windows[name].append(answer[start : start + size])
    result: dict[str, dict[str, float | None]] = {}
    for name, parts in windows.items():
        result[name] = {"words": sum(map(len, parts))}
        for n in (1, 2):
            ngrams = [ngram for part in parts for ngram in list_ngrams(part, n)]
            result[name][f"distinct-{n}"] = len(set(ngrams)) / len(ngrams) if ngrams else None
    return result
