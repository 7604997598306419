"""Each call does what libvirt's clients expect, on a real vmand service: definitions, runs, refusals, events."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from edgehold.api.vmand import Mode, State, Vcpu
from edgehold.errors import BadStateError, FailedError
from tests.unit.virtvmand_house import UUID, House, house, read
from virtvmand import keeper
from virtvmand.driver import refused
from virtvmand.table import PROCEDURES
from vmand.model import Found, Record

OTHER = "11111111-2222-4333-8444-555555555555"
INVALID_ARG, FAILED, DENIED, NO_DOMAIN, INVALID, CONFIG, ARGUMENT, NO_METADATA, UNSUPPORTED = (
    8,
    9,
    29,
    42,
    55,
    67,
    74,
    80,
    84,
)
ADDED, UPDATED, UNDEFINED, STARTED = (0, 0), (0, 1), (1, 0), (2, 0)
SUSPENDED, RESUMED, SHUT, DESTROYED, CRASHED, FINISHED = (3, 0), (4, 0), (5, 0), (5, 1), (5, 2), (6, 0)


@pytest_asyncio.fixture
async def one(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as made:
        await made.call("connect_domain_event_callback_register_any", 0, None)
        yield made


def events(one: House) -> list[tuple[int, int]]:
    return [(event, detail) for _name, event, detail in one.told()]


async def test_every_call_of_the_table_is_handled_or_known_not_to_be(one: House) -> None:
    unhandled = {
        "domain_get_autostart_once",
        "domain_set_autostart_once",
        "connect_baseline_cpu",
        "connect_compare_cpu",
        "domain_get_emulator_pin_info",
        "domain_get_job_stats",  # clients ask domain_get_job_info next
        "domain_get_scheduler_type",
        "domain_get_scheduler_parameters_flags",
    }
    handled = {PROCEDURES[number].name for number in one.driver.handlers}
    assert handled | unhandled == {each.name for each in PROCEDURES.values() if not each.event}
    assert not handled & unhandled


async def test_define_reserves_and_keeps_the_document_as_it_was_written(one: House) -> None:
    dom = await one.define()
    assert (dom.name, dom.id) == ("web", -1)
    assert await one.call("domain_get_xml_desc", dom, 0) == one.xml()
    partition = one.domain().partition
    assert (partition.uuid, partition.memory_bytes, partition.state) == (UUID, 64 << 20, State.READY)
    assert await one.call("domain_get_state", dom, 0) == (5, 0)
    assert events(one) == [ADDED]
    await one.again()
    assert await one.call("domain_get_xml_desc", dom, 0) == one.xml()


async def test_define_without_uuid_makes_one_that_stays(one: House) -> None:
    dom = await one.call("domain_define_xml", one.xml().replace(f"  <uuid>{UUID}</uuid>\n", ""))
    shown = await one.call("domain_get_xml_desc", dom, 0)
    assert f"<uuid>{one.domain().partition.uuid}</uuid>" in shown


async def test_a_life(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    assert await one.call("domain_get_state", dom, 0) == (1, 1)
    assert one.domain().id == one.domain().partition.id
    await one.call("domain_suspend", dom)
    assert await one.call("domain_get_state", dom, 0) == (3, 1)
    await one.call("domain_suspend", dom)  # it is already
    await one.call("domain_resume", dom)
    assert await one.call("domain_get_state", dom, 0) == (1, 5)
    await one.call("domain_reset", dom, 0)
    await one.call("domain_destroy", dom)
    assert await one.call("domain_get_state", dom, 0) == (5, 2)
    await one.call("domain_undefine", dom)
    assert await one.refused("domain_get_state", dom, 0) == (NO_DOMAIN, f"Domain not found: none has the uuid {UUID}")
    assert events(one) == [ADDED, STARTED, SUSPENDED, RESUMED, DESTROYED, UNDEFINED]
    assert one.backend.world.memory == {}


async def test_shutdown_asks_until_the_guest_is_off(one: House) -> None:
    one.backend.obeys_after = 10**9
    dom = await one.define()
    await one.call("domain_create", dom)
    await one.call("domain_shutdown", dom)
    await one.until(lambda: one.domain().in_shutdown)
    assert await one.call("domain_get_state", dom, 0) == (1, 1)  # Nova would take "in shutdown" for off
    await one.call("domain_shutdown", dom)  # asked again by an impatient client: no error
    one.backend.obeys_after = 0
    await one.until(lambda: not one.domain().active)
    assert one.domain().state == (5, 1)
    assert events(one) == [ADDED, STARTED, FINISHED, SHUT]


async def test_shutdown_never_ends_a_guest_by_force(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        await one.end()
        await one.begin(timeout_s=1.0)
        one.backend.obeys_after = 10**9
        dom = await one.define()
        await one.call("domain_create", dom)
        await one.call("domain_shutdown", dom)
        await one.until(lambda: one.domain().in_shutdown)
        await one.until(lambda: not one.domain().in_shutdown)
        assert one.backend.world.guests


async def test_who_does_not_wait_hears_of_a_refusal_and_of_nothing_else(
    one: House, caplog: pytest.LogCaptureFixture
) -> None:
    one.backend.obeys_after = 10**9
    await one.call("domain_create", await one.define())
    vmand, partition = one.mirror.vmand, one.domain().partition.id
    await vmand.shutdown(partition, timeout_s=0.5, leave=True, wait=False)
    assert (await vmand.status(partition)).state is State.BUSY
    await one.until(lambda: one.domain().partition.state is State.DEPLOYED)
    assert "did not power off within 0.5 s" in caplog.text
    await vmand.reboot(partition, graceful=True, timeout_s=60, wait=False)
    await vmand.shutdown(partition, force=True)
    with pytest.raises(BadStateError):
        await vmand.shutdown(partition, wait=False)
    with pytest.raises(BadStateError):
        await vmand.reboot(partition, wait=False)


async def test_destroy_does_not_wait_for_a_shutdown(one: House) -> None:
    one.backend.obeys_after = 10**9
    dom = await one.define()
    await one.call("domain_create", dom)
    await one.call("domain_shutdown_flags", dom, 1)
    await one.until(lambda: one.domain().in_shutdown)
    await one.call("domain_destroy_flags", dom, 1)
    assert one.domain().state == (5, 2)


async def test_reboot_is_told(one: House) -> None:
    number = await one.call("connect_domain_event_callback_register_any", 1, None)
    dom = await one.define()
    await one.call("domain_create", dom)
    await one.call("domain_reboot", dom, 0)
    await one.until(lambda: ("reboot", (number, (dom.name, dom.uuid, one.domain().id))) in one.client.told)
    assert await one.call("domain_get_state", dom, 0) == (1, 1)


@pytest.mark.parametrize("flags", [2, 4, 8, 16])
async def test_only_the_power_button(one: House, flags: int) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    assert (await one.refused("domain_shutdown_flags", dom, flags))[0] == ARGUMENT
    assert (await one.refused("domain_reboot", dom, flags))[0] == ARGUMENT


async def test_paused_begins_with_resume(one: House) -> None:
    dom = await one.define()
    running = await one.call("domain_create_with_flags", dom, 1)
    assert running.id == one.domain().partition.id
    assert await one.call("domain_get_state", dom, 0) == (3, 1)
    await one.call("domain_resume", dom)
    assert events(one) == [ADDED, STARTED, SUSPENDED, RESUMED]
    assert (await one.refused("domain_create_with_flags", dom, 2))[0] == ARGUMENT  # autodestroy


async def test_a_transient_domain_is_gone_when_it_ends(one: House) -> None:
    dom = await one.call("domain_create_xml", one.xml(), 0)
    assert await one.call("domain_is_persistent", dom) == 0
    assert (await one.refused("domain_set_autostart", dom, 1))[0] == INVALID
    assert (await one.refused("domain_undefine", dom))[0] == INVALID
    await one.call("domain_destroy", dom)
    assert await one.call("connect_list_all_domains", 1, 0) == ([], 0)
    assert one.service.partitions() == []
    assert events(one) == [STARTED, DESTROYED]


async def test_a_transient_domain_that_powers_off_is_gone(one: House) -> None:
    dom = await one.call("domain_create_xml", one.xml(), 0)
    await one.call("domain_shutdown", dom)
    await one.until(lambda: one.service.partitions() == [])
    await one.until(lambda: not one.mirror.all())
    assert events(one) == [STARTED, FINISHED, SHUT]


async def test_a_transient_domain_that_ended_while_we_were_away_is_gone(one: House) -> None:
    await one.call("domain_create_xml", one.xml(), 0)
    partition = one.domain().partition.id
    await one.end()
    await one.service.shutdown(partition, force=True)
    await one.begin()
    await one.until(lambda: one.service.partitions() == [])


async def test_a_create_that_fails_leaves_nothing(one: House) -> None:
    one.backend.fail["start"] = FailedError("QEMU said no")
    assert await one.refused("domain_create_xml", one.xml(), 0) == (FAILED, "domain 'web': QEMU said no")
    assert one.service.partitions() == []


async def test_create_of_a_defined_domain_runs_it_with_another_definition_once(one: House) -> None:
    dom = await one.define()
    other = one.xml().replace("quiet", "verbose")
    await one.call("domain_create_xml", other, 0)
    assert one.backend.started[-1][1] == "verbose"
    assert "verbose" in await one.call("domain_get_xml_desc", dom, 0)
    assert await one.call("domain_get_xml_desc", dom, 2) == one.xml()
    await one.call("domain_destroy", dom)
    await one.call("domain_create", dom)
    assert one.backend.started[-1][1] == "quiet"


async def test_a_definition_that_changes_while_the_guest_runs_counts_at_the_next_start(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    await one.define(memory_mib=128)
    assert one.domain().partition.memory_bytes == 64 << 20
    assert "<memory unit='MiB'>64" in await one.call("domain_get_xml_desc", dom, 0)
    assert "<memory unit='MiB'>128" in await one.call("domain_get_xml_desc", dom, 2)
    assert await one.call("domain_is_updated", dom) == 1
    await one.again()
    await one.call("domain_destroy", dom)
    assert "<memory unit='MiB'>128" in await one.call("domain_get_xml_desc", dom, 0)
    await one.call("domain_create", dom)
    assert one.domain().partition.memory_bytes == 128 << 20
    assert one.backend.started[-1][0].memory_bytes == 128 << 20


async def test_a_definition_that_changes_at_rest_changes_the_partition(one: House) -> None:
    dom = await one.define()
    partition = one.domain().partition.id
    assert await one.define(memory_mib=128, cpus=2) == dom
    now = one.domain().partition
    assert (now.id, now.memory_bytes, now.cores) == (partition, 128 << 20, 2)
    assert await one.call("domain_get_info", dom) == (5, 131072, 131072, 2, 0)
    assert events(one) == [ADDED, UPDATED]


async def test_the_settings_say_how_cores_are_used_where_a_definition_does_not(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        silent = one.xml().replace(" mode='shared'", "")
        dom = await one.call("domain_define_xml", silent)
        assert one.domain().partition.mode is Mode.DEDICATED
        await one.call("domain_undefine", dom)
        one.context.config = dataclasses.replace(one.context.config, mode=Mode.SHARED)
        dom = await one.call("domain_define_xml", silent)
        assert one.domain().partition.mode is Mode.SHARED
        assert "mode='shared'" in await one.call("domain_get_xml_desc", dom, 2)
        await one.call("domain_define_xml", silent.replace("partition:1'/", "partition:1' mode='dedicated'/"))
        assert one.domain().partition.mode is Mode.DEDICATED


async def test_what_does_not_fit_is_refused_and_nothing_changes(one: House) -> None:
    dom = await one.define()
    code, text = await one.refused("domain_define_xml", one.xml(memory_mib=1 << 20))
    assert code == FAILED
    assert "MiB" in text
    assert await one.call("domain_get_xml_desc", dom, 0) == one.xml()


async def test_one_name_one_uuid(one: House) -> None:
    await one.define()
    code, text = await one.refused("domain_define_xml", one.xml(uuid=OTHER))
    assert (code, UUID in text) == (FAILED, True)
    code, text = await one.refused("domain_define_xml", one.xml("other"))
    assert (code, "web" in text) == (FAILED, True)


async def test_undefine_of_a_running_domain_lets_it_run_to_its_end(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    await one.call("domain_undefine_flags", dom, 0x7F)
    assert await one.call("domain_is_persistent", dom) == 0
    assert (await one.call("domain_get_xml_desc", dom, 0)).startswith("<domain type='vman' id=")
    assert events(one) == [ADDED, STARTED, UNDEFINED]
    await one.define()  # back again
    assert await one.call("domain_is_persistent", dom) == 1
    await one.call("domain_destroy", dom)
    assert await one.call("domain_is_active", dom) == 0
    assert events(one) == [ADDED, DESTROYED]


async def test_memory_and_vcpus_change_at_the_next_start(one: House) -> None:
    dom = await one.define()
    await one.call("domain_set_memory_flags", dom, 98304, 2)
    await one.call("domain_set_vcpus_flags", dom, 2, 0)
    partition = one.domain().partition
    assert (partition.memory_bytes, partition.cores) == (96 << 20, 2)
    assert await one.call("domain_get_vcpus_flags", dom, 2) == 2
    await one.call("domain_create", dom)
    assert (await one.refused("domain_set_memory", dom, 65536))[0] == UNSUPPORTED
    assert (await one.refused("domain_set_vcpus_flags", dom, 1, 1))[0] == UNSUPPORTED
    await one.call("domain_set_vcpus_flags", dom, 1, 2)
    assert await one.call("domain_get_vcpus_flags", dom, 2) == 1
    assert await one.call("domain_get_vcpus_flags", dom, 1) == 2


async def test_rename(one: House) -> None:
    dom = await one.define()
    assert await one.call("domain_rename", dom, "shop", 0) == 0
    assert one.domain("shop").partition.name == "shop"
    assert "<name>shop</name>" in await one.call("domain_get_xml_desc", dom, 0)
    await one.define("other", uuid=OTHER)
    assert (await one.refused("domain_rename", dom, "other", 0))[0] in {FAILED, CONFIG}
    await one.call("domain_create", dom)
    assert (await one.refused("domain_rename", dom, "third", 0))[0] == INVALID


async def test_metadata_of_the_guest_and_of_its_definition(one: House) -> None:
    dom = await one.define()
    title, description, element = 1, 0, 2
    live, config = 1, 2
    assert (await one.refused("domain_get_metadata", dom, title, None, 0))[0] == NO_METADATA
    await one.call("domain_set_metadata", dom, title, "a shop", None, None, 0)
    assert await one.call("domain_get_metadata", dom, title, None, config) == "a shop"
    assert (await one.refused("domain_get_metadata", dom, title, None, live))[0] == INVALID
    await one.call("domain_create", dom)
    await one.call("domain_set_metadata", dom, element, "<x a='1'/>", "tool", "urn:tool", live)
    assert "a='1'" in await one.call("domain_get_metadata", dom, element, "urn:tool", live)
    assert (await one.refused("domain_get_metadata", dom, element, "urn:tool", config))[0] == NO_METADATA
    await one.call("domain_set_metadata", dom, description, "both", None, None, live | config)
    assert await one.call("domain_get_metadata", dom, description, None, live) == "both"
    await one.call("domain_set_metadata", dom, title, None, None, None, config)
    assert await one.call("domain_get_metadata", dom, title, None, live) == "a shop"
    await one.call("domain_destroy", dom)
    assert (await one.refused("domain_get_metadata", dom, title, None, 0))[0] == NO_METADATA
    assert one.domain().partition.memory_bytes == 64 << 20


async def test_a_guest_that_failed_can_be_started(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    await one.fail()
    assert await one.call("domain_get_state", dom, 0) == (5, 3)
    assert events(one) == [ADDED, STARTED, CRASHED]
    assert any("gone" in text for text in await one.call("domain_get_messages", dom, 0))
    await one.call("domain_create", dom)
    assert await one.call("domain_get_state", dom, 0) == (1, 1)
    await one.fail()
    await one.define(memory_mib=96)
    assert one.domain().partition.memory_bytes == 96 << 20
    await one.call("domain_undefine", dom)


async def test_what_needs_a_guest_says_that_there_is_none(one: House) -> None:
    dom = await one.define()
    for call in (
        ("domain_destroy", dom),
        ("domain_shutdown", dom),
        ("domain_reboot", dom, 0),
        ("domain_reset", dom, 0),
        ("domain_suspend", dom),
        ("domain_resume", dom),
        ("domain_open_console", dom, None, 0),
        ("domain_memory_stats", dom, 10, 0),
        ("domain_block_stats", dom, "vda"),
        ("domain_interface_stats", dom, "vm0-0"),
        ("domain_get_vcpus", dom, 1, 1),
        ("domain_get_control_info", dom, 0),
        ("domain_set_memory", dom, 65536),
    ):
        assert await one.refused(*call) == (INVALID, "domain 'web' is not running"), call
    await one.call("domain_create", dom)
    assert (await one.refused("domain_create", dom))[0] == INVALID
    assert (await one.refused("domain_create_xml", one.xml(), 0))[0] == INVALID
    assert (await one.refused("domain_resume", dom))[0] == INVALID


async def test_a_partition_of_another_tool_is_a_domain_too(one: House) -> None:
    partition = await one.mirror.vmand.create_partition(cores=1, memsize_gb=0.0625, name="byhand")
    await one.until(lambda: bool(one.mirror.all()))
    dom = await one.call("domain_lookup_by_name", "byhand")
    assert await one.call("domain_is_persistent", dom) == 1
    assert "<memory unit='KiB'>65536</memory>" in await one.call("domain_get_xml_desc", dom, 0)
    code, text = await one.refused("domain_create", dom)
    assert (code, "os/kernel" in text) == (INVALID, True)
    uuid = one.domain("byhand").partition.uuid
    await one.define("byhand", uuid=uuid)  # adopted
    await one.call("domain_create", dom)
    assert one.domain("byhand").partition.id == partition


async def test_autostart_happens_once_a_boot(one: House) -> None:
    dom = await one.define()
    await one.define("other", uuid=OTHER)
    await one.call("domain_set_autostart", dom, 1)
    assert await one.call("domain_get_autostart", dom) == 1
    assert (await one.call("connect_list_all_domains", 1, 1024))[1] == 1
    await one.again()
    marker = one.directory / "autostarted"
    await one.until(marker.exists)
    assert not one.domain().active  # this boot's were done when we first came
    marker.unlink()
    await one.again()
    await one.until(lambda: one.domain().active)
    await one.until(marker.exists)
    assert not one.domain("other").active


async def test_an_autostart_that_fails_hinders_no_other(one: House, caplog: pytest.LogCaptureFixture) -> None:
    for name, uuid in (("web", UUID), ("other", OTHER)):
        dom = await one.define(name, uuid=uuid)
        await one.call("domain_set_autostart", dom, 1)
    await one.until((one.directory / "autostarted").exists)
    (one.directory / "autostarted").unlink()
    xml = one.xml().replace(str(one.kernel), str(one.directory / "absent"))
    await one.call("domain_define_xml", xml)
    await one.again()
    await one.until(lambda: one.domain("other").active)
    await one.until((one.directory / "autostarted").exists)
    assert not one.domain().active
    assert "web can't be started with the host" in caplog.text


async def test_console(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    assert read(await one.call("domain_open_console", dom, None, 3)) == b"console of 1"
    code, text = await one.refused("domain_open_console", dom, "serial7", 0)
    assert (code, "serial7" in text) == (INVALID_ARG, True)


async def test_statistics(one: House) -> None:
    dom = await one.define()
    await one.define("other", uuid=OTHER)
    await one.call("domain_create", dom)
    all_of_them = await one.call("connect_get_all_domain_stats", [], 0, 0)
    assert [each[0][0] for each in all_of_them] == ["web", "other"]
    (only,) = await one.call("connect_get_all_domain_stats", [dom], 1, 0)
    assert [tuple(param) for param in only[1]] == [("state.state", 1, 1), ("state.reason", 1, 1)]
    assert len(await one.call("connect_get_all_domain_stats", [], 1, 64)) == 1
    assert (await one.refused("connect_get_all_domain_stats", [], 64, 1 << 31))[0] == ARGUMENT


async def test_lists_and_filters(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    await one.define("other", uuid=OTHER)
    counts = {flag: (await one.call("connect_list_all_domains", 0, flag))[1] for flag in (0, 1, 2, 3, 4, 8, 16, 32, 64)}
    assert counts == {0: 2, 1: 1, 2: 1, 3: 2, 4: 2, 8: 0, 16: 1, 32: 0, 64: 1}
    assert (await one.call("connect_list_all_domains", 0, 1 | 64))[1] == 0  # groups must all hold
    assert await one.call("connect_num_of_domains") == 1
    assert await one.call("connect_list_domains", 10) == [one.domain().id]
    assert await one.call("connect_num_of_defined_domains") == 1
    assert await one.call("connect_list_defined_domains", 10) == ["other"]
    assert await one.call("domain_lookup_by_id", one.domain().id) == (dom.name, dom.uuid, one.domain().id)
    assert (await one.refused("domain_lookup_by_id", 77))[0] == NO_DOMAIN
    assert (await one.refused("domain_lookup_by_name", "none"))[0] == NO_DOMAIN
    assert await one.call("connect_list_all_networks", 1, 0) == ([], 0)
    assert await one.call("domain_list_all_snapshots", dom, 1, 0) == ([], 0)


@pytest.mark.parametrize("name", sorted(refused.REASONS))
async def test_what_partitions_cannot_is_refused_with_the_reason(one: House, name: str) -> None:
    handler = one.driver.handlers[next(number for number, each in PROCEDURES.items() if each.name == name)]
    with pytest.raises(Exception, match=name) as refusal:
        handler(one.client)
    assert refusal.value.code == UNSUPPORTED  # type: ignore[attr-defined]


async def test_events_of_one_domain_and_of_none(one: House) -> None:
    dom = await one.define()
    await one.define("other", uuid=OTHER)
    only = await one.call("connect_domain_event_callback_register_any", 0, dom)
    one.client.told.clear()
    await one.call("domain_create", await one.call("domain_lookup_by_name", "other"))
    assert len(one.client.told) == 1
    await one.call("domain_create", dom)
    assert {values[0] for _name, values in one.client.told} == {1, only}
    await one.call("connect_domain_event_callback_deregister_any", only)
    assert (await one.refused("connect_domain_event_callback_deregister_any", only))[0] == INVALID_ARG
    assert (await one.refused("connect_domain_event_callback_register_any", 99, None))[0] == INVALID_ARG
    for event in range(1, 28):  # virsh event --all
        await one.call("connect_domain_event_callback_register_any", event, None)


@pytest.mark.parametrize(
    "name", ["vman:///session", "qemu:///system", "vman:///", "vman:///system/other", "test:///default"]
)
async def test_only_our_uri_can_be_opened(one: House, name: str) -> None:
    assert (await one.refused("connect_open", name, 0))[0] == INVALID_ARG
    assert not one.client.opened


@pytest.mark.parametrize("name", ["vman:///system", "vman+unix:///system?socket=/x", "vman://host/system", None])
async def test_our_uri_is_opened(one: House, name: str | None) -> None:
    await one.call("connect_open", name, 1)
    assert one.client.opened
    assert one.client.read_only


async def test_while_vmand_is_away_nothing_is_answered_and_nothing_is_lost(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    one.told()
    await one.end_vmand()
    await one.until(lambda: not one.mirror.in_sync)
    for call in (("domain_get_state", dom, 0), ("connect_list_all_domains", 1, 0), ("domain_destroy", dom)):
        code, text = await one.refused(*call)
        assert (code, "vmand is not reachable" in text) == (38, True)
    await one.begin_vmand()
    from vmand.recovery import recover

    await recover(one.service)
    await one.mirror.ready(10)
    assert await one.call("domain_get_state", dom, 0) == (1, 1)
    assert events(one) == []


async def test_many_at_once_on_one_domain_are_one_after_the_other(one: House) -> None:
    dom = await one.define()
    calls = [one.call("domain_create", dom), one.call("domain_undefine", dom), one.define(memory_mib=96)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each).__name__ for each in results].count("LibvirtError") <= 1
    assert len(one.service.partitions()) == 1
    assert not one.context.has_turn(dom.uuid)


async def test_features_and_versions(one: House) -> None:
    assert await one.call("connect_supports_feature", 10) == 1
    assert one.client.kept_alive
    assert [await one.call("connect_supports_feature", each) for each in (9, 14, 15, 1, 8, 13)] == [1, 1, 1, 0, 0, 0]
    assert await one.call("connect_get_type") == "vman"
    assert await one.call("connect_get_version") == 1_002_000
    assert await one.call("connect_get_lib_version") == 10_000_000
    assert await one.call("connect_get_uri") == "vman:///system"


async def test_a_transient_domain_that_ends_while_somebody_has_its_turn_is_gone(one: House) -> None:
    dom = await one.call("domain_create_xml", one.xml(), 0)
    async with one.context.turn(dom.uuid):
        await one.service.shutdown(one.domain().partition.id, force=True)
        await one.until(lambda: not one.domain().active)
    await one.until(lambda: one.service.partitions() == [])


async def test_a_removal_that_fails_is_tried_again(one: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_AGAIN_S", 0.01)
    dom = await one.call("domain_create_xml", one.xml(), 0)
    one.backend.fail["end"] = BadStateError("it is being looked at", retryable=True)
    one.backend.world.guests[one.service.record("web").run] = Found.OFF
    one.backend.changed(one.domain().partition.id, one.service.record("web").run)
    await one.until(lambda: not one.domain().active)
    assert one.service.partitions()
    del one.backend.fail["end"]
    await one.until(lambda: one.service.partitions() == [])
    await one.until(lambda: not one.context.has_turn(dom.uuid))


async def test_an_autostart_is_tried_until_it_can_be_done(one: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_AGAIN_S", 0.01)
    dom = await one.define()
    await one.call("domain_set_autostart", dom, 1)
    marker = one.directory / "autostarted"
    await one.until(marker.exists)
    marker.unlink()
    one.backend.fail["start"] = BadStateError("its memory is being taken", retryable=True)
    await one.again()
    await one.until(lambda: len(one.backend.started) > 2)
    assert not marker.exists()
    del one.backend.fail["start"]
    await one.until(marker.exists)
    assert one.domain().active


async def test_destroy_waits_for_a_start_that_is_under_way(one: House) -> None:
    dom = await one.define()
    starting = asyncio.create_task(one.call("domain_create", dom))
    await one.until(lambda: one.context.has_turn(dom.uuid))
    await one.call("domain_destroy", dom)
    await starting
    assert not one.domain().active
    assert one.backend.world.guests == {}


async def test_what_a_running_domain_says_of_the_next_start_is_not_what_its_guest_has(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    other = one.xml().replace("mode='shared'", "mode='dedicated'")
    await one.call("domain_define_xml", other)
    assert "mode='shared'" in await one.call("domain_get_xml_desc", dom, 0)
    await one.call("domain_destroy", dom)
    assert await one.call("domain_get_xml_desc", dom, 0) == other


async def test_two_long_definitions_fit_beside_each_other(one: House) -> None:
    text = one.xml(rest=f"<!-- {'x' * 40_000} -->")
    dom = await one.call("domain_define_xml", text)
    await one.call("domain_create", dom)
    await one.call("domain_define_xml", text.replace("quiet", "other"))
    assert "other" in await one.call("domain_get_xml_desc", dom, 2)
    assert "quiet" in await one.call("domain_get_xml_desc", dom, 0)
    await one.call("domain_undefine", dom)
    assert "quiet" in await one.call("domain_get_xml_desc", dom, 0)


async def test_many_who_ask_for_the_same_are_one_request(one: House) -> None:
    dom = await one.define()
    await one.call("domain_create", dom)
    asked = 0
    before = one.backend.vcpus

    async def vcpus(record: Record) -> list[Vcpu]:
        nonlocal asked
        asked += 1
        return await before(record)

    one.backend.vcpus = vcpus  # type: ignore[method-assign]
    await asyncio.gather(*(one.call("connect_get_all_domain_stats", [], 8, 0) for _ in range(50)))
    assert asked == 1
    assert await one.call("connect_get_all_domain_stats", [("gone", bytes(16), -1)], 1, 0) == []
