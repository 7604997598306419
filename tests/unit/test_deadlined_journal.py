"""The journal of what to restore: it keeps what it is told, and nothing of another boot."""

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from deadlined import journal as journal_module
from deadlined.journal import Journal, Row
from deadlined.quota import QuotaRow
from deadlined.reservation import safe_gap_ns
from edgehold.errors import FailedError, UnavailableError, UnsupportedError
from edgehold.kernel.sched import Flag, Policy, SchedAttr

S = 1_000_000_000
ROW = Row(
    tid=42,
    start_ticks=7,
    original=SchedAttr(policy=Policy.BATCH, flags=Flag.RESET_ON_FORK, nice=-3, runtime_ns=2_800_000),
    period_ns=100_000_000,
    max_budget_ns=80_000_000,
)


def test_a_successor_reads_what_was_written(tmp_path: Path) -> None:
    first = Journal(tmp_path, boot_id="a")
    first.hold([ROW])
    first.release([(1, 1, 5 * S)])
    first.close()
    second = Journal(tmp_path, boot_id="a")
    assert second.held() == [ROW]
    assert second.gaps(4 * S) == {(1, 1): 5 * S}
    assert second.gaps(5 * S) == {}
    second.release([(42, 7, 0)])
    assert second.held() == []
    second.close()


def test_a_release_is_of_one_thread_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path, boot_id="a")
    journal.hold([ROW])
    journal.release([(42, 8, 0)])  # the id, used again by another thread
    assert journal.held() == [ROW]
    journal.close()


def test_what_was_a_group_s_and_what_is_ours(tmp_path: Path) -> None:
    row = QuotaRow(
        directory="/cg/a", device=1, inode=2, file="cpu.max", original="max 100000", period_ns=S // 10,
        written="20000 100000", before="10000 100000",
    )  # fmt: skip
    first = Journal(tmp_path, boot_id="a")
    first.limit(replace(row, written="10000 100000", before=""))
    first.limit(row)
    first.close()
    second = Journal(tmp_path, boot_id="a")
    assert second.quotas() == [row]
    second.unlimit(replace(row, inode=3))  # another cgroup of this name
    assert second.quotas() == [row]
    second.unlimit(replace(row, directory="/mnt/a"))  # the same, through another mount
    assert second.quotas() == []
    second.close()


def test_a_journal_of_before_gets_its_new_columns(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as old:
        old.executescript(
            "CREATE TABLE boot (id TEXT NOT NULL); INSERT INTO boot VALUES ('a');"
            "CREATE TABLE quotas (directory TEXT NOT NULL, device INTEGER NOT NULL, inode INTEGER NOT NULL,"
            "file TEXT NOT NULL, original TEXT NOT NULL, period_ns INTEGER NOT NULL, PRIMARY KEY (directory, file));"
            "INSERT INTO quotas VALUES ('/cg/a', 1, 2, 'cpu.max', 'max 100000', 100000000); PRAGMA user_version = 2"
        )
    journal = Journal(tmp_path, boot_id="a")
    [row] = journal.quotas()
    assert (row.original, row.written, row.before) == ("max 100000", "", "")
    journal.close()


def test_a_journal_of_a_newer_deadlined_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    Journal(tmp_path, boot_id="a").close()
    path = tmp_path / "journal.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as newer:
        newer.executescript("ALTER TABLE held RENAME TO kept; PRAGMA user_version = 4")
    with pytest.raises(UnsupportedError, match=r"newer deadlined \(version 4, ours is 3\)"):
        Journal(tmp_path, boot_id="a")
    with contextlib.closing(sqlite3.connect(path)) as still:
        assert not still.execute("SELECT 1 FROM sqlite_master WHERE name = 'held'").fetchall()
    assert not path.with_name("journal.db.broken").exists()


def test_nothing_of_another_boot(tmp_path: Path) -> None:
    first = Journal(tmp_path, boot_id="a")
    first.hold([ROW])
    first.release([(1, 1, 5 * S)])
    first.close()
    second = Journal(tmp_path, boot_id="b")
    assert second.held() == []
    assert second.gaps(0) == {}
    second.close()


def test_one_daemon_a_directory(tmp_path: Path) -> None:
    first = Journal(tmp_path, boot_id="a")
    with pytest.raises(UnavailableError, match="another deadlined"):
        Journal(tmp_path, boot_id="a")
    first.close()
    Journal(tmp_path, boot_id="a").close()


def test_a_directory_that_can_t_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="file/state"):
        Journal(tmp_path / "file" / "state", boot_id="a")


def test_a_journal_that_can_t_be_read_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"no database at all, " * 100)
    journal = Journal(tmp_path, boot_id="a")
    journal.hold([ROW])
    journal.close()
    assert (tmp_path / "journal.db.broken").exists()


def test_a_journal_whose_pages_are_broken_is_put_aside(tmp_path: Path) -> None:
    first = Journal(tmp_path, boot_id="a")
    first.hold([ROW])
    first.close()
    data = (tmp_path / "journal.db").read_bytes()
    (tmp_path / "journal.db").write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    Journal(tmp_path, boot_id="a").close()
    assert (tmp_path / "journal.db.broken").exists()


def test_a_journal_that_is_only_locked_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_LOCKED_S", 0)
    first = Journal(tmp_path, boot_id="a")
    first.hold([ROW])
    first.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")  # whoever only writes locks no reader out
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(FailedError, match="locked"):
            Journal(tmp_path, boot_id="a")
        other.execute("ROLLBACK")
    assert not (tmp_path / "journal.db.broken").exists()
    second = Journal(tmp_path, boot_id="a")  # the lock of the directory was given back, too
    assert second.held() == [ROW]
    second.close()


def test_a_full_disk_is_an_answer_and_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, boot_id="a")
    journal.hold([ROW])
    journal._db.execute("PRAGMA max_page_count = 1")  # as full as it is now: SQLITE_FULL
    many = [replace(ROW, tid=1000 + n) for n in range(1000)]
    with pytest.raises(FailedError, match="full"):
        journal.hold(many)
    assert journal.held() == [ROW]
    journal.release([(42, 7, 0)])
    assert journal.held() == []
    journal.close()


def test_no_number_is_used_twice_not_even_after_a_boot(tmp_path: Path) -> None:
    first = Journal(tmp_path, boot_id="a")
    assert [first.number(), first.number()] == [1, 2]
    first.close()
    second = Journal(tmp_path, boot_id="b")
    assert second.number() == 3
    second.close()


@pytest.mark.parametrize(
    ("period", "budget", "overrun", "gap"),
    [
        (100_000_000, 10_000_000, 0, S),
        (100_000_000, 2_000_000, 4_000_000, S),
        (S, 100_000_000, 0, 1_250_000_000),
        (100_000_000, 1_000_000, 20_000_000, 2_350_000_000),
        (4 * S, 1024, 4_000_000, 120 * S),
        (100_000_000, 10_000_000, -5, S),
    ],
)
def test_the_safe_gap(period: int, budget: int, overrun: int, gap: int) -> None:
    assert safe_gap_ns(period_ns=period, budget_ns=budget, overrun_ns=overrun) == gap
