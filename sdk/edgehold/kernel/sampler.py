"""Executed time and run delay of many threads in one call, through descriptors that are kept open.

A kept descriptor belongs to one thread for ever: once that thread ended it reads ESRCH, even if the id is used again.
Field 1 of schedstat is the time on a CPU; field 2 the time runnable but not running, in which the kernel also counts
a throttled reservation (Documentation/scheduler/sched-stats.rst). Both are up to a tick old for a running thread.
"""

import os
from types import TracebackType
from typing import NamedTuple, Self

from edgehold.kernel import native
from edgehold.kernel.procfs import open_thread


class ThreadSample(NamedTuple):
    """One thread's counters, in nanoseconds since it began; ``time_ns`` is CLOCK_MONOTONIC at the read."""

    executed_ns: int
    run_delay_ns: int
    timeslices: int
    time_ns: int
    errno: int
    """0; else the thread is gone (ESRCH) or unreadable and the counters say nothing."""


class Sampler:
    """Keeps one descriptor a thread. Use as a context manager, or `close` it."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._batch = native.SchedstatBatch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._fds)

    def __contains__(self, tid: int) -> bool:
        return tid in self._fds

    def add(self, tid: int) -> ThreadSample:
        """Sample this thread from now on; its first sample. Adding it again opens it anew (the id may be reused).

        Raises:
            GoneError: no such thread.
            OSError: EMFILE: no descriptor is left.
        """
        fd = open_thread(tid, "schedstat")
        self.discard(tid)
        self._fds[tid] = fd
        return ThreadSample(*next(self._batch.read([fd])))

    def discard(self, tid: int) -> None:
        """Forget the thread, if it was added."""
        if (fd := self._fds.pop(tid, None)) is not None:
            os.close(fd)

    def sample(self) -> dict[int, ThreadSample]:
        """The counters of every thread, in the order in which they were added."""
        fds = list(self._fds.values())
        return {tid: ThreadSample(*raw) for tid, raw in zip(self._fds, self._batch.read(fds), strict=True)}

    def close(self) -> None:
        """Close every descriptor."""
        for tid in list(self._fds):
            self.discard(tid)
