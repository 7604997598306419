"""Cgroups as files: what the kernel's texts say, and trees of directories that look like it."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgehold.kernel import cgroup
from edgehold.kernel.births import UNKNOWN, Births
from edgehold.kernel.cgroup import Hierarchy, Quota

HYBRID = r"""30 20 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/systemd/a,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
34 30 0:29 /x /mnt/again\040here rw - cgroup cgroup rw,cpu,cpuacct
"""
CONTAINER = "40 20 0:27 /docker/c1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n"


def v2(directory: Path) -> Hierarchy:
    return Hierarchy(mount=str(directory), root="/", version=2, controllers=frozenset())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, threads in (("", "1\n"), ("a", "5\n4\n"), ("a/b", "0\n7\n"), ("a/b/c", ""), ("a/d", "6\n")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "cgroup.threads").write_text(threads)
    return tmp_path


@pytest.fixture
def group(tree: Path) -> Iterator[int]:
    fd = cgroup.open_group(str(tree / "a"))
    yield fd
    os.close(fd)


def test_the_mounts_of_a_hybrid_host() -> None:
    seen = cgroup.parse_hierarchies(HYBRID)
    assert [(one.mount, one.version) for one in seen] == [
        ("/sys/fs/cgroup/unified", 2),
        ("/sys/fs/cgroup/systemd", 1),
        ("/sys/fs/cgroup/cpu,cpuacct", 1),
    ]
    cpu = cgroup.of_controller(seen, "cpu")
    assert cpu is not None
    assert cpu.controllers == {"cpu", "cpuacct"}
    assert cgroup.of_controller(seen, "cpuacct") is cpu
    assert cpu.threads_file == "tasks"
    assert cgroup.of_controller(seen, "name=systemd") is seen[1]
    assert cgroup.unified(seen) is seen[0]
    assert cgroup.unified(seen[1:]) is None


def test_a_container_shows_a_part() -> None:
    (one,) = cgroup.parse_hierarchies(CONTAINER)
    assert one.of({"": "/docker/c1/x"}) == "/x"
    assert one.of({"": "/docker/c1"}) == "/"
    assert one.of({"": "/docker/c10"}) is None
    assert one.of({"": "/../other"}) is None
    assert one.of({"cpu": "/docker/c1"}) is None
    assert one.directory("/x") == "/sys/fs/cgroup/x"
    assert one.directory("/") == one.mount
    assert one.path("/sys/fs/cgroup/x/y") == "/x/y"
    assert one.path("/sys/fs/cgroups") is None


@pytest.mark.parametrize("line", ["", "1 2 3", "30 20 0:26 / /x rw shared:9", "31 30 0:27 / /y rw - cgroup cgroup rw"])
def test_a_mount_that_is_no_hierarchy(line: str) -> None:
    assert cgroup.parse_hierarchies(f"{line}\n") == ()


def test_the_cpu_controller_of_version_2(tmp_path: Path) -> None:
    assert cgroup.of_controller([v2(tmp_path)], "cpu") is None
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu pids\n")
    assert cgroup.of_controller([v2(tmp_path)], "cpu") == v2(tmp_path)


def test_memberships() -> None:
    text = b"9:name=systemd:/user.slice\n2:cpu,cpuacct:/a:b\n0::/user.slice/x\nnonsense\n:x\n"
    assert cgroup.parse_memberships(text) == {
        "name=systemd": "/user.slice",
        "cpu": "/a:b",
        "cpuacct": "/a:b",
        "": "/user.slice/x",
    }
    assert cgroup.memberships(threading.get_native_id())


def test_the_threads_of_a_subtree(group: int, tree: Path) -> None:
    # 0 is somebody of another process-id namespace.
    assert cgroup.threads(group, "cgroup.threads") == [4, 5, 6, 7]
    shutil.rmtree(tree / "a/b")
    assert cgroup.threads(group, "cgroup.threads") == [4, 5, 6]


def test_a_removed_cgroup_stays_removed_though_another_has_its_name(group: int, tree: Path) -> None:
    shutil.rmtree(tree / "a")
    (tree / "a").mkdir()
    (tree / "a/cgroup.threads").write_text("9\n")
    with pytest.raises(OSError, match=r"cgroup\.threads") as caught:
        cgroup.threads(group, "cgroup.threads")
    assert cgroup.is_gone(caught.value)


def test_a_file_that_is_not_there_is_not_made(group: int, tree: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cgroup.write_at(group, "cpu.max", "max 100000")
    assert not (tree / "a/cpu.max").exists()


@pytest.mark.parametrize(
    ("text", "quota", "cpus"),
    [("max 100000\n", Quota(None, 100_000), None), ("50000 100000", Quota(50_000, 100_000), 0.5)],
)
def test_cpu_max(text: str, quota: Quota, cpus: float | None) -> None:
    assert cgroup.parse_cpu_max(text) == cgroup.parse_cpu_max(text.encode()) == quota
    assert quota.cpus == cpus
    assert str(quota) == text.strip()


@pytest.mark.parametrize("text", ["", "max", "max 0", "-1 100000", "x 1", "1 2 3", "1 y"])
def test_no_cpu_max(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a cpu\.max"):
        cgroup.parse_cpu_max(text)


def test_the_limit_of_a_directory(tmp_path: Path) -> None:
    where = str(tmp_path)
    assert cgroup.quota(where, 2) is None
    assert cgroup.quota(where, 1) is None
    (tmp_path / "cpu.max").write_text("10000 100000\n")
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup.quota(where, 2) == Quota(10_000, 100_000)
    assert cgroup.quota(where, 1) == Quota(None, 100_000)
    (tmp_path / "cpu.cfs_quota_us").write_text("20000\n")
    assert cgroup.quota(where, 1) == Quota(20_000, 100_000)
    (tmp_path / "cpu.max").write_text("")
    assert cgroup.quota(where, 2) is None


def test_cpu_stat_of_both_versions() -> None:
    two = cgroup.parse_cpu_stat(b"usage_usec 70\nuser_usec 1\nnr_periods 5\nnr_throttled 4\nthrottled_usec 30\nx y\n")
    assert (two.usage_ns, two.nr_periods, two.nr_throttled, two.throttled_ns) == (70_000, 5, 4, 30_000)
    one = cgroup.parse_cpu_stat(b"nr_periods 5\nnr_throttled 4\nthrottled_time 30\n")
    assert (one.usage_ns, one.nr_periods, one.nr_throttled, one.throttled_ns) == (0, 5, 4, 30)
    assert cgroup.parse_cpu_stat(b"").nr_periods == 0


class Clock:
    now = 10**9

    def monotonic_ns(self) -> int:
        self.now += 10**6
        return self.now

    def wall_s(self) -> float:
        return 0.0


def test_the_last_id_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "loadavg"
    path.write_text("0.1 0.2 0.3 1/94 4711\n")
    births = Births(path, clock=Clock())
    assert births.last() == 4711
    path.write_text("nonsense\n")
    assert births.last() == UNKNOWN
    births.close()
    births.close()
    assert births.last() == UNKNOWN
    assert Births(tmp_path / "none").last() == UNKNOWN


def test_a_new_thread_has_a_new_id() -> None:
    births = Births(clock=Clock())
    before = births.last()
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert births.last() != before
    births.close()
