"""eval.py in several processes gives the result of one, whoever starts them; devices that cannot be used are errors."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.cli import check_error, check_run, spawn
from tests.helpers.engines import install_engine
from tests.helpers.models import saved, tiny_model
from tests.helpers.runs import ROOT, composed, write_lines
from tests.helpers.servers import Broken, completion, served
from var.evaluate.devices import count_processes
from var.utils.errors import UserError

pytestmark = pytest.mark.e2e
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides of an evaluation with all its parts: reference, KL, judge, second reward, benchmarks."""
    folder = tmp_path_factory.mktemp("devices")
    for name, seed in (("model", 0), ("other", 1)):
        saved(folder / name, tiny_model(seed, max_position_embeddings=4096))
    (folder / "mmlu").mkdir()
    sums = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(9)]
    write_lines(folder / "gsm8k_test.jsonl", sums[:5])
    write_lines(folder / "gsm8k_train.jsonl", sums)  # the shots are drawn from it, one document after another
    choices = [{"question": f"{i}?", "choices": [f"{c}{i}" for c in "pqrs"], "answer": i % 4} for i in range(5)]
    write_lines(folder / "mmlu" / "anatomy.jsonl", choices)
    return [
        f"model.path={folder}/model", "model.name=tiny", f"reference={folder}/other", "data.source.problems=30",
        "data.validation_prompts=5", "reward=near_number", "+reward@second_reward=exact_number", "seeds=[0,1]",
        "generate.max_new_tokens=8", "benchmarks=local", f"benchmarks.folder={folder}", "~benchmarks.tasks",
        "+benchmarks.tasks={gsm8k: 2, mmlu_anatomy: 0}", "benchmarks.max_new_tokens=6", "benchmarks.batch=2",
    ]  # fmt: skip


def without_benchmarks(options: list[str]) -> list[str]:
    return [option for option in options if "benchmarks" not in option]


def write_to(folder: Path) -> list[str]:
    return [f"annotation_cache={folder}/store", f"cache={folder}/cache", f"out={folder}/evals"]


def read_result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return result.json without the facts about this run, and answers.jsonl."""
    (place,) = (folder / "evals").iterdir()
    result = json.loads((place / "result.json").read_text())
    del result["depends_on"]
    result.get("benchmarks", {}).pop("command", None)
    return result, [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    check_run("eval.py", *options, "judge=reward", *write_to(folder))
    return folder


def start(*words: str) -> str:
    """Run Python with these words, assert that it succeeds, and return what it printed."""
    process = spawn(*words)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors
    return out


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the numbers, texts and truth values of a JSON value by their paths."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(child, f"{path}.{key}")
    else:
        yield path, value


def assert_same(found: Any, expected: Any) -> None:
    """Assert that two JSON values are equal, numbers up to the rounding of another batch."""
    left, right = dict(flatten(found)), dict(flatten(expected))
    assert left.keys() == right.keys()
    for path, value in left.items():
        same = pytest.approx(right[path], abs=1e-4) if isinstance(value, float) else right[path]
        assert value == same, path


@pytest.mark.parametrize(
    "words",
    [[str(ROOT / "eval.py"), "devices=2"], pytest.param([*TORCHRUN, str(ROOT / "eval.py")], marks=pytest.mark.long)],
)
@pytest.mark.long
def test_two_processes_give_the_result_of_one(
    words: list[str], options: list[str], single: Path, tmp_path: Path
) -> None:
    printed = start(*words, *options, "judge=reward", *write_to(tmp_path))
    assert len(re.findall("^Result: ", printed, re.M)) == 1, printed
    assert len(re.findall("held-out prompts", printed)) == 1, printed
    (found, answers), (expected, expected_answers) = read_result(tmp_path), read_result(single)
    assert [record["model"] for record in answers] == [record["model"] for record in expected_answers]
    assert_same(found, expected)
    assert {part.name for part in (tmp_path / "evals").iterdir()} == {p.name for p in (single / "evals").iterdir()}
    shards = [len(list(table.glob("*.arrow"))) for table in (tmp_path / "store" / "responses").iterdir()]
    assert shards == [2] * 4  # each process sampled for each of two models and two seeds


@pytest.mark.long
def test_only_the_first_process_asks_the_judge(options: list[str], tmp_path: Path) -> None:
    with served(lambda body, before: completion("[[A]]")) as server:
        judge = ["judge=mtbench", "judge.client.api_key_env=null", f"judge.client.base_url={server.base_url}"]
        start(str(ROOT / "eval.py"), "devices=2", *without_benchmarks(options), *judge, *write_to(tmp_path))
        requests = [json.dumps(body, sort_keys=True) for body in server.bodies]
    assert len(requests) == len(set(requests)) > 0


@pytest.mark.long
def test_processes_end_with_a_killed_launcher(options: list[str], tmp_path: Path) -> None:
    """They are killed while they wait for a judge, which would take an hour."""
    with served(lambda body, before: Broken(text="{}", slow=3600)) as server:
        judge = ["judge=mtbench", "judge.client.api_key_env=null", f"judge.client.base_url={server.base_url}"]
        words = [*without_benchmarks(options), *judge, *write_to(tmp_path)]
        launcher = spawn(str(ROOT / "eval.py"), "devices=2", *words)
        until = time.monotonic() + 120
        while not server.bodies and time.monotonic() < until:
            time.sleep(0.2)
        children = find_children(launcher.pid)
        assert len(children) >= 2
        launcher.kill()
        launcher.wait()
        until = time.monotonic() + 30
        while (left := [pid for pid in children if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left


@pytest.mark.long
def test_vllm_samples_on_all_processes_and_resumes_after_a_kill(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is killed in its second call. The 256 answers of its first call are not sampled again.

    It is the first of two seeds. Each process has 300 prompts, so at least 44 are still missing. The other process may
    have sampled all of its prompts, or none.
    """
    monkeypatch.setenv("PYTHONPATH", install_engine(tmp_path / "path"))
    kept = [option for option in without_benchmarks(options) if not option.startswith("data.")]
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"{i}?", "answer": "1"} for i in range(600)])
    words = [*kept, "sampler=vllm", "data=files", f"data.path={tmp_path}/prompts.jsonl", "held_out=false"]
    start(str(ROOT / "eval.py"), "devices=1", *words, *write_to(tmp_path / "one"))

    command = [str(ROOT / "eval.py"), "devices=2", *words, *write_to(tmp_path / "two")]
    monkeypatch.setenv("VAR_KILL", f"2 {tmp_path}/killed")
    process = spawn(*command)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert not list((tmp_path / "two" / "evals").glob("*/result.json"))
    found = re.search(r"Answers of the model: (\d+) of 1200 are not cached", start(*command))
    assert found is not None
    assert 600 + 44 <= int(found[1]) <= 2 * 600 - 256, found[0]

    results = [read_result(tmp_path / name) for name in ("one", "two")]
    assert results[0][1] == results[1][1]
    assert_same(results[1][0], results[0][0])


def find_children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = list[int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def test_user_error_appears_once_and_before_the_processes(options: list[str], tmp_path: Path) -> None:
    wrong = ["devices=2", "benchmarks.folder=nowhere", *write_to(tmp_path)]
    error = check_error("missing file", *options, *wrong, command="eval.py")
    assert error.count("the benchmarks cannot run") == 1
    assert not list((tmp_path / "evals").iterdir())


@pytest.mark.parametrize(
    ("overrides", "gpus", "environment", "expected"),
    [
        ([], 0, {}, 1),
        ([], 8, {}, 8),
        (["devices=3"], 8, {}, 3),
        (["devices=3"], 0, {}, 3),
        (["sampler=vllm"], 8, {}, 8),
        (["sampler=vllm", "sampler.tensor_parallel_size=4"], 8, {}, 1),
        ([], 8, {"RANK": "5", "LOCAL_WORLD_SIZE": "8"}, 1),
        (["devices=0"], 0, {}, "devices: expected at least 1, or auto, got 0"),
        (["devices=9"], 8, {}, "devices: 9, but this machine has 8 GPUs"),
        (["devices=4"], 8, {"RANK": "0", "LOCAL_WORLD_SIZE": "8"}, "devices: 4, but the launcher started 8 processes"),
        (["sampler=vllm", "sampler.tensor_parallel_size=2", "devices=4"], 8, {}, "2, but each of 4 processes has one"),
        (["sampler=vllm", "sampler.tensor_parallel_size=9"], 8, {}, "tensor_parallel_size: 9, but this machine has 8"),
        (["sampler=vllm", "sampler.tensor_parallel_size=2"], 8, {"RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "each of 2"),
    ],
)
def test_one_process_is_started_per_gpu(
    overrides: list[str], gpus: int, environment: dict[str, str], expected: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cfg = composed(*overrides, root="eval")
    if isinstance(expected, int):
        assert count_processes(cfg) == expected
        return
    with pytest.raises(UserError) as error:
        count_processes(cfg)
    assert expected in str(error.value)
