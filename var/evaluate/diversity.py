"""How much answers repeat themselves and one another; pure counts of words.

Rewards that are optimised hard narrow a policy: the same phrases in every answer, the same answer at every draw, loops
that run into the limit. None of the figures here says whether an answer is good.
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

from var.evaluate.lengths import estimate

Texts = Sequence[Sequence[str]]  # [P][S], the S answers to each of P prompts

# Thai, Lao, Burmese, Khmer, kana, CJK ideographs: written without spaces.
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
RUNS = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits, in lower case; what is between them parts words and is none.

    Of scripts that write no spaces every character is a word, so "don't" is two words and 你好 two.
    """
    return RUNS.findall("".join(map(_letter, text)).lower())


@cache
def _letter(character: str) -> str:
    return character if unicodedata.category(character)[0] in "LMN" else " "


def ngrams(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The runs of n words, in order; none where there are fewer words."""
    return list(zip(*(found[i:] for i in range(n)), strict=False))


def repetition(text: str, n: int = 4) -> float:
    """1 − distinct/total of a text's runs of n words: 0 where none comes twice. NaN where it has fewer than n words."""
    runs = ngrams(words(text), n)
    return 1 - len(set(runs)) / len(runs) if runs else math.nan


def among(texts: Sequence[str]) -> float:
    """Mean over pairs of one prompt's answers of 1 − Jaccard's index of their sets of words and word pairs, in [0, 1].

    0: all the same, as two empty ones are. NaN for a single answer.
    """
    sets = [{*ngrams(found, 1), *ngrams(found, 2)} for found in map(words, texts)]
    distances = [1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in itertools.combinations(sets, 2)]
    return sum(distances) / len(distances) if distances else math.nan


def describe(texts: Texts, finished: np.ndarray, n: int = 4) -> dict[str, Any]:
    """Repetition and diversity of a policy's answers with standard errors clustered by prompt; finished [P, S] bool.

    too_short: answers of fewer than n words, which have no repetition. diversity: among a prompt's answers, null
    where S = 1. cut, empty: shares of answers that ran into the limit and that hold nothing but space.
    """
    repeated = np.array([[repetition(text, n) for text in several] for several in texts])
    empty = np.array([[not text.strip() for text in several] for several in texts])
    diversity = np.array([[among(several)] for several in texts])
    return {
        "repetition": estimate(repeated),
        "too_short": int(np.isnan(repeated).sum()),
        "diversity": None if repeated.shape[1] == 1 else estimate(diversity),
        "cut": float(1 - finished.mean()),
        "empty": float(empty.mean()),
    }


def distinct(policies: Mapping[str, Texts], orders: Sequence[int] = (1, 2), seed: int = 0) -> dict[str, Any]:
    """distinct-n, the share of distinct n-grams among all (Li et al., arXiv 1510.03055), of policies side by side.

    The share falls as a text grows, so each is measured on as many words: of the answers that stand at one place
    (prompt and replicate) each gives a window as long as the shortest of them, its begin drawn by the seed. The sets
    are then of the same prompts and of the same size, and a number has its meaning beside the others of its call
    only. words: of each policy, that were read. null where no window has n words.
    """
    windows: dict[str, list[list[str]]] = {name: [] for name in policies}
    draw = random.Random(seed)
    for prompt in zip(*policies.values(), strict=True):
        for place in zip(*prompt, strict=True):
            found = [words(text) for text in place]
            size = min(map(len, found))
            at = draw.random()  # one for all, so that equal answers give equal windows
            for name, each in zip(policies, found, strict=True):
                begin = int(at * (len(each) - size + 1))
                windows[name].append(each[begin : begin + size])
    out: dict[str, dict[str, float | None]] = {}
    for name, parts in windows.items():
        out[name] = {"words": sum(map(len, parts))}
        for n in orders:
            runs = [run for part in parts for run in ngrams(part, n)]
            out[name][f"distinct-{n}"] = len(set(runs)) / len(runs) if runs else None
    return out
