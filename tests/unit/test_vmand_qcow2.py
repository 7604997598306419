"""Which qcow2 images a guest may be given: each refusal by its own text, and never another error."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgehold.errors import BadRequestError
from edgehold.testing.capability import missing
from vmand.backend import qcow2

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
SIZE = 10 << 20
WHOLE = 4 * CLUSTER
"""Bytes of the file: header, reference count table and block, L1 table."""

V2_FIELDS = [
    *("version", "backing_at", "backing_bytes", "cluster_bits", "size", "crypt", "l1_entries", "l1_at"),
    *("refcounts_at", "refcount_clusters", "snapshots", "snapshots_at"),
]
V3_FIELDS = ["incompatible", "compatible", "autoclear", "refcount_order", "header_bytes"]
GOOD = {
    "version": 3,
    "cluster_bits": CLUSTER_BITS,
    "size": SIZE,
    "l1_entries": 1,
    "l1_at": 3 * CLUSTER,
    "refcounts_at": CLUSTER,
    "refcount_clusters": 1,
    "refcount_order": 4,
    "header_bytes": 112,
}


def header(*, compression: int = 0, **fields: int) -> bytes:
    """The first bytes of an image that is good but for these fields."""
    values = GOOD | fields
    made = qcow2.MAGIC + struct.pack(">IQIIQIIQQIIQ", *(values.get(name, 0) for name in V2_FIELDS))
    if values["version"] >= 3:
        made += struct.pack(">QQQII", *(values.get(name, 0) for name in V3_FIELDS)) + bytes([compression]) + bytes(7)
    return made


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"version": 2},
        {"header_bytes": 104},
        {"incompatible": 16},  # extended L2 entries: half as many in a cluster
        {"incompatible": 8, "compression": 1},
        {"size": qcow2.SECTOR},
        {"compatible": 1, "autoclear": 3, "snapshots": 3},
        {"cluster_bits": 21, "l1_at": 1 << 21, "refcounts_at": 1 << 21},
    ],
)
def test_good_images(fields: dict[str, int]) -> None:
    size = qcow2.check("disks[0]", header(**fields), 1 << 22)
    assert size == fields.get("size", SIZE)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"backing_at": 512, "backing_bytes": 9}, "has a backing file.*qemu-img convert"),
        ({"backing_bytes": 9}, "has a backing file"),
        ({"incompatible": 4}, "has an external data file"),
        ({"crypt": 1}, "is encrypted"),
        ({"crypt": 2}, "is encrypted"),
        ({"incompatible": 1}, "was not closed in order.*qemu-img check"),
        ({"incompatible": 2}, "marked as corrupt"),
        ({"incompatible": 3}, "marked as corrupt"),
        ({"incompatible": 1 << 5}, "unknown features .bits 0x20"),
        ({"incompatible": 1 << 63}, "unknown features .bits 0x8000000000000000"),
        ({"version": 1}, "has version 1; 2 and 3"),
        ({"version": 4}, "has version 4; 2 and 3"),
        ({"header_bytes": 96}, "says that its header has 96 bytes"),
        ({"header_bytes": 107}, "says that its header has 107 bytes"),
        ({"header_bytes": 1 << 17}, "at an impossible place"),
        ({"refcount_order": 7}, "reference counts of 2.7 bits"),
        ({"compression": 1}, "compressed in the unknown way 1"),
        ({"incompatible": 8}, "compressed in the unknown way 0"),
        ({"incompatible": 8, "compression": 2}, "compressed in the unknown way 2"),
        ({"cluster_bits": 8}, "clusters of 2.8 bytes"),
        ({"cluster_bits": 22}, "clusters of 2.22 bytes"),
        ({"cluster_bits": 2**32 - 1}, "clusters of 2.4294967295 bytes"),
        ({"size": 0}, "a disk of 0 bytes"),
        ({"size": 513}, "a disk of 513 bytes; a multiple of 512 up to 64 TiB"),
        ({"size": qcow2.MAX_BYTES + 512}, "up to 64 TiB"),
        ({"size": 2**64 - 512}, "up to 64 TiB"),
        ({"l1_entries": 0}, "L1 table of 0 entries and needs 1"),
        ({"size": 1 << 40}, "L1 table of 1 entries and needs 2048"),
        ({"l1_entries": 2**32 - 1}, "L1 table of 4294967295 entries"),
        ({"refcount_clusters": 0}, "reference count table of 0 bytes"),
        ({"refcount_clusters": 129}, "reference count table of 8454144 bytes"),
        ({"snapshots": 65537}, "65537 snapshots"),
        ({"l1_at": 0}, "impossible place"),
        ({"l1_at": CLUSTER + 8}, "impossible place"),
        ({"refcounts_at": 0}, "impossible place"),
        ({"l1_at": 4 * CLUSTER}, "is cut off: it has 262144 bytes and needs 262152 or more"),
        ({"refcounts_at": 1 << 62}, "is cut off"),
    ],
)
def test_each_refusal_has_its_own_text(fields: dict[str, int], why: str) -> None:
    with pytest.raises(BadRequestError, match=rf"^disks\[0\]: .*{why}"):
        qcow2.check("disks[0]", header(**fields), WHOLE)


def test_what_is_no_qcow2_image() -> None:
    for head in (b"", b"QFI", b"QFI\xfa" + header()[4:], bytes(112)):
        with pytest.raises(BadRequestError, match="is no qcow2 image; give the format raw"):
            qcow2.check("disks[0]", head, WHOLE)


@pytest.mark.parametrize("version", [2, 3])
def test_truncated_at_every_byte(version: int) -> None:
    whole = header(version=version)
    needed = GOOD["l1_at"] + 8
    for end in range(len(whole)):
        with pytest.raises(BadRequestError):
            qcow2.check("disks[0]", whole[:end], end)
    for end in range(len(whole), needed, 4099):
        with pytest.raises(BadRequestError, match="is cut off"):
            qcow2.check("disks[0]", whole, end)
    with pytest.raises(BadRequestError, match="is cut off"):
        qcow2.check("disks[0]", whole, needed - 1)
    assert qcow2.check("disks[0]", whole, needed) == SIZE


@given(st.binary(max_size=160), st.integers(0, 2**63))
def test_anything_is_taken_or_refused(rest: bytes, size: int) -> None:
    for head in (rest, qcow2.MAGIC + rest, qcow2.MAGIC + b"\0\0\0\3" + rest):
        try:
            assert 0 < qcow2.check("disks[0]", head, size) <= qcow2.MAX_BYTES
        except BadRequestError as error:
            assert str(error).startswith("disks[0]: ")  # noqa: PT017 - that it raises is not the point


@given(st.dictionaries(st.sampled_from(V2_FIELDS[1:] + V3_FIELDS), st.integers(0, 2**32 - 1)))
def test_any_header_is_taken_or_refused(fields: dict[str, int]) -> None:
    try:
        qcow2.check("disks[0]", header(**fields), WHOLE)
    except BadRequestError as error:
        assert str(error).startswith("disks[0]: ")  # noqa: PT017 - as above


@pytest.mark.parametrize(
    "options",
    [
        "compat=v3",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "compression_type=zstd",
        "preallocation=metadata",
        "lazy_refcounts=on,refcount_bits=1",
    ],
)
def test_what_qemu_img_makes_is_good(options: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    make(image, options, "100M")
    assert qcow2.check("disks[0]", image.read_bytes()[: qcow2.HEADER_BYTES], image.stat().st_size) == 100 << 20


def test_what_qemu_img_makes_with_more_files_is_refused(tmp_path: Path) -> None:
    base, image = tmp_path / "base", tmp_path / "image"
    make(base, "compat=v3", "1M")
    make(image, f"backing_file={base},backing_fmt=qcow2", "1M")
    with pytest.raises(BadRequestError, match="has a backing file"):
        qcow2.check("disks[0]", image.read_bytes()[: qcow2.HEADER_BYTES], image.stat().st_size)
    make(image, f"data_file={tmp_path / 'data'}", "1M")
    with pytest.raises(BadRequestError, match="has an external data file"):
        qcow2.check("disks[0]", image.read_bytes()[: qcow2.HEADER_BYTES], image.stat().st_size)


def make(image: Path, options: str, size: str) -> None:
    program = shutil.which("qemu-img")
    if program is None:
        missing("qemu-img is not installed (Debian package qemu-utils)")
    subprocess.run([program, "create", "-q", "-f", "qcow2", "-o", options, image, size], check=True)
