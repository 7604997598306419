"""Which cores a dedicated partition gets: whole SMT cores of one NUMA node, and never core 0, which stays with Linux.

Pure: no I/O. A "core" of the settings and of the protocol is a CPU as Linux numbers them; an SMT core is what several
of them share. Half an SMT core is never given: its other half would slow down and could watch what runs beside it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from edgehold.errors import NoCapacityError

LINUX = 0
"""The core that stays with Linux, with all that shares its SMT core: its timers and interrupts can't all be moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The host's online cores."""

    siblings: Mapping[int, frozenset[int]]
    """For each core the cores of its SMT core, itself among them."""
    node: Mapping[int, int]
    """For each core its NUMA node; empty where the kernel knows of none."""

    @property
    def online(self) -> frozenset[int]:
        return frozenset(self.siblings)

    def whole(self, cores: Iterable[int]) -> frozenset[int]:
        """The cores with all that share an SMT core with them. One that is offline stands for itself."""
        return frozenset(one for core in cores for one in self.siblings.get(core, frozenset({core})))


def pool(topology: Topology, wanted: frozenset[int] | None, usable: frozenset[int]) -> frozenset[int]:
    """The cores that dedicated partitions may get. None: all of ``usable``, the cores that vmand itself may use.

    Core 0 and its siblings are left out, also where they are wanted.

    Raises:
        ValueError: a wanted core does not exist or is not usable, or only half of an SMT core is wanted.
    """
    reserved = topology.whole({LINUX})
    usable &= topology.online
    if wanted is None:
        return frozenset(one for one in usable - reserved if topology.siblings[one] <= usable)
    if missing := sorted(wanted - usable - {LINUX}):
        raise ValueError(
            f"core {missing[0]} does not exist here or vmand may not use it; usable: {as_list(usable) or 'none'}"
        )
    for one in sorted(wanted - reserved):
        if rest := topology.siblings[one] - wanted:
            raise ValueError(
                f"core {one} shares an SMT core with {as_list(rest)}, and only whole SMT cores are given; "
                "name all of them or none"
            )
    return wanted - reserved


def free(topology: Topology, pool: Iterable[int], taken: Iterable[int]) -> tuple[int, ...]:
    """What a dedicated partition may still be given: SMT cores of which nobody has a part."""
    return tuple(sorted(frozenset(pool) - topology.whole(taken) - topology.whole({LINUX})))


def place(
    topology: Topology, pool: Iterable[int], taken: Iterable[int], count: int
) -> tuple[tuple[int, ...], int | None]:
    """``count`` free cores of one NUMA node, ascending, and the node (None where the kernel knows of none).

    The node with the fewest free cores that still fits, so that large partitions find room later. Where an SMT core
    is given in part, its rest is given to nobody else.

    Raises:
        NoCapacityError: no node has as many; says what is left, by node where that is the reason.
    """
    left = free(topology, pool, taken)
    nodes: dict[int | None, list[int]] = {}
    for core in left:
        nodes.setdefault(topology.node.get(core), []).append(core)
    fitting = [(len(cores), -1 if node is None else node) for node, cores in nodes.items() if len(cores) >= count]
    if not fitting:
        raise NoCapacityError(_too_few(left, nodes, count))
    number = min(fitting)[1]
    node = None if number < 0 else number
    # By the lowest number of each SMT core, so that as few of them as possible are touched.
    ordered = sorted(nodes[node], key=lambda core: (min(topology.siblings.get(core, {core})), core))
    return tuple(sorted(ordered[:count])), node


def _too_few(left: Collection[int], nodes: Mapping[int | None, Collection[int]], count: int) -> str:
    wanted = f"cores: {count} {'is' if count == 1 else 'are'} wanted for a dedicated partition"
    if len(left) >= count:
        ordered = sorted(nodes.items(), key=lambda one: one[0] or 0)
        parts = (f"node {node} has {len(cores)} left ({_named(cores)})" for node, cores in ordered)
        said = f"{wanted}, all on one NUMA node, and {', '.join(parts)}"
    elif left:
        said = f"{wanted} and {len(left)} {'is' if len(left) == 1 else 'are'} left: {_named(left)}"
    else:
        said = f"{wanted} and none is left"
    return f"{said}; use fewer, destroy a partition, or create it with mode shared"


def _named(cores: Collection[int]) -> str:
    return f"{'core' if len(cores) == 1 else 'cores'} {', '.join(map(str, sorted(cores)))}"


def as_list(cores: Iterable[int]) -> str:
    """Cores as the kernel writes lists of CPUs: ``1-3,5``."""
    parts: list[str] = []
    run: list[int] = []
    for core in sorted(set(cores)):
        if run and core != run[-1] + 1:
            parts.append(_range(run))
            run = []
        run.append(core)
    return ",".join([*parts, _range(run)] if run else parts)


def _range(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
