"""Responses that the reference samples."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from var.annotate.annotator import Annotator
from var.annotate.cache import CacheTable
from var.annotate.cache_column import Column
from var.data import rows as rows_module
from var.data.changes import TemplateChanges
from var.data.chat import Chat
from var.data.report import DataReport
from var.data.row import Response, Row
from var.data.rows import Rows
from var.data.stored import make
from var.sampling.base import Prompts, Sample, Samples, Sampling
from var.sampling.local import Transformers
from var.utils.console import warn
from var.utils.errors import Problems, UserError
from var.utils.provenance import dump, hash_file

ENOUGH = 4  # prompts from which the variety of their responses is judged
COPIED = 0.8  # fraction of prompts with identical responses, from which the reference is asked for a comparison
COMPARED = 16  # prompts of the comparison


def sampling_fingerprint(annotator: Annotator, sampling: Sampling) -> dict[str, Any]:
    """Return what the tokens of sampled responses depend on, besides their prompts."""
    ends = sorted(annotator.chat.end_tokens)  # also of files that are not part of the weights
    own = annotator.sampler.fingerprint(annotator.reference)
    return {**own, "end_tokens": ends, "sampling": sampling.fingerprint}


def open_responses(annotator: Annotator, sampling: Sampling) -> CacheTable:
    """Return the table of the cache that holds sampled responses, by their prompts."""
    response = pa.struct([("text", pa.string()), ("finished", pa.bool_()), ("ids", pa.list_(pa.int32()))])
    return annotator.annotations.table("responses", sampling_fingerprint(annotator, sampling), pa.list_(response))


def sample_responses(
    annotator: Annotator, rows: Rows, sampling: Sampling, title: str = "Sampling", release: bool = True
) -> Samples:
    """Return K samples for each row's prompt, from the reference or the cache.

    release: whether the sampler frees what it loaded. If not, the caller releases it.
    """
    table = open_responses(annotator, sampling)

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[list[dict[str, Any]]]:
        annotator.sampler.check()  # only here: cached responses need no sampler
        check_prompts(annotator, rows, indices)
        prompts = [rows[i].prompt for i in indices]
        samples = annotator.sampler(annotator.reference, prompts, sampling, advance)
        check_variety(annotator, prompts, samples, sampling)
        return [[sample._asdict() for sample in several] for several in samples]

    values = annotator.fill(table, title, "prompts", rows.keys, compute, shard=256)
    if release:
        annotator.sampler.release()
    return CachedSamples(values)


class CachedSamples(Sequence[list[Sample]]):
    """K samples per prompt, read from the annotation cache on access."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self._last: tuple[int, list[Sample]] = (-1, [])

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        """Return the samples of a prompt, or of several for a slice."""
        if isinstance(index, slice):
            return CachedSamples(self.column[index])
        if index != self._last[0]:  # callers ask once per response
            self._last = index, _restore(self.column[index].as_py())
        return self._last[1]

    def __iter__(self) -> Iterator[list[Sample]]:
        return map(_restore, self.column)


def _restore(several: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(s["text"], s["finished"], None if s["ids"] is None else tuple(s["ids"])) for s in several]


def check_prompts(annotator: Annotator, rows: Rows, indices: np.ndarray, warns: bool = True) -> None:
    """Raise one UserError for all prompts that the template cannot render or, if that is an error, changes.

    warns: whether to warn of changes that are accepted.
    """
    problems, changes = Problems("prompts that the chat template cannot write as they are"), TemplateChanges()
    for i in indices.tolist():
        row = rows[i]
        try:
            changes.add(f"row {row.id}", annotator.chat.check_prompt(row.prompt))
        except ValueError as error:
            problems.add(f"row {row.id}", str(error))
    problems.check("Change these rows, or set model.chat_template to a template that can write them.")
    if warns or annotator.on_template_change == "error":
        changes.settle(annotator.on_template_change)


def check_variety(annotator: Annotator, prompts: Prompts, samples: Samples, sampling: Sampling) -> None:
    """Raise a UserError if a sampler returns copies of one response per prompt where the reference itself varies.

    Some servers decode greedily unless a request asks for sampling. No count of copies alone shows that: a model that
    is certain of a short answer, or that repeats a given text, copies too, at any number of prompts. So the reference
    samples some of the same prompts with the same settings, which accounts for temperature, top_p and length. If its
    responses are identical less than half as often, the sampler is at fault. If both are the same distribution, that
    happens by chance in at most 5 % of the cases with five prompts and 0.5 % with sixteen. Otherwise a warning is
    enough: this is what was asked for, as it always is if the reference samples in this process.
    """
    answers = [[sample.ids or sample.text.strip() for sample in several] for several in samples]
    if (found := describe_copies(answers, sampling)) is None:
        return
    if not isinstance(annotator.sampler, Transformers):
        annotator.sampler.release()  # so that the reference has room
        tried = [i for i, several in enumerate(answers) if any(several)][:COMPARED]
        own = Transformers()(annotator.reference, [prompts[i] for i in tried], sampling)
        repeated, _ = count_copied([[sample.ids for sample in several] for several in own])
        expected, _ = count_copied([answers[i] for i in tried])
        if repeated < expected / 2:
            raise UserError(
                f"{found}. For the first {len(tried)} prompts, the reference itself repeats its response {repeated} "
                f"times and the sampler {expected} times, so the sampler does not sample. Servers may decode greedily "
                "unless the request asks for sampling: for transformers serve, set "
                "'sampler.request={generation_config: {do_sample: true, top_k: 0}}'. Others are in the table of "
                "servers in docs/sampling.md. If you change the server instead, set sampler.version to a new value, so "
                "that it is asked again."
            )
    warn(f"{found}. The model is that certain, and a loss that compares the responses to a prompt learns little.")


def describe_copies(answers: Sequence[Sequence[Any]], sampling: Sampling) -> str | None:
    """Return for how many prompts the responses are copies, or None if that is not the case for nearly all of them.

    answers: for each prompt its responses.
    """
    copied, several = count_copied(answers)
    if several < ENOUGH or copied < COPIED * several:
        return None
    return (
        f"the {sampling.responses} responses to a prompt are identical for {copied} of {several} prompts, at "
        f"temperature={sampling.temperature} and top_p={sampling.top_p}"
    )


def count_copied(answers: Sequence[Sequence[Any]]) -> tuple[int, int]:
    """Return the number of prompts whose responses are all equal, and the number with several responses.

    Prompts with only empty responses are not counted.
    """
    several = [responses for responses in answers if len(responses) > 1 and any(responses)]
    return sum(all(other == responses[0] for other in responses) for responses in several), len(several)


def add_responses(rows: Rows, samples: Samples, chat: Chat, cache: Path, report: DataReport | None = None) -> Rows:
    """Return the rows with their sampled responses as tokens. Empty responses are skipped and counted in the report.

    A sample that came as text is tokenized, and counted.
    """
    report = report or DataReport()
    report.sampled_responses = report.empty_responses_skipped = report.truncated_responses = as_text = 0

    def answer(row: Row, several: Sequence[Sample]) -> Row:
        responses = tuple(
            Response(text=sample.text, finished=sample.finished, source="sampled", ids=tuple(sample.tokens(chat)))
            for sample in several
            if sample.text.strip()
        )
        return replace(row, responses=responses, ordered=False)

    digest = hashlib.sha256(dump([rows.key])[:-1] + b",[")  # of all responses, read one row at a time
    for i, (row, several) in enumerate(zip(rows, samples, strict=True)):
        kept = [sample for sample in several if sample.text.strip()]
        as_text += sum(sample.ids is None for sample in kept)
        report.sampled_responses += len(several)
        report.empty_responses_skipped += len(several) - len(kept)
        report.truncated_responses += sum(not sample.finished for sample in kept)
        digest.update((b"," if i else b"") + dump([vars(response) for response in answer(row, several).responses]))
    digest.update(b"]]")
    report.sampled_as_text = as_text or None
    target = cache / "rows" / digest.hexdigest()[:32]

    def write() -> Mapping[str, Any]:
        rows_module.write(map(answer, rows, samples), target, Problems("sampled rows"))
        return {"key": hash_file(target / "rows.arrow")}

    return rows_module.load(target, make(target, "writes the sampled rows", write))
