"""``make bench-safety``: what deadlined leaves behind; build/bench/safety.json. Needs root.

A thousand sleepers in and out, five hundred throttled hogs in and out and in again, fifty daemons killed with a
hundred threads held. The figures do not depend on other load; how long it takes does. The same with smaller numbers is
tests/integration/test_deadlined_safety.py.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgehold.api.deadlined import DeadlinedClient, Policy, Rule, Target, TargetKind, ThreadState
from edgehold.errors import UnavailableError
from edgehold.kernel import capacity, procfs, sched
from edgehold.kernel.sampler import Sampler
from edgehold.kernel.sched import Flag, SchedAttr
from edgehold.testing.daemons import Daemon, private_directory
from edgehold.testing.load import Load, accounted, settled
from tests.bench.figures import Figure, as_installed, plain, show, write

MS = 1_000_000
PERIOD_NS = 100 * MS
SLEEPER_NS = 1 * MS
"""A hundred of them fit."""
HOG_NS = 2 * MS
"""Fifty of them fit, and each is throttled nearly all the time."""
LOST_BAR = 0.1
"""Percent of the capacity."""
PATIENCE_S = 60.0
# Longer than the gap after a recovery, so that the next burst of attachments holds at once.
_GAP_S = 1.2
_POLICIES = (
    SchedAttr(nice=5),
    SchedAttr(policy=sched.Policy.BATCH, nice=3),
    SchedAttr(policy=sched.Policy.IDLE),
    SchedAttr(policy=sched.Policy.FIFO, priority=2),
    SchedAttr(policy=sched.Policy.RR, priority=1, flags=Flag.RESET_ON_FORK),
    SchedAttr(nice=-5, flags=Flag.RESET_ON_FORK),
)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Admission bandwidth in CPUs, free or somebody's, before and after."""

    before: float
    after: float

    @property
    def lost_percent(self) -> float:
        """What is gone; 0 where there is more than before."""
        return max(100 * (self.before - self.after) / self.before, 0.0)


@dataclass(frozen=True, slots=True)
class Sleepers:
    """Threads that slept while they were attached and detached."""

    cycles: int
    capacity: Capacity


@dataclass(frozen=True, slots=True)
class Throttled:
    """Hogs that were detached while throttled, and attached again."""

    attached_again: int
    stuck: int
    """They did not execute again, not even after the watchdog had a look."""
    revived: int
    """How often the watchdog took one for stuck."""
    capacity: Capacity


@dataclass(frozen=True, slots=True)
class Killed:
    """Daemons that were killed while they held threads, every other one in the middle of attaching."""

    kills: int
    held: int
    """Threads in SCHED_DEADLINE at the kills, all together."""
    wrong: int
    """Threads that then did not get their own policy back."""
    capacity: Capacity


def settings(directory: Path) -> dict[str, object]:
    """Of a private daemon."""
    return {
        "socket": str(directory / "api.sock"),
        "state_dir": str(directory / "state"),
        "vmand_socket": str(directory / "no-vmand.sock"),
        "cycle_ms": 200,
    }


def thread(tid: int) -> Target:
    """A thread as a target."""
    return Target(kind=TargetKind.THREAD, id=tid)


def fixed(budget_ns: int) -> Policy:
    """A budget that stays as it is."""
    return Policy(
        rule=Rule.REFERENCE, period_ns=PERIOD_NS, initial_budget_ns=budget_ns, min_budget_ns=budget_ns,
        cap=budget_ns / PERIOD_NS,
    )  # fmt: skip


async def held(client: DeadlinedClient, number: int) -> None:
    """Until all threads of an attachment are held.

    Raises:
        TimeoutError: they are not.
    """
    async with asyncio.timeout(PATIENCE_S):
        while True:
            threads = (await client.attachment(number, last=1)).attachment.threads
            if threads and all(one.state is ThreadState.HELD for one in threads):
                return
            await asyncio.sleep(0.05)


async def capacity_of(work: Callable[[], Awaitable[None]]) -> Capacity:
    """What a piece of work does to the admission bandwidth."""
    before = await asyncio.to_thread(settled, accounted)
    await work()
    after = 0.0
    end = time.monotonic() + PATIENCE_S
    # What ended a moment ago may be given back only at its 0-lag time.
    while after < before - 2 * capacity.RESOLUTION and time.monotonic() < end:
        after = max(after, await asyncio.to_thread(settled, accounted))
    return Capacity(before, after)


async def sleepers(client: DeadlinedClient, load: Load, *, threads: int, rounds: int) -> Sleepers:
    """Attach and detach a process of sleepers; every other round they sleep past their 0-lag time in between."""
    child = load.sleeper()
    tids = [child.pid, *(child.thread() for _ in range(threads - 1))]

    async def work() -> None:
        for number in range(rounds):
            one = await client.attach(Target(kind=TargetKind.PROCESS, id=child.pid), fixed(SLEEPER_NS))
            await held(client, one.id)
            await asyncio.sleep(0.3 * (number % 2))
            await client.detach(one.id)
            if any(sched.get(tid).policy is sched.Policy.DEADLINE for tid in tids):
                raise SystemExit("a detached thread is still in SCHED_DEADLINE")

    return Sleepers(threads * rounds, await capacity_of(work))


@contextlib.contextmanager
def hogs(number: int) -> Iterator[list[int]]:
    """Busy loops, nice enough to leave the CPUs to others where they are not held."""
    with contextlib.ExitStack() as stack:
        pids = []
        for _ in range(number):
            one = stack.enter_context(
                subprocess.Popen(["nice", "-n", "19", "sh", "-c", "while :; do :; done"], stdin=subprocess.DEVNULL)
            )
            stack.callback(end, one)
            pids.append(one.pid)
        while any(sched.get(pid).nice != 19 for pid in pids):  # until `nice` has done its work
            time.sleep(0.01)
        yield pids


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a busy loop. One that is stuck could not even end: so it leaves first."""
    with contextlib.suppress(procfs.GoneError):
        if sched.get(process.pid).policy is sched.Policy.DEADLINE:
            sched.set_attr(process.pid, SchedAttr())
    process.kill()


async def executing(tids: Sequence[int], *, more_than_ns: int, timeout_s: float = PATIENCE_S) -> set[int]:
    """Those that executed so much within some time from now on, as soon as it is all of them."""
    with Sampler() as sampler:
        begin = {tid: sampler.add(tid).executed_ns for tid in tids}
        moved: set[int] = set()
        stop = time.monotonic() + timeout_s
        while len(moved) < len(tids) and time.monotonic() < stop:
            await asyncio.sleep(0.05)
            now = sampler.sample()
            moved = {tid for tid in tids if now[tid].executed_ns > begin[tid] + more_than_ns}
        return moved


async def throttled(daemon: Daemon, client: DeadlinedClient, *, number: int, rounds: int) -> Throttled:
    """Detach hogs while they are throttled, attach them again at once, and see whether each executes."""
    stuck = 0

    async def work() -> None:
        nonlocal stuck
        with hogs(number) as tids:
            for _ in range(rounds + 1):
                numbers = [(await client.attach(thread(tid), fixed(HOG_NS))).id for tid in tids]
                for one in numbers:
                    await held(client, one)
                # Two budgets: each was throttled at least once, and has come back from it.
                stuck += len(tids) - len(await executing(tids, more_than_ns=2 * HOG_NS))
                for one in numbers:
                    await client.detach(one)

    found = await capacity_of(work)
    return Throttled(number * rounds, stuck, daemon.log_text().count("was left throttled"), found)


async def killed(daemon: Daemon, path: Path, load: Load, *, threads: int, kills: int) -> Killed:
    """Kill the daemon with all threads held, or in the middle of attaching; by turns start it, or let it recover."""
    child = load.sleeper()
    tids = [child.thread() for _ in range(threads)]
    for number, tid in enumerate(tids):
        sched.set_attr(tid, _POLICIES[number % len(_POLICIES)])
    own = {tid: sched.get(tid) for tid in tids}
    held_then = wrong = 0

    async def work() -> None:
        nonlocal held_then, wrong
        for number in range(kills):
            if not daemon.running:
                await daemon.start(timeout_s=PATIENCE_S)
            async with DeadlinedClient(path, timeout_s=PATIENCE_S) as client:
                burst = asyncio.create_task(attach_all(client, tids))
                if number % 2:
                    for one in await burst:
                        await held(client, one)
                else:  # between a thirtieth and all of them
                    wanted = max(threads * (number % 30 + 1) // 30, 1)
                    while in_deadline(tids) < wanted and not burst.done():  # noqa: ASYNC110 - the kernel does not tell
                        await asyncio.sleep(0)
                await daemon.kill()
                await burst
            held_then += in_deadline(tids)
            if number % 4 < 2:
                await daemon.start(timeout_s=PATIENCE_S)
            else:
                await recover(daemon)
            wrong += sum(sched.get(tid) != own[tid] for tid in tids)
            await asyncio.sleep(_GAP_S)

    found = await capacity_of(work)
    return Killed(kills, held_then, wrong, found)


async def attach_all(client: DeadlinedClient, tids: Sequence[int]) -> list[int]:
    """Attach one after the other, as far as the daemon lives."""
    numbers = []
    with contextlib.suppress(UnavailableError):
        for tid in tids:
            numbers.append((await client.attach(thread(tid), fixed(SLEEPER_NS))).id)  # noqa: PERF401 - keeps what it has
    return numbers


def in_deadline(tids: Sequence[int]) -> int:
    """How many are in SCHED_DEADLINE now."""
    return sum(sched.get(tid).policy is sched.Policy.DEADLINE for tid in tids)


async def recover(daemon: Daemon) -> None:
    """``deadlined recover``; a failure ends the benchmark."""
    command = [sys.executable, "-m", "deadlined", "recover", "--config", str(daemon.config)]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, said = await child.communicate()
    if child.returncode:
        raise SystemExit(f"deadlined recover ended with {child.returncode}: {said.decode()}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.safety", description="What deadlined leaves behind.")
    parser.add_argument("--threads", type=int, default=100, help="sleepers, and threads of each kill (default: 100)")
    parser.add_argument("--hogs", type=int, default=50, help="throttled hogs (default: 50)")
    parser.add_argument("--rounds", type=int, default=10, help="of sleepers and of hogs (default: 10)")
    parser.add_argument("--kills", type=int, default=50, help="daemons that are killed (default: 50)")
    return parser.parse_args()


def figures(one: Sleepers, two: Throttled, three: Killed) -> list[Figure]:
    """Beside their bars."""
    kills = f"{three.kills} kills, {three.held} threads held then"
    return [
        Figure("sleepers: capacity lost", one.capacity.lost_percent, "%", LOST_BAR, note=f"{one.cycles} in and out"),
        Figure("hogs: stuck", two.stuck, "threads", 0, note=f"{two.attached_again} attached again while throttled"),
        Figure("hogs: taken for stuck by the watchdog", two.revived, "times", 0),
        Figure("hogs: capacity lost", two.capacity.lost_percent, "%", LOST_BAR),
        Figure("kill -9: policies not restored", three.wrong, "threads", 0, note=kills),
        Figure("kill -9: capacity lost", three.capacity.lost_percent, "%", LOST_BAR),
    ]


async def main() -> None:
    """Measure, print, write."""
    options = arguments()
    if os.geteuid() != 0:
        raise SystemExit("this benchmark holds threads by SCHED_DEADLINE: it needs root")
    as_installed()
    begin, load_before = time.monotonic(), os.getloadavg()
    with private_directory() as directory, Load() as load:
        path = directory / "api.sock"
        daemon = Daemon("deadlined", directory=directory, settings=settings(directory))
        await daemon.start()
        try:
            async with DeadlinedClient(path, timeout_s=PATIENCE_S) as client:
                one = await sleepers(client, load, threads=options.threads, rounds=options.rounds)
                two = await throttled(daemon, client, number=options.hogs, rounds=options.rounds)
            three = await killed(daemon, path, load, threads=options.threads, kills=options.kills)
        finally:
            await daemon.stop(timeout_s=PATIENCE_S)
    took = time.monotonic() - begin
    show(
        f"What deadlined leaves behind; {took:.0f} s, load average before {load_before[0]:.2f}",
        figures(one, two, three),
    )
    write("safety", {
        "kernel": os.uname().release, "options": vars(options), "load_before": load_before,
        "figures": plain(figures(one, two, three)), "results": [asdict(each) for each in (one, two, three)],
    })  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
