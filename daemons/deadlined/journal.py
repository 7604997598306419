"""What to restore, on disk before any policy changes, so that a killed daemon's successor can put it right.

It must survive the daemon, not the host: thread ids, policies and bandwidth end with the boot, and rows of another boot
are thrown away unread. So nothing is synced to the disk, and a commit costs tens of microseconds. A row names a thread
by tid *and* start time: a reused tid is never touched.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgehold.errors import FailedError
from edgehold.kernel.sched import Flag, Policy, SchedAttr

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS held (
    tid INTEGER NOT NULL, start_ticks INTEGER NOT NULL,
    policy INTEGER NOT NULL, flags INTEGER NOT NULL, nice INTEGER NOT NULL, priority INTEGER NOT NULL,
    slice_ns INTEGER NOT NULL, period_ns INTEGER NOT NULL, max_budget_ns INTEGER NOT NULL,
    PRIMARY KEY (tid, start_ticks));
CREATE TABLE IF NOT EXISTS gaps (
    tid INTEGER NOT NULL, start_ticks INTEGER NOT NULL, until_ns INTEGER NOT NULL, PRIMARY KEY (tid, start_ticks));
PRAGMA user_version = 1;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A thread that is, or is about to be, under a reservation of ours; what it had before."""

    tid: int
    start_ticks: int
    original: SchedAttr
    period_ns: int
    max_budget_ns: int


class Journal:
    """One directory, one daemon: a lock keeps a second one out, whose recovery would free the first one's threads."""

    def __init__(self, directory: Path, *, boot_id: str) -> None:
        """Open or make it.

        Raises:
            FailedError: another daemon uses the directory, or it can't be written.
        """
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FailedError(f"{directory}: {error.strerror}; deadlined keeps there what it must restore") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise FailedError(
                f"{directory}: another deadlined uses it; stop that one or set another state_dir"
            ) from error
        path = directory / "journal.db"
        try:
            self._db = self._open(path, boot_id)
        except sqlite3.DatabaseError:
            log.exception(
                "the journal can't be read and is put aside as %s.broken; what a killed deadlined held stays held", path
            )
            for old in (path, path.with_name("journal.db-wal"), path.with_name("journal.db-shm")):
                if old.exists():
                    old.replace(f"{old}.broken")
            self._db = self._open(path, boot_id)

    @staticmethod
    def _open(path: Path, boot_id: str) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")  # see the module's text: durable against our death, not the host's
            db.executescript(_SCHEMA)
            if [row[0] for row in db.execute("SELECT id FROM boot")] != [boot_id]:
                db.executescript("DELETE FROM held; DELETE FROM gaps; DELETE FROM boot")
                db.execute("INSERT INTO boot VALUES (?)", (boot_id,))
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Let another daemon have it."""
        self._db.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def hold(self, rows: Iterable[Row]) -> None:
        """Before the policies change: what these threads have now. A row that is there already is replaced."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        row.tid, row.start_ticks, int(row.original.policy), int(row.original.flags),
                        row.original.nice, row.original.priority, row.original.runtime_ns, row.period_ns,
                        row.max_budget_ns,
                    )
                    for row in rows
                ],
            )  # fmt: skip

    def release(self, threads: Iterable[tuple[int, int, int]]) -> None:
        """After the policies changed: (tid, start_ticks, until_ns); not to be attached again before (0: gone)."""
        with self._transaction():
            for tid, start_ticks, until_ns in threads:
                self._db.execute("DELETE FROM held WHERE tid = ? AND start_ticks = ?", (tid, start_ticks))
                if until_ns:
                    self._db.execute("INSERT OR REPLACE INTO gaps VALUES (?, ?, ?)", (tid, start_ticks, until_ns))

    def held(self) -> list[Row]:
        """What a predecessor left behind."""
        return [
            Row(
                tid=tid,
                start_ticks=start,
                original=SchedAttr(
                    policy=Policy(policy), flags=Flag(flags), nice=nice, priority=priority, runtime_ns=slice_ns
                ),
                period_ns=period,
                max_budget_ns=largest,
            )
            for tid, start, policy, flags, nice, priority, slice_ns, period, largest in self._db.execute(
                "SELECT * FROM held ORDER BY tid"
            )
        ]

    def gaps(self, now_ns: int) -> dict[tuple[int, int], int]:
        """(tid, start_ticks) -> CLOCK_MONOTONIC in ns before which it must not be attached. Forgets what is over."""
        self._db.execute("DELETE FROM gaps WHERE until_ns <= ?", (now_ns,))
        return {(tid, start): until for tid, start, until in self._db.execute("SELECT * FROM gaps")}
