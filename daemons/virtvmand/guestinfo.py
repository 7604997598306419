"""What a guest's process uses of the host, from files that every user may read: guests run as users of their own.

Sources: proc_pid_stat(5), proc_pid_status(5), sched_getaffinity(2). One read a question: statistics of many domains
are asked for every few seconds.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from edgehold.kernel.procfs import PROC, GoneError, is_gone, read

_NS_PER_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
# The kernel writes these files in one piece, and shorter than that: one read has the whole.
_ENOUGH = 16384
_KEPT = 64
# Places in a stat file after the name, in which the manual page's 3rd field (state) is the first.
_STATE, _UTIME, _STIME, _PROCESSOR = 0, 11, 12, 36


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuUse:
    """A virtual CPU's thread at one moment."""

    cpu_time_ns: int
    """What it ran since its start, guest and emulator, in whole ticks of the clock (mostly 10 ms)."""
    cpu: int
    """The host's CPU on which it runs or ran last."""
    affinity: frozenset[int]
    """The host's CPUs on which it may run."""
    state: str
    """One letter: R runs or wants to, S and D sleep, T is stopped."""


class CpuTimes:
    """What processes ran since their start. Each one's file is kept open: opening it costs twice as much as reading.

    A descriptor stays with its process, so an id that is used again is never mistaken. What was read is good for
    ``fresh_ns``: the kernel's figures change once a tick.
    """

    def __init__(self, *, proc: Path = PROC, fresh_ns: int = _NS_PER_TICK) -> None:
        self._proc = proc
        self._fresh_ns = fresh_ns
        self._fds: dict[int, int] = {}
        self._read: dict[int, tuple[int, int]] = {}
        """By process: until when what was read is good, and what it was."""

    def of(self, pid: int) -> int:
        """CPU time of a process, all its threads together, in ns (whole ticks of the clock, mostly 10 ms).

        Raises:
            GoneError: no such process.
        """
        now_ns = time.monotonic_ns()
        until_ns, value = self._read.get(pid, (0, 0))
        if now_ns < until_ns:
            return value
        fd = self._fds.get(pid)
        try:
            # Of one that is kept and has ended, the id may be another's by now.
            fields = _fields(self._open(pid) if fd is None else fd, f"process {pid}")
        except GoneError:
            self._drop(pid)
            if fd is None:
                raise
            return self.of(pid)
        value = (int(fields[_UTIME]) + int(fields[_STIME])) * _NS_PER_TICK
        self._read[pid] = (now_ns + self._fresh_ns, value)
        return value

    def close(self) -> None:
        """Let go of all."""
        for pid in list(self._fds):
            self._drop(pid)

    def _open(self, pid: int) -> int:
        while len(self._fds) >= _KEPT:
            self._drop(next(iter(self._fds)))
        try:
            fd = self._fds[pid] = os.open(f"{self._proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if is_gone(error):
                raise GoneError(f"process {pid} does not exist (any more)") from None
            raise
        return fd

    def _drop(self, pid: int) -> None:
        self._read.pop(pid, None)
        if (fd := self._fds.pop(pid, None)) is not None:
            os.close(fd)


def memory_use(pid: int, *, proc: Path = PROC) -> int:
    """Memory of a process that is in the host's RAM, in KiB: its guest's as far as it is allocated, and its own.

    Huge pages are counted, which VmRSS leaves out.

    Raises:
        GoneError: no such process, or it ended and was not waited for.
    """
    resident = None
    for line in read(f"{proc}/{pid}/status", f"process {pid}").splitlines():
        name, _colon, rest = line.partition(b":")
        if name == b"VmRSS":
            resident = int(rest.split()[0])
        elif name == b"HugetlbPages" and resident is not None:
            return resident + int(rest.split()[0])
    if resident is None:
        raise GoneError(f"process {pid} has no memory (any more)")
    return resident


def vcpu_use(tid: int, *, proc: Path = PROC) -> VcpuUse:
    """What a virtual CPU's thread ran, where, and where it may run.

    Raises:
        GoneError: no such thread.
    """
    # Below task: /proc/TID/stat itself has the sums of the whole process.
    fields = _stat(f"{proc}/{tid}/task/{tid}/stat", f"thread {tid}")
    try:
        affinity = os.sched_getaffinity(tid)
    except OSError as error:
        if is_gone(error):
            raise GoneError(f"thread {tid} does not exist (any more)") from None
        raise
    return VcpuUse(
        cpu_time_ns=(int(fields[_UTIME]) + int(fields[_STIME])) * _NS_PER_TICK,
        cpu=int(fields[_PROCESSOR]),
        affinity=frozenset(affinity),
        state=fields[_STATE].decode(),
    )


def _fields(fd: int, what: str) -> list[bytes]:
    try:
        return _split(os.pread(fd, _ENOUGH, 0), what)
    except OSError as error:
        if is_gone(error):
            raise GoneError(f"{what} does not exist (any more)") from None
        raise


def _stat(path: str, what: str) -> list[bytes]:
    return _split(read(path, what), what)


def _split(data: bytes, what: str) -> list[bytes]:
    """The fields after the name, which may hold anything and stands before the last parenthesis."""
    fields = data.rpartition(b")")[2].split()
    if len(fields) <= _PROCESSOR:
        raise GoneError(f"{what} does not exist (any more)")
    return fields
