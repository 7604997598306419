"""Puts one thread under a reservation and takes it out again, without what the kernel loses on the way.

Three faults of the kernel's (all versions from 6.1 to 7.3 that were tried) shape this:

* A *sleeping* thread that goes straight to another policy leaves its bandwidth behind for ever. It first shrinks to the
  smallest reservation, which counts at once, and leaves in the same breath. One that was pinned meanwhile can't shrink
  (EPERM): it stays until it runs, when leaving loses nothing.
* A *running or throttled* thread that shrinks first stays throttled for hours if it is ever attached again. It grows
  first (the shorter is what it overran by), then leaves.
* A thread that is attached again before its old reservation's 0-lag time is throttled for ever: nobody attaches it
  before `safe_gap_ns` is over, not even after a restart of this daemon.

Sources: kernel/sched/deadline.c (switched_from_dl, inactive_task_timer, dl_task_timer); measured.
"""

import errno
import os
from dataclasses import dataclass

from edgehold.clock import NS_PER_MS, NS_PER_S
from edgehold.errors import BadStateError
from edgehold.kernel import native, procfs, sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import Policy, SchedAttr

_MIN_GAP_NS = NS_PER_S
_GAP_MARGIN_NS = 250 * NS_PER_MS
# Longest wait for a thread that overran grossly; the watchdog takes care of what is left.
_MAX_GAP_NS = 120 * NS_PER_S


@dataclass(frozen=True, slots=True)
class Left:
    """How a thread left its reservation."""

    gap_ns: int
    """Not to be attached again for so long."""
    asleep: bool
    fallback: bool
    """Its own policy was refused; it is in SCHED_OTHER."""
    refused_errno: int
    """0, or why its own policy was refused."""
    leaked: float = 0.0
    """CPUs of bandwidth that the kernel keeps for nobody."""


def safe_gap_ns(*, period_ns: int, budget_ns: int, overrun_ns: int) -> int:
    """How long a thread that left stays out: max(1 s, 250 ms + P (1 + overrun / Q)), in nanoseconds.

    The 0-lag time of a reservation is its deadline plus overrun x P / Q after the thread left.
    """
    wait = _GAP_MARGIN_NS + period_ns + period_ns * max(overrun_ns, 0) // max(budget_ns, 1)
    return min(max(_MIN_GAP_NS, wait), _MAX_GAP_NS)


def check_free(tid: int) -> SchedAttr:
    """The thread's own policy, which is what detaching will restore.

    Raises:
        GoneError: no such thread.
        BadStateError: it is in SCHED_DEADLINE by somebody else.
    """
    own = sched.get(tid)
    if own.policy is Policy.DEADLINE:
        raise BadStateError(
            f"thread {tid} is in SCHED_DEADLINE already ({own}), and not by deadlined; whoever did it must take it out "
            f"first (chrt --other --pid 0 {tid})"
        )
    return own


def enter(tid: int, *, budget_ns: int, period_ns: int) -> None:
    """Put the thread under a reservation; also what changes the budget of one that is.

    Raises:
        GoneError: no such thread.
        OSError: refused; `edgehold.kernel.sched.explain` has the text. What was set before stays.
    """
    sched.set_attr(tid, SchedAttr.deadline(runtime_ns=budget_ns, period_ns=period_ns))


def is_held(tid: int, *, period_ns: int) -> bool:
    """Whether the thread is in a reservation of this period: not so once somebody else changed its policy.

    Raises:
        GoneError: no such thread.
    """
    now = sched.get(tid)
    return now.policy is Policy.DEADLINE and now.period_ns == period_ns


def leave(
    tid: int, original: SchedAttr, *, period_ns: int, max_budget_ns: int, grow: bool = True, anyway: bool = False
) -> Left:
    """Give the thread its own policy back, by the way that is safe for its state.

    ``grow=False`` is for one that the kernel left throttled for ever: only the change of policy revives it.
    ``anyway``: leave even where that loses the thread's share (see `Left.leaked`).

    Raises:
        GoneError: no such thread any more; its bandwidth went with it.
        OSError: it is in SCHED_DEADLINE still: not even SCHED_OTHER could be set, no descriptor is left, or it sleeps
            and can't be shrunk. To be tried again.
    """
    now = sched.get(tid)
    budget_ns = now.runtime_ns or max_budget_ns
    # Read before the change, which makes it unreadable.
    left_ns = procfs.dl_runtime(tid)
    wanted = sched.without_slice(original)
    largest = SchedAttr.deadline(runtime_ns=max_budget_ns, period_ns=period_ns)
    running = sched.to_raw(largest) if grow else None
    to = sched.to_raw(wanted)
    leaked = 0.0
    stat_fd = procfs.open_thread(tid, "stat")
    try:
        how = native.sched_leave(tid, stat_fd, if_asleep=sched.to_raw(sched.SMALLEST), if_running=running, wanted=to)
        if how.stayed and anyway:
            how = native.sched_leave(tid, stat_fd, if_asleep=None, if_running=running, wanted=to)
            leaked = 0.0 if how.state == "R" else budget_ns / (now.period_ns or period_ns)
    except OSError as error:
        if procfs.is_gone(error):
            raise GoneError(f"thread {tid} does not exist (any more)") from None
        raise
    finally:
        os.close(stat_fd)
    if how.stayed:
        raise OSError(
            how.step_errno,
            f"it sleeps and the kernel refuses to shrink its reservation ({os.strerror(how.step_errno)}: was it pinned "
            "since?), so leaving now would lose its share for everybody; it stays until it runs",
        )
    if not how.fallback and how.errno == 0 and original != wanted:
        sched.restore(tid, original)  # the second half: a slice of its own, where it had one
    asleep = how.state != "R"
    # A refused growth is no fault: the thread then left by itself, and what it overran counts with the old budget.
    grown = grow and not asleep and how.step_errno == 0
    overrun_ns = -left_ns if left_ns is not None else 0
    gap_ns = safe_gap_ns(period_ns=period_ns, budget_ns=max_budget_ns if grown else budget_ns, overrun_ns=overrun_ns)
    return Left(gap_ns=gap_ns, asleep=asleep, fallback=how.fallback, refused_errno=how.errno, leaked=leaked)


def errno_name(error: OSError) -> str:
    """EBUSY and its like, for metrics and logs."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))
