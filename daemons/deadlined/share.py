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
        parts = {number: level * wants[number].weight for number in open_ones}
        low = [number for number in open_ones if granted[number] > parts[number]]
        high = [number for number in open_ones if wants[number].wanted <= parts[number]]
        # What floors take from the others, less what they leave who want little. If it is positive the level can only
        # fall: who is below his floor now stays there. Else it can only rise, and who has all he wants still has it.
        over = sum(granted[number] - parts[number] for number in low)
        over -= sum(parts[number] - wants[number].wanted for number in high)
        settled = low if over > 0 else high if over < 0 else open_ones
        for number in settled:
            granted[number] = max(min(parts[number], wants[number].wanted), granted[number])
            left -= granted[number]
        gone = set(settled)
        open_ones = [number for number in open_ones if number not in gone]
    return granted
