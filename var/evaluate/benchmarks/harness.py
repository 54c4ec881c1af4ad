"""Benchmarks by lm-eval, in this process, on a model that is already loaded.

Each run writes its tasks as YAML files next to its results: lm-eval's own tasks (and ours for HumanEval) with their
shots, local files and limits of the sandbox. lm-eval's command line reads the same files (see `format_command`).

Local files in `folder`:
gsm8k_test.jsonl        question, answer; gsm8k_train.jsonl has the same form and, if it exists, gives the shots
humaneval.jsonl.gz      the problems as published
bbh/NAME.json           the tasks as published; their three shots are written in lm-eval's tasks
mmlu/SUBJECT.jsonl      question, choices (four), answer (0 to 3); SUBJECT.dev.jsonl gives the shots, if any
"""

import importlib.util
import re
import shlex
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from var.evaluate.benchmarks import sandbox
from var.evaluate.benchmarks.results import describe_task, list_scores, write_samples
from var.utils.distributed import Ranks
from var.utils.errors import Problems, UserError
from var.utils.extras import name_install

OWN_TASKS = Path(__file__).parent / "tasks"
HUMANEVAL = ("humaneval", "humaneval_instruct")
METRIC = "!function var.evaluate.benchmarks.tasks.humaneval.pass_at_1"
LAST_NUMBERS = "!function var.evaluate.benchmarks.tasks.gsm8k.last_numbers"
BBH_SHOTS = 3
GSM8K_SHOTS = 5  # lm-eval's default
SEED = 1234  # lm-eval's default, for tasks that draw their shots


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Which benchmarks to run, and how."""

    tasks: Mapping[str, int | None]
    """Shots by name of a task or group of lm-eval, or humaneval_instruct; null uses the task's own number of shots."""
    folder: str | None
    """The folder of local files; null uses the hub."""
    limit: int | None
    """Documents per task, from the first; null uses all."""
    apply_chat_template: bool
    """Whether prompts and shots are turns of the tokenizer's chat template."""
    batch: int
    """Prompts per batch."""
    max_new_tokens: int | None
    """Tokens per response; null uses the task's own limit."""
    unsafe_code: bool
    """Whether programs that the model writes may run, in a sandbox."""
    seconds: float
    """Wall time per program."""
    memory: int
    """MiB per program."""

    def check(self) -> None:
        """Raise one UserError for everything that is missing or wrong, before a model is loaded."""
        _packaged_folder()
        problems = Problems("the benchmarks cannot run")
        if not self.tasks:
            problems.add("benchmarks.tasks", "names no task")
        for name in ("limit", "batch", "max_new_tokens", "seconds", "memory"):
            if (value := getattr(self, name)) is not None and value <= 0:
                problems.add(f"benchmarks.{name}", f"must be above 0, got {value}")
        owner: dict[str, str] = {}
        for name, shots in self.tasks.items():
            key = f"benchmarks.tasks.{name}"
            if shots is not None and shots < 0:
                problems.add(key, f"shots must be at least 0, or null, got {shots}")
                continue
            sources = self.find_sources(name, shots)
            for source in sources:
                if source.name in owner:
                    problems.add(key, f"{source.name} is already in benchmarks.tasks.{owner[source.name]}")
                owner[source.name] = name
            if missing := [file for source in sources for file in source.files.values() if not file.is_file()]:
                more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
                problems.add(key, f"missing file {missing[0]}{more}")
            if not sources and self.folder is not None:
                problems.add(key, "has no local form. Other tasks of lm-eval need benchmarks.folder=null.")
            elif not sources and name not in _packaged_tasks().all_tasks:
                problems.add(key, f"lm-eval {version('lm-eval')} has no such task")
            if name in HUMANEVAL and shots:
                problems.add(key, "has no shots. Set it to 0.")
            if name in HUMANEVAL and not self.unsafe_code:
                problems.add(key, "runs programs that the model writes. To allow it: benchmarks.unsafe_code=true")
            if name.startswith("bbh") and sources and (shots or 0) > BBH_SHOTS:
                problems.add(key, f"has {BBH_SHOTS} written shots, got {shots}")
        if self.unsafe_code and set(HUMANEVAL) & set(self.tasks):
            try:
                sandbox.check()
            except UserError as error:
                problems.add("benchmarks.unsafe_code", str(error))
        problems.check()

    def find_sources(self, name: str, shots: int | None) -> list["Source"]:
        """Return the tasks behind a name; none if it is not among `_known_tasks`."""
        return [
            self._find_source(task, path, shots)
            for task, path in _known_tasks().items()
            if name == task or (name in ("bbh", "mmlu") and task.startswith(name))
        ]

    def _find_source(self, task: str, path: Path, shots: int | None) -> "Source":
        config: dict[str, Any] = {"include": str(path)}
        if shots is not None:
            config["num_fewshot"] = shots
        if task in HUMANEVAL:
            limits = {"seconds": self.seconds, "memory": self.memory}
            config["metric_list"] = [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True, **limits}]
        if task == "gsm8k":
            own = {"name": "last-number", "filter": [{"function": "custom", "filter_fn": LAST_NUMBERS}]}
            config["filter_list"] = [*yaml.safe_load(path.read_text())["filter_list"], own]
        shots_from = "written in the task" if task.startswith("bbh") else "drawn from the data set's other split"
        if self.folder is None:
            return Source(task, config, {}, shots_from)

        folder = Path(self.folder).expanduser().absolute()
        options: dict[str, Any] = {}
        if task in HUMANEVAL:
            files = {"test": folder / "humaneval.jsonl.gz"}
        elif task == "gsm8k":
            files = {"test": folder / "gsm8k_test.jsonl"}
            shown = GSM8K_SHOTS if shots is None else shots
            if (train := folder / "gsm8k_train.jsonl").is_file():
                files["train"] = train
            elif shown:
                shots_from = f"the last {shown} rows of gsm8k_test.jsonl, which are not scored"
                config |= {"training_split": None, "fewshot_split": "shown", "fewshot_config": {"sampler": "first_n"}}
                options["split"] = {"test": f"test[:-{shown}]", "shown": f"test[-{shown}:]"}
            else:
                config |= {"training_split": None, "fewshot_split": None}
        elif task.startswith("bbh"):
            files = {"test": folder / "bbh" / f"{path.stem}.json"}
            options["field"] = "examples"
        else:
            subject = task.removeprefix("mmlu_")
            files = {"test": folder / "mmlu" / f"{subject}.jsonl"}
            if shots:
                files["dev"] = folder / "mmlu" / f"{subject}.dev.jsonl"
            else:
                config["fewshot_split"] = None
        options["data_files"] = {split: str(file) for split, file in files.items()}
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": options}
        return Source(task, config, files, shots_from)


@dataclass(frozen=True)
class Source:
    """A task whose local form is known."""

    name: str
    """lm-eval's name of the task."""
    config: Mapping[str, Any]
    """The YAML file that a run writes for it."""
    files: Mapping[str, Path]
    """Its local files by split; empty if the data comes from the hub."""
    shots_from: str | None
    """Where its shots come from; None if unknown."""


@cache
def _known_tasks() -> dict[str, Path]:
    """Return the YAML file of each task whose local form is known."""
    packaged = _packaged_folder()
    return {
        **{name: OWN_TASKS / f"{name}.yaml" for name in HUMANEVAL},
        "gsm8k": packaged / "gsm8k" / "gsm8k.yaml",
        **{f"bbh_cot_fewshot_{p.stem}": p for p in sorted((packaged / "bbh" / "cot_fewshot").glob("[a-z]*.yaml"))},
        **{p.stem: p for p in sorted((packaged / "mmlu" / "default").glob("mmlu_*.yaml"))},
    }


def _packaged_folder() -> Path:
    """Return lm-eval's folder of tasks without importing lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError(f"benchmarks need an extra: {name_install('eval')}")
    return Path(spec.origin).parent / "tasks"


@cache
def _packaged_tasks() -> Any:
    """Return all of lm-eval's own tasks. This takes seconds, so it is used for unknown names only."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def write_tasks(settings: Benchmarks, folder: Path) -> dict[str, Source]:
    """Write the YAML files of the tasks and of their groups in place of an earlier run's; return the known tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.yaml"):
        path.unlink()
    sources = {
        source.name: source for name, shots in settings.tasks.items() for source in settings.find_sources(name, shots)
    }
    for name, source in sources.items():
        text = yaml.safe_dump({**source.config, "task": name}, sort_keys=False, width=1000)
        (folder / f"{name}.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", text))  # a tag, not a string
    groups = {"bbh": "bbh/cot_fewshot/_bbh.yaml", "mmlu": "mmlu/default/_mmlu*.yaml"}
    for name in set(groups) & set(settings.tasks):
        for path in _packaged_folder().glob(groups[name]):
            (folder / f"group{path.stem}.yaml").write_text(yaml.safe_dump({"include": str(path)}))
    return sources


def precision_options(autocast: torch.dtype | None) -> dict[str, str]:
    """Return lm-eval's arguments of a model that computes in `autocast`, with the log-softmax in float32."""
    if autocast is None:
        return {}
    return {"mixed_precision_dtype": str(autocast).removeprefix("torch."), "softmax_dtype": "float32"}


def format_command(
    settings: Benchmarks,
    tasks: Path,
    model: str,
    out: Path,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
) -> list[str]:
    """Return lm-eval's own command for the same numbers, from a model's folder and the tasks that a run wrote."""
    model_options = {"pretrained": model, **precision_options(autocast)}
    words = [
        "python", "-m", "lm_eval", "--model", "hf",
        "--model_args", ",".join(f"{name}={value}" for name, value in model_options.items()), "--device", device,
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


def run_benchmarks(
    settings: Benchmarks,
    model: Any,
    tokenizer: Any,
    out: Path,
    autocast: torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Return every task's numbers and what they depend on, as JSON; write all responses to out/samples.parquet.

    The transformers model keeps its mode and attention, and the random state is restored. If a task is not available,
    a UserError is raised before the model runs.

    autocast: the dtype in which the model computes; None is that of its weights.
    ranks: the processes that share the requests. All of them call this function, and all but the first return {}.
    """
    ranks = ranks or Ranks()
    settings.check()
    if settings.apply_chat_template and not tokenizer.chat_template:
        raise UserError("benchmarks.apply_chat_template=true: the model's tokenizer has no chat template")

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from var.evaluate.benchmarks.model import SharedLM, restored

    with restored(model):
        options = precision_options(autocast)
        lm = SharedLM(
            pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=settings.batch, ranks=ranks, **options
        )
        if ranks.rank > 0:
            lm.serve()
            return {}
        sources = write_tasks(settings, out / "tasks")
        try:
            tasks = _load_tasks(settings, TaskManager(include_path=str(out / "tasks"), include_defaults=False))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"a benchmark's data cannot be read: {type(error).__name__}: {error}\n"
                "Without access to the hub, use local files: benchmarks.folder=…"
            ) from error
        _check_context(settings, tasks, lm)
        found = simple_evaluate(
            model=lm, tasks=tasks, limit=settings.limit, apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template, confirm_run_unsafe_code=settings.unsafe_code,
            gen_kwargs=None if settings.max_new_tokens is None else {"max_gen_toks": settings.max_new_tokens},
            task_manager=TaskManager(include_defaults=False), random_seed=0, numpy_random_seed=SEED,
            torch_random_seed=SEED, fewshot_random_seed=SEED,
        )  # fmt: skip
        assert found is not None
        lm.stop()
        write_samples(found, out / "samples.parquet")
        facts = {}
        for name in found["samples"]:
            source = sources.get(name, Source(name, {}, {}, None))
            facts[name] = describe_task(name, found, lm, source.shots_from, source.files)
        command = format_command(settings, out / "tasks", "FOLDER", out / "lm_eval", str(model.device), autocast)
        return {
            "harness": f"lm-eval {version('lm-eval')}",
            "chat_template": lm.chat_template(settings.apply_chat_template) or None,
            "shots_as_turns": settings.apply_chat_template,
            "limit": settings.limit,
            "batch": settings.batch,
            "autocast": None if autocast is None else options["mixed_precision_dtype"],
            "model_generation_config": model.generation_config.to_diff_dict(),  # e.g. a repetition penalty
            "scores": list_scores(found),
            "tasks": facts,
            "command": shlex.join(command),
        }


def _load_tasks(settings: Benchmarks, own: Any) -> list[Any]:
    """Load the tasks and groups with their data; `own` manages the tasks that this run wrote."""
    tasks: list[Any] = []
    for name, shots in settings.tasks.items():
        is_own = name in own.all_tasks
        loaded = (own if is_own else _packaged_tasks()).load([name])
        for task in () if is_own else loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"benchmarks.tasks.{name}: it would run generated programs outside the sandbox")
            if shots is not None:
                task.set_config(key="num_fewshot", value=shots)
        groups = loaded.get("groups") or {}
        tasks.extend([groups[name]] if name in groups else loaded["tasks"].values())
    return tasks


def _check_context(settings: Benchmarks, tasks: list[Any], lm: Any) -> None:
    """Raise a UserError if responses are as long as the model's context, which leaves no room for a prompt."""
    problems = Problems("these benchmarks do not fit the model's context")
    for task in (leaf for one in tasks for leaf in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])):
        if task.get_config("output_type") == "generate_until":
            new = settings.max_new_tokens or task.get_config("generation_kwargs").get("max_gen_toks", lm.max_gen_toks)
            if new >= lm.max_length:
                problems.add(task.task_name, f"responses of {new} tokens, in a context of {lm.max_length}")
    problems.check("Reduce benchmarks.max_new_tokens.")
