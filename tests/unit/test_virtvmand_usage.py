"""What libvirt's clients are told of disks and network interfaces: names, figures, and what nobody knows."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from edgehold.api.vmand import DiskUse, Nic, NicUse, Usage
from edgehold.errors import TimedOutError
from tests.unit.virtvmand_house import House, house

INVALID_ARG, FAILED, INVALID, TIMEOUT = 8, 9, 55, 68
MAC = "52:54:00:00:00:01"
NIC = Nic(bridge="br0", mac=MAC)
OTHER = "11111111-edaf-9455-926a-d65c16db1809"
BLOCK, INTERFACE = 32, 16
QCOW2 = b"QFI\xfb\0\0\0\3" + bytes(16) + (1 << 30).to_bytes(8, "big") + bytes(512 - 32)


def disk(path: Path, dev: str, kind: str = "raw") -> str:
    return (
        f"<disk type='file'><driver name='qemu' type='{kind}'/><source file='{path}'/>"
        f"<target dev='{dev}' bus='virtio'/><readonly/></disk>"
    )


@pytest_asyncio.fixture
async def one(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 1024)
    return path


@pytest.fixture
def second(tmp_path: Path) -> Path:
    path = tmp_path / "second"
    path.write_bytes(bytes(2048))
    return path


async def started(one: House, image: Path, second: Path, **options: Any) -> Any:
    """A guest whose first disk is called vdb, and whose second vdd."""
    dom = await one.define(rest=disk(second, "vdd") + disk(image, "vdb"), **options)
    one.backend.nics = (NIC,)
    await one.call("domain_create", dom)
    partition = one.domain(options.get("name", "web")).partition.id
    one.backend.usages[partition] = Usage(
        disks=(
            DiskUse(path=str(image), read_bytes=512, read_requests=1, written_bytes=0, written_requests=0, flushes=2,
                    capacity_bytes=1024, allocated_bytes=4096, physical_bytes=1024),
            DiskUse(path=str(second), read_bytes=100, read_requests=10),
        ),
        nics=(NicUse(bridge="br0", mac=MAC, interface=one.domain().partition.taps[0], rx_bytes=1, rx_packets=2,
                     rx_errors=3, rx_drops=4, tx_bytes=5, tx_packets=6, tx_errors=7),),
    )  # fmt: skip
    return dom


async def test_a_disk_by_its_name_and_by_its_path(one: House, image: Path, second: Path) -> None:
    dom = await started(one, image, second)
    for name in ("vdb", str(image)):
        assert await one.call("domain_block_stats", dom, name) == (1, 512, 0, 0, -1)
        assert await one.call("domain_get_block_info", dom, name, 0) == (4096, 1024, 1024)
    assert await one.call("domain_block_stats", dom, "vdd") == (10, 100, -1, -1, -1)
    assert await one.call("domain_block_stats", dom, "") == (11, 612, 0, 0, -1)  # all of them
    code, text = await one.refused("domain_get_block_info", dom, "vdd", 0)
    assert (code, "tells no size" in text) == (FAILED, True)
    for call in (("domain_block_stats", dom, "vda"), ("domain_get_block_info", dom, "vda", 0)):
        assert await one.refused(*call) == (INVALID_ARG, "domain 'web' has no disk 'vda'; it has: vdb, vdd")


async def test_an_interface_by_its_tap_and_by_its_address(one: House, image: Path, second: Path) -> None:
    dom = await started(one, image, second)
    for name in ("vm0-0", MAC, MAC.upper()):
        assert await one.call("domain_interface_stats", dom, name) == (1, 2, 3, 4, 5, 6, 7, -1)
    code, text = await one.refused("domain_interface_stats", dom, "vnet0")
    assert (code, text) == (INVALID_ARG, f"domain 'web' has no interface 'vnet0'; it has: vm0-0 ({MAC})")


PLAIN = f"<interface type='bridge'><mac address='{MAC}'/><source bridge='br0'/></interface>"


@pytest.mark.parametrize(
    ("rest", "shown"),
    [
        (PLAIN, ["<target dev='vm0-0'/>"]),
        (PLAIN.replace("</int", "<target dev='tap7' managed='no'/></int"), ["<target dev='vm0-0' managed='no'/>"]),
        (PLAIN + PLAIN.replace(":01'", ":02'"), []),  # the guest has one, so which is it?
    ],
)
async def test_the_live_view_names_the_tap(one: House, rest: str, shown: list[str]) -> None:
    one.backend.nics = (NIC,)
    dom = await one.define()
    await one.call("domain_create", dom)
    partition = one.domain().partition.id
    await one.mirror.vmand.annotate(partition, {"libvirt.live": one.xml(rest=rest)})
    await one.mirror.refresh(partition)
    assert re.findall("<target [^>]*>", await one.call("domain_get_xml_desc", dom, 0)) == shown
    await one.call("domain_destroy", dom)
    assert "vm0-0" not in await one.call("domain_get_xml_desc", dom, 0)


def figures(record: Any) -> dict[str, Any]:
    return {param.field: param.value for param in record[1]}


async def test_figures_of_many_in_one_call(one: House, image: Path, second: Path) -> None:
    await started(one, image, second)
    await one.define("off", uuid=OTHER, rest=disk(image, "vdc"))
    web, off = map(figures, await one.call("connect_get_all_domain_stats", [], BLOCK | INTERFACE, 0))
    assert web == {
        "net.count": 1, "net.0.name": "vm0-0",
        "net.0.rx.bytes": 1, "net.0.rx.pkts": 2, "net.0.rx.errs": 3, "net.0.rx.drop": 4,
        "net.0.tx.bytes": 5, "net.0.tx.pkts": 6, "net.0.tx.errs": 7,
        "block.count": 2,
        "block.0.name": "vdb", "block.0.path": str(image), "block.0.rd.reqs": 1, "block.0.rd.bytes": 512,
        "block.0.wr.reqs": 0, "block.0.wr.bytes": 0, "block.0.fl.reqs": 2,
        "block.0.allocation": 4096, "block.0.capacity": 1024, "block.0.physical": 1024,
        "block.1.name": "vdd", "block.1.path": str(second), "block.1.rd.reqs": 10, "block.1.rd.bytes": 100,
    }  # fmt: skip
    assert off == {"net.count": 0, "block.count": 1, "block.0.name": "vdc", "block.0.path": str(image)}


async def test_one_that_hangs_takes_nothing_from_the_others(one: House, image: Path, second: Path) -> None:
    dom = await started(one, image, second)
    read, asked, let_go = one.backend.usage, asyncio.Event(), asyncio.Event()

    async def hang(record: Any) -> Usage:
        if record.name == "hangs":
            asked.set()
            await let_go.wait()
            raise TimedOutError("QEMU hangs")
        return await read(record)

    hangs = await one.define("hangs", uuid=OTHER, rest=disk(image, "vda"))
    await one.call("domain_create", hangs)
    one.backend.usage = hang  # type: ignore[method-assign]
    all_of_them = asyncio.create_task(one.call("connect_get_all_domain_stats", [], BLOCK, 0))
    await asked.wait()
    assert await one.call("domain_block_stats", dom, "vdb") == (1, 512, 0, 0, -1)
    let_go.set()
    web, other = map(figures, await all_of_them)
    assert web["block.0.rd.bytes"] == 512
    assert other == {"block.count": 1, "block.0.name": "vda", "block.0.path": str(image)}
    assert (await one.refused("domain_block_stats", hangs, "vda"))[0] == TIMEOUT


async def test_a_guest_of_another_tool_has_disks_that_its_definition_does_not_know(one: House, image: Path) -> None:
    made = await one.mirror.vmand.create_partition(cores=1, memsize_gb=0.0625, name="byhand")
    await one.mirror.vmand.deploy(made, kernel=one.kernel)
    one.backend.usages[made] = Usage(disks=(DiskUse(path=str(image), read_bytes=3),))
    (record,) = await one.call("connect_get_all_domain_stats", [], BLOCK, 0)
    assert figures(record) == {
        "block.count": 1, "block.0.name": "vda", "block.0.path": str(image), "block.0.rd.bytes": 3,
    }  # fmt: skip
    dom = await one.call("domain_lookup_by_name", "byhand")
    assert await one.call("domain_block_stats", dom, "vda") == (-1, 3, -1, -1, -1)


async def test_sizes_while_no_guest_has_the_image(one: House, tmp_path: Path, image: Path) -> None:
    (tmp_path / "qcow2").write_bytes(QCOW2)
    (tmp_path / "short").write_bytes(b"QFI\xfb")
    names = {"vda": image, "vdb": tmp_path / "qcow2", "vdc": tmp_path / "none", "vdd": Path("/dev/null")}
    rest = "".join(disk(path, dev, "qcow2" if dev == "vdb" else "raw") for dev, path in names.items())
    dom = await one.define(rest=rest + disk(tmp_path / "short", "vde", "qcow2"))
    allocated = image.stat().st_blocks * 512  # noqa: ASYNC240 - it does not wait
    assert await one.call("domain_get_block_info", dom, "vda", 0) == (allocated, 1024, 1024)
    assert (await one.call("domain_get_block_info", dom, "vdb", 0))[1:] == (1 << 30, 512)
    for name, why in (("vdc", "No such file"), ("vdd", "no file and no block device"), ("vde", "no qcow2 image")):
        code, text = await one.refused("domain_get_block_info", dom, name, 0)
        assert (code, why in text) == (FAILED, True), text
    assert (await one.refused("domain_block_stats", dom, "vda"))[0] == INVALID
