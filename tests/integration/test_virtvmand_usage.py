"""virsh's figures of a real guest's disks and network interface: what it did, and nothing while it hangs.

In a network of the test's own, with a bridge in which the guest's tap is.
"""

import asyncio
import fcntl
import os
import re
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edgehold.api.vmand import State
from edgehold.testing.capability import need_command, need_root
from edgehold.testing.daemons import private_directory
from edgehold.testing.network import in_own_network, make_bridge, need_taps
from edgehold.testing.partitions import PrivateVmand, private_vmand
from edgehold.testing.virtvmand import private_virtvmand
from tests.libvirt.guest import printed, type_until
from tests.libvirt.virsh import ANOTHER, CMDLINE, Virsh, definition, need_virsh, squeezed, until

BRIDGE = "ehbr0"
MAC = "52:54:00:00:00:01"
SHELL = f"{CMDLINE} edgehold.shell=ttyS0"
MIB = 1 << 20
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h
FRAME = b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + bytes(1000)
"""A broadcast of an experiment's own protocol (IEEE 802, 88B5)."""


def up(name: str) -> None:
    """Set an interface up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        ask = struct.pack("16s24s", name.encode(), b"")
        (flags,) = struct.unpack_from("H", fcntl.ioctl(control.fileno(), _SIOCGIFFLAGS, ask), 16)
        fcntl.ioctl(control.fileno(), _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | _IFF_UP))


def send(name: str, frame: bytes) -> None:
    """Out of an interface of this network."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((name, 0))
        wire.send(frame)


def devices(raw: Path, qcow2: Path) -> str:
    """Two disks and a network interface."""
    disks = (("raw", raw, "vda"), ("qcow2", qcow2, "vdc"))
    return "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{path}'/>"
        f"<target dev='{dev}' bus='virtio'/></disk>"
        for kind, path, dev in disks
    ) + (
        f"<interface type='bridge'><mac address='{MAC}'/><source bridge='{BRIDGE}'/><model type='virtio'/></interface>"
    )


def numbers(said: str) -> dict[str, int]:
    """``vda rd_req 3`` and ``Capacity: 3`` and ``block.0.rd.reqs=3`` as a table."""
    return {name: int(figure) for name, figure in re.findall(r"(\S+?)(?:=|:? )(-?\d+)$", said, re.MULTILINE)}


async def figures(virsh: Virsh, line: str, wanted: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """What a command says, as soon as it says what is wanted: a counter may come a moment after what it counts."""
    found: dict[str, int] = {}
    try:
        async with asyncio.timeout(30):
            while not wanted(found := numbers(await virsh.did(line))):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"virsh {line}: {found}")
    return found


async def look(vmand: PrivateVmand, virsh: Virsh, raw: Path, qcow2: Path) -> None:
    """A guest that writes a mebibyte, reads half of one, and hears of one frame."""
    assert numbers(await virsh.did("domblkinfo carries vda"))["Capacity"] == 2 * MIB
    assert numbers(await virsh.did("domblkinfo carries vdc"))["Capacity"] == 8 * MIB
    await virsh.did("start carries")
    await printed(vmand, "carries")
    tap = (await virsh.did("domiflist carries")).splitlines()[-1].split()[0]
    assert tap == "vm0-0"
    assert f"{tap} bridge {BRIDGE} virtio {MAC}" in await virsh.did("domiflist carries")
    before = {dev: numbers(await virsh.did(f"domblkstat carries {dev}")) for dev in ("vda", "vdc")}
    # The second disk is the guest's vdb. What is typed is echoed: only what is printed has the sum.
    work = "dd if=/dev/zero of=/dev/vda bs=65536 count=16 conv=fsync; dd if=/dev/vdb of=/dev/null bs=65536 count=8"
    await type_until(vmand, "carries", f"{work}; ip link set eth0 up; echo $((6 * 7))-did\n".encode(), "42-did")

    def more(dev: str, name: str) -> Callable[[dict[str, int]], bool]:
        return lambda found: found[name] - before[dev].get(name, 0) >= (MIB if dev == "vda" else MIB // 2)

    found = await figures(virsh, "domblkstat carries vda", more("vda", "wr_bytes"))
    assert found["wr_req"] > 0
    assert found["wr_bytes"] % MIB == 0  # once or, where the shell was typed at twice, more often
    assert (await figures(virsh, f"domblkstat carries {qcow2}", more("vdc", "rd_bytes")))["rd_req"] > 0
    both = numbers(await virsh.did("domblkstat carries"))
    assert both["wr_bytes"] >= MIB
    info = numbers(await virsh.did(f"domblkinfo carries {raw}"))
    assert (info["Capacity"], info["Physical"]) == (2 * MIB, 2 * MIB)
    assert MIB <= info["Allocation"] <= 2 * MIB
    assert numbers(await virsh.did("domblkinfo carries vdc"))["Physical"] < MIB

    was = numbers(await virsh.did(f"domifstat carries {tap}"))
    send(BRIDGE, FRAME)
    now = await figures(virsh, f"domifstat carries {MAC}", lambda one: one["rx_bytes"] >= was["rx_bytes"] + len(FRAME))
    assert now["rx_packets"] > was["rx_packets"]
    assert set(now) == {f"{way}_{what}" for way in ("rx", "tx") for what in ("bytes", "packets", "errs", "drop")}

    said = await virsh.did("domstats --block --interface carries")
    assert f"net.0.name={tap}" in said.split()
    assert {"block.0.name=vda", "block.1.name=vdc", f"block.1.path={qcow2}"} <= set(said.split())
    all_of_them = numbers(said)
    assert all_of_them["block.count"] == 2
    assert all_of_them["block.0.wr.bytes"] >= MIB
    assert all_of_them["block.0.fl.reqs"] >= 1
    assert (all_of_them["block.0.capacity"], all_of_them["block.1.capacity"]) == (2 * MIB, 8 * MIB)
    assert all_of_them["net.0.rx.bytes"] >= now["rx_bytes"]

    # They are the guest's since its process started, whoever was away meanwhile.
    await vmand.kill()
    await vmand.start()
    await until(virsh, "domstate carries", "^running$")
    assert numbers(await virsh.did("domblkstat carries vda"))["wr_bytes"] >= found["wr_bytes"]

    (pid,) = vmand.guests()
    os.kill(pid, signal.SIGSTOP)
    try:
        done = await virsh("domblkstat", "carries", "vda")
        assert (done.status, "did not answer to query-blockstats within 2 s" in squeezed(done.err)) == (1, True), done
        said = await virsh.did("domstats --block --interface carries")
        assert {"block.count=2", "block.0.name=vda", "net.count=1"} <= set(said.split())
        assert "block.0.rd.reqs" not in said
    finally:
        os.kill(pid, signal.SIGCONT)

    async with await vmand.client() as client:
        usage = await client.usage("carries")
        assert [use.path for use in usage.disks] == [str(raw), str(qcow2)]
        assert [(use.bridge, use.mac, use.interface) for use in usage.nics] == [(BRIDGE, MAC, tap)]
        await virsh.did("destroy carries")
        assert (await client.usage("carries")).disks == ()
        assert (await client.status("carries")).state is State.READY
    done = await virsh("domblkstat", "carries", "vda")
    assert (done.status, "not running" in squeezed(done.err)) == (1, True)


def own_network(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    in_own_network(lambda: asyncio.run(main()))


def test_what_a_guest_carries(image: tuple[Path, Path]) -> None:
    need_virsh()
    need_root()
    need_taps()
    if ANOTHER:
        pytest.skip("EDGEHOLD_VIRSH may be of another root, and the images are here")
    qemu_img = need_command("qemu-img", "qemu-utils")

    async def work() -> None:
        make_bridge(BRIDGE)
        up(BRIDGE)
        with private_directory("eh-lu-") as directory:
            raw, qcow2 = directory / "raw", directory / "qcow2"
            raw.write_bytes(bytes(2 * MIB))
            made = await asyncio.create_subprocess_exec(qemu_img, "create", "-q", "-f", "qcow2", str(qcow2), "8M")
            assert await made.wait() == 0
            async with (
                private_vmand(settings={"accelerator": "tcg", "bridges": [BRIDGE]}) as vmand,
                private_virtvmand(vmand) as daemon,
            ):
                virsh = Virsh(daemon=daemon, home=daemon.directory)
                (directory / "xml").write_text(
                    definition("carries", boot=image, cmdline=SHELL, devices=devices(raw, qcow2))
                )
                await virsh.did(f"define {directory / 'xml'}")
                await look(vmand, virsh, raw, qcow2)
                assert "Traceback" not in daemon.log_text()

    own_network(work)
