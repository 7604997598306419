"""When one thread came to a CPU and when it left, as the kernel records it (perf_event_open(2), PERF_RECORD_SWITCH).

It costs the thread some tenths of a microsecond a switch, so it is for some seconds, not for ever. A thread that
switches more often than the ring can hold between two drains loses records; that is told, because what is missing
looks like a pause.
"""

import errno
import os
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Self, TypeAlias

from edgehold.errors import DeniedError, EdgeholdError, FailedError, NoCapacityError, UnsupportedError
from edgehold.kernel import native_perf, procfs
from edgehold.kernel.procfs import GoneError

OUT = native_perf.OUT
"""The thread left the CPU; a record without it: it came to one."""
PREEMPTED = native_perf.PREEMPTED
"""With `OUT`: it wanted to go on. Throttling by a used-up budget counts as that."""
LOST = native_perf.LOST
"""No switch: records are missing here."""

Switch: TypeAlias = tuple[int, int]
"""When, in nanoseconds of CLOCK_MONOTONIC, and the flags. A bare pair: there are thousands a second."""

# 1,024 records on pages of 4 KiB: of 2,500 runs a second at a drain each 200 ms.
_PAGES = 4


class SwitchRecorder:
    """Records one thread's switches from now on. Use as a context manager, or `close` it."""

    def __init__(self, tid: int) -> None:
        """Begin to record.

        Raises:
            GoneError: no such thread.
            DeniedError: no privilege; the text has the cure.
            NoCapacityError: no descriptor, or no lockable memory is left.
            UnsupportedError: the kernel has no such records.
            FailedError: the kernel refused for another reason.
        """
        self.tid = tid
        self._fd = -1
        try:
            fd = native_perf.perf_open(tid)
        except OSError as error:
            raise _explain_open(error, tid) from None
        try:
            self._ring = native_perf.PerfRing(fd, _PAGES)
        except OSError as error:
            os.close(fd)
            raise _explain_map(error, tid) from None
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def lost(self) -> int:
        """How often records were missing, so far as they were drained."""
        return self._ring.lost

    def drain(self) -> list[Switch]:
        """What was recorded since the last time, oldest first. Of a thread that ended: what is left, then nothing.

        Raises:
            OSError: EBADF: it is closed.
        """
        return self._ring.drain()

    def close(self) -> None:
        """Stop recording. A second time does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._ring.unmap()
            os.close(fd)


class Activations:
    """Finds in switches when a thread was activated: the first time on a CPU after it went to sleep by itself.

    A preemption and a throttled budget do not count. Where records are missing, everything begins anew.
    """

    def __init__(self, keep: int = 256) -> None:
        self.times_ns: deque[int] = deque(maxlen=keep)
        """The last ones, ascending, in nanoseconds of CLOCK_MONOTONIC."""
        self.stalls_ns: deque[int] = deque(maxlen=keep)
        """For each, how long the thread was off its CPU before, since the last one, while it wanted to go on."""
        self.stalled_ns = 0
        """All of that, since the beginning."""
        # What was before the first record is not known.
        self._slept = False
        self._left_ns = 0
        self._stall_ns = 0

    def feed(self, switches: Iterable[Switch]) -> None:
        """More switches, oldest first."""
        slept, left_ns = self._slept, self._left_ns
        for time_ns, flags in switches:
            if flags == 0:
                if slept:
                    self.times_ns.append(time_ns)
                    self.stalls_ns.append(self._stall_ns)
                    self._stall_ns = 0
                    slept = False
                elif left_ns:
                    self._stall_ns += time_ns - left_ns
                    self.stalled_ns += time_ns - left_ns
                left_ns = 0
            elif flags == OUT:
                slept = True
            elif flags & OUT:
                left_ns = time_ns
            elif flags & LOST:
                self.times_ns.clear()
                self.stalls_ns.clear()
                slept, left_ns, self._stall_ns = False, 0, 0
        self._slept, self._left_ns = slept, left_ns


def _explain_open(error: OSError, tid: int) -> EdgeholdError:
    if error.errno == errno.ESRCH:
        return GoneError(f"thread {tid} does not exist (any more)")
    if procfs.is_exhausted(error):
        return NoCapacityError(
            f"no file descriptor is left for the switches of thread {tid}: raise LimitNOFILE= of the unit (ulimit -n)"
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return DeniedError(
            f"the context switches of thread {tid} may not be recorded: that needs CAP_PERFMON (in the unit: "
            "AmbientCapabilities=, CapabilityBoundingSet=, and perf_event_open in SystemCallFilter=), or the thread's "
            "own user and a sysctl kernel.perf_event_paranoid of at most 2"
        )
    if error.errno in {errno.ENOSYS, errno.ENOENT, errno.EINVAL, errno.E2BIG, errno.EOPNOTSUPP}:
        return UnsupportedError(
            f"this kernel does not record context switches ({error.strerror}): it needs CONFIG_PERF_EVENTS, Linux 4.3 "
            "or newer"
        )
    return FailedError(str(error))


def _explain_map(error: OSError, tid: int) -> EdgeholdError:
    if error.errno in {errno.EPERM, errno.ENOMEM}:
        return NoCapacityError(
            f"no locked memory is left for the switches of thread {tid}: raise the sysctl kernel.perf_event_mlock_kb, "
            "or LimitMEMLOCK= of the unit, or give it CAP_IPC_LOCK"
        )
    return FailedError(str(error))
