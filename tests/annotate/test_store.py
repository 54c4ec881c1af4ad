"""The store: found by content, whole after a kill, honest about damage and a full disk."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from var.annotate import cache as store
from var.annotate.cache import AnnotationCache, CacheTable, as_keys
from var.utils.errors import UserError
from var.utils.provenance import hash_content

IDENTITY = {"weights": "a"}


def keys(*items: int) -> np.ndarray:
    return as_keys([hash_content(item) for item in items])


def shelf(root: Path, identity: dict[str, Any] = IDENTITY, warn: Callable[[str], None] = print) -> CacheTable:
    """A fresh look at the store, as another process has."""
    return AnnotationCache(root, warn).shelf("rewards", identity, pa.float64())


def squares(wanted: np.ndarray, seen: list[int]) -> Callable[..., list[float]]:
    """Computes 1, 4, 9, … for the items 1, 2, 3, …, noting which it was asked for."""
    items = {key: i for i, key in enumerate(keys(*range(100)).tolist())}

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        seen.extend(items[wanted.tolist()[i]] for i in indices)
        advance(len(indices))
        return [float(items[wanted.tolist()[i]] ** 2) for i in indices]

    return compute


def fill(target: CacheTable, items: range, shard: int = 2, **ranks: int) -> list[int]:
    seen: list[int] = []
    wanted = keys(*items)
    assert target.fill(wanted, squares(wanted, seen), shard, **ranks) == len(seen)
    return seen


def shards(target: CacheTable) -> list[Path]:
    return sorted(target.path.glob("*.parquet"))


# --- keys


def test_a_key_is_16_bytes_of_the_content_whatever_the_order_of_its_names():
    """SHA-256 of compact JSON, here `[{"a":1,"b":"é"}]` by sha256sum; a change would lose every store there is."""
    assert hash_content({"b": "é", "a": 1}).hex() == "0947ff8502bae37e3a4e94bb876631cd"
    assert hash_content({"b": "é", "a": 1}) == hash_content({"a": 1, "b": "é"})
    assert len({hash_content(x) for x in ("1", 1, [1], ["1"], "", None)}) == 6
    assert hash_content("a", "b") != hash_content("ab")
    assert hash_content([1], [2, 3]) != hash_content([1, 2], [3])


def test_keys_that_end_in_zero_bytes_are_whole(tmp_path):
    """numpy cuts trailing zeros off a fixed-width string; a key is 16 bytes on disk and found again."""
    first, second = b"k" * 14 + b"\0\0", b"k" * 13 + b"\0\0\0"
    shelf(tmp_path).write(as_keys([first, second, b"\0" * 16]), [1.0, 2.0, 3.0])
    again = shelf(tmp_path)
    assert again.read(as_keys([b"\0" * 16, second, first])).to_pylist() == [3.0, 2.0, 1.0]
    assert pq.read_table(shards(again)[0])["key"].to_pylist() == [first, second, b"\0" * 16]


def test_another_identity_is_another_shelf(tmp_path):
    """No stale number: what the numbers depend on is hashed, nested values too, and the order of names is not."""
    identities = [{"weights": "a"}, {"weights": "b"}, {"weights": "a", "dtype": "bfloat16"}, {"weights": ["a"]}]
    paths = [shelf(tmp_path, identity).path for identity in identities]
    assert len(set(paths)) == 4
    shelf(tmp_path, identities[0]).write(keys(1), [1.0])
    assert shelf(tmp_path, identities[1]).missing(keys(1)).tolist() == [True]
    one, two = (shelf(tmp_path, i).path for i in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert one == two
    other = AnnotationCache(tmp_path).shelf("features", IDENTITY, pa.float64())
    assert other.path.parent.name == "features"
    assert other.path.name != paths[0].name  # the kind is part of what is hashed


def test_the_identity_lies_beside_the_numbers(tmp_path):
    target = shelf(tmp_path)
    target.write(keys(1), [1.0])
    assert json.loads((target.path / "identity.json").read_text()) == {"format": 1, "kind": "rewards", "weights": "a"}


# --- reading


def test_read_gives_the_order_that_was_asked_for(tmp_path):
    target = shelf(tmp_path)
    target.write(keys(1, 2), [1.0, 4.0])
    target.write(keys(3), [9.0])
    assert target.read(keys(3, 1, 2, 1)).to_pylist() == [9.0, 1.0, 4.0, 1.0]
    assert len(target) == 3
    assert target.read(keys()).to_pylist() == []


def test_missing_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "STALE", 0.0)
    target = shelf(tmp_path)
    assert target.missing(keys(1, 2)).tolist() == [True, True]
    target.write(keys(2), [4.0])
    assert target.missing(keys(1, 2, 3, 2)).tolist() == [True, False, True, False]
    with pytest.raises(KeyError, match=r"2 of 3 items are not in .*rewards"):
        target.read(keys(1, 2, 3))


def test_shards_of_another_process_are_seen(tmp_path):
    mine, theirs = shelf(tmp_path), shelf(tmp_path)
    assert mine.missing(keys(1)).all()
    theirs.write(keys(1), [1.0])
    assert mine.read(keys(1)).to_pylist() == [1.0]


def test_what_is_read_has_offsets_of_64_bits(tmp_path):
    """A shelf is one array in memory, and of 32 bits it would end at 2 GiB of text or 2^31 numbers."""
    one = pa.list_(pa.struct([("text", pa.string()), ("tokens", pa.list_(pa.int32()))]))
    texts = AnnotationCache(tmp_path).shelf("responses", IDENTITY, one)
    values = [[{"text": "a", "tokens": [1, 2]}], []]
    texts.write(keys(1, 2), values)
    found = texts.read(keys(1, 2))
    inner = pa.struct([("text", pa.large_string()), ("tokens", pa.large_list(pa.int32()))])
    assert found.type == pa.large_list(inner)
    assert found.to_pylist() == values


@pytest.mark.long
def test_a_shelf_may_hold_more_than_2_gib(tmp_path):
    """Needs 7 GiB of memory and 10 MiB of disk: texts of one letter."""
    texts = AnnotationCache(tmp_path).shelf("responses", IDENTITY, pa.string())
    text, wanted = "x" * 2**20, keys(*range(2100))
    texts.fill(wanted, lambda indices, _: [text] * len(indices), 300)
    assert texts.read(wanted)[2099].as_py() == text


def test_lists_of_floats_round_trip_in_float32(tmp_path):
    target = AnnotationCache(tmp_path).shelf("reference_logps", {}, pa.list_(pa.float32()))
    lists = [[-0.1, -1e-30], [], [-1e30, -float(np.float32(1 / 3)), 0.0]]
    target.write(keys(1, 2, 3), lists)
    found = (
        AnnotationCache(tmp_path).shelf("reference_logps", {}, pa.list_(pa.float32())).read(keys(3, 2, 1)).to_pylist()
    )
    assert found == [np.array(values, dtype=np.float32).tolist() for values in lists[::-1]]


# --- filling


def test_a_duplicate_is_computed_once(tmp_path):
    target, wanted, seen = shelf(tmp_path), keys(3, 3, 1, 3, 2, 1), list[int]()
    assert target.fill(wanted, squares(wanted, seen), 2) == 3
    assert seen == [3, 1, 2]
    assert target.read(wanted).to_pylist() == [9, 9, 1, 9, 4, 1]


def test_only_what_is_missing_is_computed(tmp_path):
    assert fill(shelf(tmp_path), range(1, 6)) == [1, 2, 3, 4, 5]
    assert fill(shelf(tmp_path), range(1, 6)) == []
    assert fill(shelf(tmp_path), range(3, 8)) == [6, 7]


def test_a_kill_loses_at_most_the_shard_it_met(tmp_path):
    """Shards of 2; killed in the third, a shard half written. 1 to 4 stand, and the rest comes with the next run."""
    target, wanted, seen = shelf(tmp_path), keys(*range(1, 8)), list[int]()
    compute = squares(wanted, seen)

    def killed(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        if len(seen) == 4:
            raise KeyboardInterrupt
        return compute(indices, advance)

    with pytest.raises(KeyboardInterrupt):
        target.fill(wanted, killed, 2)
    (target.path / "0123456789abcdef.partial").write_bytes(shards(target)[0].read_bytes()[:40])
    reports: list[str] = []
    again = shelf(tmp_path, warn=reports.append)
    assert again.missing(wanted).tolist() == [False] * 4 + [True] * 3
    assert fill(again, range(1, 8)) == [5, 6, 7]
    assert again.read(wanted).to_pylist() == [1, 4, 9, 16, 25, 36, 49]
    assert reports == []


def test_a_shard_is_not_seen_before_it_is_whole(tmp_path, monkeypatch):
    """Another process that looks while one is written finds nothing, and nothing to complain of."""
    found: list[list[bool]] = []
    reports: list[str] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        found.append(shelf(tmp_path, warn=reports.append).missing(keys(1)).tolist())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    shelf(tmp_path).write(keys(1), [1.0])
    assert found == [[True], [True]]  # identity.json, the shard
    assert reports == []
    assert shelf(tmp_path).read(keys(1)).to_pylist() == [1.0]


def test_advance_counts_what_another_job_brought(tmp_path):
    """Progress ends at the whole: items that appeared meanwhile are passed over, and counted as done."""
    target, wanted, seen, done = shelf(tmp_path), keys(1, 2, 3, 4), list[int](), list[int]()
    compute = squares(wanted, seen)

    def slow(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        if not seen:
            shelf(tmp_path).write(keys(3, 4), [9.0, 16.0])
        return compute(indices, advance)

    assert target.fill(wanted, slow, 2, advance=done.append) == 2
    assert seen == [1, 2]
    assert sum(done) == 4


def test_ranks_split_the_work_without_a_gap(tmp_path):
    """Each rank looks at the store when it comes to it. The second one comes when the first is done, a third and
    slower one as well: no item is left, none is computed twice."""
    parts = [fill(shelf(tmp_path), range(1, 12), rank=rank, world=3) for rank in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(1, 12))
    assert [len(part) for part in parts] == [4, 4, 3]


WRITER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from var.annotate.cache import Store, as_keys
from var.data.rows import hash_content

root, go = Path(sys.argv[1]), Path(sys.argv[2])
shelf = Store(root).shelf("rewards", {"weights": "a"}, pa.float64())
order = range(1, 31) if sys.argv[3] == "up" else range(30, 0, -1)
keys = as_keys([hash_content(i) for i in order])

def compute(indices, advance):
    time.sleep(0.01)
    return [float(order[i] ** 2) for i in indices]

Path(sys.argv[2] + sys.argv[3]).touch()
while not go.exists():
    time.sleep(0.005)
print(shelf.fill(keys, compute, 2), shelf.read(keys).to_pylist() == [i**2 for i in order])
"""


def test_two_processes_that_fill_at_once_end_with_all_items(tmp_path):
    """Real processes, one from each end, that start together: both read all, and neither computed what it saw."""
    go = tmp_path / "go"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(go), way], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )
        for way in ("up", "down")
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"go{way}").exists() for way in ("up", "down")) and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    words = [job.communicate(timeout=60)[0].split() for job in jobs]
    assert [whole for _, whole in words] == ["True", "True"]
    assert all(0 < int(computed) < 30 for computed, _ in words)
    wanted = keys(*range(1, 31))
    assert shelf(tmp_path).read(wanted).to_pylist() == [i**2 for i in range(1, 31)]
    assert not list(tmp_path.rglob("*.partial"))


# --- damage


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


def empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_shard_is_set_aside_named_and_computed_again(tmp_path, damage):
    """Of three shards one is spoilt: it is reported once by name, its two items are computed, nothing else is lost.
    The new shard holds the same bytes as the lost one did, so it has its very name."""
    fill(shelf(tmp_path), range(1, 7))
    spoilt = next(path for path in shards(shelf(tmp_path)) if pq.read_table(path)["value"].to_pylist() == [9.0, 16.0])
    before = spoilt.read_bytes()
    spoilt.write_bytes(damage(before))
    reports: list[str] = []
    target = shelf(tmp_path, warn=reports.append)
    assert target.missing(keys(*range(1, 7))).tolist() == [False, False, True, True, False, False]
    aside = spoilt.with_suffix(".damaged")
    assert reports == [
        f"store: the checksum of {spoilt} is off; set aside as {aside.name}, its items are computed again"
    ]
    assert aside.read_bytes() == damage(before)
    assert not spoilt.exists()
    assert fill(target, range(1, 7)) == [3, 4]
    assert spoilt.read_bytes() == before
    assert target.read(keys(*range(1, 7))).to_pylist() == [1, 4, 9, 16, 25, 36]
    assert len(reports) == 1


def test_two_processes_meet_one_damaged_shard(tmp_path, monkeypatch):
    """Both listed it; the other one has set it aside before this one reads it, or before this one sets it aside."""
    fill(shelf(tmp_path), range(1, 3))
    (spoilt,) = shards(shelf(tmp_path))
    whole, plain = spoilt.read_bytes(), Path.read_bytes
    for late in (False, True):
        spoilt.write_bytes(flip(whole))

        def read_bytes(path: Path, late: bool = late) -> bytes:
            data = plain(path) if late else b""
            os.replace(path, path.with_suffix(".damaged"))
            return data if late else plain(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        target = shelf(tmp_path, warn=lambda text: None)
        assert target.missing(keys(1, 2)).all()
        monkeypatch.undo()
        assert fill(target, range(1, 3)) == [1, 2]
        assert target.read(keys(1, 2)).to_pylist() == [1.0, 4.0]


# --- a disk that does not take it


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota exceeded"), (errno.EIO, "Input/output error")],
)
def test_a_full_disk_is_one_clear_error_and_what_was_stored_is_kept(tmp_path, monkeypatch, code, reason):
    """The second shard does not fit: the first stays, no half of the second does, and a later run goes on."""
    target, synced, fsync = shelf(tmp_path), list[int](), os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 2:  # identity.json, the first shard
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as error:
        fill(target, range(1, 6))
    assert str(error.value) == (
        f"the store cannot be written: {reason} at {target.path}; what was stored before is kept. Free space, or set "
        "store= to another folder, and start again"
    )
    assert isinstance(error.value.__cause__, OSError)
    monkeypatch.undo()
    assert [path.suffix for path in sorted(target.path.iterdir())].count(".partial") == 0
    assert json.loads((target.path / "identity.json").read_text())["weights"] == "a"
    assert fill(shelf(tmp_path), range(1, 6)) == [3, 4, 5]


def test_a_read_only_disk_is_one_clear_error(tmp_path, monkeypatch):
    """On a read-only file system each call fails with EROFS, the removal of what was never written too; what is stored
    is still read."""
    fill(shelf(tmp_path), range(1, 3))
    target = shelf(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def open_(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return plain(path, mode, *rest, **options) if mode.startswith("r") else refuse()

    plain = Path.open
    monkeypatch.setattr(Path, "open", open_)
    for name in ("unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    assert target.read(keys(1, 2)).to_pylist() == [1.0, 4.0]
    with pytest.raises(
        UserError, match=r"^the store cannot be written: read-only at .*; what was stored before is kept"
    ):
        fill(target, range(1, 4))


def test_a_read_only_disk_with_a_damaged_shard_reads_the_rest(tmp_path, monkeypatch):
    fill(shelf(tmp_path), range(1, 5))
    first = shards(shelf(tmp_path))[0]
    lost = pq.read_table(first)["value"].to_pylist()
    first.write_bytes(flip(first.read_bytes()))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "replace", refuse)
    reports: list[str] = []
    found = shelf(tmp_path, warn=reports.append)
    kept = [i for i in range(1, 5) if i**2 not in lost]
    assert found.read(keys(*kept)).to_pylist() == [i**2 for i in kept]
    assert found.missing(keys(*range(1, 5))).sum() == 2
    assert first.name in reports[0]
