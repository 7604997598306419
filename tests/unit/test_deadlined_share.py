"""Who gets how much of a host that is too small: what must hold of every division, and some done by hand."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadlined.share import Group, Member, Want, share, share_groups

NEARLY = 1e-9

wants = st.builds(
    Want,
    wanted=st.floats(0, 1, allow_subnormal=False),
    floor=st.floats(0, 0.2, allow_subnormal=False),
    weight=st.integers(1, 10_000),
)
many = st.lists(wants, max_size=40)
capacities = st.floats(0, 8, allow_subnormal=False)
together = settings(deadline=None)


def floor(one: Want) -> float:
    return min(one.floor, one.wanted)


@together
@given(many, capacities)
def test_never_more_than_there_is_nor_than_is_wanted(asked: list[Want], capacity: float) -> None:
    granted = share(asked, capacity)
    assert len(granted) == len(asked)
    assert sum(granted) <= capacity + NEARLY
    for one, got in zip(asked, granted, strict=True):
        assert 0 <= got <= one.wanted + NEARLY


@together
@given(many, capacities)
def test_who_gets_anything_gets_his_floor(asked: list[Want], capacity: float) -> None:
    for one, got in zip(asked, share(asked, capacity), strict=True):
        assert got == 0 or got >= floor(one) - NEARLY
    if sum(map(floor, asked)) <= capacity:
        assert all(got >= floor(one) - NEARLY for one, got in zip(asked, share(asked, capacity), strict=True))


@together
@given(many, capacities)
def test_everything_is_given_away_where_it_is_crowded(asked: list[Want], capacity: float) -> None:
    granted = share(asked, capacity)
    if sum(one.wanted for one in asked) <= capacity:
        assert granted == [one.wanted for one in asked]
    elif sum(map(floor, asked)) <= capacity:
        assert sum(granted) == pytest.approx(capacity, abs=NEARLY)


@together
@given(many, capacities)
def test_nobody_has_more_by_weight_than_one_who_still_wants(asked: list[Want], capacity: float) -> None:
    """Max-min fairness: who has less than he wants has no smaller a part by weight than anybody above his floor."""
    granted = share(asked, capacity)
    levels = [got / one.weight for one, got in zip(asked, granted, strict=True) if got > floor(one) + NEARLY]
    for one, got in zip(asked, granted, strict=True):
        if floor(one) <= got < one.wanted - NEARLY and got > 0:
            assert got / one.weight >= max(levels, default=0) - NEARLY


@together
@given(many, capacities, st.randoms())
def test_the_order_does_not_matter_while_the_floors_fit(asked: list[Want], capacity: float, random: Random) -> None:
    if sum(map(floor, asked)) > capacity:
        return
    order = list(range(len(asked)))
    random.shuffle(order)
    granted = share(asked, capacity)
    shuffled = share([asked[number] for number in order], capacity)
    assert shuffled == pytest.approx([granted[number] for number in order], abs=NEARLY)


@together
@given(many, capacities, st.integers(2, 1000))
def test_only_the_ratio_of_weights_counts(asked: list[Want], capacity: float, factor: int) -> None:
    heavier = [Want(one.wanted, one.floor, one.weight * factor) for one in asked]
    assert share(heavier, capacity) == pytest.approx(share(asked, capacity), abs=NEARLY)


@pytest.mark.parametrize(
    ("asked", "capacity", "granted"),
    [
        ([], 1.0, []),
        ([(0.8, 0.01, 100)] * 5, 1.5, [0.3] * 5),
        ([(0.8, 0.01, 100), (0.8, 0.01, 300)], 1.0, [0.25, 0.75]),
        ([(0.8, 0.01, 100), (0.1, 0.01, 100), (0.8, 0.01, 100)], 1.1, [0.5, 0.1, 0.5]),  # who wants little gets it
        ([(0.8, 0.01, 1), (0.8, 0.01, 10_000)], 1.0, [0.2, 0.8]),
        ([(0.8, 0.3, 1), (0.8, 0.01, 10_000)], 1.0, [0.3, 0.7]),  # a floor above the level
        ([(0.8, 0.3, 100)] * 3, 0.7, [0.35, 0.35, 0.0]),  # the third floor does not fit
        ([(0.8, 0.9, 100)] * 2, 1.0, [0.8, 0.0]),  # a floor above what is wanted is no floor
        ([(0.8, 0.01, 100)], 0.0, [0.0]),
    ],
)
def test_by_hand(asked: list[tuple[float, float, int]], capacity: float, granted: list[float]) -> None:
    assert share([Want(*one) for one in asked], capacity) == pytest.approx(granted)


LEAST = 1e-5
members = st.builds(
    Member,
    wanted=st.floats(0, 1, allow_subnormal=False),
    floor=st.floats(0, 0.2, allow_subnormal=False),
    least=st.just(LEAST),
    joins=st.booleans(),
)
groups = st.lists(st.builds(Group, weight=st.integers(1, 10_000), members=st.lists(members, max_size=8)), max_size=8)


def wanted(one: Group) -> float:
    return sum(member.wanted for member in one.members)


@together
@given(groups, capacities)
def test_groups_get_never_more_than_there_is_nor_than_they_want(asked: list[Group], capacity: float) -> None:
    granted = share_groups(asked, capacity)
    assert [len(some) for some in granted] == [len(one.members) for one in asked]
    assert sum(map(sum, granted)) <= capacity + NEARLY
    for one, some in zip(asked, granted, strict=True):
        assert all(0 <= got <= member.wanted + NEARLY for member, got in zip(one.members, some, strict=True))


@together
@given(groups, capacities)
def test_a_group_has_its_part_by_weight_however_many_threads_others_have(asked: list[Group], capacity: float) -> None:
    """Where nobody has to wait for room: what each gets is what groups of one thread each would get."""
    asked = [Group(one.weight, [Member(m.wanted, m.floor, m.least) for m in one.members]) for one in asked]
    alone = share([Want(wanted(one), 0.0, one.weight) for one in asked], capacity)
    for one, some, part in zip(asked, share_groups(asked, capacity), alone, strict=True):
        most = sum(min(m.least, m.wanted) for m in one.members)
        assert sum(some) == pytest.approx(part, abs=NEARLY) or part <= most


@together
@given(groups, capacities)
def test_who_joins_gets_his_floor_or_nothing(asked: list[Group], capacity: float) -> None:
    for one, some in zip(asked, share_groups(asked, capacity), strict=True):
        for member, got in zip(one.members, some, strict=True):
            assert not member.joins or got == 0 or got >= min(member.floor, member.wanted) - NEARLY


@together
@given(groups, capacities)
def test_within_a_group_floors_hold_where_they_fit(asked: list[Group], capacity: float) -> None:
    for one, some in zip(asked, share_groups(asked, capacity), strict=True):
        inside = [(member, got) for member, got in zip(one.members, some, strict=True) if not member.joins]
        if sum(min(member.floor, member.wanted) for member, _ in inside) <= sum(some) - NEARLY:
            assert all(got >= min(member.floor, member.wanted) - NEARLY for member, got in inside)


@pytest.mark.parametrize(
    ("asked", "capacity", "granted"),
    [
        ([], 1.0, []),
        ([(100, [0.8]), (100, [0.8] * 100)], 1.0, [[0.5], [0.005] * 100]),
        ([(10_000, [0.5]), (100, [0.01] * 200)], 1.8, [[0.5], [0.0065] * 200]),
        ([(100, [0.1, 0.8]), (100, [0.8])], 1.0, [[0.1, 0.4], [0.5]]),  # by want within
        ([(300, [0.8, 0.8]), (100, [0.8])], 1.0, [[0.375, 0.375], [0.25]]),
        ([(100, []), (100, [0.8])], 0.5, [[], [0.5]]),
    ],
)
def test_groups_by_hand(asked: list[tuple[int, list[float]]], capacity: float, granted: list[list[float]]) -> None:
    some = [Group(weight, [Member(wanted, 0.01, LEAST) for wanted in wants]) for weight, wants in asked]
    for got, expected in zip(share_groups(some, capacity), granted, strict=True):
        assert got == pytest.approx(expected)


def test_who_can_t_join_leaves_it_to_the_others() -> None:
    held = Group(100, [Member(0.8, 0.2, LEAST)])
    late = Group(100, [Member(0.8, 0.2, LEAST, joins=True)])
    assert share_groups([held, held, late], 0.5) == [[0.25], [0.25], [0.0]]
