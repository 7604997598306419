"""Threads of real cgroups, units' cgroups and process trees, as the sources tell them; nothing is held here."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deadlined.ceilings import Ceilings, Limit
from deadlined.cgroups import open_cgroup
from deadlined.deny import Deny, DenySettings
from deadlined.quota import open_group
from deadlined.trees import open_tree
from deadlined.units import BOOTED, Units
from edgehold.api.deadlined import Actuator
from edgehold.errors import BadRequestError, DeniedError, UnsupportedError
from edgehold.kernel import cgroup, procfs
from edgehold.kernel.births import Births
from edgehold.kernel.cgroup import Hierarchy
from edgehold.kernel.procfs import GoneError
from edgehold.testing.capability import missing, need_root
from edgehold.testing.load import Load, eventually

PATIENCE_S = 30.0
NAME = f"edgehold-test-{os.getpid()}.service"
# A parent that starts a child when a line comes, says its pid, and outlives nothing: each child waits for its end.
_FORKS = """
import os, signal, sys
def end(number, frame): sys.exit(0)
signal.signal(signal.SIGTERM, end)
print(os.getpid(), flush=True)
for line in sys.stdin:
    if line == "grandchild\\n":
        r, w = os.pipe()
        if not (child := os.fork()):
            if not (grandchild := os.fork()): signal.pause()
            os.write(w, b"%d" % grandchild); signal.pause()
        print(child, os.read(r, 20).decode(), flush=True)
    elif line == "end\\n":
        break
    else:
        if not (child := os.fork()): signal.pause()
        print(child, flush=True)
"""


@pytest.fixture
def births() -> Iterator[Births]:
    with contextlib.closing(Births()) as one:
        yield one


@pytest.fixture(scope="module")
def seen() -> tuple[Hierarchy, ...]:
    need_root()
    return cgroup.hierarchies()


def made_in(where: Hierarchy | None) -> Iterator[Path]:
    """A cgroup with one below it, which end when nobody is in them."""
    if where is None:
        missing("no such cgroup hierarchy is mounted")
    top = Path(where.directory(f"/{NAME}"))
    if not os.access(where.mount, os.W_OK):
        missing(f"{where.mount} can't be written")
    (top / "below").mkdir(parents=True)
    try:
        yield top
    finally:
        for one in (top / "below", top):
            remove(one)


def remove(group: Path) -> None:
    """rmdir(2) of a cgroup says EBUSY as long as its last thread is being buried."""

    def gone() -> bool:
        with contextlib.suppress(FileNotFoundError):
            try:
                group.rmdir()
            except OSError:
                return False
        return True

    eventually(gone, timeout_s=PATIENCE_S, what=f"{group} is removed")


@pytest.fixture
def cpu_group(seen: tuple[Hierarchy, ...]) -> Iterator[Path]:
    yield from made_in(cgroup.of_controller(seen, "cpu"))


@pytest.fixture
def unit_group(seen: tuple[Hierarchy, ...]) -> Iterator[Path]:
    yield from made_in(cgroup.of_controller(seen, "name=systemd"))


@pytest.fixture(params=["cpu", "name=systemd"])
def group(request: pytest.FixtureRequest, seen: tuple[Hierarchy, ...]) -> Iterator[Path]:
    """Tests name it before ``load``: it can be removed only when that has ended."""
    yield from made_in(cgroup.of_controller(seen, str(request.param)))


def put(group: Path, pid: int) -> None:
    (group / "cgroup.procs").write_text(str(pid))


def looked(source: object, expected: Callable[[], set[int]]) -> None:
    """Ask as the cycle does until the source tells these threads."""
    changed, tids = getattr(source, "changed"), getattr(source, "tids")  # noqa: B009
    found: set[int] = set()

    def same() -> bool:
        nonlocal found
        if changed():
            found = set(tids())
        return found == expected()

    try:
        eventually(same, timeout_s=PATIENCE_S, what=f"the source tells {expected()}")
    except AssertionError as error:
        raise AssertionError(f"{error}, not {found}") from None


def test_threads_of_a_cgroup(group: Path, births: Births, load: Load, seen: tuple[Hierarchy, ...]) -> None:
    child, other = load.sleeper(), load.sleeper()
    thread = child.thread()
    source = open_cgroup(str(group), births=births, seen=seen)
    try:
        assert source.tids() == ()
        assert "no thread is in" in source.reason
        put(group, child.pid)
        looked(source, lambda: {child.pid, thread})
        put(group / "below", other.pid)
        looked(source, lambda: {child.pid, thread, other.pid})
        another = child.thread()
        looked(source, lambda: {child.pid, thread, another, other.pid})
        child.end_thread(thread)
        source.forget(thread)
        looked(source, lambda: {child.pid, another, other.pid})
        other.end()
        source.forget(other.pid)
        looked(source, lambda: {child.pid, another})
        child.end()
        source.forget(child.pid)
        looked(source, set)
        for one in (group / "below", group):
            remove(one)
        eventually(lambda: source.changed() and not source.tids(), timeout_s=PATIENCE_S, what="it is gone")
        assert "was removed; waits" in source.reason
        third = load.sleeper()
        (group / "below").mkdir(parents=True)
        put(group, third.pid)
        looked(source, lambda: {third.pid})
    finally:
        source.close()


def test_a_quiet_cgroup_is_not_listed(
    unit_group: Path, births: Births, load: Load, seen: tuple[Hierarchy, ...]
) -> None:
    child = load.sleeper()
    put(unit_group, child.pid)
    source = open_cgroup(str(unit_group), births=births, seen=seen)
    try:
        looked(source, lambda: {child.pid})
        # Others start threads all the time, so: sooner or later there is a look at which nothing was new.
        eventually(lambda: not source.changed() or not source.tids(), timeout_s=PATIENCE_S, what="a quiet moment")
    finally:
        source.close()


def test_the_root_cgroup_is_refused(births: Births, seen: tuple[Hierarchy, ...]) -> None:
    for one in seen:
        with pytest.raises(DeniedError, match="whole host"):
            open_cgroup(one.mount, births=births, seen=seen)


async def test_a_unit_by_the_name_of_its_cgroup(
    unit_group: Path, births: Births, load: Load, seen: tuple[Hierarchy, ...]
) -> None:
    if BOOTED.is_dir():
        missing("systemd runs this host, and knows no unit that it did not make")
    child = load.sleeper()
    put(unit_group, child.pid)
    units = Units(births, seen=seen)
    source = await units.open(NAME.removesuffix(".service"))
    try:
        looked(source, lambda: {child.pid})
        assert source.path == f"/{NAME}"
        assert Deny(DenySettings(units=("edgehold-test-*",))).why(child.pid)
        assert not Deny(DenySettings(units=("nginx*",))).why(child.pid)
    finally:
        source.close()


def test_limits_above_real_threads(cpu_group: Path, load: Load, seen: tuple[Hierarchy, ...]) -> None:
    child = load.sleeper()
    tids = frozenset({child.pid, child.thread()})
    put(cpu_group / "below", child.pid)
    ceilings = Ceilings(seen=seen)
    ceilings.refresh(0, tids)
    path = f"/{NAME}"
    assert path not in ceilings.paths_of(child.pid)
    if (cpu_group / "cpu.max").exists():
        (cpu_group / "cpu.max").write_text("30000 100000")
    else:
        (cpu_group / "cpu.cfs_quota_us").write_text("30000")
    ceilings.refresh(2 * 10**9, tids)
    assert [one for one in ceilings.limits() if one.path == path] == [Limit(path, 0.3, tids)]
    assert path in ceilings.paths_of(child.pid)


def test_a_host_with_version_1_says_what_a_quota_needs(seen: tuple[Hierarchy, ...]) -> None:
    where, both = cgroup.of_controller(seen, "cpu"), cgroup.unified(seen)
    if where is None or where.version == 2 or both is None or not os.access(both.mount, os.W_OK):
        missing("not a host whose cpu controller is of version 1, with version 2 beside it")
    group = Path(both.directory(f"/{NAME}"))
    group.mkdir()
    try:
        with pytest.raises(UnsupportedError, match="cgroup_no_v1=cpu"):
            open_group(f"/{NAME}", actuator=Actuator.CPU_MAX, period_ns=100_000_000, seen=seen)
    finally:
        remove(group)


def ended(pid: int) -> bool:
    """A zombie counts."""
    try:
        return procfs.stat(pid).ended
    except GoneError:
        return True


class Forks:
    """A process that forks when told."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pids = {self._process.pid}
        self.pid = self._process.pid
        assert self._say("") == [self.pid]

    def fork(self, what: str = "child") -> list[int]:
        found = self._say(f"{what}\n")
        self.pids.update(found)
        return found

    def end(self) -> None:
        """End the parent only; its children live on."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self.pids.discard(self.pid)

    def _say(self, text: str) -> list[int]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(text)
        self._process.stdin.flush()
        return [int(pid) for pid in self._process.stdout.readline().split()]

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.pids.discard(pid)
        eventually(lambda: ended(pid), timeout_s=PATIENCE_S, what=f"process {pid} has ended")


@pytest.fixture
def forks() -> Iterator[Forks]:
    one = Forks()
    try:
        yield one
    finally:
        for pid in one.pids - {one.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.end()


def test_a_process_and_its_descendants(forks: Forks, births: Births) -> None:
    before = forks.fork()
    source = open_tree(forks.pid, births=births)
    try:
        looked(source, lambda: {forks.pid, *before})
        child, grandchild = forks.fork("grandchild")
        looked(source, lambda: forks.pids)
        forks.kill(grandchild)
        source.forget(grandchild)  # a zombie: its parent does not look
        looked(source, lambda: {forks.pid, *before, child})
        forks.fork()
        looked(source, lambda: forks.pids)
        forks.end()
        source.forget(forks.pid)
        looked(source, lambda: forks.pids)  # whoever was a descendant stays one
        assert len(forks.pids) == 3
        assert not source.over
        for pid in list(forks.pids):
            forks.kill(pid)
            source.forget(pid)
        looked(source, set)
        eventually(lambda: not source.tids() and bool(source.over), timeout_s=PATIENCE_S, what="it is over")
        assert not source.changed()
    finally:
        source.close()


def test_new_threads_of_a_tree(load: Load, births: Births) -> None:
    child = load.sleeper()
    source = open_tree(child.pid, births=births)
    try:
        looked(source, lambda: {child.pid})
        thread = child.thread()
        looked(source, lambda: {child.pid, thread})
        child.end_thread(thread)
        source.forget(thread)
        looked(source, lambda: {child.pid})
    finally:
        source.close()


def test_a_fork_is_seen_in_the_next_look(forks: Forks, births: Births) -> None:
    source = open_tree(forks.pid, births=births)
    try:
        source.tids()
        for _ in range(20):
            (child,) = forks.fork()
            time.sleep(0.002)  # older than what `Births` remembers
            assert source.changed()
            assert child in source.tids()
    finally:
        source.close()


def test_deadlined_is_no_part_of_the_tree_that_it_holds(births: Births) -> None:
    """Attaching the shell that started it."""
    code = (
        "import contextlib, os, sys\n"
        "from deadlined.trees import TreeSource\n"
        "from edgehold.kernel.births import Births\n"
        "source = TreeSource(os.getppid(), births=Births())\n"
        "print(os.getpid() in source.tids())\n"
    )
    ran = subprocess.run(
        ["sh", "-c", '"$0" -c "$1"; true', sys.executable, code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "False", ran.stderr
    with pytest.raises(DeniedError, match="deadlined's own"):
        open_tree(os.getpid(), births=births)


def test_trees_that_are_refused(load: Load, births: Births) -> None:
    child = load.sleeper()
    thread = child.thread()
    with pytest.raises(BadRequestError, match=f"attach --tree {child.pid}"):
        open_tree(thread, births=births)
    with pytest.raises(GoneError):
        open_tree(2**30, births=births)
    with pytest.raises(DeniedError, match="init"):
        open_tree(1, births=births)
    assert procfs.stat(child.pid).name
