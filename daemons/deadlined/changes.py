"""Another policy, rule or period for threads that are attached: what was learned stays, in proportion.

A period is the one thing that the kernel must agree to before the rule may go by it: where it refuses, the thread goes
on as it was, and is asked for again in every cycle. Budgets are set by whoever calls, all together.
"""

import contextlib
from collections.abc import Callable

from deadlined.grants import Entry, Grants
from deadlined.held import Attached, Thread
from deadlined.holder import Holder
from deadlined.rules import RuleConfig, rule_config
from edgehold.api.deadlined import PeriodOrigin, Policy, Rule, ThreadState
from edgehold.kernel.procfs import GoneError


class Changes:
    """Changes what threads are sized by. Each answer is whose budgets are to be set now."""

    def __init__(self, *, holder: Holder, grants: Grants, lost: Callable[[Attached, Thread], None]) -> None:
        """``lost`` is told of a thread that turns out to be in nobody's reservation or in somebody else's."""
        self._holder = holder
        self._grants = grants
        self._lost = lost
        self._later: dict[Thread, tuple[Attached, RuleConfig]] = {}
        """Whose other period was refused."""

    def policy(self, one: Attached, policy: Policy) -> list[Entry]:
        """Another policy for an attachment."""
        auto = policy.period_ns == "auto" and one.policy.period_ns == "auto"
        one.policy, one.config = policy, rule_config(policy)
        changed: list[Entry] = []
        for thread in list(one.threads.values()):
            kept = auto and thread.period_origin is PeriodOrigin.INFERRED
            config = one.config.with_period(thread.config.period_ns) if kept else one.config
            if not kept:
                thread.period_origin, thread.confidence, thread.tries = origin(policy), 0.0, 0
            with contextlib.suppress(GoneError):  # found by the next sample
                changed += self.thread(thread, one, config)
        return changed

    def thread(self, thread: Thread, one: Attached, config: RuleConfig) -> list[Entry]:
        """Another rule or period for one thread. Raises `GoneError`."""
        before = thread.config
        self._later.pop(thread, None)
        if thread.row < 0:
            learned = thread.entered_ns and config.rule is not Rule.FIXED
            first_ns = thread.first_ns * config.period_ns // before.period_ns if learned else config.initial_budget_ns
            thread.first_ns = min(max(first_ns, config.min_budget_ns), config.max_budget_ns)
            thread.config = config
            return []
        if thread.state is ThreadState.HELD and config.period_ns != before.period_ns:
            scaled = thread.budget_ns * config.period_ns // before.period_ns
            budget_ns = min(max(scaled, config.min_budget_ns), config.max_budget_ns)
            if not self._holder.change(thread, budget_ns, config.period_ns):
                if thread.budget_ns:
                    self._later[thread] = one, config  # the reason is told; it goes on as it was
                else:
                    self._grants.without(thread)
                    self._lost(one, thread)
                return []
        thread.config = config
        self._holder.table.change_rule(thread.row, config.raw())
        if config.rule is Rule.FIXED:  # is what the policy says, whatever was learned
            thread.cells.sizing.wanted_ns = thread.cells.told_ns = config.initial_budget_ns
        self._grants.count(Entry(thread, one))
        return [Entry(thread, one)]

    def forget(self, thread: Thread) -> None:
        """It is not attached any more."""
        self._later.pop(thread, None)

    def again(self) -> list[Entry]:
        """Ask once more for the periods that were refused."""
        changed: list[Entry] = []
        for thread, (one, config) in list(self._later.items()):
            with contextlib.suppress(GoneError):  # found by the next sample
                changed += self.thread(thread, one, config)
        return changed


def origin(policy: Policy) -> PeriodOrigin:
    """Where a thread's period comes from at first."""
    return PeriodOrigin.OBSERVING if policy.period_ns == "auto" else PeriodOrigin.GIVEN
