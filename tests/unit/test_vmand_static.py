"""A hypervisor whose partitions are only started and ended: it fits below the service as it is.

No suspend, no events, no orderly shutdown, no process, no thread on the host, no console; memory that vmand has to
clear. Each refusal by itself is test_vmand_watch.py's.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edgehold.api.vmand import CoresGrade, MemoryGrade, Mode, State, Vcpu
from edgehold.errors import UnsupportedError
from tests.unit.vmand_fake import Daemon
from vmand.backend import Grades, Running, Trait
from vmand.model import Found, Images, Record

STATIC = frozenset({Trait.SECURE, Trait.DEVICE_TREE, Trait.SCRUB})
GIVEN = Grades(cores=CoresGrade.ISOLATED, memory=MemoryGrade.LOCKED)


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setattr("vmand.watch.ASK_EVERY_S", 0.005)
    one = Daemon(tmp_path)
    await start(one)
    yield one
    await one.stop()
    assert one.faults == 0


async def start(daemon: Daemon) -> None:
    """With less than the fake can do. It never speaks up by itself: only what it is asked for counts."""
    await daemon.start()
    backend = daemon.backend
    backend.traits, backend.grades = STATIC, GIVEN
    begin = backend.start

    async def run(record: Record, images: Images, *, paused: bool = False) -> Running:
        assert not paused
        await begin(record, images)
        return Running(accelerator="none", arch="aarch64")

    async def nobody(_record: Record) -> list[Vcpu]:
        return []

    def silence(_record: Record) -> str:
        return ""

    for name, method in {"start": run, "vcpus": nobody, "console": silence}.items():
        setattr(backend, name, method)


async def test_a_whole_life(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED, mode=Mode.DEDICATED, secure=True, strict=True)
    seen = daemon.service.status(one)
    assert (seen.pid, seen.user, seen.unit, seen.arch) == (None, None, "", "aarch64")
    assert (seen.cores_grade, seen.memory_grade) == (CoresGrade.ISOLATED, MemoryGrade.LOCKED)
    assert await daemon.service.vcpus(one) == []
    await daemon.service.reboot(one)
    for refused in (daemon.service.suspend(one), daemon.service.shutdown(one)):
        with pytest.raises(UnsupportedError, match="not supported on this back end"):
            await refused
    assert (await daemon.service.shutdown(one, force=True)).state is State.READY
    uuid = daemon.service.record(one).uuid
    await daemon.service.destroy(one)
    assert daemon.backend.scrubbed == [uuid]
    assert daemon.world.memory == {}
    assert (await daemon.service.capabilities()).supports == ("device-tree", "secure")


@pytest.mark.parametrize(("found", "state"), [(Found.OFF, State.READY), (Found.FAILED, State.FAILED)])
async def test_an_end_that_nobody_tells_of_is_found(daemon: Daemon, found: Found, state: State) -> None:
    one = await daemon.make(State.DEPLOYED, mode=Mode.DEDICATED)
    daemon.world.guests[daemon.service.record(one).run] = found
    await daemon.until(lambda: daemon.service.status(one).state is state)
    assert daemon.service.status(one).last_output == ""
    if state is State.FAILED:
        assert (await daemon.service.shutdown(one)).state is State.READY  # there is nobody to be asked


async def test_a_restart_finds_it_by_asking(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED, mode=Mode.DEDICATED)
    await daemon.stop()
    await start(daemon)
    seen = daemon.service.status(one)
    assert (seen.state, seen.pid, seen.boot_count, seen.reason) == (State.DEPLOYED, None, 1, "")
