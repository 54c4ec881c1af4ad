"""Cached replies: checksums, and processes that share them."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.servers import Broken, client, completion, served
from var.utils.errors import UserError
from var.utils.http_client import Failure

BODIES = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(6)]


def change(folder: Path, change: str, *values: Any) -> None:
    """Change the table of replies."""
    with closing(sqlite3.connect(folder / "replies.sqlite", isolation_level=None)) as database:
        database.execute(f"UPDATE replies SET {change}", values)


def read(folder: Path) -> bytes:
    """Return the only reply that is stored."""
    with closing(sqlite3.connect(folder / "replies.sqlite")) as database:
        database.text_factory = bytes
        ((stored,),) = database.execute("SELECT reply FROM replies").fetchall()
    return bytes(stored)


def test_every_flipped_bit_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """[[A]] and [[C]] differ in one bit."""
    with served(lambda body, before: completion("[[A]]")) as server:
        judge = client(server.base_url, tmp_path)
        judge.ask(BODIES[:1])
        stored = read(tmp_path)
        places = [stored.index(b"[[A]]") + 2, 0, len(stored) - 1, stored.index(b"\n"), len(stored) // 2]
        for i, (place, bit) in enumerate((place, bit) for place in places for bit in (1, 2, 128)):
            flipped = bytearray(stored)
            flipped[place] ^= bit
            change(tmp_path, "reply = CAST(? AS TEXT)", bytes(flipped))
            assert judge.ask(BODIES[:1]) == [completion("[[A]]")]
            assert len(server.bodies) == i + 2
            assert "damaged replies, which were removed: 1" in capsys.readouterr().out
            assert read(tmp_path) == stored


def test_reply_without_a_checksum_is_requested_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Earlier versions wrote none. It stays until there is a new one."""
    earlier, bad = json.dumps(completion("[[B]]")), Broken(400)
    with served(lambda body, before: bad if before == 1 else completion("[[A]]")) as server:
        client(server.base_url, tmp_path).ask(BODIES[:1])
        change(tmp_path, "reply = ?", earlier)
        (reply,) = client(server.base_url, tmp_path).ask(BODIES[:1])
        assert isinstance(reply, Failure)
        assert read(tmp_path) == earlier.encode()
        for _ in range(2):
            assert client(server.base_url, tmp_path).ask(BODIES[:1]) == [completion("[[A]]")]
        assert len(server.bodies) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("replies of an earlier version without a checksum, not used: 1") == 2


def test_read_only_cache_that_holds_all_replies_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with served(lambda body, before: completion("[[A]]")) as server:
        client(server.base_url, tmp_path).ask(BODIES)
        stored = (tmp_path / "replies.sqlite").read_bytes()
        monkeypatch.setattr("var.utils.files.TemporaryFile", read_only)
        assert client(server.base_url, tmp_path).ask(BODIES) == [completion("[[A]]")] * 6
        assert len(server.bodies) == 6
        with pytest.raises(UserError, match=r"it lacks replies, and cannot be written"):
            client(server.base_url, tmp_path).ask([{"messages": [{"role": "user", "content": "new"}]}])
        assert len(server.bodies) == 6  # and no request was paid
        assert (tmp_path / "replies.sqlite").read_bytes() == stored


def test_processes_send_a_request_once(tmp_path: Path) -> None:
    """One of them is killed while it waits for replies; the others then send its requests."""
    with served(lambda body, before: Broken(text=json.dumps(completion("yes")), slow=0.5)) as server:
        program = f"""
            from var.utils.http_client import Client
            client = Client(base_url={server.base_url!r}, model="judge", concurrency=2, cache={str(tmp_path)!r})
            print(len(client.ask({BODIES!r})), client.usage.asked + client.usage.cached, client.usage.asked)
        """
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for _ in range(3)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=60)[0].split() for process in processes]
        assert [words[:2] for words in outputs] == [["6", "6"]] * 3
        assert sum(int(words[2]) for words in outputs) == 6
        assert len(server.bodies) == 6


def test_claims_of_a_killed_process_are_released(tmp_path: Path) -> None:
    with served(lambda body, before: completion("yes") if before else Broken(text="{}", slow=60)) as server:
        program = f"""
            from var.utils.http_client import Client
            Client(base_url={server.base_url!r}, model="judge", cache={str(tmp_path)!r}).ask({BODIES[:1]!r})
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        while not server.bodies:
            assert process.poll() is None
        process.kill()
        process.wait()
        assert client(server.base_url, tmp_path).ask(BODIES[:1]) == [completion("yes")]


def test_file_system_without_locks_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with served(lambda body, before: completion("yes")) as server:
        assert client(server.base_url, tmp_path).ask(BODIES) == [completion("yes")] * 6


def test_damaged_database_gives_right_replies_or_one_message(tmp_path: Path) -> None:
    """Flip a bit in each of 40 places, and cut the file."""
    with served(lambda body, before: completion(body["messages"][0]["content"])) as server:
        right = client(server.base_url, tmp_path / "good").ask(BODIES)
        stored = (tmp_path / "good" / "replies.sqlite").read_bytes()
        for i in range(48):
            data = bytearray(stored)
            if i < 40:
                data[i * len(data) // 40 + i] ^= 1 << i % 8
            else:
                del data[i * len(data) // 50 :]
            folder = tmp_path / str(i)
            folder.mkdir()
            (folder / "replies.sqlite").write_bytes(data)
            with suppress(UserError):
                assert client(server.base_url, folder).ask(BODIES) == right
