"""What the parts of `tests.bench.deadline` share: a private real deadlined, crowds of threads to hold, and other load.

Only threads that were started here are ever held, and every reservation is given back by its owner or ends with it.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgehold.api.deadlined import DeadlinedClient, Policy
from edgehold.clock import NS_PER_MS, NS_PER_S
from edgehold.kernel import procfs
from edgehold.testing.daemons import Daemon, private_directory
from tests.bench import strangers
from tests.bench.figures import RESULTS, Figure, plain, resident_mb, show, write

CYCLE_MS = 500
HISTORY = 3000
"""Samples kept a thread where they are what is measured: ten minutes of windows, short ones among them."""
CALLS_BAR = 0.1
"""Calls of sched_setattr, a thread and cycle."""
SETATTR_CALLS = "deadlined_setattr_calls_total"
SOURCE = Path(__file__).with_name("deadline_threads.c")
# Up to 5,000 threads are given back one by one.
STOP_S = 180.0
# A deadline task that others have to live with: 15 ms every 50 ms, all of it used; it leaves by itself when told so.
_NEIGHBOUR = """
import signal
from edgehold.kernel import sched
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
before = sched.get()
sched.set_attr(0, sched.SchedAttr.deadline(runtime_ns=15_000_000, period_ns=50_000_000))
print("ready", flush=True)
while not ended: pass
sched.set_attr(0, sched.without_slice(before))
"""


class VoidError(Exception):
    """A part says nothing: strangers were in the way, or something is broken."""


@dataclass(slots=True)
class Outcome:
    """What one part found: figures for people, data for machines."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


class Deadlined:
    """A running daemon and a client of it."""

    def __init__(self, daemon: Daemon, client: DeadlinedClient) -> None:
        self.daemon = daemon
        self.client = client

    def cpu_ns(self) -> int:
        """CPU time of all its threads so far, ended ones too, to the nanosecond (its CLOCK_PROCESS_CPUTIME_ID)."""
        return time.clock_gettime_ns((~self.daemon.pid << 3) | 2)  # linux/posix-timers.h: MAKE_PROCESS_CPUCLOCK

    async def metric(self, name: str) -> float:
        """A metric without labels.

        Raises:
            VoidError: the daemon has none of this name.
        """
        text = (await self.client._call("GET", "/metrics")).decode()
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return float(value)
        raise VoidError(f"deadlined has no metric {name}")

    def resident_mb(self) -> tuple[float, float]:
        """RSS and PSS."""
        return resident_mb(self.daemon.pid)


@asynccontextmanager
async def private_deadlined(**settings: Any) -> AsyncIterator[Deadlined]:
    """A real daemon of our own, in order at the end: all that it holds is given back then."""
    with private_directory() as directory:
        fixed = {
            "socket": str(directory / "api.sock"),
            "state_dir": str(directory / "state"),
            "vmand_socket": str(directory / "no-vmand.sock"),
            "cycle_ms": CYCLE_MS,
        }
        daemon = Daemon("deadlined", directory=directory, settings=fixed | settings)
        await daemon.start()
        try:
            async with DeadlinedClient(directory / "api.sock", timeout_s=STOP_S) as client:
                yield Deadlined(daemon, client)
        finally:
            await daemon.stop(timeout_s=STOP_S)


def tiny(*, budget_ns: int, period_ms: int = 100) -> Policy:
    """A policy of which thousands fit: begins at its floor."""
    return Policy(period_ns=period_ms * NS_PER_MS, initial_budget_ns=budget_ns, min_budget_ns=budget_ns)


class Crowd:
    """A process of many threads; ends with the block."""

    def __init__(self, threads: int, *, work_us: int = 0, period_us: int = 0) -> None:
        self._process = subprocess.Popen(
            [_program(), str(threads), str(work_us), str(period_us)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self.end()
            raise VoidError(f"{threads} threads could not be started")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def tids(self) -> list[int]:
        """Its threads, without the first, which only waits for the end."""
        return [tid for tid in procfs.threads(self.pid) if tid != self.pid]

    def end(self) -> None:
        """Let it end, and wait."""
        with self._process:  # closes its standard input, which ends it
            pass


def _program() -> str:
    """The compiled crowd."""
    program = RESULTS / "deadline-threads"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        RESULTS.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-std=c11", "-O2", "-pthread", "-o", program, SOURCE], check=True)
    return str(program)


@contextmanager
def stress(cpus: int = 4) -> Iterator[None]:
    """``stress-ng --cpu N`` meanwhile."""
    with subprocess.Popen(
        ["stress-ng", "--cpu", str(cpus), "--quiet"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        try:
            time.sleep(1)  # its workers are forked by then
            yield
        finally:
            process.terminate()


@contextmanager
def neighbours(count: int = 2) -> Iterator[None]:
    """Other deadline tasks meanwhile: 15 ms every 50 ms each."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", _NEIGHBOUR], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            )
            stack.callback(process.terminate)
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise VoidError("a neighbour found no room for its reservation")
        yield


@dataclass(frozen=True, slots=True)
class Spent:
    """What some seconds cost the daemon."""

    percent: float
    """Of one core."""
    strangers_cpus: float
    """What everything but us used meanwhile; with it the figure says nothing on its own."""
    setattr_calls: float
    seconds: float

    def calls_a_thread(self, threads: int) -> float:
        """Calls of sched_setattr, a thread and cycle of the grid."""
        return self.setattr_calls / (self.seconds * 1000 / CYCLE_MS) / max(threads, 1)


async def spent(daemon: Deadlined, seconds: float, *, own: list[int]) -> Spent:
    """Measure the daemon for so long; ``own``: the processes that are no strangers."""
    pids = [daemon.daemon.pid, *own]
    calls = await daemon.metric(SETATTR_CALLS)
    host, cpu, begin = strangers.usage(pids), daemon.cpu_ns(), time.monotonic_ns()
    await asyncio.sleep(seconds)
    elapsed, cpu = time.monotonic_ns() - begin, daemon.cpu_ns() - cpu
    others = strangers.between(host, strangers.usage(pids))
    calls = await daemon.metric(SETATTR_CALLS) - calls
    return Spent(100 * cpu / elapsed, others, calls, elapsed / NS_PER_S)


def report(name: str, outcome: Outcome, *, load_before: tuple[float, ...], options: dict[str, Any]) -> None:
    """Print a part's table with the load, and write ``build/bench/deadline-NAME.json``."""
    after = os.getloadavg()
    show(f"{outcome.title}; load average before {load_before[0]:.2f}, after {after[0]:.2f}", outcome.figures)
    write(f"deadline-{name}", {
        "title": outcome.title, "kernel": os.uname().release, "cpus": os.cpu_count(), "load_before": load_before,
        "load_after": after, "options": options, "figures": plain(outcome.figures), **outcome.data,
    })  # fmt: skip
