"""Domain XML that is cut off, mixed up or none at all: refused in order, or taken and the same ever after."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.virtvmand_documents import BARE, DOCUMENTS, FULL, NOVA, UUID, partition_of
from virtvmand import domxml
from virtvmand.domxml import known_definition, read_definition
from virtvmand.errors import Code, LibvirtError
from virtvmand.xmltree import parse


def survives(xml: str) -> None:
    known_definition(xml)
    try:
        definition = read_definition(xml, uuid=UUID)
    except LibvirtError:
        return
    assert read_definition(definition.xml) == definition == known_definition(definition.xml)
    partition = partition_of(definition)
    shown = domxml.domain_xml(definition, partition, active=False, inactive_view=True)
    assert shown is definition.xml or "id" in parse(definition.xml).root.attributes
    live = domxml.domain_xml(definition, partition, active=True, inactive_view=False)
    assert known_definition(live).plan == definition.plan
    with contextlib.suppress(LibvirtError):  # the longest text has no room for more
        titled = domxml.with_metadata(definition.xml, 1, "t", None, None)
        assert domxml.metadata(titled, 1, None) == "t"


@pytest.mark.parametrize("xml", [FULL, NOVA])
def test_truncation_at_every_byte(xml: str) -> None:
    data = xml.rstrip().encode()
    for end in range(len(data)):
        with pytest.raises(LibvirtError) as caught:
            read_definition(data[:end].decode(errors="ignore"))
        assert caught.value.code is Code.XML_ERROR


@given(st.text() | st.text(alphabet="<>/='\"!-[]&;domaine type:?\n"))
def test_arbitrary_text(text: str) -> None:
    survives(text)
    survives(f"<domain type='vman'>{text}</domain>")
    survives(BARE.replace("<os>", f"{text}<os>"))


PIECES = st.sampled_from(
    [one for document in DOCUMENTS.values() for one in document.replace(">", ">\0").replace("=", "=\0").split("\0")]
)


@given(st.sampled_from([*DOCUMENTS.values()]), st.data())
def test_mutations(xml: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(xml)))
        end = begin + data.draw(st.integers(0, 40) | st.just(0))
        xml = xml[:begin] + data.draw(st.text(max_size=8) | PIECES) + xml[end:]
    survives(xml)


@given(st.sampled_from([*DOCUMENTS.values()]), st.data())
def test_lines_that_move(xml: str, data: st.DataObject) -> None:
    """Well-formed more often than the others: elements that are gone, doubled or elsewhere."""
    lines = xml.splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        line = lines[data.draw(st.integers(0, len(lines) - 1))]
        if data.draw(st.booleans()):
            lines.remove(line)
        if data.draw(st.booleans()):
            lines.insert(data.draw(st.integers(0, len(lines))), line)
    survives("\n".join(lines))
