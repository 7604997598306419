"""Changes, paused starts, shutdowns that leave, memory that comes back: against a back end in memory."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgehold.api.vmand import Event, Mode, Partition, State, VmandClient
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    FailedError,
    NoCapacityError,
    NotFoundError,
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

UUID = "5f0f2f5c-8a51-4f0e-9e5e-0d8f5a0c7b11"


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setattr("vmand.poweroff._PRESS_EVERY_S", 0.001)
    one = Daemon(tmp_path)
    await one.start()
    yield one
    await one.stop()
    assert one.faults == 0


@pytest.fixture
async def heard() -> list[Event | str]:
    """Events as they come to the client, and what the test notes in between."""
    return []


@pytest.fixture
async def client(daemon: Daemon, tmp_path: Path, heard: list[Event | str]) -> AsyncIterator[VmandClient]:
    """A conversation over the socket, in which all partitions are listened to."""
    server = ControlServer(Api(daemon.service, config=Config(), host_cores=4).handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    async with await VmandClient.connect(tmp_path / "s", on_event=heard.append) as one:
        await one.subscribe()
        yield one
    await server.close()


def listen(daemon: Daemon) -> list[Event]:
    listener = Listener()
    daemon.service.hub.subscribe(listener, None, console=False)
    return listener.events


# Annotations and uuids


async def test_annotations_are_kept_in_every_state_and_over_a_restart(daemon: Daemon) -> None:
    for state in (State.READY, State.DEPLOYED, State.SUSPENDED):
        one = await daemon.make(state, annotations={"a": "1", "b": state.value})
        daemon.service.annotate(one, {"a": None, "c.d_e-f": "x\0ü"})
    events = listen(daemon)
    daemon.service.annotate(1, {"b": "READY"})  # it is that already
    assert events == []
    daemon.service.annotate(1, {"b": ""})
    (event,) = events
    assert (event.kind, event.partition, event.now) == ("annotated", 1, daemon.service.status(1))
    await daemon.again()
    assert daemon.service.annotations(1) == {"b": "", "c.d_e-f": "x\0ü"}
    assert daemon.service.annotations(3) == {"b": "SUSPENDED", "c.d_e-f": "x\0ü"}
    await daemon.service.destroy(1)
    assert daemon.store.annotations(1) == {}
    for work in (daemon.service.annotations, lambda one: daemon.service.annotate(one, {})):
        with pytest.raises(NotFoundError):
            work(1)


async def test_a_command_under_way_neither_delays_an_annotation_nor_loses_it(daemon: Daemon) -> None:
    one = await daemon.make(State.BUSY, annotations={"a": "old"})
    daemon.service.annotate(one, {"a": "new"})
    await daemon.hurry()
    assert daemon.service.status(one).state is State.READY
    assert daemon.service.annotations(one) == {"a": "new"}
    await daemon.again()
    assert daemon.service.annotations(one) == {"a": "new"}


@pytest.mark.parametrize(
    ("annotations", "text"),
    [
        ({"": "x"}, "the key '' is not 1 to 64 of the characters"),
        ({"Ab": "x"}, "the key 'Ab'"),
        ({"a/b": None}, "the key 'a/b'"),
        ({"a" * 65: "x"}, "is not 1 to 64"),
        ({f"k{n}": "" for n in range(9)}, r"\d+ keys are more than 8; remove one with null"),
        ({"a": "1", "big": "ü" * 24 * 1024}, r"4915\d bytes in all are more than 49152; the longest is 'big'"),
    ],
)
async def test_annotations_that_are_refused(daemon: Daemon, annotations: dict[str, Any], text: str) -> None:
    one = await daemon.make(State.READY, annotations={"a": "1"})
    rows = daemon.rows()
    with pytest.raises(BadRequestError, match=f"annotations: .*{text}"):
        daemon.service.annotate(one, annotations)
    with pytest.raises(BadRequestError, match=f"annotations: .*{text}"):
        await change_partition(daemon.service, one, Change(name="b", annotations=annotations))
    if None not in annotations.values():
        with pytest.raises(BadRequestError, match=f"annotations: .*{text}"):
            await daemon.make(State.READY, annotations=annotations)
    assert daemon.service.annotations(one) == {"a": "1"}
    assert daemon.rows() == rows


async def test_a_full_disk_annotates_nothing(daemon: Daemon) -> None:
    one = await daemon.make(State.READY, annotations={"a": "1"})
    pages = daemon.store._db.execute("PRAGMA page_count").fetchone()[0]
    daemon.store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(FailedError, match="full"):
        daemon.service.annotate(one, {"a": None, "b": "x" * 40_000})
    assert daemon.service.annotations(one) == {"a": "1"}


async def test_a_uuid_of_ones_own(daemon: Daemon) -> None:
    one = await daemon.make(State.READY, own_uuid=UUID, annotations={"a": "1"})
    assert daemon.service.status(one).uuid == UUID
    for bad in ("x", UUID.upper(), UUID[:-1], f"{UUID}\n", "00000000-0000-0000-0000-000000000000", f"../{UUID}"):
        with pytest.raises(BadRequestError, match=r"uuid: .* is none as"):
            await daemon.make(State.READY, own_uuid=bad)
    with pytest.raises(BadRequestError, match=f"uuid: {UUID} is another partition's"):
        await daemon.make(State.READY, own_uuid=UUID)
    await daemon.service.destroy(one)
    again = await daemon.make(State.READY, own_uuid=UUID)
    assert daemon.service.annotations(again) == {}


async def test_a_uuid_whose_end_could_not_be_written_is_not_given(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start would remove the memory of that uuid."""
    one = await daemon.make(State.READY, own_uuid=UUID)
    with monkeypatch.context() as patch:
        patch.setattr(daemon.store, "delete", _full)
        await daemon.service.destroy(one)
        with pytest.raises(BadRequestError, match="another partition's"):
            await daemon.make(State.READY, own_uuid=UUID)
    two = await daemon.make(State.READY, own_uuid=UUID)
    await daemon.again()
    assert [row.id for row in daemon.rows()] == [two]
    assert set(daemon.world.memory) == {UUID}


def _full(*_args: object, **_options: object) -> None:
    raise FailedError("the journal can't be used: database or disk is full")


def test_a_journal_of_version_1_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "vmand.db"
    record = Record(uuid=UUID, name="old", mode=Mode.SHARED, cores=2, memory_bytes=64 * MIB, state=State.DEPLOYED)
    told = {key: value for key, value in msgspec.to_builtins(record).items() if key != "leave"}  # which it did not have
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute("PRAGMA journal_mode=WAL")
        old.execute("CREATE TABLE partition (id INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL) STRICT")
        old.execute("INSERT INTO partition (id, record) VALUES (7, ?)", (msgspec.json.encode(told),))
        old.execute("PRAGMA user_version=1")
    for _start in range(2):
        with contextlib.closing(Store(path)) as store:
            assert store.all() == [msgspec.structs.replace(record, id=7)]
            store.annotate(7, {"a": "1"})
            assert store.annotations(7) == {"a": "1"}
            assert store._db.execute("PRAGMA user_version").fetchone() == (2,)


# What is told, and when


async def test_events_carry_the_partition_and_come_before_the_answer(
    daemon: Daemon, client: VmandClient, heard: list[Event | str]
) -> None:
    one = await client.create_partition(cores=1, memsize_gb=0.0625, mode=Mode.SHARED, uuid=UUID, annotations={"a": "1"})
    heard.append("created")
    await daemon.service.deploy(one, IMAGES)
    await client.status(one)
    heard.clear()
    await client.suspend(one)
    heard.append("suspended")
    await client.annotate(one, {"a": "2", "b": "3"})
    heard.append("annotated")
    assert await client.annotations(one) == {"a": "2", "b": "3"}
    await client.shutdown(one, force=True)
    heard.append("off")
    done = await client.change_partition(one, name="new", memsize_gb=0.125, annotations={"a": None})
    heard.append("changed")
    assert (done.name, done.memory_bytes, done.uuid) == ("new", 128 * MIB, UUID)
    assert await client.annotations("new") == {"b": "3"}
    await client.destroy_partition(one)
    heard.append("gone")
    seen = [
        item if isinstance(item, str) else (item.kind, item.now and (item.now.state, item.now.name)) for item in heard
    ]
    assert seen == [
        ("state", (State.SUSPENDED, "p1")),
        "suspended",
        ("annotated", (State.SUSPENDED, "p1")),
        "annotated",
        ("state", (State.BUSY, "p1")),
        ("state", (State.READY, "p1")),
        "off",
        ("state", (State.BUSY, "p1")),
        ("state", (State.READY, "new")),
        ("annotated", (State.READY, "new")),
        "changed",
        ("state", (State.BUSY, "new")),
        ("gone", None),
        "gone",
    ]
    changed = next(item for item in heard if isinstance(item, Event) and item.now and item.now.name == "new")
    assert isinstance(changed.now, Partition)
    assert changed.now == done


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


async def test_what_a_back_end_lacks_is_refused_for_paused(daemon: Daemon, client: VmandClient) -> None:
    one = await daemon.make(State.READY)
    daemon.backend.traits -= {Trait.PAUSED}
    with pytest.raises(UnsupportedError, match="deploy: paused: not supported on this back end"):
        await client.deploy(one, kernel=Path("/nowhere"), paused=True)


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
    assert daemon.service.status(one).state is (State.DEPLOYED if lives else State.READY)
    assert bool(daemon.world.guests) == lives
    (row,) = daemon.rows()
    assert row.pending == ""


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


async def test_memory_that_is_not_there_any_more_is_a_reason(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await daemon.make(State.FAILED)
    failed = daemon.service.status(one).reason
    daemon.world.memory.clear()

    async def reserve(_self: object, _record: Record) -> None:
        raise NoCapacityError("memory: 64 MiB are wanted and 1 MiB are left")

    with monkeypatch.context() as patch:
        patch.setattr("tests.unit.vmand_fake.FakeBackend.reserve", reserve)
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
