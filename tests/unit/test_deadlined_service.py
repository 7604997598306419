"""The service where the host is short of something, or many ask at once. No policy is changed here."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from deadlined.config import Settings
from deadlined.service import Service
from edgehold.api.deadlined import AttachRequest, Target, TargetKind
from edgehold.errors import BadStateError, FailedError
from edgehold.kernel import capacity, procfs
from edgehold.kernel.procfs import ThreadStat
from edgehold.service import Runtime
from tests.unit.deadlined_kernel import EMPTY, TIDS, Scripted


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    one = Service(Runtime("test"), Settings(state_dir=str(tmp_path / "state"), max_threads=1))
    yield one
    one.close()


async def test_one_probe_for_all_who_ask(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = 0

    async def probe() -> capacity.Found:
        nonlocal probes
        probes += 1
        await asyncio.sleep(0)
        return capacity.Found(cpus=2, available=1.5, resolution=0.1)

    monkeypatch.setattr(capacity, "probe_in_child", probe)
    found = await asyncio.gather(*(service.capacity() for _ in range(20)))
    assert {one.available for one in found} == {1.5}
    assert probes == 1


async def test_a_child_that_can_t_be_started_is_an_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE):

        async def no_child(*_values: object, number: int = number, **_names: object) -> None:
            raise OSError(number, "can't")

        monkeypatch.setattr(asyncio, "create_subprocess_exec", no_child)
        with pytest.raises(FailedError):
            await service.capacity()
    assert not service.monitor.grants.probing


async def test_an_attach_without_a_descriptor_is_an_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(_tid: int) -> ThreadStat:
        raise EMPTY

    monkeypatch.setattr(procfs, "stat", stat)
    with pytest.raises(FailedError, match="descriptor"):
        await service.attach(AttachRequest(target=Target(kind=TargetKind.THREAD, id=TIDS[0])))
    assert service.attachments() == []


async def test_a_unit_is_one_target_under_both_of_its_names(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unit(_name: str, *, must_exist: bool = True) -> Scripted:
        assert must_exist
        return Scripted(wanted=())

    def request(name: str) -> AttachRequest:
        return AttachRequest(target=Target(kind=TargetKind.UNIT, name=name))

    monkeypatch.setattr(service.units, "open", unit)
    one = await service.attach(request("nginx"))
    assert one.target.name == "nginx.service"
    assert [kept.target for kept in service.keep.all()] == [one.target]
    for name in ("nginx", "nginx.service"):
        with pytest.raises(BadStateError, match=r"unit nginx\.service is attached already"):
            await service.attach(request(name))
    service.detach(one.id)
    assert service.keep.all() == []
