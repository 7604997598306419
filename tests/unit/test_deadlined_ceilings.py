"""Which limits lie above which threads: over directories that look like cgroups, and how little is read for it."""

import shutil
from pathlib import Path

import pytest

from deadlined.ceilings import Ceilings, Limit
from edgehold.kernel import cgroup
from edgehold.kernel.cgroup import Hierarchy
from edgehold.kernel.procfs import GoneError

S = 10**9


class Host:
    """Directories as cgroup v2's, and who is where."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        (mount / "cgroup.controllers").write_text("cpu\n")
        self.where = Hierarchy(mount=str(mount), root="/part", version=2, controllers=frozenset())
        self.of: dict[int, str] = {}
        self.asked = 0
        self.error: OSError | None = None

    def limit(self, path: str, text: str) -> None:
        (self.mount / path).mkdir(parents=True, exist_ok=True)
        (self.mount / path / "cpu.max").write_text(text)

    def put(self, path: str, *tids: int) -> None:
        """Move threads into a cgroup below the mount."""
        left = {self.of[tid].removeprefix("/part/") for tid in tids if tid in self.of}
        self.of |= dict.fromkeys(tids, f"/part/{path}")
        for place in {path, *left}:
            inside = [tid for tid, one in self.of.items() if one == f"/part/{place}"]
            (self.mount / place).mkdir(parents=True, exist_ok=True)
            (self.mount / place / "cgroup.threads").write_text("".join(f"{tid}\n" for tid in inside))

    def memberships(self, tid: int) -> dict[str, str]:
        self.asked += 1
        if self.error:
            raise self.error
        if tid not in self.of:
            raise GoneError("gone")
        return {"": self.of[tid]}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    one = Host(tmp_path)
    monkeypatch.setattr(cgroup, "memberships", one.memberships)
    return one


def test_limits_above_threads(host: Host) -> None:
    host.limit("a", "50000 100000")
    host.limit("a/b", "max 100000")
    host.limit("a/b/c", "10000 100000")
    host.put("a/b/c", 1, 2)
    host.put("a/b", 3)
    host.put("d", 4)
    ceilings = Ceilings(seen=[host.where])
    ceilings.refresh(0, frozenset({1, 2, 3, 4, 5}))
    assert ceilings.limits() == [Limit("/a", 0.5, frozenset({1, 2, 3})), Limit("/a/b/c", 0.1, frozenset({1, 2}))]
    assert ceilings.limits() is ceilings.limits()
    assert ceilings.paths_of(1) == ("/a/b/c", "/a")
    assert ceilings.paths_of(3) == ("/a",)
    assert ceilings.paths_of(4) == ceilings.paths_of(5) == ceilings.paths_of(99) == ()
    assert ceilings.cpus_of("/a/b/c") == 0.1
    assert ceilings.cpus_of("/a/b") is None
    ceilings.refresh(0, frozenset({3}))
    assert ceilings.limits() == [Limit("/a", 0.5, frozenset({3}))]
    assert ceilings.cpus_of("/a/b/c") is None
    ceilings.refresh(0, ())
    assert ceilings.limits() == []


def test_a_limit_of_ours_does_not_count(host: Host) -> None:
    host.limit("a", "50000 100000")
    host.put("a", 1)
    ours: set[str] = set()
    ceilings = Ceilings(ours=ours, seen=[host.where])
    ceilings.refresh(0, (1,))
    assert ceilings.paths_of(1) == ("/a",)
    ours.add("/a")
    assert ceilings.paths_of(1) == ()
    assert ceilings.cpus_of("/a") is None
    assert ceilings.limits() == []
    ours.clear()
    assert len(ceilings.limits()) == 1


def test_a_changed_limit_is_seen_within_two_seconds(host: Host) -> None:
    host.limit("a", "max 100000")
    host.put("a", 1)
    tids = frozenset({1})
    ceilings = Ceilings(seen=[host.where])
    ceilings.refresh(0, tids)
    host.limit("a", "50000 100000")
    ceilings.refresh(S, tids)
    assert ceilings.limits() == []
    ceilings.refresh(2 * S, tids)
    assert ceilings.limits() == [Limit("/a", 0.5, tids)]
    shutil.rmtree(host.mount / "a")
    ceilings.refresh(4 * S, tids)
    assert ceilings.limits() == []


@pytest.mark.parametrize("number", [3, 40])
def test_threads_that_were_moved_are_found_within_a_minute(number: int, host: Host) -> None:
    host.limit("a", "50000 100000")
    host.put("b", *range(1, number + 1))
    tids = frozenset(host.of)
    ceilings = Ceilings(seen=[host.where])
    ceilings.refresh(0, tids)
    host.put("a", 1, 2)
    ceilings.refresh(59 * S, tids)
    assert ceilings.limits() == []
    ceilings.refresh(60 * S, tids)
    assert ceilings.limits() == [Limit("/a", 0.5, frozenset({1, 2}))]


def test_many_threads_of_one_cgroup_are_not_asked_one_by_one(host: Host) -> None:
    host.limit("a", "50000 100000")
    host.put("a", *range(1, 1001))
    tids = frozenset(host.of)
    ceilings = Ceilings(seen=[host.where])
    ceilings.refresh(0, tids)
    assert ceilings.limits() == [Limit("/a", 0.5, tids)]
    assert host.asked == 1
    for second in range(1, 200):
        ceilings.refresh(second * S, tids)
    assert host.asked == 1


def test_work_in_one_call_is_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for tid in range(1, 201):
        host.put(f"g{tid}", tid)
    tids = frozenset(host.of)
    ceilings = Ceilings(seen=[host.where])
    ceilings.refresh(0, tids)
    read = 0
    really = cgroup.quota

    def counted(directory: str, version: int) -> cgroup.Quota | None:
        nonlocal read
        read += 1
        return really(directory, version)

    monkeypatch.setattr(cgroup, "quota", counted)
    ceilings.refresh(2 * S, tids)
    assert 0 < read < 40
    for step in range(1, 10):
        ceilings.refresh(2 * S + step, tids)
    assert read == 200  # each of them once
    host.asked = 0
    ceilings.refresh(60 * S, tids)
    assert host.asked < 40


def test_what_can_not_be_read_is_tried_again(host: Host) -> None:
    host.limit("a", "50000 100000")
    host.put("a", 1)
    tids = frozenset({1})
    ceilings = Ceilings(seen=[host.where])
    host.error = OSError(24, "too many")
    ceilings.refresh(0, tids)
    assert ceilings.limits() == []
    host.error = None
    ceilings.refresh(1, tids)
    assert ceilings.limits() == [Limit("/a", 0.5, tids)]


def test_threads_in_the_root_or_outside_have_no_limit(host: Host) -> None:
    host.of = {1: "/part", 2: "/elsewhere", 3: "/part/a"}
    host.limit("a", "50000 100000")
    tids = frozenset({1, 2, 3})
    ceilings = Ceilings(seen=[host.where])
    for now in (0, 30 * S, 61 * S):
        ceilings.refresh(now, tids)
        assert ceilings.limits() == [Limit("/a", 0.5, frozenset({3}))]
        assert ceilings.paths_of(1) == ceilings.paths_of(2) == ()


def test_a_host_without_the_controller_has_no_limits(tmp_path: Path) -> None:
    none = Hierarchy(mount=str(tmp_path), root="/", version=2, controllers=frozenset())
    ceilings = Ceilings(seen=[none])
    ceilings.refresh(0, (1,))
    assert ceilings.limits() == []
