"""What a guest finds in itself of the devices that it was deployed with, and what is on the host of what it does."""

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgehold.api.vmand import Disk, Mode, Nic, State, VmandClient
from edgehold.errors import BadRequestError, BadStateError, DeniedError, FailedError, UnsupportedError
from edgehold.testing.capability import guest_image, need_command, need_root
from edgehold.testing.daemons import private_directory
from edgehold.testing.network import in_own_network, interfaces, make_bridge, need_taps
from edgehold.testing.partitions import private_vmand
from vmand.backend import devices
from vmand.backend.command import AGENT, CONSOLE, MONITOR, Files, Machine, MemoryBacking, qemu_argv
from vmand.backend.qmp import Monitor
from vmand.model import Images, OpenDisk, OpenFile, Record

REPO = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
BRIDGE = "ehbr0"
LIST = "cd /sys/block; for d in vd?; do echo $d $(cat $d/serial) $(cat $d/ro $d/size); done"
SHELL = "quiet no_timer_check tsc=reliable console=ttyS0 edgehold.shell=ttyS0"

BOOT_S = 90.0
ANSWER_S = 60.0


class Terminal:
    """A guest's shell on the console's socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._seen = ""

    async def expect(self, pattern: str, *, timeout_s: float = ANSWER_S) -> re.Match[str]:
        """Read until it is there; what stands before it is forgotten."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := re.search(pattern, self._seen)):
                    data = await self._reader.read(65536)
                    assert data, f"the console ended:\n{self._seen}"
                    self._seen += data.decode(errors="replace")
        except TimeoutError:
            pytest.fail(f"no {pattern!r} on the console:\n{self._seen}")
        self._seen = self._seen[found.end() :]
        return found

    async def run(self, command: str) -> str:
        """One command of the guest's shell; its output. What is typed is echoed and does not look like the end."""
        self._writer.write(f"echo BEG''IN; {command}; echo E''ND\n".encode())
        found = await self.expect(r"BEGIN\r?\n((?:.|\n)*?)END\r?\n")
        return found[1].replace("\r", "").strip()


def record_of(**rest: Any) -> Record:
    given: dict[str, Any] = {"id": 1, "uuid": str(uuid.uuid4()), "run": str(uuid.uuid4()), "slot": 6, "name": "n"}
    return Record(**(given | {"mode": Mode.SHARED, "cores": 1, "memory_bytes": 256 << 20} | rest))


def images_of(**rest: Any) -> Images:
    given: dict[str, Any] = {"kernel": OpenFile(fd=-1, name="given by its path here"), "cmdline": SHELL}
    return Images(**(given | rest))


def started(argv: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL)


def tried(*argv: str) -> tuple[int, str]:
    """A program's status and what it said."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return done.returncode, (done.stdout + done.stderr).strip()


@contextlib.asynccontextmanager
async def qemu(directory: Path, record: Record, images: Images) -> AsyncIterator[tuple[Monitor, Terminal]]:
    """A QEMU of the test's own, whose guest does not run yet; at the end it is killed."""
    kernel, initrd = guest_image(REPO)
    program = need_command(QEMU, "qemu-system-x86")
    argv = qemu_argv(
        Machine(qemu=program, arch="x86_64", accelerator="tcg"),
        record,
        images,
        files=Files(kernel=kernel, initrd=initrd),
        memory=MemoryBacking(path=directory / "memory"),
        directory=directory,
    )
    process = started(argv)
    monitor = Monitor(directory / MONITOR, who="the test", timeout_s=30, on_event=lambda _name: None)
    try:
        await monitor.wait_connected(BOOT_S)
        reader, writer = await asyncio.open_unix_connection(directory / CONSOLE)
        try:
            yield monitor, Terminal(reader, writer)
        finally:
            writer.close()
    finally:
        process.kill()
        process.wait()
        monitor.give_up()
        await monitor.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    need_root()
    with private_directory() as directory:
        yield directory


def image(program: str, *arguments: str) -> None:
    """Run qemu-img."""
    status, said = tried(program, *arguments)
    assert status == 0, said


def own_network(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    in_own_network(lambda: asyncio.run(main()))


async def deployed(client: VmandClient, cmdline: str = SHELL, *, arch: str = "amd64", **rest: Any) -> int:
    """A partition whose guest runs."""
    kernel, initrd = guest_image(REPO, arch)
    partition = await client.create_partition(cores=1, memsize_gb=0.25, mode=Mode.SHARED)
    await client.deploy(partition, kernel=kernel, initrd=initrd, cmdline=cmdline, **rest)
    return partition


@contextlib.asynccontextmanager
async def attached(client: VmandClient, partition: int) -> AsyncIterator[Terminal]:
    """The guest's console."""
    console = await client.attach_console(partition)
    console.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=console)
    try:
        yield Terminal(reader, writer)
    finally:
        writer.close()


def test_a_guest_has_what_it_was_deployed_with(place: Path) -> None:
    need_taps()
    program = need_command("qemu-img", "qemu-utils")
    raw, qcow2, fixed = (place / name for name in ("raw", "qcow2", "fixed"))
    raw.write_bytes(bytes(1 << 20))
    fixed.write_bytes(b"fixed".ljust(1 << 20, b"\0"))
    image(program, "create", "-q", "-f", "qcow2", str(qcow2), "8M")
    wanted = (
        Disk(path=str(raw)),
        Disk(path=str(qcow2), format="qcow2"),
        Disk(path=str(fixed), readonly=True),
    )
    nics = (Nic(bridge=BRIDGE), Nic(bridge=BRIDGE, mac="0A:00:00:00:00:01"))

    async def look(terminal: Terminal) -> str:
        """The first interface's address."""
        await terminal.expect("edgehold-guest up", timeout_s=BOOT_S)
        await terminal.expect("guest# ")
        found = await terminal.run(
            "cd /sys/block; for d in vd?; do echo $d $(cat $d/serial) $(cat $d/ro $d/size); done"
        )
        assert found.splitlines() == ["vda disk0 0 2048", "vdb disk1 0 16384", "vdc disk2 1 2048"]
        made = (await terminal.run("cd /sys/class/net; cat eth0/mtu eth1/mtu eth1/address eth0/address")).splitlines()
        assert made[:3] == ["1400", "1400", "0a:00:00:00:00:01"]
        return made[3]

    async def work() -> None:
        make_bridge(BRIDGE, mtu=1400)
        async with private_vmand(settings={"bridges": [BRIDGE]}) as vmand:
            async with await vmand.client() as client:
                partition = await deployed(client, disks=wanted, nics=nics, agent=True)
                async with attached(client, partition) as terminal:
                    address = await look(terminal)
                    assert address.startswith("02:")
                    assert await terminal.run("cat /sys/class/virtio-ports/*/name") == "org.qemu.guest_agent.0"
                    for device in ("vda", "vdb"):
                        await terminal.run(
                            f"echo written to {device} | dd of=/dev/{device} bs=512 seek=7 conv=sync,fsync"
                        )
                    said = await terminal.run("echo no | dd of=/dev/vdc conv=fsync 2>&1; echo status=$?")
                    assert "status=1" in said
                    await client.reboot(partition)
                    assert await look(terminal) == address
                    said = await terminal.run("dd if=/dev/vdb bs=512 skip=7 count=1 2>/dev/null | head -n 1")
                    assert said == "written to vdb"
            assert (vmand.runtime / "p" / str(partition) / AGENT).is_socket()
            assert interfaces() == {"lo", BRIDGE, "vm0-0", "vm0-1"}
            # Its own tools look for its own locks, which are where ours is.
            assert "Failed to lock" in tried(program, "resize", "-f", "raw", str(raw), "2M")[1]
            await vmand.kill()
            await vmand.start()
            async with await vmand.client() as client:
                for disk in wanted:
                    with pytest.raises(BadStateError, match=r"disks\[0\]: .* is in use by another guest"):
                        await deployed(client, disks=[Disk(path=disk.path, format=disk.format)])
                await client.shutdown(partition, force=True)
                assert interfaces() == {"lo", BRIDGE}
                await deployed(client, disks=wanted, nics=nics)  # all of it is free again

    own_network(work)
    assert raw.read_bytes()[7 * 512 :].startswith(b"written to vda\n")
    image(program, "convert", "-O", "raw", str(qcow2), str(place / "flat"))
    assert (place / "flat").read_bytes()[7 * 512 :].startswith(b"written to vdb\n")
    assert fixed.read_bytes() == b"fixed".ljust(1 << 20, b"\0")


async def test_what_a_host_can_not_give_changes_nothing(place: Path) -> None:
    disk = place / "disk"
    disk.write_bytes(bytes(512))
    async with private_vmand(settings={"bridges": ["ehnone"], "limits": {"disks": 1}}) as vmand:
        async with await vmand.client() as client:
            for rest, kind, why in (
                ({"nics": [Nic(bridge="br0")]}, DeniedError, r"nics\[0\]: the bridge 'br0' is not allowed"),
                ({"nics": [Nic(bridge="ehnone")]}, UnsupportedError, r"nics\[0\]: there is no bridge ehnone"),
                ({"disks": [Disk(path="disk")]}, BadRequestError, r"disks\[0\]: .*not an absolute path"),
                ({"disks": [Disk(path=str(disk))] * 2}, BadRequestError, r"disks: 2 are more than the 1"),
                ({"disks": [Disk(path=str(disk), format="qcow2")]}, BadRequestError, r"disks\[0\]: .*no qcow2 image"),
            ):
                with pytest.raises(kind, match=why):
                    await deployed(client, **rest)
            found = await client.list_partitions()
            assert [(one.state, one.boot_count) for one in found] == [(State.READY, 0)] * 5
        assert vmand.guests() == []


async def test_the_console_may_be_a_virtio_console() -> None:
    need_root()
    async with private_vmand() as vmand, await vmand.client() as client:
        cmdline = "quiet no_timer_check tsc=reliable console=ttyS0 console=hvc0"
        partition = await deployed(client, cmdline, agent=True)
        async with attached(client, partition) as terminal:
            await terminal.expect("guest# ", timeout_s=BOOT_S)
            found = await terminal.run("tty; cat /sys/class/tty/console/active /sys/class/virtio-ports/*/name")
            assert found.splitlines() == ["/dev/hvc0", "ttyS0 hvc0", "org.qemu.guest_agent.0"]


async def test_an_arm64_guest_has_its_disks_in_order(place: Path) -> None:
    """There the guest's kernel itself powers up what is plugged in while it runs; these were there before."""
    need_command("qemu-system-aarch64", "qemu-system-arm")
    wanted = [Disk(path=str(place / f"disk{n}"), readonly=n == 2) for n in range(4)]
    for n in range(4):
        (place / f"disk{n}").write_bytes(bytes((n + 1) << 20))
    async with private_vmand() as vmand, await vmand.client() as client:
        partition = await deployed(client, "quiet edgehold.shell=ttyAMA0", arch="arm64", disks=wanted, agent=True)
        async with attached(client, partition) as terminal:
            await terminal.expect("guest# ", timeout_s=BOOT_S)
            said = await terminal.run(LIST)
            expected = [f"vd{'abcd'[n]} disk{n} {int(n == 2)} {(n + 1) * 2048}" for n in range(4)]
            assert said.splitlines() == expected
            assert await terminal.run("dmesg | grep -c 'Attention button'") == "0"
            assert await terminal.run("cat /sys/class/virtio-ports/*/name") == "org.qemu.guest_agent.0"


async def test_a_guest_answers_at_its_vsock_address() -> None:
    need_root()
    if not os.path.exists(devices.VHOST_VSOCK):  # noqa: ASYNC240, PTH110 - a constant
        pytest.skip(f"no {devices.VHOST_VSOCK}: this host's kernel has no vhost_vsock")
    async with private_vmand() as vmand, await vmand.client() as client:
        partition = await deployed(client, vsock=True)
        cid = (await client.status(partition)).vsock_cid
        assert cid == devices.FIRST_CID
        async with attached(client, partition) as terminal:
            await terminal.expect("guest# ", timeout_s=BOOT_S)
            found = await terminal.run("cat /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*/device")
            assert found == "0x0013"
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as caller:
            caller.settimeout(ANSWER_S)
            with pytest.raises(ConnectionResetError):  # by the guest's kernel: nobody listens there
                caller.connect((cid, 1234))


async def test_block_devices_of_the_host(place: Path) -> None:
    """A loop device stands for a partition or a logical volume."""
    losetup = need_command("losetup", "mount")
    backing = place / "backing"
    backing.write_bytes(bytes(1 << 20))
    status, device = tried(losetup, "--find", "--show", str(backing))
    if status:
        pytest.skip(f"this host gives no loop device: {device}")
    try:
        wanted = Disk(path=device)
        async with private_vmand() as vmand, await vmand.client() as client:
            partition = await deployed(client, disks=[wanted])
            async with attached(client, partition) as terminal:
                await terminal.expect("guest# ", timeout_s=BOOT_S)
                await terminal.run("echo written to vda | dd of=/dev/vda bs=512 seek=7 conv=sync,fsync")
            with pytest.raises(BadStateError, match="is in use"):
                await deployed(client, disks=[wanted])
    finally:
        assert tried(losetup, "--detach", device) == (0, "")
    assert backing.read_bytes()[7 * 512 :].startswith(b"written to vda\n")


async def test_an_image_that_changed_after_its_check_opens_no_further_file(place: Path) -> None:
    """Whoever may write it can do that until QEMU has opened it."""
    program = need_command("qemu-img", "qemu-utils")
    secret, backed, split = (place / name for name in ("secret", "backed", "split"))
    secret.write_bytes(b"secret".ljust(1 << 20, b"\0"))
    image(program, "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(backed))
    image(program, "create", "-q", "-f", "qcow2", "-o", f"data_file={place / 'data'}", str(split), "1M")

    def opened(stack: contextlib.ExitStack, path: Path) -> OpenDisk:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return OpenDisk(file=OpenFile(fd=fd, name=str(path)), format="qcow2", readonly=False)

    with contextlib.ExitStack() as stack:
        good = images_of(disks=(opened(stack, backed),))
        async with qemu(place, record_of(), good) as (monitor, terminal):
            await devices.plug(monitor.call, record_of(), good)
            await monitor.call("cont")
            await terminal.expect("guest# ", timeout_s=BOOT_S)
            assert "secret" not in await terminal.run("head -c 6 /dev/vda")
        bad = images_of(disks=(opened(stack, split),))
        async with qemu(place, record_of(), bad) as (monitor, _terminal):
            with pytest.raises(FailedError, match="an image names a further file since it was checked"):
                await devices.plug(monitor.call, record_of(), bad)


async def test_what_qemu_refuses_is_an_error_of_ours(place: Path) -> None:
    path = place / "disk"
    path.write_bytes(b"no image")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        images = images_of(disks=(OpenDisk(file=OpenFile(fd=fd, name="d"), format="qcow2", readonly=False),))
        async with qemu(place, record_of(), images) as (monitor, _terminal):
            with pytest.raises(FailedError, match=r"QEMU of the test refused blockdev-add: .*qcow2"):
                await devices.plug(monitor.call, record_of(), images)
    finally:
        os.close(fd)
