"""Finds the thread that the kernel left throttled for ever.

It wants to run (state R) and never executes. Its run delay does not move either: the kernel adds that up when a thread
gets a CPU. A thread that overran its budget far may rightly be throttled for long, so what it overran by is asked for
before it is judged. The pass over the table finds who is to be judged (ext/held.c).
"""

from deadlined.held import Thread
from edgehold.kernel import procfs


def is_stuck(thread: Thread, now_ns: int) -> bool:
    """Called in each cycle in which a held thread wants to run and has not executed for two periods.

    Raises:
        GoneError: it ended.
    """
    if not thread.suspect_ns or thread.suspect_ns < thread.cells.progress_ns:
        thread.suspect_ns = now_ns
    try:
        overrun_ns = max(-(procfs.dl_runtime(thread.tid) or 0), 0)
    except OSError:
        return False  # no descriptor to look through: looked at again in the next cycle
    period_ns = thread.config.period_ns
    patience_ns = 2 * period_ns + period_ns * overrun_ns // max(thread.budget_ns, 1)
    return now_ns - thread.suspect_ns > patience_ns
