"""Isolated cores with a real vmand and a real cgroup v2: a dedicated partition on two of four CPUs.

The guest is suspended in most of it: its virtual CPUs then use nothing, so that whatever its cores do is others' work.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from edgehold.api.vmand import CoresGrade, Event, Partition, State, VmandClient
from edgehold.errors import NoCapacityError
from edgehold.testing.capability import guest_image, missing, need_command, need_root
from edgehold.testing.load import Load
from edgehold.testing.partitions import PrivateVmand, private_vmand

ROOT = Path(__file__).parents[2]
CGROUP = Path("/sys/fs/cgroup")
PLANTED = CGROUP / "planted"
PATIENCE_S = 60.0
"""For what happens at once on a quiet machine; this one is emulated."""
REPAIR_S = 120.0
"""vmand tries to repair a lost isolation every 30 s."""
NOTICED_S = 2.0


@pytest.fixture
async def vmand() -> AsyncIterator[PrivateVmand]:
    need_root()
    need_command("qemu-system-x86_64", "qemu-system-x86")
    if "cpuset" not in (CGROUP / "cgroup.controllers").read_text().split():
        missing("cgroup v2 has no cpuset here")
    settings = {"accelerator": "tcg", "start_timeout_s": 120, "qmp_timeout_s": 60, "steer": True}
    async with private_vmand(settings=settings) as one:
        yield one
        assert one.running, one.log_text()[-3000:]


@contextlib.asynccontextmanager
async def suspended(vmand: PrivateVmand, *, strict: bool = False) -> AsyncIterator[tuple[VmandClient, Partition]]:
    """A partition of two cores whose guest's CPUs were stopped as soon as they ran."""
    kernel, initrd = guest_image(ROOT)
    async with await vmand.client() as client:
        one = await client.create_partition(cores=2, memsize_gb=0.125, strict=strict)
        await client.deploy(one, kernel=kernel, initrd=initrd, cmdline="quiet")
        await client.suspend(one)
        yield client, await client.status(one)


@contextlib.contextmanager
def planted(cores: str) -> Iterator[None]:
    """Somebody else's cgroup that claims these cores too."""
    PLANTED.mkdir()
    try:
        (CGROUP / "cgroup.subtree_control").write_text("+cpuset")
        (PLANTED / "cpuset.cpus").write_text(cores)
        yield
    finally:
        PLANTED.rmdir()


def groups() -> list[Path]:
    """The cgroups of partitions."""
    return sorted(CGROUP.glob("vmand-p-*"))


def effective() -> str:
    """The cores that all tasks of no partition may use, as the kernel lists them."""
    return (CGROUP / "cpuset.cpus.effective").read_text().strip()


def interrupts() -> int:
    """The cores that new interrupts may use, as a mask."""
    return int(Path("/proc/irq/default_smp_affinity").read_text(), 16)


def user_ticks(core: int) -> int:
    """How long user space has run on the core, in ticks of 10 ms (proc_stat(5))."""
    line = next(one for one in Path("/proc/stat").read_text().splitlines() if one.startswith(f"cpu{core} "))
    _name, user, nice, *_rest = line.split()
    return int(user) + int(nice)


def others_ticks() -> int:
    """The same of the cores that are left to everybody."""
    return user_ticks(0) + user_ticks(3)


async def until(condition: Callable[[], bool], what: str, *, timeout_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {timeout_s:g} s")
        await asyncio.sleep(0.1)


async def graded(client: VmandClient, partition: int, grade: CoresGrade, *, timeout_s: float) -> Event:
    """The event that tells this grade of the cores."""
    try:
        async with asyncio.timeout(timeout_s):
            async for event in client.events():
                if event.partition == partition and event.kind == "grade" and event.cores_grade is grade:
                    return event
    except TimeoutError:
        pass
    return pytest.fail(f"no event with grade {grade} within {timeout_s:g} s: {await client.status(partition)}")


async def test_nobody_else_runs_on_isolated_cores(vmand: PrivateVmand) -> None:
    async with suspended(vmand, strict=True) as (client, one):
        assert one.cores_grade is CoresGrade.ISOLATED, one.cores_reason
        assert one.state is State.SUSPENDED
        assert one.cpus == (1, 2)
        assert effective() == "0,3"
        (group,) = groups()
        assert (group / "cpuset.cpus.partition").read_text().strip() == "isolated"

        with Load() as load:
            for _ in range(4):
                load.hog()
            own, others, begun = [user_ticks(core) for core in one.cpus], others_ticks(), time.monotonic()
            # Five seconds of work on the two cores that are left: there is more to do than they can.
            await until(lambda: others_ticks() > others + 500, "the busy loops run")
            grown = [user_ticks(core) - was for core, was in zip(one.cpus, own, strict=True)]
            # QEMU's own main thread, which answers vmand, shares the first core on this kernel: a little of it.
            assert grown[0] <= 10 * (time.monotonic() - begun), grown
            assert grown[1] == 0, grown

            # The same loops once the isolation is taken away: now they are there, and vmand says so.
            await client.subscribe(one.id)
            (group / "cpuset.cpus.partition").write_text("member")
            await until(
                lambda: all(user_ticks(core) - was > 50 for core, was in zip(one.cpus, own, strict=True)),
                "the busy loops run on the partition's cores too",
            )
            event = await graded(client, one.id, CoresGrade.PINNED, timeout_s=PATIENCE_S)
            assert "isolated" in event.reason
        await client.shutdown(one.id, force=True)
        await client.destroy_partition(one.id)
        assert groups() == []
        assert effective() == "0-3"


async def test_an_overlapping_cgroup_is_noticed_and_named(vmand: PrivateVmand) -> None:
    async with suspended(vmand) as (client, one):
        assert one.cores_grade is CoresGrade.ISOLATED, one.cores_reason
        await client.subscribe(one.id)
        took_s = []
        for _ in range(3):
            # On a machine with other load one attempt may be late; the grade must drop in any case.
            with planted("2-3"):
                begun = time.monotonic()
                event = await graded(client, one.id, CoresGrade.PINNED, timeout_s=PATIENCE_S)
                took_s.append(time.monotonic() - begun)
                status = await client.status(one.id)
                assert status.cores_grade is CoresGrade.PINNED
                assert "planted" in status.cores_reason
                assert "planted" in event.reason
            await graded(client, one.id, CoresGrade.ISOLATED, timeout_s=REPAIR_S)
            assert effective() == "0,3"
            if took_s[-1] < NOTICED_S:
                break
        assert min(took_s) < NOTICED_S, took_s


async def test_isolation_outlives_vmand_and_ends_with_the_partition(vmand: PrivateVmand) -> None:
    cores, may_interrupt = effective(), interrupts()
    async with suspended(vmand) as (_client, one):
        (group,) = groups()
        assert interrupts() == 0b1001
        await vmand.kill()
        assert (group / "cpuset.cpus.partition").read_text().strip() == "isolated"
        await vmand.start(timeout_s=PATIENCE_S)
    async with await vmand.client() as client:
        status = await client.status(one.id)
        assert (status.state, status.cores_grade) == (State.SUSPENDED, CoresGrade.ISOLATED), status
        assert groups() == [group]
        assert interrupts() == 0b1001
        # Its cores are its own also for what comes after it: one core of three is left.
        with pytest.raises(NoCapacityError, match="1 is left: core 3"):
            await client.create_partition(cores=2, memsize_gb=0.125)
        await client.shutdown(one.id, force=True)
        await client.destroy_partition(one.id)
        assert groups() == []
        assert effective() == cores == "0-3"
        assert interrupts() == may_interrupt == 0b1111


async def test_strict_is_refused_where_the_cores_are_not_to_be_had(vmand: PrivateVmand) -> None:
    with planted("1-3"):
        with pytest.raises(NoCapacityError, match="planted"):
            async with suspended(vmand, strict=True):
                pass
        async with await vmand.client() as client:
            (one,) = await client.list_partitions()
            assert one.state is State.READY
        assert groups() == []
        assert effective() == "0-3"
