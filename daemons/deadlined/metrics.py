"""What Prometheus sees. Counters are counted where it happens; gauges are read when somebody asks for them."""

from collections import Counter as Count
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deadlined.held import Attached
from edgehold.api.deadlined import PeriodOrigin, ThreadState


class _Gauges(Collector):
    """The state of everything that is attached, at this moment."""

    def __init__(self, attachments: Callable[[], Iterable[Attached]], total: Callable[[], float | None]) -> None:
        self._attachments = attachments
        self._total = total

    def collect(self) -> Iterable[GaugeMetricFamily]:
        states: Count[ThreadState] = Count()
        saturated = inferred = 0
        held = wanted = 0.0
        number = 0
        for number, one in enumerate(self._attachments(), 1):  # noqa: B007 - how many there are
            for thread in one.threads.values():
                states[thread.state] += 1
                held += thread.budget_ns / thread.config.period_ns
                wanted += thread.counted
                inferred += thread.period_origin is PeriodOrigin.INFERRED
                saturated += thread.row >= 0 and bool(thread.cells.sizing.saturated)
        yield _gauge("deadlined_attachments", "Targets that are attached.", number)
        threads = GaugeMetricFamily("deadlined_threads", "Threads by state.", labels=["state"])
        for state in ThreadState:
            threads.add_metric([state.value], states[state])
        yield threads
        yield _gauge("deadlined_saturated_threads", "Threads that never slept in their last window.", saturated)
        yield _gauge("deadlined_inferred_periods", "Threads whose period was inferred.", inferred)
        yield _gauge("deadlined_budget_cpus", "Sum of all reservations in CPUs (budget / period).", held)
        yield _gauge("deadlined_wanted_cpus", "Sum of what the rules want in CPUs.", wanted)
        if (total := self._total()) is not None:
            yield _gauge("deadlined_capacity_cpus", "CPUs there are for reservations, by the last probe.", total)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family


class Metrics:
    """deadlined's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self.slowed = Counter(
            "deadlined_guard", "Times that deadlined left its real-time policy because it used too much of a CPU.",
            registry=self.registry,
        )  # fmt: skip
        self._refusals = Counter(
            "deadlined_refusals", "What the kernel refused, by errno.", ["errno"], registry=self.registry
        )

    def tell(self, attachments: Callable[[], Iterable[Attached]], total: Callable[[], float | None]) -> None:
        """Whose gauges these are."""
        self.registry.register(_Gauges(attachments, total))

    def refused(self, errno_name: str) -> None:
        """The kernel said no."""
        self._refusals.labels(errno_name).inc()
