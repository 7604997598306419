"""How exactly deadlined's cycles begin on their grid: quiet, under load, with many threads, and while a client asks."""

import asyncio
import contextlib
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence

from edgehold.api.deadlined import Sample, Target, TargetKind
from edgehold.clock import NS_PER_MS, NS_PER_S
from tests.bench.deadline_host import (
    CYCLE_MS,
    HISTORY,
    Crowd,
    Deadlined,
    Outcome,
    VoidError,
    private_deadlined,
    stress,
    tiny,
)
from tests.bench.figures import Figure, percentile

BAR_MS = 2.0
FEW, MANY = 2, 1000
POLL_S = 0.1
SETTLE_S = 3.0
# What, whether stress-ng runs, whether a client lists everything.
SITUATIONS = (
    ("quiet", False, False),
    ("under stress-ng --cpu 4", True, False),
    ("quiet, while a client asks", False, True),
    ("under stress-ng --cpu 4, while a client asks", True, True),
)
_T = CYCLE_MS * NS_PER_MS


async def jitter(options: Namespace) -> Outcome:
    """Cycles of some seconds in each situation."""
    outcome = Outcome(f"Cycle jitter over {options.seconds:g} s each, T = {CYCLE_MS} ms")
    for threads in (FEW, MANY):
        # The one whose history tells when it was sampled; the others are only many.
        with Crowd(1) as clock, Crowd(threads - 2) as crowd:
            async with private_deadlined(history=HISTORY, fast_cycle_ms=0) as daemon:
                await daemon.client.attach(Target(kind=TargetKind.THREAD, id=clock.pid), tiny(budget_ns=100_000))
                await daemon.client.attach(Target(kind=TargetKind.PROCESS, id=crowd.pid), tiny(budget_ns=100_000))
                for what, loaded, asked in SITUATIONS:
                    late = await _situation(daemon, options.seconds, loaded=loaded, asked=asked)
                    p50, p99, worst = (percentile(late, share) for share in (0.5, 0.99, 1.0))
                    bar = BAR_MS if not asked else None
                    note = f"p50 {p50:.2f}, max {worst:.2f} ms of {len(late)} cycles"
                    outcome.figures.append(Figure(f"p99, {threads} threads, {what}", p99, "ms", bar, note=note))
                    outcome.data[f"{threads} threads, {what}"] = late
    return outcome


async def _situation(daemon: Deadlined, seconds: float, *, loaded: bool, asked: bool) -> list[float]:
    """How late each cycle began, in ms."""
    with stress() if loaded else contextlib.nullcontext():
        await asyncio.sleep(SETTLE_S)
        async with _polls(daemon) if asked else contextlib.nullcontext():
            await asyncio.sleep(seconds)
            first = min(one.id for one in await daemon.client.list_attachments())
            history = (await daemon.client.attachment(first, last=round(seconds * 1000 / CYCLE_MS))).history
    return lateness_ms(history)


@contextlib.asynccontextmanager
async def _polls(daemon: Deadlined) -> AsyncIterator[None]:
    """A client that lists everything every 100 ms, meanwhile."""

    async def poll() -> None:
        while True:
            await daemon.client._call("GET", "/v1/attachments")
            await asyncio.sleep(POLL_S)

    task = asyncio.create_task(poll())
    try:
        yield
    finally:
        if task.done():
            task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def lateness_ms(history: Sequence[Sample]) -> list[float]:
    """By how much each sample is behind its place on the grid; the earliest of them all is taken to be on it.

    Raises:
        VoidError: there are none to speak of.
    """
    if len(history) < 10:
        raise VoidError(f"only {len(history)} samples were kept")
    origin = history[0].time_ns
    # From half a period before its place to half behind: a cycle that is later than that counts for the next one.
    off = [(one.time_ns - origin + _T // 2) % _T - _T // 2 for one in history]
    first = min(off)
    return [(one - first) * 1000 / NS_PER_S for one in off]
