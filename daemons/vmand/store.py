"""The journal: what vmand will do and what it has done, in sqlite, on disk before it acts or answers.

One row a partition. A command writes its intent (`Record.pending`) before it acts and its outcome before it answers;
a row with an intent at start is a command that was cut off (recovery.py says what happens then). Calls block for one
fsync; they are made by the service alone, between two awaits. Only whether a guest is suspended is not synced: a power
cut ends every guest, and a kill of vmand loses nothing that the kernel has.
"""

import sqlite3
from pathlib import Path

import msgspec

from edgehold.errors import FailedError
from vmand.model import Record

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS partition (id INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL) STRICT;
"""


class Store:
    """The database. Every method raises `FailedError` when it can't be read or written; nothing is then changed."""

    def __init__(self, path: Path) -> None:
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
                raise FailedError(f"{path}: written by a newer vmand (version {found}, ours is {_VERSION})")
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={_VERSION}")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def insert(self, record: Record) -> int:
        """Write a new partition. Returns its id; ids are never used twice."""
        try:
            self._db.execute("PRAGMA synchronous=FULL")
            row = self._db.execute("INSERT INTO partition (record) VALUES (?)", (msgspec.json.encode(record),))
        except sqlite3.Error as error:
            raise self._failed(error) from error
        if row.lastrowid is None:  # pragma: no cover - an INSERT has one
            raise FailedError(f"{self._path}: no id for the new row")
        return row.lastrowid

    def save(self, record: Record, *, synced: bool = True) -> None:
        """Write what is known of a partition now.

        ``synced`` False: a power cut may lose it, the end of vmand may not. For what ends with a power cut anyway.
        """
        try:
            # WAL: NORMAL leaves out the sync of a commit and keeps the order of all (sqlite.org/pragma.html).
            self._db.execute(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}")
            self._db.execute("UPDATE partition SET record = ? WHERE id = ?", (msgspec.json.encode(record), record.id))
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def delete(self, partition: int) -> None:
        """Forget a partition."""
        try:
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("DELETE FROM partition WHERE id = ?", (partition,))
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def all(self) -> list[Record]:
        """All partitions, by id."""
        try:
            rows = self._db.execute("SELECT id, record FROM partition ORDER BY id").fetchall()
            return [msgspec.structs.replace(msgspec.json.decode(blob, type=Record), id=one) for one, blob in rows]
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> FailedError:
        return FailedError(
            f"the journal {self._path} can't be used: {error}; look at the free space and the rights of its directory"
        )
