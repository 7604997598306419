"""The back end that has a firmware keep partitions apart, through /dev/vmanager: cores and memory that Linux loses.

The firmware's partition has the id of ours, our uuid, and a name by which a stranger's is told from ours: strangers'
are left alone. No process stands for a guest, so a restart of vmand finds it by asking for its state.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar
from uuid import UUID

from edgehold.api.vmand import Check, CoresGrade, MemoryGrade, Usage, Vcpu
from edgehold.errors import EdgeholdError, FailedError, UnsupportedError
from edgehold.kernel import vmanager
from edgehold.kernel.vmanager import Cap, Flag, Info, PartitionHandle, Status
from vmand import model
from vmand.backend import Changed, Ended, Finding, Grades, Host, Output, Running, Trait, dtb, vmanager_doctor
from vmand.backend.vmanager_calls import Act, Calls, within
from vmand.backend.vmanager_errors import GoneError, RefusedError, finding, of_create, of_verb
from vmand.backend.vmanager_found import MARK, clear, clearing_s, open_alone, remove_unknown
from vmand.config import Config
from vmand.model import LIVE, Found, Images, OpenFile, Record
from vmand.placement import as_list

log = logging.getLogger(__name__)

T = TypeVar("T")

MEMORY_REASON = "it is the firmware's own memory, which the host neither swaps nor has huge pages of"

_TRAITS = {Cap.SUSPEND: Trait.SUSPEND, Cap.SHUTDOWN: Trait.SHUTDOWN, Cap.EVENTS: Trait.EXIT_EVENTS}
_ARMS = "aarch64"
# STATUS does not wait for the firmware (uapi); verbs may, and are told how long; the rest is for the driver to say so.
_LOOK_S, _GRADE_S, _VERB_S, _SPARE_S = 5.0, 1.0, 10.0, 5.0
# A little less than the pause after which the service presses again, so that the next press finds nobody waiting.
_PRESS_MS = 1900
_POLL_S = 1.0
_SWEEP_S = 60.0


class VmanagerBackend:
    """Guests in partitions of a firmware."""

    def __init__(self, config: Config, *, pool: frozenset[int]) -> None:
        self._pool = pool
        self._start_s = config.start_timeout_s
        self._device = config.vmanager_device
        self._native = os.uname().machine
        self._manager = open_alone(self._device)
        self._info = self._manager.info()
        caps = self._info.caps
        traits = {Trait.DEVICE_TREE} | {trait for cap, trait in _TRAITS.items() if cap in caps}
        traits |= {Trait.SECURE} if Cap.SECURE in caps else set()
        traits |= set() if Cap.CLEARS in caps else {Trait.SCRUB}
        self.traits = frozenset(traits)
        self._calls = Calls(self._manager)
        self._runs: dict[int, str] = {}
        self._presses: dict[int, asyncio.Future[vmanager.State]] = {}
        self._polling: asyncio.Task[None] | None = None
        self._changed: Changed = lambda _id, _run, _found=None: None
        self._ended: Ended = lambda _task: None

    def begin(self, *, changed: Changed, output: Output, ended: Ended) -> None:  # noqa: ARG002 - there is no console
        self._changed, self._ended = changed, ended
        if Trait.EXIT_EVENTS in self.traits:
            asyncio.get_running_loop().add_reader(self._manager.fileno(), self._hear)
        else:
            self._poll()

    async def host(self) -> Host:
        await self._refresh()
        return Host(
            backend="vmanager",
            accelerator="firmware",
            accelerator_reason="guests run on cores of their own, with nothing of the host below them",
            launcher="firmware",
            best=Grades(cores=CoresGrade.ISOLATED, memory=MemoryGrade.LOCKED, memory_reason=MEMORY_REASON),
            archs=(self._native,),
        )

    async def hypervisor(self) -> str:
        major, minor = self._info.firmware
        return f"firmware {major}.{minor}" if major or minor else ""

    async def doctor(self) -> list[Check]:
        try:
            await self._refresh()
        except EdgeholdError as error:
            return [vmanager_doctor.silent(self._device, error)]
        return vmanager_doctor.checks(self._info, device=self._device, pool=self._pool, arch=self._native)

    def memory_free(self) -> int:
        return self._info.memory_free

    async def reserve(self, record: Record) -> Grades:
        caps = self._info.caps
        flags = Flag.NOFD | (Flag.KEEP if Cap.KEEP in caps else 0) | (Flag.SECURE if record.secure else 0)

        def work() -> Info:
            created = self._manager.create(
                memory_bytes=self._aligned(record),
                cpus=record.cpus,
                partition=record.id,
                uuid=UUID(record.uuid),
                name=f"{MARK}{record.name or f'p{record.id}'}"[: vmanager.NAME_MAX],
                flags=Flag(flags),
            )
            if set(created.cpus) != set(record.cpus):
                raise FailedError(f"cores: the firmware gave {as_list(created.cpus)}, not {as_list(record.cpus)}")
            return self._manager.info()

        try:
            self._info = await self._calls.run(_raw(work), "create-partition", limit_s=_VERB_S + _SPARE_S)
        except RefusedError as refused:
            await self._refresh()
            raise of_create(refused, record, self._info) from refused
        # What another's guest left in this memory is not for ours to read.
        await self._clear(record)
        return await self.grade(record)

    async def holds(self, record: Record) -> bool:
        try:
            status = await self._status(record, _LOOK_S)
        except GoneError:
            return False
        secure = Flag.SECURE in status.flags
        has = (set(status.cpus), status.memory_bytes, secure)
        return has == (set(record.cpus), self._aligned(record), record.secure)

    def keeps(self, before: Record, after: Record) -> bool:
        shares = [(self._aligned(one), one.cpus, one.secure) for one in (before, after)]
        return shares[0] == shares[1]

    async def scrub(self, record: Record) -> None:
        with contextlib.suppress(GoneError):
            await self._clear(record)

    async def release(self, record: Record) -> None:
        limit_s = clearing_s(record.memory_bytes)

        def work(handle: PartitionHandle, status: Status) -> None:
            clear(handle, status, self._info, limit_s)
            self._manager.destroy(handle.id)  # which may clear it once more

        self._drop(record)
        with contextlib.suppress(GoneError):
            await self._act(record, model.DESTROY, work, limit_s=2 * limit_s + _SPARE_S)
        with contextlib.suppress(EdgeholdError):  # it is gone, whatever else there is now
            await self._refresh()

    async def start(self, record: Record, images: Images, *, paused: bool = False) -> Running:  # noqa: ARG002 - lacking
        arch = images.arch or self._native
        make_dtb = self._check(images, arch)
        if images.dtb is not None:
            dtb.parse(await asyncio.to_thread(dtb.read, images.dtb))
        self._runs[record.id] = record.run
        timeout_ms = _ms(self._start_s)
        with contextlib.ExitStack() as undo:
            # Duplicates: a call that hangs must not find another file under the number of one that was closed.
            kernel = _dup(undo, images.kernel)
            tree, initrd = (None if file is None else _dup(undo, file) for file in (images.dtb, images.initrd))

            def deploy(handle: PartitionHandle, _status: Status) -> None:
                handle.deploy(kernel, tree, initrd, images.cmdline, timeout_ms, make_dtb=make_dtb)

            work = self._calls.on(record, deploy)
            name = f"{model.DEPLOY} of partition {record.id}"
            begun = self._calls.begin(work, name)
            begun.add_done_callback(lambda _future: files.close())
            files = undo.pop_all()
        with _refusals(model.DEPLOY, record):
            await within(begun, name, self._start_s + _SPARE_S)
        return Running(accelerator="firmware", arch=arch)

    async def adopt(self, record: Record) -> Finding:
        self._runs[record.id] = record.run
        return await self.look(record)

    async def look(self, record: Record) -> Finding:
        try:
            status = await self._status(record, _LOOK_S)
        except GoneError:
            return Finding(found=Found.GONE, reason="the firmware does not have the partition any more")
        return finding(record, status)

    async def grade(self, record: Record, *, repair: bool = False) -> Grades:  # noqa: ARG002 - nothing can be lost
        cores, reason = (record.cores_grade, record.cores_reason) if record.state in LIVE else (None, "")
        if record.state in LIVE:
            with contextlib.suppress(EdgeholdError):  # it stays what it was; that it does not answer is seen by a look
                status = await self._status(record, _GRADE_S)
                same = set(status.cpus) == set(record.cpus)
                cores = CoresGrade.ISOLATED if same else CoresGrade.PINNED
                reason = "" if same else f"the firmware says that it has the cores {as_list(status.cpus)}"
        return Grades(cores=cores, cores_reason=reason, memory=MemoryGrade.LOCKED, memory_reason=MEMORY_REASON)

    async def suspend(self, record: Record) -> None:
        await self._act(record, model.SUSPEND, lambda handle, _: handle.suspend(timeout_ms=_ms(_VERB_S)))

    async def restore(self, record: Record) -> None:
        await self._act(record, model.RESTORE, lambda handle, _: handle.restore(timeout_ms=_ms(_VERB_S)))

    async def reboot(self, record: Record) -> None:
        self._check_reboot()
        timeout_ms = _ms(self._start_s)
        await self._act(
            record,
            model.REBOOT,
            lambda handle, _: handle.reboot(also_off=True, timeout_ms=timeout_ms),
            limit_s=self._start_s + _SPARE_S,
        )

    async def press_power(self, record: Record) -> None:
        if record.pending == model.REBOOT:  # before the guest is off and can't be started again
            self._check_reboot()
        pressed = self._presses.get(record.id)
        if pressed is None or pressed.done():
            self._presses.pop(record.id, None)
            work = self._calls.on(record, lambda handle, _: handle.shutdown(timeout_ms=_PRESS_MS))
            self._presses[record.id] = self._calls.begin(work, f"shutdown of partition {record.id}")

    async def wait_off(self, record: Record, timeout_s: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if (pressed := self._presses.get(record.id)) is not None:
            await asyncio.wait({pressed}, timeout=timeout_s)
            if pressed.done() and _is_off(record, pressed):
                return True
        await asyncio.sleep(max(deadline - loop.time(), 0))  # who presses again at once would do nothing else
        return False

    async def end(self, record: Record) -> None:
        def work(handle: PartitionHandle, status: Status) -> None:
            if status.state is not vmanager.State.READY:
                try:
                    handle.shutdown(force=True)
                except OSError as error:
                    if error.errno != errno.EBADFD:  # it went off in between
                        raise

        with contextlib.suppress(GoneError):
            await self._act(record, model.SHUTDOWN, work)
        self._drop(record)

    async def vcpus(self, record: Record) -> list[Vcpu]:  # noqa: ARG002 - no thread of the host runs one
        return []

    async def usage(self, record: Record) -> Usage:  # noqa: ARG002 - its guests have no virtio devices
        return Usage()

    def console(self, record: Record) -> str:  # noqa: ARG002 - it is not ours to read
        return ""

    def attach(self, record: Record) -> socket.socket:
        raise UnsupportedError(f"partition {record.id}: the firmware has no console of a guest")

    async def sweep(self, records: Collection[Record]) -> None:
        ours = {one.id: UUID(one.uuid) for one in records}
        work = _raw(lambda: remove_unknown(self._manager, self._info, ours))
        try:
            for what in await self._calls.run(work, "sweep", limit_s=_SWEEP_S):
                log.warning("a partition of the firmware that is in no journal: %s", what)
            await self._refresh()
        except (EdgeholdError, RefusedError) as error:  # they hold cores and memory; guests are not touched by that
            log.error("the firmware's partitions could not be looked through: %s", error)  # noqa: TRY400

    async def close(self) -> None:
        if Trait.EXIT_EVENTS in self.traits:
            asyncio.get_running_loop().remove_reader(self._manager.fileno())
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        self._runs.clear()
        self._calls.close()

    # Inside

    async def _act(self, record: Record, command: str, act: Act[T], *, limit_s: float = 0.0) -> T:
        """Act on the partition, within ``limit_s`` or what a verb may take."""
        limit_s = limit_s or _VERB_S + _SPARE_S
        with _refusals(command, record):
            name = f"{command} of partition {record.id}"
            return await self._calls.run(self._calls.on(record, act), name, limit_s=limit_s)

    async def _status(self, record: Record, limit_s: float) -> Status:
        with _refusals("status", record):
            return await self._calls.status(record, limit_s=limit_s)

    async def _refresh(self) -> None:
        try:
            self._info = await self._calls.run(_raw(self._manager.info), "info", limit_s=_LOOK_S)
        except RefusedError as refused:
            raise FailedError(f"{self._device}: {refused}") from refused

    async def _clear(self, record: Record) -> None:
        limit_s = clearing_s(record.memory_bytes)

        def work(handle: PartitionHandle, status: Status) -> None:
            clear(handle, status, self._info, limit_s)

        await self._act(record, "scrub", work, limit_s=limit_s + _SPARE_S)

    def _aligned(self, record: Record) -> int:
        """What the firmware gives: bytes, in its own pieces."""
        align = self._info.memory_align
        return -(-record.memory_bytes // align) * align

    def _check(self, images: Images, arch: str) -> bool:
        """Whether the firmware is to make a device tree.

        Raises:
            UnsupportedError: it can't run this kernel, or not without a tree.
        """
        if arch != self._native:
            raise UnsupportedError(
                f"kernel: it is for {arch}, this host is {self._native}, and a firmware's partition emulates nothing"
            )
        if arch != _ARMS or images.dtb is not None:
            return False
        if Cap.GENDTB not in self._info.caps:
            raise UnsupportedError("dtb: this firmware makes no device tree itself; give the one of the partition")
        return True

    def _check_reboot(self) -> None:
        if Cap.REBOOT not in self._info.caps:
            raise UnsupportedError(
                "reboot: not supported on this back end: the firmware can't load a kernel again; shut the partition "
                "down and deploy it again"
            )

    def _drop(self, record: Record) -> None:
        self._runs.pop(record.id, None)
        self._presses.pop(record.id, None)

    def _hear(self) -> None:
        """Events of all partitions, strangers' too."""
        try:
            events = self._manager.read_events()
        except (OSError, ValueError) as error:
            log.error("%s tells no events any more, guests are asked every second: %s", self._device, error)  # noqa: TRY400
            asyncio.get_running_loop().remove_reader(self._manager.fileno())
            self._poll()
            return
        for event in events:
            if event.lost:
                self._tell_all()
            elif event.new is not vmanager.State.BUSY and (run := self._runs.get(event.id)) is not None:
                self._changed(event.id, run)

    def _poll(self) -> None:
        self._polling = asyncio.create_task(self._keep_looking(), name="look at the firmware's partitions")
        self._polling.add_done_callback(self._ended)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            self._tell_all()

    def _tell_all(self) -> None:
        for partition, run in list(self._runs.items()):
            self._changed(partition, run)


@contextlib.contextmanager
def _refusals(command: str, record: Record) -> Iterator[None]:
    """What the driver refuses in the block is told in words."""
    try:
        yield
    except RefusedError as refused:
        raise of_verb(refused, command, record) from refused


def _dup(undo: contextlib.ExitStack, file: OpenFile) -> int:
    fd = os.dup(file.fd)
    undo.callback(os.close, fd)
    return fd


def _raw(work: Callable[[], T]) -> Callable[[], T]:
    """Work whose errno is told as of a call on a partition."""

    def wrapped() -> T:
        try:
            return work()
        except OSError as error:
            raise RefusedError(error) from error

    return wrapped


def _is_off(record: Record, pressed: asyncio.Future[vmanager.State]) -> bool:
    try:
        pressed.result()
    except GoneError:
        return True
    except RefusedError as refused:
        off = refused.status is not None and refused.status.state in {vmanager.State.READY, vmanager.State.FAILED}
        if not off and refused.number != errno.ETIMEDOUT:
            log.warning("partition %d: the power button: %s", record.id, refused)
        return off
    return True


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
