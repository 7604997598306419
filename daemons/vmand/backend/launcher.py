"""A guest's process: started outside vmand's own life, found again by who it is, ended only after that is verified.

Where systemd runs, a transient unit; else a process of its own session. Identity is pid, start time and the run's uuid
in the command line; signals go through a pidfd (pidfd_open(2)), so that a pid that came back can't be hit.
"""

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import signal
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgehold.errors import FailedError, SettingsError, TimedOutError

log = logging.getLogger(__name__)

SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
_KILL_TIMEOUT_S = 20.0
_SYSTEMD_TIMEOUT_S = 30.0
_REAP_S = 2.0
_LOOKS, _LOOK_EVERY_S = 50, 0.02
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that can't be mistaken for another."""

    pid: int
    start_ticks: int
    unit: str = ""


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


def run_of(argv: Sequence[str]) -> str:
    """The run's uuid in a QEMU command line, or nothing."""
    for option, value in itertools.pairwise(argv):
        if option == "-uuid":
            return value
    return ""


def find(own: str) -> list[tuple[int, str]]:
    """(pid, run) of every process whose command line names the text ``own`` and a run."""
    found = []
    try:
        entries = os.listdir("/proc")  # noqa: PTH208 - names are enough
    except OSError as error:
        raise FailedError(f"/proc: {error.strerror}") from error
    for entry in entries:
        if entry.isdigit() and int(entry) != os.getpid():
            argv = arguments(int(entry))
            if (run := run_of(argv)) and any(own in one for one in argv):
                found.append((int(entry), run))
    return found


def _pidfd(pid: int) -> int:
    """pidfd_open(2); -1 where there is no such process."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in {errno.ESRCH, errno.EINVAL}:
            return -1
        raise FailedError(f"process {pid} can't be watched: {error.strerror}") from error


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
    def open(cls, pid: int, run: str, *, started: int | None = None, unit: str = "") -> "Process | None":
        """The process, or None where it does not exist or is not the one of this run.

        Raises:
            FailedError: it can't be told (no file descriptor is left); then nothing is known of the process.
        """
        fd = _pidfd(pid)
        if fd < 0:
            return None
        # Verified after the pidfd was opened: what it holds now is what it holds for ever.
        try:
            ticks, argv = start_ticks(pid), arguments(pid)
        except FailedError:
            os.close(fd)
            raise
        if ticks is None or started not in {None, ticks} or not run or run_of(argv) != run:
            os.close(fd)
            return None
        return cls(Identity(pid, ticks, unit), fd)

    @classmethod
    def of_child(cls, pid: int) -> "Process":
        """A child that was started just now. Until it is waited for its pid can't be another's; its command line does
        not tell yet, because a parent goes on before the kernel has set it."""
        try:
            fd = _pidfd(pid)
        except FailedError:
            os.kill(pid, signal.SIGKILL)  # nobody could watch it
            os.waitpid(pid, 0)
            raise
        return cls(Identity(pid, start_ticks(pid) or 0), fd)

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


def check_launcher(setting: str) -> None:
    """Refuse a launcher that this host does not have.

    Raises:
        SettingsError: names the cure.
    """
    if setting == "systemd" and not SYSTEMD.is_dir():
        raise SettingsError(f"launcher: systemd does not run here (no {SYSTEMD}); set it to auto or process")


def use_systemd(setting: str) -> bool:
    """Whether guests become units."""
    return setting == "systemd" or (setting == "auto" and SYSTEMD.is_dir())


def spawn(argv: list[str], *, log_file: Path, cpus: Collection[int]) -> Process:
    """Start a process of its own session on these cores; its output goes to the file.

    Raises:
        FailedError: it could not be started.
    """
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log_file), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    own = os.sched_getaffinity(0)
    try:
        # A child inherits its parent's mask; this is one thread, and nothing runs in between.
        os.sched_setaffinity(0, cpus)
        pid = os.posix_spawnp(
            argv[0], argv, _ENVIRONMENT, file_actions=actions, setsid=True, setsigmask=(), setsigdef=(signal.SIGPIPE,)
        )
    except OSError as error:
        raise FailedError(f"{argv[0]} can't be started: {error.strerror}; is it installed?") from error
    finally:
        os.sched_setaffinity(0, own)
    return Process.of_child(pid)


async def spawn_unit(
    argv: Sequence[str], *, run: str, log_file: Path, cpus: Collection[int], unit: str, slice_name: str
) -> Process:
    """Start a transient systemd unit: systemd owns the process, and vmand's end does not touch it.

    Raises:
        FailedError: systemd refused; the text has its words.
    """
    properties = [
        "KillMode=mixed",
        "SendSIGHUP=no",
        f"StandardOutput=append:{log_file}",
        f"StandardError=append:{log_file}",
        f"CPUAffinity={' '.join(map(str, sorted(cpus)))}",
    ]
    await _output(
        "systemd-run",
        "--quiet",
        "--collect",
        "--service-type=exec",  # returns after the exec, so that the command line can be verified
        f"--unit={unit}",
        f"--slice={slice_name}",
        *(f"--property={one}" for one in properties),
        "--",
        argv[0],
        # systemd replaces $NAME in the arguments of a command (systemd.service(5), COMMAND LINES); a $ is written $$.
        *(one.replace("$", "$$") for one in argv[1:]),
    )
    text = await _output("systemctl", "show", "--property=MainPID", "--value", unit)
    pid = int(text) if text.isdigit() else 0
    for _ in range(_LOOKS):  # see `Process.of_child`
        process = Process.open(pid, run, unit=unit) if pid else None
        if process is not None or not start_ticks(pid):
            break
        await asyncio.sleep(_LOOK_EVERY_S)
    if process is None:
        raise FailedError(f"{argv[0]} ended at once{last_line(log_file)}; journalctl -u {unit} may say more")
    return process


async def stop_unit(unit: str) -> None:
    """Stop a unit, also one that is only about to start. One that does not exist is stopped.

    Raises:
        TimedOutError: systemd does not answer.
    """
    try:
        await _output("systemctl", "stop", unit)
    except FailedError as error:
        log.debug("%s: %s", unit, error)


def last_line(log_file: Path) -> str:
    """The last line of a log as the end of a sentence."""
    try:
        with log_file.open("rb") as file:
            file.seek(max(0, log_file.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f": {lines[-1][:300]}" if lines else ""


async def end_child(process: asyncio.subprocess.Process) -> None:
    """SIGKILL, and a moment's wait. One that hangs in the kernel may outlive it; asyncio reaps it when it ends."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAP_S):
                await process.wait()


async def _output(*argv: str) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        raise FailedError(f"{argv[0]} can't be started: {error.strerror}; is systemd installed?") from error
    try:
        async with asyncio.timeout(_SYSTEMD_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise TimedOutError(f"{argv[0]} did not end within {_SYSTEMD_TIMEOUT_S:g} s; does systemd answer?") from None
    finally:
        await end_child(process)
    if process.returncode:
        raise FailedError(f"{argv[0]} failed: {err.decode(errors='replace').strip()[:300]}")
    return out.decode().strip()
