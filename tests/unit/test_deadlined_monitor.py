"""The monitor, the holder and the service where something goes wrong, or happens in the middle: no descriptor, no disk,
a thread that ends or is taken, a change that is refused. The kernel is one that the test steers (`deadlined_kernel`).
"""

import asyncio
import errno
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from deadlined import reservation, watchdog
from deadlined.config import Settings
from deadlined.held import Attached, Thread
from deadlined.service import Service
from deadlined.targets import ThreadSource
from edgehold.api.deadlined import (
    AttachRequest,
    PeriodOrigin,
    Policy,
    Rule,
    Target,
    TargetKind,
    ThreadState,
)
from edgehold.errors import FailedError, NoCapacityError
from edgehold.kernel import capacity, procfs
from edgehold.kernel.native_held import FROZEN, RawSample
from edgehold.kernel.procfs import GoneError, ThreadStat
from edgehold.service import Runtime
from tests.unit.deadlined_kernel import EMPTY, MS, SMALL, TARGET, TIDS, Core, S, Scripted, Task, core_on

EIO = OSError(errno.EIO, "Input/output error")
EPERM = OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    with core_on(tmp_path, monkeypatch) as one:
        yield one


def held(core: Core, policy: Policy | None = None, *, number: int = 1, threads: int = 1) -> tuple[Thread, Attached]:
    """An attachment of so many threads; its first one."""
    source = Scripted(wanted=TIDS[:threads])
    one, _ = core.monitor.adopt(number, TARGET, policy or Policy(), source)
    return one.threads[TIDS[0]], one


def script(one: Attached) -> Scripted:
    assert isinstance(one.source, Scripted)
    return one.source


def hold_fails(_rows: object) -> None:
    raise FailedError("the disk is full")


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


def test_a_thread_that_is_dropped_while_its_guest_wakes_up_is_not_entered_again(core: Core) -> None:
    """A suspended guest is resumed and loses a vCPU in one cycle: what was to be set for it must not be set."""
    core.kernel.refused[TIDS[1]] = EPERM
    thread, one = held(core, threads=3)
    waiting = one.threads[TIDS[1]]
    source = script(one)
    source.suspended = True
    core.cycle()
    assert thread.budget_ns == 1 * MS
    source.suspended = False
    source.wanted = TIDS[2:3]
    waiting.try_at_ns = 0
    core.kernel.refused.clear()
    core.kernel.calls.clear()
    for _ in range(3):
        core.cycle(executed_ms=9)
    assert core.kernel.calls == [("leave", thread.tid), ("enter", TIDS[2])]
    assert core.kernel.tasks[waiting.tid].reservation is None
    core.monitor.release(one)
    core.nothing_is_left()


def test_a_suspended_guest_keeps_what_was_learned(core: Core) -> None:
    thread, one = held(core)
    for _ in range(6):
        core.cycle(executed_ms=20)
    script(one).suspended = True
    for _ in range(20):
        core.cycle(executed_ms=0)
    assert (thread.budget_ns, thread.wanted_ns) == (1 * MS, 22 * MS)
    assert core.monitor.message(one).suspended
    script(one).suspended = False
    core.cycle()
    assert thread.budget_ns == 22 * MS


def test_a_guest_that_is_attached_while_it_is_suspended(core: Core) -> None:
    one, _ = core.monitor.adopt(1, TARGET, Policy(), Scripted(wanted=TIDS[:1], suspended=True))
    thread = one.threads[TIDS[0]]
    for _ in range(5):
        core.cycle()
    assert thread.cells.flags & FROZEN
    assert (thread.budget_ns, thread.wanted_ns) == (1 * MS, 10 * MS)
    script(one).suspended = False
    core.cycle()
    assert thread.budget_ns == 10 * MS


def test_a_suspended_guest_wakes_nobody_between_two_cycles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with core_on(tmp_path, monkeypatch, short_ns=100 * MS) as core:
        _, one = held(core)
        assert core.monitor.next_due_ns == core.kernel.now_ns + 100 * MS
        script(one).suspended = True
        core.cycle()
        assert core.monitor.next_due_ns == 0
        core.monitor.release(one)


def throttle_for_ever(core: Core, thread: Thread) -> None:
    """It wants to run and never does, until it is taken out."""
    task = core.kernel.tasks[thread.tid]
    task.state, task.dl_runtime_ns = "R", -5 * MS
    for _ in range(3):
        core.cycle()
    task.state, task.dl_runtime_ns = "S", MS


def state(thread: Thread) -> ThreadState:
    return thread.state


def test_a_stuck_thread_is_taken_out_and_attached_again_in_time(core: Core) -> None:
    thread, one = held(core)
    core.cycle(executed_ms=20)
    throttle_for_ever(core, thread)
    assert state(thread) is ThreadState.STUCK
    assert core.kernel.calls[-1] == ("revive", thread.tid)
    assert core.monitor.grants.wanted == pytest.approx(0)
    core.cycle()
    assert state(thread) is ThreadState.STUCK  # the gap
    core.cycle(8)
    core.cycle(executed_ms=20)
    assert (state(thread), thread.budget_ns) == (ThreadState.HELD, 22 * MS)  # it begins with what it had
    core.monitor.release(one)
    core.nothing_is_left()


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


def test_a_refused_raise_is_asked_for_until_it_is_granted(core: Core) -> None:
    """Nobody's need changes meanwhile, so nothing but the refusal is a reason to ask."""
    thread, _ = held(core)
    core.kernel.cpus = 0.15
    core.cycle(executed_ms=50)
    assert thread.budget_ns == 10 * MS
    assert "stays at 10 ms" in thread.reason
    core.cycle(executed_ms=50)
    core.kernel.cpus = 1.8
    core.cycle(executed_ms=50)
    assert (thread.budget_ns, thread.reason) == (55 * MS, "")


def test_a_probe_alone_shares_what_is_there(core: Core) -> None:
    _, one = held(core, Policy(rule=Rule.FIXED, initial_budget_ns=60 * MS), threads=3)
    assert [thread.budget_ns // MS for thread in one.threads.values()] == [60, 60, 60]
    core.monitor.grants.measured(0.9)
    core.cycle()
    assert sum(thread.budget_ns for thread in one.threads.values()) <= 90 * MS
    assert all("shared by weight" in thread.reason for thread in one.threads.values())


def test_who_waits_is_taken_in_when_everybody_is_set_and_then_waits_no_more(core: Core) -> None:
    core.kernel.cpus = 0.15
    thread, one = held(core, Policy(rule=Rule.FIXED), threads=2)
    late = one.threads[TIDS[1]]
    assert isinstance(late, Thread)
    assert (thread.state, late.state) == (ThreadState.HELD, ThreadState.WAITING)
    core.monitor.grants.measured(0.15)
    core.monitor.reconfigure(thread, one, one.config)  # everybody is set, whoever was changed
    core.cycle()
    assert late.state is ThreadState.HELD
    core.cycle()
    assert one.waiting == set()
    assert core.kernel.held <= 0.15


@pytest.mark.parametrize("then", list(ThreadState))
def test_a_policy_can_be_changed_in_every_state(core: Core, then: ThreadState) -> None:
    dry_run = then is ThreadState.WATCHED
    if then is ThreadState.WAITING:
        core.kernel.refused[TIDS[0]] = EPERM
    thread, one = held(core, Policy(rule=Rule.FIXED, dry_run=dry_run))
    if then is ThreadState.STUCK:
        throttle_for_ever(core, thread)
    assert state(thread) is then
    core.monitor.change(
        one, Policy(rule=Rule.FIXED, period_ns=50 * MS, initial_budget_ns=4 * MS, cap=0.5, dry_run=dry_run)
    )
    assert (thread.config.period_ns, thread.wanted_ns) == (50 * MS, 4 * MS)
    core.kernel.refused.clear()
    core.cycle(20)
    core.cycle()
    if not dry_run:
        assert core.kernel.tasks[thread.tid].reservation == (4 * MS, 50 * MS)
    core.monitor.release(one)
    core.nothing_is_left()


def test_the_budget_to_begin_with_is_the_policy_s_until_something_was_learned(core: Core) -> None:
    core.kernel.refused[TIDS[0]] = EPERM
    thread, one = held(core)
    core.monitor.change(one, Policy(initial_budget_ns=30 * MS))
    assert thread.first_ns == 30 * MS
    core.monitor.change(one, Policy(period_ns=50 * MS, initial_budget_ns=30 * MS))
    core.kernel.refused.clear()
    thread.try_at_ns = 0
    core.cycle()
    core.cycle(executed_ms=40)
    assert thread.budget_ns == 22 * MS  # 40 of 100 is 20 of 50
    core.holder.revive(thread)
    core.monitor.change(one, Policy(initial_budget_ns=5 * MS))
    assert thread.first_ns == 44 * MS


def test_another_period_that_is_refused_is_asked_for_again(core: Core) -> None:
    thread, one = held(core)
    core.kernel.refused[thread.tid] = OSError(errno.EBUSY, "Device or resource busy")
    core.monitor.change(one, Policy(period_ns=50 * MS, initial_budget_ns=5 * MS))
    assert "EBUSY" in thread.reason
    assert (thread.config.period_ns, core.kernel.tasks[thread.tid].reservation) == (100 * MS, (10 * MS, 100 * MS))
    core.cycle(executed_ms=10)
    assert thread.state is ThreadState.HELD
    core.kernel.refused.clear()
    core.cycle(executed_ms=10)
    assert core.kernel.tasks[thread.tid].reservation is not None
    assert thread.config.period_ns == 50 * MS
    assert (core.kernel.tasks[thread.tid].reservation or (0, 0))[1] == 50 * MS
    assert thread.reason == ""
    core.monitor.release(one)
    core.nothing_is_left()


def test_another_period_waits_for_the_journal(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    thread, one = held(core)
    with monkeypatch.context() as patch:
        patch.setattr(core.journal, "hold", hold_fails)
        core.monitor.change(one, Policy(period_ns=50 * MS, initial_budget_ns=5 * MS))
    assert (thread.reason, thread.config.period_ns) == ("the disk is full", 100 * MS)
    [row] = core.journal.held()
    assert (row.period_ns, row.also_period_ns) == (100 * MS, 0)
    core.cycle()
    assert thread.config.period_ns == 50 * MS
    [row] = core.journal.held()
    assert {row.period_ns, row.also_period_ns} == {100 * MS, 50 * MS}  # whichever it was when we were killed
    core.monitor.release(one)
    core.nothing_is_left()


def test_a_later_change_stands_for_an_earlier_one_that_was_refused(core: Core) -> None:
    thread, one = held(core)
    core.kernel.refused[thread.tid] = OSError(errno.EBUSY, "Device or resource busy")
    core.monitor.change(one, Policy(period_ns=50 * MS, initial_budget_ns=5 * MS))
    core.kernel.refused.clear()
    core.monitor.change(one, Policy(period_ns=200 * MS))
    for _ in range(3):
        core.cycle(executed_ms=10)
    assert thread.config.period_ns == 200 * MS
    # And one that left meanwhile is not asked for.
    core.kernel.refused[thread.tid] = OSError(errno.EBUSY, "Device or resource busy")
    core.monitor.change(one, Policy(period_ns=50 * MS, initial_budget_ns=5 * MS))
    core.monitor.release(one)
    core.cycle()
    core.nothing_is_left()


def test_a_thread_that_was_taken_is_noticed_by_a_change_too(core: Core) -> None:
    thread, one = held(core)
    core.kernel.tasks[thread.tid].reservation = (3 * MS, 7 * MS)
    core.monitor.change(one, Policy(period_ns=50 * MS, initial_budget_ns=5 * MS))
    assert (thread.state, one.waiting) == (ThreadState.WAITING, {thread.tid})
    assert core.kernel.tasks[thread.tid].reservation == (3 * MS, 7 * MS)
    assert core.monitor.grants.wanted == pytest.approx(0)
    core.monitor.release(one)
    assert core.kernel.tasks[thread.tid].reservation == (3 * MS, 7 * MS)


def test_a_thread_that_ends_while_its_policy_changes(core: Core) -> None:
    thread, one = held(core, threads=2)
    core.kernel.tasks.pop(thread.tid)
    core.monitor.change(one, Policy(period_ns=50 * MS, initial_budget_ns=5 * MS))
    assert one.threads[TIDS[1]].config.period_ns == 50 * MS


def test_what_was_inferred_stays_while_it_is_still_asked_for(core: Core) -> None:
    thread, one = held(core, Policy(period_ns="auto"))
    core.monitor.reconfigure(thread, one, one.config.with_period(40 * MS))
    thread.period_origin, thread.confidence = PeriodOrigin.INFERRED, 0.9
    core.monitor.change(one, Policy(period_ns="auto", cap=0.5))
    assert (thread.config.period_ns, thread.config.cap) == (40 * MS, 0.5)
    core.monitor.change(one, Policy())
    assert thread.config.period_ns == 100 * MS
    assert (thread.period_origin, thread.confidence) == (PeriodOrigin.GIVEN, 0.0)


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


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    one = Service(Runtime("test"), Settings(state_dir=str(tmp_path / "state"), max_threads=1))
    yield one
    one.close()


async def test_one_probe_for_all_who_ask(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = 0

    async def probe() -> capacity.Found:
        nonlocal probes
        probes += 1
        await asyncio.sleep(0)
        return capacity.Found(cpus=2, available=1.5, resolution=0.1)

    monkeypatch.setattr(capacity, "probe_in_child", probe)
    found = await asyncio.gather(*(service.capacity() for _ in range(20)))
    assert {one.available for one in found} == {1.5}
    assert probes == 1


async def test_a_child_that_can_t_be_started_is_an_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE):

        async def no_child(*_values: object, number: int = number, **_names: object) -> None:
            raise OSError(number, "can't")

        monkeypatch.setattr(asyncio, "create_subprocess_exec", no_child)
        with pytest.raises(FailedError):
            await service.capacity()
    assert not service.monitor.grants.probing


async def test_an_attach_without_a_descriptor_is_an_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(_tid: int) -> ThreadStat:
        raise EMPTY

    monkeypatch.setattr(procfs, "stat", stat)
    with pytest.raises(FailedError, match="descriptor"):
        await service.attach(AttachRequest(target=Target(kind=TargetKind.THREAD, id=TIDS[0])))
    assert service.attachments() == []


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
