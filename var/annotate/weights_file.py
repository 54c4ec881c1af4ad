"""The training responses with their weights in a file, for other trainers."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch

from var.annotate.base import TrainingSet
from var.annotate.reference_logps import reference_logps, sum_logps
from var.data.rows import Rows
from var.requirements import Requirement, Rollout, WeightColumn, Weights, find
from var.utils.errors import Problems
from var.utils.files import name_partial, remove_partials, replacing, synchronize
from var.weights.estimators import InBatch, scale_temperature
from var.weights.inputs import WeightInputs

NUMBER, TEXT = datasets.Value("float64"), datasets.Value("string")
TOKENS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features(
    {
        "id": TEXT,
        "prompt": datasets.List({"role": TEXT, "content": TEXT}),
        "response": TEXT,
        "reward": NUMBER,
        "reference_logp": NUMBER,
        "weight": NUMBER,
        "log_partition": NUMBER,
        "prompt_ids": TOKENS,
        "response_ids": TOKENS,
    }
)
FORMATS = (".parquet", ".jsonl", "")
VAR = """the weights of VAR (Variational Alignment with Re-weighting, arXiv 2502.11026). Training on
−Σ w · log π(response | prompt) fits RLHF's optimum by supervised fine-tuning. The weights are 1 on average over the
responses that train, and 0 for the others"""
CARD = """# Responses with weights

{count} responses with {weights}.

| column | content |
| --- | --- |
| `id` | row of the source |
| `prompt`, `response` | the messages of the prompt, and the text of the response |
| `reward` | reward of the response, on the scale that the run's `reward_scale` sets |
| `reference_logp` | log-probability of the response under the reference, nats, summed over tokens |
| `weight` | weight of the response |
| `log_partition` | r/λ − log w, nats: log Z(prompt) up to one constant; \
empty if w is 0, contains π_ref, or was raised by roulette or capped |
| `prompt_ids`, `response_ids` | the tokens that train, with template and end token |

Configuration:

```json
{settings}
```
"""


def check_weights_file(path: Path, requirements: tuple[Requirement, ...], live: bool) -> None:
    """Raise UserError if weights cannot be written there, or the loss has none before training.

    live: whether the reference runs in each training step.
    """
    problems = Problems("export")
    if path.suffix not in FORMATS:
        problems.add(str(path), "name a file that ends in .parquet or .jsonl, or a folder without an ending")
    elif path.exists():
        problems.add(str(path), "exists; choose another name, or remove it")
    if find(requirements, Rollout) or not (find(requirements, Weights) or find(requirements, WeightColumn)):
        problems.add("loss", "has no weights to write; choose one of VAR's, such as loss=var_grouped")
    weights = find(requirements, Weights)
    if live and weights is not None and weights.reads_reference:
        problems.add("reference=live", "these weights are computed in each step; set reference=cached")
    problems.check()


def check_text(rows: Rows) -> None:
    """Raise UserError with all rows whose messages have more than a role and a text, which the columns cannot hold."""
    problems = Problems("export: rows with more than text")
    for row in rows:
        more = {key for message in row.prompt for key in message} - {"role", "content"}
        more |= {name for name in ("tools", "template_kwargs") if getattr(row.prompt, name)}
        if not all(isinstance(message.get("content"), str) for message in row.prompt):
            more.add("content that is not text")
        if more:
            problems.add(f"row {row.id}", f"its prompt has {', '.join(sorted(more))}")
        if any(response.message for response in row.responses):
            problems.add(f"row {row.id}", "a response has more than a text")
    problems.check()


def write_weights(data: TrainingSet, requirements: tuple[Requirement, ...], path: Path, settings: Any) -> int:
    """Write all training responses with their weights, and return how many there are. All ranks call this.

    Args:
        data: the annotated training set.
        requirements: those of the loss.
        path: ends in .parquet or .jsonl, or is the folder of a data set that `datasets.load_from_disk` reads.
        settings: JSON values that the folder's card shows.

    """
    from datasets.arrow_writer import ArrowWriter

    logps = sum_logps(reference_logps(data.annotator, data.sequences, data.shares_prompts))  # by all ranks together
    if data.annotator.ranks.rank:
        return len(data.sequences)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Files of a mapped table cannot always be removed, as on NFS.
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", ignore_cleanup_errors=True) as folder:
        arrow = Path(folder) / "rows.arrow"
        with ArrowWriter(path=str(arrow), features=FEATURES) as writer:
            for record in _records(data, requirements, logps.tolist()):
                writer.write(record)
            writer.finalize()
        table = datasets.Dataset.from_file(str(arrow))
        if path.suffix:
            with replacing(path) as partial:
                if path.suffix == ".parquet":
                    table.to_parquet(str(partial))
                else:  # Dataset.to_json rounds numbers
                    with partial.open("w") as file:
                        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in table)
        else:
            remove_partials(path)
            partial = name_partial(path)
            try:
                table.save_to_disk(str(partial))
                text = json.dumps(settings, indent=2, ensure_ascii=False, default=str)
                weights = VAR if find(requirements, Weights) else "the weights of the data set"
                (partial / "README.md").write_text(CARD.format(count=len(table), weights=weights, settings=text))
                synchronize(partial)
                partial.rename(path)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return len(data.sequences)


def _records(
    data: TrainingSet, requirements: tuple[Requirement, ...], logps: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield the record of each training response."""
    sequences, weights = data.sequences, data.weights
    assert weights is not None
    partition = _log_partition(data, requirements)
    for i in range(len(sequences)):
        row = data.rows[int(sequences.row[i])]
        ids, start, _ = sequences.tokens(i)
        yield {
            "id": row.id,
            "prompt": [dict(message) for message in row.prompt],
            "response": row.responses[int(sequences.response[i])].text,
            "reward": None if data.rewards is None else float(data.rewards[i]),
            "reference_logp": logps[i],
            "weight": float(weights[i]),
            "log_partition": partition[i],
            "prompt_ids": ids[:start],
            "response_ids": ids[start:],
        }


def _log_partition(data: TrainingSet, requirements: tuple[Requirement, ...]) -> list[float | None]:
    """Return r/λ − log w of each response, or None: without λ, if π_ref is in the numerator, or if w is not e^(r/λ)/Z.

    The last is so for a weight of 0, for those that roulette has raised, which are the smallest ones, and for capped
    ones, which are the largest.
    """
    weights, requirement = data.weights, find(requirements, Weights)
    assert weights is not None
    if requirement is None or data.rewards is None or _has_reference(requirement.estimator):
        return [None] * len(weights)
    sequences = data.sequences
    inputs = WeightInputs(
        rewards=data.rewards, group=torch.from_numpy(sequences.group), length=torch.from_numpy(sequences.length)
    )
    found = data.rewards / scale_temperature(requirement, inputs) - weights.double().log()
    changed = weights == 0
    if requirement.roulette:
        changed |= weights == weights[weights > 0].min()
    if getattr(requirement.estimator, "cap", None) is not None:
        changed |= weights == weights.max()
    return [None if other else value for value, other in zip(found.tolist(), changed.tolist(), strict=True)]


def _has_reference(estimator: Any) -> bool:
    return isinstance(estimator, InBatch) and estimator.reduction != "none" and estimator.reference_in_numerator
