"""Win rates and their errors by hand, a reward as judge, and the configuration of all judges."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
from hydra.utils import instantiate

from tests.helpers.judges import ignore, pair
from tests.helpers.runs import composed
from var.config.check import check
from var.evaluate.judges.base import (
    Judgement,
    RewardJudge,
    compute_rates,
    decide_outcome,
    explain_errors,
    explain_missing_rate,
)
from var.rewards.dataset_score import Score
from var.rewards.programmatic import ExactNumber, NearNumber
from var.utils.errors import UserError

SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0, "error": math.nan}


def rate(outcomes: list[str], pairs: list | None = None, max_errors: float = 0.05) -> dict:
    judgement = Judgement(outcomes, np.array([SCORES[one] for one in outcomes]), [], {"max_errors": max_errors})
    return compute_rates(judgement, pairs or [pair(str(i)) for i in range(len(outcomes))])


def test_preference_wins_above_one_half():
    assert [decide_outcome(score) for score in (0.51, 0.5, 0.49, math.nan)] == ["win", "tie", "loss", "error"]


# --- win rates


def test_rates_by_hand():
    """h: a wins twice, b loses at seed 0 and wins at seed 1: 75 %; seeds 50 and 100, sd/√2 = 25; prompts 100 and 50,
    25 too. k: one prompt, a tie and a win: 50 %; seeds 0 and 100: 50. Mean of h and k 62.5; by seed 25 and 100: 37.5.
    """
    pairs = [pair(id, subset, seed) for seed in (0, 1) for id, subset in (("a", "h"), ("b", "h"), ("c", "k"))]
    rates = rate(["win", "loss", "tie", "win", "win", "win"], pairs)
    h, k = rates["subsets"]["h"], rates["subsets"]["k"]
    assert h == {
        "n": 4, "win": 3, "tie": 0, "loss": 1, "error": 0, "win_rate": 75.0, "mean_score": 0.75,
        "se_prompts": pytest.approx(25.0), "se_seeds": pytest.approx(25.0), "reason": None,
    }  # fmt: skip
    assert (k["win_rate"], k["mean_score"], k["tie"]) == (50.0, 0.75, 1)
    assert (k["se_prompts"], k["se_seeds"]) == (None, pytest.approx(50.0))
    assert (rates["average"], rates["average_se_seeds"]) == (62.5, pytest.approx(37.5))
    assert rates["all"]["win_rate"] == pytest.approx(400 / 6)
    assert set(rates["subsets"]) == {"h", "k"}
    json.dumps(rates, allow_nan=False)


def test_counts_of_the_protocol_are_its_win_rate():
    """a: three ones, b: a quarter, c: an error; 3.25 of 4. By seed: 1 and 1/4, of error 0.375."""
    judgement = Judgement(
        ["win", "loss", "error"], np.array([1.0, 0.25, math.nan]), [], {"max_errors": 0.5}, [[1.0] * 3, [0.25], []]
    )
    rates = compute_rates(judgement, [pair("a"), pair("b", seed=1), pair("c", seed=1)])["all"]
    assert (rates["win_rate"], rates["mean_score"]) == (81.25, 0.625)
    assert (rates["win"], rates["loss"], rates["error"]) == (1, 1, 1)
    assert rates["se_prompts"] == pytest.approx(100 * math.sqrt(2 * 2 * 0.5625**2) / 4)
    assert rates["se_seeds"] == pytest.approx(37.5)


def test_missing_win_rate_is_explained_with_the_first_failure():
    facts = {
        "errors": {"failed": 3, "no verdict": 1}, "first_failure": "500: out of memory", "base_url": "http://host:1/v1"
    }  # fmt: skip
    assert explain_missing_rate(rate(["error"] * 2)["all"], facts) == (
        "no win rate by the judge: 2 of 2 pairs are in error, more than max_errors=0.05 allows. Failures are not "
        "random, so the other pairs give no win rate. Games in error: 3 failed, 1 no verdict. First failure: 500: "
        "out of memory (http://host:1/v1). The same command asks again for the games that failed"
    )
    all_allowed = rate(["error"], max_errors=1.0)["all"]
    assert explain_missing_rate(all_allowed, {}) == "no win rate by the judge: no pair was judged"
    assert explain_missing_rate(rate(["win"])["all"], facts) is None


def test_without_subsets_the_average_is_over_all_pairs():
    rates = rate(["win", "loss", "tie", "win"])
    assert rates["subsets"] == {}
    assert rates["average"] == rates["all"]["win_rate"] == 50.0
    assert rates["all"]["se_seeds"] is rates["average_se_seeds"] is None  # one seed has no spread


def test_rows_without_a_subset_are_a_part_of_the_average():
    rates = rate(["win", "loss"], [pair("a", "h"), pair("b")])
    assert rates["average"] == 50.0
    assert rates["subsets"]["without subset"]["win_rate"] == 0.0


def test_errors_are_excluded_and_counted():
    """1 error of 20 is 5 %, the most that is allowed."""
    rates = rate(["error"] + ["win"] * 10 + ["loss"] * 9)["all"]
    assert (rates["n"], rates["error"], rates["reason"]) == (20, 1, None)
    assert rates["win_rate"] == pytest.approx(1000 / 19)
    assert rates["mean_score"] == pytest.approx(10 / 19)


def test_above_max_errors_there_is_no_win_rate():
    pairs = [pair(str(i), "k" if i < 10 else "h") for i in range(20)]
    rates = rate(["error"] + ["win"] * 19, pairs)  # 5 % of all, 10 % of k
    k = rates["subsets"]["k"]
    assert (k["win_rate"], k["mean_score"], k["se_prompts"], k["win"], k["error"]) == (None, None, None, 9, 1)
    assert k["reason"].startswith("1 of 10 pairs are in error, more than max_errors=0.05 allows.")
    assert rates["subsets"]["h"]["win_rate"] == rates["all"]["win_rate"] == 100.0
    assert rates["average"] is None  # over fewer subsets it would be another number
    assert explain_errors(["error", "win"], 0.5) is None
    rates = rate(["error"] * 2, max_errors=1.0)
    assert (rates["all"]["win_rate"], rates["average"], rates["all"]["error"]) == (None, None, 2)


# --- a reward as judge


def numbered(id: str, answer: str = "3", opponent: str = "4", **fields):
    return pair(id, answer=answer, opponent=opponent, **fields)


def test_reward_judges_by_the_rows_answer():
    pairs = [
        numbered("a", gold="3"), numbered("b", gold="4"), numbered("c", opponent="it is 3", gold="3"),
        numbered("d", gold="7"),
    ]  # fmt: skip
    done = []
    judgement = RewardJudge(reward=ExactNumber())(pairs, done.append)
    assert judgement.outcomes == ["win", "loss", "tie", "tie"]
    assert judgement.scores.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert judgement.games[0] == {"id": "a", "subset": None, "seed": 0, "rewards": [1.0, 0.0], "verdict": "win"}
    assert judgement.facts["mean_difference"] == 0.0
    assert sum(done) == 4
    assert compute_rates(judgement, pairs)["all"]["win_rate"] == 25.0
    json.dumps(judgement.facts, allow_nan=False)


def test_pairs_of_several_batches_keep_their_order():
    pairs = [numbered(str(i), str(i), "-1", gold=str(i if i % 3 else 0)) for i in range(150)]
    done = []
    judgement = RewardJudge(reward=ExactNumber())(pairs, done.append)
    assert judgement.outcomes == ["win" if i % 3 or i == 0 else "tie" for i in range(150)]
    assert done == [64, 64, 22]


@pytest.mark.parametrize(
    ("margin", "outcomes"), [(0.0, ["win", "loss"]), (0.125, ["win", "tie"]), (0.25, ["tie", "tie"])]
)
def test_within_the_margin_a_pair_is_a_tie(margin, outcomes):
    """Gold 7: "7" has 1, "5" has 3/4, "6" has 7/8."""
    pairs = [numbered("a", "7", "5", gold="7"), numbered("b", "6", "7", gold="7")]
    assert RewardJudge(reward=NearNumber(), margin=margin)(pairs, ignore).outcomes == outcomes


def test_reward_that_cannot_score_text_is_rejected():
    with pytest.raises(UserError, match=r"judge=reward: the reward only reads the data's scores"):
        RewardJudge(reward=Score()).check()
    RewardJudge(reward=ExactNumber()).check()
    with pytest.raises(UserError, match="at least 0"):
        RewardJudge(reward=ExactNumber(), margin=-1.0)


def test_reward_that_is_not_finite_names_the_pair():
    class Broken(ExactNumber):
        def __call__(self, prompts, responses, answers):
            return [math.nan if text == "4" else 1.0 for text in responses]

    with pytest.raises(UserError, match=r"pair b, seed 2: 1.0 against nan"):
        RewardJudge(reward=Broken())([numbered("a", opponent="5"), numbered("b", seed=2)], ignore)


# --- the configuration


@pytest.mark.parametrize("name", ["mtbench", "alpaca_eval_2", "arena_hard", "reward"])
def test_yaml_states_all_settings_with_the_class_defaults(name, tmp_path):
    reward = "+reward={_target_: var.rewards.programmatic.ExactNumber}"
    cfg = composed(f"+cache={tmp_path}", reward, root=f"judge/{name}")
    check(cfg, {})
    judge = instantiate(cfg.judge)
    for part, node in ((judge, cfg.judge), (getattr(judge, "client", None), cfg.judge.get("client"))):
        if part is not None:
            stated = {key for key in node if key not in ("_target_", "_convert_")}
            assert stated == {one.name for one in fields(part) if one.init}
    own = {"client": judge.client} if name != "reward" else {"reward": judge.reward}
    assert judge == type(judge)(**own)
    assert name == "reward" or type(judge.request) is dict


@pytest.mark.parametrize(
    ("name", "model", "request_fields", "data", "baseline"),
    [
        ("mtbench", "gpt-4o-2024-11-20", {"temperature": 0, "max_tokens": 2048}, "mt_bench", "gpt-3.5-turbo"),
        ("alpaca_eval_2", "gpt-4-1106-preview",
         {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}, "alpaca_eval", "gpt4_1106_preview"),
        ("arena_hard", "gpt-4-1106-preview", {"temperature": 0, "max_tokens": 4096}, "arena_hard", "gpt-4-0314"),
    ],
)  # fmt: skip
def test_settings_are_those_of_the_benchmarks(name, model, request_fields, data, baseline, tmp_path):
    """MT-Bench's judge is the paper's; the others are the public configurations of alpaca_eval 0.6.6 and Arena-Hard."""
    judge = instantiate(composed(f"+cache={tmp_path}", root=f"judge/{name}").judge)
    assert (judge.client.model, judge.request) == (model, request_fields)
    assert judge.orders == ("random" if name == "alpaca_eval_2" else "both")
    assert getattr(judge, "rule", "paper") == "paper"
    assert getattr(judge, "bootstraps", 100) == 100
    assert composed(f"data={data}").data.source.baseline == baseline
