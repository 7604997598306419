"""Domain XML against the tables of `elements`, and the values that stand in it.

A `Judge` raises what a client is told; one that is not strict passes everything over, for texts that were accepted
before by a virtvmand with other tables. Pure: no I/O.
"""

import re
import uuid as uuids

from virtvmand.elements import CHOICES, KEPT, MANY, REFUSED, USED
from virtvmand.errors import Code, LibvirtError
from virtvmand.xmltree import Element

_NUMBER = re.compile(r"\s*([0-9]{1,20})\s*", re.ASCII)
_UUID = re.compile(r"\s*(?:-*[0-9A-Fa-f]){32}-*\s*", re.ASCII)
_UNIT = re.compile(r"([kmgtpe]?)(b|bytes?|ib)?", re.ASCII | re.IGNORECASE)
_MAX_PATH = 4096


class Judge:
    """What becomes of what is wrong. ``strict``: it is raised; otherwise it is passed over."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict

    def wrong(self, path: str, why: str) -> None:
        """Something is missing or has a value that makes no sense.

        Raises:
            LibvirtError: XML_ERROR, where this judge is strict.
        """
        if self.strict:
            raise LibvirtError(Code.XML_ERROR, f"{path}: {why}")

    def unsupported(self, path: str, why: str) -> None:
        """Something is as libvirt's format allows it, and a partition can't be it.

        Raises:
            LibvirtError: CONFIG_UNSUPPORTED, where this judge is strict.
        """
        if self.strict:
            raise LibvirtError(Code.CONFIG_UNSUPPORTED, f"{path}: {why}")


def check_tables(judge: Judge, domain: Element) -> None:
    """Look at every element and attribute that the tables say something of.

    Raises:
        LibvirtError: as `Judge`.
    """
    _attributes(judge, domain, "domain", known=True)
    _children(judge, domain, "")


def _children(judge: Judge, parent: Element, above: str) -> None:
    seen: set[str] = set()
    for one in parent.children:
        path = above + one.tag
        if path in REFUSED:
            judge.unsupported(path, f"{REFUSED[path]}; leave it out")
        elif one.namespace is not None or (path not in USED and path not in KEPT):
            judge.unsupported(path, "virtvmand does not know this element; leave it out")
        elif path in KEPT:
            _kept(judge, one, path)
        else:
            if path in seen and path not in MANY:
                judge.wrong(path, "it is given twice")
            seen.add(path)
            _attributes(judge, one, path, known=True)
            _choice(judge, path, one.text.strip())
            if path != "metadata":
                _children(judge, one, path + "/")


def _kept(judge: Judge, element: Element, path: str) -> None:
    """Only what is named in a table is looked at."""
    _attributes(judge, element, path, known=False)
    for one in element.children:
        if (below := f"{path}/{one.tag}") in REFUSED:
            judge.unsupported(below, f"{REFUSED[below]}; leave it out")


def _attributes(judge: Judge, element: Element, path: str, *, known: bool) -> None:
    for name, value in element.attributes.items():
        key = f"{path}@{name}"
        if key in REFUSED:
            judge.unsupported(key, f"{REFUSED[key]}; leave it out")
        elif known and key not in USED and key not in KEPT and not name.startswith("xmlns"):
            judge.unsupported(key, "virtvmand does not know this attribute; leave it out")
        else:
            _choice(judge, key, value)


def _choice(judge: Judge, key: str, value: str) -> None:
    choice = CHOICES.get(key)
    if choice is not None and value not in choice.values:
        judge.unsupported(key, f"{value[:64]!r} is not possible: {choice.why}; possible: {', '.join(choice.values)}")


def number(judge: Judge, text: str, path: str, default: int) -> int:
    """A whole number of at most 20 digits."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        judge.wrong(path, f"{text[:64]!r} is not a whole number")
        return default
    return int(match[1])


def kibibytes(judge: Judge, element: Element, path: str) -> int:
    """A size in libvirt's units (KiB where none is written), rounded up to KiB."""
    count = number(judge, element.text, path, 0)
    unit = element.attributes.get("unit", "KiB")
    match = _UNIT.fullmatch(unit)
    if match is None or not unit or (match[1] and len(match[2] or "") > 2):
        judge.wrong(f"{path}@unit", f"{unit[:64]!r} is none of b, KB, k, KiB, MB, M, MiB, GB, G, GiB, TB, T, TiB …")
        return count
    prefix, kind = match[1].lower(), (match[2] or "").lower()
    if not prefix and kind == "ib":
        judge.wrong(f"{path}@unit", "'iB' lacks its prefix: KiB, MiB, GiB …")
    base = 1000 if kind == "b" else 1024
    size: int = count * base ** " kmgtpe".index(prefix or " ")
    return -(-size // 1024)


def uuid_text(judge: Judge, element: Element | None, default: str) -> str:
    """A uuid in lower case with dashes; it may be written without them."""
    if element is None:
        return default or (str(uuids.uuid4()) if judge.strict else "")
    if not _UUID.fullmatch(element.text):
        judge.wrong("uuid", f"{element.text[:64]!r} is not 32 hexadecimal digits, with dashes or without")
        return default
    return str(uuids.UUID(element.text.replace("-", "").strip()))


def absolute(judge: Judge, path: str, key: str) -> str:
    """A path of the host."""
    if not path.startswith("/") or len(path) > _MAX_PATH:
        judge.wrong(key, f"{path[:64]!r} is not an absolute path")
    return path
