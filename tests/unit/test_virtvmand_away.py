"""The mirror and a vmand that goes away, hangs, comes back as another, or says what nobody understands."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from edgehold.api.vmand import Event, State, VmandClient
from edgehold.errors import FailedError, UnavailableError
from tests.unit.virtvmand_fake import HOST, PATIENCE_S, Driver, Vmand, followed, partition, text, until
from virtvmand import following, mirror
from virtvmand.domain import TRANSIENT, XML, YES, Domain
from virtvmand.errors import Code, LibvirtError
from virtvmand.mirror import Mirror


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


# Away and back


async def test_nobody_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(tmp_path / "s")
    with pytest.raises(LibvirtError, match=r"not reachable at .*/s: it was not asked yet"):
        driver.mirror.all()
    async with followed(tmp_path / "s", ready=False) as driver:
        with pytest.raises(LibvirtError, match="No such file or directory; is the daemon running") as caught:
            await driver.mirror.ready(0.3)  # two or three attempts
        assert caught.value.code is Code.SYSTEM_ERROR
        assert str(caught.value).count(str(tmp_path)) == 1
        for look in (
            lambda: driver.mirror.vmand,
            lambda: driver.mirror.known_host,
            driver.mirror.all,
            lambda: driver.mirror.by_id(1),
            lambda: driver.mirror.by_name("x"),
            lambda: driver.mirror.by_uuid(bytes(16)),
        ):
            with pytest.raises(LibvirtError, match="not reachable"):
                look()
        with pytest.raises(LibvirtError, match="not reachable"):
            await driver.mirror.host()
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


async def test_commands_that_take_long_are_no_hang(vmand: Vmand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_ASK_EVERY_S", 0.01)
    vmand.put(partition(1, State.DEPLOYED))
    async with followed(vmand.path) as driver:
        gate = vmand.close("suspend")
        waiting = [asyncio.create_task(driver.mirror.vmand.suspend(1)) for _ in range(20)]
        await until(lambda: vmand.under_way == 16)  # what it takes of one conversation
        asked = vmand.asked["subscribe"]
        await until(lambda: vmand.asked["subscribe"] > asked + 2)
        assert driver.states() == [1]  # it is not taken for one that hangs
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
        early = driver.mirror.known_host
        assert early is None
        asking = asyncio.create_task(driver.mirror.host())
        given_up = asyncio.create_task(driver.mirror.host())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait({given_up})
        gate.set()
        assert await asking == HOST
        assert driver.mirror.known_host == HOST
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
