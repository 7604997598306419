"""Threads of a cgroup and of a unit, over directories that look like cgroups and a systemctl that answers as told."""

import asyncio
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadlined import cgroups, units
from deadlined.cgroups import CgroupSource, open_cgroup
from deadlined.units import Units
from edgehold.errors import BadRequestError, DeniedError, NotFoundError, UnavailableError
from edgehold.kernel import cgroup
from edgehold.kernel.births import Births
from edgehold.kernel.cgroup import Hierarchy


class Clock:
    def __init__(self) -> None:
        self.now = 10**9

    def monotonic_ns(self) -> int:
        return self.now

    def wall_s(self) -> float:
        return 0.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def births(tmp_path: Path, clock: Clock) -> Iterator[Births]:
    (tmp_path / "loadavg").write_text("0 0 0 1/2 100\n")
    one = Births(tmp_path / "loadavg", clock=clock)
    yield one
    one.close()


@pytest.fixture
def v2(tmp_path: Path) -> Hierarchy:
    mount = tmp_path / "cgroup"
    mount.mkdir()
    return Hierarchy(mount=str(mount), root="/", version=2, controllers=frozenset())


def make(v2: Hierarchy, path: str, threads: str, count: str | None = None) -> Path:
    directory = Path(v2.directory(path))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cgroup.threads").write_text(threads)
    if count is not None:
        (directory / "pids.current").write_text(count)
    return directory


def settle(source: CgroupSource) -> None:
    """Look until nothing is new: after a change it looks once more."""
    for _ in range(3):
        if source.changed():
            source.tids()
    assert not source.changed()


def test_a_count_says_that_somebody_came(v2: Hierarchy, births: Births, clock: Clock) -> None:
    directory = make(v2, "/a/b", "4\n", "1\n")
    source = open_cgroup("/a/b", births=births, seen=[v2], clock=clock)
    assert source.tids() == (4,)
    settle(source)
    make(v2, "/a/b", "4\n5\n", "2\n")
    assert source.changed()
    assert source.tids() == (4, 5)
    settle(source)
    source.forget(4)  # one ended and one came between two looks: the count is the same
    (directory / "cgroup.threads").write_text("5\n6\n")
    assert source.changed()
    assert source.tids() == (5, 6)
    settle(source)
    clock.now += 11 * 10**9
    assert source.changed()
    source.close()


def test_without_a_count_new_ids_of_the_host_say_it(
    v2: Hierarchy, births: Births, clock: Clock, tmp_path: Path
) -> None:
    make(v2, "/a", "")
    source = open_cgroup("a/", births=births, seen=[v2], clock=clock)
    assert source.tids() == ()
    assert "no thread is in" in source.reason
    settle(source)
    (tmp_path / "loadavg").write_text("0 0 0 1/2 101\n")
    make(v2, "/a", "101\n")
    clock.now += 10**6
    assert source.changed()
    assert source.tids() == (101,)
    assert not source.reason
    births.close()
    assert source.changed()  # nobody tells any more: it is listed in every cycle
    source.tids()
    assert source.changed()
    source.close()


def test_a_cgroup_that_is_made_again_is_entered_again(v2: Hierarchy, births: Births, clock: Clock) -> None:
    directory = make(v2, "/a", "4\n", "1\n")
    source = open_cgroup("/a", births=births, seen=[v2], clock=clock)
    settle(source)
    shutil.rmtree(directory)
    clock.now += 11 * 10**9
    assert source.changed()
    assert source.tids() == ()
    assert "its cgroup was removed; waits" in source.reason
    assert not source.over
    assert not source.changed()
    make(v2, "/a", "9\n", "1\n")
    assert source.changed()
    assert source.tids() == (9,)
    assert not source.reason
    source.close()
    source.close()


def test_the_path_may_begin_with_the_mount(v2: Hierarchy, births: Births) -> None:
    make(v2, "/a", "4\n")
    source = open_cgroup(f"{v2.mount}/a", births=births, seen=[v2])
    assert source.path == "/a"
    source.close()


def test_several_hierarchies_are_tried(v2: Hierarchy, births: Births, tmp_path: Path) -> None:
    systemd = Hierarchy(mount=str(tmp_path / "sd"), root="/", version=1, controllers=frozenset({"name=systemd"}))
    (tmp_path / "sd/docker/c1").mkdir(parents=True)
    (tmp_path / "sd/docker/c1/tasks").write_text("8\n")
    source = open_cgroup("/docker/c1", births=births, seen=[systemd, v2])
    assert source.tids() == (8,)
    source.close()


@pytest.mark.parametrize("path", ["", "/", "/a/../b", "..", "./a", "a\0b"])
def test_no_path_of_a_cgroup(path: str, v2: Hierarchy, births: Births) -> None:
    with pytest.raises(BadRequestError, match="names no cgroup"):
        open_cgroup(path, births=births, seen=[v2])


def test_one_that_is_not_there_is_refused_or_waited_for(v2: Hierarchy, births: Births) -> None:
    with pytest.raises(NotFoundError, match=r"no such cgroup$"):
        open_cgroup("/none", births=births, seen=[v2])
    source = open_cgroup("/none", births=births, seen=[v2], must_exist=False)
    assert not source.changed()
    assert "waits" in source.reason
    make(v2, "/none", "3\n")
    assert source.changed()
    assert source.tids() == (3,)
    source.close()


@pytest.mark.parametrize(
    ("path", "theirs"),
    [("/system.slice/d.service", "/system.slice/d.service"), ("/system.slice", "/system.slice/d.service")],
)
@pytest.mark.parametrize("whose", ["deadlined itself", "the init process"])
def test_nobody_holds_init_or_deadlined(  # noqa: PLR0917 - one case
    path: str, theirs: str, whose: str, v2: Hierarchy, births: Births, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memberships(tid: int) -> dict[str, str]:
        return {"": theirs if (tid == 1) == ("init" in whose) else "/elsewhere"}

    monkeypatch.setattr(cgroup, "memberships", memberships)
    make(v2, path, "1\n")
    with pytest.raises(DeniedError, match=whose):
        open_cgroup(path, births=births, seen=[v2])
    assert not cgroups.why_not(v2, f"{path}x")


def test_the_root_is_refused(v2: Hierarchy, births: Births) -> None:
    make(v2, "/", "1\n")
    with pytest.raises(DeniedError, match="whole host"):
        open_cgroup(v2.mount, births=births, seen=[v2])


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("nginx", "nginx.service"),
        ("nginx.service", "nginx.service"),
        ("a@1.service", "a@1.service"),
        ("my.app", "my.app.service"),
        ("docker-c1.scope", "docker-c1.scope"),
        ("--all", "--all.service"),
        (r"a\x2db.mount", r"a\x2db.mount"),
    ],
)
def test_names_of_units(name: str, full: str) -> None:
    assert units.full_name(name) == full


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "no unit's name"),
        ("a/b", "systemd-escape"),
        ("ä", "no unit's name"),
        ("x" * 256, "no unit's name"),
        ("a.timer", "timer unit has no threads"),
        ("a@.service", "template"),
        ("a@", "template"),
    ],
)
def test_names_that_are_refused(name: str, match: str) -> None:
    with pytest.raises(BadRequestError, match=match):
        units.full_name(name)


@pytest.mark.parametrize("name", ["init.scope", "-.slice"])
def test_units_of_init_are_refused(name: str) -> None:
    with pytest.raises(DeniedError, match="init process"):
        units.full_name(name)


@pytest.mark.parametrize(
    ("name", "slice_name", "path"),
    [
        ("a.service", "system.slice", "/system.slice/a.service"),
        ("a.service", "app-web-one.slice", "/app.slice/app-web.slice/app-web-one.slice/a.service"),
        ("a.service", "-.slice", "/a.service"),
        ("app-web.slice", "app.slice", "/app.slice/app-web.slice"),
        ("_a.service", "system.slice", "/system.slice/__a.service"),
    ],
)
def test_where_a_unit_will_be(name: str, slice_name: str, path: str) -> None:
    assert units.expected_path(name, slice_name) == path


class Systemd:
    """A directory that says that systemd runs the host, and a systemctl that prints a file."""

    def __init__(self, directory: Path) -> None:
        self.booted = directory / "booted"
        self.booted.mkdir()
        self.answer = directory / "answer"
        self.asked = directory / "asked"
        script = directory / "systemctl.py"
        script.write_text(
            "import pathlib, sys\n"
            f"with pathlib.Path({str(self.asked)!r}).open('a') as asked: print(*sys.argv[1:], file=asked)\n"
            f"text = pathlib.Path({str(self.answer)!r}).read_text()\n"
            "sys.exit(text) if text.startswith('Failed') else print(text)\n"
        )
        self.command = (sys.executable, str(script))

    def says(self, *, group: str = "", load: str = "loaded", active: str = "active", slice_name: str = "") -> None:
        self.answer.write_text(f"LoadState={load}\nActiveState={active}\nControlGroup={group}\nSlice={slice_name}\nX\n")


@pytest.fixture
def systemd(tmp_path: Path) -> Systemd:
    return Systemd(tmp_path)


@pytest.fixture
def known(v2: Hierarchy, births: Births, systemd: Systemd) -> Units:
    return Units(births, seen=[v2], booted=systemd.booted, systemctl=systemd.command, ask_again_s=0.05)


async def test_the_cgroup_of_a_unit(known: Units, v2: Hierarchy, systemd: Systemd) -> None:
    make(v2, "/system.slice/a.service", "4\n")
    systemd.says(group="/system.slice/a.service", slice_name="system.slice")
    source = await known.open("a")
    assert source.tids() == (4,)
    assert source.path == "/system.slice/a.service"
    assert systemd.asked.read_text().split() == [
        "show",
        "--property=LoadState",
        "--property=ActiveState",
        "--property=ControlGroup",
        "--property=Slice",
        "--",
        "a.service",
    ]
    source.close()


async def test_a_unit_that_is_not_started_is_held_when_it_is(known: Units, v2: Hierarchy, systemd: Systemd) -> None:
    systemd.says(active="inactive", slice_name="system.slice")
    source = await known.open("a.service")
    assert source.tids() == ()
    assert source.reason == "unit a.service: it is inactive; waits until that changes"
    assert not source.over
    make(v2, "/system.slice/a.service", "4\n")
    assert source.changed()  # at once: nobody has to be asked
    assert source.tids() == (4,)
    source.close()


async def test_one_that_comes_back_elsewhere_is_asked_for(known: Units, v2: Hierarchy, systemd: Systemd) -> None:
    directory = make(v2, "/system.slice/a.service", "4\n")
    systemd.says(group="/system.slice/a.service", slice_name="system.slice")
    source = await known.open("a.service")
    task = asyncio.create_task(known.run())
    try:
        shutil.rmtree(directory)
        assert source.tids() == ()
        systemd.says(active="inactive", slice_name="other.slice")
        make(v2, "/other.slice/a.service", "5\n")
        end = time.monotonic() + 30
        while not source.changed():
            assert time.monotonic() < end, source.reason
            await asyncio.sleep(0.01)
        assert source.tids() == (5,)
        assert source.path == "/other.slice/a.service"
    finally:
        source.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_unit_that_systemd_does_not_know(known: Units, systemd: Systemd) -> None:
    systemd.says(load="not-found", active="inactive")
    with pytest.raises(NotFoundError, match="list-units"):
        await known.open("typo.service")
    source = await known.open("later.service", must_exist=False)
    assert "knows no unit" in (source.reason or str(source.tids()))
    source.close()


async def test_systemd_that_does_not_answer(known: Units, systemd: Systemd, v2: Hierarchy, births: Births) -> None:
    systemd.answer.write_text("Failed to connect to bus")
    with pytest.raises(UnavailableError, match="connect to bus"):
        await known.open("a.service")
    source = await known.open("a.service", must_exist=False)
    assert "connect to bus" in source.reason
    source.close()
    none = Units(births, seen=[v2], booted=systemd.booted, systemctl=("no-such-command-here",))
    with pytest.raises(UnavailableError, match="can't be started"):
        await none.open("a.service")


async def test_without_systemd_a_directory_of_the_name_is_taken(v2: Hierarchy, births: Births, tmp_path: Path) -> None:
    found = Units(births, seen=[v2], booted=tmp_path / "none")
    make(v2, "/x.slice/a.service", "4\n")
    source = await found.open("a")
    assert source.tids() == (4,)
    source.close()
    with pytest.raises(NotFoundError, match="no systemd runs this host"):
        await found.open("b")
