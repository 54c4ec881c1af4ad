"""Cached rows, tokens and keys: damage is found, reported and repaired, and one process writes for all."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from notebooks.tiny import byte_tokenizer
from tests.helpers.runs import write_lines
from var.data import encode as encode_module
from var.data import read as read_module
from var.data import rows as rows_module
from var.data import stored
from var.data.chat import Chat
from var.data.choice import choose
from var.data.read import read
from var.data.sequences import Sequences, encode
from var.data.sources.files import Files
from var.utils import processes
from var.utils.errors import UserError
from var.utils.provenance import hash_content


def make_file(folder: Path, count: int) -> Path:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc ", k=draw.randint(3, 30))) + "z" for _ in range(2 * count)]
    return write_lines(
        folder / "rows.jsonl",
        [
            {"prompt": f"number {i}", "responses": [{"text": t, "score": i} for t in texts[2 * i : 2 * i + 2]]}
            for i in range(count)
        ],
    )


def load(file: Path, cache: Path) -> Sequences:
    """Read and tokenize a file as a new process does."""
    stored._hash_once.cache_clear()
    rows = read(Files(path=str(file)), cache)
    return encode(rows, choose(rows, "all"), Chat(byte_tokenizer()), 64, "drop", False, cache)


def contents(sequences: Sequences) -> Any:
    return [sequences.tokens(i) for i in range(len(sequences))], sequences.facts.tobytes(), sequences.content


def test_any_damage_is_reported_and_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A flipped bit, a shorter file, a missing file and other text, in each file of the cache."""
    file, cache = make_file(tmp_path, 20), tmp_path / "cache"
    expected, draw = contents(load(file, cache)), random.Random(0)
    files = [path for path in cache.rglob("*") if path.suffix in (".arrow", ".npy", ".json")]
    files.sort(key=lambda path: path.parts[-3] == "rows")  # last, since the tokens of rows that were read again are new
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        for damaged in (bytes(flipped), whole[: len(whole) // 2], b"", b"[" * 5000, None):
            capsys.readouterr()
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert contents(load(file, cache)) == expected
            missing_marker = damaged is None and path.name == "done.json"
            reported = "is damaged. It is made again." in " ".join(capsys.readouterr().out.split())
            assert reported != missing_marker


@pytest.mark.parametrize("valid", [False, True])
def test_marker_with_other_names_removes_no_other_file(valid: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Damaged or not, it names the files that are compared, and removed if they differ."""
    (tmp_path / "mine.npy").write_text("mine")
    target = tmp_path / "keys"
    expected = stored.remember(target, "computes", lambda: np.arange(3)).tolist()
    content = {"facts": {}, "files": {"array.npy": "0", "../mine.npy": "0", str(tmp_path / "mine.npy"): "0"}}
    checksum = hash_content(content).hex() if valid else "0"
    (target / "done.json").write_text(json.dumps({**content, "checksum": checksum}))
    assert stored.remember(target, "computes", lambda: np.arange(3)).tolist() == expected
    assert (tmp_path / "mine.npy").read_text() == "mine"
    assert "done.json, array.npy in" in " ".join(capsys.readouterr().out.split())


def test_several_processes_read_and_tokenize_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = make_file(tmp_path, 60)
    for module, chunk in ((encode_module, 8), (read_module, 7)):
        monkeypatch.setattr(module, "CHUNK", chunk)
    expected = contents(load(file, tmp_path / "one"))
    monkeypatch.setattr(encode_module, "PARALLEL", 10)
    monkeypatch.setattr(read_module, "ALONE", 2)
    monkeypatch.setattr(processes, "count_cpus", lambda: 3)
    started = list[int]()
    real = processes.ProcessPoolExecutor
    monkeypatch.setattr(processes, "ProcessPoolExecutor", lambda n, *rest: started.append(n) or real(n, *rest))
    assert contents(load(file, tmp_path / "several")) == expected
    assert started == [3, 3]
    one, several = (
        [path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.suffix in (".arrow", ".npy")]
        for name in ("one", "several")
    )
    assert one == several


def test_several_processes_report_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Invalid rows are named in order with an example, and columns that first occur in later rows are known."""
    file = make_file(tmp_path, 60)
    lines = [{**json.loads(line), "id": str(i)} for i, line in enumerate(file.read_text().splitlines())]
    lines[50]["note"] = "x"
    file.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(read_module, "CHUNK", 7)
    monkeypatch.setattr(read_module, "ALONE", 2)
    found = []
    for count in (1, 3):
        monkeypatch.setattr(processes, "count_cpus", lambda count=count: count)
        valid = read(Files(path=str(file)), tmp_path / f"valid{count}")
        broken = [*lines[:20], {**lines[20], "responses": [""]}, *lines[21:40], {"id": "x"}, lines[3], *lines[41:]]
        other = tmp_path / "broken.jsonl"
        other.write_text("\n".join(map(json.dumps, broken)))
        with pytest.raises(UserError) as raised:
            read(Files(path=str(other)), tmp_path / f"broken{count}")
        found.append((valid.description.replace("unused columns: note", "NOTE"), str(raised.value)))
    assert found[0] == found[1]
    assert "NOTE" in found[0][0]
    for part in (
        "broken.jsonl:21: response 0 is empty",
        "broken.jsonl:41: missing",
        "broken.jsonl:42: id '3' is also the id of broken.jsonl:4",
        "Valid: ",
    ):
        assert part in found[0][1]


def fail(part: int) -> int:
    if part == 3:
        raise {"user": UserError("row 3"), "other": ZeroDivisionError("x")}[KIND[0]]
    return part


KIND = ["user"]


def test_errors_of_processes_are_raised_and_nothing_hangs(monkeypatch: pytest.MonkeyPatch):
    """Of the work, of what yields the parts, and for parts that cannot be pickled."""

    def parts():
        yield from range(4)
        raise OSError("disk")

    monkeypatch.setattr(processes, "count_cpus", lambda: 2)
    assert list(processes.map_in_order(abs, range(-9, 0))) == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    monkeypatch.setattr(f"{__name__}.KIND", ["user"])
    with pytest.raises(UserError, match="row 3"):
        list(processes.map_in_order(fail, range(9)))
    monkeypatch.setattr(f"{__name__}.KIND", ["other"])
    with pytest.raises(RuntimeError, match="ZeroDivisionError: x"):
        list(processes.map_in_order(fail, range(9)))
    with pytest.raises(OSError, match="disk"):
        list(processes.map_in_order(abs, parts()))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        list(processes.map_in_order(abs, [lambda: 1] * 9))
    assert next(processes.map_in_order(abs, range(-9, 0))) == 9  # and the others are given up
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_one_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "count_cpus", lambda: 2)
    with pytest.raises(UserError, match="was killed"):
        list(processes.map_in_order(lambda part: os.kill(os.getpid(), signal.SIGKILL), range(5)))


@pytest.mark.parametrize("count", [10, 200])
def test_a_start_with_a_full_cache_decodes_no_row(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So it costs as little with a million rows as arrays of a million numbers do."""
    file, cache = make_file(tmp_path, count), tmp_path / "cache"
    load(file, cache)
    decoded = list[Any]()
    real = rows_module._load_row
    monkeypatch.setattr(rows_module, "_load_row", lambda record: decoded.append(record) or real(record))
    sequences = load(file, cache)
    assert len(sequences) == 2 * count
    assert sequences.column("score").tolist() == [float(i) for i in range(count) for _ in range(2)]
    assert decoded == []


def test_arrays_are_computed_once(tmp_path: Path):
    calls = list[int]()

    def compute() -> np.ndarray:
        calls.append(1)
        return np.array([b"a" * 16, b"b\0\0"], dtype="S16")

    first, second = (stored.remember(tmp_path / "keys", "computes", compute) for _ in range(2))
    assert calls == [1]
    assert first.tobytes() == second.tobytes() == compute().tobytes()
    assert not second.flags.writeable
    (tmp_path / "keys" / stored.DONE).unlink()
    (tmp_path / "keys" / "tmpab12").mkdir()  # of processes that were killed
    (tmp_path / "keys" / "values.npy.0123.partial").write_text("")
    assert stored.remember(tmp_path / "keys", "computes", compute).tobytes() == first.tobytes()
    assert not [path for path in (tmp_path / "keys").iterdir() if path.name.startswith("tmp") or "partial" in path.name]
    shutil.rmtree(tmp_path / "keys")
    assert stored.remember(tmp_path / "keys", "computes", compute).tobytes() == first.tobytes()
