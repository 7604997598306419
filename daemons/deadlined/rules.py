"""The reference rule: sizes a budget from what a thread really executed (NANCY D3.4 §4, Figure 23). Pure.

Every T: c = executed time in one period; cmax = the largest of the last N; where cmax grew, l doubles, else it is 1;
Q = cmax (1 + ovh l), between a floor and a cap. A thread that keeps hitting its budget so gets more, faster and
faster; one that needs less gets less; Q stays a little above the need, or growth could never be seen.
"""

from collections import deque
from dataclasses import dataclass

# While cmax grows in every cycle, l doubles in every cycle. From here on it changes nothing (Q has long been the cap),
# and it must not grow beyond what a float holds in a week of slow growth.
_MAX_MULTIPLIER = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """What is given. Times in nanoseconds; needs 0 < floor <= initial <= cap x period."""

    period_ns: int
    initial_budget_ns: int
    overallocation: float
    """ovh: the share above the need, > 0."""
    window: int
    """N: how many samples cmax is taken of, >= 1."""
    cap: float
    """The largest budget as a share of the period, 0..1."""
    min_budget_ns: int
    """The floor of the budget."""

    @property
    def max_budget_ns(self) -> int:
        """The largest budget."""
        return int(self.cap * self.period_ns)

    def problem(self) -> str:
        """What is wrong with it in a sentence, or an empty text."""
        if self.min_budget_ns > self.max_budget_ns:
            return (
                f"min_budget_ns ({self.min_budget_ns}) is above cap x period_ns ({self.max_budget_ns}): "
                "lower it, or make the period longer"
            )
        if not self.min_budget_ns <= self.initial_budget_ns <= self.max_budget_ns:
            return (
                f"initial_budget_ns ({self.initial_budget_ns}) must lie between min_budget_ns ({self.min_budget_ns}) "
                f"and cap x period_ns ({self.max_budget_ns})"
            )
        return ""


class ReferenceRule:
    """One thread's rule: feed it a sample a cycle, set what it answers. The same samples give the same budgets."""

    def __init__(self, config: RuleConfig) -> None:
        self.config = config
        self.multiplier = 1
        """l."""
        self.budget_ns = config.initial_budget_ns
        """Q: what the rule wants."""
        self._samples: deque[int] = deque(maxlen=config.window)
        self._largest_before = -1

    def step(self, executed_ns: int) -> int:
        """One cycle: the executed time per period in, the budget from now on out, both in nanoseconds."""
        self._samples.append(executed_ns)
        largest = max(self._samples)
        grew = self._largest_before != -1 and largest > self._largest_before
        self.multiplier = min(self.multiplier * 2, _MAX_MULTIPLIER) if grew else 1
        self._largest_before = largest
        wanted = round(largest * (1 + self.config.overallocation * self.multiplier))
        self.budget_ns = min(max(wanted, self.config.min_budget_ns), self.config.max_budget_ns)
        return self.budget_ns
