"""vmand's own figures: round trips, suspend and restore, memory, imports, a killed guest, a command's CPU.

Eight emulated guests are deployed and idle while it is asked. Times are wall times of a client on an open connection.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from edgehold.api.vmand import Event, Mode, State, VmandClient
from edgehold.cli import table
from edgehold.testing.partitions import PrivateVmand, private_vmand
from tests.bench import imports
from tests.bench.figures import (
    CMDLINE,
    UP,
    Figure,
    consoles,
    cpu_of_command_ms,
    need_guest,
    number,
    percentile,
    plain,
    resident_mb,
    show,
    timed_ms,
    write,
)

PARTITIONS, MEMORY_GB = 8, 0.125
STATUS_CALLS, SUSPENDS, KILLS = 2000, 200, 20
# The bars.
STATUS_MS, SUSPEND_P95_MS, RSS_MB, NOTICED_S, COMMAND_CPU_MS = 1.0, 10.0, 45.0, 0.5, 150.0
# What vmand imports at its start, when its back end is made, and when /metrics is first asked for.
STEPS = ("vmand.__main__", "vmand.backend.qemu", "vmand.metrics", "edgehold.wire.http")
SMALLEST_MB = 0.35
FAILED_S = 30.0


async def measure() -> None:
    """All of it: two tables and build/bench/partitions.json."""
    need_guest()
    async with private_vmand() as vmand, await vmand.client() as client:
        ids = await deployed(vmand, client)
        figures = [*await round_trips(client, ids[0]), *await memory(vmand, client), command(vmand, ids[0])]
        figures += await killed(vmand, client, ids)
    show(f"vmand with {PARTITIONS} deployed partitions of {MEMORY_GB * 1024:.0f} MiB", figures)
    found = imports.of(STEPS)
    show_imports(found)
    write("partitions", {
        "figures": plain(figures),
        "imports": [{"step": one.step, "package": one.package, "mb": one.mb, "ms": one.ms} for one in found.costs],
    })  # fmt: skip


async def deployed(vmand: PrivateVmand, client: VmandClient) -> list[int]:
    """Partitions whose guests are up."""
    async with await vmand.client() as listener, consoles(listener) as lines:
        ids = []
        for _ in range(PARTITIONS):
            one = await client.create_partition(cores=1, memsize_gb=MEMORY_GB, mode=Mode.SHARED)
            await deploy(client, one)
            await lines.until(one, UP)
            ids.append(one)
        return ids


async def deploy(client: VmandClient, partition: int) -> None:
    """Start the small guest."""
    kernel, initrd = need_guest()
    await client.deploy(partition, kernel=kernel, initrd=initrd, cmdline=CMDLINE)


async def round_trips(client: VmandClient, one: int) -> list[Figure]:
    """``status``, and ``suspend`` and ``restore`` of one partition."""
    asked = [await timed_ms(lambda: client.status(one)) for _ in range(STATUS_CALLS)]
    pairs = [
        (await timed_ms(lambda: client.suspend(one)), await timed_ms(lambda: client.restore(one)))
        for _ in range(SUSPENDS)
    ]
    suspends, restores = ([pair[n] for pair in pairs] for n in (0, 1))
    return [
        Figure("status, p50", percentile(asked, 0.5), "ms", STATUS_MS),
        Figure("status, p95", percentile(asked, 0.95), "ms"),
        Figure("suspend, p50", percentile(suspends, 0.5), "ms"),
        Figure("suspend, p95", percentile(suspends, 0.95), "ms", SUSPEND_P95_MS),
        Figure("restore, p50", percentile(restores, 0.5), "ms"),
        Figure("restore, p95", percentile(restores, 0.95), "ms", SUSPEND_P95_MS),
    ]


async def memory(vmand: PrivateVmand, client: VmandClient) -> list[Figure]:
    """The daemon's resident memory, before and after the HTTP server was loaded."""
    await client.list_partitions()
    before = resident_mb(vmand.pid)
    await metrics(vmand.runtime / "http.sock")
    after = resident_mb(vmand.pid)
    return [
        Figure("resident memory (RSS)", before[0], "MB", RSS_MB),
        Figure("resident memory (PSS)", before[1], "MB", note="shared pages divided among their users"),
        Figure("RSS after /metrics", after[0], "MB", note="the HTTP server is loaded when it is first asked"),
        Figure("PSS after /metrics", after[1], "MB"),
    ]


async def metrics(path: Path) -> str:
    """Ask for /metrics once.

    Raises:
        RuntimeError: the answer is not 200.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    if " 200 " not in answer.partition("\r\n")[0]:
        raise RuntimeError(f"/metrics: {answer:.200}")
    return answer


def command(vmand: PrivateVmand, one: int) -> Figure:
    """A command by hand: a new interpreter each time."""
    argv = [str(Path(sys.executable).parent / "vmanctl"), "status", str(one)]
    spent = cpu_of_command_ms(argv, environment={"VMAND_SOCKET": str(vmand.socket)})
    return Figure("vmanctl status, user+sys", spent, "ms CPU", COMMAND_CPU_MS, note="median of 10")


async def killed(vmand: PrivateVmand, client: VmandClient, ids: Sequence[int]) -> list[Figure]:
    """From kill(2) of a QEMU to the event that its partition FAILED."""
    noticed = []
    async with failures(vmand) as failed:
        for n in range(KILLS):
            one = ids[n % len(ids)]
            status = await client.status(one)
            if status.state is State.READY:
                await deploy(client, one)
                status = await client.status(one)
            if status.pid is None:
                raise RuntimeError(f"partition {one} has no process: {status}")
            begin = time.perf_counter_ns()
            os.kill(status.pid, signal.SIGKILL)  # it is DEPLOYED: the pid is its QEMU's
            async with asyncio.timeout(FAILED_S):
                while (await failed.get()).partition != one:
                    pass
            noticed.append((time.perf_counter_ns() - begin) / 1e9)
            await client.shutdown(one, force=True)
    return [
        Figure("killed QEMU is noticed, p50", percentile(noticed, 0.5), "s"),
        Figure("killed QEMU is noticed, worst", max(noticed), "s", NOTICED_S, note=f"of {KILLS}"),
    ]


@asynccontextmanager
async def failures(vmand: PrivateVmand) -> AsyncIterator[asyncio.Queue[Event]]:
    """Events of partitions that FAILED, as they come."""
    queue: asyncio.Queue[Event] = asyncio.Queue()
    async with await vmand.client() as client:

        async def listen() -> None:
            async for event in client.events():
                if event.state is State.FAILED:
                    queue.put_nowait(event)

        await client.subscribe()
        task = asyncio.create_task(listen())
        try:
            yield queue
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def show_imports(found: imports.Imports) -> None:
    """Packages by their memory; the small ones as one row a step."""
    print(f"\nImports of vmand: {found.interpreter_mb:.1f} MB before the first, {found.whole_mb:.1f} MB after all\n")
    rows = []
    for step in STEPS:
        mine = sorted((one for one in found.costs if one.step == step), key=lambda one: -one.mb)
        large = [one for one in mine if one.mb >= SMALLEST_MB]
        small = [one for one in mine if one.mb < SMALLEST_MB]
        rows += [[step, one.package, one.modules, number(one.mb), number(one.ms)] for one in large]
        sums = (sum(getattr(one, name) for one in small) for name in ("modules", "mb", "ms"))
        modules, mb, ms = sums
        rows.append([step, f"{len(small)} others", modules, number(mb), number(ms)])
    print(table(["STEP", "PACKAGE", "MODULES", "MB", "MS CPU"], rows), flush=True)
