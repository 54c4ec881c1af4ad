"""The length-controlled win rate compared with alpaca_eval's own function, on synthetic data and real answers."""

import gzip
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.judges import pair
from var.evaluate.judges.alpaca import compute_win_rate, count_longer, read_preference
from var.evaluate.judges.base import Pair
from var.evaluate.judges.endpoint import read_template
from var.evaluate.judges.length_control import fit_length_control, read_gamed

pytestmark = pytest.mark.peer
pandas = pytest.importorskip("pandas")
sklearn = pytest.importorskip("sklearn")
with pytest.MonkeyPatch.context() as patch:
    if find_spec("pkg_resources") is None:  # alpaca_eval imports it for version numbers; newer setuptools have none
        patch.setitem(sys.modules, "pkg_resources", SimpleNamespace())
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate")


def gamed_file(folder: Path, n: int, seed: int, empty: int = 0) -> Path:
    """Write two baselines on the same n instructions, in the layout of df_gamed.csv."""
    draw = np.random.default_rng(seed)
    difficulty = np.tile(draw.normal(size=n), 2)
    lengths = np.concatenate([draw.normal(1.0, 0.5, n), draw.normal(-1.2, 0.5, n)])
    odds = 1.5 * np.tanh(lengths) + 0.8 * difficulty + draw.normal(0, 0.5, 2 * n)
    preferred = 1 / (1 + np.exp(-odds))
    preferred[:empty] = np.nan
    table = pandas.DataFrame(
        {
            "index": np.tile(np.arange(n), 2), "preference": preferred, "std_delta_len": lengths,
            "instruction_difficulty": difficulty, "not_gamed_baseline": False,
            "model": ["verbose"] * n + ["concise"] * n,
        }
    )  # fmt: skip
    table.to_csv(folder / "df_gamed.csv", index=False)
    return folder / "df_gamed.csv"


def peer(monkeypatch, path: Path, answers: list[str], opponents: list[str], scores: np.ndarray) -> dict[str, float]:
    """Return the results of alpaca_eval's function, with a local file in place of its download."""
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: str(path))
    table = pandas.DataFrame(
        {
            "index": range(len(answers)), "output_1": opponents, "output_2": answers, "preference": scores + 1,
            "annotator": "a", "generator_1": "opponent", "generator_2": "answer",
        }
    )  # fmt: skip
    with sklearn.config_context():  # it sets an option of scikit-learn's for good
        found = glm.get_length_controlled_winrate(table, save_weights_dir=None)
    return {**found, "predicted": table["glm_preference"].to_numpy()}


def pairs_of(answers: list[str], opponents: list[str]) -> list[Pair]:
    texts = enumerate(zip(answers, opponents, strict=True))
    return [pair(str(i), answer=answer, opponent=opponent) for i, (answer, opponent) in texts]


def compare(monkeypatch, path: Path, answers: list[str], opponents: list[str], scores: np.ndarray) -> None:
    """Compare both; library, folds and seed of the solver are the same, so only rounding differs."""
    theirs = peer(monkeypatch, path, answers, opponents, scores)
    gamed, pairs = read_gamed(str(path)), pairs_of(answers, opponents)
    difficulty = np.array([gamed.by_index[i] for i in range(len(pairs))])
    ours = fit_length_control(scores, count_longer(pairs), difficulty, gamed)
    np.testing.assert_allclose(ours.predicted, theirs["predicted"], rtol=0, atol=1e-6)
    assert 100 * ours.predicted.mean() == pytest.approx(theirs["length_controlled_winrate"], abs=1e-6)
    plain = compute_win_rate(pairs, scores, True)
    assert plain["win_rate"] == pytest.approx(theirs["win_rate"], abs=1e-6)
    if not np.isnan(scores).any():  # with distinct ids the clustered error is the plain one
        assert plain["win_rate_se"] == pytest.approx(theirs["standard_error"], abs=1e-6)


@pytest.mark.parametrize(("seed", "n", "errors", "empty"), [(0, 60, 0, 0), (1, 200, 7, 0), (2, 97, 1, 5)])
def test_synthetic_data_give_the_same_win_rates(monkeypatch, tmp_path, seed, n, errors, empty):
    draw = np.random.default_rng(seed)
    answers = ["x" * size for size in draw.integers(20, 900, n)]
    opponents = ["y" * size for size in draw.integers(20, 600, n)]
    scores = 1 / (1 + np.exp(-(np.array([len(a) - len(o) for a, o in zip(answers, opponents, strict=True)]) / 300)))
    scores = np.clip(scores + draw.normal(0, 0.2, n), 0, 1)
    scores[:errors] = np.nan
    compare(monkeypatch, gamed_file(tmp_path, n, seed, empty), answers, opponents, scores)


def test_judged_real_answers_give_the_same_win_rate(monkeypatch, tmp_path, real_data):
    """Most preferences are near 0. The first response replaces the opponent's text."""
    with gzip.open(real_data / "alpaca_eval_4_responses.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    opponents, answers = ([row["responses"][k]["response"] for row in rows] for k in (0, 3))
    scores = np.array([row["responses"][3]["score"] for row in rows])
    compare(monkeypatch, gamed_file(tmp_path, len(rows), 3), answers, opponents, scores)


@pytest.mark.parametrize(
    "letters", [{"m": -0.1, "M": -2.4}, {"M": -0.2, "Both": -1.0}, {"m": -3.0}, {"m": 0, "M": -99.0}]
)
def test_log_probabilities_are_read_equally(letters):
    from alpaca_eval.completion_parsers import logprob_parser

    top = [{"token": token, "logprob": value} for token, value in {**letters, " m": -0.5, "The": -5.0}.items()]
    choice = {"logprobs": {"content": [{"top_logprobs": top}]}}
    (theirs,) = logprob_parser(choice, "m", ["m", "M"], is_binarize=False)
    assert read_preference({"choices": [choice]}) == pytest.approx(2 - theirs, abs=1e-12)
    assert math.isfinite(theirs)


def test_prompt_of_the_package_is_read_as_a_template():
    """The file has a system message, a user message, the three places, and braces that are not places."""
    import alpaca_eval

    path = Path(alpaca_eval.__file__).parent / "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
    system, user = read_template(path, "M").fill(({"role": "user", "content": "<instruction>"},), "<first>", "<second>")
    assert (system["role"], user["role"]) == ("system", "user")
    places = [user["content"].index(text) for text in ("<instruction>", '"m"', "<first>", '"M"', "<second>")]
    assert places == sorted(places)
    assert "im_start" not in system["content"] + user["content"]
    assert "{output_1}" not in user["content"]
