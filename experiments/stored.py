"""One archive per item with the results of its runs, from which its tables can be made without the runs."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from experiments.jobs import DONE, Job
from var.utils.files import atomic

NAMES = ("summary.json", "evaluations.jsonl", "metrics.csv", "samples.jsonl")
"""Files of a run that columns read."""


def name_archive(folder: Path, size: str) -> Path:
    """Return the path of an item's archive."""
    return folder / f"runs-{size}.tar.xz"


def store(path: Path, jobs: Iterable[Job]) -> None:
    """Write the results of finished jobs to an archive, and keep those of others that it has.

    Its bytes depend only on the results.
    """
    contents = {name: content for name, content in _read(path)}
    for job in jobs:
        contents |= {f"{job.folder.name}/{name}": content for name, content in _list_files(job)}
    with atomic(path, "wb") as file, tarfile.open(fileobj=file, mode="w:xz") as archive:
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _read(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file in an archive; nothing if there is none."""
    if path.exists():
        with tarfile.open(path) as archive:
            for member in archive:
                if (file := archive.extractfile(member)) is not None:
                    yield member.name, file.read()


def _list_files(job: Job) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file of a finished job, without places on this machine."""
    if job.result is None:
        return
    for path in sorted(path for path in job.result.parent.iterdir() if path.name in NAMES):
        yield str(path.relative_to(job.folder)), path.read_bytes().replace(str(job.base).encode(), b"<folder>")
    yield DONE, json.dumps({"seconds": job.seconds, "command": job.portable}).encode()


def restore(path: Path, jobs: Iterable[Job]) -> None:
    """Put the results of an archive into the folders of those jobs that have none. A missing archive has none."""
    missing = {job.folder.name: job.folder for job in jobs if job.result is None}
    # A job counts as finished from DONE on, so that comes last.
    for member, content in sorted(_read(path), key=lambda found: found[0].endswith(f"/{DONE}")):
        folder, _, name = member.partition("/")
        if folder in missing and PurePosixPath(name).name in (*NAMES, DONE) and ".." not in name.split("/"):
            target = missing[folder] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic(target, "wb") as file:
                file.write(content)
