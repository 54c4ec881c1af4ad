"""Problems that the package reasoning-gym makes (Stojanovski et al., arXiv 2505.24760); reward=reasoning_gym scores."""

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import numpy as np

from var.data.rows import Row, messages
from var.data.sources import local
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """Prompts alone. A row's `answer` is the whole problem as a Python literal, since its score may need all of it.

    task: one of the package's hundred. size: problems drawn; one whose question came before is left out and counted,
    as narrow options hold few. options: the task's own settings, as {min_terms: 2, max_terms: 2}; null: its defaults.
    """

    task: str = "chain_sum"
    size: int = 500
    seed: int = 0
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", None if self.options is None else _plain(self.options))
        if self.size < 1:
            raise UserError(f"data.source.size={self.size}: at least 1 problem is to be drawn")
        if taken := {"size", "seed"} & set(self.options or ()):
            raise UserError(f"data.source.options holds {sorted(taken)}: set data.source.size and data.source.seed")

    def records(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        problems = dataset(self.task, self.size, self.seed, self.options)
        seen = set()
        for index in range(self.size):
            problem = problems[index]
            yield f"{self.task}:{index}", None if problem["question"] in seen else {"index": index, **problem}
            seen.add(problem["question"])

    def row(self, where: str, record: dict[str, Any] | None) -> Row | None:
        if record is None:
            return None
        problem = {name: record[name] for name in ("question", "answer", "metadata")}
        return Row(
            id=f"{self.task}-{record['index']}",
            prompt=messages(record["question"]),
            answer=written({"task": self.task, "options": self.options, **problem}),
        )

    def identity(self) -> Mapping[str, Any]:
        dataset(self.task, self.size, self.seed, self.options)  # what is wrong with them is told here, before a row
        return {**local.settings(self), "package": version("reasoning-gym")}


def dataset(task: str, size: int, seed: int, options: Mapping[str, Any] | None) -> Any:
    """The package's own data set, which makes problem i when it is asked for and scores answers."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError("reasoning_gym needs an extra: pip install -e '.[verifiers]'") from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        raise UserError(
            f"data.source.task={task}: reasoning-gym has no such task"
            + (f"; did you mean {', '.join(near)}?" if near else f"; it has {', '.join(sorted(DATASETS))}")
        )
    known = sorted({field.name for field in fields(DATASETS[task][1])} - {"size", "seed"})
    if unknown := sorted(set(options or ()) - set(known)):
        raise UserError(f"data.source.options: {task} has no {', '.join(unknown)}; it has {', '.join(known)}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **(options or {}))
    except Exception as error:  # its configurations check themselves by assertions and whatever their sums raise
        raise UserError(f"data.source.options={dict(options or {})} do not fit {task}: {error}") from error


def written(problem: dict[str, Any]) -> str:
    """A problem as the literal that `read_problem` reads: JSON would turn tuples into lists and keys into text."""
    text = repr(_plain(problem))
    try:
        if ast.literal_eval(text) == problem:
            return text
    except (ValueError, SyntaxError):
        pass
    raise ValueError("the problem holds something other than numbers, text and containers of these")


def read_problem(answer: str) -> dict[str, Any]:
    """The problem that a row's `answer` holds; a ValueError says that it holds none."""
    try:
        problem = ast.literal_eval(answer)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        problem = None
    if not isinstance(problem, dict) or not {"task", "options", "answer", "metadata"} <= set(problem):
        raise ValueError(f"no problem of reasoning-gym's but {answer[:60]!r}")
    return problem


def _plain(value: Any) -> Any:
    """Without numpy's scalars and a configuration's own containers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | set | frozenset):
        return type(value)(map(_plain, value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(map(_plain, value))
    return value
