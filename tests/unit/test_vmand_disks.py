"""A guest's disks: whose rights open them, what is refused, and that nobody else gets a disk that is in use."""

import errno
import fcntl
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgehold.api.vmand import Disk
from edgehold.errors import BadRequestError, BadStateError, DeniedError, UnsupportedError
from edgehold.wire.peer import Peer
from vmand.backend import disks, qcow2
from vmand.model import OpenDisk

ROOT = Peer(1, 0, 0, frozenset({0}))
NOBODY = Peer(1, 65534, 65534, frozenset({65534}))


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    """Whatever was refused, and when, is closed."""
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) <= before


def file(path: Path, *, size: int = 4096, head: bytes = b"") -> Path:
    path.write_bytes(head + bytes(size - len(head)))
    return path


def refused(*wanted: Disk, peer: Peer = ROOT, limit: int = 8) -> None:
    with disks.opened(wanted, limit=limit, peer=peer):
        pytest.fail("it is taken")


def flags(disk: OpenDisk) -> int:
    return fcntl.fcntl(disk.file.fd, fcntl.F_GETFL) & os.O_ACCMODE


def test_disks_are_open_for_what_they_are_used_for(tmp_path: Path) -> None:
    one, two = file(tmp_path / "one"), file(tmp_path / "two")
    wanted = (Disk(path=str(one)), Disk(path=str(two), readonly=True))
    with disks.opened(wanted, limit=2, peer=ROOT) as made:
        assert [flags(disk) for disk in made] == [os.O_RDWR, os.O_RDONLY]
        assert [(disk.format, disk.readonly) for disk in made] == [("raw", False), ("raw", True)]
        assert not any(disks.is_block(disk) for disk in made)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(made[1].file.fd, b"x")
    with disks.opened((), limit=0, peer=ROOT) as made:
        assert made == ()


def test_bad_disks_are_named_with_the_cure(tmp_path: Path) -> None:
    good = Disk(path=str(file(tmp_path / "good")))
    with pytest.raises(BadRequestError, match="disks: 2 are more than the 1 that the settings allow"):
        refused(good, good, limit=1)
    with pytest.raises(BadRequestError, match=r"disks\[1\]: .*not an absolute path"):
        refused(good, Disk(path="disk"))
    with pytest.raises(BadRequestError, match=r"disks\[0\]: .*No such file"):
        refused(Disk(path=str(tmp_path / "none")))
    for what in (tmp_path, Path("/dev/null")):
        with pytest.raises(BadRequestError, match=r"disks\[0\]: "):
            refused(Disk(path=str(what)))
    for size in (0, 513):
        with pytest.raises(BadRequestError, match=rf"disks\[0\]: .* has {size} bytes; .* multiple of 512"):
            refused(Disk(path=str(file(tmp_path / "odd", size=size))))
    with pytest.raises(BadRequestError, match=r"disks\[0\]: .*is no qcow2 image; give the format raw"):
        refused(Disk(path=good.path, format="qcow2"))


@pytest.mark.parametrize("readonly", [False, True])
def test_a_raw_disk_that_a_guest_made_look_like_qcow2(tmp_path: Path, *, readonly: bool) -> None:
    path = file(tmp_path / "disk", head=qcow2.MAGIC)
    with pytest.raises(BadRequestError, match=r"given as raw and begins like a qcow2 image; give the format qcow2"):
        refused(Disk(path=str(path), readonly=readonly))


def test_the_header_of_a_qcow2_image_is_checked(tmp_path: Path) -> None:
    head = qcow2.MAGIC + struct.pack(">IQI", 3, 512, 9)  # a backing file's name of 9 bytes at 512
    path = file(tmp_path / "image", head=head)
    with pytest.raises(BadRequestError, match=r"disks\[0\]: .*image: the qcow2 image has a backing file"):
        refused(Disk(path=str(path), format="qcow2"))


def test_one_guest_writes_or_several_read(tmp_path: Path) -> None:
    path = str(file(tmp_path / "disk"))
    writes, reads = Disk(path=path), Disk(path=path, readonly=True)
    for pair in ((writes, writes), (writes, reads), (reads, writes)):
        with pytest.raises(BadStateError, match=r"disks\[1\]: .*in use by another guest or twice by this one"):
            refused(*pair)
        with disks.opened(pair[:1], limit=1, peer=ROOT), pytest.raises(BadStateError, match=r"disks\[0\]: .*in use"):
            refused(pair[1])
    with disks.opened((reads, reads), limit=2, peer=ROOT), disks.opened((reads,), limit=1, peer=ROOT):
        pass
    with disks.opened((writes,), limit=1, peer=ROOT):  # what was refused or has ended holds nothing
        pass


def test_the_lock_lives_as_long_as_the_last_that_has_the_file(tmp_path: Path) -> None:
    """As QEMU has it after vmand has died."""
    wanted = Disk(path=str(file(tmp_path / "disk")))
    with disks.opened((wanted,), limit=1, peer=ROOT) as (made,):
        other = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(made.file.fd,), close_fds=True
        )
    try:
        with pytest.raises(BadStateError):
            refused(wanted)
    finally:
        other.communicate(b"\n")
    with disks.opened((wanted,), limit=1, peer=ROOT):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def none(_fd: int, _command: int, _argument: bytes) -> bytes:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", none)
    with pytest.raises(UnsupportedError, match=r"disks\[0\]: .*can't be locked \(No locks available\)"):
        refused(Disk(path=str(file(tmp_path / "disk"))))


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may search, unlike pytest's own."""
    if not all(Path(one).stat().st_mode & 0o001 for one in ("/", "/tmp")):
        pytest.skip("the root directory here is closed to other users: no caller but root can name any file")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def test_a_guest_gets_the_rights_of_its_caller(public: Path) -> None:
    path = file(public / "disk")
    path.chmod(0o644)
    with disks.opened((Disk(path=str(path), readonly=True),), limit=1, peer=NOBODY) as (made,):
        assert flags(made) == os.O_RDONLY
    with pytest.raises(DeniedError, match=r"disks\[0\]: .*uid 65534"):
        refused(Disk(path=str(path)), peer=NOBODY)
    path.chmod(0o602)  # it may write and not read: a disk is both
    with pytest.raises(DeniedError):
        refused(Disk(path=str(path)), peer=NOBODY)
    path.chmod(0o606)
    with disks.opened((Disk(path=str(path)),), limit=1, peer=NOBODY) as (made,):
        assert flags(made) == os.O_RDWR
    path.chmod(0o600)
    with pytest.raises(DeniedError):
        refused(Disk(path=str(path), readonly=True), peer=NOBODY)


def test_block_devices_are_for_root(public: Path) -> None:
    device = public / "device"
    try:
        os.mknod(device, 0o666 | 0o060000, os.makedev(60, 250))  # for experiments: no driver has it
    except PermissionError:
        pytest.skip("this host lets nobody make device nodes")
    device.chmod(0o666)
    with pytest.raises((BadRequestError, DeniedError), match=r"disks\[0\]: "):
        refused(Disk(path=str(device), readonly=True), peer=NOBODY)
    with pytest.raises(BadRequestError, match=r"disks\[0\]: .*(No such device|not permitted|denied)"):
        refused(Disk(path=str(device), readonly=True), peer=ROOT)
