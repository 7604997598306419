"""What a guest's disks and network interfaces carry: asked of QEMU and of the host's kernel, and kept by nobody.

QEMU may have been taken over: what it says of a disk is believed as a number and nothing more; which disks there are,
the record knows.
"""

from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from edgehold.api.vmand import DiskUse, NicUse, Usage
from vmand.backend import links
from vmand.model import Record, tap_name

T = TypeVar("T")

_LIMIT_S = 2.0
"""Who asks for many guests must not wait for each that hangs as long as for one that is to do something."""

_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Ask(Protocol):
    """`Monitor.ask`: one command of QMP whose answer is of a kind."""

    async def __call__(
        self, command: str, kind: type[T], arguments: dict[str, object] | None = None, *, limit_s: float
    ) -> T: ...


class _Stats(msgspec.Struct, frozen=True):
    """Of BlockDeviceStats (qapi/block-core.json)."""

    rd_bytes: _Count
    rd_operations: _Count
    wr_bytes: _Count
    wr_operations: _Count
    flush_operations: _Count


class _BlockStats(msgspec.Struct, frozen=True, rename="kebab"):
    """Of BlockStats."""

    stats: _Stats
    node_name: str = ""


class _Image(msgspec.Struct, frozen=True, rename="kebab"):
    """Of ImageInfo."""

    virtual_size: _Count
    actual_size: _Count | None = None


class _Node(msgspec.Struct, frozen=True, rename="kebab"):
    """Of BlockDeviceInfo."""

    drv: str
    image: _Image
    node_name: str = ""


async def usage_of(ask: Ask, record: Record) -> Usage:
    """The devices of a guest that runs, in the order of its deploy.

    Raises:
        TimedOutError: QEMU does not answer.
        FailedError: it answers as no QEMU does.
    """
    stats: dict[str, _Stats] = {}
    nodes: dict[str, _Node] = {}
    if record.disks:
        told = await ask("query-blockstats", list[_BlockStats], limit_s=_LIMIT_S)
        stats = {one.node_name: one.stats for one in told}
        found = await ask("query-named-block-nodes", list[_Node], {"flat": True}, limit_s=_LIMIT_S)
        nodes = {one.node_name: one for one in found}
    return Usage(
        # The names are those of `devices.plug`.
        disks=tuple(
            _disk(path, stats.get(f"disk{n}"), nodes.get(f"disk{n}"), nodes.get(f"disk{n}-file"))
            for n, path in enumerate(record.disks)
        ),
        nics=tuple(
            _nic(nic.bridge, nic.mac, tap_name(record.slot, n), links.counters(tap_name(record.slot, n)))
            for n, nic in enumerate(record.nics)
        ),
    )


def _disk(path: str, stats: _Stats | None, node: _Node | None, file: _Node | None) -> DiskUse:
    use = DiskUse(path=path)
    if stats is not None:
        use = replace(
            use,
            read_bytes=stats.rd_bytes,
            read_requests=stats.rd_operations,
            written_bytes=stats.wr_bytes,
            written_requests=stats.wr_operations,
            flushes=stats.flush_operations,
        )
    if node is not None:
        use = replace(use, capacity_bytes=node.image.virtual_size)
    if file is None:
        return use
    physical = file.image.virtual_size
    # The kernel counts no blocks of a device (stat(2)), so QEMU says 0 of one.
    allocated = physical if file.drv == "host_device" else file.image.actual_size
    return replace(use, allocated_bytes=allocated, physical_bytes=physical)


def _nic(bridge: str, mac: str, interface: str, host: links.Counters | None) -> NicUse:
    """What the host sends into a tap is what the guest receives."""
    if host is None:
        return NicUse(bridge=bridge, mac=mac, interface=interface)
    return NicUse(
        bridge=bridge,
        mac=mac,
        interface=interface,
        rx_bytes=host.tx_bytes,
        rx_packets=host.tx_packets,
        rx_errors=host.tx_errors,
        rx_drops=host.tx_dropped,
        tx_bytes=host.rx_bytes,
        tx_packets=host.rx_packets,
        tx_errors=host.rx_errors,
        tx_drops=host.rx_dropped,
    )
