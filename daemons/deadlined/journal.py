"""What to restore, on disk before any policy changes, so that a killed daemon's successor can put it right.

It must survive the daemon, not the host: thread ids, policies and bandwidth end with the boot, and rows of another boot
are thrown away unread. So nothing is synced to the disk, and a commit costs tens of microseconds. A row names a thread
by tid *and* start time: a reused tid is never touched.

Every fault of the database leaves here as `FailedError`: a full disk is a reason to hold nobody new, never one to stop.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deadlined.quota import QuotaRow
from edgehold.directories import owned
from edgehold.errors import FailedError, UnsupportedError
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
CREATE TABLE IF NOT EXISTS numbers (last INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS quotas (
    directory TEXT NOT NULL, device INTEGER NOT NULL, inode INTEGER NOT NULL, file TEXT NOT NULL,
    original TEXT NOT NULL, period_ns INTEGER NOT NULL,
    written TEXT NOT NULL DEFAULT '', before TEXT NOT NULL DEFAULT '', PRIMARY KEY (directory, file));
"""
_VERSION = 3
# Only these say that the file itself is no journal any more. A full disk, a lock, a failing read say nothing about it.
_BROKEN = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT})
# Nobody else has business in it; who looks into it by hand must not stop the cycle for long.
_LOCKED_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A thread that is, or is about to be, under a reservation of ours; what it had before."""

    tid: int
    start_ticks: int
    original: SchedAttr
    period_ns: int
    max_budget_ns: int
    also_period_ns: int = 0
    """While the period changes: the other one that it may have."""


class Journal:
    """One directory, one daemon: a lock keeps a second one out, whose recovery would free the first one's threads."""

    def __init__(self, directory: Path, *, boot_id: str, or_root: bool = False) -> None:
        """Open or make it. ``or_root``: one of root's too, whom everybody may believe.

        Raises:
            UnavailableError: another daemon uses the directory, or it is somebody else's.
            UnsupportedError: a newer deadlined wrote it.
            FailedError: the journal can't be used.
        """
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(owned(directory, mode=0o700, who="deadlined", or_root=or_root))
        self._path = directory / "journal.db"
        try:
            self._db = self._open_or_put_aside(boot_id)
        except BaseException:
            self._stack.close()
            raise

    def _open_or_put_aside(self, boot_id: str) -> sqlite3.Connection:
        path = self._path
        with self._boundary():
            try:
                return self._open(path, boot_id)
            except sqlite3.DatabaseError as error:
                # The extended code has the primary one in its last byte (sqlite.org/rescode.html).
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _BROKEN:
                    raise
                log.exception(
                    "the journal can't be read and is put aside as %s.broken; what a killed deadlined held stays held",
                    path,
                )
            for old in (path, path.with_name("journal.db-wal"), path.with_name("journal.db-shm")):
                if old.exists():
                    old.replace(f"{old}.broken")
            return self._open(path, boot_id)

    @staticmethod
    def _open(path: Path, boot_id: str) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, timeout=_LOCKED_S)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")  # see the module's text: durable against our death, not the host's
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found > _VERSION:
                raise UnsupportedError(
                    f"{path}: written by a newer deadlined (version {found}, ours is {_VERSION}); install that one "
                    "again, or remove the file after a restart of the host, which frees all that was held"
                )
            db.executescript(_SCHEMA)
            if found < _VERSION:
                columns = [row[1] for row in db.execute("PRAGMA table_info(held)")]
                if "also_period_ns" not in columns:
                    db.execute("ALTER TABLE held ADD COLUMN also_period_ns INTEGER NOT NULL DEFAULT 0")
                columns = [row[1] for row in db.execute("PRAGMA table_info(quotas)")]
                for name in ("written", "before"):
                    if name not in columns:
                        db.execute(f"ALTER TABLE quotas ADD COLUMN {name} TEXT NOT NULL DEFAULT ''")
                db.execute(f"PRAGMA user_version = {_VERSION}")
            if [row[0] for row in db.execute("SELECT id FROM boot")] != [boot_id]:
                db.executescript("DELETE FROM held; DELETE FROM gaps; DELETE FROM quotas; DELETE FROM boot")
                db.execute("INSERT INTO boot VALUES (?)", (boot_id,))
            for table in ("held", "gaps", "numbers", "quotas"):  # what is broken in them is to be found now
                db.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608 - our own names
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Let another daemon have it."""
        self._db.close()
        self._stack.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._boundary():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors have rolled it back already
                    with contextlib.suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _boundary(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise FailedError(
                f"{self._path}: {error}; deadlined must write there what to restore before it changes anything: make "
                "room, or set another state_dir"
            ) from error

    def hold(self, rows: Iterable[Row]) -> None:
        """Before the policies change: what these threads have now. A row that is there already is replaced.

        Raises:
            FailedError: it is not on disk; no policy may change.
        """
        with self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        row.tid, row.start_ticks, int(row.original.policy), int(row.original.flags),
                        row.original.nice, row.original.priority, row.original.runtime_ns, row.period_ns,
                        row.max_budget_ns, row.also_period_ns,
                    )
                    for row in rows
                ],
            )  # fmt: skip

    def release(self, threads: Iterable[tuple[int, int, int]]) -> None:
        """After the policies changed: (tid, start_ticks, until_ns); not to be attached again before (0: gone).

        Raises:
            FailedError: the rows stay; at the next start each means a gap that is longer than needed, and no more.
        """
        with self._transaction():
            for tid, start_ticks, until_ns in threads:
                self._db.execute("DELETE FROM held WHERE tid = ? AND start_ticks = ?", (tid, start_ticks))
                if until_ns:
                    self._db.execute("INSERT OR REPLACE INTO gaps VALUES (?, ?, ?)", (tid, start_ticks, until_ns))

    def number(self) -> int:
        """A number for an attachment that none ever had in this directory. Raises `FailedError`."""
        with self._transaction():
            last = self._db.execute("SELECT max(last) FROM numbers").fetchone()[0] or 0
            self._db.execute("DELETE FROM numbers")
            self._db.execute("INSERT INTO numbers VALUES (?)", (last + 1,))
        return int(last) + 1

    def held(self) -> list[Row]:
        """What a predecessor left behind. Raises `FailedError`."""
        with self._boundary():
            rows = self._db.execute("SELECT * FROM held ORDER BY tid").fetchall()
        return [
            Row(
                tid=tid,
                start_ticks=start,
                original=SchedAttr(
                    policy=Policy(policy), flags=Flag(flags), nice=nice, priority=priority, runtime_ns=slice_ns
                ),
                period_ns=period,
                max_budget_ns=largest,
                also_period_ns=also,
            )
            for tid, start, policy, flags, nice, priority, slice_ns, period, largest, also in rows
        ]

    def limit(self, row: QuotaRow) -> None:
        """Before a cgroup's quota changes, each time: what it had, and what will be ours (`Group.plan`).

        Raises:
            FailedError: it is not on disk; the quota may not change.
        """
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO quotas VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.directory, row.device, row.inode, row.file, row.original, row.period_ns, row.written,
                    row.before,
                ),
            )  # fmt: skip

    def unlimit(self, row: QuotaRow) -> None:
        """After a cgroup got its quota back, or is gone. Raises `FailedError`."""
        with self._transaction():
            self._db.execute(
                "DELETE FROM quotas WHERE device = ? AND inode = ? AND file = ?", (row.device, row.inode, row.file)
            )

    def quotas(self) -> list[QuotaRow]:
        """The cgroups that a predecessor left limited. Raises `FailedError`."""
        with self._boundary():
            rows = self._db.execute("SELECT * FROM quotas").fetchall()
        return [
            QuotaRow(
                directory=path, device=device, inode=inode, file=file, original=original, period_ns=period,
                written=written, before=before,
            )
            for path, device, inode, file, original, period, written, before in rows
        ]  # fmt: skip

    def gaps(self, now_ns: int) -> dict[tuple[int, int], int]:
        """(tid, start_ticks) -> CLOCK_MONOTONIC in ns before which it must not be attached. Raises `FailedError`."""
        with self._boundary():
            rows = self._db.execute("SELECT * FROM gaps WHERE until_ns > ?", (now_ns,)).fetchall()
        return {(tid, start): until for tid, start, until in rows}

    def prune(self, now_ns: int) -> None:
        """Forget the gaps that are over. Raises `FailedError`."""
        with self._transaction():
            self._db.execute("DELETE FROM gaps WHERE until_ns <= ?", (now_ns,))
