"""From what is wanted to what is in force: order, compression with reasons, limits of cgroups, refusals, probes. The
holder is replaced by one that writes down what it is told and refuses what does not fit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from deadlined.ceilings import Limit
from deadlined.grants import Entry, Grants
from deadlined.held import Attached, Thread
from deadlined.rules import rule_config
from deadlined.standing import PendingSource
from edgehold.api.deadlined import Policy, Target, TargetKind, ThreadState
from edgehold.errors import DeniedError, EdgeholdError, NoCapacityError
from edgehold.kernel import capacity
from edgehold.kernel.native_held import HeldTable
from edgehold.kernel.procfs import GoneError

if TYPE_CHECKING:
    from deadlined.holder import Holder

MS = 1_000_000
S = 1_000 * MS
P = 100 * MS
LEAST_NS = 1024
TARGET = Target(kind=TargetKind.PROCESS, id=1)


class Host:
    """The kernel's admission, deadlined's holder of threads and the clock."""

    def __init__(self, cpus: float) -> None:
        self.cpus = cpus
        self.now_ns = 1000 * S
        self.calls: list[tuple[int, float]] = []
        """Each thread that was changed or entered, and its new budget in ms."""
        self.highest = 0.0
        self.threads: dict[int, Thread] = {}
        self.gone: set[int] = set()
        self.taken: set[int] = set()

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_s(self) -> float:
        raise AssertionError

    @property
    def held(self) -> float:
        return sum(one.budget_ns / one.config.period_ns for one in self.threads.values())

    def _set(self, thread: Thread, budget_ns: int) -> bool:
        assert LEAST_NS <= budget_ns <= thread.config.period_ns
        self.calls.append((thread.tid, round(budget_ns / MS, 3)))
        if thread.tid in self.gone:
            raise GoneError(f"thread {thread.tid} has ended")
        if self.held + (budget_ns - thread.budget_ns) / thread.config.period_ns > self.cpus + 1e-9:
            return False
        thread.budget_ns = budget_ns
        self.highest = max(self.highest, self.held)
        return True

    def change(self, thread: Thread, budget_ns: int) -> bool:
        if thread.tid in self.taken:
            thread.state, thread.budget_ns, thread.try_at_ns = ThreadState.WAITING, 0, None
            return False
        if self._set(thread, budget_ns):
            thread.reason = ""
            return True
        thread.reason = f"stays at {thread.budget_ns / MS:g} ms"
        return False

    def enter(self, thread: Thread, _attached: Attached, budget_ns: int) -> EdgeholdError | None:
        if not self._set(thread, budget_ns):
            thread.reason = "EBUSY"
            return NoCapacityError("EBUSY")
        thread.state, thread.try_at_ns, thread.reason = ThreadState.HELD, None, ""
        return None


class World:
    """Grants over a host, with threads of their own."""

    def __init__(self, cpus: float) -> None:
        self.host = Host(cpus)
        self.table = HeldTable(history=1, cycle_ns=S, short_ns=0)
        self.grants = Grants(clock=self.host, holder=cast("Holder", self.host), everybody=self.everybody)
        self.entries: list[Entry] = []

    def everybody(self) -> Iterator[Entry]:
        for one in self.entries:
            if one.thread.state is ThreadState.HELD or (one.thread.try_at_ns or 0) <= self.host.now_ns:
                yield one

    def thread(
        self, wanted_ms: float, *, weight: int = 100, held_ms: float | None = None, policy: Policy | None = None
    ) -> Entry:
        """A thread that wants so much of 100 ms; held with that, or with what is said."""
        tid = 2**30 + len(self.entries)
        policy = policy or Policy(weight=weight)
        config = rule_config(policy)
        attached = Attached(
            id=len(self.entries), target=TARGET, policy=policy, config=config, source=PendingSource(TARGET), begun=0
        )
        thread = Thread(tid, 1, "x", config, self.table)
        thread.row = self.table.add(
            tid=tid, fd=-1, owner=1, start_ticks=1, rule=config.raw(), budget_ns=round(wanted_ms * MS)
        )
        thread.state, thread.try_at_ns = ThreadState.HELD, None
        thread.budget_ns = round((wanted_ms if held_ms is None else held_ms) * MS)
        self.host.threads[tid] = thread
        entry = Entry(thread, attached)
        attached.threads[tid] = thread
        self.entries.append(entry)
        self.grants.count(entry)
        return entry

    def waiting(self, wanted_ms: float, *, weight: int = 100) -> Entry:
        """One that is not held yet."""
        entry = self.thread(wanted_ms, held_ms=0, weight=weight)
        entry.thread.state, entry.thread.try_at_ns = ThreadState.WAITING, 0
        self.grants.count(entry)
        return entry

    def wants(self, entry: Entry, wanted_ms: float) -> Entry:
        """Its rule has decided."""
        entry.thread.cells.sizing.wanted_ns = round(wanted_ms * MS)
        self.grants.count(entry)
        return entry

    def budgets(self) -> list[float]:
        return [round(one.thread.budget_ns / MS, 2) for one in self.entries]


@pytest.fixture
def world() -> World:
    return World(1.8)


def pending(world: World) -> bool:
    return world.grants.pending


def known(world: World, cpus: float) -> None:
    """A probe found so much, to the last step."""
    world.grants.measured(cpus + 3 * capacity.RESOLUTION)


def test_decreases_come_before_increases(world: World) -> None:
    """What one gives up can be another's a moment later; the order in which they are told does not matter."""
    grows, shrinks, stays = world.thread(80), world.thread(80), world.thread(20)
    grows.thread.budget_ns = 20 * MS
    shrinks.thread.budget_ns = 80 * MS
    world.wants(grows, 80)
    world.wants(shrinks, 20)
    world.host.cpus = 1.2
    assert world.grants.apply([grows, stays, shrinks]) == {}
    assert world.host.calls == [(shrinks.thread.tid, 20.0), (grows.thread.tid, 80.0)]
    assert world.host.highest <= 1.2
    assert world.grants.wanted == pytest.approx(1.2)


def test_what_hardly_changes_is_no_call(world: World) -> None:
    one = world.thread(10)
    world.grants.apply([world.wants(one, 10.0009)])
    assert world.host.calls == []
    world.grants.apply([world.wants(one, 10.002)])
    assert len(world.host.calls) == 1


def test_who_wants_more_than_there_is_shares_by_weight_and_is_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    known(world, 1.2)
    heavy, light, small = world.thread(80, weight=300, held_ms=20), world.thread(80, held_ms=20), world.thread(10)
    assert world.grants.crowded
    assert world.grants.apply([heavy]) == {}
    assert world.budgets() == [80.0, 30.0, 10.0]
    assert world.grants.compressed
    assert sum(world.budgets()) <= 120
    assert "1.20 CPUs for reservations and 1.70 are wanted" in light.thread.reason
    assert "weight" in light.thread.reason
    assert (heavy.thread.reason, small.thread.reason) == ("", "")
    assert caplog.text.count("budgets are shared by weight") == 1
    world.grants.apply([])
    assert caplog.text.count("budgets are shared by weight") == 1


def test_it_ends_by_itself(world: World) -> None:
    known(world, 1.0)
    first, second = world.thread(80, held_ms=50), world.thread(80, held_ms=50)
    world.grants.apply([first, second])
    assert world.budgets() == [50.0, 50.0]
    world.grants.apply([world.wants(first, 15)])
    assert world.budgets() == [15.0, 80.0]
    assert (world.grants.compressed, pending(world), second.thread.reason) == (False, False, "")


def test_the_sum_never_exceeds_what_was_measured(world: World) -> None:
    known(world, 1.3)
    world.host.cpus = 1.3
    for number in range(20):
        world.waiting(80, weight=1 + 37 * number)
    world.grants.apply(world.entries)
    assert world.host.highest <= 1.3
    assert sum(world.budgets()) == pytest.approx(130, abs=0.5)
    assert all(one.thread.state is ThreadState.HELD for one in world.entries)
    for one in world.entries:
        world.wants(one, 5)
    world.grants.apply(world.entries)
    assert world.budgets() == [5.0] * 20


def test_who_is_held_keeps_his_floor_and_who_waits_has_to(world: World) -> None:
    known(world, 0.5)
    held = [world.thread(80, held_ms=1, policy=Policy(min_budget_ns=20 * MS)) for _ in range(2)]
    late = world.waiting(80)
    late_config = replace(late.thread.config, min_budget_ns=20 * MS)
    late.thread.config = late_config
    refused = world.grants.apply([late])
    assert isinstance(refused[late.thread.tid], NoCapacityError)
    assert "not even its smallest budget" in late.thread.reason
    assert [one.thread.budget_ns for one in held] == [25 * MS] * 2
    # And when there is not even that for the ones who are held: the kernel's least, until somebody leaves.
    known(world, 0.2)
    world.grants.apply([])
    assert sorted(one.thread.budget_ns for one in held) == [LEAST_NS, 20 * MS]


@pytest.mark.parametrize("period_ms", [29, 41, 83, 1500])
def test_a_floor_that_fits_is_not_lost_to_rounding(world: World, period_ms: int) -> None:
    policy = Policy(period_ns=period_ms * MS, initial_budget_ns=20 * MS, min_budget_ns=MS)
    known(world, 2 / period_ms + 1e-9)
    for _ in range(2):
        entry = world.waiting(20)
        entry.thread.config = rule_config(policy)
        world.grants.count(entry)
    assert world.grants.apply(world.entries) == {}
    assert world.budgets() == [1.0, 1.0]


def test_a_suspended_guest_goes_to_the_floor_and_comes_back(world: World) -> None:
    guest, other = world.thread(60), world.thread(80)
    guest.attached.suspended = True
    world.grants.count(guest)
    world.grants.apply([guest])
    assert world.budgets() == [1.0, 80.0]
    assert world.grants.wanted == pytest.approx(0.81)
    assert guest.thread.wanted_ns == 60 * MS
    guest.attached.suspended = False
    world.grants.count(guest)
    world.grants.apply([guest])
    assert world.budgets() == [60.0, 80.0]
    assert other.thread.reason == ""


def limit(path: str, cpus: float, *members: Entry) -> Limit:
    return Limit(path, cpus, frozenset(one.thread.tid for one in members))


def test_a_quota_above_threads_is_kept_to(world: World) -> None:
    first, second, outside = world.thread(40), world.thread(40), world.thread(40)
    world.grants.limits = [limit("/pod", 0.5, first, second)]
    assert pending(world)  # though nobody's need has changed
    world.grants.apply([])
    assert world.budgets() == [25.0, 25.0, 40.0]
    assert "the quota of cgroup /pod is 0.5 CPUs and its held threads want 0.80" in first.thread.reason
    assert outside.thread.reason == ""
    assert not pending(world)
    world.grants.apply([world.wants(first, 10)])
    assert world.budgets() == [10.0, 40.0, 40.0]
    assert second.thread.reason == ""


def test_a_quota_that_is_changed_or_lifted_is_noticed_without_a_need_that_changes(world: World) -> None:
    one = world.thread(40)
    world.grants.limits = [limit("/pod", 0.2, one)]
    world.grants.apply([])
    world.grants.limits = [limit("/pod", 0.1, one)]
    assert pending(world)
    world.grants.apply([])
    assert world.budgets() == [10.0]
    world.grants.limits = []
    assert pending(world)
    world.grants.apply([])
    assert world.budgets() == [40.0]
    assert (one.thread.reason, pending(world)) == ("", False)


def test_nested_quotas_hold_each_by_itself(world: World) -> None:
    inner, also, outer = world.thread(40), world.thread(40), world.thread(40)
    world.grants.limits = [
        limit("/pods", 0.6, inner, also, outer),
        limit("/pods/a", 0.3, inner, also),
        limit("/pods/a/deep", 0.1, inner),
    ]
    world.grants.apply([])
    assert world.budgets() == [10.0, 20.0, 30.0]
    assert "/pods/a/deep" in inner.thread.reason
    assert "/pods/a " in also.thread.reason
    assert "/pods " in outer.thread.reason


def test_a_quota_s_threads_that_take_no_part_do_not_count(world: World) -> None:
    one = world.thread(40)
    world.grants.limits = [Limit("/pod", 0.3, frozenset({one.thread.tid, 12345}))]
    world.grants.apply([])
    assert world.budgets() == [30.0]


def test_a_quota_leaves_more_for_the_others(world: World) -> None:
    known(world, 1.0)
    inside, outside = world.thread(80, held_ms=1), world.thread(80, held_ms=1)
    world.grants.limits = [limit("/pod", 0.2, inside)]
    world.grants.apply([])
    assert world.budgets() == [20.0, 80.0]
    assert (world.grants.compressed, outside.thread.reason) == (False, "")


def test_while_the_capacity_is_unknown_the_kernel_decides(world: World) -> None:
    first, second = world.thread(80, held_ms=10), world.thread(80, held_ms=10)
    third = world.waiting(80)
    assert not world.grants.crowded
    refused = world.grants.apply([first, second, third])
    assert world.budgets() == [80.0, 80.0, 0.0]
    assert list(refused) == [third.thread.tid]
    assert world.grants.probe_wanted()  # at once
    known(world, 1.8)
    world.grants.apply([])  # the probe alone is a reason to set everybody anew
    assert world.budgets() == pytest.approx([60.0] * 3, abs=0.01)


def test_a_probe_that_finds_less_than_is_wanted_is_acted_on(world: World) -> None:
    for _ in range(2):
        world.thread(60)
    assert not pending(world)
    known(world, 1.0)
    assert pending(world)
    world.grants.apply([])
    assert world.budgets() == [50.0, 50.0]


def test_a_refused_raise_stays_and_is_asked_for_again(world: World) -> None:
    one = world.thread(10)
    world.host.cpus = 0.2
    world.grants.apply([world.wants(one, 80)])
    assert (world.budgets(), one.thread.reason) == ([10.0], "stays at 10 ms")
    assert (pending(world), world.grants.probe_wanted()) == (True, True)
    world.grants.apply([])
    assert world.host.calls == [(one.thread.tid, 80.0)] * 2
    world.host.cpus = 1.8
    world.grants.apply([])
    assert (world.budgets(), one.thread.reason, pending(world)) == ([80.0], "", False)


def test_a_refusal_while_a_probe_has_the_host_says_nothing_but_is_asked_for_again(world: World) -> None:
    one = world.thread(10)
    world.grants.probing, world.host.cpus = True, 0.1
    world.grants.apply([world.wants(one, 80)])
    assert (pending(world), world.grants.probe_wanted()) == (True, False)
    world.grants.probing, world.host.cpus = False, 1.8
    world.grants.apply([])
    assert world.budgets() == [80.0]


def test_a_refusal_that_nobody_wants_any_more_is_forgotten(world: World) -> None:
    one = world.thread(10)
    world.host.cpus = 0.2
    world.grants.apply([world.wants(one, 80)])
    world.grants.apply([world.wants(one, 10)])
    assert (world.budgets(), one.thread.reason, pending(world)) == ([10.0], "", False)
    world.grants.apply([world.wants(one, 80)])
    world.grants.without(one.thread)
    assert not pending(world)


def test_a_note_of_somebody_else_s_stays(world: World) -> None:
    one = world.thread(10)
    one.thread.reason = "period unknown: it does not wake up"
    world.grants.apply([world.wants(one, 20)])
    assert one.thread.reason == "period unknown: it does not wake up"


def test_a_refusal_by_a_known_capacity_is_probed_when_it_has_settled(world: World) -> None:
    known(world, 1.8)
    world.host.cpus = 0.2
    one = world.thread(10)
    world.grants.apply([world.wants(one, 80)])
    assert not world.grants.probe_wanted()
    world.host.now_ns += 2 * S
    assert world.grants.probe_wanted()
    known(world, 0.2)
    assert not world.grants.probe_wanted()


def test_a_full_host_is_probed_again_and_a_failed_probe_too(world: World) -> None:
    known(world, 0.5)
    world.grants.apply([world.thread(80, held_ms=1)])
    world.host.now_ns += 29 * S
    assert not world.grants.probe_wanted()
    world.host.now_ns += S
    assert world.grants.probe_wanted()
    world.grants.measured(None)
    assert (world.grants.probe_wanted(), world.grants.crowded) == (False, True)  # the old figure stays
    world.host.now_ns += 30 * S
    assert world.grants.probe_wanted()
    world.grants.probe_soon(5 * S)
    assert world.grants.probe_wanted()  # what is due is not put off


def test_a_probe_that_finds_nothing_leaves_nothing_to_give(world: World) -> None:
    world.grants.measured(0.0)
    assert world.grants.total == 0.0
    late = world.waiting(10)
    assert isinstance(world.grants.apply([late])[late.thread.tid], NoCapacityError)
    assert world.host.calls == []


def test_one_who_ended_and_one_who_was_taken_do_not_stop_the_others(world: World) -> None:
    gone, taken, other = (world.thread(10) for _ in range(3))
    world.host.gone.add(gone.thread.tid)
    world.host.taken.add(taken.thread.tid)
    refused = world.grants.apply([world.wants(one, 20) for one in (gone, taken, other)])
    assert isinstance(refused[gone.thread.tid], GoneError)
    assert world.grants.lost == [taken]
    assert other.thread.budget_ns == 20 * MS
    assert taken.thread.counted == 0.0
    assert world.grants.wanted == pytest.approx(0.4)  # the one who ended is counted until he is forgotten
    world.grants.without(gone.thread)
    world.grants.without(gone.thread)
    assert world.grants.wanted == pytest.approx(0.2)


def test_who_only_is_watched_takes_no_part(world: World) -> None:
    watched = world.thread(80)
    watched.thread.state, watched.thread.budget_ns = ThreadState.WATCHED, 0
    world.grants.count(watched)
    assert world.grants.wanted == 0
    known(world, 0.5)
    other = world.thread(80, held_ms=10)
    world.grants.apply([watched, other])
    assert world.budgets() == [0.0, 50.0]


def test_who_may_not_try_yet_is_not_tried(world: World) -> None:
    waits, given_up = world.waiting(10), world.waiting(10)
    waits.thread.try_at_ns = world.host.now_ns + 1
    given_up.thread.try_at_ns = None
    assert world.grants.apply([waits, given_up]) == {}
    assert world.host.calls == []
    world.host.now_ns += 1
    world.grants.apply([waits])
    assert waits.thread.state is ThreadState.HELD


def test_a_refusal_that_is_not_of_capacity_is_no_reason_to_probe(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = world.waiting(10)
    monkeypatch.setattr(world.host, "enter", lambda *_values: DeniedError("EPERM: pinned"))
    assert isinstance(world.grants.apply([one])[one.thread.tid], DeniedError)
    assert not world.grants.probe_wanted()
