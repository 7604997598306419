"""The devices that need descriptors: given to a QEMU that is up and whose guest does not run yet.

A systemd unit inherits no descriptors, and QEMU as its own user may open none of these files. So each is sent over the
monitor (unix(7), SCM_RIGHTS), and its device is plugged into a root port of the command line (`command.ports`). The
guest finds all of them at boot, in the order of the caller's lists; a reset keeps them.
"""

import os
from typing import Any, Protocol

from edgehold.api.vmand import Nic
from edgehold.errors import FailedError, UnsupportedError
from vmand.backend import disks, tap
from vmand.backend.command import ports
from vmand.model import Images, OpenDisk, Record

VHOST_VSOCK = "/dev/vhost-vsock"
FIRST_CID = 3
"""vsock(7): 0 to 2 are the hypervisor, the own machine and the host."""


class Call(Protocol):
    """`Monitor.call`: one command of QMP, with a descriptor for those that take one."""

    async def __call__(
        self, command: str, arguments: dict[str, object] | None = None, *, fd: int | None = None
    ) -> Any: ...


def check_vsock() -> None:
    """Refuse vsock where this host has none, before anything is started.

    Raises:
        UnsupportedError: the text has the cure.
    """
    if not os.path.exists(VHOST_VSOCK):  # noqa: PTH110 - a constant
        raise _no_vsock("there is no such device")


def vsock_cid(record: Record, images: Images) -> int | None:
    """The guest's address (vsock(7)), where it has one."""
    return FIRST_CID + record.slot if images.vsock else None


def addressed(record: Record, images: Images) -> tuple[Nic, ...]:
    """The guest's network interfaces with the addresses that `plug` gives them."""
    return tuple(Nic(bridge=nic.bridge, mac=tap.mac(record, n, nic)) for n, nic in enumerate(images.nics))


async def plug(call: Call, record: Record, images: Images) -> None:
    """Give QEMU the devices of these images. The caller closes the images' files; nothing else of ours stays open.

    What was plugged before a failure is QEMU's and ends with it.

    Raises:
        UnsupportedError: this host lacks something; the text has the cure.
        FailedError: the kernel or QEMU refused, or an image names a file that it did not name when it was checked.
    """
    for n, disk in enumerate(images.disks):
        await _plug_disk(call, n, disk, port=n)
    if images.disks:
        await _check_nodes(call, len(images.disks))
    for n, nic in enumerate(images.nics):
        await _plug_nic(call, record, n, nic, port=len(images.disks) + n)
    if (cid := vsock_cid(record, images)) is not None:
        await _plug_vsock(call, cid, port=ports(images) - 1)
    if ports(images):
        # They came to their ports while the power was on: a guest would start each in its own time, in any order (as
        # Linux' pciehp). A reset makes them older than the power. If it comes after `cont`, the guest begins twice.
        await call("system_reset")


async def _plug_disk(call: Call, n: int, disk: OpenDisk, *, port: int) -> None:
    await call("add-fd", {"fdset-id": n}, fd=disk.file.fd)
    file: dict[str, object] = {
        "driver": "host_device" if disks.is_block(disk) else "file",
        "node-name": f"disk{n}-file",
        "filename": f"/dev/fdset/{n}",
        "read-only": disk.readonly,
        # The descriptor is locked as a whole already, and QEMU's own locks would replace parts of that.
        "locking": "off",
    }
    node: dict[str, object] = {"driver": disk.format, "node-name": f"disk{n}", "read-only": disk.readonly, "file": file}
    if disk.format == "qcow2":
        node["backing"] = None
    await call("blockdev-add", node)
    # The serial number is how a guest tells its disks apart: /dev/disk/by-id/virtio-disk0.
    await _plug(call, "virtio-blk-pci", f"disk{n}", port=port, drive=f"disk{n}", serial=f"disk{n}")


async def _check_nodes(call: Call, count: int) -> None:
    """Whoever may write an image can change its header after it was checked. What QEMU has opened now is final."""
    known = {f"disk{n}{suffix}" for n in range(count) for suffix in ("", "-file")}
    nodes = {str(one.get("node-name")) for one in await call("query-named-block-nodes", {"flat": True})}
    if strange := sorted(nodes - known):
        raise FailedError(f"disks: an image names a further file since it was checked (QEMU opened {strange[0]})")


async def _plug_nic(call: Call, record: Record, n: int, nic: Nic, *, port: int) -> None:
    one = tap.open_tap(record, n, nic)
    try:
        await call("getfd", {"fdname": f"nic{n}"}, fd=one.fd)
    finally:
        os.close(one.fd)
    # vhost=off: the host kernel's own virtio-net would need one more device of the host for each guest's user.
    await call("netdev_add", {"type": "tap", "id": f"net{n}", "fd": f"nic{n}", "vhost": False})
    # host_mtu: the guest sends no frame that the bridge would drop. romfile: nothing of ours boots over a network.
    rest = {"netdev": f"net{n}", "mac": tap.mac(record, n, nic), "host_mtu": one.mtu, "romfile": ""}
    await _plug(call, "virtio-net-pci", f"nic{n}", port=port, **rest)


async def _plug_vsock(call: Call, cid: int, *, port: int) -> None:
    try:
        fd = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _no_vsock(str(error.strerror)) from error
    try:
        await call("getfd", {"fdname": "vsock"}, fd=fd)
    finally:
        os.close(fd)
    await _plug(call, "vhost-vsock-pci", "vsock", port=port, vhostfd="vsock", **{"guest-cid": cid})


async def _plug(call: Call, driver: str, name: str, *, port: int, **rest: object) -> None:
    await call("device_add", {"driver": driver, "id": name, "bus": f"port{port}", **rest})


def _no_vsock(why: str) -> UnsupportedError:
    return UnsupportedError(
        f"vsock: {VHOST_VSOCK} can't be used: {why}; load the kernel's module: modprobe vhost_vsock, or leave vsock out"
    )
