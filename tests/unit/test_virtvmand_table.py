"""The table of procedures against real bytes: every layout reads and writes what libvirt does, and no part of it."""

import contextlib
import tracemalloc

import pytest

from tests.unit.virtvmand_golden import Golden, goldens, heard
from virtvmand.table import BEFORE_OPEN, NUMBERS, PROCEDURES
from virtvmand.wire import CALL, ERROR, OK, REMOTE
from virtvmand.xdr import XdrError, layout

GOLDENS = goldens()
# A captured list of hundreds of bytes is cut at each of them; longer ones add nothing.
_CUT = 1500
_LIES = (1, 0x7FFFFFFF, 0xFFFFFFFF, 16384, 0x3FFFFF)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda one: one.what)
def test_golden_bytes(golden: Golden) -> None:
    values = golden.layout.decode(golden.data)
    assert golden.layout.encode(values) == golden.data
    if golden.values is not None:
        assert values == golden.values
        assert golden.layout.encode(golden.values) == golden.data


def test_every_layout_has_golden_bytes() -> None:
    """Of each procedure itself: two of the same layout may have their fields in another order at libvirt."""
    proved = {(one.procedure, one.kind == CALL) for one in heard() if one.program == REMOTE and one.status != ERROR}
    by_hand = {one.what for one in GOLDENS if one.values is not None}
    for number, procedure in PROCEDURES.items():
        for takes, side, text in ((True, "takes", procedure.takes), (False, "gives", procedure.gives)):
            known = (number, takes) in proved or f"{procedure.name} {side}, by hand" in by_hand
            assert known or not text or (takes and procedure.event), f"{procedure.name} {side}: {text}"


@pytest.mark.parametrize(
    ("name", "takes", "values"),
    [
        ("node_get_info", False, ("i686", 3145728, 16, 1400, 2, 2, 2, 2)),
        ("domain_get_state", False, (1, 0)),
        ("connect_list_all_domains", True, (1, 3)),
        ("domain_get_xml_desc", True, (("test", bytes.fromhex("6695eb01f6a4830479aa97f2502e193f"), 1), 0)),
        ("connect_supports_feature", True, (10,)),
        ("domain_event_callback_lifecycle", False, None),
    ],
)
def test_what_was_heard_says_what_it_means(name: str, *, takes: bool, values: tuple[object, ...] | None) -> None:
    procedure = PROCEDURES[NUMBERS[name]]
    shape = procedure.arguments if takes else procedure.returns
    said = [
        shape.decode(one.payload)
        for one in heard()
        if (one.program, one.procedure, one.kind == CALL, one.status) == (REMOTE, procedure.number, takes, OK)
    ]
    assert said
    assert values is None or values in said
    if name == "domain_event_callback_lifecycle":
        assert all(callback >= 0 and 0 <= event <= 8 and len(dom.uuid) == 16 for callback, dom, event, _ in said)


@pytest.mark.parametrize("golden", [one for one in GOLDENS if one.data], ids=lambda one: one.what)
def test_cut_at_every_byte(golden: Golden) -> None:
    for end in range(min(len(golden.data), _CUT)):
        with pytest.raises(XdrError):
            golden.layout.decode(golden.data[:end])
    with pytest.raises(XdrError, match="left over"):
        golden.layout.decode(golden.data + b"\0\0\0\0")


def test_a_lie_in_any_word_costs_nothing() -> None:
    """A count that promises what is not there is refused before anything is allocated for it."""
    tracemalloc.start()
    try:
        for golden in GOLDENS:
            data = golden.data
            for at in range(0, min(len(data), 200), 4):
                for lie in _LIES:
                    told = data[:at] + lie.to_bytes(4, "big") + data[at + 4 :]
                    tracemalloc.reset_peak()
                    before = tracemalloc.get_traced_memory()[0]
                    with contextlib.suppress(XdrError):
                        golden.layout.decode(told)
                    assert tracemalloc.get_traced_memory()[1] - before < 4096 + 64 * len(data), (golden.what, at, lie)
    finally:
        tracemalloc.stop()


def test_numbers_and_names_are_each_one_procedure() -> None:
    assert len(NUMBERS) == len(PROCEDURES)
    assert all(PROCEDURES[number].name == name for name, number in NUMBERS.items())
    for one in PROCEDURES.values():
        assert layout(one.takes) is one.arguments
        assert layout(one.gives) is one.returns
        assert not (one.event and (one.takes or one.changes))


def test_nothing_that_changes_is_allowed_before_open() -> None:
    assert {PROCEDURES[one].name for one in BEFORE_OPEN} == {
        "auth_list",
        "connect_supports_feature",
        "connect_open",
        "connect_close",
        "connect_set_identity",
    }
    assert not any(PROCEDURES[one].changes for one in BEFORE_OPEN)


def test_what_changes_is_marked() -> None:
    """By its name, so that a new procedure of this kind can't come without its mark."""
    told = (
        "set_ define create destroy shutdown reboot reset suspend resume attach detach update undefine rename "
        "pin_ inject open_ abort"
    )
    for one in PROCEDURES.values():
        if one.name.removeprefix("domain_").startswith(tuple(told.split())) and one.name.startswith("domain_"):
            assert one.changes, one.name
