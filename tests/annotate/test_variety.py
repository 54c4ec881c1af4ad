"""Responses that should be draws and are copies of each other: an error if the sampler is at fault, else a warning."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.helpers.annotators import ROWS, SAMPLING, RowSource
from var.annotate.annotator import Annotator
from var.annotate.responses import count_copied, describe_copies, sample_responses
from var.annotate.rewards import score_candidates
from var.data.messages import last_text
from var.data.read import read
from var.data.rows import Rows
from var.sampling.base import Sample
from var.utils.errors import UserError

CERTAIN = replace(SAMPLING, temperature=1e-4)


@dataclass
class Elsewhere:
    """A sampler that answers with `text`, the prompt's length and the names of the draws in `names`."""

    names: tuple[str, ...] = ("", "")
    varied: int = 0  # prompts, the shortest ones, to which the second response has another text
    text: str = "it is"
    calls: list[int] = field(default_factory=list)

    def fingerprint(self, reference: Any) -> dict[str, Any]:
        return {"sampler": repr((self.names, self.varied, self.text))}

    def check(self) -> None:
        pass

    def __call__(self, reference: Any, prompts: Any, sampling: Any, advance: Any) -> Any:
        self.calls.append(len(prompts))
        shortest = sorted({len(last_text(prompt)) for prompt in prompts})[: self.varied]
        several = self.names[: sampling.responses]
        return [
            [
                Sample(f"{self.text}{name}" + "?" * (k * (len(last_text(prompt)) in shortest)), True)
                for k, name in enumerate(several)
            ]
            for prompt in prompts
        ]

    def release(self) -> None:
        pass


def rows_of(annotator: Annotator, count: int = 6) -> Rows:
    return read(RowSource(ROWS[:count]), annotator.cache)


@pytest.mark.parametrize(
    "sampler",
    [Elsewhere(), Elsewhere(text="4"), Elsewhere(names=("", " \n")), Elsewhere(varied=1)],
    ids=["identical", "short", "but for white space", "nearly all"],
)
def test_copies_of_a_sampler_are_an_error_if_the_reference_varies(make, sampler: Elsewhere):
    annotator = make(sampler=sampler)
    with pytest.raises(UserError, match=rf"identical for {6 - sampler.varied} of 6 prompts.*docs/sampling.md"):
        sample_responses(annotator, rows_of(annotator), SAMPLING)
    with pytest.raises(UserError, match="identical for"):  # they were not cached
        score_candidates(annotator, rows_of(annotator), SAMPLING)
    assert sampler.calls == [6, 6]


@pytest.mark.parametrize(
    ("sampler", "count", "responses"),
    [(Elsewhere(names=("a", "b")), 6, 2), (Elsewhere(varied=2), 6, 2), (Elsewhere(), 3, 2), (Elsewhere(), 6, 1)],
    ids=["varied", "two of six varied", "few prompts", "one response each"],
)
def test_varied_or_few_responses_are_accepted(make, capsys, sampler: Elsewhere, count: int, responses: int):
    annotator = make(sampler=sampler)
    sample_responses(annotator, rows_of(annotator, count), replace(SAMPLING, responses=responses))
    assert "Warning" not in capsys.readouterr().out


def test_copies_are_a_warning_if_the_reference_is_as_certain(make, capsys):
    """At this temperature the reference repeats itself, so that the sampler may be right."""
    annotator = make(sampler=Elsewhere())
    assert len(sample_responses(annotator, rows_of(annotator), CERTAIN)) == 6
    assert "identical for 6 of 6 prompts" in capsys.readouterr().out


def test_copies_from_the_reference_itself_are_a_warning(make, capsys):
    annotator = make()
    sample_responses(annotator, rows_of(annotator), SAMPLING)
    assert "Warning" not in capsys.readouterr().out
    sample_responses(annotator, rows_of(annotator), CERTAIN)
    assert "identical for 6 of 6 prompts" in capsys.readouterr().out
    greedy = replace(SAMPLING, temperature=0.0, responses=1)
    sample_responses(annotator, rows_of(annotator), greedy)
    assert "Warning" not in capsys.readouterr().out


def test_prompts_with_one_or_only_empty_responses_are_not_counted():
    assert count_copied([["a", "a"], ["a", "b"], ["a"], ["", ""], ["", "a"], [[1, 2], [1, 2]]]) == (2, 4)
    assert describe_copies([["a", "a"]] * 3, SAMPLING) is None
    assert describe_copies([["a", "a"]] * 4 + [["a", "b"]], SAMPLING) is not None
    assert describe_copies([["a", "a"]] * 7 + [["a", "b"]] * 2, SAMPLING) is None
