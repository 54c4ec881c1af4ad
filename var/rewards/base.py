"""The reward protocol, and checks of what a reward reads and returns."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from var.data.rows import Message, Rows
from var.utils.errors import Problems, UserError, brief

Triple = tuple[Sequence[Message], str, str | None]  # prompt, response, answer


class Triples(Sequence[Triple]):
    """What is to be scored, read row by row when it is asked for: the texts of a large data set do not fit in memory.

    prompt, row, response: [n] the row whose prompt is asked, the row that answers, and which of its responses.
    """

    def __init__(self, rows: Rows, prompt: np.ndarray, row: np.ndarray, response: np.ndarray) -> None:
        self.rows, self.prompt, self.row, self.response = rows, prompt, row, response

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: Any) -> Any:
        asked = self.rows[self.prompt[index]]
        given = asked if self.prompt[index] == self.row[index] else self.rows[self.row[index]]
        return asked.prompt, given.responses[self.response[index]].text, asked.answer


class Reward(Protocol):
    """A reward of text. scores_text: False where it can only read the data's own scores. One that compares with a
    row's `answer` says so by reads_answers = True, and rows without one are told before anything is sampled; so are
    those of whose answer `answer_fault(answer)`, where a reward has it, says what is wrong (None: nothing)."""

    scores_text: bool

    @property
    def identity(self) -> dict[str, Any]: ...

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        """Raw rewards, one a response, in reward units."""
        ...


def scored(
    reward: Reward, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
) -> np.ndarray:
    """[n] float64: what a reward returns, as a list, an array or a tensor; UserError where it is not n numbers."""
    returned = reward(prompts, responses, answers)
    name = f"the reward ({type(reward).__name__})"
    try:
        numbers = np.asarray(returned, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:  # the last one is torch's, of a tensor with a gradient
        raise UserError(f"{name} returns no list of numbers: {brief(error)}") from error
    if len(numbers) != len(responses):
        raise UserError(
            f"{name} returned {len(numbers)} numbers for {len(responses)} responses; it owes one a response"
        )
    return numbers


def check_scores(names: Iterable[str]) -> None:
    """reward=score reads the data's own scores. names: of the rows that lack one."""
    problems = Problems("reward=score, but the data carries no score")
    for name in names:
        problems.add(f"row {name}", "a response has no score")
    problems.check("Choose a reward that scores text, as reward=offsetbias-rm-8b.")


def check_answers(reward: Reward, rows: Rows) -> None:
    """Of a reward that reads them, rows that have no `answer`, or none that it can compare with."""
    if getattr(reward, "reads_answers", False):
        fault = getattr(reward, "answer_fault", lambda answer: None)
        problems = Problems("the reward compares with a row's `answer`, and rows have none that it can use")
        for i, answer in enumerate(rows.table["answer"]):
            if what := "no answer" if answer is None else fault(answer):
                problems.add(f"row {rows[i].id}", what)
        problems.check(
            "Mend the rows, or choose a reward that needs none, as reward=classifier; reward=score reads the data's "
            "own scores, and leaves validation without a reward unless +reward@eval.reward=… names one."
        )
