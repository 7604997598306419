"""Finds the thread that the kernel left throttled for ever, and the one that ended without anybody's noticing.

A stuck thread wants to run (state R) and never executes. Its run delay does not move either: the kernel adds that up
when a thread gets a CPU. A thread that overran its budget far may rightly be throttled for long, so what it overran by
is asked for before it is judged. Looking costs some tens of microseconds, so only those that do not execute are
looked at, and sleepers seldom.
"""

from enum import Enum

from deadlined.held import Thread
from edgehold.clock import NS_PER_S
from edgehold.kernel import procfs
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sampler import ThreadSample

# How often a thread that sleeps is looked at again.
_ASLEEP_NS = 5 * NS_PER_S


class Verdict(Enum):
    """What the watchdog found."""

    FINE = "fine"
    ENDED = "ended"
    STUCK = "stuck"


def begin(thread: Thread, sample: ThreadSample) -> None:
    """The thread was attached just now, or executed: nothing is held against it."""
    thread.seen_executed_ns, thread.progress_ns = sample.executed_ns, sample.time_ns
    thread.suspect_ns = thread.look_at_ns = 0


def judge(thread: Thread, sample: ThreadSample, *, period_ns: int) -> Verdict:
    """Once a cycle for each held thread, with its counters."""
    now = sample.time_ns
    if sample.executed_ns != thread.seen_executed_ns:
        begin(thread, sample)
        thread.stuck = 0
        return Verdict.FINE
    if now - thread.progress_ns <= 2 * period_ns or now < thread.look_at_ns:
        return Verdict.FINE
    try:
        facts = procfs.stat(thread.tid)
        overrun_ns = max(-(procfs.dl_runtime(thread.tid) or 0), 0) if facts.state == "R" else 0
    except GoneError:
        return Verdict.ENDED
    except OSError as error:
        if not procfs.is_exhausted(error):
            raise
        return Verdict.FINE  # no descriptor to look through: looked at again in the next cycle
    if facts.state != "R":
        thread.suspect_ns = 0
        thread.look_at_ns = now + _ASLEEP_NS
        return Verdict.ENDED if facts.ended else Verdict.FINE
    if not thread.suspect_ns:
        thread.suspect_ns = now
    patience_ns = 2 * period_ns + period_ns * overrun_ns // max(thread.budget_ns, 1)
    return Verdict.STUCK if now - thread.suspect_ns > patience_ns else Verdict.FINE
