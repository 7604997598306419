"""Whether the fast rule's budgets stand still where the need does, and settle where not all fits."""

import asyncio
import contextlib
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from edgehold.api.deadlined import Policy, Sample, Target, TargetKind, ThreadState
from edgehold.clock import NS_PER_MS, NS_PER_S
from edgehold.kernel import capacity, sched
from edgehold.kernel.procfs import GoneError
from edgehold.testing.jobs import Job, PeriodicJob
from edgehold.testing.load import Load, available, settled
from tests.bench.deadline_host import (
    CYCLE_MS,
    HISTORY,
    Deadlined,
    Outcome,
    VoidError,
    neighbours,
    private_deadlined,
    stress,
)
from tests.bench.figures import Figure

POLICY = Policy()
WORKS_MS = (10, 20)
PERIOD_MS = 100
STEADY_S = 60.0
LOW, HIGH = 1.05, 1.25
SHARE = 0.99
CYCLES_BAR = 3
OVERLOADS = (3, 4, 6)
HOLD_S = 12.0
LOOK_S = 0.1
# What differs less is the same budget.
_SAME = 0.02
# Samples before and after a jump that are written down.
_AROUND = 6
_T = CYCLE_MS * NS_PER_MS


@dataclass(frozen=True, slots=True)
class Steady:
    """One thread in one situation."""

    samples: int
    need_ms: float
    """C: what it executed per period, on average."""
    mean: float
    low: float
    high: float
    within: float
    """The share of the samples with a budget of LOW to HIGH times C."""
    jumps: int
    """How often the rule began to want the cap."""
    false_jumps: int
    """Those of them before which no job executed as much as the budget: what a host that stalls (an interrupt, a
    hypervisor) adds to a job is executed time too, and a job that uses its budget up asks for more."""
    longest_ms: float
    """The most that one job executed."""
    saturated: int
    jobs: int
    late: int
    """Jobs that took more than 1.1 times what they executed."""
    worst_ms: float


async def steady(options: Namespace) -> Outcome:
    """Two periodic threads, quiet, under load and beside other deadline tasks."""
    outcome = Outcome(f"Steady need of 10 and 20 ms per 100 ms, rule fast, {options.minutes:g} minutes each")
    begin_ns = time.monotonic_ns() + NS_PER_S
    with contextlib.ExitStack() as stack:
        jobs = [
            stack.enter_context(PeriodicJob(work_s=ms / 1000, period_s=PERIOD_MS / 1000, origin_ns=begin_ns))
            for ms in WORKS_MS
        ]
        async with private_deadlined(history=HISTORY) as daemon:
            ids = [(await daemon.client.attach(Target(kind=TargetKind.THREAD, id=one.tid))).id for one in jobs]
            await asyncio.sleep(options.settle)
            for what, load in (
                ("quiet", None),
                ("under stress-ng --cpu 4", stress),
                ("beside 2 x 15/50 ms", neighbours),
            ):
                with load() if load is not None else contextlib.nullcontext():
                    begin_ns = time.monotonic_ns()
                    await asyncio.sleep(options.minutes * 60)
                    histories = [(await daemon.client.attachment(one)).history for one in ids]
                for ms, job, history in zip(WORKS_MS, jobs, histories, strict=True):
                    found = look(history, job.jobs(), since_ns=begin_ns)
                    outcome.figures += _figures(f"C = {ms} ms, {what}", found)
                    outcome.data[f"C = {ms} ms, {what}"] = asdict(found) | {
                        "at_jumps": at_jumps(history, since_ns=begin_ns)
                    }
                    if load is None:
                        first = look(history, job.jobs(), since_ns=begin_ns, until_ns=begin_ns + round(STEADY_S * 1e9))
                        note = f"Q/C {first.low:.3f} to {first.high:.3f}, mean {first.mean:.3f}"
                        figure = Figure(
                            f"C = {ms} ms, first {STEADY_S:g} s: {LOW} <= Q/C <= {HIGH}", 100 * first.within,
                            "% of windows", 100 * SHARE, at_least=True, note=note,
                        )  # fmt: skip
                        outcome.figures.append(figure)
    return outcome


def look(history: Sequence[Sample], jobs: Sequence[Job], *, since_ns: int, until_ns: int | None = None) -> Steady:
    """What the samples and jobs of some time say.

    Raises:
        VoidError: there are none.
    """
    end_ns = until_ns or time.monotonic_ns()
    kept = [one for one in history if since_ns <= one.time_ns - one.elapsed_ns and one.time_ns <= end_ns]
    done = [one for one in jobs if since_ns <= one.release_ns and one.end_ns <= end_ns]
    if not kept or not done:
        raise VoidError("nothing was sampled")
    need_ns = sum(one.executed_ns for one in kept) * kept[0].period_ns / sum(one.elapsed_ns for one in kept)
    ratios = [one.budget_ns / need_ns for one in kept]
    cap_ns = POLICY.cap * kept[0].period_ns * 0.99
    wants = [one.wanted_ns >= cap_ns for one in kept]
    jumps = [one for before, now, one in zip([False, *wants], wants, kept, strict=False) if now and not before]
    return Steady(
        samples=len(kept),
        need_ms=need_ns / NS_PER_MS,
        mean=sum(ratios) / len(ratios),
        low=min(ratios),
        high=max(ratios),
        within=sum(LOW <= one <= HIGH for one in ratios) / len(ratios),
        jumps=len(jumps),
        false_jumps=sum(not _overran(one, jobs) for one in jumps),
        longest_ms=max(one.executed_ns for one in done) / NS_PER_MS,
        saturated=sum(one.saturated for one in kept),
        jobs=len(done),
        late=sum(one.response_ns > 1.1 * one.executed_ns for one in done),
        worst_ms=max(one.response_ns for one in done) / NS_PER_MS,
    )


def _overran(sample: Sample, jobs: Sequence[Job]) -> bool:
    """Whether a job of this window, or of the one before, executed as much as the budget. Its counters are as old as a
    tick."""
    begin_ns = sample.time_ns - 2 * _T
    # A job that is throttled at the window's end is over some periods later, and was released before that.
    around = [one for one in jobs if one.end_ns >= begin_ns and one.start_ns <= sample.time_ns]
    return any(one.executed_ns >= sample.budget_ns for one in around)


def at_jumps(history: Sequence[Sample], *, since_ns: int) -> list[list[dict[str, Any]]]:
    """The samples around each jump to the cap: why it jumped is to be seen in them."""
    kept = [one for one in history if since_ns <= one.time_ns - one.elapsed_ns]
    wants = [one.wanted_ns >= POLICY.cap * one.period_ns * 0.99 for one in kept]
    jumps = [at for at in range(1, len(kept)) if wants[at] and not wants[at - 1]]
    return [[msgspec.to_builtins(one) for one in kept[max(at - _AROUND, 0) : at + _AROUND]] for at in jumps]


def _figures(what: str, found: Steady) -> list[Figure]:
    note = (
        f"{found.saturated} of {found.samples} windows saturated; Q/C {found.low:.3f} to {found.high:.3f}, mean "
        f"{found.mean:.3f}, {100 * found.within:.1f} % within; {found.late} of {found.jobs} jobs late, worst "
        f"{found.worst_ms:.1f} ms"
    )
    note = f"of {found.jumps}, longest job {found.longest_ms:.1f} ms; {note}"
    return [Figure(f"{what}: false jumps to the cap", found.false_jumps, "", 0, note=note)]


@dataclass(slots=True)
class Looks:
    """What was seen again and again."""

    capacity: float
    highest: float = 0.0
    """The largest sum of budgets, in CPUs."""
    looks: int = 0
    unexplained: int = 0
    """Threads with less than is wanted and no reason why, at a look after the first cycle."""
    reasons: set[str] = field(default_factory=set)
    """Why some have less than is wanted, at any look."""
    last: str = ""
    """One of them at the last look that found any."""


async def overload(options: Namespace) -> Outcome:
    """Hogs that each want the cap, on a host that can't hold them all; then one of them ends."""
    del options
    outcome = Outcome(f"Overload: hogs that want {POLICY.cap:.0%} each, rule fast, watched for {HOLD_S:g} s")
    for hogs in OVERLOADS:
        room = settled(available)
        with Load() as load:
            children = [load.hog() for _ in range(hogs)]
            async with private_deadlined(history=HISTORY) as daemon:
                ids = [(await daemon.client.attach(Target(kind=TargetKind.THREAD, id=one.pid))).id for one in children]
                looks = Looks(capacity=room)
                cycles, sums = await _watch(daemon, ids, looks)
                children[0].end()
                fewer, grown = await _watch(daemon, ids[1:], looks)
        changed = abs(settled(available) - room)
        if changed > 2 * capacity.RESOLUTION:
            raise VoidError(f"overload: strangers' reservations changed by {changed:.2f} CPUs meanwhile")
        what = f"{hogs} hogs, {room:.2f} CPUs free"
        note = f"{sums:.2f} CPUs given; {looks.last}"
        outcome.figures += [
            Figure(f"{what}: settled after", cycles, "cycles", CYCLES_BAR, note=note),
            Figure("  largest sum less what was free", looks.highest - room, "CPUs", 2 * capacity.RESOLUTION,
                   note=f"{looks.looks} looks"),
            Figure("  less than wanted, and no reason", looks.unexplained, "threads", 0),
            Figure("  after one ended: settled after", fewer, "cycles", CYCLES_BAR, note=f"{grown:.2f} CPUs given"),
        ]  # fmt: skip
        outcome.data[what] = (
            asdict(looks)
            | {"reasons": sorted(looks.reasons)}
            | {
                "cycles": cycles,
                "given": sums,
                "cycles_after_end": fewer,
                "grown": grown,
            }
        )
    return outcome


async def _watch(daemon: Deadlined, ids: Sequence[int], looks: Looks) -> tuple[int, float]:
    """Look for some seconds from now on. Returns the cycles until nothing changed any more, and the sum at the end."""
    begin_ns = time.monotonic_ns()
    sums = 0.0
    while (now_ns := time.monotonic_ns()) < begin_ns + HOLD_S * NS_PER_S:
        threads = [thread for one in await daemon.client.list_attachments() for thread in one.threads]
        sums = sum(one.budget_ns / one.period_ns for one in threads)
        looks.highest = max(looks.highest, sums, _in_force([one.tid for one in threads]))
        looks.looks += 1
        if now_ns > begin_ns + 2 * _T:
            short = [one for one in threads if one.budget_ns < one.wanted_ns * (1 - _SAME)]
            looks.unexplained += sum(not one.reason for one in short)
            looks.unexplained += sum(one.state is not ThreadState.HELD and not one.reason for one in threads)
            looks.reasons |= {one.reason for one in short if one.reason}
            looks.last = next((one.reason for one in short), looks.last)
        await asyncio.sleep(LOOK_S)
    ends_ns = [changed_ns((await daemon.client.attachment(one)).history, since_ns=begin_ns) for one in ids]
    return max(math.ceil((max(ends_ns) - begin_ns) / _T), 0), sums


def _in_force(tids: Sequence[int]) -> float:
    """The sum of these threads' reservations as the kernel has them now, in CPUs."""
    total = 0.0
    for tid in tids:
        with contextlib.suppress(GoneError):
            attr = sched.get(tid)
            if attr.policy is sched.Policy.DEADLINE:
                total += attr.runtime_ns / attr.period_ns
    return total


def changed_ns(history: Sequence[Sample], *, since_ns: int) -> int:
    """When the budget last changed: the end of the last window with another one than now; ``since_ns`` if never."""
    kept = [one for one in history if one.time_ns > since_ns]
    if not kept:
        return since_ns
    last = kept[-1].budget_ns
    other = [one.time_ns for one in kept if abs(one.budget_ns - last) > _SAME * last]
    return max(other, default=since_ns)
