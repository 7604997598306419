"""A dedicated partition's cores: pinned, isolated, read back, repaired, given back."""

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
import pytest

from edgehold.api.vmand import CoresGrade, Mode
from edgehold.errors import FailedError, NoCapacityError
from edgehold.kernel.procfs import GoneError
from edgehold.testing.capability import missing
from vmand.backend import cores as module
from vmand.backend.cores import Cores, usable
from vmand.model import Record
from vmand.placement import Topology

if TYPE_CHECKING:
    from vmand.backend.cpuset import Cpusets
    from vmand.backend.steering import Steering

# Cores 0-5; 2 and 3 share an SMT core.
HOST = Topology(
    siblings={0: frozenset({0}), 1: frozenset({1}), 4: frozenset({4}), 5: frozenset({5})}
    | dict.fromkeys((2, 3), frozenset({2, 3})),
    node={},
)
PID, TIDS = 100, (103, 104)
RECORD = Record(
    id=3, uuid="u", name="n", mode=Mode.DEDICATED, cores=2, memory_bytes=1, cpus=(1, 2), run="1aaaaaaa-bbbb"
)
STRICT = msgspec.structs.replace(RECORD, strict=True)


class Groups:
    """Stands for `Cpusets`: what it is asked for, and answers that a test chooses."""

    def __init__(self) -> None:
        self.why = ""
        self.lost = ""
        self.refusal = ""
        self.whole_process = False
        self.group: Path | None = None
        self.isolated: list[tuple[Path, frozenset[int]]] = []
        self.calls: list[str] = []
        self.not_ready = 0

    def why_not(self) -> str:
        return self.why

    def own(self, partition: int, run: str) -> Path:
        return Path(f"/cg/vmand-p-{partition}-{run[:8]}")

    def group_of(self, _pid: int) -> Path | None:
        return self.group

    def ready(self, _group: Path | None, _cores: frozenset[int]) -> bool:
        self.not_ready -= 1
        return self.not_ready < 0

    def repair(self, group: Path, *, pid: int, tids: Sequence[int], cores: frozenset[int]) -> None:
        assert (pid, tuple(tids)) == (PID, TIDS)
        self.isolated.append((group, cores))
        if self.refusal:
            raise FailedError(self.refusal)
        self.group, self.lost = group, ""

    def check(self, group: Path, *, tids: Sequence[int], cores: frozenset[int]) -> str:
        assert (group, tuple(tids), cores) == (self.group, TIDS, frozenset({1, 2, 3}))
        return self.lost

    def release(self, partition: int, run: str) -> None:
        self.calls.append(f"release {partition} {run}")

    def clear(self, partition: int) -> None:
        self.calls.append(f"clear {partition}")

    def sweep(self, ids: Collection[int]) -> None:
        self.calls.append(f"sweep {sorted(ids)}")

    def held(self) -> frozenset[int]:
        return frozenset({4, 9})


class Interrupts:
    """Stands for `Steering`."""

    def __init__(self) -> None:
        self.applied: list[set[int]] = []

    def apply(self, cores: frozenset[int]) -> None:
        self.applied.append(set(cores))


class Host:
    """Threads with affinities, and the things that `Cores` uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.affinity: dict[int, set[int]] = {tid: {0, 1, 2, 3, 4, 5} for tid in (100, 101, *TIDS)}
        self.online = frozenset(range(6))
        self.confined: frozenset[int] = self.online
        self.groups = Groups()
        self.interrupts = Interrupts()
        monkeypatch.setattr(os, "sched_setaffinity", self.pin)
        monkeypatch.setattr(os, "sched_getaffinity", self.pinned)
        monkeypatch.setattr(module, "threads", self.threads)
        monkeypatch.setattr(module, "online", lambda: self.online)
        monkeypatch.setattr(module, "_READY_EVERY_S", 0)
        self.cores = self.make()

    def make(self, pool: frozenset[int] = frozenset({1, 2, 3})) -> Cores:
        return Cores(
            topology=HOST,
            pool=pool,
            housekeeping=frozenset({0, 4, 5}),
            cpusets=cast("Cpusets", self.groups),
            steering=cast("Steering", self.interrupts),
        )

    def pin(self, tid: int, cores: Collection[int]) -> None:
        if tid not in self.affinity:
            raise ProcessLookupError
        if not set(cores) & self.online & self.confined:
            raise OSError(22, "Invalid argument")
        self.affinity[tid] = set(cores)

    def pinned(self, tid: int) -> set[int]:
        if tid == 0:
            return {0, 1}
        if tid not in self.affinity:
            raise ProcessLookupError(3, "No such process")
        return self.affinity[tid]

    def threads(self, pid: int) -> list[int]:
        if pid not in self.affinity:
            raise GoneError("gone")
        return sorted(self.affinity)

    async def dedicate(self, record: Record = RECORD, group: Path | None = None) -> None:
        await self.cores.dedicate(record, pid=PID, tids=TIDS, group=group)

    def read(self, record: Record = RECORD) -> tuple[CoresGrade, str]:
        return self.cores.read(record, pid=PID, tids=TIDS)

    def repair(self) -> tuple[CoresGrade, str]:
        return self.cores.repair(RECORD, pid=PID, tids=TIDS)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


async def test_isolated_with_the_rest_of_its_smt_core(host: Host) -> None:
    host.groups.not_ready = 3
    await host.dedicate()
    assert host.groups.isolated == [(Path("/cg/vmand-p-3-1aaaaaaa"), frozenset({1, 2, 3}))]
    assert host.affinity == {100: {0, 4, 5}, 101: {0, 4, 5}, 103: {1}, 104: {2}}
    assert host.read() == (CoresGrade.ISOLATED, "")
    assert host.interrupts.applied == [{1, 2, 3}]
    host.cores.release(RECORD)
    host.cores.release(RECORD)
    assert host.interrupts.applied == [{1, 2, 3}, set()]
    assert host.groups.calls == ["release 3 1aaaaaaa-bbbb"] * 2


async def test_other_threads_that_are_inside_share_what_the_vcpus_leave(host: Host) -> None:
    host.groups.whole_process = True
    host.confined = frozenset({1, 2, 3})
    await host.dedicate()
    assert host.affinity == {100: {3}, 101: {3}, 103: {1}, 104: {2}}
    grade, why = host.read()
    assert grade is CoresGrade.ISOLATED
    assert "other threads share core 3 with the guest (Linux before 6.7" in why
    assert host.cores.unit_slice == "-.slice"


async def test_a_units_cgroup_is_used(host: Host) -> None:
    await host.dedicate(group=Path("/cg/vmand.slice/vmand-p-3-1aaaaaaa.service"))
    assert host.groups.isolated[0][0].name == "vmand-p-3-1aaaaaaa.service"
    assert host.cores.unit_slice == ""


async def test_shared_partitions_have_no_cores(host: Host) -> None:
    shared = msgspec.structs.replace(RECORD, mode=Mode.SHARED, cpus=())
    before = dict(host.affinity)
    await host.dedicate(shared)
    host.cores.prepare(shared)
    assert host.read(shared) == (CoresGrade.SHARED, "")
    assert host.cores.repair(shared, pid=PID, tids=TIDS) == (CoresGrade.SHARED, "")
    assert host.affinity == before
    assert host.interrupts.applied == []
    assert host.groups.isolated == []


async def test_where_nothing_can_be_isolated(host: Host) -> None:
    host.groups.why = "cpusets are those of cgroup v1"
    assert host.cores.best() == (CoresGrade.PINNED, "cpusets are those of cgroup v1")
    await host.dedicate()
    assert host.read() == host.repair() == (CoresGrade.PINNED, "cpusets are those of cgroup v1")
    assert host.groups.isolated == []
    assert host.affinity[103] == {1}
    assert host.interrupts.applied == [{1, 2, 3}]
    with pytest.raises(NoCapacityError, match=r"partition 3 is strict .*: cpusets are those of cgroup v1; remove"):
        host.cores.prepare(STRICT)
    with pytest.raises(NoCapacityError, match="cpusets are those of cgroup v1"):
        await host.dedicate(STRICT)


async def test_a_refusal_is_remembered_until_it_is_over(host: Host) -> None:
    host.groups.refusal = "in the way: /x"
    await host.dedicate()
    host.groups.lost = "the kernel says: member"
    assert host.read() == (CoresGrade.PINNED, "in the way: /x")
    with pytest.raises(NoCapacityError, match="in the way: /x"):
        await host.dedicate(STRICT)
    host.groups.refusal = ""
    assert host.repair() == (CoresGrade.ISOLATED, "")
    host.groups.lost = "the kernel says: member"
    assert host.read() == (CoresGrade.PINNED, "the kernel says: member")


def test_best(host: Host) -> None:
    assert host.cores.best() == (CoresGrade.ISOLATED, "")
    grade, why = host.make(pool=frozenset()).best()
    assert grade is CoresGrade.SHARED
    assert "core 0" in why
    host.groups.whole_process = True
    assert "share one of its cores" in host.cores.best()[1]


async def test_an_affinity_that_somebody_changed(host: Host) -> None:
    await host.dedicate()
    host.affinity[104] = {2, 5}
    grade, why = host.read()
    assert grade is CoresGrade.SHARED
    assert why == "vCPU 1 may run on cores 2,5, not on core 2 alone: its affinity was changed"
    assert host.repair() == (CoresGrade.ISOLATED, "")
    assert len(host.groups.isolated) == 1  # a cpuset that is right is not touched


async def test_while_a_core_is_offline_nothing_is_touched(host: Host) -> None:
    await host.dedicate()
    host.online -= {2}
    host.affinity[104] = {1}
    assert host.read() == host.repair() == (CoresGrade.SHARED, "core 2 of vCPU 1 is offline")
    assert len(host.groups.isolated) == 1


async def test_threads_that_end(host: Host) -> None:
    await host.dedicate()
    del host.affinity[104]
    grade, why = host.read()
    assert grade is CoresGrade.SHARED
    assert why == "vCPU 1: its thread 104 can't be looked at: No such process"
    assert host.repair()[0] is CoresGrade.SHARED
    with pytest.raises(FailedError, match="a vCPU thread of partition 3 ended"):
        await host.dedicate()
    host.affinity = {103: {1}, 104: {2}}
    with pytest.raises(FailedError, match="the threads of process 100 can't be listed"):
        await host.dedicate()


async def test_cores_that_can_not_be_had(host: Host) -> None:
    host.confined = frozenset({0, 1})
    with pytest.raises(
        FailedError, match="can't be pinned to core 2: it is offline, or another isolated cpuset has it"
    ):
        await host.dedicate()
    assert host.interrupts.applied == []


async def test_as_many_threads_as_cores(host: Host) -> None:
    with pytest.raises(FailedError, match="has 2 cores and 1 vCPU threads"):
        await host.cores.dedicate(RECORD, pid=PID, tids=(103,))
    assert host.cores.read(RECORD, pid=PID, tids=(103,))[0] is CoresGrade.SHARED


async def test_another_vmand_goes_on(host: Host) -> None:
    await host.dedicate()
    host.cores = host.make()
    host.cores.adopt(RECORD)
    host.cores.sweep([3])
    assert host.read() == (CoresGrade.ISOLATED, "")
    assert host.interrupts.applied[-1] == {1, 2, 3}
    host.cores.sweep([])
    assert host.interrupts.applied[-1] == set()
    assert host.groups.calls == ["sweep [3]", "sweep []"]


async def test_a_guest_that_was_never_isolated(host: Host) -> None:
    host.groups.refusal = "no"
    await host.dedicate()
    host.cores = host.make()
    assert host.read() == (CoresGrade.PINNED, "its threads are in no cgroup of its own")
    host.groups.refusal = ""
    assert host.repair() == (CoresGrade.ISOLATED, "")


def test_before_a_start_old_remains_go(host: Host) -> None:
    host.cores.prepare(STRICT)
    assert host.groups.calls == ["clear 3"]


def test_usable_cores_include_those_that_are_isolated(host: Host) -> None:
    assert usable(HOST, cast("Cpusets", host.groups), frozenset({5})) == {0, 1, 4, 5}


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as one:
        yield one
        one.kill()


async def test_a_real_thread_is_pinned(child: subprocess.Popen[bytes]) -> None:
    own = os.sched_getaffinity(0)
    if len(own) < 2:
        missing("needs two cores")
    first, last = min(own), max(own)
    host = Topology(siblings={one: frozenset({one}) for one in own}, node={})
    groups = Groups()
    groups.why = "not tried here"
    cores = Cores(
        topology=host,
        pool=frozenset({last}),
        housekeeping=frozenset({first}),
        cpusets=cast("Cpusets", groups),
        steering=None,
    )
    record = msgspec.structs.replace(RECORD, cores=1, cpus=(last,))
    await cores.dedicate(record, pid=child.pid, tids=(child.pid,))
    assert os.sched_getaffinity(child.pid) == {last}
    assert cores.read(record, pid=child.pid, tids=(child.pid,)) == (CoresGrade.PINNED, "not tried here")
    os.sched_setaffinity(child.pid, own)
    assert cores.read(record, pid=child.pid, tids=(child.pid,))[0] is CoresGrade.SHARED
    assert cores.repair(record, pid=child.pid, tids=(child.pid,))[0] is CoresGrade.PINNED
    cores.release(record)
