"""The journal: what vmand will do and what it has done, in sqlite, on disk before it acts or answers.

One row a partition. A command writes its intent (`Record.pending`) before it acts and its outcome before it answers;
a row with an intent at start is a command that was cut off (recovery.py says what happens then). Calls block for one
fsync; they are made by the service alone, between two awaits. Only whether a guest is suspended is not synced: a power
cut ends every guest, and a kill of vmand loses nothing that the kernel has.

Annotations have rows of their own: a command writes a whole record when it ends, and one that was annotated meanwhile
keeps what it was given. They are read when somebody asks, and not held in memory.
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from edgehold.errors import FailedError, UnsupportedError
from vmand.model import Record

_VERSION = 2
# Version 1 had no annotations; what it had is as it was.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS partition (id INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS annotation (partition INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (partition, key)) STRICT, WITHOUT ROWID;
"""
NO_ANNOTATIONS: Mapping[str, str | None] = {}


class Store:
    """The database. Every method raises `FailedError` when it can't be read or written; nothing is then changed."""

    def __init__(self, path: Path) -> None:
        """Open or make it. Raises `UnsupportedError`: a newer vmand wrote it."""
        self._path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            # A power cut loses nothing that was answered and outlives it: WAL with a sync at each commit.
            # No other process reads it while we run: no lock is taken anew for each statement.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if found > _VERSION:
                raise UnsupportedError(
                    f"{path}: written by a newer vmand (version {found}, ours is {_VERSION}); install that one again, "
                    "or restore a backup that this one wrote"
                )
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={_VERSION}")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def insert(self, record: Record, *, annotations: Mapping[str, str | None] = NO_ANNOTATIONS) -> int:
        """Write a new partition. Returns its id; ids are never used twice."""
        with self._step():
            row = self._db.execute("INSERT INTO partition (record) VALUES (?)", (msgspec.json.encode(record),))
            if row.lastrowid is None:  # pragma: no cover - an INSERT has one
                raise FailedError(f"{self._path}: no id for the new row")
            self._annotate(row.lastrowid, annotations)
        return row.lastrowid

    def save(
        self, record: Record, *, synced: bool = True, annotations: Mapping[str, str | None] = NO_ANNOTATIONS
    ) -> None:
        """Write what is known of a partition now, and in the same step what is to be annotated (None removes a key).

        ``synced`` False: a power cut may lose it, the end of vmand may not. For what ends with a power cut anyway.
        """
        with self._step(synced=synced):
            self._db.execute("UPDATE partition SET record = ? WHERE id = ?", (msgspec.json.encode(record), record.id))
            self._annotate(record.id, annotations)

    def annotate(self, partition: int, annotations: Mapping[str, str | None]) -> None:
        """Keep these texts with a partition; None removes a key."""
        with self._step():
            self._annotate(partition, annotations)

    def delete(self, partition: int) -> None:
        """Forget a partition and its annotations."""
        with self._step():
            self._db.execute("DELETE FROM annotation WHERE partition = ?", (partition,))
            self._db.execute("DELETE FROM partition WHERE id = ?", (partition,))

    def all(self) -> list[Record]:
        """All partitions, by id."""
        try:
            rows = self._db.execute("SELECT id, record FROM partition ORDER BY id").fetchall()
            return [msgspec.structs.replace(msgspec.json.decode(blob, type=Record), id=one) for one, blob in rows]
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise self._failed(error) from error

    def annotations(self, partition: int) -> dict[str, str]:
        """What is annotated to a partition, by key."""
        try:
            asked = "SELECT key, value FROM annotation WHERE partition = ? ORDER BY key"
            return dict(self._db.execute(asked, (partition,)).fetchall())
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _annotate(self, partition: int, annotations: Mapping[str, str | None]) -> None:
        for key, value in annotations.items():
            if value is None:
                self._db.execute("DELETE FROM annotation WHERE partition = ? AND key = ?", (partition, key))
            else:
                self._db.execute("INSERT OR REPLACE INTO annotation VALUES (?, ?, ?)", (partition, key, value))

    @contextlib.contextmanager
    def _step(self, *, synced: bool = True) -> Iterator[None]:
        """All of the block is written, or nothing of it."""
        try:
            # WAL: NORMAL leaves out the sync of a commit and keeps the order of all (sqlite.org/pragma.html).
            self._db.execute(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                yield
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> FailedError:
        return FailedError(
            f"the journal {self._path} can't be used: {error}; look at the free space and the rights of its directory"
        )
