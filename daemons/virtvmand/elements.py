"""What of libvirt's domain XML has an effect, what is accepted without one, and what is refused: as tables.

A path is that of elements below ``<domain>``; ``path@name`` is an attribute. What is in none of the tables is refused
by name: a definition that is accepted does what it says, except for what `KEPT` lists. docs/libvirt.md has the same
tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """The values that an attribute or the text of an element may have."""

    values: tuple[str, ...]
    why: str
    """Why no other."""


USED: Mapping[str, str] = {
    # `id` is a running guest's and comes back in what clients read from a live domain and define again.
    "domain@type": "vman, kvm or qemu; vmand chooses what runs the guest's CPUs",
    "domain@id": "shown while the domain is active",
    "name": "the partition's name",
    "uuid": "the partition's uuid; made where it is missing",
    "title": "shown",
    "description": "shown",
    "metadata": "kept as it is; edgehold:partition in it has what libvirt has no element for",
    "memory": "the partition's memory, rounded up to 2 MiB",
    "memory@unit": "of libvirt's units; KiB where it is missing",
    "currentMemory": "the same as memory",
    "currentMemory@unit": "as memory's",
    "vcpu": "the partition's cores",
    "vcpu@current": "the same as the number",
    "os": "what is booted",
    "os/type": "hvm",
    "os/type@arch": "x86_64 or aarch64; the host's where it is missing",
    "os/kernel": "the guest's kernel",
    "os/initrd": "the guest's initial file system",
    "os/cmdline": "the kernel's command line",
    "os/dtb": "the device tree",
    "cputune": "nothing of it but shares is accepted",
    "clock": "UTC",
    "clock@offset": "utc",
    "on_poweroff": "destroy",
    "on_reboot": "restart",
    "on_crash": "destroy",
    "devices": "the guest's devices",
    "devices/disk": "a virtio disk; the guest finds them in the order of their target names",
    "devices/disk@type": "file or block",
    "devices/disk@device": "disk",
    "devices/disk@model": "virtio",
    "devices/disk/driver": "the image's format",
    "devices/disk/driver@name": "qemu",
    "devices/disk/driver@type": "raw or qcow2",
    "devices/disk/driver@cache": "none, writeback, unsafe or default: flushes reach the disk with each of them",
    "devices/disk/source": "the image",
    "devices/disk/source@file": "the image's path",
    "devices/disk/source@dev": "the block device's path",
    "devices/disk/source@startupPolicy": "mandatory",
    "devices/disk/target": "the disk's name in libvirt",
    "devices/disk/target@dev": "the order of the disks",
    "devices/disk/target@bus": "virtio",
    "devices/disk/readonly": "the guest may not write it",
    "devices/interface": "a virtio network interface in a bridge of the host",
    "devices/interface@type": "bridge",
    "devices/interface/source": "the bridge",
    "devices/interface/source@bridge": "the bridge's name; vmand's settings must allow it",
    "devices/interface/mac": "the interface's address",
    "devices/interface/mac@address": "made from the domain's uuid where it is missing",
    "devices/interface/model": "the kind of interface",
    "devices/interface/model@type": "virtio",
    "devices/interface/link": "whether the cable is in",
    "devices/interface/link@state": "up",
    "devices/serial": "the guest's console; it has one, also where none is written",
    "devices/serial@type": "pty",
    "devices/serial/target": "the kind of port",
    "devices/serial/target@type": "isa-serial or system-serial",
    "devices/serial/target@port": "0",
    "devices/console": "the guest's console; the same one as a serial",
    "devices/console@type": "pty",
    "devices/console/target": "the kind of console",
    "devices/console/target@type": "serial, or virtio where os/cmdline's last console= is hvc0",
    "devices/console/target@port": "0",
    "devices/channel": "the guest agent's channel",
    "devices/channel@type": "unix",
    "devices/channel/target": "the channel's name in the guest",
    "devices/channel/target@type": "virtio",
    "devices/channel/target@name": "org.qemu.guest_agent.0",
    "devices/vsock": "the guest's address for vsock(7)",
    "devices/vsock@model": "virtio",
    "devices/vsock/cid": "how it comes to its address",
    "devices/vsock/cid@auto": "yes: vmand chooses it",
    "devices/vsock/cid@address": "shown while the domain is active",
}
"""What has an effect, and which."""

_MACHINE = "vmand's machine is q35 on x86_64, virt on aarch64, with the devices that it needs"
_PLACE = "vmand gives devices their places"
_NAMES = "a name by which clients find the device"
_HOST_SIDE = "vmand names and tunes the host's side by itself"
_BALLOON = "there is no balloon; memory statistics are the host's"

KEPT: Mapping[str, str] = {
    # How a virtual machine looks. Hints that every client writes and without which the same guest runs.
    "vcpu@placement": "vmand chooses the cores",
    "memory@dumpCore": "a guest's memory is never in a core dump",
    "os/type@machine": _MACHINE,
    "os/boot": "the kernel is booted; accepted only where there is one",
    "os/bootmenu": "the kernel is booted",
    "os/bios": "the kernel is booted",
    "os/smbios": "the guest sees QEMU's own values",
    "sysinfo": "the guest sees QEMU's own values",
    "features": _MACHINE,
    "cpu": "with KVM the host's CPU, without one that QEMU emulates; one socket with all cores",
    "clock/timer": _MACHINE,
    "pm": "the guest decides",
    "iothreads": "QEMU's own threads",
    "devices/emulator": "vmand's own QEMU runs, whatever is written",
    "devices/controller": _MACHINE,
    "devices/audio": "libvirt writes one of type none into what has no sound",
    "devices/input": "nobody types on it; the console is for that",
    "devices/memballoon": _BALLOON,
    "devices/panic": "vmand's machine has one always",
    "devices/rng": "Linux gathers randomness by itself",
    # How the host accounts and labels a guest: vmand does it its own way, for every guest.
    "resource": "each guest has a unit of its own",
    "seclabel": "each guest has a user of its own, and QEMU's sandbox",
    "cputune/shares": "dedicated cores are not shared",
    # Details of devices that change their speed at most, and those that libvirt writes itself into live XML.
    "devices/disk@snapshot": "there are no snapshots",
    "devices/disk/driver@io": "QEMU's default",
    "devices/disk/driver@discard": "QEMU's default",
    "devices/disk/driver@detect_zeroes": "QEMU's default",
    "devices/disk/driver@queues": "QEMU's default",
    "devices/disk/driver@queue_size": "QEMU's default",
    "devices/disk/driver@iothread": "QEMU's own threads",
    "devices/disk/source@index": _NAMES,
    "devices/disk/source/seclabel": "QEMU gets the open file",
    "devices/disk/backingStore": "accepted where it says that there is none",
    "devices/disk/serial": "the guest sees disk0, disk1 …",
    "devices/disk/boot": "the kernel is booted; accepted only where there is one",
    "devices/disk/alias": _NAMES,
    "devices/disk/address": _PLACE,
    "devices/interface/target": _HOST_SIDE,
    "devices/interface/driver": _HOST_SIDE,
    "devices/interface/tune": _HOST_SIDE,
    "devices/interface/mtu": "the bridge's",
    "devices/interface/rom": "there is none",
    "devices/interface/boot": "the kernel is booted; accepted only where there is one",
    "devices/interface/alias": _NAMES,
    "devices/interface/address": _PLACE,
    "devices/serial@tty": "shown by libvirt for a live domain; the console is read through OPEN_CONSOLE",
    "devices/serial/source": "as its tty",
    "devices/serial/log": "no log is written; vmand keeps the last 64 KiB",
    "devices/serial/target/model": _MACHINE,
    "devices/serial/alias": _NAMES,
    "devices/serial/address": _PLACE,
    "devices/console@tty": "as serial's",
    "devices/console/source": "as serial's",
    "devices/console/log": "as serial's",
    "devices/console/target/model": _MACHINE,
    "devices/console/alias": _NAMES,
    "devices/console/address": _PLACE,
    "devices/channel/source": "the socket is in the partition's directory",
    "devices/channel/target@state": "shown by libvirt for a live domain",
    "devices/channel/alias": _NAMES,
    "devices/channel/address": _PLACE,
    "devices/vsock/alias": _NAMES,
    "devices/vsock/address": _PLACE,
}
"""What is accepted with all that is below it, shown again and has no effect; what holds instead."""

_CORES = "vmand chooses cores and their NUMA node itself"
_TIMES = "CPU time is deadlined's: it sizes reservations of shared partitions (deadlinectl)"
_SHARE = "a partition has its cores and its memory for itself; there is no share or limit to set"
_FIRMWARE = "vmand boots a kernel directly, it has no firmware"
_DISPLAY = "a partition has no display; its console is a serial line"
_PASSED = "vmand passes no device of the host on"
_HOTPLUG = "the size of a partition is fixed while its guest runs"
_DRIVER = "a partition has virtio disks, virtio network interfaces, a console, vsock and the agent's channel"
_CONTAINER = "partitions are virtual machines, not containers"
_IMAGE = "vmand gives the image to QEMU as it is"
_NETWORK = "vmand only puts the interface into the bridge"

REFUSED: Mapping[str, str] = {
    # Where a guest runs and how much of the host it gets is vmand's to say, and a promise of another kind is not kept.
    "vcpu@cpuset": _CORES,
    "vcpus": "all of a partition's CPUs are there from the start",
    "cputune/vcpupin": _CORES,
    "cputune/emulatorpin": _CORES,
    "cputune/iothreadpin": _CORES,
    "cputune/vcpusched": _TIMES,
    "cputune/emulatorsched": _TIMES,
    "cputune/iothreadsched": _TIMES,
    "cputune/period": _TIMES,
    "cputune/quota": _TIMES,
    "cputune/global_period": _TIMES,
    "cputune/global_quota": _TIMES,
    "cputune/emulator_period": _TIMES,
    "cputune/emulator_quota": _TIMES,
    "cputune/iothread_period": _TIMES,
    "cputune/iothread_quota": _TIMES,
    "cputune/cachetune": _SHARE,
    "cputune/memorytune": _SHARE,
    "numatune": _CORES,
    "cpu/numa": "a partition is on one NUMA node",
    "memtune": _SHARE,
    "blkiotune": _SHARE,
    "memoryBacking": "vmand gives the best kind of memory that the host has; vmanctl doctor shows it",
    "maxMemory": _HOTPLUG,
    "iothreadids": "QEMU's own threads serve its disks",
    "defaultiothread": "QEMU's own threads serve its disks",
    "launchSecurity": "a guest's memory is not encrypted",
    "keywrap": "there are no wrapped keys",
    "perf": "deadlined and telemetry measure guests",
    "genid": "there is no generation id",
    "on_lockfailure": "vmand locks disks itself; a disk in use is an error of the start",
    # What would boot otherwise than from a kernel, or is no virtual machine.
    "bootloader": _FIRMWARE,
    "bootloader_args": _FIRMWARE,
    "os@firmware": _FIRMWARE,
    "os/firmware": _FIRMWARE,
    "os/loader": _FIRMWARE,
    "os/nvram": _FIRMWARE,
    "os/acpi": "the machine's tables are QEMU's",
    "os/root": _CONTAINER,
    "os/init": _CONTAINER,
    "os/initarg": _CONTAINER,
    "os/initenv": _CONTAINER,
    "os/initdir": _CONTAINER,
    "os/inituser": _CONTAINER,
    "os/initgroup": _CONTAINER,
    "idmap": _CONTAINER,
    # Clocks that the guest would not get.
    "clock@basis": "a guest's clock begins with UTC",
    "clock@adjustment": "a guest's clock begins with UTC",
    "clock@timezone": "a guest's clock begins with UTC",
    "clock@start": "a guest's clock begins with UTC",
    # Devices that a partition has not. A guest that is promised one would miss it.
    "devices/graphics": _DISPLAY,
    "devices/video": _DISPLAY,
    "devices/sound": _DISPLAY,
    "devices/hostdev": _PASSED,
    "devices/redirdev": _PASSED,
    "devices/redirfilter": _PASSED,
    "devices/smartcard": _PASSED,
    "devices/hub": _DRIVER,
    "devices/parallel": _DRIVER,
    "devices/filesystem": _DRIVER,
    "devices/tpm": _DRIVER,
    "devices/watchdog": _DRIVER,
    "devices/shmem": _DRIVER,
    "devices/iommu": _DRIVER,
    "devices/nvram": _DRIVER,
    "devices/memory": _HOTPLUG,
    "devices/lease": "vmand locks disks itself",
    # Disks: what changes the guest's data or its promises.
    "devices/disk/auth": _IMAGE,
    "devices/disk/encryption": _IMAGE,
    "devices/disk/source/encryption": _IMAGE,
    "devices/disk/source/reservations": _IMAGE,
    "devices/disk/source/slices": _IMAGE,
    "devices/disk/mirror": _IMAGE,
    "devices/disk/transient": "what a guest writes stays",
    "devices/disk/shareable": "a disk has one guest that writes, or several for which it is readonly",
    "devices/disk/iotune": _SHARE,
    "devices/disk/throttlefilters": _SHARE,
    "devices/disk/geometry": _DRIVER,
    "devices/disk/blockio": _DRIVER,
    "devices/disk/wwn": _DRIVER,
    "devices/disk/vendor": _DRIVER,
    "devices/disk/product": _DRIVER,
    "devices/disk@sgio": _DRIVER,
    "devices/disk@rawio": _DRIVER,
    # Network: what filters, shapes or plumbs. Silence about a filter would be a hole.
    "devices/interface/filterref": _NETWORK + "; filter at the bridge",
    "devices/interface/bandwidth": _NETWORK,
    "devices/interface/virtualport": _NETWORK,
    "devices/interface/vlan": _NETWORK,
    "devices/interface/port": _NETWORK,
    "devices/interface/coalesce": _NETWORK,
    "devices/interface/script": _NETWORK,
    "devices/interface/downscript": _NETWORK,
    "devices/interface/backend": _NETWORK,
    "devices/interface/backenddomain": _NETWORK,
    "devices/interface/guest": _NETWORK,
    "devices/interface/ip": _NETWORK,
    "devices/interface/route": _NETWORK,
    "devices/interface/teaming": _NETWORK,
    "devices/interface@trustGuestRxFilters": _NETWORK,
    # The hypervisor's own options are vmand's.
    "qemu:commandline": "QEMU's command line is vmand's",
    "qemu:override": "QEMU's command line is vmand's",
    "qemu:capabilities": "QEMU's command line is vmand's",
    "qemu:deprecation": "QEMU's command line is vmand's",
}
"""What is refused, and why."""

CHOICES: Mapping[str, Choice] = {
    "domain@type": Choice(("vman", "kvm", "qemu"), "that is none of virtvmand's"),
    "os/type": Choice(("hvm",), _CONTAINER),
    "os/type@arch": Choice(("x86_64", "aarch64"), "vmand runs guests of no other architecture"),
    "sysinfo@type": Choice(("smbios",), "nothing is handed to the guest's firmware"),
    "clock@offset": Choice(("utc",), "a guest's clock begins with UTC"),
    "on_poweroff": Choice(("destroy",), "a guest that powers off is off"),
    "on_reboot": Choice(("restart",), "a guest that reboots goes on"),
    "on_crash": Choice(("destroy",), "a guest that crashed is off, and its last output is kept"),
    "devices/audio@type": Choice(("none",), _DISPLAY),
    "devices/disk@type": Choice(("file", "block"), "a disk is a file or a block device of the host"),
    "devices/disk@device": Choice(("disk",), "there are no drives with media to change, and no raw SCSI"),
    "devices/disk@model": Choice(("virtio",), _DRIVER),
    "devices/disk/driver@name": Choice(("qemu",), "QEMU drives all disks"),
    "devices/disk/driver@type": Choice(("raw", "qcow2"), "vmand opens no other format"),
    "devices/disk/driver@cache": Choice(
        ("none", "writeback", "default", "unsafe"), "a write is safe when the guest has flushed it, not before"
    ),
    "devices/disk/source@startupPolicy": Choice(("mandatory",), "a guest does not start without its disks"),
    "devices/disk/target@bus": Choice(("virtio",), _DRIVER),
    "devices/interface@type": Choice(("bridge",), "an interface is in a bridge of the host"),
    "devices/interface/model@type": Choice(("virtio",), _DRIVER),
    "devices/interface/link@state": Choice(("up",), "an interface is up while the guest runs"),
    "devices/serial@type": Choice(("pty",), "the console is read by OPEN_CONSOLE alone"),
    "devices/serial/target@type": Choice(("isa-serial", "system-serial"), _DRIVER),
    "devices/serial/target@port": Choice(("0",), "a partition has one console"),
    "devices/console@type": Choice(("pty",), "the console is read by OPEN_CONSOLE alone"),
    "devices/console/target@type": Choice(("serial", "virtio"), _DRIVER),
    "devices/console/target@port": Choice(("0",), "a partition has one console"),
    "devices/channel@type": Choice(("unix",), "vmand's guests have the agent's channel alone"),
    "devices/channel/target@type": Choice(("virtio",), "vmand's guests have the agent's channel alone"),
    "devices/channel/target@name": Choice(("org.qemu.guest_agent.0",), "vmand's guests have the agent's channel alone"),
    "devices/vsock@model": Choice(("virtio",), _DRIVER),
    "devices/vsock/cid@auto": Choice(("yes",), "vmand chooses the address, so that no two guests have the same"),
}
"""The values that are accepted where there are few, and why no others."""

MANY = frozenset(
    {"devices/disk", "devices/interface", "devices/serial", "devices/console", "devices/channel", "clock/timer"}
)
"""Elements that may come more than once."""
