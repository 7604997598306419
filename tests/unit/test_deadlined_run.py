"""What `deadlined run` makes of its options and its windows, and whose journals it takes over."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deadlined import leftovers
from deadlined.cli_run import sized, table_of
from deadlined.config import Settings
from deadlined.journal import Journal, Row
from deadlined.run import Report, measured
from edgehold.api.deadlined import Policy, Sample, ThreadState
from edgehold.clock import SystemClock
from edgehold.errors import BadRequestError, UnavailableError
from edgehold.kernel import procfs
from edgehold.kernel.sched import SchedAttr
from edgehold.testing.daemons import private_directory

MS = 1_000_000


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


def test_only_what_dead_runs_left_is_adopted(directory: Path) -> None:
    boot = procfs.boot_id()
    me = procfs.stat(os.getpid())
    row = Row(tid=2**30, start_ticks=1, original=SchedAttr(), period_ns=100 * MS, max_budget_ns=80 * MS)
    base, clock = directory / "run", SystemClock()
    base.mkdir()
    living, dead, reused = (base / name for name in (f"{me.tid}.{me.start_ticks}", f"{2**30}.1", f"{me.tid}.1"))
    for one in (living, dead, reused):
        journal = Journal(one, boot_id=boot)
        journal.hold([row])
        journal.release([(7, 8, clock.monotonic_ns() + 10**12)])
        journal.close()
    (base / "notes").mkdir()
    journal = Journal(directory / "state", boot_id=boot)
    try:
        assert leftovers.adopt(journal, clock, base) == 2
        assert journal.held() == [row]
        assert list(journal.gaps(clock.monotonic_ns())) == [(7, 8)]
        assert {one.name for one in base.iterdir()} == {living.name, "notes"}
        assert leftovers.adopt(journal, clock, base) == 0
        assert leftovers.adopt(journal, clock, directory / "nowhere") == 0
        # A thread that could not be restored keeps its directory.
        leftovers.remove(journal, living)
        assert living.is_dir()
        journal.release([(row.tid, row.start_ticks, 0)])
        leftovers.remove(journal, living)
        assert not living.exists()
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Policy()),
        ({"period_ms": 5.0}, Policy(period_ns=5 * MS, initial_budget_ns=4 * MS)),
        ({"period_ms": 1.0}, Policy(period_ns=1 * MS, initial_budget_ns=800_000, min_budget_ns=800_000)),
        ({"budget_ms": 0.5}, Policy(initial_budget_ns=500_000, min_budget_ns=500_000)),
        ({"min_budget_ms": 20.0}, Policy(initial_budget_ns=20 * MS, min_budget_ns=20 * MS)),
        ({"period_ms": "auto", "dry_run": True}, Policy(period_ns="auto", dry_run=True)),
    ],
)
def test_budgets_that_are_not_given_fit(given: dict[str, Any], wanted: Policy) -> None:
    assert sized(given) == wanted


def test_a_policy_that_can_not_be_names_its_options() -> None:
    with pytest.raises(BadRequestError, match="--cap x --period-ms"):
        sized({"period_ms": "auto", "budget_ms": 90.0})


def test_windows_become_one_line() -> None:
    samples = [
        Sample(
            time_ns=n, tid=1, elapsed_ns=elapsed * MS, executed_ns=executed * MS, run_delay_ns=0, budget_ns=n * MS,
            wanted_ns=2 * n * MS, period_ns=100 * MS,
        )
        for n, (elapsed, executed) in enumerate([(500, 50), (100, 30), (400, 20)], 1)
    ]  # fmt: skip
    one = measured(1, "job", ThreadState.HELD, "", samples)
    assert (one.mean_executed_ns, one.peak_executed_ns) == (10 * MS, 30 * MS)
    assert (one.budget_ns, one.wanted_ns, one.windows) == (3 * MS, 6 * MS, 3)
    none = measured(1, "job", ThreadState.WAITING, "why", [])
    assert (none.mean_executed_ns, none.windows, none.reason) == (0, 0, "why")
    text = table_of(Report(status=0, elapsed_ns=1500 * MS, threads=(one, none)))
    assert "1.5 s" in text
    assert "10.00" in text
    assert "and 1 that ended before" in text
    assert "thread 1 (job): why" in text
    assert "nothing" not in text
    assert "anything to measure" in table_of(Report(status=0, elapsed_ns=1, threads=()))


def test_who_has_no_session_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    assert leftovers.base() == directory / "deadlined/run"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert leftovers.base() == Path("/run/deadlined-run")
    assert not leftovers.base().is_relative_to(Path(Settings().socket).parent)  # which goes when the daemon stops
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(UnavailableError, match="XDG_RUNTIME_DIR"):
        leftovers.base()
