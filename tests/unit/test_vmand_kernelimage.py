"""For which architecture a kernel's image is, by its first bytes; and what everything else looks like."""

import gzip
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgehold.errors import BadRequestError
from vmand.backend.kernelimage import AARCH64, X86_64, architecture, look
from vmand.model import OpenFile

IMAGE = b"MZ@\xfaFcN\x14" + bytes(48) + b"ARM\x64" + bytes(200)
ZBOOT = b"MZ\0\0zimg" + bytes(16) + b"gzip" + bytes(28) + b"ARM\x64" + bytes(200)


def bzimage(*, version: int = 0x20F, flags: int = 0x7F) -> bytes:
    made = bytearray(1024)
    made[:2] = b"MZ"
    struct.pack_into("<H2s4sH", made, 0x1FE, 0xAA55, b"\xeb\x6a", b"HdrS", version)
    struct.pack_into("<H", made, 0x236, flags)
    return bytes(made)


def elf(*, machine: int = 62, bits: int = 2, name: bytes = b"Xen\0", kind: int = 18, segment: int = 4) -> bytes:
    """One program header, and one note before the one that counts."""
    notes = struct.pack("<III", 4, 3, 1) + b"GNU\0" + b"abc\0"
    notes += struct.pack("<III", len(name), 4, kind) + name + bytes(-len(name) % 4) + bytes(4)
    head = struct.pack(
        "<4sBB10xHHIQQQIHHHHHH", b"\x7fELF", bits, 1, 2, machine, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return head + struct.pack("<IIQQQQQQ", segment, 0, 120, 0, 0, len(notes), 0, 4) + notes


@pytest.fixture
def judge(tmp_path: Path) -> Callable[[bytes], str]:
    path = tmp_path / "kernel"

    def run(content: bytes) -> str:
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.lseek(fd, 9, os.SEEK_SET)
            return architecture(OpenFile(fd=fd, name="my\nkernel"))
        finally:
            os.close(fd)

    return run


@pytest.mark.parametrize(
    ("content", "arch"),
    [
        (IMAGE, AARCH64),
        (IMAGE.replace(b"MZ", b"\0\0"), AARCH64),  # without CONFIG_EFI
        (gzip.compress(IMAGE), AARCH64),
        (gzip.compress(IMAGE + os.urandom(1 << 20)), AARCH64),
        (bzimage(), X86_64),
        (bzimage(flags=1), X86_64),
        (elf(), X86_64),
    ],
)
def test_kernels(judge: Callable[[bytes], str], content: bytes, arch: str) -> None:
    assert judge(content) == arch


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", r"nothing known \(it is empty\)"),
        (b"k", r"nothing known \(it begins with 6b\)"),
        (bytes(4096), r"nothing known \(it begins with 00 00 00 00 00 00 00 00\)"),
        (IMAGE[:59], "a UEFI program without a kernel's header"),
        (ZBOOT, "EFI zboot.*use arch/arm64/boot/Image or Image.gz"),
        (gzip.compress(ZBOOT), "a gzip file without an arm64 Image in it.*unpack it first"),
        (gzip.compress(bzimage()), "only an arm64 Image may be compressed"),
        (gzip.compress(b"070701" + bytes(100)), "an initial RAM disk .*gzip.*may have been exchanged"),
        (b"\x1f\x8b" + bytes(100), "a damaged gzip file"),
        (gzip.compress(IMAGE)[:11], "a gzip file without an arm64 Image"),
        (b"070701" + bytes(100), "an initial RAM disk .*may have been exchanged"),
        (bzimage(flags=0), "a bzImage of a 32-bit kernel"),
        (bzimage(version=0x20B), "older than Linux 3.8"),
        (bzimage()[:0x237], "a bzImage that is cut off"),
        (elf(machine=183), "an ELF file for arm64; .*use arch/arm64/boot/Image"),
        (elf(machine=3, bits=1), "an ELF file for 32-bit x86"),
        (elf(machine=999), "an ELF file for machine 999"),
        (elf(name=b"GNU\0"), "without a PVH entry; .*use arch/x86/boot/bzImage"),
        (elf(kind=17), "without a PVH entry"),
        (elf(segment=1), "without a PVH entry"),
        (elf()[:63], "an ELF file that is cut off"),
        (elf()[:100], "without a PVH entry"),
        (elf()[:54] + b"\x37" + elf()[55:], "a damaged header"),
        (elf()[:56] + b"\0\0" + elf()[58:], "a damaged header"),
        (b"\xd0\x0d\xfe\xed" + bytes(100), "a device tree or a FIT image"),
        (b"\x27\x05\x19\x56" + bytes(100), "an image for U-Boot"),
        (b"\xfd7zXZ\0" + bytes(100), "xz compressed; .*unpack it first"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd compressed"),
        (b"QFI\xfb" + bytes(100), "a qcow2 disk"),
        (bytes(36) + b"\x18\x28\x6f\x01" + bytes(60), "a 32-bit arm kernel"),
        (bytes(56) + b"RSC\x05" + bytes(60), "a RISC-V kernel"),
        (b"#!/bin/sh\n" + bytes(100), "a script"),
    ],
)
def test_what_is_no_kernel(judge: Callable[[bytes], str], content: bytes, text: str) -> None:
    with pytest.raises(BadRequestError, match=f"^kernel: my kernel looks like .*{text}") as refusal:
        judge(content)
    assert "a 64-bit Linux kernel is needed" in str(refusal.value)


def test_a_file_that_can_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        fd = os.open(name, os.O_RDONLY)
        try:
            with pytest.raises(BadRequestError, match=r"^kernel: d: Is a directory"):
                architecture(OpenFile(fd=fd, name="d"))
        finally:
            os.close(fd)


@given(st.data(), st.sampled_from([IMAGE, bzimage(), elf(), gzip.compress(IMAGE), ZBOOT, b""]))
def test_any_bytes_are_judged_with_bounded_reads(data: st.DataObject, begin: bytes) -> None:
    content = bytearray(begin[: data.draw(st.integers(0, len(begin)))] + data.draw(st.binary(max_size=99)))
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    asked = 0

    def read(offset: int, size: int) -> bytes:
        nonlocal asked
        asked += size
        assert 0 <= offset < 1 << 62
        return bytes(content[offset : offset + size])

    found, cure = look(read)
    assert found
    assert not (cure and found in {X86_64, AARCH64})
    assert asked < 8 << 20


def test_truncation_at_every_byte() -> None:
    def read(offset: int, length: int) -> bytes:
        return cut[offset : offset + length]

    for whole in (IMAGE, bzimage(), elf(), gzip.compress(IMAGE)):
        for size in range(len(whole)):
            cut = whole[:size]
            found, _ = look(read)
            assert found
