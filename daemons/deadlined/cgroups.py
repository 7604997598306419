"""Which threads a cgroup has now: a container's, or (`units`) a systemd unit's. A `Source`, see `targets`.

The directory is kept open, so that a cgroup that was removed and made again under the same name is never mistaken for
the old one: it is entered anew. Gone is not over: a container or a service that is started again is held again.
"""

import contextlib
import os
from collections.abc import Sequence

from edgehold.clock import NS_PER_S, Clock, SystemClock
from edgehold.errors import BadRequestError, DeniedError, NotFoundError
from edgehold.kernel import cgroup, procfs
from edgehold.kernel.births import UNKNOWN, Births
from edgehold.kernel.cgroup import Hierarchy
from edgehold.kernel.procfs import GoneError

# Every list costs a microsecond a thread. What a count of its own misses is one that came as another went; without it,
# threads that were moved into the cgroup.
_HEAL_COUNTED_NS = 10 * NS_PER_S
_HEAL_NS = 2 * NS_PER_S
_UNKNOWN = b"?"
_ROOT = "the root cgroup has the threads of the whole host in it; attach a cgroup below it"
_WAITS = "; waits until that changes"
Place = tuple[Hierarchy, str]
"""A hierarchy, and a cgroup's path in it."""


class CgroupSource:
    """The threads of one cgroup and of all below it, wherever of several places it is."""

    over = ""
    suspended = False

    def __init__(
        self,
        what: str,
        places: Sequence[Place],
        *,
        births: Births,
        counts: Hierarchy | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Looks at nothing yet.

        ``what`` names it in texts; of ``places`` the first that exists is taken; ``counts`` has the pids controller,
        where another hierarchy has it.
        """
        self.what = what
        self.absent = "there is no such cgroup"
        self.reason = ""
        self.denied = ""
        """Why its cgroup must not be held, where that is why it is not entered."""
        self.path = ""
        """Its cgroup below the mount, while it has one; the last one else."""
        self._places = tuple(places)
        self._births = births
        self._counts = counts
        self._clock = clock or SystemClock()
        self._group = -1
        self._threads_file = ""
        self._count = -1
        """A descriptor of pids.current."""
        self._marker = b""
        self._again = True
        self._heal_ns = _HEAL_NS
        self._heal_at_ns = 0
        self._tids: tuple[int, ...] = ()

    @property
    def here(self) -> bool:
        """Whether it has a cgroup now, as far as is known."""
        return self._group >= 0

    def expect(self, places: Sequence[Place] | None, *, absent: str) -> None:
        """Where it may be from now on (None: where it was), and why it is not; one that is here stays until it ends."""
        self.absent = absent
        if places is not None:
            self._places = tuple(places)

    def changed(self) -> bool:
        if not self.here:
            return self._enter() or bool(self._tids)
        return self._again or self._clock.monotonic_ns() >= self._heal_at_ns or self._look() != self._marker

    def tids(self) -> tuple[int, ...]:
        if not self.here and not self._enter():
            self._tids = ()
            return ()
        # Before the list: whoever comes in between changes it again.
        marker = self._look()
        try:
            self._tids = tuple(cgroup.threads(self._group, self._threads_file))
        except OSError as error:
            self._again = True
            if cgroup.is_gone(error):
                self._leave()
                self._tids = ()
                self.absent = "its cgroup was removed"
                self.reason = f"{self.what}: {self.absent}{_WAITS}"
            else:
                self.reason = f"{self.what}: {error.strerror}; its last known threads are kept"
            return self._tids
        # A thread in the middle of its fork is counted and not yet listed: once more after each change.
        self._again = marker == _UNKNOWN or marker != self._marker
        self._marker = marker
        self._heal_at_ns = self._clock.monotonic_ns() + self._heal_ns
        self.reason = "" if self._tids else f"no thread is in {self.what}"
        return self._tids

    def forget(self, tid: int) -> None:  # noqa: ARG002 - the kernel does not list it any more
        self._again = True

    def close(self) -> None:
        self._leave()

    def _look(self) -> bytes:
        """What differs when a thread came or went. Costs a microsecond or two."""
        if self._count >= 0:
            try:
                return os.pread(self._count, 32, 0)
            except OSError:
                return _UNKNOWN
        last = self._births.last()
        return _UNKNOWN if last == UNKNOWN else b"%d" % last

    def _enter(self) -> bool:
        """Open its cgroup, if it is there and may be held; else the reason says why not."""
        self.denied = ""
        for hierarchy, path in self._places:
            try:
                group = cgroup.open_group(hierarchy.directory(path))
            except OSError as error:
                if procfs.is_exhausted(error):
                    self.reason = f"{self.what}: {error.strerror}; tried again"
                    return False
                continue
            if why := why_not(hierarchy, path):
                os.close(group)
                self.denied = self.reason = why
                return False
            self.path, self._group, self._threads_file = path, group, hierarchy.threads_file
            self._open_count(path)
            self._marker, self._again = b"", True
            return True
        self.reason = f"{self.what}: {self.absent}{_WAITS}"
        return False

    def _open_count(self, path: str) -> None:
        self._heal_ns = _HEAL_NS
        with contextlib.suppress(OSError):
            self._count = os.open("pids.current", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._group)
            self._heal_ns = _HEAL_COUNTED_NS
            return
        if self._counts:  # who makes a cgroup of version 1 makes one of the same path in each hierarchy, mostly
            with contextlib.suppress(OSError):
                self._count = os.open(f"{self._counts.directory(path)}/pids.current", os.O_RDONLY | os.O_CLOEXEC)

    def _leave(self) -> None:
        for fd in (self._count, self._group):
            if fd >= 0:
                os.close(fd)
        self._group = self._count = -1


def why_not(hierarchy: Hierarchy, path: str) -> str:
    """Why a cgroup must not be held, or an empty text."""
    if path == "/":
        return _ROOT
    for pid, whose in ((os.getpid(), "deadlined itself"), (1, "the init process")):
        try:
            theirs = hierarchy.of(cgroup.memberships(pid))
        except (GoneError, OSError):  # then its threads are refused one by one
            continue
        if theirs is not None and f"{theirs}/".startswith(f"{path}/"):
            return f"cgroup {path} has {whose} in it, which must never be throttled; attach a cgroup that has not"
    return ""


def places_of(path: str, seen: Sequence[Hierarchy]) -> list[Place]:
    """Where a cgroup may be, by its path below a mount, or with the mount: v2 first, then systemd's v1, then cpu's.

    Raises:
        BadRequestError: it is no such path.
    """
    parts = [part for part in path.split("/") if part]
    if not parts or not {".", ".."}.isdisjoint(parts) or "\0" in path:
        raise BadRequestError(
            f"{path!r} names no cgroup: give its path below the mount, as /system.slice/nginx.service, without . and .."
        )
    clean = "/" + "/".join(parts)
    for one in seen:
        if (below := one.path(clean)) is not None:
            return [(one, below)]
    likely = (cgroup.unified(seen), *(cgroup.of_controller(seen, name) for name in ("name=systemd", "cpu")))
    return [(one, clean) for one in dict.fromkeys(likely) if one is not None]


def open_cgroup(
    path: str,
    *,
    births: Births,
    must_exist: bool = True,
    seen: Sequence[Hierarchy] | None = None,
    clock: Clock | None = None,
) -> CgroupSource:
    """The source of a cgroup, by its path below the mount (``/sys/fs/cgroup`` before it does no harm).

    ``must_exist`` false: one that is not there is waited for, as after a restart. ``seen``: `cgroup.hierarchies()`.

    Raises:
        BadRequestError: it is no path below the mount.
        NotFoundError: there is no such cgroup.
        DeniedError: it is the root, or has init or deadlined in it.
        OSError: the mounts can't be read, or no descriptor is left.
    """
    seen = cgroup.hierarchies() if seen is None else seen
    counts = cgroup.of_controller(seen, "pids")
    source = CgroupSource(f"cgroup {path}", places_of(path, seen), births=births, counts=counts, clock=clock)
    begin(source, must_exist=must_exist)
    return source


def begin(source: CgroupSource, *, must_exist: bool) -> None:
    """Look at it for the first time. Raises as `open_cgroup`."""
    source.tids()
    if source.denied:
        raise DeniedError(source.denied)
    if must_exist and not source.here:
        raise NotFoundError(source.reason.removesuffix(_WAITS))
