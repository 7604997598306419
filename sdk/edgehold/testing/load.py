"""Threads to hold: child processes that sleep, spin or work periodically, and what a test asks of the host.

    with Load() as load:
        hog = load.hog()
        ...

Every process is ended by the block's end, by its own handle. Tests name only ids that this module gave them: a
reservation on a stranger's thread would be a fault of the test's.
"""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, Self

from edgehold.kernel import capacity, limits, procfs, sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import SchedAttr

# Commands on stdin, a thread id a line on stdout; the first line is the main thread's.
_CHILD = """
import sys, threading, time
def say(text): print(text, flush=True)
ends = {}
def sleeper(ready, end):
    ready.append(threading.get_native_id()); end.wait()
def spin():
    while True: pass
def periodic(c, p):
    # Work is CPU time of this thread, so that throttling makes it late and not smaller.
    due = time.monotonic()
    while True:
        until = time.thread_time() + c
        while time.thread_time() < until: pass
        due += p
        time.sleep(max(due - time.monotonic(), 0))
say(threading.get_native_id())
if sys.argv[1] == "hog": spin()
if sys.argv[1] == "periodic": periodic(float(sys.argv[2]), float(sys.argv[3]))
for line in sys.stdin:
    word, _, what = line.strip().partition(" ")
    if word == "thread":
        ready, end = [], threading.Event()
        thread = threading.Thread(target=sleeper, args=(ready, end), daemon=True); thread.start()
        while not ready: time.sleep(0.001)
        ends[ready[0]] = (end, thread); say(ready[0])
    elif word == "end":
        end, thread = ends.pop(int(what)); end.set(); thread.join(); say(what)
"""


class Child:
    """One process of a load."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self._read()

    def thread(self) -> int:
        """Start one more thread, which sleeps; its id. For sleepers only."""
        self._stdin().write("thread\n")
        self._stdin().flush()
        return self._read()

    def end_thread(self, tid: int) -> None:
        """Let a thread that `thread` started return; it is gone afterwards."""
        self._stdin().write(f"end {tid}\n")
        self._stdin().flush()
        self._read()
        # join() returns a moment before the kernel's thread is gone.
        eventually(lambda: tid not in procfs.threads(self.pid), timeout_s=5, what=f"thread {tid} is gone")

    def end(self) -> None:
        """End the process and wait for it."""
        if self._process.poll() is None:
            # A deadline thread that is killed while throttled ends late: let it leave first where we may.
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _stdin(self) -> IO[str]:
        if self._process.stdin is None:
            raise RuntimeError("the child has no stdin")
        return self._process.stdin

    def _read(self) -> int:
        if self._process.stdout is None:
            raise RuntimeError("the child has no stdout")
        return int(self._process.stdout.readline())


class Load:
    """Owns the children; use as a context manager."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for child in self._children:
            child.end()

    def _start(self, *arguments: str) -> Child:
        child = Child(*arguments)
        self._children.append(child)
        return child

    def sleeper(self) -> Child:
        """A process that sleeps, and starts threads when asked."""
        return self._start("sleeper")

    def hog(self) -> Child:
        """A process that spins."""
        return self._start("hog")

    def periodic(self, *, work_s: float, period_s: float) -> Child:
        """A process that uses ``work_s`` seconds of CPU every ``period_s`` seconds."""
        return self._start("periodic", str(work_s), str(period_s))


def deadline_refusal() -> str:
    """Why this host or user can't use SCHED_DEADLINE, or an empty text. Tried, not guessed."""
    refusal: list[str] = []

    def attempt() -> None:
        # A running thread that sets and unsets itself leaves nothing behind but a share of this size for a moment. The
        # budget is more than it can use in between: a thread that ran out of it would wait for its next period.
        try:
            sched.set_attr(0, SchedAttr.deadline(runtime_ns=limits.DL_MIN_PERIOD_NS * 10, period_ns=10**9))
            sched.set_attr(0, SchedAttr())
        except OSError as error:
            refusal.append(str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return "".join(refusal)


def settled(measure: Callable[[], float], *, timeout_s: float = 20.0) -> float:
    """A measure of bandwidth in CPUs, once nothing is on its way back from reservations that ended.

    Raises:
        AssertionError: it never stood still.
    """
    deadline = time.monotonic() + timeout_s
    same, last = 0, -1.0
    while same < 4:
        now = measure()
        same = same + 1 if abs(now - last) <= capacity.RESOLUTION else 0
        last = now
        if time.monotonic() > deadline:
            raise AssertionError(f"the capacity does not stand still: {now}")
        time.sleep(0.1)  # a period of the reservations of most tests
    return last


def deadline_threads() -> dict[int, SchedAttr]:
    """Every thread of the host that is in SCHED_DEADLINE now, with its reservation. Only looks."""
    found: dict[int, SchedAttr] = {}
    for pid in (int(path.name) for path in procfs.PROC.iterdir() if path.name.isdigit()):
        with contextlib.suppress(GoneError):
            for tid in procfs.threads(pid):
                attr = sched.get(tid)
                # A period of 0: read while it was changing (the kernel takes no lock of ours).
                if attr.policy is sched.Policy.DEADLINE and attr.period_ns:
                    found[tid] = attr
    return found


def available() -> float:
    """What the kernel would still admit, in CPUs."""
    return capacity.probe().available


def accounted() -> float:
    """What is left plus what living threads hold, in CPUs: the same at all times, unless a reservation was leaked."""
    return available() + sum(attr.runtime_ns / attr.period_ns for attr in deadline_threads().values())


@contextlib.contextmanager
def capacity_stays(*, timeout_s: float = 15.0) -> Iterator[None]:
    """Fail where the block leaks admission bandwidth. What other programs hold meanwhile is accounted for."""
    before = settled(accounted)
    yield
    after = 0.0

    def whole() -> bool:
        nonlocal after
        after = accounted()
        return after >= before - 2 * capacity.RESOLUTION

    try:
        eventually(whole, timeout_s=timeout_s, what="all bandwidth is free or somebody's")
    except AssertionError as error:
        raise AssertionError(f"{error}: {before:.4f} CPUs before, {after:.4f} after, {deadline_threads()}") from None


def eventually(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.005)
