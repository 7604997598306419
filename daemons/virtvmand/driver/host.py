"""The host: what it has, how much of it is used, what guests may be given."""

from virtvmand import domaincaps, hostinfo, hostxml
from virtvmand.call import Client
from virtvmand.driver.context import Context
from virtvmand.xdr import layout

_STATS = layout("params:node_stat<16> nparams:i32")


class Host:
    """The host."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def connect_get_hostname(self, _client: Client) -> tuple[str]:
        return (hostinfo.hostname(),)

    async def connect_get_max_vcpus(self, _client: Client, _kind: str | None) -> tuple[int]:
        return (domaincaps.max_vcpus(await self._context.mirror.host()),)

    def connect_get_sysinfo(self, _client: Client, _flags: int) -> tuple[str]:
        return (hostxml.sysinfo_xml(),)

    async def connect_get_capabilities(self, _client: Client) -> tuple[str]:
        return (hostxml.capabilities_xml(await self._context.mirror.host()),)

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
        one = hostinfo.node_info()
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


def _counted(stats: list[tuple[str, int]], count: int) -> bytes:
    """A client asks first how many there are, by asking for none."""
    return _STATS.encode((stats[:count] if count else [], len(stats)))
