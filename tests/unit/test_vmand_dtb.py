"""The parser of device trees: what is read, what is refused, and that nothing else ever happens."""

import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgehold.errors import BadRequestError
from edgehold.testing import devicetree
from edgehold.testing.devicetree import Tree, blob, cells, texts
from vmand.backend import dtb
from vmand.backend.dtb import MAX_BYTES, MAX_PACKED_BYTES, Node, packed, parse
from vmand.model import OpenFile

# `dtc -V 17` of: /memreserve/ 0x10000000 0x4000; / { #address-cells = <2>; compatible = "a,b", "c";
#   n@1 { reg = <1 2>; flag; sub { s = "x"; }; }; n@2 { reg = [01 02 03]; }; };
GOLDEN = bytes.fromhex(
    "d00dfeed0000010300000048000000e00000002800000011000000100000000000000023000000980000000010000000000000000000"
    "4000000000000000000000000000000000000000000100000000000000030000000400000000000000020000000300000006000000"
    "0f612c620063000000000000016e40310000000003000000080000001a000000010000000200000003000000000000001e0000000173"
    "75620000000003000000020000000d780000000000000200000002000000016e40320000000003000000030000001a01020300000000"
    "02000000020000000923616464726573732d63656c6c7300636f6d70617469626c650072656700666c616700"
)
TOTAL, STRUCTURE, STRINGS, RESERVED, VERSION, COMPATIBLE = 4, 8, 12, 16, 20, 24
STRINGS_BYTES, STRUCTURE_BYTES = 32, 36
NOP = struct.pack(">I", 4)


def put(at: int, number: int, *, of: bytes = GOLDEN) -> bytes:
    """The blob with another 32-bit number in it."""
    return of[:at] + struct.pack(">I", number) + of[at + 4 :]


def test_a_tree_that_dtc_made() -> None:
    root = parse(GOLDEN)
    assert (root.name, root.path, root.cell("#address-cells")) == ("", "/", 2)
    assert root.texts("compatible") == ("a,b", "c")
    assert [one.path for one in root.children] == ["/n@1", "/n@2"]
    one = root.children[0]
    assert one.cells("reg") == (1, 2)
    assert one.properties["flag"] == b""
    sub = one.child("sub")
    assert sub is not None
    assert (sub.path, sub.texts("s"), sub.cells("none"), sub.texts("none")) == ("/n@1/sub", ("x",), (), ())
    assert (sub.child("none"), sub.cell("none")) == (None, None)
    assert isinstance(root.properties, Mapping)
    with pytest.raises(TypeError):
        root.properties["x"] = b""  # type: ignore[index]


def test_version_16_says_no_length_of_its_structure() -> None:
    old = put(STRUCTURE_BYTES, 0xFFFF_FFFF, of=put(VERSION, 16))
    assert parse(old) == parse(GOLDEN)


def test_nops_and_slack_mean_nothing() -> None:
    tree = blob({"a": b"1", "n": {}})
    at = struct.unpack_from(">I", tree, STRUCTURE)[0]
    grown = tree[:at] + NOP * 3 + tree[at : at + 8] + NOP + tree[at + 8 :] + bytes(100)
    for key, more in ((TOTAL, 116), (STRINGS, 16), (STRUCTURE_BYTES, 16)):
        grown = put(key, struct.unpack_from(">I", tree, key)[0] + more, of=grown)
    assert parse(grown) == parse(tree)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (b"", "begins with nothing and not with d0 0d fe ed"),
        (b"\x7fELF", "begins with 7f 45 4c 46"),
        (GOLDEN[:20], "ends after 20 bytes, within its header"),
        (put(VERSION, 15), "of version 15"),
        (put(VERSION, 18), "of version 18"),
        (put(COMPATIBLE, 18), "compatible with 18"),
        (put(TOTAL, 39), "says 39 bytes"),
        (put(TOTAL, MAX_BYTES + 1), "says 2097153 bytes"),
        (GOLDEN[:-1], "ends after 258 of 259 bytes"),
        (put(STRUCTURE, 0x4A), "structure at 74 .* not aligned"),
        (put(STRUCTURE, 0), "its structure at 0 "),
        (put(STRUCTURE, 0xFFFF_FFF8), "its structure at 4294967288 "),
        (put(STRINGS, 0xFFFF_FFF8), "its strings at 4294967288 "),
        (put(STRINGS_BYTES, 0xFFFF_FFFF), "its strings at 224 to 4294967519"),
        (put(STRUCTURE_BYTES, 0xFFFF_FFFF), "its structure at 72 to 4294967367"),
        (put(STRUCTURE_BYTES, 0x94), "structure ends at byte 220 without a mark"),
        (put(STRUCTURE_BYTES, 0x9C), "ends at byte 224, and its header says 228"),
        (put(RESERVED, 0x2C), "reserved memory at 44 are not aligned"),
        (put(RESERVED, 0x100), "reserved memory at 256 to 272 do not lie"),
        (put(0x48, 2), "unexpected 0x2 at byte 72"),
        (put(0x48, 9), "no root node"),
        (put(0x50, 7), "unexpected 0x7 at byte 80"),
        (put(0x54, 0x10000), "has 65536 bytes, more than are left"),
        (put(0x54, 0xFFFF_FFFD), "has 4294967293 bytes, more than are left"),
        (put(0x58, 0x23), "a name outside the strings"),
        (put(0x58, 0x22), "has no name"),
        (put(STRINGS_BYTES, 0x22), "has no end within 127 bytes"),
        (GOLDEN.replace(b"flag\0", b"fl g\0"), "a character that no name has"),
        (GOLDEN.replace(b"sub\0", b"s/b\0"), "a character that no name has"),
        (GOLDEN.replace(b"n@2\0", b"n@1\0"), "/ has n@1 twice"),
        (GOLDEN.replace(b"n@2\0", b"\0\0\0\0"), "a node in / has no name"),
        (put(0x4C, 0x61000000), "one with a name"),
        (put(0x68, 0), "/ has #address-cells twice"),
        (put(0xD4, 1), "a node in /n@2 has no name"),
    ],
)
def test_damaged_trees(tree: bytes, text: str) -> None:
    with pytest.raises(BadRequestError, match=f"^dtb: .*{text}.*; give a device tree blob"):
        parse(tree)


def test_a_property_behind_a_subnode_and_a_second_root() -> None:
    node = struct.pack(">II", 1, 0) + struct.pack(">I", 2)
    late = struct.pack(">II", 1, 0) + struct.pack(">II4sI", 1, 0x61000000, b"\0\0\0\2", 3) + bytes(8)
    for structure, text in (
        (node + node, "a second root node"),
        (late + struct.pack(">I", 2), "/ has x behind a subnode"),
        (node + struct.pack(">III", 3, 0, 0), "unexpected 0x3"),
    ):
        with pytest.raises(BadRequestError, match=text):
            parse(_raw(structure + struct.pack(">I", 9)))


def _raw(structure: bytes) -> bytes:
    """A blob around a structure block; its one string is ``x``."""
    total = 56 + len(structure) + 2
    header = struct.pack(">10I", 0xD00DFEED, total, 56, total - 2, 40, 17, 16, 0, 2, len(structure))
    return header + bytes(16) + structure + b"x\0"


def chain(depth: int, name: str = "n") -> Tree:
    """A tree in which each node has one child."""
    tree: Tree = {}
    for _ in range(depth):
        tree = {name: tree}
    return tree


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (chain(dtb.MAX_DEPTH), "deeper than 32"),
        (chain(5, "n" * 120), "more than 512 bytes"),
        ({"n" * 128: {}}, "no end within 127 bytes"),
        ({"n" * 128: b""}, "no end within 127 bytes"),
        ({f"n{number}": {} for number in range(dtb.MAX_NODES)}, "more than 16384 nodes"),
        (
            {f"n{node}": {f"p{number}": b"" for number in range(257)} for node in range(256)},
            "more than 65536 properties",
        ),
    ],
)
def test_what_is_bounded(tree: Tree, text: str) -> None:
    with pytest.raises(BadRequestError, match=text):
        parse(blob(tree))


def test_bounds_are_allowed_themselves() -> None:
    parse(blob(chain(dtb.MAX_DEPTH - 1)))
    parse(blob({"n" * 127: {"p" * 127: b""}}))
    parse(blob({}, reserved=[(1, 1)] * (dtb.MAX_RESERVED - 1)))
    with pytest.raises(BadRequestError, match="no end within 1024 entries"):
        parse(blob({}, reserved=[(1, 1)] * dtb.MAX_RESERVED))


def test_the_largest_tree_of_nothing_ends() -> None:
    with pytest.raises(BadRequestError, match="without a mark"):
        parse(_raw(NOP * ((MAX_BYTES - 58) // 4)))


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda node: node.cells("odd"), "/n has a odd of 3 bytes; 32-bit numbers are needed"),
        (lambda node: node.cell("two"), "/n has a two of 2 numbers; one is needed"),
        (lambda node: node.cell("none"), "/n has a none of 0 numbers; one is needed"),
        (lambda node: node.texts("odd"), "/n has a odd that is no text"),
        (lambda node: node.texts("high"), "/n has a high that is no text"),
    ],
)
def test_properties_of_another_type(use: Callable[[Node], object], text: str) -> None:
    root = parse(blob({"n": {"odd": b"abc", "two": cells(1, 2), "none": b"", "high": b"\xff\0"}}))
    with pytest.raises(BadRequestError, match=text):
        use(root.children[0])


def test_packed_drops_the_slack() -> None:
    tree = devicetree.virt(cores=2, memory_bytes=64 << 20)
    loose = blob(tree, slack=1 << 20, reserved=[(1, 2)])
    tight = packed(loose)
    assert parse(tight) == parse(loose)
    assert 0 <= len(tight) - len(blob(tree, reserved=[(1, 2)])) < 8
    assert packed(tight) == tight
    assert tight[40:56] == loose[40:56]  # the reserved memory


def test_what_qemu_and_the_kernel_take_together() -> None:
    most = (MAX_PACKED_BYTES - len(blob({"x": b""}))) // 4 * 4
    assert len(packed(blob({"x": bytes(most)}))) == MAX_PACKED_BYTES
    with pytest.raises(BadRequestError, match=r"the tree has 1038584 bytes; 1038576 can be given"):
        packed(blob({"x": bytes(most + 1)}))
    assert 2 * (MAX_PACKED_BYTES + 10_000) == MAX_BYTES


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[bytes], OpenFile]]:
    with contextlib.ExitStack() as stack:

        def make(content: bytes) -> OpenFile:
            path = tmp_path / "t.dtb"
            path.write_bytes(content)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return OpenFile(fd=fd, name="t.dtb\n")

        yield make


def test_files_are_read_with_a_bound(opened: Callable[[bytes], OpenFile], tmp_path: Path) -> None:
    file = opened(GOLDEN)
    os.lseek(file.fd, 7, os.SEEK_SET)
    assert dtb.read(file) == GOLDEN
    assert len(dtb.read(opened(bytes(MAX_BYTES)))) == MAX_BYTES
    with pytest.raises(BadRequestError, match=r"^dtb: t.dtb is larger than 2097152 bytes"):
        dtb.read(opened(bytes(MAX_BYTES + 1)))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(BadRequestError, match=r"^dtb: d: Is a directory"):
            dtb.read(OpenFile(fd=directory, name="d"))
    finally:
        os.close(directory)


NAMES = st.text("abcxyz019,._+-@", min_size=1, max_size=8)
TREES: st.SearchStrategy[Tree] = st.recursive(
    st.dictionaries(NAMES, st.binary(max_size=9), max_size=3),
    lambda inner: st.dictionaries(NAMES, st.one_of(st.binary(max_size=9), inner), max_size=4),
    max_leaves=12,
)


@given(TREES, st.sampled_from([16, 17]), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=2))
def test_round_trip(tree: Tree, version: int, reserved: list[tuple[int, int]]) -> None:
    made = blob(tree, version=version, reserved=reserved, slack=3)
    root = parse(made)
    assert _plain(root) == tree
    assert parse(packed(made)) == root


def _plain(node: Node) -> Tree:
    return {**node.properties, **{one.name: _plain(one) for one in node.children}}


@pytest.mark.parametrize("whole", [GOLDEN, put(VERSION, 16), blob(devicetree.virt(cores=2, memory_bytes=1 << 26))])
def test_truncation_at_every_byte(whole: bytes) -> None:
    """As it is cut, and with a header that agrees with what is left."""
    for size in range(len(whole)):
        for cut in (whole[:size], put(TOTAL, size, of=whole)[:size]):
            with pytest.raises(BadRequestError):
                parse(cut)


@given(st.data())
def test_changed_bytes_are_a_tree_or_refused(data: st.DataObject) -> None:
    made = bytearray(GOLDEN if data.draw(st.booleans()) else blob({"a": texts("b"), "n": {"c": cells(1)}}))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(made) - 1))
        made[at] = data.draw(st.one_of(st.sampled_from([0, 1, 2, 3, 4, 9, 0xFF]), st.integers(0, 255)))
    with contextlib.suppress(BadRequestError):
        root = parse(bytes(made))
        assert parse(packed(bytes(made))) == root


@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes_are_a_tree_or_refused(content: bytes) -> None:
    for tree in (content, dtb.MAGIC + content, _raw(content)):
        with contextlib.suppress(BadRequestError):
            parse(tree)
    with contextlib.suppress(BadRequestError):
        tokens = b"".join(struct.pack(">I", one % 10) for one in content)
        parse(_raw(tokens))
