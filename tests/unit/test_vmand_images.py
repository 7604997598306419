"""The files of a guest: whose rights open them, what may be a descriptor, and how each mistake is named."""

import contextlib
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgehold.errors import BadRequestError, DeniedError, FailedError, UnsupportedError
from edgehold.testing.capability import need_open_root, need_root
from edgehold.wire.peer import Peer
from vmand.backend import images
from vmand.backend.rights import open_as
from vmand.model import Images, OpenFile

ROOT_PEER = Peer(1, 0, 0, frozenset({0}))
NOBODY = Peer(1, 65534, 65534, frozenset({65534}))
ARM = b"MZ@\xfa" + bytes(52) + b"ARM\x64" + bytes(100)
X86 = bytes(0x202) + b"HdrS" + struct.pack("<H", 0x20F) + bytes(0x2E) + struct.pack("<H", 1) + bytes(100)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(ARM)
    return path


@contextlib.contextmanager
def opened(
    kernel: Path | str | int,
    *,
    initrd: Path | str | int | None = None,
    dtb: Path | str | int | None = None,
    fds: tuple[int, ...] = (),
    peer: Peer = ROOT_PEER,
) -> Iterator[Images]:
    def plain(one: Path | str | int | None) -> str | int | None:
        return str(one) if isinstance(one, Path) else one

    first = plain(kernel)
    assert first is not None
    with images.opened(
        kernel=first, initrd=plain(initrd), dtb=plain(dtb), cmdline="quiet", fds=fds, limit_mib=1, peer=peer
    ) as made:
        yield made


def check(kernel: Path | str | int, **options: Any) -> tuple[bytes, Images]:
    """What QEMU would read as the kernel, and the images."""
    with opened(kernel, **options) as made:
        return os.pread(made.kernel.fd, 1 << 20, 0), made


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_good_images(kernel: Path) -> None:
    before = descriptors()
    content, made = check(kernel)
    assert content == ARM
    assert (made.initrd, made.dtb, made.cmdline, made.arch) == (None, None, "quiet", "aarch64")
    assert made.kernel.name == str(kernel)
    kernel.write_bytes(X86)
    assert check(kernel)[1].arch == "x86_64"
    assert descriptors() == before  # closed with the block


def test_bad_images_are_named_with_the_cure(kernel: Path, tmp_path: Path) -> None:
    before = descriptors()
    for text in ("Image", "/a\0b"):
        with pytest.raises(BadRequestError, match=r"kernel: .*not an absolute path"):
            check(text)
    with pytest.raises(BadRequestError, match=r"kernel: .*No such file"):
        check(tmp_path / "none")
    with pytest.raises(BadRequestError, match=r"kernel: .*no such name can be"):
        check("/\udfff\ud800")
    fifo, empty, large = tmp_path / "fifo", tmp_path / "empty", tmp_path / "large"
    os.mkfifo(fifo)
    empty.touch()
    with large.open("wb") as file:
        file.truncate((1 << 20) + 1)
    for path in (tmp_path, fifo):
        with pytest.raises(BadRequestError, match=r"initrd: .*not a regular file"):
            check(kernel, initrd=path)
    with pytest.raises(BadRequestError, match="has 0 bytes"):
        check(empty)
    with pytest.raises(BadRequestError, match="1 to 1 MiB are allowed"):
        check(large)
    kernel.write_bytes(X86)
    with pytest.raises(UnsupportedError, match="takes no device tree"):
        check(kernel, dtb="/d")
    kernel.write_bytes(b"k")
    with pytest.raises(BadRequestError, match=r"kernel: .* looks like"):
        check(kernel)
    assert descriptors() == before


def test_a_name_brings_no_control_characters_into_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError) as caught:
        check(f"{tmp_path}/a\nb")
    assert "\n" not in str(caught.value)


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    """A writer that waits for a FIFO's reader would be let go by an open; so would a device be touched."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(BadRequestError):
        check(fifo)
    with pytest.raises(OSError, match="No such device"):  # ENXIO: no reader is there, and the attempt leaves none
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    real, seen = os.open, []

    def watched(path: object, flags: int, *args: Any, **options: Any) -> int:
        seen.append(flags)
        return real(path, flags, *args, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watched)
        with pytest.raises(BadRequestError):
            check("/dev/null")
    assert all(flags & os.O_PATH for flags in seen)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may search, unlike pytest's own."""
    need_open_root()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def put(path: Path, content: bytes, mode: int) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_caller_gives_a_guest_only_what_the_caller_may_read(public: Path) -> None:
    kernel = put(public / "kernel", ARM, 0o644)
    assert check(kernel, peer=NOBODY)[0] == ARM
    secret = put(public / "secret", b"s", 0o600)
    hidden = public / "hidden"
    hidden.mkdir(mode=0o700)
    put(hidden / "file", b"h", 0o644)
    link, sly = public / "link", hidden / "sly"
    link.symlink_to(hidden / "file")
    sly.symlink_to(kernel)
    texts = set()
    for path in (secret, hidden / "file", hidden / "none", public / "none", link, sly, hidden, public / "\udfff\ud800"):
        with pytest.raises(DeniedError, match=r"initrd: .* can't be read by uid 65534") as caught:
            check(kernel, initrd=path, peer=NOBODY)
        name = "".join(one if one.isprintable() else " " for one in str(path)).strip()
        texts.add(str(caught.value).replace(name, "PATH"))
    assert len(texts) == 1  # it does not tell what is there
    secret.chmod(0o640)
    gid = secret.stat().st_gid
    assert check(kernel, initrd=secret, peer=Peer(1, 65534, 65534, frozenset({65534, gid})))[0] == ARM
    secret.chmod(0o604)  # its group may not, and is in that class before it is among the others
    with pytest.raises(DeniedError):
        check(kernel, initrd=secret, peer=Peer(1, 65534, 65534, frozenset({gid})))


def test_to_write_takes_both_rights(public: Path) -> None:
    disk = put(public / "disk", b"d" * 512, 0o644)
    with pytest.raises(DeniedError, match=r"disk: .* can't be written by uid 65534"):
        open_as("disk", str(disk), NOBODY, write=True, limit_bytes=None)
    disk.chmod(0o642)
    with pytest.raises(DeniedError, match="can't be written"):
        open_as("disk", str(disk), NOBODY, write=True, limit_bytes=None)
    disk.chmod(0o646)
    one = open_as("disk", str(disk), NOBODY, write=True, limit_bytes=None)
    assert os.pwrite(one.fd, b"e", 0) == 1
    assert os.get_blocking(one.fd)
    os.close(one.fd)
    one = open_as("disk", str(disk), NOBODY, limit_bytes=None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(one.fd, b"e", 0)
    os.close(one.fd)


def test_a_block_device_is_opened_only_where_it_may_be_one() -> None:
    block = next((one for one in Path("/dev").iterdir() if one.is_block_device()), None)
    if block is None:
        pytest.skip("no block device is in /dev here")
    with pytest.raises(BadRequestError, match="not a regular file"):
        open_as("disk", str(block), ROOT_PEER, limit_bytes=None)
    with pytest.raises(BadRequestError, match="not a regular file or block device"):
        open_as("disk", "/dev/null", ROOT_PEER, limit_bytes=None, block=True)


def test_what_was_checked_is_what_is_read(public: Path) -> None:
    kernel = put(public / "kernel", ARM, 0o644)
    secret = put(public / "secret", b"s", 0o600)
    with opened(kernel, peer=NOBODY) as made:
        kernel.unlink()
        kernel.symlink_to(secret)
        assert os.pread(made.kernel.fd, 1000, 0) == ARM


def test_an_error_of_qemu_has_the_callers_names(kernel: Path) -> None:
    copies = {Path("/run/x/p/7/kernel"): OpenFile(fd=-1, name=str(kernel))}
    with pytest.raises(FailedError, match=f"could not load '{kernel}'"), images.named(copies):
        raise FailedError("could not load '/run/x/p/7/kernel'")


@contextlib.contextmanager
def memory(content: bytes) -> Iterator[int]:
    """A memfd with this content."""
    fd = os.memfd_create("image")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def test_a_descriptor_is_a_file_whatever_the_caller_may_read() -> None:
    with memory(ARM) as one, memory(b"ramdisk") as two:
        before = descriptors()
        with opened(1, initrd=0, fds=(two, one), peer=NOBODY) as made:
            assert made.initrd is not None
            assert {made.kernel.fd, made.initrd.fd}.isdisjoint({one, two})
            assert os.pread(made.kernel.fd, 1000, 0) == ARM
            assert os.pread(made.initrd.fd, 1000, 0) == b"ramdisk"
            assert (made.kernel.name, made.initrd.name) == ("descriptor 1", "descriptor 0")
            assert not os.get_inheritable(made.kernel.fd)
        assert descriptors() == before
        assert os.pread(one, 1000, 0) == ARM  # the request's own stay open


@pytest.mark.parametrize(
    ("kernel", "initrd", "count", "text"),
    [
        (0, None, 0, "kernel: there is no descriptor 0: none came with the request"),
        (0, 2, 2, "initrd: there is no descriptor 2: 2 came with the request, counted from 0"),
        (-1, None, 1, "kernel: there is no descriptor -1"),
        (0, 0, 1, "initrd: descriptor 0 is kernel already"),
        (0, None, 2, "descriptor 1 came with the request and no argument names it"),
    ],
)
def test_descriptors_and_arguments_must_fit(kernel: int, initrd: int | None, count: int, text: str) -> None:
    with memory(ARM) as fd, pytest.raises(BadRequestError, match=text):
        check(kernel, initrd=initrd, fds=(fd,) * count)


def test_only_a_regular_file_that_is_open_for_reading_is_taken(kernel: Path) -> None:
    before = descriptors()
    out, into = os.pipe()
    one, two = socket.socketpair()
    null, write = os.open("/dev/null", os.O_RDWR), os.open(kernel, os.O_WRONLY)
    handle, directory = os.open(kernel, os.O_PATH), os.open(kernel.parent, os.O_RDONLY)
    for fd in (out, into, one.fileno(), null, directory):
        with pytest.raises(BadRequestError, match="kernel: descriptor 0 is not a regular file or memfd"):
            check(0, fds=(fd,))
    for fd in (write, handle):
        with pytest.raises(BadRequestError, match="kernel: descriptor 0 is not open for reading"):
            check(0, fds=(fd,))
    for fd in (out, into, null, write, handle, directory):
        os.close(fd)
    one.close()
    two.close()
    with memory(b"") as fd, pytest.raises(BadRequestError, match="descriptor 0 has 0 bytes; 1 to 1 MiB"):
        check(0, fds=(fd,))
    assert descriptors() == before


def test_vmand_itself_is_asked_last(public: Path) -> None:
    """Where vmand may less than the caller, its own refusal is an answer and no crash."""
    need_root()
    path = put(public / "file", b"x", 0o600)
    os.chown(path, 65534, 65534)
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child
        status = 1
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setresgid(65533, 65533, 65533)
            os.setresuid(65533, 65533, 65533)
            try:
                open_as("kernel", str(path), ROOT_PEER, limit_bytes=None)
            except BadRequestError as error:
                status = 0 if "Permission denied" in str(error) else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
