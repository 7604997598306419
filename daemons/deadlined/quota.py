"""Holds a cgroup v2 as a whole by its own limit: so much CPU time every period for all its threads together.

``cpu.max`` limits ordinary threads (Documentation/admin-guide/cgroup-v2.rst); it gives no guarantee, and no deadline
thread heeds it. ``cpu.rt.max`` is of a patch set that no released kernel has (2026): where the file is there, it is
written in the same form. What was there before, and what will be written, is told (`Group.plan`) so that the journal
has it before each write: only what stands there as it was written is ever taken back. A period alone tells nothing, as
100 ms is everybody's default.
"""

import errno
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deadlined.cgroups import why_not
from edgehold.api.deadlined import Actuator
from edgehold.clock import NS_PER_MS, NS_PER_S, Clock, SystemClock
from edgehold.errors import BadRequestError, BadStateError, DeniedError, FailedError, UnsupportedError
from edgehold.kernel import cgroup, procfs
from edgehold.kernel.cgroup import Hierarchy
from edgehold.kernel.procfs import GoneError

log = logging.getLogger(__name__)

# The kernel's bounds (max_cfs_quota_period and min_cfs_quota_period of kernel/sched/core.c); the last is a quota's too.
PERIOD_MIN_NS, PERIOD_MAX_NS = NS_PER_MS, NS_PER_S
QUOTA_MIN_NS = NS_PER_MS
_NS_PER_US = 1000
# A window is saturated where the quota did not suffice in so many of its periods, and so much of it was used.
_SHORT_PERIODS = 0.9
_USED = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSample:
    """A cgroup's counters at one moment, in nanoseconds; they only grow."""

    time_ns: int
    """CLOCK_MONOTONIC."""
    executed_ns: int
    throttled_ns: int
    """How long its CPUs waited for the next period, summed over the CPUs. 0 of cpu.rt.max."""
    nr_periods: int
    nr_throttled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRow:
    """What to restore, for the journal. Means nothing after a reboot."""

    directory: str
    """The cgroup, with the mount."""
    device: int
    inode: int
    """With the device, this cgroup and no other of the same name."""
    file: str
    original: str
    """What stood in the file."""
    period_ns: int
    """That of ours."""
    written: str = ""
    """What we wrote last, or were about to."""
    before: str = ""
    """What of ours stood there until then; empty: nothing. A limit that is neither is somebody else's."""


def is_saturated(before: GroupSample, after: GroupSample, *, budget_ns: int, period_ns: int) -> bool | None:
    """Whether the group wanted more than its budget throughout the window. None: the window does not tell.

    It did where the quota did not suffice in at least nine tenths of the window's periods, and at least three quarters
    of the budget were used. The second keeps out a group that is idle in most periods (the kernel counts none of
    those), or that hit the limit on one CPU while a part of the quota lay unused on another.
    """
    elapsed_ns = after.time_ns - before.time_ns
    periods = after.nr_periods - before.nr_periods
    if elapsed_ns <= 0 or budget_ns <= 0:
        return None
    executed_ns = (after.executed_ns - before.executed_ns) * period_ns / elapsed_ns
    if executed_ns < _USED * budget_ns:
        return False
    if periods <= 0:
        return None
    return after.nr_throttled - before.nr_throttled >= _SHORT_PERIODS * periods


class Group:
    """One cgroup that is held. Not held yet when it is opened: `set` does that."""

    def __init__(self, group: int, *, row: QuotaRow, path: str, clock: Clock) -> None:
        """Owns the descriptor ``group``; use `open_group`."""
        self.path = path
        """Below the mount."""
        self.row = row
        self.budget_ns = 0
        """In force; 0: nothing of ours is."""
        self._group = group
        self._clock = clock
        self._stat = -1
        self._ours = ""
        """The file's text as the kernel told it after ours was written; empty: nothing was."""
        self._taken = False

    @property
    def original(self) -> str:
        """What `restore` writes."""
        return self.row.original

    def sample(self) -> GroupSample:
        """The counters now. Raises `GoneError` where the cgroup was removed; `OSError` (EMFILE)."""
        try:
            if self._stat < 0:
                self._stat = os.open("cpu.stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._group)
            found = cgroup.parse_cpu_stat(os.pread(self._stat, 4096, 0))
        except OSError as error:
            raise self._gone(error) from error
        told = self.row.file == Actuator.CPU_MAX.value
        return GroupSample(
            time_ns=self._clock.monotonic_ns(),
            executed_ns=found.usage_ns,
            throttled_ns=found.throttled_ns if told else 0,
            nr_periods=found.nr_periods if told else 0,
            nr_throttled=found.nr_throttled if told else 0,
        )

    def taken(self) -> bool:
        """Whether somebody else has changed the limit since ours was set: for good. Raises as `sample`.

        What stood there before ours is nobody's change: systemd writes it back at each daemon-reload, which every
        installation of a package makes. Ours is then not in force (`budget_ns` is 0) until the next `set`.
        """
        if self._ours and not self._taken and (found := self._read()) != self._ours:
            if found == self.row.original:
                log.info("%s of cgroup %s was put back to %r; it is set again", self.row.file, self.path, found)
                self._ours, self.budget_ns = "", 0
            else:
                self._taken = True
        return self._taken

    def plan(self, budget_ns: int) -> QuotaRow:
        """For the journal, before `set` is asked for this: what is ours from then on, whether it is written or not."""
        return replace(self.row, written=self._text(budget_ns), before=self._ours)

    def set(self, budget_ns: int) -> int:
        """Make this the limit of every period; what is in force then (whole microseconds, at least a millisecond).

        Raises:
            BadStateError: somebody else has changed the limit since; it is left alone from now on.
            GoneError: the cgroup was removed.
            FailedError: the kernel refuses; the old limit stays in force, and the text says why.
            DeniedError: deadlined may not write it.
        """
        if self.taken():
            self.budget_ns = 0
            raise BadStateError(
                f"somebody else changed {self.row.file} of cgroup {self.path} to {self._read()!r}, and deadlined "
                "leaves that alone; detach and attach it again"
            )
        text = self._text(budget_ns)
        try:
            cgroup.write_at(self._group, self.row.file, text)
        except OSError as error:
            raise self._refused(error, text) from error
        self._ours, self.budget_ns = self._read(), _taken_as(budget_ns)
        return self.budget_ns

    def restore(self) -> bool:
        """Write back what stood there, if what is there now is ours. Whether it did. Raises as `set`."""
        try:
            ours = not self.taken() and bool(self._ours)
            if ours:
                cgroup.write_at(self._group, self.row.file, self.row.original)
        except GoneError:
            ours = False
        except OSError as error:
            raise self._refused(error, self.row.original) from error
        self._ours, self.budget_ns = "", 0
        return ours

    def close(self) -> None:
        """Restores nothing. Idempotent."""
        for fd in (self._stat, self._group):
            if fd >= 0:
                os.close(fd)
        self._stat = self._group = -1

    def _text(self, budget_ns: int) -> str:
        return str(cgroup.Quota(_taken_as(budget_ns) // _NS_PER_US, self.row.period_ns // _NS_PER_US))

    def _read(self) -> str:
        try:
            return procfs.read_at(self._group, self.row.file).decode("ascii", errors="replace").strip()
        except OSError as error:
            raise self._gone(error) from error

    def _gone(self, error: OSError) -> OSError | GoneError:
        return GoneError(f"cgroup {self.path} was removed") if cgroup.is_gone(error) else error

    def _refused(self, error: OSError, text: str) -> FailedError | DeniedError | GoneError:
        what = f"{self.row.file} of cgroup {self.path} can't be set to {text!r}"
        if cgroup.is_gone(error):
            return GoneError(f"cgroup {self.path} was removed")
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return DeniedError(f"{what}: {error.strerror}; deadlined needs root, and cgroups that it may write")
        if error.errno == errno.EINVAL and (burst := self._burst_us()):
            return FailedError(f"{what}: its cpu.max.burst ({burst} us) is more than that; write 0 to it")
        if error.errno in {errno.EBUSY, errno.EINVAL} and self.row.file == Actuator.CPU_RT_MAX.value:
            return FailedError(f"{what}: {error.strerror}; a cgroup above it has not that much real-time budget left")
        return FailedError(f"{what}: {error.strerror}", retryable=procfs.is_exhausted(error))

    def _burst_us(self) -> int:
        try:
            return int(procfs.read_at(self._group, "cpu.max.burst"))
        except (OSError, ValueError):
            return 0


def _taken_as(budget_ns: int) -> int:
    return max(round(budget_ns / _NS_PER_US) * _NS_PER_US, QUOTA_MIN_NS)


def open_group(
    path: str,
    *,
    actuator: Actuator,
    period_ns: int,
    seen: Sequence[Hierarchy] | None = None,
    clock: Clock | None = None,
) -> Group:
    """Look at a cgroup that is to be held by its own limit; nothing is written. ``seen``: `cgroup.hierarchies()`.

    Args:
        path: below the mount of cgroup v2, ``/`` first.
        actuator: `Actuator.CPU_MAX` or `Actuator.CPU_RT_MAX`.
        period_ns: 1 ms to 1 s, whole microseconds.

    Raises:
        BadRequestError: the period is one that the kernel does not take.
        GoneError: there is no such cgroup.
        DeniedError: it is the root, or has init or deadlined in it.
        UnsupportedError: this host has no such limit there; the text says why, and what would change that.
        OSError: no descriptor is left.
    """
    if not PERIOD_MIN_NS <= period_ns <= PERIOD_MAX_NS or period_ns % _NS_PER_US:
        raise BadRequestError(
            f"policy.period_ns: {actuator.value} takes a period of 1 ms to 1 s in whole microseconds, "
            f"not {period_ns / NS_PER_MS:g} ms"
        )
    seen = cgroup.hierarchies() if seen is None else seen
    mounted = cgroup.unified(seen)
    if mounted is None:
        raise UnsupportedError(f"{actuator.value} needs cgroup v2, which is not mounted; mount it at /sys/fs/cgroup")
    if why := why_not(mounted, path):
        raise DeniedError(why)
    directory = mounted.directory(path)
    try:
        group = cgroup.open_group(directory)
    except OSError as error:
        if cgroup.is_gone(error):
            raise GoneError(f"cgroup {path} does not exist in cgroup v2 ({mounted.mount})") from None
        raise
    try:
        found = os.fstat(group)
        row = QuotaRow(
            directory=directory,
            device=found.st_dev,
            inode=found.st_ino,
            file=actuator.value,
            original=procfs.read_at(group, actuator.value).decode("ascii", errors="replace").strip(),
            period_ns=period_ns,
        )
    except OSError as error:
        os.close(group)
        if error.errno == errno.ENOENT:
            raise UnsupportedError(_missing(path, actuator, mounted, seen)) from None
        raise
    return Group(group, row=row, path=path, clock=clock or SystemClock())


def _missing(path: str, actuator: Actuator, mounted: Hierarchy, seen: Sequence[Hierarchy]) -> str:
    """Why a cgroup has no such file."""
    if actuator is Actuator.CPU_RT_MAX:
        return "this kernel has no cpu.rt.max (no released one has); use cpu.max, or deadline for each thread"
    if any("cpu" in one.controllers for one in seen):
        return (
            "the cpu controller is cgroup v1's on this host, and cpu.max is version 2's; boot with "
            "systemd.unified_cgroup_hierarchy=1 or cgroup_no_v1=cpu, or use the actuator deadline"
        )
    if cgroup.of_controller(seen, "cpu") is None:
        return "this kernel has no cpu controller in cgroup v2 (CONFIG_CGROUP_SCHED, CONFIG_CFS_BANDWIDTH)"
    above = mounted.directory(os.path.dirname(path))  # noqa: PTH120 - a cgroup's path
    return (
        f"cgroup {path} has no cpu.max, as the one above it does not pass the cpu controller on; if systemd made it: "
        f"systemctl set-property {os.path.basename(path)} CPUWeight=100; else write +cpu to "  # noqa: PTH119
        f"{above}/cgroup.subtree_control"
    )


def restore(row: QuotaRow) -> bool:
    """Put right what a killed deadlined left, by its journal. Whether something of ours was there.

    A cgroup that was removed, or made again, has nothing of ours; a limit that we did not write is somebody else's.

    Raises:
        OSError: the kernel refuses, or no descriptor is left.
    """
    try:
        group = cgroup.open_group(row.directory)
    except OSError as error:
        if cgroup.is_gone(error) or error.errno == errno.ENOTDIR:
            return False
        raise
    try:
        found = os.fstat(group)
        if (found.st_dev, found.st_ino) != (row.device, row.inode):
            return False
        text = procfs.read_at(group, row.file).decode("ascii", errors="replace").strip()
        ours = [cgroup.parse_cpu_max(one) for one in (row.written, row.before) if one]
        if cgroup.parse_cpu_max(text) not in ours or text == row.original:
            return False
        cgroup.write_at(group, row.file, row.original)
    except ValueError:
        return False
    except OSError as error:
        if cgroup.is_gone(error):
            return False
        raise
    finally:
        os.close(group)
    return True
