"""The store under many hands: processes that fill it at once and are killed, full disks, NFS, other versions' files."""

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

from tests.annotate.test_store import fill, flip, keys, shards, shelf
from var.annotate import cache as store
from var.annotate.cache import AnnotationCache, CacheTable
from var.utils.errors import UserError

# A process that has imported once and is forked for each worker: a start takes some milliseconds.
context: Any = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pytest", "var.annotate.cache"])


class Disk:
    """A file on a slow disk, or on a full one, which says so where `step` is reached."""

    def __init__(self, file: Any, step: str) -> None:
        self.file, self.step = file, step

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()
        if self.step == "close":  # where NFS says it
            raise no_space()

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        self.file.write(data[:half])
        if self.step == "write":
            raise no_space()
        if self.step == "slow":
            self.file.flush()
            time.sleep(0.002)
        self.file.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def on(step: str) -> Callable[..., Any]:
    """Path.open of such a disk."""
    plain = Path.open

    def open_(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = plain(path, mode, *rest, **options)
        return Disk(file, step) if mode == "wb" else file

    return open_


def work(root: Path, items: list[int], shard: int, seconds: float, ranks: tuple[int, int], started: Any) -> None:
    """Fill the shelf with the squares of `items`, `seconds` each, in this order, on a slow disk."""
    Path.open = on("slow")  # type: ignore[method-assign]  # of this process
    wanted = keys(*items)

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        time.sleep(seconds * len(indices))
        return [float(items[i] ** 2) for i in indices]

    target = shelf(root)
    started.wait()
    target.fill(wanted, compute, shard, *ranks)


def workers(root: Path, parts: list[list[int]], shard: int = 3, seconds: float = 0.001, ranks: bool = False) -> Any:
    """One process for each part, which start together; ranks: they are those of one job."""
    started = context.Barrier(len(parts) + 1)
    places = [(i, len(parts)) if ranks else (0, 1) for i in range(len(parts))]
    jobs = [
        context.Process(target=work, args=(root, part, shard, seconds, place, started))
        for part, place in zip(parts, places, strict=True)
    ]
    for job in jobs:
        job.start()
    started.wait(60)
    return jobs


def assert_whole(root: Path, items: range) -> None:
    """Every shard is what its name says, and every item that is held has the right value."""
    reports: list[str] = []
    found = shelf(root, warn=reports.append)
    for path in shards(found):
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:32] == path.stem
        pq.read_table(path)
    held = np.array(items)[~found.missing(keys(*items))]
    assert found.read(keys(*held.tolist())).to_pylist() == [i**2 for i in held.tolist()]
    assert reports == []


# --- many at once


@pytest.mark.parametrize("ranks", [False, True], ids=["jobs", "ranks"])
def test_processes_that_fill_one_shelf_at_once_end_with_every_item_right(tmp_path: Path, ranks: bool):
    """Jobs whose items overlap, in orders of their own; ranks that share the items of one job."""
    parts = [list(range(0, 40)), list(range(59, 19, -1)), list(range(10, 50)), list(range(60))]
    jobs = workers(tmp_path, [parts[-1]] * 4 if ranks else parts, ranks=ranks)
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert_whole(tmp_path, range(60))
    assert not shelf(tmp_path).missing(keys(*range(60))).any()
    assert not list(tmp_path.rglob("*.partial"))
    assert json.loads((shelf(tmp_path).path / "identity.json").read_bytes())["weights"] == "a"
    if ranks:
        assert len(shelf(tmp_path)) == 60  # none was computed twice


def test_every_process_reads_the_same_value_of_an_item_held_twice(tmp_path: Path):
    """Two jobs sampled one prompt, each with its own rounding: all ranks must read one of the two, or their plans
    differ. One reader saw either shard first, another both at once."""
    one, two = shelf(tmp_path), shelf(tmp_path)
    for order in (["1", "2"], ["2", "1"]):
        root = tmp_path / order[0]
        early = shelf(root)
        for value in order:
            shelf(root).write(keys(7), [float(value)])
            early.missing(keys(7))
        assert early.read(keys(7)).to_pylist() == shelf(root).read(keys(7)).to_pylist()
    one, two = (shelf(tmp_path / first).read(keys(7)).to_pylist() for first in "12")
    assert one == two


# --- kills


def kill_and_go_on(root: Path, kills: int, together: int, seed: int) -> None:
    draw, items, held = random.Random(seed), range(40 * kills), 0
    for _ in range(kills):
        jobs = workers(root, [draw.sample(items, len(items)) for _ in range(together)], shard=2, seconds=0.0005)
        time.sleep(draw.uniform(0.0, 0.05))
        for job in jobs:
            os.kill(job.pid, signal.SIGKILL)
        for job in jobs:
            job.join(60)
        assert_whole(root, items)
        assert len(shelf(root)) >= held  # what was stored stays
        held = len(shelf(root))
    missing = shelf(root).missing(keys(*items))
    assert missing.any(), "nothing was left to do: the kills came too late"
    assert not missing.all(), "nothing was done: the kills came too early"
    assert sorted(fill_all(root, items)) == np.array(items)[missing].tolist()
    assert_whole(root, items)
    assert not shelf(root).missing(keys(*items)).any()


def fill_all(root: Path, items: range) -> list[int]:
    """Fill what is missing of the items; which that was."""
    seen: list[int] = []

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        seen.extend(items[i] for i in indices)
        return [float(items[i] ** 2) for i in indices]

    shelf(root).fill(keys(*items), compute, 64)
    return seen


def test_a_killed_process_leaves_whole_shards_and_the_next_does_the_rest(tmp_path: Path):
    kill_and_go_on(tmp_path, kills=4, together=1, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("together", [1, 3])
def test_many_kills_leave_whole_shards(tmp_path: Path, together: int):
    kill_and_go_on(tmp_path, kills=40, together=together, seed=together)


def test_what_a_killed_writer_left_is_ignored_then_removed_and_told(tmp_path: Path):
    """A young one may be another process's, still being written; one of the day before yesterday is nobody's."""
    assert fill(shelf(tmp_path), range(1, 3)) == [1, 2]
    young, old = (shelf(tmp_path).path / f"{name * 32}.partial" for name in "ab")
    for partial in (young, old):
        partial.write_bytes(shards(shelf(tmp_path))[0].read_bytes()[:100])
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    reports: list[str] = []
    target = shelf(tmp_path, warn=reports.append)
    assert target.read(keys(1, 2)).to_pylist() == [1.0, 4.0]
    assert old.exists()  # reading removes nothing
    assert fill(target, range(1, 4)) == [3]
    assert young.exists()
    assert not old.exists()
    assert reports == [f"store: half-written files of killed runs, removed from {target.path}: 1"]


def test_old_leftovers_that_cannot_be_removed_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process was faster, or the folder takes no removal."""
    target = shelf(tmp_path)
    fill(target, range(1, 3))
    old = target.path / "a.partial"
    old.touch()
    os.utime(old, (0, 0))
    plain = Path.unlink
    for code in (errno.ENOENT, errno.EACCES):

        def unlink(path: Path, missing_ok: bool = False, code: int = code) -> None:
            if path == old:
                raise OSError(code, os.strerror(code))
            plain(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", unlink)
        assert fill(shelf(tmp_path), range(1, 4 + code % 2)) in ([3], [3, 4], [4])


def test_ctrl_c_in_a_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(shelf(tmp_path), range(1, 3))
    assert list(shelf(tmp_path).path.iterdir()) == []


# --- disks


def no_space(*_: Any) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["write", "close", "fsync", "rename"])
@pytest.mark.parametrize("kept", [True, False], ids=["", "and nothing can be removed"])
def test_a_disk_that_is_full_at_any_step_loses_no_more_than_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, kept: bool
):
    """What the disk said first is what is told, though the half-written file cannot be removed either."""
    assert fill(shelf(tmp_path), range(1, 3)) == [1, 2]
    target = shelf(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise no_space()

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", on(step))
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    if step == "rename":
        monkeypatch.setattr(Path, "replace", refuse)
    if not kept:
        monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match=r"^the store cannot be written: no space left at .*what was stored before is"):
        fill(target, range(1, 6))
    monkeypatch.undo()
    assert len(list(target.path.glob("*.partial"))) == (not kept)
    assert_whole(tmp_path, range(1, 6))
    assert fill(shelf(tmp_path), range(1, 6)) == [3, 4, 5]


def test_a_folder_that_vanishes_while_it_is_filled_is_made_again(tmp_path: Path):
    """What this process has read or written it still knows; what was lost is computed by the next one."""
    target, seen = shelf(tmp_path), list[int]()

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        if seen:
            shutil.rmtree(tmp_path, ignore_errors=True)
        seen.extend(int(i) + 1 for i in indices)
        return [float((i + 1) ** 2) for i in indices]

    assert target.fill(keys(1, 2, 3, 4), compute, 2) == 4
    assert target.read(keys(1, 2, 3, 4)).to_pylist() == [1, 4, 9, 16]
    assert json.loads((target.path / "identity.json").read_bytes())["weights"] == "a"
    assert fill(shelf(tmp_path), range(1, 5)) == [1, 2]


def test_a_folder_that_cannot_be_made_or_listed_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    file.touch()
    for ask in (shelf(file).refresh, lambda: fill(shelf(file), range(1, 3))):
        with pytest.raises(UserError, match=r"^the store cannot be read: Not a directory at .*; set store= to another"):
            ask()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)  # removed as soon as it was made
    with pytest.raises(UserError, match="the store cannot be written: No such file or directory"):
        shelf(tmp_path / "gone").write(keys(1), [1.0])


# --- other versions, other identities


def test_another_formats_store_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(shelf(tmp_path), range(1, 3))
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert shelf(tmp_path).missing(keys(1, 2)).all()
    assert fill(shelf(tmp_path), range(1, 3)) == [1, 2]
    monkeypatch.undo()
    assert len(list(tmp_path.glob("rewards/*"))) == 2
    assert shelf(tmp_path).read(keys(1, 2)).to_pylist() == [1.0, 4.0]


@pytest.mark.parametrize("how", ["another shelf's", "edited", "another kind of JSON"])
def test_a_shelf_whose_identity_is_anothers_is_neither_read_nor_written(tmp_path: Path, how: str):
    """Copied under the wrong name, or edited by hand: the numbers beside it may depend on anything."""
    target, other = shelf(tmp_path), shelf(tmp_path, {"weights": "b"})
    fill(target, range(1, 3))
    if how == "another shelf's":
        fill(other, range(3, 5))
        shutil.rmtree(target.path)
        shutil.copytree(other.path, target.path)
    else:
        file = target.path / "identity.json"
        file.write_text(file.read_text().replace('"a"', '"b"') if how == "edited" else "[1]")
    before = sorted(target.path.iterdir())
    fresh = shelf(tmp_path)
    for ask in (fresh.refresh, lambda: fresh.missing(keys(1)), lambda: fresh.write(keys(9), [81.0])):
        with pytest.raises(UserError, match=r"identity\.json says something else than the name of its folder"):
            ask()
    assert sorted(target.path.iterdir()) == before


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\xfa", None], ids=["empty", "cut", "bytes", "gone"])
def test_an_identity_that_is_damaged_or_gone_is_brought_back(tmp_path: Path, damage: bytes | None):
    """The folder's name still says what the shards depend on, and they are whole by their own names."""
    fill(shelf(tmp_path), range(1, 3))
    file = shelf(tmp_path).path / "identity.json"
    before = file.read_bytes()
    file.unlink() if damage is None else file.write_bytes(damage)
    reports: list[str] = []
    target = shelf(tmp_path, warn=reports.append)
    assert target.read(keys(1, 2)).to_pylist() == [1.0, 4.0]
    assert fill(target, range(1, 4)) == [3]
    assert file.read_bytes() == before
    told = [f"store: {file} is damaged; the next shard that is written here brings it back"]
    assert reports == ([] if damage is None else told)


def test_an_identity_reads_back_as_it_was_written(tmp_path: Path):
    """Tuples, numbers as keys, NaN, half a surrogate pair: what JSON changes is no other identity."""
    identity = {"sizes": (1, 2), "by": {10: "x", 9: "y"}, "nan": float("nan"), "text": "é\ud800"}
    fill(shelf(tmp_path, identity), range(1, 3))
    assert shelf(tmp_path, identity).read(keys(1, 2)).to_pylist() == [1.0, 4.0]


def named(path: Path, data: bytes) -> Path:
    """A shard with a right name, whatever is in it."""
    target = path / f"{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    path.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


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
    "a gap": parquet(key=pa.array([keys(1).tobytes(), None], type=pa.binary(16)), value=[2.0, 3.0]),
    "a value that is missing": parquet(key=KEY, value=pa.array([None], type=pa.float64())),
    "other names": parquet(hash=KEY, number=[2.0]),
    "the columns the other way round": parquet(value=[2.0], key=KEY),
    "nothing": b"",
    "no Parquet": b"PAR1 and more PAR1",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_a_shard_of_another_form_is_told_left_alone_and_not_read(tmp_path: Path, data: bytes):
    """Whole by its name, so no damage but another program's: were it set aside, that program would do it in turn."""
    path = named(shelf(tmp_path).path, data)
    reports: list[str] = []
    target = shelf(tmp_path, warn=reports.append)
    assert target.missing(keys(1, 2)).all()
    assert fill(target, range(1, 3)) == [1, 2]
    assert target.read(keys(1, 2)).to_pylist() == [1.0, 4.0]
    assert path.read_bytes() == data
    (told,) = reports
    assert told.startswith(f"store: {path} ")
    assert told.endswith(
        "where key: fixed_size_binary[16] and value: double without gaps belong; it is left as it is, and its items "
        "are computed again"
    )


def test_values_are_stored_in_the_shelfs_own_type(tmp_path: Path):
    """Or the shelf would not read what it wrote."""
    target = shelf(tmp_path)
    target.write(keys(1, 2), pa.array([1, 4], type=pa.int32()))
    assert target.read(keys(1, 2)).to_pylist() == [1.0, 4.0]


# --- what NFS shows


def listing(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[str]], list[str]]) -> None:
    plain = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: change(plain(path)))


def test_a_listed_shard_that_is_not_there_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A listing from before another process set the shard aside, and from before it was computed again."""
    fill(shelf(tmp_path), range(1, 5))
    monkeypatch.setattr(store, "STALE", 2.0)
    lost = shards(shelf(tmp_path))[0]
    data, reports = lost.read_bytes(), list[str]()
    lost.unlink()
    listing(monkeypatch, lambda names: sorted({*names, lost.name}))
    target = shelf(tmp_path, warn=reports.append)
    assert target.missing(keys(1, 2, 3, 4)).sum() == 2
    lost.write_bytes(data)
    assert target.read(keys(1, 2, 3, 4)).to_pylist() == [1, 4, 9, 16]
    assert reports == []


def test_a_stale_handle_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ESTALE: the server let go of the file that another one of this name was renamed over."""
    fill(shelf(tmp_path), range(1, 3))
    monkeypatch.setattr(store, "STALE", 2.0)
    plain, reports, stale = Path.read_bytes, list[str](), [1]

    def read_bytes(path: Path) -> bytes:
        if path.suffix == ".parquet" and stale:
            stale.clear()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    target = shelf(tmp_path, warn=reports.append)
    assert target.missing(keys(1, 2)).all()
    assert target.read(keys(1, 2)).to_pylist() == [1.0, 4.0]
    assert reports == []


def late(monkeypatch: pytest.MonkeyPatch, looks: int) -> list[float]:
    """Shards are listed only after so many looks; returns the clock, which sleeping moves on."""
    clock, seen = [0.0], [0]

    def change(names: list[str]) -> list[str]:
        seen[0] += 1
        return names if seen[0] > looks else [name for name in names if not name.endswith(".parquet")]

    listing(monkeypatch, change)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    return clock


def test_a_shard_that_is_listed_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What another rank wrote before the barrier is there, whatever this rank's listing says yet."""
    fill(shelf(tmp_path), range(1, 3))
    clock = late(monkeypatch, looks=20)
    assert shelf(tmp_path).read(keys(1, 2)).to_pylist() == [1.0, 4.0]
    assert 5 < clock[0] < store.STALE


def test_what_stays_missing_is_an_error_after_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(shelf(tmp_path), range(1, 3))
    clock = late(monkeypatch, looks=10_000)
    with pytest.raises(KeyError, match="2 of 2 items are not in"):
        shelf(tmp_path).read(keys(1, 2))
    assert clock[0] == pytest.approx(store.STALE, abs=1)


def test_a_late_listing_costs_work_and_no_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Computed twice, the same numbers have the same bytes: renamed over the shard that is there, they are it."""
    fill(shelf(tmp_path), range(1, 5))
    before = {path.name: path.read_bytes() for path in shards(shelf(tmp_path))}
    late(monkeypatch, looks=6)
    assert fill(shelf(tmp_path), range(1, 5)) == [1, 2, 3, 4]
    assert {path.name: path.read_bytes() for path in shards(shelf(tmp_path))} == before


def test_two_processes_that_damage_meets_agree_in_the_end(tmp_path: Path):
    """Both find one shard damaged, one after the other computes it again, and each reads all."""
    fill(shelf(tmp_path), range(1, 5))
    spoilt = shards(shelf(tmp_path))[0]
    spoilt.write_bytes(flip(spoilt.read_bytes()))
    first, second = (shelf(tmp_path, warn=lambda text: None) for _ in range(2))
    assert first.missing(keys(1, 2, 3, 4)).sum() == second.missing(keys(1, 2, 3, 4)).sum() == 2
    assert len(fill(first, range(1, 5))) == 2
    assert fill(second, range(1, 5)) == []
    for one in (first, second):
        assert one.read(keys(1, 2, 3, 4)).to_pylist() == [1, 4, 9, 16]


def test_a_store_is_found_by_its_shelves_alone(tmp_path: Path):
    """Strange files and folders of other people in it stop nothing."""
    target = shelf(tmp_path)
    fill(target, range(1, 3))
    (target.path / "notes.txt").write_text("mine")
    (target.path / "sub").mkdir()
    (target.path / ".nfs0001").touch()  # an open file that was removed
    (target.path / "folder.parquet").mkdir()
    reports: list[str] = []
    again: CacheTable = AnnotationCache(tmp_path, reports.append).shelf("rewards", {"weights": "a"}, pa.float64())
    assert again.read(keys(1, 2)).to_pylist() == [1.0, 4.0]
    assert len(reports) == 1
    assert "folder.parquet cannot be used" in reports[0]
