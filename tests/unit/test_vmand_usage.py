"""What vmand makes of QEMU's and the kernel's figures of a guest's devices."""

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgehold.api.vmand import DiskUse, Mode, Nic, NicUse, State, Usage
from edgehold.errors import TimedOutError, UnsupportedError
from tests.unit.vmand_fake import Daemon
from vmand import cli_show
from vmand.backend import Trait, links
from vmand.backend.usage import usage_of
from vmand.model import Record

NIC = Nic(bridge="br0", mac="02:00:00:00:00:01")
RECORD = Record(
    id=7, uuid="5b2f0c1e-0000-4000-8000-000000000001", name="n", mode=Mode.SHARED, cores=1, memory_bytes=1 << 20,
    slot=5, state=State.DEPLOYED, disks=("/a.raw", "/b.qcow2", "/dev/sdb"), nics=(NIC,),
)  # fmt: skip
HOST = links.Counters(
    rx_packets=1, tx_packets=2, rx_bytes=3, tx_bytes=4, rx_errors=5, tx_errors=6, rx_dropped=7, tx_dropped=8
)


def stats(name: str, *, read: int = 0) -> dict[str, Any]:
    """As QEMU 7.2 says it, shortened."""
    figures = {"rd_bytes": read, "rd_operations": 2, "wr_bytes": 3, "wr_operations": 4, "flush_operations": 5}
    return {"device": "", "node-name": name, "stats": {**figures, "wr_highest_offset": 9}, "parent": {"stats": {}}}


def node(name: str, size: int, *, drv: str = "raw", taken: int | None = None) -> dict[str, Any]:
    image = {"virtual-size": size, "filename": "/dev/fdset/0", "format": drv}
    return {"node-name": name, "drv": drv, "image": image if taken is None else {**image, "actual-size": taken}}


ANSWERS: dict[str, Any] = {
    "query-blockstats": [stats("disk0", read=1), stats("disk1"), stats("other")],
    "query-named-block-nodes": [
        node("disk0", 1024), node("disk0-file", 1024, drv="file", taken=512),
        node("disk1", 8192, drv="qcow2", taken=4096), node("disk1-file", 2048, drv="file", taken=4096),
        node("disk2", 100), node("disk2-file", 100, drv="host_device", taken=0),
    ],
}  # fmt: skip


class Qemu:
    """Answers as `Monitor.ask` does."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers
        self.asked: list[tuple[str, dict[str, object] | None]] = []

    async def ask(self, command: str, kind: Any, arguments: dict[str, object] | None = None, *, limit_s: float) -> Any:
        assert 0 < limit_s <= 2
        self.asked.append((command, arguments))
        return msgspec.convert(self._answers[command], kind)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "counters", lambda name: HOST if name == "vm5-0" else None)


async def test_disks_and_interfaces_in_the_order_of_the_deploy() -> None:
    qemu = Qemu(ANSWERS)
    found = await usage_of(qemu.ask, RECORD)
    assert qemu.asked == [("query-blockstats", None), ("query-named-block-nodes", {"flat": True})]
    counted = {"read_requests": 2, "written_bytes": 3, "written_requests": 4, "flushes": 5}
    assert found.disks == (
        DiskUse(path="/a.raw", read_bytes=1, **counted, capacity_bytes=1024, allocated_bytes=512, physical_bytes=1024),
        DiskUse(
            path="/b.qcow2", read_bytes=0, **counted, capacity_bytes=8192, allocated_bytes=4096, physical_bytes=2048
        ),
        DiskUse(path="/dev/sdb", capacity_bytes=100, allocated_bytes=100, physical_bytes=100),
    )
    (nic,) = found.nics
    assert (nic.bridge, nic.mac, nic.interface) == ("br0", "02:00:00:00:00:01", "vm5-0")
    # What the host sent into the tap is what the guest received.
    assert (nic.rx_packets, nic.rx_bytes, nic.rx_errors, nic.rx_drops) == (2, 4, 6, 8)
    assert (nic.tx_packets, nic.tx_bytes, nic.tx_errors, nic.tx_drops) == (1, 3, 5, 7)


async def test_what_is_not_told_is_absent_and_not_zero() -> None:
    nothing = Qemu({"query-blockstats": [], "query-named-block-nodes": []})
    record = msgspec.structs.replace(RECORD, slot=6)
    found = await usage_of(nothing.ask, record)
    assert found.disks == tuple(DiskUse(path=path) for path in record.disks)
    assert found.nics == (NicUse(bridge="br0", mac="02:00:00:00:00:01", interface="vm6-0"),)


async def test_a_guest_without_disks_is_not_asked() -> None:
    qemu = Qemu({})
    assert await usage_of(qemu.ask, msgspec.structs.replace(RECORD, disks=(), nics=())) == Usage()
    assert qemu.asked == []


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("query-blockstats", {}),
        ("query-blockstats", [{"node-name": "disk0"}]),
        ("query-blockstats", [stats("disk0", read=-1)]),
        ("query-blockstats", [stats("disk0", read=2**63)]),
        ("query-named-block-nodes", [{"node-name": "disk0", "drv": "raw", "image": {}}]),
        ("query-named-block-nodes", [node("disk0", -1)]),
    ],
)
async def test_figures_that_no_qemu_gives(command: str, answer: Any) -> None:
    with pytest.raises(msgspec.ValidationError):  # `Monitor.ask` makes a refusal of it
        await usage_of(Qemu(ANSWERS | {command: answer}).ask, RECORD)


def link(*attributes: tuple[int, bytes], kind: int = 16) -> bytes:
    """An answer of the kernel's."""
    body = bytes(16)
    for number, value in attributes:
        body += struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


def test_the_kernels_answer() -> None:
    whole = link((3, b"vm5-0\0"), (23, struct.pack("=25Q", *range(1, 26))), (99, b"x"))
    assert links.parsed(whole) == links.Counters(*range(1, 9))
    assert links.parsed(link((3, b"vm5-0\0"))) is None
    assert links.parsed(link((23, bytes(200)), kind=2)) is None
    assert links.parsed(link((23, bytes(10)))) is None
    assert links.parsed(struct.pack("=IHHII", 40, 16, 0, 1, 0) + bytes(24)) is None  # an attribute of no length
    for end in range(len(whole)):
        assert links.parsed(whole[:end]) in {None, links.Counters(*range(1, 9))}


def test_the_kernel_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = links.counters("lo")
    assert found is not None
    assert found.rx_bytes == found.tx_bytes >= 0
    assert links.counters("eh-no-such") is None
    assert links.counters("x" * 100) is None


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    one = Daemon(tmp_path)
    await one.start()
    yield one
    await one.stop()
    assert one.faults == 0


async def test_only_a_guest_that_is_there_is_asked(daemon: Daemon) -> None:
    one = await daemon.make(State.DEPLOYED)
    use = Usage(disks=(DiskUse(path="/a", read_bytes=1),))
    daemon.backend.usages[one] = use
    assert await daemon.service.usage(one) == use
    daemon.backend.fail["usage"] = TimedOutError("QEMU hangs")
    with pytest.raises(TimedOutError, match="QEMU hangs"):
        await daemon.service.usage(one)
    await daemon.service.shutdown(one, force=True)
    assert await daemon.service.usage(one) == Usage()
    daemon.backend.traits -= {Trait.VIRTIO}
    with pytest.raises(UnsupportedError, match="usage: not supported on this back end"):
        await daemon.service.usage(one)


def test_taps_come_and_go_with_the_guest() -> None:
    assert RECORD.public().taps == ("vm5-0",)
    for state in (State.READY, State.FAILED):
        assert RECORD.at_rest(state).public().taps == ()


def test_people_see_a_column_for_each_device() -> None:
    assert cli_show.usage(Usage()) == "no disks and no network interfaces"
    disks = (DiskUse(path="/a", read_bytes=1), DiskUse(path="/b\x1b[2J"))
    nics = (NicUse(bridge="br0", mac="02:00:00:00:00:01", interface="vm5-0", rx_bytes=0),)
    told = cli_show.usage(Usage(disks=disks, nics=nics)).splitlines()
    assert told[0].split() == ["DISK", "0", "1"]
    assert told[1].split() == ["path", "/a", "/b", "[2J"]
    assert told[2].split() == ["read_bytes", "1", "-"]
    assert ["rx_bytes", "0"] in [line.split() for line in told]
