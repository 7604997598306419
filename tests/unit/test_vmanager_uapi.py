"""The ABI of /dev/vmanager as numbers: sizes, offsets and ioctl numbers of the header are what was published."""

import errno
import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgehold.kernel import native, vmanager
from edgehold.kernel.vmanager import Cap, Event, Flag, Manager, State
from edgehold.testing.capability import need_command

UAPI = Path(__file__).parents[2] / "ext" / "uapi"
# Structure: its size, and the offsets of its fields after `size`.
LAYOUT: dict[str, tuple[int, dict[str, int]]] = {
    "vman_info": (
        96,
        {
            "abi": 4,
            "caps": 8,
            "cpu_possible": 16,
            "mem_total": 48,
            "mem_free": 56,
            "mem_align": 64,
            "max_partitions": 72,
            "num_partitions": 76,
            "fw_version": 80,
            "backend": 84,
            "rsvd": 88,
        },
    ),
    "vman_create": (
        128,
        {
            "ncpus": 4,
            "flags": 8,
            "memsize": 16,
            "cpu_mask": 24,
            "id": 56,
            "fd": 60,
            "mem_base": 64,
            "name": 72,
            "uuid": 104,
            "rsvd": 120,
        },
    ),
    "vman_destroy": (16, {"id": 4, "flags": 8, "rsvd": 12}),
    "vman_open": (16, {"id": 4, "fd": 8, "flags": 12}),
    "vman_next": (16, {"id": 4, "flags": 8, "rsvd": 12}),
    "vman_deploy": (
        160,
        {"timeout_ms": 4, "flags": 8, "img": 16, "cmdline_ptr": 144, "cmdline_len": 152, "rsvd": 156},
    ),
    "vman_ctl": (16, {"flags": 4, "timeout_ms": 8, "state": 12}),
    "vman_status": (
        152,
        {
            "id": 4,
            "state": 8,
            "last_error": 12,
            "flags": 16,
            "memsize": 24,
            "mem_base": 32,
            "cpu_mask": 40,
            "boot_count": 72,
            "deployed_ns": 80,
            "generation": 88,
            "name": 96,
            "uuid": 128,
            "fw_code": 144,
        },
    ),
    "vman_event": (32, {"id": 4, "old_state": 8, "new_state": 12, "generation": 16, "time_ns": 24}),
}
IMAGE: tuple[int, dict[str, int]] = (32, {"fd": 0, "flags": 4, "offset": 8, "len": 16, "load_addr": 24})
NUMBERS = {
    "GET_INFO": 0xC060BE00,
    "CREATE": 0xC080BE01,
    "DESTROY": 0x4010BE02,
    "OPEN": 0xC010BE03,
    "NEXT": 0xC010BE04,
    "DEPLOY": 0x40A0BE20,
    "SHUTDOWN": 0xC010BE21,
    "REBOOT": 0xC010BE22,
    "SUSPEND": 0xC010BE23,
    "RESTORE": 0xC010BE24,
    "STATUS": 0xC098BE25,
    "SCRUB": 0xC010BE26,
}
EVENT = struct.Struct("=IIIIQQ")


@pytest.mark.parametrize("width", ["-m64", "-m32"])
def test_the_layout_is_the_same_for_every_caller(tmp_path: Path, width: str) -> None:
    """Also for 32-bit ones, and without any padding that would hold what nobody has set."""
    gcc = need_command("gcc", "gcc")
    lines = ["#include <vmanager.h>"]
    for name, (size, offsets) in {**LAYOUT, "vman_image": IMAGE}.items():
        lines.append(f'_Static_assert(sizeof(struct {name}) == {size}, "{name}");')
        lines += [
            f'_Static_assert(__builtin_offsetof(struct {name}, {field}) == {offset}, "{name}.{field}");'
            for field, offset in offsets.items()
        ]
    lines += [f'_Static_assert(VMAN_{name} == {number}u, "{name}");' for name, number in NUMBERS.items()]
    (tmp_path / "layout.c").write_text("\n".join(lines) + "\n")
    headers = subprocess.run([gcc, "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    options = ["-std=c11", "-Wall", "-Wextra", "-Wpadded", "-Werror", "-fsyntax-only", f"-I{UAPI}"]
    if headers == "x86_64-linux-gnu":
        # The kernel's headers are the same for both; only gcc looks for those of a 32-bit libc, which is not there.
        options += [width, "-isystem", f"/usr/include/{headers}"]
    elif width == "-m32":
        pytest.skip("only x86-64's compiler has a 32-bit caller")
    done = subprocess.run([gcc, *options, tmp_path / "layout.c"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_extension_has_the_header_s_numbers() -> None:
    assert {name: native.vman_constant(name) for name in NUMBERS} == NUMBERS
    assert [state.value for state in State] == [0, 1, 2, 3, 4, 5]
    assert [cap.value for cap in Cap] == [1 << bit for bit in range(8)]
    assert [flag.value for flag in Flag] == [1, 2, 4, 8, 1 << 32]
    assert (vmanager.ABI, vmanager.NAME_MAX, vmanager.CPUS_MAX, vmanager.ID_MAX) == (1, 31, 256, 2**31 - 1)


def test_every_constant_of_the_declarations_is_in_the_header() -> None:
    """And no verb of the header is forgotten."""
    declared = set()
    for line in (UAPI.parent / "vmanager_cdef.h").read_text().splitlines():
        if line.startswith("#define VMAN_"):
            declared.add(line.split()[1].removeprefix("VMAN_"))
    told = {
        line.split()[1].removeprefix("VMAN_")
        for line in (UAPI / "vmanager.h").read_text().splitlines()
        if line.startswith("#define VMAN_") and "_IO" in line and "VMAN_IOC," in line
    }
    assert told == set(NUMBERS)
    assert told <= declared


@given(st.sets(st.integers(0, 255)))
def test_a_mask_is_its_cores(cores: set[int]) -> None:
    assert vmanager.cpus_of(vmanager.mask_of(cores)) == tuple(sorted(cores))


@pytest.mark.parametrize("core", [-1, 256])
def test_a_core_without_a_bit(core: int) -> None:
    with pytest.raises(ValueError, match=str(core)):
        vmanager.mask_of([core])


def test_events_step_by_their_own_size() -> None:
    old, newer = EVENT.pack(32, 1, 2, 3, 4, 5), EVENT.pack(40, 6, 2, 1, 9, 10) + bytes(8)
    events = list(native.vman_events(old + newer + old))
    assert [event.id for event in events] == [1, 6, 1]
    assert events[1] == (6, 2, 1, 9, 10)
    assert list(native.vman_events(b"")) == []


@pytest.mark.parametrize("length", [1, 4, 31, 33, 63])
def test_events_that_are_cut_off(length: int) -> None:
    with pytest.raises(ValueError, match="whole events"):
        list(native.vman_events(EVENT.pack(32, 1, 2, 3, 4, 5)[:length] + bytes(max(0, length - 32))))


def test_a_lost_event_says_how_many() -> None:
    assert Event(id=0, old=State.NONE, new=State.NONE, generation=7, time_ns=0).lost == 7
    assert Event(id=3, old=State.NONE, new=State.READY, generation=7, time_ns=0).lost == 0


def test_what_is_no_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Manager.open(tmp_path / "vmanager")
    (tmp_path / "vmanager").touch()
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    with pytest.raises(OSError, match="VMAN_GET_INFO") as caught:
        Manager.open(tmp_path / "vmanager")
    assert caught.value.errno == errno.ENOTTY
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_what_needs_no_driver_to_be_refused(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    with Manager(file) as manager:
        with pytest.raises(ValueError, match="31 bytes"):
            manager.create(memory_bytes=1, cpus=(1,), name="é" * 16)
        with pytest.raises(OSError, match="VMAN_CREATE"):
            manager.create(memory_bytes=1, cpus=(1,), name="x" * 31)
        for call in (manager.next, manager.info):
            with pytest.raises(OSError, match="VMAN_"):
                call()
    with vmanager.PartitionHandle(os.open(tmp_path / "file", os.O_RDWR | os.O_CLOEXEC), 1) as handle:
        with pytest.raises(ValueError, match="NUL"):
            handle.deploy(0, cmdline="a\0b")
        with pytest.raises(OSError, match="VMAN_SUSPEND"):
            handle.suspend()
