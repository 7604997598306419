"""A guest's QEMU as a transient systemd unit: systemd owns the process, and vmand's end does not touch it.

Property names are those of systemd.exec(5), systemd.resource-control(5), systemd.service(5) and systemd.kill(5).
"""

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgehold.errors import FailedError, TimedOutError
from vmand.backend.confinement import Limits
from vmand.backend.process import Process, end_child, start_ticks
from vmand.backend.rundir import last_line
from vmand.model import Record

log = logging.getLogger(__name__)

_SYSTEMD_TIMEOUT_S = 30.0
_LOOKS, _LOOK_EVERY_S = 250, 0.02

_ALWAYS = (
    "KillMode=mixed",
    "SendSIGHUP=no",
    "TimeoutStopSec=10s",
    "OOMPolicy=kill",
    "UMask=0077",
    "NoNewPrivileges=yes",
    # Only what setpriv needs to give up the rest; QEMU has none.
    "CapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_SETPCAP",
    # What it can see of the file system is what Debian ships; it can write nowhere but where BindPaths= says.
    "ProtectSystem=strict",
    "ProtectHome=tmpfs",
    "PrivateTmp=yes",
    "ReadOnlyPaths=/tmp /var/tmp -/home -/root -/run/user",
    "TemporaryFileSystem=/run:ro",
    "TemporaryFileSystem=/dev/shm:ro",
    "PrivateDevices=yes",
    "PrivateNetwork=yes",
    "PrivateIPC=yes",
    "IPAddressDeny=any",
    "RestrictAddressFamilies=AF_UNIX",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "ProtectProc=invisible",
    "ProcSubset=pid",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",  # for itself: a reservation comes from outside
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "KeyringMode=private",
    # MemoryDenyWriteExecute= is left out: emulation runs code that it has written. PrivateUsers= is left out: the
    # partition's user would not exist inside.
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged @resources @keyring",
    "SystemCallFilter=@setuid capset seccomp",  # what setpriv and QEMU's own filter take to lose rights
    "SystemCallErrorNumber=EPERM",
    "LimitCORE=0",
    "LimitMSGQUEUE=0",
    "LimitRTPRIO=0",
)


_HIDDEN = ("/boot", "/media", "/mnt", "/srv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a unit runs and what it is given."""

    slice_name: str
    cpus: Collection[int]
    """Its affinity."""
    allowed: Collection[int] = ()
    """Its cpuset (``AllowedCPUs=``), where the unit's own cgroup becomes a cpuset partition."""
    delegate: bool = False
    """vmand makes cgroups below the unit's."""
    writable: Sequence[Path]
    """Directories and files that exist for it and that it may write to."""
    log_file: Path


def unit_name(record: Record) -> str:
    """The unit of a run: made of what the intent holds, so that it is known before systemd is asked for it."""
    return f"vmand-p-{record.id}-{record.run[:8]}.service"


def properties(place: Place, bounds: Limits, *, uid: int | None) -> list[str]:
    """The unit's properties, one ``NAME=value`` each."""
    # Nothing can be mounted below what is inaccessible, and huge pages may be mounted below /mnt.
    hidden = [one for one in _HIDDEN if not any(path.is_relative_to(one) for path in place.writable)]
    made = [
        *_ALWAYS,
        f"InaccessiblePaths={' '.join(f'-{one}' for one in hidden)}",
        f"StandardOutput=append:{place.log_file}",
        f"StandardError=append:{place.log_file}",
        f"CPUAffinity={_list(place.cpus)}",
        f"TasksMax={bounds.threads}",
        f"LimitNOFILE={bounds.open_files}",
        f"LimitFSIZE={'infinity' if bounds.file_bytes is None else bounds.file_bytes}",
        f"LimitMEMLOCK={bounds.locked_bytes}",
        # The guest's memory does not count here: pages of a tmpfs count for who touched them first, and that was vmand.
        f"MemoryMax={bounds.own_bytes}",
        *(f"BindPaths={_quoted(path)}" for path in place.writable),
    ]
    if uid is not None:  # the number of processes counts for a user as a whole
        made.append(f"LimitNPROC={bounds.threads}")
    if place.allowed:
        made.append(f"AllowedCPUs={_list(place.allowed)}")
    if place.delegate:
        made.append("Delegate=yes")
    return made


def device(path: Path) -> list[str]:
    """What lets a unit use a device of the host."""
    return [f"BindPaths={path}", f"DeviceAllow={path} rw"]


def _list(cpus: Collection[int]) -> str:
    return " ".join(map(str, sorted(cpus)))


def _quoted(path: Path) -> str:
    """A path among the colons of BindPaths= (systemd.syntax(7), QUOTING)."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


async def spawn_unit(
    argv: Sequence[str], *, run: str, unit: str, slice_name: str, given: Sequence[str], uid: int | None, log_file: Path
) -> Process:
    """Start a transient unit and wait until its process is the QEMU of this run.

    Raises:
        FailedError: systemd refused, or the process ended at once; the text has its words.
        TimedOutError: systemd does not answer.
    """
    await _output(
        "systemd-run",
        "--quiet",
        "--collect",
        "--service-type=exec",  # returns after the exec, so that the command line can be verified
        f"--unit={unit}",
        f"--slice={slice_name}",
        *(f"--property={one}" for one in given),
        "--",
        argv[0],
        # systemd replaces $NAME in the arguments of a command (systemd.service(5), COMMAND LINES); a $ is written $$.
        *(one.replace("$", "$$") for one in argv[1:]),
    )
    text = await _output("systemctl", "show", "--property=MainPID", "--value", unit)
    pid = int(text) if text.isdigit() else 0
    for _ in range(_LOOKS):  # see `Process.of_child`: setpriv first has to become QEMU's user
        process = Process.open(pid, run, unit=unit, uid=uid) if pid else None
        if process is not None or not start_ticks(pid):
            break
        await asyncio.sleep(_LOOK_EVERY_S)
    if process is None:
        raise FailedError(f"QEMU ended at once{last_line(log_file)}; journalctl -u {unit} may say more")
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
