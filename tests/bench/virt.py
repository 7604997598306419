"""``make bench-libvirt``: virtvmand beside Debian's libvirtd, call by call in one run; build/bench/virt.json.

The same client library with a connection to each, the same number of domains, one running guest each. What is compared
is what each call takes until it returns, the daemon's CPU time for it, and the daemons' memory.
"""

import argparse
import asyncio
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgehold.cli import table
from edgehold.testing.partitions import private_vmand
from edgehold.testing.virtvmand import private_virtvmand
from tests.bench.figures import (
    CMDLINE,
    LINE_S,
    UP,
    Figure,
    as_installed,
    consoles,
    need_guest,
    percentile,
    plain,
    resident_mb,
    show,
    write,
)
from tests.bench.libvirt import MEMORY_MIB, NAME, Libvirt, private_libvirt
from tests.bench.peer import Comparison
from tests.bench.virtcalls import KINDS, LIST, VirtCalls

OURS, THEIRS = "virtvmand", "libvirtd"
FEW, MANY = 8, 1000
SMALL_MIB = 16  # the smallest partition; a domain that is never started
# The bars: latency and memory as ours over theirs; CPU of listing many.
LATENCY, MEMORY, LIST_CPU_MS = 1.0, 0.6, 10.0
# What stays the host's while many partitions' memory is allocated.
SPARE_MIB = 3072
BLOCKS = 10

_DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <metadata><edgehold:partition xmlns:edgehold='urn:edgehold:partition:1' mode='shared'/></metadata>
  <memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline></os>
  <features><acpi/><apic/></features>
  <cpu mode='maximum'/>
  <devices>
    <controller type='usb' model='none'/><memballoon model='none'/>
    <serial type='pty'><target port='0'/></serial><console type='pty'><target type='serial' port='0'/></console>
  </devices>
</domain>
"""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory in MB at one moment, by process: RSS and PSS."""

    when: str
    of: Mapping[str, tuple[float, float]]


class Bench:
    """Both daemons through one client, and what was measured."""

    def __init__(self, calls: VirtCalls, pids: Mapping[str, int], definitions: Mapping[str, str]) -> None:
        self.calls = calls
        self.pids = pids
        self.definitions = definitions
        self.rows: list[Comparison] = []
        self.figures: list[Figure] = []
        self.memory: list[Memory] = []
        self.spread: dict[str, dict[str, float]] = {}

    def look(self, when: str) -> None:
        """Remember everybody's memory."""
        self.memory.append(Memory(when, {who: resident_mb(pid) for who, pid in self.pids.items()}))

    async def define(self, first: int, end: int, *, memory_mib: int) -> None:
        """The same number of domains more on both sides."""
        for who, definition in self.definitions.items():
            names = [f"{NAME}-{n}" for n in range(first, end)]
            await self.calls.define(who, [definition.format(name=name, memory=memory_mib) for name in names])

    async def start(self, who: str) -> None:
        """Define and start the domain that is asked."""
        await self.calls.define(who, [self.definitions[who].format(name=NAME, memory=MEMORY_MIB)])
        await self.calls.start(who, NAME)

    async def latency(self, kinds: Sequence[str], domains: int, *, rounds: int, bar: float | None) -> None:
        """How long the client waits for each kind of call: medians."""
        taken = await self.calls.latency_us(kinds, rounds=rounds, warm_up=max(rounds // 20, 2))
        for kind in kinds:
            ours, theirs = (statistics.median(taken[kind, who]) for who in (OURS, THEIRS))
            what = f"{shown(kind, domains)}: wall"
            self.rows.append(Comparison(what, ours, THEIRS, theirs, "us", ours / theirs, bar))
        for (kind, who), one in taken.items():
            self.spread[f"{shown(kind, domains)}, {who}"] = {
                "min": min(one), "p50": percentile(one, 0.5), "p95": percentile(one, 0.95),
            }  # fmt: skip

    async def cpu_us(self, kind: str, *, times: int) -> dict[str, float]:
        """Microseconds of the daemon's CPU a call, in blocks that alternate."""
        spent = {OURS: 0, THEIRS: 0}
        for n in range(BLOCKS):
            for who in (OURS, THEIRS) if n % 2 else (THEIRS, OURS):
                begin = cpu_ns(self.pids[who])
                await self.calls.calls(who, kind, times // BLOCKS)
                spent[who] += cpu_ns(self.pids[who]) - begin
        return {who: ns / (times // BLOCKS * BLOCKS) / 1000 for who, ns in spent.items()}

    async def few(self, *, rounds: int, times: int) -> None:
        """Every kind of call, with some domains."""
        await self.latency(KINDS, FEW, rounds=rounds, bar=LATENCY)
        for kind in KINDS:
            spent = await self.cpu_us(kind, times=times)
            ours, theirs = spent[OURS], spent[THEIRS]
            what = f"{shown(kind, FEW)}: daemon's CPU"
            self.rows.append(Comparison(what, ours, THEIRS, theirs, "us", ours / theirs))

    async def many(self, wanted: int) -> None:
        """Listing many domains."""
        there = min(wanted, FEW + max(available_mib() - SPARE_MIB, 0) // SMALL_MIB)
        note = "" if there == wanted else f"not {wanted}: memory for no more partitions of {SMALL_MIB} MiB"
        begin = time.perf_counter()
        await self.define(FEW, there, memory_mib=SMALL_MIB)
        print(f"{there} domains are defined on both sides after {time.perf_counter() - begin:.0f} s", flush=True)
        counts = [await self.calls.count(who) for who in (OURS, THEIRS)]
        if counts != [there, there]:
            raise RuntimeError(f"{there} domains were defined, and both sides list {counts}")
        self.look(f"{there} domains")
        await self.latency([LIST], there, rounds=100, bar=None)
        spent = await self.cpu_us(LIST, times=100)
        ours, theirs = spent[OURS] / 1000, spent[THEIRS] / 1000
        what = f"{shown(LIST, there)}: daemon's CPU"
        self.rows.append(Comparison(what, ours, THEIRS, theirs, "ms", ours / theirs))
        self.figures.append(Figure(what, ours, "ms", LIST_CPU_MS, note=note))
        self.look(f"{there} domains, listed 200 times")

    def memory_rows(self) -> list[Comparison]:
        """Resident memory at every moment."""
        rows = []
        for one in self.memory:
            (rss, pss), (their_rss, their_pss) = one.of[OURS], one.of[THEIRS]
            rows.append(Comparison(f"RSS, {one.when}", rss, THEIRS, their_rss, "MB", rss / their_rss, MEMORY))
            rows.append(Comparison(f"PSS, {one.when}", pss, THEIRS, their_pss, "MB", pss / their_pss))
        return rows

    def others(self) -> list[Figure]:
        """What stands behind each daemon: virtlogd on their side, vmand on ours."""
        last = self.memory[-1]
        return [
            Figure(f"{who}: RSS, {last.when}", last.of[who][0], "MB", note=f"PSS {last.of[who][1]:.1f} MB")
            for who in last.of
            if who not in (OURS, THEIRS)
        ]


def shown(kind: str, domains: int) -> str:
    """How a kind of call is called in tables."""
    return f"{kind}, {domains} domains" if kind == LIST else kind


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process, those that ended too, in nanoseconds: clock_getcpuclockid(3).

    The C library makes the clock's number of the pid in the same way; Python has no call for it.
    """
    return time.clock_gettime_ns((~pid << 3) | 2)


def available_mib() -> int:
    """What new partitions' memory may be made of: MemAvailable, and what is free in /dev/shm."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return min(int(rows["MemAvailable"].split()[0]) // 1024, shutil.disk_usage("/dev/shm").free // 2**20)


def definitions(libvirt: Libvirt) -> dict[str, str]:
    """Both sides' domains, with ``{name}`` and ``{memory}`` to be filled in."""
    kernel, initrd = (libvirt.directory / image.name for image in need_guest())
    ours = _DOMAIN.format(name="{name}", memory="{memory}", kernel=kernel, initrd=initrd, cmdline=CMDLINE)
    theirs = libvirt.definition.read_text()
    theirs = theirs.replace(f"<name>{NAME}</name>", "<name>{name}</name>")
    return {OURS: ours, THEIRS: theirs.replace(f">{MEMORY_MIB}</memory>", ">{memory}</memory>")}


def report(bench: Bench, version: str) -> None:
    """Tables, and the results for machines."""
    rows = [*bench.rows, *bench.memory_rows()]
    figures = [*bench.figures, *bench.others()]
    print(f"\nvirtvmand beside {version}; {time.strftime('%Y-%m-%d')}\n")
    header = ["WHAT", "VIRTVMAND", "UNIT", "PEER", "THEIRS", "OURS/THEIRS", "BAR", "VERDICT"]
    print(table(header, [one.cells() for one in rows]), flush=True)
    show("Beside a bar of its own, and what else is in memory", figures)
    results: dict[str, Any] = {
        "peer": version,
        "comparisons": [asdict(one) | {"verdict": one.verdict} for one in rows],
        "figures": plain(figures),
        "spread_us": bench.spread,
    }
    write("virt", results)


async def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.virt", description="virtvmand beside libvirtd.")
    parser.add_argument("--rounds", type=int, default=2000, help="calls that are timed, of each kind (default: 2000)")
    parser.add_argument("--calls", type=int, default=5000, help="calls for CPU time, of each kind (default: 5000)")
    parser.add_argument("--domains", type=int, default=MANY, help=f"how many are listed at last (default: {MANY})")
    options = parser.parse_args()
    need_guest()
    as_installed()
    async with (
        private_libvirt() as libvirt,
        private_vmand(settings={"accelerator": "tcg", "limits": {"partitions": 1024}}) as vmand,
        private_virtvmand(vmand) as virtvmand,
        await vmand.client() as client,
        await vmand.client() as listener,
        consoles(listener) as lines,
    ):
        daemon, logger = libvirt.pids()
        pids = {OURS: virtvmand.pid, THEIRS: daemon, "virtlogd": logger, "vmand": vmand.pid}
        with VirtCalls() as calls:
            bench = Bench(calls, pids, definitions(libvirt))
            await calls.open(OURS, virtvmand.uri)
            await calls.open(THEIRS, libvirt.uri)
            bench.look("no domain")
            await bench.start(OURS)
            await lines.until((await client.list_partitions())[0].id, UP)
            await bench.start(THEIRS)
            await libvirt.until(UP, timeout_s=LINE_S)
            await bench.define(1, FEW, memory_mib=SMALL_MIB)
            bench.look(f"{FEW} domains")
            await bench.few(rounds=options.rounds, times=options.calls)
            bench.look(f"{FEW} domains, {len(KINDS) * (options.rounds + options.calls)} calls later")
            await bench.many(options.domains)
            report(bench, libvirt.version())


if __name__ == "__main__":
    asyncio.run(main())
