"""``make bench-isolation``: a partition's job while another partition attacks; build/bench/isolation.json.

The victim's guest works 10 ms every 100 ms and says how long each job took. The attacker's has two CPUs and floods the
memory, or forks without end. Once the victim has a core of its own (a dedicated partition; the attacker is kept on core
0), once both are shared partitions on any core. docs/isolation.md explains what is seen.
"""

import argparse
import asyncio
import contextlib
import os
import re
import statistics
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgehold.api.vmand import Mode, State, VmandClient
from edgehold.cli import table
from edgehold.kernel import procfs
from edgehold.testing.partitions import PrivateVmand, private_vmand
from tests.bench import strangers
from tests.bench.figures import CMDLINE, Lines, as_installed, consoles, need_guest, percentile, write

ATTACKS = ("memory", "fork")
# vmand gives core 0 to nobody: there a shared partition can be kept away from a dedicated one.
LINUX_CORES = frozenset({0})
PINNED, SHARED = "pinned", "shared"
VICTIM_GB, ATTACKER_GB = 0.125, 0.25
BAR = 1.25
"""p99 under attack over p99 without, where the victim is pinned."""
SETTLE_S = 2.0
# How often a phase is measured that strangers disturb, until its round is void.
REPEATS = 3
JOB = re.compile(r"edgehold-job n=\d+ release_ms=\S+ response_ms=(\d+\.\d+)\r?\n")


@dataclass(frozen=True, slots=True)
class Phase:
    """Some seconds of the victim's jobs."""

    name: str
    """An attack, or ``quiet``."""
    responses_ms: tuple[float, ...]
    strangers_cpus: float
    waited_ms_per_s: float
    """How long the victim's vCPU could run and did not, because its core was another's (run_delay of schedstat)."""
    void: bool
    """Strangers disturbed it: it does not count."""


@dataclass(frozen=True, slots=True)
class Round:
    """One boot of the victim: quiet, an attack, quiet, the other attack, quiet."""

    placement: str
    number: int
    phases: tuple[Phase, ...]
    void: str
    """Why it does not count; empty where it does."""

    def good(self) -> list[Phase]:
        """The phases that count, in their order."""
        return [one for one in self.phases if not one.void]

    def quiet(self, attack: str) -> list[float]:
        """The responses before and after an attack."""
        good = self.good()
        at = [one.name for one in good].index(attack)
        return [*good[at - 1].responses_ms, *good[at + 1].responses_ms]

    def attacked(self, attack: str) -> list[float]:
        """The responses during an attack."""
        return [value for one in self.good() if one.name == attack for value in one.responses_ms]


@dataclass(frozen=True, slots=True)
class Result:
    """One placement under one attack: medians over the rounds that count."""

    placement: str
    attack: str
    rounds: int
    quiet_p50_ms: float
    attacked_p50_ms: float
    quiet_p99_ms: float
    attacked_p99_ms: float
    attacked_max_ms: float
    ratio: float
    """Of the two p99: the median of the rounds' ratios."""
    verdict: str


class Void(Exception):  # noqa: N818 - no fault: the round does not count
    """Why."""


class Bench:
    """One vmand, its victim and its attackers."""

    def __init__(self, vmand: PrivateVmand, client: VmandClient, lines: Lines, *, options: argparse.Namespace) -> None:
        self.vmand = vmand
        self.client = client
        self.lines = lines
        self.options = options
        self.grade = ""
        self.all_cores = frozenset(os.sched_getaffinity(0))

    async def round(self, placement: str, number: int) -> Round:
        """Boot the victim and attack it, unless it turns out to be void. Nothing of it is left afterwards."""
        phases: list[Phase] = []
        void = ""
        try:
            await self.attacks(placement, phases)
        except Void as why:
            void = str(why)
        return Round(placement, number, tuple(phases), void)

    async def attacks(self, placement: str, phases: list[Phase]) -> None:
        """All phases, as far as they count.

        Raises:
            Void: a phase does not count.
        """
        mode = Mode.DEDICATED if placement == PINNED else Mode.SHARED
        # Who only watches must not be what disturbs.
        for pid in (os.getpid(), self.vmand.pid):
            keep_on(pid, LINUX_CORES if placement == PINNED else self.all_cores)
        job = f"edgehold.job_ms={self.options.job_ms:g} edgehold.period_ms={self.options.period_ms:g}"
        async with self.guest(
            mode=mode, cores=1, memory_gb=VICTIM_GB, arguments=job, words="edgehold-job n="
        ) as victim:
            if placement == PINNED:
                self.grade = (await self.client.status(victim)).cores_grade or ""
            await self.phase("quiet", victim, phases)
            for attack in ATTACKS:
                hog = f"edgehold.hog={attack}"
                async with self.guest(
                    mode=Mode.SHARED, cores=2, memory_gb=ATTACKER_GB, arguments=hog, words=f"edgehold-hog {attack}",
                    confined=placement == PINNED,
                ) as attacker:  # fmt: skip
                    await self.phase(attack, victim, phases)
                    state = (await self.client.status(attacker)).state
                    if state is not State.DEPLOYED:
                        raise Void(f"the attacker is {state.value}")
                await self.phase("quiet", victim, phases)

    @contextlib.asynccontextmanager
    async def guest(
        self, *, mode: Mode, cores: int, memory_gb: float, arguments: str, words: str, confined: bool = False
    ) -> AsyncIterator[int]:
        """A partition whose guest has said these words; destroyed at the end."""
        kernel, initrd = need_guest()
        one = await self.client.create_partition(cores=cores, memsize_gb=memory_gb, mode=mode)
        try:
            await self.client.deploy(one, kernel=kernel, initrd=initrd, cmdline=f"{CMDLINE} {arguments}")
            if confined:
                keep_on((await self.client.status(one)).pid or 0, LINUX_CORES)
            await self.lines.until(one, words)
            yield one
        finally:
            if (await self.client.status(one)).state is not State.READY:
                await self.client.shutdown(one, force=True)
            await self.client.destroy_partition(one)
            self.lines.forget(one)

    async def phase(self, name: str, victim: int, phases: list[Phase]) -> None:
        """Wait until strangers are quiet (not for ever), then measure; again where they came back meanwhile.

        Raises:
            Void: they always did, or the victim said nothing.
        """
        for _ in range(REPEATS):
            for _ in range(max(round(self.options.patience / SETTLE_S), 1)):
                if await self.disturbed(SETTLE_S) <= self.options.strangers:
                    break
            phases.append(await self.measured(name, victim))
            if not phases[-1].void:
                return
        raise Void(f"strangers disturbed {name} {REPEATS} times")

    async def measured(self, name: str, victim: int) -> Phase:
        """What the victim says in the seconds from now on.

        Raises:
            Void: nothing.
        """
        pid = (await self.client.status(victim)).pid or 0
        (vcpu,) = await self.client.vcpus(victim)
        self.lines.forget(victim)
        waited = waited_ns(pid, vcpu.tid)
        cpus = await self.disturbed(self.options.seconds)
        waited = waited_ns(pid, vcpu.tid) - waited
        responses = tuple(float(one) for one in JOB.findall(self.lines.text(victim)))
        if not responses:
            raise Void("the victim said nothing")
        void = cpus > self.options.strangers
        return Phase(name, responses, cpus, waited / 1e6 / self.options.seconds, void)

    async def disturbed(self, seconds: float) -> float:
        """What strangers use in so many seconds from now on, in CPUs."""
        pids = [self.vmand.pid, *self.vmand.guests()]
        before = strangers.usage(pids)
        await asyncio.sleep(seconds)
        return strangers.between(before, strangers.usage(pids))


def keep_on(pid: int, cores: Collection[int]) -> None:
    """Let every thread of a process run on these cores only; threads that it starts later inherit it."""
    for tid in procfs.threads(pid):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(tid, cores)


def waited_ns(pid: int, tid: int) -> int:
    """How long a thread has waited for a core so far: the second number of its schedstat (sched-stats.rst)."""
    return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[1])


def result(placement: str, attack: str, rounds: Sequence[Round]) -> Result:
    """What the rounds that count say together."""
    good = [one for one in rounds if one.placement == placement and not one.void]
    if not good:
        return Result(placement, attack, 0, 0, 0, 0, 0, 0, 0, "void")

    def over(values: Sequence[list[float]], share: float) -> float:
        return statistics.median(percentile(one, share) for one in values)

    quiet, attacked = [one.quiet(attack) for one in good], [one.attacked(attack) for one in good]
    ratios = [percentile(a, 0.99) / percentile(b, 0.99) for a, b in zip(attacked, quiet, strict=True)]
    ratio = statistics.median(ratios)
    verdict = "" if placement != PINNED else "met" if ratio <= BAR else "MISSED"
    return Result(
        placement, attack, len(good), over(quiet, 0.5), over(attacked, 0.5), over(quiet, 0.99), over(attacked, 0.99),
        over(attacked, 1.0), ratio, verdict,
    )  # fmt: skip


def show_round(one: Round) -> None:
    """Its phases, a line each."""
    for phase in one.phases:
        p50, p99, worst = (percentile(phase.responses_ms, share) for share in (0.5, 0.99, 1.0))
        void = "  VOID" if phase.void else ""
        print(
            f"{one.placement:6} {one.number:2}  {phase.name:6}  {len(phase.responses_ms):4} jobs  p50 {p50:7.2f}  "
            f"p99 {p99:7.2f}  max {worst:7.2f} ms  waited {phase.waited_ms_per_s:5.1f} ms/s  "
            f"strangers {phase.strangers_cpus:.2f} CPUs{void}",
            flush=True,
        )
    if one.void:
        print(f"{one.placement:6} {one.number:2}  the round is VOID: {one.void}", flush=True)


def show(results: Sequence[Result], *, grade: str) -> None:
    """The table that docs/isolation.md has."""
    print(f"\nResponse of the victim's job in ms; cores of the pinned victim: {grade}; {time.strftime('%Y-%m-%d')}\n")
    header = [
        "VICTIM",
        "ATTACK",
        "ROUNDS",
        "P50",
        "ATTACKED",
        "P99",
        "ATTACKED",
        "WORST",
        "P99 RATIO",
        "BAR",
        "VERDICT",
    ]
    rows = []
    for one in results:
        if not one.rounds:
            rows.append([one.placement, one.attack, 0, *["-"] * 6, "", one.verdict])
            continue
        values = (one.quiet_p50_ms, one.attacked_p50_ms, one.quiet_p99_ms, one.attacked_p99_ms, one.attacked_max_ms)
        bar = f"<= {BAR:g}" if one.placement == PINNED else ""
        rows.append([
            one.placement, one.attack, one.rounds, *(f"{value:.2f}" for value in values), f"{one.ratio:.2f}", bar,
            one.verdict,
        ])  # fmt: skip
    print(table(header, rows), flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.isolation", description="A partition under attack.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count, of each placement (default: 3)")
    parser.add_argument("--tries", type=int, default=6, help="rounds at most, of each placement (default: 6)")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each phase (default: 30)")
    parser.add_argument(
        "--strangers", type=float, default=0.15, help="CPUs that others may use in a phase that counts (default: 0.15)"
    )
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait for strangers before each phase (default: 60)"
    )
    parser.add_argument("--job-ms", type=float, default=10.0, help="the victim's work each period (default: 10)")
    parser.add_argument("--period-ms", type=float, default=100.0, help="the victim's period (default: 100)")
    return parser.parse_args()


async def main() -> None:
    """Measure, print, write."""
    options = arguments()
    need_guest()
    as_installed()
    rounds: list[Round] = []
    async with (
        private_vmand(settings={"accelerator": "tcg", "steer": True}) as vmand,
        await vmand.client() as client,
        await vmand.client() as listener,
        consoles(listener) as lines,
    ):
        if not (await client.capabilities()).cores_pool:
            raise SystemExit("no core can be dedicated on this host: two are needed, and core 0 stays with Linux")
        bench = Bench(vmand, client, lines, options=options)
        for number in range(1, options.tries + 1):
            for placement in (PINNED, SHARED):
                if sum(one.placement == placement and not one.void for one in rounds) < options.rounds:
                    rounds.append(await bench.round(placement, number))
                    show_round(rounds[-1])
    results = [result(placement, attack, rounds) for placement in (PINNED, SHARED) for attack in ATTACKS]
    show(results, grade=bench.grade)
    write("isolation", {
        "options": vars(options), "grade": bench.grade, "results": [asdict(one) for one in results],
        "rounds": [asdict(one) for one in rounds],
    })  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
