"""Which guests vmand runs here, in libvirt's words, and what each kind of guest can have.

Sources: libvirt's formatdomaincaps page; of vmand's guests daemons/vmand (its command line of QEMU) and docs/vmand.md.
Only what is so is in there; what is left out means "not known", and so does a client take it.
"""

import os
from collections.abc import Callable, Iterable, Mapping

from edgehold.api.vmand import Capabilities
from virtvmand.errors import Code, LibvirtError
from virtvmand.markup import leaf, tag

Which = Callable[[str], str | None]
"""Where a program is; as `shutil.which`."""

# vmand's machines (its own choice, whatever a definition says), then the names that clients have for the same.
# Nova asks for "pc" on every x86 host that is not told otherwise, and where that is refused it drops the architecture.
MACHINES: Mapping[str, tuple[str, ...]] = {"x86_64": ("q35", "pc"), "aarch64": ("virt",)}
_EMULATED_CPU = {"aarch64": "cortex-a72"}
"""The model that emulated guests get where it is not all that the emulator can."""
# A domain of this type may be defined, but clients know only the hypervisors that libvirt has: Nova refuses a document
# with another name in it.
_OURS = "vman"


def which_program(name: str) -> str | None:
    """As `shutil.which`."""
    import shutil  # noqa: PLC0415 - it brings three compression libraries into the process, for one who asks seldom

    return shutil.which(name)


def max_vcpus(caps: Capabilities, *, cpus: int | None = None) -> int:
    """The most vCPUs that one guest may have: the host's CPUs where it has shared partitions, else its pool of cores.

    ``cpus``: how many the host has, if not as the kernel says.
    """
    pool = len(caps.cores_pool)
    return max(cpus or os.cpu_count() or 1, pool) if "shared" in caps.supports else pool


def types(caps: Capabilities, arch: str, *, native: str) -> tuple[str, ...]:
    """Libvirt's names for what runs a guest's CPUs, the best last. The firmware's cores are no emulation: ``kvm``."""
    if caps.backend != "qemu":
        return ("kvm",)
    return ("qemu", "kvm") if arch == native and caps.accelerator == "kvm" else ("qemu",)


def emulator_of(caps: Capabilities, arch: str, *, which: Which = which_program) -> str:
    """The path of the program that runs such a guest. Empty where none does, or one of another name than QEMU gives."""
    return (which(f"qemu-system-{arch}") or "") if caps.backend == "qemu" else ""


def domain_capabilities_xml(
    caps: Capabilities,
    *,
    emulator: str | None = None,
    arch: str | None = None,
    machine: str | None = None,
    virttype: str | None = None,
    native: str = "",
    which: Which = which_program,
) -> str:
    """What a guest of one kind can have. What is not asked for is the default: the host's architecture, the best type.

    ``native``: the host's architecture, if not as the kernel says.

    Raises:
        LibvirtError: INVALID_ARG: this host runs no such guest; the text has what it runs.
    """
    native = native or os.uname().machine
    paths = {one: emulator_of(caps, one, which=which) for one in caps.archs if one in MACHINES}
    if not paths:
        raise LibvirtError(Code.INVALID_ARG, "arch: this host runs guests of no architecture; vmanctl doctor says why")
    _check("emulatorbin", emulator, paths.values())
    if not arch:
        # The emulator's, where one is named; an emulator runs guests of one architecture.
        fitting = [one for one, path in paths.items() if path == (emulator or path)]
        arch = native if native in fitting else fitting[0]
    _check("arch", arch, paths)
    _check("emulatorbin", emulator, [paths[arch]], of=arch)
    _check("machine", machine, MACHINES[arch], of=arch)
    kinds = types(caps, arch, native=native)
    _check("virttype", virttype, [*kinds, _OURS], of=arch)
    document = tag(
        "domainCapabilities",
        leaf("path", paths[arch]),
        leaf("domain", kinds[-1] if virttype in {None, "", _OURS} else virttype),
        leaf("machine", MACHINES[arch][0]),
        leaf("arch", arch),
        tag("vcpu", max=max_vcpus(caps)),
        _no("iothreads"),
        # vmand boots kernels: there is no firmware to choose.
        _yes("os", _enum("firmware"), _no("loader")),
        _cpu(arch, accelerated="kvm" in kinds),
        _no("memoryBacking"),
        _devices(),
        _features(arch, emulated=caps.backend == "qemu"),
    )
    return f"{document}\n"


def _cpu(arch: str, *, accelerated: bool) -> str:
    """The model is vmand's choice: the host's own, the one that it emulates, or all that the emulator can."""
    model = "" if accelerated else _EMULATED_CPU.get(arch, "")
    custom = [leaf("model", model, usable="yes", vendor="unknown")] if model else []
    return tag(
        "cpu",
        _mode("host-passthrough", supported=accelerated),
        _mode("maximum", supported=not accelerated and not model),
        _mode("host-model", supported=False),
        _mode("custom", *custom, supported=bool(model)),
    )


def _devices() -> str:
    virtio_disk = [_enum("diskDevice", "disk"), _enum("bus", "virtio"), _enum("model", "virtio")]
    return tag(
        "devices",
        _yes("disk", *virtio_disk),
        *map(_no, ("graphics", "video", "hostdev", "rng", "filesystem", "tpm", "redirdev")),
        _yes("channel", _enum("type", "unix")),
        _yes("console", _enum("type", "pty")),
    )


def _features(arch: str, *, emulated: bool) -> str:
    # QEMU's machine has a GIC of version 3; which one the firmware's guests see is not told.
    interrupts = [_enum("version", "3")] if emulated else []
    return tag(
        "features",
        _yes("gic", *interrupts) if arch == "aarch64" else _no("gic"),
        *map(_no, ("vmcoreinfo", "genid", "backingStoreInput", "backup", "sev", "sgx", "hyperv")),
    )


def _yes(name: str, *children: str) -> str:
    return tag(name, *children, supported="yes")


def _no(name: str) -> str:
    return tag(name, supported="no")


def _mode(name: str, *children: str, supported: bool) -> str:
    return tag("mode", *children, name=name, supported="yes" if supported else "no")


def _enum(name: str, *values: str) -> str:
    return tag("enum", *(leaf("value", one) for one in values), name=name)


def _check(what: str, asked: str | None, known: Iterable[str], *, of: str = "") -> None:
    names = [one for one in known if one]
    if asked and asked not in names:
        where = f" for {of}" if of else ""
        use = f"use {' or '.join(names)}, or name none" if names else "name none"
        raise LibvirtError(Code.INVALID_ARG, f"{what}: this host has no {asked!r}{where}; {use}")
