"""What vmand has for a driver above it: annotations, a paused start, a shutdown that never forces, changes, with QEMU."""

import os
import signal
from pathlib import Path

import pytest

from edgehold.api.vmand import Event, Mode, State, VmandClient
from edgehold.errors import BadRequestError, BadStateError
from edgehold.testing.partitions import PrivateVmand

BOOT_S = 60.0
CMDLINE = "quiet no_timer_check tsc=reliable panic=-1"
UP = "edgehold-guest up"
UUID = "5f0f2f5c-8a51-4f0e-9e5e-0d8f5a0c7b11"


async def printed(client: VmandClient, text: str, seen: str = "") -> str:
    """Until a guest that ``client`` listens to has printed this."""
    import asyncio

    async with asyncio.timeout(BOOT_S):
        async for event in client.events():
            seen += event.text
            if text in seen:
                return seen
    raise AssertionError(seen)


async def test_annotations_outlive_vmand(vmand: PrivateVmand) -> None:
    heard: list[Event] = []
    async with await VmandClient.connect(vmand.socket, on_event=heard.append) as client:
        await client.subscribe()
        one = await client.create_partition(
            cores=1, memsize_gb=0.0625, mode=Mode.SHARED, uuid=UUID, annotations={"libvirt.xml": "<domain/>"}
        )
        assert (await client.status(one)).uuid == UUID
        with pytest.raises(BadRequestError, match=f"uuid: {UUID} is another partition's"):
            await client.create_partition(cores=1, memsize_gb=0.0625, mode=Mode.SHARED, uuid=UUID)
        await client.annotate(one, {"libvirt.autostart": "yes", "libvirt.xml": "<domain>ü\n</domain>"})
        assert [event.kind for event in heard] == ["state", "annotated"]
        assert heard[-1].now == await client.status(one)
    os.kill(vmand.pid, signal.SIGKILL)
    await vmand.kill()
    await vmand.start()
    async with await vmand.client() as client:
        kept = {"libvirt.autostart": "yes", "libvirt.xml": "<domain>ü\n</domain>"}
        assert await client.annotations(one) == kept
        await client.annotate(one, {"libvirt.autostart": None})
        assert await client.annotations(UUID if False else one) == {"libvirt.xml": kept["libvirt.xml"]}


async def test_a_paused_start(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    """Loaded, and not begun: the console is silent, also over vmand's end, until it is restored."""
    async with await vmand.client() as client:
        assert "paused" in (await client.capabilities()).supports
        one = await client.create_partition(cores=1, memsize_gb=0.125, mode=Mode.SHARED)
        await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=CMDLINE, paused=True)
        status = await client.status(one)
        assert (status.state, status.boot_count, status.reason) == (State.SUSPENDED, 1, "")
        assert status.pid in vmand.guests()
    await vmand.kill()
    await vmand.start()
    async with await vmand.client() as client:
        status = await client.status(one)
        assert (status.state, status.pid in vmand.guests()) == (State.SUSPENDED, True)
        assert await client.console(one) == ""
        with pytest.raises(BadStateError):
            await client.suspend(one)
        seen = await client.subscribe(one, console=True)
        await client.restore(one)
        assert (await client.status(one)).state is State.DEPLOYED
        await printed(client, UP, seen)
        await client.shutdown(one, timeout_s=20)
        assert (await client.status(one)).reason == ""
