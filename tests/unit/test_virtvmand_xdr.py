"""XDR as libvirt uses it: golden bytes of each type and structure, round trips of every layout, and what is refused."""

import struct
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.virtvmand_golden import DOMAIN, DOMAIN_HEX, UUID, UUID_HEX, words
from virtvmand.table import PROCEDURES
from virtvmand.xdr import (
    BOOLEAN,
    DOUBLE,
    INT,
    LLONG,
    MAX_STRING,
    STRING,
    STRUCTS,
    UINT,
    ULLONG,
    Domain,
    Param,
    XdrError,
    encoded_domain,
    layout,
)

LAYOUTS = sorted({text for one in PROCEDURES.values() for text in (one.takes, one.gives)})
GOLDEN: tuple[tuple[str, Any, str], ...] = (
    ("i32", -2, "fffffffe"),
    ("u32", 2**32 - 2, "fffffffe"),
    ("i64", -2, "fffffffffffffffe"),
    ("u64", 2**63, "8000000000000000"),
    ("f64", -1.5, "bff8000000000000"),
    ("str", "", "00000000"),
    ("str", "a", "00000001 61000000"),
    ("str", "abcd", "00000004 61626364"),
    ("str", "aé€", "00000006 61c3a9e282ac 0000"),
    ("uuid", UUID, UUID_HEX),
    ("opaque<5>", b"\xff\0\xff\0\xff", "00000005 ff00ff00ff 000000"),
    ("char[3]", "ab", words(0x61, 0x62, 0)),
    ("char[3]", "", words(0, 0, 0)),
    ("char<3>", "ab", words(3, 0x61, 0x62, 0)),
    ("char<3>", "", words(1, 0)),
    ("str?", None, "00000000"),
    ("str?", "", "00000001 00000000"),
    ("domain?", None, "00000000"),
    ("domain?", DOMAIN, f"00000001 {DOMAIN_HEX}"),
    ("i32<3>", [], "00000000"),
    ("i32<3>", [1, -1, 0], words(3, 1, 2**32 - 1, 0)),
    ("param", Param("f", INT, -1), "00000001 66000000 00000001 ffffffff"),
    ("param", Param("f", UINT, 2**32 - 1), "00000001 66000000 00000002 ffffffff"),
    ("param", Param("f", LLONG, -1), "00000001 66000000 00000003 ffffffffffffffff"),
    ("param", Param("f", ULLONG, 2**64 - 1), "00000001 66000000 00000004 ffffffffffffffff"),
    ("param", Param("f", DOUBLE, 2.0), "00000001 66000000 00000005 4000000000000000"),
    ("param", Param("f", BOOLEAN, 1), "00000001 66000000 00000006 00000001"),
    ("param", Param("f", STRING, "xyz"), "00000001 66000000 00000007 00000003 78797a00"),
    ("domain", DOMAIN, DOMAIN_HEX),
    ("domain", ("vm", UUID, -1), f"00000002 766d0000 {UUID_HEX} ffffffff"),
    ("network", ("n", UUID), f"00000001 6e000000 {UUID_HEX}"),
    ("storage_pool", ("p", UUID), f"00000001 70000000 {UUID_HEX}"),
    ("nwfilter", ("f", UUID), f"00000001 66000000 {UUID_HEX}"),
    ("domain_snapshot", ("s", DOMAIN), f"00000001 73000000 {DOMAIN_HEX}"),
    ("interface", ("i", "aa:b"), "00000001 69000000 00000004 61613a62"),
    ("node_device", ("d",), "00000001 64000000"),
    ("secret", (UUID, 2, "/"), f"{UUID_HEX} 00000002 00000001 2f000000"),
    ("vcpu", (1, 2, 2**32 + 3, -1), "00000001 00000002 0000000100000003 ffffffff"),
    ("memory_stat", (6, 2**40), "00000006 0000010000000000"),
    ("node_stat", ("user", 5), "00000004 75736572 0000000000000005"),
    ("domain_stats", (DOMAIN, [Param("f", INT, 1)]), f"{DOMAIN_HEX} 00000001 00000001 66000000 00000001 00000001"),
    ("ip_address", (1, "::1", 128), "00000001 00000003 3a3a3100 00000080"),
    (
        "domain_interface",
        ("e", None, [(0, "10.0", 8)]),
        "00000001 65000000 00000000 00000001 00000000 00000004 31302e30 00000008",
    ),
)


@pytest.mark.parametrize(("kind", "value", "text"), GOLDEN)
def test_golden_bytes(kind: str, value: object, text: str) -> None:
    data = bytes.fromhex(text)
    shape = layout(f"one:{kind}")
    assert shape.encode([value]) == data
    assert shape.decode(data) == (value,)
    for end in range(len(data)):
        with pytest.raises(XdrError):
            shape.decode(data[:end])
    with pytest.raises(XdrError, match="left over"):
        shape.decode(data + b"\0")


def test_every_structure_has_golden_bytes() -> None:
    assert set(STRUCTS) <= {kind for kind, _, _ in GOLDEN}


def test_nothing_is_no_bytes() -> None:
    assert layout("").encode(()) == b""
    assert layout("").decode(b"") == ()
    with pytest.raises(XdrError, match="4 bytes are left over after 'nothing'"):
        layout("").decode(b"\0\0\0\0")


def test_a_domain_may_be_bytes_that_were_kept() -> None:
    kept = encoded_domain(*DOMAIN)
    assert kept == bytes.fromhex(DOMAIN_HEX)
    assert layout("doms:domain<2>").encode([[kept, kept]]) == b"\0\0\0\2" + kept + kept
    (dom,) = layout("dom:domain").decode(kept)
    assert isinstance(dom, Domain)
    assert dom.uuid == UUID


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("i32", 2**31, "2147483648"),
        ("u32", -1, "-1"),
        ("u64", 2**64, "18446744073709551616"),
        ("i32", "1", "'1'"),
        ("uuid", b"x" * 15, "16 bytes, not 15"),
        ("opaque<3>", b"abcd", "opaque bytes: 4 is more than 3"),
        ("char[3]", "abc", "characters: 3 is more than 2"),
        ("char<3>", "abc", "characters: 3 is more than 2"),
        ("i32<1>", [1, 2], "a list: 2 is more than 1"),
        ("str", "x" * (MAX_STRING + 1), "a text: 4194305 is more than 4194304"),
    ],
)
def test_values_that_do_not_fit(kind: str, value: object, text: str) -> None:
    with pytest.raises(XdrError, match=text):
        layout(f"one:{kind}").encode([value])


def test_values_that_are_too_few_or_many() -> None:
    with pytest.raises(XdrError, match="1 values for 'a:i32 b:i32'"):
        layout("a:i32 b:i32").encode([1])
    with pytest.raises(XdrError, match="1 values for ''"):
        layout("").encode([1])


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("str", "00000004 61620063", "NUL"),
        ("str", "00000002 c3280000", "not UTF-8"),
        ("str", words(MAX_STRING + 1), "a text: 4194305 is more than 4194304"),
        ("str?", words(2, 0), "an optional value: 2 is more than 1"),
        ("str?", words(0xFFFFFFFF), "more than 1"),
        ("param", words(0, 0, 0), "kind 0"),
        ("param", words(0, 8, 0), "kind 8"),
        ("param", words(0, 0xFFFFFFFF, 0), "kind -1"),
        ("i32<3>", words(4, 1, 1, 1, 1), "a list: 4 is more than 3"),
        ("opaque<3>", words(4, 0), "opaque bytes: 4 is more than 3"),
        ("char<3>", words(4, 0, 0, 0, 0), "characters: 4 is more than 3"),
        ("domain<16384>", words(16384), "end within a list"),
        ("param<262144>", words(262144, 0, 0), "end within a list"),
        ("opaque<8388608>", words(8388608), "end within opaque bytes"),
        ("str", words(MAX_STRING), "end within a text"),
    ],
)
def test_bytes_that_are_refused(kind: str, text: str, why: str) -> None:
    with pytest.raises(XdrError, match=why):
        layout(f"one:{kind}").decode(bytes.fromhex(text))


@pytest.mark.parametrize("text", ["one", "one:", "one:i33", "one:i32<", "one:str??", "one:str<3", ":str", "one:nobody"])
def test_a_layout_that_is_none(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        layout(text)


# Values of a type, from its text: written again here, so that a fault in reading layouts is not in both.
_I32, _U32 = st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1)
_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)
_NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "i32": _I32,
    "u32": _U32,
    "i64": st.integers(-(2**63), 2**63 - 1),
    "u64": st.integers(0, 2**64 - 1),
    "f64": st.floats(allow_nan=False),
}
_PARAMETERS = {INT: "i32", UINT: "u32", LLONG: "i64", ULLONG: "u64", DOUBLE: "f64", BOOLEAN: "i32", STRING: "str"}


def of_type(text: str) -> st.SearchStrategy[Any]:  # noqa: PLR0911 - a case each
    if text.endswith("?"):
        return st.none() | of_type(text[:-1])
    if text.endswith(">"):
        base, _, most = text[:-1].partition("<")
        if base == "opaque":
            return st.binary(max_size=min(int(most), 9))
        if base == "char":
            return st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=int(most) - 1)
        return st.lists(of_type(base), max_size=min(int(most), 3))
    if text.endswith("]"):
        return st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=int(text[5:-1]) - 1)
    if text in _NUMBERS:
        return _NUMBERS[text]
    if text == "param":
        return st.one_of([st.builds(Param, _TEXTS, st.just(kind), of_type(one)) for kind, one in _PARAMETERS.items()])
    simple = {"str": _TEXTS, "uuid": st.binary(min_size=16, max_size=16)}
    return simple[text] if text in simple else of_layout(STRUCTS[text])


def of_layout(text: str) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(*(of_type(one.partition(":")[2]) for one in text.split()))


@pytest.mark.parametrize("text", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_round_trip(text: str, data: st.DataObject) -> None:
    values = data.draw(of_layout(text))
    shape = layout(text)
    encoded = shape.encode(values)
    assert shape.decode(encoded) == values
    assert len(encoded) % 4 == 0
    assert len(encoded) >= shape.least
    if encoded:
        cut = data.draw(st.integers(0, len(encoded) - 1))
        with pytest.raises(XdrError):
            shape.decode(encoded[:cut])


@settings(max_examples=500, deadline=None)
@given(text=st.sampled_from(LAYOUTS), data=st.binary(max_size=120))
def test_any_bytes_are_values_or_refused(text: str, data: bytes) -> None:
    shape = layout(text)
    try:
        values = shape.decode(data)
    except XdrError:
        return
    # Padding is not looked at, as libvirt does not; everything else is what the values say.
    assert len(shape.encode(values)) <= len(data) or "char<" in text


def test_a_long_list_costs_what_its_bytes_do() -> None:
    """The longest that any layout allows, all there: at most some 20 bytes of ours for one of the client's."""
    least = struct.pack(">I", 0) + UUID + struct.pack(">i", -1)
    data = words(16384) + (least * 16384).hex()
    (doms,) = layout("doms:domain<16384>").decode(bytes.fromhex(data))
    assert len(doms) == 16384
    assert sum(sys.getsizeof(one) + sys.getsizeof(one.uuid) for one in doms[:100]) < 100 * 20 * len(least)
