"""The monitor and the holder where something goes wrong: no descriptor, no disk, a thread that ends or is taken at any
step. The kernel is one that the test steers (`deadlined_kernel`).
"""

import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadlined import reservation, watchdog
from deadlined.held import Attached, Thread
from deadlined.targets import ThreadSource
from edgehold.api.deadlined import Policy, ThreadState
from edgehold.errors import FailedError, NoCapacityError
from edgehold.kernel import procfs
from edgehold.kernel.native_held import RawSample
from edgehold.kernel.procfs import GoneError, ThreadStat
from tests.unit.deadlined_kernel import (
    EMPTY,
    MS,
    SMALL,
    TARGET,
    TIDS,
    Core,
    S,
    Scripted,
    Task,
    core_on,
    held,
    hold_fails,
    script,
)

EIO = OSError(errno.EIO, "Input/output error")
EPERM = OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    with core_on(tmp_path, monkeypatch) as one:
        yield one


def test_it_holds_sizes_and_gives_back(core: Core) -> None:
    thread, one = held(core)
    assert (thread.state, thread.budget_ns, core.kernel.held) == (ThreadState.HELD, 10 * MS, 0.1)
    core.cycle(executed_ms=20)
    assert thread.budget_ns == 22 * MS
    core.kernel.calls.clear()
    for _ in range(10):
        core.cycle(executed_ms=20)
    assert core.kernel.calls == []  # nothing redundant
    assert one.message(11).cycles == 11
    core.monitor.release(one)
    core.nothing_is_left()
    assert script(one).closed == 1


def test_a_target_that_can_t_be_taken_in_whole_leaves_nothing_behind(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(tid: int) -> ThreadStat:
        if tid == TIDS[5]:
            raise EMPTY
        return core.kernel.stat(tid)

    monkeypatch.setattr(procfs, "stat", stat)
    for policy in (SMALL, Policy(dry_run=True)):
        source = Scripted()
        with pytest.raises(OSError, match="Too many open files"):
            core.monitor.adopt(1, TARGET, policy, source)
        assert core.monitor.attachments == {}
        assert [tid for tid in TIDS if core.monitor.owner(tid)] == []
        assert source.closed == 0  # still the caller's
        core.nothing_is_left()


def test_no_descriptor_is_a_reason_to_wait(core: Core) -> None:
    _, one = held(core, SMALL, threads=128)
    source = script(one)
    source.error = EMPTY
    core.cycle()
    assert "no file descriptor" in core.monitor.message(one).reason
    assert len(one.threads) == len(TIDS)
    source.error = None
    core.cycle()
    assert core.monitor.message(one).reason == ""
    source.error = EIO
    with pytest.raises(OSError, match="Input"):
        core.cycle()


def test_no_descriptor_for_the_watchdog_is_no_verdict(core: Core) -> None:
    thread, _ = held(core)
    thread.suspect_ns = 1
    thread.cells.progress_ns = 0
    core.kernel.exhausted = True
    assert not watchdog.is_stuck(thread, core.kernel.now_ns)
    core.kernel.exhausted = False
    assert watchdog.is_stuck(thread, core.kernel.now_ns)


def test_no_descriptor_at_entering_is_a_refusal(core: Core) -> None:
    core.kernel.refused[TIDS[0]] = EPERM
    thread, one = held(core)
    core.kernel.exhausted = True
    core.kernel.now_ns += 6 * S
    refused = core.holder.enter(thread, one, 10 * MS)
    assert isinstance(refused, FailedError)
    assert thread.state is ThreadState.WAITING
    assert "descriptor" in thread.reason


def test_what_is_not_in_the_journal_is_not_changed(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(core.journal, "hold", hold_fails)
        thread, one = held(core)
        assert (thread.state, thread.reason) == (ThreadState.WAITING, "the disk is full")
        assert core.kernel.calls == []
    core.cycle(12)  # tried again by itself, in time
    assert thread.state is ThreadState.HELD
    core.monitor.release(one)
    core.nothing_is_left()


def test_all_threads_are_given_back_whatever_fails_for_one(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    _, one = held(core, SMALL, threads=5)
    left: list[int] = []

    def leave(thread: Thread, *, grow: bool = True) -> int:
        left.append(thread.tid)
        if thread.tid == TIDS[2]:
            raise RuntimeError(f"a bug, {grow}")
        return 0

    monkeypatch.setattr(core.holder, "leave", leave)
    with pytest.raises(RuntimeError):
        core.monitor.release(one)
    assert sorted(left) == list(TIDS[:5])
    assert script(one).closed == 1
    assert [tid for tid in TIDS if core.monitor.owner(tid)] == []
    assert core.monitor.grants.wanted == pytest.approx(0)


def test_histories_are_bounded_in_sum(core: Core) -> None:
    _, one = held(core, SMALL, threads=128)
    blank = dict.fromkeys(RawSample._fields, 1)
    for number in range(10):
        for tid in TIDS:
            core.holder.table.remember(RawSample(**(blank | {"time_ns": number, "tid": tid})))
    samples = core.monitor.history(one)
    assert len(samples) == 10 * 64
    assert min(sample.time_ns for sample in samples) == 5  # the newest are kept
    assert len(core.monitor.history(one, 7)) == 7
    assert core.monitor.history(one, 7) == samples[-7:]
    assert core.monitor.history(one, 0) == ()
    core.monitor.release(one)


def test_a_thread_that_ends_is_forgotten_and_a_process_without_threads_is_over(core: Core) -> None:
    thread, one = held(core, SMALL, threads=3)
    ended: list[Attached] = []
    core.monitor.on_over = ended.append
    core.kernel.tasks[thread.tid].state = "Z"  # its parent has not looked yet
    core.cycle()
    assert sorted(one.threads) == list(TIDS[1:3])
    assert script(one).forgotten == [thread.tid]
    for tid in TIDS[1:3]:
        core.kernel.tasks[tid].state = "Z"
    core.cycle()
    assert (one.threads, core.monitor.attachments) == ({}, {1: one})
    script(one).over = "the process ended"
    core.cycle()
    assert core.monitor.attachments == {}
    assert ended == [one]
    assert script(one).closed == 1
    for tid in TIDS[:3]:
        core.kernel.tasks[tid].reservation = None
    core.nothing_is_left()


def test_a_single_thread_s_end_is_the_attachment_s(core: Core) -> None:
    one, _ = core.monitor.adopt(1, TARGET, Policy(), ThreadSource(TIDS[0]))
    core.kernel.tasks[TIDS[0]].state = "Z"
    core.cycle()
    assert core.monitor.attachments == {}
    assert one.message(1).reason == "the thread ended"


def test_a_thread_that_somebody_took_is_left_alone_and_forgotten_when_it_ends(core: Core) -> None:
    thread, one = held(core, threads=2)
    core.kernel.tasks[thread.tid].reservation = (3 * MS, 7 * MS)
    core.cycle(executed_ms=20)
    assert thread.state is ThreadState.WAITING
    assert "somebody else changed" in thread.reason
    assert core.monitor.grants.wanted == pytest.approx(0.22)  # the other one's
    for _ in range(100):
        core.cycle(executed_ms=20)
    assert core.kernel.calls.count(("enter", thread.tid)) == 1
    assert core.kernel.tasks[thread.tid].reservation == (3 * MS, 7 * MS)
    core.kernel.tasks[thread.tid] = Task(state="Z")
    core.cycle(executed_ms=20)
    assert list(one.threads) == [TIDS[1]]
    assert script(one).forgotten == [thread.tid]
    core.monitor.release(one)
    core.nothing_is_left()


def test_a_row_that_can_t_be_erased_stops_nobody(
    core: Core, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, one = held(core, SMALL, threads=5)
    monkeypatch.setattr(core.journal, "release", hold_fails)
    core.monitor.release(one)
    assert core.monitor.attachments == {}
    assert core.kernel.held == 0
    assert caplog.text.count("the disk is full") == 1
    core.holder.prune()


def test_a_dry_run_changes_nothing_and_takes_no_part(core: Core) -> None:
    core.kernel.cpus = 0
    thread, one = held(core, Policy(dry_run=True), threads=2)
    for _ in range(3):
        core.cycle()
    core.monitor.change(one, Policy(dry_run=True, cap=0.5))
    script(one).suspended = True
    core.cycle()
    assert thread.state is ThreadState.WATCHED
    assert core.kernel.calls == []
    assert core.monitor.grants.wanted == 0
    assert one.waiting == set()
    core.monitor.release(one)
    core.nothing_is_left()


def test_a_dry_run_without_a_descriptor_is_tried_again(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    _, one = held(core, Policy(dry_run=True))
    script(one).wanted = TIDS[:3]

    def empty(_tid: int, _file: str) -> int:
        raise EMPTY

    with monkeypatch.context() as patch:
        patch.setattr(procfs, "open_thread", empty)
        core.cycle()
        assert "no file descriptor" in core.monitor.message(one).reason
        assert list(one.threads) == [TIDS[0]]
    core.cycle()
    assert [thread.state for thread in one.threads.values()] == [ThreadState.WATCHED] * 3
    core.monitor.release(one)
    core.nothing_is_left()


def test_a_watched_thread_that_ends_at_once_leaves_nothing(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(tid: int, _file: str) -> int:
        raise GoneError(f"thread {tid} has ended")

    monkeypatch.setattr(procfs, "open_thread", gone)
    one, refused = core.monitor.adopt(1, TARGET, Policy(dry_run=True), ThreadSource(TIDS[0]))
    assert (one.threads, list(refused)) == ({}, [TIDS[0]])
    core.nothing_is_left()


def test_a_thread_that_ends_at_any_step_of_entering_leaves_nothing(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_values: object, **_names: object) -> None:
        raise GoneError("it ended")

    for number, (where, name) in enumerate(
        ((reservation, "check_free"), (procfs, "open_thread"), (reservation, "enter"), (procfs, "schedstat")), 1
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, gone)
            one, refused = core.monitor.adopt(number, TARGET, Policy(), Scripted(wanted=TIDS[:1]))
        assert list(refused) == [TIDS[0]]
        assert one.threads == {}
        core.kernel.tasks[TIDS[0]].reservation = None  # what it had ended with it
        core.nothing_is_left()
        core.monitor.release(one)


def test_a_thread_of_two_targets_is_the_first_one_s(core: Core) -> None:
    held(core, SMALL, threads=2)
    other, refused = core.monitor.adopt(2, TARGET, SMALL, Scripted(wanted=TIDS[:3]))
    assert (list(other.threads), refused) == ([TIDS[2]], {})
    core.monitor.release(core.monitor.attachments[1])
    core.cycle(4)
    assert set(other.threads) == set(TIDS[:3])
    assert {thread.state for thread in other.threads.values()} == {ThreadState.HELD}


def test_who_does_not_fit_into_max_threads_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with core_on(tmp_path, monkeypatch, max_threads=3) as core:
        _, one = held(core, SMALL, threads=5)
        assert len(one.threads) == 3
        assert "2 threads are left out" in core.monitor.message(one).reason
        core.monitor.release(one)
        core.nothing_is_left()


def test_many_threads_come_and_go_and_nothing_is_left(core: Core) -> None:
    source = Scripted()
    one, _ = core.monitor.adopt(1, TARGET, SMALL, source)
    for number in range(60):
        source.wanted = tuple(tid for place, tid in enumerate(TIDS) if (place * 7 + number) % 5)
        core.cycle(3, executed_ms=0.5)
    assert set(one.threads) == set(source.wanted)
    core.monitor.release(one)
    core.nothing_is_left()


def test_a_broken_commit_is_an_answer(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        in_transaction = True

        def execute(self, text: str, *_values: object) -> None:
            if text in {"COMMIT", "ROLLBACK"}:
                raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(core.journal, "_db", Failing())
        with pytest.raises(FailedError, match="disk is full"):
            core.journal.release([(1, 1, 5)])


def test_all_of_a_full_host_wait_with_a_reason(core: Core) -> None:
    core.kernel.cpus = 0
    one, refused = core.monitor.adopt(1, TARGET, SMALL, Scripted(wanted=TIDS[:3]))
    assert {type(why) for why in refused.values()} == {NoCapacityError}
    core.kernel.cpus = 1
    core.cycle()
    assert {thread.state for thread in one.threads.values()} == {ThreadState.HELD}
