"""Documents of clients: where each element stands, what is refused, and edits that leave the rest as it was written."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtvmand.errors import Code, LibvirtError
from virtvmand.xmledit import Edits
from virtvmand.xmltree import MAX_BYTES, MAX_DEPTH, MAX_ELEMENTS, Element, attribute, escaped, parse

ODD = """<?xml version='1.0' encoding='latin-1'?>
<!-- a comment > with < signs -->
<a one = "1>2" two='&lt;"'
   three="é">
  text &amp; <![CDATA[<raw>]]>
  <b/><c x='/>'  />
\t<p:d xmlns:p='urn:p' xmlns='urn:e'><e/><p:f></p:f ></p:d>
  <!-- last -->
</a>
<!-- after -->
"""
NAMES = st.sampled_from(["a", "b", "metadata", "x.y", "_z", "é"])
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff"))


def below(element: Element) -> list[Element]:
    return [element, *(two for one in element.children for two in below(one))]


def shape(element: Element) -> object:
    return element.tag, element.attributes, element.text, [shape(one) for one in element.children]


@st.composite
def trees(draw: st.DrawFn, depth: int = 0) -> str:
    tag = draw(NAMES)
    attributes = draw(st.dictionaries(NAMES, TEXTS, max_size=3))
    quotes = draw(st.sampled_from("'\""))
    blank = draw(st.sampled_from([" ", "\n  ", "\t"]))
    start = tag + "".join(f"{blank}{key} ={quotes}{attribute(one)}{quotes}" for key, one in attributes.items())
    inner = draw(st.lists(trees(depth + 1) | TEXTS.map(escaped), max_size=3)) if depth < 3 else []
    return f"<{start}{blank}/>" if not inner else f"<{start}>{''.join(inner)}</{tag}{blank}>"


def test_elements_know_their_place() -> None:
    document = parse(ODD)
    root = document.root
    data = ODD.encode()
    assert document.data == data
    assert root.attributes == {"one": "1>2", "two": '<"', "three": "é"}
    assert root.text.split() == ["text", "&", "<raw>"]
    assert [one.tag for one in below(root)] == ["a", "b", "c", "p:d", "e", "p:f"]
    assert [one.namespace for one in below(root)] == [None, None, None, "urn:p", "urn:e", "urn:p"]
    written = [data[one.begin : one.end].decode() for one in below(root)]
    assert written[1:3] == ["<b/>", "<c x='/>'  />"]
    assert written[4:] == ["<e/>", "<p:f></p:f >"]
    for one in below(root):
        start, end = data[one.begin : one.inner], data[one.inner_end : one.end]
        assert start.startswith(b"<" + one.tag.encode())
        assert start.endswith(b">")
        assert (end == b"") == start.endswith(b"/>")
        assert end == b"" or end.startswith(b"</" + one.tag.encode())
    assert root.find("c") is root.child("c")
    assert root.child("d") is None
    assert root.child("p:d") is None  # a child has no namespace
    assert root.find("c", "x") is None
    assert root.children[2].local == "d"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1, column 1"),
        ("<a>", "line 1, column 4"),
        ("<a>\n<b></a>", "line 2, column 6: mismatched tag"),
        ("<a/><b/>", "line 1, column 5"),
        ("<a b='1' b='2'/>", "duplicate attribute"),
        ("<a>&nbsp;</a>", "undefined entity"),
        ("<!DOCTYPE a><a/>", "<!DOCTYPE>"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "<!DOCTYPE>"),
        ("<!DOCTYPE a SYSTEM 'file:///etc/passwd'><a/>", "<!DOCTYPE>"),
        ("<a>\0</a>", r"U\+0000 at offset 3"),
        ("<a>\ud800</a>", r"U\+D800"),
        ("<a>\ufffe</a>", r"U\+FFFE"),
        ("<a>&#0;</a>", "line 1, column 4"),
        ("<p:a/>", "nothing declares the prefix of 'p:a'"),
        ("<a p:b=''/>", "nothing declares the prefix of 'p:b'"),
        ("<a xmlns:p='urn:p'><b xmlns:p=''><p:c/></b></a>", "nothing declares"),
        ("<a>" * (MAX_DEPTH + 1) + "</a>" * (MAX_DEPTH + 1), f"deeper than {MAX_DEPTH}"),
        ("<a>" + "<b/>" * MAX_ELEMENTS + "</a>", f"more than {MAX_ELEMENTS} elements"),
        ("<a>" + "x" * (MAX_BYTES - 6) + "</a>", "44 KiB"),
        ("<a>" + "é" * (MAX_BYTES // 2) + "</a>", "44 KiB"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(LibvirtError, match=says) as caught:
        parse(text)
    assert caught.value.code is Code.XML_ERROR


@pytest.mark.parametrize(
    "text",
    [
        "<a>" * MAX_DEPTH + "</a>" * MAX_DEPTH,
        "<a>" + "<b/>" * (MAX_ELEMENTS - 1) + "</a>",
        "<a>" + "x" * (MAX_BYTES - 7) + "</a>",
        "\ufeff<a/>",
        "<a xml:lang='en'/>",
        "<a xmlnsx='1'/>",
    ],
)
def test_what_just_fits(text: str) -> None:
    parse(text)


def test_blanks_are_looked_at_once() -> None:
    """Hostile blanks cost no more than others: this would take minutes if they did."""
    text = "<a" + " " * 20000 + "b='" + " " * 20000 + "'><c/></a>"
    document = parse(text)
    edits = Edits(document)
    edits.set_attribute(document.root, "z", "1")
    edits.insert_last(document.root, "<d/>")
    assert shape(parse(edits.text()).root) == (
        "a",
        {"b": " " * 20000, "z": "1"},
        "",
        [("c", {}, "", []), ("d", {}, "", [])],
    )


EDITED = "<a x=\"1\" y = '2'>\n  <!-- c -->\n  <b>old</b>\n\n  <n/>\n  <é k='v'/></a>"


def edited(change: str, *args: str | None) -> str:
    document = parse(EDITED)
    edits = Edits(document)
    root = document.root
    one = root if change.endswith("attribute") else root.child(str(args[0]))
    getattr(edits, change)(one, *(args if one is root else args[1:]))
    text = edits.text()
    parse(text)
    return text


@pytest.mark.parametrize(
    ("change", "was", "becomes"),
    [
        (("set_text", "b", "a<b"), "<b>old</b>", "<b>a&lt;b</b>"),
        (("set_text", "n", "1"), "<n/>", "<n>1</n>"),
        (("set_text", "é", "1"), "<é k='v'/>", "<é k='v'>1</é>"),
        (("set_attribute", "x", "'\"\n"), 'x="1"', "x='&apos;&quot;&#10;'"),
        (("set_attribute", "x", None), ' x="1"', ""),
        (("set_attribute", "y", None), " y = '2'", ""),
        (("set_attribute", "z", "3"), "'2'>", "'2' z='3'>"),
        (("set_attribute", "z", None), "", ""),
        (("remove", "b"), "\n  <b>old</b>", ""),
        (("remove", "n"), "\n\n  <n/>", ""),
        (("insert_after", "b", "<q/>"), "</b>", "</b>\n  <q/>"),
        (("insert_after", "n", "<q/>"), "<n/>", "<n/>\n  <q/>"),
        (("insert_first", "n", "<q/>"), "<n/>", "<n>\n    <q/>\n  </n>"),
        (("insert_last", "b", "<q/>"), "<b>old", "<b>\n    <q/>\n  old"),
        (("rename", "b", "p"), "<b>old</b>", "<p>old</p>"),
        (("rename", "é", "p"), "<é", "<p"),
    ],
)
def test_edits_leave_the_rest(change: tuple[str, ...], was: str, becomes: str) -> None:
    assert edited(*change) == EDITED.replace(was, becomes, 1)


def test_several_edits_at_once() -> None:
    document = parse(EDITED)
    root, edits = document.root, Edits(document)
    edits.insert_first(root, "<first/>")
    edits.insert_last(root, "<last/>")
    edits.set_attribute(root, "z", "1")
    for one in root.children:
        edits.set_text(one, one.tag)
        edits.set_attribute(one, "t", one.tag)
    made = parse(edits.text()).root
    assert [one.tag for one in made.children] == ["first", "b", "n", "é", "last"]
    assert [one.text for one in made.children] == ["", "b", "n", "é", ""]
    assert made.children[3].attributes == {"k": "v", "t": "é"}


@given(trees(), st.data())
def test_any_edit_changes_what_it_says(text: str, data: st.DataObject) -> None:
    document = parse(text)
    assert Edits(document).text() == text
    elements = below(document.root)
    at = data.draw(st.integers(0, len(elements) - 1))
    value, edits = data.draw(TEXTS), Edits(document)
    edits.set_attribute(elements[at], "new", value)
    edits.set_text(elements[at], value)
    changed = parse(edits.text())
    edits = Edits(changed)
    edits.rename(below(changed.root)[at], "renamed")
    made = below(parse(edits.text()).root)
    assert [shape(one) for one in made if one.tag == "renamed"] == [
        ("renamed", elements[at].attributes | {"new": value}, value, [])
    ]
    edits = Edits(document)
    edits.set_attribute(elements[at], "new", value)
    again = parse(edits.text())
    undo = Edits(again)
    undo.set_attribute(below(again.root)[at], "new", None)
    assert undo.text() == text


@given(TEXTS)
def test_escapes_round_trip(text: str) -> None:
    root = parse(f"<a b='{attribute(text)}' c=\"{attribute(text)}\">{escaped(text)}</a>").root
    assert (root.attributes["b"], root.attributes["c"], root.text) == (text, text, text)


@given(st.text() | st.binary().map(lambda one: one.decode("latin-1")) | st.text(alphabet="<>/='\"!-[]&;a b:?\n"))
def test_arbitrary_text_is_refused_in_order(text: str) -> None:
    for one in (text, f"<a>{text}</a>", f"<a {text}/>"):
        with contextlib.suppress(LibvirtError):
            parse(one)
