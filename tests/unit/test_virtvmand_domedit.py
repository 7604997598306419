"""Domain XML that is changed and shown: what a client reads back, and that all else stays as it was written."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from edgehold.api.vmand import Mode, Partition, State
from edgehold.testing.capability import missing, need_command
from tests.unit.virtvmand_documents import (
    BARE,
    DOCUMENTS,
    DUMPED,
    FULL,
    NOVA,
    UUID,
    VIRT_INSTALL,
    partition_of,
    plan,
    refused,
)
from virtvmand import domxml
from virtvmand.domxml import Plan, read_definition
from virtvmand.elements import CHOICES
from virtvmand.errors import Code, LibvirtError
from virtvmand.xmltree import MAX_BYTES, parse

MIB = 1024 * 1024
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
PARTITION = Partition(
    id=4, name="full", uuid=UUID, state=State.DEPLOYED, mode=Mode.SHARED, cores=3, memory_bytes=64 * MIB,
    secure=True, strict=True, vsock_cid=9,
)  # fmt: skip


@pytest.mark.parametrize("xml", [NOVA, VIRT_INSTALL])
@pytest.mark.parametrize("active", [False, True])
def test_a_definition_is_shown_as_it_was_written(xml: str, active: bool) -> None:
    definition = read_definition(xml)
    assert domxml.domain_xml(definition, partition_of(definition), active=active, inactive_view=True) is xml


def test_a_running_domain_is_shown_with_its_id() -> None:
    definition = read_definition(NOVA)
    shown = domxml.domain_xml(definition, partition_of(definition), active=True, inactive_view=False)
    assert shown == NOVA.replace('<domain type="kvm">', "<domain type=\"kvm\" id='4'>").replace(
        "\n    </serial>", "\n      <alias name='serial0'/>\n    </serial>"
    )
    assert read_definition(shown).plan == definition.plan


def test_what_libvirt_has_shown_is_shown_anew() -> None:
    definition = read_definition(FULL)
    shown = domxml.domain_xml(definition, PARTITION, active=True, inactive_view=False)
    assert "<domain type='vman' id='4' xmlns:qemu" in shown
    assert "<cid auto='yes' address='9'/>" in shown
    assert shown.count("<alias name='serial0'/>") == 2
    for active in (False, True):
        shown = domxml.domain_xml(definition, PARTITION, active=active, inactive_view=True)
        assert shown == FULL.replace(" id='7'", "")
    written = read_definition(DUMPED)
    shown = domxml.domain_xml(written, partition_of(written), active=True, inactive_view=False)
    assert shown == DUMPED.replace("id='12'", "id='4'")


def test_what_vmand_changed_is_shown() -> None:
    definition = read_definition(NOVA)
    shared = partition_of(definition, mode=Mode.SHARED, secure=True)
    element = "<edgehold:partition xmlns:edgehold='urn:edgehold:partition:1' mode='shared' secure='yes'/>"
    shown = domxml.domain_xml(definition, shared, active=True, inactive_view=False)
    assert f"</nova:instance>\n    {element}" in shown
    # What the next start takes may be another than what runs, and a start makes the partition what was defined.
    assert domxml.domain_xml(definition, shared, active=True, inactive_view=True) is NOVA
    assert domxml.domain_xml(definition, shared, active=False, inactive_view=False) is NOVA
    weaker = partition_of(read_definition(FULL), mode=Mode.DEDICATED, strict=False)
    shown = domxml.domain_xml(read_definition(FULL), weaker, active=True, inactive_view=False)
    assert "mode='dedicated' secure='yes' strict='no' vsock='no'/>" in shown


@pytest.mark.parametrize("vsock_cid", [None, 12])
@pytest.mark.parametrize(("mode", "strict"), [(Mode.SHARED, False), (Mode.DEDICATED, True)])
@pytest.mark.parametrize("arch", ["", "aarch64"])
def test_partitions_without_a_definition(vsock_cid: int | None, mode: Mode, strict: bool, arch: str) -> None:
    partition = Partition(
        id=2, name="web-1.a_b", uuid=UUID, state=State.DEPLOYED, mode=mode, cores=2, memory_bytes=96 * MIB,
        strict=strict, arch=arch, vsock_cid=vsock_cid,
    )  # fmt: skip
    made = domxml.synthesized(partition)
    assert made.plan == Plan(
        name="web-1.a_b", uuid=UUID, cores=2, memory_bytes=96 * MIB, mode=mode, strict=strict,
        vsock=vsock_cid is not None,
    )  # fmt: skip
    if (arch or os.uname().machine) in CHOICES["os/type@arch"].values:
        assert read_definition(made.xml) == made
    shown = domxml.domain_xml(made, partition, active=True, inactive_view=False)
    assert shown.startswith("<domain type='vman' id='2'>\n  <name>web-1.a_b</name>\n")
    assert ("<cid auto='yes' address='12'/>" in shown) == (vsock_cid is not None)
    assert domxml.domain_xml(made, partition, active=True, inactive_view=True) is made.xml


@pytest.mark.parametrize("xml", [*DOCUMENTS.values(), BARE, ""])
def test_libvirts_schema_allows_what_is_shown(xml: str, tmp_path: Path) -> None:
    need_command("xmllint", "libxml2-utils")
    if not SCHEMA.exists():
        missing(f"{SCHEMA} is not there (Debian package libvirt0)")
    definition = read_definition(xml) if xml else domxml.synthesized(PARTITION)
    titled = domxml.with_metadata(domxml.with_memory(definition.xml, memory_kib=65536), 1, "t", None, None)
    texts = [
        definition.xml,
        domxml.domain_xml(definition, PARTITION, active=True, inactive_view=False),
        domxml.with_vcpus(domxml.with_metadata(titled, 2, "<a/>", "k", "urn:x"), 2),
    ]
    files = [tmp_path / f"{n}.xml" for n in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text.replace("type='vman'", "type='kvm'", 1))  # the schema knows libvirt's own hypervisors only
    checked = ["xmllint", "--nonet", "--noout", "--relaxng", *map(str, (SCHEMA, *files))]
    done = subprocess.run(checked, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


NS = "http://openstack.org/xmlns/libvirt/nova/1.1"
SAME = ""
"""What is shown is what was given."""


@pytest.mark.parametrize("xml", [*DOCUMENTS.values(), BARE])
@pytest.mark.parametrize("kind", [0, 1])
def test_title_and_description(xml: str, kind: int) -> None:
    tag, text = ("description", "title")[kind], "T & <b> \"q\" 'é'"
    changed = domxml.with_metadata(xml, kind, text, None, None)
    assert domxml.metadata(changed, kind, None) == text
    read_definition(changed)
    for empty in (None, ""):
        without = domxml.with_metadata(changed, kind, empty, None, None)
        with pytest.raises(LibvirtError, match=f"metadata not found: the domain has no {tag}") as caught:
            domxml.metadata(without, kind, None)
        assert caught.value.code is Code.NO_DOMAIN_METADATA
        read_definition(without)
        if xml is not FULL:  # it had none
            assert without == xml
            assert domxml.with_metadata(xml, kind, empty, None, None) == xml


def test_new_texts_stand_where_libvirt_puts_them() -> None:
    xml = domxml.with_metadata(BARE, 0, "d", None, None)
    xml = domxml.with_metadata(xml, 1, "t", None, None)
    xml = domxml.with_metadata(xml, 2, "<a/>", "k", "urn:a")
    assert "<name>bare</name><title>t</title><description>d</description><metadata><k:a xmlns:k='urn:a'/>" in xml
    nova = domxml.with_metadata(NOVA, 0, "d\ne", None, None)
    assert "</name>\n  <description>d\ne</description>\n  <memory>" in nova


@pytest.mark.parametrize(
    ("value", "stored", "shown"),
    [
        ("<a/>", "<k:a xmlns:k='urn:x'/>", "<a/>"),
        ("<a><b q='1'/> t </a>", "<k:a xmlns:k='urn:x'><k:b q='1'/> t </k:a>", "<a><b q='1'/> t </a>"),
        ("<?xml version='1.0'?>\n<!-- c --><a\n/>", "<k:a xmlns:k='urn:x'\n/>", "<a\n/>"),
        ("<k:a xmlns:k='urn:x'><k:b/></k:a>", "<k:a xmlns:k='urn:x'><k:b/></k:a>", "<a><b/></a>"),
        ("<n:a xmlns:n='urn:x'/>", "<n:a xmlns:n='urn:x'/>", "<a/>"),
        ("<a xmlns='urn:x'><b/></a>", "<a xmlns='urn:x'><b/></a>", "<a><b/></a>"),
        ("<a xmlns:o='urn:o'><o:b/></a>", "<k:a xmlns:o='urn:o' xmlns:k='urn:x'><o:b/></k:a>", SAME),
        ("<a><b xmlns='urn:z'><c/></b></a>", "<k:a xmlns:k='urn:x'><b xmlns='urn:z'><c/></b></k:a>", SAME),
        # What would lose its meaning with its prefix keeps both.
        ("<k:a xmlns:k='urn:x' k:q='1'/>", "<k:a xmlns:k='urn:x' k:q='1'/>", "<k:a xmlns:k='urn:x' k:q='1'/>"),
        ("<k:a xmlns:k='urn:x' xmlns='urn:z'><b/></k:a>",) * 3,
    ],
)  # fmt: skip
@pytest.mark.parametrize("xml", [*DOCUMENTS.values(), BARE])
def test_metadata_of_applications(xml: str, value: str, stored: str, shown: str) -> None:
    changed = domxml.with_metadata(xml, 2, value, "k", "urn:x")
    assert stored in changed
    assert domxml.metadata(changed, 2, "urn:x") == (shown or value)
    assert plan(changed, uuid=UUID) == plan(xml, uuid=UUID)
    again = domxml.with_metadata(changed, 2, "<z>2</z>", "k", "urn:x")
    assert domxml.metadata(again, 2, "urn:x") == "<z>2</z>"
    removed = domxml.with_metadata(again, 2, None, None, "urn:x")
    assert domxml.with_metadata(removed, 2, None, None, "urn:x") == removed
    if "<metadata>" in xml:
        assert removed == xml
    else:
        assert parse(removed).root.find("metadata") is not None  # empty, which says nothing
    with pytest.raises(LibvirtError, match="has none of namespace 'urn:x'"):
        domxml.metadata(removed, 2, "urn:x")


def test_metadata_that_others_wrote() -> None:
    shown = domxml.metadata(NOVA, 2, NS)
    assert shown.startswith('<instance>\n      <package version="26.2.2"/>\n      <name>edge-1</name>')
    assert domxml.metadata(FULL, 2, "urn:app") == "<any>kept</any>"
    around = BARE.replace("<domain ", "<domain xmlns:k='urn:k' xmlns:l='urn:l' ").replace(
        "<os>", "<metadata><k:a l:q='1'><l:b/></k:a></metadata><os>"
    )
    assert domxml.metadata(around, 2, "urn:k") == "<a l:q='1' xmlns:l='urn:l'><l:b/></a>"
    parse(domxml.metadata(around, 2, "urn:k"))


@pytest.mark.parametrize(
    ("kind", "value", "key", "uri", "code"),
    [
        (3, "x", None, None, Code.INVALID_ARG),
        (-1, None, None, None, Code.INVALID_ARG),
        (2, "<a/>", "k", None, Code.INVALID_ARG),
        (2, "<a/>", "k", "", Code.INVALID_ARG),
        (2, "<a/>", None, "urn:x", Code.INVALID_ARG),
        (2, "<a/>", "1 k", "urn:x", Code.INVALID_ARG),
        (2, "<a xmlns='urn:y'/>", "k", "urn:x", Code.INVALID_ARG),
        (2, "<a xmlns:k='urn:y'/>", "k", "urn:x", Code.INVALID_ARG),
        (2, "<a><b xmlns:k='urn:y'/></a>", "k", "urn:x", Code.INVALID_ARG),
        (1, "two\nlines", None, None, Code.INVALID_ARG),
        (1, "\0", None, None, Code.XML_ERROR),
        (0, "x" * MAX_BYTES, None, None, Code.XML_ERROR),
        (2, "<a>" + "x" * (MAX_BYTES - 100) + "</a>", "k", "urn:x", Code.XML_ERROR),
        (2, "<a>", "k", "urn:x", Code.XML_ERROR),
        (2, "", "k", "urn:x", Code.XML_ERROR),
        (2, "<a/><b/>", "k", "urn:x", Code.XML_ERROR),
        (2, "text", "k", "urn:x", Code.XML_ERROR),
        (2, "</metadata>", "k", "urn:x", Code.XML_ERROR),
        (2, "<k:a/>", "k", "urn:x", Code.XML_ERROR),
    ],
)
def test_metadata_that_is_refused(kind: int, value: str | None, key: str | None, uri: str | None, code: Code) -> None:
    with pytest.raises(LibvirtError) as caught:
        domxml.with_metadata(FULL, kind, value, key, uri)
    assert caught.value.code is code
    if kind not in {0, 1} and not uri:
        with pytest.raises(LibvirtError) as caught:
            domxml.metadata(FULL, kind, uri)
        assert caught.value.code is Code.INVALID_ARG


@pytest.mark.parametrize("xml", [*DOCUMENTS.values(), BARE])
def test_size_and_name(xml: str) -> None:
    was = plan(xml, uuid=UUID)
    assert plan(domxml.with_vcpus(xml, 7), uuid=UUID) == dataclasses.replace(was, cores=7)
    assert plan(domxml.with_memory(xml, memory_kib=40960), uuid=UUID) == dataclasses.replace(was, memory_bytes=40 * MIB)
    both = domxml.with_memory(xml, memory_kib=40960, current_kib=40960)
    assert plan(both, uuid=UUID) == dataclasses.replace(was, memory_bytes=40 * MIB)
    assert "currentMemory" in both
    assert plan(domxml.with_name(xml, "other.name"), uuid=UUID) == dataclasses.replace(was, name="other.name")
    lower = domxml.with_memory(xml, current_kib=16384)
    assert refused(lower).startswith("currentMemory: it differs from memory")


def test_sizes_keep_what_is_around_them() -> None:
    assert domxml.with_memory(FULL, memory_kib=98304) == FULL.replace(
        "<memory unit='MiB'>63</memory>", "<memory unit='KiB'>98304</memory>"
    ).replace(">64512<", ">98304<")
    assert domxml.with_vcpus(FULL, 2) == FULL.replace("<vcpu current='3'>3<", "<vcpu>2<")
    assert "<memory>32768</memory><vcpu>2</vcpu><os>" in domxml.with_vcpus(BARE, 2)
    assert "<memory>32768</memory><currentMemory>1</currentMemory><os>" in domxml.with_memory(BARE, current_kib=1)
    assert domxml.with_name(FULL, "a&b") == FULL.replace(">full<", ">a&amp;b<")
    with pytest.raises(LibvirtError, match="name: the character"):
        domxml.with_name(FULL, "\1")
