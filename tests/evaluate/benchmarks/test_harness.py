"""Prompts, scores and provenance of benchmarks, through lm-eval's own code on a tiny model."""

import gzip
import importlib.util
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import instantiate
from lightning import seed_everything
from omegaconf import OmegaConf

from notebooks.tiny import byte_tokenizer
from tests.helpers.models import tiny_model
from tests.helpers.runs import ROOT, composed
from var.config.check import FOLDER, check
from var.evaluate.benchmarks import harness, sandbox
from var.evaluate.benchmarks.harness import Benchmarks, format_command, run_benchmarks
from var.evaluate.benchmarks.tasks.gsm8k import last_numbers
from var.evaluate.benchmarks.tasks.humaneval import pass_at_1
from var.models.attention import use_attention
from var.utils.errors import UserError

pytest.importorskip("lm_eval")

DEFAULTS = {
    "limit": None, "apply_chat_template": False, "batch": 4, "max_new_tokens": 64, "unsafe_code": False,
    "seconds": 2.0, "memory": 512,
}  # fmt: skip
LONG = {"max_position_embeddings": 16384}  # every byte is a token: prompts are long


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of `datasets` with the tests, and skip lm-eval's slow list of packages."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def settings(tasks: dict[str, int | None], folder: Path | None, **changes: Any) -> Benchmarks:
    return Benchmarks(tasks=tasks, folder=None if folder is None else str(folder), **{**DEFAULTS, **changes})


def sandboxed() -> None:
    try:
        sandbox.check()
    except UserError as error:
        pytest.skip(str(error))


def read_solutions(real_data: Path) -> dict[str, str]:
    """Return HumanEval's solutions by prompt, or skip the test if there is no sandbox."""
    sandboxed()
    with gzip.open(real_data / "humaneval.jsonl.gz", "rt") as file:
        return {p["prompt"]: p["canonical_solution"] for p in map(json.loads, file)}


def answering(answer: Callable[[str], str]) -> Any:
    """Return a tiny model whose `generate` gives known responses."""
    model, tokenizer = tiny_model(**LONG), byte_tokenizer()

    def generate(input_ids: torch.Tensor, max_length: int, **_: Any) -> torch.Tensor:
        new = [
            tokenizer(answer(tokenizer.decode(row, skip_special_tokens=True)))["input_ids"]
            for row in input_ids.tolist()
        ]
        room = max_length - input_ids.shape[1]
        rows = [(ids + [257] * room)[:room] for ids in new]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    model.generate = generate
    return model


def run(out: Path, tasks: Any, folder: Path | None, model: Any = None, tokenizer: Any = None, **changes: Any) -> Any:
    """Run benchmarks on a model, by default one that knows the sums."""
    model = answering(summed) if model is None else model
    return run_benchmarks(settings(tasks, folder, **changes), model, tokenizer or byte_tokenizer(), out)


def scores(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["task"], one["extraction"]): one for one in result["scores"]}


def samples(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "samples.parquet").to_pylist()


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """Write a small GSM8K: twelve sums in the form of the real file."""
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(10, 22)]
    return jsonl(tmp_path / "data" / "gsm8k_test.jsonl", rows).parent


def summed(prompt: str) -> str:
    """Answer 10 + 10 and 11 + 11 in the right form, 12 + 12 in free form, 13 + 13 wrong, and so on."""
    number = int(re.findall(r"What is (\d+)", prompt)[-1])
    return [f"#### {2 * number}", f"#### {2 * number}", f"It makes {2 * number}", "#### 7"][(number - 10) % 4]


@pytest.mark.parametrize(
    ("response", "answer", "number"),
    [
        ("It is 1,234.0 dollars", "2+2=4\n#### 1,234", "1,234"),
        ("It is 5.", "#### 1,234", "5"),
        ("2,3,5", "#### 235", "[none]"),
        ("So 10-7", "#### -7", "7"),
        ("\\frac{1}{2}", "#### .5", ".5"),
    ],
)
def test_last_number_of_gsm8k(response: str, answer: str, number: str) -> None:
    assert last_numbers([[response]], [{"answer": answer}]) == [number]


def test_gsm8k_has_all_extractions_with_errors(sums: Path, tmp_path: Path) -> None:
    """Of 8 rows 4 have the right form, 6 the right last number: 0.5 and 0.75; se √(p(1 − p)/(n − 1))."""
    result = run(tmp_path, {"gsm8k": 4}, sums)
    strict, flexible = scores(result)["gsm8k", "strict-match"], scores(result)["gsm8k", "flexible-extract"]
    assert (strict["value"], flexible["value"]) == (0.5, 0.75)
    assert scores(result)["gsm8k", "last-number"]["value"] == 0.75
    assert strict["se"] == pytest.approx(math.sqrt(0.25 / 7))
    assert flexible["se"] == pytest.approx(math.sqrt(0.1875 / 7))
    assert strict | {"value": 0, "se": 0} == {
        "task": "gsm8k", "version": 3.0, "shots": 4, "metric": "exact_match", "extraction": "strict-match", "value": 0,
        "se": 0, "n": 8, "of": 8, "members": None,
    }  # fmt: skip
    assert json.loads(json.dumps(result)) == result
    rows = samples(tmp_path)
    assert len(rows) == 24
    assert {(r["document"], r["extraction"], r["score"]) for r in rows if r["document"] < 4} == {
        (0, "strict-match", 1.0), (1, "strict-match", 1.0), (2, "strict-match", 0.0), (3, "strict-match", 0.0),
        (0, "flexible-extract", 1.0), (1, "flexible-extract", 1.0), (2, "flexible-extract", 1.0),
        (3, "flexible-extract", 0.0),
        (0, "last-number", 1.0), (1, "last-number", 1.0), (2, "last-number", 1.0), (3, "last-number", 0.0),
    }  # fmt: skip
    assert rows[0]["response"] == "#### 20"
    assert json.loads(rows[0]["doc"])["question"] == "What is 10 + 10?"


def test_result_has_its_provenance(sums: Path, tmp_path: Path) -> None:
    model = answering(summed)
    model.generation_config.repetition_penalty = 1.5
    result = run(tmp_path, {"gsm8k": 1}, sums, model, limit=2)
    facts = result["tasks"]["gsm8k"]
    assert facts["generation"]["max_gen_toks"] == 64
    assert facts["generation"]["do_sample"] is False
    assert len(facts["data"]["test"]["sha256"]) == 64
    assert facts["data"]["test"]["file"] == str(sums / "gsm8k_test.jsonl")
    assert facts["shots_from"] == "the last 1 rows of gsm8k_test.jsonl, which are not scored"
    assert re.fullmatch(r"lm-eval \d+\.\d+.*", result["harness"])
    assert result["chat_template"] is None
    assert result["model_generation_config"]["repetition_penalty"] == 1.5
    assert (result["limit"], result["batch"]) == (2, 4)
    assert [(s["n"], s["of"]) for s in result["scores"]] == [(2, 11)] * 3


def test_without_training_file_last_rows_are_the_shots(real_data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (real_data / "gsm8k_test.jsonl").read_text().splitlines()]
    result = run(tmp_path, {"gsm8k": 4}, real_data, answering(lambda _: "#### 1"), limit=3)
    assert scores(result)["gsm8k", "strict-match"]["of"] == len(rows) - 4
    for sample in samples(tmp_path):
        assert re.findall(r"Question: (.*)\nAnswer:", sample["prompt"]) == [
            *(row["question"] for row in rows[-4:]), rows[sample["document"]]["question"],
        ]  # fmt: skip


def test_training_file_gives_the_shots(sums: Path, tmp_path: Path) -> None:
    jsonl(sums / "gsm8k_train.jsonl", [{"question": f"Train {i}?", "answer": f"#### {i}"} for i in range(9)])
    result = run(tmp_path, {"gsm8k": 4}, sums)
    assert scores(result)["gsm8k", "strict-match"]["of"] == 12
    assert result["tasks"]["gsm8k"]["shots_from"] == "drawn from the data set's other split"
    assert set(result["tasks"]["gsm8k"]["data"]) == {"test", "train"}
    for sample in samples(tmp_path):
        assert len(set(re.findall(r"Train \d", sample["prompt"]))) == 4
        assert sample["prompt"].count("What is") == 1


def test_without_shots_every_row_is_scored(sums: Path, tmp_path: Path) -> None:
    result = run(tmp_path, {"gsm8k": 0}, sums)
    assert scores(result)["gsm8k", "strict-match"]["of"] == 12
    assert result["tasks"]["gsm8k"]["shots_from"] is None
    assert all(sample["prompt"].count("Question") == 1 for sample in samples(tmp_path))


def test_bbh_prompt_is_the_published_chain_of_thought(real_data: Path, tmp_path: Path) -> None:
    """The prompt is the published one, then the question; the answer is extracted from the response."""
    name = "bbh_cot_fewshot_object_counting"
    examples = json.loads((real_data / "bbh" / "object_counting.json").read_text())["examples"]

    def answer(prompt: str) -> str:
        right = next(
            e["target"] for e in examples if prompt.endswith(f"Q: {e['input']}\nA: Let's think step by step.\n")
        )
        return f"So the answer is {right if right != '8' else '9'}."

    result = run(tmp_path, {name: 3}, real_data, answering(answer), limit=8)
    right = sum(example["target"] != "8" for example in examples[:8]) / 8
    assert scores(result)[name, "get-answer"]["value"] == right
    assert 0 < right < 1
    assert result["tasks"][name]["shots_from"] == "written in the task"
    published = (real_data / "bbh" / "object_counting.cot-prompt.txt").read_text().split("-----\n")[1]
    shown = samples(tmp_path)[0]["prompt"].removesuffix(f"Q: {examples[0]['input']}\nA: Let's think step by step.\n")
    assert shown.split() == published.split()


def test_humaneval_runs_the_programs_in_the_sandbox(real_data: Path, tmp_path: Path) -> None:
    """Canonical solutions of three of four problems; the fourth response never ends and is stopped."""
    problems = read_solutions(real_data)
    last = list(problems)[3]

    def answer(prompt: str) -> str:
        return "    while True: pass\n" if prompt == last else problems[prompt]

    options = {"limit": 4, "unsafe_code": True, "max_new_tokens": 600, "seconds": 0.6}
    result = run(tmp_path, {"humaneval": 0}, real_data, answering(answer), **options)
    assert scores(result)["humaneval", "program"]["value"] == 0.75
    assert [sample["score"] for sample in samples(tmp_path)] == [1.0, 1.0, 1.0, 0.0]
    assert "seconds: 0.6" in (tmp_path / "tasks" / "humaneval.yaml").read_text()


def test_limits_apply_to_the_program() -> None:
    sandboxed()
    assert pass_at_1(["assert len(x) > 1"], ["x = bytearray(2**28)"], seconds=5.0, memory=1024) == 1.0
    assert pass_at_1(["assert len(x) > 1"], ["x = bytearray(2**28)"], seconds=5.0, memory=256) == 0.0
    assert pass_at_1(["assert sleep(1) is None"], ["from time import sleep"], seconds=0.5, memory=256) == 0.0


def test_chat_template_makes_turns_and_starts_the_answer(real_data: Path, tmp_path: Path) -> None:
    problems = read_solutions(real_data)

    def answer(prompt: str) -> str:
        given = prompt.rsplit("```python\n", 1)[1]
        return next(s for p, s in problems.items() if p.rstrip() == given.rstrip()) + "\n```\nIt returns at once."

    tasks = {"humaneval_instruct": 0, "gsm8k": 2}
    options = {"limit": 2, "unsafe_code": True, "max_new_tokens": 600, "apply_chat_template": True}
    model = answering(lambda prompt: answer(prompt) if "def " in prompt else "#### 1")
    result = run(tmp_path, tasks, real_data, model, **options)
    assert scores(result)["humaneval_instruct", "program"]["value"] == 1.0
    assert result["chat_template"] == byte_tokenizer().chat_template
    prompts = {sample["task"]: sample["prompt"] for sample in samples(tmp_path)}
    assert prompts["gsm8k"].count("<user>") == 3  # two shots are turns
    assert prompts["gsm8k"].endswith("<end><assistant>")
    assert not prompts["humaneval_instruct"].endswith("<assistant>")


SUBJECTS = ("anatomy", "astronomy")


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    for subject in SUBJECTS:
        rows = [
            {"question": f"{subject} {i}?", "choices": [f"{c}{i}" for c in "pqrs"], "answer": i % 4} for i in range(6)
        ]
        jsonl(tmp_path / "data" / "mmlu" / f"{subject}.jsonl", rows)
        jsonl(tmp_path / "data" / "mmlu" / f"{subject}.dev.jsonl", [{**r, "question": "shown?"} for r in rows])
    return tmp_path / "data"


def test_mmlu_compares_log_probabilities_of_the_letters(choices: Path, tmp_path: Path) -> None:
    """By hand: log p(" " | prompt) + log p(letter | prompt, " ") of the same model, the largest wins."""
    model, tokenizer = tiny_model(**LONG), byte_tokenizer()
    name = "mmlu_anatomy"
    result = run(tmp_path, {name: 0}, choices, model, tokenizer, max_new_tokens=None)
    right = []
    for sample in samples(tmp_path):
        ids = tokenizer(sample["prompt"])["input_ids"]
        logps = []
        for letter in "ABCD":
            full = torch.tensor([[*ids, *tokenizer(f" {letter}")["input_ids"]]])
            with torch.inference_mode(), use_attention(model, "sdpa"):
                out = model(full).logits.log_softmax(-1)[0]
            logps.append(float(out[-3, full[0, -2]] + out[-2, full[0, -1]]))
        assert json.loads(sample["response"]) == [
            [f" {c}", pytest.approx(p, abs=1e-4)] for c, p in zip("ABCD", logps, strict=True)
        ]
        assert sample["extracted"] == f" {'ABCD'[int(np.argmax(logps))]}"
        right.append(int(np.argmax(logps)) == json.loads(sample["doc"])["answer"])
        assert sample["score"] == right[-1]
    assert scores(result)[name, "none"]["value"] == pytest.approx(np.mean(right))
    assert result["tasks"][name]["generation"] is None


def test_mmlu_shots_are_the_development_rows(choices: Path, tmp_path: Path) -> None:
    run(tmp_path, {"mmlu_anatomy": 2}, choices, tiny_model(**LONG), max_new_tokens=None)
    assert all(sample["prompt"].count("shown?") == 2 for sample in samples(tmp_path))


def test_group_is_the_mean_over_all_documents(choices: Path, tmp_path: Path) -> None:
    """All 57 subjects of MMLU, one document each, and six of anatomy: Σ right / 62, not the mean of the subjects."""
    for task in harness._known_tasks():
        path = choices / "mmlu" / f"{task.removeprefix('mmlu_')}.jsonl"
        if task.startswith("mmlu") and not path.is_file():
            jsonl(path, [{"question": f"{task}?", "choices": list("pqrs"), "answer": len(task) % 4}])
    (choices / "mmlu" / "astronomy.jsonl").write_text(
        (choices / "mmlu" / "astronomy.jsonl").read_text().splitlines()[0] + "\n"
    )
    result = run(tmp_path, {"mmlu": 0}, choices, tiny_model(**LONG), max_new_tokens=None)
    found = scores(result)
    subjects = [one for (task, _), one in found.items() if one["members"] is None]
    assert len(subjects) == 57
    assert sum(one["n"] for one in subjects) == 62
    group = found["mmlu", "none"]
    assert group["value"] == pytest.approx(sum(one["value"] * one["n"] for one in subjects) / 62)
    assert group["value"] != pytest.approx(np.mean([one["value"] for one in subjects]))
    assert (group["n"], len(group["members"])) == (62, 57)
    stem = found["mmlu_stem", "none"]
    assert "mmlu_astronomy" in stem["members"]
    assert len(stem["members"]) < 57


def test_truncated_prompts_are_counted(sums: Path, tmp_path: Path) -> None:
    """A shot is 54 bytes, a question 34: two shots are 142. 206 positions less 64 for the response hold them."""
    for positions, truncated in ((206, 0), (205, 8)):
        model = tiny_model(max_position_embeddings=positions)
        result = run(tmp_path, {"gsm8k": 2}, sums, model, limit=8)
        assert result["tasks"]["gsm8k"]["prompts_truncated_on_the_left"] == truncated


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_model_computes_in_the_chosen_precision(
    choices: Path, sums: Path, tmp_path: Path, autocast: torch.dtype | None
) -> None:
    """In forward passes and in generation; the scores of choices stay in float32."""
    model, seen = tiny_model(**LONG), set()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    chosen = settings({"gsm8k": 0, "mmlu_anatomy": 0}, sums, limit=2, max_new_tokens=4)
    result = run_benchmarks(chosen, model, byte_tokenizer(), tmp_path, autocast)
    assert seen == {autocast or torch.float32}
    assert result["autocast"] == (None if autocast is None else "bfloat16")
    assert ("mixed_precision_dtype=bfloat16,softmax_dtype=float32" in result["command"]) is (autocast is not None)


def drawn() -> tuple[float, ...]:
    """Return the next numbers of the three global generators."""
    return random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize("training", [True, False])
def test_model_and_random_state_are_restored(sums: Path, tmp_path: Path, training: bool) -> None:
    model, tokenizer = tiny_model(**LONG).train(training), byte_tokenizer()
    model.model.layers[0].train(not training)
    next_numbers = []
    for runs in (False, True):
        seed_everything(3)
        if runs:
            run(tmp_path, {"gsm8k": 0}, sums, model, tokenizer, limit=1, max_new_tokens=4)
        next_numbers.append(drawn())
    assert next_numbers[0] == next_numbers[1]
    assert model.training is training
    assert model.model.layers[0].training is not training
    assert model.config._attn_implementation == "packed"
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == byte_tokenizer().padding_side


def test_run_is_deterministic_and_removes_old_tasks(sums: Path, tmp_path: Path) -> None:
    """A run with other tasks removes those of the first."""
    first, again = (run(tmp_path, {"gsm8k": 2}, sums, tiny_model(**LONG), max_new_tokens=8) for _ in range(2))
    assert first == again
    (tmp_path / "tasks" / "old.yaml").write_text("task: old")
    run(tmp_path, {"gsm8k": 0}, sums, tiny_model(**LONG), limit=1, max_new_tokens=4)
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["gsm8k.yaml"]


def test_all_problems_are_reported_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_packaged_tasks", lambda: SimpleNamespace(all_tasks=["ifeval"]))
    tasks = {
        "gsm8k": -1, "bbh": 4, "bbh_cot_fewshot_navigate": 3, "mmlu_anatomy": 5, "humaneval": 1, "gsm9k": 0,
        "ifeval": None,
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        settings(tasks, tmp_path, limit=0, memory=-1).check()
    text = str(error.value)
    assert text.startswith("the benchmarks cannot run (")
    for line in (
        "benchmarks.limit: must be above 0, got 0",
        "benchmarks.memory: must be above 0, got -1",
        "benchmarks.tasks.gsm8k: shots must be at least 0, or null, got -1",
        f"benchmarks.tasks.bbh: missing file {tmp_path}/bbh/boolean_expressions.json, and 26 more",
        "benchmarks.tasks.bbh: has 3 written shots, got 4",
    ):
        assert f"  {line}" in text.splitlines()
    del tasks["bbh"]
    with pytest.raises(UserError) as error:
        settings(tasks, tmp_path).check()
    version = importlib.metadata.version("lm-eval")
    assert str(error.value).splitlines() == [
        "the benchmarks cannot run (8):",
        "  benchmarks.tasks.gsm8k: shots must be at least 0, or null, got -1",
        f"  benchmarks.tasks.bbh_cot_fewshot_navigate: missing file {tmp_path}/bbh/navigate.json",
        f"  benchmarks.tasks.mmlu_anatomy: missing file {tmp_path}/mmlu/anatomy.jsonl, and 1 more",
        f"  benchmarks.tasks.humaneval: missing file {tmp_path}/humaneval.jsonl.gz",
        "  benchmarks.tasks.humaneval: has no shots. Set it to 0.",
        "  benchmarks.tasks.humaneval: runs programs that the model writes. To allow it: benchmarks.unsafe_code=true",
        "  benchmarks.tasks.gsm9k: has no local form. Other tasks of lm-eval need benchmarks.folder=null.",
        "  benchmarks.tasks.ifeval: has no local form. Other tasks of lm-eval need benchmarks.folder=null.",
    ]
    with pytest.raises(UserError) as error:
        settings({"gsm9k": 0, "ifeval": None}, None).check()
    assert (
        str(error.value)
        == f"the benchmarks cannot run (1):\n  benchmarks.tasks.gsm9k: lm-eval {version} has no such task"
    )


def test_repeated_task_is_an_error() -> None:
    with pytest.raises(UserError, match=r"tasks.mmlu_anatomy: mmlu_anatomy is already in benchmarks.tasks.mmlu"):
        settings({"mmlu": 0, "mmlu_anatomy": 0}, None).check()
    with pytest.raises(UserError, match=r"benchmarks.tasks: names no task"):
        settings({}, None).check()


@pytest.mark.parametrize("local", [True, False])
def test_task_is_a_name_and_not_a_path(local: bool, tmp_path: Path) -> None:
    """lm-eval would also read tasks from files. Names of tasks are names of files in the folder of results."""
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\noutput_type: generate_until\n")
    names = ["../../escaped", "/escaped", "a/b", "..", str(tmp_path / "mine.yaml"), str(tmp_path), "gsm8k/../gsm8k"]
    with pytest.raises(UserError) as error:
        settings(dict.fromkeys(names), tmp_path if local else None).check()
    reason = "has no local form" if local else "has no such task"
    assert [name for name in names if not re.search(re.escape(name) + f": .*{reason}", str(error.value))] == []


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        settings({"gsm8k": 4}, None).check()
    assert str(error.value) == "benchmarks need an extra: pip install -e '.[eval]'"


def test_response_as_long_as_the_context_is_rejected(sums: Path, tmp_path: Path) -> None:
    model = tiny_model(max_position_embeddings=256)
    with pytest.raises(UserError) as error:
        run(tmp_path, {"gsm8k": 1}, sums, model, max_new_tokens=None)
    assert str(error.value) == (
        "these benchmarks do not fit the model's context (1):\n  gsm8k: responses of 256 tokens, in a context of 256\n"
        "Reduce benchmarks.max_new_tokens."
    )
    run(tmp_path, {"gsm8k": 1}, sums, model, max_new_tokens=8, limit=1)


def test_turns_need_a_chat_template(sums: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run(tmp_path, {"gsm8k": 1}, sums, tiny_model(), byte_tokenizer(None), apply_chat_template=True)
    assert str(error.value) == "benchmarks.apply_chat_template=true: the model's tokenizer has no chat template"


def test_without_sandbox_humaneval_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("no namespaces here")

    monkeypatch.setattr(sandbox, "check", fail)
    settings({"gsm8k": 4}, None, unsafe_code=True).check()  # runs no program
    with pytest.raises(UserError, match=r"benchmarks.unsafe_code: no namespaces here"):
        settings({"humaneval": 0}, None, unsafe_code=True).check()


def test_other_task_that_runs_programs_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval would run them without a sandbox."""
    packaged = SimpleNamespace(
        all_tasks=["mbpp"], load=lambda names: {"tasks": {"mbpp": SimpleNamespace(UNSAFE_CODE=True)}}
    )
    monkeypatch.setattr(harness, "_packaged_tasks", lambda: packaged)
    with pytest.raises(UserError) as error:
        run(tmp_path, {"mbpp": 3}, None, tiny_model(), unsafe_code=True)
    assert str(error.value) == "benchmarks.tasks.mbpp: it would run generated programs outside the sandbox"


def test_unreadable_data_is_an_error_before_the_model_runs(tmp_path: Path) -> None:
    def never(prompt: str) -> str:
        raise AssertionError("the model ran")

    with pytest.raises(UserError, match=r"(?s)data cannot be read: .*use local files: benchmarks.folder=…"):
        run(tmp_path, {"gsm8k": 4}, None, answering(never))
    (tmp_path / "gsm8k_test.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="data cannot be read"):
        run(tmp_path, {"gsm8k": 4}, tmp_path, answering(never))


@pytest.mark.parametrize("path", sorted(Path(FOLDER, "benchmarks").glob("[!_]*.yaml")), ids=lambda p: p.stem)
def test_yaml_files_state_all_fields(path: Path, tmp_path: Path) -> None:
    loaded: Any = composed(f"benchmarks={path.stem}", root="eval").benchmarks
    OmegaConf.set_struct(loaded, False)
    loaded.folder = str(tmp_path) if OmegaConf.is_missing(loaded, "folder") else loaded.folder
    check(OmegaConf.create({"benchmarks": loaded}), {})
    built = instantiate(loaded)
    with pytest.raises(UserError, match=r"unsafe_code=true|missing file"):
        built.check()


def compared(
    model: str,
    tasks: dict[str, int | None],
    folder: Path,
    out: Path,
    autocast: torch.dtype | None = None,
    **changes: Any,
) -> int:
    """Compare our run with lm-eval's command line, document by document; return the number of responses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = settings(tasks, folder, **changes)
    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="packed")
    ours = run_benchmarks(chosen, loaded, AutoTokenizer.from_pretrained(model), out, autocast)
    words = format_command(chosen, out / "tasks", model, out / "theirs", autocast=autocast)
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True, text=True)
    (results,) = (out / "theirs").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]
    for one in ours["scores"]:
        assert theirs[one["task"]][f"{one['metric']},{one['extraction']}"] == pytest.approx(one["value"], abs=0)
        assert theirs[one["task"]][f"{one['metric']}_stderr,{one['extraction']}"] == pytest.approx(one["se"])
    documents = {(s["task"], s["document"], s["extraction"]): s for s in samples(out)}
    count = 0
    for path in (out / "theirs").rglob("samples_*.jsonl"):
        task = re.sub(r"samples_(.*)_\d{4}-.*", r"\1", path.name)
        for line in path.read_text().splitlines():
            theirs_one = json.loads(line)
            one = documents[task, theirs_one["doc_id"], theirs_one["filter"]]
            assert theirs_one["arguments"]["gen_args_0"]["arg_0"] == one["prompt"]
            assert theirs_one[one["metric"]] == one["score"]
            if one["response"].startswith("[["):
                logps = [float(several[0][0]) for several in theirs_one["resps"]]
                assert [p for _, p in json.loads(one["response"])] == pytest.approx(logps, abs=1e-5)
            else:
                assert theirs_one["resps"][0][0] == one["response"]
            count += 1
    assert count == len(documents)
    return count


@pytest.mark.long
@pytest.mark.parametrize(("turns", "autocast"), [(False, None), (True, None), (False, torch.bfloat16)])
def test_command_line_of_lm_eval_gives_the_same_results(
    tiny_folder: Path, real_data: Path, choices: Path, tmp_path: Path, turns: bool, autocast: torch.dtype | None
) -> None:
    for path in real_data.rglob("*"):
        if path.suffix in (".jsonl", ".gz", ".json"):
            target = choices / path.relative_to(real_data)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path)
    code = "humaneval_instruct" if turns else "humaneval"
    tasks = {"gsm8k": 4, "bbh_cot_fewshot_object_counting": 3, "bbh_cot_fewshot_date_understanding": 3, code: 0}
    options = {"limit": 6, "max_new_tokens": 24, "unsafe_code": True, "apply_chat_template": turns}
    tasks["mmlu_anatomy"] = 2
    assert compared(str(tiny_folder), tasks, choices, tmp_path / "out", autocast, **options) == 36


@pytest.mark.long
def test_other_tasks_of_lm_eval_are_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tasks.no_such: lm-eval .* has no such task"):
        settings({"ifeval": None, "no_such": 0}, None).check()
    settings({"ifeval": None}, None).check()
    with pytest.raises(UserError, match="data cannot be read"):  # on the hub, which no test uses
        run(tmp_path, {"ifeval": None}, None, tiny_model())
