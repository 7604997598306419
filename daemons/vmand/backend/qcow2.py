"""The header of a qcow2 image, as far as it decides whether a guest may be given it. Pure.

An image may name further files, which QEMU would open with its own rights and not the caller's: such images are
refused, and so is what QEMU could not use anyway, because a refusal before the start names the cure.
Source: QEMU's docs/interop/qcow2.txt.
"""

import struct
from typing import NamedTuple

from edgehold.errors import BadRequestError

MAGIC = b"QFI\xfb"
HEADER_BYTES = 112
"""As much of the file as `check` looks at."""
MAX_BYTES = 1 << 46  # 64 TiB
SECTOR = 512

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_V3_BYTES = _V2.size + _V3.size  # 104; byte 104 is the compression type where the header is long enough
# What QEMU takes at most of the two tables that it reads at once (and keeps), and of snapshots.
_MAX_L1_BYTES = 32 << 20
_MAX_REFCOUNT_BYTES = 8 << 20
_MAX_SNAPSHOTS = 65536

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2


class _Header(NamedTuple):
    magic: bytes
    version: int
    backing_at: int
    backing_bytes: int
    cluster_bits: int
    size: int
    crypt: int
    l1_entries: int
    l1_at: int
    refcounts_at: int
    refcount_clusters: int
    snapshots: int
    snapshots_at: int
    # Version 3 alone; as they are understood in version 2:
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_bytes: int = _V2.size

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits


def check(key: str, head: bytes, file_bytes: int) -> int:
    """The size of the disk in bytes. ``head``: the file's first `HEADER_BYTES`, or all of a shorter one.

    Raises:
        BadRequestError: a guest can't be given it; the text begins with ``key`` and ends with the cure.
    """
    try:
        header = _parse(head)
        _check_kind(header, head)
        _check_places(header, file_bytes)
    except ValueError as error:
        raise BadRequestError(f"{key}: {error}") from None
    return header.size


def _parse(head: bytes) -> _Header:
    if not head.startswith(MAGIC):
        raise ValueError("it is no qcow2 image; give the format raw if it is a plain copy of a disk")
    if len(head) < _V2.size:
        raise ValueError(f"the qcow2 image ends within its header, after {len(head)} bytes; copy it again")
    header = _Header(*_V2.unpack_from(head))
    if header.version == 2:
        return header
    if header.version != 3:
        raise ValueError(f"the qcow2 image has version {header.version}; 2 and 3 can be used")
    if len(head) < _V3_BYTES:
        raise ValueError(f"the qcow2 image ends within its header, after {len(head)} bytes; copy it again")
    return _Header(*header[:13], *_V3.unpack_from(head, _V2.size))


def _check_kind(header: _Header, head: bytes) -> None:
    """What the image is made of."""
    if header.backing_at or header.backing_bytes:
        raise ValueError(
            "the qcow2 image has a backing file, which would be opened with rights that are not yours; "
            "make one whole image of both: qemu-img convert -O qcow2 OLD NEW"
        )
    if header.incompatible & _DATA_FILE:
        raise ValueError(
            "the qcow2 image has an external data file, which would be opened with rights that are not yours; "
            "give that file as a raw disk, or convert it: qemu-img convert -O qcow2 OLD NEW"
        )
    if header.crypt:
        raise ValueError("the qcow2 image is encrypted and vmand keeps no keys; encrypt inside the guest instead")
    if header.incompatible & _CORRUPT:
        raise ValueError("the qcow2 image is marked as corrupt; repair a copy of it: qemu-img check -r all")
    if header.incompatible & _DIRTY:
        raise ValueError("the qcow2 image was not closed in order; repair it first: qemu-img check -r all")
    if unknown := header.incompatible & ~_KNOWN:
        raise ValueError(f"the qcow2 image has unknown features (bits {unknown:#x}); convert it with an older qemu-img")
    if header.version == 3 and (header.header_bytes < _V3_BYTES or header.header_bytes % 8):
        raise ValueError(f"the qcow2 image says that its header has {header.header_bytes} bytes; copy it again")
    if header.refcount_order > 6:
        raise ValueError(f"the qcow2 image has reference counts of 2^{header.refcount_order} bits; copy it again")
    compression = head[_V3_BYTES] if header.header_bytes > _V3_BYTES and len(head) > _V3_BYTES else 0
    # zlib is 0 and has no bit; 1 is zstd.
    if compression > 1 or bool(compression) != bool(header.incompatible & _COMPRESSION):
        raise ValueError(f"the qcow2 image is compressed in the unknown way {compression}; convert it without that")


def _check_places(header: _Header, file_bytes: int) -> None:
    """Sizes, and that the tables are where the file is."""
    if not 9 <= header.cluster_bits <= 21:
        raise ValueError(f"the qcow2 image has clusters of 2^{header.cluster_bits} bytes; 2^9 to 2^21 are possible")
    if not 0 < header.size <= MAX_BYTES or header.size % SECTOR:
        raise ValueError(
            f"the qcow2 image is a disk of {header.size} bytes; "
            f"a multiple of {SECTOR} up to {MAX_BYTES >> 40} TiB is possible"
        )
    entry = 16 if header.incompatible & _EXTENDED_L2 else 8
    needed = -(-header.size // (header.cluster * (header.cluster // entry)))
    l1_bytes = header.l1_entries * 8
    if not needed * 8 <= l1_bytes <= _MAX_L1_BYTES:
        raise ValueError(
            f"the qcow2 image has an L1 table of {header.l1_entries} entries and needs {needed}; copy it again"
        )
    refcount_bytes = header.refcount_clusters * header.cluster
    if not 0 < refcount_bytes <= _MAX_REFCOUNT_BYTES:
        raise ValueError(f"the qcow2 image has a reference count table of {refcount_bytes} bytes; copy it again")
    if header.snapshots > _MAX_SNAPSHOTS:
        raise ValueError(f"the qcow2 image has {header.snapshots} snapshots; at most {_MAX_SNAPSHOTS} are possible")
    tables = ((header.l1_at, l1_bytes), (header.refcounts_at, refcount_bytes))
    if header.header_bytes > header.cluster or any(not at or at % header.cluster for at, _size in tables):
        raise ValueError("the qcow2 image has a table at an impossible place; copy it again")
    if (end := max(at + size for at, size in tables)) > file_bytes:
        raise ValueError(
            f"the qcow2 image is cut off: it has {file_bytes} bytes and needs {end} or more; copy it again"
        )
