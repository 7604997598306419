"""What guests use: CPU time by vCPU, memory, and many figures of many domains in one call."""

import asyncio
from collections.abc import Iterable, Sequence

from edgehold.api.vmand import Partition, Vcpu
from edgehold.errors import EdgeholdError
from edgehold.kernel.procfs import GoneError
from virtvmand import guestinfo, hostinfo
from virtvmand.call import Client
from virtvmand.domain import Domain
from virtvmand.driver.context import Context
from virtvmand.driver.find import selected
from virtvmand.driver.look import cpu_time_ns, kib, must_be_active
from virtvmand.driver.usage import Carried, blocks, interfaces
from virtvmand.errors import Code, LibvirtError
from virtvmand.xdr import INT, UINT, ULLONG, Param, encoded_domain
from virtvmand.xdr import Domain as Named

# virDomainStatsTypes that we have something for; the bits of others are passed over, unless they are enforced.
STATE, CPU, BALLOON, VCPU, INTERFACE, BLOCK = 1, 2, 4, 8, 16, 32
_ALL = STATE | CPU | BALLOON | VCPU | INTERFACE | BLOCK
_ENFORCE = 1 << 31
_FILTERS = 0xFF  # active to other: the same bits as those of a list
# virDomainMemoryStatTags and virVcpuState.
_ACTUAL, _RSS = 6, 7
_RUNNING, _BLOCKED = 1, 2
# vmand takes 16 requests of a conversation at once: most are for those who change something.
_AT_ONCE = 2
_STATES = {"R": _RUNNING}
# Of a map of CPUs, as in the wire's own cpumaps: 16,384 CPUs.
_MAX_MAP_BYTES = 2048


class Stats:
    """Figures of guests that run."""

    def __init__(self, context: Context, carried: Carried) -> None:
        self._context = context
        self._carried = carried
        self._threads: dict[int, tuple[int, list[Vcpu]]] = {}
        """By partition: its process, and the threads of its vCPUs, which stay the same as long as the process."""
        self._asking: dict[int, asyncio.Task[list[Vcpu]]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._makers = {STATE: _state, CPU: self._cpu, BALLOON: _balloon, VCPU: _vcpu}

    async def domain_get_vcpus(
        self, _client: Client, dom: Named, most: int, map_length: int
    ) -> tuple[list[tuple[int, int, int, int]], bytes]:
        _check_map(map_length)
        one = self._context.find(dom)
        must_be_active(one)
        infos, maps = [], b""
        for vcpu in (await self._vcpus(one))[: max(most, 0)]:
            use = guestinfo.vcpu_use(vcpu.tid)
            infos.append((vcpu.index, _STATES.get(use.state, _BLOCKED), use.cpu_time_ns, use.cpu))
            maps += hostinfo.bitmap(use.affinity, map_length)
        return (infos, maps if map_length > 0 else b"")

    async def domain_get_vcpu_pin_info(
        self, _client: Client, dom: Named, most: int, map_length: int, _flags: int
    ) -> tuple[bytes, int]:
        _check_map(map_length)
        one = self._context.find(dom)
        if one.active:
            cpus = [guestinfo.vcpu_use(vcpu.tid).affinity for vcpu in await self._vcpus(one)]
        else:
            _present, online = hostinfo.cpu_map()
            cpus = [frozenset({cpu}) for cpu in one.partition.cpus] or [online] * one.partition.cores
        cpus = cpus[: max(most, 0)]
        return (b"".join(hostinfo.bitmap(each, map_length) for each in cpus), len(cpus))

    def domain_memory_stats(self, _client: Client, dom: Named, most: int, _flags: int) -> tuple[list[tuple[int, int]]]:
        one = self._context.find(dom)
        must_be_active(one)
        stats = [(_ACTUAL, kib(one))]
        if (rss := _rss_kib(one)) is not None:
            stats.append((_RSS, rss))
        return (stats[:most],)

    def domain_get_cpu_stats(
        self, _client: Client, dom: Named, count: int, start: int, cpus: int, _flags: int
    ) -> tuple[list[Param], int]:
        one = self._context.find(dom)
        must_be_active(one)
        if start != -1:
            raise LibvirtError(Code.OPERATION_UNSUPPORTED, "the kernel counts a guest's time as a whole: start -1")
        if cpus != 1:
            raise LibvirtError(Code.INVALID_ARG, f"ncpus: {cpus}; the time as a whole is one set of figures")
        stats = [Param("cpu_time", ULLONG, cpu_time_ns(one, self._context.times))]
        return (stats[:count], len(stats)) if count else ([], len(stats))

    async def connect_get_all_domain_stats(
        self, _client: Client, named: Sequence[Named], wanted: int, flags: int
    ) -> tuple[list[tuple[bytes, list[Param]]]]:
        if flags & _ENFORCE and wanted & ~_ALL:
            raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"stats {wanted & ~_ALL:#x}: not known of these guests")
        mirror = self._context.mirror
        # Each once: a client must not have us count one guest 16,384 times.
        asked = {one.uuid for one in named}
        # One that is gone by now is passed over, as libvirt does.
        domains = [one for one in mirror.all() if not asked or one.uuid in asked]
        kinds = wanted or _ALL
        records = []
        wished = selected(domains, flags & _FILTERS)
        usages = await self._carried.of_all(wished) if kinds & (INTERFACE | BLOCK) else {}
        for one in wished:
            usage = usages.get(one.uuid)
            vcpus = await self._known_vcpus(one) if kinds & VCPU and one.active else []
            params = [each for kind, make in self._makers.items() if kinds & kind for each in make(one)]
            params += [each for vcpu in vcpus for each in _vcpu_figures(vcpu)]
            params += [each for kind, make in _OF_DEVICES.items() if kinds & kind for each in make(one, usage)]
            records.append((encoded_domain(one.name, one.uuid, one.id), params))
        return (records,)

    def _cpu(self, one: Domain) -> Iterable[Param]:
        if one.active:
            yield Param("cpu.time", ULLONG, cpu_time_ns(one, self._context.times))

    async def _known_vcpus(self, one: Domain) -> list[Vcpu]:
        """The vCPUs' threads, none where the guest ended meanwhile: the others' figures are not lost for it."""
        try:
            return await self._vcpus(one)
        except EdgeholdError:
            return []

    async def _vcpus(self, one: Domain) -> list[Vcpu]:
        partition = one.partition
        known = self._threads.get(partition.id)
        if partition.pid is not None and known is not None and known[0] == partition.pid:
            return known[1]
        asking = self._asking.get(partition.id)
        if asking is None or asking.done():
            asking = self._context.spawn(self._ask(partition), f"vCPUs of partition {partition.id}")
            self._asking[partition.id] = asking
        return await asyncio.shield(asking)

    async def _ask(self, partition: Partition) -> list[Vcpu]:
        """One request a guest, however many ask; and few at once, because one that hangs takes seconds."""
        try:
            async with self._slots:
                vcpus = await self._context.mirror.vmand.vcpus(partition.id)
        finally:
            self._asking.pop(partition.id, None)
        there = {each.partition.id for each in self._context.mirror.all()}
        self._threads = {each: what for each, what in self._threads.items() if each in there}
        if partition.pid is not None:
            self._threads[partition.id] = (partition.pid, vcpus)
        return vcpus


def _check_map(length: int) -> None:
    """Refuse a map of CPUs that no host needs; zeroes are allocated for all of it.

    Raises:
        LibvirtError: INVALID_ARG.
    """
    if not 0 <= length <= _MAX_MAP_BYTES:
        raise LibvirtError(Code.INVALID_ARG, f"maplen: {length}; 0 to {_MAX_MAP_BYTES} bytes a map of CPUs")


def _state(one: Domain) -> Iterable[Param]:
    yield Param("state.state", INT, one.state[0])
    yield Param("state.reason", INT, one.state[1])


def _balloon(one: Domain) -> Iterable[Param]:
    yield Param("balloon.current", ULLONG, kib(one))
    yield Param("balloon.maximum", ULLONG, kib(one))
    if (rss := _rss_kib(one)) is not None:
        yield Param("balloon.rss", ULLONG, rss)


def _vcpu(one: Domain) -> Iterable[Param]:
    yield Param("vcpu.current", UINT, one.partition.cores)
    yield Param("vcpu.maximum", UINT, one.partition.cores)


_OF_DEVICES = {INTERFACE: interfaces, BLOCK: blocks}


def _vcpu_figures(vcpu: Vcpu) -> list[Param]:
    try:
        use = guestinfo.vcpu_use(vcpu.tid)
    except GoneError:
        return []
    return [
        Param(f"vcpu.{vcpu.index}.state", INT, _STATES.get(use.state, _BLOCKED)),
        Param(f"vcpu.{vcpu.index}.time", ULLONG, use.cpu_time_ns),
    ]


def _rss_kib(one: Domain) -> int | None:
    pid = one.partition.pid
    if not one.active or pid is None:
        return None
    try:
        return guestinfo.memory_use(pid)
    except GoneError:
        return None
