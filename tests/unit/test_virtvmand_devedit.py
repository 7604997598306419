"""Devices in the text of a definition: put in, changed and taken out, and every other byte as it was."""

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgehold.api.vmand import Disk
from tests.unit.virtvmand_documents import BARE, DOCUMENTS, DUMPED, FULL, NOVA, VIRT_INSTALL, plan, replaced
from virtvmand import domxml
from virtvmand.devedit import with_device, with_device_changed, without_device
from virtvmand.domdevices import made_mac
from virtvmand.domxml import known_definition, read_definition
from virtvmand.elements import KEPT, REFUSED, USED
from virtvmand.errors import Code, LibvirtError

MAC = "52:54:00:00:00:31"
# As `virsh attach-disk` and `attach-interface` write them.
DISK = "<disk type='file'>\n  <driver type='qcow2'/>\n  <source file='/images/e'/>\n  <target dev='vdx'/>\n</disk>\n"
NIC = (
    "<interface type='bridge'>\n  <source bridge='br1'/>\n"
    f"  <mac address='{MAC}'/>\n  <model type='virtio'/>\n</interface>\n"
)
UNNAMED = "<interface type='bridge'><source bridge='br1'/></interface>"
CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
VSOCK = "<vsock model='virtio'><cid auto='yes'/></vsock>"
DEVICES = {"disk": DISK, "interface": NIC, "channel": CHANNEL, "vsock": VSOCK}
EDITS = (with_device, without_device, with_device_changed)
Edit = Callable[[str, str], str]


def refused(edit: Edit, xml: str, device: str) -> tuple[Code, str]:
    with pytest.raises(LibvirtError) as caught:
        edit(xml, device)
    return caught.value.code, str(caught.value)


def without(tag: str, xml: str) -> str:
    """The document without any device of this kind."""
    with contextlib.suppress(LibvirtError):
        while True:
            xml = without_device(xml, DEVICES[tag] if tag in {"channel", "vsock"} else named(tag, xml))
    return xml


def named(tag: str, xml: str) -> str:
    """A description of the first device of this kind."""
    one = plan(xml)
    if tag == "interface" and one.nics:
        return f"<interface><mac address='{one.nics[0].mac}'/></interface>"
    dev = xml.partition("<disk")[2].partition("dev='vd")[2][:1] or xml.partition('dev="vd')[2][:1]
    return f"<disk><target dev='vd{dev}'/></disk>"


@pytest.mark.parametrize("tag", DEVICES)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_attach_and_detach_leave_the_text_as_it_was(tag: str, document: str) -> None:
    xml = DOCUMENTS[document]
    if tag in {"channel", "vsock"}:
        xml = without(tag, xml)
    more = with_device(xml, DEVICES[tag])
    assert len(more) > len(xml)
    read_definition(more)
    assert without_device(more, DEVICES[tag]) == xml
    assert without_device(more, f"<?xml version='1.0'?>\n<!-- it -->\n{DEVICES[tag]}<!-- this -->") == xml


@given(st.sampled_from([*DOCUMENTS.values()]), st.permutations(list(DEVICES)), st.data())
def test_several_in_any_order(xml: str, order: list[str], data: st.DataObject) -> None:
    """Whatever blanks, quotes and comments are in the text around."""
    for tag in ("channel", "vsock"):
        xml = without(tag, xml)
    blank = st.text(alphabet=" \t\n", max_size=6) | st.just("<!-- a comment > of ours -->")
    at = [n for n in range(len(xml)) if xml[n] == "<" and "<devices>" in xml[:n] and "</devices" not in xml[:n]]
    for begin in sorted(data.draw(st.lists(st.sampled_from(at), max_size=4)), reverse=True):
        xml = xml[:begin] + data.draw(blank) + xml[begin:]
    texts = [xml]
    for tag in order:
        texts.append(with_device(texts[-1], DEVICES[tag]))
        read_definition(texts[-1])
    for before, after, tag in zip(texts, texts[1:], order, strict=False):
        assert without_device(after, DEVICES[tag]) == before
    more = texts[-1]
    for tag in data.draw(st.permutations(order)):
        more = without_device(more, DEVICES[tag])
    assert more == xml


def test_it_stands_after_the_last_of_its_kind_and_as_far_right() -> None:
    disk = (
        "    <disk type='file'>\n      <driver type='qcow2'/>\n      <source file='/images/e'/>\n"
        "      <target dev='vdx'/>\n    </disk>\n"
    )
    assert with_device(FULL, DISK) == FULL.replace("    <interface", f"{disk}    <interface", 1)
    # As `virsh detach-disk` and the like copy it out of a definition, whose lines begin further right.
    copied = disk.strip()
    assert with_device(VIRT_INSTALL, copied) == VIRT_INSTALL.replace("    <controller", f"{disk}    <controller", 1)
    assert with_device(DUMPED, CHANNEL) == DUMPED.replace("    </memballoon>", f"    </memballoon>\n    {CHANNEL}")


@pytest.mark.parametrize(
    ("devices", "becomes"),
    [
        ("", "<devices>@</devices>"),
        ("<devices/>", "<devices>@</devices>"),
        ("<devices></devices>", "<devices>@</devices>"),
        ("\n  <devices/>", "\n  <devices>\n    @\n  </devices>"),
        ("\n  <devices>\n  </devices>", "\n  <devices>\n    @\n  </devices>"),
        ("<devices><console type='pty'/></devices>", "<devices><console type='pty'/>@</devices>"),
    ],
)
def test_the_first_device(devices: str, becomes: str) -> None:
    xml = BARE.replace("</os>", f"</os>{devices}")
    assert with_device(xml, VSOCK) == BARE.replace("</os>", "</os>" + becomes.replace("@", VSOCK))


def test_what_a_partition_gets() -> None:
    more = plan(with_device(FULL, DISK))
    assert more.disks == (*plan(FULL).disks, Disk(path="/images/e", format="qcow2"))
    assert [one.bridge for one in plan(with_device(FULL, NIC)).nics] == ["br0", "br1"]
    one = read_definition(with_device(FULL, UNNAMED))
    made = made_mac(one.plan.uuid, 1)
    assert one.plan.nics[1].mac == made
    assert f"<interface type='bridge'><mac address='{made}'/><source" in one.xml
    assert plan(with_device(with_device(BARE, CHANNEL), VSOCK)).agent
    assert plan(with_device(BARE, VSOCK)).vsock
    assert not plan(without_device(replaced(" vsock='no'", ""), VSOCK)).vsock


@pytest.mark.parametrize(
    ("xml", "device", "said"),
    [
        (FULL, "<disk type='file'><source file='/x'/><target dev='vda'/></disk>", "devices/disk/target@dev: 'vda' al"),
        (FULL, NIC.replace(MAC, "52:54:00:aA:BB:01"), "devices/interface/mac@address: '52:54:00:aa:bb:01' al"),
        (FULL, CHANNEL, "devices/channel/target@name: 'org.qemu.guest_agent.0' al"),
        (FULL, VSOCK, "devices/vsock: the domain al"),
        (domxml.with_metadata(BARE, 2, "<partition vsock='yes'/>", "e", domxml.NAMESPACE), VSOCK, "devices/vsock: the"),
    ],
)
def test_what_is_there_already(xml: str, device: str, said: str) -> None:
    code, text = refused(with_device, xml, device)
    assert code is Code.OPERATION_INVALID
    assert said in text
    assert "already" in text


@pytest.mark.parametrize("edit", [without_device, with_device_changed])
@pytest.mark.parametrize(
    ("device", "said"),
    [
        (DISK, "device not found: devices/disk/target@dev: there is no 'vdx'"),
        (NIC, f"device not found: devices/interface/mac@address: there is no '{MAC}'"),
        (UNNAMED, "device not found: devices/interface: the domain has none that is so"),
        ("<interface type='network'><source network='default'/></interface>", "none that is so"),
    ],
)
@pytest.mark.parametrize("xml", [FULL, BARE])
def test_what_is_not_there(edit: Edit, xml: str, device: str, said: str) -> None:
    code, text = refused(edit, xml, device)
    assert code is Code.DEVICE_MISSING
    assert said in text


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (CHANNEL.replace("agent.0", "agent.1"), "there is no 'org.qemu.guest_agent.1'"),
        ("<vsock><cid auto='no' address='9'/></vsock>", "devices/vsock: the domain has none that is so"),
    ],
)
def test_what_else_is_not_there(device: str, said: str) -> None:
    code, text = refused(without_device, FULL, device)
    assert code is Code.DEVICE_MISSING
    assert said in text


@pytest.mark.parametrize(
    "device",
    [
        "<disk><target dev='vdb'/></disk>",
        "<disk type='file' device='disk'><source file='/another'/><target dev='vdb' bus='scsi'/></disk>",
        "<interface><mac address='52:54:00:aa:BB:01'/><source bridge='another'/></interface>",
        "<interface type='bridge'><source bridge='br0'/></interface>",
        "<interface/>",
        "<vsock/>",
        "<vsock><cid auto='yes' address='77'/></vsock>",
        "<channel><target name='org.qemu.guest_agent.0'/></channel>",
    ],
)
def test_it_is_found_by_its_name_alone(device: str) -> None:
    tag = device[1:].partition(" ")[0].partition(">")[0].strip("/")
    begin = FULL.index(f"\n    <{tag}")
    end = FULL.index(f"</{tag}>") + len(f"</{tag}>")
    assert without_device(replaced(" vsock='no'", ""), device) == (FULL[:begin] + FULL[end:]).replace(" vsock='no'", "")


def test_two_that_could_be_meant() -> None:
    xml = with_device(with_device(FULL, NIC), NIC.replace("31", "32"))
    for edit in (without_device, with_device_changed):
        code, text = refused(edit, xml, UNNAMED)
        assert code is Code.OPERATION_FAILED
        assert "devices/interface/mac@address: 2 devices match" in text


def test_vsock_that_the_metadata_give_too() -> None:
    code, text = refused(without_device, replaced("vsock='no'", "vsock='yes'"), VSOCK)
    assert code is Code.OPERATION_INVALID
    assert "vsock='yes'" in text


def test_another_disk_in_its_place() -> None:
    old = DISK.rstrip().replace("\n", "\n    ")
    new = DISK.replace("/images/e", "/images/f & <g>".replace("&", "&amp;").replace("<", "&lt;"))
    xml = with_device(FULL, DISK)
    changed = with_device_changed(xml, new)
    assert changed == xml.replace(old, new.rstrip().replace("\n", "\n    "))
    assert plan(changed).disks[-1].path == "/images/f & <g>"
    assert with_device_changed(changed, DISK) == xml


def test_another_interface_in_its_place() -> None:
    xml = with_device(FULL, NIC)
    changed = with_device_changed(xml, NIC.replace("br1", "br7"))
    assert changed == xml.replace("br1", "br7")
    assert [one.bridge for one in plan(changed).nics] == ["br0", "br7"]
    # One that is meant by its bridge keeps its address.
    kept = with_device_changed(xml, "<interface type='bridge'><source bridge='br1'/><link state='up'/></interface>")
    assert plan(kept) == plan(xml)
    assert f"    <interface type='bridge'><mac address='{MAC}'/><source bridge='br1'/><link state='up'/>" in kept


@pytest.mark.parametrize("device", [CHANNEL, VSOCK])
def test_what_has_nothing_to_change(device: str) -> None:
    assert refused(with_device_changed, FULL, device)[0] is Code.OPERATION_UNSUPPORTED


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    ("device", "code", "said"),
    [
        ("<graphics type='vnc'/>", Code.CONFIG_UNSUPPORTED, "devices/graphics: a partition has no display"),
        ("<hostdev/>", Code.CONFIG_UNSUPPORTED, "devices/hostdev: vmand passes no device"),
        ("<rng model='virtio'/>", Code.OPERATION_UNSUPPORTED, "devices/rng: it can't be attached"),
        ("<console type='pty'/>", Code.OPERATION_UNSUPPORTED, "devices/console: it can't be attached"),
        ("<domain/>", Code.CONFIG_UNSUPPORTED, "devices/domain: virtvmand does not know"),
        ("<d:disk xmlns:d='urn:d'><target dev='vda'/></d:disk>", Code.CONFIG_UNSUPPORTED, "devices/d:disk: virtvm"),
        ("<disk xmlns='urn:d'><target dev='vda'/></disk>", Code.CONFIG_UNSUPPORTED, "devices/disk: virtvmand does not"),
        ("<disk/>", Code.XML_ERROR, "devices/disk/target@dev: it is missing"),
        ("<channel type='unix'/>", Code.XML_ERROR, "devices/channel/target@name: it is missing"),
        ("<disk", Code.XML_ERROR, "device XML: line 1"),
        ("", Code.XML_ERROR, "device XML: line 1"),
        ("<!DOCTYPE disk><disk/>", Code.XML_ERROR, "device XML: a document type declaration"),
        (f"<disk>{' ' * 45056}</disk>", Code.XML_ERROR, "device XML: it is longer"),
    ],
)
def test_what_is_no_device(edit: Edit, device: str, code: Code, said: str) -> None:
    answer, text = refused(edit, FULL, device)
    assert answer is code
    assert said in text


@pytest.mark.parametrize("path", [one for one in (*USED, *KEPT, *REFUSED) if one.count("/") == 1 and "@" not in one])
def test_every_device_is_attached_or_has_its_reason(path: str) -> None:
    above, tag = path.split("/")
    if above == "devices" and tag not in DEVICES:
        assert path in refused(with_device, FULL, f"<{tag}/>")[1]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (DISK.replace("file='/images", "file='images"), "devices/disk/source@file"),
        (DISK.replace("dev='vdx'", "dev='vdx' bus='scsi'"), "devices/disk/target@bus"),
        (DISK.replace("<driver", "<shareable/><driver"), "devices/disk/shareable"),
        ("<disk device='cdrom'><source file='/x'/><target dev='vdx'/></disk>", "devices/disk@device"),
        (NIC.replace("type='bridge'", "type='network'"), "devices/interface@type"),
        (NIC.replace(MAC, "no"), "devices/interface/mac@address"),
        (NIC.replace("<model", "<filterref filter='f'/><model"), "devices/interface/filterref"),
        (CHANNEL.replace("agent.0", "agent.1"), "devices/channel"),
    ],
)
def test_what_no_partition_can_have_is_refused_as_in_a_definition(device: str, said: str) -> None:
    with pytest.raises(LibvirtError, match=said):
        read_definition(with_device(FULL, device))


@given(st.sampled_from([FULL, NOVA, BARE]), st.sampled_from([*DEVICES.values()]), st.data())
def test_documents_that_are_none(xml: str, device: str, data: st.DataObject) -> None:
    """Refused in order, or what comes out is a document."""
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(device)))
        end = begin + data.draw(st.integers(0, 30) | st.just(0))
        device = device[:begin] + data.draw(st.text(max_size=6) | st.sampled_from(["<", ">", "/>", "'"])) + device[end:]
    for edit in EDITS:
        with contextlib.suppress(LibvirtError):
            changed = edit(xml, device)
            assert known_definition(changed).plan.name == plan(xml).name
