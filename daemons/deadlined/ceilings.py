"""What CPU limits of cgroups lie above held threads, so that deadlined heeds them itself.

The kernel does not: a ``cpu.max`` (v1: ``cpu.cfs_quota_us``) binds no deadline thread, on any kernel. A container that
its administrator gave a tenth of a CPU would get all of its reservation. Nothing here waits or raises: what can't be
read stays as it was. Limits that deadlined has set itself do not count.

Work is spread: all of it at once for a new thread, then a limit every two seconds and a membership every minute, so
much in a cycle at most.
"""

import os
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from edgehold.clock import NS_PER_S
from edgehold.kernel import cgroup, procfs
from edgehold.kernel.cgroup import Hierarchy
from edgehold.kernel.procfs import GoneError

_VALUES_NS = 2 * NS_PER_S
_MEMBERS_NS = 60 * NS_PER_S
# At most so many files are read in one call for what is known already.
_READS = 32
# From so many threads of one cgroup on, its own list is cheaper than each thread's file.
_MANY = 16
# Stands for the cgroups that a container does not show.
_OUTSIDE = ""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limited cgroup, and who of the held threads is in it or below it."""

    path: str
    """Below the mount."""
    cpus: float
    tids: frozenset[int]


@dataclass(slots=True, eq=False)
class _Group:
    path: str
    cpus: float | None = None
    tids: set[int] = field(default_factory=set)
    """The held threads directly in it."""
    value_at_ns: int = 0
    """When to read the limit again."""
    members_at_ns: int = 0
    """When to look again whether its threads are still in it."""


class Ceilings:
    """Keeps the limits above a changing set of threads."""

    def __init__(self, *, ours: Collection[str] = (), seen: Sequence[Hierarchy] | None = None) -> None:
        """``ours``: the paths that deadlined limits itself, asked each time. ``seen``: `cgroup.hierarchies()`."""
        self._ours = ours
        try:
            self._where = cgroup.of_controller(cgroup.hierarchies() if seen is None else seen, "cpu")
        except OSError:
            self._where = None
        self._tids: Collection[int] = frozenset()
        self._of: dict[int, _Group] = {}
        self._lost: set[int] = set()
        """Threads whose cgroup could not be read yet."""
        self._groups: dict[str, _Group] = {}
        self._values: deque[_Group] = deque()
        self._members: deque[_Group] = deque()
        """All of them by when they are due: each is put behind the others with the same interval."""
        self._limits: list[Limit] | None = []

    def refresh(self, now_ns: int, tids: Collection[int]) -> None:
        """Bring it up to date with the threads that are held now; ``now_ns`` of CLOCK_MONOTONIC.

        Pass the same object while nothing changed: then it is not looked through. Costs some microseconds a call then,
        and a hundred at most.
        """
        if self._where is None:
            return
        if tids is not self._tids:
            wanted = frozenset(tids)
            self._leave(self._of.keys() - wanted)
            self._lost &= wanted
            self._place(wanted - self._of.keys(), self._where, now_ns)
            self._tids = tids
        elif self._lost:
            self._place(frozenset(self._lost), self._where, now_ns)
        if self._groups:
            left = self._read_values(now_ns, self._where, _READS)
            self._read_members(now_ns, self._where, max(left, 1))

    def paths_of(self, tid: int) -> tuple[str, ...]:
        """The limited cgroups that a thread is in, its own first."""
        group = self._of.get(tid)
        if group is None:
            return ()
        return tuple(path for path in _upwards(group.path) if self.cpus_of(path) is not None)

    def cpus_of(self, path: str) -> float | None:
        """The limit of one cgroup; None: it has none, it is ours, or no held thread is in it."""
        group = self._groups.get(path)
        return None if group is None or path in self._ours else group.cpus

    def limits(self) -> list[Limit]:
        """Every limited cgroup with held threads, the highest first. The same list while nothing changed."""
        if self._limits is None:
            inside: dict[str, set[int]] = {path: set() for path, one in self._groups.items() if one.cpus is not None}
            for group in self._groups.values():
                for path in _upwards(group.path) if group.tids and inside else ():
                    if path in inside:
                        inside[path] |= group.tids
            self._limits = [
                Limit(path, cpus, frozenset(tids))
                for path, tids in sorted(inside.items())
                if (cpus := self._groups[path].cpus) is not None
            ]
        if self._ours:
            return [one for one in self._limits if one.path not in self._ours]
        return self._limits

    def _place(self, new: Collection[int], where: Hierarchy, now_ns: int) -> None:
        """Find the cgroups of threads."""
        left = set(new)
        while left:
            tid = left.pop()
            self._lost.discard(tid)
            try:
                path = where.of(cgroup.memberships(tid))
            except (GoneError, OSError) as error:
                if not isinstance(error, GoneError):
                    self._lost.add(tid)
                continue
            group = self._join(path or _OUTSIDE, where, now_ns)
            inside = {tid}
            if path and len(left) >= _MANY:
                inside |= left & _directly_in(where, path)
            left -= inside
            self._lost -= inside
            group.tids |= inside
            self._of.update(dict.fromkeys(inside, group))
            self._limits = None

    def _join(self, path: str, where: Hierarchy, now_ns: int) -> _Group:
        """The record of a cgroup that has threads of ours, with those above it, their limits read."""
        for one in (path, *_upwards(path)):
            if one not in self._groups:
                self._groups[one] = group = _Group(one, members_at_ns=now_ns + _MEMBERS_NS)
                self._members.append(group)
                self._values.append(group)
                self._value(group, where, now_ns)
        return self._groups[path]

    def _leave(self, tids: Collection[int]) -> None:
        """Forget threads, and the cgroups that none is in or below any more."""
        emptied = False
        for tid in tids:
            group = self._of.pop(tid)
            group.tids.discard(tid)
            emptied |= not group.tids
            self._limits = None
        if emptied:
            used = {path for one in self._groups.values() if one.tids for path in (one.path, *_upwards(one.path))}
            self._groups = {path: one for path, one in self._groups.items() if path in used}

    def _value(self, group: _Group, where: Hierarchy, now_ns: int) -> None:
        group.value_at_ns = now_ns + _VALUES_NS
        if group.path == _OUTSIDE:
            return
        try:
            quota = cgroup.quota(where.directory(group.path), where.version)
        except OSError:
            return
        cpus = None if quota is None else quota.cpus
        if cpus != group.cpus:
            group.cpus = cpus
            self._limits = None

    def _read_values(self, now_ns: int, where: Hierarchy, reads: int) -> int:
        """Read the limits that are due. Returns how many reads are left."""
        while reads and self._values and self._values[0].value_at_ns <= now_ns:
            group = self._values.popleft()
            if self._groups.get(group.path) is group:
                self._value(group, where, now_ns)
                self._values.append(group)
                reads -= 1
        return reads

    def _read_members(self, now_ns: int, where: Hierarchy, reads: int) -> None:
        """Look whether threads are still in the cgroups where they were."""
        while reads > 0 and self._members and self._members[0].members_at_ns <= now_ns:
            group = self._members.popleft()
            if self._groups.get(group.path) is not group:
                continue
            group.members_at_ns = now_ns + _MEMBERS_NS
            self._members.append(group)
            moved = set(group.tids)
            if group.path != _OUTSIDE and len(moved) >= _MANY:
                moved -= _directly_in(where, group.path)
                reads -= 1
            reads -= len(moved)
            self._leave(moved)
            self._place(moved, where, now_ns)


def _upwards(path: str) -> Iterator[str]:
    """A cgroup and those above it, without the root, which has no limit."""
    while path not in {"", "/"}:
        yield path
        path = path.rpartition("/")[0]


def _directly_in(where: Hierarchy, path: str) -> set[int]:
    """The threads of one cgroup, without those below it; none where it can't be read."""
    try:
        group = cgroup.open_group(where.directory(path))
    except OSError:
        return set()
    try:
        return set(map(int, procfs.read_at(group, where.threads_file).split()))
    except OSError:
        return set()
    finally:
        os.close(group)
