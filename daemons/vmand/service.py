"""Owns the partitions: every change of one goes through here, one at a time, written down before it happens.

A command that was refused changes nothing. One that is cut off by vmand's end is settled by recovery.py at the next
start. What a guest does by itself comes in by `_changed` and is looked at, not believed.
"""

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from typing import Any

import msgspec

from edgehold.api.vmand import Capabilities, Mode, Partition, State, Vcpu
from edgehold.clock import NS_PER_S, Clock
from edgehold.errors import EdgeholdError, FailedError, NoCapacityError, NotFoundError, TimedOutError, UnavailableError
from vmand import model
from vmand.backend import Backend, Finding
from vmand.events import Hub
from vmand.model import AFTER, LIVE, TABLE, Found, Images, Record
from vmand.store import Store

log = logging.getLogger(__name__)

GUEST_FAILED_ID = "5f1c35a0c7d64a0d9b0c9f6b6c0d7e21"
"""MESSAGE_ID of a guest that panicked or whose process died."""
_PRESS_EVERY_S = 2.0
# How long a stop of vmand waits for commands under way; what takes longer is settled at the next start.
_DRAIN_S = 5.0
# Pauses between looks at a guest whose QEMU does not answer.
_LOOK_AGAIN_S, _LOOK_AGAIN_MAX_S = 0.5, 30.0


class Service:
    """The partitions of this host."""

    def __init__(
        self,
        *,
        backend: Backend,
        store: Store,
        clock: Clock,
        pool: Collection[int],
        max_partitions: int,
        memory_limit: int = 0,
        shutdown_timeout_s: float = 30.0,
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        self.backend = backend
        self.store = store
        self.hub = Hub(clock)
        self.guest_ends: Counter[str] = Counter()
        self._clock = clock
        self._pool = frozenset(pool)
        self._max_partitions = max_partitions
        self._memory_limit = memory_limit
        self._shutdown_timeout_s = shutdown_timeout_s
        self._on_fault = on_fault
        self._records: dict[int, Record] = {}
        self._locks: dict[int, asyncio.Lock] = {}
        self._creating = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._looking: set[str] = set()
        self._closing = asyncio.Event()
        backend.begin(changed=self._changed, output=self.hub.console, ended=self._task_done)

    # What is there

    @property
    def records(self) -> list[Record]:
        """All partitions, by id."""
        return [self._records[one] for one in sorted(self._records)]

    def partitions(self) -> list[Partition]:
        """All partitions, by id."""
        return [one.public() for one in self.records]

    def status(self, partition: int) -> Partition:
        """One partition."""
        return self.record(partition).public()

    def record(self, partition: int) -> Record:
        """One partition as the journal keeps it.

        Raises:
            NotFoundError: there is none of this id.
        """
        if partition not in self._records:
            raise NotFoundError(f"there is no partition {partition}")
        return self._records[partition]

    def check(self, partition: int, command: str) -> None:
        """Refuse early what the state does not allow, before arguments are looked at more closely.

        Raises:
            BadStateError: names the state.
        """
        TABLE.check(command, self.record(partition).state, who=str(partition))

    async def vcpus(self, partition: int) -> list[Vcpu]:
        """The threads of the guest's CPUs; none where no guest is deployed."""
        record = self.record(partition)
        return await self.backend.vcpus(record) if record.state in LIVE else []

    def console(self, partition: int) -> str:
        """The last console output."""
        return self.backend.console(self.record(partition))

    async def capabilities(self) -> Capabilities:
        """What this host can give."""
        host = await self.backend.host()
        free = self._memory_free()
        return Capabilities(
            accelerator=host.accelerator,
            accelerator_reason=host.accelerator_reason,
            backend=host.backend,
            launcher=host.launcher,
            cores_pool=model.free_cores(self._pool, ()),
            cores_free=self._cores_free(),
            memory_total_bytes=self._reserved() + free,
            memory_free_bytes=free,
        )

    # Commands

    async def create(self, *, cores: int, memory_bytes: int, mode: Mode, name: str = "") -> Record:
        """Reserve cores and memory. The partition is READY when this returns."""
        async with self._creating:  # one at a time: what is left is looked at and taken in one piece
            if len(self._records) >= self._max_partitions:
                raise NoCapacityError(f"{self._max_partitions} partitions exist, which is the limit; destroy one first")
            names = {one.name for one in self._records.values()}
            if name:
                model.check_name(name, names)
            cpus = model.pick_cores(self._cores_free(), cores) if mode is Mode.DEDICATED else ()
            model.check_memory(memory_bytes, self._memory_free())
            intent = Record(
                uuid=str(uuid.uuid4()),
                name=name,
                mode=mode,
                cores=cores,
                memory_bytes=memory_bytes,
                cpus=cpus,
                pending=model.CREATE,
            )
            record = msgspec.structs.replace(intent, id=self.store.insert(intent))
            try:
                await self.backend.reserve(record)
                name = name or next(one for one in _names(record.id) if one not in names)
                made = msgspec.structs.replace(record, name=name, pending="")
                self.store.save(made)
            except EdgeholdError:
                await self.backend.release(record)
                self._forget(record)
                raise
            self._hold(made)
            return made

    async def deploy(self, partition: int, images: Images) -> Record:
        """Start a guest in a READY partition."""
        async with self._turn(partition, model.DEPLOY, run=str(uuid.uuid4())) as record:
            try:
                running = await self.backend.start(record, images)
                deployed = msgspec.structs.replace(
                    record,
                    state=State.DEPLOYED,
                    pending="",
                    reason="",
                    boot_count=record.boot_count + 1,
                    pid=running.pid,
                    start_ticks=running.start_ticks,
                    unit=running.unit,
                    accelerator=running.accelerator,
                )
                # Not kept unless it is written: a restart would take the guest for a deploy that was cut off.
                self._put(deployed)
            except EdgeholdError:
                await self.backend.end(record)
                raise
            self._changed(partition, record.run)  # what happened before the outcome was written
            return deployed

    async def suspend(self, partition: int) -> Record:
        """Stop the guest's CPUs."""
        async with self._turn(partition, model.SUSPEND) as record:
            await self.backend.suspend(record)
            return self._put_late(msgspec.structs.replace(record, state=State.SUSPENDED, pending=""))

    async def restore(self, partition: int) -> Record:
        """Let the guest's CPUs go on."""
        async with self._turn(partition, model.RESTORE) as record:
            await self.backend.restore(record)
            return self._put_late(msgspec.structs.replace(record, state=State.DEPLOYED, pending=""))

    async def reboot(self, partition: int) -> Record:
        """Reset the guest by force."""
        async with self._turn(partition, model.REBOOT) as record:
            await self.backend.reboot(record)
            return self._put_late(msgspec.structs.replace(record, boot_count=record.boot_count + 1, pending=""))

    async def shutdown(self, partition: int, *, timeout_s: float | None = None, force: bool = False) -> Record:
        """Power the guest off: the button until the time is over, then by force."""
        limit_s = self._shutdown_timeout_s if timeout_s is None else timeout_s
        async with self._turn(partition, model.SHUTDOWN) as record:
            reason = ""
            if record.state is State.DEPLOYED and not force and not await self._power_off(record, limit_s):
                reason = f"ended by force: the guest did not power off within {limit_s:g} s"
            await self.backend.end(record)
            return self._put_late(record.at_rest(State.READY, reason=reason))

    async def destroy(self, partition: int) -> Record:
        """Give everything back."""
        async with self._turn(partition, model.DESTROY) as record:
            await self.backend.end(record)
            await self.backend.release(record)
            self._forget(record)
            return record

    # What guests do by themselves, and what recovery asks for

    async def reconcile(self, record: Record, finding: Finding) -> Record:
        """Write what was found. Asked for with the partition's lock held."""
        state = AFTER[finding.found]
        if state in LIVE:
            if state is record.state and not record.pending and record.reason == finding.reason:
                return record
            return self._put_late(msgspec.structs.replace(record, state=state, pending="", reason=finding.reason))
        ended = "off" if finding.found is Found.OFF else "failed"
        self.guest_ends[ended] += 1
        reason = finding.reason or ("the guest powered itself off" if state is State.READY else finding.found.value)
        if state is State.FAILED:
            fields = {"message_id": GUEST_FAILED_ID, "partition": record.id}
            log.error("partition %d failed: %s", record.id, reason, extra=fields)
            if finding.found is Found.GONE:
                reason += "; vmanctl console has its last output, shutdown makes it READY"
        # Written before its process is ended: after a crash in between it would seem to have died.
        begun = self._put_late(msgspec.structs.replace(record, state=state, reason=reason, pending=""), quiet=True)
        try:
            await self.backend.end(record)
        except EdgeholdError as error:
            log.error("partition %d: %s", record.id, error)  # noqa: TRY400 - the text is the message
            return self._put_late(begun)
        return self._put_late(record.at_rest(state, reason=reason))

    def load(self, record: Record) -> None:
        """Take a partition over from the journal."""
        self._hold(record)

    def put(self, record: Record) -> Record:
        """Write a partition's new record, as recovery found it."""
        return self._put_late(record)

    def forget(self, record: Record) -> None:
        """Write that a partition is gone, as recovery found it."""
        self._forget(record)

    def look_again(self, record: Record) -> None:
        """Look at a guest that could not be looked at, later and until it can be."""
        if record.run not in self._looking and not self._closing.is_set():
            self._looking.add(record.run)
            self.spawn(self._see_later(record.id, record.run), f"look again at partition {record.id}")

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run something to its end, whoever asked for it and went away. A bug in it ends the daemon."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    async def close(self) -> None:
        """Let commands under way end, then let go of the guests; they live on."""
        self._closing.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_DRAIN_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.backend.close()

    # Inside

    @contextlib.asynccontextmanager
    async def _turn(self, partition: int, command: str, **changes: Any) -> AsyncIterator[Record]:
        """One command's turn on a partition: legal in its state, its intent written. A refusal leaves no trace."""
        async with self.lock(partition):
            before = self.record(partition)
            TABLE.check(command, before.state, who=str(partition))
            intent = msgspec.structs.replace(before, pending=command, **changes)
            self.store.save(intent)
            try:
                yield intent
            except EdgeholdError:
                self._put_late(before, quiet=True)
                raise

    def lock(self, partition: int) -> asyncio.Lock:
        """Whose turn it is on a partition; recovery takes turns too, because its guests speak up meanwhile."""
        self.record(partition)
        return self._locks.setdefault(partition, asyncio.Lock())

    async def _power_off(self, record: Record, limit_s: float) -> bool:
        """Press until the guest is off. One press is lost where nobody in the guest reads the button yet."""
        deadline = self._clock.monotonic_ns() + int(limit_s * NS_PER_S)
        while (left_s := (deadline - self._clock.monotonic_ns()) / NS_PER_S) > 0:
            try:
                await self.backend.press_power(record)
            except (TimedOutError, UnavailableError, FailedError) as error:
                log.warning("partition %d: the power button: %s", record.id, error)
            if await self.backend.wait_off(record, min(_PRESS_EVERY_S, left_s)):
                return True
        return False

    def _changed(self, partition: int, run: str) -> None:
        self.spawn(self._see(partition, run), f"look at partition {partition}")

    async def _see(self, partition: int, run: str) -> None:
        if self._current(partition, run) is None:
            return
        async with self.lock(partition):
            record = self._current(partition, run)
            if record is None:
                return  # a command has dealt with it meanwhile
            try:
                await self.reconcile(record, await self.backend.look(record))
            except EdgeholdError as error:
                log.warning("partition %d can't be looked at: %s", partition, error)
                self.look_again(record)

    def _current(self, partition: int, run: str) -> Record | None:
        """The partition, as long as this run of its guest is the present one."""
        record = self._records.get(partition)
        return record if record is not None and record.run == run and record.state in LIVE else None

    async def _see_later(self, partition: int, run: str) -> None:
        """Until QEMU answers: what it could not say once (the guest is off, or panicked) it says only when asked."""
        pause_s = _LOOK_AGAIN_S
        try:
            while (record := self._current(partition, run)) is not None and not await self._closes_within(pause_s):
                pause_s = min(pause_s * 2, _LOOK_AGAIN_MAX_S)
                try:
                    await self.backend.look(record)  # without the lock: a command need not wait for a QEMU that hangs
                except EdgeholdError as error:
                    log.debug("partition %d still can't be looked at: %s", partition, error)
                else:
                    break
        finally:
            self._looking.discard(run)
        if not self._closing.is_set():
            await self._see(partition, run)

    async def _closes_within(self, pause_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._closing.wait()
        return self._closing.is_set()

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None or isinstance(error, EdgeholdError):
            return
        log.critical("the task %r failed", task.get_name(), exc_info=error)
        self._on_fault()

    def _hold(self, record: Record) -> None:
        self._records[record.id] = record
        self.hub.state(record.id, record.state, record.reason)

    def _put(self, record: Record) -> Record:
        self.store.save(record)
        old = self._records.get(record.id)
        self._records[record.id] = record
        if old is None or (old.state, old.reason, old.boot_count) != (record.state, record.reason, record.boot_count):
            self.hub.state(record.id, record.state, record.reason)
        return record

    def _put_late(self, record: Record, *, quiet: bool = False) -> Record:
        """Write what has happened already. If that can't be written, it stands all the same: the intent is in the
        journal, and a restart comes to the same outcome from it."""
        try:
            self.store.save(record)
        except FailedError as error:
            log.error("partition %d: the outcome is not written: %s", record.id, error)  # noqa: TRY400
        old = self._records.get(record.id)
        self._records[record.id] = record
        if not quiet and old is not None:
            self.hub.state(record.id, record.state, record.reason)
        return record

    def _forget(self, record: Record) -> None:
        try:
            self.store.delete(record.id)
        except FailedError as error:
            log.error("partition %d: its end is not written: %s", record.id, error)  # noqa: TRY400
        self._locks.pop(record.id, None)
        if self._records.pop(record.id, None) is not None:
            self.hub.gone(record.id)

    def _reserved(self) -> int:
        return sum(one.memory_bytes for one in self._records.values())

    def _memory_free(self) -> int:
        free = self.backend.memory_free()
        if self._memory_limit:
            free = min(free, self._memory_limit - self._reserved())
        return max(free, 0)

    def _cores_free(self) -> tuple[int, ...]:
        return model.free_cores(self._pool, (cpu for one in self._records.values() for cpu in one.cpus))


def _names(partition: int) -> Iterable[str]:
    yield f"p{partition}"
    for number in itertools.count(2):
        yield f"p{partition}-{number}"
