"""The devices of domain XML onto those of a partition: disks, network interfaces, console, agent's channel, vsock.

Pure: no I/O; whether a file or a bridge is there, vmand says when the guest starts.
"""

import re

from edgehold.api.vmand import Disk, Nic
from virtvmand.domcheck import Judge, absolute
from virtvmand.xmltree import Element

_TARGET = re.compile(r"(?P<kind>[hsv]d|xvd)(?P<place>[a-z]{1,3})", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}", re.ASCII)
_BRIDGE = re.compile(r"[^\s/:]{1,15}")  # dev_valid_name() of the kernel; IFNAMSIZ with its NUL is 16
_SOURCES = {"file": "file", "block": "dev"}
_VIRTIO_CONSOLE = "hvc0"


def disks(judge: Judge, devices: Element) -> tuple[Disk, ...]:
    """The disks in the order of their target names: so a guest finds vda first, wherever it is written."""
    found: dict[str, tuple[tuple[int, str], Disk]] = {}
    for element in devices.all("disk"):
        dev = _attribute(element, "dev", "target")
        match = _TARGET.fullmatch(dev)
        if match is None:
            judge.wrong("devices/disk/target@dev", f"{dev[:64]!r} is not a disk's name as vda, vdb …")
            continue
        if match["kind"] != "vd" and not _attribute(element, "bus", "target"):
            judge.unsupported("devices/disk/target@bus", f"{dev} without a bus is no virtio disk; write bus='virtio'")
        if dev in found:
            judge.wrong("devices/disk/target@dev", f"{dev!r} is given twice")
        if (disk := _disk(judge, element)) is not None:
            found[dev] = (len(match["place"]), match["place"]), disk
    return tuple(disk for _, disk in sorted(found.values(), key=lambda one: one[0]))


def targets(devices: Element) -> tuple[str, ...]:
    """The names of those disks, in the same order."""
    found: dict[str, tuple[int, str]] = {}
    for element in devices.all("disk"):
        dev = _attribute(element, "dev", "target")
        source = _SOURCES.get(element.attributes.get("type", "file"), "file")
        if (match := _TARGET.fullmatch(dev)) is not None and _attribute(element, source, "source"):
            found.setdefault(dev, (len(match["place"]), match["place"]))
    return tuple(sorted(found, key=lambda dev: found[dev]))


def _disk(judge: Judge, element: Element) -> Disk | None:
    attribute = _SOURCES.get(element.attributes.get("type", "file"), "file")
    key = f"devices/disk/source@{attribute}"
    path = _attribute(element, attribute, "source")
    if not path:
        judge.wrong(key, "a disk needs a source")
        return None
    if (backing := element.child("backingStore")) is not None and (backing.children or backing.attributes.get("type")):
        judge.unsupported("devices/disk/backingStore", "an image must be whole by itself; vmand opens one file a disk")
    return Disk(
        path=absolute(judge, path, key),
        format="qcow2" if _attribute(element, "type", "driver") == "qcow2" else "raw",
        readonly=element.child("readonly") is not None,
    )


def nics(judge: Judge, devices: Element, uuid: str) -> tuple[Nic, ...]:
    """The network interfaces in the order of the text."""
    elements = devices.all("interface")
    written = [_mac(judge, one) for one in elements]
    taken = set(filter(None, written))
    if len(taken) != sum(map(bool, written)):
        judge.wrong("devices/interface/mac@address", "two interfaces have the same address")
    made: list[Nic] = []
    for n, (element, mac) in enumerate(zip(elements, written, strict=True)):
        bridge = _attribute(element, "bridge", "source")
        if not element.attributes.get("type"):
            judge.wrong("devices/interface@type", "it is missing; write type='bridge'")
        if not _BRIDGE.fullmatch(bridge):
            judge.wrong("devices/interface/source@bridge", f"{bridge[:64]!r} is not a bridge's name")
            continue
        made.append(Nic(bridge=bridge, mac=mac or _free_mac(uuid, n, taken)))
    return tuple(made)


def made_mac(uuid: str, n: int) -> str:
    """The address of a partition's n-th interface where none was given: as vmand makes it, so it stays the same."""
    import hashlib  # noqa: PLC0415 - it brings libcrypto into the process, for which few have a need

    return (b"\x02" + hashlib.sha256(f"{uuid}/{n}".encode()).digest()[:5]).hex(":")


def _free_mac(uuid: str, n: int, taken: set[str]) -> str:
    while (mac := made_mac(uuid, n)) in taken:
        n += 1
    taken.add(mac)
    return mac


def _mac(judge: Judge, interface: Element) -> str:
    element = interface.child("mac")
    if element is None:
        return ""
    key, mac = "devices/interface/mac@address", element.attributes.get("address", "").lower()
    if not _MAC.fullmatch(mac):
        judge.wrong(key, f"{mac[:64]!r} is not six bytes as 52:54:00:00:00:01; without the element one is made")
        return ""
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        judge.wrong(key, f"{mac} is not the address of one station; its first byte must be even")
    return mac


def consoles(judge: Judge, devices: Element, cmdline: str) -> tuple[str, ...]:
    """The names by which a client may ask for the console; there is one, whatever is written."""
    serials, others = devices.all("serial"), devices.all("console")
    virtio = [one for one in others if _attribute(one, "type", "target") == "virtio"]
    if len(serials) > 1:
        judge.unsupported("devices/serial", "a partition has one console; leave the others out")
    if len(others) > 1 or (virtio and serials):
        judge.unsupported("devices/console", "a partition has one console, serial or virtio; leave the others out")
    if virtio and last_console(cmdline) != _VIRTIO_CONSOLE:
        judge.unsupported(
            "devices/console/target@type", "a partition has a virtio console where os/cmdline ends in console=hvc0"
        )
    for element in (*serials, *others):
        if not element.attributes.get("type"):
            judge.wrong(f"devices/{element.tag}@type", "it is missing; write type='pty'")
    aliases = (_attribute(one, "name", "alias") for one in (*serials, *others))
    return tuple(dict.fromkeys(("serial0", "console0", *filter(None, aliases))))


def last_console(cmdline: str) -> str:
    """The console that becomes the guest's /dev/console; empty where its kernel's command line names none."""
    words = [word.removeprefix("console=") for word in cmdline.split() if word.startswith("console=")]
    return words[-1].partition(",")[0] if words else ""


def agent(judge: Judge, devices: Element) -> bool:
    """Whether there is a channel for the guest agent."""
    channels = devices.all("channel")
    for element in channels:
        for name, below in (("type", ()), ("type", ("target",)), ("name", ("target",))):
            if not _attribute(element, name, *below):
                judge.wrong("/".join(("devices/channel", *below)) + f"@{name}", "it is missing")
    if len(channels) > 1:
        judge.unsupported("devices/channel", "a partition has one channel, the agent's; leave the others out")
    return bool(channels)


def vsock(judge: Judge, devices: Element) -> bool:
    """Whether the guest has an address for vsock(7)."""
    element = devices.child("vsock")
    if element is not None and _attribute(element, "auto", "cid") != "yes":
        judge.unsupported("devices/vsock/cid", "vmand chooses the address; write <cid auto='yes'/>")
    return element is not None


def ordered(devices: Element) -> list[str]:
    """Paths of devices that are to be booted from."""
    kinds = ("disk", "interface")
    return [f"devices/{kind}/boot" for kind in kinds if any(one.child("boot") for one in devices.all(kind))]


def _attribute(element: Element, name: str, *path: str) -> str:
    found = element.find(*path)
    return "" if found is None else found.attributes.get(name, "")
