"""The annotation cache with many processes: concurrent fills, kills, full disks, NFS, and files of other versions."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.cache import fill, flip, keys, open_table, shards, squares, values
from var.annotate import cache as cache_module
from var.annotate.cache import AnnotationCache, CacheTable
from var.utils.errors import UserError

# A process that has imported everything once and is forked for each worker: a worker starts in milliseconds.
context: Any = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pytest", "var.annotate.cache"])


class Disk:
    """A file on a slow disk, or on a disk that is full at `step`."""

    def __init__(self, file: Any, step: str) -> None:
        self.file, self.step = file, step

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()
        if self.step == "close":  # where NFS reports it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        self.file.write(data[:half])
        if self.step == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.step == "slow":
            self.file.flush()
            time.sleep(0.002)
        self.file.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def open_on_disk(step: str) -> Callable[..., Any]:
    """Return a Path.open that writes to such a disk."""
    plain = Path.open

    def open_(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = plain(path, mode, *rest, **options)
        return Disk(file, step) if mode == "xb" else file

    return open_


def work(
    root: Path, items: list[int], shard: int, seconds: float, ranks: tuple[int, int], started: Any, results: Any
) -> None:
    """Fill the table on a slow disk with the squares of `items`, in this order, each in `seconds`."""
    Path.open = open_on_disk("slow")  # type: ignore[method-assign]  # of this process

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        time.sleep(seconds * len(indices))
        return [float(items[i] ** 2) for i in indices]

    table = open_table(root)
    started.wait()
    computed = table.fill(keys(*items), compute, shard, *ranks)
    complete = not table.missing(keys(*items)).any() and values(table, items) == [i**2 for i in items]
    results.put((computed, complete))


def start_workers(
    root: Path, parts: list[list[int]], shard: int = 3, seconds: float = 0.001, ranks: bool = False
) -> tuple[list[Any], Any]:
    """Start one process per part, all at once; return them and the queue of their results.

    With `ranks` they are the ranks of one job.
    """
    started, results = context.Barrier(len(parts) + 1), context.SimpleQueue()
    places = [(i, len(parts)) if ranks else (0, 1) for i in range(len(parts))]
    jobs = [
        context.Process(target=work, args=(root, part, shard, seconds, place, started, results))
        for part, place in zip(parts, places, strict=True)
    ]
    for job in jobs:
        job.start()
    started.wait(60)
    return jobs, results


def assert_sound(root: Path, items: range) -> None:
    """Assert that every shard matches its name, and that every item that is there has the right value."""
    reports: list[str] = []
    table = open_table(root, warn=reports.append)
    for path in shards(table):
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:32] == path.stem
        pq.read_table(path)
    held = np.array(items)[~table.missing(keys(*items))].tolist()
    assert values(table, held) == [i**2 for i in held]
    assert reports == []


# --- concurrent processes

UP, DOWN = list(range(30)), list(range(29, -1, -1))
OVERLAPPING = [list(range(0, 40)), list(range(59, 19, -1)), list(range(10, 50)), list(range(60))]


@pytest.mark.parametrize(
    ("parts", "ranks", "seconds"),
    [([UP, DOWN], False, 0.01), (OVERLAPPING, False, 0.001), ([OVERLAPPING[-1]] * 4, True, 0.001)],
    ids=["from both ends", "overlapping jobs", "ranks"],
)
def test_concurrent_processes_fill_every_item(tmp_path, parts, ranks, seconds):
    items = range(max(map(max, parts)) + 1)
    jobs, results = start_workers(tmp_path, parts, seconds=seconds, ranks=ranks)
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    done = [results.get() for _ in jobs]
    assert_sound(tmp_path, items)
    assert not open_table(tmp_path).missing(keys(*items)).any()
    assert not list(tmp_path.rglob("*.partial"))
    assert json.loads((open_table(tmp_path).path / "fingerprint.json").read_bytes())["weights"] == "a"
    if ranks:
        assert len(open_table(tmp_path)) == 60  # none was computed twice
    else:
        assert all(complete for _, complete in done)
    if parts == [UP, DOWN]:  # neither computed what it saw of the other
        assert all(0 < computed < 30 for computed, _ in done)


def test_every_process_reads_the_same_value_of_a_duplicate_item(tmp_path):
    """Two jobs computed one item with different rounding. All ranks must read the same one, or their plans differ.

    One reader sees the first shard before the second, another sees both at once.
    """
    for order in (["1", "2"], ["2", "1"]):
        root = tmp_path / order[0]
        early = open_table(root)
        for value in order:
            open_table(root).write(keys(7), [float(value)])
            early.missing(keys(7))
        assert values(early, [7]) == values(open_table(root), [7])
    one, two = (values(open_table(tmp_path / first), [7]) for first in "12")
    assert one == two


# --- kills


@pytest.mark.parametrize(
    ("kills", "together"),
    [(4, 1), pytest.param(40, 1, marks=pytest.mark.long), pytest.param(40, 3, marks=pytest.mark.long)],
)
def test_killed_processes_leave_complete_shards(tmp_path, kills, together):
    """What was stored is kept, and the next process computes exactly what is missing."""
    draw, items, held = random.Random(together), range(40 * kills), 0
    for _ in range(kills):
        parts = [draw.sample(items, len(items)) for _ in range(together)]
        jobs, _ = start_workers(tmp_path, parts, shard=2, seconds=0.0005)
        time.sleep(draw.uniform(0.0, 0.05))
        for job in jobs:
            os.kill(job.pid, signal.SIGKILL)
        for job in jobs:
            job.join(60)
        assert_sound(tmp_path, items)
        assert len(open_table(tmp_path)) >= held
        held = len(open_table(tmp_path))
    missing = open_table(tmp_path).missing(keys(*items))
    assert missing.any(), "nothing was left to do: the kills came too late"
    assert not missing.all(), "nothing was done: the kills came too early"
    assert sorted(fill(open_table(tmp_path), items, 64)) == np.array(items)[missing].tolist()
    assert_sound(tmp_path, items)
    assert not open_table(tmp_path).missing(keys(*items)).any()


def test_old_partial_files_are_ignored_then_removed_and_reported(tmp_path):
    """Another process may still be writing a young one. Nobody is writing one from two days ago."""
    assert fill(open_table(tmp_path), range(1, 3)) == [1, 2]
    young, old = (open_table(tmp_path).path / f"{name * 32}.partial" for name in "ab")
    for partial in (young, old):
        partial.write_bytes(shards(open_table(tmp_path))[0].read_bytes()[:100])
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    reports: list[str] = []
    table = open_table(tmp_path, warn=reports.append)
    assert values(table, [1, 2]) == [1.0, 4.0]
    assert old.exists()  # reading removes nothing
    assert fill(table, range(1, 4)) == [3]
    assert young.exists()
    assert not old.exists()
    assert reports == [f"annotation cache: incomplete files of killed runs, removed from {table.path}: 1"]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES])
def test_old_partial_files_that_cannot_be_removed_do_not_stop_a_fill(tmp_path, monkeypatch, code):
    """Another process was faster, or the folder does not allow removal."""
    table = open_table(tmp_path)
    fill(table, range(1, 3))
    old, plain = table.path / "a.partial", Path.unlink
    old.touch()
    os.utime(old, (0, 0))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == old:
            raise OSError(code, os.strerror(code))
        plain(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert fill(open_table(tmp_path), range(1, 4)) == [3]


def test_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fill(open_table(tmp_path), range(1, 3))
    assert list(open_table(tmp_path).path.iterdir()) == []


# --- disks


@pytest.mark.parametrize(
    ("step", "code", "reason"),
    [
        *[(step, errno.ENOSPC, "no space left") for step in ("write", "close", "fsync", "rename")],
        ("fsync", errno.EDQUOT, "quota exceeded"), ("fsync", errno.EIO, "Input/output error"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("removable", [True, False], ids=["", "and nothing can be removed"])
def test_disk_that_fills_at_any_step_loses_only_the_current_shard(tmp_path, monkeypatch, step, code, reason, removable):
    """Three shards of 2: the second one does not fit. The first one is kept, and a later run resumes.

    The first error is reported, even if the incomplete file cannot be removed either.
    """
    table, written = open_table(tmp_path), list[int]()

    def raise_error(code: int) -> None:
        raise OSError(code, os.strerror(code))

    def fill_up(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        if written:
            monkeypatch.setattr(Path, "open", open_on_disk(step))
            if step == "fsync":
                monkeypatch.setattr(os, "fsync", lambda _: raise_error(code))
            if step == "rename":
                monkeypatch.setattr(Path, "replace", lambda *_: raise_error(code))
            if not removable:
                monkeypatch.setattr(Path, "unlink", lambda *_, **__: raise_error(errno.EROFS))
        return squares(range(1, 6), written)(indices, advance)

    with pytest.raises(UserError) as error:
        table.fill(keys(*range(1, 6)), fill_up, 2)
    assert str(error.value) == (
        f"annotation_cache: cannot be written: {reason} at {table.path}. Earlier annotations are kept. Free disk space "
        "or set another folder, and run the same command again."
    )
    assert isinstance(error.value.__cause__, OSError)
    monkeypatch.undo()
    assert len(list(table.path.glob("*.partial"))) == (not removable)
    assert json.loads((table.path / "fingerprint.json").read_text())["weights"] == "a"
    assert_sound(tmp_path, range(1, 6))
    assert fill(open_table(tmp_path), range(1, 6)) == [3, 4, 5]


def test_folder_that_vanishes_during_a_fill_is_made_again(tmp_path):
    """This process still knows what it read or wrote. The next one computes what was lost."""
    table, seen = open_table(tmp_path), list[int]()
    compute = squares(range(1, 5), seen)

    def remove_and_compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        if seen:
            shutil.rmtree(tmp_path, ignore_errors=True)
        return compute(indices, advance)

    assert table.fill(keys(1, 2, 3, 4), remove_and_compute, 2) == 4
    assert values(table, range(1, 5)) == [1, 4, 9, 16]
    assert json.loads((table.path / "fingerprint.json").read_bytes())["weights"] == "a"
    assert fill(open_table(tmp_path), range(1, 5)) == [1, 2]


def test_folder_that_cannot_be_made_or_listed_is_a_clear_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for ask in (open_table(file).refresh, lambda: fill(open_table(file), range(1, 3))):
        with pytest.raises(
            UserError, match=r"^annotation_cache: cannot be read: Not a directory at .*\. Set another folder\."
        ):
            ask()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)  # removed as soon as it was made
    with pytest.raises(UserError, match="annotation_cache: cannot be written: No such file or directory"):
        open_table(tmp_path / "gone").write(keys(1), [1.0])


# --- other versions, other fingerprints


def test_cache_of_another_format_is_not_read(tmp_path, monkeypatch):
    fill(open_table(tmp_path), range(1, 3))
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert open_table(tmp_path).missing(keys(1, 2)).all()
    assert fill(open_table(tmp_path), range(1, 3)) == [1, 2]
    monkeypatch.undo()
    assert len(list(tmp_path.glob("rewards/*"))) == 2
    assert values(open_table(tmp_path), [1, 2]) == [1.0, 4.0]


@pytest.mark.parametrize("how", ["of another table", "edited", "another kind of JSON"])
def test_table_with_another_fingerprint_is_neither_read_nor_written(tmp_path, how):
    """It was copied under the wrong name or edited by hand, so it is unknown what its numbers depend on."""
    table, other = open_table(tmp_path), open_table(tmp_path, {"weights": "b"})
    fill(table, range(1, 3))
    if how == "of another table":
        fill(other, range(3, 5))
        shutil.rmtree(table.path)
        shutil.copytree(other.path, table.path)
    else:
        file = table.path / "fingerprint.json"
        file.write_text(file.read_text().replace('"a"', '"b"') if how == "edited" else "[1]")
    before = sorted(table.path.iterdir())
    fresh = open_table(tmp_path)
    for ask in (fresh.refresh, lambda: fresh.missing(keys(1)), lambda: fresh.write(keys(9), [81.0])):
        with pytest.raises(UserError, match=r"fingerprint\.json does not match the name of its folder"):
            ask()
    assert sorted(table.path.iterdir()) == before


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\xfa", None], ids=["empty", "truncated", "bytes", "gone"])
def test_damaged_or_missing_fingerprint_is_restored(tmp_path, damage):
    """The folder's name still says what the shards depend on, and their own names show that they are complete."""
    fill(open_table(tmp_path), range(1, 3))
    file = open_table(tmp_path).path / "fingerprint.json"
    before = file.read_bytes()
    file.unlink() if damage is None else file.write_bytes(damage)
    reports: list[str] = []
    table = open_table(tmp_path, warn=reports.append)
    assert values(table, [1, 2]) == [1.0, 4.0]
    assert fill(table, range(1, 4)) == [3]
    assert file.read_bytes() == before
    report = f"annotation cache: {file} is damaged. The next shard that is written here restores it."
    assert reports == ([] if damage is None else [report])


def test_fingerprint_that_json_changes_is_found_again(tmp_path):
    """Tuples, numbers as keys, NaN, half a surrogate pair."""
    fingerprint = {"sizes": (1, 2), "by": {10: "x", 9: "y"}, "nan": float("nan"), "text": "é\ud800"}
    fill(open_table(tmp_path, fingerprint), range(1, 3))
    assert values(open_table(tmp_path, fingerprint), [1, 2]) == [1.0, 4.0]


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


KEY = pa.array([keys(1).tobytes()], type=pa.binary(16))
FOREIGN = {
    "an extra column": parquet(key=KEY, value=[2.0], seed=[0]),
    "no value": parquet(key=KEY),
    "no key": parquet(value=[2.0]),
    "another type": parquet(key=KEY, value=pa.array([2.0], type=pa.float32())),
    "integers": parquet(key=KEY, value=[2]),
    "text": parquet(key=KEY, value=["2"]),
    "a list": parquet(key=KEY, value=[[2.0]]),
    "keys of another length": parquet(key=[b"short"], value=[2.0]),
    "keys as text": parquet(key=["k" * 16], value=[2.0]),
    "a null key": parquet(key=pa.array([keys(1).tobytes(), None], type=pa.binary(16)), value=[2.0, 3.0]),
    "a null value": parquet(key=KEY, value=pa.array([None], type=pa.float64())),
    "other names": parquet(hash=KEY, number=[2.0]),
    "a name that is not UTF-8": parquet(key=KEY, value=[2.0]).replace(b"value", b"val\xe3e"),
    "columns in another order": parquet(value=[2.0], key=KEY),
    "nothing": b"",
    "not Parquet": b"PAR1 and more PAR1",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_shard_of_another_form_is_reported_kept_and_not_read(tmp_path, data):
    """It matches its name, so another program wrote it. If it were moved, that program would move ours in turn."""
    folder = open_table(tmp_path).path
    path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    folder.mkdir(parents=True)
    path.write_bytes(data)
    reports: list[str] = []
    table = open_table(tmp_path, warn=reports.append)
    assert table.missing(keys(1, 2)).all()
    assert fill(table, range(1, 3)) == [1, 2]
    assert values(table, [1, 2]) == [1.0, 4.0]
    assert path.read_bytes() == data
    (report,) = reports
    assert report.startswith(f"annotation cache: {path} ")
    assert report.endswith(
        ", expected key: fixed_size_binary[16] and value: double without nulls. It is ignored and its items will be "
        "recomputed."
    )


def test_values_are_stored_in_the_type_of_the_table(tmp_path):
    """Otherwise the table would not read what it wrote."""
    table = open_table(tmp_path)
    table.write(keys(1, 2), pa.array([1, 4], type=pa.int32()))
    assert values(table, [1, 2]) == [1.0, 4.0]


# --- what NFS shows


def patch_listing(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[str]], list[str]]) -> None:
    plain = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: change(plain(path)))


@pytest.mark.parametrize("stale", [False, True], ids=["old listing", "stale file handle"])
def test_shard_that_cannot_be_read_yet_is_looked_for_again(tmp_path, monkeypatch, stale):
    """A listing can be older than another process's move of the shard, and than its recomputation.

    ESTALE means that the server has dropped a file, because another one was renamed over it. Neither is damage.
    """
    fill(open_table(tmp_path), range(1, 5))
    monkeypatch.setattr(cache_module, "STALE", 2.0)
    shard = shards(open_table(tmp_path))[0]
    data, reports, plain, failures = shard.read_bytes(), list[str](), Path.read_bytes, [stale]
    if not stale:
        shard.unlink()
        patch_listing(monkeypatch, lambda names: sorted({*names, shard.name}))

    def read_bytes(path: Path) -> bytes:
        if path == shard and failures.pop(0):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    table = open_table(tmp_path, warn=reports.append)
    assert table.missing(keys(1, 2, 3, 4)).sum() == 2
    failures[:] = [False]
    shard.write_bytes(data)
    assert values(table, range(1, 5)) == [1, 4, 9, 16]
    assert reports == []


def hide_shards(monkeypatch: pytest.MonkeyPatch, looks: int) -> list[float]:
    """List shards only after this many looks; return the clock, which sleeping advances."""
    clock, seen = [0.0], [0]

    def change(names: list[str]) -> list[str]:
        seen[0] += 1
        return names if seen[0] > looks else [name for name in names if not name.endswith(".parquet")]

    patch_listing(monkeypatch, change)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    return clock


def test_read_waits_up_to_a_minute_for_a_shard_that_is_listed_late(tmp_path, monkeypatch):
    """Another rank wrote it before the barrier, so it exists, whatever this rank's listing shows."""
    fill(open_table(tmp_path), range(1, 3))
    with monkeypatch.context() as patch:
        clock = hide_shards(patch, looks=20)
        assert values(open_table(tmp_path), [1, 2]) == [1.0, 4.0]
        assert 5 < clock[0] < cache_module.STALE
    clock = hide_shards(monkeypatch, looks=10_000)
    with pytest.raises(KeyError, match="2 of 2 items are not in"):
        open_table(tmp_path).read(keys(1, 2))
    assert clock[0] == pytest.approx(cache_module.STALE, abs=1)


def test_late_listing_costs_work_but_no_item(tmp_path, monkeypatch):
    """Recomputed numbers have the same bytes, so the new shard replaces an equal one."""
    fill(open_table(tmp_path), range(1, 5))
    before = {path.name: path.read_bytes() for path in shards(open_table(tmp_path))}
    hide_shards(monkeypatch, looks=6)
    assert fill(open_table(tmp_path), range(1, 5)) == [1, 2, 3, 4]
    assert {path.name: path.read_bytes() for path in shards(open_table(tmp_path))} == before


def test_two_processes_that_find_one_damaged_shard_both_recover(tmp_path):
    """The first one recomputes its items, and each reads all."""
    fill(open_table(tmp_path), range(1, 5))
    damaged = shards(open_table(tmp_path))[0]
    damaged.write_bytes(flip(damaged.read_bytes()))
    first, second = (open_table(tmp_path, warn=lambda text: None) for _ in range(2))
    assert first.missing(keys(1, 2, 3, 4)).sum() == second.missing(keys(1, 2, 3, 4)).sum() == 2
    assert len(fill(first, range(1, 5))) == 2
    assert fill(second, range(1, 5)) == []
    for table in (first, second):
        assert values(table, range(1, 5)) == [1, 4, 9, 16]


def test_foreign_files_in_the_cache_are_ignored(tmp_path):
    table = open_table(tmp_path)
    fill(table, range(1, 3))
    (table.path / "notes.txt").write_text("mine")
    (table.path / "sub").mkdir()
    (table.path / ".nfs0001").touch()  # an open file that was removed
    (table.path / "folder.parquet").mkdir()
    reports: list[str] = []
    again: CacheTable = AnnotationCache(tmp_path, reports.append).table("rewards", {"weights": "a"}, pa.float64())
    assert values(again, [1, 2]) == [1.0, 4.0]
    assert len(reports) == 1
    assert "folder.parquet cannot be read or moved" in reports[0]
