"""Isolated cpuset partitions (cgroup v2): cores on which no other task of the host may run and nothing is balanced.

Linux 6.7 and later (`cpuset.cpus.exclusive`): only the vCPUs' threads are in the partition, a threaded child ``vcpu``
of the run's cgroup; the other threads stay on the host's cores. Older kernels: the whole process is in the run's
cgroup, directly below the root, and that is the partition.

The kernel takes a write of ``isolated`` without an error also where it makes no valid partition of it, and later
changes of others' cgroups can end it without a sign. So nothing here trusts a write: `Cpusets.check` reads back what
holds now. Source: Documentation/admin-guide/cgroup-v2.rst, "Cpuset Interface Files"; cgroups(7).
"""

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from edgehold.errors import FailedError
from vmand.backend.mounts import mounts
from vmand.backend.topology import write
from vmand.model import parse_cores, plain
from vmand.placement import as_list

log = logging.getLogger(__name__)

PREFIX = "vmand-p-"
"""How the name of a run's cgroup begins, whether vmand made it or systemd did for a unit of this name."""
_OWN = re.compile(PREFIX + r"([0-9]{1,10})-[0-9A-Za-z-]{1,8}")
_CHILD = "vcpu"
_EXCLUSIVE_SINCE = (6, 7)
# rmdir(2) of a cgroup whose last task is being buried: EBUSY, for some milliseconds.
_RMDIR_TRIES, _RMDIR_EVERY_S = 50, 0.01


class Cpusets:
    """The host's cgroup v2 hierarchy, as far as cores are concerned."""

    def __init__(
        self, *, boot_isolated: frozenset[int] = frozenset(), proc: Path = Path("/proc"), release: str = ""
    ) -> None:
        """``boot_isolated``: see `topology.isolated_by_boot`. ``release``: the kernel's, as uname(2) says it."""
        self._boot_isolated = boot_isolated
        self._proc = proc
        self._release = release or os.uname().release
        self._whole: bool | None = None
        self._root, self._why_not = _hierarchy(proc / "self/mountinfo")

    def why_not(self) -> str:
        """Why no partition can be isolated here at all; empty where that may work."""
        return self._why_not

    @property
    def whole_process(self) -> bool:
        """All threads of a QEMU are in the partition, not the vCPUs' alone; its cgroup must be below the root."""
        if self._whole is None and self._root is not None:
            for one in _groups(self._root):
                if (one / "cpuset.cpus").exists():  # the files say it better than the number: some backport it
                    self._whole = not (one / "cpuset.cpus.exclusive").exists()
                    break
        if self._whole is not None:
            return self._whole
        found = re.match(r"(\d+)\.(\d+)", self._release)
        return found is None or (int(found[1]), int(found[2])) < _EXCLUSIVE_SINCE

    def own(self, partition: int, run: str) -> Path:
        """The cgroup that vmand makes for a run where systemd does not. Needs a hierarchy."""
        return self._mount / f"{PREFIX}{partition}-{run[:8]}"

    def group_of(self, pid: int) -> Path | None:
        """The cgroup of a run that the process is in; None where it is in another or gone."""
        if self._root is None:
            return None
        for line in _text(self._proc / str(pid) / "cgroup").splitlines():
            if line.startswith("0::/"):  # cgroups(7): hierarchy 0 is v2
                group = self._root / line[4:]
                return group if group.name.startswith(PREFIX) else None
        return None

    def ready(self, group: Path | None, cores: frozenset[int]) -> bool:
        """Whether a run's cgroup, where it has one, has its cpuset already, and no cgroup that ends has the cores."""
        if self._root is None or group is None:
            return self._root is None or cores <= _cores(self._root / "cpuset.cpus.effective")
        partition = self._partition(group) / "cpuset.cpus.partition"
        return (group / "cpuset.cpus.partition").exists() and (
            cores <= _cores(self._root / "cpuset.cpus.effective") or _text(partition).startswith("isolated")
        )

    def isolate(self, group: Path, *, pid: int, tids: Sequence[int], cores: frozenset[int]) -> None:
        """Make it so, whatever part of it is there already. The process comes in only when the partition is valid.

        The affinity of its threads is lost by that.

        Raises:
            FailedError: the reason. A cgroup of our own is removed, unless the process is in it.
        """
        try:
            partition = self._make(group, cores)
            _set(partition / "cpuset.cpus", as_list(cores))
            if not self.whole_process:
                _set(partition / "cpuset.cpus.exclusive", as_list(cores))
            _set(partition / "cpuset.cpus.partition", "isolated")
            if why := self._state(partition, cores):
                raise FailedError(why + self._culprits(group, cores))
            if self.group_of(pid) != group:
                write(group / "cgroup.procs", str(pid))
            if not self.whole_process:
                for tid in tids:
                    write(partition / "cgroup.threads", str(tid))
        except OSError as error:
            self._undo(group, pid)
            where = str(error.filename or "cgroup").removeprefix(str(self._mount))
            raise FailedError(f"{where}: {error.strerror}{self._culprits(group, cores)}") from error
        except FailedError:
            self._undo(group, pid)
            raise

    def repair(self, group: Path, *, pid: int, tids: Sequence[int], cores: frozenset[int]) -> None:
        """Try once to get an isolation back that was lost. To write ``isolated`` alone does nothing before Linux 6.12.

        Raises:
            FailedError: as `isolate`.
        """
        partition = self._partition(group) / "cpuset.cpus.partition"
        if partition.exists():
            try:
                write(partition, "member")
            except OSError as error:
                raise FailedError(f"/{partition.relative_to(self._mount)}: {error.strerror}") from error
        self.isolate(group, pid=pid, tids=tids, cores=cores)

    def check(self, group: Path, *, tids: Sequence[int], cores: frozenset[int]) -> str:
        """Why the cores are not isolated now; empty where they are. Reads four small files, more where they are not."""
        partition = self._partition(group)
        if why := self._state(partition, cores):
            return why + self._culprits(group, cores)
        inside = set(_text(partition / "cgroup.threads").split())
        if outside := [tid for tid in tids if str(tid) not in inside]:
            return f"{_count(len(outside), 'vCPU thread')} outside the cgroup of the isolated cores"
        return ""

    def release(self, partition: int, run: str) -> None:
        """Give the cores of a run that ended back: an empty cgroup would keep them. Idempotent.

        The cgroup of a unit is systemd's to remove.
        """
        if self._root is not None and not _remove(self.own(partition, run), tries=_RMDIR_TRIES):
            log.warning("the cgroup of partition %d is still in use; its cores stay isolated", partition)

    def clear(self, partition: int) -> None:
        """Remove what earlier runs of a partition left; asked for while it has no process."""
        self._remove_empty(lambda one: one == partition)

    def sweep(self, ids: Collection[int]) -> None:
        """Remove the empty cgroups of partitions that are not among these."""
        self._remove_empty(lambda one: one not in ids)

    def held(self) -> frozenset[int]:
        """The cores in the cgroups of runs, whoever made them: they are not in vmand's own affinity any more."""
        if self._root is None:
            return frozenset()
        found: set[int] = set()
        for group in self._root.rglob(PREFIX + "*"):
            for one in (group, group / _CHILD):
                if _text(one / "cpuset.cpus.partition").startswith("isolated"):
                    found |= _cores(one / "cpuset.cpus")
        return frozenset(found)

    def _remove_empty(self, chosen: Callable[[int], bool]) -> None:
        for group in _groups(self._root) if self._root is not None else ():
            found = _OWN.fullmatch(group.name)
            if found and chosen(int(found[1])) and _remove(group, tries=1):
                log.warning("removed a cgroup that no guest needs any more: %s", group.name)

    @property
    def _mount(self) -> Path:
        if self._root is None:
            raise FailedError(self._why_not)
        return self._root

    def _partition(self, group: Path) -> Path:
        return group if self.whole_process else group / _CHILD

    def _make(self, group: Path, cores: frozenset[int]) -> Path:
        """The cgroups; returns the one that is to be the partition. Now their files tell what the kernel can."""
        way = self._way(group)
        for above in (self._mount, *way[:-1]):
            _enable(above)
        _make(group)
        if self.whole_process and len(way) > 1:
            raise FailedError(f"this kernel (before Linux 6.7) isolates only cgroups below the root, not {group}")
        if self.whole_process:
            return group
        # Each cgroup on the way down must have been given what the next takes: a slice the sum of all its units.
        for above in way[:-1]:
            _set(above / "cpuset.cpus.exclusive", as_list(_cores(above / "cpuset.cpus.exclusive") | cores))
        _set(group / "cpuset.cpus.exclusive", as_list(cores))
        _make(group / _CHILD)
        # First: then cpuset can be passed on although processes are in the group (cgroups(7), "Threaded mode").
        _set(group / _CHILD / "cgroup.type", "threaded")
        _enable(group)
        return group / _CHILD

    def _way(self, group: Path) -> list[Path]:
        """The cgroups from below the root down to this one."""
        return [self._mount.joinpath(*parts) for parts in _prefixes(group.relative_to(self._mount).parts)]

    def _state(self, partition: Path, cores: frozenset[int]) -> str:
        """Why the partition is not valid; empty where it is."""
        state = _text(partition / "cpuset.cpus.partition").strip()
        if state != "isolated":
            return f"the cpuset is no isolated partition (the kernel says: {plain(state, 200) or 'nothing'})"
        # The state alone does not tell: it is kept when a core goes offline, or when the parent takes cores away.
        if (effective := _cores(partition / "cpuset.cpus.effective")) != cores:
            return f"the cpuset has cores {as_list(effective) or 'none'} instead of {as_list(cores)}; is one offline?"
        if both := _cores(self._mount / "cpuset.cpus.effective") & cores:
            return f"other tasks may still run on cores {as_list(both)}"
        return ""

    def _culprits(self, group: Path, cores: frozenset[int]) -> str:
        """Whose cpusets are in the way, as the end of a sentence."""
        found = []
        for level in self._way(group):
            for other in _groups(level.parent):
                if other != level and (file := self._in_the_way(other, cores)):
                    name, what = other.relative_to(self._mount), _text(other / file).strip()
                    found.append(plain(f"/{name} has {file} {what}", 200))
        said = f"; in the way: {', '.join(found[:3])}{' and others' if found[3:] else ''}" if found else ""
        if boot := cores & self._boot_isolated:
            said += f"; the kernel was booted with isolcpus= for {as_list(boot)}"
        return said

    def _in_the_way(self, other: Path, cores: frozenset[int]) -> str:
        """The file of another cgroup which keeps these cores from being isolated."""
        if _cores(other / "cpuset.cpus.exclusive") & cores:
            return "cpuset.cpus.exclusive"
        cpus = _cores(other / "cpuset.cpus")
        # Where there are exclusive cores, others may name them too, unless they would be left with none.
        fatal = self.whole_process or cpus <= cores or _text(other / "cpuset.cpus.partition").strip() != "member"
        return "cpuset.cpus" if cpus & cores and fatal else ""

    def _undo(self, group: Path, pid: int) -> None:
        """Take back what was begun. Where the process is in the group, it stays, and the cores are everybody's."""
        if self.group_of(pid) != group and _OWN.fullmatch(group.name):
            _remove(group, tries=1)
            return
        partition = self._partition(group) / "cpuset.cpus.partition"
        if partition.exists():
            try:
                write(partition, "member")
            except OSError as error:
                log.warning("%s: %s", partition, error.strerror)


def _hierarchy(mountinfo: Path) -> tuple[Path | None, str]:
    """Where cgroup v2 is mounted with its cpusets, or None and why nothing can be isolated."""
    v1 = False
    roots = []
    for mount in mounts(mountinfo):
        v1 |= mount.kind == "cgroup" and "cpuset" in mount.options
        if mount.kind == "cgroup2":
            roots.append(Path(mount.point))
    for root in roots:
        if "cpuset" in _text(root / "cgroup.controllers").split():
            if (root / "cgroup.type").exists():  # the root cgroup has none
                return None, f"{root} is not the root of the host's cgroups (a container?), which isolation needs"
            if not os.access(root / "cgroup.subtree_control", os.W_OK):
                return None, f"vmand may not write to {root}"
            return root, ""
    if v1:
        return None, "cpusets are those of cgroup v1 here; boot with cgroup_no_v1=cpuset to have them in cgroup v2"
    if not roots:
        return None, "no cgroup v2 is mounted; mount it at /sys/fs/cgroup"
    return None, "this kernel has no cpusets in cgroup v2 (CONFIG_CPUSETS)"


def _prefixes(parts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (parts[: count + 1] for count in range(len(parts)))


def _groups(group: Path) -> list[Path]:
    """The children of a cgroup."""
    try:
        with os.scandir(group) as entries:
            return sorted(Path(one.path) for one in entries if one.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _text(path: Path) -> str:
    """A file of the kernel's; empty where it is not there or its cgroup goes away."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cores(path: Path) -> frozenset[int]:
    try:
        return parse_cores(_text(path).strip())
    except ValueError:
        return frozenset()


def _set(path: Path, text: str) -> None:
    """Write what does not stand there yet."""
    if _text(path).strip() != text:
        write(path, text)


def _enable(group: Path) -> None:
    """Give the children of a cgroup their cpusets."""
    if "cpuset" not in _text(group / "cgroup.subtree_control").split():
        write(group / "cgroup.subtree_control", "+cpuset")


def _make(group: Path) -> None:
    group.mkdir(mode=0o755, exist_ok=True)


def _rmdir(group: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        group.rmdir()


def _remove(group: Path, *, tries: int) -> bool:
    """Remove a cgroup of ours and its child; False where tasks are in it."""
    for left in range(tries, 0, -1):
        try:
            for one in (group / _CHILD, group):
                _rmdir(one)
        except OSError as error:
            if error.errno != errno.EBUSY:
                log.warning("%s: %s", group, error.strerror)
                return False
            if left > 1:
                time.sleep(_RMDIR_EVERY_S)
        else:
            return True
    return False


def _count(number: int, what: str) -> str:
    return f"{number} {what}{' is' if number == 1 else 's are'}"
