"""Attachments that hold a cgroup by its own quota: what is written and when, whose it is, and what is given back. The
cgroup is a directory of ordinary files."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from deadlined.groups import Groups
from deadlined.held import Attached
from deadlined.journal import Journal
from deadlined.rules import rule_config
from edgehold.api.deadlined import Actuator, Policy, Rule, Target, TargetKind
from edgehold.errors import BadStateError, FailedError, UnsupportedError
from edgehold.kernel import cgroup
from edgehold.kernel.cgroup import Hierarchy
from edgehold.kernel.native_held import HeldTable

if TYPE_CHECKING:
    from deadlined.cgroups import CgroupSource

MS = 1_000_000
CYCLE_NS = 500 * MS
POLICY = Policy(actuator=Actuator.CPU_MAX)
FIXED = Policy(actuator=Actuator.CPU_MAX, rule=Rule.FIXED, initial_budget_ns=20 * MS)


@dataclass
class Source:
    """Of a cgroup that comes and goes."""

    path: str = "/a"
    here: bool = True
    reason: str = ""
    over: str = ""
    suspended: bool = False


@dataclass
class Host:
    """The cgroup, the clock and what is written."""

    directory: Path
    now_ns: int = 10**12
    executed_us: int = 0
    written: list[str] = field(default_factory=list)

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_s(self) -> float:
        raise AssertionError

    @property
    def file(self) -> Path:
        return self.directory / "a/cpu.max"

    def write_at(self, _group: int, name: str, text: str) -> None:
        """As the kernel's: what is written replaces all of it."""
        assert name == "cpu.max"
        self.written.append(text)
        self.file.write_text(text if " " in text else f"{text} 100000")

    def run(self, executed_ms: float) -> None:
        """A cycle's time goes by, in which it executed so much of each 100 ms."""
        self.now_ns += CYCLE_NS
        self.executed_us += round(5000 * executed_ms)
        self.tell()

    def tell(self) -> None:
        (self.directory / "a/cpu.stat").write_text(
            f"usage_usec {self.executed_us}\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0\n"
        )

    def make(self) -> None:
        (self.directory / "a").mkdir(exist_ok=True)
        self.file.write_text("max 100000")
        self.tell()


class World:
    """The groups over a host."""

    def __init__(self, host: Host, journal: Journal) -> None:
        self.host = host
        self.journal = journal
        self.table = HeldTable(history=8, cycle_ns=CYCLE_NS, short_ns=0)
        self.groups = Groups(clock=host, journal=journal, table=self.table, cycle_ns=CYCLE_NS)
        self.source = Source()

    def attached(self, policy: Policy, number: int = 1) -> Attached:
        source = cast("CgroupSource", self.source)
        target = Target(kind=TargetKind.CGROUP, name="/a")
        return Attached(id=number, target=target, policy=policy, config=rule_config(policy), source=source, begun=0)

    def attach(self, policy: Policy = POLICY, number: int = 1) -> Attached:
        one = self.attached(policy, number)
        self.groups.attach(one, cast("CgroupSource", self.source))
        return one

    def cycle(self, executed_ms: float = 0) -> None:
        self.host.run(executed_ms)
        self.groups.cycle()

    @property
    def reason(self) -> str:
        status = self.groups.status(1)
        assert status is not None
        return status.reason


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    host = Host(tmp_path)
    host.make()
    v2 = Hierarchy(mount=str(tmp_path), root="/", version=2, controllers=frozenset())
    monkeypatch.setattr(cgroup, "hierarchies", lambda: [v2])
    monkeypatch.setattr(cgroup, "write_at", host.write_at)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    journal = Journal(tmp_path / "state", boot_id="a")
    one = World(host, journal)
    yield one
    one.groups.release(1)
    journal.close()


def test_it_is_limited_sized_and_given_back(world: World) -> None:
    world.attach()
    assert world.host.written == ["10000 100000"]
    assert [row.original for row in world.journal.quotas()] == ["max 100000"]
    assert ("/a" in world.groups, len(world.groups)) == (True, 1)
    world.cycle(20)
    assert world.host.written[1:] == ["22000 100000"]
    [sample] = world.table.history(1, most=9)
    assert (sample.tid, sample.executed_ns, sample.budget_ns, sample.wanted_ns) == (0, 100 * MS, 10 * MS, 22 * MS)
    world.groups.release(1)
    assert world.host.written[2:] == ["max 100000"]
    assert world.journal.quotas() == []
    assert list(world.groups) == []


def test_nothing_is_written_while_nothing_changes(world: World) -> None:
    world.attach()
    world.cycle(20.0001)  # no whole number of microseconds
    world.host.written.clear()
    for _ in range(20):
        world.cycle(20.0001)
    world.groups.change(1, Policy(actuator=Actuator.CPU_MAX, min_budget_ns=100_000))
    for _ in range(20):
        world.cycle(0)  # less than the kernel's least quota
    assert world.host.written == ["1000 100000"]


def test_what_somebody_else_writes_is_noticed_although_nothing_changes_and_stays(world: World) -> None:
    world.attach(FIXED)
    world.cycle(20)
    world.host.file.write_text("70000 100000")
    for _ in range(3):  # told as long as it is so
        world.cycle(20)
        assert "somebody else changed cpu.max of cgroup /a to '70000 100000'" in world.reason
    world.groups.release(1)
    assert world.host.file.read_text() == "70000 100000"
    assert world.journal.quotas() == []


def test_a_limit_outlives_a_daemon_reload(world: World) -> None:
    world.attach(FIXED)
    world.cycle(20)
    limit = world.host.file.read_text()
    world.host.file.write_text("max 100000")
    world.cycle(20)
    assert (world.host.file.read_text(), world.reason) == (limit, "")
    [row] = world.journal.quotas()
    assert (row.original, row.written) == ("max 100000", limit)


def test_a_limit_can_be_changed(world: World) -> None:
    one = world.attach(FIXED)
    one.policy = Policy(actuator=Actuator.CPU_MAX, rule=Rule.FIXED, initial_budget_ns=150 * MS)
    world.groups.change(1, one.policy)
    world.cycle()
    assert world.host.written[-1] == "150000 100000"


def test_another_period_is_set_anew(world: World) -> None:
    one = world.attach(FIXED)
    one.policy = Policy(actuator=Actuator.CPU_MAX, rule=Rule.FIXED, period_ns=50 * MS, initial_budget_ns=5 * MS)
    world.groups.change(1, one.policy)
    world.cycle()
    assert world.host.file.read_text() == "5000 50000"
    assert [(row.original, row.period_ns) for row in world.journal.quotas()] == [("max 100000", 50 * MS)]


def test_one_that_can_t_be_held_yet_is_tried_in_every_cycle_with_the_reason(world: World) -> None:
    """An attachment of the settings: cgroup v2 passes the controller on some seconds later, or never."""
    world.host.file.unlink()
    with pytest.raises(UnsupportedError, match=r"no cpu\.max|not pass the cpu controller"):
        world.attach()
    for _ in range(2):
        world.cycle()
        assert "cpu controller" in world.reason
    world.host.make()
    world.cycle()
    assert (world.host.written, world.reason) == (["10000 100000"], "")


def test_a_cgroup_that_goes_and_comes_back(world: World) -> None:
    world.source.here = False
    world.source.reason = "no such cgroup"
    world.attach()
    world.cycle()
    assert (world.host.written, world.reason) == ([], "no such cgroup")
    world.source.here = True
    world.cycle()
    world.cycle(30)
    assert world.host.written == ["10000 100000", "33000 100000"]


def test_what_is_not_in_the_journal_is_not_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_row: object) -> None:
        raise FailedError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.journal, "limit", full)
        with pytest.raises(FailedError, match="full"):
            world.attach()
        world.cycle()
        assert (world.host.written, world.reason) == ([], "the disk is full")
    world.cycle()
    assert world.host.written == ["10000 100000"]


def test_a_dry_run_writes_nothing(world: World) -> None:
    world.attach(Policy(actuator=Actuator.CPU_MAX, dry_run=True))
    world.cycle(20)
    status = world.groups.status(1)
    assert status is not None
    assert (world.host.written, status.budget_ns, status.wanted_ns) == ([], 0, 22 * MS)


def test_a_killed_predecessor_s_limits_are_taken_back(world: World) -> None:
    world.attach()
    again = Groups(clock=world.host, journal=world.journal, table=world.table, cycle_ns=CYCLE_NS)
    assert again.recover() == 1
    assert world.host.file.read_text() == "max 100000"
    assert (world.journal.quotas(), again.recover()) == ([], 0)


def test_a_killed_predecessor_s_limit_is_found_whenever_it_was_killed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a write the journal has what will stand there, and what does."""
    world.attach(FIXED)
    one, told = world.attached(FIXED), []
    one.policy = Policy(actuator=Actuator.CPU_MAX, rule=Rule.FIXED, initial_budget_ns=30 * MS)
    world.groups.change(1, one.policy)

    def write_at(group: int, name: str, text: str) -> None:
        [row] = world.journal.quotas()
        told.append((row.original, row.before, row.written))
        world.host.write_at(group, name, text)

    monkeypatch.setattr(cgroup, "write_at", write_at)
    world.cycle()
    world.cycle()
    assert told == [("max 100000", "20000 100000", "30000 100000")]
    assert world.host.file.read_text() == "30000 100000"


def test_an_administrator_s_limit_survives_a_killed_predecessor(world: World) -> None:
    world.attach()
    world.host.file.write_text("70000 100000")
    again = Groups(clock=world.host, journal=world.journal, table=world.table, cycle_ns=CYCLE_NS)
    assert again.recover() == 0
    assert world.host.file.read_text() == "70000 100000"
    assert world.journal.quotas() == []


def test_a_change_that_is_not_in_the_journal_is_not_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_row: object) -> None:
        raise FailedError("the disk is full")

    world.attach()
    with monkeypatch.context() as patch:
        patch.setattr(world.journal, "limit", full)
        world.cycle(20)
        assert (world.host.file.read_text(), world.reason) == ("10000 100000", "the disk is full")
    world.groups.release(1)
    assert world.host.file.read_text() == "max 100000"


def test_a_group_is_limited_once_under_whatever_names(world: World) -> None:
    """A second one would take the first one's limit for the group's own, and leave that behind."""
    world.attach(FIXED)
    with pytest.raises(BadStateError, match="attachment 1 has it as cgroup /a; detach that"):
        world.attach(POLICY, number=2)
    world.cycle(20)
    status = world.groups.status(2)
    assert status is not None
    assert "attachment 1 has it" in status.reason
    assert world.host.written == ["20000 100000"]
    assert len(world.journal.quotas()) == 1
    world.groups.release(1)
    assert world.host.file.read_text() == "max 100000"
    world.cycle(20)
    assert world.host.file.read_text() == "10000 100000"  # its turn
    world.groups.release(2)
    assert world.host.file.read_text() == "max 100000"
    assert world.journal.quotas() == []
