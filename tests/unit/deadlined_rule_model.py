"""Both rules once more, in plain Python: what the C is compared with. Written from docs/deadlined.md and Figure 23."""

from collections import deque
from dataclasses import dataclass

from deadlined.rules import RuleConfig
from edgehold.api.deadlined import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One window of one thread. Times in nanoseconds; None: not known."""

    elapsed_ns: int
    executed_ns: int
    run_delay_ns: int = 0
    budget_ns: int
    throttled: bool | None = None
    saturated: bool | None = None


class Model:
    """A rule with its state."""

    def __init__(self, config: RuleConfig, *, begins: bool = False) -> None:
        """``begins``: its first window is a short one."""
        self.config = config
        self.wanted_ns = config.initial_budget_ns
        self.multiplier = 1
        self.saturated = False
        self.again = False
        """The next window should be a short one."""
        self._largest_before = 0
        self._samples: deque[int] = deque(maxlen=config.window)
        self._phase = "begin" if begins else "steady"
        self._looks = 0
        self._provisional = False

    def step(self, window: Window) -> int:
        """One window; the budget from now on."""
        executed = int(float(window.executed_ns) * float(self.config.period_ns) / float(window.elapsed_ns))
        self.again = False
        match self.config.rule:
            case Rule.FAST:
                self._fast(window, executed)
            case Rule.REFERENCE:
                self.saturated = self._is_saturated(window, executed)
                self._figure_23(executed)
            case Rule.FIXED:
                self.saturated = self._is_saturated(window, executed)
        return self.wanted_ns

    def _bounded(self, wanted: float) -> int:
        if wanted >= self.config.max_budget_ns:
            return self.config.max_budget_ns
        return self.config.min_budget_ns if wanted <= self.config.min_budget_ns else int(wanted + 0.5)

    def _figure_23(self, executed: int) -> None:
        """The pseudo-code, with the cap of the experiment and our floor."""
        self._samples.append(executed)
        largest = max(self._samples)
        grew = largest > self._largest_before
        self.multiplier = min(self.multiplier * 2, 2**40) if grew else 1
        self._largest_before = largest
        self.wanted_ns = self._bounded(largest * (1 + self.config.overallocation * self.multiplier))

    def _awake(self, window: Window) -> bool:
        limit = max(0.9, 1 - (1 - window.budget_ns / self.config.period_ns) / 2)
        return window.executed_ns + window.run_delay_ns >= limit * window.elapsed_ns

    def _is_saturated(self, window: Window, executed: int) -> bool:
        if window.saturated is not None:
            return window.saturated
        if not window.budget_ns:
            return False
        if self._phase == "saturated":
            return self._awake(window) or window.throttled is True
        if self._awake(window):
            return executed >= 0.75 * window.budget_ns
        if not window.throttled or executed < 0.93 * window.budget_ns:
            return False
        mostly = window.executed_ns + window.run_delay_ns >= 0.6 * window.elapsed_ns
        return self._phase == "begin" or (self._phase == "steady" and mostly)

    def _fast(self, window: Window, executed: int) -> None:
        before = self._phase
        self.saturated = self._is_saturated(window, executed)
        if self.saturated:
            self._looks = self._looks + 1 if before == "saturated" else 0
            self._phase = "saturated"
            self._samples.clear()
            self._provisional = False
            wanted = self._bounded(40 * window.budget_ns) if window.budget_ns else self.config.max_budget_ns
            self.wanted_ns = max(self.wanted_ns, wanted)
            self.again = self._looks < 10
            return
        self._phase = "steady"
        if before != "steady":
            return  # a backlog's end, or a short look
        second = self._provisional  # the first one alone: the second replaces it
        if second:
            self._samples.clear()
        self._provisional = not self._samples and not second
        self._samples.append(executed)
        over = self.config.overallocation
        wanted = self._bounded(max(self._samples) * (1 + over))
        lower = 0.99 if second else 0.95
        if wanted > self.wanted_ns * (1 + min(over / 4, 0.05)) or wanted < self.wanted_ns * lower:
            self.wanted_ns = wanted
        waited = bool(window.throttled) or window.run_delay_ns > 0.05 * window.elapsed_ns
        suspected = executed >= 0.93 * window.budget_ns and waited
        if window.budget_ns and suspected:
            self._phase, self.again = "suspect", True
