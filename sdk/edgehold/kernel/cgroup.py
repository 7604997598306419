"""Control groups as files: where they are, who is in them, and how a CPU limit is written.

cgroups(7), Documentation/admin-guide/cgroup-v2.rst, Documentation/scheduler/sched-bwc.rst. Only reads: who changes a
limit has to know what for. A cgroup's *path* is always that below the mount, as ``/system.slice/x.service``; where a
container shows only a part of the host's cgroups, what lies outside has no path.
"""

import errno
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgehold.kernel import procfs

MOUNTINFO = Path("/proc/self/mountinfo")
# What stands beside the controllers among the options of a mount of version 1.
_OPTIONS = frozenset({"rw", "ro", "xattr", "clone_children", "noprefix", "cpuset_v2_mode", "favordynmods", "none"})
_OCTAL = re.compile(r"\\([0-7]{3})")
# A removed cgroup: no directory any more (ENOENT), or no cgroup behind an open file (ENODEV).
_GONE = frozenset({errno.ENOENT, errno.ENODEV})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# How deep a subtree is walked; the kernel's own limit is the administrator's (cgroup.max.depth).
_DEEPEST = 64
# A directory without subdirectories has two links, itself and its name in the parent; some file systems say 1 always.
_LEAF_LINKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """One tree of cgroups, where it is mounted."""

    mount: str
    root: str
    """Which of the kernel's cgroups is at the mount point; ``/`` unless a container shows a part."""
    version: int
    """1 or 2."""
    controllers: frozenset[str]
    """Of version 1: ``cpu``, or ``name=systemd``. Version 2 tells them in cgroup.controllers."""

    @property
    def threads_file(self) -> str:
        return "cgroup.threads" if self.version == 2 else "tasks"

    def directory(self, path: str) -> str:
        """Where a cgroup is, or would be."""
        return self.mount if path == "/" else self.mount.rstrip("/") + path

    def path(self, directory: str) -> str | None:
        """A directory's cgroup; None where it is not below this mount."""
        return _below(self.mount, directory)

    def of(self, memberships: Mapping[str, str]) -> str | None:
        """Whose cgroups these are (see `memberships`): the one in this hierarchy; None where it is not shown here."""
        name = next(iter(self.controllers)) if self.version == 1 else ""
        found = memberships.get(name)
        return None if found is None or found.startswith("/..") else _below(self.root, found)


def _below(top: str, path: str) -> str | None:
    if top == "/":
        return path
    if path == top:
        return "/"
    return path[len(top) :] if path.startswith(f"{top}/") else None


def is_gone(error: OSError) -> bool:
    """Whether an error means that the cgroup was removed."""
    return error.errno in _GONE


def parse_hierarchies(text: str) -> tuple[Hierarchy, ...]:
    """The cgroup mounts of a mountinfo text (proc_pid_mountinfo(5)). Of several of one hierarchy the first counts."""
    found: dict[frozenset[str], Hierarchy] = {}
    for line in text.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        end = fields.index("-", 6)
        kind = fields[end + 1]
        if kind not in {"cgroup", "cgroup2"}:
            continue
        options = fields[end + 3].split(",") if kind == "cgroup" else []
        controllers = frozenset(
            one for one in options if one.startswith("name=") or ("=" not in one and one not in _OPTIONS)
        )
        if kind == "cgroup" and not controllers:
            continue
        root, mount = (_OCTAL.sub(lambda one: chr(int(one[1], 8)), fields[number]) for number in (3, 4))
        found.setdefault(
            controllers,
            Hierarchy(mount=mount, root=root, version=2 if kind == "cgroup2" else 1, controllers=controllers),
        )
    return tuple(found.values())


def hierarchies(mountinfo: Path = MOUNTINFO) -> tuple[Hierarchy, ...]:
    """The hierarchies that this process sees. Raises `OSError`."""
    return parse_hierarchies(mountinfo.read_text(encoding="utf-8", errors="surrogateescape"))


def unified(seen: Sequence[Hierarchy]) -> Hierarchy | None:
    """Version 2's, where it is mounted: at /sys/fs/cgroup, or at /sys/fs/cgroup/unified beside version 1."""
    return next((one for one in seen if one.version == 2), None)


def of_controller(seen: Sequence[Hierarchy], controller: str) -> Hierarchy | None:
    """The one that has a controller: only one can have it. ``name=systemd``: where systemd keeps its units."""
    for one in seen:
        if controller in one.controllers:
            return one
    both = unified(seen)
    if both is None or controller == "name=systemd":
        return both
    return both if controller in _words(both.mount, "cgroup.controllers") else None


def parse_memberships(data: bytes) -> dict[str, str]:
    """A thread's cgroups, from its cgroup file (cgroups(7)): by controller of v1; that of v2 has the empty name."""
    found: dict[str, str] = {}
    for line in data.splitlines():
        number, _colon, rest = line.decode(errors="surrogateescape").partition(":")
        names, colon, path = rest.partition(":")
        if colon and number.isdigit():
            for name in names.split(","):
                found[name] = path
    return found


def memberships(tid: int) -> dict[str, str]:
    """A thread's cgroups as `parse_memberships` has them. Raises `GoneError`; `OSError` (EMFILE)."""
    return parse_memberships(procfs.read(f"/proc/{tid}/task/{tid}/cgroup", f"thread {tid}"))


def open_group(directory: str) -> int:
    """A descriptor of this cgroup, which no other of the same name ever gets. Raises `OSError`; see `is_gone`."""
    return os.open(directory, _DIRECTORY)


def write_at(group: int, name: str, text: str) -> None:
    """Write a file of an open cgroup, which must be there: on no file system a new one is made. Raises `OSError`."""
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=group)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def threads(group: int, threads_file: str) -> list[int]:
    """All threads in an open cgroup and below it, in ascending order; ``threads_file`` of its `Hierarchy`.

    Raises:
        OSError: the cgroup was removed (`is_gone`), or no descriptor is left. Of those below it, removed ones are
            passed over.
    """
    found: set[int] = set()
    _collect(group, threads_file, found, _DEEPEST)
    found.discard(0)  # of another process-id namespace: it has no number here
    return sorted(found)


def _collect(group: int, threads_file: str, found: set[int], depth: int) -> None:
    found.update(map(int, procfs.read_at(group, threads_file).split()))
    if depth == 0 or os.fstat(group).st_nlink == _LEAF_LINKS:
        return
    with os.scandir(group) as entries:
        names = [one.name for one in entries if one.is_dir(follow_symlinks=False)]
    for name in names:
        try:
            child = os.open(name, _DIRECTORY, dir_fd=group)
            try:
                _collect(child, threads_file, found, depth - 1)
            finally:
                os.close(child)
        except OSError as error:
            if not is_gone(error):
                raise


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit of CPU time for all threads below a cgroup together: so much every period, in microseconds."""

    quota_us: int | None
    """None: no limit."""
    period_us: int

    @property
    def cpus(self) -> float | None:
        """As a number of CPUs; None: no limit."""
        return None if self.quota_us is None else self.quota_us / self.period_us

    def __str__(self) -> str:
        return f"{'max' if self.quota_us is None else self.quota_us} {self.period_us}"


def parse_cpu_max(text: str | bytes) -> Quota:
    """A cpu.max, as ``max 100000`` or ``50000 100000``. Raises `ValueError`."""
    words = (text if isinstance(text, str) else text.decode("ascii", errors="replace")).split()
    if len(words) != 2 or not (words[1].isdigit() and int(words[1])) or not (words[0] == "max" or words[0].isdigit()):
        raise ValueError(f"not a cpu.max: {text!r:.100}")
    return Quota(None if words[0] == "max" else int(words[0]), int(words[1]))


def quota(directory: str, version: int) -> Quota | None:
    """The limit of one cgroup; None where it has no such file: the root, or no cpu controller. Raises `OSError`."""
    try:
        if version == 2:
            return parse_cpu_max(_file(directory, "cpu.max"))
        limit, period = int(_file(directory, "cpu.cfs_quota_us")), int(_file(directory, "cpu.cfs_period_us"))
    except FileNotFoundError:
        return None
    except ValueError:
        return None
    return Quota(limit if limit >= 0 else None, period) if period > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuStat:
    """A cgroup's cpu.stat. What a kernel or a version does not tell is 0."""

    usage_ns: int
    """CPU time used below it; version 1 tells it elsewhere (cpuacct.usage)."""
    nr_periods: int
    """Periods of its quota in which it wanted to run."""
    nr_throttled: int
    """Those in which the quota did not suffice."""
    throttled_ns: int
    """How long its CPUs waited for the next period, summed."""


def parse_cpu_stat(data: bytes) -> CpuStat:
    """A cpu.stat of version 2 (microseconds) or 1 (nanoseconds). What is no number is passed over."""
    found: dict[bytes, int] = {}
    for line in data.splitlines():
        name, _space, value = line.partition(b" ")
        if value.isdigit():
            found[name] = int(value)
    return CpuStat(
        usage_ns=found.get(b"usage_usec", 0) * 1000,
        nr_periods=found.get(b"nr_periods", 0),
        nr_throttled=found.get(b"nr_throttled", 0),
        throttled_ns=found.get(b"throttled_usec", 0) * 1000 or found.get(b"throttled_time", 0),
    )


def _file(directory: str, name: str) -> bytes:
    fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _words(directory: str, name: str) -> list[str]:
    try:
        return _file(directory, name).decode("ascii", errors="replace").split()
    except OSError:
        return []
