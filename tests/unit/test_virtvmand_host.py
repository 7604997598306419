"""The host in libvirt's numbers: trees of x86-64 and ARM machines, and what their kernels leave out."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest

from virtvmand import hostcells, hostinfo
from virtvmand.errors import Code, LibvirtError
from virtvmand.hostcells import Pages, Place

MEMINFO = """MemTotal:       16000000 kB
MemFree:         9000000 kB
MemAvailable:   12000000 kB
Buffers:            2000 kB
Cached:           300000 kB
SwapCached:            7 kB
HugePages_Total:       4
"""
STAT = """cpu  100 5 40 1000 7 3 2 9 50 1
cpu0 60 5 20 400 4 2 1 9 50 1
cpu2 40 0 20 600 3 1 1 0 0 0
intr 123 0 0
ctxt 5
"""
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class Tree:
    """A /proc and a /sys below one directory."""

    def __init__(self, root: Path, files: Mapping[str, str]) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    def node_info(self, machine: str = "x86_64") -> hostinfo.NodeInfo:
        return hostinfo.node_info(proc=self.proc, sysfs=self.sys, machine=machine)

    def cells(self) -> tuple[hostcells.Cell, ...]:
        return hostcells.cells(proc=self.proc, sysfs=self.sys)


def cpu(number: int, *, socket: int = 0, core: int = 0, siblings: str = "", die: int | None = 0) -> dict[str, str]:
    below = f"sys/devices/system/cpu/cpu{number}/topology"
    files = {
        f"{below}/physical_package_id": str(socket),
        f"{below}/core_id": str(core),
        f"{below}/core_cpus_list": siblings or str(number),
    }
    return files if die is None else files | {f"{below}/die_id": str(die)}


def host(cpus: str, *, present: str = "", meminfo: str = MEMINFO) -> dict[str, str]:
    return {
        "proc/meminfo": meminfo,
        "sys/devices/system/cpu/online": cpus,
        "sys/devices/system/cpu/present": present or cpus,
    }


def node(number: int, cpus: str, *, total: int = 8_000_000, free: int = 4_000_000) -> dict[str, str]:
    below = f"sys/devices/system/node/node{number}"
    meminfo = f"Node {number} MemTotal: {total} kB\nNode {number} MemFree:  {free} kB\nNode {number} Dirty: 5 kB"
    return {f"{below}/cpulist": cpus, f"{below}/meminfo": meminfo}


def counts(info: hostinfo.NodeInfo) -> tuple[int, int, int, int, int]:
    return info.cpus, info.nodes, info.sockets, info.cores, info.threads


@pytest.fixture
def server(tmp_path: Path) -> Tree:
    """Two sockets, each a node, of two cores with two threads each, numbered as Intel's firmware does."""
    files = host("0-7")
    for number in range(8):
        one = number % 4
        files |= cpu(number, socket=one // 2, core=one % 2, siblings=f"{one},{one + 4}")
    for number, cpus in ((0, "0-1,4-5"), (1, "2-3,6-7")):
        below = f"sys/devices/system/node/node{number}"
        files |= node(number, cpus, free=1_000_000 * (number + 1))
        files[f"{below}/distance"] = "10 21" if number == 0 else "21 10"
        files[f"{below}/hugepages/hugepages-2048kB/nr_hugepages"] = str(100 * number)
        files[f"{below}/hugepages/hugepages-1048576kB/nr_hugepages"] = "1"
    files["sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"] = "100"
    files["proc/cpuinfo"] = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu MHz\t\t: 2399.998\n\ncpu MHz\t: 800.0"
    files["proc/stat"] = STAT
    return Tree(tmp_path, files)


# The host at a glance


def test_a_server(server: Tree) -> None:
    info = server.node_info()
    assert counts(info) == (8, 2, 1, 2, 2)
    assert (info.model, info.memory_kib, info.mhz) == ("x86_64", 16_000_000, 2399)


def test_the_model_fits_its_place(server: Tree) -> None:
    assert server.node_info(machine="ä" * 20).model == "ä" * 15  # whole characters, at most 31 bytes


def test_the_speed_is_of_cpufreq_where_there_is_one(tmp_path: Path) -> None:
    files = host("1-2") | {"proc/cpuinfo": "cpu MHz : 800.000"}
    files["sys/devices/system/cpu/cpu2/cpufreq/cpuinfo_max_freq"] = "1800000"
    assert Tree(tmp_path, files).node_info().mhz == 1800


def test_big_and_little_cores_of_clusters_that_number_their_cores_alike(tmp_path: Path) -> None:
    """Arm: no cpuinfo MHz, a core's id counts within its cluster, there is no die (-1), and the kernel has no NUMA."""
    files = host("0-5") | {"proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 48.00"}
    for number in range(6):
        files |= cpu(number, core=number % 4, die=-1)
    tree = Tree(tmp_path, files)
    info = tree.node_info("aarch64")
    assert counts(info) == (6, 1, 1, 6, 1)
    assert (info.model, info.mhz) == ("aarch64", 0)
    (cell,) = tree.cells()
    assert cell.memory_kib == 16_000_000
    assert [one.place for one in cell.cpus][4] == Place(socket=0, die=0, core=0, siblings=frozenset({4}))


def test_a_board_without_any_topology(tmp_path: Path) -> None:
    tree = Tree(tmp_path, host("0-3"))
    assert counts(tree.node_info()) == (4, 1, 1, 4, 1)
    assert [one.place for one in tree.cells()[0].cpus] == [None] * 4
    assert hostcells.huge_page_sizes(tree.sys) == []


def test_a_package_that_the_architecture_does_not_know_is_one(tmp_path: Path) -> None:
    files = host("0-1") | cpu(0, socket=-1, core=0) | cpu(1, socket=-1, core=1)
    assert counts(Tree(tmp_path, files).node_info()) == (2, 1, 1, 2, 1)


def test_a_kernel_before_5_3_calls_siblings_otherwise(tmp_path: Path) -> None:
    files = host("0-1")
    for number in (0, 1):
        below = f"sys/devices/system/cpu/cpu{number}/topology"
        files |= {f"{below}/core_id": "0", f"{below}/thread_siblings_list": "0-1"}
    assert counts(Tree(tmp_path, files).node_info()) == (2, 1, 1, 1, 2)


def test_performance_cores_with_threads_and_efficient_ones_without(tmp_path: Path) -> None:
    """What does not multiply is told as libvirt does: one node, one socket, as many cores as there are CPUs."""
    files = host("0-5") | node(0, "0-5")
    for number in range(4):
        files |= cpu(number, core=number // 2, siblings="0-1" if number < 2 else "2-3")
    files |= cpu(4, core=8) | cpu(5, core=9)
    assert counts(Tree(tmp_path, files).node_info()) == (6, 1, 1, 6, 1)


@pytest.mark.parametrize(
    ("online", "expected"),
    [
        ("0-6", (7, 1, 1, 4, 2)),  # one thread is off: the rest still shows how it is built
        ("0-3", (4, 1, 1, 8, 1)),  # SMT is off: nobody can tell what the other four are
        ("0-1,4-5", (4, 1, 1, 8, 1)),
    ],
)
def test_offline_cpus_are_counted_in_the_product(tmp_path: Path, online: str, expected: tuple[int, ...]) -> None:
    files = host(online, present="0-7") | node(0, online)
    for number in range(8):
        files |= cpu(number, core=number % 4, siblings=f"{number % 4},{number % 4 + 4}")
    info = Tree(tmp_path, files).node_info()
    assert counts(info) == expected
    assert info.nodes * info.sockets * info.cores * info.threads == 8


def test_a_node_of_memory_alone_has_no_sockets(tmp_path: Path) -> None:
    files = host("0-1") | node(0, "0-1") | node(2, "", total=1000) | cpu(0, core=0) | cpu(1, core=1)
    tree = Tree(tmp_path, files)
    assert counts(tree.node_info()) == (2, 1, 1, 2, 1)
    assert [(one.id, len(one.cpus), one.memory_kib) for one in tree.cells()] == [(0, 2, 8_000_000), (2, 0, 1000)]


def test_this_host() -> None:
    info = hostinfo.node_info()
    assert info.model == os.uname().machine
    assert info.cpus == os.cpu_count()
    assert info.nodes * info.sockets * info.cores * info.threads >= info.cpus
    assert info.memory_kib * 1024 == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert sum(len(cell.cpus) for cell in hostcells.cells()) == info.cpus
    count, online = hostinfo.cpu_map()
    assert max(online) < count
    assert dict(hostinfo.cpu_stats())["idle"] > 0
    assert 0 < hostinfo.free_memory() < info.memory_kib * 1024
    assert sum(hostinfo.cells_free(0, 1024)) > 0
    assert hostinfo.hostname() == os.uname().nodename


@pytest.mark.parametrize("files", [{}, {"proc/meminfo": MEMINFO}, {"sys/devices/system/cpu/online": "0"}])
def test_nothing_is_made_up_where_the_kernel_is_silent(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(LibvirtError, match="mounted") as caught:
        Tree(tmp_path, files).node_info()
    assert caught.value.code is Code.SYSTEM_ERROR


# Cells


def test_cells_of_a_server(server: Tree) -> None:
    first, second = server.cells()
    assert [one.id for one in second.cpus] == [2, 3, 6, 7]
    assert second.cpus[0].place == Place(socket=1, die=0, core=0, siblings=frozenset({2, 6}))
    assert second.distances == ((0, 21), (1, 10))
    base = hostcells.base_page_kib()
    assert first.pages == (Pages(size_kib=base, count=(8_000_000 - 1048576) // base), Pages(size_kib=2048, count=0),
                           Pages(size_kib=1048576, count=1))  # fmt: skip
    assert second.pages[1] == Pages(size_kib=2048, count=100)


def test_what_a_node_does_not_tell_is_absent(tmp_path: Path) -> None:
    files = host("0") | {
        "sys/devices/system/node/node0/cpulist": "0",
        "sys/devices/system/node/node0/distance": "10 20",
    }
    (cell,) = Tree(tmp_path, files).cells()
    assert (cell.memory_kib, cell.pages, cell.distances) == (None, (), ())


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("(null)", set()), ("0-2,5", {0, 1, 2, 5}), ("3", {3})])
def test_lists_of_cpus(tmp_path: Path, text: str, cpus: set[int]) -> None:
    (tmp_path / "list").write_text(f"{text}\n")
    assert hostcells.read_cpus(tmp_path / "list") == cpus


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), ("-1", -1), ("", None), ("0x3", None), ("²", None), ("-", None)]
)
def test_files_with_a_number(tmp_path: Path, text: str, number: int | None) -> None:
    (tmp_path / "number").write_text(f"{text}\n")
    assert hostcells.read_number(tmp_path / "number") == number


# CPU map and times


def test_the_map_reaches_to_the_last_cpu_that_is_present(tmp_path: Path) -> None:
    tree = Tree(tmp_path, host("0-1,9", present="0-11"))
    assert hostinfo.cpu_map(sysfs=tree.sys) == (12, frozenset({0, 1, 9}))


@pytest.mark.parametrize(
    ("cpus", "length", "expected"),
    [({0, 1, 9}, 2, b"\x03\x02"), ({7}, 1, b"\x80"), ({8}, 1, b"\0"), ((), 3, b"\0\0\0"), ({0}, 0, b"")],
)
def test_bitmaps(cpus: set[int], length: int, expected: bytes) -> None:
    assert hostinfo.bitmap(cpus, length) == expected


def test_where_the_time_went(server: Tree) -> None:
    def ticks(number: int) -> list[tuple[str, int]]:
        return [(name, ns // TICK_NS) for name, ns in hostinfo.cpu_stats(number, proc=server.proc)]

    assert ticks(hostinfo.ALL) == [("kernel", 45), ("user", 105), ("idle", 1000), ("iowait", 7)]
    assert ticks(2) == [("kernel", 22), ("user", 40), ("idle", 600), ("iowait", 3)]


@pytest.mark.parametrize("number", [1, 3, -2, 20])
def test_times_of_a_cpu_that_is_not_online(server: Tree, number: int) -> None:
    with pytest.raises(LibvirtError, match=rf"cpuNum: no CPU {number} is online; .* one of 0, 2$") as caught:
        hostinfo.cpu_stats(number, proc=server.proc)
    assert caught.value.code is Code.INVALID_ARG


def test_times_without_a_proc(tmp_path: Path) -> None:
    with pytest.raises(LibvirtError, match="is /proc mounted"):
        hostinfo.cpu_stats(proc=tmp_path)


# Memory


def test_memory(server: Tree) -> None:
    assert hostinfo.memory_stats(proc=server.proc, sysfs=server.sys) == [
        ("total", 16_000_000), ("free", 9_000_000), ("buffers", 2000), ("cached", 300_000),
    ]  # fmt: skip
    assert hostinfo.memory_stats(1, proc=server.proc, sysfs=server.sys) == [("total", 8_000_000), ("free", 2_000_000)]
    assert hostinfo.free_memory(proc=server.proc) == 9_000_000 * 1024
    with pytest.raises(LibvirtError, match=r"cellNum: no cell 2; .* one of 0, 1$") as caught:
        hostinfo.memory_stats(2, proc=server.proc, sysfs=server.sys)
    assert caught.value.code is Code.INVALID_ARG


@pytest.mark.parametrize(
    ("start", "count", "expected"), [(0, 1, [1]), (0, 2, [1, 2]), (1, 1, [2]), (1, 1024, [2]), (0, 1024, [1, 2])]
)
def test_free_memory_of_cells(server: Tree, start: int, count: int, expected: list[int]) -> None:
    found = hostinfo.cells_free(start, count, proc=server.proc, sysfs=server.sys)
    assert found == [one * 1_000_000 * 1024 for one in expected]


@pytest.mark.parametrize(("start", "count", "text"), [(2, 1, "startCell"), (-1, 1, "startCell"), (0, 0, "maxCells")])
def test_cells_that_are_not_there(server: Tree, start: int, count: int, text: str) -> None:
    with pytest.raises(LibvirtError, match=text) as caught:
        hostinfo.cells_free(start, count, proc=server.proc, sysfs=server.sys)
    assert caught.value.code is Code.INVALID_ARG


def test_without_numa_the_host_is_cell_0(tmp_path: Path) -> None:
    tree = Tree(tmp_path, host("0"))
    assert hostinfo.cells_free(0, 8, proc=tree.proc, sysfs=tree.sys) == [9_000_000 * 1024]
    assert hostinfo.memory_stats(0, proc=tree.proc, sysfs=tree.sys) == [("total", 16_000_000), ("free", 9_000_000)]
    with pytest.raises(LibvirtError, match=r"one of 0$"):
        hostinfo.memory_stats(1, proc=tree.proc, sysfs=tree.sys)


def test_a_number_that_no_cell_has_is_no_memory(tmp_path: Path) -> None:
    tree = Tree(tmp_path, host("0") | node(0, "0", free=3) | node(2, "", free=5))
    assert hostinfo.cells_free(0, 9, proc=tree.proc, sysfs=tree.sys) == [3 * 1024, 0, 5 * 1024]


def test_a_node_that_does_not_tell_its_memory(tmp_path: Path) -> None:
    tree = Tree(tmp_path, host("0") | {"sys/devices/system/node/node0/cpulist": "0"})
    with pytest.raises(LibvirtError, match="has no MemTotal"):
        hostinfo.memory_stats(0, proc=tree.proc, sysfs=tree.sys)


# Identity

OWN = "4c4c4544-0043-3510-8052-b4c04f564433"
MACHINE = "0123456789abcdef0123456789abcdef"


def identity(tmp_path: Path, *, firmware: str = "", machine: str = "") -> str | None:
    files = {"sys/class/dmi/id/product_uuid": firmware} if firmware else {}
    tree = Tree(tmp_path, files | ({"etc/machine-id": machine} if machine else {}))
    return hostinfo.host_uuid(sysfs=tree.sys, machine_id=tmp_path / "etc/machine-id")


def test_the_firmware_s_identity(tmp_path: Path) -> None:
    assert identity(tmp_path, firmware=OWN.upper(), machine=MACHINE) == OWN


@pytest.mark.parametrize(
    "firmware",
    ["", "Not Settable", "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
     "03000200-0400-0500-0006-000700080009"],
)  # fmt: skip
def test_an_identity_made_from_the_machine_id(tmp_path: Path, firmware: str) -> None:
    made = identity(tmp_path, firmware=firmware, machine=MACHINE)
    assert made == identity(tmp_path, firmware=firmware, machine=MACHINE)
    assert made is not None
    assert uuid.UUID(made).version == 4
    assert made.replace("-", "") != MACHINE  # machine-id(5): it is not to be shown
    assert made != identity(tmp_path, firmware=firmware, machine=MACHINE[::-1])


@pytest.mark.parametrize("machine", ["", "uninitialized"])
def test_a_host_without_an_identity(tmp_path: Path, machine: str) -> None:
    assert identity(tmp_path, machine=machine) is None
