"""Annotations and uuids of the caller's, and what listeners are told when: against a back end in memory."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgehold.api.vmand import Event, Mode, Partition, State, VmandClient
from edgehold.errors import BadRequestError, FailedError, NotFoundError
from edgehold.wire.control import ControlServer, bind_unix
from edgehold.wire.peer import Roles
from tests.unit.vmand_fake import IMAGES, Daemon, Listener
from vmand.api import Api
from vmand.backend import Grades
from vmand.change import Change, change_partition
from vmand.config import Config
from vmand.model import MIB, Record
from vmand.store import Store

UUID = "5f0f2f5c-8a51-4f0e-9e5e-0d8f5a0c7b11"


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
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
        ({"a": "1", "big": "ü" * 48 * 1024}, r"9830\d bytes in all are more than 98304; the longest is 'big'"),
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


async def test_two_definitions_of_44_kib_fit(daemon: Daemon, client: VmandClient) -> None:
    one = await daemon.make(State.READY)
    kept = {"definition": "d" * 44 * 1024, "live": "<" * 44 * 1024, "note": ""}
    for key, text in kept.items():
        await client.annotate(one, {key: text})
    assert await client.annotations(one) == kept


async def test_who_asks_for_many_at_once_is_not_cut_off(daemon: Daemon, client: VmandClient) -> None:
    one = await daemon.make(State.READY)
    kept = {"definition": '"' * 44 * 1024, "live": "\0" * 44 * 1024}
    daemon.service.annotate(one, kept)
    assert await asyncio.gather(*(client.annotations(one) for _ in range(16))) == [kept] * 16


async def test_an_annotation_in_the_middle_of_a_change_passes_no_bound(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon.make(State.READY)
    (before,) = daemon.rows()
    reserve = daemon.backend.reserve

    async def late(record: Record) -> Grades:
        if record.memory_bytes != before.memory_bytes:
            daemon.service.annotate(one, {"a": "x" * 60_000})
        return await reserve(record)

    monkeypatch.setattr(daemon.backend, "reserve", late)
    with pytest.raises(BadRequestError, match="bytes in all are more than 98304"):
        await change_partition(daemon.service, one, Change(memory_bytes=128 * MIB, annotations={"b": "x" * 60_000}))
    assert daemon.rows() == [before]
    assert daemon.world.memory == {before.uuid: before.memory_bytes}
    assert list(daemon.service.annotations(one)) == ["a"]


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
