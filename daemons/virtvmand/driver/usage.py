"""What guests' disks and network interfaces carry, by the names that libvirt's clients have for them.

The figures are vmand's, asked for once a guest and never kept. Sizes of a domain's images that has no guest are the
files' own, as far as virtvmand's user may open them.
"""

import asyncio
import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence

from edgehold.api.vmand import Disk, DiskUse, NicUse, Usage
from edgehold.errors import EdgeholdError
from virtvmand.call import Client
from virtvmand.domain import Domain
from virtvmand.driver.context import Context
from virtvmand.driver.look import must_be_active
from virtvmand.errors import Code, LibvirtError
from virtvmand.xdr import STRING, UINT, ULLONG, Param
from virtvmand.xdr import Domain as Named

# vmand answers 16 requests of a conversation at once; some stay for others, however many guests hang.
_AT_ONCE = 4
_UNKNOWN = -1
"""A figure that libvirt's calls must have and nobody knows."""
_BLOCK_BYTES = 512  # of st_blocks (stat(2))
# The qcow2 header (QEMU's docs/interop/qcow2.txt): magic, and the size that a guest sees at this place.
_QCOW2, _QCOW2_SIZE = b"QFI\xfb", slice(24, 32)


class Carried:
    """Figures of devices."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def domain_block_stats(
        self, _client: Client, dom: Named, path: str
    ) -> tuple[int | None, int | None, int | None, int | None, int]:
        one, usage = await self._running(dom)
        uses = list(usage.disks) if not path else [_disk(one, usage, path)]
        figures = ("read_requests", "read_bytes", "written_requests", "written_bytes")
        requests, read, writes, written = (_sum(getattr(use, name) for use in uses) for name in figures)
        return (requests, read, writes, written, _UNKNOWN)

    async def domain_interface_stats(self, _client: Client, dom: Named, device: str) -> tuple[int, ...]:
        one, usage = await self._running(dom)
        for use in usage.nics:
            if device == use.interface or device.lower() == use.mac:
                return tuple(_UNKNOWN if figure is None else figure for figure in _nic_figures(use).values())
        known = ", ".join(f"{use.interface} ({use.mac})" for use in usage.nics) or "none"
        raise LibvirtError(Code.INVALID_ARG, f"domain '{one.name}' has no interface {device[:64]!r}; it has: {known}")

    async def domain_get_block_info(self, _client: Client, dom: Named, path: str, _flags: int) -> tuple[int, int, int]:
        one = self._context.find(dom)
        if not one.active:
            disk = _disk_of_definition(one, path)
            return await asyncio.to_thread(_sizes_of_file, disk)
        use = _disk(one, await self._asked(one), path)
        if use.allocated_bytes is None or use.capacity_bytes is None or use.physical_bytes is None:
            raise LibvirtError(Code.OPERATION_FAILED, f"domain '{one.name}': QEMU tells no size of {path[:256]!r}")
        return (use.allocated_bytes, use.capacity_bytes, use.physical_bytes)

    async def of_all(self, domains: Iterable[Domain]) -> Mapping[bytes, Usage]:
        """By uuid, several at a time; nothing of a guest that does not say it, as one that hangs."""
        asked = [one for one in domains if one.active and _may_have_devices(one)]
        found: dict[bytes, Usage] = {}

        async def ask(one: Domain) -> None:
            with contextlib.suppress(EdgeholdError, LibvirtError):
                found[one.uuid] = await self._asked(one)

        async with asyncio.TaskGroup() as group:
            for one in asked:
                group.create_task(ask(one))
        return found

    async def _running(self, dom: Named) -> tuple[Domain, Usage]:
        one = self._context.find(dom)
        must_be_active(one)
        return one, await self._asked(one)

    async def _asked(self, one: Domain) -> Usage:
        async with self._slots:
            return await self._context.mirror.vmand.usage(one.partition.id)


def interfaces(one: Domain, usage: Usage | None) -> Iterable[Param]:
    """The parameters ``net.`` of domain statistics."""
    nics = () if usage is None else usage.nics
    yield Param("net.count", UINT, len(one.current.plan.nics) if usage is None else len(nics))
    for number, use in enumerate(nics):
        yield Param(f"net.{number}.name", STRING, use.interface)
        for name, figure in _nic_figures(use).items():
            if figure is not None:
                yield Param(f"net.{number}.{name}", ULLONG, figure)


def blocks(one: Domain, usage: Usage | None) -> Iterable[Param]:
    """The parameters ``block.`` of domain statistics; without figures the names and paths of the definition."""
    uses = [DiskUse(path=disk.path) for disk in one.current.plan.disks] if usage is None else usage.disks
    yield Param("block.count", UINT, len(uses))
    for number, (name, use) in enumerate(zip(_targets(one, uses), uses, strict=True)):
        yield Param(f"block.{number}.name", STRING, name)
        yield Param(f"block.{number}.path", STRING, use.path)
        figures = {
            "rd.reqs": use.read_requests,
            "rd.bytes": use.read_bytes,
            "wr.reqs": use.written_requests,
            "wr.bytes": use.written_bytes,
            "fl.reqs": use.flushes,
            "allocation": use.allocated_bytes,
            "capacity": use.capacity_bytes,
            "physical": use.physical_bytes,
        }
        for what, figure in figures.items():
            if figure is not None:
                yield Param(f"block.{number}.{what}", ULLONG, figure)


def _nic_figures(use: NicUse) -> dict[str, int | None]:
    """In the order of virDomainInterfaceStats, by the names of domain statistics."""
    return {
        "rx.bytes": use.rx_bytes,
        "rx.pkts": use.rx_packets,
        "rx.errs": use.rx_errors,
        "rx.drop": use.rx_drops,
        "tx.bytes": use.tx_bytes,
        "tx.pkts": use.tx_packets,
        "tx.errs": use.tx_errors,
        "tx.drop": use.tx_drops,
    }


def _may_have_devices(one: Domain) -> bool:
    """A guest that was started by another tool has no kernel in its definition, and devices that are not in it."""
    plan = one.current.plan
    return bool(plan.disks or plan.nics or one.partition.taps or not plan.kernel)


def _targets(one: Domain, disks: Collection[object]) -> Sequence[str]:
    """The disks' names as written; where the guest has others than its definition, as a guest calls them."""
    names = one.current.targets
    return names if len(names) == len(disks) else [f"vd{chr(ord('a') + n)}" for n in range(len(disks))]


def _disk(one: Domain, usage: Usage, wanted: str) -> DiskUse:
    return usage.disks[_place(one, [use.path for use in usage.disks], wanted)]


def _disk_of_definition(one: Domain, wanted: str) -> Disk:
    disks = one.current.plan.disks
    return disks[_place(one, [disk.path for disk in disks], wanted)]


def _place(one: Domain, paths: Sequence[str], wanted: str) -> int:
    names = _targets(one, paths)
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        if wanted in {name, path}:
            return number
    known = ", ".join(names) or "none"
    raise LibvirtError(Code.INVALID_ARG, f"domain '{one.name}' has no disk {wanted[:256]!r}; it has: {known}")


def _sum(figures: Iterable[int | None]) -> int:
    known = [one for one in figures if one is not None]
    return sum(known) if known else _UNKNOWN


def _sizes_of_file(disk: Disk) -> tuple[int, int, int]:
    """Allocation, capacity and physical size of an image that no guest has.

    Raises:
        LibvirtError: OPERATION_FAILED; it is not there, not ours to open, or no image.
    """
    try:
        kind = os.stat(disk.path).st_mode  # noqa: PTH116 - a text as it is
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):  # opening a pipe would wait
            raise LibvirtError(Code.OPERATION_FAILED, f"{disk.path}: it is no file and no block device")
        fd = os.open(disk.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            found, physical = os.fstat(fd), os.lseek(fd, 0, os.SEEK_END)
            head = os.pread(fd, _QCOW2_SIZE.stop, 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise LibvirtError(
            Code.OPERATION_FAILED, f"{disk.path}: {error.strerror}; its sizes can't be known while no guest has it"
        ) from error
    capacity = physical
    if disk.format == "qcow2":
        if not head.startswith(_QCOW2) or len(head) < _QCOW2_SIZE.stop:
            raise LibvirtError(Code.OPERATION_FAILED, f"{disk.path}: it is no qcow2 image")
        capacity = int.from_bytes(head[_QCOW2_SIZE], "big")
    allocated = physical if stat.S_ISBLK(found.st_mode) else found.st_blocks * _BLOCK_BYTES
    return (allocated, capacity, physical)
