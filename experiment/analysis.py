"""What a run of the experiment says: budgets after each cycle, when responses are good, what waste there is. Pure."""

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from edgehold.api.deadlined import Sample
from edgehold.clock import NS_PER_MS
from edgehold.testing.jobs import Job

RESPONSE_OVER_EXECUTED = 1.1
"""A response up to so many times the executed time is good."""
GOOD_JOBS = 10
"""So many good jobs in a row, and the thread has what it needs."""
SETTLED_OVER_NEED = 1.25
"""A budget that stays below so many times the need is settled."""
STEADY_CYCLES = 10
"""The last so many cycles of a run are the steady state."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A rule as deadlined runs it. Times in milliseconds."""

    key: str
    title: str
    rule: str
    cycle_ms: int
    fast_cycle_ms: int
    """0: off."""


CYCLE_MS = 500
VARIANTS = (
    Variant("reference", "reference rule", "reference", CYCLE_MS, 0),
    Variant("fast", "fast rule, T alone", "fast", CYCLE_MS, 0),
    Variant("fast-cycle", "fast rule, fast cycle", "fast", CYCLE_MS, 100),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One thread of a run. Times in nanoseconds of CLOCK_MONOTONIC."""

    work_ns: int
    """What each of its jobs executes."""
    attached_ns: int
    first_budget_ns: int
    samples: tuple[Sample, ...]
    jobs: tuple[Job, ...]
    request_ms: float
    """How long the attachment's request took; the thread was held from some moment of it on."""
    reason: str = ""
    """What deadlined said of the thread at the end: why it has less than it needs, for one."""

    def budgets(self) -> list[tuple[int, int]]:
        """From when on which budget was in force: the first one from the attachment on."""
        steps = [(self.attached_ns, self.first_budget_ns)]
        for before, after in zip(self.samples, self.samples[1:], strict=False):
            # Each sample has the budget of the window that ended with it, so that the next one tells what came of it.
            if after.budget_ns != steps[-1][1]:
                steps.append((before.time_ns, after.budget_ns))
        return steps

    def after(self) -> list[Job]:
        """The jobs that ended after the attachment."""
        return [job for job in self.jobs if job.end_ns > self.attached_ns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One daemon, two threads, one rule, one first budget."""

    variant: Variant
    first_budget_ns: int
    number: int
    """Of the repetition, from 1."""
    threads: tuple[Held, ...]
    setattr_calls: int
    cycles: int
    """Monitoring cycles that `setattr_calls` were counted over."""
    others_cpus: float
    """What everything else on the host used meanwhile."""
    capacity_cpus: float
    """What the kernel would have admitted before the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One thread of a run in figures. Cycles count from the attachment: cycle k ends k times T after it."""

    variant: str
    first_budget_ms: float
    number: int
    work_ms: float
    need_ms: float
    """C: what a job executed, the median."""
    path_ms: tuple[float, ...]
    """The budget in force after cycle 1, 2, and so on."""
    good_cycle: int | None
    """In which cycle the first of `GOOD_JOBS` good jobs in a row ended; none: never."""
    good_ms: float | None
    """And how long after the attachment."""
    peak_ms: float
    peak_cycle: int
    settled_cycle: int | None
    """From which cycle on the budget stays below `SETTLED_OVER_NEED` times C; none: it never does."""
    fits: tuple[float, ...]
    """The budget over C after each cycle."""
    steady: tuple[float, float, float]
    """The smallest, mean and largest of the last `STEADY_CYCLES` of them."""
    worst_response_ms: float
    late: int
    """Jobs with a response that is not good, after the first good ones."""


def budget_at(steps: Sequence[tuple[int, int]], time_ns: int) -> int:
    """The budget in force at a time; the first one before that."""
    return steps[max(bisect_right(steps, (time_ns, 2**63)) - 1, 0)][1]


def is_good(job: Job) -> bool:
    """Whether a job's response is about what it executed."""
    return job.response_ns <= RESPONSE_OVER_EXECUTED * job.executed_ns


def first_good(jobs: Sequence[Job]) -> int | None:
    """The index of the first of `GOOD_JOBS` good jobs in a row."""
    row = 0
    for index, job in enumerate(jobs):
        row = row + 1 if is_good(job) else 0
        if row == GOOD_JOBS:
            return index - GOOD_JOBS + 1
    return None


def settled_from(fits: Sequence[float], bound: float) -> int | None:
    """From which cycle (1: the first) on all values stay below a bound."""
    settled = None
    for cycle, value in enumerate(fits, 1):
        if value > bound:
            settled = None
        elif settled is None:
            settled = cycle
    return settled


def cycle_of(time_ns: int, attached_ns: int, cycle_ns: int) -> int:
    """In which cycle a time lies: cycle 1 begins with the attachment."""
    return max(math.ceil((time_ns - attached_ns) / cycle_ns), 1)


def summary(run: Run, thread: Held) -> Summary:
    """One thread in figures.

    Raises:
        ValueError: there is nothing to reckon with: no job ended, or not two cycles were seen.
    """
    cycle_ns = run.variant.cycle_ms * NS_PER_MS
    jobs, steps = thread.after(), thread.budgets()
    last_ns = thread.samples[-1].time_ns if thread.samples else thread.attached_ns
    # In the middle of what follows a cycle: a cycle that is some milliseconds late changes nothing.
    seen = (last_ns - thread.attached_ns - cycle_ns // 2) // cycle_ns
    if not jobs or seen < 2:
        raise ValueError(f"the thread of {thread.work_ns / NS_PER_MS:g} ms: {len(jobs)} jobs, {seen} cycles")
    after = [thread.attached_ns + cycle * cycle_ns + cycle_ns // 2 for cycle in range(1, seen + 1)]
    path = [budget_at(steps, time_ns) for time_ns in after]
    need_ns = statistics.median(job.executed_ns for job in jobs)
    fits = tuple(budget / need_ns for budget in path)
    good = first_good(jobs)
    peak_at, peak = max(steps, key=lambda step: (step[1], -step[0]))
    tail = fits[-STEADY_CYCLES:]
    return Summary(
        variant=run.variant.key,
        first_budget_ms=run.first_budget_ns / NS_PER_MS,
        number=run.number,
        work_ms=thread.work_ns / NS_PER_MS,
        need_ms=need_ns / NS_PER_MS,
        path_ms=tuple(budget / NS_PER_MS for budget in path),
        good_cycle=None if good is None else cycle_of(jobs[good].end_ns, thread.attached_ns, cycle_ns),
        good_ms=None if good is None else (jobs[good].end_ns - thread.attached_ns) / NS_PER_MS,
        peak_ms=peak / NS_PER_MS,
        peak_cycle=round((peak_at - thread.attached_ns) / cycle_ns),
        settled_cycle=settled_from(fits, SETTLED_OVER_NEED),
        fits=fits,
        steady=(min(tail), statistics.fmean(tail), max(tail)),
        worst_response_ms=max(job.response_ns for job in jobs) / NS_PER_MS,
        late=0 if good is None else sum(not is_good(job) for job in jobs[good:]),
    )
