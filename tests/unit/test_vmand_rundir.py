"""The directory of a run: its user, the copies in it, and its removal whatever its owner has made of it."""

import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgehold.api.vmand import Mode
from edgehold.errors import BadRequestError, FailedError, NoCapacityError, TimedOutError
from edgehold.testing.capability import need_open_root, need_root
from vmand.backend import rundir
from vmand.backend.rundir import RunDirs, last_line
from vmand.model import Record

FIRST = 1_900_000_000 + 1024 * secrets.randbelow(100_000)
RECORD = Record(id=7, uuid="u", name="n", mode=Mode.SHARED, cores=1, memory_bytes=64 << 20, slot=3)


@pytest.fixture
def base() -> Iterator[Path]:
    """A place to which every user can walk, unless the root directory itself is closed."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name) / "p"


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_each_partition_has_a_user_of_its_own(base: Path) -> None:
    need_root()
    need_open_root()
    dirs = RunDirs(base, FIRST)
    assert dirs.ids() == []
    path = dirs.make(RECORD)
    assert dirs.reason == ""
    assert dirs.user(RECORD) == FIRST + 3
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (FIRST + 3, FIRST + 3, 0o700)
    assert (base.stat().st_uid, base.stat().st_mode & 0o7777) == (0, 0o711)
    (path / "old").touch()
    assert list(dirs.make(RECORD).iterdir()) == []
    dirs.seal(RECORD)
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (0, FIRST + 3, 0o750)
    (base / "x").mkdir()
    assert dirs.ids() == [7]
    dirs.remove(7)
    dirs.remove(7)
    assert dirs.ids() == []


def test_why_there_is_no_user(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RunDirs(base, 0).reason == "uid_first is 0 in the settings"
    assert RunDirs(base, 0).user(RECORD) is None
    need_open_root()
    if os.geteuid() == 0:
        closed = base.parent / "closed"
        closed.mkdir(mode=0o700)
        assert f"{closed} is closed to other users" in RunDirs(closed / "run/p", FIRST).reason
        assert f"get to {closed}/memory" in RunDirs(base, FIRST, places=[closed / "memory"]).reason
        outside = RunDirs(base, 2**32 - 2000)
        monkeypatch.setattr(rundir, "_mapped", lambda _path, wanted: wanted[0] < 2**31)
        assert "outside the user namespace" in outside.reason
        monkeypatch.setattr(rundir, "_lacking", lambda _needed: ["CAP_SETUID"])
        assert RunDirs(base, FIRST).reason == "vmand has no CAP_SETUID"
        assert not RunDirs(base, FIRST).privileged
        monkeypatch.setattr(rundir, "_lacking", lambda needed: sorted({"CAP_KILL", "CAP_SETUID"} & set(needed)))
        assert RunDirs(base, FIRST).reason == "vmand has no CAP_KILL, CAP_SETUID"
        assert RunDirs(base, FIRST, units=True).reason == "vmand has no CAP_KILL"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    one = RunDirs(base, FIRST)
    assert (one.reason, list(one.uids)) == ("vmand does not run as root", [])


@pytest.mark.parametrize(
    ("text", "covered"),
    [("0 0 4294967295\n", True), ("0 100000 65536\n", False), ("0 0 1000\n1900000000 5 1024\n", True), ("", False)],
)
def test_a_user_namespace_has_the_ids_or_not(text: str, covered: bool, tmp_path: Path) -> None:
    path = tmp_path / "uid_map"
    path.write_text(text)
    assert rundir._mapped(path, range(1_900_000_000, 1_900_001_024)) is covered


def test_a_base_that_is_somebody_elses_is_refused(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(FailedError, match="with mode 0777; it must be vmand's own"):
        RunDirs(base, 0).make(RECORD)
    base.rmdir()
    base.symlink_to("/tmp")
    with pytest.raises(FailedError):
        RunDirs(base, 0).make(RECORD)


async def test_a_copy_is_what_was_open_and_cannot_be_changed(base: Path) -> None:
    dirs = RunDirs(base, FIRST)
    dirs.make(RECORD)
    content = os.urandom(3 << 20)
    fd = os.memfd_create("image")
    try:
        os.write(fd, content)
        os.lseek(fd, 5, os.SEEK_SET)
        path = await dirs.put(RECORD, "kernel", fd, limit=4 << 20)
        assert path.read_bytes() == content
        assert path.stat().st_mode & 0o7777 == 0o400
        assert path.stat().st_uid == (dirs.user(RECORD) or os.geteuid())
        assert os.lseek(fd, 0, os.SEEK_CUR) == 5
        os.ftruncate(fd, 0)
        assert path.read_bytes() == content
        with pytest.raises(FailedError, match="File exists"):
            await dirs.put(RECORD, "kernel", fd, limit=4 << 20)
        with pytest.raises(BadRequestError, match="initrd: it has 0 bytes"):
            await dirs.put(RECORD, "initrd", fd, limit=1 << 20)
        os.ftruncate(fd, 2 << 20)
        with pytest.raises(BadRequestError, match="1 to 1 MiB are allowed"):
            await dirs.put(RECORD, "dtb", fd, limit=1 << 20)
        assert (dirs.path(7) / "dtb").stat().st_size == (1 << 20) + 1  # no further than it takes to know
    finally:
        os.close(fd)
    dirs.remove(7)


async def test_a_full_file_system_and_one_that_hangs(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dirs = RunDirs(base, 0)
    dirs.make(RECORD)
    before = descriptors()
    fd = os.memfd_create("image")
    os.write(fd, b"x")
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(RunDirs, "create", lambda *_args, **_options: os.dup(full))
    with pytest.raises(NoCapacityError, match="no space is left in the file system of runtime_dir"):
        await dirs.put(RECORD, "kernel", fd, limit=1 << 20)
    go, real = threading.Event(), rundir._copy

    def hangs(source: int, target: int, limit: int) -> int:
        go.wait(60)
        return real(source, target, limit)

    monkeypatch.setattr(rundir, "_copy", hangs)
    monkeypatch.setattr(rundir, "_COPY_S", 0.05)
    with pytest.raises(TimedOutError, match="kernel: it can't be read within"):
        await dirs.put(RECORD, "kernel", fd, limit=1 << 20)
    go.set()
    for one in threading.enumerate():
        if one.name == "copy":
            one.join(60)
    os.close(fd)
    os.close(full)
    assert descriptors() == before


def test_links_are_removed_and_not_followed(base: Path) -> None:
    dirs = RunDirs(base, FIRST)
    path = dirs.make(RECORD)
    other = base.parent / "other"
    (other / "in").mkdir(parents=True)
    (other / "file").touch()
    (path / "link").symlink_to(other)
    (path / "sub").mkdir()
    (path / "sub/link").symlink_to(other / "in")
    (path / "sub/file").symlink_to(other / "file")
    os.link(other / "file", path / "sub/hard")
    os.mkfifo(path / "sub/fifo")
    dirs.remove(7)
    assert not path.exists()
    assert sorted(one.name for one in other.iterdir()) == ["file", "in"]
    path.symlink_to(other)  # the directory itself
    dirs.remove(7)
    assert not path.is_symlink()
    assert (other / "file").exists()


def test_depth_width_and_modes_do_not_matter(base: Path) -> None:
    """Deeper than a path may be long (PATH_MAX), and than Python would recurse."""
    dirs = RunDirs(base, FIRST)
    path = dirs.make(RECORD)
    fd = os.open(path, os.O_RDONLY)
    for n in range(1500):
        os.mkdir("deep", dir_fd=fd)
        for m in range(n % 3):
            os.mkdir(f"beside-{m}", dir_fd=fd)
            os.close(os.open(f"file-{m}", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        below = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.fchmod(fd, 0)
    os.close(fd)
    for n in range(300):
        (path / f"wide-{n}").mkdir()
        (path / f"wide-{n}" / "x").touch()
        (path / f"wide-{n}").chmod(0)
    uid = dirs.user(RECORD)
    if uid is not None:
        os.chown(path / "deep", uid, uid)
    before = descriptors()
    dirs.remove(7)
    assert not path.exists()
    assert descriptors() == before


def test_the_last_line_is_of_our_own_log(tmp_path: Path) -> None:
    log, secret = tmp_path / "qemu.log", tmp_path / "secret"
    assert last_line(log) == ""
    log.write_bytes(b"first\nqemu: no \x1b[31msuch file\xff\n")
    assert last_line(log) == ": qemu: no  [31msuch file\ufffd"
    secret.write_text("a secret")
    log.unlink()
    log.symlink_to(secret)
    assert last_line(log) == ""
    log.unlink()
    os.link(secret, log)
    assert last_line(log) == ""
    log.unlink()
    os.mkfifo(log)
    assert last_line(log) == ""
    log.unlink()
    log.touch()
    assert last_line(log) == ""
    if os.geteuid() == 0:
        log.write_text("text")
        os.chown(log, 65534, 65534)
        assert last_line(log) == ""
