"""How QEMU is started: the chain of programs, the unit's properties, which process is the one, and its end."""

import asyncio
import dataclasses
import errno
import os
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edgehold.api.vmand import Mode
from edgehold.errors import FailedError, SettingsError, TimedOutError
from edgehold.testing.capability import need_root
from vmand.backend import confinement, launcher, process, unit
from vmand.backend.launcher import Launcher
from vmand.backend.process import Process
from vmand.backend.rundir import RunDirs
from vmand.backend.unit import Place
from vmand.config import Config
from vmand.model import OpenDisk, OpenFile, Record

RUN = "0f6f5a0e-8a0e-4c55-9f0c-9d4f5a8f2b11"
RECORD = Record(id=7, uuid="u", name="n", mode=Mode.SHARED, cores=3, memory_bytes=1 << 30, run=RUN, slot=2)
BOUNDS = confinement.limits(RECORD, file_bytes=0, image_bytes=50 << 20, lock_memory=False)
PLACE = Place(slice_name="s.slice", cpus=(1, 0), writable=(Path("/run/x/p/7"), Path('/m/a "b:c')), log_file=Path("/l"))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Launcher, RunDirs, Path]:
    """A launcher without systemd and without users of its own, and the directory of a run."""
    config = Config(runtime_dir=str(tmp_path), memory_dir=str(tmp_path / "m"), launcher="process", uid_first=0)
    dirs = RunDirs(tmp_path / "p", 0)
    return Launcher(config, dirs), dirs, dirs.make(RECORD)


def script(directory: Path, text: str) -> str:
    """A program that stands for QEMU: it is known by the same arguments."""
    path = directory / "qemu"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def argv_of(program: str, directory: Path) -> list[str]:
    return [program, "-uuid", RUN, f"path={directory}/qmp.sock"]


def changed(**changes: Any) -> Record:
    return msgspec.structs.replace(RECORD, **changes)


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status (proc_pid_status(5))."""
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def started(argv: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, start_new_session=True)


async def until(condition: Any, *, timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the kernel changes it, which sets no event
            await asyncio.sleep(0.01)


def test_limits_follow_the_partition() -> None:
    assert BOUNDS.threads == 99
    assert BOUNDS.file_bytes == 16 << 20
    assert BOUNDS.locked_bytes == 0
    assert BOUNDS.own_bytes < 1 << 30
    locked = confinement.limits(RECORD, file_bytes=1 << 40, image_bytes=0, lock_memory=True)
    assert locked.file_bytes == 1 << 40
    assert locked.locked_bytes == RECORD.memory_bytes + locked.own_bytes
    assert confinement.limits(RECORD, file_bytes=None, image_bytes=0, lock_memory=False).file_bytes is None


def test_the_chain_gives_up_everything() -> None:
    words = confinement.setpriv(uid=5, group=108, privileged=True)
    assert words == [
        *("setpriv", "--reuid", "5", "--regid", "5", "--groups", "108"),
        *("--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs", "--"),
    ]
    assert "--clear-groups" in confinement.setpriv(uid=5, group=None, privileged=True)
    assert confinement.setpriv(uid=None, group=None, privileged=False) == ["setpriv", "--no-new-privs", "--"]
    assert "--reuid" not in confinement.setpriv(uid=None, group=None, privileged=True)
    words = confinement.prlimit(BOUNDS, uid=5, privileged=True)
    assert {"--core=0", "--nproc=99", "--fsize=16777216", "--memlock=0", "--nofile=8192"} < set(words)
    assert not any("nproc" in one for one in confinement.prlimit(BOUNDS, uid=None, privileged=True))
    assert confinement.prlimit(BOUNDS, uid=None, privileged=False) == ["prlimit", "--core=0", "--msgqueue=0", "--"]
    unlimited = dataclasses.replace(BOUNDS, file_bytes=None)
    assert "--fsize=unlimited" in confinement.prlimit(unlimited, uid=5, privileged=True)


def test_the_properties_of_a_unit() -> None:
    given = unit.properties(PLACE, BOUNDS, uid=5)
    assert {"TasksMax=99", "LimitNPROC=99", "LimitFSIZE=16777216", "LimitMEMLOCK=0", "CPUAffinity=0 1"} < set(given)
    assert {'BindPaths="/run/x/p/7"', 'BindPaths="/m/a \\"b:c"', "StandardOutput=append:/l"} < set(given)
    assert not any(one.startswith(("Delegate", "AllowedCPUs", "User=")) for one in given)
    given = unit.properties(dataclasses.replace(PLACE, allowed=(2, 1), delegate=True), BOUNDS, uid=None)
    assert {"Delegate=yes", "AllowedCPUs=1 2"} < set(given)
    assert not any(one.startswith("LimitNPROC") for one in given)
    assert "InaccessiblePaths=-/boot -/media -/mnt -/srv" in given
    given = unit.properties(dataclasses.replace(PLACE, writable=(Path("/mnt/huge/x"),)), BOUNDS, uid=5)
    assert "InaccessiblePaths=-/boot -/media -/srv" in given
    assert unit.device(Path("/dev/kvm")) == ["BindPaths=/dev/kvm", "DeviceAllow=/dev/kvm rw"]
    assert unit.unit_name(RECORD) == "vmand-p-7-0f6f5a0e.service"


def test_systemd_finds_the_unit_right_and_tight(tmp_path: Path) -> None:
    """An equivalent unit file; a transient unit is never on a disk."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian package systemd)")
    place = dataclasses.replace(PLACE, slice_name="vmand.slice", writable=(Path("/run"),))
    path = tmp_path / "vmand-p-7-x.service"
    lines = [*unit.properties(place, BOUNDS, uid=5), "Slice=vmand.slice", "Type=exec", "ExecStart=/bin/true"]
    path.write_text("\n".join(["[Unit]", "Description=x", "[Service]", *lines]) + "\n")
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=120, check=False
    )
    assert [one for one in said.stderr.splitlines() if path.name in one] == []
    if said.returncode:
        pytest.skip(f"systemd-analyze can't verify here: {said.stderr.strip()[:200]}")
    said = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=15", "--no-pager", path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert said.returncode == 0, said.stdout[-1000:]


async def test_it_starts_confined_and_is_found_again(made: tuple[Launcher, RunDirs, Path], tmp_path: Path) -> None:
    one, _dirs, directory = made
    program = script(
        tmp_path, f'umask > {tmp_path}/umask; env > {tmp_path}/env; echo started; echo "to stderr" >&2; exec sleep 99'
    )
    cpu = min(os.sched_getaffinity(0))
    before = os.umask(0o022)
    started = await one.spawn(
        argv_of(program, directory), RECORD, directory=directory, cpus={cpu}, kvm=False, lock_memory=False
    )
    assert os.umask(before) == 0o022
    pid = started.identity.pid
    try:
        log = directory / "qemu.log"
        await until(lambda: log.read_text() == "started\nto stderr\n")
        await until(lambda: process.arguments(pid)[0] == "sleep")
        assert (tmp_path / "umask").read_text() == "0077\n"
        assert {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()} <= {"PWD", "SHLVL", "_"}
        status = status_of(pid)
        assert status["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            assert {int(status[key], 16) for key in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")} == {0}
        assert os.sched_getaffinity(pid) == {cpu}
        assert os.getsid(pid) == pid
        assert log.stat().st_mode & 0o7777 == 0o600
        assert one.cgroup(started) is None
        assert (started.identity.uid, started.identity.unit) == (None, "")
    finally:
        await started.kill()
        started.close()
    assert started.cause == "its process was killed by SIGKILL"


async def test_which_process_is_the_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = script(tmp_path, "while :; do sleep 0.1; done")
    child = started(argv_of(program, tmp_path))
    try:
        await until(lambda: process.run_of(process.arguments(child.pid)) == RUN)
        ticks = process.start_ticks(child.pid)
        assert ticks
        assert (child.pid, RUN) in process.find(f"path={tmp_path}/")
        assert process.find(f"path={tmp_path}/other/") == []

        def opens(run: str = RUN, **options: Any) -> bool:
            found = Process.open(child.pid, run, **options)
            if found is not None:
                found.close()
            return found is not None

        own = os.geteuid()
        assert opens()
        assert opens(started=ticks)
        assert not opens("another")
        assert not opens("")
        assert not opens(started=ticks + 1)
        assert opens(started=ticks, uid=own)
        assert not opens("another", started=ticks, uid=own)  # vmand's own user says nothing
        assert not opens(started=ticks, uid=own + 1)  # the command line alone does not, where there is a user
        assert Process.open(0, RUN) is None
        assert Process.open(2**22 + 1, RUN) is None
        # As QEMU's user a guest may have written another command line; as ours nobody else can.
        monkeypatch.setattr(process, "users", lambda _pid: frozenset({own + 1}))
        assert opens("another", started=ticks, uid=own + 1)
        assert not opens("another", uid=own + 1)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        monkeypatch.undo()
    await until(lambda: process.users(child.pid) == frozenset())
    assert process.start_ticks(child.pid) == ticks
    assert not opens(started=ticks)  # it has ended and is only not waited for
    child.wait()


async def test_a_process_whose_first_thread_ended_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that took its QEMU over could do that; the command line is gone then, the process is not."""
    text = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(99,)).start()
ctypes.CDLL(None).syscall(60 if __import__("os").uname().machine == "x86_64" else 93, 0)
"""
    child = started([sys.executable, "-c", text])
    try:
        await until(lambda: status_of(child.pid)["State"].startswith("Z"))
        assert process.arguments(child.pid) == []
        assert process.users(child.pid) == {os.geteuid()}
        user = os.geteuid() + 1
        monkeypatch.setattr(process, "users", lambda _pid: frozenset({user}))
        found = Process.open(child.pid, RUN, started=process.start_ticks(child.pid), uid=user)
        assert found is not None
        assert not await found.wait(0.05)
        found.close()
    finally:
        child.kill()
        child.wait()


async def test_only_a_users_own_processes_are_ended() -> None:
    for uid in (0, os.geteuid()):
        with pytest.raises(ValueError, match="is not a partition's own"):
            await process.end_user(uid)
    assert await process.end_user(1_899_999_999) == 0


async def test_a_process_that_can_not_be_watched_is_not_taken_for_dead(
    made: tuple[Launcher, RunDirs, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    one, _dirs, directory = made
    monkeypatch.setattr(os, "pidfd_open", full)
    with pytest.raises(FailedError, match="can't be watched: Too many open files"):
        Process.open(os.getpid(), "r")
    with pytest.raises(FailedError, match="can't be watched"):
        await one.spawn(
            ["sleep", "99"], RECORD, directory=directory, cpus=os.sched_getaffinity(0), kvm=False, lock_memory=False
        )
    with pytest.raises(ChildProcessError):  # no child is left that nobody watches
        os.waitpid(-1, os.WNOHANG)  # noqa: ASYNC222 - it does not wait


async def test_what_is_left_of_a_run_is_ended(made: tuple[Launcher, RunDirs, Path], tmp_path: Path) -> None:
    one, _dirs, directory = made
    program = script(tmp_path, "echo up; while :; do sleep 0.1; done")

    async def start() -> Process:
        (directory / "qemu.log").unlink(missing_ok=True)
        made = await one.spawn(
            argv_of(program, directory), RECORD, directory=directory, cpus={0}, kvm=False, lock_memory=False
        )
        await until((directory / "qemu.log").read_text)  # the last of the chain: no exec is under way
        assert (made.identity.pid, RUN) in process.find(f"path={directory.parent}/")
        return made

    first = await start()
    await one.sweep({RUN})
    assert not first.ended
    await one.sweep(set(), slots=())
    assert await first.wait(30)
    first.close()
    second = await start()
    await one.end(changed(run="another"))
    assert not second.ended
    await one.end(RECORD)
    assert await second.wait(30)
    second.close()
    await one.end(RECORD)
    await one.stop(RECORD)


async def test_a_program_that_is_not_there_is_named(made: tuple[Launcher, RunDirs, Path]) -> None:
    one, _dirs, directory = made
    with pytest.raises(FailedError, match="no-such-qemu can't be started: No such file or directory; is it installed"):
        await one.spawn(["no-such-qemu"], RECORD, directory=directory, cpus={0}, kvm=False, lock_memory=False)


def test_who_may_use_kvm(tmp_path: Path) -> None:
    need_root()
    device = tmp_path / "kvm"
    with pytest.raises(FailedError, match="No such file"):
        launcher._group(device)
    device.touch()
    os.chown(device, 0, 108)
    device.chmod(0o660)
    assert launcher._group(device) == 108
    device.chmod(0o666)
    assert launcher._group(device) is None
    for gid, mode in ((108, 0o640), (0, 0o660), (108, 0o600)):
        os.chown(device, 0, gid)
        device.chmod(mode)
        assert stat.S_IMODE(device.stat().st_mode) == mode
        with pytest.raises(FailedError, match=f"no group but root's may use it .*chgrp kvm {device}"):
            launcher._group(device)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[OpenDisk]]:
    """A raw disk of 1 MiB that may be written, a larger one that may not, and a qcow2 of 1 TiB."""
    made = []
    for name, size, format_, readonly in (("a", 1 << 20, "raw", 0), ("b", 1 << 30, "raw", 1), ("c", 512, "qcow2", 0)):
        fd = os.open(tmp_path / name, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, size)
        made.append(OpenDisk(file=OpenFile(fd=fd, name=name), format=format_, readonly=bool(readonly)))
    os.pwrite(made[2].file.fd, struct.pack(">Q", 1 << 40), 24)
    yield made
    for one in made:
        os.close(one.file.fd)


def test_how_long_a_file_may_become(disks: list[OpenDisk]) -> None:
    assert launcher._largest(None) is None
    assert launcher._largest(()) == 0
    assert launcher._largest(disks[:2]) == 1 << 20
    grown = launcher._largest(disks)
    assert grown is not None
    assert grown > 2 << 40


def test_limits_stay_within_what_vmand_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (10, 20))
    bounds = dataclasses.replace(BOUNDS, file_bytes=None)
    least = launcher._within(bounds)
    assert (least.threads, least.open_files, least.locked_bytes, least.file_bytes) == (20, 20, 0, 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (-1, -1))
    assert launcher._within(bounds) == bounds


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


async def test_systemd_gets_dollars_twice_and_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def spawn() -> None:
        await unit.spawn_unit(
            ["qemu$", "-append", "a=$HOME"],
            run="r",
            unit="u",
            slice_name="s",
            given=["NoNewPrivileges=yes"],
            uid=None,
            log_file=tmp_path / "log",
        )

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedError, match="systemd-run can't be started: No such file"):
        await spawn()
    await unit.stop_unit("u")  # idempotent: what is not there is stopped
    program(tmp_path / "systemd-run", f'for one; do echo "$one"; done > {tmp_path}/said')
    program(tmp_path / "systemctl", "echo 0")
    with pytest.raises(FailedError, match="ended at once"):
        await spawn()
    said = (tmp_path / "said").read_text().splitlines()
    assert said[-3:] == ["qemu$", "-append", "a=$$HOME"]
    assert {"--unit=u", "--slice=s", "--collect", "--property=NoNewPrivileges=yes"} < set(said)
    program(tmp_path / "systemctl", "exec /bin/sleep 20")
    monkeypatch.setattr(unit, "_SYSTEMD_TIMEOUT_S", 0.1)
    with pytest.raises(TimedOutError, match="systemctl did not end within"):
        await unit.stop_unit("u")


async def test_a_unit_has_its_place_and_is_stopped_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SYSTEMD", tmp_path)
    config = Config(runtime_dir=str(tmp_path), memory_dir="/m", uid_first=0, slice="x.slice")
    dirs = RunDirs(tmp_path / "p", 0)
    one = Launcher(config, dirs)
    assert one.systemd
    asked: list[dict[str, Any]] = []
    stopped: list[str] = []

    async def spawn_unit(argv: list[str], **options: Any) -> object:
        asked.append({"argv": argv, **options})
        return SimpleNamespace()

    async def stop_unit(name: str) -> None:
        stopped.append(name)

    monkeypatch.setattr(launcher, "spawn_unit", spawn_unit)
    monkeypatch.setattr(launcher, "stop_unit", stop_unit)
    dedicated = changed(mode=Mode.DEDICATED, cpus=(2, 3))
    for record, slice_name in ((RECORD, None), (dedicated, None), (dedicated, "-.slice")):
        directory = dirs.make(record)
        await one.spawn(
            ["sleep"],
            record,
            directory=directory,
            cpus={0},
            kvm=True,
            lock_memory=False,
            slice_name=slice_name,
            own_cores=(2, 3, 5),  # with the idle sibling of one
        )
    assert [given["slice_name"] for given in asked] == ["x.slice", "x.slice", "-.slice"]
    assert asked[0]["argv"][0].endswith("/setpriv")
    assert asked[0]["argv"][-1].endswith("/sleep")
    assert "prlimit" not in asked[0]["argv"][0]
    delegates = ["Delegate=yes" in given["given"] for given in asked]
    assert delegates == [False, True, True]
    assert {"CPUAffinity=0", "Description=Edgehold: guest of partition 7"} < set(asked[1]["given"])
    assert {"CPUAffinity=2 3 5", "AllowedCPUs=2 3 5", "DeviceAllow=/dev/kvm rw"} < set(asked[2]["given"])
    assert f'BindPaths="{directory}"' in asked[2]["given"]
    assert 'BindPaths="/m"' in asked[2]["given"]
    await one.stop(RECORD)
    await one.stop(changed(unit="other.service"))
    await one.stop(changed(run=""))
    assert stopped == ["vmand-p-7-0f6f5a0e.service", "other.service"]


def test_the_systemd_launcher_needs_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SYSTEMD", tmp_path / "none")
    for setting in ("auto", "process"):
        launcher.check_launcher(setting)
    with pytest.raises(SettingsError, match="launcher: systemd does not run here"):
        launcher.check_launcher("systemd")
    monkeypatch.setattr(launcher, "SYSTEMD", tmp_path)
    launcher.check_launcher("systemd")


def test_guests_are_no_part_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "CGROUP", tmp_path / "cgroup")
    launcher.check_launcher("process")
    (tmp_path / "cgroup").write_text("1:name=systemd:/user.slice/x.scope\n0::/user.slice/vmand.service.d/x.scope\n")
    launcher.check_launcher("process")
    (tmp_path / "cgroup").write_text("0::/edgehold.slice/vmand.service\n")
    with pytest.raises(SettingsError, match=r"launcher: with process guests would be a part of vmand\.service"):
        launcher.check_launcher("process")
    launcher.check_launcher("auto")
