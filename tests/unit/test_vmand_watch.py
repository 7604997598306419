"""What goes on without being asked for: grades that are lost and repaired, guests that hang, waits that are hurried."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from edgehold.api.vmand import CoresGrade, Event, MemoryGrade, Mode, State
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    FailedError,
    NoCapacityError,
    NotFoundError,
    TimedOutError,
    UnsupportedError,
)
from tests.unit.vmand_fake import PINNED, Daemon, Listener
from vmand.backend import Grades, Trait
from vmand.model import MIB, Found, Record

ISOLATED = Grades(cores=CoresGrade.ISOLATED, memory=MemoryGrade.LOCKED)


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setattr("vmand.watch.GRADES_EVERY_S", 0.005)
    monkeypatch.setattr("vmand.watch.REPAIR_EVERY_S", 0.02)
    monkeypatch.setattr("vmand.watch.ASK_EVERY_S", 0.005)
    monkeypatch.setattr("vmand.watch._LOOK_AGAIN_S", 0.001)
    one = Daemon(tmp_path)
    await one.start()
    yield one
    await one.stop()
    assert one.faults == 0


def grades(listener: Listener) -> list[Event]:
    return [event for event in listener.events if event.kind == "grade"]


async def test_a_lost_grade_is_told_and_had_back(daemon: Daemon) -> None:
    daemon.backend.grades = ISOLATED
    one = await daemon.make(State.DEPLOYED, mode=Mode.DEDICATED)
    seen = daemon.service.status(one)
    assert (seen.cores_grade, seen.memory_grade, seen.cores_reason) == (CoresGrade.ISOLATED, MemoryGrade.LOCKED, "")
    listener = Listener()
    daemon.service.hub.subscribe(listener, one, console=False)
    daemon.backend.grades = PINNED
    await daemon.until(lambda: daemon.service.status(one).cores_grade is CoresGrade.PINNED)
    (event,) = grades(listener)
    assert (event.cores_grade, event.memory_grade) == (CoresGrade.PINNED, MemoryGrade.PLAIN)
    assert event.reason == "cores: no cpuset here; memory: swap is on"
    assert daemon.rows()[0].cores_grade is CoresGrade.PINNED
    await daemon.until(lambda: daemon.backend.repairs > 0)
    daemon.backend.grades = ISOLATED
    await daemon.until(lambda: daemon.service.status(one).cores_grade is CoresGrade.ISOLATED)
    assert len(grades(listener)) == 2
    repairs = daemon.backend.repairs
    await asyncio.sleep(0.05)
    assert daemon.backend.repairs == repairs
    assert len(grades(listener)) == 2


async def test_grades_of_a_partition_at_rest(daemon: Daemon) -> None:
    daemon.backend.grades = ISOLATED
    one = await daemon.make(State.DEPLOYED, mode=Mode.DEDICATED)
    await daemon.service.shutdown(one)
    seen = daemon.service.status(one)
    assert (seen.cores_grade, seen.memory_grade) == (None, MemoryGrade.LOCKED)
    daemon.backend.grades = PINNED
    await daemon.until(lambda: daemon.service.status(one).memory_grade is MemoryGrade.PLAIN)


async def test_grades_that_can_not_be_read_stay(daemon: Daemon) -> None:
    daemon.backend.grades = ISOLATED
    one = await daemon.make(State.DEPLOYED, mode=Mode.DEDICATED)
    daemon.backend.fail["grade"] = TimedOutError("no answer")
    await asyncio.sleep(0.03)
    assert daemon.service.status(one).cores_grade is CoresGrade.ISOLATED


async def test_grades_are_read_back_after_a_restart(daemon: Daemon) -> None:
    daemon.backend.grades = ISOLATED
    one = await daemon.make(State.DEPLOYED, mode=Mode.DEDICATED)
    await daemon.again()
    daemon.backend.grades = PINNED
    await daemon.until(lambda: daemon.service.status(one).cores_grade is CoresGrade.PINNED)


async def test_a_guest_that_hangs_is_reported_and_well_again(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    listener = Listener()
    daemon.service.hub.subscribe(listener, one, console=False)
    daemon.backend.fail["look"] = TimedOutError("QEMU does not answer")
    await daemon.until(lambda: daemon.service.status(one).reason == "QEMU does not answer")
    assert [(event.state, event.reason) for event in listener.events] == [(State.DEPLOYED, "QEMU does not answer")]
    assert (await daemon.service.suspend(one)).state is State.SUSPENDED  # no command waits for a look
    daemon.backend.fail.clear()
    await daemon.until(lambda: daemon.service.status(one).reason == "")
    assert daemon.service.status(one).state is State.SUSPENDED


async def test_the_last_lines_of_a_guest_that_failed_are_kept(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await daemon.make(State.DEPLOYED)
    text = "".join(f"line {n}\x1b[0m\r\n" for n in range(100))
    monkeypatch.setattr(daemon.backend, "console", lambda _record: text)
    daemon.world.guests[daemon.service.record(one).run] = Found.FAILED
    await daemon.until(lambda: daemon.service.status(one).state is State.FAILED)
    kept = daemon.service.status(one).last_output
    assert kept.splitlines()[-1] == "line 99 [0m"
    assert len(kept.splitlines()) == 20
    await daemon.again()
    assert daemon.service.status(one).last_output == kept
    await daemon.service.shutdown(one)
    assert daemon.service.status(one).last_output == ""


async def test_force_hurries_a_shutdown_that_waits(daemon: Daemon) -> None:
    one = await daemon.make(State.BUSY)
    seen = daemon.service.status(one)
    assert (seen.state, seen.command) == (State.BUSY, "shutdown")
    record = await daemon.service.shutdown(one, force=True)
    assert record.state is State.READY
    assert daemon.world.guests == {}


@pytest.mark.parametrize("obeys", [True, False])
async def test_a_graceful_reboot(daemon: Daemon, obeys: bool) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.obeys_after = 1 if obeys else 10**9
    record = await daemon.service.reboot(one, graceful=True, timeout_s=20 if obeys else 0.02)
    assert (record.state, record.boot_count) == (State.DEPLOYED, 2)
    assert ("by force" in record.reason) == (not obeys)


async def test_a_shutdown_lets_a_suspended_guest_go_on_first(daemon: Daemon) -> None:
    one = await daemon.make(State.SUSPENDED)
    record = await daemon.service.shutdown(one)
    assert (record.state, record.reason, daemon.backend.presses) == (State.READY, "", 1)


async def test_strict_is_refused_where_cores_can_not_be_isolated(daemon: Daemon) -> None:
    with pytest.raises(NoCapacityError, match="strict: cores can't be isolated on this host: no cpuset here"):
        await daemon.make(State.READY, mode=Mode.DEDICATED, strict=True)
    with pytest.raises(BadRequestError, match="strict: a shared partition"):
        await daemon.make(State.READY, strict=True)
    daemon.backend.grades = ISOLATED
    one = await daemon.make(State.READY, mode=Mode.DEDICATED, strict=True)
    assert daemon.service.status(one).strict


async def test_what_a_back_end_lacks_is_refused(daemon: Daemon) -> None:
    one, two = await daemon.make(State.DEPLOYED), await daemon.make(State.DEPLOYED)
    await daemon.service.suspend(two)
    rows = daemon.rows()
    daemon.backend.traits = frozenset({Trait.SCRUB})
    service = daemon.service
    work: Callable[[], Awaitable[object]]
    for work in (
        lambda: service.suspend(one),
        lambda: service.restore(two),
        lambda: service.shutdown(one),
        lambda: service.reboot(one, graceful=True),
        lambda: service.create(cores=1, memory_bytes=MIB, mode=Mode.DEDICATED, secure=True),
        lambda: service.create(cores=1, memory_bytes=MIB, mode=Mode.SHARED),
    ):
        with pytest.raises(UnsupportedError, match="not supported on this back end"):
            await work()
    for look in (service.console, service.attach):
        with pytest.raises(UnsupportedError, match="no console"):
            look(one)
    assert daemon.rows() == rows
    await service.reboot(one)
    assert (await service.shutdown(one, force=True)).state is State.READY
    uuid = service.record(one).uuid
    await service.destroy(one)
    assert daemon.backend.scrubbed == [uuid]


async def test_memory_that_can_not_be_scrubbed_is_not_given_back(daemon: Daemon) -> None:
    one = await daemon.make(State.READY)
    daemon.backend.traits |= {Trait.SCRUB}
    daemon.backend.fail["scrub"] = TimedOutError("the firmware does not answer")
    with pytest.raises(TimedOutError):
        await daemon.service.destroy(one)
    assert daemon.service.status(one).state is State.READY


async def test_names_and_ids(daemon: Daemon) -> None:
    one = await daemon.make(State.READY, name="router")
    assert daemon.service.record("router").id == daemon.service.record(str(one)).id == one
    for which in ("router2", "77", 77):
        with pytest.raises(NotFoundError, match="no partition"):
            daemon.service.record(which)


async def test_slots_are_used_again(daemon: Daemon) -> None:
    first, second = await daemon.make(State.READY), await daemon.make(State.READY)
    assert [daemon.service.record(one).slot for one in (first, second)] == [0, 1]
    await daemon.service.destroy(first)
    third = await daemon.make(State.READY)
    assert daemon.service.record(third).slot == 0


async def test_a_console_needs_a_guest(daemon: Daemon) -> None:
    one = await daemon.make(State.READY)
    with pytest.raises(BadStateError, match="no guest is there"):
        daemon.service.attach(one)


@pytest.mark.parametrize("found", [Found.OFF, Found.RUNNING])
async def test_a_graceful_reboot_that_was_cut_off(daemon: Daemon, found: Found) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.fail["look"] = TimedOutError("hangs")  # the daemon dies before it sees it
    await daemon.until(lambda: daemon.service.status(one).reason == "hangs")
    record = daemon.service.record(one)
    daemon.world.guests[record.run] = found
    daemon.store.save(msgspec.structs.replace(record, pending="reboot"))
    await daemon.again()
    assert daemon.service.status(one).state is State.DEPLOYED
    assert daemon.world.guests == {record.run: Found.RUNNING}


async def test_the_slot_of_an_end_that_is_not_written_is_given_to_nobody(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start ends what the user of that slot runs: it must not be another's guest by then."""
    one = await daemon.make(State.SUSPENDED)

    def full(_partition: int) -> None:
        raise FailedError("the journal can't be used: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.store, "delete", full)
        await daemon.service.destroy(one)
        two = await daemon.make(State.DEPLOYED)
    assert daemon.service.record(two).slot == 1
    three = await daemon.make(State.READY)  # it can be written by now
    assert daemon.service.record(three).slot == 0
    await daemon.again()
    assert [row.id for row in daemon.rows()] == [two, three]
    assert daemon.service.status(two).state is State.DEPLOYED


async def test_a_reason_that_a_command_gave_stays(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    daemon.backend.obeys_after = 10**9
    await daemon.service.reboot(one, graceful=True, timeout_s=0.01)
    run = daemon.service.record(one).run
    daemon.backend.fail["look"] = TimedOutError("hangs")
    await daemon.until(lambda: daemon.service.status(one).reason == "hangs")
    daemon.backend.fail.clear()
    await daemon.until(lambda: daemon.service.status(one).reason == "")
    await daemon.service.reboot(one, graceful=True, timeout_s=0.01)
    for _ in range(3):
        daemon.backend.changed(one, run)
        await asyncio.sleep(0.01)
    assert "by force" in daemon.service.status(one).reason


@pytest.mark.parametrize("state", [State.DEPLOYED, State.SUSPENDED])
async def test_force_does_not_wait_for_a_button_that_hangs(
    daemon: Daemon, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon.make(state)
    hangs = asyncio.Event()

    async def hang(_record: Record) -> None:
        hangs.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(daemon.backend, "press_power", hang)
    monkeypatch.setattr(daemon.backend, "restore", hang)
    waiting = asyncio.create_task(daemon.service.shutdown(one, timeout_s=60))
    async with asyncio.timeout(20):
        await hangs.wait()
        record = await daemon.service.shutdown(one, force=True)
        assert record.state is State.READY
        assert (await waiting).reason == "ended by force: it was asked for"


async def test_a_plain_shutdown_of_a_guest_whose_button_hangs_ends_by_force(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon.make(State.SUSPENDED)

    async def hang(_record: Record) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(daemon.backend, "restore", hang)
    record = await daemon.service.shutdown(one, timeout_s=0.05)
    assert (record.state, record.reason) == (
        State.READY,
        "ended by force: the guest did not power off within 0.05 s",
    )


async def test_a_guest_that_speaks_up_without_end_is_one_task(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    run = daemon.service.record(one).run
    before = len(asyncio.all_tasks())
    for _ in range(1000):
        daemon.backend.changed(one, run)
    assert len(asyncio.all_tasks()) <= before + 1
