"""What changes while threads are held: policies in every state, refused changes, a guest that is suspended, a stuck
thread. The kernel is one that the test steers (`deadlined_kernel`).
"""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadlined.held import Thread
from edgehold.api.deadlined import PeriodOrigin, Policy, Rule, ThreadState
from edgehold.kernel.native_held import FROZEN
from tests.unit.deadlined_kernel import MS, TARGET, TIDS, Core, Scripted, core_on, held, hold_fails, script

EPERM = OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    with core_on(tmp_path, monkeypatch) as one:
        yield one


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
