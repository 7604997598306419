"""Switch records of single threads, as ext/perf.c hands them over: C's -errno becomes `OSError`.

It must not decide anything: what a record means is said in switches.py.
"""

import os
import struct
from typing import Any

from edgehold._kernel import ffi, lib

# struct eh_switch of ext/perf_cdef.h without its reserved field; its size is asserted in ext/perf.c.
_SWITCH = struct.Struct("=QI4x")
# A thread that switches more often between two looks costs a further call for so many.
_BATCH = 64

OUT: int = lib.EH_SWITCH_OUT
PREEMPTED: int = lib.EH_SWITCH_PREEMPTED
LOST: int = lib.EH_SWITCH_LOST


def _fail(call: str, result: int) -> OSError:
    return OSError(-result, f"{call}: {os.strerror(-result)}")


def perf_open(tid: int) -> int:
    """A descriptor that records a thread's switches. Raises `OSError`."""
    if (fd := lib.eh_perf_open(tid)) < 0:
        raise _fail(f"perf_event_open of thread {tid}", fd)
    return fd


class PerfRing:
    """The records of a descriptor, in memory that is shared with the kernel: unmap it."""

    def __init__(self, fd: int, pages: int) -> None:
        """Map it, with so many pages for records, a power of two. Raises `OSError`."""
        self._ring: Any = ffi.new("struct eh_perf *")
        self._out: Any = ffi.new("struct eh_switch[]", _BATCH)
        self._view: Any = ffi.buffer(self._out)
        if (result := lib.eh_perf_map(fd, pages, self._ring)) < 0:
            raise _fail("mmap of a perf event", result)

    @property
    def lost(self) -> int:
        """How many of the drained records told of a loss."""
        return int(self._ring.lost)

    def drain(self) -> list[tuple[int, int]]:
        """Time and flags of each record since the last drain, oldest first. Raises `OSError`."""
        records: list[tuple[int, int]] = []
        count = _BATCH
        while count == _BATCH:
            if (count := lib.eh_perf_drain(self._ring, self._out, _BATCH)) < 0:
                raise _fail("reading a perf event's ring", count)
            if count:
                records += _SWITCH.iter_unpack(self._view[0 : count * _SWITCH.size])
        return records

    def unmap(self) -> None:
        """Give the memory back; a drain fails afterwards (EBADF)."""
        lib.eh_perf_unmap(self._ring)
