"""Devices that are attached, detached and updated: a definition changes as a whole, and no guest does."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from edgehold.api.vmand import Mode
from tests.unit.virtvmand_house import House, house
from virtvmand.devedit import with_device

INVALID_ARG, XML, INVALID, CONFIG_UNSUPPORTED, UNSUPPORTED, MISSING = 8, 27, 55, 67, 84, 99
CURRENT, LIVE, CONFIG, FORCE = 0, 1, 2, 4
INACTIVE = 2
NIC = "<interface type='bridge'><mac address='52:54:00:00:00:31'/><source bridge='br0'/></interface>"
VSOCK = "<vsock model='virtio'><cid auto='yes'/></vsock>"
WITH_FLAGS = ("domain_attach_device_flags", "domain_detach_device_flags", "domain_update_device_flags")
WITHOUT = ("domain_attach_device", "domain_detach_device")


@pytest_asyncio.fixture
async def one(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as made:
        await made.call("connect_domain_event_callback_register_any", 0, None)
        yield made


def disk(one: House, name: str, target: str = "vdb") -> str:
    """A disk whose image is there."""
    path = one.directory / name
    path.write_bytes(bytes(1 << 20))
    return f"<disk type='file' device='disk'><source file='{path}'/><target dev='{target}' bus='virtio'/></disk>"


@pytest.mark.parametrize("flags", [CURRENT, CONFIG])
async def test_of_a_domain_that_is_off(one: House, flags: int) -> None:
    dom = await one.define()
    xml, device = await one.call("domain_get_xml_desc", dom, 0), disk(one, "a")
    one.told()
    await one.call("domain_attach_device_flags", dom, device, flags)
    more = await one.call("domain_get_xml_desc", dom, 0)
    assert more == with_device(xml, device)
    assert one.told() == [("web", 0, 1)]
    assert (await one.refused("domain_attach_device_flags", dom, device, flags))[0] == INVALID
    await one.call("domain_update_device_flags", dom, device.replace("<target", "<readonly/><target"), flags | FORCE)
    assert "<readonly/>" in await one.call("domain_get_xml_desc", dom, 0)
    await one.call("domain_update_device_flags", dom, device, flags)
    assert await one.call("domain_get_xml_desc", dom, 0) == more
    await one.again()
    await one.call("domain_detach_device_flags", dom, device, flags)
    assert await one.call("domain_get_xml_desc", dom, 0) == xml
    assert (await one.refused("domain_detach_device_flags", dom, device, flags))[0] == MISSING
    assert (await one.refused("domain_update_device_flags", dom, device, flags))[0] == MISSING


async def test_of_a_domain_that_runs_it_is_for_the_next_start(one: House) -> None:
    dom = await one.define(rest=disk(one, "a", "vda"))
    await one.call("domain_create", dom)
    live, inactive = await one.call("domain_get_xml_desc", dom, 0), await one.call("domain_get_xml_desc", dom, INACTIVE)
    device = disk(one, "b")
    await one.call("domain_attach_device_flags", dom, device, CONFIG)
    assert await one.call("domain_get_xml_desc", dom, 0) == live
    more = with_device(inactive, device)
    assert await one.call("domain_get_xml_desc", dom, INACTIVE) == more
    assert await one.call("domain_is_updated", dom) == 1
    await one.again()
    assert await one.call("domain_get_xml_desc", dom, 0) == live
    await one.call("domain_destroy", dom)
    assert await one.call("domain_get_xml_desc", dom, 0) == more
    await one.call("domain_create", dom)
    (_, _, first), (_, _, second) = one.backend.started
    assert first == (str(one.directory / "a"),)
    assert second == (str(one.directory / "a"), str(one.directory / "b"))
    await one.call("domain_detach_device_flags", dom, device, CONFIG)
    assert await one.call("domain_get_xml_desc", dom, INACTIVE) == inactive


@pytest.mark.parametrize("flags", [CURRENT, LIVE, LIVE | CONFIG])
@pytest.mark.parametrize("name", WITH_FLAGS)
async def test_what_a_guest_has_stays(one: House, name: str, flags: int) -> None:
    """As a whole: the definition does not change either."""
    dom = await one.define(rest=disk(one, "a", "vda"))
    await one.call("domain_create", dom)
    before = dict(one.domain().annotations)
    for device in (disk(one, "a", "vda"), NIC, VSOCK, "<disk/>", "no device"):
        code, text = await one.refused(name, dom, device, flags)
        assert (code, "--config" in text) == (UNSUPPORTED, True)
    assert one.domain().annotations == before


@pytest.mark.parametrize("name", WITHOUT)
async def test_without_flags_the_guest_is_meant(one: House, name: str) -> None:
    dom = await one.define()
    assert await one.refused(name, dom, VSOCK) == (INVALID, "domain 'web' is not running")
    await one.call("domain_create", dom)
    assert (await one.refused(name, dom, VSOCK))[0] == UNSUPPORTED


@pytest.mark.parametrize("name", WITH_FLAGS)
async def test_where_no_guest_runs(one: House, name: str) -> None:
    dom = await one.define()
    for flags in (LIVE, LIVE | CONFIG):
        assert await one.refused(name, dom, VSOCK, flags) == (INVALID, "domain 'web' is not running")
    assert (await one.refused(name, dom, VSOCK, 8))[0] == INVALID_ARG
    if name != "domain_update_device_flags":
        assert (await one.refused(name, dom, VSOCK, FORCE))[0] == INVALID_ARG


@pytest.mark.parametrize("name", WITH_FLAGS)
async def test_a_transient_domain_has_no_definition(one: House, name: str) -> None:
    dom = await one.call("domain_create_xml", one.xml(), 0)
    code, text = await one.refused(name, dom, VSOCK, CONFIG)
    assert (code, "transient" in text) == (INVALID, True)


async def test_what_no_partition_can_have_changes_nothing(one: House) -> None:
    dom = await one.define()
    before = dict(one.domain().annotations)
    for device, wanted in (
        ("<disk type='network'><source/><target dev='vdb'/></disk>", CONFIG_UNSUPPORTED),
        ("<graphics type='vnc'/>", CONFIG_UNSUPPORTED),
        ("<rng model='virtio'/>", UNSUPPORTED),
        ("<disk type='file'><target dev='vdb'/></disk>", XML),
        ("<disk", XML),
        (f"<vsock><cid auto='yes'/>{' ' * 44_900}</vsock>", XML),  # too long only with the rest
    ):
        assert (await one.refused("domain_attach_device_flags", dom, device, CONFIG))[0] == wanted, device
    assert one.domain().annotations == before


async def test_an_address_is_made_as_a_definition_makes_it(one: House) -> None:
    dom = await one.define()
    await one.call("domain_attach_device_flags", dom, NIC, CONFIG)
    await one.call("domain_attach_device_flags", dom, "<interface type='bridge'><source bridge='br1'/></interface>", 2)
    xml = await one.call("domain_get_xml_desc", dom, 0)
    nics = one.domain().config.plan.nics
    assert [nic.bridge for nic in nics] == ["br0", "br1"]
    assert all(f"<mac address='{nic.mac}'/>" in xml for nic in nics)
    await one.again()
    assert one.domain().config.plan.nics == nics


async def test_a_partition_that_another_tool_made_gets_a_definition(one: House) -> None:
    await one.mirror.vmand.create_partition(cores=1, memsize_gb=1 / 16, mode=Mode.SHARED, name="plain")
    await one.until(lambda: any(each.name == "plain" for each in one.mirror.all()))
    dom = await one.call("domain_lookup_by_name", "plain")
    await one.call("domain_attach_device_flags", dom, VSOCK, CURRENT)
    assert VSOCK in await one.call("domain_get_xml_desc", dom, 0)


async def test_many_at_once_are_all_there(one: House) -> None:
    dom = await one.define()
    devices = [disk(one, name, f"vd{name}") for name in "abcdefgh"]
    async with asyncio.TaskGroup() as tasks:
        for device in devices:
            tasks.create_task(one.call("domain_attach_device_flags", dom, device, CONFIG))
    assert len(one.domain().config.plan.disks) == len(devices)
