"""What /metrics shows, read when somebody asks. Imported only then (see __main__.py)."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from virtvmand.mirror import Mirror
from virtvmand.server import Server
from virtvmand.table import PROCEDURES


class _Virtvmand(Collector):
    def __init__(self, server: Server, mirror: Mirror) -> None:
        self._server = server
        self._mirror = mirror

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("virtvmand_connections", "Open connections.", value=len(list(self._server.connections)))
        yield GaugeMetricFamily("virtvmand_vmand_up", "1 while vmand answers.", value=int(self._mirror.in_sync))
        calls = CounterMetricFamily("virtvmand_calls", "Calls by outcome.", labels=["procedure", "outcome"])
        for (number, outcome), count in sorted(self._server.outcomes.items()):
            calls.add_metric([PROCEDURES[number].name, outcome], count)
        yield calls


def registry(server: Server, mirror: Mirror) -> CollectorRegistry:
    """A registry of virtvmand's own numbers."""
    one = CollectorRegistry()
    one.register(_Virtvmand(server, mirror))
    return one
