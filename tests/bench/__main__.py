"""``make bench``: what things cost, each beside a named peer in the same run; a table, and build/bench/results.json.

CPU seconds, not wall time; the ratio is the result, the absolute figure depends on the machine. vmand's own figures
follow, each beside its bar (see `tests.bench.partitions`); they need root.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from edgehold.cli import table
from edgehold.kernel.sampler import Sampler
from edgehold.wire.control import Connection, ControlClient, ControlServer, bind_unix
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Roles
from tests.bench import partitions
from tests.bench.figures import as_installed, write

ROUNDS = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; ``ratio`` is ours over the peer's."""

    what: str
    ours: float
    unit: str
    peer: str
    theirs: float
    ratio: float


def row(what: str, ours: float, unit: str, peer: str, theirs: float) -> Row:
    return Row(what, round(ours, 3), unit, peer, round(theirs, 3), round(ours / theirs, 3))


def cpu_of(statement: str) -> float:
    """Milliseconds of CPU of a fresh interpreter with this statement: the median of nine."""
    code = f"{statement}\nimport resource as r; u = r.getrusage(r.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(9)
    ]
    return statistics.median(runs) * 1000


async def per_call(call: Callable[[], Awaitable[object]]) -> float:
    """Microseconds of CPU a call, both ends in this process."""
    for _ in range(100):
        await call()
    begin = time.process_time_ns()
    for _ in range(ROUNDS):
        await call()
    return (time.process_time_ns() - begin) / ROUNDS / 1000


async def control() -> Row:
    """A request through the control socket, against a bare echo of lines by asyncio's own streams."""

    async def handle(_connection: Connection, _request: Request) -> object:
        return {"state": "READY"}

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        server = ControlServer(handle, roles=Roles())
        await server.listen(bind_unix(path / "ours"))
        client = await ControlClient.connect(path / "ours")
        ours = await per_call(lambda: client.call("status", {"id": 1}))
        await client.close()
        await server.close()
        async with await asyncio.start_unix_server(echo, path / "peer"):
            reader, writer = await asyncio.open_unix_connection(path / "peer")

            async def ask() -> None:
                writer.write(b'{"command":"status","args":{"id":1},"id":1}\n')
                await writer.drain()
                await reader.readline()

            theirs = await per_call(ask)
            writer.close()
            await writer.wait_closed()
    return row("control socket, one request", ours, "us CPU", "asyncio line echo", theirs)


def sampling(threads: int = 500) -> Row:
    """Reading schedstat of many threads, against os.pread through kept descriptors."""
    stop = threading.Event()
    crowd = [threading.Thread(target=stop.wait, daemon=True) for _ in range(threads)]
    for one in crowd:
        one.start()
    tids = [one.native_id or 0 for one in crowd]
    fds = [os.open(f"/proc/self/task/{tid}/schedstat", os.O_RDONLY) for tid in tids]
    with Sampler() as sampler:
        for tid in tids:
            sampler.add(tid)

        def pread() -> dict[int, tuple[int, ...]]:
            return {tid: tuple(map(int, os.pread(fd, 128, 0).split())) for tid, fd in zip(tids, fds, strict=True)}

        costs: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(50):
            for name, work in (("ours", sampler.sample), ("theirs", pread)):
                begin = time.thread_time_ns()
                work()
                costs[name].append((time.thread_time_ns() - begin) / threads / 1000)
    for fd in fds:
        os.close(fd)
    stop.set()
    for one in crowd:
        one.join()
    what = f"sampling a thread ({threads} threads)"
    return row(what, statistics.median(costs["ours"]), "us CPU", "os.pread, kept", statistics.median(costs["theirs"]))


async def main() -> None:
    """Measure, print, write."""
    as_installed()
    bare = cpu_of("pass")
    imports = ("edgehold", "edgehold.api.vmand", "edgehold.api.deadlined", "vmand.cli", "deadlined.cli")
    rows = [row(f"import {one}", cpu_of(f"import {one}"), "ms CPU", "python -c pass", bare) for one in imports]
    rows += [await control(), sampling()]
    print(table(["WHAT", "OURS", "UNIT", "PEER", "THEIRS", "RATIO"], [tuple(asdict(one).values()) for one in rows]))
    write("results", [asdict(one) for one in rows])
    if os.geteuid() == 0:
        await partitions.measure()
    else:
        print("\nvmand's own figures are left out: its guests need root")


if __name__ == "__main__":
    asyncio.run(main())
