"""Threads that can't leave their reservation at once, or go on as another thread: none is lost (`deadlined_kernel`)."""

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadlined import reservation, watchdog
from deadlined.held import Thread
from deadlined.journal import Row
from edgehold.api.deadlined import Policy, ThreadState
from edgehold.kernel import native, procfs, sched
from edgehold.kernel.native import RawAttr, RawLeft
from edgehold.kernel.sched import SchedAttr
from tests.unit.deadlined_kernel import MS, SMALL, TARGET, TIDS, Core, S, Scripted, Task, core_on, held

TID = TIDS[0]
P = 100 * MS
ENFILE = OSError(errno.ENFILE, "Too many open files in system")


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    with core_on(tmp_path, monkeypatch) as one:
        yield one


def rows(core: Core) -> list[int]:
    return [row.tid for row in core.journal.held()]


def again(core: Core) -> Thread:
    """The same thread, attached anew."""
    one, _ = core.monitor.adopt(2, TARGET, Policy(), Scripted(wanted=(TID,)))
    return one.threads[TID]


def test_who_can_t_leave_is_tried_again_until_it_has(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    _, one = held(core)
    core.kernel.stays[TID] = ENFILE
    core.monitor.release(one)
    for _ in range(3):
        core.cycle()
    assert (rows(core), core.kernel.held) == ([TID], 0.1)
    assert caplog.text.count("Too many open files in system") == 1
    del core.kernel.stays[TID]
    core.cycle()
    core.nothing_is_left()
    assert core.kernel.calls.count(("leave", TID)) == 1


def test_attached_again_it_waits_until_it_has_left_and_its_row_stays(core: Core) -> None:
    _, one = held(core)
    core.kernel.stays[TID] = ENFILE
    core.monitor.release(one)
    thread = again(core)
    core.cycle()
    assert (thread.state, rows(core)) == (ThreadState.WAITING, [TID])
    assert "a reservation of before" in thread.reason
    del core.kernel.stays[TID]
    core.cycle()
    assert core.kernel.held == 0
    core.cycle(10)  # the safe gap
    core.cycle()
    assert thread.state is ThreadState.HELD


def test_a_stuck_thread_that_can_t_leave_is_not_lost(core: Core) -> None:
    thread, one = held(core)
    core.kernel.stays[TID] = ENFILE
    core.holder.revive(thread)
    core.monitor._waits(one, thread)  # as it does itself
    core.cycle()
    assert (thread.state, rows(core)) == (ThreadState.STUCK, [TID])
    del core.kernel.stays[TID]
    core.cycle()
    assert core.kernel.calls[-1] == ("revive", TID)
    core.cycle(20)
    core.cycle()
    assert thread.state is ThreadState.HELD


def test_a_refusal_before_a_row_is_written_erases_none(core: Core) -> None:
    before = Row(tid=TID, start_ticks=5, original=SchedAttr(nice=3), period_ns=P, max_budget_ns=P)
    core.journal.hold([before])
    core.kernel.tasks[TID].reservation = MS, P
    thread, _ = held(core)
    assert "SCHED_DEADLINE already" in thread.reason
    assert core.journal.held() == [before]


def test_late_threads_that_end_or_that_somebody_takes_are_forgotten(core: Core) -> None:
    _, one = held(core, SMALL, threads=3)
    core.kernel.stays = dict.fromkeys(TIDS[:3], ENFILE)
    core.monitor.release(one)
    del core.kernel.tasks[TIDS[0]]
    core.kernel.tasks[TIDS[1]] = Task(start_ticks=6, reservation=(MS, P))  # another one of the same id
    core.kernel.tasks[TIDS[2]].reservation = None
    core.cycle()
    assert rows(core) == []
    assert core.kernel.tasks[TIDS[1]].reservation == (MS, P)
    assert "leave" not in [call for call, _ in core.kernel.calls]


def test_at_the_end_it_leaves_whatever_it_costs(core: Core) -> None:
    _, one = held(core)
    core.kernel.stays[TID] = OSError(errno.EPERM, "it sleeps and is pinned")
    core.monitor.release(one)
    core.holder.finish()
    core.nothing_is_left()
    core.holder.finish()


def test_what_could_not_be_recovered_is_tried_again(core: Core) -> None:
    core.journal.hold([Row(tid=TID, start_ticks=5, original=SchedAttr(), period_ns=P, max_budget_ns=P)])
    core.kernel.tasks[TID].reservation = MS, P
    core.kernel.stays[TID] = ENFILE
    assert core.holder.recover() == 0
    assert rows(core) == [TID]
    del core.kernel.stays[TID]
    core.cycle()
    core.nothing_is_left()


def _exec(core: Core, *, reservation_of: int = TIDS[1]) -> None:
    """A second thread of a process calls execve."""
    core.kernel.tasks[TID] = core.kernel.tasks.pop(reservation_of)


def test_a_thread_that_calls_execve_goes_on_as_the_first_one_and_leaves(core: Core) -> None:
    core.kernel.processes[TIDS[1]] = TID
    one, _ = core.monitor.adopt(1, TARGET, SMALL, Scripted(wanted=(TIDS[1],)))
    assert one.threads[TIDS[1]].state is ThreadState.HELD
    _exec(core)
    core.cycle()
    assert core.kernel.calls[-1] == ("leave", TID)
    assert core.kernel.tasks[TID].reservation is None
    assert rows(core) == []


def test_an_heir_that_can_t_leave_has_a_row(core: Core) -> None:
    core.kernel.processes[TIDS[1]] = TID
    core.monitor.adopt(1, TARGET, SMALL, Scripted(wanted=(TIDS[1],)))
    core.kernel.stays[TID] = ENFILE
    _exec(core)
    core.cycle()
    assert rows(core) == [TID]
    del core.kernel.stays[TID]
    core.cycle()
    assert rows(core) == []


def test_a_first_thread_with_a_reservation_of_somebody_else_s_is_left_alone(core: Core) -> None:
    core.kernel.processes[TIDS[1]] = TID
    core.monitor.adopt(1, TARGET, SMALL, Scripted(wanted=(TIDS[1],)))
    core.kernel.tasks[TID].reservation = 2 * MS, P
    del core.kernel.tasks[TIDS[1]]
    core.cycle()
    assert core.kernel.tasks[TID].reservation == (2 * MS, P)


def test_where_the_kernel_does_not_tell_the_budget_the_watchdog_allows_for_ticks(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, _ = held(core, SMALL)  # 1 ms in 100: two ticks of 10 ms are made up for in 2 s
    monkeypatch.setattr(procfs, "dl_runtime", lambda _tid: None)
    thread.suspect_ns = now = core.kernel.now_ns
    thread.cells.progress_ns = 0
    assert not watchdog.is_stuck(thread, now + 22 * P)
    assert watchdog.is_stuck(thread, now + 22 * P + 1)
    monkeypatch.setattr(procfs, "dl_runtime", lambda _tid: 0)
    assert watchdog.is_stuck(thread, now + 2 * P + 1)


class Pinned:
    """A thread whose reservation can't be set any more, and how the extension is asked to take it out."""

    def __init__(self, patch: pytest.MonkeyPatch, *, wakes: bool = False) -> None:
        self.asked: list[bool] = []
        self._wakes = wakes
        patch.setattr(sched, "get", lambda _tid: SchedAttr.deadline(runtime_ns=P // 4, period_ns=P))
        patch.setattr(native, "sched_leave", self.leave)
        patch.setattr(procfs, "dl_runtime", lambda _tid: MS)

    def leave(
        self, _tid: int, _fd: int, *, if_asleep: RawAttr | None, if_running: RawAttr | None, wanted: RawAttr
    ) -> RawLeft:
        assert (if_running, wanted.policy) != (None, 6)
        self.asked.append(if_asleep is not None)
        if if_asleep is not None:
            return RawLeft("S", errno.EPERM, fallback=False, errno=0, stayed=True)
        return RawLeft("R" if self._wakes else "S", 0, fallback=False, errno=0)


def _leave(*, anyway: bool) -> reservation.Left:
    tid = threading.get_native_id()
    return reservation.leave(tid, SchedAttr(), period_ns=P, max_budget_ns=P // 2, anyway=anyway)


def test_a_sleeper_that_can_t_shrink_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    kernel = Pinned(monkeypatch)
    with pytest.raises(PermissionError, match="refuses to shrink"):
        _leave(anyway=False)
    assert kernel.asked == [True]
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_at_the_end_it_leaves_and_its_share_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Pinned(monkeypatch)
    left = _leave(anyway=True)
    assert (kernel.asked, left.leaked, left.gap_ns) == ([True, False], 0.25, S)
    Pinned(monkeypatch, wakes=True)
    assert _leave(anyway=True).leaked == 0.0


def test_the_cure_is_in_the_log(core: Core, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _, one = held(core)
    core.kernel.stays[TID] = ENFILE
    core.monitor.release(one)
    left = reservation.Left(gap_ns=S, asleep=True, fallback=False, refused_errno=0, leaked=0.25)
    monkeypatch.setattr(reservation, "leave", lambda *_which, **_how: left)
    with caplog.at_level(logging.WARNING):
        core.holder.finish()
    assert "keeps 0.250 CPUs for nobody: see docs/troubleshooting.md" in caplog.text
