"""AlpacaEval 2.0: preferences from log-probabilities, win rates at equal length, its files, and a real server."""

import json
import math
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.helpers import judges
from tests.helpers.judges import ignore, pair
from tests.helpers.servers import client, completion, served, shown
from var.evaluate.judges.alpaca import MATCHED, AlpacaEval, compute_win_rate, read_preference
from var.evaluate.judges.base import compute_rates
from var.evaluate.judges.endpoint import UnreadableReply
from var.evaluate.judges.length_control import (
    Gamed,
    fit_length_control,
    read_difficulty,
    read_gamed,
    read_reference,
)
from var.utils.errors import UserError


def sized(id: str, answer: int, opponent: int, question: str = "?", seed: int = 0):
    """Return a pair whose texts differ by their lengths only."""
    fields = {"answer": f"<answer {'x' * answer}>", "opponent": f"<answer {'y' * opponent}>"}
    return pair(id, None, seed, question, **fields)


def first_token(**logs: float) -> dict:
    """The part of a reply that is read: the first token's most likely ones."""
    top = [{"token": token, "logprob": value} for token, value in logs.items()]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}


# --- one game


def test_preference_is_the_normalized_probability_of_m():
    """0.6 and 0.2 of the probability, the remainder on other tokens: 0.6/0.8."""
    assert read_preference(first_token(m=math.log(0.6), M=math.log(0.2), The=math.log(0.1))) == pytest.approx(0.75)
    assert read_preference(first_token(m=-5.0)) == 1.0
    assert read_preference(first_token(M=-5.0)) == 0.0
    assert read_preference(first_token(m=-2000.0, M=0.0)) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (first_token(The=-0.1, Both=-3.0), "neither m nor M"),
        (first_token(**{" m": -0.1}), "neither m nor M"),
        ({"choices": [{"logprobs": None}]}, "no log-probabilities"),
        ({"choices": [{"logprobs": {"content": []}}]}, "no log-probabilities"),
        ({"choices": [{"logprobs": {"content": [1]}}]}, "no log-probabilities"),
        ({"choices": []}, "no log-probabilities"),
        ({}, "no log-probabilities"),
    ],
)
def test_reply_without_the_letters_is_an_error(reply, kind):
    with pytest.raises(UnreadableReply, match=kind):
        read_preference(reply)


# --- win rates


def test_win_rates_of_all_and_of_matched_pairs():
    """Scores 1, ½, 0 and an error: 50 %. Within 10 %: 11 and 9 against 10, not 12; of these 1 and ½: 75 %."""
    pairs = [pair(str(size), answer="x" * size, opponent="y" * 10) for size in (11, 9, 12, 10)]
    found = compute_win_rate(pairs, np.array([1.0, 0.5, 0.0, math.nan]), True)
    assert found["win_rate"] == pytest.approx(50.0)
    assert found["win_rate_se"] == pytest.approx(50 / math.sqrt(3))
    assert found["win rate among pairs of lengths within ±10 %"] == {"win_rate": pytest.approx(75.0), "n": 2}
    invalid = compute_win_rate(pairs, np.array([1.0, 0.5, 0.0, math.nan]), False)
    assert invalid == {"win_rate": None, "win_rate_se": None, MATCHED: {"win_rate": None, "n": 2}}


def gamed(n: int, weights: tuple[float, float], draw: np.random.Generator) -> Gamed:
    shorter, difficulty = draw.normal(size=2 * n), np.tile(draw.normal(size=n), 2)
    odds = weights[0] * np.tanh(shorter) + weights[1] * difficulty
    return Gamed(1 / (1 + np.exp(-odds)), shorter, difficulty, dict(enumerate(difficulty[:n].tolist())))


def test_known_model_is_fitted_and_its_length_removed():
    """Log-odds −1.5 tanh(Δ/sd) + 0.7 difficulty + 0.4, a little shrunk by the penalty; the prediction omits Δ."""
    draw = np.random.default_rng(0)
    longer, difficulty = draw.normal(-200, 150, 400), draw.normal(size=400)  # our answers are the longer ones
    odds = -1.5 * np.tanh(longer / longer.std(ddof=1)) + 0.7 * difficulty + 0.4
    scores = 1 / (1 + np.exp(-odds))
    fit = fit_length_control(scores, longer, difficulty, gamed(400, (-1.5, 0.7), draw))
    assert fit.weights == pytest.approx([-1.5, 0.7, 0.4], abs=0.02)
    assert fit.predicted == pytest.approx(1 / (1 + np.exp(-(0.7 * difficulty + 0.4))), abs=0.01)
    assert scores.mean() > fit.predicted.mean() + 0.1


def test_preference_for_length_alone_becomes_one_half():
    draw = np.random.default_rng(1)
    longer = draw.normal(-300, 200, 300)
    scores = 1 / (1 + np.exp(2 * np.tanh(longer / longer.std(ddof=1))))
    fit = fit_length_control(scores, longer, draw.normal(size=300), gamed(300, (-2.0, 0.0), draw))
    assert scores.mean() > 0.7
    assert fit.predicted.mean() == pytest.approx(0.5, abs=0.01)


def test_gamed_rows_have_a_tenth_of_the_weight():
    """If they all are ½, ten of them pull as much as one pair: the weight of length stays near its own."""
    draw = np.random.default_rng(2)
    longer = draw.normal(0, 100, 200)
    scores = 1 / (1 + np.exp(2 * np.tanh(longer / 100)))
    flat = Gamed(np.full(400, 0.5), draw.normal(size=400), np.zeros(400), {})
    weight = fit_length_control(scores, longer, np.zeros(200), flat).weights[0]
    assert -1.9 < weight < -1.4  # with weight 1 it is −0.54, without these rows −1.96


def test_pair_in_error_is_predicted_and_not_fitted():
    draw = np.random.default_rng(3)
    longer, difficulty, prior = draw.normal(size=50), draw.normal(size=50), gamed(50, (-1.0, 0.5), draw)
    scores = 1 / (1 + np.exp(-difficulty))
    scores[:5] = math.nan
    fit = fit_length_control(scores, longer, difficulty, prior)
    assert np.isfinite(fit.predicted).all()
    assert len(fit.predicted) == 50
    harder = difficulty + 9 * np.isnan(scores)
    other = fit_length_control(scores, longer, harder, prior)
    assert other.weights == pytest.approx(fit.weights)
    assert (other.predicted != fit.predicted).tolist() == np.isnan(scores).tolist()


# --- its files

GAMED = (
    "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n"
    "0,0.1,1.5,-0.5,False,x\n1,,0.5,0.25,False,x\n2,0.9,0.1,0.75,False,x\n"
    "0,0.2,-1.5,-0.5,False,y\n1,0.4,-0.5,0.25,False,y\n2,0.5,0.0,0.75,False,y\n"
)


def test_gamed_rows_without_preference_are_skipped(tmp_path):
    (tmp_path / "g.csv").write_text(GAMED)
    found = read_gamed(str(tmp_path / "g.csv"))
    assert found.preference.tolist() == [0.1, 0.9, 0.2, 0.4, 0.5]
    assert found.shorter.tolist() == [1.5, 0.1, -1.5, -0.5, 0.0]
    assert found.difficulty.tolist() == [-0.5, 0.75, -0.5, 0.25, 0.75]
    assert found.by_index == {0: -0.5, 1: 0.25, 2: 0.75}
    assert found.skipped == 1


def test_wrong_file_names_its_rows(tmp_path):
    (tmp_path / "g.csv").write_text(GAMED.replace("0,0.1,", "0,1.1,").replace("False,y\n2", "True,y\n2"))
    with pytest.raises(UserError) as error:
        read_gamed(str(tmp_path / "g.csv"))
    assert str(error.value) == (
        f"judge.gamed={tmp_path}/g.csv cannot be used (2):\n"
        "  g.csv, record 0: preference is not in [0, 1]\n"
        "  g.csv, record 4: not_gamed_baseline must be false\n"
        "It is df_gamed.csv of the hub's data set tatsu-lab/alpaca_eval."
    )
    (tmp_path / "o.csv").write_text("index,instruction_difficulty\n0,0.5\n")
    with pytest.raises(UserError, match="column std_delta_len: is missing"):
        read_gamed(str(tmp_path / "o.csv"))
    (tmp_path / "few.csv").write_text("".join(GAMED.splitlines(keepends=True)[:4]))
    with pytest.raises(UserError, match="2 with a preference; 5 folds"):
        read_gamed(str(tmp_path / "few.csv"))
    for path in ("none.csv", "e.json"):
        (tmp_path / "e.json").write_text('{"a": 1}')
        with pytest.raises(UserError, match=f"judge.gamed=.*{path} cannot be read"):
            read_gamed(str(tmp_path / path))


def test_difficulties_are_read_from_csv_and_json(tmp_path):
    (tmp_path / "d.csv").write_text(",instruction_difficulty\n0,0.5\n1,-1.25\n")
    (tmp_path / "d.json").write_text(json.dumps([{"index": i, "instruction_difficulty": v} for i, v in ((0, 0.5), (1, -1.25))]))  # noqa: E501  # fmt: skip
    for name in ("d.csv", "d.json"):
        assert read_difficulty(str(tmp_path / name)) == {0: 0.5, 1: -1.25}
    (tmp_path / "d.csv").write_text(",instruction_difficulty\n0,nan\nx,1\n")
    with pytest.raises(
        UserError,
        match=r"(?s)record 1: .*record 0: instruction_difficulty is not a finite number",
    ):
        read_difficulty(str(tmp_path / "d.csv"))


def test_reference_numbers_the_instructions(tmp_path):
    (tmp_path / "r.json").write_text(
        json.dumps([{"instruction": text, "output": ""} for text in ("a", "b\n\nc ", "a")])
    )
    assert read_reference(str(tmp_path / "r.json")) == {"a": [0, 2], "b\n\nc": [1]}
    (tmp_path / "r.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(UserError, match="record 0: no text under `instruction`"):
        read_reference(str(tmp_path / "r.json"))


# --- against a server


@pytest.fixture
def play(tmp_path):
    return partial(judges.play, AlpacaEval, tmp_path)


@pytest.fixture
def alpaca(tmp_path):
    def build(url: str = "http://127.0.0.1:1/v1", **options) -> AlpacaEval:
        return AlpacaEval(client=client(url, tmp_path), **options)

    return build


def longer_is_better(body, before):
    """p("m") = 0.8 of the two letters' mass where the first output is the longer one, 0.2 where the second is."""
    first, second = map(len, shown(body))
    p = 0.5 if first == second else 0.8 if first > second else 0.2
    top = [{"token": token, "logprob": math.log(value)} for token, value in (("m", 0.9 * p), ("M", 0.9 - 0.9 * p))]
    letter = "m" if p > 0.5 else "M"
    return completion(letter, "length", logprobs={"content": [{"token": letter, "logprob": -0.2, "top_logprobs": top}]})


def test_score_is_the_answers_preference_in_both_orders(play):
    pairs = [sized(str(i), 9 if i % 3 else 3, 6, f"question {i}") for i in range(30)] + [sized("t", 4, 4)]
    found, bodies = play(longer_is_better, pairs)
    assert found.scores == pytest.approx([0.8 if i % 3 else 0.2 for i in range(30)] + [0.5])
    assert found.outcomes == ["win" if i % 3 else "loss" for i in range(30)] + ["tie"]
    assert found.facts["win_rate"] == pytest.approx(100 * (20 * 0.8 + 10 * 0.2 + 0.5) / 31)
    overall = compute_rates(found, pairs)["all"]
    assert overall["win_rate"] == pytest.approx(found.facts["win_rate"])
    assert overall["se_prompts"] == pytest.approx(found.facts["win_rate_se"])
    assert (overall["win"], overall["tie"], overall["loss"]) == (20, 1, 10)
    assert 5 < [game["order"] for game in found.games].count("answer first") < 25
    assert (len(bodies), found.facts["games"]) == (31, 31)
    assert not any(name.startswith("lc") for name in found.facts)  # without its file nothing has that name
    json.dumps([found.facts, found.games], allow_nan=False)


def test_request_follows_the_protocol(play):
    _, bodies = play(longer_is_better, [sized("a", 5, 6)])
    (body,) = bodies
    assert {key: value for key, value in body.items() if key not in ("messages", "model")} == {
        "max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    assert body["messages"][1]["content"].endswith("m or M.")


def thinking(p: float, text: str = "m", **fields) -> dict:
    """A reply that considers M with certainty, and then gives "m" the probability p."""
    tops = [{"M": 0.99}, {"M": 0.99}, {"M": 0.99}, {"\n\n": 0.9}, {"m": p, "M": 1 - p}]
    content = [
        {"token": token, "top_logprobs": [{"token": name, "logprob": math.log(value)} for name, value in top.items()]}
        for token, top in zip(["<think>", "M", "</think>", "\n\n", "m"], tops, strict=True)
    ]
    return completion(text, logprobs={"content": content}, **fields)


def test_preference_is_that_of_the_first_token_after_the_reasoning(play):
    assert read_preference(thinking(0.7, "<think>M</think>\n\nm")) == pytest.approx(0.7)
    assert read_preference(thinking(0.7, reasoning={"reasoning_content": "M"})) == pytest.approx(0.7)
    found = play(lambda body, before: thinking(0.5, "<think>M</think>\n\nm"), [sized("a", 5, 6)])[0]
    assert found.outcomes == ["tie"]


def test_one_token_of_reasoning_is_not_a_preference(play):
    """With max_tokens=1 a judge that thinks aloud never answers."""
    logprobs = {"content": [{"token": "<think>", "top_logprobs": [{"token": "m", "logprob": -0.1}]}]}
    found = play(lambda body, before: completion("<think>", "length", logprobs=logprobs), [sized("a", 5, 6)])[0]
    assert (found.outcomes, found.facts["errors"]) == (["error"], {"unfinished reasoning": 1})


def test_judge_without_log_probabilities_gives_errors(play):
    found = play(lambda body, before: completion("m"), [sized("a", 5, 6)])[0]
    assert (found.outcomes, found.facts["errors"]) == (["error"], {"no log-probabilities": 1})
    assert found.facts["win_rate"] is None


@pytest.fixture
def files(tmp_path):
    """The three files for 40 instructions, "question 7" under 7; the gamed baselines win by length alone."""
    draw = np.random.default_rng(4)
    difficulty = draw.normal(size=40)
    lines = ["index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for sign in (1, -1):
        for i in range(40):
            shorter = sign * abs(draw.normal())
            lines.append(f"{i},{1 / (1 + math.exp(1.4 * math.tanh(shorter)))},{shorter},{difficulty[i]},False")
    (tmp_path / "df_gamed.csv").write_text("\n".join(lines))
    (tmp_path / "difficulty.csv").write_text("\n".join([",d", *(f"{i},{d}" for i, d in enumerate(difficulty))]))
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": f"question {i}"} for i in range(40)]))
    return {"gamed": str(tmp_path / "df_gamed.csv"), "reference": str(tmp_path / "alpaca_eval.json")}


def test_length_controlled_rate_of_longer_answers_is_lower(play, files):
    """The judge prefers the longer output and nothing else; ours are longer in 30 of 40: 65 %, and near ½ at equal
    length. Two equal seeds give the same as one."""
    pairs = [sized(f"row{i}", 30 + i if i % 4 else 20, 30 - i % 3, f" question {i}") for i in range(40)]
    twice = [*pairs, *(replace(pair, seed=1) for pair in pairs)]
    one, two = (play(longer_is_better, given, **files)[0].facts for given in (pairs, twice))
    assert one["win_rate"] == pytest.approx(65.0)
    assert 45 < one["lc_win_rate"] < 58
    assert one["lc_weights"][0]["length"] < -0.5
    assert two["lc_win_rate"] == pytest.approx(one["lc_win_rate"])
    assert two["lc_se"] == pytest.approx(one["lc_se"])
    assert (one["gamed_rows"], one["gamed_rows_without_preference"]) == (80, 0)
    json.dumps(two, allow_nan=False)


def test_unknown_instructions_are_named_before_a_request(alpaca, files):
    pairs = [sized("ours", 5, 6, "question 3"), sized("x", 5, 6, "another"), sized("y", 5, 6, "one more")]
    with served(longer_is_better) as server:
        judge = alpaca(server.base_url, **files)
        for ask in (judge.describe, lambda pairs: judge(pairs, ignore)):
            with pytest.raises(UserError) as error:
                ask(pairs)
            assert str(error.value).splitlines()[:3] == [
                "pairs that AlpacaEval's files do not hold (2):",
                "  x: its instruction is not in judge.reference",
                "  y: its instruction is not in judge.reference",
            ]
        assert server.bodies == []
    numbered = alpaca(gamed=files["gamed"])
    with pytest.raises(UserError, match=r"(?s)  41: instruction 41 has no difficulty.*  a7: is not a number"):
        numbered.describe([sized("3", 5, 6), sized("41", 5, 6), sized("a7", 5, 6)])


def test_repeated_instruction_has_two_difficulties(alpaca, files, tmp_path):
    """Rows a and b have one text: the first takes the first number, the second the other, in every seed."""
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": text} for text in ("q", "r", "q")]))
    (tmp_path / "difficulty.csv").write_text(",d\n0,0.5\n1,1.5\n2,2.5\n")
    judge = alpaca(**files, difficulty=str(tmp_path / "difficulty.csv"))
    pairs = [sized(id, 5, 6, text, seed) for seed in (0, 1) for id, text in (("a", "q"), ("b", "q"), ("c", "r"))]
    assert judge._difficulties(pairs).tolist() == [0.5, 2.5, 1.5, 0.5, 2.5, 1.5]


def test_equal_lengths_have_no_length_controlled_rate(play, files):
    found = play(longer_is_better, [sized(str(i), 5, 6, f"question {i}") for i in range(3)], **files)[0]
    assert found.facts["lc_win_rate"] is None
    assert found.facts["lc_reason"] == "a seed has no judged pair, or all its pairs have the same length difference"
    assert found.facts["win_rate"] == pytest.approx(20.0)


def test_check_reports_what_length_control_lacks(alpaca, files, monkeypatch):
    with pytest.raises(UserError, match=r"Set judge.gamed"):
        alpaca(reference="r.json")
    with pytest.raises(UserError, match=r"judge.difficulty=none.csv cannot be read"):
        alpaca(**files, difficulty="none.csv").check()
    with pytest.raises(UserError, match=r"judge.reference=none.json cannot be read"):
        alpaca(gamed=files["gamed"], reference="none.json").check()
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError) as error:
        alpaca(**files).check()
    assert str(error.value) == "the length-controlled win rate needs an extra: pip install -e '.[eval]'"
    alpaca().check()
