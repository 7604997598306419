"""A cgroup's own limit: when a group is saturated, what is refused and why, and that only what is ours is restored."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadlined import quota
from deadlined.quota import Group, GroupSample, QuotaRow, is_saturated, open_group
from edgehold.api.deadlined import Actuator
from edgehold.errors import BadRequestError, BadStateError, DeniedError, UnsupportedError
from edgehold.kernel.cgroup import Hierarchy
from edgehold.kernel.procfs import GoneError

MS = 1_000_000
PERIOD_NS = 100 * MS
STAT = "usage_usec {}\nnr_periods {}\nnr_throttled {}\nthrottled_usec {}\n"


@pytest.fixture
def v2(tmp_path: Path) -> Hierarchy:
    (tmp_path / "a").mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    (tmp_path / "a/cpu.max").write_text("max 100000\n")
    (tmp_path / "a/cpu.stat").write_text(STAT.format(70, 5, 4, 30))
    return Hierarchy(mount=str(tmp_path), root="/", version=2, controllers=frozenset())


@pytest.fixture
def group(v2: Hierarchy) -> Iterator[Group]:
    one = open_group("/a", actuator=Actuator.CPU_MAX, period_ns=PERIOD_NS, seen=[v2])
    yield one
    one.close()


@pytest.fixture
def file(v2: Hierarchy, group: Group) -> Path:
    """cpu.max of the group; as the kernel's, a write replaces all of it."""
    assert group.path == "/a"
    path = Path(v2.mount) / "a/cpu.max"
    path.write_text("max 100000")
    return path


def sample(time_ms: float, executed_ms: float, periods: int, throttled: int) -> GroupSample:
    return GroupSample(
        time_ns=round(time_ms * MS),
        executed_ns=round(executed_ms * MS),
        throttled_ns=0,
        nr_periods=periods,
        nr_throttled=throttled,
    )


@pytest.mark.parametrize(
    ("executed_ms", "periods", "throttled", "saturated"),
    [
        (50, 5, 5, True),
        (50, 5, 4, False),  # in one period it had enough
        (38, 5, 5, True),
        (37, 5, 5, False),  # a part of the budget was not used
        (10, 1, 1, False),  # idle in four periods, which the kernel does not count
        (50, 0, 0, None),  # no period ended in the window
        (0, 0, 0, False),
        (500, 10, 9, True),
    ],
)
def test_when_a_group_is_saturated(executed_ms: float, periods: int, throttled: int, saturated: bool | None) -> None:
    before = sample(1000, 70, 10, 3)
    after = sample(1500, 70 + executed_ms, 10 + periods, 3 + throttled)
    assert is_saturated(before, after, budget_ns=10 * MS, period_ns=PERIOD_NS) is saturated


def test_no_window_and_no_budget_tell_nothing() -> None:
    one = sample(1000, 70, 10, 3)
    assert is_saturated(one, one, budget_ns=10 * MS, period_ns=PERIOD_NS) is None
    assert is_saturated(one, sample(1500, 570, 15, 8), budget_ns=0, period_ns=PERIOD_NS) is None


def test_the_counters(group: Group) -> None:
    found = group.sample()
    assert (found.executed_ns, found.throttled_ns, found.nr_periods, found.nr_throttled) == (70_000, 30_000, 5, 4)
    assert found.time_ns > 0


def test_set_and_restore(group: Group, file: Path) -> None:
    assert group.original == "max 100000"
    assert group.row.period_ns == PERIOD_NS
    file.write_text("")
    assert group.set(50 * MS + 1400) == 50 * MS + 1000
    assert file.read_text() == "50001 100000"
    assert group.budget_ns == 50 * MS + 1000
    assert not group.taken()
    file.write_text("50001 100000")
    assert group.restore()
    assert file.read_text().startswith("max 100000")
    assert group.budget_ns == 0
    assert not group.restore()


def test_the_least_quota_is_a_millisecond(group: Group, file: Path) -> None:
    file.write_text("")
    assert group.set(1000) == MS
    assert file.read_text() == "1000 100000"


def test_what_systemd_puts_back_is_set_again(group: Group, file: Path) -> None:
    """A daemon-reload writes what the unit's files say, which is what stood there before ours."""
    file.write_text("")
    group.set(50 * MS)
    file.write_text("max 100000")
    assert not group.taken()
    assert group.budget_ns == 0
    assert group.plan(50 * MS).before == ""
    file.write_text("")
    assert group.set(50 * MS) == 50 * MS
    assert file.read_text() == "50000 100000"
    file.write_text("max 100000")
    assert not group.restore()
    assert file.read_text() == "max 100000"


def test_what_somebody_else_has_written_stays(group: Group, file: Path) -> None:
    file.write_text("")
    group.set(50 * MS)
    file.write_text("20000 100000")
    assert group.taken()
    for _ in range(2):
        with pytest.raises(BadStateError, match=r"somebody else changed cpu\.max of cgroup /a to '20000 100000'"):
            group.set(30 * MS)
    assert not group.restore()
    assert file.read_text() == "20000 100000"


def test_a_cgroup_that_was_removed(group: Group, file: Path) -> None:
    file.write_text("")
    group.set(50 * MS)
    shutil.rmtree(file.parent)
    file.parent.mkdir()
    file.write_text("50000 100000")
    with pytest.raises(GoneError, match="was removed"):
        group.set(30 * MS)
    assert not group.restore()
    assert not quota.restore(group.row)
    assert file.read_text() == "50000 100000"


def test_restoring_by_the_journal(group: Group, file: Path) -> None:
    file.write_text("")
    group.set(50 * MS)
    left = group.plan(60 * MS)
    for ours in ("50000 100000\n", "60000 100000\n"):  # killed before the write, and after it
        file.write_text(ours)
        assert quota.restore(left)
        assert file.read_text().startswith("max 100000")
    for others in ("max 100000", "50000 20000", "nonsense"):
        file.write_text(others)
        assert not quota.restore(left)
        assert file.read_text() == others
    shutil.rmtree(file.parent)
    assert not quota.restore(left)


def test_an_administrator_s_limit_of_the_same_period_stays(group: Group, file: Path) -> None:
    file.write_text("")
    group.set(50 * MS)
    left = group.plan(60 * MS)
    for others in ("70000 100000\n", "0 100000\n"):
        file.write_text(others)
        assert not quota.restore(left)
        assert file.read_text() == others
    file.write_text("50000 100000\n")
    assert not quota.restore(group.row)  # nothing was ever written


def test_another_cgroup_of_the_same_name_is_not_restored(group: Group, file: Path) -> None:
    file.write_text("50000 100000")
    row = QuotaRow(
        directory=group.row.directory,
        device=group.row.device,
        inode=group.row.inode + 1,
        file="cpu.max",
        original="max 100000",
        period_ns=PERIOD_NS,
        written="50000 100000",
    )
    assert not quota.restore(row)
    assert file.read_text() == "50000 100000"


@pytest.mark.parametrize("period_ns", [MS - 1000, 1000 * MS + 1000, MS + 1])
def test_periods_that_the_kernel_does_not_take(period_ns: int, v2: Hierarchy) -> None:
    with pytest.raises(BadRequestError, match=r"policy\.period_ns: cpu\.max takes"):
        open_group("/a", actuator=Actuator.CPU_MAX, period_ns=period_ns, seen=[v2])


def refusal(path: str, actuator: Actuator, seen: list[Hierarchy]) -> str:
    with pytest.raises(UnsupportedError) as caught:
        open_group(path, actuator=actuator, period_ns=PERIOD_NS, seen=seen)
    return caught.value.message


def test_why_a_host_has_no_such_limit(v2: Hierarchy, tmp_path: Path) -> None:
    v1 = Hierarchy(mount="/none", root="/", version=1, controllers=frozenset({"cpu", "cpuacct"}))
    assert "not mounted" in refusal("/a", Actuator.CPU_MAX, [v1])
    assert "no released one" in refusal("/a", Actuator.CPU_RT_MAX, [v2])
    (tmp_path / "a/b").mkdir()
    refused = refusal("/a/b", Actuator.CPU_MAX, [v2])
    assert f"+cpu to {tmp_path}/a/cgroup.subtree_control" in refused
    # Not CPUAccounting=, for which systemd turns no controller on.
    assert "systemctl set-property b CPUWeight=100" in refused
    assert "cgroup_no_v1=cpu" in refusal("/a/b", Actuator.CPU_MAX, [v2, v1])
    (tmp_path / "cgroup.controllers").write_text("pids\n")
    assert "CONFIG_CFS_BANDWIDTH" in refusal("/a/b", Actuator.CPU_MAX, [v2])
    with pytest.raises(GoneError, match="/none does not exist"):
        open_group("/none", actuator=Actuator.CPU_MAX, period_ns=PERIOD_NS, seen=[v2])
    with pytest.raises(DeniedError, match="whole host"):
        open_group("/", actuator=Actuator.CPU_MAX, period_ns=PERIOD_NS, seen=[v2])


def test_a_real_time_quota_where_the_file_is(v2: Hierarchy, tmp_path: Path) -> None:
    file = tmp_path / "a/cpu.rt.max"
    file.write_text("max 100000\n")
    group = open_group("/a", actuator=Actuator.CPU_RT_MAX, period_ns=PERIOD_NS, seen=[v2])
    try:
        file.write_text("")
        group.set(20 * MS)
        assert file.read_text() == "20000 100000"
        found = group.sample()
        assert (found.executed_ns, found.nr_periods) == (70_000, 0)  # the others are of cpu.max
    finally:
        group.close()


def test_nothing_stays_open(v2: Hierarchy) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    group = open_group("/a", actuator=Actuator.CPU_MAX, period_ns=PERIOD_NS, seen=[v2])
    group.sample()
    group.close()
    group.close()
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
