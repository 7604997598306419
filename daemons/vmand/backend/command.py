"""A guest as a QEMU command line. Pure.

q35: `microvm` gains nothing under emulation and has no power button. ``-S``: nothing runs before vmand has pinned it.
``shutdown=pause``: a guest that powers itself off stays readable instead of vanishing.
"""

from pathlib import Path

from vmand.model import MIB, Images, Record

CONSOLE_ARGUMENT = "console=ttyS0"
MONITOR = "qmp.sock"
CONSOLE = "console.sock"
LOG = "qemu.log"

ACCELERATORS = {
    # A bounded cache of translated code: QEMU's own default is 1 GiB a guest, which nobody has reserved.
    "tcg": ("tcg,thread=multi,tb-size=128", "max"),
    "kvm": ("kvm", "host"),
}


def value(text: str | Path) -> str:
    """A text as the value of a QEMU option, in which a comma is written twice."""
    return str(text).replace(",", ",,")


def kernel_cmdline(cmdline: str) -> str:
    """The caller's command line; a console is added only where it names none."""
    words = cmdline.split()
    if any(word.startswith("console=") for word in words):
        return cmdline
    return f"{cmdline} {CONSOLE_ARGUMENT}".strip()


def qemu_argv(
    qemu: str, record: Record, images: Images, *, accelerator: str, memory: Path, directory: Path
) -> list[str]:
    """The whole command line for one run. The run's uuid and the directory in it are how the process is found again."""
    accel, cpu = ACCELERATORS[accelerator]
    argv = [qemu, "-S", "-nodefaults", "-no-user-config", "-display", "none", "-uuid", record.run]
    argv += ["-name", f"guest=vmand-{record.id},debug-threads=on"]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    argv += ["-action", "reboot=reset,shutdown=pause,panic=pause"]
    argv += ["-machine", "q35,memory-backend=ram,dump-guest-core=off,usb=off,vmport=off", "-accel", accel, "-cpu", cpu]
    argv += ["-smp", f"cpus={record.cores},sockets=1,cores={record.cores},threads=1"]
    argv += ["-m", f"{record.memory_bytes // MIB}M", "-overcommit", "mem-lock=off"]
    argv += ["-object", f"memory-backend-file,id=ram,size={record.memory_bytes},mem-path={value(memory)},share=on"]
    argv += ["-chardev", f"socket,id=monitor,path={value(directory / MONITOR)},server=on,wait=off"]
    argv += ["-mon", "chardev=monitor,mode=control"]
    argv += ["-chardev", f"socket,id=console,path={value(directory / CONSOLE)},server=on,wait=off"]
    argv += ["-serial", "chardev:console", "-device", "pvpanic"]
    argv += ["-kernel", images.kernel, "-append", kernel_cmdline(images.cmdline)]
    if images.initrd:
        argv += ["-initrd", images.initrd]
    return argv
