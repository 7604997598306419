"""A guest's process: found again by who it is, ended only after that is verified.

Identity is pid, start time and the run's uuid in the command line. Signals go through a pidfd (pidfd_open(2)), so that
a pid that came back can't be hit. A guest that took its QEMU over can write another command line: where the process has
a user of its own, start time and user are enough, and what else that user has is found by the user alone.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import select
import signal
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgehold.errors import FailedError, TimedOutError

_KILL_TIMEOUT_S = 20.0
_REAP_S = 2.0
_LOOK_EVERY_S = 0.02
_EXEC_LOOKS, _EXEC_LOOK_S = 6, 0.002
_PF_KTHREAD = 0x00200000
# How often a user's processes are stopped before they are killed: each round finds what was forked during the last.
_STOP_ROUNDS = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that can't be mistaken for another."""

    pid: int
    start_ticks: int
    unit: str = ""
    uid: int | None = None
    """The user that no other process has; None where it runs as vmand's own."""


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None where there is no such process. The name in field 2 may hold anything."""
    fields = _proc(pid, "stat").rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else None


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty for a dead one."""
    return _proc(pid, "cmdline").decode(errors="replace").split("\0")[:-1]


def _proc(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty where there is no such process.

    Raises:
        FailedError: it can't be told, for example because no file descriptor is left.
    """
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    except OSError as error:
        raise FailedError(f"/proc/{pid}/{name}: {error.strerror}") from error


def _pids() -> list[int]:
    try:
        return [int(one) for one in os.listdir("/proc") if one.isdigit()]  # noqa: PTH208 - names are enough
    except OSError as error:
        raise FailedError(f"/proc: {error.strerror}") from error


def run_of(argv: Sequence[str]) -> str:
    """The run's uuid in a QEMU command line, or nothing."""
    for option, value in itertools.pairwise(argv):
        if option == "-uuid":
            return value
    return ""


def find(own: str) -> list[tuple[int, str]]:
    """(pid, run) of every process whose command line names the text ``own`` and a run.

    A process that is just then in execve(2) shows none: it is looked at again, for some milliseconds.
    """
    found = []
    pids = [pid for pid in _pids() if pid != os.getpid()]
    for _ in range(_EXEC_LOOKS):
        unsaid = []
        for pid in pids:
            argv = arguments(pid)
            if (run := run_of(argv)) and any(own in one for one in argv):
                found.append((pid, run))
            elif not argv and _has_program(pid):
                unsaid.append(pid)
        if not unsaid:
            break
        time.sleep(_EXEC_LOOK_S)
        pids = unsaid
    return found


def _has_program(pid: int) -> bool:
    """Whether it lives and is no thread of the kernel (field 9 of /proc/PID/stat; linux/sched.h, PF_KTHREAD)."""
    fields = _proc(pid, "stat").rpartition(b")")[2].split()
    return len(fields) > 6 and fields[0] not in {b"Z", b"X"} and not int(fields[6]) & _PF_KTHREAD


def users(pid: int) -> frozenset[int]:
    """Real, effective, saved and file system uid of a process; empty for one that has ended.

    Not the owner of /proc/PID, which is root's for a process that forbids to dump it (proc(5)).
    """
    fields = {line.partition(b":")[0]: line.split()[1:] for line in _proc(pid, "status").splitlines()}
    # A process whose first thread alone has ended is a zombie too, but its other threads run.
    over = fields.get(b"State", [b"X"])[0] in {b"Z", b"X"} and int(fields.get(b"Threads", [b"0"])[0]) <= 1
    return frozenset() if over else frozenset(map(int, fields.get(b"Uid", ())))


def of_users(wanted: Container[int]) -> list[tuple[int, int]]:
    """(pid, uid) of every living process of one of these users. Some ten microseconds a process of the host."""
    return [(pid, uid) for pid in _pids() for uid in users(pid) if uid in wanted]


def of_user(uid: int) -> list[int]:
    """The living processes of a user."""
    return [pid for pid, _uid in of_users((uid,))]


async def end_user(uid: int) -> int:
    """SIGKILL to whatever a user of our own has; how many processes that were. Idempotent.

    All are stopped first, until a look finds no new one, so that none of them forks while the others are killed.

    Raises:
        TimedOutError: some are still there.
    """
    if uid in {0, os.geteuid()}:
        raise ValueError(f"uid {uid} is not a partition's own")
    ended: set[int] = set()
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while pids := of_user(uid):
        stopped: set[int] = set()
        for _ in range(_STOP_ROUNDS):
            if not (new := set(pids) - stopped):
                break
            for pid in new:
                _signal(pid, uid, signal.SIGSTOP)
            stopped |= new
            pids = of_user(uid)
        for pid in stopped.union(pids):
            _signal(pid, uid, signal.SIGKILL)
        ended |= stopped
        if time.monotonic() > deadline:
            raise TimedOutError(
                f"uid {uid} still has {len(pids)} processes {_KILL_TIMEOUT_S:g} s after SIGKILL; "
                f"the first is {pids[0] if pids else '-'}"
            )
        await asyncio.sleep(_LOOK_EVERY_S)
    return len(ended)


def _signal(pid: int, uid: int, number: signal.Signals) -> None:
    """To this process, if it is still the user's."""
    fd = _pidfd(pid)
    if fd < 0:
        return
    try:
        if uid in users(pid):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
    finally:
        os.close(fd)


def _pidfd(pid: int) -> int:
    """pidfd_open(2); -1 where there is no such process."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in {errno.ESRCH, errno.EINVAL}:
            return -1
        raise FailedError(f"process {pid} can't be watched: {error.strerror}") from error


def _over(fd: int) -> bool:
    """Whether all threads of a pidfd's process have ended, waited for or not."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class Process:
    """A verified process, held by its pidfd."""

    def __init__(self, identity: Identity, fd: int) -> None:
        self.identity = identity
        self._fd = fd
        self._ended = asyncio.Event()
        self._status: int | None = None
        self._callbacks: list[Callable[[], None]] = []
        asyncio.get_running_loop().add_reader(fd, self._on_end)

    @classmethod
    def open(
        cls, pid: int, run: str, *, started: int | None = None, unit: str = "", uid: int | None = None
    ) -> "Process | None":
        """The process, or None where it has ended or is not the one of this run.

        ``uid``: the user that it has of its own; with ``started`` it stands for the command line.

        Raises:
            FailedError: it can't be told (no file descriptor is left); then nothing is known of the process.
        """
        fd = _pidfd(pid) if pid > 0 else -1
        if fd < 0:
            return None
        # Verified after the pidfd was opened: what it holds now is what it holds for ever.
        try:
            ticks, argv, who = start_ticks(pid), arguments(pid), users(pid)
            verified = not _over(fd) and ticks is not None and started in {None, ticks} and bool(run)
        except FailedError:
            os.close(fd)
            raise
        own = uid if uid not in {0, os.geteuid()} else None
        known = run_of(argv) == run or (own is not None and started is not None)
        if ticks is None or not verified or not known or (own is not None and own not in who):
            os.close(fd)
            return None
        return cls(Identity(pid, ticks, unit, own), fd)

    @classmethod
    def of_child(cls, pid: int, *, uid: int | None = None) -> "Process":
        """A child that was started just now. Until it is waited for its pid can't be another's; its command line does
        not tell yet, because a parent goes on before the kernel has set it, nor does its user."""
        try:
            fd = _pidfd(pid)
        except FailedError:
            os.kill(pid, signal.SIGKILL)  # nobody could watch it
            os.waitpid(pid, 0)
            raise
        return cls(Identity(pid, start_ticks(pid) or 0, uid=uid), fd)

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def cause(self) -> str:
        """How it ended, as far as the kernel tells us: only a parent is told."""
        if self._status is None:
            return "its process ended"
        if os.WIFSIGNALED(self._status):
            number = os.WTERMSIG(self._status)
            return f"its process was killed by {signal.Signals(number).name}"
        return f"its process ended with status {os.WEXITSTATUS(self._status)}"

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call it once, when the process has ended."""
        self._callbacks.append(callback)

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Until it has ended; False when the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone.

        Raises:
            TimedOutError: the kernel does not let it go (it hangs in a device).
        """
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        if not await self.wait(_KILL_TIMEOUT_S):
            raise TimedOutError(f"process {self.identity.pid} did not end within {_KILL_TIMEOUT_S:g} s of SIGKILL")

    def close(self) -> None:
        """Stop watching; the process lives on."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        with contextlib.suppress(ChildProcessError):  # an earlier vmand was its parent
            pid, status = os.waitpid(self.identity.pid, os.WNOHANG)
            self._status = status if pid else None
        self._ended.set()
        for callback in self._callbacks:
            callback()


async def end_child(process: asyncio.subprocess.Process) -> None:
    """SIGKILL, and a moment's wait. One that hangs in the kernel may outlive it; asyncio reaps it when it ends."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAP_S):
                await process.wait()
