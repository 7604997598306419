"""What a guest's process uses, by files that every user may read; against real processes and hostile names."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgehold.kernel import procfs
from edgehold.kernel.procfs import GoneError
from edgehold.testing.capability import need_open_root, need_root
from virtvmand import guestinfo

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
NOBODY = 65534
FIELDS = "S 1 100 100 0 -1 4194560 100 0 0 0 7 5 30 20 20 0 4 0 5000 1000 20 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 3 0 0 0"  # noqa: E501
BIG_MIB = 64


def cpu_time_ns(pid: int, *, proc: Path = Path("/proc")) -> int:
    with contextlib.closing(guestinfo.CpuTimes(proc=proc)) as times:
        return times.of(pid)


def process(proc: Path, pid: int, *, name: str = "qemu-system-x86", fields: str = FIELDS, status: str = "") -> None:
    directory = proc / str(pid)
    directory.mkdir()
    (directory / "stat").write_text(f"{pid} ({name}) {fields}\n")
    (directory / "status").write_text(f"Name:\t{name}\n{status}")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of another user, where root makes it, with 64 MiB of memory, that waits."""
    # It becomes that user by itself: the interpreter may be where only we can run it.
    code = f"""if 1:
        import os
        block = bytearray({BIG_MIB} << 20)
        if os.geteuid() == 0:
            os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
        print(flush=True)
        input()
    """
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def gone_pid() -> int:
    with subprocess.Popen(["true"]) as child:
        child.wait()
        return child.pid


def test_own_time_grows() -> None:
    before = cpu_time_ns(os.getpid())
    deadline = time.monotonic() + 20
    while cpu_time_ns(os.getpid()) <= before + 2 * TICK_NS:
        assert time.monotonic() < deadline
    times = os.times()
    assert cpu_time_ns(os.getpid()) / 1e9 == pytest.approx(times.user + times.system, abs=0.5)


def test_threads_are_counted_in_their_process_and_told_apart() -> None:
    """/proc/TID/stat has the sums of the process; a vCPU's thread is to be asked for itself."""
    tids: list[int] = []
    begin, end = threading.Event(), threading.Event()

    def idle() -> None:
        tids.append(threading.get_native_id())
        begin.set()
        end.wait()

    thread = threading.Thread(target=idle)
    thread.start()
    try:
        begin.wait()
        deadline = time.monotonic() + 20
        while (use := guestinfo.vcpu_use(tids[0])).state != "S":
            assert time.monotonic() < deadline
        assert use.cpu_time_ns < cpu_time_ns(os.getpid())
        assert use.affinity == os.sched_getaffinity(tids[0])
        assert use.cpu in use.affinity
    finally:
        end.set()
        thread.join()


def test_an_affinity_that_was_set() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    os.sched_setaffinity(0, {one})
    try:
        use = guestinfo.vcpu_use(threading.get_native_id())
    finally:
        os.sched_setaffinity(0, before)
    assert (use.affinity, use.cpu, use.state) == (frozenset({one}), one, "R")


def test_memory_in_use(sleeper: subprocess.Popen[bytes]) -> None:
    used = guestinfo.memory_use(sleeper.pid)
    assert BIG_MIB << 10 < used < (BIG_MIB + 100) << 10
    assert used == pytest.approx(resident(sleeper.pid), rel=0.1)


def resident(pid: int) -> int:
    """By statm, in KiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.root
def test_another_user_s_process_can_be_read(sleeper: subprocess.Popen[bytes]) -> None:
    need_root()
    need_open_root()
    assert f"\nUid:\t{NOBODY}\t" in Path(f"/proc/{sleeper.pid}/status").read_text()
    os.seteuid(NOBODY - 1)  # a third user, who is neither root nor the process' own
    try:
        assert cpu_time_ns(sleeper.pid) >= 0
        assert guestinfo.memory_use(sleeper.pid) > BIG_MIB << 10
        assert guestinfo.vcpu_use(sleeper.pid).affinity
    finally:
        os.seteuid(0)


def test_what_is_gone() -> None:
    pid = gone_pid()
    with pytest.raises(GoneError, match=f"process {pid} "):
        cpu_time_ns(pid)
    with pytest.raises(GoneError, match=f"process {pid} "):
        guestinfo.memory_use(pid)
    with pytest.raises(GoneError, match=f"thread {pid} "):
        guestinfo.vcpu_use(pid)


def test_what_ended_and_was_not_waited_for() -> None:
    child = subprocess.Popen(["true"])
    try:
        deadline = time.monotonic() + 20
        while not procfs.stat(child.pid).ended:
            assert time.monotonic() < deadline
        assert cpu_time_ns(child.pid) >= 0
        with pytest.raises(GoneError, match="has no memory"):
            guestinfo.memory_use(child.pid)
    finally:
        child.wait()


def test_a_thread_that_ends_between_two_looks(tmp_path: Path) -> None:
    pid = gone_pid()
    task = tmp_path / str(pid) / "task" / str(pid)
    task.mkdir(parents=True)
    (task / "stat").write_text(f"{pid} (CPU 0/KVM) {FIELDS}\n")
    with pytest.raises(GoneError):  # its file was read, its affinity is not there any more
        guestinfo.vcpu_use(pid, proc=tmp_path)


@pytest.mark.parametrize("name", ["qemu", "a) R 1 2 (b", "x\ny", ") ) )", ""])
def test_the_name_is_the_process_own_choice(tmp_path: Path, name: str) -> None:
    process(tmp_path, 7, name=name)
    assert cpu_time_ns(7, proc=tmp_path) == 12 * TICK_NS


@pytest.mark.parametrize("fields", ["", "S 1 2", "Z" + " 0" * 30])
def test_a_stat_that_is_cut_off(tmp_path: Path, fields: str) -> None:
    process(tmp_path, 7, fields=fields)
    with pytest.raises(GoneError):
        cpu_time_ns(7, proc=tmp_path)


@pytest.mark.parametrize(
    ("status", "kib"),
    [
        ("VmHWM:\t  900 kB\nVmRSS:\t  800 kB\nHugetlbPages:\t 4096 kB\n", 4896),
        ("VmRSS:\t  800 kB\n", 800),  # a kernel without hugetlbfs
    ],
)
def test_huge_pages_are_memory_too(tmp_path: Path, status: str, kib: int) -> None:
    process(tmp_path, 7, status=status)
    assert guestinfo.memory_use(7, proc=tmp_path) == kib


def test_a_look_leaves_no_descriptor_open() -> None:
    pid = gone_pid()
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(10):
        cpu_time_ns(os.getpid())
        with pytest.raises(GoneError):
            guestinfo.memory_use(pid)
    assert len(list(descriptors.iterdir())) == before


def test_a_descriptor_stays_with_its_process() -> None:
    with contextlib.closing(guestinfo.CpuTimes(fresh_ns=0)) as times:
        for _ in range(100):  # more than are kept, and each ends
            with subprocess.Popen(["sleep", "60"]) as child:
                assert times.of(child.pid) >= 0
                assert times.of(child.pid) >= 0
                child.kill()
            with pytest.raises(GoneError):
                times.of(child.pid)
        assert times.of(os.getpid()) > 0


def test_what_was_read_is_good_for_a_tick(tmp_path: Path) -> None:
    process(tmp_path, 7)
    with contextlib.closing(guestinfo.CpuTimes(proc=tmp_path, fresh_ns=10**15)) as times:
        assert times.of(7) == 12 * TICK_NS
        (tmp_path / "7" / "stat").write_text("")
        assert times.of(7) == 12 * TICK_NS
