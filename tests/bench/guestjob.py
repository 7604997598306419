"""``make bench-deadline-guest``: a partition's job, its deadlines missed with and without a reservation beside hogs.

The guest works every period and says how long each job took, as it sees it itself. It is measured alone and beside
ordinary processes that spin on every core, each time first as it is and then held by deadlined, which knows nothing of
the job. A job's deadline is its period; how many take half as long again as their work is told too.
"""

import argparse
import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgehold.api.deadlined import AttachmentDetail, DeadlinedClient, Target, TargetKind, ThreadState
from edgehold.api.vmand import Mode, State, VmandClient
from edgehold.cli import table
from edgehold.clock import NS_PER_MS
from edgehold.testing.daemons import Daemon
from edgehold.testing.partitions import private_vmand
from tests.bench import strangers
from tests.bench.figures import CMDLINE, Lines, as_installed, consoles, need_guest, percentile, write

MEMORY_GB = 0.125
JOB = re.compile(r"edgehold-job n=(\d+) release_ms=\S+ response_ms=(\d+\.\d+)\r?\n")
WORK = re.compile(r"edgehold-job calibrated work_ms=(\d+\.\d+)")
TIGHT = 1.5
"""A job that takes so many times its work is late, though it may still meet its deadline."""
# A backlog is worked off, and a budget has found its size, when so many jobs in a row met their deadline.
CALM_JOBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Some seconds of the guest's jobs."""

    hogs: int
    held: bool
    due: int
    """Jobs that were released meanwhile."""
    responses_ms: tuple[float, ...]
    """Of those that ended meanwhile."""
    missed: int
    """Of these, later than the deadline."""
    late: int
    """Of these, longer than `TIGHT` times the work."""
    calm_s: float | None
    """After the attachment, until `CALM_JOBS` jobs in a row met their deadline; none: not held, or never."""
    budget_ms: float
    """The median of the budgets in force; 0: not held."""
    strangers_cpus: float
    """What neither the guest, its daemons nor the hogs used."""


class Bench:
    """One guest, its daemons, and hogs when they are wanted."""

    def __init__(
        self, vmand: VmandClient, deadlined: DeadlinedClient, lines: Lines, *, pids: Sequence[int],
        options: argparse.Namespace,
    ) -> None:  # fmt: skip
        self.vmand = vmand
        self.deadlined = deadlined
        self.lines = lines
        self.pids = pids
        self.options = options
        self.work_ms = 0.0

    @contextlib.asynccontextmanager
    async def guest(self) -> AsyncIterator[int]:
        """A shared partition whose guest does its job; destroyed at the end."""
        kernel, initrd = need_guest()
        job = f"edgehold.job_ms={self.options.job_ms:g} edgehold.period_ms={self.options.period_ms:g}"
        one = await self.vmand.create_partition(cores=1, memsize_gb=MEMORY_GB, mode=Mode.SHARED)
        try:
            await self.vmand.deploy(one, kernel=kernel, initrd=initrd, cmdline=f"{CMDLINE} {job}")
            await self.lines.until(one, "edgehold-job n=10 ")
            said = WORK.search(self.lines.text(one))
            self.work_ms = float(said[1]) if said else self.options.job_ms
            yield one
        finally:
            if (await self.vmand.status(one)).state is not State.READY:
                await self.vmand.shutdown(one, force=True)
            await self.vmand.destroy_partition(one)

    async def phases(self, partition: int) -> AsyncGenerator[Phase]:
        """Alone and beside hogs, each time first as it is, then held."""
        for hogs in (0, self.options.hogs):
            await self.calm(partition)  # what was left undone before is not this phase's
            with spinning(hogs) as pids:
                yield await self.measured(partition, pids)
                async with self.held(partition) as attachment:
                    calm_s = await self.calm(partition)
                    yield await self.measured(partition, pids, attachment=attachment, calm_s=calm_s)

    @contextlib.asynccontextmanager
    async def held(self, partition: int) -> AsyncIterator[int]:
        """The partition is held meanwhile.

        Raises:
            SystemExit: deadlined does not hold it; the text says why.
        """
        policy = {"period_ns": round(self.options.period_ms * NS_PER_MS)}
        one = await self.deadlined.attach(Target(kind=TargetKind.PARTITION, id=partition), policy)
        try:
            if waiting := [thread.reason for thread in one.threads if thread.state is not ThreadState.HELD]:
                raise SystemExit(f"the partition is not held: {waiting[0]}")
            yield one.id
        finally:
            await self.deadlined.detach(one.id)

    async def calm(self, partition: int) -> float | None:
        """Seconds until so many jobs in a row met their deadline; none: not in the time that is given."""
        begin = time.monotonic()
        self.lines.forget(partition)
        while (spent := time.monotonic() - begin) < self.options.patience:
            responses = [float(one[2]) for one in JOB.finditer(self.lines.text(partition))][-CALM_JOBS:]
            if len(responses) == CALM_JOBS and max(responses) <= self.options.period_ms:
                return spent
            await asyncio.sleep(0.1)
        return None

    async def measured(
        self, partition: int, hogs: Sequence[int], *, attachment: int = 0, calm_s: float | None = None
    ) -> Phase:
        """What the guest says in the seconds from now on.

        Raises:
            SystemExit: nothing.
        """
        pids = [*self.pids, *hogs, (await self.vmand.status(partition)).pid or os.getpid()]
        self.lines.forget(partition)
        begin_ns = time.monotonic_ns()
        before = strangers.usage(pids)
        await asyncio.sleep(self.options.seconds)
        others = strangers.between(before, strangers.usage(pids))
        responses = tuple(float(one[2]) for one in JOB.finditer(self.lines.text(partition)))
        if not responses:
            raise SystemExit("the guest said nothing")
        budget = median_budget_ms(await self.deadlined.attachment(attachment), begin_ns) if attachment else 0.0
        return Phase(
            hogs=len(hogs),
            held=bool(attachment),
            due=round(self.options.seconds * 1000 / self.options.period_ms),
            responses_ms=responses,
            missed=sum(one > self.options.period_ms for one in responses),
            late=sum(one > TIGHT * self.work_ms for one in responses),
            calm_s=calm_s,
            budget_ms=budget,
            strangers_cpus=others,
        )


@contextlib.contextmanager
def spinning(number: int) -> Iterator[list[int]]:
    """So many processes that use all CPU time they get; their pids.

    Each has a session of its own: where the kernel groups tasks by session (sched(7), autogroup), all hogs of one would
    have the weight of one task together.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(number):
            hog = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"], start_new_session=True)
            stack.callback(hog.wait)
            stack.callback(hog.kill)
            found.append(hog.pid)
        yield found


def median_budget_ms(detail: AttachmentDetail, since_ns: int) -> float:
    """Of an attachment's windows that ended after a time of CLOCK_MONOTONIC."""
    budgets = [one.budget_ns / NS_PER_MS for one in detail.history if one.time_ns >= since_ns]
    return percentile(budgets, 0.5) if budgets else 0.0


def show(phases: Sequence[Phase], *, work_ms: float, options: argparse.Namespace) -> str:
    """The table."""
    header = [
        "HOGS", "HELD", "JOBS", "OF DUE", "MISSED", "LATE", "P50 MS", "P99 MS", "WORST MS", "BUDGET MS", "CALM AFTER S",
        "STRANGERS",
    ]  # fmt: skip
    rows = [
        [
            one.hogs, "yes" if one.held else "no", len(one.responses_ms), one.due, one.missed, one.late,
            *(f"{percentile(one.responses_ms, share):.1f}" for share in (0.5, 0.99, 1.0)),
            f"{one.budget_ms:.1f}" if one.held else "-", "-" if one.calm_s is None else f"{one.calm_s:.1f}",
            f"{one.strangers_cpus:.2f}",
        ]
        for one in phases
    ]  # fmt: skip
    return (
        f"\nA guest's job of {work_ms:.1f} ms every {options.period_ms:g} ms; missed: later than its period; "
        f"late: longer than {TIGHT:g} times its work\n\n{table(header, rows)}"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guestjob", description="A guest's deadlines.")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each phase (default: 20)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for calm (default: 60)")
    parser.add_argument(
        "--hogs", type=int, default=2 * cores, help=f"processes that spin (default: two for each core, {2 * cores})"
    )
    parser.add_argument("--job-ms", type=float, default=40.0, help="the guest's work each period (default: 40)")
    parser.add_argument("--period-ms", type=float, default=100.0, help="and its period (default: 100)")
    parser.add_argument("--accelerator", default="tcg", help="what runs the guest (default: tcg)")
    return parser.parse_args()


@contextlib.asynccontextmanager
async def private_deadlined(directory: Path, vmand: Path) -> AsyncIterator[tuple[int, DeadlinedClient]]:
    """A deadlined that asks this vmand: its pid and a client."""
    socket = directory / "dl.sock"
    daemon = Daemon("deadlined", directory=directory, settings={
        "socket": str(socket), "state_dir": str(directory / "dl-state"), "vmand_socket": str(vmand),
    })  # fmt: skip
    try:
        await daemon.start()
        async with DeadlinedClient(socket) as client:
            yield daemon.pid, client
    finally:
        await daemon.stop()


async def main() -> None:
    """Measure, print, write."""
    options = arguments()
    need_guest()
    as_installed()
    phases: list[Phase] = []
    async with (
        private_vmand(settings={"accelerator": options.accelerator}) as vmand,
        await vmand.client() as client,
        await vmand.client() as listener,
        consoles(listener) as lines,
        private_deadlined(vmand.directory, vmand.socket) as (pid, deadlined),
    ):
        bench = Bench(client, deadlined, lines, pids=[vmand.pid, pid], options=options)
        print(f"load before: {' '.join(f'{one:.2f}' for one in os.getloadavg())}")
        async with bench.guest() as partition, contextlib.aclosing(bench.phases(partition)) as measured:
            async for phase in measured:
                phases.append(phase)
                print(
                    f"{phase.hogs} hogs, {'held' if phase.held else 'free'}: {phase.missed} of "
                    f"{len(phase.responses_ms)} jobs missed their deadline",
                    flush=True,
                )
    print(show(phases, work_ms=bench.work_ms, options=options))
    write("guestjob", {
        "options": vars(options), "work_ms": bench.work_ms, "phases": [asdict(one) for one in phases],
    })  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
