"""What a rule is given, and rules apart from any thread: replayed from recorded samples, or for a group. Pure.

The rules themselves are C (ext/rule.c), next to what samples the threads; docs/deadlined.md says them in words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgehold.api.deadlined import Policy, Rule, Sample
from edgehold.clock import NS_PER_MS
from edgehold.kernel import native_held
from edgehold.kernel.limits import DL_MIN_RUNTIME_NS
from edgehold.kernel.native_held import RawRule

_KINDS = {Rule.FAST: native_held.FAST, Rule.REFERENCE: native_held.REFERENCE, Rule.FIXED: native_held.FIXED}


def _ms(ns: int) -> str:
    return f"{ns} ns ({ns / NS_PER_MS:g} ms)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """What is given. Times in nanoseconds; needs 0 < floor <= initial <= cap x period."""

    rule: Rule = Rule.FAST
    period_ns: int
    initial_budget_ns: int
    overallocation: float
    """ovh: the share above the need, > 0."""
    window: int
    """N: how many samples the largest is taken of, >= 1."""
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
                f"min_budget_ns, {_ms(self.min_budget_ns)}, is above cap x period_ns, {_ms(self.max_budget_ns)}: "
                "lower it, or make the period longer"
            )
        if not self.min_budget_ns <= self.initial_budget_ns <= self.max_budget_ns:
            return (
                f"initial_budget_ns, {_ms(self.initial_budget_ns)}, must lie between min_budget_ns, "
                f"{_ms(self.min_budget_ns)}, and cap x period_ns, {_ms(self.max_budget_ns)}"
            )
        return ""

    def with_period(self, period_ns: int) -> "RuleConfig":
        """The same share of the CPU every other period."""
        floor = max(self.min_budget_ns * period_ns // self.period_ns, DL_MIN_RUNTIME_NS)
        largest = max(int(self.cap * period_ns), floor)
        initial = min(max(self.initial_budget_ns * period_ns // self.period_ns, floor), largest)
        return replace(self, period_ns=period_ns, min_budget_ns=floor, initial_budget_ns=initial)

    def raw(self) -> RawRule:
        """As the extension wants it."""
        return RawRule(
            period_ns=self.period_ns,
            floor_ns=self.min_budget_ns,
            cap_ns=self.max_budget_ns,
            overallocation=self.overallocation,
            window=self.window,
            kind=_KINDS[self.rule],
        )


def rule_config(policy: Policy, *, cpus: float = 1.0) -> RuleConfig:
    """The rule's part of a policy; ``cpus``: of how many CPUs the cap is a share."""
    return RuleConfig(
        rule=policy.rule,
        period_ns=policy.first_period_ns,
        initial_budget_ns=policy.initial_budget_ns,
        overallocation=policy.overallocation,
        window=policy.window,
        cap=policy.cap * cpus,
        min_budget_ns=policy.min_budget_ns,
    )


class Sizer:
    """One rule with its state: feed it windows, set what it answers. The same windows give the same budgets."""

    def __init__(self, config: RuleConfig) -> None:
        self.config = config
        self._sizing = native_held.Sizing(config.raw(), config.initial_budget_ns)

    def step(
        self,
        *,
        elapsed_ns: int,
        executed_ns: int,
        run_delay_ns: int = 0,
        budget_ns: int | None = None,
        throttled: bool | None = None,
        saturated: bool | None = None,
    ) -> int:
        """One window (nanoseconds, whole); the budget from now on.

        ``budget_ns``: in force in the window; what was answered last where it is left out, 0: nothing limited it.
        ``throttled``: it waited for its budget at the window's end; ``saturated``: known, and not to be judged here.
        """
        self._sizing.step(
            elapsed_ns=elapsed_ns,
            executed_ns=executed_ns,
            run_delay_ns=run_delay_ns,
            budget_ns=self.budget_ns if budget_ns is None else budget_ns,
            throttled=-1 if throttled is None else int(throttled),
            saturated=-1 if saturated is None else int(saturated),
        )
        return self.budget_ns

    def change(self, config: RuleConfig) -> None:
        """Go on under another rule; what was learned stays, in proportion to the period."""
        self.config = config
        self._sizing.change(config.raw())
        if config.rule is Rule.FIXED:  # is what the policy says, whatever was learned
            self._sizing.state.wanted_ns = config.initial_budget_ns

    @property
    def budget_ns(self) -> int:
        """Q: what the rule wants."""
        return int(self._sizing.state.wanted_ns)

    @property
    def multiplier(self) -> int:
        """l of the reference rule."""
        return int(self._sizing.state.multiplier)

    @property
    def saturated(self) -> bool:
        """Whether the last window was."""
        return bool(self._sizing.state.saturated)


def replay(samples: Sequence[Sample], policy: Policy, *, cycle_ns: int) -> list[tuple[int, bool]]:
    """What a policy would have wanted after each sample of one thread: (budget in ns, saturated).

    Samples say what was executed under the budget that was in force, so a replay tells how a rule reads them, not what
    the thread would have done with more. Windows shorter than half a ``cycle_ns`` are short looks, which only the fast
    rule takes: the others pass over them.
    """
    sizer = Sizer(rule_config(policy))
    answers = []
    for sample in samples:
        if policy.rule is Rule.FAST or sample.elapsed_ns >= cycle_ns // 2:
            sizer.step(
                elapsed_ns=sample.elapsed_ns,
                executed_ns=sample.executed_ns,
                run_delay_ns=sample.run_delay_ns,
                budget_ns=sample.budget_ns,
                saturated=sample.saturated if policy.rule is Rule.FAST and sample.budget_ns else None,
            )
        answers.append((sizer.budget_ns, sizer.saturated))
    return answers
