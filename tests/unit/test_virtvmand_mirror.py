"""The mirror while vmand is there: every order in which it can be told of something."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from edgehold.api.vmand import CoresGrade, Event, Partition, State, VmandClient
from tests.unit.virtvmand_fake import PATIENCE_S, Vmand, followed, partition, text, until
from virtvmand.domain import LIVE, TRANSIENT, XML, YES, Domain
from virtvmand.errors import Code, LibvirtError


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    yield
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.fixture
async def vmand(tmp_path: Path) -> AsyncIterator[Vmand]:
    one = Vmand(tmp_path)
    await one.start()
    yield one
    await one.stop()


# In sync


async def test_all_that_is_there(vmand: Vmand) -> None:
    vmand.put(partition(2, State.DEPLOYED), notes={XML: text(2)})
    vmand.put(partition(1, name="other"), notes={XML: text(1, name="other"), TRANSIENT: YES})
    async with followed(vmand.path) as driver:
        assert driver.names() == ["other", "p2"]
        other, two = driver.mirror.all()
        assert (other.persistent, other.active, two.persistent, two.active) == (False, False, True, True)
        assert two.config.plan.kernel == "/k"
        assert driver.mirror.by_name("p2") is two
        assert driver.mirror.by_id(2) is two
        assert driver.mirror.by_uuid(UUID(int=1).bytes) is other
        assert isinstance(driver.mirror.vmand, VmandClient)
        assert driver.syncs == 1
        assert {(old, new) for old, new in driver.seen} == {(None, other), (None, two)}
        assert driver.heard == []  # nobody is told of what was there before
        assert vmand.asked["annotations"] == 2


async def test_nothing_is_there(vmand: Vmand) -> None:
    async with followed(vmand.path) as driver:
        assert driver.mirror.all() == []


async def test_what_there_is_not(vmand: Vmand) -> None:
    vmand.put(partition(1))
    async with followed(vmand.path) as driver:
        looks: list[tuple[Callable[[], Domain], str]] = [
            (lambda: driver.mirror.by_name("x" * 5000), "x" * 100),
            (lambda: driver.mirror.by_uuid(bytes(16)), "00000000-0000-0000-0000-000000000000"),
            (lambda: driver.mirror.by_id(5), "5"),
            (lambda: driver.mirror.by_id(1), "1"),  # it is not active
        ]
        for look, why in looks:
            with pytest.raises(LibvirtError, match=f"Domain not found: .*{why}") as caught:
                look()
            assert caught.value.code is Code.NO_DOMAIN
            assert len(str(caught.value)) < 200


async def test_many(vmand: Vmand) -> None:
    for number in range(1, 1001):
        vmand.put(partition(number), notes={XML: text(number)})
    before = time.process_time()
    async with followed(vmand.path) as driver:
        spent = time.process_time() - before
        assert len(driver.mirror.all()) == 1000
        assert vmand.most <= 12 + 1  # and the question for the host
        assert vmand.asked["annotations"] == 1000
        assert spent < 5  # both ends; a hundred times less would still be much for an interpreter under load


# Events


async def test_events_become_domains_and_happenings(vmand: Vmand) -> None:
    vmand.put(partition(1), notes={XML: text(1)})
    async with followed(vmand.path) as driver:
        steps: list[tuple[Partition, str]] = [
            (partition(1, State.BUSY, command="deploy"), ""),
            (partition(1, State.DEPLOYED, boot_count=1), "p1 started:0"),
            (partition(1, State.DEPLOYED, boot_count=1, cores_grade=CoresGrade.PINNED), ""),
            (partition(1, State.SUSPENDED, boot_count=1), "p1 suspended:0"),
            (partition(1, State.DEPLOYED, boot_count=1), "p1 resumed:0"),
            (partition(1, State.DEPLOYED, boot_count=2), "p1 reboot"),
            (partition(1, State.BUSY, command="shutdown", boot_count=2, pid=1001), ""),
            (partition(1, State.READY, boot_count=2), "p1 shutdown:0,p1 stopped:0"),
        ]
        for one, expected in steps:
            driver.heard.clear()
            vmand.put(one)
            await driver.mirror.refresh(1)
            assert driver.mirror.by_name("p1").partition == one
            assert ",".join(driver.heard) == expected
        driver.heard.clear()
        vmand.remove(1)
        await until(lambda: not driver.mirror.all())
        assert driver.heard == ["p1 undefined:0"]
        assert driver.seen[-1][1] is None
        with pytest.raises(LibvirtError, match="p1"):
            driver.mirror.by_name("p1")
        with pytest.raises(LibvirtError):
            driver.mirror.by_uuid(UUID(int=1).bytes)


async def test_an_answer_comes_after_the_mirror_knows(vmand: Vmand) -> None:
    vmand.put(partition(1, State.DEPLOYED))
    async with followed(vmand.path) as driver:
        await driver.mirror.vmand.suspend(1)
        assert driver.states() == [3]


@pytest.mark.parametrize(
    ("notes", "expected"),
    [({XML: text(3)}, ["p3 defined:0", "p3 started:0"]), ({XML: text(3), TRANSIENT: YES}, ["p3 started:0"])],
)
async def test_what_appears_is_shown_with_its_annotations(
    vmand: Vmand, notes: dict[str, str], expected: list[str]
) -> None:
    async with followed(vmand.path) as driver:
        gate = vmand.close("annotations")
        vmand.put(partition(3), notes=notes)
        await until(lambda: vmand.asked["annotations"] == 1)
        vmand.put(partition(3, State.DEPLOYED))
        await driver.mirror.vmand.subscribe()  # all events before it have been heard
        assert driver.mirror.all() == []
        gate.set()
        await until(driver.mirror.all)
        assert driver.states() == [1]
        assert driver.heard == expected


async def test_what_appears_and_goes_before_its_annotations_come_is_told_to_nobody(vmand: Vmand) -> None:
    async with followed(vmand.path) as driver:
        gate = vmand.close("annotations")
        vmand.put(partition(3))
        await until(lambda: vmand.asked["annotations"] == 1)
        vmand.remove(3)
        await driver.mirror.vmand.subscribe()
        gate.set()
        vmand.closed.clear()
        vmand.put(partition(4))
        await until(driver.mirror.all)
        assert driver.names() == ["p4"]
        assert driver.heard == ["p4 defined:0"]


async def test_annotations_that_change_while_they_are_read(vmand: Vmand) -> None:
    vmand.put(partition(1), notes={XML: text(1)})
    async with followed(vmand.path) as driver:
        vmand.then["annotations"] = lambda: vmand.note(1, libvirt_xml=text(1, kernel="/third"))
        vmand.note(1, libvirt_xml=text(1, kernel="/second"))
        await until(lambda: driver.mirror.by_name("p1").config.plan.kernel == "/third")
        assert driver.heard == ["p1 defined:1"]  # both at once
        assert vmand.asked["annotations"] == 3


async def test_events_go_on_while_annotations_are_read(vmand: Vmand) -> None:
    vmand.put(partition(1, State.DEPLOYED), notes={XML: text(1)})
    async with followed(vmand.path) as driver:
        gate = vmand.close("annotations")
        vmand.note(1, libvirt_xml=text(1, kernel="/second"))
        await until(lambda: vmand.asked["annotations"] == 2)
        vmand.put(partition(1, State.SUSPENDED))
        await until(lambda: driver.states() == [3])
        assert driver.mirror.by_id(1).config.plan.kernel == "/k"
        gate.set()
        await until(lambda: driver.mirror.by_id(1).config.plan.kernel == "/second")
        assert driver.heard == ["p1 suspended:0", "p1 defined:1"]


async def test_a_change_and_its_annotations_are_one(vmand: Vmand) -> None:
    vmand.put(partition(1), notes={XML: text(1)})
    async with followed(vmand.path) as driver:
        gate = vmand.close("annotations")
        vmand.put(partition(1, name="new"), notes={XML: text(1, name="new")})
        vmand.put(partition(1, State.BUSY, name="new", command="deploy"))
        await driver.mirror.vmand.subscribe()
        assert driver.names() == ["p1"]
        gate.set()
        await until(lambda: driver.names() == ["new"])
        assert driver.heard == ["p1 undefined:1", "new defined:2"]
        assert driver.mirror.by_name("new").partition.command == "deploy"
        with pytest.raises(LibvirtError):
            driver.mirror.by_name("p1")


async def test_names_that_are_swapped(vmand: Vmand) -> None:
    vmand.put(partition(1))
    vmand.put(partition(2))
    async with followed(vmand.path) as driver:
        vmand.put(partition(1, name="p3"))
        vmand.put(partition(2, name="p1"))
        await until(lambda: driver.names() == ["p3", "p1"])
        assert (driver.mirror.by_name("p3").partition.id, driver.mirror.by_name("p1").partition.id) == (1, 2)
        vmand.remove(1)
        await until(lambda: driver.names() == ["p1"])
        assert driver.mirror.by_name("p1").partition.id == 2


async def test_what_nobody_asked_for_is_passed_over(vmand: Vmand) -> None:
    vmand.put(partition(1))
    async with followed(vmand.path) as driver:
        vmand.send(Event(kind="console", partition=1, time_s=1.0, text="x"))
        vmand.send(Event(kind="gone", partition=9, time_s=1.0))
        await driver.mirror.vmand.subscribe()
        assert driver.names() == ["p1"]
        assert driver.heard == []


# Between the subscription and the list, and until all annotations are there


async def test_events_before_the_list(vmand: Vmand) -> None:
    for number in (1, 2, 3):
        vmand.put(partition(number), notes={XML: text(number)})

    def happens() -> None:
        vmand.put(partition(1, State.BUSY, command="deploy"))
        vmand.put(partition(1, State.DEPLOYED))
        vmand.remove(2)
        vmand.note(3, libvirt_xml=text(3, kernel="/second"))
        vmand.put(partition(4))
        vmand.put(partition(5))
        vmand.remove(5)

    vmand.then["subscribe"] = happens
    async with followed(vmand.path) as driver:
        assert driver.names() == ["p1", "p3", "p4"]
        assert driver.states() == [1, 5, 5]
        assert driver.mirror.by_name("p3").config.plan.kernel == "/second"
        assert driver.heard == []


async def test_events_right_after_the_list(vmand: Vmand) -> None:
    for number in (1, 2, 3):
        vmand.put(partition(number, State.DEPLOYED), notes={XML: text(number)})

    def happens() -> None:
        vmand.put(partition(1, State.SUSPENDED))
        vmand.remove(2)
        vmand.note(3, libvirt_xml=text(3, kernel="/second"))
        vmand.put(partition(4))

    vmand.then["list"] = happens
    async with followed(vmand.path) as driver:
        assert driver.names() == ["p1", "p3", "p4"]
        assert driver.states() == [3, 1, 5]
        assert driver.mirror.by_name("p3").config.plan.kernel == "/second"


async def test_what_happens_before_all_annotations_are_there(vmand: Vmand) -> None:
    for number in (1, 2, 3):
        vmand.put(partition(number), notes={XML: text(number)})
    gate = vmand.close("annotations")
    async with followed(vmand.path, ready=False) as driver:
        await until(lambda: vmand.asked["annotations"] == 3)
        vmand.put(partition(1, State.DEPLOYED))
        vmand.remove(2)  # between the list and its annotations
        vmand.note(3, libvirt_xml=text(3, kernel="/second"))
        vmand.put(partition(4))
        await until(lambda: vmand.asked["annotations"] == 4)
        with pytest.raises(LibvirtError, match="not reachable") as caught:
            driver.mirror.all()
        assert caught.value.code is Code.SYSTEM_ERROR
        gate.set()
        await driver.mirror.ready(PATIENCE_S)
        assert driver.names() == ["p1", "p3", "p4"]
        assert driver.states() == [1, 5, 5]
        assert driver.mirror.by_name("p3").config.plan.kernel == "/second"
        assert vmand.asked["annotations"] == 5  # one again
        assert driver.heard == []


async def test_vanished_before_its_annotations_are_asked_for_and_no_event_said_so(vmand: Vmand) -> None:
    vmand.put(partition(1))
    vmand.put(partition(2))
    del vmand.notes[2]
    async with followed(vmand.path) as driver:
        assert driver.names() == ["p1"]


# refresh


async def test_refresh_after_a_change(vmand: Vmand) -> None:
    vmand.put(partition(1), notes={XML: text(1)})
    async with followed(vmand.path) as driver:
        for told in (True, False):  # by an event, or not at all
            vmand.notes[1] = {XML: text(1, kernel=f"/{told}")}
            if told:
                vmand.put(partition(1), "annotated")
            domain = await driver.mirror.refresh(1)
            assert domain.config.plan.kernel == f"/{told}"
            assert domain is driver.mirror.by_name("p1")
        vmand.put(partition(2), notes={LIVE: "x"})
        await driver.mirror.vmand.subscribe()
        assert (await driver.mirror.refresh(2)).annotations == {LIVE: "x"}


async def test_refresh_of_what_is_gone(vmand: Vmand) -> None:
    async with followed(vmand.path) as driver:
        with pytest.raises(LibvirtError, match="partition 9 is gone") as caught:
            await driver.mirror.refresh(9)
        assert caught.value.code is Code.NO_DOMAIN
        vmand.put(partition(1))
        vmand.close("annotations")
        await driver.mirror.vmand.subscribe()
        refreshing = asyncio.create_task(driver.mirror.refresh(1))
        await until(lambda: vmand.asked["annotations"] == 1)
        vmand.remove(1)
        vmand.closed.pop("annotations").set()
        with pytest.raises(LibvirtError, match="partition 1 is gone"):
            await refreshing


async def test_refresh_that_is_given_up_disturbs_nobody(vmand: Vmand) -> None:
    vmand.put(partition(1))
    async with followed(vmand.path) as driver:
        gate = vmand.close("annotations")
        first, second = (asyncio.create_task(driver.mirror.refresh(1)) for _ in range(2))
        await until(lambda: vmand.asked["annotations"] == 2)
        first.cancel()
        await asyncio.wait({first})
        vmand.notes[1] = {LIVE: "x"}
        gate.set()
        assert (await second).annotations == {LIVE: "x"}


async def test_vmand_goes_away_while_somebody_waits(vmand: Vmand) -> None:
    vmand.put(partition(1))
    vmand.close("capabilities")
    async with followed(vmand.path) as driver:
        vmand.close("annotations")
        refreshing = asyncio.create_task(driver.mirror.refresh(1))
        asking = asyncio.create_task(driver.mirror.host())
        await until(lambda: vmand.asked["annotations"] == 2)
        await vmand.stop()
        for one in (refreshing, asking):
            with pytest.raises(LibvirtError, match="vmand is not reachable") as caught:
                await one
            assert caught.value.code is Code.SYSTEM_ERROR


# Who is told that it was destroyed


async def test_destroyed(vmand: Vmand) -> None:
    vmand.put(partition(1, State.DEPLOYED))
    uuid = UUID(int=1).bytes
    async with followed(vmand.path) as driver:
        for intended, expected, reason in ((True, "p1 stopped:1", 2), (False, "p1 shutdown:0,p1 stopped:0", 1)):
            driver.mirror.intend_destroy(uuid)
            if not intended:
                driver.mirror.forget_destroy(uuid)
            vmand.put(partition(1, State.BUSY, command="shutdown", pid=1001))
            vmand.put(partition(1))
            await until(lambda: driver.states() == [5])
            assert ",".join(driver.heard) == expected
            assert driver.mirror.by_name("p1").state == (5, reason)
            vmand.put(partition(1, State.DEPLOYED))
            await until(lambda: driver.states() == [1])
            driver.heard.clear()
        vmand.put(partition(1))  # what was intended counted once
        await until(lambda: driver.states() == [5])
        assert driver.mirror.by_name("p1").state == (5, 1)
