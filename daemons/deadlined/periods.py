"""The period of a thread, from when it was activated: an answer where the pattern is clear, and none else. Pure.

An answer is never a guess: whoever gets none keeps the period that he has. Two rules, the first that applies:

* *even*: the intervals between activations hardly differ. Jitter up to a tenth of the period is borne.
* *pattern*: nearly every activation has another one period later, as of a job that sleeps in its middle.

Only what a thread does by itself counts: one that gets too little of the CPU is activated when others let it, or when
its budget is filled up, and that period is not its own.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul

from edgehold.clock import NS_PER_MS

_PERIODS = 10
"""So many must have been seen."""
_AGREE = 0.04
"""By how much the period of the first half may differ from that of the second, as a share."""

# The even rule. The last one is how far the answer may be off, as a standard error: what varies has to be seen longer,
# and few intervals that are even by chance are none.
_FIT = 0.9
_BAND = 0.25
_VARIATION = 0.15
_ERROR = 0.004

# The pattern rule.
_TOLERANCE = 0.03
_PARTNERS = 0.75
_NEARLY_BEST = 0.85
# A part of the period that has so many partners makes it ambiguous; after so many periods there must still be as many.
_STILL = 0.6
_PARTS = (2, 3, 4, 5)
_LASTS = 5
# A period shorter than the mean interval is one inside of bursts.
_SHORTEST = 0.8
_STEP = 1.03
# More activations a period than this, and what repeats is only the beat of several periods.
_ACTIVATIONS_A_PERIOD = 4
# Of a pattern of so few, more than an eighth of the intervals are alike: cheap to see, and rare by chance.
_ALIKE = 8
# So many activations are enough for ten periods of that, and cost a tenth of a millisecond.
_PATTERN = 64

# What is runnable for so much of the time hardly ever sleeps, and its activations are not its own.
_BUSY = 0.8
# Whoever waits for so much of the time is activated when others let it, or when its budget is filled up again.
_WAITED = 0.05
_WAITED_IN_PATTERN = 0.01
# So little of a period makes no difference; so many intervals without more must there be, where others have it.
_STALL = 0.02
_FREE = 5


@dataclass(frozen=True, slots=True)
class Inference:
    """What a thread's activations show."""

    period_ns: int | None
    """None: unknown."""
    confidence: float = 0.0
    """The share of its activations that fit, 0 to 1."""
    reason: str = ""
    """Why it is unknown, in a sentence."""


def infer(activations_ns: Sequence[int], stalls_ns: Sequence[int] = (), *, patterns: bool = True) -> Inference:
    """The period of activations at these times, ascending, in nanoseconds.

    ``stalls_ns`` has for each of them how long the thread was kept from going on in the interval before; without it
    nothing did. ``patterns=False`` leaves out the second rule, which costs more; see `shows_patterns`.
    """
    intervals = [later - one for one, later in pairwise(activations_ns)]
    if len(intervals) < _PERIODS or activations_ns[-1] <= activations_ns[0]:
        return Inference(None, reason=f"it was activated {_times(len(activations_ns))}, too seldom to show a period")
    found = _even(activations_ns, intervals)
    even = True
    if found is None and patterns:
        found = _pattern(activations_ns[-_PATTERN:])
        even = False
    if found is None:
        return Inference(None, reason="its activations show no period")
    # A little waiting makes no pattern. More of it may, unless the intervals without it are as long.
    stalled = sum(stalls_ns[1:]) >= _WAITED * (activations_ns[-1] - activations_ns[0])
    if found.period_ns is not None and stalled and not (even and _free(found.period_ns, intervals, stalls_ns[1:])):
        return Inference(None, reason="it was kept waiting so often that its activations may not be its own")
    return found


def shows_patterns(elapsed_ns: int, run_delay_ns: int) -> bool:
    """Whether the thread was so free in a window that patterns can be its own.

    What delays an even thread every third time, as others with a longer period do, makes a pattern of that length.
    """
    return run_delay_ns < _WAITED_IN_PATTERN * elapsed_ns


def can_infer(elapsed_ns: int, executed_ns: int, run_delay_ns: int, *, stalled_ns: int = 0) -> str:
    """Why activations of a window say nothing about the thread's own period, or an empty text.

    The counters are what it executed and what it was runnable without running, throttled included, in the window;
    ``stalled_ns`` is the part of the latter that `infer` is told. Of the rest nobody knows which activation it delayed.
    """
    if executed_ns + run_delay_ns >= _BUSY * elapsed_ns:
        ran, waited = executed_ns / elapsed_ns, run_delay_ns / elapsed_ns
        return f"it hardly ever sleeps: {ran:.0%} of the time it ran, {waited:.0%} it waited for a CPU or its budget"
    waited = (run_delay_ns - stalled_ns) / elapsed_ns
    if waited >= _WAITED:
        return f"once awake it had to wait, for {waited:.0%} of the time: its activations may not be its own"
    return ""


def _free(period_ns: int, intervals: Sequence[int], stalls: Sequence[int]) -> bool:
    """Whether the intervals in which the thread was not kept waiting show the same period."""
    free = [one for one, stall in zip(intervals, stalls, strict=False) if stall < _STALL * period_ns]
    return len(free) >= _FREE and abs(sum(free) / len(free) - period_ns) <= _AGREE * period_ns


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _even(times: Sequence[int], intervals: Sequence[int]) -> Inference | None:
    count = len(intervals)
    ordered = sorted(intervals)
    median = ordered[count // 2]
    if median <= 0:
        return None
    fit = bisect_right(ordered, (1 + _BAND) * median) - bisect_left(ordered, (1 - _BAND) * median)
    if fit < _FIT * count:
        return None
    mean = (times[-1] - times[0]) / count
    deviation = math.sqrt(max(sum(map(mul, intervals, intervals)) / count - mean * mean, 0))
    if deviation > min(_VARIATION, _ERROR * count) * mean:
        return None
    # Over the whole span, so that jitter counts only at its ends. One that was left out is a period all the same.
    periods = [1] * count if fit == count else [round(one / median) for one in intervals]
    middle = count // 2
    first = (times[middle] - times[0]) / max(sum(periods[:middle]), 1)
    second = (times[-1] - times[middle]) / max(sum(periods[middle:]), 1)
    if abs(first - second) > _AGREE * median:
        return None
    return Inference(round((times[-1] - times[0]) / sum(periods)), fit / count)


def _pattern(times: Sequence[int]) -> Inference | None:
    span = times[-1] - times[0]
    mean = span / (len(times) - 1)
    scores: dict[int, float] = {}
    for tau in _candidates(times, shortest=_SHORTEST * mean, longest=span / _PERIODS):
        scores[tau] = _score(times, tau, mean)
    best = max(scores.values(), default=0.0)
    if best < _PARTNERS:
        return None
    smallest = min(tau for tau, score in scores.items() if score >= _NEARLY_BEST * best)
    # Neighbours belong to the same peak: its top counts.
    peak = (1 + 2 * _TOLERANCE) * smallest
    tau = max((one for one in scores if smallest <= one <= peak), key=scores.__getitem__)
    if tau > _ACTIVATIONS_A_PERIOD * (1 + _TOLERANCE) * mean:
        text = f"its activations repeat only every {tau / NS_PER_MS:.1f} ms, after {tau / mean:.0f} of them"
        return Inference(None, reason=text)
    # With a tolerance as wide as the whole's: jitter hides a period better than its multiples.
    if any(_score(times, tau / part, mean, tolerance=_TOLERANCE * part) >= _STILL for part in _PARTS):
        return Inference(None, reason=f"its activations have several periods, {tau / NS_PER_MS:.1f} ms is the longest")
    # Bursts have a pace too, but it begins anew with each of them.
    if _score(times, _LASTS * tau, mean) < _STILL:
        return None
    middle = len(times) // 2
    for half in (times[:middle], times[middle:]):
        found, asked = _partners(half, tau)
        if len(found) < (_PARTNERS * _NEARLY_BEST) * max(asked, 1):
            return None
    found, asked = _partners(times, tau)
    return Inference(round(sum(found) / len(found)), len(found) / asked)


def _candidates(times: Sequence[int], *, shortest: float, longest: float) -> list[int]:
    """Distances that enough pairs of activations have."""
    intervals = sorted(later - one for one, later in pairwise(times))
    alike = intervals[len(intervals) // _ALIKE :]
    if not any(last <= (1 + 2 * _TOLERANCE) * one for one, last in zip(intervals, alike, strict=False)):
        return []
    distances: list[int] = []
    for apart in range(1, len(times)):
        more = [later - one for one, later in zip(times, times[apart:], strict=False)]
        distances += more
        if min(more) > longest:
            break
    distances.sort()
    found: dict[int, None] = {}
    tau = shortest
    while tau <= longest:
        begin = bisect_left(distances, (1 - _TOLERANCE) * tau)
        end = bisect_right(distances, (1 + _TOLERANCE) * tau, begin)
        # Those of the last period have no partner any more: a tenth at most.
        if end - begin >= _PARTNERS * _NEARLY_BEST * _FIT * len(times):
            found[distances[(begin + end) // 2]] = None
        tau *= _STEP
    return list(found)


def _partners(times: Sequence[int], tau: float, tolerance: float = _TOLERANCE) -> tuple[list[int], int]:
    """The distances of those that have a partner one tau later, and how many could have one."""
    low, high = round((1 - tolerance) * tau), round((1 + tolerance) * tau)
    asked = bisect_right(times, times[-1] - high)
    found = []
    for one in times[:asked]:
        begin = bisect_left(times, one + low)
        end = bisect_right(times, one + high, begin)
        if end - begin == 1:
            found.append(times[begin] - one)
        elif end > begin:
            found.append(min((later - one for later in times[begin:end]), key=lambda distance: abs(distance - tau)))
    return found, asked


def _score(times: Sequence[int], tau: float, mean: float, *, tolerance: float = _TOLERANCE) -> float:
    """The share of those that have a partner, without those who would have one by chance, were they random."""
    found, asked = _partners(times, tau, tolerance)
    chance = 1 - math.exp(-2 * tolerance * tau / mean)
    return (len(found) / max(asked, 1) - chance) / (1 - chance)
