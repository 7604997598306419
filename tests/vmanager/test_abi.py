"""The ABI of /dev/vmanager with bytes of our own: structures that are too short, too long or wrong, case by case."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import time
from pathlib import Path

import pytest

from edgehold.kernel.native import vman_constant
from edgehold.kernel.vmanager import Cap, Flag, Info, Manager, State
from edgehold.testing.vmanager import MEMORY, image, make, need, refused

CREATE = struct.Struct("=IIQQ4QIiQ32s16sQ")
DEPLOY = struct.Struct("=IIQ" + "iIQQQ" * 4 + "QII")
SMALL = struct.Struct("=IIiI")  # destroy, open, next
CTL = struct.Struct("=IIII")
PRESENT = vman_constant("IMAGE_PRESENT")


def raw(fd: int, name: str, data: bytearray) -> int:
    """The call with exactly these bytes; its errno. What the driver writes is in ``data`` afterwards."""
    try:
        fcntl.ioctl(fd, vman_constant(name), data, True)
    except OSError as error:
        return error.errno or -1
    return 0


def create_bytes(
    *,
    ncpus: int = 0,
    flags: int = 0,
    memory: int = MEMORY,
    mask: int = 2,
    wanted: int = 0,
    name: bytes = b"",
    rsvd: int = 0,
) -> bytearray:
    return bytearray(CREATE.pack(CREATE.size, ncpus, flags, memory, mask, 0, 0, 0, wanted, 0, 0, name, bytes(16), rsvd))


def deploy_bytes(
    *images: tuple[int, int, int, int, int], flags: int = 0, pointer: int = 0, length: int = 0, rsvd: int = 0
) -> bytearray:
    slots = [*images, *[(0, 0, 0, 0, 0)] * (4 - len(images))]
    return bytearray(
        DEPLOY.pack(DEPLOY.size, 0, flags, *(field for slot in slots for field in slot), pointer, length, rsvd)
    )


def test_a_structure_may_be_shorter_or_longer_than_the_driver_s(manager: Manager) -> None:
    fd = manager.fileno()
    for size in (8, 16, 40, 96, 120, 4096):
        data = bytearray(b"\0" * size + b"\xaa" * 32)
        data[0:4] = struct.pack("=I", size)
        assert raw(fd, "GET_INFO", data) == 0
        assert data[size:] == b"\xaa" * 32, "it wrote beyond what the caller has"
        assert struct.unpack_from("=II", data) == (size, vman_constant("ABI_VERSION")), "size is the caller's"
    shorter = create_bytes()[:72]  # without a name, a uuid and what follows
    shorter[0:4] = struct.pack("=I", len(shorter))
    assert raw(fd, "CREATE", shorter) == 0
    longer = create_bytes(mask=4) + bytes(16)
    longer[0:4] = struct.pack("=I", len(longer))
    assert raw(fd, "CREATE", longer) == 0
    assert manager.info().num_partitions == 2
    for partition_fd in (struct.unpack_from("=i", data, 60)[0] for data in (shorter, longer)):
        os.close(partition_fd)


@pytest.mark.parametrize(
    ("size", "tail", "number"),
    [
        (0, 0, errno.EINVAL),
        (4, 0, errno.EINVAL),
        (7, 0, errno.EINVAL),
        (136, 1, errno.E2BIG),
        (4096, 1, errno.E2BIG),
        (4097, 0, errno.E2BIG),
        (0xFFFFFFFF, 0, errno.E2BIG),
    ],
)
def test_a_size_that_can_t_be(manager: Manager, size: int, tail: int, number: int) -> None:
    data = create_bytes() + bytes(5000 - CREATE.size)
    data[0:4] = struct.pack("=I", size)
    if tail:
        data[size - 1] = tail
    assert raw(manager.fileno(), "CREATE", data) == number
    assert manager.info().num_partitions == 0


def test_the_size_in_a_number_is_not_looked_at(manager: Manager) -> None:
    data = bytearray(struct.pack("=I", 96) + bytes(92))
    number = vman_constant("GET_INFO") & ~(0x3FFF << 16) | 200 << 16
    fcntl.ioctl(manager.fileno(), number, data + bytes(104), True)


def test_numbers_that_mean_nothing_here(manager: Manager) -> None:
    for number in (0xC010BE05, 0xC010BE1F, 0xC010BE3F, vman_constant("DEPLOY"), vman_constant("STATUS")):
        with refused(errno.ENOTTY):
            fcntl.ioctl(manager.fileno(), number, bytearray(256), True)
    with make(manager) as handle:
        for name in ("CREATE", "DESTROY", "OPEN", "NEXT", "GET_INFO"):
            assert raw(handle.fileno(), name, bytearray(256)) == errno.ENOTTY


def test_memory_that_is_not_there(manager: Manager, kernel: int) -> None:
    for name in ("GET_INFO", "CREATE", "DESTROY", "OPEN", "NEXT"):
        with refused(errno.EFAULT):
            fcntl.ioctl(manager.fileno(), vman_constant(name), 8)
    with make(manager) as handle:
        one = (kernel, PRESENT, 0, 0, 0)
        assert raw(handle.fileno(), "DEPLOY", deploy_bytes(one, pointer=8, length=4)) == errno.EFAULT
        assert handle.status().state is State.READY


def test_a_create_whose_result_can_t_be_told_made_nothing(manager: Manager) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[: CREATE.size] = bytes(create_bytes())
        libc = ctypes.CDLL(None, use_errno=True)
        start = ctypes.addressof(view := ctypes.c_char.from_buffer(page))
        assert libc.mprotect(ctypes.c_void_p(start), mmap.PAGESIZE, mmap.PROT_READ) == 0
        failed = libc.ioctl(manager.fileno(), ctypes.c_ulong(vman_constant("CREATE")), ctypes.c_void_p(start))
        assert (failed, ctypes.get_errno()) == (-1, errno.EFAULT)
        assert libc.mprotect(ctypes.c_void_p(start), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        del view
    assert manager.next() is None


ANY = int(Flag.CPUS_ANY)


@pytest.mark.parametrize(
    ("mistake", "number"),
    [
        ({"flags": 1 << 4}, errno.EINVAL),
        ({"flags": int(Flag.DIRTY)}, errno.EINVAL),
        ({"rsvd": 1}, errno.EINVAL),
        ({"wanted": 0x80000000}, errno.EINVAL),
        ({"memory": 0}, errno.EINVAL),
        ({"memory": 1 << 20}, errno.EINVAL),
        ({"memory": 1 << 62}, errno.ENOSPC),
        ({"mask": 0}, errno.EINVAL),
        ({"mask": 1}, errno.EINVAL),  # core 0 stays with Linux
        ({"mask": 1 << 63}, errno.EINVAL),
        ({"ncpus": 1}, errno.EINVAL),
        ({"flags": ANY, "mask": 0}, errno.EINVAL),
        ({"flags": ANY, "ncpus": 1}, errno.EINVAL),
        ({"flags": ANY, "mask": 0, "ncpus": 8}, errno.ENOSPC),
        ({"name": b"x" * 32}, errno.EINVAL),
        ({"name": b"a\nb"}, errno.EINVAL),
        ({"name": b"a\0b"}, errno.EINVAL),
    ],
)
def test_create_s_mistakes_change_nothing(manager: Manager, mistake: dict[str, int], number: int) -> None:
    before = manager.info()
    assert raw(manager.fileno(), "CREATE", create_bytes(**mistake)) == number  # type: ignore[arg-type]
    assert manager.info() == before


@pytest.mark.parametrize("name", ["DESTROY", "OPEN", "NEXT"])
def test_reserved_fields_are_zero(manager: Manager, name: str) -> None:
    make(manager, partition=4).close()
    start = 3 if name == "NEXT" else 4
    if name != "OPEN":
        assert raw(manager.fileno(), name, bytearray(SMALL.pack(SMALL.size, start, 1, 0))) == errno.EINVAL
    assert raw(manager.fileno(), name, bytearray(SMALL.pack(SMALL.size, start, 0, 1))) == errno.EINVAL
    assert manager.next() == 4


@pytest.mark.parametrize("name", ["SHUTDOWN", "REBOOT", "SUSPEND", "RESTORE", "SCRUB"])
def test_a_refused_verb_tells_the_state(manager: Manager, info: Info, kernel: int, name: str) -> None:
    need(info, Cap.SUSPEND, Cap.REBOOT, Cap.SHUTDOWN)
    with make(manager) as handle:
        if name == "SCRUB":
            handle.deploy(kernel)
        data = bytearray(CTL.pack(CTL.size, 0, 0, 99))
        assert raw(handle.fileno(), name, data) == errno.EBADFD
        assert CTL.unpack(data)[3] == (State.DEPLOYED if name == "SCRUB" else State.READY)
        assert raw(handle.fileno(), name, bytearray(CTL.pack(CTL.size, 1 << 7, 0, 0))) == errno.EINVAL


def test_deploy_s_mistakes_change_nothing(manager: Manager, kernel: int, tmp_path: Path) -> None:
    text = bytearray(b"a\0b")
    (tmp_path / "file").write_bytes(bytes(4096))
    with contextlib.ExitStack() as stack, make(manager) as handle:
        base = handle.status().memory_base

        def opened(path: Path, flags: int) -> int:
            fd = os.open(path, flags)
            stack.callback(os.close, fd)
            return fd

        def memory(content: bytes, size: int = 0) -> int:
            fd = image(content, size=size)
            stack.callback(os.close, fd)
            return fd

        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        good = (kernel, PRESENT, 0, 0, 0)
        absent = (0, 0, 0, 0, 0)
        tree = memory(b"\xd0\x0d\xfe\xed" + bytes(60))
        pointer = ctypes.addressof(ctypes.c_char.from_buffer(text))
        cases: list[tuple[bytearray, int]] = [
            (deploy_bytes(), errno.EINVAL),
            (deploy_bytes(absent, good), errno.EINVAL),
            (deploy_bytes(good, flags=2), errno.EINVAL),
            (deploy_bytes(good, rsvd=1), errno.EINVAL),
            (deploy_bytes((kernel, PRESENT | 2, 0, 0, 0)), errno.EINVAL),
            (deploy_bytes(good, (0, 0, 0, 4, 0)), errno.EINVAL),
            (deploy_bytes(good, (kernel, 0, 0, 0, 0)), errno.EINVAL),
            (deploy_bytes(good, absent, absent, good), errno.EINVAL),
            (deploy_bytes(good, (tree, PRESENT, 0, 0, 0), flags=1), errno.EINVAL),
            (deploy_bytes(good, pointer=pointer), errno.EINVAL),
            (deploy_bytes(good, length=4), errno.EINVAL),
            (deploy_bytes(good, pointer=pointer, length=3), errno.EINVAL),  # a NUL inside
            (deploy_bytes(good, pointer=pointer, length=4097), errno.EINVAL),
            (deploy_bytes((kernel, PRESENT, 0, 1 << 40, 0)), errno.EINVAL),
            (deploy_bytes((kernel, PRESENT, 0, 0, base - 1)), errno.EINVAL),
            (deploy_bytes((kernel, PRESENT, 0, 0, base + MEMORY)), errno.EINVAL),
            (deploy_bytes((kernel, PRESENT, 0, 0, base + MEMORY - 1)), errno.ENOSPC),
            (deploy_bytes((reader, PRESENT, 0, 0, 0)), errno.EINVAL),
            (deploy_bytes((opened(tmp_path, os.O_RDONLY), PRESENT, 0, 0, 0)), errno.EINVAL),
            (deploy_bytes((-1, PRESENT, 0, 0, 0)), errno.EBADF),
            (deploy_bytes((999, PRESENT, 0, 0, 0)), errno.EBADF),
            (deploy_bytes((opened(tmp_path / "file", os.O_WRONLY), PRESENT, 0, 0, 0)), errno.EBADF),
            (deploy_bytes((opened(tmp_path / "file", os.O_PATH), PRESENT, 0, 0, 0)), errno.EBADF),
            (deploy_bytes((opened(tmp_path / "file", os.O_RDONLY), PRESENT, 0, 0, 0)), errno.ENOEXEC),
            (deploy_bytes((memory(b""), PRESENT, 0, 0, 0)), errno.ENOEXEC),
            (deploy_bytes((kernel, PRESENT, 1, 0, 0)), errno.ENOEXEC),
            (deploy_bytes((kernel, PRESENT, 0, 0x202, 0)), errno.ENOEXEC),
            (deploy_bytes((kernel, PRESENT, 1 << 40, 0, 0)), errno.ENOEXEC),
            (deploy_bytes(good, (kernel, PRESENT, 0, 0, 0)), errno.ENOEXEC),
            (deploy_bytes((memory(b"\0" * 0x202 + b"HdrS", 2 * MEMORY), PRESENT, 0, 0, 0)), errno.ENOSPC),
            (deploy_bytes(good, absent, (memory(b"i", MEMORY), PRESENT, 0, 0, 0)), errno.ENOSPC),
        ]
        before = handle.status()
        for number, (data, expected) in enumerate(cases):
            assert (number, raw(handle.fileno(), "DEPLOY", data)) == (number, expected)
            assert handle.status() == before, f"case {number}"


def test_every_image_and_the_command_line_arrive(manager: Manager, kernel: int) -> None:
    arm = image(bytes(100) + bytes(56) + b"ARM\x64")
    tree, disk = image(b"\xd0\x0d\xfe\xed"), image(b"x")
    os.lseek(tree, 2, os.SEEK_SET)  # offsets are the caller's and are not looked at
    try:
        with make(manager) as handle:
            data = deploy_bytes((arm, PRESENT, 100, 0, 0), (tree, PRESENT, 0, 0, 0), (disk, PRESENT, 0, 1, 0))
            assert raw(handle.fileno(), "DEPLOY", data) == 0
            status = handle.status()
            assert (status.state, status.boot_count, status.last_error, status.fw_code) == (State.DEPLOYED, 1, 0, 0)
            assert 0 < status.deployed_ns <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            handle.shutdown(force=True)
            handle.deploy(kernel, tree, disk, "a" * 4096)
            assert handle.status().boot_count == 2
    finally:
        for fd in (arm, tree, disk):
            os.close(fd)
