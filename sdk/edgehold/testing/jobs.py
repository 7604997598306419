"""A periodic thread that tells what became of each of its jobs: what experiments and benchmarks hold by a reservation.

    with PeriodicJob(work_s=0.01, period_s=0.1) as one:
        ...  # hold one.tid
        for job in one.jobs():
            print(job.response_ns)

It is a process with one thread. A job is so much CPU time of that thread, so that throttling makes it late and not
smaller. Releases lie on a fixed grid; a late job's next one starts at once and keeps its own release, so that response
times contain the backlog. What happened is written to memory that is shared with the parent: no system call of the
report's own is in what is measured. The process ends with the block, or by itself once its parent has gone.
"""

import mmap
import os
import struct
import subprocess
import sys
from types import TracebackType
from typing import NamedTuple, Self

from edgehold.clock import NS_PER_S

CAPACITY = 65_536
"""So many jobs are kept; the thread ends after the last one."""

# number, release, start, end, executed; of each job one. The count of whole records comes before the first of them.
_RECORD = struct.Struct("=5q")
_COUNT = struct.Struct("=q")

_CHILD = """
import ctypes, gc, mmap, os, struct, time
from sys import argv
fd, capacity, parent, work, period = map(int, argv[1:])
class Timespec(ctypes.Structure):
    _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]
# time.sleep() is relative: a thread that is throttled on its way there would leave the grid.
sleep = ctypes.CDLL(None).clock_nanosleep
record, count = struct.Struct("=5q"), struct.Struct("=q")
shared = mmap.mmap(fd, count.size + capacity * record.size)
now, used, store, above = time.monotonic_ns, time.thread_time_ns, record.pack_into, os.getppid
gc.disable()
print("ready", flush=True)
origin = int(input()) or now()
for number in range(capacity):
    release = origin + number * period
    until = Timespec(*divmod(release, 10**9))
    while sleep(time.CLOCK_MONOTONIC, 1, ctypes.byref(until), None): pass  # 1: TIMER_ABSTIME
    start, before = now(), used()
    end = before + work
    while (after := used()) < end: pass
    store(shared, count.size + number * record.size, number, release, start, now(), after - before)
    count.pack_into(shared, 0, number + 1)
    if above() != parent: break
"""


class Job(NamedTuple):
    """One job. Times are nanoseconds of CLOCK_MONOTONIC."""

    number: int
    """From 0."""
    release_ns: int
    start_ns: int
    end_ns: int
    executed_ns: int
    """CPU time of the thread, start to end."""

    @property
    def response_ns(self) -> int:
        """From its release to its end."""
        return self.end_ns - self.release_ns


class PeriodicJob:
    """One such thread; use as a context manager."""

    def __init__(self, *, work_s: float, period_s: float, origin_ns: int | None = 0) -> None:
        """``work_s`` seconds of CPU time every ``period_s`` seconds.

        ``origin_ns``: when the first job is released, in CLOCK_MONOTONIC; 0: as soon as the thread is there; None:
        `begin` says it later.
        """
        self._origin_ns = origin_ns
        self.work_ns = round(work_s * NS_PER_S)
        self.period_ns = round(period_s * NS_PER_S)
        self._fd = os.memfd_create("edgehold-job", os.MFD_CLOEXEC)
        size = _COUNT.size + CAPACITY * _RECORD.size
        os.ftruncate(self._fd, size)
        self._shared = mmap.mmap(self._fd, size)
        arguments = (self._fd, CAPACITY, os.getpid(), self.work_ns, self.period_ns)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _CHILD, *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[self._fd], start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self._release()
            raise
        self.tid = self._process.pid
        """The thread's id, which is its process' id too."""

    def __enter__(self) -> Self:
        """Wait until the thread is there.

        Raises:
            RuntimeError: it ended instead.
        """
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        try:
            if self._process.stdout.readline() != b"ready\n":
                raise RuntimeError("the periodic thread ended before it began")
            if self._origin_ns is not None:
                self.begin(self._origin_ns)
        except BaseException:
            self.end()
            raise
        return self

    def begin(self, origin_ns: int = 0) -> None:
        """Release the first job: at that time of CLOCK_MONOTONIC, or (0) now. Only once."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._process.stdin.write(b"%d\n" % origin_ns)
        self._process.stdin.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def jobs(self) -> list[Job]:
        """All jobs that have ended so far, oldest first. Not after `end`."""
        (count,) = _COUNT.unpack_from(self._shared)  # written after the record that it counts
        whole = memoryview(self._shared)[_COUNT.size : _COUNT.size + count * _RECORD.size]
        with whole:
            return [Job(*fields) for fields in _RECORD.iter_unpack(whole)]

    def end(self) -> None:
        """End the process and wait for it."""
        self._process.kill()  # our own child, not waited for yet: the pid can't be another's
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._release()

    def _release(self) -> None:
        self._shared.close()
        os.close(self._fd)
