"""A partition's memory: a file, allocated whole at create, kept until destroy, whatever processes die.

In a hugetlbfs where the host has huge pages for it, else in the tmpfs of memory_dir. See
docs/adr/0001-memory-is-a-tmpfs-file.md for the file, docs/adr/0002-grades-are-read-back.md for its grade.
"""

import asyncio
import contextlib
import errno
import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from edgehold.api.vmand import MemoryGrade
from edgehold.errors import FailedError, NoCapacityError, SettingsError
from edgehold.kernel import numa
from vmand.backend.hugepages import KIB, HugePages, Place, is_limited, page_size, room
from vmand.backend.mounts import active_swaps, filesystem, mount_of
from vmand.model import MIB

log = logging.getLogger(__name__)

_KINDS = frozenset({"tmpfs", "hugetlbfs"})
_FILE = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\.mem")
_FULL = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EDQUOT})
_BLOCK = 512  # the unit of st_blocks (inode(7)), whatever the file system's own
_PROC, _SYS = Path("/proc"), Path("/sys")


class MemoryFiles:
    """The files below one directory that is ours, and below ours in the host's hugetlbfs mounts."""

    def __init__(self, directory: Path, *, hugepages: bool, proc: Path = _PROC, sysfs: Path = _SYS) -> None:
        self._directory = directory
        self._wanted = hugepages
        self._proc = proc
        self._sysfs = sysfs
        self._mountinfo = proc / "self/mountinfo"
        self._huge = HugePages(directory, mountinfo=self._mountinfo, sysfs=sysfs)
        self._base: Place | None = None
        self._where: dict[str, Place] = {}
        self._why: dict[str, str] = {}
        """Why a partition got no huge pages, as far as this process was there."""

    def path(self, uuid: str) -> Path:
        """Where the memory of a partition is."""
        return self._place(uuid).directory / _name(uuid)

    def is_huge(self, uuid: str) -> bool:
        """Whether it is made of huge pages."""
        return self._place(uuid).huge

    def page_bytes(self, uuid: str) -> int:
        """The size of its pages."""
        return self._place(uuid).page_bytes

    def free_bytes(self, headroom: int) -> int:
        """What the host could give now to all partitions together: free huge pages, and the less of the tmpfs' room and
        of MemAvailable without the headroom (bytes)."""
        huge = 0
        if self._wanted and not self._own().huge:
            with contextlib.suppress(OSError):
                huge = self._huge.free_bytes()
        return max(self._room(headroom), 0) + huge

    async def take(self, uuid: str, size: int, *, node: int | None = None, headroom: int = 0) -> None:
        """Allocate every page of it: huge ones of this memory node if they are there, else ordinary ones, near it.

        ``headroom``: bytes of MemAvailable that ordinary pages leave.

        Raises:
            NoCapacityError: too little is left; nothing is left behind.
        """
        refusal = await self._take_huge(uuid, size, node)
        if not refusal:
            return
        self._why[uuid] = refusal
        base = self._own()
        left = self._room(headroom)
        if size > left:
            raise self._too_little(size, left, refusal)
        try:
            await _in_thread(base.directory / _name(uuid), size, node, huge=base.huge)
        except OSError as error:
            if error.errno in _FULL:
                raise self._too_little(size, self._room(headroom), refusal) from error
            raise FailedError(
                f"{base.directory / _name(uuid)}: {error.strerror}; memory_dir must be a tmpfs, see the settings"
            ) from error
        self._where[uuid] = base

    def give_back(self, uuid: str) -> None:
        """Remove it. Idempotent."""
        places = [self._own(), *self._existing()]
        for place in places:
            _remove(place.directory / _name(uuid))
        self._where.pop(uuid, None)
        self._why.pop(uuid, None)

    def has(self, uuid: str, size: int, *, uid: int | None = None) -> bool:
        """Whether the memory is there, whole (a reboot of the host empties a tmpfs), and our own file still.

        ``uid``: the user to whom it was handed over, who may also own it.
        """
        return not self._fault(uuid, size, lambda: uid)

    def hand_over(self, uuid: str, uid: int | None) -> None:
        """Make the file belong to this user, or to us again (None), readable and writable for the owner alone.

        Raises:
            FailedError: it is not there, or not the file that we made.
        """
        path = self.path(uuid)
        try:
            # What is checked is what is changed: the name is looked up once.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FailedError(f"{path}: {error.strerror}; deploy the partition again") from error
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise FailedError(f"{path} is not the file that was made for the partition; look who changed it")
            owner = os.geteuid() if uid is None else uid
            if owner == os.geteuid():
                os.fchown(fd, owner, -1)
                os.fchmod(fd, 0o600)
            else:
                # The mode first: afterwards the other user could be in between.
                os.fchmod(fd, 0o600)
                os.fchown(fd, owner, -1)
        except OSError as error:
            raise FailedError(f"{path} can't be given to uid {uid}: {error.strerror}") from error
        finally:
            os.close(fd)

    def needs_lock(self, uuid: str | None = None) -> bool:
        """Whether the host could swap these pages now, so that a guest's process shall lock them (mlockall(2)).

        None: ordinary pages in general.
        """
        place = self._own() if uuid is None else self._place(uuid)
        return place.swaps and bool(active_swaps(self._proc / "swaps"))

    def best(self) -> tuple[MemoryGrade, str]:
        """The best grade that a new partition's memory can have now, and why not a better one."""
        if self._own().huge:
            return MemoryGrade.HUGETLB, ""
        refusal = self._no_huge()
        if not refusal:
            return MemoryGrade.HUGETLB, ""
        reason = f"no huge pages: {refusal}"
        if self.needs_lock():
            reason += f"; swap is in use ({self._swaps()}), so only while a guest's process has locked it"
        return MemoryGrade.LOCKED, reason

    def grade(self, uuid: str, size: int, *, pid: int | None) -> tuple[MemoryGrade, str]:
        """What it is now, and why not better. Costs some 10 microseconds: stat(2) and one or two files of /proc.

        ``pid``: the guest's process, verified by the caller, where there is one. The file may be its user's.
        """
        if fault := self._fault(uuid, size, lambda: None if pid is None else self._status(pid, b"Uid")):
            return MemoryGrade.PLAIN, fault
        place = self._place(uuid)
        if place.huge:
            return MemoryGrade.HUGETLB, ""
        why = self._why.get(uuid, "there were none for it when it was created")
        reason = f"no huge pages: {why}"
        if not self.needs_lock():
            return MemoryGrade.LOCKED, reason
        locked = None if pid is None else self._status(pid, b"VmLck")
        if locked is not None and locked * KIB >= size:
            return MemoryGrade.LOCKED, reason
        who = "no guest runs that locks it" if pid is None else "the guest's process has not locked it"
        cure = "swapoff it" if pid is None else "swapoff it, or shut the guest down and deploy it again"
        return MemoryGrade.PLAIN, f"swap is in use ({self._swaps()}) and {who}; {cure}"

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Remove the files of unknown partitions; their names."""
        gone = []
        for place in (self._own(), *self._existing()):
            try:
                names = os.listdir(place.directory)  # noqa: PTH208 - names are enough
            except OSError as error:
                raise FailedError(f"{place.directory}: {error.strerror}; see memory_dir in the settings") from error
            for name in names:
                if _FILE.fullmatch(name) and name.removesuffix(".mem") not in keep:
                    _remove(place.directory / name)
                    gone.append(name)
        return gone

    def close(self) -> None:
        """Let go of the directories; memory stays."""
        self._huge.close()

    async def _take_huge(self, uuid: str, size: int, node: int | None) -> str:
        """Take huge pages. Returns why it could not."""
        if refusal := self._not_wanted():
            return refusal
        try:
            place, refusal = self._huge.pick(size, node)
            if place is None:
                return refusal
            await _in_thread(place.directory / _name(uuid), size, node, huge=True)
        except FileExistsError as error:
            raise FailedError(f"{error.filename}: {error.strerror}") from error
        except OSError as error:
            cause = "the host's pool or a limit of this cgroup has too few left" if error.errno in _FULL else ""
            return f"the kernel gave none ({cause or error.strerror})"
        self._where[uuid] = place
        return ""

    def _not_wanted(self) -> str:
        if self._own().huge:
            return "memory_dir is a hugetlbfs itself"
        return "" if self._wanted else "hugepages is false in the settings"

    def _no_huge(self) -> str:
        try:
            return self._not_wanted() or self._huge.refusal()
        except OSError as error:
            return f"{error.filename}: {error.strerror}"

    def _own(self) -> Place:
        """The place of memory_dir. What it is mounted on can't change its mind about swap (tmpfs(5), noswap)."""
        if self._base is None:
            try:
                mount = mount_of(self._directory, self._mountinfo)
            except OSError as error:
                raise FailedError(f"{self._mountinfo}: {error.strerror}") from error
            huge = mount is not None and mount.kind == "hugetlbfs"
            place = Place(
                directory=self._directory,
                page_bytes=os.sysconf("SC_PAGE_SIZE"),
                huge=huge,
                swaps=not huge and (mount is None or "noswap" not in mount.options),
            )
            if mount is not None and huge:
                place = replace(place, page_bytes=page_size(mount), limited=is_limited(mount))
            self._base = place
        return self._base

    def _existing(self) -> list[Place]:
        try:
            return self._huge.existing()
        except OSError as error:
            raise FailedError(f"huge pages can't be looked at: {error}") from error

    def _place(self, uuid: str) -> Place:
        """Where the file is. Also what an earlier vmand made, with other settings."""
        if uuid not in self._where:
            for place in self._existing():
                if os.path.lexists(place.directory / _name(uuid)):
                    self._where[uuid] = place
                    return place
            if not os.path.lexists(self._own().directory / _name(uuid)):
                return self._own()
            self._where[uuid] = self._own()
        return self._where[uuid]

    def _room(self, headroom: int) -> int:
        """Bytes that memory_dir could give, not below 0 alone: less than the headroom may be available."""
        base = self._own()
        try:
            if base.huge:
                return room(base.directory, base.page_bytes, limited=base.limited, sysfs=self._sysfs)
            found = os.statvfs(self._directory)
        except OSError as error:
            raise FailedError(f"{self._directory}: {error.strerror}; see memory_dir in the settings") from error
        return min(found.f_bavail * found.f_frsize, available_bytes(self._proc / "meminfo") - headroom)

    def _too_little(self, size: int, left: int, huge: str) -> NoCapacityError:
        return NoCapacityError(
            f"memory: {size // MIB} MiB are wanted and {max(left, 0) // MIB} MiB are left in {self._directory}; "
            f"no huge pages: {huge}"
        )

    def _fault(self, uuid: str, size: int, user: Callable[[], int | None]) -> str:
        """What is wrong with the file; nothing where all of it is there."""
        try:
            found = os.stat(self.path(uuid), follow_symlinks=False)  # noqa: PTH116 - half the price, each second
        except OSError as error:
            return f"its file can't be found: {error.strerror}"
        if found.st_size != size:
            return f"its file has {found.st_size} bytes and not {size}"
        if (there := found.st_blocks * _BLOCK) < size:
            return f"only {there // MIB} of {size // MIB} MiB are allocated: somebody made holes in its file"
        if not stat.S_ISREG(found.st_mode) or (found.st_uid != os.geteuid() and found.st_uid != user()):
            return f"its file is not ours (uid {found.st_uid})"
        return ""

    def _status(self, pid: int, field: bytes) -> int | None:
        """A field's first number (proc_pid_status(5)): ``Uid`` real, ``VmLck`` in KiB. None for one that is gone."""
        try:
            text = (self._proc / str(pid) / "status").read_bytes()
        except OSError:
            return None
        found = re.search(rb"^%s:\s*(\d+)" % field, text, re.MULTILINE)
        return int(found[1]) if found else None

    def _swaps(self) -> str:
        return ", ".join(active_swaps(self._proc / "swaps"))


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
    try:
        text = meminfo.read_text(encoding="ascii")
    except OSError as error:
        raise FailedError(f"{meminfo}: {error.strerror}") from error
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise FailedError(f"{meminfo}: no MemAvailable")


def _name(uuid: str) -> str:
    return f"{uuid}.mem"


async def _in_thread(path: Path, size: int, node: int | None, *, huge: bool) -> None:
    """Make and fill a file; the daemon goes on. Whoever gives up waiting leaves no file behind. Raises `OSError`."""
    abandoned = threading.Event()
    try:
        # The kernel zeroes each page: a second or so for some GiB.
        await asyncio.to_thread(_fill, path, size, node, huge=huge, abandoned=abandoned)
    except asyncio.CancelledError:
        # The thread can't be interrupted; it looks at the event when it is done.
        abandoned.set()
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - one name in a file system without a disk
        raise


def _fill(path: Path, size: int, node: int | None, *, huge: bool, abandoned: threading.Event) -> None:
    # The thread owns the descriptor: one that the waiting side closed could be another file's by the time of the call.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with _near(node, only=huge):
            os.posix_fallocate(fd, 0, size)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    if abandoned.is_set():
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _near(node: int | None, *, only: bool) -> Iterator[None]:
    """Allocate on this node, where that can be said and makes a difference."""
    with contextlib.ExitStack() as stack:
        if node is not None and numa.several():
            try:
                stack.enter_context(numa.pages_from(node, only=only))
            except OSError as error:
                log.warning("memory is not taken from node %d: %s", node, error)
        yield


def _remove(path: Path) -> None:
    """Free the pages, then the name: another name or an open descriptor must not keep a partition's memory."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        pass  # nothing there, or nothing that we made: only the name counts
    else:
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise FailedError(f"{path} can't be removed: {error.strerror}") from error
