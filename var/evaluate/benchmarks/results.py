"""lm-eval's results as plain records: scores, settings of the tasks, responses."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def list_scores(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one record per task or group, metric and extraction: value, standard error over documents, and counts."""
    records = []
    for name, metrics in found["results"].items():
        members = _list_members(name, found)
        counts = [found["n-samples"][member] for member in members]
        for key, value in metrics.items():
            metric, _, extraction = key.partition(",")
            if extraction and not metric.endswith("_stderr"):
                records.append(
                    {
                        "task": name,
                        "version": found["versions"].get(name),
                        "shots": found["n-shot"].get(name),
                        "metric": metric,
                        "extraction": extraction,
                        "value": _to_number(value),
                        "se": _to_number(metrics.get(f"{metric}_stderr,{extraction}")),
                        "n": sum(count["effective"] for count in counts),
                        "of": sum(count["original"] for count in counts),
                        "members": members if members != [name] else None,
                    }
                )
    return records


def _list_members(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return the tasks of a group and of its groups; a task is its own member."""
    if name in found["n-samples"]:
        return [name]
    return [task for child in found["group_subtasks"].get(name, ()) for task in _list_members(child, found)]


def _to_number(value: Any) -> float | None:
    """Return a finite float; None for everything else, such as lm-eval's "N/A"."""
    try:
        return number if math.isfinite(number := float(value)) else None
    except (TypeError, ValueError):
        return None


def describe_task(
    name: str, found: Mapping[str, Any], lm: Any, shots_from: str | None, files: Mapping[str, Path]
) -> dict[str, Any]:
    """Return what a task's numbers depend on, apart from the model, and how many prompts were truncated."""
    config, samples = found["configs"][name], found["samples"][name]
    generation = None
    if config["output_type"] == "generate_until":
        generation = {"max_gen_toks": lm.max_gen_toks, **config["generation_kwargs"]}
    room = lm.max_length + 1 if generation is None else lm.max_length - generation["max_gen_toks"]
    texts = [
        "".join(part for part in arguments if isinstance(part, str))
        for sample in samples
        if sample["filter"] == samples[0]["filter"]
        for arguments in sample["arguments"]
    ]
    data: dict[str, Any] = {"hub": config.get("dataset_path"), "name": config.get("dataset_name")}
    if files:
        hashes = {split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in files.items()}
        data = {split: {"file": str(path), "sha256": hashes[split]} for split, path in files.items()}
    return {
        "output": config["output_type"],
        "generation": generation,
        "shots_from": shots_from if config.get("num_fewshot") else None,
        "prompts_truncated_on_the_left": sum(len(lm.tok_encode(text)) > room for text in texts),
        "data": data,
    }


def write_samples(found: Mapping[str, Any], path: Path) -> None:
    """Write one row per document, extraction and metric.

    The response of a multiple choice task lists the choices with their log-probabilities in nats.
    """
    rows = []
    for name, samples in found["samples"].items():
        for sample in samples:
            if found["configs"][name]["output_type"] == "generate_until":
                response, extracted = sample["resps"][0][0], str(sample["filtered_resps"][0])
            else:
                choices = [str(arguments[-1]) for arguments in sample["arguments"]]
                answers = [responses[0] for responses in sample["resps"]]  # (logp, whether it is greedy), or logp
                logps = [float(answer[0] if isinstance(answer, tuple | list) else answer) for answer in answers]
                response = json.dumps(list(zip(choices, logps, strict=True)), ensure_ascii=False)
                extracted = choices[logps.index(max(logps))]
            rows += [
                {
                    "task": name,
                    "document": sample["doc_id"],
                    "extraction": sample["filter"],
                    "metric": metric,
                    "score": _to_number(sample[metric]),
                    "prompt": sample["arguments"][0][0],
                    "response": response,
                    "extracted": extracted,
                    "target": str(sample["target"]),
                    "doc": json.dumps(sample["doc"], ensure_ascii=False, default=str),
                }
                for metric in sample["metrics"]
            ]
    pq.write_table(pa.Table.from_pylist(rows), path)
