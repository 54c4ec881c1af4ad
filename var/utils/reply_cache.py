"""Replies of endpoints on disk: one SQLite file for all processes, with a checksum and a lock per request."""

import asyncio
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from var.utils.console import warn
from var.utils.errors import UserError
from var.utils.files import READ_ONLY, try_to_write
from var.utils.locks import try_lock

POLL_SECONDS = 0.1  # while another process waits for the reply to the same request

Reply = dict[str, Any]


@dataclass
class ReplyCache:
    """An open cache. Several processes and threads may use the same folder at the same time."""

    folder: Path
    """Has replies.sqlite and locks/."""
    database: sqlite3.Connection
    """Has the table replies: the key of a request, and the reply as JSON, a line break and its checksum."""
    read_only: bool = False
    """Whether nothing can be written. A reply that is missing is then an error, before its request is paid."""
    damaged: int = 0
    """The number of replies that were removed because their checksums did not match."""
    unchecked: set[bytes] = field(default_factory=set)
    """The requests whose replies have no checksum, as earlier versions wrote them, and were not used."""
    _files: dict[int, IO[str]] = field(default_factory=dict)
    _users: Counter[int] = field(default_factory=Counter)

    def get(self, key: bytes) -> Reply | None:
        """Return the reply to a request, or None. A damaged reply is removed. One without a checksum is not used."""
        row = self.database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        text, separator, checksum = row[0].partition(b"\n")
        try:
            reply = dict(json.loads(text))
            if not separator:
                self.unchecked.add(key)
                return None
            if checksum == _hash(key, text):
                return reply
        except (ValueError, TypeError):
            pass
        self.database.execute("DELETE FROM replies WHERE key = ?", (key,))
        self.damaged += 1
        return None

    def put(self, key: bytes, reply: Reply) -> None:
        """Add the reply to a request. The first one stays, unless it has no checksum."""
        text = json.dumps(reply).encode()
        stored = (text + b"\n" + _hash(key, text)).decode()
        self.database.execute(
            "INSERT INTO replies VALUES (?, ?) "
            "ON CONFLICT(key) DO UPDATE SET reply = excluded.reply WHERE instr(replies.reply, char(10)) = 0",
            (key, stored),
        )

    @asynccontextmanager
    async def claim(self, key: bytes) -> AsyncIterator[None]:
        """Wait until no other process or thread has claimed this request. The kernel releases the claims of the dead.

        The requests share 256 lock files. Requests of one cache object do not wait for each other.
        """
        if self.read_only:
            raise UserError(
                f"client.cache={self.folder}: it lacks replies, and cannot be written. Set another folder, or copy it."
            )
        shard = key[0]
        if shard not in self._files:
            self._files[shard] = (self.folder / "locks" / f"{shard:02x}").open("w")
        self._users[shard] += 1
        try:
            while not self._try_lock(shard):
                await asyncio.sleep(POLL_SECONDS)
            yield
        finally:
            self._users[shard] -= 1
            if self._users[shard] == 0:
                self._files.pop(shard).close()

    def _try_lock(self, shard: int) -> bool:
        try:
            return try_lock(self._files[shard])
        except OSError:  # this file system has no locks; at worst two processes send the same request
            return True


@contextmanager
def open_cache(folder: Path) -> Iterator[ReplyCache]:
    """Open the cache in a folder, and create it if there is none. At the end, warn of damaged replies.

    Raise a UserError if the folder or the database cannot be used.
    """
    file = folder / "replies.sqlite"
    reason = try_to_write(folder) if file.exists() else None
    read_only = reason is not None and reason.errno in READ_ONLY  # it can hold all replies that are needed
    written = file.with_name(f"{file.name}-wal")  # replies of a writer that is alive or was killed
    mode = ("?mode=ro" if written.exists() and written.stat().st_size else "?immutable=1") if read_only else ""
    try:
        if not read_only:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        # autocommit: each reply is on disk at once; check_same_thread: the client waits for the thread that it starts
        connection = sqlite3.connect(
            file.absolute().as_uri() + mode, uri=True, timeout=60.0, isolation_level=None, check_same_thread=False
        )
        connection.text_factory = bytes  # damaged text may not be UTF-8
        with closing(connection) as database:
            if not read_only:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=NORMAL")
                database.execute("CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT) WITHOUT ROWID")
            cache = ReplyCache(folder, database, read_only)
            try:
                yield cache
            finally:
                if cache.damaged:
                    warn(f"{file}: damaged replies, which were removed: {cache.damaged}")
                if cache.unchecked:
                    warn(f"{file}: replies of an earlier version without a checksum, not used: {len(cache.unchecked)}")
    except (sqlite3.Error, FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"client.cache={folder}: cannot use {file}: {error}. Set client.cache to another folder, or move a "
            "damaged file away"
        ) from error


def _hash(key: bytes, text: bytes) -> bytes:
    return hashlib.sha256(key + text).hexdigest().encode()
