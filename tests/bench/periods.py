"""``python -m tests.bench.periods``: are inferred periods right, how soon, and what does the looking cost.

Periodic threads are held as deadlined holds them: every 100 ms a tenth more than they were seen to execute. What they
were told to work is less than that: an interpreter adds a tenth of a millisecond a job, which starves a thread whose
budget was computed. Needs root.
"""

import asyncio
import errno
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from deadlined.observer import Observer
from deadlined.periods import Inference, infer
from edgehold.clock import SystemClock
from edgehold.kernel import sched
from edgehold.kernel.sampler import Sampler
from edgehold.kernel.sched import SchedAttr
from edgehold.testing.patterns import Patterns
from tests.bench import strangers
from tests.bench.figures import Figure, plain, show, write

MS = 1_000_000
PERIODS_MS = (10.0, 100 / 3, 40.0, 100.0)
SHARES = (0.05, 0.2, 0.4)
ROUNDS = 3
APERIODIC = (
    *(f"poisson {mean} 0.001" for mean in (0.005, 0.01, 0.02, 0.05, 0.1)),
    *(f"uniform {mean} 0.001" for mean in (0.005, 0.01, 0.02, 0.05, 0.1)),
    *(f"uniform {mean} 0.001 0.5" for mean in (0.01, 0.02, 0.05, 0.1)),
    *(f"bursts {mean} 0.0005" for mean in (0.01, 0.02, 0.05, 0.1)),
    "hog",
    "hog",
)
THROTTLED = ("periodic 0.01 0.004", "periodic 0.0333 0.013", "periodic 0.04 0.016", "relative 0.02 0.002")
CROWD = 50
CROWD_S = 20.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said of one thread, and after how long."""

    pid: int
    inference: Inference
    after_s: float


async def hold(pid: int, *, budget_ms: float, timeout_s: float = 60) -> None:
    """A budget every 100 ms, as soon as it fits in: others may hold reservations too."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            sched.set_attr(pid, SchedAttr.deadline(runtime_ns=round(budget_ms * MS), period_ns=100 * MS))
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)
        else:
            return


async def fit(pid: int) -> None:
    """Lower a generous budget to what the thread executes in a second, and a tenth of that."""
    with Sampler() as sampler:
        first = sampler.add(pid)
        await asyncio.sleep(1)
        last = sampler.sample()[pid]
    share = (last.executed_ns - first.executed_ns) / (last.time_ns - first.time_ns)
    await hold(pid, budget_ms=110 * share)


async def ask(lines: Sequence[str], *, budgets_ms: Sequence[float], fitted: bool = False) -> list[Answer]:
    """Observe one process for each line, each with such a budget every 100 ms, or with what `fit` makes of it."""
    observer = Observer(clock=SystemClock())
    with Patterns(lines) as patterns:
        for pid, budget_ms in zip(patterns.pids, budgets_ms, strict=True):
            await hold(pid, budget_ms=budget_ms)
        await asyncio.sleep(0.3)  # the interpreters' beginning is not the pattern
        if fitted:
            await asyncio.gather(*(fit(pid) for pid in patterns.pids))

        async def one(pid: int) -> Answer:
            begin = time.monotonic()
            return Answer(pid, await observer.observe(pid), time.monotonic() - begin)

        answers = await asyncio.gather(*(one(pid) for pid in patterns.pids))
    await asyncio.sleep(0.3)  # what they held is free again
    return answers


async def strict() -> list[Figure]:
    """Threads of 10 to 100 ms, of 5, 20 and 40 per cent of a CPU."""
    figures = []
    for period_ms in PERIODS_MS:
        errors: list[float] = []
        times: list[float] = []
        unknown = 0
        for _ in range(ROUNDS):
            for share in SHARES:  # one at a time: with others beside it, it has to wait
                line = f"periodic {period_ms / 1000} {share * period_ms / 1000}"
                (answer,) = await ask([line], budgets_ms=[200 * share], fitted=True)
                times.append(answer.after_s)
                if answer.inference.period_ns is None:
                    unknown += 1
                    print(f"{period_ms:.1f} ms, {share:.0%}: {answer.inference.reason}", file=sys.stderr)
                else:
                    errors.append(abs(answer.inference.period_ns / (period_ms * MS) - 1) * 100)
        total = ROUNDS * len(SHARES)
        right = sum(error <= 1 for error in errors)
        note = f"{unknown} unknown, {len(errors) - right} wrong of {total}"
        figures += [
            Figure(f"{period_ms:.1f} ms: right within 1 %", 100 * right / total, "%", 100, at_least=True, note=note),
            Figure(f"{period_ms:.1f} ms: largest error", max(errors, default=0), "%", 1),
            Figure(f"{period_ms:.1f} ms: the longest look", max(times), "s", 2),
        ]
    return figures


def need(line: str) -> float:
    """The share of a CPU that an aperiodic pattern uses; of a hog, some."""
    name, *numbers = line.split()
    if name == "hog":
        return 0.05
    mean, work = float(numbers[0]), float(numbers[1])
    return 5 * work / (mean + 5 * (work + 0.002)) if name == "bursts" else work / (mean + work)


async def none() -> list[Figure]:
    """Threads that must get no answer."""
    aperiodic: list[Answer] = []
    for begin in range(0, len(APERIODIC), 5):  # more would not fit in at once
        lines = APERIODIC[begin : begin + 5]
        aperiodic += await ask(lines, budgets_ms=[150 * need(line) for line in lines])
    throttled = await ask(THROTTLED, budgets_ms=[4.0] * len(THROTTLED))
    figures = []
    for what, lines, answers in (("aperiodic", APERIODIC, aperiodic), ("throttled", THROTTLED, throttled)):
        wrong = [line for line, one in zip(lines, answers, strict=True) if one.inference.period_ns is not None]
        figures.append(Figure(f"false answers, {len(lines)} {what}", len(wrong), "", 0, note="; ".join(wrong)))
    return figures


async def cost(what: str, lines: Sequence[str]) -> list[Figure]:
    """CPU of this process while it observes a crowd again and again without a pause; 100 us a second are 0.01 %."""
    observer = Observer(clock=SystemClock())
    with Patterns(lines) as patterns:
        await asyncio.sleep(0.5)
        end = time.monotonic() + CROWD_S
        looks = 0

        async def again(pid: int) -> None:
            nonlocal looks
            while time.monotonic() < end:
                await observer.observe(pid)
                looks += 1

        begin, cpu = time.monotonic(), time.process_time_ns()
        await asyncio.gather(*(again(pid) for pid in patterns.pids))
        spent_us, elapsed_s = (time.process_time_ns() - cpu) / 1000, time.monotonic() - begin
    who = f"{len(lines)} {what}"
    length_s = elapsed_s * len(lines) / looks
    return [
        Figure(f"observing {who}, each", spent_us / elapsed_s / len(lines), "us CPU a second", 100),
        Figure(f"one observation of {who}", spent_us / looks, "us CPU", note=f"takes {length_s:.1f} s"),
    ]


def judging() -> Figure:
    """The dearest case: 200 random activations."""
    rng = random.Random(1)  # noqa: S311 - the same in each run
    now, times = 0.0, []
    for _ in range(200):
        now += rng.expovariate(1 / (10 * MS))
        times.append(round(now))
    spent = []
    for _ in range(200):
        begin = time.thread_time_ns()
        infer(times)
        spent.append((time.thread_time_ns() - begin) / 1e6)
    return Figure("judging 200 random activations", sorted(spent)[100], "ms CPU", 1)


async def main() -> None:
    """Measure, print, write."""
    if os.geteuid() != 0:
        raise SystemExit("this benchmark holds threads by reservations: it needs root")
    before = strangers.usage(())
    figures = await strict()
    figures += await none()
    periodic = [f"periodic {period_ms / 1000} 0.0002" for period_ms in (20, 25, 40, 50, 100)] * (CROWD // 5)
    figures += await cost("even ones", periodic)
    figures += await cost("random ones", [f"poisson {mean} 0.0002" for mean in (0.02, 0.03, 0.05, 0.1, 0.2)] * 10)
    figures.append(judging())
    # Children come and go: their CPU is in this figure, so it says how busy the machine was, not who was.
    figures.append(
        Figure("busy CPUs meanwhile, with the load itself", strangers.between(before, strangers.usage(())), "")
    )
    show("Periods of threads, by their context switches", figures)
    write("periods", plain(figures))


if __name__ == "__main__":
    asyncio.run(main())
