"""Finds the thread that the kernel left throttled for ever.

It wants to run (state R) and never executes. Its run delay does not move either: the kernel adds that up when a thread
gets a CPU. A thread that overran its budget far may rightly be throttled for long, so what it overran by is asked for
before it is judged; where the kernel does not tell, the most by which enforcing by ticks lets it overrun. The pass over
the table finds who is to be judged (ext/held.c).
"""

from deadlined.held import Thread
from edgehold.clock import NS_PER_MS
from edgehold.kernel import procfs

# A budget is enforced by ticks, so that a job overruns by less than two. HZ=100 has the longest.
_TICKS_NS = 2 * 10 * NS_PER_MS


def is_stuck(thread: Thread, now_ns: int) -> bool:
    """Called in each cycle in which a held thread wants to run and has not executed for two periods.

    Raises:
        GoneError: it ended.
    """
    if not thread.suspect_ns or thread.suspect_ns < thread.cells.progress_ns:
        thread.suspect_ns = now_ns
    try:
        left_ns = procfs.dl_runtime(thread.tid)
    except OSError:
        return False  # no descriptor to look through: looked at again in the next cycle
    overrun_ns = _TICKS_NS if left_ns is None else max(-left_ns, 0)
    period_ns = thread.config.period_ns
    patience_ns = 2 * period_ns + period_ns * overrun_ns // max(thread.budget_ns, 1)
    return now_ns - thread.suspect_ns > patience_ns
