"""Every deadline thread's counters by one read of the kernel's own list, without a descriptor a thread.

A BPF program (ext/bpf.c) walks all threads and gives a record for each in SCHED_DEADLINE. The numbers are those of
schedstat and as old (a tick, for a running thread). It costs less than half of what reading their files does, but looks
at every thread of the host: see `pays`. It needs privilege and a kernel that describes itself, so `Sampler` stays for
where it is refused; the refusal says why. It only reads; what a number means for a reservation is decided elsewhere.

A thread is named by tid and start here too: `TaskRecord.start_ticks` is what proc_pid_stat(5) calls starttime. One that
is missing from a pass has ended, is in another policy now, or was passed by: look, before you conclude.
"""

import errno
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from edgehold.errors import UnsupportedError
from edgehold.kernel import native_bpf
from edgehold.kernel.procfs import PROC

# PROC_PID_INIT_INO and PROC_USER_INIT_INO of include/linux/proc_ns.h: the same on every host.
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD
# include/uapi/linux/capability.h; CAP_SYS_ADMIN stands for both (capabilities(7)).
_CAP_SYS_ADMIN = 21
_NEEDED = {"CAP_BPF": 39, "CAP_PERFMON": 38}
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
# fs/proc/array.c: the letters of the lowest bits of a state, and the bits behind them that are shown as another one.
_LETTERS = "RSDTtXZPI"
_REPORTED = 0x7F
_IDLE = 0x402
_LOOKS_LIKE_D = 0x9000
# TASK_DEAD: the last state of a thread; until its parent has looked proc(5) calls it a zombie.
_DEAD = 0x80
# proc_pid_stat(5) has starttime in clock ticks; USER_HZ is 100 on x86 and arm64.
_TICK_NS = 10_000_000
_CURES = {
    errno.ENOENT: "this kernel does not describe its types: it needs CONFIG_DEBUG_INFO_BTF=y, and a mounted /sys",
    errno.EPROTO: "this kernel describes its types in a way that this version does not know",
    errno.ENOTSUP: "this kernel has no iterators over threads (Linux 5.8), or is one that this version does not know",
    errno.ENOSYS: "the kernel is built without CONFIG_BPF_SYSCALL, or a seccomp filter hides bpf(2)",
}
_FIRST_SIZE = 256
# PID_MAX_LIMIT: a host never has more threads.
_MAX_SIZE = 1 << 22


class TaskRecord(NamedTuple):
    """One thread in SCHED_DEADLINE, times in nanoseconds; the counters count since it began."""

    tid: int
    state: str
    """The letter of proc_pid_stat(5): R runs or wants to (throttled included), Z and X are over."""
    start_ticks: int
    """Clock ticks since boot, as proc_pid_stat(5) has them outside of time namespaces."""
    executed_ns: int
    run_delay_ns: int
    timeslices: int
    dl_runtime_ns: int
    """What is left of the budget, as old as the last tick; 0 and less: used up."""
    throttled: bool
    """Never true where `TaskIterator.knows_throttled` is false."""


class TaskBuffer:
    """What a pass read, in memory that C and Python share. Grows, never shrinks; use it again for the next pass."""

    def __init__(self, size: int = _FIRST_SIZE) -> None:
        """``size``: how many records it has room for at first, from 1."""
        self.raw = native_bpf.TaskRecords(size)

    @property
    def pointer(self) -> Any:
        """``struct eh_task *`` of ext/bpf_cdef.h, for the extension alone; another one once the buffer has grown."""
        return self.raw.pointer

    @property
    def count(self) -> int:
        """How many records the last pass read; 0 after one that failed."""
        return self.raw.count

    def records(self) -> list[TaskRecord]:
        """The records as Python has them: for tests and tools, not for every cycle."""
        return [
            TaskRecord(
                tid=one.tid,
                state=state_letter(one.state),
                start_ticks=one.start_boottime_ns // _TICK_NS,
                executed_ns=one.executed_ns,
                run_delay_ns=one.run_delay_ns,
                timeslices=one.timeslices,
                dl_runtime_ns=one.dl_runtime_ns,
                throttled=one.throttled,
            )
            for one in self.raw
        ]


class TaskIterator:
    """A loaded program. `open` it; use it as a context manager, or `close` it. Two descriptors while it is open."""

    def __init__(self, bpf: native_bpf.Bpf) -> None:
        self._bpf: native_bpf.Bpf | None = bpf

    @classmethod
    def open(cls) -> Self:
        """Read the kernel's description of itself (5 MB, some milliseconds) and load the program.

        Only this needs CAP_BPF and CAP_PERFMON; `read` needs no privilege.

        Raises:
            UnsupportedError: this kernel, or this process, can't have it; the text says why and what would change it.
            OSError: EMFILE, ENFILE, ENOMEM: this host is short of something at the moment.
        """
        if why := _elsewhere():
            raise UnsupportedError(why)
        try:
            return cls(native_bpf.Bpf())
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                raise
            raise UnsupportedError(_explain(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def knows_throttled(self) -> bool:
        """Whether this kernel tells `TaskRecord.throttled`."""
        return self._open().knows_throttled

    def read(self, buffer: TaskBuffer) -> int:
        """One pass over all threads of the host: how many are in SCHED_DEADLINE. Their records are in ``buffer``.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM: this host is short of something; EBADF: it is closed.
        """
        bpf = self._open()
        while True:
            try:
                bpf.read(buffer.raw)
            except OSError as error:
                if error.errno != errno.ENOSPC or buffer.raw.size >= _MAX_SIZE:
                    raise
                buffer.raw.grow(min(2 * buffer.raw.size, _MAX_SIZE))
            else:
                return buffer.count

    def close(self) -> None:
        """Unload the program. Closing twice does nothing."""
        if self._bpf is not None:
            self._bpf.close()
            self._bpf = None

    def _open(self) -> native_bpf.Bpf:
        if self._bpf is None:
            raise OSError(errno.EBADF, "the iterator over threads is closed")
        return self._bpf


def host_threads() -> int:
    """How many threads the host has, of whatever policy (proc_loadavg(5)); 0 where that can't be told."""
    try:
        text = (PROC / "loadavg").read_text(encoding="ascii")
        return int(text.split()[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return 0


def pays(*, held: int, threads: int) -> bool:
    """Whether a pass over ``threads`` costs less than reading the files of the ``held`` ones.

    A pass looks at each thread of the host, whoever's it is, at four tenths of the price of one file (docs/adr/0005).
    """
    return 5 * held >= 2 * threads


def state_letter(state: int) -> str:
    """The letter that proc_pid_stat(5) has for the kernel's state bits (task_state_index of include/linux/sched.h)."""
    if state & _IDLE == _IDLE:
        return "I"
    if state == _DEAD:
        return "Z"
    if state & _LOOKS_LIKE_D:
        return "D"
    return _LETTERS[(state & _REPORTED).bit_length()]


def _elsewhere() -> str:
    """Why the thread ids of the kernel's list would not be ours, or an empty text."""
    try:
        own = (PROC / "self/ns/pid").stat().st_ino
    except OSError as error:
        return f"can't tell whether this is the host's pid namespace ({error}): the list has the host's thread ids"
    if own == _INITIAL_PID_NAMESPACE:
        return ""
    return (
        "this process is not in the host's pid namespace, and the kernel's list has the host's thread ids: run it on "
        "the host, or in a container with the host's pid namespace"
    )


def _explain(error: OSError) -> str:
    """What an operator should know of a refusal."""
    said = (error.strerror or "").replace("\n", " | ")  # the verifier has several lines to say
    if error.errno == errno.EPERM:
        return f"{said}: {_denied()}"
    return f"{said}: {_CURES.get(error.errno or 0, 'the kernel does not take the program')}"


def _denied() -> str:
    if lacking := _lacking(_effective()):
        return (
            f"this process lacks {' and '.join(lacking)} (a unit's CapabilityBoundingSet= and AmbientCapabilities=, a "
            "container's --cap-add)"
        )
    if (PROC / "self/ns/user").stat().st_ino != _INITIAL_USER_NAMESPACE:
        return "its capabilities are those of a user namespace, and the kernel wants the host's (PrivateUsers=no)"
    return f"a seccomp filter (SystemCallFilter=bpf lets it pass), {_lockdown()} or a security module refuses it"


def _effective() -> int:
    """The effective capabilities as a mask (capabilities(7))."""
    for line in (PROC / "thread-self/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return int(line[7:], 16)
    return 0


def _lacking(effective: int) -> list[str]:
    if effective >> _CAP_SYS_ADMIN & 1:
        return []
    return [name for name, bit in _NEEDED.items() if not effective >> bit & 1]


def _lockdown() -> str:
    """The kernel's lockdown in words (kernel_lockdown(7))."""
    try:
        mode = _LOCKDOWN.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except OSError:
        mode = ""
    return f"lockdown ({mode})" if mode and mode != "none" else "lockdown"
