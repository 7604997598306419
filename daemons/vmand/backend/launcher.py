"""How a guest's QEMU is started and ended: as a user of its own, confined, outside vmand's own life.

Where systemd runs, a transient unit; else a process of its own session, which has the user, the limits and the lost
privileges of a unit but sees the host's file system, devices and network as that user does.
"""

import contextlib
import dataclasses
import logging
import os
import resource
import shutil
import signal
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from edgehold.errors import FailedError, SettingsError
from vmand.backend.command import LOG
from vmand.backend.confinement import Limits, emptied, limits, prlimit, setpriv
from vmand.backend.mounts import mounts
from vmand.backend.process import Process, end_user, find, of_users
from vmand.backend.rundir import RunDirs, may_raise_limits
from vmand.backend.unit import Place, device, properties, spawn_unit, stop_unit, unit_name
from vmand.config import Config
from vmand.model import MIB, OpenDisk, Record

log = logging.getLogger(__name__)

SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
CGROUP = Path("/proc/self/cgroup")
KVM = Path("/dev/kvm")
ROOT_SLICE = "-.slice"
_SERVICE = "vmand.service"
_UMASK = 0o077
_QCOW2_SIZE = slice(24, 32)  # big endian, in the header: QEMU's docs/interop/qcow2.txt
_QCOW2_TABLES_BYTES = 64 * MIB


def check_launcher(setting: str) -> None:
    """Refuse a launcher that this host does not have.

    Raises:
        SettingsError: names the cure.
    """
    if setting == "systemd" and not SYSTEMD.is_dir():
        raise SettingsError(f"launcher: systemd does not run here (no {SYSTEMD}); set it to auto or process")
    if setting == "process" and _is_service():
        raise SettingsError(
            f"launcher: with process guests would be a part of {_SERVICE}, end with it and lack what it may not do; "
            "set it to auto, or start vmand by hand"
        )


def use_systemd(setting: str) -> bool:
    """Whether guests become units."""
    return setting == "systemd" or (setting == "auto" and SYSTEMD.is_dir())


def _is_service() -> bool:
    """Whether this process is our unit's, as its cgroups tell (cgroups(7))."""
    try:
        return any(line.endswith(f"/{_SERVICE}") for line in CGROUP.read_text(encoding="utf-8").splitlines())
    except OSError:
        return False


class Launcher:
    """Starts the QEMUs of one vmand and ends what they leave."""

    def __init__(self, config: Config, dirs: RunDirs) -> None:
        self._config = config
        self._dirs = dirs
        self.systemd = use_systemd(config.launcher)

    async def spawn(
        self,
        argv: Sequence[str],
        record: Record,
        *,
        directory: Path,
        cpus: Collection[int],
        kvm: bool,
        lock_memory: bool,
        slice_name: str | None = None,
        memory: Path | None = None,
        disks: Sequence[OpenDisk] | None = None,
        own_cores: Collection[int] = (),
    ) -> Process:
        """Start QEMU in the directory of its run, on these cores. What it prints goes to its log there.

        ``slice_name``: other than that of the settings; directly below the root slice the whole process is put on
        the partition's own cores. ``memory``: the file of the guest's memory; None: somewhere in memory_dir. ``disks``:
        the files that it may write to; None: of any size. ``own_cores``: the partition's, whole SMT cores.

        Raises:
            FailedError: it could not be started.
            TimedOutError: systemd does not answer.
        """
        uid = self._dirs.user(record)
        bounds = limits(record, file_bytes=_largest(disks), image_bytes=_content(directory), lock_memory=lock_memory)
        os.close(self._dirs.create(record, LOG, mode=0o600))
        privileged = self.systemd or self._dirs.privileged
        group = _group(KVM) if kvm and uid is not None else None
        losing = setpriv(uid=uid, group=group, privileged=privileged)
        chain = [*_located(losing), *_located(emptied()), *_located(argv)]
        if not self.systemd:
            bounds = bounds if may_raise_limits() else _within(bounds)
            limited = [*_located(prlimit(bounds, uid=uid, privileged=privileged)), *chain]
            return _spawn(limited, log_file=directory / LOG, cpus=cpus, uid=uid)
        place = Place(
            slice_name=slice_name or self._config.slice,
            cpus=own_cores if slice_name == ROOT_SLICE else cpus,
            allowed=own_cores if slice_name == ROOT_SLICE else (),
            delegate=bool(record.cpus),
            writable=(directory, memory or self._config.memory),
            log_file=directory / LOG,
        )
        # Else systemctl shows the command line, which is longer than a screen.
        description = f"Description=Edgehold: guest of partition {record.id}"
        return await spawn_unit(
            chain,
            run=record.run,
            unit=unit_name(record),
            slice_name=place.slice_name,
            given=[description, *properties(place, bounds, uid=uid), *(device(KVM) if kvm else ())],
            uid=uid,
            log_file=place.log_file,
        )

    def cgroup(self, process: Process) -> Path | None:
        """The cgroup (version 2) of a unit's process; None for a process that is in none of its own.

        Raises:
            FailedError: it can't be read.
        """
        if not process.identity.unit:
            return None
        try:
            lines = Path(f"/proc/{process.identity.pid}/cgroup").read_text(encoding="utf-8").splitlines()
            root = next((one.point for one in mounts() if one.kind == "cgroup2"), "")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FailedError(f"the cgroup of process {process.identity.pid}: {error.strerror}") from error
        path = next((one.removeprefix("0::") for one in lines if one.startswith("0::")), "")
        # Whoever moved it elsewhere did not make that cgroup for us.
        return Path(root + path) if root and path.rpartition("/")[2] == process.identity.unit else None

    async def stop(self, record: Record) -> None:
        """Stop the unit of a run, also one that systemd was asked for and whose QEMU is not there yet. Idempotent."""
        if record.run and (self.systemd or record.unit):
            await stop_unit(record.unit or unit_name(record))

    async def end(self, record: Record) -> None:
        """End whatever is left of a run: its process, its unit, and all that its user has. Idempotent.

        Raises:
            TimedOutError: even SIGKILL did not end it.
        """
        if record.run:
            await self._end_runs({record.run})
            await self.stop(record)
        if self._dirs.uids:
            await self._end_user(self._dirs.uids[record.slot])

    async def sweep(self, runs: Collection[str], *, slots: Collection[int] | None = None) -> None:
        """End what was started for a partition of this vmand and belongs to none of these runs.

        ``slots``: of the partitions with these runs; the users of all others have nothing to run. None: not asked.
        """
        await self._end_runs({run for _pid, run in self._processes() if run not in runs})
        if slots is not None:
            keep = {self._dirs.uids[one] for one in slots if self._dirs.uids}
            for uid in sorted({uid for _pid, uid in of_users(self._dirs.uids)} - keep):
                await self._end_user(uid)

    def _processes(self) -> list[tuple[int, str]]:
        return find(f"path={self._dirs.base}/")

    async def _end_runs(self, runs: Collection[str]) -> None:
        for pid, run in self._processes() if runs else ():
            if run in runs and (process := Process.open(pid, run)) is not None:
                log.warning("ending the remains of a run", extra={"run": run, "pid": pid})
                with contextlib.closing(process):
                    await process.kill()

    async def _end_user(self, uid: int) -> None:
        if count := await end_user(uid):
            log.warning("ended %d processes that a partition's user still had", count, extra={"uid": uid})


def _within(bounds: Limits) -> Limits:
    """No more than vmand's own hard limits, where it may not raise them."""

    def least(kind: int, wanted: int) -> int:
        hard = resource.getrlimit(kind)[1]
        return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)

    longest = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    files = bounds.file_bytes
    if files is None and longest != resource.RLIM_INFINITY:
        files = longest
    return dataclasses.replace(
        bounds,
        threads=least(resource.RLIMIT_NPROC, bounds.threads),
        open_files=least(resource.RLIMIT_NOFILE, bounds.open_files),
        locked_bytes=least(resource.RLIMIT_MEMLOCK, bounds.locked_bytes),
        file_bytes=None if files is None else least(resource.RLIMIT_FSIZE, files),
    )


def _content(directory: Path) -> int:
    """The bytes of the files in a directory."""
    return sum(one.stat().st_size for one in directory.iterdir() if one.is_file())


def _largest(disks: Sequence[OpenDisk] | None) -> int | None:
    """The most bytes that one of these files may come to have. A block device does not grow and counts for nothing."""
    if disks is None:
        return None
    return max((_grown(one) for one in disks if not one.readonly), default=0)


def _grown(disk: OpenDisk) -> int:
    size = os.fstat(disk.file.fd).st_size
    if disk.format != "qcow2":
        return size
    # Its tables come on top, and clusters that were freed and are not used again.
    told = int.from_bytes(os.pread(disk.file.fd, _QCOW2_SIZE.stop, 0)[_QCOW2_SIZE], "big")
    return max(size, 2 * told) + _QCOW2_TABLES_BYTES


def _group(path: Path) -> int | None:
    """The group through which another user may use a device; None where everybody may.

    Raises:
        FailedError: nobody but its owner may.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise FailedError(f"{path}: {error.strerror}") from error
    if found.st_mode & (stat.S_IROTH | stat.S_IWOTH) == stat.S_IROTH | stat.S_IWOTH:
        return None
    if found.st_gid == 0 or not found.st_mode & stat.S_IRGRP or not found.st_mode & stat.S_IWGRP:
        raise FailedError(
            f"{path}: no group but root's may use it (mode {stat.S_IMODE(found.st_mode):04o}), and a guest has none of "
            f"root's rights; chgrp kvm {path} and chmod 0660 it, or set accelerator to tcg"
        )
    return found.st_gid


def _located(argv: Sequence[str]) -> list[str]:
    """The command line with its program's path: QEMU's environment is empty, and so has no PATH.

    Raises:
        FailedError: there is no such program.
    """
    path = shutil.which(argv[0])
    if path is None:
        raise FailedError(f"{argv[0]} can't be started: No such file or directory; is it installed?")
    return [path, *argv[1:]]


def _spawn(argv: list[str], *, log_file: Path, cpus: Collection[int], uid: int | None) -> Process:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log_file), os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW, 0),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    own, umask = os.sched_getaffinity(0), os.umask(_UMASK)
    try:
        # A child inherits mask and umask. This is one thread, and what another makes meanwhile is for vmand alone.
        os.sched_setaffinity(0, cpus)
        pid = os.posix_spawn(
            argv[0], argv, {}, file_actions=actions, setsid=True, setsigmask=(), setsigdef=(signal.SIGPIPE,)
        )
    except OSError as error:
        raise FailedError(f"{argv[0]} can't be started: {error.strerror}; is it installed?") from error
    finally:
        os.sched_setaffinity(0, own)
        os.umask(umask)
    return Process.of_child(pid, uid=uid)
