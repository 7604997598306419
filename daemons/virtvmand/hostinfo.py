"""The host in numbers, grouped and counted as libvirt's clients expect it; each is read when it is asked for.

Sources: proc_stat(5), proc_meminfo(5), proc_cpuinfo(5); for the conventions libvirt's API reference, module
libvirt-host (virNodeInfo, virNodeGetCPUStats, virNodeGetMemoryStats, virNodeGetCPUMap).
"""

import os
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from virtvmand import hostcells
from virtvmand.errors import Code, LibvirtError
from virtvmand.hostcells import PROC, SYS

ALL = -1
"""For "of the whole host" where a CPU or a cell could be named."""
MACHINE_ID = Path("/etc/machine-id")
_KIB = 1024
_NS_PER_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
# virNodeInfo: char model[32], of which the last is the end.
_MODEL_BYTES = 31
# What firmware of cheap boards says instead of an identity, beside one digit repeated.
_NOBODYS = frozenset({uuid.UUID("03000200-0400-0500-0006-000700080009")})
# machine-id(5) is not to be shown to others as it is: what they see is made from it and from this.
_OURS = b"urn:edgehold:virtvmand:host"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """virNodeInfo. ``nodes * sockets * cores * threads`` is the number of CPUs, those that are offline among them."""

    model: str
    """The architecture, at most 31 bytes."""
    memory_kib: int
    cpus: int
    """CPUs that are online."""
    mhz: int
    """0 where it is not known: libvirt's convention, and what the ABI has room for."""
    nodes: int
    sockets: int
    """Of one node."""
    cores: int
    """Of one socket."""
    threads: int
    """Of one core."""


def node_info(*, proc: Path = PROC, sysfs: Path = SYS, machine: str = "") -> NodeInfo:
    """The host at a glance. ``machine``: the architecture, if not as the kernel says.

    The four counts describe only hosts of which all parts are alike. For another one (big and small cores, half of a
    core offline, sockets of two sizes) libvirt says one node, one socket and as many cores as there are CPUs, and
    clients multiply; capabilities have the topology as it is.

    Raises:
        LibvirtError: /proc or /sys do not tell.
    """
    (total,) = _memory(proc / "meminfo", "MemTotal")
    found = [cell for cell in hostcells.cells(proc=proc, sysfs=sysfs) if cell.cpus]
    places = [cpu.place for cell in found for cpu in cell.cpus]
    sockets = cores = threads = 1
    for cell in found:
        by_socket: dict[int, set[frozenset[int]]] = {}
        for cpu in cell.cpus:
            # By the set of threads: a core's id is its own only within a cluster or a die.
            siblings = cpu.place.siblings if cpu.place else frozenset({cpu.id})
            by_socket.setdefault(cpu.place.socket if cpu.place else 0, set()).add(siblings)
            threads = max(threads, len(siblings))
        sockets = max(sockets, len(by_socket))
        cores = max(cores, *map(len, by_socket.values()))
    nodes, every = len(found), len(hostcells.present(sysfs))
    if nodes * sockets * cores * threads != every:
        nodes, sockets, cores, threads = 1, 1, every, 1
    return NodeInfo(
        model=(machine or os.uname().machine).encode()[:_MODEL_BYTES].decode(errors="ignore"),
        memory_kib=total,
        cpus=len(places),
        mhz=_mhz(proc, sysfs),
        nodes=nodes,
        sockets=sockets,
        cores=cores,
        threads=threads,
    )


def cpu_map(*, sysfs: Path = SYS) -> tuple[int, frozenset[int]]:
    """How many CPUs a map of this host has (the highest number and one), and which are online.

    Raises:
        LibvirtError: the kernel does not tell.
    """
    return max(hostcells.present(sysfs)) + 1, hostcells.online(sysfs)


def bitmap(cpus: Collection[int], length: int) -> bytes:
    """CPUs as libvirt's cpumap of ``length`` bytes: CPU 0 is the lowest bit of the first.

    What does not fit is left out. A map of ``count`` CPUs has ``(count + 7) // 8`` bytes (VIR_CPU_MAPLEN).
    """
    bits = sum(1 << cpu for cpu in set(cpus) if cpu < length * 8)
    return bits.to_bytes(length, "little")


def cpu_stats(cpu: int = ALL, *, proc: Path = PROC) -> list[tuple[str, int]]:
    """Where a CPU's time since boot went, in ns: ``kernel``, ``user``, ``idle``, ``iowait``; `ALL`: the sum of all.

    ``kernel`` has interrupts in it, ``user`` what was niced and what guests ran. Time that a hypervisor below took
    (steal) is in none of them, as with libvirt.

    Raises:
        LibvirtError: INVALID_ARG: no such CPU is online; SYSTEM_ERROR: the kernel does not tell.
    """
    wanted = "cpu" if cpu == ALL else f"cpu{cpu}"
    known = []
    text = hostcells.read(proc / "stat")
    if text is None:
        raise LibvirtError(Code.SYSTEM_ERROR, f"{proc / 'stat'} can't be read; is /proc mounted?")
    for line in text.splitlines():
        name, *values = line.split()
        if not name.startswith("cpu"):
            break  # the CPUs come first
        if name == wanted:
            user, nice, system, idle, iowait, irq, softirq = map(int, values[:7])
            sums = {"kernel": system + irq + softirq, "user": user + nice, "idle": idle, "iowait": iowait}
            return [(one, ticks * _NS_PER_TICK) for one, ticks in sums.items()]
        known.append(name.removeprefix("cpu"))
    raise LibvirtError(
        Code.INVALID_ARG,
        f"cpuNum: no CPU {cpu} is online; use {ALL} for all of them, or one of {', '.join(filter(None, known))}",
    )


def memory_stats(cell: int = ALL, *, proc: Path = PROC, sysfs: Path = SYS) -> list[tuple[str, int]]:
    """The memory in KiB: ``total`` and ``free``, and for the whole host (`ALL`) also ``buffers`` and ``cached``.

    Raises:
        LibvirtError: INVALID_ARG: no such cell; SYSTEM_ERROR: the kernel does not tell.
    """
    names = {"total": "MemTotal", "free": "MemFree"}
    if cell == ALL:
        names |= {"buffers": "Buffers", "cached": "Cached"}
    found = _memory(proc / "meminfo" if cell == ALL else _meminfo(cell, proc, sysfs), *names.values())
    return list(zip(names, found, strict=True))


def cells_free(start: int, count: int, *, proc: Path = PROC, sysfs: Path = SYS) -> list[int]:
    """Free memory in bytes of at most ``count`` cells from cell ``start`` on. The place in the list is the cell's id.

    A number in between that no cell has is 0: there is no memory.

    Raises:
        LibvirtError: INVALID_ARG: no such cell, or ``count`` is not positive; SYSTEM_ERROR: the kernel does not tell.
    """
    if count < 1:
        raise LibvirtError(Code.INVALID_ARG, f"maxCells: {count}; it must be at least 1")
    there = hostcells.nodes(sysfs) or [0]
    if not 0 <= start <= there[-1]:
        raise LibvirtError(Code.INVALID_ARG, f"startCell: no cell {start}; this host has 0 to {there[-1]}")
    wanted = range(start, min(start + count, there[-1] + 1))
    return [dict(memory_stats(one, proc=proc, sysfs=sysfs))["free"] * _KIB if one in there else 0 for one in wanted]


def free_memory(*, proc: Path = PROC) -> int:
    """Memory in bytes that nothing uses, caches counted as used (libvirt's convention).

    Raises:
        LibvirtError: the kernel does not tell.
    """
    (free,) = _memory(proc / "meminfo", "MemFree")
    return free * _KIB


def hostname() -> str:
    """The name that the host gives itself. No resolver is asked for a longer one: that may take seconds."""
    return os.uname().nodename


def host_uuid(*, sysfs: Path = SYS, machine_id: Path = MACHINE_ID) -> str | None:
    """An identity of this host that lasts: the firmware's (which only root may read), else one made from machine-id(5).

    None where the host has neither.
    """
    told = _uuid(hostcells.read(sysfs / "class/dmi/id/product_uuid"))
    if told is not None and len(set(told.hex)) > 1 and told not in _NOBODYS:
        return str(told)
    own = _uuid(hostcells.read(machine_id))
    if own is None:
        return None
    import hmac  # noqa: PLC0415 - it brings libcrypto into the process, for which few have a need

    return str(uuid.UUID(bytes=hmac.digest(own.bytes, _OURS, "sha256")[:16], version=4))


def _uuid(text: str | None) -> uuid.UUID | None:
    try:
        return uuid.UUID((text or "").strip())
    except ValueError:  # nothing, or "uninitialized" at a first boot
        return None


def _mhz(proc: Path, sysfs: Path) -> int:
    """The fastest that cpufreq allows; where there is none (virtual machines), what /proc/cpuinfo says.

    libvirt asks /proc/cpuinfo alone: that is the speed of this moment, and to tell it some kernels interrupt every
    core, those of partitions too.
    """
    for cpu in sorted(hostcells.online(sysfs)):
        khz = hostcells.read_number(f"{sysfs}/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq")
        if khz is not None:
            return khz // 1000
    for line in (hostcells.read(proc / "cpuinfo") or "").splitlines():
        name, _colon, value = line.partition(":")
        whole = value.strip().partition(".")[0]
        if name.strip() == "cpu MHz" and whole.isdigit():
            return int(whole)
    return 0


def _meminfo(cell: int, proc: Path, sysfs: Path) -> Path:
    there = hostcells.nodes(sysfs)
    if cell in there:
        return hostcells.node_directory(sysfs, cell) / "meminfo"
    if not there and cell == 0:  # a kernel without NUMA: the host is the cell
        return proc / "meminfo"
    known = ", ".join(map(str, there or [0]))
    raise LibvirtError(Code.INVALID_ARG, f"cellNum: no cell {cell}; use {ALL} for all of them, or one of {known}")


def _memory(path: Path, *lines: str) -> list[int]:
    found = hostcells.read_memory(path)
    if missing := [line for line in lines if line not in found]:
        raise LibvirtError(Code.SYSTEM_ERROR, f"{path} has no {missing[0]}; are /proc and /sys mounted?")
    return [found[line] for line in lines]
