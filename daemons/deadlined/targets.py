"""Which threads a target has now. A source is asked in every cycle and must be cheap; it never waits and never raises.

A thread id that ended is told to the source (`forget`), so that the id, used again by a stranger, is not held.
"""

import os
from typing import Protocol

from edgehold.api.deadlined import Target, TargetKind
from edgehold.errors import BadRequestError, DeniedError
from edgehold.kernel import procfs
from edgehold.kernel.procfs import GoneError


class Source(Protocol):
    """Where an attachment's threads come from."""

    @property
    def over(self) -> str:
        """Why there will never be a thread again, or an empty text."""
        ...

    @property
    def reason(self) -> str:
        """What a person should know about the target at the moment, or an empty text."""
        ...

    @property
    def suspended(self) -> bool:
        """The target is a guest that is suspended: its budgets shrink to the floor until it is resumed."""
        ...

    def changed(self) -> bool:
        """Whether `tids` may answer something else than the last time; asked in every cycle, so about a microsecond.

        Threads that ended need not be told: the sampler notices.
        """
        ...

    def tids(self) -> tuple[int, ...]:
        """The threads as they are now."""
        ...

    def forget(self, tid: int) -> None:
        """This thread ended."""
        ...

    def close(self) -> None:
        """The attachment is gone."""
        ...


class ThreadSource:
    """One thread."""

    reason = ""
    suspended = False

    def __init__(self, tid: int) -> None:
        self._tids: tuple[int, ...] = (tid,)

    @property
    def over(self) -> str:
        return "" if self._tids else "the thread ended"

    def changed(self) -> bool:
        return False

    def tids(self) -> tuple[int, ...]:
        return self._tids

    def forget(self, tid: int) -> None:
        self._tids = tuple(one for one in self._tids if one != tid)

    def close(self) -> None:
        """Nothing is kept open."""


class ProcessSource:
    """All threads of a process, read through a directory that belongs to this process for ever."""

    reason = ""
    suspended = False

    def __init__(self, pid: int) -> None:
        """Raises `GoneError`."""
        self.over = ""
        try:
            self._task = os.open(f"/proc/{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if procfs.is_gone(error):
                raise GoneError(f"process {pid} does not exist (any more)") from None
            raise
        self._links = 0

    def changed(self) -> bool:
        # A directory of threads has two links and one for each (fs/proc/base.c, proc_task_getattr). Who ends while
        # another one begins is missed here, and noticed by the sampler.
        try:
            return os.fstat(self._task).st_nlink != self._links
        except OSError:
            return True

    def tids(self) -> tuple[int, ...]:
        if self.over:
            return ()
        try:
            self._links = os.fstat(self._task).st_nlink
            found = tuple(sorted(int(name) for name in os.listdir(self._task)))  # noqa: PTH208 - by descriptor
        except OSError as error:
            if not procfs.is_gone(error):
                raise
            found = ()
        if not found:
            self.over = "the process ended"
        return found

    def forget(self, tid: int) -> None:  # noqa: ARG002 - the directory does not list it any more, or as a zombie
        self._links = 0

    def close(self) -> None:
        os.close(self._task)


def check_thread(tid: int) -> procfs.ThreadStat:
    """That this thread may be held at all; its facts.

    Raises:
        GoneError: no such thread, or it has ended and only its parent has not looked.
        DeniedError: it is deadlined's own, init's or the kernel's.
    """
    facts = procfs.stat(tid)
    if facts.ended:
        raise GoneError(f"thread {tid} has ended")
    if why := why_not(facts):
        raise DeniedError(why)
    return facts


def why_not(facts: procfs.ThreadStat) -> str:
    """Why nobody may ever hold this thread, or an empty text."""
    if facts.kernel:
        return f"thread {facts.tid} ({facts.name}) is the kernel's own; deadlined holds threads of programs only"
    if (procfs.PROC / f"1/task/{facts.tid}").exists():
        return f"thread {facts.tid} is the init process': if it was throttled, the whole host would wait for it"
    if (procfs.PROC / f"self/task/{facts.tid}").exists():
        return f"thread {facts.tid} is deadlined's own: throttled by itself it could never raise its budget"
    return ""


def open_local(target: Target) -> Source:
    """The source of a thread or a process.

    Raises:
        GoneError: it does not exist.
        BadRequestError: a process is asked for by the id of one of its other threads.
        DeniedError: it may not be held.
    """
    check_thread(target.id)
    if target.kind is TargetKind.THREAD:
        return ThreadSource(target.id)
    if (pid := procfs.process_of(target.id)) != target.id:
        raise BadRequestError(f"{target.id} is a thread of process {pid}, not a process: attach --pid {pid}, or --tid")
    return ProcessSource(target.id)
