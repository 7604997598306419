"""From what is wanted to what is in force: order, compression with reasons, floors, suspended guests."""

from dataclasses import replace

import pytest

from deadlined.rules import rule_config
from edgehold.api.deadlined import Policy, ThreadState
from edgehold.errors import NoCapacityError
from tests.unit.deadlined_world import LEAST_NS, MS, World, known, pending


@pytest.fixture
def world() -> World:
    return World(1.8)


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
        world.waiting(80, weight=100 + 37 * number)
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
    # And when there is not even that for the ones who are held: what their weights give them, until somebody leaves.
    known(world, 0.2)
    world.grants.apply([])
    assert [one.thread.budget_ns for one in held] == [10 * MS] * 2
    known(world, 0.0)
    world.grants.apply([])
    assert [one.thread.budget_ns for one in held] == [LEAST_NS] * 2


@pytest.mark.parametrize("period_ms", [49, 98, 103, 1425])
def test_a_floor_that_fits_is_not_lost_to_rounding(world: World, period_ms: int) -> None:
    known(world, 0.5)
    one = world.thread(80, held_ms=10)
    late = world.waiting(60, beside=one)
    floor_ns = 3 * period_ms * MS // 10
    policy = Policy(period_ns=period_ms * MS, initial_budget_ns=2 * floor_ns, min_budget_ns=floor_ns)
    late.thread.config = rule_config(policy)
    late.thread.cells.sizing.wanted_ns = 2 * floor_ns
    world.grants.count(late)
    assert world.grants.apply([late]) == {}
    assert late.thread.budget_ns == floor_ns
    assert one.thread.budget_ns == pytest.approx(20 * MS, abs=10)


def test_a_camera_beside_many_idle_threads_has_what_it_wants(world: World) -> None:
    """Floors are a part of an attachment's share: who has many threads takes nothing from others by that."""
    known(world, 1.8)
    idle = world.thread(1)
    for _ in range(177):
        world.thread(1, beside=idle)
    camera = world.waiting(50, weight=10_000)
    assert world.grants.apply([camera]) == {}
    assert camera.thread.budget_ns == 50 * MS
    assert sum(world.budgets()) <= 180
    assert min(world.budgets()) == pytest.approx(130 / 178, abs=0.01)


def test_one_thread_beside_a_hundred_of_another_at_the_same_weight_has_the_half(world: World) -> None:
    known(world, 1.0)
    many = world.thread(80, held_ms=1)
    for _ in range(99):
        world.thread(80, held_ms=1, beside=many)
    one = world.thread(80, held_ms=1)
    world.grants.apply([one])
    assert one.thread.budget_ns == 50 * MS
    assert world.budgets()[:100] == [0.5] * 100  # below their floors, which do not fit
    assert "shared by weight" in many.thread.reason


def test_a_group_s_threads_wait_where_its_share_has_no_room_for_their_floors(world: World) -> None:
    known(world, 1.0)
    other = world.thread(80, held_ms=80)
    first = world.waiting(80)
    for _ in range(99):
        world.waiting(80, beside=first)
    refused = world.grants.apply(world.entries)
    assert len(refused) == 50
    assert other.thread.budget_ns == 50 * MS
    assert world.budgets()[1:] == [1.0] * 50 + [0.0] * 50


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
