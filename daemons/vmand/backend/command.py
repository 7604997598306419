"""A guest as a QEMU command line. Pure.

q35: `microvm` gains nothing under emulation and has no power button. ``-S``: nothing runs before vmand has pinned it.
``shutdown=pause``: a guest that powers itself off stays readable instead of vanishing. What needs a descriptor (disks,
network interfaces, vsock) is not here: `devices.plug` gives it to the running QEMU, into the ports that are made here.
"""

from dataclasses import dataclass
from pathlib import Path

from vmand.model import MIB, Images, Record

MONITOR = "qmp.sock"
CONSOLE = "console.sock"
AGENT = "agent.sock"
LOG = "qemu.log"
AGENT_PORT = "org.qemu.guest_agent.0"

# What every machine type has, then what is its own. usb=off: nothing of ours is on that bus.
_COMMON = "memory-backend=ram,dump-guest-core=off,usb=off"
_MACHINES = {"x86_64": f"q35,{_COMMON},vmport=off", "aarch64": f"virt,{_COMMON},gic-version=3"}
_PANIC = {"x86_64": "pvpanic", "aarch64": "pvpanic-pci"}
_SERIAL = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}
_VIRTIO_CONSOLE = "hvc0"
_ACCELERATORS = {
    # A bounded cache of translated code: QEMU's own default is 1 GiB a guest, which nobody has reserved.
    "tcg": "tcg,thread=multi,tb-size=128",
    "kvm": "kvm",
}
# An emulated arm64 guest sees the same model on every host: `max` would be another CPU with each QEMU.
_EMULATED = {"x86_64": "max", "aarch64": "cortex-a72"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a guest's CPUs are and what runs them."""

    qemu: str
    """The program: a path, or a name on PATH."""
    arch: str
    """``x86_64`` or ``aarch64``."""
    accelerator: str
    """``kvm`` or ``tcg``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Copies of the images where QEMU may read them."""

    kernel: Path
    initrd: Path | None = None
    dtb: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBacking:
    """The file that is the guest's memory."""

    path: Path
    lock: bool = False
    """QEMU is to keep all of its own memory from being swapped (mlockall(2))."""


def value(text: str | Path) -> str:
    """A text as the value of a QEMU option, in which a comma is written twice."""
    return str(text).replace(",", ",,")


def kernel_cmdline(cmdline: str, *, arch: str = "x86_64") -> str:
    """The caller's command line; a console is added only where it names none."""
    return cmdline if _consoles(cmdline) else f"{cmdline} console={_SERIAL[arch]}".strip()


def ports(images: Images) -> int:
    """How many devices are plugged into the running QEMU: disks first, then network interfaces, then vsock."""
    return len(images.disks) + len(images.nics) + images.vsock


def qemu_argv(
    machine: Machine, record: Record, images: Images, *, files: Files, memory: MemoryBacking, directory: Path
) -> list[str]:
    """The whole command line for one run. The run's uuid and the directory in it are how the process is found again."""
    cpu = "host" if machine.accelerator == "kvm" else _EMULATED[machine.arch]
    argv = [machine.qemu, "-S", "-nodefaults", "-no-user-config", "-display", "none", "-uuid", record.run]
    argv += ["-name", f"guest=vmand-{record.id},debug-threads=on"]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    argv += ["-action", "reboot=reset,shutdown=pause,panic=pause"]
    argv += ["-machine", _MACHINES[machine.arch], "-accel", _ACCELERATORS[machine.accelerator], "-cpu", cpu]
    argv += ["-smp", f"cpus={record.cores},sockets=1,cores={record.cores},threads=1"]
    argv += ["-m", f"{record.memory_bytes // MIB}M", "-overcommit", f"mem-lock={'on' if memory.lock else 'off'}"]
    argv += ["-object", f"memory-backend-file,id=ram,size={record.memory_bytes},mem-path={value(memory.path)},share=on"]
    argv += [*_socket("monitor", directory / MONITOR), "-mon", "chardev=monitor,mode=control"]
    argv += [*_socket("console", directory / CONSOLE), *_characters(images, directory)]
    argv += ["-device", _PANIC[machine.arch]]
    for port in range(ports(images)):
        # Root buses take no device while QEMU runs, a root port takes one. Virtio needs none of the few I/O windows.
        argv += ["-device", f"pcie-root-port,id=port{port},chassis={port + 1},io-reserve=0"]
    argv += ["-kernel", str(files.kernel), "-append", kernel_cmdline(images.cmdline, arch=machine.arch)]
    if files.initrd is not None:
        argv += ["-initrd", str(files.initrd)]
    if files.dtb is not None:
        argv += ["-dtb", str(files.dtb)]
    return argv


def _socket(name: str, path: Path) -> list[str]:
    return ["-chardev", f"socket,id={name},path={value(path)},server=on,wait=off"]


def _characters(images: Images, directory: Path) -> list[str]:
    """The console, on the serial port or as a virtio console, and the agent's channel."""
    # The last console= is the one that becomes the guest's /dev/console.
    virtio = _consoles(images.cmdline)[-1:] == [_VIRTIO_CONSOLE]
    argv = [] if virtio else ["-serial", "chardev:console"]
    if virtio or images.agent:
        argv += ["-device", "virtio-serial-pci,id=serial"]
    if virtio:
        argv += ["-device", "virtconsole,bus=serial.0,chardev=console"]
    if images.agent:
        argv += _socket("agent", directory / AGENT)
        argv += ["-device", f"virtserialport,bus=serial.0,chardev=agent,name={AGENT_PORT}"]
    return argv


def _consoles(cmdline: str) -> list[str]:
    """The consoles that a kernel's command line names, without their options (``ttyS0,115200``)."""
    words = [word.removeprefix("console=") for word in cmdline.split() if word.startswith("console=")]
    return [word.partition(",")[0] for word in words]
