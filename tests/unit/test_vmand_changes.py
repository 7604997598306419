"""Changes, paused starts, shutdowns that leave, memory that comes back: against a back end in memory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgehold.api.vmand import Event, Mode, State, VmandClient
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    FailedError,
    NoCapacityError,
    TimedOutError,
    UnsupportedError,
)
from edgehold.wire.control import ControlServer, bind_unix
from edgehold.wire.peer import Roles
from tests.unit.vmand_fake import IMAGES, Daemon, Listener
from vmand import model
from vmand.api import Api
from vmand.backend import Finding, Trait
from vmand.change import Change, change_partition
from vmand.config import Config
from vmand.model import MIB, Found, Record
from vmand.store import Store


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setattr("vmand.poweroff._PRESS_EVERY_S", 0.001)
    one = Daemon(tmp_path)
    await one.start()
    yield one
    await one.stop()
    assert one.faults == 0


def listen(daemon: Daemon) -> list[Event]:
    listener = Listener()
    daemon.service.hub.subscribe(listener, None, console=False)
    return listener.events


# A paused start


async def test_a_paused_start_is_suspended_until_it_is_restored(daemon: Daemon) -> None:
    one = await daemon.make(State.READY)
    record = await daemon.service.deploy(one, IMAGES, paused=True)
    assert (record.state, record.boot_count) == (State.SUSPENDED, 1)
    await asyncio.sleep(0.01)  # the look that follows
    assert daemon.service.status(one).state is State.SUSPENDED
    await daemon.again()
    assert daemon.service.status(one).state is State.SUSPENDED
    await daemon.service.restore(one)
    assert daemon.world.guests == {record.run: Found.RUNNING}


async def test_what_a_back_end_lacks_is_refused_for_paused(daemon: Daemon, tmp_path: Path) -> None:
    one = await daemon.make(State.READY)
    daemon.backend.traits -= {Trait.PAUSED}
    server = ControlServer(Api(daemon.service, config=Config(), host_cores=4).handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    async with await VmandClient.connect(tmp_path / "s") as client:
        with pytest.raises(UnsupportedError, match="deploy: paused: not supported on this back end"):
            await client.deploy(one, kernel=Path("/nowhere"), paused=True)
    await server.close()


# A shutdown that leaves


@pytest.mark.parametrize("state", [State.DEPLOYED, State.SUSPENDED])
async def test_a_guest_that_does_not_obey_is_left_as_it_was(daemon: Daemon, state: State) -> None:
    one = await daemon.make(state)
    daemon.backend.obeys_after = 10**9
    before, guests, events = daemon.rows(), dict(daemon.world.guests), listen(daemon)
    with pytest.raises(TimedOutError, match=rf"did not power off within 0\.02 s; it goes on, and is {state.value}"):
        await daemon.service.shutdown(one, timeout_s=0.02, leave=True)
    assert daemon.backend.presses > 0
    assert (daemon.rows(), daemon.world.guests) == (before, guests)
    assert [(event.state, event.reason) for event in events] == [(State.BUSY, "shutdown"), (state, "")]
    daemon.backend.obeys_after = 1
    assert (await daemon.service.shutdown(one, leave=True)).state is State.READY


async def test_force_hurries_a_shutdown_that_would_leave(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.obeys_after = 10**9
    waits = asyncio.create_task(daemon.service.shutdown(one, timeout_s=60, leave=True))
    await daemon.until(lambda: daemon.backend.presses > 0)
    assert (await daemon.service.shutdown(one, force=True)).state is State.READY
    done = await waits
    assert (done.state, done.reason, done.leave) == (State.READY, "ended by force: it was asked for", False)
    assert daemon.world.guests == {}
    with pytest.raises(BadRequestError, match="force or leave, not both"):
        await daemon.service.shutdown(one, force=True, leave=True)


@pytest.mark.parametrize(
    ("found", "state"), [(Found.OFF, State.READY), (Found.FAILED, State.FAILED), (None, State.FAILED)]
)
async def test_a_guest_that_ends_in_the_last_moment(
    daemon: Daemon, found: Found | None, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.obeys_after = 10**9
    run = daemon.service.record(one).run

    async def look(_record: Record) -> Finding:
        if found is None:
            return Finding(found=Found.GONE, reason="its process was killed")
        daemon.world.guests[run] = found
        return Finding(found=found)

    monkeypatch.setattr(daemon.backend, "look", look)
    if found is Found.OFF:
        done = await daemon.service.shutdown(one, timeout_s=0.01, leave=True)
        assert done.reason == ""
    else:
        with pytest.raises(FailedError, match=r"did not power off within .*, and it failed meanwhile"):
            await daemon.service.shutdown(one, timeout_s=0.01, leave=True)
    (row,) = daemon.rows()
    assert (row.state, row.pending, row.run) == (state, "", "")
    assert daemon.world.guests.get(run) is None


async def test_a_back_end_that_is_busy_with_the_press_is_asked_again(daemon: Daemon) -> None:
    one = await daemon.make(State.SUSPENDED)
    daemon.backend.obeys_after = 10**9
    daemon.backend.fail["suspend"] = BadStateError("the firmware has it BUSY", retryable=True)
    waits = asyncio.create_task(daemon.service.shutdown(one, timeout_s=0.01, leave=True))
    await daemon.until(lambda: daemon.backend.presses > 0)
    await asyncio.sleep(0.05)
    daemon.backend.fail.clear()
    with pytest.raises(TimedOutError, match="is SUSPENDED"):
        await waits
    assert list(daemon.world.guests.values()) == [Found.PAUSED]


async def test_a_hung_guest_that_is_left_keeps_its_state(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmand.poweroff._LOOK_FOR_S", 0.01)
    one = await daemon.make(State.DEPLOYED)
    before = daemon.rows()
    daemon.backend.fail |= {name: TimedOutError("QEMU hangs") for name in ("press_power", "look")}
    with pytest.raises(TimedOutError, match="QEMU hangs"):
        await daemon.service.shutdown(one, timeout_s=0.01, leave=True)
    assert daemon.rows() == before
    assert list(daemon.world.guests.values()) == [Found.RUNNING]
    daemon.backend.fail.clear()


@pytest.mark.parametrize("state", [State.DEPLOYED, State.SUSPENDED, State.FAILED])
@pytest.mark.parametrize("leave", [True, False])
async def test_a_shutdown_that_was_cut_off_ends_no_guest_that_it_was_to_leave(
    daemon: Daemon, state: State, leave: bool
) -> None:
    one = await daemon.make(state)
    record = daemon.service.record(one)
    await daemon.stop()
    with contextlib.closing(Store(daemon.path)) as store:
        store.save(msgspec.structs.replace(record, pending=model.SHUTDOWN, leave=leave))
    if state is State.SUSPENDED:  # it had gone on for the button
        daemon.world.guests[record.run] = Found.RUNNING
    await daemon.start()
    lives = leave and state is not State.FAILED
    assert daemon.service.status(one).state is (state if lives else State.READY)
    before = Found.PAUSED if state is State.SUSPENDED else Found.RUNNING
    assert daemon.world.guests == ({record.run: before} if lives else {})
    (row,) = daemon.rows()
    assert row.pending == ""


# Who does not wait


@pytest.fixture
async def client(daemon: Daemon, tmp_path: Path) -> AsyncIterator[VmandClient]:
    """A conversation over the socket; a command waits long for the one before it."""
    daemon.service.book._patience_s = 20
    server = ControlServer(Api(daemon.service, config=Config(), host_cores=4).handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    async with await VmandClient.connect(tmp_path / "s") as one:
        yield one
    await server.close()


async def test_who_does_not_wait_is_refused_at_once_where_a_command_is_under_way(
    daemon: Daemon, client: VmandClient
) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.obeys_after = 10**9
    await client.reboot(one, graceful=True, timeout_s=60, wait=False)
    assert daemon.service.status(one).command == model.REBOOT
    for ask in (partial(client.shutdown, leave=True), client.reboot):
        with pytest.raises(BadStateError, match="is BUSY: reboot is under way") as refused:
            await ask(one, wait=False)
        assert refused.value.retryable
    await client.shutdown(one, force=True, wait=False)  # it waits for nobody's guest
    await daemon.until(lambda: daemon.service.status(one).state is State.READY)
    with pytest.raises(BadStateError, match="READY"):
        await client.shutdown(one, wait=False)


@pytest.mark.parametrize("command", [model.SHUTDOWN, model.REBOOT])
async def test_who_does_not_wait_hears_that_it_has_begun_when_it_has(
    daemon: Daemon, client: VmandClient, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmand.api._REFUSAL_S", 0.001)
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.obeys_after = 10**9
    ask = client.shutdown if command == model.SHUTDOWN else partial(client.reboot, graceful=True)
    async with daemon.service.book.lock(one):  # as a look at the guest does
        asked = asyncio.create_task(ask(one, timeout_s=60, wait=False))
        assert not (await asyncio.wait({asked}, timeout=0.1))[0]
    await asked
    assert daemon.service.status(one).command == command
    await daemon.service.shutdown(one, force=True)


# Changes


async def test_what_a_change_changes_and_what_stays(daemon: Daemon) -> None:
    one = await daemon.make(State.READY, mode=Mode.DEDICATED, cores=2, name="a")
    before = daemon.service.record(one)
    daemon.backend.fail["reserve"] = FailedError("nothing is to be taken for that")
    renamed = await change_partition(daemon.service, one, Change(name="b", annotations={"x": "1"}))
    assert renamed == msgspec.structs.replace(before, name="b")
    smaller = await change_partition(daemon.service, one, Change(cores=3))  # its own count as free
    assert (smaller.cores, smaller.cpus) == (3, (1, 2, 3))
    shared = await change_partition(daemon.service, one, Change(mode=Mode.SHARED, cores=1))
    assert (shared.mode, shared.cpus, shared.node) == (Mode.SHARED, (), None)
    assert (await daemon.service.capabilities()).cores_free == (1, 2, 3)
    assert await change_partition(daemon.service, one, Change()) == shared
    daemon.backend.fail.clear()
    larger = await change_partition(daemon.service, one, Change(memory_bytes=1024 * MIB))  # more than is left beside it
    assert (daemon.world.memory, daemon.world.free) == ({before.uuid: 1024 * MIB}, 0)
    await daemon.again()
    assert daemon.service.record(one) == larger
    assert daemon.service.annotations(one) == {"x": "1"}


@pytest.mark.parametrize(
    ("wanted", "kind", "text"),
    [
        (Change(name="1"), BadRequestError, "name: '1' is not"),
        (Change(name="taken"), BadRequestError, "is taken by another"),
        (Change(mode=Mode.DEDICATED, cores=3), NoCapacityError, "3 are wanted .* 2 are left"),
        (Change(memory_bytes=961 * MIB, name="b"), NoCapacityError, "961 MiB are wanted and 960 MiB are left"),
        (Change(secure=True), UnsupportedError, "secure: not supported"),
        (Change(strict=True), BadRequestError, "strict: a shared partition has no cores"),
        (Change(strict=True, mode=Mode.DEDICATED), NoCapacityError, "can't be isolated on this host"),
    ],
)
async def test_changes_that_are_refused_change_nothing(
    daemon: Daemon, wanted: Change, kind: type[Exception], text: str
) -> None:
    one = await daemon.make(State.READY)
    await daemon.make(State.READY, name="taken", mode=Mode.DEDICATED)
    rows, memory = daemon.rows(), dict(daemon.world.memory)
    with pytest.raises(kind, match=text):
        await change_partition(daemon.service, one, wanted)
    assert (daemon.rows(), daemon.world.memory) == (rows, memory)
    assert daemon.service.records == rows


async def test_a_change_whose_memory_is_not_there_takes_back_what_it_had(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon.make(State.READY)
    (before,) = daemon.rows()
    real = daemon.backend.reserve

    async def reserve(record: Record) -> Any:
        if record.memory_bytes > 64 * MIB:
            raise NoCapacityError("memory: somebody took it meanwhile")
        return await real(record)

    monkeypatch.setattr(daemon.backend, "reserve", reserve)
    with pytest.raises(NoCapacityError, match="took it meanwhile; the partition is as it was"):
        await change_partition(daemon.service, one, Change(memory_bytes=128 * MIB, name="b"))
    assert daemon.rows() == [before]
    assert daemon.world.memory == {before.uuid: 64 * MIB}


async def test_a_change_that_leaves_no_memory_says_so_and_deploy_tries_again(daemon: Daemon) -> None:
    one = await daemon.make(State.READY)
    daemon.backend.fail["reserve"] = NoCapacityError("memory: none is left")
    with pytest.raises(NoCapacityError, match=r"none is left; its memory is gone .* none is left; deploy tries again"):
        await change_partition(daemon.service, one, Change(memory_bytes=128 * MIB, name="b"))
    (row,) = daemon.rows()
    assert (row.name, row.memory_bytes, row.pending) == ("p1", 64 * MIB, "")
    assert "its memory is gone" in row.reason
    with pytest.raises(NoCapacityError, match=r"its memory is gone .*: memory: none is left"):
        await daemon.service.deploy(one, IMAGES)
    assert daemon.rows() == [row]
    daemon.backend.fail.clear()
    assert (await daemon.service.deploy(one, IMAGES)).reason == ""
    assert daemon.world.memory == {row.uuid: 64 * MIB}


# Memory that is gone


@pytest.mark.parametrize("state", [State.READY, State.FAILED, State.DEPLOYED, State.SUSPENDED])
async def test_memory_comes_back_after_a_new_start_of_the_host(daemon: Daemon, state: State) -> None:
    one = await daemon.make(state)
    (row,) = daemon.rows()
    await daemon.stop()
    daemon.world.memory.clear()
    daemon.world.guests.clear()
    daemon.world.free = 1024 * MIB
    await daemon.start()
    await daemon.until(lambda: daemon.world.memory == {row.uuid: 64 * MIB})
    expected = State.READY if state is State.READY else State.FAILED
    await daemon.until(lambda: daemon.service.status(one).state is expected)
    assert "memory" not in daemon.service.status(one).reason
    if expected is State.FAILED:
        await daemon.service.shutdown(one)
    await daemon.service.deploy(one, IMAGES)


async def test_memory_that_is_still_to_be_taken_anew_is_nobody_elses(daemon: Daemon) -> None:
    first, second = [await daemon.make(State.READY) for _ in range(2)]
    kept = {row.uuid: row.memory_bytes for row in daemon.rows()}
    await daemon.stop()
    daemon.world.memory.clear()
    daemon.world.free = 160 * MIB
    await daemon.start()
    service = daemon.service
    async with service.book.lock(second):  # between the one and the other
        assert service.capacity.memory_free() == 32 * MIB
        await daemon.until(lambda: service.record(first).uuid in daemon.world.memory)
        assert service.capacity.memory_free() == 32 * MIB
        assert service.capacity.memory_free(besides=service.record(second)) == 96 * MIB
        with pytest.raises(NoCapacityError, match="memory"):
            await service.create(cores=1, memory_bytes=64 * MIB, mode=Mode.SHARED)
    await daemon.until(lambda: daemon.world.memory == kept)
    assert service.capacity.memory_free() == 32 * MIB
    third = await service.create(cores=1, memory_bytes=32 * MIB, mode=Mode.SHARED)
    await service.destroy(third.id)


async def test_memory_that_can_not_be_taken_anew_is_not_waited_for(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = [await daemon.make(State.READY) for _ in range(2)]
    await daemon.stop()
    daemon.world.memory.clear()
    daemon.world.free = 1024 * MIB
    with monkeypatch.context() as patch:
        patch.setattr("tests.unit.vmand_fake.FakeBackend.reserve", _none_is_left)
        await daemon.start()
        assert daemon.service.capacity.memory_free() == 896 * MIB
        await daemon.service.destroy(other)
        await daemon.until(lambda: "deploy tries again" in daemon.service.status(one).reason)
    assert daemon.service.capacity.memory_free() == 1024 * MIB


async def _none_is_left(_self: object, _record: Record) -> None:
    raise NoCapacityError("memory: 64 MiB are wanted and 1 MiB are left")


async def test_memory_that_is_not_there_any_more_is_a_reason(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await daemon.make(State.FAILED)
    failed = daemon.service.status(one).reason
    daemon.world.memory.clear()

    with monkeypatch.context() as patch:
        patch.setattr("tests.unit.vmand_fake.FakeBackend.reserve", _none_is_left)
        for _start in range(2):  # it is said once
            await daemon.again()
            await daemon.until(lambda: "memory" in daemon.service.status(one).reason)
            reason = daemon.service.status(one).reason
            assert reason.startswith(f"{failed}; its memory is gone (was the host started anew?), and can't be taken")
            assert reason.count("deploy tries again") == 1
    await daemon.again()
    await daemon.until(lambda: daemon.service.status(one).reason == failed)
    assert len(daemon.world.memory) == 1


async def test_what_can_not_be_known_is_left_alone(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await daemon.make(State.READY)
    rows = daemon.rows()

    async def holds(_self: object, _record: Record) -> bool:
        raise TimedOutError("the firmware does not answer")

    with monkeypatch.context() as patch:
        patch.setattr("tests.unit.vmand_fake.FakeBackend.holds", holds)
        await daemon.again()
        assert daemon.rows() == rows
    await daemon.service.deploy(one, IMAGES)
