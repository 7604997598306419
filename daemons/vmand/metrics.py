"""What /metrics shows, read from the service when somebody asks. Imported only then (see __main__.py)."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edgehold.api.vmand import CoresGrade, MemoryGrade, State
from vmand.api import Api
from vmand.service import Service


class _Vmand(Collector):
    def __init__(self, service: Service, api: Api) -> None:
        self._service = service
        self._api = api

    def collect(self) -> Iterator[Metric]:
        records = self._service.records
        states = GaugeMetricFamily("vmand_partitions", "Partitions by state.", labels=["state"])
        for state in State:
            states.add_metric([state.value], sum(one.public().state is state for one in records))
        yield states
        memory = GaugeMetricFamily("vmand_memory_reserved_bytes", "Memory that partitions hold.")
        memory.add_metric([], sum(one.memory_bytes for one in records))
        yield memory
        cores = GaugeMetricFamily("vmand_cores_dedicated", "Cores that dedicated partitions hold.")
        cores.add_metric([], sum(len(one.cpus) for one in records))
        yield cores
        for what, grades in (("cores", CoresGrade), ("memory", MemoryGrade)):
            name = f"vmand_{what}_grade"
            graded = GaugeMetricFamily(name, f"1 for the grade that a partition's {what} have.", labels=["id", "grade"])
            for record in records:
                found = getattr(record, f"{what}_grade")
                for grade in grades if found else ():  # what is not known is absent
                    graded.add_metric([str(record.id), grade.value], int(grade is found))
            yield graded
        commands = CounterMetricFamily("vmand_commands", "Commands by outcome.", labels=["command", "outcome"])
        for (command, outcome), count in sorted(self._api.outcomes.items()):
            commands.add_metric([command, outcome], count)
        yield commands
        ends = CounterMetricFamily("vmand_guest_ends", "Guests that ended by themselves.", labels=["how"])
        for how in ("off", "failed"):
            ends.add_metric([how], self._service.guest_ends[how])
        yield ends


def registry(service: Service, api: Api) -> CollectorRegistry:
    """A registry of vmand's own numbers."""
    one = CollectorRegistry()
    one.register(_Vmand(service, api))
    return one
