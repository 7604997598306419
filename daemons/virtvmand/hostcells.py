"""The host's CPUs and memory nodes as the kernel shows them: what belongs together, nothing that changes by the second.

Sources: Documentation/admin-guide/cputopology.rst, Documentation/ABI/stable/sysfs-devices-node and
Documentation/admin-guide/mm/hugetlbpage.rst. Directories are parameters, so that tests have trees of their own. What a
kernel does not tell is None or empty here, never a number that nobody has measured.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from virtvmand.errors import Code, LibvirtError

PROC = Path("/proc")
SYS = Path("/sys")
_NODE = re.compile(r"node([0-9]+)")
_HUGE = re.compile(r"hugepages-([0-9]+)kB")
_NUMBER = re.compile(r"-?[0-9]+", re.ASCII)
_DEVICES = "devices/system"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a CPU is. The ids are the kernel's: they need not be dense, and cores of two clusters may share one."""

    socket: int
    die: int
    core: int
    siblings: frozenset[int]
    """The online CPUs of its SMT core, itself among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """An online CPU."""

    id: int
    place: Place | None
    """None where this kernel tells no topology, as on some ARM boards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """How many pages of one size a node has, free ones among them."""

    size_kib: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A memory node, in libvirt's words a NUMA cell. A kernel without NUMA has one: the whole host."""

    id: int
    cpus: tuple[Cpu, ...]
    memory_kib: int | None
    pages: tuple[Pages, ...] = ()
    distances: tuple[tuple[int, int], ...] = ()
    """(cell, distance) for each cell, in the firmware's units (10: itself); empty where it does not tell."""


def online(sysfs: Path = SYS) -> frozenset[int]:
    """The CPUs that are online now.

    Raises:
        LibvirtError: the kernel does not tell.
    """
    path = sysfs / _DEVICES / "cpu/online"
    found = read_cpus(path)
    if not found:
        raise LibvirtError(Code.SYSTEM_ERROR, f"{path} names no CPU; is sysfs mounted?")
    return found


def present(sysfs: Path = SYS) -> frozenset[int]:
    """The CPUs that the host has, those that are offline among them. Raises as `online`."""
    return read_cpus(sysfs / _DEVICES / "cpu/present") | online(sysfs)


def cells(*, proc: Path = PROC, sysfs: Path = SYS) -> tuple[Cell, ...]:
    """The host's memory nodes by id, at least one. Raises as `online`."""
    there = online(sysfs)
    cpus = {one: Cpu(id=one, place=_place(sysfs, one, there)) for one in sorted(there)}
    found = tuple(_cell(sysfs, number, cpus) for number in nodes(sysfs))
    if any(cell.cpus for cell in found):
        return found
    total = read_memory(proc / "meminfo").get("MemTotal")
    return (
        Cell(id=0, cpus=tuple(cpus.values()), memory_kib=total, pages=_pages(sysfs / "kernel/mm/hugepages", total)),
    )


def nodes(sysfs: Path = SYS) -> list[int]:
    """The ids of the memory nodes, ascending; none on a kernel without NUMA."""
    return sorted(_numbers(sysfs / _DEVICES / "node", _NODE))


def node_directory(sysfs: Path, node: int) -> Path:
    """Where a memory node's files are."""
    return sysfs / _DEVICES / f"node/node{node}"


def huge_page_sizes(sysfs: Path = SYS) -> list[int]:
    """Sizes of huge pages that this kernel can give, in KiB, ascending; none where it can't."""
    return sorted(_numbers(sysfs / "kernel/mm/hugepages", _HUGE))


def base_page_kib() -> int:
    """The size of an ordinary page."""
    return os.sysconf("SC_PAGE_SIZE") // 1024


def read(path: Path | str) -> str | None:
    """What a file of the kernel's says, without the line's end; None where there is none, or not for this user."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # several files a CPU: a third of what Path.read_text costs
        try:
            parts = []
            while part := os.read(fd, 65536):
                parts.append(part)
        finally:
            os.close(fd)
    except OSError:
        return None
    return b"".join(parts).decode(errors="replace").strip("\n\0")


def read_number(path: Path | str) -> int | None:
    """A file with one number; None where there is none."""
    text = (read(path) or "").strip()
    return int(text) if _NUMBER.fullmatch(text) else None


def read_cpus(path: Path | str) -> frozenset[int]:
    """A file with a list of CPUs, as ``0-3,8``; empty where there is none."""
    found: set[int] = set()
    for part in (read(path) or "").strip().split(","):
        first, dash, last = part.partition("-")
        if first.isdigit() and (not dash or last.isdigit()):  # else "" or "(null)": no CPU
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def read_memory(path: Path) -> dict[str, int]:
    """A meminfo file, the host's (proc_meminfo(5)) or a node's: KiB by name. Empty where there is none."""
    found: dict[str, int] = {}
    for line in (read(path) or "").splitlines():
        name, _colon, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name.rpartition(" ")[2]] = int(words[0])  # a node's lines begin "Node 0 "
    return found


def _cell(sysfs: Path, node: int, cpus: dict[int, Cpu]) -> Cell:
    directory = node_directory(sysfs, node)
    memory = read_memory(directory / "meminfo").get("MemTotal")
    return Cell(
        id=node,
        cpus=tuple(cpus[one] for one in sorted(read_cpus(directory / "cpulist") & cpus.keys())),
        memory_kib=memory,
        pages=_pages(directory / "hugepages", memory),
        distances=_distances(sysfs, directory),
    )


def _place(sysfs: Path, cpu: int, there: frozenset[int]) -> Place | None:
    topology = f"{sysfs}/{_DEVICES}/cpu/cpu{cpu}/topology"
    core = read_number(f"{topology}/core_id")
    if core is None:
        return None
    # The second is the first's name before Linux 5.3.
    siblings = read_cpus(f"{topology}/core_cpus_list") or read_cpus(f"{topology}/thread_siblings_list")
    return Place(
        # -1: this architecture has no such level, and what is not divided is one.
        socket=max(read_number(f"{topology}/physical_package_id") or 0, 0),
        die=max(read_number(f"{topology}/die_id") or 0, 0),
        core=max(core, 0),
        siblings=(siblings & there) | {cpu},
    )


def _pages(directory: Path, memory_kib: int | None) -> tuple[Pages, ...]:
    """Ordinary pages are those that no pool of huge pages has taken."""
    huge = []
    for size in sorted(_numbers(directory, _HUGE)):
        count = read_number(directory / f"hugepages-{size}kB/nr_hugepages")
        if count is not None:
            huge.append(Pages(size_kib=size, count=count))
    if memory_kib is None:
        return tuple(huge)
    rest = max(memory_kib - sum(one.size_kib * one.count for one in huge), 0)
    return (Pages(size_kib=base_page_kib(), count=rest // base_page_kib()), *huge)


def _distances(sysfs: Path, directory: Path) -> tuple[tuple[int, int], ...]:
    values = [int(word) for word in (read(directory / "distance") or "").split() if word.isdigit()]
    there = nodes(sysfs)
    return tuple(zip(there, values, strict=True)) if len(values) == len(there) else ()


def _numbers(directory: Path, pattern: re.Pattern[str]) -> Iterable[int]:
    """The numbers in the names of a directory's entries; none where there is no such directory."""
    try:
        names = os.listdir(directory)  # noqa: PTH208 - names are enough
    except OSError:
        return []
    return [int(found[1]) for name in names if (found := pattern.fullmatch(name))]
