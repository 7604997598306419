"""Huge pages as a place for memory: which are taken, why not, and a real hugetlbfs where the host has pages for it."""

import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgehold.api.vmand import MemoryGrade
from edgehold.errors import NoCapacityError
from vmand.backend import hugepages, mounts
from vmand.backend.hugepages import HugePages, Pool
from vmand.backend.memory import MemoryFiles

MIB = 1 << 20
GIB = 1 << 30
UUID = "00000000-0000-4000-8000-000000000001"
OTHER = "00000000-0000-4000-8000-000000000002"


@dataclass(frozen=True)
class Fake:
    """A directory that passes for a hugetlbfs, and a /sys with its pages."""

    root: Path

    @property
    def mountinfo(self) -> Path:
        return self.root / "proc/self/mountinfo"

    @property
    def sysfs(self) -> Path:
        return self.root / "sys"

    def pages(self, kib: int, *, free: int, reserved: int = 0, total: int = 64) -> None:
        pool = self.sysfs / f"kernel/mm/hugepages/hugepages-{kib}kB"
        pool.mkdir(parents=True, exist_ok=True)
        for name, value in (("nr", total), ("free", free), ("resv", reserved)):
            (pool / f"{name}_hugepages").write_text(f"{value}\n")

    def node(self, node: int, kib: int, *, free: int) -> None:
        pool = self.sysfs / f"devices/system/node/node{node}/hugepages/hugepages-{kib}kB"
        pool.mkdir(parents=True)
        (pool / "free_hugepages").write_text(f"{free}\n")

    def mount(self, options: str = "rw,pagesize=2M", *, device: int | None = None) -> Path:
        point = self.root / "huge"
        point.mkdir(exist_ok=True)
        found = point.stat().st_dev if device is None else device
        line = f"30 1 {os.major(found)}:{os.minor(found)} / {point} {options[:2]} - hugetlbfs none {options}\n"
        with self.mountinfo.open("a", encoding="ascii") as file:
            file.write(line)
        return point

    def huge(self, memory: str = "/dev/shm/vmand") -> HugePages:
        return HugePages(Path(memory), mountinfo=self.mountinfo, sysfs=self.sysfs)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    one = Fake(tmp_path)
    one.mountinfo.parent.mkdir(parents=True)
    one.mountinfo.write_text("")
    return one


def test_without_a_hugetlbfs_there_is_no_place(fake: Fake) -> None:
    huge = fake.huge()
    assert huge.pick(MIB) == (None, "no hugetlbfs is mounted")
    assert huge.refusal() == "no hugetlbfs is mounted"
    assert huge.free_bytes() == 0
    assert huge.existing() == []


def test_a_place_is_a_directory_of_ours(fake: Fake) -> None:
    fake.pages(2048, free=10, reserved=2)
    point = fake.mount()
    huge = fake.huge()
    assert huge.refusal() == ""
    assert huge.free_bytes() == 16 * MIB
    assert list(point.iterdir()) == []  # looking makes nothing
    place, why = huge.pick(16 * MIB)
    assert why == ""
    assert place is not None
    assert (place.page_bytes, place.huge, place.swaps) == (2 * MIB, True, False)
    assert place.directory.parent == point
    assert place.directory.stat().st_mode & 0o7777 == 0o711
    assert huge.existing() == [place]
    huge.close()
    assert list(point.iterdir()) == []  # nothing was in it


def test_two_daemons_never_share_a_directory(fake: Fake) -> None:
    fake.pages(2048, free=10)
    fake.mount()
    first, again, other = fake.huge(), fake.huge(), fake.huge("/dev/shm/other")
    place, _why = first.pick(2 * MIB)
    assert place is not None
    none, why = again.pick(2 * MIB)
    assert none is None
    assert "another vmand uses it" in why
    assert again.existing() == []
    elsewhere, _why = other.pick(2 * MIB)
    assert elsewhere is not None
    assert elsewhere.directory != place.directory
    (place.directory / "x").touch()
    first.close()
    assert again.existing() == [place]  # as after a restart
    (place.directory / "x").unlink()
    again.close()
    other.close()


def test_too_few_pages_are_a_reason(fake: Fake) -> None:
    fake.pages(2048, free=10, reserved=3)
    fake.mount()
    assert fake.huge().pick(16 * MIB) == (None, "8 huge pages of 2 MiB are wanted and 7 free")
    fake.pages(2048, free=0)
    assert fake.huge().refusal() == "no huge page is free"


def test_pages_are_counted_on_the_node_of_the_cores(fake: Fake) -> None:
    fake.pages(2048, free=10)
    fake.node(0, 2048, free=9)
    fake.node(1, 2048, free=1)
    fake.mount()
    huge = fake.huge()
    assert huge.pick(4 * MIB, 1) == (None, "2 huge pages of 2 MiB are wanted and 1 free on node 1")
    assert huge.pick(4 * MIB, 0)[0] is not None
    assert huge.pick(4 * MIB, 7)[0] is not None  # a kernel without NUMA knows no nodes
    huge.close()


@pytest.mark.parametrize(
    ("size", "pagesize"), [(GIB, GIB), (3 * GIB, 2 * MIB), (GIB + 2 * MIB, 2 * MIB), (2 * GIB, GIB)]
)
def test_the_largest_pages_that_come_out_even(fake: Fake, size: int, pagesize: int) -> None:
    fake.pages(2048, free=4096)
    fake.pages(1048576, free=2)
    fake.mount("rw,pagesize=2M")
    # The same directory again, as a file system of its own: the device is what tells them apart.
    big = fake.root / "big"
    big.mkdir()
    huge = fake.huge()
    two = mounts.mounts(fake.mountinfo)
    one = mounts.Mount(
        point=str(big), kind="hugetlbfs", device=12345, options=frozenset({"rw", "relatime", "pagesize=1024M"})
    )
    huge._mounts = lambda: [*two, one]  # type: ignore[method-assign]
    place, why = huge.pick(size)
    assert place is not None, why
    assert place.page_bytes == pagesize
    assert huge.free_bytes() == 4096 * 2 * MIB + 2 * GIB
    huge.close()


def test_a_size_that_does_not_come_out_even(fake: Fake) -> None:
    fake.pages(1048576, free=2)
    fake.mount("rw,pagesize=1024M")
    assert fake.huge().pick(66 * MIB) == (None, "66 MiB is no whole number of pages of 1 GiB")


@pytest.mark.parametrize(
    ("options", "mode", "why"),
    [
        ("ro,pagesize=2M", 0o755, "mounted read-only"),
        ("rw,pagesize=2M", 0o777, "others may write to"),
        ("rw,pagesize=2M", 0o700, "can't get into"),
    ],
)
def test_a_mount_that_is_not_safe_or_no_use(fake: Fake, options: str, mode: int, why: str) -> None:
    fake.pages(2048, free=10)
    fake.mount(options).chmod(mode)
    huge = fake.huge()
    place, reason = huge.pick(2 * MIB)
    assert place is None
    assert why in reason
    assert why in huge.refusal()
    assert huge.free_bytes() == 0


def test_a_mount_under_another_one_is_not_taken(fake: Fake) -> None:
    fake.mount(device=1)
    assert fake.huge().pick(2 * MIB) == (None, "no hugetlbfs is mounted")


def test_a_directory_that_somebody_else_made(fake: Fake) -> None:
    fake.pages(2048, free=10)
    fake.mount()
    huge = fake.huge()
    place, _why = huge.pick(2 * MIB)
    assert place is not None
    huge.close()
    place.directory.mkdir()
    place.directory.chmod(0o777)
    assert "others may write to it (mode 0777)" in fake.huge().pick(2 * MIB)[1]
    assert fake.huge().existing() == []
    place.directory.rmdir()
    place.directory.symlink_to("/tmp")
    assert str(place.directory) in fake.huge().pick(2 * MIB)[1]
    if os.geteuid() == 0:
        place.directory.unlink()
        place.directory.mkdir()
        os.chown(place.directory, 65534, 65534)
        assert "it belongs to uid 65534" in fake.huge().pick(2 * MIB)[1]


def test_the_host_s_pools(fake: Fake) -> None:
    assert hugepages.pools(fake.sysfs) == []
    fake.pages(2048, free=3, reserved=1, total=5)
    fake.pages(1048576, free=0, total=0)
    assert hugepages.pools(fake.sysfs) == [
        Pool(page_bytes=2 * MIB, total=5, free=2),
        Pool(page_bytes=GIB, total=0, free=0),
    ]
    assert [hugepages.size_text(one) for one in (64 << 10, 2 * MIB, GIB)] == ["64 KiB", "2 MiB", "1 GiB"]


PAGES = 24
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@pytest.fixture
def hugetlbfs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real one, with some pages that are given back."""
    if os.geteuid() != 0:
        pytest.skip("only root can give huge pages")
    try:
        before = int(POOL.read_text())
        POOL.write_text(f"{before + PAGES}\n")
        given = int(POOL.read_text()) - before
    except OSError as error:
        pytest.skip(f"this host gives no huge pages: {error}")
    point = Path(tempfile.mkdtemp(prefix="vmand-hugetlbfs-"))
    try:
        if given < PAGES:
            pytest.skip(f"this host gave {given} of {PAGES} huge pages")
        # Closed to others, so that another vmand of this host leaves it alone; this one looks away.
        argv = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M,mode=0700", "none", str(point)]
        monkeypatch.setattr(HugePages, "_refusal", staticmethod(lambda _mount: ""))
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no hugetlbfs can be mounted here: {done.stderr.strip()}")
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        point.rmdir()
        # Less what was added: somebody else may have changed it meanwhile.
        POOL.write_text(f"{max(int(POOL.read_text()) - given, 0)}\n")


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmand-test-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def proc(hugetlbfs: Path, tmp_path: Path) -> Path:
    """A /proc in which ours is the only hugetlbfs: the host may have one of its own, which others use."""
    (tmp_path / "self").mkdir()
    lines = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)
    kept = [one for one in lines if " hugetlbfs " not in one or f" {hugetlbfs} " in one]
    (tmp_path / "self/mountinfo").write_text("".join(kept))
    for name in ("swaps", "meminfo"):
        (tmp_path / name).symlink_to(f"/proc/{name}")
    return tmp_path


async def test_real_huge_pages(hugetlbfs: Path, memory_dir: Path, proc: Path) -> None:
    free = hugepages.free_pages(2 * MIB)
    files = MemoryFiles(memory_dir, hugepages=True, proc=proc)
    assert files.best() == (MemoryGrade.HUGETLB, "")
    await files.take(UUID, 32 * MIB)
    assert files.is_huge(UUID)
    assert files.page_bytes(UUID) == 2 * MIB
    assert files.path(UUID).is_relative_to(hugetlbfs)
    assert files.has(UUID, 32 * MIB)
    assert files.grade(UUID, 32 * MIB, pid=None) == (MemoryGrade.HUGETLB, "")
    assert hugepages.free_pages(2 * MIB) == free - 16
    # All of it is there: every page can be touched, by a mapping that reserves nothing more.
    with files.path(UUID).open("r+b") as file, mmap.mmap(file.fileno(), 32 * MIB) as mapped:
        for at in range(0, 32 * MIB, 2 * MIB):
            mapped[at] = 1
        assert hugepages.free_pages(2 * MIB) == free - 16
    # More than is left: ordinary pages, and the reason.
    size = (free - 15) * 2 * MIB
    await files.take(OTHER, size)
    assert not files.is_huge(OTHER)
    assert f"{free - 15} huge pages of 2 MiB are wanted and {free - 16} free" in files.grade(OTHER, size, pid=None)[1]
    # vmand dies; the next one finds both, whatever its settings.
    files.close()
    again = MemoryFiles(memory_dir, hugepages=False, proc=proc)
    assert again.is_huge(UUID)
    assert not again.is_huge(OTHER)
    assert again.grade(UUID, 32 * MIB, pid=None)[0] is MemoryGrade.HUGETLB
    again.hand_over(UUID, 1_900_000_001)
    assert again.path(UUID).stat().st_uid == 1_900_000_001
    assert not again.has(UUID, 32 * MIB)
    assert again.has(UUID, 32 * MIB, uid=1_900_000_001)
    assert sorted(again.sweep(())) == [f"{UUID}.mem", f"{OTHER}.mem"]
    assert hugepages.free_pages(2 * MIB) == free
    assert not again.has(UUID, 32 * MIB)
    again.close()
    assert os.listdir(hugetlbfs) == []  # noqa: PTH208 - names are enough


async def test_the_kernel_refuses_in_the_middle(memory_dir: Path, proc: Path) -> None:
    files = MemoryFiles(memory_dir, hugepages=True, proc=proc)
    place, _why = files._huge.pick(2 * MIB)
    assert place is not None
    free = hugepages.free_pages(2 * MIB)
    # As if another process had taken pages between the look and the taking.
    files._huge.pick = lambda _size, _node=None: (place, "")  # type: ignore[assignment, method-assign]
    size = (free + 8) * 2 * MIB
    await files.take(UUID, size)
    assert not files.is_huge(UUID)
    assert "the kernel gave none" in files.grade(UUID, size, pid=None)[1]
    assert os.listdir(place.directory) == []  # noqa: PTH208 - names are enough
    assert hugepages.free_pages(2 * MIB) == free
    files.give_back(UUID)
    files.close()


@pytest.fixture
def small(hugetlbfs: Path, proc: Path) -> Iterator[Path]:
    """One of 8 MiB, and the only one that is seen."""
    point = hugetlbfs / "small"
    point.mkdir()
    argv = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M,size=8M,mode=0700", "none", str(point)]
    subprocess.run(argv, check=True)
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)
        (proc / "self/mountinfo").write_text("".join(one for one in lines if f" {point} " in one))
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)
        point.rmdir()


async def test_a_size_of_the_file_system_s_own(small: Path, memory_dir: Path, proc: Path) -> None:
    files = MemoryFiles(memory_dir, hugepages=True, proc=proc)
    assert files._huge.free_bytes() == 8 * MIB
    assert files._huge.pick(16 * MIB) == (None, f"8 huge pages of 2 MiB are wanted and 4 free in {small}")
    await files.take(UUID, 8 * MIB)
    assert files.is_huge(UUID)
    assert files._huge.free_bytes() == 0
    files.give_back(UUID)
    files.close()


async def test_memory_dir_may_be_on_huge_pages_itself(hugetlbfs: Path, proc: Path) -> None:
    directory = hugetlbfs / "vmand"
    directory.mkdir()
    files = MemoryFiles(directory, hugepages=True, proc=proc)
    free = hugepages.free_pages(2 * MIB)
    assert files.best() == (MemoryGrade.HUGETLB, "")
    assert files.free_bytes(1 << 60) == free * 2 * MIB  # MemAvailable has nothing to do with it
    assert not files.needs_lock()
    await files.take(UUID, 16 * MIB)
    assert files.grade(UUID, 16 * MIB, pid=None) == (MemoryGrade.HUGETLB, "")
    assert (files.is_huge(UUID), files.page_bytes(UUID)) == (True, 2 * MIB)
    with pytest.raises(NoCapacityError, match="MiB are left"):
        await files.take(OTHER, free * 2 * MIB)
    files.give_back(UUID)
    files.close()
    directory.rmdir()
