"""What tests of deadlined share: a private daemon, its settings, and vmand's side of their conversation."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from edgehold.api.deadlined import DeadlinedClient, Policy, Rule, Target, TargetKind
from edgehold.errors import EdgeholdError, NotFoundError
from edgehold.testing.daemons import Daemon, private_directory
from edgehold.wire.control import Connection, ControlServer, bind_unix
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Roles

MS = 1_000_000
CYCLE_MS = 200


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


def settings(directory: Path) -> dict[str, object]:
    return {
        "socket": str(directory / "api.sock"),
        "state_dir": str(directory / "state"),
        "vmand_socket": str(directory / "vmand.sock"),
        "cycle_ms": CYCLE_MS,
    }


@pytest_asyncio.fixture
async def daemon(directory: Path) -> AsyncIterator[Daemon]:
    one = Daemon("deadlined", directory=directory, settings=settings(directory))
    await one.start()
    yield one
    if one.running:
        assert await one.stop() == 0
    assert "Traceback" not in one.log_text()


@pytest_asyncio.fixture
async def client(daemon: Daemon, directory: Path) -> AsyncIterator[DeadlinedClient]:
    assert daemon.running
    async with DeadlinedClient(directory / "api.sock") as one:
        yield one


def thread(tid: int) -> Target:
    return Target(kind=TargetKind.THREAD, id=tid)


def process(pid: int) -> Target:
    return Target(kind=TargetKind.PROCESS, id=pid)


def policy(budget_ms: float = 10, cap: float = 0.8, floor_ms: float = 1, rule: Rule = Rule.FAST) -> Policy:
    return Policy(initial_budget_ns=round(budget_ms * MS), cap=cap, min_budget_ns=round(floor_ms * MS), rule=rule)


async def until(
    look: Callable[[], Awaitable[bool]], *, timeout_s: float = 15.0, what: str, every_s: float = 0.02
) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not await look():  # noqa: ASYNC110 - the other side is another process
                await asyncio.sleep(every_s)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


class FakeVmand:
    """vmand's side of the conversation, as far as deadlined uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tids: list[int] = []
        self.mode = "shared"
        self.pid = 0
        self.state = ""
        self.hung: asyncio.Event | None = None
        self.refusal: EdgeholdError | None = None
        self._subscribed: list[Connection] = []
        self._server: ControlServer | None = None

    async def start(self) -> None:
        self._server = ControlServer(self._handle, roles=Roles())
        await self._server.listen(bind_unix(self.path))

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()
        self._subscribed.clear()
        self.path.unlink(missing_ok=True)

    def changed(self) -> None:
        for one in self._subscribed:
            one.send_event("partition", {"kind": "state", "partition": 1, "time_s": time.time(), "state": "DEPLOYED"})

    async def _handle(self, connection: Connection, request: Request) -> object:
        if request.command == "subscribe":
            self._subscribed.append(connection)
            return {"text": ""}
        number = request.args.get("id")
        if number not in {1, 2}:
            raise NotFoundError("no such partition")
        if number == 2:
            if self.hung is not None:
                await self.hung.wait()
            if self.refusal is not None:
                raise self.refusal
            if request.command == "vcpus":
                return []
        if request.command == "vcpus":
            return [{"index": n, "tid": tid} for n, tid in enumerate(self.tids)]
        state = self.state or ("DEPLOYED" if self.tids else "READY")
        return {
            "id": number, "name": "one", "uuid": "u", "state": state, "mode": self.mode, "cores": 2, "memory_bytes": 1,
            "pid": self.pid or None,
        }  # fmt: skip
