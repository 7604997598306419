"""The whole driver above a real vmand service on a back end in memory, for tests: calls go through the table's layouts.

What a client would send is encoded, decoded and handled, and what it would get is encoded and decoded again.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from edgehold.api.vmand import Nic, State
from edgehold.clock import SystemClock
from edgehold.errors import EdgeholdError
from edgehold.wire.control import ControlServer, bind_unix
from edgehold.wire.peer import Peer, Roles
from tests.unit.test_vmand_kernelimage import bzimage
from tests.unit.vmand_fake import TOPOLOGY, FakeBackend, World
from virtvmand.call import Streamed, Subscription
from virtvmand.config import Config
from virtvmand.domain import Domain
from virtvmand.driver.assembly import Driver
from virtvmand.driver.context import Context
from virtvmand.errors import LibvirtError, from_edgehold
from virtvmand.keeper import Keeper
from virtvmand.mirror import Mirror
from virtvmand.table import NUMBERS, PROCEDURES
from vmand.api import Api
from vmand.backend import Running
from vmand.config import Config as VmandConfig
from vmand.model import Images, Record
from vmand.service import Service
from vmand.store import Store

UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"


class Backend(FakeBackend):
    """Remembers with what each guest was started."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.started: list[tuple[Record, str, tuple[str, ...]]] = []
        self.nics: tuple[Nic, ...] = ()
        """What guests are said to have; there are no bridges here."""

    async def start(self, record: Record, images: Images, *, paused: bool = False) -> Running:
        from tests.unit.vmand_fake import IMAGES

        disks = tuple(disk.file.name for disk in images.disks)
        self.started.append((record, images.cmdline, disks))
        running = await super().start(record, IMAGES, paused=paused)
        return dataclasses.replace(running, disks=disks, nics=self.nics)


class FakeClient:
    """Somebody who is connected."""

    def __init__(self) -> None:
        self.peer = Peer(os.getpid(), 0, 0, frozenset({0}))
        self.read_only = False
        self.callbacks: dict[int, Subscription] = {}
        self.opened = False
        self.kept_alive = False
        self.told: list[tuple[str, tuple[Any, ...]]] = []

    def open(self, *, read_only: bool) -> None:
        self.opened = True
        self.read_only = read_only

    def keep_alive(self) -> None:
        self.kept_alive = True

    def send_event(self, procedure: int, payload: bytes) -> None:
        one = PROCEDURES[procedure]
        self.told.append((one.name.removeprefix("domain_event_callback_"), one.returns.decode(payload)))


class House:
    """vmand, virtvmand and one client in one process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kernel = directory / "vmlinuz"
        self.kernel.write_bytes(bzimage() + bytes(4096))
        self.backend = Backend(World())
        self.backend.world.free = 8 << 30
        self.client = FakeClient()
        self.clients = [self.client]

    async def begin_vmand(self) -> None:
        self.store = Store(self.directory / "vmand.db")
        self.service = Service(
            backend=self.backend,
            store=self.store,
            clock=SystemClock(),
            pool={1, 2, 3},
            topology=TOPOLOGY,
            max_partitions=8,
            shutdown_timeout_s=0.05,
            patience_s=1.0,
        )
        api = Api(self.service, config=VmandConfig(runtime_dir=str(self.directory / "run")), host_cores=4)
        self.server = ControlServer(api.handle, roles=Roles())
        await self.server.listen(bind_unix(self.directory / "v.sock"))

    async def end_vmand(self) -> None:
        await self.server.close()
        await self.service.close()
        self.store.close()

    async def begin(self, *, timeout_s: float = 5.0) -> None:
        config = Config(runtime_dir=str(self.directory), shutdown_timeout_s=timeout_s, reboot_timeout_s=1.0)
        self.mirror = Mirror(
            self.directory / "v.sock",
            tell=lambda happening: self.driver.tell.happened(happening),  # noqa: PLW0108
            changed=lambda old, new: self.keeper.changed(old, new),  # noqa: PLW0108
            synced=lambda: self.keeper.synced(),  # noqa: PLW0108
        )
        self.faults = 0
        self.context = Context(mirror=self.mirror, config=config, on_fault=self._fault)
        self.driver = Driver(self.context, clients=lambda: self.clients)
        self.keeper = Keeper(self.context, self.driver.run, marker=self.directory / "autostarted")
        self.following = asyncio.create_task(self.mirror.run())
        await self.mirror.ready(10)

    async def end(self) -> None:
        """As `kill -9` does: nothing is brought to its end."""
        await self.context.close()
        self.following.cancel()
        await asyncio.gather(self.following, return_exceptions=True)

    async def again(self) -> None:
        """Another virtvmand on the same vmand."""
        await self.end()
        await self.begin()

    async def call(self, name: str, *arguments: Any) -> Any:
        """The answer's values; the only one where there is one, None where there is none."""
        procedure = PROCEDURES[NUMBERS[name]]
        decoded = procedure.arguments.decode(procedure.arguments.encode(arguments))
        try:
            values = self.driver.handlers[procedure.number](self.client, *decoded)
            if inspect.isawaitable(values):
                values = await values
        except EdgeholdError as error:
            raise from_edgehold(error) from error
        if isinstance(values, Streamed):
            return values.sock
        payload = values if isinstance(values, bytes) else procedure.returns.encode(values or ())
        answer = procedure.returns.decode(payload)
        return answer[0] if len(answer) == 1 else answer or None

    async def refused(self, name: str, *arguments: Any) -> tuple[int, str]:
        """Code and text of the refusal."""
        try:
            await self.call(name, *arguments)
        except LibvirtError as error:
            return int(error.code), str(error)
        raise AssertionError(f"{name} was not refused")

    def xml(self, name: str = "web", *, uuid: str = UUID, memory_mib: int = 64, cpus: int = 1, rest: str = "") -> str:
        """A definition that can be started."""
        return (
            f"<domain type='vman'>\n  <!-- ours -->\n  <name>{name}</name>\n  <uuid>{uuid}</uuid>\n"
            "  <metadata><edgehold:partition xmlns:edgehold='urn:edgehold:partition:1' mode='shared'/></metadata>\n"
            f"  <memory unit='MiB'>{memory_mib}</memory>\n  <vcpu>{cpus}</vcpu>\n"
            f"  <os><type arch='x86_64'>hvm</type><kernel>{self.kernel}</kernel><cmdline>quiet</cmdline></os>\n"
            f"  <devices><console type='pty'/>{rest}</devices>\n</domain>"
        )

    async def define(self, name: str = "web", **options: Any) -> Any:
        return await self.call("domain_define_xml", self.xml(name, **options))

    def domain(self, name: str = "web") -> Domain:
        return self.mirror.by_name(name)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - no event tells of all that is waited for
                await asyncio.sleep(0.001)

    def told(self) -> list[tuple[str, int, int]]:
        """Life-cycle events so far, (name, event, detail), and forget them."""
        told = [(values[1].name, *values[2:]) for name, values in self.client.told if name == "lifecycle"]
        self.client.told.clear()
        return told

    async def fail(self, name: str = "web") -> None:
        """The guest's process dies."""
        one = self.domain(name).partition.id
        record = self.service.record(one)
        del self.backend.world.guests[record.run]
        self.backend.changed(one, record.run)
        await self.until(lambda: self.domain(name).partition.state is State.FAILED)

    def _fault(self) -> None:
        self.faults += 1


@contextlib.asynccontextmanager
async def house(directory: Path) -> AsyncIterator[House]:
    """A house in which everything runs; nothing is left of it."""
    one = House(directory)
    await one.begin_vmand()
    try:
        await one.begin()
        try:
            yield one
        finally:
            await one.end()
            assert one.faults == 0
    finally:
        await one.end_vmand()


def read(sock: socket.socket) -> bytes:
    """All that a console says until its end."""
    with sock:
        sock.settimeout(10)
        said = b""
        while piece := sock.recv(4096):
            said += piece
        return said
