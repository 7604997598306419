"""A back end in memory and a service above it, for tests of what stands above a back end.

The fake keeps what a world would keep: memory that is reserved, guests that run. It outlives a service, as the world
outlives a daemon.
"""

import asyncio
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec

from edgehold.api.vmand import Check, CoresGrade, Event, MemoryGrade, Mode, State, Usage, Vcpu
from edgehold.clock import SystemClock
from vmand import model
from vmand.backend import Backend, Changed, Ended, Finding, Grades, Host, Output, Running, Trait
from vmand.change import Change, change_partition
from vmand.model import MIB, TABLE, Found, Images, OpenFile, Record
from vmand.placement import Topology
from vmand.recovery import recover
from vmand.service import Service
from vmand.store import Store

IMAGES = Images(kernel=OpenFile(fd=-1, name="/k"))
PINNED = Grades(
    cores=CoresGrade.PINNED, cores_reason="no cpuset here", memory=MemoryGrade.PLAIN, memory_reason="swap is on"
)
TOPOLOGY = Topology(siblings={one: frozenset({one}) for one in range(4)}, node={})
COMMANDS = sorted(TABLE.table)


class World:
    """What a daemon's end does not touch."""

    def __init__(self) -> None:
        self.memory: dict[str, int] = {}
        self.guests: dict[str, Found] = {}  # by run
        self.free = 1024 * MIB


class FakeBackend:
    """Acts on a `World`; ``fail`` names methods that raise."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.fail: dict[str, Exception] = {}
        self.traits = frozenset(Trait) - {Trait.SECURE, Trait.SCRUB}
        self.grades = PINNED
        self.repairs = 0
        self.scrubbed: list[str] = []
        self.presses = 0
        self.obeys_after = 1
        self.cut: str = ""
        self.usages: dict[int, Usage] = {}

    def begin(self, *, changed: Changed, output: Output, ended: Ended) -> None:
        self.changed, self.output, self.ended = changed, output, ended

    def _try(self, method: str) -> None:
        if method in self.fail:
            raise self.fail[method]

    async def host(self) -> Host:
        return Host(
            backend="fake",
            accelerator="tcg",
            accelerator_reason="a fake",
            launcher="process",
            best=self.grades,
            archs=("x86_64",),
        )

    async def hypervisor(self) -> str:
        return "fake 1.2"

    async def doctor(self) -> list[Check]:
        return [Check(subject="cores", level="limited", found="pinned")]

    async def grade(self, record: Record, *, repair: bool = False) -> Grades:
        self._try("grade")
        self.repairs += repair
        live = record.run in self.world.guests
        return self.grades if live else Grades(memory=self.grades.memory, memory_reason=self.grades.memory_reason)

    async def scrub(self, record: Record) -> None:
        self._try("scrub")
        assert record.uuid in self.world.memory
        self.scrubbed.append(record.uuid)

    def attach(self, record: Record) -> socket.socket:
        here, there = socket.socketpair()
        here.sendall(f"console of {record.id}".encode())
        here.close()
        return there

    def memory_free(self) -> int:
        return self.world.free

    async def reserve(self, record: Record) -> Grades:
        self._try("reserve")
        self.world.memory[record.uuid] = record.memory_bytes
        self.world.free -= record.memory_bytes
        return Grades(memory=self.grades.memory, memory_reason=self.grades.memory_reason)

    async def holds(self, record: Record) -> bool:
        self._try("holds")
        return self.world.memory.get(record.uuid) == record.memory_bytes

    def keeps(self, before: Record, after: Record) -> bool:
        return before.memory_bytes == after.memory_bytes

    async def release(self, record: Record) -> None:
        self.world.free += self.world.memory.pop(record.uuid, 0)

    async def start(self, record: Record, images: Images, *, paused: bool = False) -> Running:
        assert images == IMAGES
        self.world.guests[record.run] = Found.PAUSED
        self._try("start")
        if not paused:
            self.world.guests[record.run] = Found.RUNNING
        return Running(pid=4242, start_ticks=1, uid=77, accelerator="tcg", arch="x86_64")

    async def adopt(self, record: Record) -> Finding:
        self._try("adopt")
        return await self.look(record)

    async def look(self, record: Record) -> Finding:
        self._try("look")
        return Finding(found=self.world.guests.get(record.run, Found.GONE), reason="")

    async def suspend(self, record: Record) -> None:
        self._try("suspend")
        self.world.guests[record.run] = Found.PAUSED

    async def restore(self, record: Record) -> None:
        self._try("restore")
        self.world.guests[record.run] = Found.RUNNING

    async def reboot(self, record: Record) -> None:
        self._try("reboot")
        assert record.run in self.world.guests
        self.world.guests[record.run] = Found.RUNNING
        self.presses = 0

    async def press_power(self, record: Record) -> None:
        self.presses += 1
        self._try("press_power")
        if self.presses >= self.obeys_after:
            self.world.guests[record.run] = Found.OFF

    async def wait_off(self, record: Record, timeout_s: float) -> bool:
        assert timeout_s > 0
        await asyncio.sleep(0.001)
        return self.world.guests.get(record.run) in {Found.OFF, None}

    async def end(self, record: Record) -> None:
        self._try("end")
        self.world.guests.pop(record.run, None)

    async def vcpus(self, record: Record) -> list[Vcpu]:
        return [Vcpu(index=n, tid=100 + n) for n in range(record.cores)]

    async def usage(self, record: Record) -> Usage:
        self._try("usage")
        return self.usages.get(record.id, Usage())

    def console(self, record: Record) -> str:
        return f"console of {record.id}"

    async def sweep(self, records: Collection[Record]) -> None:
        for uuid in set(self.world.memory) - {one.uuid for one in records}:
            del self.world.memory[uuid]
        for run in set(self.world.guests) - {one.run for one in records if one.run}:
            del self.world.guests[run]

    async def close(self) -> None:
        pass


class Listener:
    """Collects events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def send_event(self, name: str, data: object) -> None:
        assert name == "partition"
        assert isinstance(data, msgspec.Raw)
        self.events.append(msgspec.json.decode(data, type=Event))


class Daemon:
    """A service, its journal and its world; `again` is a restart."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "vmand.db"
        self.world = World()
        self.faults = 0

    async def start(self) -> None:
        self.backend = FakeBackend(self.world)
        self.store = Store(self.path)
        checked: Backend = self.backend
        self.service = Service(
            backend=checked,
            store=self.store,
            clock=SystemClock(),
            pool={1, 2, 3},
            topology=TOPOLOGY,
            max_partitions=3,
            shutdown_timeout_s=0.05,
            patience_s=0.05,
            on_fault=self._fault,
        )
        await recover(self.service)

    async def stop(self) -> None:
        await self.service.close()
        self.store.close()

    async def hurry(self) -> None:
        """End what `make` made BUSY."""
        for one in self.service.partitions():
            if one.state is State.BUSY:
                await self.service.shutdown(one.id, force=True)

    async def again(self) -> None:
        await self.stop()
        await self.start()

    async def make(self, state: State, **options: Any) -> int:
        """A partition in a state, by commands alone."""
        given = {"cores": 1, "memory_bytes": 64 * MIB, "mode": Mode.SHARED, **options}
        one = (await self.service.create(**given)).id
        if state is State.READY:
            return one
        await self.service.deploy(one, IMAGES)
        if state is State.SUSPENDED:
            await self.service.suspend(one)
        elif state is State.BUSY:  # a shutdown waits for the guest
            self.backend.obeys_after = 10**9
            self.service.spawn(self.service.shutdown(one, timeout_s=60), "a shutdown that takes long")
        elif state is State.FAILED:
            del self.world.guests[self.service.record(one).run]
            self.backend.changed(one, self.service.record(one).run)
        await self.until(lambda: self.service.status(one).state is state)
        return one

    async def run(self, command: str, one: int) -> Any:
        service = self.service
        return await {
            model.DEPLOY: lambda: service.deploy(one, IMAGES),
            model.SUSPEND: lambda: service.suspend(one),
            model.RESTORE: lambda: service.restore(one),
            model.REBOOT: lambda: service.reboot(one),
            model.SHUTDOWN: lambda: service.shutdown(one),
            model.DESTROY: lambda: service.destroy(one),
            model.CHANGE: lambda: change_partition(service, one, Change(memory_bytes=128 * MIB)),
        }[command]()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - the fake has no event to wait for
                await asyncio.sleep(0)

    def rows(self) -> list[Record]:
        return self.store.all()

    def _fault(self) -> None:
        self.faults += 1
