"""What a guest that took its QEMU over would have: a user of its own, and nothing else. With real QEMUs, as root."""

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edgehold.api.vmand import Mode
from edgehold.testing.capability import guest_image, need_command, need_open_root, need_root
from edgehold.testing.partitions import private_vmand
from vmand.backend import process
from vmand.backend.launcher import Launcher
from vmand.backend.process import Process
from vmand.backend.rundir import RunDirs, may_raise_limits
from vmand.config import Config
from vmand.model import Record

ROOT = Path(__file__).parents[2]
FIRST = 1_950_000_000 + 1024 * secrets.randbelow(100_000)
DEADLINE_S = 60.0
ONE = Record(
    id=1,
    uuid="one",
    name="one",
    mode=Mode.SHARED,
    cores=1,
    memory_bytes=64 << 20,
    run="7c1f1d5e-52a0-4c3c-8a3e-0c6c9e0f7a11",
    slot=0,
)
OTHER = msgspec.structs.replace(
    ONE, id=2, uuid="other", name="other", run="7c1f1d5e-52a0-4c3c-8a3e-0c6c9e0f7a22", slot=1
)


class Place:
    """A launcher with its directories, and memory files as `MemoryFiles` leaves them."""

    def __init__(self, directory: Path, memory: Path) -> None:
        self.memory = memory
        self.secret = directory / "state"
        self.secret.mkdir(mode=0o700)
        config = Config(runtime_dir=str(directory), memory_dir=str(memory), launcher="process", uid_first=FIRST)
        self.dirs = RunDirs(directory / "p", FIRST, places=[memory])
        self.launcher = Launcher(config, self.dirs)

    def memory_of(self, record: Record) -> Path:
        path = self.memory / f"{record.uuid}.mem"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(fd, 0, record.memory_bytes)
        os.fchown(fd, FIRST + record.slot, FIRST + record.slot)
        os.close(fd)
        return path

    @contextlib.asynccontextmanager
    async def running(self, record: Record, argv: list[str], *, fresh: bool = True) -> AsyncIterator[Process]:
        """A process as that partition's QEMU, ended with all that its user has."""
        directory = self.dirs.make(record) if fresh else self.dirs.path(record.id)
        (directory / "qemu.log").unlink(missing_ok=True)
        one = await self.launcher.spawn(
            argv, record, directory=directory, cpus=os.sched_getaffinity(0), kvm=False, lock_memory=False, disks=()
        )
        try:
            yield one
        finally:
            await self.launcher.end(record)
            assert await one.wait(DEADLINE_S)
            one.close()

    def qemu(self, record: Record) -> list[str]:
        directory, memory = self.dirs.path(record.id), self.memory_of(record)
        return [
            *("qemu-system-x86_64", "-S", "-nodefaults", "-no-user-config", "-display", "none", "-uuid", record.run),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
            *("-machine", "q35,memory-backend=ram", "-accel", "tcg,tb-size=32", "-m", "64M"),
            *("-object", f"memory-backend-file,id=ram,size={record.memory_bytes},mem-path={memory},share=on"),
            *("-chardev", f"socket,id=monitor,path={directory}/qmp.sock,server=on,wait=off"),
            *("-mon", "chardev=monitor,mode=control"),
        ]

    async def tried(self, record: Record, script: str, *, fresh: bool = True) -> list[str]:
        """What a shell in QEMU's place says."""
        async with self.running(record, ["sh", "-c", script], fresh=fresh) as shell:
            assert await shell.wait(DEADLINE_S), "the shell hangs"
            return (self.dirs.path(record.id) / "qemu.log").read_text().splitlines()


@pytest.fixture
def place() -> Iterator[Place]:
    need_root()
    need_open_root()
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="eh-co-") as name,
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="eh-co-") as memory,
    ):
        for one in (name, memory):
            Path(one).chmod(0o711)
        made = Place(Path(name), Path(memory))
        assert made.dirs.reason == ""
        yield made
        assert process.of_users(range(FIRST, FIRST + 1024)) == []


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - the kernel changes it, which sets no event
            await asyncio.sleep(0.02)


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status (proc_pid_status(5))."""
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


def limits_of(pid: int) -> dict[str, str]:
    """The hard limits of /proc/PID/limits."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[47:68].strip() for line in lines}


def check_confined(pid: int, uid: int) -> None:
    """Nothing is left to a process but its user. (What root's own processes are is counted for root as a whole.)"""
    status = status_of(pid)
    assert status["Uid"].split() == status["Gid"].split() == [str(uid)] * 4
    assert status["Groups"].split() in ([], [str(uid)])
    assert {int(status[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Umask"] == "0077"
    limits = limits_of(pid)
    assert limits["Max core file size"] == "0"
    assert limits["Max msgqueue size"] == "0"
    assert uid == 0 or int(limits["Max processes"]) < 1000
    assert int(limits["Max open files"]) <= 8192
    assert int(limits["Max locked memory"]) == 0
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""


async def test_qemu_has_nothing_but_its_user(place: Place) -> None:
    need_command("qemu-system-x86_64", "qemu-system-x86")
    argv = place.qemu(ONE)
    async with place.running(ONE, argv) as qemu:
        monitor = place.dirs.path(1) / "qmp.sock"
        await until(lambda: monitor.exists() or qemu.ended)
        assert not qemu.ended, (place.dirs.path(1) / "qemu.log").read_text()
        pid = qemu.identity.pid
        check_confined(pid, FIRST)
        assert limits_of(pid)["Max file size"] == str(16 << 20)
        assert (monitor.stat().st_uid, monitor.stat().st_mode & 0o7777) == (FIRST, 0o700)
        assert os.getsid(pid) == pid
        assert process.of_user(FIRST) == [pid]

        ticks = qemu.identity.start_ticks
        found = Process.open(pid, ONE.run, started=ticks, uid=FIRST)
        assert found is not None
        assert found.identity.uid == FIRST
        found.close()
        assert Process.open(pid, ONE.run, started=ticks, uid=FIRST + 1) is None
        place.dirs.seal(ONE)
        assert (place.dirs.path(1).stat().st_uid, place.dirs.path(1).stat().st_mode & 0o7777) == (0, 0o750)
    assert process.of_user(FIRST) == []
    place.dirs.remove(1)
    assert place.dirs.ids() == []


async def test_a_user_gets_nowhere_but_into_its_own_directory(place: Place) -> None:
    theirs = place.dirs.make(OTHER)
    (theirs / "kernel").write_text("theirs")
    (place.secret / "vmand.db").write_text("ours")
    own, other = place.memory_of(ONE), place.memory_of(OTHER)
    base = place.dirs.base
    said = await place.tried(
        ONE,
        f"""
        cd {base / "1"} && echo mine > file && cat file
        exec 2>/dev/null
        for one in {theirs}/kernel {other} {place.secret}/vmand.db /etc/shadow; do cat $one && echo READ $one; done
        for one in {base} {base.parent} {place.memory} {theirs} /etc /usr /run /var/lib /; do
            ls $one >/dev/null && case $one in {base.parent.parent}/*|{place.memory}|{theirs}) echo LISTED $one;; esac
            echo x > $one/x-{FIRST} && echo WROTE $one
        done
        for one in {own} {other} /proc/1/environ /proc/{os.getpid()}/environ; do
            head -c 1 $one > /dev/null && echo OPENED $one
        done
        kill -0 {os.getpid()} && echo SIGNALLED
        echo end
        """,
    )
    assert said == ["mine", f"OPENED {own}", "end"]


async def test_after_the_start_the_directory_is_closed(place: Place) -> None:
    place.dirs.make(ONE)
    place.dirs.seal(ONE)
    said = await place.tried(
        ONE,
        f"""
        cd {place.dirs.path(1)} && ls && exec 2>/dev/null
        echo x > file && echo MADE
        mv qemu.log other && echo MOVED
        rm -f qemu.log && echo REMOVED
        chmod 700 . && echo CHANGED
        echo end
        """,
        fresh=False,
    )
    assert said == ["qemu.log", "end"]


async def test_its_files_stay_short(place: Place) -> None:
    """So a log that a guest fills does not fill the host's memory."""
    script = f"cd {place.dirs.path(1)}; head -c 100000000 /dev/zero > file 2>/dev/null; ls -n file"
    (said,) = await place.tried(ONE, script)
    assert said.split()[4] == str(16 << 20)


async def test_whatever_a_user_has_started_ends_with_the_run(place: Place) -> None:
    """Also what left its session, changed its command line, and forks without end."""
    # A shell that can't fork ends: so the tree grows up to the limit, and what is left of it forks on and on.
    script = "f() { f & f & while :; do sleep 0.01; done; }; setsid sleep 1000 & f 2>/dev/null & exec sleep 1000"
    async with place.running(ONE, ["sh", "-c", script]) as shell:
        await until(lambda: len(process.of_user(FIRST)) > 20)
        assert len(process.of_user(FIRST)) <= 1 + 96  # RLIMIT_NPROC
        neighbour = place.running(OTHER, ["sleep", "1000"])
        async with neighbour as other:
            await until(lambda: process.of_user(FIRST + 1))
            await place.launcher.end(ONE)
            assert process.of_user(FIRST) == []
            assert await shell.wait(DEADLINE_S)
            assert process.of_user(FIRST + 1) == [other.identity.pid]
            await place.launcher.sweep({OTHER.run}, slots={OTHER.slot})
            assert not other.ended
            await place.launcher.sweep(set(), slots=())
            assert await other.wait(DEADLINE_S)


async def test_limits_can_be_what_vmand_may_set(place: Place) -> None:
    async with place.running(ONE, ["sleep", "1000"]) as one:
        await until(lambda: process.users(one.identity.pid) == {FIRST})
        limits = limits_of(one.identity.pid)
        assert limits["Max processes"] == "97"
        if may_raise_limits():
            assert limits["Max open files"] == "8192"


@pytest.mark.parametrize("first", [FIRST, 0])
async def test_a_guest_of_vmand_is_confined(first: int) -> None:
    """The whole way: a deploy, and where its process is. Where it has no user of its own it is root without rights."""
    need_root()
    if first:
        need_open_root()
    need_command("qemu-system-x86_64", "qemu-system-x86")
    kernel, initrd = guest_image(ROOT)
    async with private_vmand(settings={"accelerator": "tcg", "uid_first": first}) as vmand:
        async with await vmand.client() as client:
            one = await client.create_partition(cores=1, memsize_gb=0.125, mode=Mode.SHARED)
            await client.deploy(one, kernel=kernel, initrd=initrd, cmdline="quiet")
            status = await client.status(one)
            assert status.user == (first or None)
            assert status.pid is not None
            check_confined(status.pid, first)
            await client.shutdown(one, force=True)
            assert process.of_users(range(FIRST, FIRST + 1024)) == []
            await client.destroy_partition(one)
        assert vmand.remains() == []
