"""vmand's back end for a firmware on a /dev/vmanager, with the service above it: lives, ends, restarts, strangers.

Every change of a state and every refusal is a case of tests/integration/test_backends.py; here is what only a firmware
has. What the firmware can't do is passed over, or looked for as a refusal.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from edgehold.api.vmand import CoresGrade, MemoryGrade, Mode, State
from edgehold.clock import SystemClock
from edgehold.errors import (
    BadStateError,
    EdgeholdError,
    FailedError,
    NoCapacityError,
    TimedOutError,
    UnavailableError,
    UnsupportedError,
)
from edgehold.kernel import vmanager
from edgehold.kernel.vmanager import Cap, Flag, Info, Manager
from edgehold.testing.daemons import private_directory
from edgehold.testing.partitions import PrivateVmand
from edgehold.testing.vmanager import MEMORY, PATIENCE_S, Device, image, make, need
from vmand.backend import vmanager_found
from vmand.backend.kernelimage import AARCH64, X86_64
from vmand.backend.vmanager import VmanagerBackend
from vmand.change import Change, change_partition
from vmand.config import Config
from vmand.model import MIB, Images, OpenFile, Record
from vmand.recovery import recover
from vmand.service import Service
from vmand.store import Store

SIZE = 16 * MIB


class Daemon:
    """A service on this process' device, without its process; `again` is a restart, `crash` one without an end."""

    def __init__(self, device: Device, directory: Path) -> None:
        self.device = device
        self.path = directory / "vmand.db"
        self.faults = 0

    async def start(self) -> None:
        topology, pool = vmanager_found.cores(str(self.device.path))
        self.store = Store(self.path)
        self.backend = VmanagerBackend(Config(vmanager_device=str(self.device.path)), pool=pool)
        self.service = Service(
            backend=self.backend,
            store=self.store,
            clock=SystemClock(),
            pool=pool,
            topology=topology,
            max_partitions=8,
            shutdown_timeout_s=PATIENCE_S,
            on_fault=self._fault,
        )
        await recover(self.service)

    async def stop(self) -> None:
        await self.service.close()
        self.store.close()

    async def again(self) -> None:
        await self.stop()
        await self.start()

    async def create(self, **options: Any) -> int:
        given = {"cores": 1, "memory_bytes": SIZE, "mode": Mode.DEDICATED, **options}
        return (await self.service.create(**given)).id

    async def deploy(self, partition: int, cmdline: str = "", **options: Any) -> Record:
        with kernel() as file:
            return await self.service.deploy(partition, Images(kernel=file, cmdline=cmdline, **options))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - what is waited for may have no event
                await asyncio.sleep(0.01)

    async def reaches(self, partition: int, state: State) -> Record:
        await self.until(lambda: self.service.status(partition).state is state)
        return self.service.record(partition)

    def _fault(self) -> None:
        self.faults += 1


@contextlib.contextmanager
def kernel() -> Iterator[OpenFile]:
    """Enough of a bzImage for vmand too (boot protocol 2.12, 64-bit entry)."""
    head = bytearray(0x240)
    head[0x202:0x208] = b"HdrS\x0c\x02"
    head[0x236] = 1
    fd = image(bytes(head))
    yield OpenFile(fd=fd, name="/kernel")
    os.close(fd)


@pytest.fixture
async def daemon(device: Device, manager: Manager, tmp_path: Path) -> AsyncIterator[Daemon]:
    """On a device with no partition in it; ``manager`` looks at it from aside, and cleans."""
    del manager
    others = unknown_threads()
    one = Daemon(device, tmp_path)
    await one.start()
    yield one
    if device.kind == "double":
        device.clear()
    await one.stop()
    await one.until(lambda: one.backend._calls._threads == 0)
    await one.until(lambda: unknown_threads() <= others)
    assert one.faults == 0


def unknown_threads() -> int:
    """The kernel's threads that Python does not have: one that is over is there a moment longer for who looks."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))
    return found - threading.active_count()


@pytest.fixture
def only_the_double(device: Device) -> None:
    if device.kind != "double":
        pytest.skip("only the double can be made to fail")


def found(manager: Manager, partition: int) -> vmanager.Status:
    with manager.open_partition(partition) as handle:
        return handle.status()


async def test_a_whole_life(daemon: Daemon, manager: Manager, info: Info) -> None:
    host = await daemon.backend.host()
    assert (host.backend, host.best.cores, host.archs) == ("vmanager", CoresGrade.ISOLATED, (os.uname().machine,))
    free = daemon.backend.memory_free()
    one = await daemon.create(name="control")
    record = daemon.service.record(one)
    status = found(manager, one)
    assert (status.state, status.name, str(status.uuid)) == (vmanager.State.READY, "vmand:control", record.uuid)
    assert (status.cpus, status.memory_bytes) == (record.cpus, SIZE)
    assert (Flag.KEEP in status.flags) == (Cap.KEEP in info.caps)
    assert (record.cores_grade, record.memory_grade) == (None, MemoryGrade.LOCKED)
    assert daemon.backend.memory_free() == free - SIZE

    record = await daemon.deploy(one)
    assert (record.state, record.cores_grade, record.cores_reason) == (State.DEPLOYED, CoresGrade.ISOLATED, "")
    assert (record.accelerator, record.arch, record.pid) == ("firmware", os.uname().machine, None)
    assert await daemon.service.vcpus(one) == []
    if Cap.SUSPEND in info.caps:
        await daemon.service.suspend(one)
        assert found(manager, one).state is vmanager.State.SUSPENDED
        await daemon.service.restore(one)
    if Cap.REBOOT in info.caps:
        assert (await daemon.service.reboot(one)).boot_count == found(manager, one).boot_count == 2
    record = await daemon.service.shutdown(one, force=Cap.SHUTDOWN not in info.caps)
    assert (record.state, record.reason) == (State.READY, "")
    assert found(manager, one).state is vmanager.State.READY
    await daemon.deploy(one)
    await daemon.service.shutdown(one, force=True)
    await daemon.service.destroy(one)
    assert manager.next() is None
    assert daemon.backend.memory_free() == free


async def test_what_the_firmware_can_is_what_is_offered(daemon: Daemon, info: Info) -> None:
    offered = (await daemon.service.capabilities()).supports
    caps = {"suspend": Cap.SUSPEND, "shutdown": Cap.SHUTDOWN, "exit-events": Cap.EVENTS, "secure": Cap.SECURE}
    for word, cap in caps.items():
        assert (word in offered) == (cap in info.caps), word
    assert "device-tree" in offered
    assert not {"virtio", "console", "shared", "scrub"} & set(offered)
    checks = {one.subject: one for one in await daemon.backend.doctor()}
    assert checks["firmware"].level == checks["cores"].level == "good"
    assert (checks["suspend"].level == "good") == (Cap.SUSPEND in info.caps)
    one = await daemon.create()
    await daemon.deploy(one)
    if Cap.SUSPEND not in info.caps:
        with pytest.raises(UnsupportedError, match="suspend: not supported on this back end"):
            await daemon.service.suspend(one)
    if Cap.SHUTDOWN not in info.caps:
        with pytest.raises(UnsupportedError, match="shutdown: not supported on this back end"):
            await daemon.service.shutdown(one)
    if Cap.REBOOT not in info.caps:
        with pytest.raises(UnsupportedError, match="reboot: not supported on this back end"):
            await daemon.service.reboot(one)
    if Cap.REBOOT not in info.caps and Cap.SHUTDOWN in info.caps:
        with pytest.raises(UnsupportedError, match="reboot: not supported on this back end"):
            await daemon.service.reboot(one, graceful=True)
    assert daemon.service.status(one).state is State.DEPLOYED
    if Cap.SECURE in info.caps:
        two = await daemon.create(secure=True)
        assert daemon.service.status(two).secure
    for work in (daemon.service.console, daemon.service.attach):
        with pytest.raises(UnsupportedError, match="no console of a guest"):
            work(one)


@pytest.mark.parametrize(
    ("cmdline", "state", "reason"),
    [
        ("vman.off=20", State.READY, "the guest powered itself off"),
        ("vman.crash=20", State.FAILED, "the guest crashed"),
    ],
)
async def test_a_guest_that_ends_by_itself(daemon: Daemon, cmdline: str, state: State, reason: str) -> None:
    one = await daemon.create()
    await daemon.deploy(one, cmdline)
    assert reason in (await daemon.reaches(one, state)).reason
    if state is State.FAILED:
        with pytest.raises(BadStateError, match="FAILED; deploy needs READY"):
            await daemon.deploy(one)
        await daemon.service.shutdown(one)
    assert (await daemon.deploy(one)).state is State.DEPLOYED


async def test_a_guest_that_does_not_listen_is_ended_by_force(daemon: Daemon, info: Info) -> None:
    need(info, Cap.SHUTDOWN)
    one = await daemon.create()
    await daemon.deploy(one, "vman.deaf")
    record = await daemon.service.shutdown(one, timeout_s=0.3)
    assert (record.state, record.reason) == (
        State.READY,
        "ended by force: the guest did not power off within 0.3 s",
    )


async def test_a_guest_that_takes_its_time_is_waited_for(daemon: Daemon, info: Info) -> None:
    """Longer than one press waits."""
    need(info, Cap.SHUTDOWN, Cap.REBOOT)
    one = await daemon.create()
    await daemon.deploy(one, "vman.obey=2500")
    assert (await daemon.service.reboot(one, graceful=True)).reason == ""
    assert (await daemon.service.shutdown(one)).reason == ""


async def test_force_hurries_a_shutdown(daemon: Daemon, info: Info) -> None:
    need(info, Cap.SHUTDOWN)
    one = await daemon.create()
    await daemon.deploy(one, "vman.deaf")
    waits = daemon.service.spawn(daemon.service.shutdown(one), "a shutdown")
    await daemon.reaches(one, State.BUSY)
    assert (await daemon.service.shutdown(one, force=True)).state is State.READY
    await waits


async def test_a_firmware_that_refuses_or_is_silent(daemon: Daemon, manager: Manager) -> None:
    daemon.backend._start_s = 0.2
    one = await daemon.create()
    with pytest.raises(FailedError, match=r"deploy: the firmware refused it \(its code -6\)"):
        await daemon.deploy(one, "vman.refuse=1")
    with pytest.raises(TimedOutError, match="deploy: the firmware did not answer in time"):
        await daemon.deploy(one, "vman.hang")
    assert daemon.service.status(one).state is State.READY
    assert found(manager, one).state is vmanager.State.READY
    assert (await daemon.deploy(one)).state is State.DEPLOYED


async def test_a_kernel_for_another_machine(daemon: Daemon) -> None:
    one = await daemon.create()
    other = {X86_64: AARCH64, AARCH64: X86_64}[os.uname().machine]
    with pytest.raises(UnsupportedError, match=f"kernel: it is for {other}, this host is {os.uname().machine}"):
        await daemon.deploy(one, arch=other)


async def test_a_reservation_that_the_firmware_can_t_give(daemon: Daemon, manager: Manager, info: Info) -> None:
    """What vmand does not know of: strangers' partitions, made after its start."""
    stranger = make(manager, cpus=(info.cpus[0],), partition=2, flags=Flag.KEEP & _flags(info))
    try:
        with pytest.raises(NoCapacityError, match=f"cores: somebody else's partition has one of .* {info.cpus[0]} "):
            await daemon.create()
        with pytest.raises(NoCapacityError, match="has a partition 2 that is not vmand's"):
            await daemon.create()
        assert daemon.service.partitions() == []
        assert found(manager, 2).name == ""
        await daemon.again()
        one = await daemon.create()  # its cores are known now
        assert daemon.service.record(one).cpus == (info.cpus[1],)
        with pytest.raises(NoCapacityError, match="MiB are wanted and"):
            await daemon.create(memory_bytes=info.memory_total)
    finally:
        stranger.close()


def _flags(info: Info) -> Flag:
    return Flag.KEEP if Cap.KEEP in info.caps else Flag(0)


async def test_a_restart_finds_what_guests_do(daemon: Daemon, manager: Manager, info: Info) -> None:
    need(info, Cap.KEEP)
    lives, off, crashed = [await daemon.create() for _ in range(3)]
    for one in (lives, off, crashed):
        await daemon.deploy(one)
    before = daemon.service.status(lives)
    await daemon.stop()
    for one, cmdline in ((off, "vman.off=1"), (crashed, "vman.crash=1")):
        with manager.open_partition(one) as handle, kernel() as file:
            handle.shutdown(force=True)
            handle.deploy(file.fd, cmdline=cmdline)
    await daemon.start()
    assert daemon.service.status(lives) == before
    assert "powered itself off" in (await daemon.reaches(off, State.READY)).reason
    assert "the guest crashed" in (await daemon.reaches(crashed, State.FAILED)).reason
    with manager.open_partition(lives) as handle:
        handle.shutdown(force=True)
    await daemon.reaches(lives, State.READY)  # it is watched again


async def test_what_was_cut_off_is_settled(daemon: Daemon, manager: Manager, info: Info) -> None:
    need(info, Cap.KEEP)
    deploying, going = await daemon.create(), await daemon.create()
    await daemon.deploy(going)
    save = daemon.store.save
    await daemon.service.close()
    save(msgspec.structs.replace(daemon.service.record(deploying), pending="deploy", run="a run"))
    save(msgspec.structs.replace(daemon.service.record(going), pending="destroy-partition"))
    with manager.open_partition(deploying) as handle, kernel() as file:
        handle.deploy(file.fd)
    made = daemon.store.insert(msgspec.structs.replace(daemon.service.record(going), uuid=NEVER, pending=CREATE))
    manager.create(
        memory_bytes=SIZE, cpus=(info.cpus[4],), partition=made, uuid=UUID(NEVER), flags=Flag.KEEP | Flag.NOFD
    )
    daemon.store.close()
    await daemon.start()
    assert [one.id for one in daemon.service.partitions()] == [deploying]
    assert daemon.service.status(deploying).state is State.READY
    assert found(manager, deploying).state is vmanager.State.READY
    assert manager.next(deploying) is None


NEVER = "00000000-0000-4000-8000-000000000001"
CREATE = "create-partition"


async def test_a_start_removes_ours_and_leaves_strangers(
    daemon: Daemon, manager: Manager, info: Info, caplog: pytest.LogCaptureFixture
) -> None:
    need(info, Cap.KEEP)
    one = await daemon.create()
    await daemon.deploy(one)
    flags = Flag.KEEP | Flag.NOFD
    for number, (name, core) in enumerate((("vmand:lost", 2), ("web", 3)), 50):
        manager.create(memory_bytes=SIZE, cpus=(info.cpus[core],), partition=number, name=name, flags=flags)
        with manager.open_partition(number) as handle, kernel() as file:
            handle.deploy(file.fd)
    with caplog.at_level(logging.WARNING):
        await daemon.again()
    assert "in no journal: 50 (vmand:lost) is removed" in caplog.text
    assert manager.next(one) == 51
    assert found(manager, 51).state is found(manager, one).state is vmanager.State.DEPLOYED
    assert info.cpus[3] not in (await daemon.service.capabilities()).cores_pool


async def test_another_s_partition_is_never_taken_for_ours(daemon: Daemon, manager: Manager, info: Info) -> None:
    """The host was started anew, and somebody else was faster."""
    need(info, Cap.KEEP)
    one = await daemon.create()
    await daemon.deploy(one)
    await daemon.stop()
    with manager.open_partition(one) as handle:
        handle.shutdown(force=True)
    manager.destroy(one)
    manager.create(memory_bytes=SIZE, cpus=(1,), partition=one, name="web", flags=Flag.KEEP | Flag.NOFD)
    await daemon.start()
    assert "does not have the partition any more" in (await daemon.reaches(one, State.FAILED)).reason
    await daemon.service.shutdown(one)
    taken = rf"its memory is gone .*: the firmware has a partition {one} that is not vmand's; create another"
    with pytest.raises(NoCapacityError, match=taken):
        await daemon.deploy(one)
    await daemon.service.destroy(one)
    assert found(manager, one).name == "web"


async def test_a_partition_at_rest_comes_back_after_a_new_start_of_the_host(
    daemon: Daemon, manager: Manager, info: Info
) -> None:
    need(info, Cap.KEEP)
    kept, lost = await daemon.create(), await daemon.create(name="lost")
    before = {one: found(manager, one) for one in (kept, lost)}
    await daemon.stop()
    manager.destroy(lost)
    await daemon.start()
    await daemon.until(lambda: manager.next(kept) == lost)
    await daemon.deploy(lost)
    after = found(manager, lost)
    assert (after.uuid, after.cpus, after.memory_bytes) == (before[lost].uuid, before[lost].cpus, SIZE)
    assert found(manager, kept).generation == before[kept].generation  # it was not made anew


async def test_a_change(daemon: Daemon, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await daemon.create(name="a")
    before = found(manager, one)
    await change_partition(daemon.service, one, Change(name="b"))
    assert found(manager, one) == before
    changed = await change_partition(daemon.service, one, Change(memory_bytes=2 * SIZE, cores=2))
    after = found(manager, one)
    assert (after.memory_bytes, after.uuid, len(after.cpus)) == (2 * SIZE, before.uuid, 2)
    assert after.cpus == changed.cpus
    too_much = daemon.backend.memory_free() + 2 * SIZE
    monkeypatch.setattr(daemon.service.capacity, "memory_free", lambda **_options: 2 * too_much)
    with pytest.raises(NoCapacityError, match=r"memory: .* are left in all; the partition is as it was"):
        await change_partition(daemon.service, one, Change(memory_bytes=too_much + SIZE))
    again = found(manager, one)
    assert (again.memory_bytes, again.cpus) == (2 * SIZE, changed.cpus)
    await daemon.deploy(one)


async def test_a_killed_vmand_finds_its_guests(device: Device, manager: Manager, info: Info) -> None:
    """The daemon itself, by its own choice of the back end."""
    need(info, Cap.KEEP)
    with private_directory("eh-vm-") as directory, kernel() as file:
        vmand = PrivateVmand(directory, settings={"vmanager_device": str(device.path)})
        try:
            await vmand.start(timeout_s=PATIENCE_S)
            async with await vmand.client() as client:
                one = await client.create_partition(cores=1, memsize_gb=0.0625)
                await client.deploy(one, kernel=file.fd)
                before = await client.status(one)
            assert found(manager, one).state is vmanager.State.DEPLOYED
            await vmand.kill()
            await vmand.start(timeout_s=PATIENCE_S)
            async with await vmand.client() as client:
                assert await client.status(one) == before
                assert found(manager, one).boot_count == 1
                await client.shutdown(one, force=True)
                await client.destroy_partition(one)
            assert manager.next() is None
        finally:
            await vmand.stop()
            shutil.rmtree(vmand.memory, ignore_errors=True)


async def test_two_vmands_on_one_device(daemon: Daemon) -> None:
    if daemon.device.kind == "double":
        pytest.skip("the double's open files are not of one file")
    with pytest.raises(UnavailableError, match="another vmand uses"):
        VmanagerBackend(Config(vmanager_device=str(daemon.device.path)), pool=frozenset())


async def test_memory_is_clear_before_a_partition_has_it(daemon: Daemon, manager: Manager, info: Info) -> None:
    with make(manager, cpus=(info.cpus[-1],)) as handle, kernel() as file:
        handle.deploy(file.fd)
        handle.shutdown(force=True)
    manager.destroy(handle.id)
    one = await daemon.create(memory_bytes=MEMORY)
    assert Flag.DIRTY not in found(manager, one).flags
    await daemon.deploy(one)
    assert Flag.DIRTY in found(manager, one).flags
    await daemon.service.shutdown(one, force=True)
    await daemon.service.destroy(one)
    with make(manager) as handle:
        assert Flag.DIRTY not in handle.status().flags
    manager.destroy(handle.id)


@pytest.mark.usefixtures("only_the_double")
class TestFaults:
    """Any errno at any call, and calls that hang."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("_LOOK_S", "_GRADE_S", "_VERB_S", "_SPARE_S", "_SWEEP_S"):
            monkeypatch.setattr(f"vmand.backend.vmanager.{name}", 0.5)
        monkeypatch.setattr("vmand.backend.vmanager_found._STRANGERS_S", 0.5)
        monkeypatch.setattr("vmand.watch._LOOK_AGAIN_S", 0.05)
        monkeypatch.setattr("vmand.watch.ASK_EVERY_S", 0.1)

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EINVAL, errno.EFAULT, errno.EPERM])
    @pytest.mark.parametrize("after", [False, True])
    async def test_every_call(self, daemon: Daemon, manager: Manager, number: int, after: bool) -> None:
        """An error of ours each time, no bug; and what stands in the journal is what the firmware does."""
        service = daemon.service
        for name in ("CREATE", "OPEN", "STATUS", "DEPLOY", "SUSPEND", "RESTORE", "REBOOT", "SHUTDOWN", "DESTROY"):
            daemon.device.fail(name, number, after=after)
            one = 0
            with contextlib.suppress(EdgeholdError):
                one = await daemon.create()
                for command in (daemon.deploy, service.suspend, service.restore, service.reboot):
                    await command(one)
                await service.shutdown(one, force=True)
                await service.destroy(one)
            daemon.device.clear()
            for left in service.partitions():
                with contextlib.suppress(BadStateError):
                    await service.shutdown(left.id, force=True)
                await service.destroy(left.id)
            await daemon.until(lambda: manager.next() is None)

    async def test_a_firmware_that_hangs_is_reported_and_nothing_else_waits(self, daemon: Daemon, info: Info) -> None:
        need(info, Cap.SUSPEND)
        one, two = await daemon.create(), await daemon.create()
        for partition in (one, two):
            await daemon.deploy(partition)
        daemon.device.hang("SUSPEND")
        with pytest.raises(TimedOutError, match="suspend of partition 1: the firmware does not answer"):
            await daemon.service.suspend(one)
        assert (await daemon.service.suspend(two)).state is State.SUSPENDED
        daemon.device.clear()
        daemon.device.hang("STATUS", at=0)
        await daemon.until(lambda: "does not answer" in daemon.service.status(one).reason)
        assert daemon.backend._calls._threads < 12
        daemon.device.clear()
        await daemon.until(lambda: daemon.service.status(one).reason == "")
        assert daemon.service.status(one).state is State.DEPLOYED

    async def test_a_late_answer_counts(self, daemon: Daemon, info: Info) -> None:
        need(info, Cap.SUSPEND)
        one = await daemon.create()
        await daemon.deploy(one)
        daemon.device.hang("SUSPEND", after=True)
        with pytest.raises(TimedOutError):
            await daemon.service.suspend(one)
        await daemon.reaches(one, State.SUSPENDED)

    async def test_a_start_with_a_firmware_that_hangs(self, daemon: Daemon, info: Info) -> None:
        need(info, Cap.KEEP)
        one = await daemon.create()
        await daemon.deploy(one)
        await daemon.stop()
        daemon.device.hang("STATUS", at=0)
        await daemon.start()
        status = daemon.service.status(one)
        assert (status.state, "at vmand's start" in status.reason) == (State.DEPLOYED, True)
        daemon.device.clear()
        await daemon.until(lambda: daemon.service.status(one).reason == "")

    async def test_events_that_can_t_be_read_any_more(
        self, daemon: Daemon, manager: Manager, info: Info, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need(info, Cap.EVENTS)

        def fail() -> list[vmanager.Event]:
            raise OSError(errno.EIO, "gone")

        one = await daemon.create()
        await daemon.deploy(one)
        monkeypatch.setattr(daemon.backend._manager, "read_events", fail)
        for _ in range(2):
            with manager.open_partition(one) as handle:
                handle.shutdown(force=True)
            await daemon.reaches(one, State.READY)
            await daemon.deploy(one)
