"""Which cores a dedicated partition gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgehold.errors import NoCapacityError
from vmand import placement
from vmand.model import parse_cores
from vmand.placement import Topology, as_list


def host(*, nodes: int = 1, cores: int = 4, threads: int = 1) -> Topology:
    """A regular host. Siblings are numbered as most firmware does: first all first threads, then all second ones."""
    total = nodes * cores
    siblings = {
        core: frozenset(core % total + total * thread for thread in range(threads)) for core in range(total * threads)
    }
    return Topology(siblings=siblings, node={core: core % total // cores for core in siblings})


PLAIN = host()
SMT = host(cores=4, threads=2)  # 0,4 1,5 2,6 3,7
NUMA = host(nodes=2, cores=4)  # 0-3 4-7


def test_core_0_and_its_siblings_stay_with_linux() -> None:
    assert placement.pool(PLAIN, None, PLAIN.online) == {1, 2, 3}
    assert placement.pool(SMT, None, SMT.online) == {1, 2, 3, 5, 6, 7}
    assert placement.pool(SMT, frozenset({0, 4, 1, 5}), SMT.online) == {1, 5}
    assert placement.free(SMT, {0, 1, 4, 5}, ()) == (1, 5)


def test_all_means_whole_smt_cores_of_what_vmand_may_use() -> None:
    assert placement.pool(SMT, None, frozenset({0, 1, 2, 6})) == {2, 6}


def test_wanted_cores_must_exist_be_usable_and_be_whole() -> None:
    with pytest.raises(ValueError, match=r"core 9 does not exist here or vmand may not use it; usable: 0-3"):
        placement.pool(PLAIN, frozenset({1, 9}), PLAIN.online)
    with pytest.raises(ValueError, match=r"core 3 does not exist here or vmand may not use it; usable: 0-1"):
        placement.pool(PLAIN, frozenset({1, 3}), frozenset({0, 1}))
    with pytest.raises(ValueError, match=r"core 2 shares an SMT core with 6"):
        placement.pool(SMT, frozenset({1, 5, 2}), SMT.online)


def test_nobody_gets_the_rest_of_an_smt_core() -> None:
    pool = placement.pool(SMT, None, SMT.online)
    first, _node = placement.place(SMT, pool, (), 3)
    assert first == (1, 2, 5)
    assert placement.free(SMT, pool, first) == (3, 7)
    assert placement.place(SMT, pool, first, 1) == ((3,), 0)
    assert placement.free(SMT, pool, (*first, 3)) == ()


def test_the_node_with_the_fewest_that_fits() -> None:
    pool = placement.pool(NUMA, None, NUMA.online)
    assert placement.place(NUMA, pool, (), 2) == ((1, 2), 0)
    assert placement.place(NUMA, pool, (), 4) == ((4, 5, 6, 7), 1)
    assert placement.place(NUMA, pool, (4, 5), 2) == ((6, 7), 1)
    assert placement.place(NUMA, pool, (4,), 1) == ((1,), 0)  # of two equal ones the first


def test_a_kernel_without_nodes() -> None:
    flat = Topology(siblings={core: frozenset({core}) for core in range(3)}, node={})
    assert placement.place(flat, {1, 2}, (), 2) == ((1, 2), None)


def test_too_few_says_what_is_left() -> None:
    pool = {1, 2, 3}
    with pytest.raises(NoCapacityError, match=r"3 are wanted for a dedicated .* and 2 are left: cores 1, 3; use fewer"):
        placement.place(PLAIN, pool, (2,), 3)
    with pytest.raises(NoCapacityError, match=r"2 are wanted .* and 1 is left: core 3;"):
        placement.place(PLAIN, pool, (1, 2), 2)
    with pytest.raises(NoCapacityError, match=r"1 is wanted .* and none is left;"):
        placement.place(PLAIN, pool, (1, 2, 3), 1)
    with pytest.raises(
        NoCapacityError,
        match=r"5 are wanted .*, all on one NUMA node, and node 0 has 3 left \(cores 1, 2, 3\), "
        r"node 1 has 4 left \(cores 4, 5, 6, 7\); use fewer",
    ):
        placement.place(NUMA, placement.pool(NUMA, None, NUMA.online), (), 5)


def test_a_core_that_went_offline_is_only_itself() -> None:
    assert placement.free(PLAIN, {1, 2, 3}, (2, 77)) == (1, 3)


@given(
    nodes=st.integers(1, 3),
    cores=st.integers(1, 5),
    threads=st.integers(1, 4),
    counts=st.lists(st.integers(1, 6), max_size=8),
)
def test_no_two_partitions_ever_share_an_smt_core(nodes: int, cores: int, threads: int, counts: list[int]) -> None:
    topology = host(nodes=nodes, cores=cores, threads=threads)
    pool = placement.pool(topology, None, topology.online)
    taken: list[int] = []
    for count in counts:
        before = placement.free(topology, pool, taken)
        try:
            cpus, node = placement.place(topology, pool, taken, count)
        except NoCapacityError:
            by_node = [sum(topology.node[core] == node for core in before) for node in range(nodes)]
            assert max(by_node) < count
            continue
        assert len(cpus) == len(set(cpus)) == count
        assert list(cpus) == sorted(cpus)
        assert {topology.node[core] for core in cpus} == {node}
        assert not topology.whole(cpus) & topology.whole([*taken, 0])
        assert len(topology.whole(cpus)) < count + threads
        taken += cpus


@given(st.frozensets(st.integers(0, 300)))
def test_lists_are_what_the_kernel_writes(cores: frozenset[int]) -> None:
    assert parse_cores(as_list(cores)) == cores


def test_lists_are_short() -> None:
    assert as_list({5, 1, 2, 3}) == "1-3,5"
    assert as_list(()) == ""
