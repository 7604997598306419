"""What deadlined knows about one thread and one attachment, and how it tells it. No system calls here."""

from collections import deque
from dataclasses import dataclass, field

from deadlined.rules import ReferenceRule, RuleConfig
from deadlined.targets import Source
from edgehold.api.deadlined import Attachment, Policy, Sample, Target, ThreadState, ThreadStatus
from edgehold.kernel.sampler import ThreadSample
from edgehold.kernel.sched import SchedAttr


@dataclass(slots=True, eq=False)
class Thread:
    """One thread of an attachment. Times in nanoseconds of CLOCK_MONOTONIC."""

    tid: int
    start_ticks: int
    name: str
    rule: ReferenceRule
    history: deque[Sample]
    state: ThreadState = ThreadState.WAITING
    reason: str = ""
    original: SchedAttr | None = None
    """What to restore; set from the journal's row on."""
    budget_ns: int = 0
    """In force; 0 while it is not held."""
    try_at_ns: int | None = 0
    """When to try (again) to hold it; None: it is held, or must not be tried by itself."""
    base: ThreadSample | None = None
    """The sample at which the current window began."""
    executed_ns: int = 0
    """Per period, of the last window."""
    run_delay_ns: int = 0
    seen_executed_ns: int = 0
    """The counter at the last look of the watchdog."""
    progress_ns: int = 0
    """When that counter last moved."""
    suspect_ns: int = 0
    """Since when it wants to run and does not; 0: it is not suspected."""
    look_at_ns: int = 0
    """When to look (again) whether a thread that does not execute sleeps."""
    check_at_ns: int = 0
    """When to ask (again) whether it still is in our reservation."""
    stuck: int = 0
    """How often in a row the kernel left it throttled."""

    @property
    def key(self) -> tuple[int, int]:
        """Names this thread and no other of this boot."""
        return self.tid, self.start_ticks

    def status(self) -> ThreadStatus:
        """As the API tells it."""
        return ThreadStatus(
            tid=self.tid,
            name=self.name,
            state=self.state,
            budget_ns=self.budget_ns,
            executed_ns=self.executed_ns,
            run_delay_ns=self.run_delay_ns,
            multiplier=self.rule.multiplier,
            reason=self.reason,
        )


@dataclass(slots=True, eq=False)
class Attached:
    """A target and the threads that it has now."""

    id: int
    target: Target
    policy: Policy
    config: RuleConfig
    source: Source
    threads: dict[int, Thread] = field(default_factory=dict)
    cycles: int = 0
    left_out: int = 0
    """Threads that did not fit into max_threads."""
    trouble: str = ""
    """Why its threads could not be looked at in the last cycle."""

    def message(self) -> Attachment:
        """As the API tells it."""
        threads = tuple(self.threads[tid].status() for tid in sorted(self.threads))
        number = f"{self.left_out} thread{' is' if self.left_out == 1 else 's are'}"
        left_out = f"{number} left out: deadlined's max_threads is reached" if self.left_out else ""
        return Attachment(
            id=self.id,
            target=self.target,
            policy=self.policy,
            threads=threads,
            cycles=self.cycles,
            reason=self.source.over or self.trouble or self.source.reason or left_out,
        )

    def history(self, last: int | None = None) -> tuple[Sample, ...]:
        """The kept samples of every thread, oldest first; all, or only the last ones."""
        samples = [sample for thread in self.threads.values() for sample in thread.history]
        samples.sort(key=lambda sample: (sample.time_ns, sample.tid))
        return tuple(samples if last is None else samples[max(len(samples) - last, 0) :])


def rule_config(policy: Policy) -> RuleConfig:
    """The rule's part of a policy."""
    return RuleConfig(
        period_ns=policy.period_ns,
        initial_budget_ns=policy.initial_budget_ns,
        overallocation=policy.overallocation,
        window=policy.window,
        cap=policy.cap,
        min_budget_ns=policy.min_budget_ns,
    )
