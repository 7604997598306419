"""The mirror against a real control socket with a scripted vmand behind it: every order of what can be told."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from edgehold.api.vmand import (
    Capabilities,
    CoresGrade,
    Event,
    MemoryGrade,
    Mode,
    Partition,
    State,
    VmandClient,
)
from edgehold.errors import EdgeholdError, FailedError, NotFoundError, UnavailableError
from edgehold.wire.control import Connection, ControlServer, bind_unix
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Roles
from virtvmand import following, mirror
from virtvmand.domain import LIVE, TRANSIENT, XML, YES, Domain
from virtvmand.errors import Code, LibvirtError
from virtvmand.events import Happening, Lifecycle, MetadataChange
from virtvmand.mirror import Mirror

PATIENCE_S = 30
HOST = Capabilities(
    accelerator="tcg",
    accelerator_reason="a fake",
    backend="fake",
    launcher="process",
    cores_grade=CoresGrade.PINNED,
    cores_reason="",
    memory_grade=MemoryGrade.PLAIN,
    memory_reason="",
    supports=("suspend",),
    archs=("x86_64",),
    cores_pool=(1, 2),
    cores_free=(1,),
    memory_total_bytes=1 << 30,
    memory_free_bytes=1 << 29,
)


def partition(number: int, state: State = State.READY, **rest: Any) -> Partition:
    fields: dict[str, Any] = {"name": f"p{number}", "uuid": str(UUID(int=number)), "mode": Mode.DEDICATED}
    fields |= {"cores": 1, "memory_bytes": 16 << 20}
    if state in {State.DEPLOYED, State.SUSPENDED}:
        fields |= {"pid": 1000 + number, "arch": "x86_64"}
    return Partition(id=number, state=state, **(fields | rest))


def text(number: int, *, kernel: str = "/k", name: str = "") -> str:
    return (
        f"<domain type='vman'><name>{name or f'p{number}'}</name><uuid>{UUID(int=number)}</uuid><memory>16384</memory>"
        f"<vcpu>1</vcpu><os><type>hvm</type><kernel>{kernel}</kernel></os></domain>"
    )


class Vmand:
    """What a vmand would keep, and a word for each way to be told of it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "s"
        self.partitions: dict[int, Partition] = {}
        self.notes: dict[int, dict[str, str]] = {}
        self.asked: Counter[str] = Counter()
        self.closed: dict[str, asyncio.Event] = {}
        """Commands that wait until somebody opens."""
        self.answers: dict[str, Any] = {}
        """By command: another answer, or an error."""
        self.on: dict[str, Callable[[], None]] = {}
        """By command: what happens before its answer."""
        self.then: dict[str, Callable[[], None]] = {}
        """By command: what happens right after its answer."""
        self.under_way = 0
        self.most = 0
        self._listeners: list[Connection] = []
        self._server: ControlServer | None = None

    async def start(self) -> None:
        self._server = ControlServer(self._handle, roles=Roles())
        await self._server.listen(bind_unix(self.path))

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()
            self._server = None
        self.path.unlink(missing_ok=True)

    def close(self, command: str) -> asyncio.Event:
        return self.closed.setdefault(command, asyncio.Event())

    def put(self, one: Partition, kind: str = "state", *, notes: dict[str, str] | None = None) -> None:
        """It becomes this, and whoever listens is told."""
        self.partitions[one.id] = one
        self.notes.setdefault(one.id, {})
        if notes is not None:
            self.notes[one.id] = notes
        self.send(Event(kind=kind, partition=one.id, time_s=1.0, now=one))

    def note(self, number: int, **notes: str) -> None:
        self.put(self.partitions[number], "annotated", notes={key.replace("_", "."): one for key, one in notes.items()})

    def remove(self, number: int) -> None:
        del self.partitions[number], self.notes[number]
        self.send(Event(kind="gone", partition=number, time_s=1.0))

    def send(self, data: Any) -> None:
        for one in self._listeners:
            one.send_event("partition", data)

    async def _handle(self, connection: Connection, request: Request) -> Any:
        command = request.command
        self.asked[command] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if command in self.closed:
                await self.closed[command].wait()
            answer = self._answer(connection, request)
            if (before := self.on.pop(command, None)) is not None:
                before()
            if (after := self.then.pop(command, None)) is not None:
                asyncio.get_running_loop().call_soon(after)  # this task sends the answer in its present step
            if isinstance(answer, EdgeholdError):
                raise answer
            return answer
        finally:
            self.under_way -= 1

    def _answer(self, connection: Connection, request: Request) -> Any:
        command, number = request.command, request.args.get("id")
        if command in self.answers:
            return self.answers[command]
        match command:
            case "subscribe":
                if connection not in self._listeners:
                    self._listeners.append(connection)
                    connection.on_close.append(lambda: self._listeners.remove(connection))
                return {"text": ""}
            case "list":
                return [self.partitions[one] for one in sorted(self.partitions)]
            case "capabilities":
                return HOST
            case "annotations":
                return dict(self.notes[number]) if number in self.notes else NotFoundError(f"no partition {number}")
            case "suspend":
                assert isinstance(number, int)
                self.put(partition(number, State.SUSPENDED))
                return {}
        raise AssertionError(command)


class Driver:
    """Who has a mirror, and what was heard."""

    def __init__(self, path: Path) -> None:
        self.heard: list[str] = []
        self.seen: list[tuple[Domain | None, Domain | None]] = []
        self.syncs = 0
        self.mirror = Mirror(path, tell=self._tell, changed=self._changed, synced=self._synced)

    def _tell(self, one: Happening) -> None:
        what = type(one).__name__.lower()
        if isinstance(one, Lifecycle):
            what = f"{one.event.name.lower()}:{one.detail}"
        elif isinstance(one, MetadataChange):
            what = f"metadata:{one.kind}"
        self.heard.append(f"{one.domain.name} {what}")

    def _changed(self, old: Domain | None, new: Domain | None) -> None:
        self.seen.append((old, new))

    def _synced(self) -> None:
        self.syncs += 1

    def names(self) -> list[str]:
        return [one.name for one in self.mirror.all()]

    def states(self) -> list[int]:
        return [one.state[0] for one in self.mirror.all()]

    async def until_away(self) -> str:
        """Until vmand is known to be away; why."""
        reasons: list[str] = []

        def away() -> bool:
            try:
                self.mirror.all()
            except LibvirtError as error:
                assert error.code is Code.SYSTEM_ERROR
                reasons.append(str(error))
                return True
            return False

        await until(away)
        return reasons[0]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on the other side of a socket
            await asyncio.sleep(0.001)


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


@contextlib.asynccontextmanager
async def followed(path: Path, *, ready: bool = True) -> AsyncIterator[Driver]:
    driver = Driver(path)
    running = asyncio.create_task(driver.mirror.run())
    try:
        if ready:
            await driver.mirror.ready(PATIENCE_S)
        yield driver
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


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
        assert driver.mirror.vmand
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
        for look, why in (
            (lambda: driver.mirror.by_name("x" * 5000), "x" * 100),
            (lambda: driver.mirror.by_uuid(bytes(16)), "00000000-0000-0000-0000-000000000000"),
            (lambda: driver.mirror.by_id(5), "5"),
            (lambda: driver.mirror.by_id(1), "1"),  # it is not active
        ):
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
            await until(lambda one=one: driver.mirror.by_name("p1").partition == one)
            assert ",".join(driver.heard) == expected
        driver.heard.clear()
        vmand.remove(1)
        await until(lambda: not driver.mirror.all())
        assert driver.heard == ["p1 undefined:0"]
        assert driver.seen[-1][1] is None
        assert vmand.asked["annotations"] == 1
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

    vmand.on["subscribe"] = lambda: asyncio.get_running_loop().call_soon(happens) and None
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


# Away and back


async def test_nobody_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(tmp_path / "s")
    with pytest.raises(LibvirtError, match="not reachable at .*/s: it was not asked yet"):
        driver.mirror.all()
    async with followed(tmp_path / "s", ready=False) as driver:
        with pytest.raises(LibvirtError, match="No such file or directory; is the daemon running") as caught:
            await driver.mirror.ready(0.3)  # two or three attempts
        assert caught.value.code is Code.SYSTEM_ERROR
        assert str(caught.value).count(str(tmp_path)) == 1
        for look in (
            lambda: driver.mirror.vmand,
            lambda: driver.mirror.capabilities,
            driver.mirror.all,
            lambda: driver.mirror.by_id(1),
            lambda: driver.mirror.by_name("x"),
            lambda: driver.mirror.by_uuid(bytes(16)),
        ):
            with pytest.raises(LibvirtError, match="not reachable"):
                look()
        with pytest.raises(LibvirtError, match="not reachable"):
            await driver.mirror.host()
        with pytest.raises(LibvirtError, match="not reachable"):
            async with driver.mirror.apart():
                pass
    assert [one.message.split(":")[0] for one in caplog.records if one.levelno >= logging.WARNING] == ["vmand is away"]


async def test_back_with_differences(vmand: Vmand, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    vmand.put(partition(1, State.DEPLOYED), notes={XML: text(1)})
    vmand.put(partition(2, State.DEPLOYED), notes={XML: text(2)})
    vmand.put(partition(3, State.DEPLOYED), notes={XML: text(3)})
    vmand.put(partition(4), notes={XML: text(4)})
    vmand.put(partition(5), notes={XML: text(5)})
    vmand.put(partition(6, State.SUSPENDED), notes={XML: text(6)})
    async with followed(vmand.path) as driver:
        same = driver.mirror.by_name("p6")
        for number in (3, 6):
            driver.mirror.intend_destroy(UUID(int=number).bytes)
        driver.seen.clear()
        await vmand.stop()
        assert "the daemon closed the connection" in await driver.until_away()
        vmand.put(partition(2, State.SUSPENDED))
        vmand.put(partition(3))
        vmand.put(partition(4, State.DEPLOYED))
        vmand.put(partition(5), notes={XML: text(5, kernel="/second")})
        vmand.put(partition(7), notes={XML: text(7)})
        vmand.put(partition(8, State.DEPLOYED), notes={XML: text(8), TRANSIENT: YES})
        vmand.remove(1)
        await vmand.start()
        await driver.mirror.ready(PATIENCE_S)
        assert driver.names() == ["p2", "p3", "p4", "p5", "p6", "p7", "p8"]
        assert driver.heard == [
            "p1 stopped:1",
            "p1 undefined:0",
            "p2 suspended:0",
            "p3 stopped:1",  # as it was intended before
            "p4 started:0",
            "p5 defined:1",
            "p7 defined:0",
            "p8 started:0",
        ]
        assert driver.mirror.by_name("p6") is same
        assert len(driver.seen) == 7
        assert driver.syncs == 2
        vmand.put(partition(6, State.DEPLOYED))
        vmand.put(partition(6))
        await until(lambda: driver.mirror.by_name("p6").state == (5, 1))  # what was intended is over with the outage
    told = [one.message.split(":")[0] for one in caplog.records if one.name == "virtvmand.mirror"]
    assert told == ["vmand is there, domains", "vmand is away", "vmand is there, domains"]


async def test_ids_begin_anew(vmand: Vmand) -> None:
    vmand.put(partition(1, State.DEPLOYED))
    async with followed(vmand.path) as driver:
        await vmand.stop()
        await driver.until_away()
        vmand.put(partition(1, State.DEPLOYED, uuid=str(UUID(int=99)), name="other"))
        await vmand.start()
        await driver.mirror.ready(PATIENCE_S)
        assert driver.heard == ["p1 stopped:1", "p1 undefined:0", "other defined:0", "other started:0"]
        assert driver.mirror.by_uuid(UUID(int=99).bytes).state == (1, 1)


async def test_it_goes_away_before_all_is_known(vmand: Vmand) -> None:
    vmand.put(partition(1), notes={XML: text(1)})
    vmand.close("annotations")
    async with followed(vmand.path, ready=False) as driver:
        await until(lambda: vmand.asked["annotations"] == 1)
        await vmand.stop()
        vmand.closed.clear()
        await vmand.start()
        await driver.mirror.ready(PATIENCE_S)
        assert driver.names() == ["p1"]


async def test_a_vmand_that_hangs(vmand: Vmand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_ASK_EVERY_S", 0.02)
    monkeypatch.setattr(following, "_ANSWER_S", 0.2)
    vmand.put(partition(1, State.DEPLOYED))
    async with followed(vmand.path) as driver:
        await until(lambda: vmand.asked["subscribe"] > 3)  # it is asked, and nothing happens
        assert driver.states() == [1]
        gate = vmand.close("subscribe")
        assert "it does not answer within 0.2 s" in await driver.until_away()
        vmand.closed.clear()
        gate.set()
        await driver.mirror.ready(PATIENCE_S)
        assert driver.states() == [1]
        assert driver.heard == []


async def test_one_that_refuses_another_conversation_does_not_hang(
    vmand: Vmand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_ASK_EVERY_S", 0.001)
    vmand.put(partition(1))
    async with followed(vmand.path) as driver:
        vmand.answers["subscribe"] = UnavailableError("too many connections")
        asked = vmand.asked["subscribe"]
        await until(lambda: vmand.asked["subscribe"] > asked + 2)
        assert driver.names() == ["p1"]
        assert driver.syncs == 1


async def test_commands_that_take_long_have_a_conversation_apart(vmand: Vmand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_ASK_EVERY_S", 0.01)
    vmand.put(partition(1, State.DEPLOYED))
    async with followed(vmand.path) as driver:
        gate = vmand.close("suspend")
        waiting = [asyncio.create_task(driver.mirror.vmand.suspend(1)) for _ in range(20)]
        await until(lambda: vmand.under_way == 16)  # what it takes of one conversation
        asked = vmand.asked["subscribe"]
        await until(lambda: vmand.asked["subscribe"] > asked + 2)
        assert driver.states() == [1]  # it is not taken for one that hangs
        async with driver.mirror.apart() as conversation:
            assert await conversation.annotations(1) == {}
        gate.set()
        await asyncio.gather(*waiting)
        assert driver.states() == [3]


MALFORMED = {"kind": "state", "partition": 1, "time_s": 1.0, "now": {"id": 1, "state": "ASLEEP"}}


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({"list": [{"id": "x"}]}, "can't be understood: .*list|can't be understood: "),
        ({"list": None}, "can't be understood"),
        ({"annotations": {"a": 1}}, "can't be understood"),
        ({"annotations": FailedError("the journal can't be used")}, "the journal can't be used"),
        ({"list": FailedError("no")}, "no"),
        ({"subscribe": []}, "vmand's answer has no 'text'"),
        ({"capabilities": {"archs": 5}}, "can't be understood"),
    ],
)
async def test_answers_that_can_not_be_understood(vmand: Vmand, answers: dict[str, Any], why: str) -> None:
    vmand.put(partition(1))
    vmand.answers = dict(answers)
    async with followed(vmand.path, ready=False) as driver:
        await until(lambda: driver.mirror._told_away)
        with pytest.raises(LibvirtError, match=why):
            driver.mirror.all()
        vmand.answers.clear()
        await until(lambda: driver.mirror._ready.is_set() and driver.mirror._there().host.done())
        assert driver.names() == ["p1"]


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (MALFORMED, "event can't be read: .*ASLEEP"),
        (["x"], "event can't be read"),
        (Event(kind="state", partition=1, time_s=1.0), "'state' without a partition"),
    ],
)
async def test_events_that_can_not_be_understood(vmand: Vmand, event: Any, why: str) -> None:
    vmand.put(partition(1))
    async with followed(vmand.path) as driver:
        vmand.send(event)
        await until(lambda: driver.mirror._told_away)
        with pytest.raises(LibvirtError, match=why):
            driver.mirror.all()
        await driver.mirror.ready(PATIENCE_S)
        assert driver.names() == ["p1"]


async def test_a_bug_of_whoever_is_told_ends_the_task(vmand: Vmand) -> None:
    def fail(_old: Domain | None, new: Domain | None) -> None:
        if new is not None and new.active:
            raise ZeroDivisionError

    vmand.put(partition(1))
    one = Mirror(vmand.path, tell=lambda _happening: None, changed=fail)
    running = asyncio.create_task(one.run())
    await one.ready(PATIENCE_S)
    vmand.put(partition(1, State.DEPLOYED))
    with pytest.raises(ZeroDivisionError):
        await running


# The host


async def test_the_host_may_be_known_later(vmand: Vmand) -> None:
    gate = vmand.close("capabilities")
    async with followed(vmand.path) as driver:
        with pytest.raises(LibvirtError, match="still finding out") as caught:
            assert driver.mirror.capabilities
        assert caught.value.code is Code.SYSTEM_ERROR
        asking = asyncio.create_task(driver.mirror.host())
        given_up = asyncio.create_task(driver.mirror.host())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait({given_up})
        gate.set()
        assert await asking == HOST
        assert driver.mirror.capabilities == HOST
        assert vmand.asked["capabilities"] == 1


async def test_the_host_is_asked_for_again(
    vmand: Vmand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(following, "_ASK_HOST_AGAIN_S", 0.01)
    vmand.answers["capabilities"] = FailedError("the probe ended")
    async with followed(vmand.path) as driver:
        await until(lambda: "can't tell what its host gives: the probe ended" in caplog.text)
        vmand.answers.clear()
        assert await driver.mirror.host() == HOST
        assert driver.syncs == 1


async def test_it_waits_longer_after_each_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 9:
            raise ZeroDivisionError

    monkeypatch.setattr(mirror, "asyncio", _Asyncio(pause))
    with pytest.raises(ZeroDivisionError):
        await Mirror(tmp_path / "s", tell=lambda _happening: None).run()
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5])


class _Asyncio:
    """asyncio with a sleep of ours."""

    def __init__(self, sleep: Any) -> None:
        self.sleep = sleep

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


async def test_a_socket_that_nobody_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_ASK_EVERY_S", 0.01)
    monkeypatch.setattr(following, "_ANSWER_S", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(8)
        async with followed(tmp_path / "s", ready=False) as driver:
            await until(lambda: driver.mirror._told_away)
            with pytest.raises(LibvirtError, match=r"it does not answer within 0\.1 s"):
                driver.mirror.all()


async def test_an_event_of_another_version_is_an_end_with_a_reason(vmand: Vmand) -> None:
    """The client's part: what it can't read ends the conversation as any malformed line does."""
    heard: list[Event] = []
    async with await VmandClient.connect(vmand.path, on_event=heard.append) as client:
        await client.subscribe()
        vmand.send(MALFORMED)
        with pytest.raises(UnavailableError, match="event can't be read"):
            async for _ in client.events():
                pass
    assert heard == []
