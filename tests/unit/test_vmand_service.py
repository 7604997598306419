"""The service against a back end in memory: every (state, command) pair, every refusal, every cut-off command."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgehold.api.vmand import CoresGrade, Mode, State
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    EdgeholdError,
    FailedError,
    NoCapacityError,
    NotFoundError,
    TimedOutError,
    UnsupportedError,
)
from tests.unit.vmand_fake import COMMANDS, IMAGES, Daemon, FakeBackend, Listener
from vmand import model
from vmand.backend import Finding
from vmand.model import MIB, TABLE, Found, Record
from vmand.store import Store


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    one = Daemon(tmp_path)
    await one.start()
    yield one
    await one.stop()
    assert one.faults == 0


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("command", COMMANDS)
async def test_every_command_in_every_state(daemon: Daemon, state: State, command: str) -> None:
    one = await daemon.make(state)
    rows, world = daemon.rows(), dict(daemon.world.guests)
    listener = Listener()
    daemon.service.hub.subscribe(listener, one, console=False)
    allowed, target = TABLE.table[command]
    if state not in allowed:
        text = f"partition {one} is {state.value}; {command} needs"
        if state is State.BUSY:
            text = f"partition {one} is BUSY: shutdown is under way; {command} can be tried again"
        with pytest.raises(BadStateError, match=text) as caught:
            await daemon.run(command, one)
        assert caught.value.retryable == (state is State.BUSY)
        assert daemon.rows() == rows
        assert daemon.world.guests == world
        assert listener.events == []
        await daemon.hurry()
        return
    await daemon.run(command, one)
    if target is None:
        with pytest.raises(NotFoundError):
            daemon.service.status(one)
        assert daemon.rows() == []
        assert (daemon.world.memory, daemon.world.guests) == ({}, {})
        assert [(event.kind, event.state) for event in listener.events] == [("state", State.BUSY), ("gone", None)]
        return
    assert daemon.service.status(one).state is target
    (row,) = daemon.rows()
    assert (row.state, row.pending) == (target, "")
    assert [event.state for event in listener.events if event.kind == "state"][-1] is target
    assert bool(daemon.world.guests) == (target in model.LIVE)
    await daemon.again()
    assert daemon.service.status(one).state is target


@pytest.mark.parametrize("command", COMMANDS)
async def test_no_such_partition(daemon: Daemon, command: str) -> None:
    with pytest.raises(NotFoundError, match="no partition 77"):
        await daemon.run(command, 77)


@pytest.mark.parametrize(
    ("state", "command", "method"),
    [
        (State.READY, model.DEPLOY, "start"),
        (State.DEPLOYED, model.SUSPEND, "suspend"),
        (State.SUSPENDED, model.RESTORE, "restore"),
        (State.DEPLOYED, model.REBOOT, "reboot"),
        (State.DEPLOYED, model.SHUTDOWN, "end"),
        (State.READY, model.DESTROY, "end"),
    ],
)
async def test_what_the_back_end_refuses_changes_nothing(
    daemon: Daemon, state: State, command: str, method: str
) -> None:
    one = await daemon.make(state)
    (before,) = daemon.rows()
    daemon.backend.fail[method] = TimedOutError("QEMU hangs")
    daemon.backend.obeys_after = 10**9
    with pytest.raises(TimedOutError, match="QEMU hangs"):
        await daemon.run(command, one)
    assert daemon.rows() == [before]
    assert daemon.service.record(one) == before
    assert bool(daemon.world.guests) == (state in model.LIVE)
    daemon.backend.fail.clear()
    await daemon.run(command, one)


async def test_a_create_that_fails_leaves_nothing(daemon: Daemon) -> None:
    daemon.backend.fail["reserve"] = NoCapacityError("full")
    with pytest.raises(NoCapacityError):
        await daemon.make(State.READY)
    assert daemon.rows() == []
    assert daemon.service.partitions() == []
    daemon.backend.fail.clear()
    capabilities = await daemon.service.capabilities()
    assert capabilities.cores_pool == capabilities.cores_free == (1, 2, 3)
    assert (capabilities.cores_grade, capabilities.cores_reason) == (CoresGrade.PINNED, "no cpuset here")
    assert "secure" not in capabilities.supports


async def test_ids_are_never_used_twice(daemon: Daemon) -> None:
    first = await daemon.make(State.READY)
    await daemon.service.destroy(first)
    await daemon.again()
    assert await daemon.make(State.READY) > first


async def test_cores_memory_and_names_run_out(daemon: Daemon) -> None:
    first = await daemon.make(State.READY, mode=Mode.DEDICATED, cores=2, name="a")
    assert daemon.service.status(first).cpus == (1, 2)
    with pytest.raises(NoCapacityError, match=r"2 are wanted .* 1 is left: core 3;"):
        await daemon.make(State.READY, mode=Mode.DEDICATED, cores=2)
    with pytest.raises(BadRequestError, match="taken"):
        await daemon.make(State.READY, name="a")
    with pytest.raises(NoCapacityError, match="2000 MiB are wanted and 960 MiB are left"):
        await daemon.make(State.READY, memory_bytes=2000 * MIB)
    second = await daemon.make(State.READY, mode=Mode.DEDICATED)
    third = await daemon.make(State.READY)
    with pytest.raises(NoCapacityError, match="3 partitions exist"):
        await daemon.make(State.READY)
    assert daemon.service.status(second).cpus == (3,)
    assert daemon.service.status(third).name == f"p{third}"
    await daemon.service.destroy(first)
    assert (await daemon.service.capabilities()).cores_free == (1, 2)


async def test_a_name_that_looks_like_the_next_default(daemon: Daemon) -> None:
    await daemon.make(State.READY, name="p2")
    second = await daemon.make(State.READY)
    assert daemon.service.status(second).name == "p2-2"


async def test_creates_at_once_share_what_is_there(daemon: Daemon) -> None:
    made = await asyncio.gather(
        *(daemon.make(State.READY, mode=Mode.DEDICATED, cores=2) for _ in range(3)), return_exceptions=True
    )
    assert sorted(type(one).__name__ for one in made) == ["NoCapacityError", "NoCapacityError", "int"]


async def test_commands_on_one_partition_take_turns(daemon: Daemon) -> None:
    one = await daemon.make(State.READY)
    made = await asyncio.gather(*(daemon.service.deploy(one, IMAGES) for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(one, Record) for one in made) == 1
    assert sum(isinstance(one, BadStateError) for one in made) == 3
    assert len(daemon.world.guests) == 1


async def test_power_button_is_pressed_until_it_is_obeyed(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmand.poweroff._PRESS_EVERY_S", 0.001)
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.obeys_after = 3
    record = await daemon.service.shutdown(one, timeout_s=5)
    assert (record.state, record.reason, daemon.backend.presses) == (State.READY, "", 3)


async def test_a_guest_that_does_not_obey_is_ended_by_force(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.obeys_after = 10**9
    record = await daemon.service.shutdown(one, timeout_s=0.02)
    assert record.state is State.READY
    assert "by force" in record.reason
    assert daemon.world.guests == {}


async def test_force_presses_no_button(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    await daemon.service.shutdown(one, force=True)
    assert daemon.backend.presses == 0


async def test_a_hung_qemu_can_be_shut_down(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.fail["press_power"] = TimedOutError("no answer")
    assert (await daemon.service.shutdown(one, timeout_s=0.01)).state is State.READY


@pytest.mark.parametrize(
    ("found", "state", "reason"),
    [
        (Found.OFF, State.READY, "powered itself off"),
        (Found.FAILED, State.FAILED, "failed"),
        (None, State.FAILED, "gone"),
        (Found.PAUSED, State.SUSPENDED, ""),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
async def test_what_a_guest_does_by_itself(
    daemon: Daemon, found: Found | None, state: State, reason: str, restart: bool
) -> None:
    one = await daemon.make(State.DEPLOYED)
    run = daemon.service.record(one).run
    if found is None:
        del daemon.world.guests[run]
    else:
        daemon.world.guests[run] = found
    if restart:
        await daemon.again()
    else:
        daemon.backend.changed(one, run)
    await daemon.until(lambda: daemon.service.status(one).state is state)
    assert reason in daemon.service.status(one).reason
    (row,) = daemon.rows()
    assert row.state is state
    if state not in model.LIVE:
        await daemon.until(lambda: daemon.world.guests == {} and daemon.rows()[0].run == "")
        if state is State.FAILED:
            await daemon.service.shutdown(one)
        await daemon.service.deploy(one, IMAGES)


async def test_old_news_of_an_earlier_run_are_nothing(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    old = daemon.service.record(one).run
    await daemon.service.shutdown(one)
    await daemon.service.deploy(one, IMAGES)
    daemon.backend.changed(one, old)
    daemon.backend.changed(99, old)
    await asyncio.sleep(0.01)
    assert daemon.service.status(one).state is State.DEPLOYED


async def test_a_watcher_of_a_guest_that_dies_is_noticed(daemon: Daemon) -> None:
    async def die(error: Exception | None) -> None:
        if error is not None:
            raise error

    for error, faults in ((None, 0), (FailedError("told already"), 0), (ValueError("a bug"), 1)):
        task = asyncio.create_task(die(error))
        task.add_done_callback(daemon.backend.ended)
        await asyncio.wait({task})
        await asyncio.sleep(0)
        assert daemon.faults == faults
    daemon.faults = 0


class Cut(BaseException):
    """The daemon's end at this very instant."""


def cut_after(store: Store, writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the given write on the daemon is dead: nothing more is written."""
    left = [writes]

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(argument: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise Cut
            left[0] -= 1
            return real(argument, **options)

        return write

    for name in ("insert", "save", "delete"):
        monkeypatch.setattr(store, name, guard(getattr(store, name)))


CUTS = {
    # (state before, command, writes that got through) -> the states that may be found then; None: no partition
    ("", model.CREATE, 0): None,
    ("", model.CREATE, 1): None,
    (State.READY, model.DEPLOY, 0): State.READY,
    (State.READY, model.DEPLOY, 1): State.READY,
    (State.DEPLOYED, model.SUSPEND, 0): State.DEPLOYED,
    (State.DEPLOYED, model.SUSPEND, 1): State.SUSPENDED,
    (State.SUSPENDED, model.RESTORE, 0): State.SUSPENDED,
    (State.SUSPENDED, model.RESTORE, 1): State.DEPLOYED,
    (State.DEPLOYED, model.REBOOT, 0): State.DEPLOYED,
    (State.DEPLOYED, model.REBOOT, 1): State.DEPLOYED,
    (State.DEPLOYED, model.SHUTDOWN, 0): State.DEPLOYED,
    (State.DEPLOYED, model.SHUTDOWN, 1): State.READY,
    (State.FAILED, model.SHUTDOWN, 1): State.READY,
    (State.READY, model.DESTROY, 0): State.READY,
    (State.READY, model.DESTROY, 1): None,
    (State.SUSPENDED, model.DESTROY, 0): State.SUSPENDED,
    (State.SUSPENDED, model.DESTROY, 1): None,
    (State.FAILED, model.DESTROY, 1): None,
    (State.READY, model.CHANGE, 0): State.READY,
    (State.READY, model.CHANGE, 1): State.READY,
}


@pytest.mark.parametrize(
    ("case", "expected", "acted"),
    [
        (case, expected, acted)
        for case, expected in CUTS.items()
        for acted in (True, False)
        if acted or case[2] > 0  # without an intent nothing is acted on
    ],
)
async def test_a_command_that_is_cut_off(
    daemon: Daemon, case: tuple[str, str, int], expected: State | None, acted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, command, writes = case
    one = await daemon.make(State(state)) if state else 0
    if not acted:  # the end comes between the intent and the act
        for name in ("reserve", "start", "suspend", "restore", "reboot", "end", "press_power"):
            monkeypatch.setattr(daemon.backend, name, _cut)
        if command in {model.SUSPEND, model.RESTORE}:
            expected = State(state)
    cut_after(daemon.store, writes, monkeypatch)
    with contextlib.suppress(Cut):
        await (daemon.make(State.READY) if command == model.CREATE else daemon.run(command, one))
    await daemon.again()
    daemon.faults = 0  # whatever the dead daemon was about to do
    monkeypatch.undo()
    assert [row.state for row in daemon.rows()] == ([expected] if expected else [])
    assert all(row.pending == "" for row in daemon.rows())
    # What a change had given back is taken again in the background.
    await daemon.until(lambda: daemon.world.memory == {row.uuid: 64 * MIB for row in daemon.rows()})
    assert set(daemon.world.guests) == {row.run for row in daemon.rows() if row.state in model.LIVE}
    assert all(row.run == "" for row in daemon.rows() if row.state not in model.LIVE)
    for row in daemon.rows():  # and it can be used and given back
        if row.state is State.DEPLOYED:
            await daemon.service.shutdown(row.id)
        await daemon.service.destroy(row.id)
    assert daemon.world.free == 1024 * MIB


async def _cut(*_args: object, **_options: object) -> None:
    raise Cut


async def test_a_guest_that_can_not_be_adopted_keeps_its_state_and_lives(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = await daemon.make(State.DEPLOYED), await daemon.make(State.DEPLOYED)
    real = FakeBackend.adopt

    async def adopt(self: FakeBackend, record: Record) -> Finding:
        if record.id == bad:
            raise FailedError("no such luck")
        return await real(self, record)

    monkeypatch.setattr(FakeBackend, "adopt", adopt)
    await daemon.again()
    assert daemon.service.status(good).state is State.DEPLOYED
    assert daemon.service.status(bad).state is State.DEPLOYED
    assert "no such luck" in daemon.service.status(bad).reason
    assert daemon.service.record(bad).run in daemon.world.guests
    await daemon.until(lambda: daemon.service.status(bad).reason == "")  # looked at again, and well
    assert [row.state for row in daemon.rows()] == [State.DEPLOYED, State.DEPLOYED]


@pytest.mark.parametrize("command", [model.SHUTDOWN, model.DESTROY, model.DEPLOY])
async def test_a_cut_off_command_that_can_not_be_settled(
    daemon: Daemon, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had a guest keeps its state, and the guest is not swept away; the rest is FAILED."""
    one = await daemon.make({model.SHUTDOWN: State.DEPLOYED, model.DESTROY: State.SUSPENDED}.get(command, State.READY))
    record = daemon.service.record(one)
    run = record.run or "r"
    daemon.store.save(msgspec.structs.replace(record, pending=command, run=run))
    daemon.world.guests.setdefault(run, Found.RUNNING)

    async def end(_self: FakeBackend, _record: Record) -> None:
        raise TimedOutError("it hangs in a device")

    with monkeypatch.context() as patch:
        patch.setattr(FakeBackend, "end", end)
        await daemon.again()
        assert daemon.service.status(one).state is (record.state if record.state in model.LIVE else State.FAILED)
        assert "hangs in a device" in daemon.service.status(one).reason
        assert run in daemon.world.guests
    await daemon.again()  # and now it can be
    assert daemon.world.guests == {}
    assert [row.state for row in daemon.rows()] == ([] if command == model.DESTROY else [State.READY])


@pytest.mark.parametrize("found", [Found.OFF, Found.FAILED])
async def test_what_qemu_could_not_say_at_once_is_asked_again(
    daemon: Daemon, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmand.watch._LOOK_AGAIN_S", 0.001)
    one = await daemon.make(State.DEPLOYED)
    run = daemon.service.record(one).run
    daemon.world.guests[run] = found
    daemon.backend.fail["look"] = TimedOutError("no answer")
    daemon.backend.changed(one, run)
    await asyncio.sleep(0.02)
    assert daemon.service.status(one).state is State.DEPLOYED
    daemon.backend.fail.clear()
    await daemon.until(lambda: daemon.service.status(one).state is model.AFTER[found])


async def test_a_stop_does_not_wait_for_a_guest_that_does_not_answer(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.fail["look"] = TimedOutError("no answer")
    daemon.backend.changed(one, daemon.service.record(one).run)
    await asyncio.sleep(0.01)
    async with asyncio.timeout(4):  # less than a stop waits for what is under way
        await daemon.again()
    assert daemon.service.status(one).state is State.DEPLOYED


async def test_a_hung_guest_is_not_ended_by_a_restart(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await daemon.make(State.DEPLOYED)

    async def adopt(_self: FakeBackend, _record: Record) -> Finding:
        raise TimedOutError("hangs")

    monkeypatch.setattr(FakeBackend, "adopt", adopt)
    await daemon.again()
    assert daemon.service.status(one).state is State.DEPLOYED
    assert len(daemon.world.guests) == 1


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize(
    ("state", "command"),
    [
        ("", model.CREATE),
        (State.READY, model.DEPLOY),
        (State.DEPLOYED, model.SUSPEND),
        (State.SUSPENDED, model.RESTORE),
        (State.DEPLOYED, model.REBOOT),
        (State.DEPLOYED, model.SHUTDOWN),
        (State.READY, model.DESTROY),
        (State.READY, model.CHANGE),
    ],
)
async def test_a_full_disk(
    daemon: Daemon, state: str, command: str, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space for the intent: refused, nothing changed. None for the outcome: it is as the intent says after all."""
    one = await daemon.make(State(state)) if state else 0
    left = [writes]

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(argument: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise FailedError("the journal can't be used: database or disk is full")
            left[0] -= 1
            return real(argument, **options)

        return write

    for name in ("insert", "save", "delete"):
        monkeypatch.setattr(daemon.store, name, guard(getattr(daemon.store, name)))
    error: EdgeholdError | None = None
    try:
        await (daemon.make(State.READY) if command == model.CREATE else daemon.run(command, one))
    except EdgeholdError as caught:
        error = caught
    assert (error is not None) == (writes == 0 or command in {model.CREATE, model.DEPLOY, model.CHANGE})
    seen = {row.id: row.state for row in daemon.service.records}
    if error is not None:
        assert "disk is full" in str(error)
        assert seen == ({one: State(state)} if state else {})
        assert len(daemon.world.guests) == (state in model.LIVE)
        assert len(daemon.world.memory) == len(seen)
    monkeypatch.undo()
    await daemon.again()
    assert {row.id: row.state for row in daemon.service.records} == seen
    assert set(daemon.world.memory) == {row.uuid for row in daemon.rows()}


async def test_the_journal_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match=r"journal .*none/vmand.db can't be used"):
        Store(tmp_path / "none" / "vmand.db")
    (tmp_path / "bad.db").write_bytes(b"not a database" * 100)
    with pytest.raises(FailedError, match="not a database"):
        Store(tmp_path / "bad.db")
    newer = tmp_path / "newer.db"
    with contextlib.closing(Store(newer)) as store:
        store._db.execute("PRAGMA user_version=99")
    with pytest.raises(UnsupportedError, match="newer vmand"):
        Store(newer)


def fill(store: Store, record: Record) -> None:
    for _ in range(1000):
        try:
            store.insert(msgspec.structs.replace(record, reason="x" * 1000))
        except FailedError as error:
            if "full" in str(error):
                return
            raise
    pytest.fail("it is never full")


async def test_a_really_full_database(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "vmand.db")) as store:
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count={pages}")
        record = Record(uuid="u", name="n", mode=Mode.SHARED, cores=1, memory_bytes=1)
        fill(store, record)
        count = len(store.all())
        with pytest.raises(FailedError, match="full"):
            store.insert(msgspec.structs.replace(record, reason="x" * 4000))
        assert len(store.all()) == count
