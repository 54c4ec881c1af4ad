"""The length-controlled win rate of AlpacaEval 2.0, and the files that it needs.

Dubois et al., arXiv 2404.04475, and the package alpaca_eval 0.6.6 (GLM length_controlled_v1), with which tests compare
the numbers. The files are those of the hub's data set tatsu-lab/alpaca_eval, as CSV or JSON.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from var.utils.errors import Problems, UserError
from var.utils.extras import name_install

FEATURES = ("length", "difficulty", "model")
GAMED_WEIGHT = 0.2 / 2  # of each row of the two gamed baselines; a judged pair has weight 1
STRENGTHS = np.logspace(-4, 4, 10)  # the inverse L1 strengths that cross-validation compares
FOLDS = 5
HINT = "It is {} of the hub's data set tatsu-lab/alpaca_eval."


class Gamed(NamedTuple):
    """Judged answers of G baselines that game the length (df_gamed.csv)."""

    preference: np.ndarray
    """[G] preferences in [0, 1]."""
    shorter: np.ndarray
    """[G] standardized length differences."""
    difficulty: np.ndarray
    """[G] difficulties of the instructions."""
    by_index: dict[int, float]
    """The difficulty of each instruction, by its number."""
    skipped: int = 0
    """Rows without a preference."""


class Fit(NamedTuple):
    """A fitted length-controlled model."""

    predicted: np.ndarray
    """[n] preferences at equal length."""
    weights: np.ndarray
    """[3] weights of FEATURES."""
    strength: float
    """The inverse L1 strength that cross-validation chose."""


def fit_length_control(scores: np.ndarray, longer: np.ndarray, difficulty: np.ndarray, gamed: Gamed) -> Fit:
    """Fit a logistic regression to preferences, and predict them as if both answers were equally long.

    log-odds of preference = w_0 tanh(longer/sd) + w_1 difficulty + w_2 [not a gamed row], L1-penalized, without an
    intercept; sd is the standard deviation of these pairs' length differences. The gamed rows determine w_0 and w_1.
    The two copies of a row, one for each side of its preference, are in the same fold.

    scores: [n] preferences; a pair with NaN is predicted and not fitted. longer: [n] the characters that the opponent
    has more than the answer. difficulty: [n]. Dubois et al., arXiv 2404.04475.
    """
    from sklearn.model_selection import GroupKFold

    estimator = import_estimator()
    n = len(scores)
    pairs = np.column_stack([np.tanh(longer / longer.std(ddof=1)), difficulty, np.ones(n)])
    baselines = np.column_stack([np.tanh(gamed.shorter), gamed.difficulty, np.zeros(len(gamed.preference))])
    target = np.concatenate([gamed.preference, scores])
    known = ~np.isnan(target)
    x = np.concatenate([baselines, pairs])[known]
    weight = np.concatenate([np.full(len(baselines), GAMED_WEIGHT), np.ones(n)])[known]
    target = target[known]

    # a graded preference p is a row that won with weight p and a copy that lost with weight 1 − p
    twice, won = np.concatenate([x, x]), np.repeat([1, 0], len(x))
    share, weight = np.concatenate([target, 1 - target]), np.concatenate([weight, weight])
    rows = np.tile(np.arange(len(x)), 2)

    def fit(strength: float, index: Any) -> Any:
        model = estimator(
            C=strength, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=123, tol=1e-4
        )  # the package's seed and tolerance: liblinear visits the coordinates in random order
        return model.fit(twice[index], won[index], sample_weight=(share * weight)[index])

    def compute_loss(model: Any, index: np.ndarray) -> float:
        odds = twice[index] @ model.coef_[0]
        p = np.where(won[index] == 1, share[index], 1 - share[index])
        return float(np.mean(weight[index] * (p * np.logaddexp(0, -odds) + (1 - p) * np.logaddexp(0, odds))))

    folds = list(GroupKFold(n_splits=FOLDS).split(twice, won, rows))
    losses = [[compute_loss(fit(strength, train), test) for train, test in folds] for strength in STRENGTHS]
    best = float(STRENGTHS[int(np.argmin(np.mean(losses, axis=1)))])
    weights = fit(best, slice(None)).coef_[0]
    equal = pairs * np.array([0.0, 1.0, 1.0])
    return Fit(1 / (1 + np.exp(-(equal @ weights))), weights, best)


def import_estimator() -> Any:
    """Return scikit-learn's LogisticRegression, or raise a UserError that names the extra."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(f"the length-controlled win rate needs an extra: {name_install('eval')}") from error
    return LogisticRegression


def read_gamed(path: str) -> Gamed:
    """Read df_gamed.csv: index, preference (in [0, 1] or empty), std_delta_len, instruction_difficulty."""
    problems, table = _read_table("gamed", path)
    index, length, difficulty = (
        _read_numbers(table, name, path, problems) for name in ("index", "std_delta_len", "instruction_difficulty")
    )
    preference = _read_numbers(table, "preference", path, problems, optional=True)
    real = table.get("not_gamed_baseline", pd.Series(False, table.index)).astype(str)
    _add_rows(problems, path, (preference < 0) | (preference > 1), "preference is not in [0, 1]")
    _add_rows(problems, path, ~real.isin(["False", "false", "0"]), "not_gamed_baseline must be false")
    known = ~np.isnan(preference)
    if not problems and known.sum() < FOLDS:
        problems.add("rows", f"{known.sum()} with a preference; {FOLDS} folds need at least {FOLDS}")
    problems.check(HINT.format("df_gamed.csv"))
    order = range(len(table) - 1, -1, -1)  # the first row of an instruction counts
    by_index = {int(index[row]): float(difficulty[row]) for row in order}
    return Gamed(preference[known], length[known], difficulty[known], by_index, int((~known).sum()))


def read_difficulty(path: str) -> dict[int, float]:
    """Read instruction_difficulty.csv: number and difficulty of each instruction, in its first two columns.

    The columns `index` and `instruction_difficulty` may be anywhere.
    """
    problems, table = _read_table("difficulty", path)
    names = ("index", "instruction_difficulty") if "index" in table else tuple(table.columns[:2])
    numbers = [_read_numbers(table, name, path, problems) for name in names]
    if len(numbers) < 2:
        problems.add("columns", f"expected a number and a difficulty, got {list(table.columns)}")
    problems.check(HINT.format("instruction_difficulty.csv"))
    return dict(zip(numbers[0].astype(int).tolist(), numbers[1].tolist(), strict=True))


def read_reference(path: str) -> dict[str, list[int]]:
    """Read alpaca_eval.json: the numbers, from 0, of each instruction in the file."""
    problems, table = _read_table("reference", path)
    texts = table.get("instruction", pd.Series(None, table.index, dtype=object))
    _add_rows(problems, path, ~texts.map(lambda text: isinstance(text, str)), "no text under `instruction`")
    problems.check(HINT.format("alpaca_eval.json"))
    positions: dict[str, list[int]] = defaultdict(list)
    for position, text in enumerate(texts):
        positions[text.strip()].append(position)
    return dict(positions)


def _read_table(key: str, path: str) -> tuple[Problems, pd.DataFrame]:
    """Read a CSV with a header (as text) or a JSON list of objects."""
    file = Path(path).expanduser()
    try:
        if file.suffix == ".csv":
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
        else:
            table = pd.DataFrame(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"judge.{key}={path} cannot be read: {error}") from error
    if table.empty:
        raise UserError(f"judge.{key}={path} cannot be read: it has no rows")
    return Problems(f"judge.{key}={path} cannot be used"), table


def _read_numbers(table: pd.DataFrame, name: str, path: str, problems: Problems, optional: bool = False) -> np.ndarray:
    """Return a column as floats; if it is optional, empty cells are NaN. Other values are problems."""
    if name not in table:
        problems.add(f"column {name}", "is missing")
        return np.zeros(len(table))
    numbers = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=float)
    empty = (table[name].isna() | (table[name] == "")) & optional
    _add_rows(problems, path, ~np.isfinite(numbers) & ~empty, f"{name} is not a finite number")
    return numbers


def _add_rows(problems: Problems, path: str, wrong: Any, what: str) -> None:
    for row in np.flatnonzero(wrong):
        problems.add(f"{Path(path).name}, record {row}", what)
