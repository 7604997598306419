"""Who gets how much where not everybody can have what he wants. Pure.

Weighted max-min fairness: nobody gets more than he wants, nobody less than his floor, and what is left goes by weight
to those who want more (as cpu.weight shares a CPU, Documentation/admin-guide/cgroup-v2.rst).
"""

from collections.abc import Sequence
from dataclasses import dataclass


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
    open_ones = []
    for number, one in enumerate(wants):
        floor = min(one.floor, one.wanted)
        if floor <= left:
            granted[number] = floor
            left -= floor
            open_ones.append(number)
    left += sum(granted)  # floors are a part of what each gets, not on top of it
    while open_ones:
        level = left / sum(wants[number].weight for number in open_ones)
        # Whose floor lies above the level keeps it and takes no more part; then whoever wants less than the level.
        settled = [number for number in open_ones if granted[number] > level * wants[number].weight]
        if not settled:
            settled = [number for number in open_ones if wants[number].wanted <= level * wants[number].weight]
            for number in settled:
                granted[number] = wants[number].wanted
        if not settled:
            for number in open_ones:
                granted[number] = level * wants[number].weight
            break
        left -= sum(granted[number] for number in settled)
        open_ones = sorted(set(open_ones) - set(settled))
    return granted
