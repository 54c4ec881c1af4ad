"""eval.py on a tiny random model: known numbers, a second run that computes nothing, rejected inputs."""

import csv
import importlib.machinery
import json
import signal
import sys
import threading
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from notebooks.tiny import byte_tokenizer
from tests.helpers.cli import check_run, run, spawn
from tests.helpers.engines import SeededEngine, sampling_params
from tests.helpers.models import saved, tiny_model
from tests.helpers.runs import ROOT, write_lines
from tests.helpers.servers import Broken, completion, served
from var.annotate import rewards
from var.data.chat import Chat
from var.models import frozen
from var.models.packing import pack
from var.models.policy import Policy
from var.models.pretrained import Pretrained
from var.report.read import EvaluationRecord

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("eval")
    return [
        f"model.path={tiny_folder}", "model.name=tiny", "data.source.problems=30", "data.validation_prompts=6",
        "reward=near_number", "seeds=[0,1]", "generate.max_new_tokens=8", f"annotation_cache={folder}/store",
        f"cache={folder}/cache", f"out={folder}/evals",
    ]  # fmt: skip


def result(options: list[str]) -> tuple[Path, dict]:
    (place,) = Path(options[-1].removeprefix("out=")).iterdir()
    return place, json.loads((place / "result.json").read_text())


def test_model_compared_with_itself_gains_nothing(base: list[str], tiny_folder: Path):
    options = [f"reference={tiny_folder}", "judge=reward", *base]
    done = run("eval.py", *options)
    assert done.returncode == 0, done.stderr
    place, found = result(options)
    part = found["model"]["subsets"]["arithmetic"]
    assert part["prompts"] == 6
    assert part["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert part["reward"] == found["reference"]["subsets"]["arithmetic"]["reward"]
    assert found["against_reference"]["reward"]["arithmetic"]["gain"]["mean"] == 0
    assert (found["win_rates"]["all"]["n"], found["win_rates"]["all"]["tie"]) == (12, 12)
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    rewards = [one["reward"] for record in answers for one in record["model"]]
    assert len(rewards) == 12
    assert part["reward"]["mean"] == pytest.approx(sum(rewards) / 12)
    assert len((place / "games.jsonl").read_text().splitlines()) == 12
    assert found["depends_on"]["weights"]["model"]["weights"]
    assert Path(found["depends_on"]["origins"]["model"]).is_dir()

    again = run("eval.py", *options)  # everything is cached
    assert "Answers of the model" not in again.stdout
    assert result(options)[1]["model"] == found["model"]


def test_kl_to_another_model_is_its_log_ratio(base: list[str], tiny_folder: Path, tmp_path: Path):
    saved(tmp_path / "other", tiny_model(seed=1))
    options = [f"reference={tmp_path}/other", *base[:-1], f"out={tmp_path}/evals"]
    done = run("eval.py", *options)
    assert done.returncode == 0, done.stderr
    place, found = result(options)
    chat, ids, starts = Chat(byte_tokenizer()), [], []
    for record in map(json.loads, (place / "answers.jsonl").read_text().splitlines()):
        for one in record["model"]:
            ids.append([*chat.prompt(record["prompt"]), *one["ids"]])
            starts.append(len(chat.prompt(record["prompt"])))
    batch = pack(ids, starts)
    with torch.no_grad():
        apart = batch.sum_by_sequence(Policy(tiny_model())(batch) - Policy(tiny_model(seed=1))(batch))
    assert found["model"]["subsets"]["arithmetic"]["kl"]["mean"] == pytest.approx(float(apart.mean()), abs=1e-3)
    assert apart.abs().mean() > 1


@pytest.mark.parametrize(
    ("message", "overrides"),
    [
        ("there is no reference. Set reference=", ["judge=reward"]),
        ("cannot score new text", ["reward=score"]),
        ("got [0, 0]", ["seeds=[0,0]"]),
        ("no chosen response", ["judge=reward", "against=chosen"]),
        ("nonsense: ", ["+nonsense=1"]),
        ("init=nowhere", ["init=nowhere"]),
    ],
)
def test_invalid_input_is_one_error_without_traceback(base: list[str], message: str, overrides: list[str]):
    done = run("eval.py", *base, *overrides)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_validation_during_training_is_logged_as_curves(tiny_folder: Path, tmp_path: Path):
    """The run uses bf16-mixed and gradient clipping."""
    done = run(
        "train.py", f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs", "data.source.problems=30", "data.validation_prompts=4", "reward=near_number",
        "loss=sft", "trainer.max_steps=3", "trainer.log_every_n_steps=1", "eval.every_n_steps=1",
        "trainer.precision=bf16-mixed", "trainer.accelerator=cpu", "generate.max_new_tokens=40",
        "optim.optimizer.lr=1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("reward", "win_rate", "length", "kl"):
        points = {int(row["step"]): float(row[f"validation/{name}"]) for row in rows if row.get(f"validation/{name}")}
        assert set(points) >= {1, 2, 3}, name
        assert name != "kl" or min(points[1], points[3]) > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["validation"]["win_rate"]["mean"] <= 1


# --- answers in a file, several data sets, another sampler


@pytest.fixture(scope="module")
def sampled(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of sample.py with two answers to each of 30 problems."""
    out = tmp_path_factory.mktemp("sampled") / "answers.jsonl"
    options = [option for option in base if not option.startswith(("out=", "seeds="))]
    done = run("sample.py", *options, "generate.responses=2", f"out={out}")
    assert done.returncode == 0, done.stderr
    return out


def test_file_of_answers_is_evaluated_like_a_model(base: list[str], sampled: Path, tmp_path: Path):
    """Answers are found by prompt in any order; answers that sample.py dropped as empty count as empty."""
    records = [json.loads(line) for line in sampled.read_text().splitlines()]
    next(record for record in records if len(record["responses"]) == 2)["responses"].pop(0)
    (tmp_path / "answers.jsonl").write_text("\n".join(json.dumps(record) for record in reversed(records)))
    options = [*base[:-1], f"answers={tmp_path}/answers.jsonl", "held_out=false", f"out={tmp_path}/evals"]
    done = run("eval.py", *options)
    assert done.returncode == 0, done.stderr
    place, found = result(options)
    answers = {r["id"]: r for r in map(json.loads, (place / "answers.jsonl").read_text().splitlines())}
    assert len(answers) == 30
    for record in records:
        texts = [one["text"] for one in answers[record["id"]]["model"]]
        own = [one["text"] for one in record["responses"]]
        assert texts == [*own, *[""] * (2 - len(own))]
    part = found["model"]["subsets"]["arithmetic"]
    rewards = [one["reward"] for record in answers.values() for one in record["model"]]
    assert part["reward"]["mean"] == pytest.approx(sum(rewards) / 60)
    assert "kl" not in part
    assert found["depends_on"]["answers"]["model"]["sha256"]
    assert found["depends_on"]["weights"] == {}
    assert place.name.startswith("answers_arithmetic-")


@pytest.mark.parametrize(
    ("message", "overrides"),
    [
        ("has 2 answers, but seeds has 3 numbers", ["seeds=[0,1,2]"]),
        ("has no answers, but seeds has 2 numbers", ["data.source.seed=1"]),
        ("there is no reference. Set reference=", ["judge=reward"]),
        ("no such file or folder", ["answers=nowhere.jsonl"]),
    ],
)
def test_file_with_missing_answers_is_an_error(base: list[str], sampled: Path, message: str, overrides: list[str]):
    done = run("eval.py", *base, f"answers={sampled}", *overrides)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_several_data_sets_are_evaluated_together(base: list[str], sampled: Path, tmp_path: Path):
    """One uses its held-out prompts, the other all prompts up to its limit."""
    rows = tmp_path / "rows.jsonl"
    own = [{"id": f"r{i}", "prompt": f"{i}?", "subset": "odd" if i % 2 else "even", "answer": "1"} for i in range(5)]
    rows.write_text("\n".join(map(json.dumps, own)))
    more = ["+data@more.own=files", f"more.own.path={rows}", "more.own.name=own", "more.own.limit=4"]
    options = [*base[:-1], *more, "held_out=[arithmetic]", f"out={tmp_path}/evals"]
    done = run("eval.py", *options, "+averages.some=[odd,absent]")
    assert done.returncode == 0, done.stderr
    assert "average, some (1 of 2 subsets): reward" in done.stdout
    place, found = result(options)
    assert place.name.startswith("tiny_arithmetic+own-")
    prompts = {name: part["prompts"] for name, part in found["model"]["subsets"].items()}
    assert prompts == {"arithmetic": 6, "even": 2, "odd": 2}
    assert found["model"]["averages"]["all of own"]["of"] == ["even", "odd"]
    assert set(found["model"]["averages"]) == {"some", "all of arithmetic", "all of own"}

    for message, overrides in (
        ("must have different names", ["more.own.name=arithmetic"]),
        ("more.own.nonsense: ", ["+more.own.nonsense=1"]),
        ("subset even: is in 2 data sets", ["+data@more.same=files", f"more.same.path={rows}", "more.same.name=same"]),
    ):
        done = run("eval.py", *options, *overrides)
        assert done.returncode == 1, message
        assert message in done.stderr


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def evaluate_on_hh_rlhf(base: list[str], folder: Path, *options: str) -> tuple[str, dict]:
    """Evaluate on HH-RLHF against the chosen responses. Return what was printed, and the result."""
    kept = [option for option in base[:-1] if not option.startswith("data.")]
    words = [
        *kept, "data=hh_rlhf", *options, "held_out=false", "reference=null", "judge=reward", "against=chosen",
        "reward=sentiment", f"out={folder}/evals",
    ]  # fmt: skip
    printed = check_run("eval.py", *words)
    return printed, result(words)[1]


def test_hh_rlhf_is_evaluated_by_the_subsets_of_hha(base: list[str], tmp_path: Path):
    """A clone has two of the three helpful subsets. One pair has two prompts, and one prompt is in a subset twice."""
    pairs = [{"chosen": dialogue(q, "good"), "rejected": dialogue(q, "bad")} for q in ("a", "b", "b")]
    broken = {"chosen": dialogue("a", "good"), "rejected": dialogue("b", "bad")}
    for i, subset in enumerate(("harmless-base", "helpful-base", "helpful-online")):
        own = [json.loads(json.dumps(pair).replace("Human: ", f"Human: {i}")) for pair in pairs]
        (tmp_path / "hh" / subset).mkdir(parents=True)
        write_lines(tmp_path / "hh" / subset / "test.jsonl", [*own, broken] if i == 0 else own[: 3 - i])
    printed, found = evaluate_on_hh_rlhf(
        base, tmp_path, f"data.path={tmp_path}/hh", "data.source.split=test",
        "data.source.subsets=[harmless-base,helpful-base,helpful-online]",
    )  # fmt: skip
    assert "hh_rlhf: 1 records of the data set are skipped" in printed
    counts = "harmless_base 2, helpful_base 2, helpful_online 1; 1 rows repeat an earlier prompt"
    assert f"5 of 5 prompts, held out or not ({counts})" in printed
    averages = found["model"]["averages"]
    assert averages["helpful"]["of"] == ["helpful_base", "helpful_online"]
    assert averages["helpful"]["without"] == ["helpful_rejection"]
    assert averages["all"]["of"] == ["harmless_base", "helpful_base", "helpful_online"]
    assert (found["win_rates"]["all"]["n"], sorted(found["model"]["subsets"])) == (10, averages["all"]["of"])


def test_hh_rlhf_file_is_evaluated_as_its_subset(base: list[str], tmp_path: Path, real_data: Path):
    file = real_data / "hh_rlhf_harmless_base_test.jsonl.gz"
    printed, found = evaluate_on_hh_rlhf(base, tmp_path, f"data.path={file}", "prompts=2")
    assert "hh_rlhf: 13 records of the data set are skipped" in printed
    assert "2 of 2297 prompts, held out or not (harmless_base 2; 2 rows repeat an earlier prompt)" in printed
    assert found["model"]["subsets"]["harmless_base"]["prompts"] == 2
    assert found["win_rates"]["all"]["n"] == 4


def test_answers_come_from_the_chosen_sampler(base: list[str], tmp_path: Path):
    with served(lambda body, before: completion(f"the answer is {body['seed'] % 7}")) as server:
        client = [f"sampler.client.base_url={server.base_url}", "sampler.client.model=tiny"]
        options = [*base[:-1], "sampler=endpoint", *client, f"out={tmp_path}/evals"]
        done = run("eval.py", *options)
        assert done.returncode == 0, done.stderr
        assert len(server.bodies) == 12
        place, found = result(options)
        first = json.loads((place / "answers.jsonl").read_text().splitlines()[0])
        assert all(one["text"].startswith("the answer is ") for one in first["model"])
        assert found["depends_on"]["answers"]["model"]["model"] == "tiny"
        assert run("eval.py", *options).returncode == 0
        assert len(server.bodies) == 12


def test_engine_of_vllm_has_the_gpu_for_itself(
    base: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No model and no reward is loaded while an engine runs, which reserves 0.9 of the GPU's memory."""
    events: list[str] = []

    class Recorded(SeededEngine):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            events.append("engine")
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: events.append("end")))

    def record(place: Any, name: str, event: str) -> None:
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **kwargs: (events.append(event), original(*args, **kwargs))[1])

    module = ModuleType("vllm")
    module.__dict__.update(
        LLM=Recorded, SamplingParams=sampling_params, __spec__=importlib.machinery.ModuleSpec("vllm", None)
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    record(Pretrained, "load", "load")
    record(frozen, "free_memory", "free")
    record(rewards, "compute_scores", "score")
    saved(tmp_path / "other", tiny_model(seed=1))
    places = [f"{name}={tmp_path}/{name}" for name in ("annotation_cache", "cache", "out")]
    check_run("eval.py", *base[:-3], f"reference={tmp_path}/other", "sampler=vllm", *places)
    each = ["engine", "end", "load", "free"]
    assert [event for event, _ in groupby(events)] == [*each, *each, "score"]


@pytest.mark.long
def test_killed_evaluation_resumes_by_the_same_command(tiny_folder: Path, base: list[str], tmp_path: Path):
    """SIGKILL during judging, then the same command gives the same numbers and repeats no request."""
    saved(tmp_path / "other", tiny_model(seed=1))
    common = [
        *base[:-3], f"reference={tmp_path}/other", "judge=mtbench", "judge.client.api_key_env=null",
        "judge.client.concurrency=1",
    ]  # fmt: skip

    def places(name: str) -> list[str]:
        return [f"{what}={tmp_path}/{name}/{what}" for what in ("annotation_cache", "cache", "out")]

    def verdict(body: dict, before: int) -> dict:
        return completion("[[A]]" if len(body["messages"][-1]["content"]) % 2 else "[[B]]")

    with served(verdict) as server:
        straight = run("eval.py", *common, f"judge.client.base_url={server.base_url}", *places("straight"))
        assert straight.returncode == 0, straight.stderr
        asked = len(server.bodies)
    stalled, killed = threading.Event(), threading.Event()

    def stalling(body: dict, before: int) -> dict | Broken:
        if len(server.bodies) == 6 and not stalled.is_set():
            stalled.set()
            killed.wait(60)
        return verdict(body, before)

    with served(stalling) as server:
        options = [*common, f"judge.client.base_url={server.base_url}", *places("killed")]
        process = spawn(str(ROOT / "eval.py"), *options)
        assert stalled.wait(240)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.set()
        assert not list((tmp_path / "killed" / "out").glob("*/result.json"))
        again = run("eval.py", *options)
        assert again.returncode == 0, again.stderr
        assert "Answers of the" not in again.stdout
        assert len(server.bodies) == asked + 1  # the one in flight
    one, two = (result(places(name))[1] for name in ("straight", "killed"))
    for part in ("model", "reference", "against_reference", "distinct"):
        assert one[part] == two[part]
    assert one["win_rates"]["all"] == two["win_rates"]["all"]
    read = [EvaluationRecord.read(path.parent) for path in sorted(tmp_path.glob("*/out/*/result.json"))]
    assert read[0].rewards == read[1].rewards != {}  # report.py compares evaluations by these
    assert read[0].by_prompt("reward") == read[1].by_prompt("reward")
    assert len(read[0].by_prompt("reward")) == 6


# --- a judge while training


def test_judge_during_training_logs_a_curve_and_may_fail(tiny_folder: Path, tmp_path: Path):
    """Two games for each of 3 prompts at each of 2 evaluations; the judge prefers the answer shown first, so every pair
    is a tie. Then the judge is down."""
    options = [
        f"model.path={tiny_folder}",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", f"runs={tmp_path}/runs",
        "data.source.problems=30", "data.validation_prompts=4", "reward=near_number", "loss=sft",
        "trainer.max_steps=2", "trainer.accelerator=cpu",
        "optim.optimizer.lr=1e-2", "eval.every_n_steps=1", "generate.max_new_tokens=40",
        "eval.judged=3", "+judge@eval.judge=mtbench", "eval.judge.client.api_key_env=null",
        "eval.judge.client.retries=0",
    ]  # fmt: skip
    with served(lambda body, before: completion("[[A]]")) as server:
        done = run("train.py", *options, f"eval.judge.client.base_url={server.base_url}")
        assert done.returncode == 0, done.stderr
        assert 6 <= len(server.bodies) <= 12  # an unchanged answer is judged once
    assert done.stdout.count("win rate against the initial policy") == 2  # by the reward and by the judge
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    judged = summary["validation"]["judge"]
    assert (judged["n"], judged["tie"], judged["win_rate"]) == (3, 3, 0.0)
    with (folder / "metrics.csv").open(newline="") as file:
        points = [row for row in csv.DictReader(file) if row["validation/judge_win_rate"]]
    assert [int(row["step"]) for row in points] == [1, 2]

    with served(lambda body, before: Broken(401)) as server:
        done = run("train.py", *options, f"eval.judge.client.base_url={server.base_url}", "resume=false", "seed=1")
    assert done.returncode == 0, done.stderr
    assert "the judge gave no verdict, training continues" in done.stdout
    done = run("train.py", *options[:-2], "eval.judge.client.api_key_env=NO_SUCH_KEY", "seed=2")
    assert done.returncode == 1
    assert "NO_SUCH_KEY is not set" in done.stderr
