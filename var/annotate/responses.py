"""Responses that the reference samples."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from var.annotate.annotator import Annotator
from var.data import rows as rows_module
from var.data.report import DataReport
from var.data.rows import Response, Row, Rows
from var.sampling.base import Sampling, Texts
from var.utils.errors import Problems
from var.utils.provenance import hash_content


def sampling_fingerprint(annotator: Annotator, sampling: Sampling) -> dict[str, Any]:
    """Return what the text of sampled responses depends on, besides their prompts."""
    return {**annotator.sampler.fingerprint(annotator.reference), "sampling": sampling.fingerprint}


def sample_responses(
    annotator: Annotator, rows: Rows, sampling: Sampling, title: str = "Sampling", release: bool = True
) -> Texts:
    """Return K (text, finished) for each row's prompt, sampled from the reference or read from the cache.

    release: whether the sampler frees what it loaded. If not, the caller releases it.
    """
    response = pa.struct([("text", pa.string()), ("finished", pa.bool_())])
    fingerprint = sampling_fingerprint(annotator, sampling)
    table = annotator.annotations.table("responses", fingerprint, pa.list_(response))

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[list[dict[str, Any]]]:
        annotator.sampler.check()  # only here: cached responses need no sampler
        prompts = [rows[i].prompt for i in indices]
        texts = annotator.sampler(annotator.reference, prompts, sampling, advance)
        return [[{"text": t, "finished": f} for t, f in several] for several in texts]

    values = annotator.fill(table, title, "prompts", rows.keys, compute, shard=256).to_pylist()
    if release:
        annotator.sampler.release()
    return [[(response["text"], response["finished"]) for response in several] for several in values]


def add_responses(rows: Rows, texts: Texts, cache: Path, report: DataReport | None = None) -> Rows:
    """Return the rows with their sampled responses. Empty responses are skipped and counted in the report."""
    report = report or DataReport()
    report.sampled_responses = report.empty_responses_skipped = report.truncated_responses = 0
    filled = list[Row]()
    for row, several in zip(rows, texts, strict=True):
        responses = [Response(text=t, finished=f, source="sampled") for t, f in several if t.strip()]
        report.sampled_responses += len(several)
        report.empty_responses_skipped += len(several) - len(responses)
        report.truncated_responses += sum(not r.finished for r in responses)
        filled.append(replace(row, responses=tuple(responses), ordered=False))
    target = cache / "rows" / hash_content(rows.table._fingerprint, texts).hex()
    if not (target / "done.json").exists():
        rows_module.write(filled, target, Problems("sampled rows"))
        rows_module.finish(target, {"left_out": 0})
    return rows_module.load(target)
