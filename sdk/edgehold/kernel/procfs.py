"""Facts about threads from /proc (proc(5)). A thread that ended in the middle is `GoneError`, never a parse error.

Every function reads one file. Other processes choose their own names, so nothing here splits on what a name may hold.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from edgehold.errors import NotFoundError

PROC = Path("/proc")
# PF_KTHREAD of include/linux/sched.h, in the flags of proc_pid_stat(5).
_KERNEL_THREAD = 0x0020_0000
# How reading a file of a task that ends goes wrong: no directory any more, or no task behind the open file.
_GONE = frozenset({errno.ENOENT, errno.ESRCH})
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE})


class GoneError(NotFoundError):
    """The thread or process does not exist (any more)."""


@dataclass(frozen=True, slots=True)
class ThreadStat:
    """A thread at one moment (proc_pid_stat(5))."""

    tid: int
    name: str
    state: str
    """One letter: R runs or wants to (throttled included), S and D sleep, T is stopped, Z and X are over."""
    kernel: bool
    """A thread of the kernel itself."""
    start_ticks: int
    """When it began, in clock ticks since boot: with the tid and the boot id it names this thread and no other."""

    @property
    def ended(self) -> bool:
        return self.state in {"Z", "X", "x"}


def is_gone(error: OSError) -> bool:
    """Whether an error of a system call or a read means that the task ended."""
    return error.errno in _GONE


def is_exhausted(error: OSError) -> bool:
    """Whether no file descriptor is left, in this process or on the host: a reason to wait, not to give up."""
    return error.errno in _EXHAUSTED


def read(path: str, what: str) -> bytes:
    """A whole file of a task. Raises `GoneError`; ``what`` is the task in its text."""
    try:
        return read_at(None, path)
    except OSError as error:
        if is_gone(error):
            raise GoneError(f"{what} does not exist (any more)") from None
        raise


def read_at(directory: int | None, name: str) -> bytes:
    """A whole file, by its name in an open directory (None: by its path). Raises `OSError`."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def parse_stat(data: bytes) -> ThreadStat:
    """The text of a stat file. The name is what stands between the first and the last parenthesis.

    Raises:
        ValueError: it is not such a text.
    """
    head, paren, tail = data.rpartition(b")")
    tid, begin, name = head.partition(b" (")
    fields = tail.split()
    # After the name: state is the 3rd field of the manual page, flags the 9th, starttime the 22nd.
    if not paren or not begin or len(fields) < 20:
        raise ValueError(f"not a /proc/<pid>/stat text: {data[:80]!r}")
    return ThreadStat(
        tid=int(tid),
        name=name.decode(errors="replace"),
        state=fields[0].decode(),
        kernel=bool(int(fields[6]) & _KERNEL_THREAD),
        start_ticks=int(fields[19]),
    )


def stat(tid: int) -> ThreadStat:
    """A thread's name, state and start. Raises `GoneError`; one that has ended but was not waited for is still read."""
    data = read(f"/proc/{tid}/task/{tid}/stat", f"thread {tid}")
    if not data:
        raise GoneError(f"thread {tid} does not exist (any more)")
    return parse_stat(data)


def process_of(tid: int) -> int:
    """The process (thread group) of a thread. Raises `GoneError`."""
    for line in read(f"/proc/{tid}/status", f"thread {tid}").splitlines():
        if line.startswith(b"Tgid:"):
            return int(line[5:])
    raise GoneError(f"thread {tid} does not exist (any more)")


def threads(pid: int) -> list[int]:
    """The threads of a process, in ascending order. Raises `GoneError`."""
    try:
        names = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - each cycle, and half the price of iterdir
    except OSError as error:
        if is_gone(error):
            raise GoneError(f"process {pid} does not exist (any more)") from None
        raise
    return sorted(int(name) for name in names)


def open_thread(tid: int, file: str) -> int:
    """A descriptor of one of a thread's files; it stays with this thread even if the id is used again.

    Raises:
        GoneError: no such thread.
        OSError: EMFILE, EACCES and the like.
    """
    try:
        return os.open(f"/proc/{tid}/task/{tid}/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if is_gone(error):
            raise GoneError(f"thread {tid} does not exist (any more)") from None
        raise


def parse_dl_runtime(data: bytes) -> int | None:
    """``dl.runtime`` of a sched file in nanoseconds, or None where the text has none."""
    for line in data.splitlines():
        name, colon, value = line.partition(b":")
        if colon and name.strip() == b"dl.runtime":
            try:
                return int(value)
            except ValueError:
                return None
    return None


def dl_runtime(tid: int) -> int | None:
    """What is left of a deadline thread's budget in nanoseconds; 0 and less: throttled, and by how much it overran.

    None where the kernel does not tell (no CONFIG_SCHED_DEBUG, or not a deadline thread). Costs about 0.1 ms: for
    decisions, not for every cycle.

    Raises:
        GoneError: it ended.
        OSError: no descriptor is left.
    """
    try:
        return parse_dl_runtime(read(f"/proc/{tid}/task/{tid}/sched", f"thread {tid}"))
    except OSError as error:
        if is_exhausted(error):
            raise
        return None  # EACCES under a hardened kernel: not told


def schedstat(fd: int) -> tuple[int, int]:
    """Executed and waited time of a thread in nanoseconds, through its open schedstat (`open_thread`).

    Raises:
        GoneError: it ended.
    """
    try:
        executed, waited, _slices = os.pread(fd, 64, 0).split()
    except OSError as error:
        if is_gone(error):
            raise GoneError("the thread ended") from None
        raise
    return int(executed), int(waited)


def boot_id() -> str:
    """This boot's identity: thread ids and start times mean nothing across it."""
    return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
