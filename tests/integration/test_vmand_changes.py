"""What vmand has for a driver above it, with QEMU: annotations, paused starts, shutdowns that never force, changes."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edgehold.api.vmand import Event, Mode, State, VmandClient, wait_for_state
from edgehold.errors import BadRequestError, BadStateError, NoCapacityError, TimedOutError
from edgehold.testing.load import eventually
from edgehold.testing.partitions import PrivateVmand

BOOT_S = 60.0
CMDLINE = "quiet no_timer_check tsc=reliable panic=-1"
JOB = f"{CMDLINE} edgehold.job_ms=1 edgehold.period_ms=50"
# Nobody reads the power button: the kernel waits for a root file system.
DEAF = f"{CMDLINE} rootwait root=/dev/none"
UP = "edgehold-guest up"
UUID = "5f0f2f5c-8a51-4f0e-9e5e-0d8f5a0c7b11"


async def printed(client: VmandClient, pattern: str, seen: str = "") -> re.Match[str]:
    """Until a guest to whose console ``client`` listens has printed this."""
    async with asyncio.timeout(BOOT_S):
        async for event in client.events():
            seen += event.text
            if found := re.search(pattern, seen):
                return found
    raise AssertionError(seen)


@pytest.fixture
async def one(client: VmandClient) -> int:
    """A READY partition."""
    return await client.create_partition(cores=1, memsize_gb=0.125, mode=Mode.SHARED, name="one")


@pytest.fixture
async def listener(vmand: PrivateVmand, one: int) -> AsyncIterator[VmandClient]:
    """A conversation that hears the partition's console."""
    async with await vmand.client() as client:
        await client.subscribe(one, console=True)
        yield client


async def test_annotations_outlive_vmand(vmand: PrivateVmand) -> None:
    heard: list[Event] = []
    async with await VmandClient.connect(vmand.socket, on_event=heard.append) as client:
        await client.subscribe()
        options = {"cores": 1, "memsize_gb": 0.0625, "mode": Mode.SHARED, "uuid": UUID}
        one = await client.create_partition(**options, annotations={"libvirt.xml": "<domain/>"})  # type: ignore[arg-type]
        assert (await client.status(one)).uuid == UUID
        with pytest.raises(BadRequestError, match=f"uuid: {UUID} is another partition's"):
            await client.create_partition(**options)  # type: ignore[arg-type]
        await client.annotate(one, {"libvirt.autostart": "yes", "libvirt.xml": "<domain>ü\n</domain>" * 2000})
        assert [event.kind for event in heard] == ["state", "annotated"]
        assert heard[-1].now == await client.status(one)
    await vmand.kill()
    await vmand.start()
    async with await vmand.client() as client:
        kept = {"libvirt.autostart": "yes", "libvirt.xml": "<domain>ü\n</domain>" * 2000}
        assert await client.annotations(one) == kept
        await client.annotate(one, dict.fromkeys(kept))
        assert await client.annotations(one) == {}


async def test_a_paused_start(vmand: PrivateVmand, client: VmandClient, one: int, image: tuple[Path, Path]) -> None:
    """Loaded and not begun: the console is silent, also over vmand's end, until it is restored."""
    assert "paused" in (await client.capabilities()).supports
    await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=CMDLINE, paused=True)
    status = await client.status(one)
    assert (status.state, status.boot_count, status.reason) == (State.SUSPENDED, 1, "")
    assert status.pid in vmand.guests()
    await vmand.kill()
    await vmand.start()
    async with await vmand.client() as again:
        status = await again.status(one)
        assert (status.state, status.pid in vmand.guests()) == (State.SUSPENDED, True)
        assert await again.console(one) == ""
        with pytest.raises(BadStateError):
            await again.suspend(one)
        seen = await again.subscribe(one, console=True)
        await again.restore(one)
        assert (await again.status(one)).state is State.DEPLOYED
        await printed(again, UP, seen)
        await again.shutdown(one, timeout_s=20)
        assert (await again.status(one)).reason == ""


@pytest.mark.parametrize("state", [State.DEPLOYED, State.SUSPENDED])
async def test_a_shutdown_that_leaves(
    vmand: PrivateVmand, client: VmandClient, one: int, image: tuple[Path, Path], state: State
) -> None:
    await client.deploy(one, kernel=image[0], cmdline=DEAF)
    if state is State.SUSPENDED:
        await client.suspend(one)
    pid = (await client.status(one)).pid
    with pytest.raises(TimedOutError, match=rf"did not power off within 0\.3 s; it goes on, and is {state.value}"):
        await client.shutdown(one, timeout_s=0.3, leave=True)
    status = await client.status(one)
    assert (status.state, status.pid, status.reason) == (state, pid, "")
    # vmand ends in the middle of one: the guest is not ended by the next start, as another shutdown's would be.
    waits = asyncio.create_task(client.shutdown(one, timeout_s=600, leave=True))
    async with await vmand.client() as other:
        await wait_for_state(other, one, State.BUSY, timeout_s=BOOT_S)
    await vmand.kill()
    await asyncio.gather(waits, return_exceptions=True)
    await vmand.start()
    async with await vmand.client() as again:
        status = await again.status(one)
        assert (status.state in {State.DEPLOYED, state}, status.pid) == (True, pid)
        assert vmand.guests() == [pid]
        hurried = asyncio.create_task(again.shutdown(one, timeout_s=600, leave=True))
        async with await vmand.client() as other:
            await wait_for_state(other, one, State.BUSY, timeout_s=BOOT_S)
            await other.shutdown(one, force=True)
        await hurried
        assert (await again.status(one)).state is State.READY


async def test_a_shutdown_that_leaves_is_obeyed(
    client: VmandClient, one: int, listener: VmandClient, image: tuple[Path, Path]
) -> None:
    await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=CMDLINE)
    await printed(listener, UP)
    await client.shutdown(one, timeout_s=BOOT_S, leave=True)
    status = await client.status(one)
    assert (status.state, status.reason) == (State.READY, "")


async def test_a_changed_partition_is_another_for_its_guest(
    vmand: PrivateVmand, client: VmandClient, one: int, listener: VmandClient, image: tuple[Path, Path]
) -> None:
    before = await client.status(one)
    memory = vmand.memory / f"{before.uuid}.mem"
    inode = memory.stat().st_ino
    changed = await client.change_partition(one, name="two", annotations={"a": "1"})
    assert (changed.name, changed.uuid, changed.id) == ("two", before.uuid, one)
    assert memory.stat().st_ino == inode  # nothing is given back for that
    changed = await client.change_partition("two", cores=2, memsize_gb=0.25)
    assert (changed.cores, changed.memory_bytes) == (2, 256 << 20)
    assert memory.stat().st_blocks * 512 == 256 << 20
    with pytest.raises(NoCapacityError, match=r"memory: 65\d+ MiB are wanted and \d+ MiB are left"):
        await client.change_partition(one, name="three", memsize_gb=64 * 1000)
    assert await client.status(one) == changed
    assert await client.annotations(one) == {"a": "1"}
    await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=CMDLINE.removeprefix("quiet "))
    found = await printed(listener, r"Memory: \d+K/(\d+)K available[\s\S]* (\d) CPUs?\b[\s\S]*" + UP)
    assert 240 << 10 < int(found[1]) <= 256 << 10
    assert len(await client.vcpus(one)) == int(found[2]) == 2
    with pytest.raises(BadStateError, match="is DEPLOYED; change-partition needs READY"):
        await client.change_partition(one, name="three")


async def test_memory_comes_back(vmand: PrivateVmand, client: VmandClient, one: int, image: tuple[Path, Path]) -> None:
    """As after a new start of the host: no guest, and no memory."""
    two = await client.create_partition(cores=1, memsize_gb=0.0625, mode=Mode.SHARED)
    await client.deploy(two, kernel=image[0], initrd=image[1], cmdline=JOB)
    before = {each.id: each for each in await client.list_partitions()}
    await vmand.kill()
    vmand.end_guests()
    for file in vmand.memory.glob("*.mem"):
        file.unlink()
    await vmand.start()
    async with await vmand.client() as again:

        def there() -> bool:
            return len(list(vmand.memory.glob("*.mem"))) == len(before)

        await asyncio.to_thread(eventually, there, timeout_s=BOOT_S, what="memory is taken anew")
        await wait_for_state(again, two, State.FAILED, timeout_s=BOOT_S)
        await again.shutdown(two)
        for each in (one, two):
            await again.deploy(each, kernel=image[0], initrd=image[1], cmdline=JOB)
            after = await again.status(each)
            assert (after.state, after.memory_bytes) == (State.DEPLOYED, before[each].memory_bytes)
            assert after.memory_grade is before[each].memory_grade
        await again.shutdown(one, force=True)
        (vmand.memory / f"{before[one].uuid}.mem").unlink()  # somebody else's doing: deploy looks too
        await again.deploy(one, kernel=image[0], initrd=image[1], cmdline=JOB)


async def test_the_hypervisor_is_named(client: VmandClient) -> None:
    assert re.fullmatch(r"QEMU \d+\.\d+\.\d+", (await client.capabilities()).hypervisor)
