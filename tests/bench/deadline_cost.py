"""What deadlined itself costs with many threads: CPU, memory, and how long attach and stop take."""

import asyncio
import contextlib
import time
from argparse import Namespace
from dataclasses import asdict

from edgehold.api.deadlined import Policy, Target, TargetKind, ThreadState
from tests.bench.deadline_host import (
    CALLS_BAR,
    CYCLE_MS,
    Crowd,
    Deadlined,
    Outcome,
    VoidError,
    private_deadlined,
    spent,
    tiny,
)
from tests.bench.figures import Figure

MANY, MORE = 1000, 5000
CPU_BAR = {MANY: 0.3, MORE: 2.0}
RSS_BAR_MB = 50.0
# 5,000 x 0.02 / 100 = 1 CPU of admission bandwidth.
BUDGET_NS = 20_000
# Before anything is measured: the attach is over, and what a first cycle has to do as well.
SETTLE_S = 5.0


async def overhead(options: Namespace) -> Outcome:
    """CPU and memory of the daemon with nobody, a thousand and five thousand held threads."""
    outcome = Outcome(f"What deadlined costs, T = {CYCLE_MS} ms, over {options.seconds:g} s each")
    await _cost(outcome, options, what="nobody", threads=0)
    for threads in options.threads:
        await _cost(outcome, options, what=f"{threads} sleeping threads of a process", threads=threads)
        await _cost(outcome, options, what=f"{threads} attachments of a sleeping thread", threads=threads, apart=True)
    work = f"{options.work_us} us every {options.every_ms} ms"
    busy = options.busy * options.work_us / options.every_ms / 1000
    await _cost(
        outcome, options, what=f"{options.busy} threads that work {work} ({busy:.2f} CPUs)", threads=options.busy,
        work_us=options.work_us,
    )  # fmt: skip
    return outcome


async def _cost(
    outcome: Outcome, options: Namespace, *, what: str, threads: int, apart: bool = False, work_us: int = 0
) -> None:
    """One daemon with one crowd."""
    with contextlib.ExitStack() as stack:
        crowd = None
        if threads:
            crowd = stack.enter_context(Crowd(threads, work_us=work_us, period_us=options.every_ms * 1000))
        async with private_deadlined(max_attachments=MORE + 1, max_threads=2 * MORE) as daemon:
            begin = time.monotonic()
            if crowd is not None:
                # One that works has its own period, and twice what it needs: a tenth of so little is no more than an
                # interrupt, and budgets that never stand still are another benchmark.
                policy = tiny(budget_ns=BUDGET_NS)
                if work_us:
                    policy = tiny(budget_ns=2000 * work_us, period_ms=options.every_ms)
                await _attach(daemon, crowd, policy, apart=apart)
            attached_s = time.monotonic() - begin
            await asyncio.sleep(SETTLE_S)
            found = await spent(daemon, options.seconds, own=[crowd.pid] if crowd else [])
            rss, pss = daemon.resident_mb()
            held, short, why = await _held(daemon)
            begin = time.monotonic()
        restored_s = time.monotonic() - begin
    if held < threads:
        raise VoidError(f"{what}: {held} of {threads} threads are held; one is {why}")
    cycle_us = found.percent / 100 * CYCLE_MS * 1000
    note = f"{cycle_us:.0f} us a cycle; strangers used {found.strangers_cpus:.2f} CPUs"
    note += f"; {short} have less than is wanted" if short else ""
    calls = found.calls_a_thread(threads)
    outcome.figures += [
        Figure(f"CPU: {what}", found.percent, "% of a core", CPU_BAR.get(threads), note=note),
        Figure("  RSS", rss, "MB", RSS_BAR_MB if threads == MANY else None, note=f"PSS {pss:.1f} MB"),
        Figure("  sched_setattr", calls, "a thread and cycle", CALLS_BAR if threads else None,
               note=f"attach {attached_s:.1f} s, stop {restored_s:.1f} s"),
    ]  # fmt: skip
    outcome.data[what] = asdict(found) | {
        "rss_mb": rss, "pss_mb": pss, "held": held, "short": short, "attach_s": attached_s, "stop_s": restored_s
    }  # fmt: skip


async def _attach(daemon: Deadlined, crowd: Crowd, policy: Policy, *, apart: bool) -> None:
    if not apart:
        await daemon.client.attach(Target(kind=TargetKind.PROCESS, id=crowd.pid), policy)
        return
    for tid in crowd.tids():
        await daemon.client.attach(Target(kind=TargetKind.THREAD, id=tid), policy)


async def _held(daemon: Deadlined) -> tuple[int, int, str]:
    """How many threads are held, how many of them with less than is wanted, and why one is not."""
    all_of_them = [thread for one in await daemon.client.list_attachments() for thread in one.threads]
    held = [one for one in all_of_them if one.state is ThreadState.HELD]
    why = next((f"{one.state.value}: {one.reason}" for one in all_of_them if one.state is not ThreadState.HELD), "")
    return len(held), sum(one.budget_ns < one.wanted_ns for one in held), why
