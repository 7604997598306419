"""What deadlined knows about one thread and one attachment, and how it tells it. No system calls here.

What is measured lives in a row of the table (`HeldTable`); a thread that has no row is not sampled.
"""

from dataclasses import dataclass, field
from typing import Any

from deadlined.rules import RuleConfig
from deadlined.targets import Source
from edgehold.api.deadlined import (
    Attachment,
    GroupStatus,
    PeriodOrigin,
    Policy,
    Sample,
    Target,
    ThreadState,
    ThreadStatus,
)
from edgehold.kernel.native_held import HeldTable, RawSample
from edgehold.kernel.sched import SchedAttr


@dataclass(slots=True, eq=False)
class Thread:
    """One thread of an attachment. Times in nanoseconds of CLOCK_MONOTONIC."""

    tid: int
    start_ticks: int
    name: str
    config: RuleConfig
    table: HeldTable
    state: ThreadState = ThreadState.WAITING
    reason: str = ""
    """Why it is not held, or has not what it wants."""
    original: SchedAttr | None = None
    """What to restore; set from the journal's row on."""
    row: int = -1
    """In the table; -1: it is not sampled."""
    fd: int = -1
    first_ns: int = 0
    """The budget to begin with: the policy's, or what it had before it was taken out."""
    budget_ns: int = 0
    """In force; 0 while it is not held."""
    try_at_ns: int | None = 0
    """When to try (again) to hold it; None: it is held, or must not be tried by itself."""
    counted: float = 0.0
    """The CPUs with which it stands in the sum of what is wanted."""
    process: int = 0
    """Whose thread it is; 0: not asked yet."""
    entered_ns: int = 0
    suspect_ns: int = 0
    """Since when it wants to run and does not; 0: it is not suspected."""
    stuck: int = 0
    """How often in a row the kernel left it throttled."""
    period_origin: PeriodOrigin = PeriodOrigin.GIVEN
    confidence: float = 0.0
    tries: int = 0
    """How often its period was looked for in vain."""

    @property
    def key(self) -> tuple[int, int]:
        """Names this thread and no other of this boot."""
        return self.tid, self.start_ticks

    @property
    def cells(self) -> Any:
        """Its row: struct eh_held of ext/held_cdef.h. Only while ``row`` is not -1."""
        return self.table.row(self.row)

    @property
    def wanted_ns(self) -> int:
        """What its rule wants."""
        return int(self.cells.sizing.wanted_ns) if self.row >= 0 else self.first_ns

    def status(self) -> ThreadStatus:
        """As the API tells it."""
        cells = self.cells if self.row >= 0 else None
        return ThreadStatus(
            tid=self.tid,
            name=self.name,
            state=self.state,
            budget_ns=self.budget_ns,
            wanted_ns=self.wanted_ns,
            period_ns=self.config.period_ns,
            period_origin=self.period_origin,
            executed_ns=int(cells.executed_ns) if cells else 0,
            run_delay_ns=int(cells.run_delay_ns) if cells else 0,
            saturated=bool(cells.sizing.saturated) if cells else False,
            multiplier=int(cells.sizing.multiplier) if cells else 1,
            confidence=self.confidence,
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
    begun: int
    """The monitor's cycle in which it was attached."""
    threads: dict[int, Thread] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    """Those of them that are to be tried, or looked at, in every cycle."""
    left_out: int = 0
    """Threads that did not fit into max_threads."""
    denied: str = ""
    """Why one of its threads is left alone: the settings' deny list."""
    trouble: str = ""
    """Why its threads could not be looked at in the last cycle."""
    suspended: bool = False

    def message(self, cycle: int, group: GroupStatus | None = None) -> Attachment:
        """As the API tells it; ``cycle``: the monitor's."""
        threads = tuple(self.threads[tid].status() for tid in sorted(self.threads))
        number = f"{self.left_out} thread{' is' if self.left_out == 1 else 's are'}"
        left_out = f"{number} left out: deadlined's max_threads is reached" if self.left_out else ""
        return Attachment(
            id=self.id,
            target=self.target,
            policy=self.policy,
            threads=threads,
            group=group,
            cycles=cycle - self.begun,
            suspended=self.suspended,
            reason=self.source.over or self.trouble or self.source.reason or left_out or self.denied,
        )


def sample_of(raw: RawSample) -> Sample:
    """As the API tells it."""
    return Sample(
        time_ns=raw.time_ns,
        tid=raw.tid,
        elapsed_ns=raw.elapsed_ns,
        executed_ns=raw.executed_ns,
        run_delay_ns=raw.run_delay_ns,
        budget_ns=raw.budget_ns,
        wanted_ns=raw.wanted_ns,
        period_ns=raw.period_ns,
        saturated=bool(raw.saturated),
        multiplier=raw.multiplier,
    )
