"""Devices that clients put into the text of a domain's definition, change there, or take out of it.

The rest of the text stays byte by byte. Which device is meant is found as libvirt finds it: a disk by its target, an
interface by its address, a channel by its name. Whether a partition can be what comes out of it, `definition` says.
Pure: no I/O.
"""

import re
from typing import NoReturn

from virtvmand.definition import known_definition
from virtvmand.elements import KEPT, REFUSED, USED
from virtvmand.errors import Code, LibvirtError
from virtvmand.xmledit import Edits
from virtvmand.xmltree import Document, Element, attribute, parse, refuse

_NAMES = {"disk": ("target", "dev"), "interface": ("mac", "address"), "channel": ("target", "name"), "vsock": ("", "")}
"""Devices that are handled one by one, and the attribute that tells those of a kind apart. There is one vsock."""
_REPLACED = ("disk", "interface")
"""Devices that can be another one at the same place; of the others there is nothing to change."""
_NEW_LINE = re.compile(r"(?<=>)(\s*\n)([ \t]*)(?=<)")


def with_device(xml: str, device: str) -> str:
    """The definition with one device more, after the last of its kind.

    Raises:
        LibvirtError: OPERATION_INVALID, there is one of that name; XML_ERROR, OPERATION_UNSUPPORTED or
            CONFIG_UNSUPPORTED, it is none that can be given. The text names it.
    """
    new, document = _read(device), parse(xml)
    root, tag, devices = new.root, new.root.tag, document.root.child("devices")
    edits = Edits(document)
    if devices is None:
        edits.insert_last(document.root, "<devices/>")
        return with_device(edits.text(), device)
    if tag == "vsock":
        if known_definition(xml).plan.vsock:
            raise LibvirtError(Code.OPERATION_INVALID, "devices/vsock: the domain already has one")
    elif _name(root) and _matching(devices, root):
        raise LibvirtError(Code.OPERATION_INVALID, f"{_path(root)}: {_name(root)[:64]!r} already exists")
    if last := devices.all(tag)[-1:] or devices.children[-1:]:
        edits.insert_after(last[0], _indented(Edits(new).text(root), _margin(document, last[0])))
    else:
        edits.insert_last(devices, _indented(Edits(new).text(root), f"{_margin(document, devices)}  "))
    return edits.text()


def without_device(xml: str, device: str) -> str:
    """The definition without the device that a client describes.

    Raises:
        LibvirtError: DEVICE_MISSING, there is none; OPERATION_FAILED, several could be meant; OPERATION_INVALID, the
            definition would give it nevertheless; as `with_device` for what is no device.
    """
    wanted, document = _read(device), parse(xml)
    edits = Edits(document)
    edits.remove(_the_one(document, wanted.root))
    text = edits.text()
    if wanted.root.tag == "vsock" and known_definition(text).plan.vsock:
        raise LibvirtError(
            Code.OPERATION_INVALID, "metadata: edgehold:partition has vsock='yes' too; take that out of the definition"
        )
    return text


def with_device_changed(xml: str, device: str) -> str:
    """The definition with this disk or interface in the place of the one of the same name.

    An interface without an address keeps the one it had.

    Raises:
        LibvirtError: as `without_device`; OPERATION_UNSUPPORTED for other devices.
    """
    new, document = _read(device), parse(xml)
    root = new.root
    if root.tag not in _REPLACED:
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED, f"devices/{root.tag}: there is nothing to change; attach or detach it"
        )
    old = _the_one(document, root)
    changed, edits = Edits(new), Edits(document)
    if root.tag == "interface" and root.child("mac") is None and (mac := _name(old)):
        changed.insert_first(root, f"<mac address='{attribute(mac)}'/>")
    edits.replace(old.begin, old.end, _indented(changed.text(root), _margin(document, old)))
    return edits.text()


def _read(device: str) -> Document:
    """A client's document of one device."""
    document = parse(device, what="device XML")
    root = document.root
    path = f"devices/{root.tag[:64]}"
    if root.namespace is None and root.tag in _NAMES:
        if root.tag in {"disk", "channel"} and not _name(root):
            refuse(_path(root), "it is missing")
        return document
    if path in REFUSED:
        raise LibvirtError(Code.CONFIG_UNSUPPORTED, f"{path}: {REFUSED[path]}")
    if root.namespace is None and (path in USED or path in KEPT):
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED,
            f"{path}: it can't be attached, detached or updated by itself; change the definition (virsh edit)",
        )
    raise LibvirtError(
        Code.CONFIG_UNSUPPORTED, f"{path}: virtvmand does not know this device; possible: {', '.join(_NAMES)}"
    )


def _the_one(document: Document, wanted: Element) -> Element:
    """The device of a definition that a client means."""
    devices = document.root.child("devices")
    found = _matching(devices, wanted) if devices else []
    if not found:
        _missing(wanted)
    if len(found) > 1:
        raise LibvirtError(
            Code.OPERATION_FAILED, f"{_path(wanted)}: {len(found)} devices match; say with it which one is meant"
        )
    return found[0]


def _matching(devices: Element, wanted: Element) -> list[Element]:
    known = devices.all(wanted.tag)
    if wanted.tag == "vsock":
        return [one for one in known if _value(wanted, "cid", "auto") in {"", "yes"}]
    if name := _name(wanted):
        return [one for one in known if _name(one) == name]
    kind, bridge = wanted.attributes.get("type", ""), _value(wanted, "source", "bridge")
    alike = [one for one in known if kind in {"", one.attributes.get("type")}]
    return [one for one in alike if bridge in {"", _value(one, "source", "bridge")}]


def _missing(wanted: Element) -> NoReturn:
    if name := _name(wanted):
        why = f"{_path(wanted)}: there is no {name[:64]!r}"
    else:
        why = f"devices/{wanted.tag}: the domain has none that is so"
    raise LibvirtError(Code.DEVICE_MISSING, f"device not found: {why}")


def _name(device: Element) -> str:
    """What tells it from others of its kind; empty where nothing does."""
    name = _value(device, *_NAMES[device.tag])
    return name.lower() if device.tag == "interface" else name


def _path(device: Element) -> str:
    """Where its name stands."""
    return "devices/{}/{}@{}".format(device.tag, *_NAMES[device.tag])


def _value(device: Element, below: str, name: str) -> str:
    element = device.child(below)
    return "" if element is None else element.attributes.get(name, "")


def _margin(document: Document, element: Element) -> str:
    """What is before an element on its line, where that is blank."""
    line = document.data[: element.begin].rpartition(b"\n")[2].decode()
    return "" if line.strip() else line


def _indented(text: str, margin: str) -> str:
    """A device's text, of which the lines after the first begin further right by as much as its place needs."""
    last = text.rpartition("\n")[2]
    was = last[: len(last) - len(last.lstrip(" \t"))]
    return _NEW_LINE.sub(lambda line: line[1] + margin + line[2].removeprefix(was), text)
