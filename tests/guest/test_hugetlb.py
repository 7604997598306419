"""Memory on a host with swap, huge pages and two memory nodes: what no ordinary test may switch on."""

import asyncio
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from edgehold.api.vmand import MemoryGrade
from edgehold.errors import FailedError
from edgehold.kernel import numa
from edgehold.testing.capability import missing, need_command, need_root
from vmand.backend import hugepages
from vmand.backend.memory import MemoryFiles

MIB = 1 << 20
UUID = "00000000-0000-4000-8000-000000000001"
OTHER = "00000000-0000-4000-8000-000000000002"
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
SWAP = "/dev/ram0"
PATIENCE_S = 120.0
_NOT_HUGE = "no huge pages: hugepages is false in the settings"


@pytest.fixture
def directory() -> Iterator[Path]:
    need_root()
    with tempfile.TemporaryDirectory(prefix="vmand-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def swap() -> Iterator[Callable[[], None]]:
    """Swap on a RAM disk, on when it is called."""
    for argv in (["modprobe", "brd", "rd_nr=1", "rd_size=32768"], ["mkswap", SWAP]):
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        if done.returncode:
            missing(f"{' '.join(argv)}: {done.stderr.strip()}")

    def on() -> None:
        subprocess.run(["swapon", SWAP], check=True)

    yield on
    subprocess.run(["swapoff", SWAP], check=False, capture_output=True)
    subprocess.run(["modprobe", "-r", "brd"], check=False, capture_output=True)


@pytest.fixture
def hugetlbfs() -> Iterator[Path]:
    before = int(POOL.read_text())
    POOL.write_text("48\n")
    point = Path(tempfile.mkdtemp(prefix="huge-"))
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M,mode=0755", "none", str(point)], check=True)
    yield point
    subprocess.run(["umount", str(point)], check=True)
    point.rmdir()
    POOL.write_text(f"{before}\n")


@contextlib.asynccontextmanager
async def locking(path: Path, size: int) -> AsyncIterator[int]:
    """A QEMU whose memory is this file, locked, and whose CPU never runs; its pid."""
    argv = ["-S", "-nodefaults", "-display", "none", "-machine", "q35,memory-backend=ram", "-accel", "tcg,tb-size=16"]
    argv += ["-m", f"{size // MIB}M", "-overcommit", "mem-lock=on", "-qmp", "stdio", "-object"]
    argv += [f"memory-backend-file,id=ram,size={size},mem-path={path},share=on"]
    pipe = asyncio.subprocess.PIPE
    qemu = await asyncio.create_subprocess_exec("qemu-system-x86_64", *argv, stdin=pipe, stdout=pipe)
    try:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        # The greeting comes from a thread of its own, perhaps before anything is locked; an answer comes from the main
        # loop, after the start.
        qemu.stdin.write(b'{"execute": "qmp_capabilities"}\n')
        async with asyncio.timeout(PATIENCE_S):
            assert b"QMP" in await qemu.stdout.readline()
            assert b"return" in await qemu.stdout.readline()
        yield qemu.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            qemu.kill()
        await qemu.communicate()


async def test_swap_takes_the_grade_away_and_a_lock_gives_it_back(directory: Path, swap: Callable[[], None]) -> None:
    need_command("qemu-system-x86_64", "qemu-system-x86")
    files = MemoryFiles(directory, hugepages=False)
    await files.take(UUID, 64 * MIB)
    assert files.grade(UUID, 64 * MIB, pid=None)[0] is MemoryGrade.LOCKED
    swap()
    assert files.needs_lock(UUID)
    grade, reason = files.grade(UUID, 64 * MIB, pid=os.getpid())
    assert grade is MemoryGrade.PLAIN
    assert f"swap is in use ({SWAP})" in reason
    async with locking(files.path(UUID), 64 * MIB) as pid:
        assert files.grade(UUID, 64 * MIB, pid=pid) == (MemoryGrade.LOCKED, _NOT_HUGE)
    assert files.grade(UUID, 64 * MIB, pid=pid)[0] is MemoryGrade.PLAIN
    files.give_back(UUID)


async def test_huge_pages_are_not_swapped(directory: Path, hugetlbfs: Path, swap: Callable[[], None]) -> None:
    files = MemoryFiles(directory, hugepages=True)
    swap()
    assert files.best() == (MemoryGrade.HUGETLB, "")
    await files.take(UUID, 64 * MIB)
    assert files.path(UUID).is_relative_to(hugetlbfs)
    assert not files.needs_lock(UUID)
    assert files.needs_lock()
    assert files.grade(UUID, 64 * MIB, pid=None) == (MemoryGrade.HUGETLB, "")
    files.give_back(UUID)
    files.close()


def pages(path: Path, node: int) -> int:
    """Pages of a file on a node, as numa_maps has them for a mapping of it in which all were touched (numa(7))."""
    argv = ["python3", "-c", _TOUCH, str(path)]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    found = re.search(rf" N{node}=(\d+)", text)
    return int(found[1]) if found else 0


_TOUCH = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
    for at in range(0, len(mapped), 4096):
        mapped[at]
    print([line for line in open("/proc/self/numa_maps") if sys.argv[1] in line][0])
"""


@pytest.mark.usefixtures("hugetlbfs")
async def test_pages_come_from_the_node_of_the_cores(directory: Path) -> None:
    if not numa.several():
        pytest.skip("one memory node; start the rig with -append numa=fake=2")
    files = MemoryFiles(directory, hugepages=True)
    for node in (1, 0):
        free = hugepages.free_pages(2 * MIB, node)
        await files.take(UUID, 16 * MIB, node=node)
        assert files.is_huge(UUID)
        assert hugepages.free_pages(2 * MIB, node) == free - 8
        files.give_back(UUID)
        # More than this node has, though all together have enough: ordinary pages, near.
        size = (free + 2) * 2 * MIB
        await files.take(OTHER, size, node=node)
        assert not files.is_huge(OTHER)
        assert f"on node {node}" in files.grade(OTHER, size, pid=None)[1]
        assert await asyncio.to_thread(pages, files.path(OTHER), node) == size // 4096
        files.give_back(OTHER)
    with pytest.raises(FailedError):
        files.hand_over(UUID, 1)
    files.close()
