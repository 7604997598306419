"""Which threads a process and its descendants have now. A `Source`, see `targets`.

Each process is known by a directory that belongs to it for ever, so an id that is used again is nobody we hold. A
descendant stays one when its parent ends; one whose parent ended before anybody looked is not found (proc(5) tells
living parents only), which a cgroup would not miss.
"""

import os
from dataclasses import dataclass, field

from deadlined.targets import check_thread
from edgehold.clock import NS_PER_S, Clock, SystemClock
from edgehold.errors import BadRequestError, UnsupportedError
from edgehold.kernel import procfs
from edgehold.kernel.births import UNKNOWN, Births
from edgehold.kernel.procfs import GoneError

# Everything is read anew so seldom: it costs some microseconds a thread, for what the cheap ways could miss.
_HEAL_NS = 30 * NS_PER_S
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# To ask one new id whose child it is costs about as much as to ask so many threads for their children.
_ASKING = 8


@dataclass(slots=True)
class _Member:
    directory: int
    """A descriptor of /proc/<pid>."""
    links: int = -1
    """Of its directory ``task`` when it was listed: two, and one for each thread."""
    tids: tuple[int, ...] = ()
    ended: set[int] = field(default_factory=set)
    """Threads that are over, and are listed until their parent has looked."""


class TreeSource:
    """A process, its descendants, and all their threads."""

    suspended = False

    def __init__(self, pid: int, *, births: Births, clock: Clock | None = None) -> None:
        """Raises `GoneError`; `OSError` (EMFILE)."""
        self.over = ""
        self.reason = ""
        self._births = births
        self._clock = clock or SystemClock()
        self._members: dict[int, _Member] = {pid: _Member(_open(pid))}
        self._last = self._before = UNKNOWN
        """The last id of this host at the latest look, and at the one before."""
        self._again = True
        self._heal_at_ns = 0

    def changed(self) -> bool:
        if self.over:
            return False
        return (
            self._again
            or self._births.last() != self._last
            or self._last == UNKNOWN
            or self._clock.monotonic_ns() >= self._heal_at_ns
        )

    def tids(self) -> tuple[int, ...]:
        if self.over:
            return ()
        now_ns = self._clock.monotonic_ns()
        last = self._births.last()
        whole = now_ns >= self._heal_at_ns
        # A fork that is not finished has an id and no directory yet: each id is looked for twice.
        self._again = last != self._last
        begin, self._before, self._last = self._before, self._last, last
        try:
            self._list(whole=whole)
            self._adopt(begin, last, whole=whole)
            self.reason = ""
        except OSError as error:
            self._again = True
            self._before = UNKNOWN
            self.reason = f"not all of the processes are known: {error.strerror}; tried again"
        else:
            if whole:
                self._heal_at_ns = now_ns + _HEAL_NS
        if not self._members:
            self.over = "the process and all its descendants ended"
        return tuple(sorted(tid for one in self._members.values() for tid in one.tids))

    def forget(self, tid: int) -> None:
        for one in self._members.values():
            if tid in one.tids:
                one.ended.add(tid)
                one.links = -1
                self._again = True

    def close(self) -> None:
        while self._members:
            _, one = self._members.popitem()
            os.close(one.directory)

    def _list(self, *, whole: bool) -> None:
        """Bring each member's threads up to date; who has none any more leaves."""
        for pid, one in list(self._members.items()):
            try:
                links = os.stat("task", dir_fd=one.directory).st_nlink
                if whole or links != one.links:
                    listed = _threads(one)
                    one.ended &= listed
                    one.tids = tuple(listed - one.ended)
                    one.links = links
            except OSError as error:
                if not procfs.is_gone(error):
                    raise
                one.tids = ()
            if not one.tids:
                os.close(self._members.pop(pid).directory)

    def _adopt(self, begin: int, last: int, *, whole: bool) -> None:
        """Take in the children that are new: by asking our threads for them, or the new ids for their parents."""
        if not whole and begin == last != UNKNOWN:
            return
        new = last - begin
        if whole or begin == UNKNOWN or new < 0 or new * _ASKING > sum(len(one.tids) for one in self._members.values()):
            todo = list(self._members.values())
            while todo:
                one = todo.pop()
                new_ones = [self._take(child) for child in _children(one) if child not in self._members]
                todo += [member for member in new_ones if member is not None]
            return
        for pid in range(begin + 1, last + 1):
            if pid not in self._members:
                self._take(pid)

    def _take(self, pid: int) -> _Member | None:
        """Take a process in whose parent is one of us; None where it is not one, or over."""
        if pid == os.getpid():
            return None  # whoever attaches deadlined's own ancestor
        try:
            directory = _open(pid)
        except GoneError:
            return None
        one = _Member(directory)
        try:
            parent, ended = _status(directory, pid)
            if parent in self._members:
                one.links = os.stat("task", dir_fd=directory).st_nlink
                one.ended = {pid} if ended else set()
                one.tids = tuple(_threads(one) - one.ended)
        except OSError as error:
            if not procfs.is_gone(error):
                os.close(directory)
                raise
        if not one.tids:
            os.close(directory)
            return None
        self._members[pid] = one
        return one


def _open(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}", _DIRECTORY)
    except OSError as error:
        if procfs.is_gone(error):
            raise GoneError(f"process {pid} does not exist (any more)") from None
        raise


def _threads(one: _Member) -> set[int]:
    fd = os.open("task", _DIRECTORY, dir_fd=one.directory)
    try:
        return {int(name) for name in os.listdir(fd)}  # noqa: PTH208 - by descriptor
    finally:
        os.close(fd)


def _children(one: _Member) -> list[int]:
    """The living children of all threads of a process. Those of a thread that ends meanwhile are its siblings' then."""
    found: list[int] = []
    for tid in one.tids:
        try:
            found += map(int, procfs.read_at(one.directory, f"task/{tid}/children").split())
        except OSError as error:
            if not procfs.is_gone(error):
                raise
    return found


def _status(directory: int, pid: int) -> tuple[int, bool]:
    """The parent of a process, and whether its first thread has ended. Parent 0: a thread of another process.

    Raises:
        OSError: see `procfs.is_gone`.
    """
    fields = dict(line.split(b":", 1) for line in procfs.read_at(directory, "status").splitlines() if b":" in line)
    if int(fields.get(b"Tgid", b"0")) != pid:
        return 0, False
    return int(fields.get(b"PPid", b"0")), fields.get(b"State", b"").strip()[:1] in {b"Z", b"X", b"x"}


def open_tree(pid: int, *, births: Births, clock: Clock | None = None) -> TreeSource:
    """The source of a process and its descendants. deadlined itself is left out where it is one of them.

    Raises:
        GoneError: there is no such process.
        BadRequestError: it is a thread of one, not the process.
        DeniedError: it is init, deadlined, or the kernel's.
        UnsupportedError: this kernel does not tell whose child a process is.
        OSError: no descriptor is left.
    """
    check_thread(pid)
    if (process := procfs.process_of(pid)) != pid:
        raise BadRequestError(f"{pid} is a thread of process {process}, not a process: attach --tree {process}")
    if not os.path.exists("/proc/thread-self/children"):  # noqa: PTH110 - a question, not a path
        raise UnsupportedError(
            "this kernel does not tell the children of a process (CONFIG_PROC_CHILDREN); attach each process by --pid, "
            "or their cgroup by --cgroup"
        )
    return TreeSource(pid, births=births, clock=clock)
