"""Data sets of the hub: loaded in one place, so that being offline is one clear error."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import datasets

from var.utils.errors import UserError


@cache
def load(path: str, name: str | None = None, split: str = "train", data_dir: str | None = None) -> datasets.Dataset:
    """One split of the hub's data set `path`, memory-mapped; name: its configuration, data_dir: a folder of it."""
    try:
        return datasets.load_dataset(path, name=name, split=split, data_dir=data_dir)
    except Exception as error:  # datasets, hub and HTTP client share no base class for "not reachable"
        raise UserError(
            f"the data set {_label(path, name or data_dir, split)} could not be loaded from the hub: "
            f"{type(error).__name__}: {error}\n"
            "Run once with a network (later runs read the hub's cache), or fetch its files (.jsonl, .jsonl.gz, "
            ".parquet) and set `data.path=` to them."
        ) from error


def records(
    path: str, name: str | None = None, split: str = "train", data_dir: str | None = None
) -> Iterator[tuple[str, Any]]:
    label = _label(path, name or data_dir, split)
    for number, record in enumerate(load(path, name, split, data_dir), start=1):
        yield f"{label}:row {number}", record


def fingerprint(path: str, name: str | None = None, split: str = "train", data_dir: str | None = None) -> str:
    """Stands for the content: the hub's revision is in it."""
    return load(path, name, split, data_dir)._fingerprint


def _label(path: str, part: str | None, split: str) -> str:
    return f"{path}/{part}[{split}]" if part else f"{path}[{split}]"
