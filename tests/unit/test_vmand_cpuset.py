"""Isolated cpusets, on trees of files that behave like the kernels whose behaviour was recorded: 6.1 and 6.12."""

import errno
import os
from pathlib import Path

import pytest

from edgehold.errors import FailedError
from vmand.backend import cpuset
from vmand.backend.cpuset import Cpusets
from vmand.model import parse_cores
from vmand.placement import as_list

ONLINE = frozenset(range(6))
PID, TIDS = 100, (103, 104)
THREADS = (100, 101, 103, 104)
RUN = "1aaaaaaa-bbbb-cccc"
INVALID = "isolated invalid (Cpu list in cpuset.cpus not exclusive)"


class Kernel:
    """A cgroup v2 hierarchy. After every change each partition is judged anew, as the kernel does."""

    def __init__(self, root: Path, *, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.mount = root / "cgroup"
        self.proc = root / "proc"
        self.online = ONLINE
        self.writes: list[tuple[str, str]] = []
        self.refuse: dict[str, int] = {}
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir()
        line = f"42 31 0:28 / {self.mount} rw,relatime - cgroup2 cgroup2 rw\n"
        (self.proc / "self/mountinfo").write_text(line)
        for name, text in {
            "controllers": "cpuset cpu memory",
            "subtree_control": "",
            "procs": "",
            "threads": "",
        }.items():
            (self.mount / f"cgroup.{name}").write_text(text)
        self.enter(self.mount)
        self.judge()

    def cpusets(self) -> Cpusets:
        return Cpusets(proc=self.proc, release="6.12.1" if self.exclusive else "6.1.0-50-cloud")

    def enter(self, group: Path) -> None:
        (self.proc / str(PID)).mkdir(exist_ok=True)
        path = "/" + str(group.relative_to(self.mount)) if group != self.mount else "/"
        (self.proc / str(PID) / "cgroup").write_text(f"3:cpuset:/\n0::{path}\n")
        for other in [self.mount, *self.groups()]:
            (other / "cgroup.threads").write_text("")
        (group / "cgroup.threads").write_text("\n".join(map(str, THREADS)))

    def groups(self) -> list[Path]:
        return sorted(path for path in self.mount.rglob("*") if path.is_dir())

    def make(self, group: Path) -> None:
        if group.exists():
            return
        group.mkdir()
        for name, text in {"type": "domain", "subtree_control": "", "procs": "", "threads": ""}.items():
            (group / f"cgroup.{name}").write_text(text)
        if "cpuset" in (group.parent / "cgroup.subtree_control").read_text():
            self.give(group)
        self.judge()

    def give(self, group: Path) -> None:
        if (group / "cpuset.cpus").exists():
            return
        names = {"cpus": "", "cpus.partition": "member", "cpus.effective": ""}
        if self.exclusive:
            names["cpus.exclusive"] = ""
        for name, text in names.items():
            (group / f"cpuset.{name}").write_text(text)

    def rmdir(self, group: Path) -> None:
        if not group.exists():
            return
        if (group / "cgroup.threads").read_text():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(group))
        for path in group.iterdir():
            path.unlink()
        group.rmdir()
        self.judge()

    def write(self, path: Path, text: str) -> None:
        self.writes.append((str(path.relative_to(self.mount)), text))
        if (number := self.refuse.get(path.name)) or not path.exists():
            raise OSError(number or errno.ENOENT, os.strerror(number or errno.ENOENT), str(path))
        if path.name == "cgroup.subtree_control":
            text = "cpuset"
            for child in filter(Path.is_dir, path.parent.iterdir()):
                self.give(child)
        elif path.name == "cgroup.threads":
            text = self.move(path, text)
        elif path.name == "cpuset.cpus.exclusive":
            self.conflict(path, parse_cores(text))
        elif text == "isolated" and path.read_text().startswith(text):
            return  # what stands there already changes nothing, before 6.12
        path.write_text(text)
        if path.name == "cgroup.procs":
            self.enter(path.parent)
        self.judge()

    def move(self, path: Path, tid: str) -> str:
        above = path.parent.parent / path.name
        above.write_text("\n".join(one for one in above.read_text().split() if one != tid))
        return "\n".join([*(one for one in path.read_text().split() if one != tid), tid])

    def conflict(self, path: Path, cores: frozenset[int]) -> None:
        for other in filter(Path.is_dir, path.parent.parent.iterdir()):
            if other != path.parent and self.cores(other / path.name) & cores:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))

    def cores(self, path: Path) -> frozenset[int]:
        return parse_cores(path.read_text().strip()) if path.exists() else frozenset()

    def judge(self) -> None:
        taken: frozenset[int] = frozenset()
        for group in self.groups():
            state = group / "cpuset.cpus.partition"
            if not state.exists():
                continue
            cpus = self.cores(group / "cpuset.cpus")
            if state.read_text() == "isolated":  # an invalid one does not become valid by itself
                good = bool(cpus) and self.allowed(group, cpus)
                state.write_text("isolated" if good else INVALID)
            if state.read_text() == "isolated":
                taken |= cpus
            (group / "cpuset.cpus.effective").write_text(as_list(cpus & self.online))
        (self.mount / "cpuset.cpus.effective").write_text(as_list(self.online - taken))

    def allowed(self, group: Path, cpus: frozenset[int]) -> bool:
        if not self.exclusive:
            others = [one for one in group.parent.iterdir() if one.is_dir() and one != group]
            return group.parent == self.mount and not any(self.cores(one / "cpuset.cpus") & cpus for one in others)
        above = group
        while above != self.mount:
            if not cpus <= self.cores(above / "cpuset.cpus.exclusive"):
                return False
            above = above.parent
        return True

    def other(self, name: str, **files: str) -> Path:
        """Somebody else's cgroup below the root."""
        group = self.mount / name
        self.make(group)
        for file, text in files.items():
            self.write(group / f"cpuset.{file.replace('_', '.')}", text)
        return group

    def root_cores(self) -> str:
        return (self.mount / "cpuset.cpus.effective").read_text()

    def end(self) -> None:
        """The guest's process is gone."""
        for group in [self.mount, *self.groups()]:
            (group / "cgroup.threads").write_text("")
        (self.proc / str(PID) / "cgroup").unlink()


def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, exclusive: bool) -> Kernel:
    made = Kernel(tmp_path, exclusive=exclusive)
    monkeypatch.setattr(cpuset, "write", made.write)
    monkeypatch.setattr(cpuset, "_make", made.make)
    monkeypatch.setattr(cpuset, "_rmdir", made.rmdir)
    monkeypatch.setattr(cpuset, "_RMDIR_EVERY_S", 0)
    return made


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Linux 6.1."""
    return kernel(tmp_path, monkeypatch, exclusive=False)


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Linux 6.12."""
    return kernel(tmp_path, monkeypatch, exclusive=True)


@pytest.fixture(params=[False, True], ids=["6.1", "6.12"])
def any_kernel(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return kernel(tmp_path, monkeypatch, exclusive=request.param)


CORES = frozenset({1, 2})


def isolate(cpusets: Cpusets, group: Path, cores: frozenset[int] = CORES) -> None:
    cpusets.isolate(group, pid=PID, tids=TIDS, cores=cores)


def test_there_and_back(any_kernel: Kernel) -> None:
    cpusets = any_kernel.cpusets()
    assert cpusets.why_not() == ""
    assert cpusets.whole_process is not any_kernel.exclusive
    group = cpusets.own(3, RUN)
    assert group.name == "vmand-p-3-1aaaaaaa"
    assert cpusets.group_of(PID) is None
    isolate(cpusets, group)
    assert cpusets.group_of(PID) == group
    assert cpusets.check(group, tids=TIDS, cores=CORES) == ""
    assert any_kernel.root_cores() == "0,3-5"
    assert cpusets.held() == CORES
    any_kernel.end()
    cpusets.release(3, RUN)
    cpusets.release(3, RUN)
    assert any_kernel.groups() == []
    assert any_kernel.root_cores() == "0-5"
    assert cpusets.held() == frozenset()


def test_since_6_7_only_the_vcpus_threads_are_in_the_partition(new: Kernel) -> None:
    cpusets = new.cpusets()
    group = cpusets.own(3, RUN)
    isolate(cpusets, group)
    assert (group / "vcpu/cgroup.type").read_text() == "threaded"
    assert (group / "vcpu/cgroup.threads").read_text().split() == ["103", "104"]
    assert (group / "cgroup.threads").read_text().split() == ["100", "101"]
    assert (group / "cpuset.cpus.partition").read_text() == "member"


def test_a_unit_in_a_slice(new: Kernel) -> None:
    """Each cgroup above must have what the units take together."""
    cpusets = new.cpusets()
    new.write(new.mount / "cgroup.subtree_control", "+cpuset")
    for run, cores in (("1a", CORES), ("2b", frozenset({4}))):
        group = new.mount / "vmand.slice" / f"vmand-p-3-{run}.service"
        new.make(group.parent)
        new.write(group.parent / "cgroup.subtree_control", "+cpuset")
        new.make(group)
        new.enter(group)
        assert cpusets.ready(group, cores)
        isolate(cpusets, group, cores)
        assert cpusets.check(group, tids=TIDS, cores=cores) == ""
    assert (new.mount / "vmand.slice/cpuset.cpus.exclusive").read_text() == "1-2,4"
    assert new.root_cores() == "0,3,5"
    assert cpusets.held() == {1, 2, 4}


def test_before_6_7_a_unit_must_be_below_the_root(old: Kernel) -> None:
    cpusets = old.cpusets()
    old.make(old.mount / "vmand.slice")
    with pytest.raises(FailedError, match="isolates only cgroups below the root"):
        isolate(cpusets, old.mount / "vmand.slice" / "vmand-p-3-1a.service")


def test_an_overlap_says_with_whom_and_leaves_nothing(old: Kernel) -> None:
    cpusets = old.cpusets()
    old.write(old.mount / "cgroup.subtree_control", "+cpuset")
    old.other("system.slice", cpus="0-3")
    old.other("quiet.slice", cpus="5")
    with pytest.raises(FailedError, match=r"not exclusive\)\); in the way: /system.slice has cpuset.cpus 0-3$"):
        isolate(cpusets, cpusets.own(3, RUN))
    assert not cpusets.own(3, RUN).exists()
    assert cpusets.group_of(PID) is None
    assert old.root_cores() == "0-5"


def test_exclusive_cores_of_others(new: Kernel) -> None:
    cpusets = new.cpusets()
    new.write(new.mount / "cgroup.subtree_control", "+cpuset")
    new.other("system.slice", cpus="0-5")  # does no harm
    new.other("rival.slice", cpus_exclusive="2")
    with pytest.raises(FailedError, match=r"exclusive: Invalid argument; in the way: /rival.slice has .*exclusive 2$"):
        isolate(cpusets, cpusets.own(3, RUN))
    assert not cpusets.own(3, RUN).exists()


def test_boot_options_are_named(old: Kernel) -> None:
    cpusets = Cpusets(boot_isolated=frozenset({2, 3}), proc=old.proc, release="6.1")
    old.refuse = {"cpuset.cpus.partition": errno.EINVAL}
    with pytest.raises(
        FailedError, match=r"/vmand-p-3-1aaaaaaa/.*: Invalid argument; the kernel was booted with .* 2$"
    ):
        isolate(cpusets, cpusets.own(3, RUN))


def test_lost_to_a_sibling_and_repaired(old: Kernel) -> None:
    cpusets = old.cpusets()
    group = cpusets.own(3, RUN)
    isolate(cpusets, group)
    rival = old.other("rival.slice", cpus="2-3")
    assert cpusets.check(group, tids=TIDS, cores=CORES).endswith("; in the way: /rival.slice has cpuset.cpus 2-3")
    assert old.root_cores() == "0-5"
    with pytest.raises(FailedError, match="in the way: /rival"):
        cpusets.repair(group, pid=PID, tids=TIDS, cores=CORES)
    assert cpusets.group_of(PID) == group  # a process is never thrown out
    old.write(rival / "cpuset.cpus", "5")
    assert cpusets.check(group, tids=TIDS, cores=CORES) != ""  # it does not come back by itself
    old.writes.clear()
    cpusets.repair(group, pid=PID, tids=TIDS, cores=CORES)
    assert [text for name, text in old.writes if name.endswith(".partition")] == ["member", "isolated"]
    assert cpusets.check(group, tids=TIDS, cores=CORES) == ""


def test_the_state_alone_is_not_believed(any_kernel: Kernel) -> None:
    cpusets = any_kernel.cpusets()
    group = cpusets.own(3, RUN)
    isolate(cpusets, group)
    any_kernel.online = ONLINE - {2}
    any_kernel.judge()
    assert "has cores 1 instead of 1-2; is one offline?" in cpusets.check(group, tids=TIDS, cores=CORES)
    any_kernel.online = ONLINE
    any_kernel.judge()
    (any_kernel.mount / "cpuset.cpus.effective").write_text("0,2-5")
    assert cpusets.check(group, tids=TIDS, cores=CORES) == "other tasks may still run on cores 2"


def test_a_thread_that_is_outside(new: Kernel) -> None:
    cpusets = new.cpusets()
    group = cpusets.own(3, RUN)
    isolate(cpusets, group)
    (group / "vcpu/cgroup.threads").write_text("103\n")
    assert cpusets.check(group, tids=TIDS, cores=CORES).startswith("1 vCPU thread is outside")
    cpusets.repair(group, pid=PID, tids=TIDS, cores=CORES)
    assert cpusets.check(group, tids=TIDS, cores=CORES) == ""


def test_a_cgroup_in_use_is_left_to_the_next_sweep(any_kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    cpusets = any_kernel.cpusets()
    isolate(cpusets, cpusets.own(3, RUN))
    cpusets.release(3, RUN)
    assert "still in use" in caplog.text
    cpusets.sweep([])
    assert cpusets.own(3, RUN).exists()
    any_kernel.end()
    cpusets.sweep([3])
    assert cpusets.own(3, RUN).exists()
    cpusets.sweep([])
    assert any_kernel.groups() == []


def test_only_our_cgroups_are_swept(old: Kernel) -> None:
    cpusets = old.cpusets()
    kept = [old.other(name) for name in ("user.slice", "vmand-p-3-1aaaaaaa.service", "vmand-p-x", "vmand-p-4-1a")]
    old.other("vmand-p-3-1aaaaaaa")
    cpusets.sweep([4])
    assert old.groups() == sorted(kept)
    cpusets.clear(4)
    assert old.groups() == sorted(kept[:3])


def test_the_cores_of_a_cgroup_that_ends_are_waited_for(old: Kernel) -> None:
    cpusets = old.cpusets()
    assert cpusets.ready(None, CORES)
    isolate(cpusets, cpusets.own(3, RUN))
    assert not cpusets.ready(None, CORES)
    assert not cpusets.ready(old.mount / "vmand-p-3-2.service", CORES)  # systemd has not made it yet
    assert cpusets.ready(cpusets.own(3, RUN), CORES)  # it has them itself


def test_files_say_more_than_the_kernels_number(new: Kernel) -> None:
    """Some distributions have newer cpusets in an older kernel."""
    cpusets = Cpusets(proc=new.proc, release="5.14.0-503.el9")
    before = cpusets.whole_process
    isolate(cpusets, cpusets.own(3, RUN))
    assert (before, cpusets.whole_process) == (True, False)
    assert cpusets.check(cpusets.own(3, RUN), tids=TIDS, cores=CORES) == ""


@pytest.mark.parametrize(("release", "whole"), [("6.6.1", True), ("6.7.0-rc1", False), ("10.0", False), ("odd", True)])
def test_which_kernel_can_do_what(old: Kernel, release: str, *, whole: bool) -> None:
    assert Cpusets(proc=old.proc, release=release).whole_process is whole


V1 = "34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"


@pytest.mark.parametrize(
    ("mountinfo", "controllers", "why"),
    [
        ("", "", "no cgroup v2 is mounted"),
        (V1, "", "cpusets are those of cgroup v1 here; boot with cgroup_no_v1=cpuset"),
        (V1 + "{v2}", "hugetlb", "cpusets are those of cgroup v1 here"),
        ("{v2}", "cpu memory", "this kernel has no cpusets"),
    ],
)
def test_hosts_that_can_not_isolate(tmp_path: Path, mountinfo: str, controllers: str, why: str) -> None:
    (tmp_path / "self").mkdir()
    v2 = f"41 31 0:38 / {tmp_path}/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
    (tmp_path / "self/mountinfo").write_text(mountinfo.format(v2=v2))
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup/cgroup.controllers").write_text(controllers)
    cpusets = Cpusets(proc=tmp_path, release="6.12")
    assert cpusets.why_not().startswith(why)
    assert cpusets.group_of(os.getpid()) is None
    assert cpusets.held() == frozenset()
    assert cpusets.ready(None, CORES)
    cpusets.release(1, RUN)
    cpusets.sweep([])
    with pytest.raises(FailedError, match=r"cgroup|cpusets"):
        cpusets.own(1, RUN)


def test_inside_a_container(old: Kernel) -> None:
    (old.mount / "cgroup.type").write_text("domain")
    assert "is not the root of the host's cgroups" in old.cpusets().why_not()


def test_this_host() -> None:
    """It works or says why not."""
    cpusets = Cpusets()
    assert cpusets.why_not() or cpusets.own(1, RUN).parent.is_dir()
