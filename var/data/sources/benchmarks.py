"""Prompts of benchmarks for judges, with a baseline's answers: AlpacaEval 2.0, Arena-Hard 0.1 and MT-Bench.

The files are those that the benchmarks publish, on the hub or as a local copy. `eval.py … against=chosen` compares a
model with the baseline, whose answer is the only response of a row.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from var.data.check import INVALID
from var.data.messages import parse_prompt
from var.data.row import Response, Row
from var.data.sources import local
from var.data.sources.hub import HubSource, download
from var.data.sources.pairs import is_empty
from var.utils.errors import UserError


class Benchmark(HubSource):
    """Base of the benchmarks, whose files have the same names on the hub and in a local copy."""

    baseline: str
    path: str | None
    revision: str | None

    title: ClassVar[str]
    """The benchmark's name in messages."""
    repository: ClassVar[str]
    """The repository on the hub, owner/name."""
    kind: ClassVar[str] = "dataset"
    """What the hub calls it: dataset or space."""
    folder: ClassVar[str] = ""
    """The folder of the files in the repository, with a slash at its end."""
    expected_responses = 1

    @property
    def names(self) -> list[str]:
        """The files in the folder, the prompts first."""
        raise NotImplementedError

    @property
    def advice(self) -> str:
        """What to do if files are missing or invalid."""
        return (
            f"Set data.path to a folder with {' and '.join(self.names)} of {self.title}, or to null to read the hub's "
            f"{self.repository}. data.source.baseline names the model whose answers are read."
        )

    def files(self) -> list[Path]:
        """Return the files on the hub, or those in the folder `path` or next to the file `path`."""
        if self.path is None:
            names = [self.folder + name for name in self.names]
            return [download(self.repository, name, self.revision, self.kind) for name in names]
        place = Path(self.path).expanduser()
        prompts = place / self.names[0] if place.is_dir() else place
        files = [prompts, *(prompts.parent / name for name in self.names[1:])]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise UserError(f"data.path={self.path}: no such file: {', '.join(missing)}. {self.advice}")
        return files

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, record) of the prompts."""
        self.check_revision()
        return self.read(self.files())

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the settings with the stamps of the files."""
        return local.describe_source(self, self.files())

    @property
    def origin(self) -> str:
        """The path, or the repository with its commit."""
        if self.is_local:
            return str(self.path)
        commit = re.search("/snapshots/([0-9a-f]{40})/", self.files()[0].as_posix())
        return f"{self.repository} at commit {commit[1] if commit else 'unknown'}"

    @property
    def form(self) -> str:
        """The prompts and the answers, in one line."""
        return f"prompts of {self.title} with the answers of {self.baseline}"

    def explain(self, record: Any) -> str:
        """Return what to do about invalid records."""
        return self.advice

    def make_row(self, id: str, prompt: Any, answer: Any, subset: str | None = None) -> Row | None:
        """Return a prompt with the baseline's answer; None to skip and count an empty one."""
        response = Response(text=get_text(answer), source=self.baseline)
        row = Row(id=id, prompt=parse_prompt(get_text(prompt)), responses=(response,), ordered=True, subset=subset)
        return None if is_empty(row) else row


@dataclass(frozen=True, kw_only=True)
class AlpacaEval(Benchmark):
    """Read `instruction`, `output` and `generator`, the model that wrote the output.

    Rows of the complete file are named by their position from 0, which is the number of the instruction in AlpacaEval's
    files for length control. alpaca_eval.json has the outputs of text_davinci_003, the baseline of AlpacaEval 1.
    """

    baseline: str = "gpt4_1106_preview"  # the generator of all outputs
    path: str | None = None  # a file, or a folder with the file of the hub; None: read the hub
    revision: str | None = None  # commit or tag on the hub

    title = "AlpacaEval 2.0"
    repository = "tatsu-lab/alpaca_eval"
    expected_rows = 805

    @property
    def names(self) -> list[str]:
        """The baseline's outputs."""
        return ["alpaca_eval_gpt4_baseline.json"]

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, (id, record))."""
        found = list(super().records())
        complete = len(found) == self.expected_rows
        for position, (where, record) in enumerate(found):
            yield where, (str(position) if complete else where, record)

    def row(self, where: str, record: tuple[str, Any]) -> Row | None:
        """Return an instruction with the baseline's output."""
        id, value = record[0], local.parse_record(record[1])
        if value["generator"] != self.baseline:
            raise ValueError(f"expected an output of data.source.baseline={self.baseline}, got {value['generator']!r}")
        return self.make_row(id, value["instruction"], value["output"])


class QuestionFiles(Benchmark):
    """Base of benchmarks with the files of FastChat: question.jsonl and model_answer/<model>.jsonl."""

    turns: ClassVar[int]
    """The turns of a question. Only the first one is used."""
    categories: ClassVar[tuple[str, ...]]
    """The categories of the questions, which are the rows' subsets."""

    @property
    def names(self) -> list[str]:
        """The questions, and the baseline's answers."""
        return ["question.jsonl", f"model_answer/{self.baseline}.jsonl"]

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, (question, its answers with their places)), and (where, (None, answer)) without a question."""
        self.check_revision()
        questions, answers = self.files()
        found = dict[str, list[tuple[str, Any]]]()
        for where, record in self.read([answers]):
            found.setdefault(_find_key(where, record), []).append((where, record))
        keys = set[str]()
        for where, record in self.read([questions]):
            keys.add(key := _find_key(where, record))
            yield where, (record, found.get(key, []))
        yield from (
            (where, (None, record)) for key, several in found.items() if key not in keys for where, record in several
        )

    def row(self, where: str, record: tuple[Any, Any]) -> Row | None:
        """Return the first turn of a question with the baseline's answer."""
        question, answers = record
        if question is None:
            id = get_id(local.parse_record(answers))
            raise ValueError(f"its question is not in {self.names[0]} (row {id})")
        question = local.parse_record(question)
        id, category = get_id(question), question["category"]
        if category not in self.categories:
            expected = ", ".join(self.categories)
            raise ValueError(f"not a question of {self.title}: expected the category {expected}, got {category!r}")
        turns = question["turns"] if "turns" in question else [question["prompt"]]
        if len(turns) != self.turns:
            raise ValueError(f"number of turns: expected {self.turns}, got {len(turns)}")
        if not answers:
            raise ValueError(f"{self.names[1]} has no answer to it (row {id})")
        if len(answers) > 1:
            raise ValueError(f"{self.names[1]} has several answers to it, got {', '.join(at for at, _ in answers)}")
        ((at, answer),) = answers
        try:
            text = get_answer(local.parse_record(answer))
        except INVALID as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"its answer in {at} cannot be read: {reason}") from error
        return self.make_row(id, turns[0], text, category)


@dataclass(frozen=True, kw_only=True)
class ArenaHard(QuestionFiles):
    """Read the 500 questions of Arena-Hard 0.1.

    The files are in FastChat's form (`turns`, `choices`) or in the benchmark's newer one (`prompt`, `messages`).
    """

    baseline: str = "gpt-4-0314"  # the model in model_answer/
    path: str | None = None  # a folder, or its question.jsonl; None: read the hub
    revision: str | None = None  # commit or tag on the hub

    title = "Arena-Hard 0.1"
    repository = "lmarena-ai/arena-hard-auto"
    folder = "data/arena-hard-v0.1/"
    expected_rows = 500
    turns = 1
    categories = ("arena-hard-v0.1",)


@dataclass(frozen=True, kw_only=True)
class MTBench(QuestionFiles):
    """Read the first turn of MT-Bench's 80 questions; the second turns and the reference answers are not used."""

    baseline: str = "gpt-3.5-turbo"  # the model in model_answer/; this one is FastChat's default
    path: str | None = None  # a folder, or its question.jsonl; None: read the hub
    revision: str | None = None  # commit or tag on the hub

    title = "MT-Bench"
    repository = "lmsys/mt-bench"
    kind = "space"
    folder = "data/mt_bench/"
    expected_rows = 80
    turns = 2
    categories = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

    @property
    def form(self) -> str:
        """The prompts and the answers, and what is not used."""
        return f"{super().form}; only the first turn of each question is used, not the second"


def get_id(record: Mapping[str, Any]) -> str:
    """Return the id of a question, or that of the question of an answer."""
    return str(record["uid"] if "uid" in record else record["question_id"])


def get_answer(record: Mapping[str, Any]) -> str:
    """Return the answer to the first turn: in FastChat's form (`choices`) or Arena-Hard's newer one (`messages`)."""
    if "choices" not in record:
        turns = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
    elif len(record["choices"]) == 1:
        turns = record["choices"][0]["turns"]
    else:
        raise ValueError(f"expected one choice, got {len(record['choices'])}")
    if not turns:
        raise ValueError("it has no turn of the assistant")
    return get_text(turns[0])


def get_text(value: Any) -> str:
    """Return a text, or that of an object with `content` or `answer`."""
    if isinstance(value, Mapping):
        value = value["content"] if "content" in value else value["answer"]
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r}")
    return value


def _find_key(where: str, record: Any) -> str:
    """Return the id in a record, or `where`, which no other record has, if it cannot be read."""
    try:
        return get_id(local.parse_record(record))
    except INVALID:
        return where
