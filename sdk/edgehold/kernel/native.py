"""The only importer of the compiled extension: C's -errno becomes `OSError`, C's structures become named tuples.

It must not decide anything: what a call means is said in sched.py and sampler.py.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from edgehold._kernel import ffi, lib

# struct eh_schedstat of ext/cdef.h; its size is asserted there.
_SCHEDSTAT = struct.Struct("=QQQQii")


class RawAttr(NamedTuple):
    """struct sched_attr without its size (sched_setattr(2)). Times in nanoseconds."""

    policy: int
    flags: int
    nice: int
    priority: int
    runtime_ns: int
    deadline_ns: int
    period_ns: int


class RawLeft(NamedTuple):
    """How a thread left SCHED_DEADLINE: see `sched_leave`."""

    state: str
    """The state letter (proc_pid_stat(5)) by which the way was chosen."""
    step_errno: int
    """0, or why the step before (shrink or grow) was refused; it does not stop the leaving."""
    fallback: bool
    """The wanted policy was refused and the thread is in SCHED_OTHER instead."""
    errno: int
    """0, or why the wanted policy was refused."""


class RawSchedstat(NamedTuple):
    """One thread's /proc/…/schedstat, in nanoseconds since the thread began, and when it was read."""

    executed_ns: int
    run_delay_ns: int
    timeslices: int
    time_ns: int
    """CLOCK_MONOTONIC right after the read."""
    errno: int
    """0, or why it could not be read (ESRCH: the thread is gone); the other fields then say nothing."""


def _fail(call: str, tid: int, errno: int) -> OSError:
    who = f"thread {tid}" if tid else "this thread"
    return OSError(errno, f"{call} of {who}: {os.strerror(errno)}")


def _to_c(attr: RawAttr) -> Any:
    raw = ffi.new("struct eh_sched_attr *")
    raw.policy, raw.flags, raw.nice, raw.priority, raw.runtime_ns, raw.deadline_ns, raw.period_ns = attr
    return raw


def sched_setattr(tid: int, attr: RawAttr) -> None:
    """Set a thread's policy; 0 is the calling thread. Raises `OSError` with the call's name in its text."""
    if (result := lib.eh_sched_setattr(tid, _to_c(attr))) < 0:
        raise _fail("sched_setattr", tid, -result)


def sched_getattr(tid: int) -> RawAttr:
    """A thread's policy; 0 is the calling thread. Raises `OSError` with the call's name in its text."""
    raw = ffi.new("struct eh_sched_attr *")
    if (result := lib.eh_sched_getattr(tid, raw)) < 0:
        raise _fail("sched_getattr", tid, -result)
    return RawAttr(raw.policy, raw.flags, raw.nice, raw.priority, raw.runtime_ns, raw.deadline_ns, raw.period_ns)


def sched_leave(
    tid: int, stat_fd: int, *, if_asleep: RawAttr | None, if_running: RawAttr | None, wanted: RawAttr
) -> RawLeft:
    """Read the thread's state, take the step that the state asks for, set ``wanted``: three calls back to back.

    ``stat_fd`` is the thread's open ``/proc/<tid>/stat``. A refused ``wanted`` ends in SCHED_OTHER and is told in the
    result, so that a step never stays alone.

    Raises:
        OSError: the thread is gone, or nothing at all could be changed.
    """
    left = ffi.new("struct eh_left *")
    result = lib.eh_sched_leave(
        tid,
        stat_fd,
        ffi.NULL if if_asleep is None else _to_c(if_asleep),
        ffi.NULL if if_running is None else _to_c(if_running),
        _to_c(wanted),
        left,
    )
    if result < 0 and not left.fallback:
        raise _fail("sched_setattr", tid, -result)
    return RawLeft(chr(left.state), left.step_error, bool(left.fallback), -result)


class SchedstatBatch:
    """Descriptors and results of a batched read, in memory that C and Python share. Grows, never shrinks."""

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._fds = ffi.new("int[]", size)
        self._out = ffi.new("struct eh_schedstat[]", size)

    def read(self, fds: list[int]) -> Iterator[RawSchedstat]:
        """Read all in one call, without the GIL. The results come in the order of the descriptors."""
        count = len(fds)
        if count > self._size:
            self._size = max(count, 2 * self._size)
            self._fds = ffi.new("int[]", self._size)
            self._out = ffi.new("struct eh_schedstat[]", self._size)
        self._fds[0:count] = fds
        lib.eh_schedstat_read(self._fds, self._out, count)
        data = bytes(ffi.buffer(self._out, count * _SCHEDSTAT.size)) if count else b""
        for executed, delay, slices, time, errno, _reserved in _SCHEDSTAT.iter_unpack(data):
            yield RawSchedstat(executed, delay, slices, time, errno)
