"""Domain XML onto a partition: what a definition asks vmand for.

The definition stays as it was written; `Plan` is its meaning. What is not in the tables of `elements` is refused by
name, so that nobody is promised what a partition does not have. Pure: no I/O.
"""

import re
from dataclasses import dataclass

from edgehold.api.vmand import Disk, Mode, Nic
from virtvmand import domdevices
from virtvmand.domcheck import Judge, absolute, check_tables, kibibytes, number, uuid_text
from virtvmand.errors import LibvirtError
from virtvmand.xmledit import Edits
from virtvmand.xmltree import MAX_OWN_BYTES, Document, Element, parse, refuse

NAMESPACE = "urn:edgehold:partition:1"
"""Of the element in a domain's metadata that has what libvirt has no element for."""

_NAME = re.compile(r"(?![0-9]+\Z)[A-Za-z0-9._][A-Za-z0-9._-]{0,31}", re.ASCII)
_GRANULE = 2 * 1024 * 1024
"""vmand gives memory in pieces of this size."""
_MIN_MEMORY = 16 * 1024 * 1024
_MAX_MEMORY = 64 << 40
_MAX_CORES = 4096
_MAX_CMDLINE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What vmand is asked for."""

    name: str
    uuid: str
    """In lower case with dashes."""
    cores: int = 1
    memory_bytes: int = 0
    """A multiple of 2 MiB, as vmand gives it."""
    mode: Mode = Mode.DEDICATED
    secure: bool = False
    strict: bool = False
    kernel: str = ""
    """Empty: the domain can be defined and not started."""
    initrd: str = ""
    dtb: str = ""
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    vsock: bool = False
    agent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A domain as a client defined it, and what it means."""

    xml: str
    """As it was written, with the uuid and the addresses of interfaces where they were missing."""
    plan: Plan
    os_type: str = "hvm"
    targets: tuple[str, ...] = ()
    """What the disks of the plan are called in the text, in their order."""
    consoles: tuple[str, ...] = ("serial0", "console0")
    """The names by which a client may ask for the console."""


def read_definition(xml: str, *, uuid: str = "") -> Definition:
    """What a client defines. ``uuid`` is taken where the text has none; without it, a random one.

    Raises:
        LibvirtError: XML_ERROR for what is malformed, missing or has a wrong value; CONFIG_UNSUPPORTED for what a
            partition can't be. The text names the element.
    """
    document = parse(xml)
    root, judge = document.root, Judge(strict=True)
    if root.tag != "domain" or root.namespace is not None:
        refuse("domain XML", f"the root element is <{root.tag[:64]}>; it must be <domain>")
    if "type" not in root.attributes:
        judge.wrong("domain@type", "it is missing; write type='vman'")
    check_tables(judge, root)
    plan = _plan(judge, root, uuid)
    return _definition(judge, root, _completed(xml, document, plan), plan)


def known_definition(xml: str) -> Definition:
    """A text that was accepted once, maybe by another version: what is not understood is passed over.

    A text that is no domain XML at all gives a plan without a name.
    """
    try:
        root = parse(xml, most=MAX_OWN_BYTES).root
    except LibvirtError:
        return Definition(xml=xml, plan=Plan(name="", uuid=""))
    judge = Judge(strict=False)
    return _definition(judge, root, xml, _plan(judge, root, ""))


def _definition(judge: Judge, root: Element, xml: str, plan: Plan) -> Definition:
    devices = root.child("devices")
    title = root.child("title")
    if title is not None and "\n" in title.text:
        judge.wrong("title", "it may have one line; the description may have more")
    kind = root.find("os", "type")
    return Definition(
        xml=xml,
        plan=plan,
        os_type=(kind and kind.text.strip()) or "hvm",
        targets=() if devices is None else domdevices.targets(devices),
        consoles=("serial0", "console0")
        if devices is None
        else domdevices.consoles(judge, devices, plan.cmdline if plan.kernel else "console=hvc0"),
    )


def _completed(xml: str, document: Document, plan: Plan) -> str:
    """The text with what a definition gets where it was not written: it must be the same the next time."""
    edits, root = Edits(document), document.root
    missing = False
    if root.child("uuid") is None and (name := root.child("name")) is not None:
        edits.insert_after(name, f"<uuid>{plan.uuid}</uuid>")
        missing = True
    devices = root.child("devices")
    for element, nic in zip(devices.all("interface") if devices else (), plan.nics, strict=True):
        if element.child("mac") is None:
            edits.insert_first(element, f"<mac address='{nic.mac}'/>")
            missing = True
    if not missing:
        return xml
    text = edits.text()
    parse(text)  # what was added must not make it too long
    return text


def _plan(judge: Judge, root: Element, uuid: str) -> Plan:
    uuid = uuid_text(judge, root.child("uuid"), uuid)
    edgehold = _edgehold(judge, root)
    devices = root.child("devices")
    mode, secure, strict, vsock = (_option(judge, edgehold, name) for name in ("mode", "secure", "strict", "vsock"))
    kernel, initrd, dtb, cmdline = _boot(judge, root)
    if not kernel and (orders := _orders(root, devices)):
        judge.unsupported(
            "os/kernel",
            f"it is missing and {orders[0]} is given: vmand boots kernels directly, it has no firmware that boots "
            "from a disk or a network; give a kernel, or leave the boot order out",
        )
    return Plan(
        name=_name(judge, root),
        uuid=uuid,
        cores=_cores(judge, root),
        memory_bytes=_memory(judge, root),
        mode=Mode.SHARED if mode == "shared" else Mode.DEDICATED,
        secure=secure == "yes",
        strict=strict == "yes",
        kernel=kernel,
        initrd=initrd,
        dtb=dtb,
        cmdline=cmdline,
        disks=domdevices.disks(judge, devices) if devices else (),
        nics=domdevices.nics(judge, devices, uuid) if devices else (),
        vsock=(devices is not None and domdevices.vsock(judge, devices)) or vsock == "yes",
        agent=devices is not None and domdevices.agent(judge, devices),
    )


def _name(judge: Judge, root: Element) -> str:
    element = root.child("name")
    if element is None or not element.text:
        judge.wrong("name", "it is missing")
        return ""
    if not _NAME.fullmatch(element.text):
        judge.unsupported(
            "name",
            f"{element.text[:64]!r} is not 1 to 32 of the characters A-Z a-z 0-9 . _ -, not all digits and not "
            "beginning with -, as vmand's names are",
        )
    return element.text


def _cores(judge: Judge, root: Element) -> int:
    element = root.child("vcpu")
    if element is None:
        return 1
    cores = number(judge, element.text, "vcpu", 1)
    if cores == 0:
        judge.wrong("vcpu", "a guest needs at least one")
    if cores > _MAX_CORES:
        judge.unsupported("vcpu", f"{cores} are more than the {_MAX_CORES} that a partition may have")
    if number(judge, element.attributes.get("current", str(cores)), "vcpu@current", cores) != cores:
        judge.unsupported("vcpu@current", f"all {cores} CPUs are there from the start; write the same or leave it out")
    return cores


def _memory(judge: Judge, root: Element) -> int:
    element = root.child("memory")
    if element is None:
        judge.wrong("memory", "it is missing")
        return _MIN_MEMORY
    size = _granules(kibibytes(judge, element, "memory"))
    if size < _MIN_MEMORY:
        judge.unsupported("memory", f"{size // 1024} KiB are less than the 16 MiB of the smallest partition")
    if size > _MAX_MEMORY:
        judge.unsupported("memory", "it is more than the 64 TiB of the largest partition")
    current = root.child("currentMemory")
    if current is not None and _granules(kibibytes(judge, current, "currentMemory")) not in {0, size}:
        judge.unsupported(
            "currentMemory", "it differs from memory and there is no balloon; write the same or leave it out"
        )
    return size


def _granules(kib: int) -> int:
    return -(-kib * 1024 // _GRANULE) * _GRANULE


def _boot(judge: Judge, root: Element) -> tuple[str, str, str, str]:
    """Kernel, initrd, device tree and command line."""
    element = root.child("os")
    if element is None or element.child("type") is None:
        judge.wrong("os/type", "it is missing; write <os><type>hvm</type></os>")
        return "", "", "", ""
    texts = {one.tag: one.text for one in element.children if one.namespace is None}
    for key in ("kernel", "initrd", "dtb"):
        if texts.get(key):
            absolute(judge, texts[key], f"os/{key}")
    cmdline = texts.get("cmdline", "")
    if len(cmdline.encode()) > _MAX_CMDLINE:
        judge.unsupported("os/cmdline", f"it is longer than the {_MAX_CMDLINE} bytes that vmand takes")
    if any(ord(one) < 32 or ord(one) == 127 for one in cmdline):
        judge.wrong("os/cmdline", "line ends and other control characters can't be in a kernel's command line")
    return texts.get("kernel", ""), texts.get("initrd", ""), texts.get("dtb", ""), cmdline


def _orders(root: Element, devices: Element | None) -> list[str]:
    orders = ["os/boot"] if root.find("os", "boot") else []
    return orders + (domdevices.ordered(devices) if devices else [])


def _edgehold(judge: Judge, root: Element) -> Element | None:
    """What stands in the metadata about the partition."""
    metadata = root.child("metadata")
    found = [one for one in metadata.children if one.namespace == NAMESPACE] if metadata else []
    if not found:
        return None
    if len(found) > 1:
        judge.wrong(f"metadata/{found[1].tag}", "it is given twice")
    if found[0].local != "partition":
        judge.wrong(f"metadata/{found[0].tag}", f"the element of {NAMESPACE} is called partition")
    for name in found[0].attributes:
        if name not in _OPTIONS and not name.startswith("xmlns"):
            judge.wrong(f"metadata/{found[0].tag}@{name}", f"it has only {', '.join(_OPTIONS)}")
    return found[0]


_OPTIONS = {"mode": ("dedicated", "shared"), "secure": ("no", "yes"), "strict": ("no", "yes"), "vsock": ("no", "yes")}
"""The attributes of the element of `NAMESPACE`, their values, the default first."""


def _option(judge: Judge, element: Element | None, name: str) -> str:
    values = _OPTIONS[name]
    value = values[0] if element is None else element.attributes.get(name, values[0])
    if value not in values:
        judge.wrong(
            f"metadata/{'' if element is None else element.tag}@{name}",
            f"{value[:64]!r} is none of {', '.join(values)}",
        )
    return value
