"""The mirror and a real vmand: what happens to partitions, and what a killed or stopped vmand leaves known."""

import asyncio
import os
import signal
import uuid
from pathlib import Path

import pytest

from edgehold.api.vmand import Mode, State, VmandClient
from edgehold.testing.partitions import PrivateVmand
from tests.unit.virtvmand_fake import PATIENCE_S, followed, until
from virtvmand import following
from virtvmand.domain import AUTOSTART, LIVE, TRANSIENT, XML, YES

CMDLINE = "quiet no_timer_check tsc=reliable panic=-1"
SMALL_GIB = 1 / 64


def definition(name: str, one: str, *, kernel: str = "/k") -> str:
    return (
        f"<domain type='vman'><name>{name}</name><uuid>{one}</uuid><memory>16384</memory><vcpu>1</vcpu>"
        f"<os><type>hvm</type><kernel>{kernel}</kernel></os></domain>"
    )


async def create(client: VmandClient, name: str, *, memsize_gb: float = SMALL_GIB, **notes: str) -> int:
    own = str(uuid.uuid4())
    annotations = {XML: definition(name, own), **{key.replace("_", "."): one for key, one in notes.items()}}
    return await client.create_partition(
        cores=1, memsize_gb=memsize_gb, mode=Mode.SHARED, name=name, uuid=own, annotations=annotations
    )


async def test_definitions(vmand: PrivateVmand, client: VmandClient) -> None:
    async with followed(vmand.socket) as driver:
        mine = driver.mirror.vmand
        one = await create(mine, "one")
        domain = await driver.mirror.refresh(one)
        assert (domain.name, domain.persistent, domain.config.plan.kernel) == ("one", True, "/k")
        assert driver.heard == ["one defined:0"]

        other = domain.config.xml.replace(">/k<", ">/other<")
        await mine.annotate(one, {XML: other, AUTOSTART: YES})
        domain = await driver.mirror.refresh(one)
        assert (domain.config.plan.kernel, domain.autostart) == ("/other", True)

        renamed = other.replace(">one<", ">two<")
        await mine.change_partition(one, name="two", memsize_gb=2 * SMALL_GIB, annotations={XML: renamed})
        domain = await driver.mirror.refresh(one)
        assert (domain.name, domain.partition.memory_bytes, domain.config.xml) == ("two", 32 << 20, renamed)
        assert driver.heard == ["one defined:0", "one defined:1", "one undefined:1", "two defined:2"]

        # What somebody else does without us, by vmanctl for example.
        driver.heard.clear()
        plain = await client.create_partition(cores=1, memsize_gb=SMALL_GIB, mode=Mode.SHARED, name="plain")
        await until(lambda: len(driver.mirror.all()) == 2)
        assert driver.mirror.by_name("plain").config.plan.cores == 1
        await client.annotate(one, {TRANSIENT: YES})
        await until(lambda: not driver.mirror.by_name("two").persistent)
        await client.destroy_partition(one)
        await client.destroy_partition(plain)
        await until(lambda: not driver.mirror.all())
        assert driver.heard == ["plain defined:0", "two undefined:0", "plain undefined:0"]
        assert (await driver.mirror.host()).backend == "qemu"


async def test_a_guest_and_a_killed_vmand(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    kernel, initrd = image
    async with followed(vmand.socket) as driver:
        mine = driver.mirror.vmand
        one = await create(mine, "one", memsize_gb=0.125, **{LIVE: "no XML"})
        await driver.mirror.refresh(one)
        await mine.deploy(one, kernel=kernel, initrd=initrd, cmdline=CMDLINE, paused=True)
        domain = driver.mirror.by_id(one)
        assert domain.state == (3, 1)
        await mine.restore(one)
        assert driver.mirror.by_id(one).state == (1, 5)
        await mine.reboot(one)
        assert driver.mirror.by_id(one).state == (1, 1)
        await mine.suspend(one)
        assert driver.mirror.by_id(one).state == (3, 1)
        assert driver.heard == [
            "one defined:0",
            "one started:0",
            "one suspended:0",
            "one resumed:0",
            "one reboot",
            "one suspended:0",
        ]
        driver.heard.clear()

        before = driver.mirror.by_id(one)
        await vmand.kill()
        await driver.until_away()
        await vmand.start()
        await driver.mirror.ready(PATIENCE_S)
        assert driver.mirror.by_id(one).partition == before.partition
        assert driver.mirror.by_id(one).config is before.config
        assert driver.heard == []

        await vmand.kill()
        await driver.until_away()
        (pid,) = vmand.guests()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: vmand.guests() == [])
        await vmand.start()
        await driver.mirror.ready(PATIENCE_S)
        await until(lambda: driver.mirror.by_name("one").partition.state is State.FAILED)
        assert driver.mirror.by_name("one").state == (5, 3)
        assert driver.heard == ["one stopped:2"]

        driver.heard.clear()
        mine = driver.mirror.vmand
        await mine.shutdown(one)
        assert driver.mirror.by_name("one").state == (5, 3)
        await mine.deploy(one, kernel=kernel, initrd=initrd, cmdline=CMDLINE)
        driver.mirror.intend_destroy(before.uuid)
        await mine.shutdown(one, force=True)
        assert driver.mirror.by_name("one").state == (5, 2)
        await mine.destroy_partition(one)
        assert driver.mirror.all() == []
        assert driver.heard == ["one started:0", "one stopped:1", "one undefined:0"]


async def test_a_stopped_vmand_is_away(
    vmand: PrivateVmand, client: VmandClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_ASK_EVERY_S", 0.05)
    monkeypatch.setattr(following, "_ANSWER_S", 1.0)
    await create(client, "one")
    async with followed(vmand.socket) as driver:
        os.kill(vmand.pid, signal.SIGSTOP)
        try:
            assert "it does not answer within 1 s" in await driver.until_away()
        finally:
            os.kill(vmand.pid, signal.SIGCONT)
        await driver.mirror.ready(PATIENCE_S)
        assert [one.name for one in driver.mirror.all()] == ["one"]
        assert driver.heard == []


async def test_many_at_once(vmand: PrivateVmand, client: VmandClient) -> None:
    """Partitions come, are annotated and go while the mirror meets vmand again and again."""
    async with followed(vmand.socket) as driver:

        async def live(number: int) -> None:
            for turn in range(3):
                one = await create(client, f"d{number}-{turn}")
                await client.annotate(one, {LIVE: str(turn)})
                await client.annotate(one, {LIVE: None, AUTOSTART: YES})
                if turn < 2:
                    await client.destroy_partition(one)

        await asyncio.gather(*(live(number) for number in range(5)))
        there = {one.id: one for one in await client.list_partitions()}
        await until(lambda: {one.partition.id for one in driver.mirror.all()} == there.keys())
        await until(lambda: all(one.autostart and LIVE not in one.annotations for one in driver.mirror.all()))
        async with followed(vmand.socket) as second:
            assert [one.partition for one in second.mirror.all()] == [one.partition for one in driver.mirror.all()]
        assert sorted(one for one in driver.heard if "defined:0" in one and "un" not in one) == sorted(
            f"d{number}-{turn} defined:0" for number in range(5) for turn in range(3)
        )
