"""What QEMU is asked for, in which order, and that no descriptor of ours stays open whatever fails."""

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgehold.api.vmand import Mode, Nic
from edgehold.errors import FailedError, UnavailableError, UnsupportedError
from vmand.backend import devices, qmp, tap
from vmand.backend.command import ports
from vmand.model import Images, OpenDisk, OpenFile, Record

RECORD = Record(
    id=7, uuid="5b2f0c1e-0000-4000-8000-000000000001", name="n", mode=Mode.SHARED, cores=1, memory_bytes=1 << 20, slot=5
)
NIC = Nic(bridge="br0")


class Qemu:
    """Takes commands as a monitor does; says yes, or fails at one."""

    def __init__(self, *, fail_at: str = "", nodes: tuple[str, ...] = ()) -> None:
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.given: dict[str, os.stat_result] = {}
        self._fail_at = fail_at
        self._nodes = [{"node-name": one} for one in nodes]

    async def call(
        self, command: str, arguments: dict[str, object] | None = None, *, fd: int | None = None, limit_s: float = 1
    ) -> Any:
        del limit_s
        arguments = arguments or {}
        assert (fd is not None) is (command in {"add-fd", "getfd"})
        if fd is not None:
            self.given[str(arguments.get("fdname", arguments.get("fdset-id")))] = os.fstat(fd)
        self.asked.append((command, arguments))
        if command == self._fail_at:
            raise FailedError("no")
        return self._nodes if command == "query-named-block-nodes" else {}


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) <= before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., OpenDisk]]:
    fds: list[int] = []

    def make(image_format: str = "raw", *, readonly: bool = False) -> OpenDisk:
        fds.append(os.open(tmp_path / f"disk{len(fds)}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return OpenDisk(file=OpenFile(fd=fds[-1], name="d"), format=image_format, readonly=readonly)

    yield make
    for fd in fds:
        os.close(fd)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(record: Record, n: int, nic: Nic) -> tap.Tap:
        del nic
        return tap.Tap(fd=os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), name=f"vm{record.slot}-{n}", mtu=1400)

    monkeypatch.setattr(tap, "open_tap", made)
    monkeypatch.setattr(devices, "VHOST_VSOCK", "/dev/null")


def images_of(**rest: Any) -> Images:
    given: dict[str, Any] = {"kernel": OpenFile(fd=-1, name="k")}
    return Images(**(given | rest))


async def test_everything_in_its_port(disk: Callable[..., OpenDisk]) -> None:
    images = images_of(disks=(disk(), disk("qcow2", readonly=True)), nics=(NIC,), vsock=True)
    qemu = Qemu(nodes=("disk0", "disk0-file", "disk1", "disk1-file"))
    await devices.plug(qemu.call, RECORD, images)
    assert [command for command, _arguments in qemu.asked] == [
        *("add-fd", "blockdev-add", "device_add") * 2,
        "query-named-block-nodes",
        *("getfd", "netdev_add", "device_add"),
        *("getfd", "device_add"),
        "system_reset",
    ]
    assert [qemu.given[str(n)].st_ino for n in (0, 1)] == [os.fstat(one.file.fd).st_ino for one in images.disks]
    plugged = [arguments for command, arguments in qemu.asked if command == "device_add"]
    assert [one["bus"] for one in plugged] == [f"port{n}" for n in range(ports(images))]
    assert [one["driver"] for one in plugged] == ["virtio-blk-pci"] * 2 + ["virtio-net-pci", "vhost-vsock-pci"]
    assert plugged[2]["mac"] == tap.mac(RECORD, 0, NIC)
    assert plugged[2]["host_mtu"] == 1400
    assert plugged[3]["guest-cid"] == 8 == devices.vsock_cid(RECORD, images)
    raw, qcow2 = (arguments for command, arguments in qemu.asked if command == "blockdev-add")
    assert (raw["driver"], raw["read-only"], qcow2["driver"], qcow2["read-only"]) == ("raw", False, "qcow2", True)
    assert "backing" not in raw
    assert qcow2["backing"] is None  # and not: what the image says


async def test_what_is_not_wanted_is_not_asked_for() -> None:
    qemu = Qemu()
    await devices.plug(qemu.call, RECORD, images_of(agent=True))
    assert qemu.asked == []
    assert devices.vsock_cid(RECORD, images_of()) is None


def test_addresses_that_were_made_are_known() -> None:
    given = Nic(bridge="br1", mac="0A:00:00:00:00:01")
    found = devices.addressed(RECORD, images_of(nics=(NIC, given)))
    assert found == (Nic(bridge="br0", mac=tap.mac(RECORD, 0, NIC)), Nic(bridge="br1", mac="0a:00:00:00:00:01"))


async def test_a_further_file_is_noticed(disk: Callable[..., OpenDisk]) -> None:
    qemu = Qemu(nodes=("disk0", "disk0-file", "#block077"))
    with pytest.raises(FailedError, match=r"names a further file since it was checked \(QEMU opened #block077\)"):
        await devices.plug(qemu.call, RECORD, images_of(disks=(disk("qcow2"),)))


@pytest.mark.parametrize("command", ["add-fd", "blockdev-add", "getfd", "netdev_add", "device_add", "system_reset"])
async def test_a_refusal_leaves_nothing_open(command: str, disk: Callable[..., OpenDisk]) -> None:
    qemu = Qemu(fail_at=command, nodes=("disk0", "disk0-file"))
    with pytest.raises(FailedError):
        await devices.plug(qemu.call, RECORD, images_of(disks=(disk(),), nics=(NIC,), vsock=True))
    assert qemu.asked[-1][0] == command
    with pytest.raises(FailedError):
        await devices.plug(Qemu(fail_at="device_add").call, RECORD, images_of(vsock=True))


async def test_a_host_without_vsock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    devices.check_vsock()
    monkeypatch.setattr(devices, "VHOST_VSOCK", str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match=r"vsock: .* can't be used: .*modprobe vhost_vsock, or leave vsock out"):
        devices.check_vsock()
    with pytest.raises(UnsupportedError, match=r"vsock: .*No such file"):
        await devices.plug(Qemu().call, RECORD, images_of(vsock=True))


class Peer:
    """The other end of a monitor. As QEMU, it keeps the last descriptor until a command takes it."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.setblocking(False)
        self.taken: list[int] = []
        """How many descriptors had come since the last getfd, for each getfd."""

    async def serve(self) -> None:
        """One connection, until its end."""
        loop = asyncio.get_running_loop()
        version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
        with self._listener:
            connection, _ = await loop.sock_accept(self._listener)
        with connection:
            connection.setblocking(False)
            await loop.sock_sendall(
                connection, json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n"
            )
            text, waiting = "", 0
            while True:
                await self._readable(connection)
                data, fds, _flags, _address = socket.recv_fds(connection, 65536, 16)
                if not data:
                    return
                waiting += len(fds)
                for fd in fds:
                    os.close(fd)
                text += data.decode()
                while text.strip():
                    try:
                        command, end = json.JSONDecoder().raw_decode(text.lstrip())
                    except ValueError:
                        break
                    text = text.lstrip()[end:]
                    if command["execute"] == "getfd":
                        self.taken.append(waiting)
                        waiting = 0
                    answer = {"return": {}} | ({"id": command["id"]} if "id" in command else {})
                    await loop.sock_sendall(connection, json.dumps(answer).encode() + b"\n")

    @staticmethod
    async def _readable(connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(connection, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(connection)


async def test_a_descriptor_comes_with_its_own_command(tmp_path: Path) -> None:
    peer = Peer(tmp_path / "s")
    serving = asyncio.create_task(peer.serve())
    monitor = qmp.Monitor(tmp_path / "s", who="partition 1", timeout_s=30, on_event=lambda _name: None)
    try:
        with Path("/dev/null").open("rb") as file:  # noqa: ASYNC230 - it does not wait
            wanted = [monitor.call("getfd", {"fdname": str(n)}, fd=file.fileno()) for n in range(8)]
            await asyncio.gather(monitor.call("query-status"), *wanted, monitor.call("query-status"))
            assert peer.taken == [1] * 8
    finally:
        await monitor.close()
        await serving


async def test_a_descriptor_for_a_monitor_that_is_gone(tmp_path: Path) -> None:
    monitor = qmp.Monitor(tmp_path / "none", who="partition 1", timeout_s=30, on_event=lambda _name: None)
    monitor.give_up()
    try:
        with pytest.raises(UnavailableError, match="QEMU of partition 1 closed its monitor"):
            await monitor.call("getfd", {"fdname": "x"}, fd=0)
    finally:
        await monitor.close()
