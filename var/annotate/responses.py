"""Responses that the reference samples."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from var.annotate.annotator import Annotator
from var.data import rows as rows_module
from var.data.changes import TemplateChanges
from var.data.chat import Chat
from var.data.report import DataReport
from var.data.rows import Response, Row, Rows
from var.sampling.base import Sample, Samples, Sampling
from var.utils.errors import Problems, UserError
from var.utils.provenance import hash_content

ENOUGH = 8  # prompts with several answers from which their variety is judged
COPIES = 0.95  # fraction of these whose answers are all identical, from which sampling is taken for greedy decoding


def sampling_fingerprint(annotator: Annotator, sampling: Sampling) -> dict[str, Any]:
    """Return what the text of sampled responses depends on, besides their prompts."""
    return {**annotator.sampler.fingerprint(annotator.reference), "sampling": sampling.fingerprint}


def sample_responses(
    annotator: Annotator, rows: Rows, sampling: Sampling, title: str = "Sampling", release: bool = True
) -> Samples:
    """Return K samples for each row's prompt, from the reference or the cache.

    release: whether the sampler frees what it loaded. If not, the caller releases it.
    """
    response = pa.struct([("text", pa.string()), ("finished", pa.bool_()), ("ids", pa.list_(pa.int32()))])
    fingerprint = sampling_fingerprint(annotator, sampling)
    table = annotator.annotations.table("responses", fingerprint, pa.list_(response))

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[list[dict[str, Any]]]:
        annotator.sampler.check()  # only here: cached responses need no sampler
        check_prompts(annotator, rows, indices)
        prompts = [rows[i].prompt for i in indices]
        samples = annotator.sampler(annotator.reference, prompts, sampling, advance)
        return [[sample._asdict() for sample in several] for several in samples]

    values = annotator.fill(table, title, "prompts", rows.keys, compute, shard=256).to_pylist()
    if release:
        annotator.sampler.release()
    return [[_restore(response) for response in several] for several in values]


def _restore(value: dict[str, Any]) -> Sample:
    return Sample(value["text"], value["finished"], None if value["ids"] is None else tuple(value["ids"]))


def check_prompts(annotator: Annotator, rows: Rows, indices: np.ndarray) -> None:
    """Raise one UserError for all prompts that the template cannot render or, if that is an error, changes."""
    problems, changes = Problems("prompts that the chat template cannot write as they are"), TemplateChanges()
    for i in indices.tolist():
        row = rows[i]
        try:
            changes.add(f"row {row.id}", annotator.chat.check_prompt(row.prompt))
        except ValueError as error:
            problems.add(f"row {row.id}", str(error))
    problems.check()
    changes.settle(annotator.on_template_change)


def check_variety(samples: Samples, sampling: Sampling) -> None:
    """Raise a UserError if responses that should be draws are copies of each other for nearly every prompt.

    Some servers decode greedily unless a request asks for sampling.
    """
    several = [answers for answers in samples if len(answers) > 1 and any(answer.text.strip() for answer in answers)]
    copies = sum(len({answer.text for answer in answers}) == 1 for answers in several)
    if sampling.temperature > 0 and len(several) >= ENOUGH and copies >= COPIES * len(several):
        raise UserError(
            f"the {sampling.responses} responses to a prompt are identical for {copies} of {len(several)} prompts, "
            f"although they were to be sampled at temperature={sampling.temperature}, so there is nothing to learn "
            "from comparing them. A server may decode greedily unless the request asks for sampling: see the table of "
            "servers in docs/sampling.md, and set sampler.request. If the model itself is that certain, raise "
            "generate.temperature or set generate.responses=1."
        )


def add_responses(rows: Rows, samples: Samples, chat: Chat, cache: Path, report: DataReport | None = None) -> Rows:
    """Return the rows with their sampled responses as tokens. Empty responses are skipped and counted in the report.

    A sample that came as text is tokenized, and counted.
    """
    report = report or DataReport()
    report.sampled_responses = report.empty_responses_skipped = report.truncated_responses = 0
    filled, as_text = list[Row](), 0
    for row, several in zip(rows, samples, strict=True):
        kept = [sample for sample in several if sample.text.strip()]
        as_text += sum(sample.ids is None for sample in kept)
        responses = tuple(
            Response(text=sample.text, finished=sample.finished, source="sampled", ids=tuple(sample.tokens(chat)))
            for sample in kept
        )
        report.sampled_responses += len(several)
        report.empty_responses_skipped += len(several) - len(kept)
        report.truncated_responses += sum(not sample.finished for sample in kept)
        filled.append(replace(row, responses=responses, ordered=False))
    report.sampled_as_text = as_text or None
    target = cache / "rows" / hash_content(rows.table._fingerprint, samples, chat.fingerprint).hex()
    if not (target / "done.json").exists():
        rows_module.write(filled, target, Problems("sampled rows"))
        rows_module.finish(target, {"left_out": 0})
    return rows_module.load(target)
