"""A partition's memory: a file in a tmpfs, allocated whole at create, kept until destroy, whatever processes die.

See docs/adr/0001-memory-is-a-tmpfs-file.md.
"""

import asyncio
import contextlib
import errno
import os
import re
from collections.abc import Collection
from pathlib import Path

from edgehold.errors import FailedError, NoCapacityError
from vmand.model import MIB

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
        stat = os.statvfs(self._directory)
        return min(stat.f_bavail * stat.f_frsize, available_bytes() - headroom)

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
                stat = os.statvfs(self._directory)
                left = stat.f_bavail * stat.f_frsize // MIB
                raise NoCapacityError(
                    f"memory: {size // MIB} MiB are wanted and {left} MiB are left in {self._directory}"
                ) from error
            raise FailedError(f"{path}: {error.strerror}; memory_dir must be a tmpfs") from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def give_back(self, uuid: str) -> None:
        """Remove it. Idempotent."""
        self.path(uuid).unlink(missing_ok=True)

    def has(self, uuid: str, size: int) -> bool:
        """Whether the memory is there, whole: a reboot of the host empties a tmpfs."""
        with contextlib.suppress(OSError):
            return self.path(uuid).stat().st_size == size
        return False

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Remove the files of unknown partitions; their names."""
        gone = [
            one
            for one in os.listdir(self._directory)  # noqa: PTH208 - names are enough
            if _FILE.fullmatch(one) and one.removesuffix(".mem") not in keep
        ]
        for name in gone:
            (self._directory / name).unlink(missing_ok=True)
        return gone


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable: what can be taken without pushing the host into swapping (proc(5))."""
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise FailedError(f"{meminfo}: no MemAvailable")
