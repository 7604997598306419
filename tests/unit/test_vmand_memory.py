"""A partition's memory: allocated whole or not at all, its own file, and a grade that is read back."""

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgehold.api.vmand import MemoryGrade
from edgehold.errors import FailedError, NoCapacityError, SettingsError
from edgehold.kernel import numa
from edgehold.testing.capability import missing
from vmand.backend import memory
from vmand.backend.memory import MemoryFiles

MIB = 1 << 20
GIB = 1 << 30
UUID = "00000000-0000-4000-8000-000000000001"
OTHER = "00000000-0000-4000-8000-000000000002"
STRANGER = 65534
SWAP = "Filename\tType\tSize\tUsed\tPriority\n"


@dataclass(frozen=True)
class Host:
    """A /proc that the test writes, and a directory for memory."""

    root: Path

    @property
    def directory(self) -> Path:
        return self.root / "memory"

    def mount(self, options: str = "rw") -> None:
        device = self.directory.stat().st_dev
        at = f"{os.major(device)}:{os.minor(device)}"
        self.write("self/mountinfo", f"25 1 {at} / {self.root} rw - tmpfs tmpfs {options}\n")

    def swap(self, *areas: str) -> None:
        self.write("swaps", SWAP + "".join(f"{one} partition 1 0 -2\n" for one in areas))

    def locked(self, pid: int, kib: int) -> None:
        self.write(f"{pid}/status", f"Name:\tqemu\nUid:\t{STRANGER}\t0\t0\t0\nVmLck:\t{kib:8} kB\nVmPin:\t 0 kB\n")

    def write(self, name: str, text: str) -> None:
        path = self.root / "proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def files(self, *, hugepages: bool = False) -> MemoryFiles:
        return MemoryFiles(self.directory, hugepages=hugepages, proc=self.root / "proc", sysfs=self.root / "sys")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    one = Host(tmp_path)
    one.directory.mkdir()
    one.mount()
    one.swap()
    one.write("meminfo", "MemTotal: 9 kB\nMemAvailable:    1048576 kB\n")
    return one


async def test_memory_is_taken_whole_and_given_back(host: Host) -> None:
    files = host.files()
    await files.take(UUID, 3 * MIB)
    found = files.path(UUID).stat()
    assert (found.st_size, found.st_mode & 0o7777) == (3 * MIB, 0o600)
    assert found.st_blocks * 512 >= 3 * MIB
    assert files.has(UUID, 3 * MIB)
    assert not files.is_huge(UUID)
    assert files.page_bytes(UUID) == os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(FailedError, match="File exists"):
        await files.take(UUID, 3 * MIB)
    assert files.has(UUID, 3 * MIB)
    files.give_back(UUID)
    files.give_back(UUID)
    assert not files.has(UUID, 3 * MIB)
    assert list(host.directory.iterdir()) == []


async def test_ordinary_pages_leave_the_headroom(host: Host) -> None:
    files = host.files()
    assert files.free_bytes(GIB - MIB) == MIB
    with pytest.raises(NoCapacityError, match=r"2 MiB are wanted and 1 MiB are left in .*; no huge pages: hugepages"):
        await files.take(UUID, 2 * MIB, headroom=GIB - MIB)
    assert files.free_bytes(2 * GIB) == 0
    with pytest.raises(NoCapacityError, match="0 MiB are left"):
        await files.take(UUID, 2 * MIB, headroom=2 * GIB)
    assert list(host.directory.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [(errno.ENOSPC, NoCapacityError, "are wanted"), (errno.EINVAL, FailedError, "must be a tmpfs")],
)
async def test_what_the_kernel_refuses_leaves_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], text: str
) -> None:
    def refuse(*_args: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(kind, match=text):
        await host.files().take(UUID, MIB)
    assert list(host.directory.iterdir()) == []


async def test_one_who_gives_up_waiting_leaves_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, done = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    fill = memory._fill

    def slow(path: Path, size: int, node: int | None, *, huge: bool, abandoned: threading.Event) -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(60)
        fill(path, size, node, huge=huge, abandoned=abandoned)
        done.set()

    monkeypatch.setattr(memory, "_fill", slow)
    task = asyncio.create_task(host.files().take(UUID, MIB))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await asyncio.to_thread(done.wait, 60)
    assert list(host.directory.iterdir()) == []


async def test_pages_come_from_the_node_where_there_are_several(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    @contextlib.contextmanager
    def pages_from(node: int, *, only: bool = False) -> Iterator[None]:
        asked.append((node, only))
        if node == 7:
            raise OSError(errno.EINVAL, "no such node")
        yield

    monkeypatch.setattr(numa, "pages_from", pages_from)
    files = host.files()
    monkeypatch.setattr(numa, "several", lambda: False)
    await files.take(UUID, MIB, node=1)
    assert asked == []
    monkeypatch.setattr(numa, "several", lambda: True)
    await files.take(OTHER, MIB, node=1)
    files.give_back(OTHER)
    await files.take(OTHER, MIB, node=7)  # better a little farther away than not at all
    assert asked == [(1, False), (7, False)]
    assert files.has(OTHER, MIB)


def test_a_thread_s_memory_policy_is_set_and_given_back() -> None:
    def policy() -> bytes:
        # The mapping of a thread's own stack follows its policy; /proc/self/numa_maps shows it (numa(7)).
        return Path(f"/proc/self/task/{threading.get_native_id()}/numa_maps").read_bytes()

    try:
        with numa.pages_from(0, only=True):
            assert b" bind:0 " in policy()
        with numa.pages_from(0):
            assert b" prefer:0 " in policy()
    except OSError as error:
        pytest.skip(f"no NUMA here: {error}")  # a kernel without it has one node: nothing is missed
    assert b":0 " not in policy().splitlines()[0]
    with pytest.raises(OSError, match="set_mempolicy"), numa.pages_from(1023, only=True):
        pass
    with pytest.raises(OSError, match="set_mempolicy"), numa.pages_from(1024):
        pass


@pytest.mark.parametrize(("text", "several"), [("0\n", False), ("0-1\n", True), ("0,2\n", True), ("\n", False)])
def test_whether_there_is_more_than_one_node(text: str, several: bool, tmp_path: Path) -> None:
    (tmp_path / "has_memory").write_text(text)
    assert numa.several(tmp_path) is several
    assert not numa.several(tmp_path / "none")


async def test_without_swap_memory_is_as_good_as_locked(host: Host) -> None:
    files = host.files()
    await files.take(UUID, MIB)
    assert not files.needs_lock()
    grade, reason = files.grade(UUID, MIB, pid=None)
    assert grade is MemoryGrade.LOCKED
    assert reason == "no huge pages: hugepages is false in the settings"
    assert files.best() == (grade, reason)
    # A later vmand knows no more why, but the grade.
    assert host.files().grade(UUID, MIB, pid=None)[0] is MemoryGrade.LOCKED


async def test_swapon_later_takes_the_grade_away(host: Host) -> None:
    files = host.files()
    await files.take(UUID, 2 * MIB)
    host.swap("/dev/sda2", "/swapfile")
    assert files.needs_lock()
    assert files.needs_lock(UUID)
    assert files.grade(UUID, 2 * MIB, pid=None) == (
        MemoryGrade.PLAIN,
        "swap is in use (/dev/sda2, /swapfile) and no guest runs that locks it; swapoff it",
    )
    host.locked(7, 2047)
    grade, reason = files.grade(UUID, 2 * MIB, pid=7)
    assert grade is MemoryGrade.PLAIN
    assert "the guest's process has not locked it" in reason
    host.locked(7, 2048)
    assert files.grade(UUID, 2 * MIB, pid=7)[0] is MemoryGrade.LOCKED
    assert files.grade(UUID, 2 * MIB, pid=8)[0] is MemoryGrade.PLAIN  # it is gone
    best, reason = files.best()
    assert best is MemoryGrade.LOCKED
    assert "only while a guest's process has locked it" in reason
    host.swap()
    assert files.grade(UUID, 2 * MIB, pid=None)[0] is MemoryGrade.LOCKED


async def test_a_tmpfs_that_is_never_swapped(host: Host) -> None:
    host.mount("rw,size=1024k,noswap")
    host.swap("/dev/sda2")
    files = host.files()
    await files.take(UUID, MIB)
    assert not files.needs_lock()
    assert files.grade(UUID, MIB, pid=None)[0] is MemoryGrade.LOCKED


async def test_what_is_not_whole_any_more_has_no_grade(host: Host) -> None:
    files = host.files()
    await files.take(UUID, 4 * MIB)
    path = files.path(UUID)
    assert "4194304 bytes and not 8388608" in files.grade(UUID, 8 * MIB, pid=None)[1]
    os.truncate(path, 0)
    os.truncate(path, 4 * MIB)
    assert files.grade(UUID, 4 * MIB, pid=None) == (
        MemoryGrade.PLAIN,
        "only 0 of 4 MiB are allocated: somebody made holes in its file",
    )
    assert not files.has(UUID, 4 * MIB)
    path.unlink()
    assert "can't be found" in files.grade(UUID, 4 * MIB, pid=None)[1]


def root() -> None:
    if os.geteuid() != 0:
        missing("needs root")


async def test_a_guest_s_own_user_gets_the_file_and_gives_it_back(host: Host) -> None:
    root()
    files = host.files()
    await files.take(UUID, MIB)
    path = files.path(UUID)
    path.chmod(0o666)
    files.hand_over(UUID, STRANGER)
    assert (path.stat().st_uid, path.stat().st_mode & 0o7777) == (STRANGER, 0o600)
    assert not files.has(UUID, MIB)
    assert files.has(UUID, MIB, uid=STRANGER)
    # Whose it may be is what the guest's process is.
    host.locked(7, 0)
    assert files.grade(UUID, MIB, pid=7)[0] is MemoryGrade.LOCKED
    assert files.grade(UUID, MIB, pid=8) == (MemoryGrade.PLAIN, f"its file is not ours (uid {STRANGER})")
    assert files.grade(UUID, MIB, pid=None)[0] is MemoryGrade.PLAIN
    files.hand_over(UUID, None)
    assert path.stat().st_uid == os.geteuid()
    assert files.has(UUID, MIB)


async def test_only_the_file_that_was_made_is_handed_over(host: Host) -> None:
    files = host.files()
    with pytest.raises(FailedError, match="deploy the partition again"):
        files.hand_over(UUID, STRANGER)
    victim = host.root / "victim"
    victim.write_bytes(b"x")
    before = victim.stat()
    files.path(UUID).symlink_to(victim)
    with pytest.raises(FailedError):
        files.hand_over(UUID, STRANGER)
    files.give_back(UUID)
    files.path(UUID).hardlink_to(victim)
    with pytest.raises(FailedError, match="not the file that was made"):
        files.hand_over(UUID, STRANGER)
    files.path(UUID).unlink()
    os.mkfifo(files.path(UUID))
    with pytest.raises(FailedError, match="not the file that was made"):
        files.hand_over(UUID, STRANGER)
    after = victim.stat()
    assert (after.st_uid, after.st_mode, after.st_size) == (before.st_uid, before.st_mode, 1)


async def test_another_name_or_an_open_descriptor_keeps_no_memory(host: Host) -> None:
    files = host.files()
    await files.take(UUID, MIB)
    (host.root / "link").hardlink_to(files.path(UUID))
    with files.path(UUID).open("rb") as open_still:
        files.give_back(UUID)
        assert os.fstat(open_still.fileno()).st_blocks == 0
    assert (host.root / "link").stat().st_size == 0


async def test_files_of_no_partition_are_swept(host: Host) -> None:
    files = host.files()
    await files.take(UUID, MIB)
    await files.take(OTHER, MIB)
    (host.directory / "notes.txt").write_text("not ours to remove")
    assert files.sweep({UUID}) == [f"{OTHER}.mem"]
    assert sorted(one.name for one in host.directory.iterdir()) == [f"{UUID}.mem", "notes.txt"]


def test_only_our_own_regular_file_is_a_partitions_memory(host: Host) -> None:
    files = host.files()
    assert not files.has("u", 3)
    files.path("other").write_bytes(b"abc")
    files.path("u").symlink_to(files.path("other"))
    assert not files.has("u", 3)
    files.give_back("u")
    assert files.has("other", 3)
    assert not files.has("other", 4)
    root()
    os.chown(files.path("other"), STRANGER, STRANGER)
    assert not files.has("other", 3)


def test_memory_that_can_not_be_looked_at_is_an_error_for_people(host: Host) -> None:
    (host.directory / "u.mem").mkdir()
    with pytest.raises(FailedError, match="can't be removed"):
        host.files().give_back("u")
    (host.directory / "u.mem").rmdir()
    host.directory.rmdir()
    with pytest.raises(FailedError, match="see memory_dir"):
        host.files().free_bytes(0)
    with pytest.raises(FailedError, match="see memory_dir"):
        host.files().sweep(())
    (host.root / "proc/self/mountinfo").unlink()
    with pytest.raises(FailedError, match="mountinfo"):
        host.files().best()


def test_memory_on_a_disk_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"memory_dir: /proc is on proc; .* tmpfs"):
        memory.check_directory(Path("/proc"))


def test_the_kernel_s_own_figures_are_read() -> None:
    assert memory.available_bytes() > MIB
