"""Flattened device trees, read without trust. Pure but for `read`.

A parser of our own: PyPI's ``fdt`` failed under fuzzing. This one is bounded in bytes, nodes, properties and depth,
checks each offset, and knows one error. What two readers could understand in two ways (a name twice in a node, a
property behind a subnode) is refused: QEMU and the guest read it after us.

Nothing is generated here: without a tree of the caller's, QEMU describes its machine itself.
Source: devicetree specification v0.4, chapter 5; versions 16 and 17 of the format.
"""

import os
import string
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, NoReturn

from edgehold.errors import BadRequestError
from vmand.model import OpenFile, plain

MAX_BYTES = 2 * 1024 * 1024
"""What an arm64 kernel takes at most (the kernel's Documentation/arch/arm64/booting.rst)."""
MAX_PACKED_BYTES = MAX_BYTES // 2 - 10_000
"""What QEMU may be given: it hands the guest a tree of 2 * (bytes of the file + 10000), slack and all. With one byte
more the kernel takes no tree and stops before its first word."""
MAX_DEPTH = 32
MAX_NODES = 16 * 1024
MAX_PROPERTIES = 64 * 1024
MAX_RESERVED = 1024
MAX_NAME = 127
MAX_PATH = 512

MAGIC = b"\xd0\x0d\xfe\xed"
_HEADER = struct.Struct(">10I")
_PROPERTY = struct.Struct(">II")
_WORD = struct.Struct(">I")
_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
# Narrower than ASCII, wider than the specification's: labels of __symbols__ have underscores, old trees other signs.
_NAME_BYTES = frozenset((string.ascii_letters + string.digits + ",._+-@?#*").encode())


@dataclass(frozen=True, slots=True)
class Node:
    """A node; the root's name is empty. ``path`` is its full name, ``/`` for the root."""

    name: str
    path: str
    properties: Mapping[str, bytes] = field(default_factory=dict)
    children: tuple["Node", ...] = ()

    def child(self, name: str) -> "Node | None":
        """The child of this whole name."""
        return next((one for one in self.children if one.name == name), None)

    def cells(self, key: str) -> tuple[int, ...]:
        """A property as 32-bit numbers; none where it is absent.

        Raises:
            BadRequestError: it is none.
        """
        value = self.properties.get(key, b"")
        if len(value) % 4:
            raise BadRequestError(f"dtb: {self} has a {key} of {len(value)} bytes; 32-bit numbers are needed")
        return tuple(number for (number,) in _WORD.iter_unpack(value))

    def cell(self, key: str) -> int | None:
        """A property of one 32-bit number; None where it is absent.

        Raises:
            BadRequestError: it is something else.
        """
        found = self.cells(key)
        if key in self.properties and len(found) != 1:
            raise BadRequestError(f"dtb: {self} has a {key} of {len(found)} numbers; one is needed")
        return found[0] if found else None

    def texts(self, key: str) -> tuple[str, ...]:
        """A property as a list of texts, each of which ends in a NUL; none where it is absent.

        Raises:
            BadRequestError: it is none.
        """
        value = self.properties.get(key, b"")
        if not value:
            return ()
        if not value.endswith(b"\0") or not value.isascii():
            raise BadRequestError(f"dtb: {self} has a {key} that is no text; ASCII with a NUL at its end is needed")
        return tuple(value[:-1].decode("ascii").split("\0"))

    def __str__(self) -> str:
        return plain(self.path, 200)


class _Layout(NamedTuple):
    """Where the parts are: bytes from the beginning of the file, ends excluded."""

    total: int
    structure: int
    structure_end: int
    exact: bool
    """The mark at the structure's end stands at ``structure_end``."""
    strings: int
    strings_end: int
    reserved: int


class _Parsed(NamedTuple):
    root: Node
    end: int
    """Behind the last byte that is not slack."""


def read(file: OpenFile) -> bytes:
    """The whole file, which is at most `MAX_BYTES` long: check what was read, and give QEMU no other bytes.

    Raises:
        BadRequestError: it is larger or can't be read.
    """
    try:
        blob = os.pread(file.fd, MAX_BYTES + 1, 0)
    except OSError as error:
        raise BadRequestError(f"dtb: {plain(file.name, 200)}: {error.strerror}") from None
    if len(blob) > MAX_BYTES:
        raise BadRequestError(f"dtb: {plain(file.name, 200)} is larger than {MAX_BYTES} bytes, which no kernel takes")
    return blob


def parse(blob: bytes) -> Node:
    """The tree's root. Takes some milliseconds for a usual tree, up to a second for the largest possible.

    Raises:
        BadRequestError: says where it is damaged.
    """
    return _parse(blob).root


def packed(blob: bytes) -> bytes:
    """The same tree without the slack at its end. QEMU's own ``dumpdtb`` writes 1 MiB, nearly all of it slack.

    Raises:
        BadRequestError: it is damaged, or larger than QEMU and the kernel together take (`MAX_PACKED_BYTES`).
    """
    end = -(-_parse(blob).end // 8) * 8
    if end > MAX_PACKED_BYTES:
        raise BadRequestError(f"dtb: the tree has {end} bytes; {MAX_PACKED_BYTES} can be given to a guest")
    made = bytearray(blob[:end].ljust(end, b"\0"))
    _WORD.pack_into(made, 4, end)
    return bytes(made)


def _damaged(what: str) -> NoReturn:
    raise BadRequestError(f"dtb: {what}; give a device tree blob, as dtc or QEMU's dumpdtb makes it")


def _layout(blob: bytes) -> _Layout:
    if not blob.startswith(MAGIC):
        _damaged(f"it begins with {blob[:4].hex(' ') or 'nothing'} and not with {MAGIC.hex(' ')}")
    if len(blob) < _HEADER.size:
        _damaged(f"it ends after {len(blob)} bytes, within its header")
    _, total, structure, strings, reserved, version, compatible, _, strings_bytes, structure_bytes = (
        _HEADER.unpack_from(blob)
    )
    if version not in {16, 17} or compatible > 17:
        _damaged(f"it is of version {version} (compatible with {compatible}), and 16 and 17 are known")
    if not _HEADER.size <= total <= MAX_BYTES:
        _damaged(f"its header says {total} bytes, and {_HEADER.size} to {MAX_BYTES} are possible")
    if total > len(blob):
        _damaged(f"it ends after {len(blob)} of {total} bytes")
    # Version 16 does not say how long the structure is: its end has a mark of its own.
    structure_end = structure + structure_bytes if version == 17 else total
    parts = (("structure", structure, structure_end), ("strings", strings, strings + strings_bytes))
    for name, begin, end in (*parts, ("reserved memory", reserved, reserved + 16)):
        if begin < _HEADER.size or end > total:
            _damaged(f"its {name} at {begin} to {end} do not lie between byte {_HEADER.size} and {total}")
    if structure % 4 or reserved % 8:
        _damaged(f"its structure at {structure} and its reserved memory at {reserved} are not aligned")
    return _Layout(total, structure, structure_end, version == 17, strings, strings + strings_bytes, reserved)


def _end_of_reserved(blob: bytes, layout: _Layout) -> int:
    for at in range(layout.reserved, min(layout.total - 15, layout.reserved + 16 * MAX_RESERVED), 16):
        if not any(blob[at : at + 16]):
            return at + 16
    _damaged(f"its list of reserved memory has no end within {MAX_RESERVED} entries")


class _Open:
    """A node whose end has not come yet."""

    __slots__ = ("children", "name", "path", "properties")

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self.properties: dict[str, bytes] = {}
        self.children: dict[str, Node] = {}

    def closed(self) -> Node:
        return Node(self.name, self.path, MappingProxyType(self.properties), tuple(self.children.values()))


class _Builder:
    """Makes the tree of what comes one after the other."""

    def __init__(self) -> None:
        self.root: Node | None = None
        self._above: list[_Open] = []
        self._nodes = 0
        self._properties = 0

    @property
    def inside(self) -> bool:
        """Between the root's begin and end."""
        return bool(self._above)

    def begin(self, name: str) -> None:
        """A node begins."""
        self._nodes += 1
        if self._nodes > MAX_NODES or len(self._above) >= MAX_DEPTH:
            _damaged(f"it has more than {MAX_NODES} nodes, or they are deeper than {MAX_DEPTH}")
        if not self._above:
            if self.root is not None or name:
                _damaged("it has a second root node, or one with a name")
            self._above.append(_Open("", "/"))
            return
        parent = self._above[-1]
        path = f"{parent.path.rstrip('/')}/{name}"
        if not name or len(path) > MAX_PATH:
            _damaged(f"a node in {plain(parent.path, 200)} has no name, or a full name of more than {MAX_PATH} bytes")
        if name in parent.children:
            _damaged(f"{plain(parent.path, 200)} has {name} twice")
        self._above.append(_Open(name, path))

    def property(self, name: str, value: bytes) -> None:
        """A property of the node that began last."""
        self._properties += 1
        if self._properties > MAX_PROPERTIES:
            _damaged(f"it has more than {MAX_PROPERTIES} properties")
        node = self._above[-1]
        if name in node.properties:
            _damaged(f"{plain(node.path, 200)} has {name} twice")
        if node.children:
            _damaged(f"{plain(node.path, 200)} has {name} behind a subnode")
        node.properties[name] = value

    def end(self) -> None:
        """The node that began last ends."""
        done = self._above.pop().closed()
        if self._above:
            self._above[-1].children[done.name] = done
        else:
            self.root = done


class _Cursor:
    """Reads the structure block forward and never beyond its end."""

    def __init__(self, blob: bytes, layout: _Layout) -> None:
        self._blob = blob
        self._layout = layout
        self.at = layout.structure

    def tokens(self) -> Iterator[int]:
        """Each token but NOP, up to and with END."""
        while self.at + 4 <= self._layout.structure_end:
            (token,) = _WORD.unpack_from(self._blob, self.at)
            self.at += 4
            if token != _NOP:
                yield token
            if token == _END:
                return
        _damaged(f"its structure ends at byte {self.at} without a mark")

    def name(self) -> str:
        """A node's name."""
        text = self._text(self.at, self._layout.structure_end)
        self.at += (len(text) + 4) & ~3  # with its NUL, to the next multiple of 4
        if self.at > self._layout.structure_end:
            _damaged(f"its structure ends within a node's name at byte {self.at}")
        return text

    def value(self) -> tuple[str, bytes]:
        """A property's name and value."""
        start = self.at + _PROPERTY.size
        if start > self._layout.structure_end:
            _damaged(f"its structure ends within a property at byte {self.at}")
        size, name_at = _PROPERTY.unpack_from(self._blob, self.at)
        self.at = start + (size + 3 & ~3)
        if self.at > self._layout.structure_end:
            _damaged(f"a property at byte {start} has {size} bytes, more than are left")
        if name_at >= self._layout.strings_end - self._layout.strings:
            _damaged(f"a property at byte {start} has a name outside the strings")
        name = self._text(self._layout.strings + name_at, self._layout.strings_end)
        if not name:
            _damaged(f"a property at byte {start} has no name")
        return name, self._blob[start : start + size]

    def _text(self, at: int, end: int) -> str:
        nul = self._blob.find(b"\0", at, min(end, at + MAX_NAME + 1))
        if nul < 0:
            _damaged(f"a name at byte {at} has no end within {MAX_NAME} bytes")
        text = self._blob[at:nul]
        if not _NAME_BYTES.issuperset(text):
            _damaged(f"a name at byte {at} has a character that no name has")
        return text.decode("ascii")


def _parse(blob: bytes) -> _Parsed:
    layout = _layout(blob)
    reserved_end = _end_of_reserved(blob, layout)
    cursor = _Cursor(blob, layout)
    tree = _Builder()
    for token in cursor.tokens():
        if token == _BEGIN_NODE:
            tree.begin(cursor.name())
        elif token == _PROP and tree.inside:
            tree.property(*cursor.value())
        elif token == _END_NODE and tree.inside:
            tree.end()
        elif token != _END or tree.inside:
            _damaged(f"it has an unexpected {token:#x} at byte {cursor.at - 4}")
    if tree.root is None:
        _damaged("it has no root node")
    if layout.exact and cursor.at != layout.structure_end:
        _damaged(f"its structure ends at byte {cursor.at}, and its header says {layout.structure_end}")
    return _Parsed(tree.root, max(cursor.at, layout.strings_end, reserved_end))
