"""Whether a device tree describes the machine that a partition's guest gets: QEMU's ``virt``, as `command` asks for it.

QEMU corrects memory, command line and initial RAM disk in a tree that it is given, and nothing else: with a CPU too
many, another interrupt controller or another way to start CPUs the guest would hang before its first word. So the tree
is compared before anything is started. Devices are the caller's affair: what the tree leaves out, the guest lacks.
Sources: QEMU's docs/system/arm/virt.rst and its own generated trees; the kernel's Documentation/devicetree/bindings
(arm/cpus.yaml, arm/psci.yaml, interrupt-controller/arm,gic-v3.yaml, timer/arm,arch_timer.yaml). Pure.
"""

from collections.abc import Iterator
from itertools import chain

from edgehold.errors import BadRequestError
from vmand.backend.dtb import Node
from vmand.model import plain

MEMORY_BASE = 0x4000_0000
GIC_DISTRIBUTOR = 0x0800_0000
GIC_REDISTRIBUTOR = 0x080A_0000
PSCI_METHOD = "hvc"
"""Without an EL3 and without an EL2 of the guest's own, as our guests are started."""
_REDISTRIBUTOR_BYTES = 0x2_0000  # of one CPU: two frames of 64 KiB
_PSCI = ("arm,psci-1.0", "arm,psci-0.2")
_GIC = "arm,gic-v3"
_TIMER = "arm,armv8-timer"
_CLUSTER = 16  # CPUs that differ in the lowest level of affinity only; a GICv3 reaches so many at once


def check(tree: Node, *, cores: int, memory_bytes: int) -> None:
    """Compare a tree with the partition that is to use it.

    Raises:
        BadRequestError: says what was found, and what is needed.
    """
    _sizes_of_cells(tree, least_size=1)
    _cpus(tree, cores)
    _psci(tree)
    _gic(tree, cores)
    _timer(tree)
    _memory(tree, memory_bytes)


def _wrong(found: str, needed: str) -> BadRequestError:
    return BadRequestError(f"dtb: {found}; needed: {needed}")


def _sizes_of_cells(node: Node, *, least_size: int) -> tuple[int, int]:
    """How many numbers an address and a size of this node's children have."""
    found = node.cell("#address-cells"), node.cell("#size-cells")
    for key, count, least in zip(("#address-cells", "#size-cells"), found, (1, least_size), strict=True):
        if count is None or not least <= count <= 2:
            raise _wrong(f"{node} has {'no' if count is None else count} as {key}", f"{least} to 2")
    return found[0] or 0, found[1] or 0


def _cpus(tree: Node, cores: int) -> None:
    cpus = tree.child("cpus")
    if cpus is None:
        raise _wrong("there is no node /cpus", f"one with {cores} cpu nodes")
    found = [one for one in cpus.children if "cpu" in (one.name.partition("@")[0], *one.texts("device_type"))]
    enabled = [one for one in found if _is_enabled(one)]
    if len(enabled) != cores:
        raise _wrong(f"/cpus has {len(enabled)} enabled cpu nodes", f"{cores}, as the partition has cores")
    width, _ = _sizes_of_cells(cpus, least_size=0)
    expected = [number // _CLUSTER << 8 | number % _CLUSTER for number in range(cores)]
    left = set(expected)
    for one in enabled:
        cells = one.cells("reg")
        if len(cells) != width:
            raise _wrong(f"{one} has {len(cells)} numbers as reg", f"{width}, as {cpus} says in #address-cells")
        affinity = _number(cells)
        if affinity not in left:
            raise _wrong(
                f"{one} has reg {affinity:#x}",
                f"each of {', '.join(map(hex, expected[:4]))}{f' to {expected[-1]:#x}' * (cores > 4)} once",
            )
        left.remove(affinity)
        # A guest with one CPU starts no other; QEMU's own tree says nothing then.
        method = one.texts("enable-method")
        if method[:1] != ("psci",) and (method or cores > 1):
            raise _wrong(f"{one} has {_words(method)} as enable-method", "psci")


def _psci(tree: Node) -> None:
    psci = tree.child("psci")
    if psci is None or not _is_enabled(psci):
        raise _wrong("there is no enabled node /psci", f"one with method {PSCI_METHOD}")
    if not set(psci.texts("compatible")) & set(_PSCI):
        raise _wrong(f"/psci is compatible with {_words(psci.texts('compatible'))}", " or ".join(_PSCI))
    if psci.texts("method") != (PSCI_METHOD,):
        raise _wrong(f"/psci has {_words(psci.texts('method'))} as method", PSCI_METHOD)


def _gic(tree: Node, cores: int) -> None:
    others: list[str] = []
    found: list[tuple[Node, Node]] = []
    for node, parent in _below(tree):
        compatible = node.texts("compatible")
        if _GIC in compatible:
            found.append((node, parent))
        elif "interrupt-controller" in node.properties and compatible and "gic" in compatible[0]:
            others.append(f"{node} ({plain(compatible[0], 64)})")
    if len(found) != 1:
        instead = ", ".join(str(node) for node, _ in found) or ", ".join(others[:3]) or "none"
        raise _wrong(f"the interrupt controller is {instead}", f"one that is compatible with {_GIC}")
    node, parent = found[0]
    regions = _ranges(node, parent)
    begin = [base for base, _ in regions[:2]]
    if begin != [GIC_DISTRIBUTOR, GIC_REDISTRIBUTOR]:
        raise _wrong(
            f"{node} has its distributor and redistributor at {', '.join(map(hex, begin)) or 'no address'}",
            f"{GIC_DISTRIBUTOR:#x} and {GIC_REDISTRIBUTOR:#x}",
        )
    count = node.cell("#redistributor-regions") or 1
    room = sum(size // _REDISTRIBUTOR_BYTES for _, size in regions[1 : 1 + min(count, len(regions))])
    if room < cores:
        raise _wrong(f"{node} has redistributors for {room} CPUs", f"{cores}, as the partition has cores")


def _timer(tree: Node) -> None:
    if not any(_TIMER in node.texts("compatible") for node, _ in _below(tree)):
        raise _wrong("there is no timer", f"a node that is compatible with {_TIMER}")


def _memory(tree: Node, memory_bytes: int) -> None:
    found = [one for one in tree.children if one.texts("device_type") == ("memory",) and _is_enabled(one)]
    ranges = list(chain.from_iterable(_ranges(one, tree) for one in found))
    if ranges != [(MEMORY_BASE, memory_bytes)]:
        said = ", ".join(f"{size:#x} bytes at {base:#x}" for base, size in ranges[:4]) or "none"
        raise _wrong(
            f"the memory is {said}{' …' * (len(ranges) > 4)}",
            f"{memory_bytes:#x} bytes at {MEMORY_BASE:#x} in one node, as the partition has",
        )


def _below(tree: Node) -> Iterator[tuple[Node, Node]]:
    """Every enabled node below with its parent. The depth is bounded by the parser."""
    for one in filter(_is_enabled, tree.children):
        yield one, tree
        yield from _below(one)


def _is_enabled(node: Node) -> bool:
    return node.texts("status")[:1] in ((), ("okay",), ("ok",))


def _ranges(node: Node, parent: Node) -> list[tuple[int, int]]:
    """``reg`` as pairs of address and size, as the CPUs see them."""
    if parent.path != "/" and (parent.path.count("/") > 1 or parent.properties.get("ranges") != b""):
        raise _wrong(
            f"{node} lies behind an address translation of {parent}", "one in / or in a child of / with empty ranges"
        )
    address, size = _sizes_of_cells(parent, least_size=1)
    cells = node.cells("reg")
    if len(cells) % (address + size):
        raise _wrong(
            f"{node} has {len(cells)} numbers as reg", f"a multiple of {address + size}, as {parent} says in its cells"
        )
    step = address + size
    return [
        (_number(cells[at : at + address]), _number(cells[at + address : at + step]))
        for at in range(0, len(cells), step)
    ]


def _number(cells: tuple[int, ...]) -> int:
    number = 0
    for cell in cells:
        number = number << 32 | cell
    return number


def _words(texts: tuple[str, ...]) -> str:
    return plain(", ".join(texts), 100) or "nothing"
