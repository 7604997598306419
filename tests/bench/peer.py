"""``make bench-peer``: vmand beside Debian's libvirt, one after the other in every round; build/bench/peer.json.

The same kernel, initial RAM disk, memory and emulated machine. Each figure is a median; the ratio is the median of the
rounds' ratios, ours over theirs: what else the host does meets both sides of a round alike.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from edgehold.api.vmand import Mode, VmandClient
from edgehold.cli import table
from edgehold.testing.partitions import PrivateVmand, private_vmand
from tests.bench.figures import (
    CMDLINE,
    LINE_S,
    UP,
    Lines,
    as_installed,
    consoles,
    cpu_of_command_ms,
    need_guest,
    number,
    percentile,
    resident_mb,
    timed_ms,
    write,
)
from tests.bench.libvirt import MEMORY_MIB, NAME, Libvirt, LibvirtPython, private_libvirt

# The bars, as ours over theirs.
FIRST_LINE, COMMAND, LIBRARY = 1.0, 1 / 20, 1.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of ours beside one of theirs."""

    what: str
    ours: float
    peer: str
    theirs: float
    unit: str
    ratio: float
    """Ours over theirs."""
    bar: float | None = None

    @property
    def verdict(self) -> str:
        """``met`` or ``MISSED``; nothing where there is no bar."""
        return "" if self.bar is None else "met" if self.ratio <= self.bar else "MISSED"

    def cells(self) -> list[str]:
        """A row of the table."""
        bar = "" if self.bar is None else f"<= {self.bar:g}"
        cells = [self.what, number(self.ours), self.unit, self.peer, number(self.theirs), f"{self.ratio:.3f}"]
        return [*cells, bar, self.verdict]


class Bench:
    """Both sides, and what was measured: milliseconds by (what, who)."""

    def __init__(self, client: VmandClient, lines: Lines, libvirt: Libvirt, python: LibvirtPython) -> None:
        self.client = client
        self.lines = lines
        self.libvirt = libvirt
        self.python = python
        self.taken: dict[tuple[str, str], list[float]] = {}
        self.partition = 0

    async def take(self, what: str, who: str, call: Callable[[], Awaitable[object]], *, count: bool) -> None:
        """Measure once. A call that answers a number has measured itself."""
        answer: object = None

        async def run() -> None:
            nonlocal answer
            answer = await call()

        spent = await timed_ms(run)
        if count:
            self.taken.setdefault((what, who), []).append(answer if isinstance(answer, float) else spent)

    def compare(self, what: str, who: str, *, shown: str, peer: str, bar: float | None = None) -> Comparison:
        """Medians in milliseconds, and the median of the rounds' ratios."""
        ours, theirs = self.taken[what, "vmand"], self.taken[what, who]
        ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
        return Comparison(shown, statistics.median(ours), peer, statistics.median(theirs), "ms", ratio, bar)

    async def by_vmand(self) -> None:
        """Create and deploy, until the guest's first line."""
        kernel, initrd = need_guest()
        self.partition = await self.client.create_partition(cores=1, memsize_gb=MEMORY_MIB / 1024, mode=Mode.SHARED)
        await self.client.deploy(self.partition, kernel=kernel, initrd=initrd, cmdline=CMDLINE)
        await self.lines.until(self.partition, UP)

    async def by_virsh(self) -> None:
        """Define and start, until the same line."""
        await self.libvirt.virsh("define", str(self.libvirt.definition))
        await self.libvirt.virsh("start", NAME)
        await self.libvirt.until(UP, timeout_s=LINE_S)

    async def by_python(self) -> None:
        """The same by libvirt-python on an open connection."""
        await self.python.ask(f"start {self.libvirt.definition}")
        await self.libvirt.until(UP, timeout_s=LINE_S)

    async def end_ours(self) -> None:
        """Away with the guest."""
        await self.client.shutdown(self.partition, force=True)
        await self.client.destroy_partition(self.partition)

    async def starts(self, rounds: int) -> None:
        """Each side from nothing to its guest's first line; the first round only warms up."""
        sides = [("vmand", self.by_vmand, self.end_ours)]
        sides += [
            ("virsh", self.by_virsh, self.libvirt.remove),
            ("libvirt-python", self.by_python, self.libvirt.remove),
        ]
        for n in range(rounds + 1):
            for who, start, end in sides[n % 3 :] + sides[: n % 3]:
                await self.take("first line", who, start, count=n > 0)
                await end()
            said = ", ".join(f"{who} {times[-1] / 1000:.2f} s" for (_what, who), times in self.taken.items())
            print(f"start {n} of {rounds}: {said or 'warm-up'}", flush=True)

    async def suspends(self, rounds: int) -> None:
        """Suspend and restore of a guest on each side that is up and idle."""
        await self.by_vmand()
        await self.by_virsh()
        await self.python.ask(f"find {NAME}")
        for n in range(rounds + 1):
            count = n > 0
            await self.take("suspend", "vmand", partial(self.client.suspend, self.partition), count=count)
            await self.take("restore", "vmand", partial(self.client.restore, self.partition), count=count)
            # One domain for both peers: each finds it running and leaves it so.
            await self.take("suspend", "virsh", partial(self.libvirt.virsh, "suspend", NAME), count=count)
            await self.take("restore", "virsh", partial(self.libvirt.virsh, "resume", NAME), count=count)
            await self.take("suspend", "libvirt-python", partial(self.python.ask, "suspend"), count=count)
            await self.take("restore", "libvirt-python", partial(self.python.ask, "resume"), count=count)

    def memory_and_commands(self, vmand: PrivateVmand) -> list[Comparison]:
        """With one idle guest each: the daemons' memory, and the CPU of asking for the state by a command."""
        argv = [str(Path(sys.executable).parent / "vmanctl"), "status", str(self.partition)]
        ours = resident_mb(vmand.pid)[1], cpu_of_command_ms(argv, environment={"VMAND_SOCKET": str(vmand.socket)})
        theirs = (
            sum(resident_mb(pid)[1] for pid in self.libvirt.pids()),
            cpu_of_command_ms(["virsh", "-c", self.libvirt.uri, "domstate", NAME]),
        )
        memory, command = (mine / other for mine, other in zip(ours, theirs, strict=True))
        return [
            Comparison("daemon's memory (PSS)", ours[0], "libvirtd + virtlogd", theirs[0], "MB", memory),
            Comparison("state by a command", ours[1], "virsh domstate", theirs[1], "ms CPU", command),
        ]

    def comparisons(self) -> list[Comparison]:
        """What was measured, with the bars."""
        shown, library = "create + deploy to first line", "libvirt-python, open"
        rows = [
            self.compare("first line", "virsh", shown=shown, peer="virsh define + start", bar=FIRST_LINE),
            self.compare("first line", "libvirt-python", shown=shown, peer=library),
        ]
        for what, word in (("suspend", "suspend"), ("restore", "resume")):
            rows.append(self.compare(what, "virsh", shown=what, peer=f"virsh {word}", bar=COMMAND))
            rows.append(self.compare(what, "libvirt-python", shown=what, peer=library, bar=LIBRARY))
        return rows


async def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peer", description="vmand beside libvirt.")
    parser.add_argument("--rounds", type=int, default=10, help="guests that each side starts (default: 10)")
    parser.add_argument("--suspends", type=int, default=50, help="suspends and restores of each side (default: 50)")
    options = parser.parse_args()
    need_guest()
    as_installed()
    async with (
        private_libvirt() as libvirt,
        private_vmand(settings={"accelerator": "tcg"}) as vmand,
        await vmand.client() as client,
        await vmand.client() as listener,
        consoles(listener) as lines,
    ):
        with LibvirtPython(libvirt.uri) as python:
            bench = Bench(client, lines, libvirt, python)
            await bench.starts(options.rounds)
            await bench.suspends(options.suspends)
            rows = [*bench.comparisons(), *bench.memory_and_commands(vmand)]
            await bench.end_ours()
            taken = bench.taken
            version = libvirt.version()
    print(f"\nvmand beside {version}; {time.strftime('%Y-%m-%d')}\n")
    header = ["WHAT", "VMAND", "UNIT", "PEER", "THEIRS", "OURS/THEIRS", "BAR", "VERDICT"]
    print(table(header, [one.cells() for one in rows]), flush=True)
    write("peer", {
        "peer": version,
        "comparisons": [asdict(one) | {"verdict": one.verdict} for one in rows],
        "spread_ms": {
            f"{what}, {who}": {"min": min(one), "p50": percentile(one, 0.5), "p95": percentile(one, 0.95)}
            for (what, who), one in taken.items()
        },
    })  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
