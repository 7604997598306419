"""The host: what it has, how much of it is used, what guests may be given."""

import time
from collections.abc import Callable
from typing import TypeVar, cast

from virtvmand import domaincaps, hostinfo, hostxml
from virtvmand.call import Client
from virtvmand.driver.context import Context
from virtvmand.xdr import layout

T = TypeVar("T")
_KEPT_S = 5.0
_STATS = layout("params:node_stat<16> nparams:i32")


class Host:
    """The host."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._kept: dict[str, tuple[float, object]] = {}

    def connect_get_hostname(self, _client: Client) -> tuple[str]:
        return (hostinfo.hostname(),)

    async def connect_get_max_vcpus(self, _client: Client, _kind: str | None) -> tuple[int]:
        return (domaincaps.max_vcpus(await self._context.mirror.host()),)

    def connect_get_sysinfo(self, _client: Client, _flags: int) -> tuple[str]:
        return (self._lately("sysinfo", hostxml.sysinfo_xml),)

    async def connect_get_capabilities(self, _client: Client) -> tuple[str]:
        host = await self._context.mirror.host()
        return (self._lately("capabilities", lambda: hostxml.capabilities_xml(host)),)

    async def connect_get_domain_capabilities(
        self,
        _client: Client,
        emulator: str | None,
        arch: str | None,
        machine: str | None,
        kind: str | None,
        _flags: int,
    ) -> tuple[str]:
        host = await self._context.mirror.host()
        return (domaincaps.domain_capabilities_xml(host, emulator=emulator, arch=arch, machine=machine, virttype=kind),)

    def node_get_info(self, _client: Client) -> tuple[str, int, int, int, int, int, int, int]:
        one = self._lately("node", hostinfo.node_info)
        return (one.model, one.memory_kib, one.cpus, one.mhz, one.nodes, one.sockets, one.cores, one.threads)

    def node_get_cpu_map(self, _client: Client, need_map: int, need_online: int, _flags: int) -> tuple[bytes, int, int]:
        present, online = hostinfo.cpu_map()
        bits = hostinfo.bitmap(online, -(-present // 8)) if need_map else b""
        return (bits, len(online) if need_online else 0, present)

    def node_get_cpu_stats(self, _client: Client, cpu: int, count: int, _flags: int) -> bytes:
        return _counted(hostinfo.cpu_stats(cpu), count)

    def node_get_memory_stats(self, _client: Client, count: int, cell: int, _flags: int) -> bytes:
        return _counted(hostinfo.memory_stats(cell), count)

    def node_get_free_memory(self, _client: Client) -> tuple[int]:
        return (hostinfo.free_memory(),)

    def node_get_cells_free_memory(self, _client: Client, start: int, most: int) -> tuple[list[int]]:
        return (hostinfo.cells_free(start, most),)

    def node_get_security_model(self, _client: Client) -> tuple[str, str]:
        return ("", "")  # none that clients could label something for

    def _lately(self, what: str, make: Callable[[], T]) -> T:
        """Made of many files of the kernel, which change when somebody changes the host's hardware: kept for a while,
        so that one who asks without end keeps nobody else waiting."""
        now = time.monotonic()
        until, kept = self._kept.get(what, (0.0, None))
        if now >= until:
            kept = make()
            self._kept[what] = (now + _KEPT_S, kept)
        return cast("T", kept)


def _counted(stats: list[tuple[str, int]], count: int) -> bytes:
    """A client asks first how many there are, by asking for none."""
    return _STATS.encode((stats[:count] if count else [], len(stats)))
