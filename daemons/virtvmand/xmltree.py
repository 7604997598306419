"""Documents of clients as small trees that know where each element stands in the text.

The place is what `xmledit` needs to change a document as it was written. Nothing of a document is ever fetched or
expanded: declarations of types are refused, and every size has a limit that is looked at before memory is spent. Pure:
no I/O.
"""

import re
from collections.abc import Mapping
from typing import NoReturn
from xml.parsers import expat

import msgspec

from virtvmand.errors import Code, LibvirtError

MAX_BYTES = 44 * 1024
MAX_OWN_BYTES = 2 * MAX_BYTES
"""vmand keeps 96 KiB of annotations with a partition: two of these, and the rest of it is for the small ones."""
MAX_ELEMENTS = 5000
MAX_DEPTH = 32

_START_TAG = re.compile(rb"<[^'\">]*(?:(?:\"[^\"]*\"|'[^']*')[^'\">]*)*>")
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_XML = "http://www.w3.org/XML/1998/namespace"


class Element(msgspec.Struct, frozen=True, gc=False):
    """An element of a document and its place there, in bytes of the UTF-8 text."""

    tag: str
    """As written, with its prefix."""
    namespace: str | None
    """What the prefix stands for; None for an element that is in no namespace."""
    attributes: dict[str, str]
    """By name as written, ``xmlns`` and its kind among them."""
    children: tuple["Element", ...]
    text: str
    """The characters directly in it, without those of its children."""
    begin: int
    """Where ``<`` of its start tag is."""
    inner: int
    """Where its start tag is over."""
    inner_end: int
    """Where its end tag begins; `inner` where the element is written as ``<empty/>``."""
    end: int
    """Where its end tag is over."""

    def child(self, tag: str) -> "Element | None":
        """The first child of this name that is in no namespace."""
        for one in self.children:
            if one.tag == tag and one.namespace is None:
                return one
        return None

    def find(self, *path: str) -> "Element | None":
        """The first element below, step by step."""
        here: Element | None = self
        for tag in path:
            here = here and here.child(tag)
        return here

    def all(self, tag: str) -> tuple["Element", ...]:
        """All children of this name that are in no namespace."""
        return tuple(one for one in self.children if one.tag == tag and one.namespace is None)

    @property
    def local(self) -> str:
        """The name without its prefix."""
        return self.tag.rpartition(":")[2]


class Document(msgspec.Struct, frozen=True):
    """A text and what it means."""

    data: bytes
    root: Element


def parse(text: str, *, what: str = "domain XML", most: int = MAX_BYTES) -> Document:
    """Read a document. ``most``: bytes; `MAX_OWN_BYTES` for one that was accepted and got something put into it since.

    Raises:
        LibvirtError: XML_ERROR; it is malformed (the text names line and column), too large, or declares types.
    """
    data = encoded(text[: most + 1], what=what)
    if len(data) > most:
        refuse(what, f"it is longer than the {most} bytes ({most // 1024} KiB) that are kept; shorten its metadata")
    return Document(data, _Builder(data, what).root())


def encoded(text: str, *, what: str) -> bytes:
    """A text in UTF-8.

    Raises:
        LibvirtError: XML_ERROR; it has a character that XML 1.0 has not, NUL for example.
    """
    if strange := _FORBIDDEN.search(text):
        refuse(what, f"the character U+{ord(strange[0]):04X} at offset {strange.start()} is none that XML may have")
    return text.encode()


def refuse(what: str, why: str) -> NoReturn:
    """Raise XML_ERROR with this text."""
    raise LibvirtError(Code.XML_ERROR, f"{what}: {why}")


def escaped(text: str) -> str:
    """As the text of an element or the value of an attribute, whichever quotes are around it."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\r", "&#13;")
    return text.replace('"', "&quot;").replace("'", "&apos;")


def attribute(text: str) -> str:
    """As the value of an attribute: line ends and tabs survive too."""
    return escaped(text).replace("\n", "&#10;").replace("\t", "&#9;")


class _Open:
    """An element whose end tag has not come yet."""

    __slots__ = ("attributes", "begin", "children", "inner", "scope", "tag", "text")

    def __init__(self, tag: str, attributes: dict[str, str], scope: Mapping[str, str], begin: int, inner: int) -> None:
        self.tag = tag
        self.attributes = attributes
        self.scope = scope
        self.begin = begin
        self.inner = inner
        self.children: list[Element] = []
        self.text: list[str] = []


class _Builder:
    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self._open: list[_Open] = []
        self._count = 0
        self._root: Element | None = None
        # What a declaration says of its encoding counts for nothing: the text came as UTF-8.
        self._parser = expat.ParserCreate("utf-8")
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters

    def root(self) -> Element:
        try:
            self._parser.Parse(self._data, True)
        except expat.ExpatError as error:
            why = expat.ErrorString(error.code)
            refuse(self._what, f"line {error.lineno}, column {error.offset + 1}: {why}")
        finally:
            del self._parser  # the parser holds this object by its methods: a circle, for the collector to find one day
        assert self._root is not None  # noqa: S101 - expat refuses a document without one
        return self._root

    def _doctype(self, *_: object) -> NoReturn:
        refuse(self._what, "a document type declaration (<!DOCTYPE>) is not allowed; leave it out")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > MAX_ELEMENTS:
            refuse(self._what, f"more than {MAX_ELEMENTS} elements")
        if len(self._open) == MAX_DEPTH:
            refuse(self._what, f"elements are nested deeper than {MAX_DEPTH}")
        scope = self._open[-1].scope if self._open else {"xml": _XML}
        for name, value in attributes.items():
            if name.startswith("xmlns"):
                _, colon, prefix = name.partition(":")
                if colon or name == "xmlns":
                    scope = {**scope, prefix: value}
        begin = self._parser.CurrentByteIndex
        match = _START_TAG.match(self._data, begin)
        assert match is not None  # noqa: S101 - expat has read this very tag
        self._open.append(_Open(tag, attributes, scope, begin, match.end()))

    def _end(self, tag: str) -> None:
        one = self._open.pop()
        for name in (tag, *one.attributes):
            prefix, colon, _ = name.partition(":")
            if colon and prefix != "xmlns" and not one.scope.get(prefix):
                refuse(self._what, f"<{one.tag}>: nothing declares the prefix of {name!r} (xmlns:{prefix}='…')")
        prefix = tag.partition(":")[0] if ":" in tag else ""
        at = self._parser.CurrentByteIndex  # of an end tag where it begins, of an empty element where it is over
        empty = self._data[one.inner - 2 : one.inner] == b"/>"
        inner_end = one.inner if empty else at
        end = one.inner if empty else self._data.index(b">", at) + 1
        made = Element(
            tag=tag,
            namespace=one.scope.get(prefix) or None,
            attributes=one.attributes,
            children=tuple(one.children),
            text="".join(one.text),
            begin=one.begin,
            inner=one.inner,
            inner_end=inner_end,
            end=end,
        )
        if self._open:
            self._open[-1].children.append(made)
        else:
            self._root = made

    def _characters(self, text: str) -> None:
        self._open[-1].text.append(text)
