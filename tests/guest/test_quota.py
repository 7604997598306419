"""cpu.max of a real cgroup v2: what deadlined sets, reads and gives back, and that it binds no deadline thread."""

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deadlined import quota
from deadlined.ceilings import Ceilings, Limit
from deadlined.cgroups import open_cgroup
from deadlined.quota import Group, GroupSample, is_saturated, open_group
from edgehold.api.deadlined import Actuator
from edgehold.errors import BadStateError, FailedError, UnsupportedError
from edgehold.kernel import cgroup, procfs, sched
from edgehold.kernel.births import Births
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import SchedAttr
from edgehold.testing.capability import missing, need_root
from edgehold.testing.load import Load, eventually

MOUNT = Path("/sys/fs/cgroup")
NAME = "edgehold-quota"
GROUP = MOUNT / NAME
MS = 1_000_000
PERIOD_NS = 100 * MS
PATIENCE_S = 60.0
"""This machine is emulated."""


@pytest.fixture
def group() -> Iterator[Path]:
    need_root()
    if "cpu" not in (MOUNT / "cgroup.controllers").read_text().split():
        missing("cgroup v2 has no cpu controller here")
    (MOUNT / "cgroup.subtree_control").write_text("+cpu +pids")
    GROUP.mkdir()
    yield GROUP
    eventually(lambda: removed(GROUP), timeout_s=PATIENCE_S, what=f"{GROUP} is removed")


def removed(path: Path) -> bool:
    """rmdir(2) of a cgroup says EBUSY as long as its last thread is being buried."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@pytest.fixture
def held(group: Path) -> Iterator[Group]:
    one = open_group(f"/{group.name}", actuator=Actuator.CPU_MAX, period_ns=PERIOD_NS)
    yield one
    one.close()


@pytest.fixture
def hog(group: Path, load: Load) -> int:
    """A process in the cgroup that spins."""
    child = load.hog()
    (group / "cgroup.procs").write_text(str(child.pid))
    return child.pid


@pytest.fixture
def load() -> Iterator[Load]:
    with Load() as one:
        yield one


def window(held: Group, *, periods: int) -> tuple[GroupSample, GroupSample]:
    """Two samples between which so many periods ended in which the group wanted to run."""
    before = held.sample()
    eventually(
        lambda: held.sample().nr_periods >= before.nr_periods + periods,
        timeout_s=PATIENCE_S,
        what=f"{periods} periods of the quota",
    )
    return before, held.sample()


def share(before: GroupSample, after: GroupSample) -> float:
    return (after.executed_ns - before.executed_ns) / (after.time_ns - before.time_ns)


def test_a_group_is_held_and_let_go(held: Group, hog: int, group: Path) -> None:
    assert procfs.stat(hog).name
    assert held.original == "max 100000"
    assert held.set(20 * MS) == 20 * MS
    assert (group / "cpu.max").read_text().strip() == "20000 100000"
    window(held, periods=3)
    before, after = window(held, periods=12)
    assert after.throttled_ns > before.throttled_ns
    assert after.nr_throttled - before.nr_throttled >= 9
    assert share(before, after) < 0.3
    assert is_saturated(before, after, budget_ns=20 * MS, period_ns=PERIOD_NS)
    assert not held.taken()
    assert held.restore()
    assert (group / "cpu.max").read_text().strip() == "max 100000"
    before = held.sample()
    eventually(lambda: share(before, held.sample()) > 0.5, timeout_s=PATIENCE_S, what="it runs without a limit")


def test_a_group_that_has_enough_is_not_saturated(held: Group, group: Path, load: Load) -> None:
    child = load.periodic(work_s=0.005, period_s=0.2)
    (group / "cgroup.procs").write_text(str(child.pid))
    held.set(80 * MS)
    before, after = window(held, periods=8)
    assert is_saturated(before, after, budget_ns=80 * MS, period_ns=PERIOD_NS) is False


def test_somebody_elses_limit_stays(held: Group, group: Path) -> None:
    held.set(20 * MS)
    (group / "cpu.max").write_text("max 50000")
    with pytest.raises(BadStateError, match="max 50000"):
        held.set(30 * MS)
    left = held.plan(30 * MS)
    assert not held.restore()
    assert not quota.restore(left)
    (group / "cpu.max").write_text("70000 100000")  # by its period it could be ours
    assert not quota.restore(left)
    assert (group / "cpu.max").read_text().strip() == "70000 100000"


def test_what_a_killed_deadlined_left_is_restored(held: Group, group: Path) -> None:
    left = held.plan(20 * MS)
    held.set(20 * MS)
    assert quota.restore(left)
    assert (group / "cpu.max").read_text().strip() == "max 100000"
    assert not quota.restore(left)


def test_a_cgroup_that_was_made_again_is_not_restored(held: Group, group: Path) -> None:
    left = held.plan(20 * MS)
    held.set(20 * MS)
    held.sample()
    group.rmdir()
    assert not quota.restore(left)
    group.mkdir()
    (group / "cpu.max").write_text("20000 100000")
    assert not quota.restore(left)
    for ask in (held.sample, held.taken, lambda: held.set(30 * MS)):
        with pytest.raises(GoneError, match="was removed"):
            ask()
    assert not held.restore()
    assert (group / "cpu.max").read_text().strip() == "20000 100000"


def test_why_the_kernel_refuses(held: Group, group: Path) -> None:
    held.set(50 * MS)
    (group / "cpu.max.burst").write_text("40000")
    with pytest.raises(FailedError, match=r"cpu\.max\.burst \(40000 us\)"):
        held.set(20 * MS)
    assert held.budget_ns == 50 * MS
    (group / "below").mkdir()
    try:
        with pytest.raises(UnsupportedError, match=f"cpu to {group}/cgroup.subtree_control"):
            open_group(f"/{group.name}/below", actuator=Actuator.CPU_MAX, period_ns=PERIOD_NS)
    finally:
        (group / "below").rmdir()
    if not (group / "cpu.rt.max").exists():
        with pytest.raises(UnsupportedError, match=r"no cpu\.rt\.max"):
            open_group(f"/{group.name}", actuator=Actuator.CPU_RT_MAX, period_ns=PERIOD_NS)


def test_a_limit_binds_no_deadline_thread_but_is_known(group: Path, hog: int) -> None:
    (group / "cpu.max").write_text("10000 100000")
    ceilings = Ceilings()
    tids = frozenset({hog})
    ceilings.refresh(0, tids)
    assert ceilings.limits() == [Limit(f"/{NAME}", 0.1, tids)]
    assert ceilings.paths_of(hog) == (f"/{NAME}",)
    sched.set_attr(hog, SchedAttr.deadline(runtime_ns=50 * MS, period_ns=PERIOD_NS))
    try:

        def executed_ns() -> int:
            return int(Path(f"/proc/{hog}/schedstat").read_text().split()[0])

        begin, then = executed_ns(), time.monotonic_ns()
        eventually(
            lambda: (
                time.monotonic_ns() - then > 10**9 and (executed_ns() - begin) / (time.monotonic_ns() - then) > 0.25
            ),
            timeout_s=PATIENCE_S,
            what="the deadline thread runs far above its cgroup's limit",
        )
    finally:
        sched.set_attr(hog, SchedAttr())
    (group / "cpu.max").write_text("max 100000")
    ceilings.refresh(2 * 10**9, tids)
    assert ceilings.limits() == []


class Still:
    """Time stands: a source that now and then looks anew in any case does not."""

    def monotonic_ns(self) -> int:
        return 10**9

    def wall_s(self) -> float:
        return 0.0


def test_threads_of_a_cgroup_by_its_count(group: Path, load: Load) -> None:
    child = load.sleeper()
    with contextlib.closing(Births()) as births:
        source = open_cgroup(f"/{group.name}", births=births, clock=Still())

        def tells(expected: Callable[[], set[int]]) -> None:
            eventually(
                lambda: not source.changed() or set(source.tids()) == expected(),
                timeout_s=PATIENCE_S,
                what=f"the source tells {expected()}",
            )
            eventually(lambda: set(source.tids()) == expected(), timeout_s=PATIENCE_S, what=f"{expected()}")

        try:
            (group / "below").mkdir()
            (group / "below/cgroup.procs").write_text(str(child.pid))
            tells(lambda: {child.pid})
            thread = child.thread()
            assert source.changed()
            tells(lambda: {child.pid, thread})
            source.tids()
            assert not source.changed()  # whatever happens elsewhere on this host
            load.sleeper()
            assert not source.changed()
            child.end()
            eventually(lambda: source.changed() and not source.tids(), timeout_s=PATIENCE_S, what="it is empty")
        finally:
            source.close()
            child.end()
            eventually(lambda: removed(group / "below"), timeout_s=PATIENCE_S, what="its child is removed")
    assert cgroup.unified(cgroup.hierarchies()) is not None
