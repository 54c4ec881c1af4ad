"""The results of single runs, of which an item keeps one archive, so that its tables can be made without its runs."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.jobs import DONE, Job

NAMES = ("summary.json", "evaluations.jsonl", "metrics.csv", "samples.jsonl")
"""Files of a run that columns read."""


def name_archive(folder: Path, size: str) -> Path:
    """Return the path of an item's archive."""
    return folder / f"runs-{size}.tar.xz"


def store(path: Path, jobs: Iterable[Job]) -> None:
    """Write the results of finished jobs to an archive, whose bytes depend on nothing else."""
    by_folder = {job.folder: job for job in jobs}  # tables may share them
    with tarfile.open(path, "w:xz") as archive:
        for _, job in sorted(by_folder.items()):
            for name, content in _list_files(job):
                member = tarfile.TarInfo(f"{job.folder.name}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _list_files(job: Job) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file of a finished job, without places on this machine."""
    if job.result is None:
        return
    for path in sorted(path for path in job.result.parent.iterdir() if path.name in NAMES):
        yield str(path.relative_to(job.folder)), path.read_bytes().replace(str(job.base).encode(), b"<folder>")
    yield DONE, json.dumps({"seconds": job.seconds, "command": job.portable}).encode()


def restore(path: Path, jobs: Iterable[Job]) -> None:
    """Put the results of an archive into the folders of those jobs that have none. A missing archive has none."""
    if not path.exists():
        return
    missing = {job.folder.name: job.base for job in jobs if job.result is None}
    with tarfile.open(path) as archive:
        for member in archive:
            if (base := missing.get(member.name.partition("/")[0])) is not None:
                archive.extract(member, base, filter="data")
