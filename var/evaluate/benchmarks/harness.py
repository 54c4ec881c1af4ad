"""Benchmarks through lm-eval, in process, on a model that is already loaded; every number says what it is a number of.

Each run writes its tasks as YAML files beside its results: lm-eval's own tasks (and, for HumanEval, ours), with the
shots, the local files and the sandbox's limits filled in. lm-eval's command line reads the same files (`command`).

Local files, by name in `folder`:
gsm8k_test.jsonl        question, answer; gsm8k_train.jsonl of the same form, where it is there, gives the shots
humaneval.jsonl.gz      the problems as published
bbh/NAME.json           the tasks as published; their three shots are written in lm-eval's tasks
mmlu/SUBJECT.jsonl      question, choices (four), answer (0 to 3); SUBJECT.dev.jsonl gives the shots, if any
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from var.evaluate.benchmarks import sandbox
from var.models.attention import use_attention
from var.utils.errors import Problems, UserError

OWN = Path(__file__).parent / "tasks"


HUMANEVAL = ("humaneval", "humaneval_instruct")


BBH_SHOTS = 3


GSM8K_SHOTS = 5  # where none are named: lm-eval's own number


SEED = 1234  # lm-eval's own, which draws the shots of a task that draws them


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Which benchmarks, from where, and how they are asked.

    tasks: name → shots; null is the task's own number. A name is a task or a group of lm-eval, or humaneval_instruct.
    limit: documents a task, from the first. batch: prompts at once. max_new_tokens: a response; null is the task's own.
    unsafe_code: programs that the model writes are run; each has `seconds` and `memory` (MiB) in a sandbox.
    """

    tasks: Mapping[str, int | None]
    folder: str | None
    limit: int | None
    apply_chat_template: bool
    batch: int
    max_new_tokens: int | None
    unsafe_code: bool
    seconds: float
    memory: int

    def check(self) -> None:
        """UserError that tells everything that is missing or wrong, before a model is loaded."""
        _packaged()  # or lm-eval is not installed
        problems = Problems("the benchmarks cannot run")
        if not self.tasks:
            problems.add("benchmarks.tasks", "names no task")
        for name in ("limit", "batch", "max_new_tokens", "seconds", "memory"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.add(f"benchmarks.{name}", f"is above 0, got {value}")
        seen: dict[str, str] = {}
        for name, shots in self.tasks.items():
            where = f"benchmarks.tasks.{name}"
            if shots is not None and shots < 0:
                problems.add(where, f"shots are 0 or more, or null, got {shots}")
                continue
            for task in (found := _sources(name, shots, self)):
                if task.name in seen:
                    problems.add(where, f"{task.name} is in benchmarks.tasks.{seen[task.name]} already")
                seen[task.name] = name
            if missing := [file for task in found for file in task.files.values() if not file.is_file()]:
                more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
                problems.add(where, f"{missing[0]} is not there{more}")
            if not found and self.folder is not None:
                problems.add(where, "has no local form; for lm-eval's other tasks: benchmarks.folder=null")
            elif not found and name not in _all_packaged().all_tasks:
                problems.add(where, f"lm-eval {importlib.metadata.version('lm-eval')} has no such task")
            if shots and name in HUMANEVAL:
                problems.add(where, "is asked without shots: 0")
            if found and shots and shots > BBH_SHOTS and name.startswith("bbh"):
                problems.add(where, f"has {BBH_SHOTS} written shots, got {shots}")
            if not self.unsafe_code and name in HUMANEVAL:
                problems.add(where, "runs programs that the model writes; to allow it: benchmarks.unsafe_code=true")
        if self.unsafe_code and set(HUMANEVAL) & set(self.tasks):
            try:
                sandbox.check()
            except UserError as error:
                problems.add("benchmarks.unsafe_code", str(error))
        problems.check()


@dataclass(frozen=True)
class Source:
    """A task that we know: the YAML file that a run writes for it, its local files by split, and where its shots are
    from. Without local files it is the hub's data set, as lm-eval names it."""

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    shots: str


def _sources(name: str, shots: int | None, settings: Benchmarks) -> list[Source]:
    """The tasks behind a name; none where the name is not one that we know."""
    return [
        _source(task, yaml, shots, settings)
        for task, yaml in _known().items()
        if name == task or (name in ("bbh", "mmlu") and task.startswith(name))
    ]


@cache
def _known() -> dict[str, Path]:
    """The YAML file of each task whose local form is known."""
    packaged = _packaged()
    return {
        **{name: OWN / f"{name}.yaml" for name in HUMANEVAL},
        "gsm8k": packaged / "gsm8k" / "gsm8k.yaml",
        **{f"bbh_cot_fewshot_{p.stem}": p for p in sorted((packaged / "bbh" / "cot_fewshot").glob("[a-z]*.yaml"))},
        **{p.stem: p for p in sorted((packaged / "mmlu" / "default").glob("mmlu_*.yaml"))},
    }


def _packaged() -> Path:
    """lm-eval's folder of tasks, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("benchmarks need an extra: pip install -e '.[eval]'")
    return Path(spec.origin).parent / "tasks"


def _source(task: str, yaml: Path, shots: int | None, settings: Benchmarks) -> Source:
    config: dict[str, Any] = {"include": str(yaml)}
    if shots is not None:
        config["num_fewshot"] = shots
    if task in HUMANEVAL:
        limits = {"seconds": settings.seconds, "memory": settings.memory}
        metric = Function("var.evaluate.benchmarks.tasks.humaneval.pass_at_1")
        config["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True, **limits}]
    where = "written in the task" if task.startswith("bbh") else "drawn from the data set's other split"
    if settings.folder is None:
        return Source(task, config, {}, where)

    folder = Path(settings.folder).expanduser().absolute()
    options: dict[str, Any] = {}
    if task in HUMANEVAL:
        files = {"test": folder / "humaneval.jsonl.gz"}
    elif task == "gsm8k":
        files = {"test": folder / "gsm8k_test.jsonl"}
        held = GSM8K_SHOTS if shots is None else shots
        if (train := folder / "gsm8k_train.jsonl").is_file():
            files["train"] = train
        elif held:
            where = f"the last {held} rows of gsm8k_test.jsonl, which are not scored"
            config |= {"training_split": None, "fewshot_split": "shown", "fewshot_config": {"sampler": "first_n"}}
            options["split"] = {"test": f"test[:-{held}]", "shown": f"test[-{held}:]"}
        else:
            config |= {"training_split": None, "fewshot_split": None}
    elif task.startswith("bbh"):
        files = {"test": folder / "bbh" / f"{yaml.stem}.json"}
        options["field"] = "examples"
    else:
        subject = task.removeprefix("mmlu_")
        files = {"test": folder / "mmlu" / f"{subject}.jsonl"}
        if shots:
            files["dev"] = folder / "mmlu" / f"{subject}.dev.jsonl"
        else:
            config["fewshot_split"] = None
    options["data_files"] = {split: str(path) for split, path in files.items()}
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": options}
    return Source(task, config, files, where)


class Function(str):
    """A dotted name that lm-eval's YAML writes as !function."""


def write_tasks(settings: Benchmarks, folder: Path) -> list[Source]:
    """The YAML files of a run's tasks and of their groups, for us and for lm-eval's command line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.yaml"):
        path.unlink()  # of an earlier run, with other tasks
    sources = [one for name, shots in settings.tasks.items() for one in _sources(name, shots, settings)]
    for source in sources:
        text = yaml.dump({**source.config, "task": source.name}, Dumper=Dumper, sort_keys=False)
        (folder / f"{source.name}.yaml").write_text(text)
    groups = {"bbh": "bbh/cot_fewshot/_bbh.yaml", "mmlu": "mmlu/default/_mmlu*.yaml"}
    for name in set(groups) & set(settings.tasks):
        for path in _packaged().glob(groups[name]):
            (folder / f"group{path.stem}.yaml").write_text(yaml.dump({"include": str(path)}))
    return sources


def command(settings: Benchmarks, tasks: Path, model: str, out: Path, device: str = "cpu") -> list[str]:
    """lm-eval's own command for the same numbers, of the model in a folder and the tasks that a run wrote."""
    words = [
        "python", "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}", "--device", device,
        "--tasks", ",".join(settings.tasks), "--include_path", str(tasks), "--batch_size", str(settings.batch),
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    if settings.limit is not None:
        words += ["--limit", str(settings.limit)]
    if settings.max_new_tokens is not None:
        words += ["--gen_kwargs", f"max_gen_toks={settings.max_new_tokens}"]
    if settings.apply_chat_template:
        words += ["--apply_chat_template"]
    if settings.unsafe_code:
        words += ["--confirm_run_unsafe_code"]
    return words


def run(settings: Benchmarks, model: Any, tokenizer: Any, out: Path) -> dict[str, Any]:
    """Every task's numbers, and what they depend on, as plain JSON; out/samples.parquet has every response.

    model: a loaded transformers causal model, left in the mode, the attention and with the random state that it came
    with. UserError before the model runs, where a task cannot be had.
    """
    settings.check()
    if settings.apply_chat_template and not tokenizer.chat_template:
        raise UserError("benchmarks.apply_chat_template=true, but the model's tokenizer has no chat template")
    sources = write_tasks(settings, out / "tasks")

    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _as_it_came(model), use_attention(model, "sdpa"), isolate_rng(), _quiet("lm_eval"):
        lm = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=settings.batch)
        try:
            tasks = _load(settings, TaskManager(include_path=str(out / "tasks"), include_defaults=False))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"a benchmark's data cannot be read: {type(error).__name__}: {error}\n"
                "Without a hub, local files serve: benchmarks.folder=…"
            ) from error
        _check_room(settings, tasks, lm)
        found = simple_evaluate(
            model=lm, tasks=tasks, limit=settings.limit, apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template, confirm_run_unsafe_code=settings.unsafe_code,
            gen_kwargs=None if settings.max_new_tokens is None else {"max_gen_toks": settings.max_new_tokens},
            task_manager=TaskManager(include_defaults=False), random_seed=0, numpy_random_seed=SEED,
            torch_random_seed=SEED, fewshot_random_seed=SEED,
        )  # fmt: skip
        assert found is not None
        _write_samples(found, out / "samples.parquet")
        return {
            "harness": f"lm-eval {importlib.metadata.version('lm-eval')}",
            "chat_template": lm.chat_template(settings.apply_chat_template) or None,
            "shots_as_turns": settings.apply_chat_template,
            "limit": settings.limit,
            "batch": settings.batch,
            "model_generation_config": model.generation_config.to_diff_dict(),  # a repetition penalty counts here
            "scores": _scores(found),
            "tasks": {name: _facts(name, found, lm, sources) for name in found["samples"]},
            "command": shlex.join(command(settings, out / "tasks", "FOLDER", out / "lm_eval", str(model.device))),
        }


def _load(settings: Benchmarks, ours: Any) -> list[Any]:
    """The tasks and groups that were asked for, with their data."""
    tasks: list[Any] = []
    for name, shots in settings.tasks.items():
        known = name in ours.all_tasks
        loaded = (ours if known else _all_packaged()).load([name])
        for task in () if known else loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"benchmarks.tasks.{name}: it would run generated programs outside the sandbox")
            if shots is not None:
                task.set_config(key="num_fewshot", value=shots)
        groups = loaded.get("groups") or {}
        tasks.extend([groups[name]] if name in groups else loaded["tasks"].values())
    return tasks


def _check_room(settings: Benchmarks, tasks: list[Any], lm: Any) -> None:
    """A response as long as the model's context leaves no room for its prompt."""
    problems = Problems("these benchmarks do not fit the model's context")
    for task in (leaf for one in tasks for leaf in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])):
        if task.get_config("output_type") == "generate_until":
            new = settings.max_new_tokens or task.get_config("generation_kwargs").get("max_gen_toks", lm.max_gen_toks)
            if new >= lm.max_length:
                problems.add(task.task_name, f"responses of {new} tokens, in a context of {lm.max_length}")
    problems.check("Set benchmarks.max_new_tokens to less.")


@cache
def _all_packaged() -> Any:
    """lm-eval's own tasks, all of them: seconds of reading, so only for a name that we do not know."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _as_it_came(model: Any) -> Iterator[None]:
    """lm-eval sets a model to evaluate and leaves it so."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """What a logger warns of is counted here and stands in the results."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _scores(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record a task (or group), metric and extraction: value, standard error (of the mean over documents), n."""
    records = []
    for name, metrics in found["results"].items():
        members = _members(name, found)
        for key, value in metrics.items():
            metric, _, extraction = key.partition(",")
            if not extraction or metric.endswith("_stderr"):
                continue
            se = metrics.get(f"{metric}_stderr,{extraction}")
            records.append(
                {
                    "task": name,
                    "version": found["versions"].get(name),
                    "shots": found["n-shot"].get(name),
                    "metric": metric,
                    "extraction": extraction,
                    "value": _number(value),
                    "se": _number(se),
                    "n": sum(found["n-samples"][member]["effective"] for member in members),
                    "of": sum(found["n-samples"][member]["original"] for member in members),
                    "members": members if members != [name] else None,
                }
            )
    return records


def _members(name: str, found: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, of the groups in it too; a task is its own."""
    if name in found["n-samples"]:
        return [name]
    return [task for child in found["group_subtasks"].get(name, ()) for task in _members(child, found)]


def _number(value: Any) -> float | None:
    """A plain finite float; None for what is none, as lm-eval's "N/A"."""
    try:
        return number if math.isfinite(number := float(value)) else None
    except (TypeError, ValueError):
        return None


def _facts(name: str, found: Mapping[str, Any], lm: Any, sources: list[Source]) -> dict[str, Any]:
    """What a task's numbers depend on beside the model."""
    config, samples = found["configs"][name], found["samples"][name]
    generation = None
    if config["output_type"] == "generate_until":
        generation = {"max_gen_toks": lm.max_gen_toks, **config["generation_kwargs"]}
    room = lm.max_length + 1 if generation is None else lm.max_length - generation["max_gen_toks"]
    texts = [
        "".join(part for part in arguments if isinstance(part, str))
        for one in samples
        if one["filter"] == samples[0]["filter"]
        for arguments in one["arguments"]
    ]
    source = next((one for one in sources if one.name == name), None)
    return {
        "output": config["output_type"],
        "generation": generation,
        "shots_from": source.shots if source is not None and config.get("num_fewshot") else None,
        "prompts_cut_on_the_left": sum(len(lm.tok_encode(text)) > room for text in texts),
        "data": {
            split: {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for split, path in source.files.items()
        }
        if source is not None and source.files
        else {"hub": config.get("dataset_path"), "name": config.get("dataset_name")},
    }


def _write_samples(found: Mapping[str, Any], path: Path) -> None:
    """One row a document, extraction and metric. response of a multiple choice: each one's log-probability, nats."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for name, several in found["samples"].items():
        for one in several:
            if found["configs"][name]["output_type"] == "generate_until":
                response, extracted = one["resps"][0][0], str(one["filtered_resps"][0])
            else:
                choices = [str(arguments[-1]) for arguments in one["arguments"]]
                logps = [_first(resps[0]) for resps in one["resps"]]
                response = json.dumps(list(zip(choices, logps, strict=True)), ensure_ascii=False)
                extracted = choices[logps.index(max(logps))]
            rows += [
                {
                    "task": name,
                    "document": one["doc_id"],
                    "extraction": one["filter"],
                    "metric": metric,
                    "score": _number(one[metric]),
                    "prompt": one["arguments"][0][0],
                    "response": response,
                    "extracted": extracted,
                    "target": str(one["target"]),
                    "doc": json.dumps(one["doc"], ensure_ascii=False, default=str),
                }
                for metric in one["metrics"]
            ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def _first(response: Any) -> float:
    """The log-probability in what lm-eval gives for one choice: (logp, whether greedy), or logp."""
    return float(response[0] if isinstance(response, tuple | list) else response)
