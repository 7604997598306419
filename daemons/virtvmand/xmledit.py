"""Changes to a document as it was written.

A change replaces bytes of the text: comments, prefixes, quotes and indentation of all else stay, which a serializer
would not keep, and clients such as Nova compare what they read with what they wrote. Pure: no I/O.
"""

import re

from virtvmand.xmltree import Document, Element, attribute, escaped

_ATTRIBUTE = re.compile(rb"(\s+)([^\s=/>]+)\s*=\s*(\"[^\"]*\"|'[^']*')")
_NAME = re.compile(rb"[^\s/>]+")
_BLANK = b" \t\r\n"


class Edits:
    """Replacements in a document, gathered and then made at once. No byte is replaced twice."""

    def __init__(self, document: Document) -> None:
        self._data = document.data
        self._made: list[tuple[int, int, bytes]] = []

    def replace(self, begin: int, end: int, text: str) -> None:
        """These bytes become this text; with ``begin == end`` it is put between."""
        self._made.append((begin, end, text.encode()))

    def set_text(self, element: Element, text: str) -> None:
        """All that the element holds becomes this text."""
        if self._is_empty(element):
            tag_end = element.inner - 2
            self.replace(tag_end, element.end, f">{escaped(text)}</{element.tag}>")
        else:
            self.replace(element.inner, element.inner_end, escaped(text))

    def set_attribute(self, element: Element, name: str, value: str | None) -> None:
        """Give an attribute another value, add it at the end of the start tag, or remove it (None)."""
        for match in self._attributes(element):
            if match[2].decode() == name:
                if value is None:
                    self.replace(match.start(), match.end(), "")
                else:
                    self.replace(match.start(3), match.end(3), f"'{attribute(value)}'")
                return
        if value is not None:
            at = element.begin + 1 + len(element.tag.encode())
            for match in self._attributes(element):
                at = match.end()
            self.replace(at, at, f" {name}='{attribute(value)}'")

    def remove(self, element: Element) -> None:
        """Take an element away, with the blanks before it."""
        self.replace(self._blank_before(element.begin), element.end, "")

    def insert_after(self, element: Element, text: str) -> None:
        """Put an element after another, indented like it."""
        self.replace(element.end, element.end, self._margin(element) + text)

    def insert_first(self, element: Element, text: str) -> None:
        """Put an element before the first of the children, indented like them."""
        if element.children:
            self.replace(element.inner, element.inner, self._margin(element.children[0]) + text)
        else:
            self._into_childless(element, text)

    def insert_last(self, element: Element, text: str) -> None:
        """Put an element after the last of the children, indented like it."""
        if element.children:
            self.insert_after(element.children[-1], text)
        else:
            self._into_childless(element, text)

    def rename(self, element: Element, tag: str) -> None:
        """Give an element another name, at both of its ends."""
        begin = element.begin + 1
        self.replace(begin, begin + len(element.tag.encode()), tag)
        if not self._is_empty(element):
            match = _NAME.match(self._data, element.inner_end + 2)
            assert match is not None  # noqa: S101 - the document was well-formed
            self.replace(match.start(), match.end(), tag)

    def text(self, part: Element | None = None) -> str:
        """The document, or a part of it in which all replacements are, as it becomes."""
        at, last = (0, len(self._data)) if part is None else (part.begin, part.end)
        parts: list[bytes] = []
        for begin, end, new in sorted(self._made, key=lambda one: one[:2]):
            parts += [self._data[at:begin], new]
            at = end
        parts.append(self._data[at:last])
        return b"".join(parts).decode()

    def _is_empty(self, element: Element) -> bool:
        return self._data[element.inner - 2 : element.inner] == b"/>"

    def _attributes(self, element: Element) -> list[re.Match[bytes]]:
        at = element.begin + 1 + len(element.tag.encode())
        found: list[re.Match[bytes]] = []
        while match := _ATTRIBUTE.match(self._data, at):
            found.append(match)
            at = match.end()
        return found

    def _blank_before(self, at: int) -> int:
        return len(self._data[:at].rstrip(_BLANK))

    def _margin(self, element: Element) -> str:
        blank = self._data[self._blank_before(element.begin) : element.begin].decode()
        return "\n" + blank.rpartition("\n")[2] if "\n" in blank else blank

    def _into_childless(self, element: Element, text: str) -> None:
        margin = self._margin(element)
        inner = f"{margin}  {text}{margin}" if "\n" in margin else text
        if self._is_empty(element):
            self.replace(element.inner - 2, element.end, f">{inner}</{element.tag}>")
        else:
            end = element.inner if self._data[element.inner : element.inner_end].strip() else element.inner_end
            self.replace(element.inner, end, inner)
