"""eval.py on the public files of AlpacaEval, Arena-Hard and MT-Bench: a judge compares the model with the baseline."""

import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.benchmarks import write_alpaca_eval, write_arena_hard, write_mt_bench
from tests.helpers.cli import check_error, check_run, spawn
from tests.helpers.runs import ROOT
from tests.helpers.servers import Broken, completion, serve_model, served

pytestmark = pytest.mark.e2e

WRITERS = {"alpaca_eval": write_alpaca_eval, "arena_hard": write_arena_hard, "mt_bench": write_mt_bench}
JUDGES = {"alpaca_eval": "alpaca_eval_2", "arena_hard": "arena_hard", "mt_bench": "mtbench"}
GAMES = {"alpaca_eval": 1, "arena_hard": 2, "mt_bench": 2}  # per pair


def list_options(data: str, folder: Path, model: Path, url: str, prompts: int = 3) -> list[str]:
    """Write the benchmark's files, and return the overrides that compare a model with the baseline."""
    if not (place := folder / "files" / data).exists():
        WRITERS[data](place, prompts)
    return [
        f"data={data}", f"data.path={place}", "held_out=false", "against=chosen", "reference=null", "seeds=[0]",
        f"model.path={model}", "generate.max_new_tokens=8", "reward=none",
        f"judge={JUDGES[data]}", f"judge.client.base_url={url}", "judge.client.concurrency=1",
        *(f"{name}={folder}/{name}" for name in ("annotation_cache", "cache", "out")),
    ]  # fmt: skip


def read_result(folder: Path, data: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the win rates and the games of an evaluation."""
    (place,) = (folder / "out").glob(f"*_{data}-*")
    games = [json.loads(line) for line in (place / "games.jsonl").read_text().splitlines()]
    return json.loads((place / "result.json").read_text())["win_rates"], games


def prefer_baseline(body: dict[str, Any], before: int = 0) -> Any:
    """Prefer the baseline, with 4/5 of the probability of "m" and "M" and with a clear verdict."""
    text = body["messages"][-1]["content"]
    first = "baseline" in text[: text.index("End of ")]
    if "logprobs" not in body:
        return completion(
            f"[[{'A' if first else 'B'}]]" if "[[C]]" in str(body) else f"[[{'A>>B' if first else 'B>>A'}]]"
        )
    p = 0.8 if first else 0.2
    top = [{"token": token, "logprob": math.log(value)} for token, value in (("m", p), ("M", 1 - p))]
    return completion("m", logprobs={"content": [{"token": "m", "logprob": 0.0, "top_logprobs": top}]})


@pytest.mark.parametrize("data", WRITERS)
def test_model_is_compared_with_the_baseline(data, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The judge prefers the baseline: 20 % by its probabilities, 0 % by its verdicts. The cost is printed first, and
    the same command sends nothing more."""
    said = list[tuple[str, int]]()
    with served(prefer_baseline) as server:
        monkeypatch.setattr("var.evaluate.judges.base.say", lambda text: said.append((text, len(server.bodies))))
        options = list_options(data, tmp_path, tiny_folder, server.base_url)
        printed = check_run("eval.py", *options)
        calls = 3 * GAMES[data]
        assert len(server.bodies) == calls
        assert all("baseline" in body["messages"][-1]["content"] for body in server.bodies)
        rates, games = read_result(tmp_path, data)
        assert rates["all"]["win_rate"] == pytest.approx(20 if data == "alpaca_eval" else 0)
        assert (rates["all"]["n"], rates["all"]["loss"], rates["facts"]["games"]) == (3, 3, calls)
        assert len(games) == calls
        assert ": length " in printed
        assert ": reward" not in printed
        (estimate,) = [(text, sent) for text, sent in said if text.startswith("Judge: ")]
        assert estimate[0].startswith(f"Judge: {calls} calls, about ")
        assert ", cost at most " in estimate[0]
        assert estimate[1] == 0
        assert ("only the first turn of each question is used" in printed) == (data == "mt_bench")

        check_run("eval.py", *options)
        assert len(server.bodies) == calls
        assert said[-2][0].startswith(f"Judge: {calls} calls ({calls} cached), about 0 tokens in and at most 0 out")
        assert read_result(tmp_path, data)[0]["all"] == rates["all"]


def test_subsets_of_mt_bench_are_its_categories(tiny_folder: Path, tmp_path: Path):
    with served(prefer_baseline) as server:
        check_run("eval.py", *list_options("mt_bench", tmp_path, tiny_folder, server.base_url))
    rates, _ = read_result(tmp_path, "mt_bench")
    assert {name: part["n"] for name, part in rates["subsets"].items()} == {"math": 1, "writing": 2}


def test_empty_outputs_and_repeated_prompts_are_reported(tiny_folder: Path, tmp_path: Path):
    file = write_alpaca_eval(tmp_path / "files" / "alpaca_eval", 4)
    file.write_text(file.read_text().replace("baseline 1", "").replace("Name 3", "Name 0"))
    with served(prefer_baseline) as server:
        printed = check_run("eval.py", *list_options("alpaca_eval", tmp_path, tiny_folder, server.base_url))
        assert len(server.bodies) == 2
    assert "alpaca_eval: 1 records of the data set are skipped\n" in printed
    assert "alpaca_eval: 2 of 2 prompts, held out or not (alpaca_eval 2; 1 rows repeat an earlier prompt)" in printed


def test_invalid_files_are_an_error_before_a_request(tiny_folder: Path, tmp_path: Path):
    folder = write_arena_hard(tmp_path / "files" / "arena_hard")
    answers = folder / "model_answer" / "gpt-4-0314.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
    with served(prefer_baseline) as server:
        options = list_options("arena_hard", tmp_path, tiny_folder, server.base_url)
        check_error("question.jsonl:3: model_answer/gpt-4-0314.jsonl has no answer to it", *options, command="eval.py")
        assert not server.bodies


@pytest.mark.long
@pytest.mark.parametrize("data", WRITERS)
def test_killed_evaluation_pays_for_no_reply_twice(data: str, tiny_folder: Path, tmp_path: Path):
    """SIGKILL while the judge works on the third game; then the same command. Only that game, whose reply did not
    arrive, is sent again."""
    stalled, killed = threading.Event(), threading.Event()

    def stall(body: dict[str, Any], before: int) -> dict[str, Any] | Broken:
        if len(server.bodies) == 3 and not stalled.is_set():
            stalled.set()
            killed.wait(60)
        return prefer_baseline(body)

    calls = 4 * GAMES[data]
    with served(stall) as server:
        options = list_options(data, tmp_path, tiny_folder, server.base_url, prompts=4)
        process = spawn(str(ROOT / "eval.py"), *options)
        assert stalled.wait(240), process.communicate(timeout=5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.set()
        assert not list(tmp_path.glob("out/*/result.json"))
        check_run("eval.py", *options)
        sent = [json.dumps(body) for body in server.bodies]
        assert (len(set(sent)), len(sent)) == (calls, calls + 1)
        assert sent.count(sent[2]) == 2
        check_run("eval.py", *options)
        assert len(server.bodies) == calls + 1
    rates, games = read_result(tmp_path, data)
    assert (rates["all"]["n"], rates["all"]["error"], len(games)) == (4, 0, calls)


# --- a real model as the judge


@pytest.fixture(scope="module")
def real_judge(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Yield the address of SmolLM2 in `transformers serve`."""
    with serve_model(smollm2, tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


@pytest.mark.long
@pytest.mark.parametrize("data", WRITERS)
def test_real_model_judges_a_benchmark(data: str, real_judge: str, smollm2: Path, tiny_folder: Path, tmp_path: Path):
    """SmolLM2 rarely writes a verdict, and this server has no log-probabilities. Errors are counted by kind, and
    a win rate is reported only if a pair has a verdict. The replies are cached, so a second run sends nothing."""
    limit = 1 if data == "alpaca_eval" else 24
    options = [
        *list_options(data, tmp_path, tiny_folder, real_judge, prompts=2), f"judge.client.model={smollm2}",
        "judge.client.timeout=600", "judge.max_errors=1", f"judge.request.max_tokens={limit}",
    ]  # fmt: skip
    printed = check_run("eval.py", *options)
    calls = 2 * GAMES[data]
    assert f"Judge: {calls} calls, about " in printed
    rates, games = read_result(tmp_path, data)
    facts, total = rates["facts"], rates["all"]
    assert (len(games), facts["games"], facts["usage"]["asked"], total["n"]) == (calls, calls, calls, 2)
    assert facts["usage"]["tokens_in"] > 100 * calls
    assert all(game["text"].strip() for game in games)
    failed = [game["error"] for game in games if game["verdict"] is None]
    assert sum(facts["errors"].values()) == len(failed)
    assert set(failed) <= {"truncated", "no verdict", "no log-probabilities"}
    assert (total["win_rate"] is None) == (total["error"] == 2)
    assert total["error"] + total["win"] + total["tie"] + total["loss"] == 2
    if data == "alpaca_eval":
        assert facts["errors"] == {"no log-probabilities": 2}
        assert "no win rate by the judge" in printed

    again = check_run("eval.py", *options)
    assert f"Judge: {calls} calls ({calls} cached)" in again
    assert read_result(tmp_path, data)[0]["facts"]["usage"]["asked"] == 0
    assert read_result(tmp_path, data)[0]["all"] == total


@pytest.mark.long
def test_alpaca_eval_reads_the_probabilities_of_a_real_model(smollm2: Path, tiny_folder: Path, tmp_path: Path):
    """SmolLM2 behind a server with log-probabilities: each verdict is its p(m) / (p(m) + p(M)), both among the five
    most likely tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in ("m", "M")]
    preferences = list[float]()

    @torch.no_grad()
    def reply(body: dict[str, Any], before: int) -> Any:
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        logps = model(**ids).logits[0, -1].log_softmax(-1)
        preferences.append(float(logps[letters].softmax(-1)[0]))
        best = zip(*logps.topk(body["top_logprobs"]), strict=True)
        top = [{"token": tokenizer.decode([int(token)]), "logprob": float(value)} for value, token in best]
        return completion(top[0]["token"], "length", logprobs={"content": [{**top[0], "top_logprobs": top}]})

    with served(reply) as server:
        check_run("eval.py", *list_options("alpaca_eval", tmp_path, tiny_folder, server.base_url))
    rates, games = read_result(tmp_path, "alpaca_eval")
    assert [game["verdict"] for game in games] == pytest.approx(preferences, abs=1e-5)
    scores = [p if game["order"] == "answer first" else 1 - p for p, game in zip(preferences, games, strict=True)]
    assert rates["all"]["win_rate"] == pytest.approx(100 * sum(scores) / 3, abs=1e-3)
    assert len(set(preferences)) == 3
    assert rates["all"]["error"] == 0
