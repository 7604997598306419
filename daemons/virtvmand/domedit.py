"""Changes that clients ask for, in the text of a domain's definition: its name, size, title, description and metadata.

The rest of the text stays byte by byte. Whether a partition can be what comes out of it, `definition` says. Pure: no
I/O.
"""

import re
from collections.abc import Iterator, Mapping

from virtvmand.definition import NAMESPACE
from virtvmand.errors import Code, LibvirtError
from virtvmand.xmledit import Edits
from virtvmand.xmltree import Document, Element, attribute, encoded, escaped, parse

DESCRIPTION, TITLE, ELEMENT = 0, 1, 2
"""virDomainMetadataType."""

_PREFIX = re.compile(r"[A-Za-z_][\w.-]*")
_TEXTS = {DESCRIPTION: "description", TITLE: "title"}
_BEFORE = {
    "title": ("uuid", "name"),
    "description": ("title", "uuid", "name"),
    "metadata": ("description", "title", "uuid", "name"),
    "currentMemory": ("memory",),
    "vcpu": ("currentMemory", "memory"),
}
"""After which element a new one stands, as libvirt orders them."""


def metadata(xml: str, kind: int, uri: str | None) -> str:
    """A domain's description, title, or its metadata of a namespace, without what says that it is of that namespace.

    Raises:
        LibvirtError: NO_DOMAIN_METADATA where there is none; INVALID_ARG for another kind, or a uri that is missing.
    """
    document = parse(xml)
    if kind in _TEXTS:
        found = document.root.child(_TEXTS[kind])
        if found is None or not found.text:
            raise LibvirtError(Code.NO_DOMAIN_METADATA, f"metadata not found: the domain has no {_TEXTS[kind]}")
        return found.text
    uri = _uri(kind, uri)
    element = _of(document.root, uri)
    if element is None:
        raise LibvirtError(Code.NO_DOMAIN_METADATA, f"metadata not found: the domain has none of namespace {uri!r}")
    return _bare(document, element, uri)


def with_metadata(xml: str, kind: int, value: str | None, key: str | None, uri: str | None) -> str:
    """The definition with another description, title or metadata of a namespace; None removes it.

    ``key`` is the prefix that elements of ``value`` get which are in no namespace.

    Raises:
        LibvirtError: INVALID_ARG for another kind, a uri or key that is missing, or a title of several lines; XML_ERROR
            where the value is no element, or makes the definition too long.
    """
    document = parse(xml)
    if kind in _TEXTS:
        if kind == TITLE and value is not None and "\n" in value:
            raise LibvirtError(Code.INVALID_ARG, "metadata: a title has one line; a description may have more")
        edits = Edits(document)
        _set_text(edits, document.root, _TEXTS[kind], value or None)  # an empty one is none, as in libvirt
        text = edits.text()
    else:
        uri = _uri(kind, uri)
        text = _with_element(document, uri, None if value is None else _dressed(value, key, uri))
    parse(text)  # it must not have become too long
    return text


def with_memory(xml: str, *, memory_kib: int | None = None, current_kib: int | None = None) -> str:
    """The definition with another memory (KiB); ``memory_kib`` alone sets the current one too."""
    document = parse(xml)
    root, edits = document.root, Edits(document)
    if current_kib is None and root.child("currentMemory") is not None:
        current_kib = memory_kib
    for tag, kib in (("memory", memory_kib), ("currentMemory", current_kib)):
        if kib is not None:
            element = root.child(tag)
            if element is not None and "unit" in element.attributes:
                edits.set_attribute(element, "unit", "KiB")
            _set_text(edits, root, tag, str(kib))
    return edits.text()


def with_vcpus(xml: str, count: int) -> str:
    """The definition with another number of CPUs, all of them there from the start."""
    document = parse(xml)
    edits = Edits(document)
    element = document.root.child("vcpu")
    if element is not None:
        edits.set_attribute(element, "current", None)
    _set_text(edits, document.root, "vcpu", str(count))
    return edits.text()


def with_name(xml: str, name: str) -> str:
    """The definition with another name."""
    document = parse(xml)
    encoded(name, what="name")
    edits = Edits(document)
    _set_text(edits, document.root, "name", name)
    return edits.text()


def with_options(xml: str, options: Mapping[str, str]) -> str:
    """The definition with these attributes of the element that has what is only Edgehold's."""
    document = parse(xml)
    element = _of(document.root, NAMESPACE)
    if element is None:
        return _with_element(document, NAMESPACE, edgehold_element(options))
    edits = Edits(document)
    for name, value in options.items():
        edits.set_attribute(element, name, value)
    return edits.text()


def says(xml: str, option: str) -> bool:
    """Whether the definition has this attribute of the element that has what is only Edgehold's."""
    element = _of(parse(xml).root, NAMESPACE)
    return element is not None and option in element.attributes


def edgehold_element(options: Mapping[str, str]) -> str:
    """The element of `NAMESPACE`."""
    rest = "".join(f" {name}='{attribute(value)}'" for name, value in options.items())
    return f"<edgehold:partition xmlns:edgehold='{NAMESPACE}'{rest}/>"


def _uri(kind: int, uri: str | None) -> str:
    if kind != ELEMENT:
        raise LibvirtError(Code.INVALID_ARG, f"unknown metadata type {kind}; 0 description, 1 title, 2 element")
    if not uri:
        raise LibvirtError(Code.INVALID_ARG, "metadata of an element needs the uri of its namespace")
    return uri


def _of(root: Element, uri: str) -> Element | None:
    holder = root.child("metadata")
    return next((one for one in holder.children if one.namespace == uri), None) if holder else None


def _set_text(edits: Edits, root: Element, tag: str, value: str | None) -> None:
    if value is not None:
        encoded(value, what=tag)
    element = root.child(tag)
    if element is None:
        if value is not None:
            _insert(edits, root, tag, f"<{tag}>{escaped(value)}</{tag}>")
    elif value is None:
        edits.remove(element)
    else:
        edits.set_text(element, value)


def _with_element(document: Document, uri: str, new: str | None) -> str:
    root, edits = document.root, Edits(document)
    old, holder = _of(root, uri), root.child("metadata")
    if old is not None:
        if new is None:
            edits.remove(old)
        else:
            edits.replace(old.begin, old.end, new)
    elif new is not None:
        if holder is None:
            _insert(edits, root, "metadata", "<metadata/>")
            return _with_element(parse(edits.text()), uri, new)
        edits.insert_last(holder, new)
    return edits.text()


def _insert(edits: Edits, root: Element, tag: str, text: str) -> None:
    """A new child of the domain, after the last of those that libvirt puts before it."""
    before = [one for name in _BEFORE.get(tag, ()) if (one := root.child(name))]
    if before:
        edits.insert_after(max(before, key=lambda one: one.begin), text)
    else:
        edits.insert_first(root, text)


def _dressed(value: str, key: str | None, uri: str) -> str:
    """A client's element with its namespace: what is in none gets the prefix ``key``, which is declared at its root."""
    document = parse(value, what="metadata")
    root, edits = document.root, Edits(document)
    if root.namespace is None:
        if not key or not _PREFIX.fullmatch(key):
            raise LibvirtError(
                Code.INVALID_ARG, f"metadata key {(key or '')[:64]!r} can't be the prefix of a namespace"
            )
        declaration = f"xmlns:{key}"
        for one in _below(root):
            if one.attributes.get(declaration, uri) != uri:
                raise LibvirtError(Code.INVALID_ARG, f"metadata: the prefix {key!r} stands for another namespace in it")
            if one.namespace is None:
                edits.rename(one, f"{key}:{one.tag}")
        if declaration not in root.attributes:
            edits.set_attribute(root, declaration, uri)
    elif root.namespace != uri:
        raise LibvirtError(
            Code.INVALID_ARG, f"metadata: its element is of namespace {root.namespace!r}, not of {uri!r}"
        )
    return edits.text(root)


def _bare(document: Document, element: Element, uri: str) -> str:
    """The element without what says of which namespace it is, as clients wrote it: they ask by the namespace."""
    edits, inside = Edits(document), list(_below(element))
    prefix = element.tag.rpartition(":")[0]
    declared = {name for one in inside for name in one.attributes if name.startswith("xmlns")}
    prefixes = {name.partition(":")[0] for one in inside for name in one.attributes if ":" in name} - {"xml", "xmlns"}
    if prefix not in prefixes and not any(_hidden(element, uri)):
        for name, value in element.attributes.items():
            if name.startswith("xmlns") and value == uri:
                edits.set_attribute(element, name, None)
        for one in inside:
            if one.namespace == uri and one.tag != one.local:
                edits.rename(one, one.local)
    # Prefixes that are declared around the element: without them it would not be well-formed by itself.
    holder = document.root.child("metadata")
    around = document.root.attributes | (holder.attributes if holder else {})
    prefixes |= {one.tag.partition(":")[0] for one in inside if ":" in one.tag and one.namespace != uri}
    for name in sorted(f"xmlns:{one}" for one in prefixes):
        if name not in declared and name in around:
            edits.set_attribute(element, name, around[name])
    return edits.text(element)


def _below(element: Element) -> Iterator[Element]:
    yield element
    for one in element.children:
        yield from _below(one)


def _hidden(element: Element, uri: str, *, default: bool = False) -> Iterator[bool]:
    """Whether elements of ``uri`` would be of another namespace, a default one declared around them, without prefix."""
    default = element.attributes.get("xmlns", uri if not default else "") != uri
    yield default and element.namespace == uri
    for one in element.children:
        yield from _hidden(one, uri, default=default)
