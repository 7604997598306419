"""Scheduling policies of threads: sched_setattr(2) and sched_getattr(2) with their rules and their errors.

SCHED_DEADLINE is never set without SCHED_FLAG_RESET_ON_FORK: without it every fork and pthread_create of the thread
fails with EAGAIN (sched(7)), which no program expects.
"""

import errno
import os
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from pathlib import Path

from edgehold.errors import DeniedError, EdgeholdError, FailedError, NoCapacityError
from edgehold.kernel import native
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_PERIOD_NS, DL_MIN_RUNTIME_NS
from edgehold.kernel.procfs import GoneError, is_gone


class Policy(IntEnum):
    """Scheduling policies (sched(7)) by the kernel's numbers."""

    OTHER = 0
    FIFO = 1
    RR = 2
    BATCH = 3
    IDLE = 5
    DEADLINE = 6
    EXT = 7


class Flag(IntFlag):
    """sched_flags (include/uapi/linux/sched.h)."""

    NONE = 0
    RESET_ON_FORK = 0x01
    RECLAIM = 0x02
    DL_OVERRUN = 0x04


_REAL_TIME = frozenset({Policy.FIFO, Policy.RR})
_NICE = frozenset({Policy.OTHER, Policy.BATCH})


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedAttr:
    """How a thread is scheduled. What a policy does not use is 0. Times in nanoseconds."""

    policy: Policy = Policy.OTHER
    flags: Flag = Flag.NONE
    nice: int = 0
    """-20 (most) to 19 (least)."""
    priority: int = 0
    """1 (least) to 99 (most), FIFO and RR only."""
    runtime_ns: int = 0
    """DEADLINE: the budget. OTHER and BATCH from 6.12 on: a slice of the thread's own, 0 for the system's."""
    deadline_ns: int = 0
    period_ns: int = 0

    @classmethod
    def deadline(cls, *, runtime_ns: int, period_ns: int) -> "SchedAttr":
        """A reservation whose relative deadline is its period."""
        return cls(
            policy=Policy.DEADLINE,
            flags=Flag.RESET_ON_FORK,
            runtime_ns=runtime_ns,
            deadline_ns=period_ns,
            period_ns=period_ns,
        )

    def __str__(self) -> str:
        if self.policy is Policy.DEADLINE:
            return f"SCHED_DEADLINE {self.runtime_ns} ns every {self.period_ns} ns"
        if self.policy in _REAL_TIME:
            return f"SCHED_{self.policy.name} priority {self.priority}"
        return f"SCHED_{self.policy.name}" + (f" nice {self.nice}" if self.policy in _NICE and self.nice else "")


SMALLEST = SchedAttr.deadline(runtime_ns=DL_MIN_RUNTIME_NS, period_ns=DL_MAX_PERIOD_NS)
"""The smallest share that the kernel takes: a step on the way out of SCHED_DEADLINE, never a place to stay."""


def to_raw(attr: SchedAttr) -> native.RawAttr:
    """As the kernel wants it; the one place through which every reservation goes, with RESET_ON_FORK added."""
    flags = attr.flags | (Flag.RESET_ON_FORK if attr.policy is Policy.DEADLINE else Flag.NONE)
    return native.RawAttr(
        policy=attr.policy,
        flags=flags,
        nice=attr.nice,
        priority=attr.priority,
        runtime_ns=attr.runtime_ns,
        deadline_ns=attr.deadline_ns,
        period_ns=attr.period_ns,
    )


def get(tid: int = 0) -> SchedAttr:
    """How a thread is scheduled; 0 is the calling one.

    Raises:
        GoneError: no such thread.
        OSError: EINVAL for a negative tid.
    """
    try:
        raw = native.sched_getattr(tid)
    except OSError as error:
        if is_gone(error):
            raise GoneError(f"thread {tid} does not exist (any more)") from None
        raise
    return SchedAttr(
        policy=Policy(raw.policy),
        flags=Flag(raw.flags & 0x07),  # utilisation clamps have setters of their own and stay as they are
        nice=raw.nice,
        priority=raw.priority,
        runtime_ns=raw.runtime_ns,
        deadline_ns=raw.deadline_ns,
        period_ns=raw.period_ns,
    )


def set_attr(tid: int, attr: SchedAttr) -> None:
    """Schedule a thread so; 0 is the calling one.

    Raises:
        GoneError: no such thread.
        OSError: EBUSY no admission bandwidth left, EPERM no privilege or pinned, EINVAL out of bounds; see `explain`.
    """
    try:
        native.sched_setattr(tid, to_raw(attr))
    except OSError as error:
        if is_gone(error):
            raise GoneError(f"thread {tid} does not exist (any more)") from None
        raise


def restore(tid: int, original: SchedAttr) -> None:
    """Give a thread that is not in SCHED_DEADLINE exactly what it had. Raises as `set_attr`.

    A slice that is read back may be the system's own or the thread's; it is set only where the system's differs, so
    that a thread without one does not get one.
    """
    set_attr(tid, without_slice(original))
    if original.policy in _NICE and original.runtime_ns and get(tid).runtime_ns != original.runtime_ns:
        set_attr(tid, original)


def without_slice(attr: SchedAttr) -> SchedAttr:
    """The same without a slice of its own (only OTHER and BATCH have one)."""
    return replace(attr, runtime_ns=0, deadline_ns=0, period_ns=0) if attr.policy is not Policy.DEADLINE else attr


def spans_online_cpus(tid: int) -> bool | None:
    """Whether a thread may run on every CPU that is online; None where that can't be told.

    A reservation needs an affinity that covers its root domain. Without exclusive cpusets that is all online CPUs;
    with them a smaller one may do, so this explains a refusal and does not foresee it.
    """
    try:
        online = cpu_list(Path("/sys/devices/system/cpu/online").read_text(encoding="ascii"))
        return os.sched_getaffinity(tid) >= online
    except OSError:
        return None


def cpu_list(text: str) -> set[int]:
    """``0-3,8`` as a set (cpuset(7), list format)."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def explain(error: OSError, tid: int, attr: SchedAttr) -> EdgeholdError:
    """A refused SCHED_DEADLINE in the user's terms, with the cure; the text begins with the errno's name."""
    share = f"{attr.runtime_ns / 1e6:g} ms every {attr.period_ns / 1e6:g} ms"
    if is_gone(error):
        return GoneError(f"thread {tid} does not exist (any more)")
    if error.errno == errno.EBUSY:
        return NoCapacityError(
            f"EBUSY: {share} for thread {tid} does not fit into the host's admission bandwidth; lower or detach "
            "another reservation (`deadlinectl list`, `deadlinectl capacity`). What was just given up comes back "
            "within about its own period"
        )
    if error.errno == errno.EPERM:
        return _explain_denied(tid)
    if error.errno == errno.EINVAL:
        return FailedError(
            f"EINVAL: the kernel does not take {share}; it wants {DL_MIN_RUNTIME_NS} ns <= budget <= period and "
            f"{DL_MIN_PERIOD_NS / 1e6:g} ms <= period <= {DL_MAX_PERIOD_NS / 1e6:g} ms "
            "(sysctl kernel.sched_deadline_period_{min,max}_us)"
        )
    if error.errno == errno.EAGAIN:
        return FailedError(
            f"EAGAIN: thread {tid} can't get a reservation at the moment (it is being created, or a limit of its "
            "process is reached: RLIMIT_NPROC); try again",
            retryable=True,
        )
    return FailedError(str(error))


def _explain_denied(tid: int) -> DeniedError:
    if spans_online_cpus(tid) is False:
        return DeniedError(
            f"EPERM: thread {tid} is pinned to some of the CPUs (taskset, cpuset, vcpupin), and the kernel gives "
            "reservations only to threads that may run on every CPU of their root domain; lift the pinning, or make "
            "its cpuset an exclusive one (cgroup v2: cpuset.cpus.partition = root)"
        )
    return DeniedError(
        f"EPERM: a reservation for thread {tid} needs CAP_SYS_NICE, and a cpuset that covers the thread's root "
        "domain; run as root or with AmbientCapabilities=CAP_SYS_NICE, and look at /proc/<tid>/cgroup"
    )
