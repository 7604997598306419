"""What the demo records: steps with their conditions, and the curves. Pure: no daemon, no file."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgehold.api.deadlined import Sample
from edgehold.clock import NS_PER_MS

JOB = re.compile(r"edgehold-job n=(\d+) release_ms=([0-9.]+) response_ms=([0-9.]+)")
CALIBRATED = re.compile(r"edgehold-job calibrated work_ms=([0-9.]+)")

# The last budget over the need: not less than the need, and not a waste (the bars of the demo).
BUDGET_OVER_NEED = (1.05, 1.6)
# The response time "is about the executed time": the guest's job and the vCPU's wake-ups, seen from inside the guest.
RESPONSE_OVER_NEED = 1.5
STEADY_CYCLES = 10
STEADY_JOBS = 20


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was done, and whether what it promises held."""

    name: str
    detail: str
    good: bool
    at_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """One job of the guest: when its line came (host's monotonic clock), and its response time inside the guest."""

    time_ns: int
    number: int
    response_ms: float


@dataclass(slots=True)
class Story:
    """All that the report shows."""

    started_ns: int
    directory: Path | None = None
    """Where the daemons of this run lived."""
    steps: list[Step] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    work_ms: float = 0.0
    unfinished: str = ""
    """The beginning of a console line whose end has not come yet."""

    def add_samples(self, history: Sequence[Sample]) -> list[Sample]:
        """Take over what is new in a history. Returns the new ones."""
        last = self.samples[-1].time_ns if self.samples else 0
        fresh = [sample for sample in history if sample.time_ns > last]
        self.samples.extend(fresh)
        return fresh

    def add_console(self, text: str, now_ns: int) -> None:
        """Take over the guest's lines; what comes is cut anywhere, so the last line waits for its end."""
        *lines, self.unfinished = (self.unfinished + text).split("\n")
        text = "\n".join(lines)
        for match in JOB.finditer(text):
            self.jobs.append(Job(now_ns, int(match[1]), float(match[3])))
        if calibrated := CALIBRATED.search(text):
            self.work_ms = float(calibrated[1])

    def jobs_between(self, begin_ns: int, end_ns: int) -> list[Job]:
        """The jobs whose lines came in this interval."""
        return [job for job in self.jobs if begin_ns <= job.time_ns < end_ns]

    def need_ms(self) -> float:
        """What the vCPU executes a period once things are steady: the median of the last cycles."""
        return statistics.median(sample.executed_per_period_ns for sample in self.samples[-STEADY_CYCLES:]) / NS_PER_MS

    def last_response_ms(self) -> float:
        """The response time once things are steady: the median of the last jobs."""
        return statistics.median(job.response_ms for job in self.jobs[-STEADY_JOBS:])

    def converged(self) -> bool:
        """Whether the last jobs answer in about what they execute, and the budget is a little above the need."""
        if len(self.samples) < STEADY_CYCLES or len(self.jobs) < STEADY_JOBS:
            return False
        low, high = (bound * self.need_ms() * NS_PER_MS for bound in BUDGET_OVER_NEED)
        fits = all(low <= sample.budget_ns <= high for sample in self.samples[-STEADY_CYCLES // 2 :])
        return fits and self.last_response_ms() <= RESPONSE_OVER_NEED * self.need_ms()
