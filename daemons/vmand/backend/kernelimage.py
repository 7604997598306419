"""For which architecture a kernel's image is, from its first bytes: it decides which machine a guest gets.

Only what QEMU can start is accepted. Everything else is refused here, where the text can say what the file looks like:
QEMU would start some of it and then stay silent. At most some 100 KiB of the file are read.
Sources: the kernel's Documentation/arch/x86/boot.rst and arch/arm64/booting.rst, include/linux/pe.h and
drivers/firmware/efi/libstub/zboot-header.S; elf(5); Xen's PVH boot note in include/xen/interface/elfnote.h.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator

from edgehold.errors import BadRequestError
from vmand.model import OpenFile, plain

X86_64 = "x86_64"
AARCH64 = "aarch64"

Reader = Callable[[int, int], bytes]
"""(offset, bytes): what the file has there; less at its end."""

_HEAD = 16 * 1024
_NEEDED = "a 64-bit Linux kernel is needed: a bzImage for x86, an Image for arm64"

# Where each kind has its mark. An arm64 Image and a bzImage may both begin with the "MZ" of a UEFI program.
_ARM64_MAGIC = (56, b"ARM\x64")
_ZBOOT_MAGIC = (4, b"zimg")
_BZIMAGE_MAGIC = (0x202, b"HdrS")
_BZIMAGE_VERSION = 0x206
_BZIMAGE_XLOADFLAGS = 0x236  # since version 2.12 of the boot protocol, Linux 3.8
_XLF_KERNEL_64 = 1

_GZIP = b"\x1f\x8b"
_UNPACK = "unpack it first"
_SWAPPED = "kernel and initrd may have been exchanged"
_OTHERS = (
    (0, b"070701", "an initial RAM disk (cpio)", _SWAPPED),
    (0, b"070702", "an initial RAM disk (cpio)", _SWAPPED),
    (
        0,
        b"\xd0\x0d\xfe\xed",
        "a device tree or a FIT image",
        "give a device tree as dtb, and of a FIT image its kernel",
    ),
    (0, b"\x27\x05\x19\x56", "an image for U-Boot", "give the kernel that was wrapped in it"),
    (0, b"\xfd7zXZ\0", "a file that xz compressed", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a file that zstd compressed", _UNPACK),
    (0, b"\x02\x21\x4c\x18", "a file that lz4 compressed", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "a file that lz4 compressed", _UNPACK),
    (0, b"BZh", "a file that bzip2 compressed", _UNPACK),
    (0, b"\x5d\0\0", "a file that lzma compressed", _UNPACK),
    (0, b"QFI\xfb", "a qcow2 disk", "give the kernel that is in it as a file"),
    (36, b"\x18\x28\x6f\x01", "a 32-bit arm kernel (zImage)", ""),
    (56, b"RSC\x05", "a RISC-V kernel", ""),
    (0, b"MZ", "a UEFI program without a kernel's header", ""),
    (0, b"#!", "a script", ""),
)

# elf(5). The note with which a vmlinux says where a hypervisor without firmware enters it.
_ELF = b"\x7fELF"
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_ELF_SEGMENT = struct.Struct("<IIQQQQQQ")
_ELF_NOTE = struct.Struct("<III")
_ELF_CLASS64, _ELF_LITTLE = 2, 1
_PT_NOTE = 4
_MAX_SEGMENTS, _MAX_NOTES = 64, 64 * 1024
_PVH_NAME, _PVH_TYPE = b"Xen\0", 18
_MACHINES = {3: "32-bit x86", 40: "32-bit arm", 62: "x86-64", 183: "arm64", 243: "RISC-V"}


def architecture(file: OpenFile) -> str:
    """``x86_64`` or ``aarch64``. A gzip file with an arm64 Image counts as one: QEMU unpacks it.

    Raises:
        BadRequestError: it is no kernel that QEMU can start; says what it looks like instead.
    """

    def read(offset: int, size: int) -> bytes:
        try:
            return os.pread(file.fd, size, offset)
        except OSError as error:
            raise BadRequestError(f"kernel: {plain(file.name, 200)}: {error.strerror}") from None

    found, cure = look(read)
    if not cure and found in {X86_64, AARCH64}:
        return found
    raise BadRequestError(f"kernel: {plain(file.name, 200)} looks like {found}; {_NEEDED}{f'; {cure}' if cure else ''}")


def look(read: Reader) -> tuple[str, str]:
    """The architecture and an empty text; or what it looks like, in words, and a cure or an empty text."""
    head = read(0, _HEAD)
    if head.startswith(_ELF):
        return _elf(head, read)
    for mark, judge in (
        ((0, _GZIP), _packed),
        (_ZBOOT_MAGIC, _zboot),
        (_ARM64_MAGIC, _image),
        (_BZIMAGE_MAGIC, _bzimage),
    ):
        if _has(head, mark):
            return judge(head)
    for offset, magic, words, cure in _OTHERS:
        if _has(head, (offset, magic)):
            return words, cure
    begin = f"it begins with {head[:8].hex(' ')}" if head else "it is empty"
    return f"nothing known ({begin})", ""


def _has(head: bytes, mark: tuple[int, bytes]) -> bool:
    return head.startswith(mark[1], mark[0])


def _image(_head: bytes) -> tuple[str, str]:
    return AARCH64, ""


def _zboot(_head: bytes) -> tuple[str, str]:
    return (
        "a compressed kernel for UEFI (EFI zboot), which unpacks itself only under firmware",
        "use arch/arm64/boot/Image or Image.gz of the same build",
    )


def _packed(head: bytes) -> tuple[str, str]:
    """A gzip file by its first unpacked bytes; its end is not looked at."""
    try:
        inner = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head, _HEAD)
    except zlib.error:
        return "a damaged gzip file", ""
    if _has(inner, _ARM64_MAGIC) and not _has(inner, _ZBOOT_MAGIC):
        return AARCH64, ""
    if inner.startswith((b"070701", b"070702")):
        return "an initial RAM disk (cpio, compressed with gzip)", _SWAPPED
    return "a gzip file without an arm64 Image in it", f"{_UNPACK}; only an arm64 Image may be compressed"


def _bzimage(head: bytes) -> tuple[str, str]:
    if len(head) < _BZIMAGE_XLOADFLAGS + 2:
        return "a bzImage that is cut off", ""
    (version,) = struct.unpack_from("<H", head, _BZIMAGE_VERSION)
    (flags,) = struct.unpack_from("<H", head, _BZIMAGE_XLOADFLAGS)
    if version < 0x20C or not flags & _XLF_KERNEL_64:
        return "a bzImage of a 32-bit kernel, or of one older than Linux 3.8", ""
    return X86_64, ""


def _elf(head: bytes, read: Reader) -> tuple[str, str]:
    if len(head) < _ELF_HEADER.size:
        return "an ELF file that is cut off", ""
    ident, _, machine, _, _, segments_at, _, _, _, entry_bytes, count, *_ = _ELF_HEADER.unpack_from(head)
    name = _MACHINES.get(machine, f"machine {machine}")
    if (ident[4], ident[5], machine) != (_ELF_CLASS64, _ELF_LITTLE, 62):
        cure = "use arch/arm64/boot/Image of the same build" if machine == 183 else ""
        return f"an ELF file for {name}", cure
    if entry_bytes != _ELF_SEGMENT.size or not 0 < count <= _MAX_SEGMENTS or segments_at > 1 << 40:
        return "an ELF file for x86-64 with a damaged header", ""
    table = read(segments_at, count * entry_bytes)
    for kind, _, at, _, _, size, _, align in _ELF_SEGMENT.iter_unpack(table[: len(table) // entry_bytes * entry_bytes]):
        if kind == _PT_NOTE and at <= 1 << 40 and _has_pvh(read(at, min(size, _MAX_NOTES)), 8 if align == 8 else 4):
            return X86_64, ""
    return "an ELF file for x86-64 without a PVH entry", (
        "use arch/x86/boot/bzImage of the same build, or build with CONFIG_PVH=y"
    )


def _has_pvh(notes: bytes, align: int) -> bool:
    return any(name == _PVH_NAME and kind == _PVH_TYPE for name, kind in _notes(notes, align))


def _notes(notes: bytes, align: int) -> Iterator[tuple[bytes, int]]:
    at = 0
    while at + _ELF_NOTE.size <= len(notes):
        name_bytes, desc_bytes, kind = _ELF_NOTE.unpack_from(notes, at)
        at += _ELF_NOTE.size
        yield notes[at : at + min(name_bytes, 16)], kind
        at += -(-name_bytes // align) * align
        at += -(-desc_bytes // align) * align
