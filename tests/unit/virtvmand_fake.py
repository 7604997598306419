"""A scripted vmand behind a real control socket, and somebody who mirrors it, for tests of both.

What it is told to keep it tells of, and each command can be made to wait, to fail, or to be followed by something.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from edgehold.api.vmand import (
    Capabilities,
    CoresGrade,
    Event,
    MemoryGrade,
    Mode,
    Partition,
    State,
)
from edgehold.errors import EdgeholdError, NotFoundError
from edgehold.wire.control import Connection, ControlServer, bind_unix
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Roles
from virtvmand.domain import Domain
from virtvmand.errors import Code, LibvirtError
from virtvmand.events import Happening, Lifecycle, MetadataChange
from virtvmand.mirror import Mirror

PATIENCE_S = 30
HOST = Capabilities(
    accelerator="tcg",
    accelerator_reason="a fake",
    backend="fake",
    launcher="process",
    cores_grade=CoresGrade.PINNED,
    cores_reason="",
    memory_grade=MemoryGrade.PLAIN,
    memory_reason="",
    supports=("suspend",),
    archs=("x86_64",),
    cores_pool=(1, 2),
    cores_free=(1,),
    memory_total_bytes=1 << 30,
    memory_free_bytes=1 << 29,
)


def partition(number: int, state: State = State.READY, **rest: Any) -> Partition:
    fields: dict[str, Any] = {"name": f"p{number}", "uuid": str(UUID(int=number)), "mode": Mode.DEDICATED}
    fields |= {"cores": 1, "memory_bytes": 16 << 20}
    if state in {State.DEPLOYED, State.SUSPENDED}:
        fields |= {"pid": 1000 + number, "arch": "x86_64"}
    return Partition(id=number, state=state, **(fields | rest))


def text(number: int, *, kernel: str = "/k", name: str = "") -> str:
    return (
        f"<domain type='vman'><name>{name or f'p{number}'}</name><uuid>{UUID(int=number)}</uuid><memory>16384</memory>"
        f"<vcpu>1</vcpu><os><type>hvm</type><kernel>{kernel}</kernel></os></domain>"
    )


class Vmand:
    """What a vmand would keep, and a word for each way to be told of it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "s"
        self.partitions: dict[int, Partition] = {}
        self.notes: dict[int, dict[str, str]] = {}
        self.asked: Counter[str] = Counter()
        self.closed: dict[str, asyncio.Event] = {}
        """Commands that wait until somebody opens."""
        self.answers: dict[str, Any] = {}
        """By command: another answer, or an error."""
        self.then: dict[str, Callable[[], None]] = {}
        """By command: what happens right after its answer."""
        self.under_way = 0
        self.most = 0
        self._listeners: list[Connection] = []
        self._server: ControlServer | None = None

    async def start(self) -> None:
        self._server = ControlServer(self._handle, roles=Roles())
        await self._server.listen(bind_unix(self.path))

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()
            self._server = None
        self.path.unlink(missing_ok=True)

    def close(self, command: str) -> asyncio.Event:
        return self.closed.setdefault(command, asyncio.Event())

    def put(self, one: Partition, kind: str = "state", *, notes: dict[str, str] | None = None) -> None:
        """It becomes this, and whoever listens is told."""
        self.partitions[one.id] = one
        self.notes.setdefault(one.id, {})
        if notes is not None:
            self.notes[one.id] = notes
        self.send(Event(kind=kind, partition=one.id, time_s=1.0, now=one))

    def note(self, number: int, **notes: str) -> None:
        self.put(self.partitions[number], "annotated", notes={key.replace("_", "."): one for key, one in notes.items()})

    def remove(self, number: int) -> None:
        del self.partitions[number], self.notes[number]
        self.send(Event(kind="gone", partition=number, time_s=1.0))

    def send(self, data: Any) -> None:
        for one in self._listeners:
            one.send_event("partition", data)

    async def _handle(self, connection: Connection, request: Request) -> Any:
        command = request.command
        self.asked[command] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if command in self.closed:
                await self.closed[command].wait()
            answer = self._answer(connection, request)
            if (after := self.then.pop(command, None)) is not None:
                asyncio.get_running_loop().call_soon(after)  # this task sends the answer in its present step
            if isinstance(answer, EdgeholdError):
                raise answer
            return answer
        finally:
            self.under_way -= 1

    def _answer(self, connection: Connection, request: Request) -> Any:
        command, number = request.command, request.args.get("id")
        if command in self.answers:
            return self.answers[command]
        match command:
            case "subscribe":
                if connection not in self._listeners:
                    self._listeners.append(connection)
                    connection.on_close.append(lambda: self._listeners.remove(connection))
                return {"text": ""}
            case "list":
                return [self.partitions[one] for one in sorted(self.partitions)]
            case "capabilities":
                return HOST
            case "annotations":
                return dict(self.notes[number]) if number in self.notes else NotFoundError(f"no partition {number}")
            case "suspend":
                assert isinstance(number, int)
                self.put(partition(number, State.SUSPENDED))
                return {}
        raise AssertionError(command)


class Driver:
    """Who has a mirror, and what was heard."""

    def __init__(self, path: Path) -> None:
        self.heard: list[str] = []
        self.seen: list[tuple[Domain | None, Domain | None]] = []
        self.syncs = 0
        self.mirror = Mirror(path, tell=self._tell, changed=self._changed, synced=self._synced)

    def _tell(self, one: Happening) -> None:
        what = type(one).__name__.lower()
        if isinstance(one, Lifecycle):
            what = f"{one.event.name.lower()}:{one.detail}"
        elif isinstance(one, MetadataChange):
            what = f"metadata:{one.kind}"
        self.heard.append(f"{one.domain.name} {what}")

    def _changed(self, old: Domain | None, new: Domain | None) -> None:
        self.seen.append((old, new))

    def _synced(self) -> None:
        self.syncs += 1

    def names(self) -> list[str]:
        return [one.name for one in self.mirror.all()]

    def states(self) -> list[int]:
        return [one.state[0] for one in self.mirror.all()]

    async def until_away(self) -> str:
        """Until vmand is known to be away; why."""
        await until(lambda: not self.mirror._ready.is_set())
        with pytest.raises(LibvirtError) as caught:
            self.mirror.all()
        assert caught.value.code is Code.SYSTEM_ERROR
        return str(caught.value)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on the other side of a socket
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def followed(path: Path, *, ready: bool = True) -> AsyncIterator[Driver]:
    driver = Driver(path)
    running = asyncio.create_task(driver.mirror.run())
    try:
        if ready:
            await driver.mirror.ready(PATIENCE_S)
        yield driver
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
