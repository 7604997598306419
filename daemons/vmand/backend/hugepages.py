"""Huge pages of this host as a place for partitions' memory: a directory of ours in a hugetlbfs that is mounted.

vmand mounts nothing and reserves no huge pages: that is the operator's (Documentation/admin-guide/mm/hugetlbpage.rst).
Whatever does not fit is a reason, never an error: ordinary pages are taken instead.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vmand.backend.mounts import MOUNTINFO, Mount, mounts

KIB = 1024
_SYS = Path("/sys")
_UNITS = {"K": KIB, "M": KIB**2, "G": KIB**3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A directory in which memory files are made, and what their pages are."""

    directory: Path
    page_bytes: int
    huge: bool
    swaps: bool
    """The host may swap its pages, where it has swap."""
    limited: bool = False
    """The file system has a size of its own (the mount options ``size`` and ``nr_inodes``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The host's huge pages of one size (/sys/kernel/mm/hugepages)."""

    page_bytes: int
    total: int
    free: int
    """Pages that nobody has and that are promised to nobody."""


def size_text(size: int) -> str:
    """A page size as people write it: ``2 MiB``."""
    for unit, text in ((KIB**3, "GiB"), (KIB**2, "MiB")):
        if size % unit == 0:
            return f"{size // unit} {text}"
    return f"{size // KIB} KiB"


def pools(sysfs: Path = _SYS) -> list[Pool]:
    """All pools, the smallest pages first; none where the kernel has no huge pages."""
    found = []
    for entry in (sysfs / "kernel/mm/hugepages").glob("hugepages-*kB"):
        size = int(entry.name.removeprefix("hugepages-").removesuffix("kB")) * KIB
        found.append(
            Pool(
                page_bytes=size,
                total=_number(entry / "nr_hugepages"),
                free=max(_number(entry / "free_hugepages") - _number(entry / "resv_hugepages"), 0),
            )
        )
    return sorted(found, key=lambda one: one.page_bytes)


def free_pages(page_bytes: int, node: int | None = None, sysfs: Path = _SYS) -> int:
    """Free pages of this size, on one node or on all; those promised to others are counted off (on all nodes only)."""
    name = f"hugepages-{page_bytes // KIB}kB"
    everywhere = sysfs / "kernel/mm/hugepages" / name
    free = max(_number(everywhere / "free_hugepages") - _number(everywhere / "resv_hugepages"), 0)
    if node is None:
        return free
    try:
        return min(free, _number(sysfs / f"devices/system/node/node{node}/hugepages" / name / "free_hugepages"))
    except OSError:  # a kernel without NUMA has no such directory, and one node
        return free


def page_size(mount: Mount) -> int:
    """The size of a hugetlbfs' pages. Raises `OSError`."""
    for option in mount.options:
        name, _equals, value = option.partition("=")
        if name == "pagesize" and value[-1:] in _UNITS and value[:-1].isdigit():
            return int(value[:-1]) * _UNITS[value[-1]]
    return os.statvfs(mount.point).f_bsize


def room(path: Path, page_bytes: int, *, limited: bool, sysfs: Path = _SYS) -> int:
    """Bytes that a hugetlbfs could still give: of the host's pool, and of the file system's own size. `OSError`."""
    free = free_pages(page_bytes, sysfs=sysfs)
    if limited:
        found = os.statvfs(path)
        free = min(free, found.f_bavail * found.f_frsize // page_bytes)
    return free * page_bytes


def is_limited(mount: Mount) -> bool:
    """Whether the file system has a size of its own. Without one statvfs(3) tells 0 or -1 blocks on a hugetlbfs."""
    return any(one.startswith("size=") for one in mount.options)


class HugePages:
    """Our directories in hugetlbfs mounts: made when first needed, ours alone (a lock), removed when empty at close."""

    def __init__(self, memory_dir: Path, *, mountinfo: Path = MOUNTINFO, sysfs: Path = _SYS) -> None:
        # One a vmand: its memory_dir is its own, so the name made of it is too.
        self._name = f"vmand-{hashlib.sha256(str(memory_dir).encode()).hexdigest()[:12]}"
        self._mountinfo = mountinfo
        self._sysfs = sysfs
        self._held: dict[int, tuple[int, Path]] = {}
        """The descriptor and path of each directory, by the device of its file system."""

    def existing(self) -> list[Place]:
        """The places in which our directory is already, whether or not more fits there."""
        there = [one for one in self._mounts() if os.path.lexists(self._directory(one))]
        return [self._place(one) for one in there if not self._hold(one)]

    def pick(self, size: int, node: int | None = None) -> tuple[Place | None, str]:
        """The place for so many bytes, or why there is none. The largest pages come first, where they come out even."""
        found = self._mounts()
        if not found:
            return None, "no hugetlbfs is mounted"
        reasons = []
        for mount in sorted(found, key=page_size, reverse=True):
            if refusal := self._refusal(mount):
                reasons.append(refusal)
                continue
            place = self._place(mount)
            pages, rest = divmod(size, place.page_bytes)
            if rest:
                reasons.append(f"{size_text(size)} is no whole number of pages of {size_text(place.page_bytes)}")
                continue
            free = free_pages(place.page_bytes, node, self._sysfs)
            where = "" if node is None else f" on node {node}"
            if (left := self._room(mount) // place.page_bytes) < free:
                free, where = left, f" in {mount.point}"
            if pages > free:
                reasons.append(f"{pages} huge pages of {size_text(place.page_bytes)} are wanted and {free} free{where}")
            elif refusal := self._hold(mount):
                reasons.append(refusal)
            else:
                return place, ""
        # Of the smallest pages: they are the likeliest to be had, and the cure is theirs.
        return None, reasons[-1]

    def free_bytes(self) -> int:
        """What all usable places together could give."""
        usable = {page_size(one): one for one in self._mounts() if not self._refusal(one)}
        return sum(self._room(one) for one in usable.values())

    def refusal(self) -> str:
        """Why no partition at all could get huge pages now; empty where some could."""
        found = self._mounts()
        if not found:
            return "no hugetlbfs is mounted"
        reasons = [self._refusal(one) for one in found]
        if all(reasons):
            return reasons[0]
        return "" if self.free_bytes() else "no huge page is free"

    def close(self) -> None:
        """Let go; directories without a partition's memory are removed."""
        for fd, directory in self._held.values():
            with contextlib.suppress(OSError):  # not empty: what is in it outlives us
                directory.rmdir()
            os.close(fd)
        self._held.clear()

    def _mounts(self) -> list[Mount]:
        found: dict[int, Mount] = {}
        for one in mounts(self._mountinfo):
            if one.kind == "hugetlbfs" and one.on_top:
                found.setdefault(one.device, one)  # the same file system may be mounted twice
        return list(found.values())

    def _directory(self, mount: Mount) -> Path:
        return Path(mount.point) / self._name

    def _room(self, mount: Mount) -> int:
        return room(Path(mount.point), page_size(mount), limited=is_limited(mount), sysfs=self._sysfs)

    def _place(self, mount: Mount) -> Place:
        return Place(
            directory=self._directory(mount),
            page_bytes=page_size(mount),
            huge=True,
            swaps=False,
            limited=is_limited(mount),
        )

    @staticmethod
    def _refusal(mount: Mount) -> str:
        if "ro" in mount.options:
            return f"{mount.point} is mounted read-only"
        try:
            found = os.stat(mount.point)  # noqa: PTH116 - the text is the kernel's
        except OSError as error:
            return f"{mount.point}: {error.strerror}"
        if found.st_uid not in {0, os.geteuid()}:
            return f"{mount.point} belongs to uid {found.st_uid}: what is in it could be replaced"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
            return f"others may write to {mount.point}: what is in it could be replaced; mount it with mode=0755"
        if not found.st_mode & stat.S_IXOTH:
            return f"a guest's own user can't get into {mount.point}; mount it with mode=0755"
        return ""

    def _hold(self, mount: Mount) -> str:
        """Make sure that the directory is there and ours. Returns why it is not."""
        if mount.device in self._held:
            return ""
        path, fd = self._directory(mount), -1
        try:
            path.mkdir(mode=0o711, exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            refusal = _not_ours(path, fd)
            if not refusal:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had the lock before may have removed it when it let go.
                refusal = "" if os.path.samestat(os.fstat(fd), path.stat()) else f"{path} is just being removed"
            if not refusal:
                os.fchmod(fd, 0o711)
                self._held[mount.device], fd = (fd, path), -1
        except BlockingIOError:
            refusal = f"{path}: another vmand uses it"
        except OSError as error:
            refusal = f"{path}: {error.strerror}"
        finally:
            if fd >= 0:
                os.close(fd)
        return refusal


def _not_ours(path: Path, fd: int) -> str:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        return f"{path}: it belongs to uid {found.st_uid}, not to us"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path}: others may write to it (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
