"""What OpenStack Nova's libvirt driver wrote for two instances, and the calls that it made of it, in its order.

``tests/captures/nova-VERSION.xml`` is what Nova itself gave to virDomainDefineXML while its driver ran an instance on
``vman:///system`` from spawn to destroy: 32.2.1 (machine q35, guest agent, a swap disk) and 29.4.0 (a port in a Linux
bridge). Only the directory of the instances was renamed.
"""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from edgehold.api.vmand import Mode, Nic, State
from edgehold.testing.capability import need_root
from edgehold.testing.partitions import PrivateVmand
from edgehold.testing.virtvmand import PrivateVirtvmand, private_virtvmand
from tests.libvirt.guest import POWER_OFF, UP, printed
from tests.libvirt.python import LIFECYCLE, LibvirtPython, RefusedError, libvirt_python, need_libvirt_python
from virtvmand.domxml import read_definition

CAPTURES = Path(__file__).parents[1] / "captures"
VERSIONS = ("29.4.0", "32.2.1")
UUID = "5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11"
NAME = "instance-00000007"
DIRECTORY = f"/var/lib/nova/instances/{UUID}"
NAMESPACE = "http://openstack.org/xmlns/libvirt/nova/1.1"
RUNNING, PAUSED, SHUT_OFF = 1, 3, 5
STARTED, SUSPENDED, RESUMED, STOPPED = 2, 3, 4, 5
"""virDomainState and virDomainEventType."""
CODES = {"gone": 42, "not possible": 84}
LIVE_AND_CONFIG, MANAGED_SAVE = 3, 1
MIB = 1 << 20


def captured(version: str) -> str:
    """Nova's own text."""
    return (CAPTURES / f"nova-{version}.xml").read_text(encoding="utf-8")


@pytest_asyncio.fixture
async def daemon(vmand: PrivateVmand) -> AsyncIterator[PrivateVirtvmand]:
    """In front of the test's vmand. Nova says nothing about cores; the settings do."""
    need_root()
    async with private_virtvmand(vmand, settings={"mode": "shared"}) as one:
        yield one
        assert "Traceback" not in one.log_text()


@pytest_asyncio.fixture
async def python(daemon: PrivateVirtvmand) -> AsyncIterator[LibvirtPython]:
    """A client's process that is connected and hears of events."""
    need_libvirt_python()
    async with libvirt_python() as one:
        await one.do("open", uri=daemon.uri, name="c")
        await one.do("listen", on="c", event=LIFECYCLE)
        yield one


def test_what_nova_means() -> None:
    plan = read_definition(captured("29.4.0")).plan
    assert (plan.name, plan.uuid, plan.cores, plan.memory_bytes) == (NAME, UUID, 1, 256 * MIB)
    assert (plan.kernel, plan.initrd) == (f"{DIRECTORY}/kernel", f"{DIRECTORY}/ramdisk")
    assert [(one.path, one.format) for one in plan.disks] == [(f"{DIRECTORY}/disk", "raw")]
    assert plan.nics == (Nic(bridge="brq3f1a2b4c-00", mac="fa:16:3e:aa:bb:cc"),)
    assert not plan.agent
    plan = read_definition(captured("32.2.1")).plan
    assert [one.path for one in plan.disks] == [f"{DIRECTORY}/disk", f"{DIRECTORY}/disk.swap"]
    assert plan.agent
    assert not plan.nics


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_instance_from_spawn_to_destroy(
    version: str, vmand: PrivateVmand, python: LibvirtPython, image: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("disk", "disk.swap"):
        (tmp_path / name).write_bytes(bytes(MIB))
    xml = captured(version).replace(f"{DIRECTORY}/kernel", str(image[0])).replace(f"{DIRECTORY}/ramdisk", str(image[1]))
    xml = xml.replace(DIRECTORY, str(tmp_path))
    # The bridge is not here; with it the port is in the definition, as the test above has it.
    xml = re.sub(r"<interface.*</interface>", "", xml, flags=re.DOTALL)

    async def state() -> int:
        await python.call("c", "lookupByUUIDString", UUID, name="d")
        return int((await python.call("d", "info"))[0])

    async def create() -> None:
        await python.call("c", "defineXML", xml, name="d")
        shown = await python.call("d", "XMLDesc", 0)
        assert re.sub(r" *<edgehold:partition [^\n]*\n", "", shown) == xml
        await python.call("d", "createWithFlags", 0)
        assert await state() == RUNNING

    async def off(times: int) -> None:
        def stops(events: list[list[object]]) -> bool:
            return sum(one[:5] == ["domain", "c", LIFECYCLE, NAME, STOPPED] for one in events) >= times

        await python.until(stops, f"{times} stops did not come")
        assert await state() == SHUT_OFF

    await create()
    async with await vmand.client() as client:
        partition = await client.status(NAME)
    assert (partition.state, partition.mode, partition.cores) == (State.DEPLOYED, Mode.SHARED, 1)
    assert f'version="{version}"' in await python.call("d", "metadata", 2, NAMESPACE, 0)
    assert f"id='{partition.id}'" in (await python.call("d", "XMLDesc", 0)).replace('"', "'")
    await printed(vmand, NAME)

    await python.call("d", "suspend")
    assert await state() == PAUSED
    await python.call("d", "resume")
    assert await state() == RUNNING
    with pytest.raises(RefusedError) as caught:
        await python.call("d", "attachDeviceFlags", "<disk/>", LIVE_AND_CONFIG)
    assert caught.value.code == CODES["not possible"]

    # Soft reboot: off, and started with the definition that is there.
    await python.call("d", "shutdown")
    await off(1)
    await python.call("d", "createWithFlags", 0)
    assert POWER_OFF not in await printed(vmand, NAME, UP)  # what it has printed since this start

    # Hard reboot: all of it anew.
    await python.call("d", "destroy")
    await off(2)
    await python.call("d", "undefineFlags", MANAGED_SAVE)
    await create()
    await printed(vmand, NAME)

    await python.call("d", "destroy")
    await off(3)
    await python.call("d", "undefineFlags", MANAGED_SAVE)
    with pytest.raises(RefusedError) as caught:
        await state()
    assert caught.value.code == CODES["gone"]
    assert vmand.remains() == []
