"""A partition's memory: a file in a tmpfs, allocated whole at create, kept until destroy, whatever processes die.

See docs/adr/0001-memory-is-a-tmpfs-file.md.
"""

import asyncio
import errno
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path

from edgehold.errors import FailedError, NoCapacityError, SettingsError
from vmand.model import MIB

_KINDS = frozenset({"tmpfs", "hugetlbfs"})
_FILE = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\.mem")


class MemoryFiles:
    """The files below one directory that is ours."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, uuid: str) -> Path:
        """Where the memory of a partition is."""
        return self._directory / f"{uuid}.mem"

    def free_bytes(self, headroom: int) -> int:
        """What the host could give now: the less of the tmpfs' room and of MemAvailable without the headroom."""
        return min(self._room(), available_bytes() - headroom)

    def _room(self) -> int:
        try:
            found = os.statvfs(self._directory)
        except OSError as error:
            raise FailedError(f"{self._directory}: {error.strerror}; see memory_dir in the settings") from error
        return found.f_bavail * found.f_frsize

    async def take(self, uuid: str, size: int) -> None:
        """Allocate every page of it.

        Raises:
            NoCapacityError: the tmpfs is full; nothing is left behind.
        """
        path = self.path(uuid)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FailedError(f"{path}: {error.strerror}; see memory_dir in the settings") from error
        try:
            # The kernel zeroes each page: a second or so for some GiB, in which the daemon goes on.
            await asyncio.to_thread(os.posix_fallocate, fd, 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno in {errno.ENOSPC, errno.ENOMEM}:
                raise NoCapacityError(
                    f"memory: {size // MIB} MiB are wanted and {self._room() // MIB} MiB are left in {self._directory}"
                ) from error
            raise FailedError(f"{path}: {error.strerror}; memory_dir must be a tmpfs") from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def give_back(self, uuid: str) -> None:
        """Remove it. Idempotent."""
        self._remove(self.path(uuid))

    def has(self, uuid: str, size: int) -> bool:
        """Whether the memory is there, whole (a reboot of the host empties a tmpfs), and our own file still."""
        try:
            fd = os.open(self.path(uuid), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
        return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_size == size

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Remove the files of unknown partitions; their names."""
        try:
            names = os.listdir(self._directory)  # noqa: PTH208 - names are enough
        except OSError as error:
            raise FailedError(f"{self._directory}: {error.strerror}; see memory_dir in the settings") from error
        gone = [one for one in names if _FILE.fullmatch(one) and one.removesuffix(".mem") not in keep]
        for name in gone:
            self._remove(self._directory / name)
        return gone

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise FailedError(f"{path} can't be removed: {error.strerror}") from error


def filesystem(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that the path is on, or would be made on (proc(5), mountinfo)."""
    wanted = Path(os.path.realpath(path))
    kind, longest = "", -1
    for line in mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        # The kernel writes space, tab, newline and backslash in octal.
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        # Of mounts at one place the last is on top.
        if len(point) >= longest and wanted.is_relative_to(point):
            kind, longest = fields[fields.index("-") + 1], len(point)
    return kind


def check_directory(path: Path) -> None:
    """Refuse a directory whose files would be on a disk.

    Raises:
        SettingsError: names the file system's type.
    """
    if (kind := filesystem(path)) not in _KINDS:
        raise SettingsError(
            f"memory_dir: {path} is on {kind or 'an unknown file system'}; partitions' memory needs a tmpfs or "
            "hugetlbfs, for example a directory below /dev/shm"
        )


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable: what can be taken without pushing the host into swapping (proc(5))."""
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise FailedError(f"{meminfo}: no MemAvailable")
