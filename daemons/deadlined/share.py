"""Who gets how much where not everybody can have what he wants. Pure.

Weighted max-min fairness: nobody gets more than he wants, nobody less than his floor, and what is left goes by weight
to those who want more. A weight is a group's, as cpu.weight is a cgroup's (Documentation/admin-guide/cgroup-v2.rst):
who has many threads gets no more by that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Sums of floors are compared with shares: what the order of adding makes of them is no difference.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Want:
    """One who asks; all in CPUs (1.0 is one whole CPU)."""

    wanted: float
    floor: float
    weight: int
    """1..10000; only its ratio to others' counts."""


def share(wants: Sequence[Want], capacity: float) -> list[float]:
    """What each gets, in CPUs, in the same order; their sum is at most the capacity.

    0: not even his floor fits. The first ones come first then, so that who has a floor keeps it.
    """
    if sum(one.wanted for one in wants) <= capacity:
        return [one.wanted for one in wants]
    granted = [0.0] * len(wants)
    left = capacity
    asking = []
    for number, one in enumerate(wants):
        floor = min(one.floor, one.wanted)
        if floor <= left + _ROUNDING:
            left -= floor
            asking.append((number, floor, one.wanted, one.weight))
    level = _level([one[1:] for one in asking], capacity, capacity - left)
    for number, floor, wanted, weight in asking:
        granted[number] = wanted if wanted / weight <= level else max(min(level * weight, wanted), floor)
    return granted


def _level(asking: Sequence[tuple[float, float, int]], capacity: float, floors: float) -> float:
    """What each unit of weight gets: of floor, want and weight of each, and the sum of the floors.

    The sum of what all get grows with the level, by the weight of whoever is above his floor and below his want.
    """
    steps = [(floor / weight, weight) for floor, _, weight in asking]
    steps += [(wanted / weight, -weight) for _, wanted, weight in asking]
    level, given, slope = 0.0, floors, 0
    for step, change in sorted(steps):
        more = slope * (step - level)
        if given + more >= capacity:
            return level + (capacity - given) / slope if slope else level
        level, given, slope = step, given + more, slope + change
    return level


@dataclass(frozen=True, slots=True)
class Member:
    """One of a group; all in CPUs."""

    wanted: float
    floor: float
    least: float
    """What is its floor where the group's share is less than the sum of the floors."""
    joins: bool = False
    """Is not in yet: gets nothing where its floor does not fit beside those who are."""


@dataclass(frozen=True, slots=True)
class Group:
    """Those who share one weight, as the processes of a cgroup share its cpu.weight."""

    weight: int
    members: Sequence[Member]


def share_groups(groups: Sequence[Group], capacity: float) -> list[list[float]]:
    """What each member gets, in CPUs, in the same order; their sum is at most the capacity.

    By weight among the groups, however many each has; equally within one. A floor is a part of the group's share: it
    binds between its own members, and takes nothing from other groups.
    """
    got = _among(groups, capacity)
    fitting = [_fitting(group, part) for group, part in zip(groups, got, strict=True)]
    if any(fits is not group for fits, group in zip(fitting, groups, strict=True)):
        got = _among(fitting, capacity)  # what they do not get is the others'
    return [_inside(group, part) for group, part in zip(fitting, got, strict=True)]


def _among(groups: Sequence[Group], capacity: float) -> list[float]:
    return share([Want(sum(one.wanted for one in group.members), 0.0, group.weight) for group in groups], capacity)


def _floor(one: Member) -> float:
    return min(one.floor, one.wanted)


def _fitting(group: Group, part: float) -> Group:
    """The group without the wants of those who can't join; the same object where all can."""
    if not any(one.joins for one in group.members):
        return group
    left = part + _ROUNDING - sum(_floor(one) for one in group.members if not one.joins)
    members, out = [], False
    for one in group.members:
        if one.joins and _floor(one) > left:
            members.append(Member(0.0, 0.0, 0.0))
            out = True
            continue
        if one.joins:
            left -= _floor(one)
        members.append(one)
    return Group(group.weight, members) if out else group


def _inside(group: Group, part: float) -> list[float]:
    if len(group.members) == 1:
        return [min(part, group.members[0].wanted)]
    fits = sum(_floor(one) for one in group.members) <= part + _ROUNDING
    return share([Want(one.wanted, one.floor if fits else one.least, 1) for one in group.members], part)
