"""What Prometheus sees. Everything is counted where it happens; gauges are set once a cycle."""

from collections import Counter as Count
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from deadlined.held import Attached
from edgehold.api.deadlined import ThreadState


class Metrics:
    """deadlined's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._attachments = Gauge("deadlined_attachments", "Targets that are held.", registry=self.registry)
        self._threads = Gauge("deadlined_threads", "Threads by state.", ["state"], registry=self.registry)
        self._budget = Gauge(
            "deadlined_budget_cpus", "Sum of all reservations in CPUs (budget / period).", registry=self.registry
        )
        self.cycles = Counter("deadlined_cycles", "Monitoring cycles.", registry=self.registry)
        self.overruns = Counter(
            "deadlined_cycle_overruns", "Cycles that were left out because one began too late.", registry=self.registry
        )
        self.busy = Counter("deadlined_cycle_seconds", "Wall time spent in cycles.", registry=self.registry)
        self.setattr_calls = Counter(
            "deadlined_setattr_calls", "Reservations that were set, changed or ended.", registry=self.registry
        )
        self.stuck = Counter(
            "deadlined_stuck_threads", "Threads that the kernel left throttled and that were revived.",
            registry=self.registry,
        )  # fmt: skip
        self._refusals = Counter(
            "deadlined_refusals", "What the kernel refused, by errno.", ["errno"], registry=self.registry
        )
        self.update(())

    def refused(self, errno_name: str) -> None:
        """The kernel said no."""
        self._refusals.labels(errno_name).inc()

    def update(self, attachments: Iterable[Attached]) -> None:
        """Set the gauges."""
        states: Count[ThreadState] = Count()
        number, cpus = 0, 0.0
        for one in attachments:
            number += 1
            for thread in one.threads.values():
                states[thread.state] += 1
                cpus += thread.budget_ns / one.config.period_ns
        self._attachments.set(number)
        self._budget.set(cpus)
        for state in ThreadState:
            self._threads.labels(state.value).set(states[state])
