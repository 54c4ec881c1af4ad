"""Data sets of the Hugging Face hub, or local copies of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from var.data.messages import without_padding
from var.data.sources import local
from var.utils.errors import UserError, brief
from var.utils.hub import explain_failure


class Part(NamedTuple):
    """One split of a data set of the hub."""

    path: str  # owner/name
    name: str | None = None  # configuration
    split: str = "train"
    data_dir: str | None = None  # folder of the data set
    revision: str | None = None  # commit or tag; None is the newest

    def __str__(self) -> str:
        folder = self.name or self.data_dir
        name = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{name}/{folder}[{self.split}]" if folder else f"{name}[{self.split}]"


@cache
def load(part: Part) -> datasets.Dataset:
    """Load one split, memory-mapped. Raise an `UnavailableError` if the hub cannot be reached."""
    try:
        validate_repo_id(part.path)
        return datasets.load_dataset(
            part.path, name=part.name, split=part.split, data_dir=part.data_dir, revision=part.revision
        )
    except Exception as error:  # datasets, hub and HTTP client have no common base class for "not reachable"
        if isinstance(error, ValueError) and not isinstance(error, HFValidationError):  # it lists what there is
            raise UserError(f"data: {part}: {brief(error)} Check data.source.name and data.source.split.") from error
        advice = "set data.path to a copy of its files (.jsonl, .jsonl.gz, .parquet)"
        raise explain_failure(_find_reason(error, part), f"data: {part}", part.path, advice, "dataset") from error


def find_commit(part: Part) -> str | None:
    """Return the commit of a split that `load` has read; None if the hub's client does not name it.

    The client keeps a split in a folder that is named after the commit.
    """
    folders = {Path(file["filename"]).parent.name for file in load(part).cache_files}
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)


def download(repository: str, name: str, revision: str | None, kind: str) -> Path:
    """Return the local copy of a file of a repository. Raise an `UnavailableError` if there is none.

    kind: what the hub calls the repository, dataset or space.
    """
    try:
        return Path(hf_hub_download(repository, name, revision=revision, repo_type=kind))
    except Exception as error:  # as in `load`
        advice = "set data.path to a copy of its files"
        raise explain_failure(error, f"data: {repository}/{name}", repository, advice, kind) from error


def _find_reason(error: Exception, part: Part) -> Exception:
    """Return the hub's error. `datasets` drops it from its own, so the hub is asked whether the set can be read."""
    try:
        HfApi().auth_check(part.path, repo_type="dataset")
    except (RepositoryNotFoundError, OfflineModeIsEnabled) as reason:
        return reason
    except Exception:  # the hub or a mirror does not answer this question
        return error
    return error


class HubSource(local.LocalSource):
    """Base of adapters of a data set of the hub, or of a local copy of it."""

    expected_rows: ClassVar[int | None] = None
    """Rows on the hub, for debug=dry if they are not on this machine."""
    expected_responses: ClassVar[int] = 2
    """Responses per row, likewise."""

    @property
    def parts(self) -> Sequence[Part]:
        """The splits to read from the hub."""
        raise NotImplementedError

    @property
    def is_local(self) -> bool:
        """Whether to read local files: `path` is None for the hub."""
        return self.path is not None  # type: ignore[attr-defined]

    @property
    def origin(self) -> str:
        """The data that is used, in words: its path, or the splits on the hub with their commits."""
        if self.is_local:
            return str(self.path)  # type: ignore[attr-defined]
        return ", ".join(f"{part} at commit {find_commit(part) or 'unknown'}" for part in self.parts)

    def check_revision(self) -> None:
        """Raise UserError for a revision of local files."""
        if self.is_local and self.revision is not None:  # type: ignore[attr-defined]
            raise UserError("data.source.revision applies to hub sets only, and data.path is local. Set it to null.")

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, record) of all parts or local files."""
        self.check_revision()
        if self.is_local:
            return super().records()
        return chain.from_iterable(
            ((f"{part}:row {number}", without_padding(record)) for number, record in enumerate(load(part), start=1))
            for part in self.parts
        )

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the settings with the stamps of the local files or the hub's fingerprints, which name a revision."""
        if self.is_local:
            return super().fingerprint()
        return {**local.describe_source(self), "fingerprint": [load(part)._fingerprint for part in self.parts]}
