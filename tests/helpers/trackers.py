"""Read what W&B, MLflow and TensorBoard have stored of a run."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
"""Bytes of a block of a W&B file, which has the format of LevelDB's log."""


def read_wandb(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """Return (run id, step, metrics) of each row in the offline files of a run's folder, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, _records(path.read_bytes())):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                values = {name: json.loads(text) for name, text in items.items()}
                metrics = {name: value for name, value in values.items() if "/" in name}
                rows.append((path.stem.removeprefix("run-"), metrics.pop("trainer/global_step"), metrics))
    return rows


def _records(data: bytes, at: int = 7) -> Iterator[bytes]:
    content = b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        content, at = content + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # complete, or the last part
            yield content
            content = b""


def read_mlflow(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each metric of a run, from the database next to its folder."""
    from mlflow.tracking import MlflowClient

    client, run = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db"), (folder / "mlflow_run").read_text()
    names = client.get_run(run).data.metrics
    return {name: sorted(metric.step for metric in client.get_metric_history(run, name)) for name in names}


def read_tensorboard(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each metric in a run's folder, from the raw files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("tensorboard/**/events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
    return steps
