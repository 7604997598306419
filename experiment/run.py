"""One run: a private deadlined, two real periodic threads, a first budget that is far too small.

Nothing is simulated: the threads are processes of their own, the budgets SCHED_DEADLINE's. As in the document, their
work and the monitor begin together, so that no run inherits a backlog. Whatever happens, both threads have their own
policy back before they end.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgehold.api.deadlined import DeadlinedClient, Sample, Target, TargetKind, ThreadState
from edgehold.clock import NS_PER_MS, NS_PER_S
from edgehold.errors import FailedError, UnavailableError
from edgehold.kernel import capacity, procfs
from edgehold.testing.daemons import Daemon, private_directory
from edgehold.testing.jobs import PeriodicJob
from experiment.analysis import STEADY_CYCLES, Held, Run, Variant

PERIOD_MS = 100
WORKS_MS = (10, 20)
OVERALLOCATION, WINDOW, CAP = 0.1, 5, 0.8
_TICKS = os.sysconf("SC_CLK_TCK")


async def metrics(socket: Path) -> dict[str, float]:
    """deadlined's metrics by name; of one with labels the sum.

    Raises:
        UnavailableError: it does not answer.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
        try:
            writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = (await reader.read()).decode()
        finally:
            writer.close()
            await writer.wait_closed()
    except OSError as error:
        raise UnavailableError(f"deadlined does not answer at {socket}: {error.strerror}") from error
    found: dict[str, float] = {}
    for line in text.partition("\r\n\r\n")[2].splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            plain = name.partition("{")[0]
            found[plain] = found.get(plain, 0.0) + float(value)
    return found


async def next_cycle(socket: Path, *, timeout_s: float = 30.0) -> None:
    """Wait until a monitoring cycle has just been: the reference's monitor begins together with its thread, so that its
    first cycle is a whole one.

    Raises:
        TimeoutError: none came.
    """
    name = "deadlined_cycles_total"
    before = (await metrics(socket)).get(name)
    async with asyncio.timeout(timeout_s):
        while (await metrics(socket)).get(name) == before:  # noqa: ASYNC110 - a counter elsewhere
            await asyncio.sleep(0.003)


@contextlib.asynccontextmanager
async def private_deadlined(variant: Variant) -> AsyncIterator[tuple[Daemon, Path]]:
    """A deadlined of this run's own, and its socket.

    Raises:
        FailedError: it ended meanwhile; the text has the end of its log.
    """
    with private_directory("eh-ex-") as directory:
        socket = directory / "api.sock"
        daemon = Daemon("deadlined", directory=directory, settings={
            "socket": str(socket), "state_dir": str(directory / "state"), "vmand_socket": str(directory / "vmand.sock"),
            "cycle_ms": variant.cycle_ms, "fast_cycle_ms": variant.fast_cycle_ms,
        })  # fmt: skip
        try:
            await daemon.start()
            yield daemon, socket
        except UnavailableError as error:
            if daemon.running:
                raise
            raise FailedError(f"deadlined ended meanwhile:\n{daemon.log_text()[-2000:]}") from error
        finally:
            await daemon.stop()


@contextlib.contextmanager
def idle_threads() -> Iterator[tuple[PeriodicJob, ...]]:
    """Both threads, which wait to be told to begin."""
    with contextlib.ExitStack() as stack:
        yield tuple(
            stack.enter_context(PeriodicJob(work_s=work / 1000, period_s=PERIOD_MS / 1000, origin_ns=None))
            for work in WORKS_MS
        )


def policy(variant: Variant, first_budget_ms: float) -> dict[str, object]:
    """What the document has: overallocation 0.1, cap 80 %; N is ours."""
    return {
        "rule": variant.rule,
        "period_ns": PERIOD_MS * NS_PER_MS,
        "initial_budget_ns": round(first_budget_ms * NS_PER_MS),
        "overallocation": OVERALLOCATION,
        "window": WINDOW,
        "cap": CAP,
    }


@dataclass(frozen=True, slots=True)
class Request:
    """An attachment, and between when and when deadlined made it."""

    attachment: int
    began_ns: int
    ended_ns: int

    def held_ns(self, samples: Sequence[Sample]) -> int:
        """Since when the thread is held: where its first window begins."""
        begin = samples[0].time_ns - samples[0].elapsed_ns if samples else self.ended_ns
        return min(max(begin, self.began_ns), self.ended_ns)


async def attach(client: DeadlinedClient, tid: int, what: dict[str, object]) -> Request:
    """Hold a thread.

    Raises:
        FailedError: deadlined does not hold it.
    """
    began = time.monotonic_ns()
    one = await client.attach(Target(kind=TargetKind.THREAD, id=tid), what)
    (thread,) = one.threads
    if thread.state is not ThreadState.HELD:
        await client.detach(one.id)
        raise FailedError(f"the thread is {thread.state.value}, not held: {thread.reason}")
    return Request(one.id, began, time.monotonic_ns())


async def play(
    variant: Variant, first_budget_ms: float, *, seconds: float, number: int = 1, phase_ms: float = 0.0
) -> Run:
    """One run of so many seconds from the attachment on; the threads begin ``phase_ms`` after it.

    Raises:
        EdgeholdError: this host can't show it; the text says why.
    """
    admitted = (await capacity.probe_in_child()).available
    with idle_threads() as jobs:
        async with private_deadlined(variant) as (daemon, socket), DeadlinedClient(socket) as client:
            await next_cycle(socket)
            counted = await metrics(socket)
            usage = Usage([daemon.pid, *(one.tid for one in jobs)])
            held = []
            for one in jobs:
                held.append(await attach(client, one.tid, policy(variant, first_budget_ms)))
                one.begin(time.monotonic_ns() + round(phase_ms * NS_PER_MS))
            await asyncio.sleep(seconds)
            others = usage.others_cpus()
            now = await metrics(socket)
            details = [await client.attachment(one.attachment) for one in held]
            done = [tuple(one.jobs()) for one in jobs]
            for request in held:
                await client.detach(request.attachment)
    first = round(first_budget_ms * NS_PER_MS)
    threads = tuple(
        Held(
            work_ns=one.work_ns, attached_ns=request.held_ns(detail.history), first_budget_ns=first,
            samples=detail.history, jobs=did, request_ms=(request.ended_ns - request.began_ns) / NS_PER_MS,
            reason="; ".join(thread.reason for thread in detail.attachment.threads if thread.reason),
        )
        for one, request, detail, did in zip(jobs, held, details, done, strict=True)
    )  # fmt: skip
    calls, cycles = (
        round(now.get(name, 0) - counted.get(name, 0))
        for name in ("deadlined_setattr_calls_total", "deadlined_cycles_total")
    )
    return Run(
        variant=variant, first_budget_ns=first, number=number, threads=threads, setattr_calls=calls, cycles=cycles,
        others_cpus=others, capacity_cpus=admitted,
    )  # fmt: skip


def least_seconds(variant: Variant) -> float:
    """A shorter run has no steady state."""
    return (STEADY_CYCLES + 4) * variant.cycle_ms / 1000


class Usage:
    """What everything but some processes uses of the host's CPUs, from now on."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = (os.getpid(), *pids)
        self._before = self._look()

    def others_cpus(self) -> float:
        """On average since then; good to some hundredths, because the kernel counts the host's time in ticks."""
        elapsed, others = (now - before for now, before in zip(self._look(), self._before, strict=True))
        return max(others / elapsed, 0.0)

    def _look(self) -> tuple[float, float]:
        # proc(5), /proc/stat: user nice system idle iowait irq softirq steal; what a hypervisor took is a stranger's.
        cells = [int(one) for one in (procfs.PROC / "stat").read_text().partition("\n")[0].split()[1:9]]
        own = 0.0
        for pid in self._pids:
            own += int((procfs.PROC / str(pid) / "schedstat").read_text().split()[0]) / NS_PER_S
        return time.monotonic(), (sum(cells) - cells[3] - cells[4]) / _TICKS - own
