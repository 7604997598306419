"""Grants where something is refused or limited: by the kernel, by a probe, by the quota of a cgroup above."""

import pytest

from deadlined.ceilings import Limit
from deadlined.grants import Entry
from edgehold.errors import DeniedError, NoCapacityError
from edgehold.kernel.procfs import GoneError
from tests.unit.deadlined_world import MS, S, World, known, pending


@pytest.fixture
def world() -> World:
    return World(1.8)


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


def test_a_refusal_that_is_not_of_capacity_is_no_reason_to_probe(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = world.waiting(10)
    monkeypatch.setattr(world.host, "enter", lambda *_values: DeniedError("EPERM: pinned"))
    assert isinstance(world.grants.apply([one])[one.thread.tid], DeniedError)
    assert not world.grants.probe_wanted()


def test_a_refused_change_of_a_pinned_thread_is_no_reason_to_probe_and_is_asked_for_seldom(world: World) -> None:
    known(world, 1.8)
    one = world.thread(10)
    world.host.pinned.add(one.thread.tid)
    for number in range(20):  # half a second each
        world.grants.apply([world.wants(one, 20 + number)])
        assert one.thread.reason == "EPERM: pinned"
        assert not world.grants.probe_wanted()
        world.host.now_ns += S // 2
    assert len(world.host.calls) == 2
    world.host.pinned.clear()
    assert pending(world)  # 5 s are over, though its need has not changed
    world.grants.apply([])
    assert (world.budgets(), one.thread.reason, pending(world)) == ([39.0], "", False)


def test_a_pinned_thread_that_wants_what_it_has_is_left_alone(world: World) -> None:
    one = world.thread(10)
    world.host.pinned.add(one.thread.tid)
    world.grants.apply([world.wants(one, 20)])
    world.grants.apply([world.wants(one, 10)])
    world.host.now_ns += 10 * S
    assert (one.thread.reason, pending(world)) == ("", False)


def test_a_pinned_thread_keeps_its_reason_where_it_is_crowded(world: World) -> None:
    known(world, 1.0)
    one = world.thread(10)
    world.thread(80), world.thread(80)
    world.host.pinned.add(one.thread.tid)
    for _ in range(3):
        world.grants.apply([world.wants(one, 20)])
        assert one.thread.reason == "EPERM: pinned"
        world.host.now_ns += S
    assert [tid for tid, _ in world.host.calls].count(one.thread.tid) == 1


def test_probes_that_do_not_help_come_after_ever_longer_times(world: World) -> None:
    """Each takes for a moment what everybody on the host could want."""
    known(world, 1.8)
    world.host.cpus = 0.2
    one = world.thread(10)
    world.wants(one, 80)
    times = []
    for second in range(600):
        world.grants.apply([]) if second else world.grants.apply([one])
        if world.grants.probe_wanted():
            times.append(second)
            known(world, 1.8)
        world.host.now_ns += S
    assert times[:4] == [2, 7, 16, 33]
    assert times[-1] - times[-2] in {120, 121}
    # One helped: the next trouble is a new one.
    world.host.cpus = 1.8
    world.grants.apply([])
    assert not pending(world)
    world.host.now_ns += 20 * S
    world.host.cpus = 0.1
    world.grants.apply([world.wants(one, 90)])
    world.host.now_ns += 2 * S
    assert world.grants.probe_wanted()
