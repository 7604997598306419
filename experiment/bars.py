"""What the experiment is held against, and whether every repetition kept it. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiment.analysis import Summary

PATH_MS = (2.4, 3.4, 6.0, 15.6, 64.0, 80.0)
"""The reference rule's budgets after the first cycles, from 2 ms."""
PATH_WITHIN = 0.15
FITS_OVER_NEED, FITS_BY_CYCLE = 1.15, 4
FAST_WITHIN_MS = 500.0

Check = Callable[[Summary], str]
"""Why a thread of a run misses a bar, or an empty text."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise about some of the runs."""

    what: str
    variant: str
    first_budgets_ms: tuple[float, ...]
    check: Check


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar after all repetitions."""

    what: str
    held: int
    """Of how many repetitions it held."""
    repetitions: int
    missed: tuple[str, ...]
    """What was seen where it did not."""

    @property
    def good(self) -> bool:
        """Whether every repetition kept it."""
        return self.held == self.repetitions

    def line(self) -> str:
        """For people."""
        first = f": {self.missed[0]}" if self.missed else ""
        more = f" (and {len(self.missed) - 1} more)" if len(self.missed) > 1 else ""
        return f"{'met' if self.good else 'MISSED':6}  {self.held} of {self.repetitions}  {self.what}{first}{more}"


def follows_path(one: Summary) -> str:
    """The reference rule's way up."""
    for cycle, (seen, wanted) in enumerate(zip(one.path_ms, PATH_MS, strict=False), 1):
        if abs(seen - wanted) > PATH_WITHIN * wanted:
            return f"{seen:.1f} ms after cycle {cycle}, not {wanted:g} ms"
    return ""


def good_by(cycle: int) -> Check:
    """Responses are good early enough, in cycles."""

    def check(one: Summary) -> str:
        if one.good_cycle is None:
            return "responses never became good"
        return f"good in cycle {one.good_cycle} ({one.good_ms:.0f} ms)" if one.good_cycle > cycle else ""

    return check


def good_within(limit_ms: float) -> Check:
    """Responses are good early enough, in milliseconds."""

    def check(one: Summary) -> str:
        if one.good_ms is None:
            return "responses never became good"
        return f"good after {one.good_ms:.0f} ms" if one.good_ms > limit_ms else ""

    return check


def fits(one: Summary) -> str:
    """The budget is no waste early enough."""
    seen = one.fits[FITS_BY_CYCLE - 1]
    return f"Q is {seen:.2f} times C after cycle {FITS_BY_CYCLE}" if seen > FITS_OVER_NEED else ""


BARS = (
    Bar(
        "reference, from 2 ms: Q is 2.4, 3.4, 6.0, 15.6, 64, 80 ms within 15 %", "reference", (2.0,), follows_path
    ),
    Bar("reference, from 2 ms: responses good by cycle 7", "reference", (2.0,), good_by(7)),
    Bar("reference, from 8 ms: responses good by cycle 6", "reference", (8.0,), good_by(6)),
    Bar("fast, T alone: responses good by cycle 2", "fast", (2.0, 8.0), good_by(2)),
    Bar("fast, T alone: Q at most 1.15 C by cycle 4", "fast", (2.0, 8.0), fits),
    Bar("fast, fast cycle: responses good within 500 ms", "fast-cycle", (2.0, 8.0), good_within(FAST_WITHIN_MS)),
    Bar("fast, fast cycle: Q at most 1.15 C by cycle 4", "fast-cycle", (2.0, 8.0), fits),
)  # fmt: skip


def verdicts(summaries: Sequence[Summary]) -> list[Verdict]:
    """Every bar of which runs were made."""
    found = []
    for bar in BARS:
        seen = [one for one in summaries if one.variant == bar.variant and one.first_budget_ms in bar.first_budgets_ms]
        numbers = sorted({one.number for one in seen})
        missed = {
            number: f"repetition {number}, {one.work_ms:g} ms thread from {one.first_budget_ms:g} ms: {why}"
            for number in numbers
            for one in seen
            if one.number == number and (why := bar.check(one))
        }
        if numbers:
            held = len(numbers) - len(missed)
            found.append(Verdict(bar.what, held, len(numbers), tuple(missed.values())))
    return found
