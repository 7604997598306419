"""Random and mutated requests at deadlined's socket: no crash, no hang, memory flat, and it still answers.

The daemon runs in a PID namespace of its own: a random number that names a thread then names one of the three sleepers
in there, and never a stranger's on this host.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from edgehold.api.deadlined import DeadlinedClient
from edgehold.testing.capability import missing
from edgehold.testing.daemons import private_directory, toml
from edgehold.testing.load import eventually

REQUESTS = int(os.environ.get("EDGEHOLD_FUZZ", "100000"))
SEED = int(os.environ.get("EDGEHOLD_FUZZ_SEED", "1"))
CONNECTIONS = 6
PIPELINED = 25
MAX_GROWTH_KIB = 8 * 1024

# The daemon is the namespace's init, the sleepers get the ids 2 to 4.
_START = 'sleep 100000 & sleep 100000 & sleep 100000 & exec "$0" -m deadlined --config "$1"'
_GOOD = {"target": {"kind": "thread", "id": 2}, "policy": {"period_ns": 100_000_000, "initial_budget_ns": 2_000_000}}


# A PID namespace of its own, and /proc as seen from in there. In a chroot the root is no mount point whose propagation
# could be changed; that of /proc is.
_UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--propagation", "unchanged", "--mount-proc")


def namespace_refusal() -> str:
    done = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@pytest.fixture
def directory(deadline: None) -> Iterator[Path]:  # noqa: ARG001 - what it needs, not what it takes
    if why := namespace_refusal():
        missing(f"no PID namespace here: {why}")
    with private_directory() as path:
        yield path


class Fuzzed:
    """The daemon in its namespace."""

    def __init__(self, directory: Path) -> None:
        config = directory / "deadlined.toml"
        self.socket = directory / "api.sock"
        config.write_text(
            toml(
                {
                    "socket": str(self.socket),
                    "state_dir": str(directory / "state"),
                    "vmand_socket": str(directory / "vmand.sock"),
                    "cycle_ms": 100,
                    "history": 50,
                }
            )
        )
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_UNSHARE, "sh", "-c", _START, sys.executable,
                 str(config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        eventually(self.socket.exists, timeout_s=20, what="the daemon listens")

    @property
    def pid(self) -> int:
        """The daemon's id on the host: the only child of our unshare."""
        own = self._process.pid
        return int(Path(f"/proc/{own}/task/{own}/children").read_text().split()[0])

    def rss_kib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        with contextlib.suppress(IndexError, ProcessLookupError):
            os.kill(self.pid, 15)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()  # and its child with it: --kill-child
            self._process.wait()
            raise


@pytest_asyncio.fixture
async def daemon(directory: Path) -> AsyncIterator[Fuzzed]:
    one = Fuzzed(directory)
    yield one
    await asyncio.to_thread(one.end)


def random_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([0, 1, 2, 3, 4, -1, 2**31 - 1, 2**63, -(2**70), 1.5, 1e308, 1024, 100_000])
    if kind == 1:
        return rng.choice(["", "thread", "process", "partition", "\x00", "é" * 40, "A" * rng.randrange(300)])
    if kind == 2:
        return rng.choice([None, True, False])
    if kind < 6:
        return rng.randrange(-5, 10**9)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["target", "policy", "kind", "id", "x"]): random_value(rng, depth + 1) for _ in range(3)}


def random_body(rng: random.Random) -> bytes:
    choice = rng.randrange(10)
    if choice == 0:
        return rng.randbytes(rng.randrange(200))
    if choice == 1:
        return b"[" * rng.randrange(2000)
    if choice == 2:
        return json.dumps(random_value(rng)).encode()
    body = json.loads(json.dumps(_GOOD))
    body["target"]["id"] = rng.choice([2, 3, 4, 5, 99, rng.randrange(1, 2**31)])
    for _ in range(rng.randrange(3)):
        where = rng.choice([body, body["target"], body["policy"]]) if isinstance(body["policy"], dict) else body
        if isinstance(where, dict):
            name = rng.choice(["id", "kind", "period_ns", "initial_budget_ns", "cap", "window", "overallocation", "x"])
            where[name] = random_value(rng)
    data = json.dumps(body).encode()
    if choice == 3:
        data = mutate(rng, data)
    return data


def mutate(rng: random.Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(4):
            case 0:
                raw[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 1:
                del raw[at : at + rng.randrange(1, 9)]
            case 2 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case _:
                raw[at:at] = raw[at : at + rng.randrange(30)]
    return bytes(raw)


def random_request(rng: random.Random, known: list[int]) -> bytes:
    """A request that is HTTP, whatever it asks for; ``known``: attachments that were seen in answers."""
    one = rng.choice([*known, rng.randrange(3000)])
    choice = rng.randrange(100)
    body = b""
    if choice < 55:
        method, path, body = "POST", "/v1/attachments", random_body(rng)
    elif choice < 70:
        method, path = "DELETE", f"/v1/attachments/{rng.choice([one, one, one, -1, 10**30, 'x', '%00'])}"
    elif choice < 85:
        method, path = "GET", f"/v1/attachments{rng.choice(['', '/', '/1', '/x', f'/{one}', '/1/2'])}"
    elif choice < 92:
        method, path = rng.choice(["GET", "PUT", "PATCH", "HEAD", "OPTIONS"]), f"/{rng.randbytes(4).hex()}"
        body = rng.randbytes(rng.randrange(30))
    elif choice < 99:
        method, path = "GET", rng.choice(["/healthz", "/metrics", "/v1", "/v1/attachments?x=1"])
    else:  # starts a process each time: one in a thousand
        method, path = "GET", "/v1/capacity" if rng.randrange(10) == 0 else "/healthz"
    head = f"{method} {path} HTTP/1.1\r\nHost: d\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def exchange(path: Path, batch: list[bytes], known: list[int], *, whole: bool) -> int:
    """Send a batch at once and read what comes back. Returns how many answers there were, notes attachments' ids."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    answers = 0
    try:
        writer.write(b"".join(batch))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        tail = b""
        while True:
            # Whole requests are all answered, and the last one closes the connection. A mutated one may rightly make
            # the daemon wait for more of it.
            async with asyncio.timeout(30 if whole else 0.03):
                data = await reader.read(65536)
            if not data:
                break
            if found := re.findall(rb'\{"id":(\d+),"target"', data):
                known[:] = [int(number) for number in found[-5:]]
            answers += (tail + data).count(b"HTTP/1.1 ")
            tail = data[-8:] if not data.endswith(b"HTTP/1.1 ") else b""
    except ConnectionError:
        pass
    except TimeoutError:
        assert not whole, "the daemon hangs"
    finally:
        writer.transport.abort()
    return answers


async def fuzz(daemon: Fuzzed, count: int, rng: random.Random) -> int:
    """That many requests, a fifth of the batches mutated below HTTP. Returns how many answers came."""
    batches = -(-count // PIPELINED)
    answers = 0
    known: list[int] = []
    todo = iter(range(batches))

    async def worker() -> None:
        nonlocal answers
        for _ in todo:
            batch = [random_request(rng, known) for _ in range(PIPELINED)]
            whole = rng.randrange(5) != 0
            if whole:
                batch[-1] = b"GET /healthz HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
            else:
                batch = [mutate(rng, one) if rng.randrange(3) == 0 else one for one in batch]
            got = await exchange(daemon.socket, batch, known, whole=whole)
            if whole:
                assert got == PIPELINED, f"{got} answers to {PIPELINED} requests"
            answers += got
            assert daemon.running, daemon.log.read_text()[-3000:]

    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
    return answers


@pytest.mark.slow
async def test_random_requests_at_the_api(daemon: Fuzzed) -> None:
    rng = random.Random(SEED)  # noqa: S311 - reproducible on purpose
    warm_up = REQUESTS // 4
    await fuzz(daemon, warm_up, rng)
    before = daemon.rss_kib()
    answers = await fuzz(daemon, REQUESTS - warm_up, rng)
    after = daemon.rss_kib()
    assert answers > (REQUESTS - warm_up) * 0.7  # every whole batch was answered in full; of the mutated ones, some
    assert after - before < MAX_GROWTH_KIB, f"{before} KiB before, {after} KiB after"
    async with DeadlinedClient(daemon.socket) as client:
        for one in await client.list_attachments():
            await client.detach(one.id)
        assert (await client.capacity()).held == 0
        assert msgspec.to_builtins(await client.list_attachments()) == []
    text = daemon.log.read_text()
    assert "Traceback" not in text, text[text.index("Traceback") :][:3000]
    attached = text.count(": attached ")
    print(f"{REQUESTS} requests, {attached} of them attached, RSS {before} -> {after} KiB")  # noqa: T201 - a figure to report
