"""Attach and detach on the real kernel: nothing leaks, nobody gets stuck, everybody gets back what he had."""

import time

import pytest

from deadlined import reservation
from edgehold.errors import BadStateError
from edgehold.kernel import capacity, procfs, sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sampler import Sampler
from edgehold.kernel.sched import Flag, Policy, SchedAttr
from edgehold.testing.load import Load, eventually

MS = 1_000_000
P = 100 * MS
CAP = 80 * MS


pytestmark = pytest.mark.usefixtures("deadline")


def asleep(tid: int) -> None:
    eventually(lambda: procfs.stat(tid).state == "S", timeout_s=5, what="it sleeps")


def hold(tid: int, budget_ns: int = 10 * MS) -> SchedAttr:
    own = reservation.check_free(tid)
    reservation.enter(tid, budget_ns=budget_ns, period_ns=P)
    return own


def test_a_hundred_sleepers_in_and_out_leave_the_capacity_as_it_was(load: Load) -> None:
    child = load.sleeper()
    before = capacity.probe().available
    for _ in range(100):
        tid = child.thread()
        asleep(tid)
        own = hold(tid, 30 * MS)
        left = reservation.leave(tid, own, period_ns=P, max_budget_ns=CAP)
        assert left.asleep
        assert sched.get(tid).policy is Policy.OTHER
        child.end_thread(tid)
    # At once, and not after some time: what a sleeper gives up counts immediately.
    assert capacity.probe().available == pytest.approx(before, abs=0.005)


def test_a_sleeper_that_slept_past_its_0_lag_time_leaks_nothing_either(load: Load) -> None:
    child = load.sleeper()
    before = capacity.probe().available
    tids = [child.thread() for _ in range(5)]
    own = {tid: hold(tid, 15 * MS) for tid in tids}
    time.sleep(0.3)  # three periods: nothing is pending any more (the case in which the kernel leaks)
    for tid in tids:
        assert reservation.leave(tid, own[tid], period_ns=P, max_budget_ns=CAP).asleep
    assert capacity.probe().available == pytest.approx(before, abs=0.005)


@pytest.mark.parametrize("budget_ms", [2, 10, 50])
def test_a_throttled_hog_that_is_attached_again_after_the_gap_is_not_stuck(load: Load, budget_ms: int) -> None:
    tid = load.hog().pid
    with Sampler() as sampler:
        for _ in range(3):
            own = hold(tid, budget_ms * MS)
            begin = sampler.add(tid)
            # In its second period of throttling at the earliest, at no particular phase.
            eventually(
                lambda begin=begin: sampler.sample()[tid].timeslices > begin.timeslices + 2,  # type: ignore[misc]
                timeout_s=10,
                what="it was throttled and replenished",
            )
            left = reservation.leave(tid, own, period_ns=P, max_budget_ns=CAP)
            assert not left.asleep
            assert sched.get(tid) == own
            time.sleep(left.gap_ns / 1e9)
            hold(tid, budget_ms * MS)
            begin = sampler.sample()[tid]
            eventually(
                lambda begin=begin: sampler.sample()[tid].executed_ns > begin.executed_ns + budget_ms * MS,  # type: ignore[misc]
                timeout_s=10,
                what="it executes under its second reservation",
            )
            left = reservation.leave(tid, own, period_ns=P, max_budget_ns=CAP)
            time.sleep(left.gap_ns / 1e9)


@pytest.mark.parametrize(
    "own",
    [
        SchedAttr(nice=5),
        SchedAttr(nice=-5, flags=Flag.RESET_ON_FORK),
        SchedAttr(policy=Policy.BATCH, nice=3),
        SchedAttr(policy=Policy.IDLE),
        SchedAttr(policy=Policy.FIFO, priority=2),
        SchedAttr(policy=Policy.RR, priority=1, flags=Flag.RESET_ON_FORK),
    ],
    ids=str,
)
def test_everybody_gets_back_what_he_had(load: Load, own: SchedAttr) -> None:
    tid = load.sleeper().pid
    asleep(tid)
    sched.set_attr(tid, own)
    told = reservation.check_free(tid)
    assert (told.policy, told.nice, told.priority, told.flags) == (own.policy, own.nice, own.priority, own.flags)
    reservation.enter(tid, budget_ns=10 * MS, period_ns=P)
    assert reservation.is_held(tid, period_ns=P)
    reservation.leave(tid, told, period_ns=P, max_budget_ns=CAP)
    assert sched.get(tid) == told
    assert not reservation.is_held(tid, period_ns=P)


def test_a_slice_of_one_s_own_comes_back_and_the_system_s_is_not_made_one(load: Load) -> None:
    plain, sliced = load.sleeper().pid, load.sleeper().pid
    sched.set_attr(sliced, SchedAttr(runtime_ns=10 * MS))
    if sched.get(sliced).runtime_ns != 10 * MS:
        pytest.skip("this kernel has no slices of one's own (6.12)")
    system = sched.get(plain).runtime_ns
    for tid in (plain, sliced):
        own = hold(tid)
        reservation.leave(tid, own, period_ns=P, max_budget_ns=CAP)
    assert sched.get(sliced).runtime_ns == 10 * MS
    assert sched.get(plain).runtime_ns == system


def test_somebody_else_s_reservation_is_left_alone(load: Load) -> None:
    tid = load.hog().pid
    theirs = SchedAttr.deadline(runtime_ns=5 * MS, period_ns=50 * MS)
    sched.set_attr(tid, theirs)
    with pytest.raises(BadStateError, match="not by deadlined"):
        reservation.check_free(tid)
    assert sched.get(tid) == theirs
    sched.set_attr(tid, SchedAttr())


def test_a_thread_that_ended_is_gone_and_its_bandwidth_with_it(load: Load) -> None:
    child = load.sleeper()
    tid = child.thread()
    own = hold(tid, 40 * MS)
    child.end_thread(tid)
    with pytest.raises(GoneError):
        reservation.leave(tid, own, period_ns=P, max_budget_ns=CAP)
    with pytest.raises(GoneError):
        reservation.enter(tid, budget_ns=10 * MS, period_ns=P)
