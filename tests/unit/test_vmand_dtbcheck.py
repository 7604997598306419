"""A device tree against the partition: what fits, and each way in which it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgehold.errors import BadRequestError
from edgehold.testing.devicetree import Tree, blob, cells, changed, texts, virt, wide
from vmand.backend.dtb import parse
from vmand.backend.dtbcheck import check

MEMORY = 256 << 20
GOOD = virt(cores=2, memory_bytes=MEMORY)
GIC = "intc@8000000"


def check_tree(tree: Tree, *, cores: int = 2, memory_bytes: int = MEMORY) -> None:
    check(parse(blob(tree)), cores=cores, memory_bytes=memory_bytes)


@pytest.mark.parametrize("cores", [1, 2, 16, 17, 40, 123])
@pytest.mark.parametrize("memory_bytes", [16 << 20, MEMORY, 5 << 30])
def test_trees_that_fit(cores: int, memory_bytes: int) -> None:
    check_tree(virt(cores=cores, memory_bytes=memory_bytes), cores=cores, memory_bytes=memory_bytes)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("cpus/cpu@0/status", texts("okay")),
        ("cpus/cpu@0/status", texts("ok")),
        ("cpus/cpu@2", {"device_type": texts("cpu"), "reg": cells(2), "status": texts("disabled")}),
        ("cpus/cpu-map", {}),
        ("cpus/idle-states", {"entry-method": texts("psci")}),
        ("psci/compatible", texts("arm,psci-0.2", "arm,psci")),
        ("timer/compatible", texts("arm,armv8-timer", "arm,armv7-timer")),
        (f"{GIC}/#redistributor-regions", cells(1)),
        (f"{GIC}/its@8080000", {"compatible": texts("arm,gic-v3-its"), "reg": wide(0x8080000, 0x20000)}),
        ("old-gic", {"compatible": texts("arm,gic-400"), "status": texts("disabled")}),
        ("chosen", None),
        ("more", {"reg": b"any"}),
    ],
)
def test_differences_that_do_no_harm(path: str, value: "bytes | Tree | None") -> None:
    check_tree(changed(GOOD, path, value))


def test_a_guest_with_one_cpu_starts_no_other() -> None:
    """QEMU's own tree has no enable-method then."""
    tree = changed(virt(cores=1, memory_bytes=MEMORY), "cpus/cpu@0/enable-method", None)
    check_tree(tree, cores=1)
    tree = changed(tree, "cpus/cpu@0/enable-method", texts("spin-table"))
    with pytest.raises(BadRequestError, match="has spin-table as enable-method; needed: psci"):
        check_tree(tree, cores=1)


def test_an_interrupt_controller_on_a_bus_without_translation() -> None:
    bus: Tree = {"#address-cells": cells(2), "#size-cells": cells(2), "ranges": b"", GIC: GOOD[GIC]}
    tree = changed(changed(GOOD, GIC, None), "soc", bus)
    check_tree(tree)
    translated = wide(0, 0x800_0000, 0x100_0000)
    with pytest.raises(BadRequestError, match=r"/soc/intc@8000000 lies behind an address translation of /soc; needed"):
        check_tree(changed(tree, "soc/ranges", translated))
    with pytest.raises(BadRequestError, match="behind an address translation of /soc"):
        check_tree(changed(tree, "soc/ranges", None))
    inner = changed(changed(GOOD, GIC, None), "outer", {"soc": bus, "ranges": translated})
    with pytest.raises(BadRequestError, match="behind an address translation of /outer/soc"):
        check_tree(inner)


REFUSED: list[tuple[str, "bytes | Tree | None", str]] = [
    ("#address-cells", None, "/ has no as #address-cells; needed: 1 to 2"),
    ("#address-cells", cells(0), "/ has 0 as #address-cells; needed: 1 to 2"),
    ("#size-cells", cells(3), "/ has 3 as #size-cells; needed: 1 to 2"),
    ("#size-cells", b"ab", "/ has a #size-cells of 2 bytes; 32-bit numbers are needed"),
    ("cpus", None, "there is no node /cpus; needed: one with 2 cpu nodes"),
    ("cpus/cpu@1", None, "/cpus has 1 enabled cpu nodes; needed: 2, as the partition has cores"),
    ("cpus/cpu@2", {"device_type": texts("cpu"), "reg": cells(2)}, "/cpus has 3 enabled cpu nodes; needed: 2"),
    ("cpus/more@2", {"device_type": texts("cpu"), "reg": cells(2)}, "/cpus has 3 enabled cpu nodes; needed: 2"),
    ("cpus/cpu@1/status", texts("disabled"), "/cpus has 1 enabled cpu nodes; needed: 2"),
    ("cpus/cpu@1/status", texts("fail"), "/cpus has 1 enabled cpu nodes; needed: 2"),
    ("cpus/#address-cells", cells(2), "/cpus/cpu@0 has 1 numbers as reg; needed: 2, as /cpus says in #address-cells"),
    ("cpus/#address-cells", None, "/cpus has no as #address-cells"),
    ("cpus/cpu@1/reg", cells(0x100), "/cpus/cpu@1 has reg 0x100; needed: each of 0x0, 0x1 once"),
    ("cpus/cpu@1/reg", cells(0), "/cpus/cpu@1 has reg 0x0; needed: each of 0x0, 0x1 once"),
    ("cpus/cpu@1/reg", None, "/cpus/cpu@1 has 0 numbers as reg; needed: 1"),
    ("cpus/cpu@1/enable-method", None, "/cpus/cpu@1 has nothing as enable-method; needed: psci"),
    ("cpus/cpu@0/enable-method", texts("spin-table"), "/cpus/cpu@0 has spin-table as enable-method; needed: psci"),
    ("cpus/cpu@0/enable-method", b"psci", "/cpus/cpu@0 has a enable-method that is no text"),
    ("psci", None, "there is no enabled node /psci; needed: one with method hvc"),
    ("psci/status", texts("disabled"), "there is no enabled node /psci"),
    ("psci/method", texts("smc"), "/psci has smc as method; needed: hvc"),
    ("psci/method", None, "/psci has nothing as method; needed: hvc"),
    ("psci/compatible", texts("arm,psci"), "/psci is compatible with arm,psci; needed: arm,psci-1.0 or arm,psci-0.2"),
    (GIC, None, "the interrupt controller is none; needed: one that is compatible with arm,gic-v3"),
    (
        f"{GIC}/compatible",
        texts("arm,cortex-a15-gic"),
        r"the interrupt controller is /intc@8000000 \(arm,cortex-a15-gic\); needed: one .* with arm,gic-v3",
    ),
    ("second", {"compatible": texts("arm,gic-v3")}, "controller is /intc@8000000, /second; needed: one that"),
    (f"{GIC}/status", texts("disabled"), "the interrupt controller is none"),
    (
        f"{GIC}/reg",
        wide(0x2F000000, 0x10000, 0x2F100000, 0x200000),
        "at 0x2f000000, 0x2f100000; needed: 0x8000000 and 0x80a0000",
    ),
    (f"{GIC}/reg", wide(0x8000000, 0x10000), "redistributor at 0x8000000; needed: 0x8000000 and 0x80a0000"),
    (f"{GIC}/reg", None, "redistributor at no address; needed"),
    (f"{GIC}/reg", cells(1), "has 1 numbers as reg; needed: a multiple of 4, as / says in its cells"),
    (
        f"{GIC}/reg",
        wide(0x8000000, 0x10000, 0x80A0000, 0x20000),
        "has redistributors for 1 CPUs; needed: 2, as the partition has cores",
    ),
    (
        f"{GIC}/reg",
        wide(0x8000000, 0x10000, 0x80A0000, 0x20000, 0, 0x1000000),
        "has redistributors for 1 CPUs",
    ),
    ("timer", None, "there is no timer; needed: a node that is compatible with arm,armv8-timer"),
    ("timer/compatible", texts("arm,armv7-timer"), "there is no timer"),
    ("memory@40000000", None, "the memory is none; needed: 0x10000000 bytes at 0x40000000 in one node"),
    ("memory@40000000/reg", wide(0x40000000, 1 << 30), "the memory is 0x40000000 bytes at 0x40000000; needed: 0x1000"),
    ("memory@40000000/reg", wide(0x80000000, MEMORY), "the memory is 0x10000000 bytes at 0x80000000; needed"),
    (
        "memory@40000000/reg",
        wide(1 << 30, MEMORY // 2, 1 << 31, MEMORY // 2),
        "at 0x40000000, .* at 0x80000000; needed",
    ),
    ("memory@80000000", {"device_type": texts("memory"), "reg": wide(1, 2)}, "at 0x40000000, 0x2 bytes at 0x1; needed"),
]


@pytest.mark.parametrize(("path", "value", "text"), REFUSED)
def test_trees_that_do_not_fit(path: str, value: "bytes | Tree | None", text: str) -> None:
    with pytest.raises(BadRequestError, match=f"^dtb: .*{text}"):
        check_tree(changed(GOOD, path, value))


def test_a_tree_of_another_partition() -> None:
    with pytest.raises(BadRequestError, match="2 enabled cpu nodes; needed: 4"):
        check_tree(GOOD, cores=4)
    with pytest.raises(BadRequestError, match="needed: 0x8000000 bytes"):
        check_tree(GOOD, memory_bytes=128 << 20)


def test_many_cores_are_told_shortly() -> None:
    tree = changed(virt(cores=20, memory_bytes=MEMORY), "cpus/cpu@16/reg", cells(16))
    with pytest.raises(BadRequestError, match="has reg 0x10; needed: each of 0x0, 0x1, 0x2, 0x3 to 0x103 once"):
        check_tree(tree, cores=20)


PATHS = [path for path, *_ in REFUSED if path not in {"second", "memory@80000000"}]
VALUES = st.one_of(
    st.binary(max_size=17),
    st.lists(st.integers(0, 2**32 - 1), max_size=9).map(lambda numbers: cells(*numbers)),
    st.sampled_from([texts("cpu"), texts("arm,gic-v3"), texts("memory"), texts(""), {}, {"reg": b"x"}]),
)


@given(st.sampled_from(PATHS), VALUES, st.integers(1, 600))
def test_whatever_a_property_is_the_tree_is_judged(path: str, value: "bytes | Tree", cores: int) -> None:
    said = ""
    try:
        check_tree(changed(GOOD, path, value), cores=cores)
    except BadRequestError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 1200
