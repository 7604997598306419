"""What partitions can be told to do: each command is legal in its state, written down before it happens, and answered
when it is done.

A command that was refused changes nothing. One that is cut off by vmand's end is settled by recovery.py at the next
start. What guests do by themselves is watch.py's.
"""

import asyncio
import itertools
import logging
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from edgehold.api.vmand import Capabilities, CoresGrade, MemoryGrade, Mode, Partition, State, Usage, Vcpu
from edgehold.clock import Clock
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    EdgeholdError,
    FailedError,
    NoCapacityError,
    TimedOutError,
    UnsupportedError,
)
from vmand import model
from vmand.backend import Backend, Trait
from vmand.book import Book
from vmand.capacity import Capacity
from vmand.events import Hub
from vmand.model import LIVE, TABLE, Found, Images, Record
from vmand.placement import Topology
from vmand.poweroff import HURRIED, PowerOff
from vmand.store import NO_ANNOTATIONS, Store
from vmand.tasks import Tasks
from vmand.watch import Watch, with_grades

T = TypeVar("T")
log = logging.getLogger(__name__)

_LACKS = {
    Trait.SECURE: "it has no secure world to put a partition into; create it with secure false",
    Trait.SHARED: "it gives partitions cores of their own only; create it with mode dedicated",
    Trait.SUSPEND: "it can't stop a guest's CPUs and let them go on",
    Trait.SHUTDOWN: "it can't ask a guest to power off; power it off from inside, or use force",
    Trait.VIRTIO: "it gives guests no virtio devices; leave out disks, nics, vsock and agent",
    Trait.CONSOLE: "it has no console of a guest; use a serial line of the board",
    Trait.DEVICE_TREE: "its guests take no device tree; leave it out",
    Trait.PAUSED: "its guests begin as soon as they are loaded; deploy without paused",
}


class Service:
    """The partitions of this host."""

    def __init__(
        self,
        *,
        backend: Backend,
        store: Store,
        clock: Clock,
        pool: Collection[int],
        topology: Topology,
        max_partitions: int,
        memory_limit: int = 0,
        shutdown_timeout_s: float = 30.0,
        patience_s: float = 5.0,
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        self.backend = backend
        self.store = store
        self.hub = Hub(clock)
        self.book = Book(store=store, hub=self.hub, patience_s=patience_s)
        self.tasks = Tasks(on_fault)
        self.watch = Watch(backend=backend, book=self.book, tasks=self.tasks, clock=clock)
        self.capacity = Capacity(
            backend=backend, records=lambda: self.book.records, pool=pool, topology=topology, memory_limit=memory_limit
        )
        self._power_off = PowerOff(backend, clock)
        self._max_partitions = max_partitions
        self._shutdown_timeout_s = shutdown_timeout_s
        backend.begin(changed=self.watch.changed, output=self.hub.console, ended=self.tasks.done)

    # What is there

    @property
    def records(self) -> list[Record]:
        """All partitions, by id."""
        return self.book.records

    @property
    def guest_ends(self) -> Counter[str]:
        """How guests ended by themselves."""
        return self.watch.ends

    def partitions(self) -> list[Partition]:
        """All partitions, by id."""
        return [one.public() for one in self.book.records]

    def status(self, partition: int) -> Partition:
        """One partition."""
        return self.record(partition).public()

    def record(self, which: int | str) -> Record:
        """One partition as the journal keeps it, by id or name.

        Raises:
            NotFoundError: there is none.
        """
        return self.book.record(which)

    def check(self, partition: int, command: str) -> None:
        """Refuse early what the state does not allow, before arguments are looked at more closely.

        Raises:
            BadStateError: names the state.
        """
        record = self.record(partition)
        if not record.pending:  # what is under way may lead to a state that allows it
            TABLE.check(command, record.state, who=str(partition))

    def require(self, trait: Trait, what: str) -> None:
        """Refuse what this kind of back end can't do.

        Raises:
            UnsupportedError: says why.
        """
        if trait not in self.backend.traits:
            raise UnsupportedError(f"{what}: not supported on this back end: {_LACKS[trait]}")

    async def vcpus(self, partition: int) -> list[Vcpu]:
        """The threads of the guest's CPUs; none where no guest is deployed."""
        record = self.record(partition)
        return await self.backend.vcpus(record) if record.state in LIVE else []

    async def usage(self, partition: int) -> Usage:
        """What the guest's devices carry; empty where no guest is deployed."""
        self.require(Trait.VIRTIO, "usage")
        record = self.record(partition)
        return await self.backend.usage(record) if record.state in LIVE else Usage()

    def console(self, partition: int) -> str:
        """The last console output."""
        self.require(Trait.CONSOLE, "console")
        return self.backend.console(self.record(partition))

    def attach(self, partition: int) -> socket.socket:
        """The guest's console as a stream; see `Backend.attach`.

        Raises:
            BadStateError: no guest is deployed.
        """
        self.require(Trait.CONSOLE, "console")
        record = self.record(partition)
        if record.state not in LIVE:
            raise BadStateError(f"partition {partition} is {record.state.value}; no guest is there to talk to")
        return self.backend.attach(record)

    async def capabilities(self) -> Capabilities:
        """What this host can give."""
        host = await self.backend.host()
        free = self.capacity.memory_free()
        return Capabilities(
            accelerator=host.accelerator,
            accelerator_reason=host.accelerator_reason,
            backend=host.backend,
            hypervisor=await self.backend.hypervisor(),
            launcher=host.launcher,
            cores_grade=host.best.cores or CoresGrade.SHARED,
            cores_reason=host.best.cores_reason,
            memory_grade=host.best.memory or MemoryGrade.PLAIN,
            memory_reason=host.best.memory_reason,
            supports=tuple(sorted(one.value for one in self.backend.traits if one is not Trait.SCRUB)),
            archs=host.archs,
            cores_pool=self.capacity.pool,
            cores_free=self.capacity.cores_free(),
            memory_total_bytes=self.capacity.reserved_bytes() + free,
            memory_free_bytes=free,
        )

    # Commands

    async def create(
        self,
        *,
        cores: int,
        memory_bytes: int,
        mode: Mode,
        name: str = "",
        secure: bool = False,
        strict: bool = False,
        own_uuid: str = "",
        annotations: Mapping[str, str | None] = NO_ANNOTATIONS,
    ) -> Record:
        """Reserve cores and memory. The partition is READY when this returns."""
        model.annotated({}, annotations)
        if secure:
            self.require(Trait.SECURE, "secure")
        if mode is Mode.SHARED:
            self.require(Trait.SHARED, "mode shared")
        if strict:
            await self.capacity.check_strict(mode)
        async with self.capacity.taking:
            records = self.book.records
            if len(records) >= self._max_partitions:
                raise NoCapacityError(f"{self._max_partitions} partitions exist, which is the limit; destroy one first")
            names, claims = {one.name for one in records}, self.book.claims()
            taken = {one.slot for one in claims}
            if name:
                model.check_name(name, names)
            if own_uuid:
                model.check_uuid(own_uuid, {one.uuid for one in claims})
            cpus, node = self.capacity.place(mode, cores)
            model.check_memory(memory_bytes, self.capacity.memory_free())
            intent = Record(
                uuid=own_uuid or str(uuid.uuid4()),
                name=name,
                mode=mode,
                cores=cores,
                memory_bytes=memory_bytes,
                slot=next(one for one in itertools.count() if one not in taken),
                secure=secure,
                strict=strict,
                cpus=cpus,
                node=node,
                pending=model.CREATE,
            )
            record = msgspec.structs.replace(intent, id=self.store.insert(intent, annotations=annotations))
            try:
                grades = await self.backend.reserve(record)
                name = name or next(one for one in _names(record.id) if one not in names)
                made = with_grades(msgspec.structs.replace(record, name=name, pending=""), grades)
                self.store.save(made)
            except EdgeholdError:
                await self.backend.release(record)
                self.book.forget(record)
                raise
            self.book.hold(made)
            return made

    def annotate(self, partition: int, changes: Mapping[str, str | None]) -> None:
        """Keep texts with a partition, whatever is under way; see `Book.annotate`."""
        self.book.annotate(partition, changes)

    def annotations(self, partition: int) -> dict[str, str]:
        """What is kept with a partition."""
        return self.store.annotations(self.record(partition).id)

    async def deploy(self, partition: int, images: Images, *, paused: bool = False) -> Record:
        """Start a guest in a READY partition. ``paused``: its CPUs wait for a restore before the first instruction."""
        async with self.book.turn(partition, model.DEPLOY, run=str(uuid.uuid4())) as record:
            try:
                record = await self.capacity.with_memory(record)  # noqa: PLW2901 - the same, with other grades
                running = await self.backend.start(record, images, paused=paused)
                deployed = msgspec.structs.replace(
                    record,
                    state=State.SUSPENDED if paused else State.DEPLOYED,
                    pending="",
                    reason="",
                    last_output="",
                    boot_count=record.boot_count + 1,
                    pid=running.pid or None,
                    start_ticks=running.start_ticks,
                    uid=running.uid,
                    unit=running.unit,
                    arch=running.arch,
                    vsock_cid=running.vsock_cid,
                    disks=running.disks,
                    nics=running.nics,
                    accelerator=running.accelerator,
                )
                grades = await self.backend.grade(deployed)
                # Not kept unless it is written: a restart would take the guest for a deploy that was cut off.
                deployed = self.book.put(with_grades(deployed, grades))
            except EdgeholdError:
                await self.backend.end(record)
                raise
            self.watch.changed(partition, record.run)  # what happened before the outcome was written
            return deployed

    async def suspend(self, partition: int) -> Record:
        """Stop the guest's CPUs."""
        self.require(Trait.SUSPEND, model.SUSPEND)
        async with self.book.turn(partition, model.SUSPEND) as record:
            await self.backend.suspend(record)
            return self.book.put_late(msgspec.structs.replace(record, state=State.SUSPENDED, pending=""))

    async def restore(self, partition: int) -> Record:
        """Let the guest's CPUs go on."""
        self.require(Trait.SUSPEND, model.RESTORE)
        async with self.book.turn(partition, model.RESTORE) as record:
            await self.backend.restore(record)
            return self.book.put_late(msgspec.structs.replace(record, state=State.DEPLOYED, pending=""))

    async def reboot(
        self,
        partition: int,
        *,
        graceful: bool = False,
        timeout_s: float | None = None,
        begun: Callable[[], None] = lambda: None,
    ) -> Record:
        """Reset the guest: at once, or when it has powered off, or when the time for that is over.

        ``begun`` is called when it is its turn: it is not refused for its state any more.
        """
        limit_s = self._shutdown_timeout_s if timeout_s is None else timeout_s
        if graceful:
            self.require(Trait.SHUTDOWN, "reboot graceful")
        async with self.book.turn(partition, model.REBOOT) as record:
            begun()
            reason = ""
            if graceful and (refused := await self._power_off.ask(record, limit_s)):
                reason = f"reset by force: {refused}"
            await self.backend.reboot(record)
            count = record.boot_count + 1
            self.watch.keep_reason(record, reason)
            return self.book.put_late(msgspec.structs.replace(record, boot_count=count, pending="", reason=reason))

    async def shutdown(
        self,
        partition: int,
        *,
        timeout_s: float | None = None,
        force: bool = False,
        leave: bool = False,
        begun: Callable[[], None] = lambda: None,
    ) -> Record:
        """Power the guest off: the button until the time is over, then by force; with ``leave`` never by force.

        ``begun``: as of `reboot`.

        Raises:
            TimedOutError: with ``leave``; the guest goes on as it was.
        """
        if force and leave:
            raise BadRequestError("shutdown: leave never ends a guest by force; give force or leave, not both")
        limit_s = self._shutdown_timeout_s if timeout_s is None else timeout_s
        if not force and self.record(partition).state is not State.FAILED:
            self.require(Trait.SHUTDOWN, model.SHUTDOWN)
        elif force and self._power_off.hurry(partition):
            async with self.book.lock(partition):
                record = self.record(partition)
            if record.state is State.READY:
                return record
        async with self.book.turn(partition, model.SHUTDOWN, leave=leave) as record:
            begun()
            refused = ""
            if record.state in LIVE and not force:
                refused = await self._power_off.ask(record, limit_s)
            found = await self._power_off.leave(record) if leave and refused not in {"", HURRIED} else None
            if found is None or found.found is Found.OFF:
                await self.backend.end(record)
                reason = f"ended by force: {refused}" if refused and found is None else ""
                return self.book.put_late(record.at_rest(State.READY, reason=reason))
            left = await self.watch.reconcile(msgspec.structs.replace(record, leave=False), found)
        if left.state not in LIVE:
            raise FailedError(f"shutdown: {refused}, and it failed meanwhile: {left.reason}")
        raise TimedOutError(f"shutdown: {refused}; it goes on, and is {left.state.value}")

    async def destroy(self, partition: int) -> Record:
        """Give everything back."""
        async with self.book.turn(partition, model.DESTROY) as record:
            await self.backend.end(record)
            await self.capacity.give_back(record)
            self.book.forget(record)
            return record

    async def restock(self, partition: int) -> None:
        """Give a partition at rest its memory where it is not there (a host that was started anew has none of it).

        Where there is too little, its reason says so, and a deploy tries again.
        """
        async with self.book.lock(partition):
            record = self.record(partition)
            if record.state in LIVE or record.run:
                return
            async with self.capacity.taking:
                after = await self.capacity.restocked(record)
            if after != record:
                self.book.put_late(after)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run something to its end, whoever asked for it and went away. A bug in it ends the daemon."""
        return self.tasks.spawn(work, name)

    async def close(self) -> None:
        """Let commands under way end, then let go of the guests; they live on."""
        await self.tasks.close()
        await self.backend.close()


def _names(partition: int) -> Iterable[str]:
    yield f"p{partition}"
    for number in itertools.count(2):
        yield f"p{partition}-{number}"
