"""The annotation cache: items are found by content, survive kills, and damage and full disks are reported."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.helpers.cache import FINGERPRINT, fill, flip, keys, open_table, read_shard, shards, squares, values
from var.annotate import cache as cache_module
from var.annotate.cache import AnnotationCache
from var.annotate.cache_files import as_keys
from var.utils.errors import UserError
from var.utils.provenance import hash_content

# --- keys


def test_key_is_16_bytes_of_the_content_whatever_the_order_of_names():
    """SHA-256 of compact JSON, here `[{"a":1,"b":"é"}]` by sha256sum. A change would invalidate every cache."""
    assert hash_content({"b": "é", "a": 1}).hex() == "0947ff8502bae37e3a4e94bb876631cd"
    assert hash_content({"b": "é", "a": 1}) == hash_content({"a": 1, "b": "é"})
    assert len({hash_content(x) for x in ("1", 1, [1], ["1"], "", None)}) == 6
    assert hash_content("a", "b") != hash_content("ab")
    assert hash_content([1], [2, 3]) != hash_content([1, 2], [3])


def test_keys_that_end_in_zero_bytes_are_found(tmp_path):
    """Trailing zeros are removed by numpy from a fixed-width string. On disk a key has all 16 bytes."""
    first, second, third = b"k" * 14 + b"\0\0", b"k" * 13 + b"\0\0\0", b"\0" * 16
    open_table(tmp_path).write(as_keys([first, second, third]), [1.0, 2.0, 3.0])
    again = open_table(tmp_path)
    assert again.read(as_keys([third, second, first])).to_pylist() == [3.0, 2.0, 1.0]
    assert read_shard(shards(again)[0])["key"].to_pylist() == sorted([first, second, third])


def test_each_fingerprint_and_kind_has_its_own_table(tmp_path):
    """What the numbers depend on is hashed, nested values too, but not the order of names."""
    fingerprints = [{"weights": "a"}, {"weights": "b"}, {"weights": "a", "dtype": "bfloat16"}, {"weights": ["a"]}]
    paths = [open_table(tmp_path, fingerprint).path for fingerprint in fingerprints]
    assert len(set(paths)) == 4
    open_table(tmp_path, fingerprints[0]).write(keys(1), [1.0])
    assert open_table(tmp_path, fingerprints[1]).missing(keys(1)).tolist() == [True]
    assert open_table(tmp_path, {"a": 1, "b": 2}).path == open_table(tmp_path, {"b": 2, "a": 1}).path
    other = AnnotationCache(tmp_path).table("features", FINGERPRINT, pa.float64())
    assert other.path.parent.name == "features"
    assert other.path.name != paths[0].name


def test_fingerprint_is_stored_next_to_the_numbers(tmp_path):
    table = open_table(tmp_path)
    table.write(keys(1), [1.0])
    assert json.loads((table.path / "fingerprint.json").read_text()) == {"format": 1, "kind": "rewards", "weights": "a"}


# --- reading


def test_read_returns_values_in_the_order_of_the_keys(tmp_path):
    table = open_table(tmp_path)
    table.write(keys(1, 2), [1.0, 4.0])
    table.write(keys(3), [9.0])
    assert values(table, [3, 1, 2, 1]) == [9.0, 1.0, 4.0, 1.0]
    assert len(table) == 3
    assert values(table, []) == []


def test_missing_items_are_marked_and_reading_them_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "STALE", 0.0)
    table = open_table(tmp_path)
    assert table.missing(keys(1, 2)).tolist() == [True, True]
    table.write(keys(2), [4.0])
    assert table.missing(keys(1, 2, 3, 2)).tolist() == [True, False, True, False]
    with pytest.raises(KeyError, match=r"2 of 3 items are not in .*rewards"):
        table.read(keys(1, 2, 3))


def test_values_are_read_with_64_bit_offsets(tmp_path):
    """In memory a table is one array, and 32-bit offsets would limit it to 2 GiB of text or 2^31 numbers."""
    kind = pa.list_(pa.struct([("text", pa.string()), ("tokens", pa.list_(pa.int32()))]))
    table = AnnotationCache(tmp_path).table("responses", FINGERPRINT, kind)
    written = [[{"text": "a", "tokens": [1, 2]}], []]
    table.write(keys(1, 2), written)
    found = table.read(keys(1, 2))
    inner = pa.struct([("text", pa.large_string()), ("tokens", pa.large_list(pa.int32()))])
    assert found.type == pa.large_list(inner)
    assert found.to_pylist() == written


@pytest.mark.long
def test_table_can_hold_more_than_2_gib(tmp_path):
    """Needs 7 GiB of memory and 10 MiB of disk: each text repeats one character."""
    table = AnnotationCache(tmp_path).table("responses", FINGERPRINT, pa.string())
    text, wanted = "x" * 2**20, keys(*range(2100))
    table.fill(wanted, lambda indices, _: [text] * len(indices), 300)
    assert table.read(wanted)[2099].as_py() == text


# --- filling


def test_duplicates_are_computed_once(tmp_path):
    table, items = open_table(tmp_path), [3, 3, 1, 3, 2, 1]
    assert fill(table, items) == [3, 1, 2]
    assert values(table, items) == [9, 9, 1, 9, 4, 1]


def test_only_missing_items_are_computed(tmp_path):
    assert fill(open_table(tmp_path), range(1, 6)) == [1, 2, 3, 4, 5]
    assert fill(open_table(tmp_path), range(1, 6)) == []
    assert fill(open_table(tmp_path), range(3, 8)) == [6, 7]


def test_shard_is_not_visible_before_it_is_complete(tmp_path, monkeypatch):
    """Another process that looks while a shard is written finds nothing, and reports nothing."""
    found, reports, fsync = list[list[bool]](), list[str](), os.fsync

    def look(descriptor: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):  # a folder is synced after the rename
            found.append(open_table(tmp_path, warn=reports.append).missing(keys(1)).tolist())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    open_table(tmp_path).write(keys(1), [1.0])
    assert found == [[True], [True]]  # fingerprint.json, the shard
    assert reports == []
    assert values(open_table(tmp_path), [1]) == [1.0]


def test_progress_counts_items_that_another_job_wrote(tmp_path):
    table, seen, done = open_table(tmp_path), list[int](), list[int]()
    compute = squares(range(1, 5), seen)

    def slow(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        if not seen:
            open_table(tmp_path).write(keys(3, 4), [9.0, 16.0])
        return compute(indices, advance)

    assert table.fill(keys(1, 2, 3, 4), slow, 2, advance=done.append) == 2
    assert seen == [1, 2]
    assert sum(done) == 4


def test_ranks_divide_the_items_without_gap_or_overlap(tmp_path):
    """The second and the third rank look at the table after the first one has finished."""
    parts = [fill(open_table(tmp_path), range(1, 12), rank=rank, world=3) for rank in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(1, 12))
    assert [len(part) for part in parts] == [4, 4, 3]


# --- damage


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], flip, lambda _: b""], ids=["truncated", "bit flipped", "empty"]
)
def test_damaged_shard_is_moved_reported_and_recomputed(tmp_path, damage):
    """One of three shards is damaged. The new shard holds the same bytes, so it has the same name."""
    fill(open_table(tmp_path), range(1, 7))
    damaged = next(p for p in shards(open_table(tmp_path)) if set(read_shard(p)["value"].to_pylist()) == {9.0, 16.0})
    before = damaged.read_bytes()
    damaged.write_bytes(damage(before))
    reports: list[str] = []
    table = open_table(tmp_path, warn=reports.append)
    assert table.missing(keys(*range(1, 7))).tolist() == [False, False, True, True, False, False]
    moved = damaged.with_suffix(".damaged")
    assert reports == [
        f"annotation cache: checksum mismatch in {damaged}. It was moved to {moved.name} and its items will be "
        "recomputed."
    ]
    assert moved.read_bytes() == damage(before)
    assert not damaged.exists()
    assert fill(table, range(1, 7)) == [3, 4]
    assert damaged.read_bytes() == before
    assert values(table, range(1, 7)) == [1, 4, 9, 16, 25, 36]
    assert len(reports) == 1


@pytest.mark.parametrize("late", [False, True], ids=["before reading", "before moving"])
def test_damaged_shard_can_be_moved_by_another_process(tmp_path, monkeypatch, late):
    """Both processes have listed it; the other one moves it before this one reads it, or before this one moves it."""
    fill(open_table(tmp_path), range(1, 3))
    (damaged,) = shards(open_table(tmp_path))
    damaged.write_bytes(flip(damaged.read_bytes()))
    plain = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        data = plain(path) if late else b""
        os.replace(path, path.with_suffix(".damaged"))
        return data if late else plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    table = open_table(tmp_path, warn=lambda text: None)
    assert table.missing(keys(1, 2)).all()
    monkeypatch.undo()
    assert fill(table, range(1, 3)) == [1, 2]
    assert values(table, [1, 2]) == [1.0, 4.0]


# --- disks that cannot be written


def read_only(*_: Any, **__: Any) -> Any:
    """Fail as a read-only file system does."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_read_only_disk_can_be_read_and_writing_is_a_clear_error(tmp_path, monkeypatch):
    """Every change fails with EROFS, also the removal of a file that was never written."""
    fill(open_table(tmp_path), range(1, 3))
    table, plain = open_table(tmp_path), Path.open

    def open_(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return plain(path, mode, *rest, **options) if mode.startswith("r") else read_only()

    monkeypatch.setattr(Path, "open", open_)
    for name in ("unlink", "replace"):
        monkeypatch.setattr(Path, name, read_only)
    assert values(table, [1, 2]) == [1.0, 4.0]
    with pytest.raises(
        UserError, match=r"^annotation_cache: cannot be written: read-only at .*\. Earlier annotations are kept"
    ):
        fill(table, range(1, 4))


def test_damage_on_a_read_only_disk_hides_only_its_items(tmp_path, monkeypatch):
    fill(open_table(tmp_path), range(1, 5))
    first = shards(open_table(tmp_path))[0]
    lost = read_shard(first)["value"].to_pylist()
    first.write_bytes(flip(first.read_bytes()))
    monkeypatch.setattr(Path, "replace", read_only)
    reports: list[str] = []
    table = open_table(tmp_path, warn=reports.append)
    kept = [i for i in range(1, 5) if i**2 not in lost]
    assert values(table, kept) == [i**2 for i in kept]
    assert table.missing(keys(*range(1, 5))).sum() == 2
    assert first.name in reports[0]
