"""No descriptor or no memory is left for a moment: what is known stays, and nothing of it ends the daemon."""

import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from deadlined.domainask import Seen
from deadlined.domains import DomainSource, LibvirtLink
from deadlined.holder import Holder
from deadlined.partitions import PartitionSource, VmandLink
from deadlined.service import descriptor_room
from deadlined.shortage import is_short
from edgehold.api.deadlined import ThreadState
from edgehold.api.vmand import Mode, State
from edgehold.kernel import procfs
from edgehold.kernel.native_held import ERROR, TAKEN
from edgehold.kernel.procfs import GoneError
from edgehold.wire.http import MAX_CONNECTIONS
from tests.unit.deadlined_kernel import SMALL, TIDS, Core, core_on, held

if TYPE_CHECKING:
    from edgehold.api.vmand import VmandClient

SHORT = [OSError(number, "can't") for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)]
EIO = OSError(errno.EIO, "Input/output error")
NOWHERE = VmandLink(Path("/nowhere"))


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    with core_on(tmp_path, monkeypatch) as one:
        yield one


def fails(patch: pytest.MonkeyPatch, where: object, name: str, error: OSError) -> None:
    def function(*_values: object, **_names: object) -> None:
        raise error

    patch.setattr(where, name, function)


def test_what_is_short() -> None:
    assert all(map(is_short, SHORT))
    assert not is_short(EIO)


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_one_that_was_taken_waits_while_nobody_can_look_at_it(
    core: Core, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    _, one = held(core, SMALL, threads=2)
    core.kernel.tasks[TIDS[0]].reservation = (7, 77)  # somebody else's
    with monkeypatch.context() as patch:
        fails(patch, procfs, "stat", error)
        core.cycle()  # it is found to be taken
        assert one.threads[TIDS[0]].state is ThreadState.HELD
    core.cycle()
    assert one.threads[TIDS[0]].state is ThreadState.WAITING
    with monkeypatch.context() as patch:
        fails(patch, procfs, "stat", error)
        core.cycle()  # it waits
    assert set(one.threads) == set(TIDS[:2])
    core.cycle()
    del core.kernel.tasks[TIDS[0]]
    core.cycle()
    assert set(one.threads) == {TIDS[1]}


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_a_counter_that_can_t_be_read_is_read_in_the_next_cycle(
    core: Core, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    thread, _ = held(core, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(core.monitor, "_table", SimpleNamespace(run=lambda **_: [(thread.row, ERROR, error.errno, 0)]))
        core.cycle()
        assert thread.state is ThreadState.HELD
        patch.setattr(core.monitor, "_table", SimpleNamespace(run=lambda **_: [(thread.row, ERROR, errno.EIO, 0)]))
        with pytest.raises(OSError, match="schedstat"):
            core.cycle()
    core.cycle()
    assert thread.state is ThreadState.HELD


def test_another_fault_of_looking_is_not_hidden(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    thread, _ = held(core, SMALL)
    fails(monkeypatch, Holder, "check_alive", EIO)
    monkeypatch.setattr(core.monitor, "_table", SimpleNamespace(run=lambda **_: [(thread.row, TAKEN, 0, 0)]))
    with pytest.raises(OSError, match="Input"):
        core.cycle()


class Vmand:
    """One partition of two vCPUs."""

    async def status(self, _partition: int) -> object:
        return SimpleNamespace(mode=Mode.SHARED, state=next(iter(State)), pid=7)

    async def vcpus(self, _partition: int) -> object:
        return [SimpleNamespace(tid=tid) for tid in TIDS[:2]]


@pytest.mark.parametrize("error", SHORT, ids=str)
async def test_a_partition_s_last_threads_are_kept(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    vmand = cast("VmandClient", Vmand())
    source = PartitionSource(1, NOWHERE)
    with monkeypatch.context() as patch:
        patch.setattr(procfs, "process_of", lambda _tid: 7)
        await VmandLink._refresh(source, vmand)
    with monkeypatch.context() as patch:
        fails(patch, procfs, "process_of", error)
        await VmandLink._refresh(source, vmand)
        assert source.tids() == TIDS[:2]
        assert "last known threads are kept" in source.reason
        with pytest.raises(OSError, match="can't"):
            await source.refresh(vmand)  # to whoever attaches
        fails(patch, procfs, "process_of", EIO)
        with pytest.raises(OSError, match="Input"):
            await VmandLink._refresh(source, vmand)

    def gone(_tid: int) -> int:
        raise GoneError("it ended")

    monkeypatch.setattr(procfs, "process_of", gone)
    await VmandLink._refresh(source, vmand)
    assert source.tids() == ()


@pytest.mark.parametrize("error", SHORT, ids=str)
async def test_a_domain_s_last_threads_are_kept(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    link = LibvirtLink(NOWHERE, vmand_socket=Path("/nowhere"))
    source = DomainSource("one", "qemu:///system", link)
    with monkeypatch.context() as patch:
        patch.setattr(procfs, "process_of", lambda _tid: 7)
        source.told(Seen(state="running", pid=7, tids=TIDS[:2]))
    more = Seen(state="running", pid=7, tids=TIDS[:3])
    with monkeypatch.context() as patch:
        fails(patch, procfs, "process_of", error)
        link.tell(source, more)
        assert source.tids() == TIDS[:2]
        assert "last known threads are kept" in source.reason
        fails(patch, procfs, "process_of", EIO)
        with pytest.raises(OSError, match="Input"):
            link.tell(source, more)
    monkeypatch.setattr(procfs, "process_of", lambda _tid: 7)
    link.tell(source, more)
    assert (source.tids(), source.reason) == (TIDS[:3], "")


@pytest.mark.parametrize(
    ("limits", "wanted", "room", "soft"),
    [
        ((1024, 524_288), 1000, 1000, 524_288),
        ((1024, 1024), 1000, 1024 - MAX_CONNECTIONS - 256, None),
        ((1024, resource.RLIM_INFINITY), 5000, 5000, 5000 + MAX_CONNECTIONS + 256),
        ((64, 64), 1000, 1, None),
    ],
)
def test_the_soft_limit_goes_up_to_the_hard_one_and_connections_have_their_part(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: int, room: int, soft: int | None
) -> None:
    made = []
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _what, both: made.append(both[0]))
    assert descriptor_room(wanted) == room
    assert made == ([] if soft is None else [soft])
