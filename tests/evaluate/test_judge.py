"""The rule of a pair, win rates and their errors by hand, the judge's prompt, and a reward as judge."""

import itertools
import json
import math
from dataclasses import fields

import numpy as np
import pytest
from hydra.utils import instantiate

from tests.helpers.runs import composed
from var.config.check import check
from var.evaluate.judges.base import (
    Judgement,
    Pair,
    RewardJudge,
    Template,
    clustered_error,
    decide,
    outcome,
    question,
    rates,
    read_template,
    too_many,
    unjudged,
)
from var.rewards.dataset_score import Score
from var.rewards.programmatic import ExactNumber, NearNumber
from var.utils.errors import UserError

PROMPT = ({"role": "user", "content": "1 + 2?"},)
SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0, "error": math.nan}


def pair(id: str, subset: str | None = None, seed: int = 0, **rest) -> Pair:
    return Pair(**{"id": id, "subset": subset, "seed": seed, "prompt": PROMPT, "answer": "3", "opponent": "4", **rest})


def judged(outcomes: list[str], max_errors: float = 0.05) -> Judgement:
    return Judgement(outcomes, np.array([SCORES[one] for one in outcomes]), [], {"max_errors": max_errors})


# --- the rule


@pytest.mark.parametrize(
    ("first", "second", "paper", "mtbench"),
    [
        ("win", "win", "win", "win"),
        ("win", "tie", "win", "tie"),
        ("tie", "win", "win", "tie"),
        ("tie", "tie", "tie", "tie"),
        ("win", "loss", "tie", "tie"),
        ("loss", "win", "tie", "tie"),
        ("tie", "loss", "loss", "tie"),
        ("loss", "tie", "loss", "tie"),
        ("loss", "loss", "loss", "loss"),
    ],
)
def test_two_games_make_an_outcome_by_either_rule(first, second, paper, mtbench):
    assert decide([first, second], "paper") == paper
    assert decide([first, second], "mtbench") == mtbench


@pytest.mark.parametrize("rule", ["paper", "mtbench"])
def test_one_game_is_the_outcome_and_one_error_is_an_error(rule):
    assert [decide([one], rule) for one in ("win", "tie", "loss", "error")] == ["win", "tie", "loss", "error"]
    for other in ("win", "tie", "loss", "error"):
        assert decide(["error", other], rule) == decide([other, "error"], rule) == "error"


@pytest.mark.parametrize(("first", "second"), itertools.product(("win", "tie", "loss"), repeat=2))
def test_the_rule_is_the_same_from_the_other_side(first, second):
    other = {"win": "loss", "tie": "tie", "loss": "win"}
    for rule in ("paper", "mtbench"):
        assert decide([other[first], other[second]], rule) == other[decide([first, second], rule)]


def test_a_preference_wins_above_a_half():
    assert [outcome(one) for one in (0.51, 0.5, 0.49, math.nan)] == ["win", "tie", "loss", "error"]


# --- rates


def test_rates_by_hand():
    """h: a wins twice, b loses at seed 0 and wins at seed 1: 75 %; seeds 50 and 100, sd/√2 = 25; prompts 100 and 50,
    25 too. k: one prompt, a tie and a win: 50 %; seeds 0 and 100: 50. Mean of h and k 62.5; by seed 25 and 100: 37.5.
    """
    pairs = [
        pair("a", "h", 0), pair("b", "h", 0), pair("c", "k", 0), pair("a", "h", 1), pair("b", "h", 1), pair("c", "k", 1)
    ]  # fmt: skip
    found = rates(judged(["win", "loss", "tie", "win", "win", "win"]), pairs)
    h, k = found["subsets"]["h"], found["subsets"]["k"]
    assert h == {
        "n": 4, "win": 3, "tie": 0, "loss": 1, "error": 0, "win_rate": 75.0, "mean_score": 0.75,
        "se_prompts": pytest.approx(25.0), "se_seeds": pytest.approx(25.0), "reason": None,
    }  # fmt: skip
    assert (k["win_rate"], k["mean_score"], k["tie"]) == (50.0, 0.75, 1)
    assert (k["se_prompts"], k["se_seeds"]) == (None, pytest.approx(50.0))
    assert (found["average"], found["average_se_seeds"]) == (62.5, pytest.approx(37.5))
    assert found["all"]["win_rate"] == pytest.approx(400 / 6)
    assert set(found["subsets"]) == {"h", "k"}
    json.dumps(found, allow_nan=False)


def test_a_protocols_own_counts_are_its_win_rate():
    """a: three ones, b: a quarter, c: an error; 3.25 of 4. By seed: 1 and 1/4, of error 0.375."""
    several = Judgement(
        ["win", "loss", "error"], np.array([1.0, 0.25, math.nan]), [], {"max_errors": 0.5}, [[1.0] * 3, [0.25], []]
    )
    found = rates(several, [pair("a"), pair("b", seed=1), pair("c", seed=1)])["all"]
    assert (found["win_rate"], found["mean_score"]) == (81.25, 0.625)
    assert (found["win"], found["loss"], found["error"]) == (1, 1, 1)
    assert found["se_prompts"] == pytest.approx(100 * math.sqrt(2 * 2 * 0.5625**2) / 4)
    assert found["se_seeds"] == pytest.approx(37.5)


def test_why_there_is_no_win_rate_is_told_with_the_first_failure():
    facts = {"errors": {"failed": 3, "no verdict": 1}, "first_failure": "500: out of memory"}
    limit = "2 of 2 pairs are in error, more than max_errors=0.05 allows; what fails is not a random part, so the rest "
    assert unjudged(rates(judged(["error"] * 2), [pair("a"), pair("b")])["all"], facts) == (
        f"no win rate by the judge: {limit}gives no win rate. Of the games: 3 failed, 1 no verdict. The first that "
        "failed: 500: out of memory"
    )
    all_may = rates(judged(["error"], max_errors=1.0), [pair("a")])["all"]
    assert unjudged(all_may, {}) == "no win rate by the judge: no pair was judged"
    assert unjudged(rates(judged(["win"]), [pair("a")])["all"], facts) is None


def test_without_subsets_the_average_is_over_all():
    found = rates(judged(["win", "loss", "tie", "win"]), [pair(id) for id in "abcd"])
    assert found["subsets"] == {}
    assert found["average"] == found["all"]["win_rate"] == 50.0
    assert found["all"]["se_seeds"] is found["average_se_seeds"] is None  # one seed has no spread


def test_rows_without_a_subset_beside_others_are_a_part_of_the_average():
    found = rates(judged(["win", "loss"]), [pair("a", "h"), pair("b")])
    assert found["average"] == 50.0
    assert found["subsets"]["without subset"]["win_rate"] == 0.0


def test_errors_are_left_out_and_counted():
    """19 wins and 1 error: 5 %, the most that is allowed."""
    outcomes = ["error"] + ["win"] * 10 + ["loss"] * 9
    found = rates(judged(outcomes), [pair(str(i)) for i in range(20)])["all"]
    assert (found["n"], found["error"], found["reason"]) == (20, 1, None)
    assert found["win_rate"] == pytest.approx(1000 / 19)
    assert found["mean_score"] == pytest.approx(10 / 19)


def test_above_max_errors_there_is_no_win_rate():
    pairs = [pair(str(i), "k" if i < 10 else "h") for i in range(20)]
    found = rates(judged(["error"] + ["win"] * 19), pairs)  # 5 % of all, 10 % of k
    k = found["subsets"]["k"]
    assert (k["win_rate"], k["mean_score"], k["se_prompts"], k["win"], k["error"]) == (None, None, None, 9, 1)
    assert k["reason"] == (
        "1 of 10 pairs are in error, more than max_errors=0.05 allows; what fails is not a random part, so the rest "
        "gives no win rate"
    )
    assert found["subsets"]["h"]["win_rate"] == found["all"]["win_rate"] == 100.0
    assert found["average"] is None  # of three subsets it would be another number
    assert too_many(["error", "win"], 0.5) is None


def test_when_all_fail_and_all_may_there_is_no_win_rate():
    found = rates(judged(["error"] * 2, max_errors=1.0), [pair("a"), pair("b")])
    assert (found["all"]["win_rate"], found["average"], found["all"]["error"]) == (None, None, 2)


def test_the_clustered_error_of_unequal_clusters():
    """1, 0 | 1: mean 2/3; sums −1/3 and 1/3: √(2 · 2/9)/3 = 2/9."""
    assert clustered_error(np.array([1.0, 0.0, 1.0]), ["a", "a", "b"]) == pytest.approx(2 / 9)
    alone = np.array([3.0, 1.0, 4.0, 1.0])
    assert clustered_error(alone, list("abcd")) == pytest.approx(alone.std(ddof=1) / 2)
    assert clustered_error(alone, list("aaaa")) is None


# --- the prompt

OURS = Template(system=None, user="{question} {answer_a} {answer_b} [[A]]")


def test_texts_are_put_in_as_they_are():
    messages = OURS.messages(PROMPT, r"{answer_b} {0} \1 }{", "{question}")
    assert messages == [{"role": "user", "content": r"1 + 2? {answer_b} {0} \1 }{ {question} [[A]]"}]


def test_a_conversation_is_shown_with_its_roles():
    prompt = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
              {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"})  # fmt: skip
    assert question(prompt) == (
        "This is a conversation; the two answers reply to its last message.\n\n"
        "[System]\nBe kind.\n\n[User]\nHi\n\n[Assistant]\nHello\n\n[User]\nBye"
    )


def test_another_text_is_another_hash(tmp_path):
    (tmp_path / "t.txt").write_text("{question}{answer_a}{answer_b} [[A]]")
    other = read_template(str(tmp_path / "t.txt"), OURS, "[[A]]")
    assert other.hash != OURS.hash == Template(system=None, user=OURS.user).hash
    assert Template(system="", user=OURS.user).hash != OURS.hash
    assert read_template(None, OURS, "[[A]]") is OURS


def test_the_benchmarks_own_files_are_read(tmp_path):
    """Their forms, not their words: FastChat's list of entries, Arena-Hard's YAML, AlpacaEval's marks."""
    entry = {"name": "pair-v2", "system_prompt": "judge [[A]]", "prompt_template": "{question}|{answer_a}|{answer_b}"}
    other = {"name": "single-v1", "system_prompt": "no", "prompt_template": "{question}"}
    (tmp_path / "judge_prompts.jsonl").write_text("\n".join(map(json.dumps, [other, entry])) + "\n")
    (tmp_path / "judge_config.yaml").write_text(
        'regex_pattern: \\[\\[([AB<>=]+)\\]\\]\nsystem_prompt: "judge\\n[[A]]"\n'
        'prompt_template: ["{question_1}|{answer_1}|{answer_2}"]\n'
    )
    (tmp_path / "clf.txt").write_text(
        "<|im_start|>system\njudge\nwell [[A]]\n<|im_end|>\n<|im_start|>user\n"
        "{instruction}|{output_1}|{output_2}\n<|im_end|>\n"
    )
    for name, system in (
        ("judge_prompts.jsonl", "judge [[A]]"), ("judge_config.yaml", "judge\n[[A]]"), ("clf.txt", "judge\nwell [[A]]")
    ):  # fmt: skip
        template = read_template(str(tmp_path / name), OURS, "[[A]]")
        assert template.messages(PROMPT, "x", "y") == [
            {"role": "system", "content": system},
            {"role": "user", "content": "1 + 2?|x|y"},
        ]


def test_a_template_that_lacks_a_part_names_all_that_it_lacks(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("{question} and {answer_a}")
    with pytest.raises(UserError) as error:
        read_template(str(path), OURS, "[[A]]")
    assert str(error.value) == (
        f"judge.template={path} cannot be used (2):\n"
        "  {answer_b}: does not occur in it\n"
        "  [[A]]: does not occur in it, so the judge would not know how to write its verdict"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [("none.txt", None), ("a.jsonl", '{"name": "other"}'), ("a.jsonl", "{"), ("a.yaml", "prompt_template: x"),
     ("a.yaml", "3"), ("a.jsonl", '{"name": "pair-v2"}')],
)  # fmt: skip
def test_a_template_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"judge.template=.*{name} cannot be used"):
        read_template(str(tmp_path / name), OURS, "[[A]]")


# --- a reward as judge


def test_a_reward_judges_by_the_rows_answer():
    pairs = [
        pair("a", gold="3"), pair("b", gold="4"), pair("c", answer="3", opponent="it is 3", gold="3"),
        pair("d", gold="7"),
    ]  # fmt: skip
    done = []
    found = RewardJudge(reward=ExactNumber())(pairs, done.append)
    assert found.outcomes == ["win", "loss", "tie", "tie"]
    assert found.scores.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert found.games[0] == {"id": "a", "subset": None, "seed": 0, "rewards": [1.0, 0.0], "verdict": "win"}
    assert found.facts["mean_difference"] == 0.0
    assert sum(done) == 4
    assert rates(found, pairs)["all"]["win_rate"] == 25.0
    json.dumps(found.facts, allow_nan=False)


def test_more_pairs_than_a_batch_keep_their_order():
    pairs = [pair(str(i), answer=str(i), opponent="-1", gold=str(i if i % 3 else 0)) for i in range(150)]
    done = []
    found = RewardJudge(reward=ExactNumber())(pairs, done.append)
    assert found.outcomes == ["win" if i % 3 or i == 0 else "tie" for i in range(150)]
    assert done == [64, 64, 22]


def test_within_the_margin_it_is_a_tie():
    """Gold 7: "7" has 1, "5" has 3/4, "6" has 7/8."""
    pairs = [pair("a", answer="7", opponent="5", gold="7"), pair("b", answer="6", opponent="7", gold="7")]
    for margin, expected in ((0.0, ["win", "loss"]), (0.125, ["win", "tie"]), (0.25, ["tie", "tie"])):
        assert RewardJudge(reward=NearNumber(), margin=margin)(pairs, lambda done: None).outcomes == expected


def test_a_reward_that_only_reads_scores_is_refused_before_anything_is_scored():
    with pytest.raises(UserError) as error:
        RewardJudge(reward=Score()).check()
    assert str(error.value) == (
        "judge=reward needs a reward that can score new text, and this one only reads the data's scores; choose "
        "another, as reward=offsetbias-rm-8b"
    )
    RewardJudge(reward=ExactNumber()).check()
    with pytest.raises(UserError, match="at least 0"):
        RewardJudge(reward=ExactNumber(), margin=-1.0)


def test_a_reward_that_is_not_finite_is_an_error_that_names_the_pair():
    class Broken(ExactNumber):
        def __call__(self, prompts, responses, answers):
            return [math.nan if text == "4" else 1.0 for text in responses]

    with pytest.raises(UserError, match=r"pair b, seed 2: 1.0 against nan"):
        RewardJudge(reward=Broken())([pair("a", opponent="5"), pair("b", seed=2)], lambda done: None)


# --- the configuration


@pytest.mark.parametrize("name", ["mtbench", "alpaca_eval_2", "arena_hard", "reward"])
def test_every_judge_composes_states_all_its_settings_and_has_its_own_defaults(name, tmp_path):
    """What the YAML says is what the class says without it, so that neither can drift."""
    reward = "+reward={_target_: var.rewards.programmatic.ExactNumber}"
    cfg = composed(f"+cache={tmp_path}", reward, root=f"judge/{name}")
    check(cfg, {})
    judge = instantiate(cfg.judge)
    for part, given in ((judge, cfg.judge), (getattr(judge, "client", None), cfg.judge.get("client"))):
        if part is not None:
            stated = {key for key in given if key not in ("_target_", "_convert_")}
            assert stated == {one.name for one in fields(part) if one.init}
    own = {"client": judge.client} if name != "reward" else {"reward": judge.reward}
    assert judge == type(judge)(**own)
    assert name == "reward" or type(judge.request) is dict
