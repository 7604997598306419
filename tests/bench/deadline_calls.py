"""What deadlined asks of the kernel: one sample of a thread, by each way, and sched_setattr while nothing changes."""

import asyncio
import contextlib
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgehold.api.deadlined import Target, TargetKind
from edgehold.clock import NS_PER_MS
from edgehold.errors import UnsupportedError
from edgehold.kernel import native, procfs, sched
from edgehold.kernel.sched import SchedAttr
from edgehold.kernel.taskiter import TaskBuffer, TaskIterator
from edgehold.testing.load import Load
from tests.bench.deadline_host import (
    CALLS_BAR,
    SETATTR_CALLS,
    Crowd,
    Deadlined,
    Outcome,
    VoidError,
    private_deadlined,
    spent,
    tiny,
)
from tests.bench.figures import Figure, number

SAMPLE_BAR_US = 1.2
BAR_AT = 1000
COLD_S = 0.5
WORKS_MS = (2, 4, 6, 8, 10, 12, 14, 16)
CHANGED = 10
_SETATTR = re.compile(r"(\d+\.\d+) sched_setattr\((\d+), \{([^}]*)\}")


async def sampling(options: Namespace) -> Outcome:
    """CPU time of one sample of a thread, by each way, with half a second between passes: caches are cold then."""
    outcome = Outcome(f"One sample of a thread, {COLD_S:g} s between passes, median of {options.passes}")
    for threads in (100, *options.threads):
        with Crowd(threads) as crowd, contextlib.ExitStack() as stack:
            tids = crowd.tids()
            for tid in tids:  # they end with their process, which gives the bandwidth back
                sched.set_attr(tid, SchedAttr.deadline(runtime_ns=30_000, period_ns=100 * NS_PER_MS))
            ways = {"pread": stack.enter_context(_pread(tids))}
            try:
                ways["BPF iterator"] = stack.enter_context(_iterator(len(tids)))
            except UnsupportedError as error:
                print(f"no BPF iterator: {error}", flush=True)
            costs: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(options.passes):
                for name, sample in ways.items():
                    await asyncio.sleep(COLD_S)
                    begin = time.thread_time_ns()
                    sample()
                    costs[name].append((time.thread_time_ns() - begin) / 1000 / threads)
        best = min(costs, key=lambda name: statistics.median(costs[name]))
        for name, values in costs.items():
            # What the daemon takes is the cheapest that the host has.
            bar = SAMPLE_BAR_US if threads == BAR_AT and name == best else None
            note = f"{number(min(values))} to {number(max(values))}"
            what = f"{name}, {threads} threads"
            outcome.figures.append(Figure(what, statistics.median(values), "us of CPU a thread", bar, note=note))
        outcome.data[str(threads)] = costs
    return outcome


@contextlib.contextmanager
def _pread(tids: Sequence[int]) -> Iterator[Callable[[], object]]:
    """Kept descriptors of schedstat, all read in one call."""
    with contextlib.ExitStack() as stack:
        fds = []
        for tid in tids:
            fds.append(procfs.open_thread(tid, "schedstat"))
            stack.callback(os.close, fds[-1])
        batch = native.SchedstatBatch()
        yield lambda: next(batch.read(fds))


@contextlib.contextmanager
def _iterator(threads: int) -> Iterator[Callable[[], object]]:
    """Every deadline thread's counters in one read.

    Raises:
        UnsupportedError: this host has none.
    """
    with TaskIterator.open() as tasks:
        buffer = TaskBuffer()
        if (found := tasks.read(buffer)) < threads:
            raise VoidError(f"the iterator tells {found} of {threads} deadline threads")
        yield lambda: tasks.read(buffer)


async def calls(options: Namespace) -> Outcome:
    """How often a budget is set while every thread needs the same all the time; what a tracer says of that count."""
    outcome = Outcome(f"Calls of sched_setattr; {len(WORKS_MS)} periodic threads of 2 to 16 ms per 100 ms")
    with Load() as load, Crowd(CHANGED) as crowd:
        jobs = [load.periodic(work_s=ms / 1000, period_s=0.1) for ms in WORKS_MS]
        async with private_deadlined() as daemon:
            for job in jobs:
                await daemon.client.attach(Target(kind=TargetKind.THREAD, id=job.pid))
            await asyncio.sleep(options.settle)
            found = await spent(daemon, options.seconds, own=[job.pid for job in jobs])
            traced = await _traced(daemon, crowd, options.traced)
    twice = sum(before == given for before, given in traced.calls)
    outcome.figures += [
        Figure(f"when steady, over {options.seconds:g} s", found.calls_a_thread(len(jobs)), "a thread and cycle",
               CALLS_BAR, note=f"{found.setattr_calls:.0f} calls; strangers used {found.strangers_cpus:.2f} CPUs"),
        Figure(f"with what was set already, of {len(traced.calls)} that strace saw", twice, "calls", 0),
        Figure("the metric, against what strace saw", traced.off, "calls off", 0,
               note=f"{CHANGED + 1} threads were attached and changed in that time"),
    ]  # fmt: skip
    outcome.data = {"steady": found.setattr_calls, "seconds": found.seconds, "traced": traced.calls}
    return outcome


@dataclass(slots=True)
class Traced:
    """What strace saw in some seconds, and the metric beside it."""

    calls: list[tuple[str, str]]
    """What the thread had, and what it was given."""
    off: float
    """By how many calls the metric differs from what strace saw."""


async def _traced(daemon: Deadlined, crowd: Crowd, seconds: float) -> Traced:
    """Trace the daemon; some threads are attached and changed meanwhile, so that there is something to see."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "strace"
        held = [thread.tid for one in await daemon.client.list_attachments() for thread in one.threads]
        last = {tid: _shown(sched.get(tid)) for tid in held}
        tracer = subprocess.Popen(  # noqa: ASYNC220 - a fork does not wait
            ["strace", "-f", "-ttt", "-e", "trace=sched_setattr", "-o", log, "-p", str(daemon.daemon.pid)],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        with tracer:
            assert tracer.stderr is not None
            await asyncio.to_thread(tracer.stderr.readline)  # it has attached
            first = await _count(daemon)
            one = await daemon.client.attach(Target(kind=TargetKind.PROCESS, id=crowd.pid), tiny(budget_ns=100_000))
            await asyncio.sleep(seconds / 2)
            await daemon.client.change(one.id, {"min_budget_ns": 200_000})
            await asyncio.sleep(seconds / 2)
            second = await _count(daemon)
            tracer.send_signal(signal.SIGINT)
            tracer.stderr.close()
        await daemon.client.detach(one.id)
        calls, times = [], []
        for at, tid, text in _SETATTR.findall(log.read_text()):
            calls.append((last.get(int(tid), ""), given := _given(text)))
            last[int(tid)] = given
            times.append(float(at))
    counted = second.calls - first.calls
    # Nobody knows which of those in the moment of asking were counted already.
    least = sum(first.end_s < at < second.begin_s for at in times)
    most = sum(first.begin_s <= at <= second.end_s for at in times)
    return Traced(calls, max(least - counted, counted - most, 0.0))


@dataclass(frozen=True, slots=True)
class Count:
    """The metric, and between which wall times that was."""

    begin_s: float
    calls: float
    end_s: float


async def _count(daemon: Deadlined) -> Count:
    begin_s = time.time()
    return Count(begin_s, await daemon.metric(SETATTR_CALLS), time.time())


def _shown(attr: SchedAttr) -> str:
    return f"{attr.runtime_ns} per {attr.period_ns}" if attr.policy is sched.Policy.DEADLINE else str(attr)


def _given(text: str) -> str:
    """The same of strace's text."""
    fields = dict(part.split("=", 1) for part in text.split(", ") if "=" in part)
    if fields.get("sched_policy") != "SCHED_DEADLINE":
        return text
    return f"{fields['sched_runtime']} per {fields['sched_period']}"
