"""The back end for a firmware against a fake of edgehold.kernel.vmanager: what is asked of it, and what an errno means.

What a device really does is tests/vmanager/test_backend_cases.py's.
"""

import asyncio
import contextlib
import dataclasses
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self, cast
from uuid import UUID

import msgspec
import pytest

from edgehold.api.vmand import CoresGrade, MemoryGrade, Mode, State
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    EdgeholdError,
    FailedError,
    NoCapacityError,
    SettingsError,
    TimedOutError,
    UnavailableError,
    UnsupportedError,
)
from edgehold.kernel import vmanager
from edgehold.kernel.vmanager import Cap, Created, Event, Flag, Info, Manager, Status
from edgehold.testing import devicetree
from vmand import model
from vmand.backend import Trait, backends, vmanager_doctor
from vmand.backend.vmanager import VmanagerBackend
from vmand.backend.vmanager_calls import Calls
from vmand.backend.vmanager_errors import RefusedError, finding, of_create, of_verb
from vmand.config import Config, Pool
from vmand.model import GIB, MIB, Found, Images, OpenFile, Record

ALL = Cap.SUSPEND | Cap.SHUTDOWN | Cap.EVENTS | Cap.REBOOT | Cap.KEEP | Cap.GENDTB
INFO = Info(
    abi=1,
    caps=ALL,
    cpus=(1, 2, 3),
    memory_total=GIB,
    memory_free=GIB,
    memory_align=32 * MIB,
    max_partitions=4,
    num_partitions=1,
    firmware=(2, 1),
    backend=1,
)
RECORD = Record(
    id=1,
    uuid="00000000-0000-4000-8000-000000000007",
    name="control",
    mode=Mode.DEDICATED,
    cores=1,
    memory_bytes=48 * MIB,
    cpus=(2,),
    run="a run",
)
LIVES = msgspec.structs.replace(RECORD, state=State.DEPLOYED)
STATUS = Status(
    id=1,
    state=vmanager.State.READY,
    last_error=0,
    fw_code=0,
    flags=Flag(0),
    memory_bytes=64 * MIB,
    memory_base=0,
    cpus=RECORD.cpus,
    boot_count=0,
    deployed_ns=0,
    generation=1,
    name="vmand:control",
    uuid=UUID(RECORD.uuid),
)


class FakeHandle:
    """The one partition of a `FakeManager`."""

    def __init__(self, manager: "FakeManager") -> None:
        self._manager = manager
        self.id = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._manager.open_handles -= 1

    def status(self) -> Status:
        self._manager.act("status")
        return self._manager.status

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args, **options: self._manager.act(name, *args, **options)


class FakeManager:
    """Says what it was told to say: an `OSError`, or waits for an event in a list of answers by a call's name."""

    def __init__(self) -> None:
        self.facts = INFO
        self.status = STATUS
        self.answers: dict[str, OSError | threading.Event] = {}
        self.asked: list[tuple[str, tuple[object, ...], dict[str, object]]] = []
        self.events: list[Event] = []
        self.open_handles = 0
        self.closed = False
        self._readable = os.eventfd(0, os.EFD_NONBLOCK)

    def act(self, name: str, /, *args: object, **options: object) -> None:
        self.asked.append((name, args, options))
        answer = self.answers.get(name)
        if isinstance(answer, OSError):
            raise answer
        if answer is not None:
            assert answer.wait(30)

    def names(self) -> list[str]:
        return [name for name, _, _ in self.asked if name not in {"status", "open", "info"}]

    def fileno(self) -> int:
        return self._readable

    def close(self) -> None:
        if not self.closed:
            os.close(self._readable)
        self.closed = True

    def info(self) -> Info:
        self.act("info")
        return self.facts

    def create(self, **options: Any) -> Created:
        self.act("create", **options)
        self.status = dataclasses.replace(STATUS, uuid=options["uuid"])
        return Created(id=options["partition"], cpus=options["cpus"], memory_base=0, handle=None)

    def destroy(self, partition: int) -> None:
        self.act("destroy", partition)

    def open_partition(self, partition: int) -> FakeHandle:
        self.act("open", partition)
        self.open_handles += 1
        return FakeHandle(self)

    def next(self, partition: int = 0) -> int | None:
        self.act("next", partition)
        return 1 if partition == 0 else None

    def tell(self, *events: Event) -> None:
        self.events += events
        os.eventfd_write(self._readable, 1)

    def read_events(self) -> list[Event]:
        os.eventfd_read(self._readable)
        self.act("read")
        events, self.events = self.events, []
        return events


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeManager]:
    one = FakeManager()
    monkeypatch.setattr("vmand.backend.vmanager.open_alone", lambda _path: one)
    yield one
    one.close()
    assert one.open_handles == 0


class World:
    def __init__(self, manager: FakeManager) -> None:
        self.manager = manager
        self.changed: list[tuple[int, str]] = []
        self.backend = self.again()

    def again(self, **facts: Any) -> VmanagerBackend:
        """A back end for another firmware."""
        self.manager.facts = dataclasses.replace(INFO, **facts)
        self.backend = VmanagerBackend(Config(start_timeout_s=20), pool=frozenset({1, 2, 3}))
        self.backend.begin(
            changed=lambda *one: self.changed.append(one), output=lambda *_: None, ended=lambda _task: None
        )
        return self.backend


@pytest.fixture
async def world(manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    for name in ("_LOOK_S", "_GRADE_S", "_VERB_S", "_SPARE_S", "_POLL_S"):
        monkeypatch.setattr(f"vmand.backend.vmanager.{name}", 0.05)
    others = unknown_threads()
    one = World(manager)
    yield one
    for answer in manager.answers.values():
        if isinstance(answer, threading.Event):
            answer.set()
    await until(lambda: one.backend._calls._threads == 0)
    await one.backend.close()
    await until(lambda: unknown_threads() <= others)
    assert manager.closed


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - a thread's end has no event
            await asyncio.sleep(0.001)


def unknown_threads() -> int:
    """The kernel's threads that Python does not have: one that is over is there a moment longer for who looks."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))
    return found - threading.active_count()


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    with contextlib.ExitStack() as stack:
        files = []
        for name in ("kernel", "initrd"):
            (tmp_path / name).write_bytes(name.encode())
            files.append(OpenFile(fd=os.open(tmp_path / name, os.O_RDONLY), name=name))
            stack.callback(os.close, files[-1].fd)
        yield Images(kernel=files[0], initrd=files[1], cmdline="quiet", arch=os.uname().machine)


# What is asked for


async def test_a_partition_is_made_as_it_stands_in_the_journal(world: World) -> None:
    grades = await world.backend.reserve(RECORD)
    assert (grades.cores, grades.memory) == (None, MemoryGrade.LOCKED)
    (given,) = [options for name, _, options in world.manager.asked if name == "create"]
    assert given == {
        "memory_bytes": 64 * MIB,  # in the firmware's own pieces
        "cpus": (2,),
        "partition": 1,
        "uuid": UUID(RECORD.uuid),
        "name": "vmand:control",
        "flags": Flag.KEEP | Flag.NOFD,
    }
    world.again(caps=ALL & ~Cap.KEEP | Cap.SECURE)
    await world.backend.reserve(msgspec.structs.replace(RECORD, secure=True, name="n" * 32))
    given = _last(world, "create")
    assert (given["flags"], given["name"]) == (Flag.SECURE | Flag.NOFD, "vmand:" + "n" * 25)


def _last(world: World, name: str) -> dict[str, object]:
    return next(options for one, _, options in reversed(world.manager.asked) if one == name)


async def test_what_is_there_is_what_the_journal_says(world: World) -> None:
    backend = world.backend
    assert await backend.holds(RECORD)
    for other in ({"memory_bytes": 65 * MIB}, {"cpus": (2, 3)}, {"secure": True}, {"uuid": str(UUID(int=1))}):
        record = msgspec.structs.replace(RECORD, **other)
        assert not await backend.holds(record)
        assert backend.keeps(RECORD, record) == ("uuid" in other)
    assert backend.keeps(RECORD, msgspec.structs.replace(RECORD, memory_bytes=64 * MIB, name="b"))  # the same pieces
    world.manager.answers["open"] = OSError(errno.ENOENT, "none")
    assert not await backend.holds(RECORD)
    world.manager.answers["open"] = OSError(errno.EIO, "who knows")
    with pytest.raises(FailedError):
        await backend.holds(RECORD)
    assert await backend.hypervisor() == "firmware 2.1"
    assert await world.again(firmware=(0, 0)).hypervisor() == ""


async def test_another_s_cores_are_not_taken_for_ours(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        world.manager, "create", lambda **_: Created(id=1, cpus=(3,), memory_base=0, handle=None), raising=True
    )
    with pytest.raises(FailedError, match="cores: the firmware gave 3, not 2"):
        await world.backend.reserve(RECORD)
    world.manager.status = dataclasses.replace(STATUS, cpus=(3,))
    grades = await world.backend.grade(LIVES)
    assert (grades.cores, grades.cores_reason) == (CoresGrade.PINNED, "the firmware says that it has the cores 3")


@pytest.mark.parametrize("caps", [ALL, ALL | Cap.CLEARS])
async def test_memory_is_cleared_where_the_firmware_does_not(world: World, caps: Cap) -> None:
    backend = world.again(caps=caps)
    assert (Trait.SCRUB in backend.traits) == (Cap.CLEARS not in caps)
    world.manager.status = dataclasses.replace(STATUS, flags=Flag.DIRTY)
    await backend.scrub(RECORD)
    await backend.release(RECORD)
    expected = ["destroy"] if Cap.CLEARS in caps else ["scrub", "scrub", "destroy"]
    assert world.manager.names() == expected


async def test_images_are_duplicates_that_are_closed(world: World, images: Images) -> None:
    hangs = world.manager.answers["deploy"] = threading.Event()
    world.backend._start_s = 0.05
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    with pytest.raises(TimedOutError, match="deploy of partition 1: the firmware does not answer"):
        await world.backend.start(RECORD, images)
    _, (kernel, tree, initrd, cmdline, timeout_ms), options = world.manager.asked[-1]
    assert (tree, cmdline, timeout_ms, options) == (None, "quiet", 50, {"make_dtb": images.arch == "aarch64"})
    assert os.pread(cast("int", kernel), 9, 0) == b"kernel"
    assert os.pread(cast("int", initrd), 9, 0) == b"initrd"
    assert kernel != images.kernel.fd
    hangs.set()
    await until(lambda: len(os.listdir("/proc/self/fd")) == before)  # noqa: PTH208


@pytest.mark.parametrize(
    ("caps", "given", "made"), [(ALL, False, True), (ALL, True, False), (ALL & ~Cap.GENDTB, True, False)]
)
async def test_a_device_tree(  # noqa: PLR0917 - fixtures
    world: World, images: Images, tmp_path: Path, caps: Cap, given: bool, made: bool
) -> None:
    backend = world.again(caps=caps)
    backend._native = "aarch64"
    (tmp_path / "dtb").write_bytes(devicetree.blob({}))
    with (tmp_path / "dtb").open("rb") as file:
        dtb = OpenFile(fd=file.fileno(), name="dtb") if given else None
        running = await backend.start(RECORD, dataclasses.replace(images, arch="aarch64", dtb=dtb))
    assert (running.accelerator, running.arch, running.pid) == ("firmware", "aarch64", 0)
    assert _last(world, "deploy") == {"make_dtb": made}


async def test_what_can_not_be_started(world: World, images: Images, tmp_path: Path) -> None:
    backend = world.again(caps=ALL & ~Cap.GENDTB)
    backend._native = "aarch64"
    with pytest.raises(UnsupportedError, match="dtb: this firmware makes no device tree"):
        await backend.start(RECORD, dataclasses.replace(images, arch="aarch64"))
    with pytest.raises(UnsupportedError, match="kernel: it is for x86_64, this host is aarch64"):
        await backend.start(RECORD, dataclasses.replace(images, arch="x86_64"))
    (tmp_path / "dtb").write_bytes(b"no tree")
    with (tmp_path / "dtb").open("rb") as file:
        bad = dataclasses.replace(images, arch="aarch64", dtb=OpenFile(fd=file.fileno(), name="dtb"))
        with pytest.raises(BadRequestError, match="dtb: "):
            await backend.start(RECORD, bad)
    assert world.manager.names() == []


async def test_a_reboot_that_can_t_be_is_refused_before_the_guest_is_off(world: World) -> None:
    backend = world.again(caps=ALL & ~Cap.REBOOT)
    with pytest.raises(UnsupportedError, match="reboot: not supported on this back end"):
        await backend.press_power(msgspec.structs.replace(LIVES, pending=model.REBOOT))
    with pytest.raises(UnsupportedError, match="reboot: not supported on this back end"):
        await backend.reboot(LIVES)
    assert world.manager.names() == []


async def test_the_power_button(world: World) -> None:
    """One press at a time; a guest that is off already is off."""
    backend = world.backend
    hangs = world.manager.answers["shutdown"] = threading.Event()
    await backend.press_power(LIVES)
    await backend.press_power(LIVES)
    assert not await backend.wait_off(LIVES, 0.01)
    assert world.manager.names() == ["shutdown"]
    hangs.set()
    assert await backend.wait_off(LIVES, 30)
    for number, state, off in (
        (errno.ETIMEDOUT, vmanager.State.DEPLOYED, False),
        (errno.EBADFD, vmanager.State.READY, True),
        (errno.EIO, vmanager.State.FAILED, True),
        (errno.EIO, vmanager.State.DEPLOYED, False),
        (errno.ENODEV, vmanager.State.READY, True),
    ):
        world.manager.answers["shutdown"] = OSError(number, "no")
        world.manager.status = dataclasses.replace(STATUS, state=state)
        await backend.press_power(LIVES)
        assert await backend.wait_off(LIVES, 0.05) == off, number


async def test_an_end_is_asked_for_once(world: World) -> None:
    await world.backend.end(LIVES)
    assert world.manager.names() == []
    world.manager.status = dataclasses.replace(STATUS, state=vmanager.State.DEPLOYED)
    world.manager.answers["shutdown"] = OSError(errno.EBADFD, "went off")
    await world.backend.end(LIVES)
    assert world.manager.names() == ["shutdown"]
    assert _last(world, "shutdown") == {"force": True}
    world.manager.status = dataclasses.replace(STATUS, uuid=UUID(int=9))  # another's by now
    world.manager.asked.clear()
    await world.backend.end(LIVES)
    await world.backend.release(LIVES)
    assert world.manager.names() == []


# What is heard


async def test_events_reach_those_whose_guest_it_is(world: World) -> None:
    old = vmanager.State.DEPLOYED
    await world.backend.adopt(LIVES)
    for partition, new in ((7, vmanager.State.READY), (1, vmanager.State.BUSY), (1, vmanager.State.FAILED)):
        world.manager.tell(Event(id=partition, old=old, new=new, generation=3, time_ns=4))
    await until(lambda: world.changed == [(1, "a run")])
    world.manager.tell(Event(id=0, old=vmanager.State.NONE, new=vmanager.State.NONE, generation=90, time_ns=4))
    await until(lambda: len(world.changed) == 2)
    world.manager.answers["read"] = OSError(errno.EIO, "no more")
    world.manager.tell()
    await until(lambda: len(world.changed) > 3)  # it is looked at now and then instead
    await world.backend.end(LIVES)


@pytest.mark.parametrize(
    ("state", "error", "found", "reason"),
    [
        (vmanager.State.DEPLOYED, 0, Found.RUNNING, ""),
        (vmanager.State.SUSPENDED, 0, Found.PAUSED, ""),
        (vmanager.State.READY, 0, Found.OFF, ""),
        (vmanager.State.FAILED, errno.ENOTRECOVERABLE, Found.FAILED, "the guest crashed"),
        (vmanager.State.FAILED, errno.EIO, Found.FAILED, "the firmware gave it up (its code -3)"),
        (vmanager.State.FAILED, errno.ETIMEDOUT, Found.FAILED, "the firmware did not answer in time and gave it up"),
        (vmanager.State.FAILED, errno.ENOMEM, Found.FAILED, "the firmware gave it up: Cannot allocate memory"),
    ],
)
async def test_what_a_guest_does(world: World, state: vmanager.State, error: int, found: Found, reason: str) -> None:
    world.manager.status = dataclasses.replace(STATUS, state=state, last_error=error, fw_code=-3)
    one = await world.backend.look(LIVES)
    assert (one.found, one.reason) == (found, reason)


async def test_a_partition_that_is_gone_or_busy(world: World) -> None:
    world.manager.status = dataclasses.replace(STATUS, uuid=UUID(int=9))
    assert (await world.backend.look(LIVES)).found is Found.GONE
    world.manager.answers["open"] = OSError(errno.ENOENT, "none")
    assert (await world.backend.adopt(LIVES)).found is Found.GONE
    with pytest.raises(TimedOutError, match="the firmware is BUSY with it"):
        finding(LIVES, dataclasses.replace(STATUS, state=vmanager.State.BUSY))


# Calls that hang


async def test_one_question_at_a_time_and_never_an_old_answer(world: World) -> None:
    hangs = world.manager.answers["status"] = threading.Event()
    for _ in range(5):
        with pytest.raises(TimedOutError, match="status of partition 1: the firmware does not answer"):
            await world.backend.look(LIVES)
    grades = await world.backend.grade(msgspec.structs.replace(LIVES, cores_grade=CoresGrade.ISOLATED))
    assert grades.cores is CoresGrade.ISOLATED  # nothing was lost
    assert world.backend._calls._threads == 1
    waiting = asyncio.create_task(world.backend._calls.status(LIVES, limit_s=30))
    await asyncio.sleep(0)
    world.manager.answers.clear()
    world.manager.status = dataclasses.replace(STATUS, generation=5)
    hangs.set()
    assert (await waiting).generation == 5
    assert len([name for name, _, _ in world.manager.asked if name == "status"]) == 2


async def test_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmand.backend.vmanager_calls._MAX_THREADS", 3)
    others = unknown_threads()
    manager, end = FakeManager(), threading.Event()
    calls = Calls(cast("Manager", manager))
    begun = [calls.begin(end.wait, "a call") for _ in range(3)]
    with pytest.raises(TimedOutError, match="does not answer, 3 calls wait for it"):
        calls.begin(end.wait, "a call")
    calls.close()
    assert not manager.closed  # its number would become another file's under them
    end.set()
    assert await asyncio.gather(*begun) == [True] * 3
    await until(lambda: unknown_threads() <= others)
    calls.close()
    assert manager.closed


async def test_a_bug_in_a_thread_is_a_bug_here(world: World) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await world.backend._calls.run(bug, "a bug", limit_s=30)


async def test_a_firmware_that_is_silent(world: World) -> None:
    world.manager.answers["info"] = threading.Event()
    with pytest.raises(TimedOutError):
        await world.backend.host()
    (check,) = await world.backend.doctor()
    assert (check.subject, check.level) == ("firmware", "missing")
    assert "does not answer" in check.found
    world.manager.answers["next"] = OSError(errno.EIO, "no")
    await world.backend.sweep([])  # a start goes on


# What an errno means


@pytest.mark.parametrize(
    ("number", "state", "kind", "text"),
    [
        (errno.EBADFD, "READY", BadStateError, "partition 1 is READY; suspend needs DEPLOYED (deploy leads there)"),
        (
            errno.EBUSY,
            "BUSY",
            BadStateError,
            "partition 1 is BUSY: the firmware has it BUSY; suspend can be tried again",
        ),
        (errno.EBADFD, "DEPLOYED", BadStateError, "the firmware has it DEPLOYED; suspend can be tried again"),
        (errno.ETIMEDOUT, "FAILED", TimedOutError, "suspend: the firmware did not answer in time"),
        (errno.EIO, "FAILED", FailedError, "suspend: the firmware refused it (its code -3)"),
        (errno.ECANCELED, "READY", FailedError, "suspend: it was ended by force meanwhile"),
        (errno.EOPNOTSUPP, "DEPLOYED", UnsupportedError, "suspend: not supported on this back end"),
        (errno.ENOSPC, "READY", BadRequestError, "don't fit into the partition's 48 MiB; create it with a larger"),
        (errno.ENOEXEC, "READY", BadRequestError, "does not take one of the files"),
        (errno.EINVAL, "READY", FailedError, "suspend: the firmware's driver refused it: Invalid argument"),
    ],
)
def test_refused_verbs(number: int, state: str, kind: type[EdgeholdError], text: str) -> None:
    status = dataclasses.replace(STATUS, state=vmanager.State[state], fw_code=-3)
    error = of_verb(RefusedError(OSError(number, "VMAN_SUSPEND"), status), model.SUSPEND, RECORD)
    assert type(error) is kind
    assert text in error.message
    assert type(of_verb(RefusedError(OSError(number, "VMAN_SUSPEND")), model.SUSPEND, RECORD)) is kind


@pytest.mark.parametrize(
    ("number", "partitions", "kind", "text"),
    [
        (errno.EEXIST, 1, NoCapacityError, "has a partition 1 that is not vmand's"),
        (errno.EBUSY, 1, NoCapacityError, "somebody else's partition has one of the cores 2"),
        (errno.ENOSPC, 1, NoCapacityError, "48 MiB are wanted in one piece and the firmware has none; 1024 MiB"),
        (errno.ENOSPC, 4, NoCapacityError, "room for 4 partitions; destroy one first"),
        (errno.EOPNOTSUPP, 1, UnsupportedError, "not supported on this back end"),
        (errno.EPERM, 1, FailedError, "the firmware's driver refused it: Operation not permitted"),
    ],
)
def test_refused_reservations(number: int, partitions: int, kind: type[EdgeholdError], text: str) -> None:
    info = dataclasses.replace(INFO, num_partitions=partitions)
    error = of_create(RefusedError(OSError(number, "VMAN_CREATE")), RECORD, info)
    assert type(error) is kind
    assert text in error.message


# What is there


def test_the_doctor_says_what_lacks_and_what_follows() -> None:
    told = {one.subject: one for one in vmanager_doctor.checks(INFO, device="/d", pool={1, 2}, arch="aarch64")}
    assert told["firmware"].found == "/d: a firmware by SMC 2.1, ABI 1, 1 of 4 partitions; it runs kernels for aarch64"
    assert {one.level for one in told.values()} == {"good", "limited"}
    assert (told["cores"].found, told["secure"].level) == ("isolated by the firmware: 1-2", "limited")
    bare = dataclasses.replace(INFO, caps=Cap(0), memory_free=0, backend=2)
    told = {one.subject: one for one in vmanager_doctor.checks(bare, device="/d", pool=(), arch="x86_64")}
    assert [told[one].level for one in ("cores", "memory", "restart")] == ["missing", "missing", "limited"]
    assert "device-tree" not in told


def test_the_pool_is_the_firmware_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its cores may be none that Linux still has; those of strangers are left out."""
    device = tmp_path / "vmanager"
    device.touch()
    facts = dataclasses.replace(INFO, cpus=(1, 200, 201))

    def fake(_path: str) -> FakeManager:
        one = FakeManager()
        one.facts = facts
        one.status = dataclasses.replace(STATUS, name="web", cpus=(1,))
        return one

    monkeypatch.setattr("vmand.backend.vmanager_found.Manager.open", fake)
    config = Config(vmanager_device=str(device))
    assert backends.kind_of(config) == "vmanager"
    topology, pool = backends.pool_of(config)
    assert (set(topology.online), set(pool)) == ({1, 200, 201}, {200, 201})
    assert backends.pool_of(dataclasses.replace(config, pool=Pool(cores="0,201")))[1] == {201}
    with pytest.raises(SettingsError, match=r"pool.cores: core 1 does not exist here or .*; usable: 200-201"):
        backends.pool_of(dataclasses.replace(config, pool=Pool(cores="1")))


def test_a_device_that_is_none(tmp_path: Path) -> None:
    config = Config(backend="vmanager", vmanager_device=str(tmp_path / "vmanager"))
    with pytest.raises(SettingsError, match="does not exist: the firmware's driver is not loaded"):
        backends.kind_of(config)
    (tmp_path / "vmanager").touch()
    with pytest.raises(SettingsError, match=r"vmanager_device: .*: Inappropriate ioctl for device"):
        backends.pool_of(config)
    with pytest.raises(UnavailableError, match=r"vmanager_device: .*: Inappropriate ioctl"):
        VmanagerBackend(config, pool=frozenset())
