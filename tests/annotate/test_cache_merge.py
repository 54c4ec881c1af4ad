"""The files of the annotation cache: linear cost, merging, memory maps, damage, and tables of earlier versions."""

import hashlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.cache import FINGERPRINT, fill, flip, keys, open_table, read_shard, shards, values
from tests.helpers.cache_workers import assert_sound, start_workers
from var.annotate import cache as cache_module
from var.annotate import cache_files, cache_work
from var.annotate.cache import AnnotationCache, CacheTable
from var.annotate.cache_files import Damaged, as_keys, load

# --- cost


def count_operations(root: Path, monkeypatch: pytest.MonkeyPatch, items: int) -> Counter[str]:
    """Return the files and bytes read, keys sorted and searched, and names listed, while items are filled and read."""
    counts, hashes = Counter[str](), np.random.default_rng(0).integers(0, 256, (items, 16), dtype=np.uint8)
    plain_load, plain_sort, plain_search, plain_list = load, cache_files.sort_order, np.searchsorted, os.listdir

    def count_load(path: Path, value: pa.DataType) -> Any:
        counts.update(files=1, bytes=path.stat().st_size)
        return plain_load(path, value)

    def count_sort(some: np.ndarray) -> np.ndarray:
        counts["sorted"] += len(some)
        return plain_sort(some)

    def count_search(within: np.ndarray, some: np.ndarray) -> np.ndarray:
        counts["searched"] += len(some)
        return plain_search(within, some)

    def count_names(path: Path) -> list[str]:
        names = plain_list(path)
        counts["names"] += len(names)
        return names

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "load", count_load)
        for module in (cache_files, cache_work):
            patch.setattr(module, "sort_order", count_sort)
        patch.setattr(np, "searchsorted", count_search)
        patch.setattr(os, "listdir", count_names)
        some = hashes.view("S16")[:, 0]
        open_table(root).fill(some, lambda indices, _: indices * 0.5, 8)
        assert (open_table(root).read(some).to_numpy() == np.arange(items) * 0.5).all()
    return counts


def test_cost_is_linear_in_the_number_of_items(tmp_path, monkeypatch):
    """Four times as many items cost about four times as much, not sixteen. The number of files grows slowly."""
    few = count_operations(tmp_path / "few", monkeypatch, 500)
    many = count_operations(tmp_path / "many", monkeypatch, 2000)
    assert set(few) == {"files", "bytes", "sorted", "searched", "names"}
    for name in few:
        assert many[name] <= 6 * few[name], (name, few, many)
    assert len(list((tmp_path / "many").rglob("*.arrow"))) <= 24


def test_many_small_fills_leave_few_files(tmp_path):
    for item in range(100):
        assert fill(open_table(tmp_path), [item]) == [item]
        assert len(shards(open_table(tmp_path))) <= 16
    assert values(open_table(tmp_path), range(100)) == [i**2 for i in range(100)]
    assert len(open_table(tmp_path)) == 100


# --- merging


def test_reader_finds_items_of_a_file_that_was_merged_meanwhile(tmp_path, monkeypatch):
    """It has listed the parts, which are removed before it opens them. The merged file has their items."""
    for item in range(7):
        fill(open_table(tmp_path), [item])
    plain, merged = os.listdir, list[int]()

    def merge_after_listing(path: Path) -> list[str]:
        names = plain(path)
        if not merged:
            merged.append(len(names))
            fill(open_table(tmp_path), [7])
        return names

    table = open_table(tmp_path)
    monkeypatch.setattr(os, "listdir", merge_after_listing)
    assert not table.missing(keys(*range(8))).any()
    assert len(shards(table)) == 1
    assert values(table, range(8)) == [i**2 for i in range(8)]


def test_open_table_releases_merged_files(tmp_path):
    """Each item is held once, and values that were read before the merge remain."""
    table = open_table(tmp_path)
    for item in range(7):
        fill(open_table(tmp_path), [item])
    before = table.read(keys(*range(7)))
    fill(open_table(tmp_path), [7])
    assert len(table) == 8
    assert before.to_pylist() == [i**2 for i in range(7)]


def test_merge_keeps_the_value_that_was_read_before(tmp_path):
    """Two machines rounded an item differently. Which value is read does not depend on what is merged."""
    for order in ([1.5, 1.25, 1.75], [1.75, 1.5, 1.25]):
        root = tmp_path / str(order[0])
        for value in order:
            open_table(root).write(keys(1, 2), [value, 4.0])
        assert values(open_table(root), [1, 2]) == [1.25, 4.0]
        for item in range(3, 9):
            fill(open_table(root), [item])
        assert len(shards(open_table(root))) < 5
        assert values(open_table(root), range(1, 9)) == [1.25, *[i**2 for i in range(2, 9)]]
        assert len(open_table(root)) == 8


def test_merge_without_space_keeps_the_parts(tmp_path, monkeypatch):
    """The fill is complete without it."""
    table, plain = open_table(tmp_path), CacheTable._store

    def store(self: CacheTable, some: np.ndarray, column: pa.Array) -> str:
        if len(some) > 1:
            raise OSError(28, "No space left on device")
        return plain(self, some, column)

    monkeypatch.setattr(CacheTable, "_store", store)
    assert fill(table, range(12), shard=1) == list(range(12))
    assert len(shards(table)) == 12
    assert_sound(tmp_path, range(12))


@pytest.mark.parametrize("kills", [10, pytest.param(60, marks=pytest.mark.long)])
def test_process_killed_while_it_merges_loses_nothing(tmp_path, kills):
    """Every second file leads to a merge."""
    draw, items, root = random.Random(0), range(2000), tmp_path / "cache"
    held = np.zeros(len(items), dtype=bool)
    for _ in range(kills):
        (job,), _ = start_workers(root, [draw.sample(items, len(items))], shard=2, seconds=0.0, fanout=2)
        while not shards(open_table(root)):  # on a busy machine, the first one may not have started yet
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.2))
        os.kill(job.pid, signal.SIGKILL)
        job.join(60)
        assert_sound(root, items)
        now = ~open_table(root).missing(keys(*items))
        assert now[held].all()
        held = now
    assert 0 < held.sum() < len(items)
    assert sorted(fill(open_table(root), items, 64)) == np.flatnonzero(~held).tolist()
    assert_sound(root, items)


# --- memory maps

LISTS = pa.list_(pa.float32())


def write_lists(root: Path, items: int) -> CacheTable:
    table = AnnotationCache(root).table("logps", FINGERPRINT, LISTS)
    table.write(keys(*range(items)), [np.full(1000, i, dtype=np.float32) for i in range(items)])
    return table


def test_large_files_are_mapped_and_never_merged(tmp_path, monkeypatch):
    """Values are in the page cache, which ranks share. Reading some of them allocates memory for those alone."""
    monkeypatch.setattr(cache_files, "LIMIT", 100_000)
    table = write_lists(tmp_path, 500)
    allocated = pa.total_allocated_bytes()
    column = AnnotationCache(tmp_path).table("logps", FINGERPRINT, LISTS).read(keys(*range(500)))
    assert column[7].as_py() == [7.0] * 1000
    assert column.take(np.array([3, 1])).to_pylist() == [[3.0] * 1000, [1.0] * 1000]
    assert pa.total_allocated_bytes() - allocated < 100_000  # of two million
    before = shards(table)
    for item in range(500, 520):
        fill_lists = AnnotationCache(tmp_path).table("logps", FINGERPRINT, LISTS)
        fill_lists.fill(keys(item), lambda indices, _: [[1.0]], 8)
    assert set(before) <= set(shards(table))


def test_small_files_are_merged_once_they_reach_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_files, "LIMIT", 20_000)
    some = keys(*range(3000))
    open_table(tmp_path).fill(some, lambda indices, _: indices * 0.5, 100)
    sizes = [path.stat().st_size for path in shards(open_table(tmp_path))]
    assert sum(size >= 20_000 for size in sizes) >= 3
    assert sum(size for size in sizes if size < 20_000) < 20_000
    assert (open_table(tmp_path).read(some).to_numpy() == np.arange(3000) * 0.5).all()


@pytest.mark.parametrize("limit", [2**28, 1], ids=["read", "mapped"])
def test_every_damaged_bit_is_detected(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(cache_files, "LIMIT", limit)
    fill(open_table(tmp_path), range(20), shard=20)
    (path,) = shards(open_table(tmp_path))
    data = path.read_bytes()
    for place in np.linspace(0, len(data) - 1, 24).astype(int):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(Damaged):
            load(path, pa.float64())
    reports: list[str] = []
    table = open_table(tmp_path, warn=reports.append)
    assert fill(table, range(20), shard=20) == list(range(20))
    assert path.read_bytes() == data
    assert len(reports) == 1
    assert values(table, range(20)) == [i**2 for i in range(20)]


# --- tables of earlier versions


def write_parquet(table: CacheTable, items: range) -> Path:
    """Write a file as earlier versions did: Parquet, not sorted."""
    column = pa.array([as_keys([key]).tobytes() for key in keys(*items)], type=pa.binary(16))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": column, "value": [float(i**2) for i in items]}), sink)
    data = sink.getvalue().to_pybytes()
    table.path.mkdir(parents=True, exist_ok=True)
    path = table.path / f"{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    path.write_bytes(data)
    return path


def test_parquet_files_are_converted_once_and_reported(tmp_path, monkeypatch):
    """The 21 files give three Arrow files, each of at least LIMIT bytes but the last."""
    monkeypatch.setattr(cache_files, "LIMIT", 2000)
    for begin in range(0, 210, 10):
        write_parquet(open_table(tmp_path), range(begin, begin + 10))
    reports: list[str] = []
    table = open_table(tmp_path, warn=reports.append)
    assert values(table, range(210)) == [i**2 for i in range(210)]
    assert reports == [f"annotation cache: 21 Parquet files in {table.path} were converted to Arrow files."]
    assert not list(table.path.glob("*.parquet"))
    assert len(shards(table)) == 3
    assert fill(open_table(tmp_path, warn=reports.append), range(211)) == [210]
    assert len(reports) == 1


def test_parquet_files_that_cannot_be_replaced_are_read(tmp_path, monkeypatch):
    """On a read-only disk nothing is converted or reported."""
    path = write_parquet(open_table(tmp_path), range(10))

    def reject(*_: Any) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(CacheTable, "_store", reject)
    reports: list[str] = []
    assert values(open_table(tmp_path, warn=reports.append), range(10)) == [i**2 for i in range(10)]
    assert path.exists()
    assert reports == []


def test_damaged_parquet_file_is_moved_and_its_items_are_recomputed(tmp_path):
    kept, damaged = (write_parquet(open_table(tmp_path), some) for some in (range(5), range(5, 10)))
    damaged.write_bytes(flip(damaged.read_bytes()))
    reports: list[str] = []
    table = open_table(tmp_path, warn=reports.append)
    assert fill(table, range(10)) == [5, 6, 7, 8, 9]
    assert [report.split(str(table.path))[0] for report in reports] == [
        "annotation cache: checksum mismatch in ", "annotation cache: 1 Parquet files in "
    ]  # fmt: skip
    assert not kept.exists()
    assert damaged.with_suffix(".damaged").exists()
    assert values(table, range(10)) == [i**2 for i in range(10)]


def test_files_hold_sorted_keys_in_one_batch(tmp_path):
    """So that they can be searched where they are."""
    fill(open_table(tmp_path), range(50), shard=50)
    (path,) = shards(open_table(tmp_path))
    column = read_shard(path)["key"]
    assert column.num_chunks == 1
    assert column.to_pylist() == sorted(column.to_pylist())
