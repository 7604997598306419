"""The host as libvirt's clients read it: capabilities, and what the firmware says of the machine.

Sources: libvirt's formatcaps page and, for sysinfo, its formatdomain page. Only what this host tells is in there; an
element that is left out means "not known", and so does a client take it. The texts change seldom: callers keep them.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from edgehold.api.vmand import Capabilities
from virtvmand import hostcells, hostinfo
from virtvmand.domaincaps import MACHINES, Which, emulator_of, max_vcpus, types, which_program
from virtvmand.errors import Code, LibvirtError
from virtvmand.hostcells import PROC, SYS, Cell, Cpu
from virtvmand.markup import leaf, tag

_DMI = "class/dmi/id"
# Element, then libvirt's name of an entry and the kernel's (drivers/firmware/dmi-id.c). Serial numbers and the uuid
# are for root alone.
_SMBIOS: Mapping[str, Mapping[str, str]] = {
    "bios": {"vendor": "bios_vendor", "version": "bios_version", "date": "bios_date", "release": "bios_release"},
    "system": {
        "manufacturer": "sys_vendor",
        "product": "product_name",
        "version": "product_version",
        "serial": "product_serial",
        "uuid": "product_uuid",
        "sku": "product_sku",
        "family": "product_family",
    },
    "baseBoard": {
        "manufacturer": "board_vendor",
        "product": "board_name",
        "version": "board_version",
        "serial": "board_serial",
        "asset": "board_asset_tag",
    },
    "chassis": {
        "manufacturer": "chassis_vendor",
        "version": "chassis_version",
        "serial": "chassis_serial",
        "asset": "chassis_asset_tag",
    },
}
# Devicetree Specification, section 2.3 and 3.2: properties of the root node.
_DEVICE_TREE = "firmware/devicetree/base"
_TREE: Mapping[str, str] = {"product": "model", "serial": "serial-number"}


def capabilities_xml(
    caps: Capabilities,
    *,
    proc: Path = PROC,
    sysfs: Path = SYS,
    machine_id: Path = hostinfo.MACHINE_ID,
    native: str = "",
    which: Which = which_program,
) -> str:
    """What virsh capabilities shows: the host's CPUs and memory as they belong together, and the guests that it runs.

    ``native``: the host's architecture, if not as the kernel says. Raises as `hostinfo.node_info`.
    """
    native = native or os.uname().machine
    host = tag(
        "host",
        leaf("uuid", hostinfo.host_uuid(sysfs=sysfs, machine_id=machine_id) or ""),
        _cpu(native, proc, sysfs),
        tag("migration_features"),
        _topology(hostcells.cells(proc=proc, sysfs=sysfs)),
        tag("secmodel", leaf("model", "none"), leaf("doi", "0")),
    )
    # Clients take the first guest for the default.
    archs = sorted(MACHINES.keys() & set(caps.archs), key=lambda arch: (arch != native, arch))
    return tag("capabilities", host, *(_guest(caps, arch, native=native, which=which) for arch in archs)) + "\n"


def sysinfo_xml(*, sysfs: Path = SYS) -> str:
    """What the host's firmware says of the machine, as far as this user may read it.

    Raises:
        LibvirtError: NO_SUPPORT: it says nothing.
    """
    parts = {element: _entries(sysfs / _DMI, entries) for element, entries in _SMBIOS.items()}
    parts["system"] = parts["system"] or _entries(sysfs / _DEVICE_TREE, _TREE)
    if not any(parts.values()):
        raise LibvirtError(
            Code.NO_SUPPORT,
            f"sysinfo: this host's firmware tells nothing: there is neither SMBIOS ({sysfs / _DMI}) nor a device tree "
            f"({sysfs / _DEVICE_TREE})",
        )
    return tag("sysinfo", *(tag(name, *told) for name, told in parts.items() if told), type="smbios") + "\n"


def _entries(directory: Path, files: Mapping[str, str]) -> list[str]:
    told = (leaf("entry", hostcells.read(directory / file) or "", name=name) for name, file in files.items())
    return [entry for entry in told if entry]


def _cpu(native: str, proc: Path, sysfs: Path) -> str:
    """No model: libvirt's are names of a database of its own, and one that is not in there says nothing to clients."""
    info = hostinfo.node_info(proc=proc, sysfs=sysfs)
    pages = [hostcells.base_page_kib(), *hostcells.huge_page_sizes(sysfs)]
    return tag(
        "cpu",
        leaf("arch", native),
        tag("topology", sockets=info.sockets, dies=1, cores=info.cores, threads=info.threads),
        *(tag("pages", unit="KiB", size=size) for size in pages),
    )


def _topology(cells: tuple[Cell, ...]) -> str:
    return tag("topology", tag("cells", *map(_cell, cells), num=len(cells)))


def _cell(cell: Cell) -> str:
    distances = [tag("sibling", id=other, value=value) for other, value in cell.distances]
    return tag(
        "cell",
        "" if cell.memory_kib is None else leaf("memory", cell.memory_kib, unit="KiB"),
        *(leaf("pages", one.count, unit="KiB", size=one.size_kib) for one in cell.pages),
        tag("distances", *distances) if distances else "",
        tag("cpus", *map(_place, cell.cpus), num=len(cell.cpus)),
        id=cell.id,
    )


def _place(cpu: Cpu) -> str:
    where = cpu.place
    if where is None:
        return tag("cpu", id=cpu.id)
    siblings = ",".join(map(str, sorted(where.siblings)))
    return tag("cpu", id=cpu.id, socket_id=where.socket, die_id=where.die, core_id=where.core, siblings=siblings)


def _guest(caps: Capabilities, arch: str, *, native: str, which: Which) -> str:
    name, *others = MACHINES[arch]
    most = max_vcpus(caps)
    return tag(
        "guest",
        leaf("os_type", "hvm"),
        tag(
            "arch",
            leaf("wordsize", 64),
            leaf("emulator", emulator_of(caps, arch, which=which)),
            leaf("machine", name, maxCpus=most),
            *(leaf("machine", one, canonical=name, maxCpus=most) for one in others),
            # Without children: what stands beside them is true of each (so Nova reads it).
            *(tag("domain", type=kind) for kind in types(caps, arch, native=native)),
            name=arch,
        ),
    )
