"""The reward protocol, and checks of what a reward reads and returns."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from var.data.messages import Message
from var.data.rows import Rows
from var.utils.errors import Problems, UserError, brief

Prompts = Sequence[Sequence[Message]]
Answers = Sequence[str | None]
Triple = tuple[Sequence[Message], str, str | None]  # prompt, response, answer


class Triples(Sequence[Triple]):
    """Texts to score, read row by row on access, since those of a large data set do not fit in memory."""

    def __init__(self, rows: Rows, prompt: np.ndarray, row: np.ndarray, response: np.ndarray) -> None:
        self.rows = rows
        self.prompt = prompt  # [n] index of the row with the prompt and the answer
        self.row = row  # [n] index of the row with the response
        self.response = response  # [n] index of the response in its row

    def __len__(self) -> int:
        return len(self.row)

    @property
    def key(self) -> str:
        """A hash of which texts they are."""
        digest = hashlib.sha256(self.rows.key.encode())
        for part in (self.prompt, self.row, self.response):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).data)
        return digest.hexdigest()[:32]

    def __getitem__(self, index: Any) -> Any:
        asked = self.rows[self.prompt[index]]
        own = asked if self.prompt[index] == self.row[index] else self.rows[self.row[index]]
        return asked.prompt, own.responses[self.response[index]].as_text, asked.answer


class Reward(Protocol):
    """A reward of texts.

    Six members are optional:
        reads_answers: True if the reward compares with a row's `answer`. Rows without one are then an error before
            anything is sampled.
        text_fault(prompt, response): Return why the reward cannot score a text, or None. All such texts are reported
            before any is scored.
        answer_fault(answer): Return why the reward cannot use an answer, or None. Such rows are an error too.
        counts: What a mean reward is the fraction of, if each is 0 or 1, such as "right answers".
        origin: The weights that are used, in words or by the names of members, for the files of runs.
        release(): Free the memory of the reward's model, which the next use loads again.
    """

    scores_text: bool  # False: the reward can only read the data set's own scores

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rewards depend on, as JSON values. The annotation cache is keyed by it."""
        ...

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one raw reward per response, in reward units."""
        ...


def release(reward: Reward | None) -> None:
    """Free the memory of a reward that has a method for it."""
    getattr(reward, "release", lambda: None)()


def compute_scores(reward: Reward, prompts: Prompts, responses: Sequence[str], answers: Answers) -> np.ndarray:
    """Return [n] float64 rewards. Raise a `UserError` unless the reward returns n numbers (list, array or tensor)."""
    name = f"the reward ({type(reward).__name__})"
    try:
        returned = reward(prompts, responses, answers)
    except Exception as error:
        shown = ", ".join(repr(text[:60]) for text in responses[:1])
        error.add_note(f"It comes from {name}, for {len(responses)} responses, the first of which is {shown}.")
        raise
    try:
        numbers = np.asarray(returned, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises a RuntimeError for a tensor with a gradient
        raise UserError(f"{name} must return a list of numbers: {brief(error)}") from error
    if len(numbers) != len(responses):
        raise UserError(f"{name} returned {len(numbers)} numbers for {len(responses)} responses; expected one each")
    return numbers


def check_scores(names: Iterable[str]) -> None:
    """Raise a `UserError` for rows without a score, given their names. reward=score reads the data set's own scores."""
    problems = Problems("reward=score, but rows have no score")
    for name in names:
        problems.add(f"row {name}", "a response has no score")
    problems.check(
        "If another column has the scores, name it: data.columns='{score: <column>}'. Otherwise choose a reward that "
        "scores text, such as reward=offsetbias-rm-8b."
    )


def check_answers(reward: Reward, rows: Rows) -> None:
    """Raise a `UserError` for rows whose `answer` is missing or unusable, if the reward reads answers."""
    if not getattr(reward, "reads_answers", False):
        return
    find_fault = getattr(reward, "answer_fault", lambda answer: None)
    problems = Problems("the reward compares with a row's `answer`, which is missing or unusable")
    for i, answer in enumerate(rows.texts("answer")):
        if fault := "no answer" if answer is None else find_fault(answer):
            problems.add(f"row {rows[i].id}", fault)
    problems.check(
        "Fix these rows, or choose a reward that needs no answers, such as reward=classifier. reward=score reads the "
        "data set's own scores, and leaves validation without a reward unless you set +reward@eval.reward=…. A loss "
        "that needs no reward, such as loss=dpo, trains without one with eval=off."
    )


def check_texts(reward: Reward, triples: Iterable[Triple]) -> None:
    """Raise a `UserError` with all texts that the reward cannot score, if it says so. Nothing is scored."""
    if (find_fault := getattr(reward, "text_fault", None)) is None:
        return
    problems, texts = Problems(f"texts that the reward ({type(reward).__name__}) cannot score", shown=5), 0
    for prompt, response, _ in triples:
        texts += 1
        if fault := find_fault(prompt, response):
            problems.add(f"response {response[:60]!r}", fault)
    problems.check(f"They are {len(problems.found)} of {texts}. Leave them out, or choose a reward that reads them.")
