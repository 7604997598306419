"""Domains and what clients are told: every state of a partition, every pair of views."""

import itertools
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import msgspec
import pytest

from edgehold.api.vmand import Mode, Partition, State
from virtvmand import domxml
from virtvmand.domain import AUTOSTART, LIVE, TRANSIENT, XML, YES, Domain, Guest
from virtvmand.errors import Code, LibvirtError
from virtvmand.events import Happening, Lifecycle, MetadataChange, Reboot, What, changes
from virtvmand.xdr import layout

ID, ID_TEXT = 7, "9f0a3d3e-6f1c-4a57-8d23-0f4a6f1b2c3d"
TEXT = (
    f"<domain type='vman'><name>one</name><uuid>{ID_TEXT}</uuid><memory>65536</memory><vcpu>2</vcpu>"
    "<os><type>hvm</type><kernel>/k</kernel></os></domain>"
)
ANNOTATED = {XML: TEXT}


def partition(state: State = State.READY, **rest: Any) -> Partition:
    fields: dict[str, Any] = {"name": "one", "mode": Mode.DEDICATED, "cores": 2, "memory_bytes": 64 << 20} | rest
    if state in {State.DEPLOYED, State.SUSPENDED}:
        fields = {"pid": 100, "arch": "x86_64"} | fields
    return Partition(id=ID, uuid=ID_TEXT, state=state, **fields)


def busy(command: str, **rest: Any) -> Partition:
    return partition(State.BUSY, command=command, **rest)


def guest_busy(command: str) -> Partition:
    return busy(command, pid=100, arch="x86_64")


# What it is.


@pytest.mark.parametrize(
    ("one", "state", "active"),
    [
        (partition(State.READY), (5, 0), False),
        (partition(State.FAILED), (5, 3), False),
        (partition(State.DEPLOYED), (1, 1), True),
        (partition(State.SUSPENDED), (3, 1), True),
        (guest_busy("suspend"), (1, 1), True),
        (guest_busy("reboot"), (1, 1), True),
        (guest_busy("restore"), (3, 1), True),
        (guest_busy("shutdown"), (1, 1), True),
        (busy("shutdown", arch="aarch64"), (1, 1), True),  # a back end without processes
        (busy("shutdown"), (5, 0), False),  # of what FAILED
        (busy("deploy"), (5, 0), False),
        (busy("create-partition"), (5, 0), False),
        (busy("change-partition"), (5, 0), False),
        (busy("destroy-partition"), (5, 0), False),
        (busy("something new"), (5, 0), False),
    ],
)
def test_state_at_first_sight(one: Partition, state: tuple[int, int], active: bool) -> None:
    domain = Domain(one, ANNOTATED)
    assert (domain.state, domain.active, domain.id) == (state, active, ID if active else -1)
    assert domain.ref == layout("dom:domain").encode([("one", UUID(ID_TEXT).bytes, domain.id)])
    assert domain.uuid == UUID(ID_TEXT).bytes


def after(*steps: Partition, destroyed: bool = False) -> Domain:
    """What became of a domain step by step; ``destroyed`` counts for the last."""
    first, *rest = steps
    domain = Domain(first, ANNOTATED)
    for one in rest:
        domain = domain.successor(one, destroyed=destroyed and one is steps[-1])
    return domain


READY, FAILED = partition(), partition(State.FAILED)
RUNS, STANDS, ENDS = partition(State.DEPLOYED), partition(State.SUSPENDED), guest_busy("shutdown")


@pytest.mark.parametrize(
    ("steps", "state", "guest"),
    [
        ([READY, RUNS], (1, 1), Guest.RUNS),
        ([READY, STANDS], (3, 1), Guest.STANDS),
        ([READY, STANDS, RUNS], (1, 5), Guest.RUNS),
        ([RUNS, STANDS, guest_busy("restore"), RUNS], (1, 5), Guest.RUNS),
        ([STANDS, RUNS, guest_busy("suspend")], (1, 5), Guest.RUNS),
        ([RUNS, partition(State.DEPLOYED, reason="x")], (1, 1), Guest.RUNS),
        ([STANDS, RUNS, partition(State.DEPLOYED, boot_count=1)], (1, 1), Guest.RUNS),
        ([RUNS, ENDS, RUNS], (1, 1), Guest.RUNS),
        ([STANDS, RUNS, ENDS, RUNS], (1, 5), Guest.RUNS),
        ([STANDS, ENDS], (3, 1), Guest.STANDS),
        ([STANDS, ENDS, RUNS], (1, 5), Guest.RUNS),
        ([STANDS, ENDS, STANDS], (3, 1), Guest.STANDS),
        ([RUNS, ENDS], (1, 1), Guest.RUNS),
        ([RUNS, ENDS, READY], (5, 1), Guest.OFF),
        ([RUNS, READY], (5, 1), Guest.OFF),
        ([RUNS, partition(reason="ended by force: the guest did not power off within 30 s")], (5, 2), Guest.OFF),
        ([RUNS, FAILED], (5, 3), Guest.OFF),
        ([RUNS, FAILED, busy("shutdown"), READY], (5, 3), Guest.OFF),
        ([RUNS, FAILED, busy("shutdown", arch="x86_64")], (5, 3), Guest.OFF),
        ([RUNS, READY, busy("deploy")], (5, 1), Guest.OFF),
        ([RUNS, READY, busy("deploy"), READY], (5, 1), Guest.OFF),
        ([RUNS, READY, RUNS], (1, 1), Guest.RUNS),
        ([STANDS, busy("destroy-partition", pid=100)], (5, 2), Guest.OFF),
    ],
)
def test_state_after(steps: list[Partition], state: tuple[int, int], guest: Guest) -> None:
    domain = after(*steps)
    assert (domain.state, domain.guest) == (state, guest)


@pytest.mark.parametrize("steps", [[RUNS, READY], [RUNS, ENDS, READY], [STANDS, READY]])
def test_state_of_what_was_destroyed(steps: list[Partition]) -> None:
    assert after(*steps, destroyed=True).state == (5, 2)
    assert after(*steps, destroyed=True).successor(busy("deploy")).state == (5, 2)


def test_that_it_was_destroyed_says_nothing_of_a_failure() -> None:
    assert after(RUNS, FAILED, destroyed=True).state == (5, 3)


def test_annotations() -> None:
    plain = Domain(READY, {})
    assert (plain.persistent, plain.autostart) == (True, False)
    other = Domain(READY, {TRANSIENT: YES, AUTOSTART: YES})
    assert (other.persistent, other.autostart) == (False, True)
    assert Domain(READY, {TRANSIENT: "no", AUTOSTART: "no"}).persistent


def test_what_did_not_change_has_no_successor() -> None:
    domain = Domain(RUNS, ANNOTATED)
    assert domain.successor(msgspec.structs.replace(RUNS), dict(ANNOTATED)) is domain
    assert domain.successor() is domain
    assert repr(domain) == f"<Domain one {ID_TEXT} state=(1, 1) id=7>"


# What it is defined as.


def shared(old: Domain, new: Domain) -> tuple[bool, bool]:
    config, current = old.config, old.current
    made = old.successor(new.partition, new.annotations)
    return made.config is config, made.current is current


def test_definitions_are_shared_as_long_as_their_source_is_the_same() -> None:
    old = Domain(RUNS, {XML: TEXT, LIVE: TEXT.replace(">/k<", ">/live<")})
    assert old.config is not old.current
    assert shared(old, Domain(STANDS, old.annotations)) == (True, True)
    assert shared(old, Domain(RUNS, {**old.annotations, AUTOSTART: YES})) == (True, True)
    assert shared(old, Domain(RUNS, {**old.annotations, XML: TEXT.replace(">/k<", ">/n<")})) == (False, True)
    assert shared(old, Domain(RUNS, {**old.annotations, LIVE: TEXT})) == (True, False)
    assert shared(old, Domain(READY, old.annotations)) == (True, False)
    assert shared(old, Domain(msgspec.structs.replace(RUNS, cores=1), old.annotations)) == (True, True)
    assert shared(old, Domain(msgspec.structs.replace(RUNS, name="x"), old.annotations)) == (False, False)
    plain = Domain(READY, {})
    assert shared(plain, Domain(partition(reason="x"), {})) == (True, True)
    assert shared(plain, Domain(partition(mode=Mode.SHARED), {}))[0] is False


def test_what_is_not_asked_for_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(domxml, "known_definition")
    domain = Domain(RUNS, ANNOTATED).successor(STANDS)
    assert domain.state == (3, 1)
    assert domain.ref


def test_the_definition_of_a_guest_counts_while_it_is_active() -> None:
    notes = {XML: TEXT, LIVE: TEXT.replace(">/k<", ">/live<")}
    assert Domain(RUNS, notes).current.plan.kernel == "/live"
    assert Domain(RUNS, notes).config.plan.kernel == "/k"
    assert Domain(READY, notes).current.plan.kernel == "/k"


@pytest.mark.parametrize("state", [RUNS, READY])
def test_a_transient_domain_has_one_definition(state: Partition) -> None:
    assert Domain(state, {XML: TEXT, TRANSIENT: YES}).config.plan.kernel == "/k"
    undefined = {XML: TEXT, LIVE: TEXT.replace(">/k<", ">/live<"), TRANSIENT: YES}
    assert Domain(state, undefined).config.plan.kernel == "/live"
    assert Domain(state, undefined).current.plan.kernel == "/live"


@pytest.mark.parametrize("text", ["", "<domain", "no XML", "<domain/>", TEXT.replace(ID_TEXT, str(UUID(int=5)))])
def test_a_definition_of_no_use_is_made_of_the_partition(text: str) -> None:
    domain = Domain(RUNS, {XML: text})
    assert (domain.config.plan.name, domain.config.plan.cores, domain.config.plan.uuid) == ("one", 2, ID_TEXT)
    assert "one" in domain.xml()


def test_the_definition_has_the_name_of_the_partition() -> None:
    domain = Domain(partition(name="other"), ANNOTATED)
    assert (domain.config.plan.name, domain.config.plan.kernel) == ("other", "/k")
    assert "<name>other</name>" in domain.xml()
    assert Domain(READY, ANNOTATED).config.xml == TEXT


def test_the_definition_may_be_of_another_size() -> None:
    domain = Domain(partition(cores=3, memory_bytes=128 << 20), ANNOTATED)  # it was changed while a guest ran
    assert (domain.config.plan.cores, domain.config.plan.memory_bytes) == (2, 64 << 20)


def test_xml_by_flags() -> None:
    domain = Domain(RUNS, {XML: TEXT, LIVE: TEXT.replace(">/k<", ">/live<")})
    assert "/live" in domain.xml(0)
    assert domain.xml(0) is domain.xml(1 | 4 | 8)
    assert "/k" in domain.xml(2)
    assert domain.xml(2) is domain.xml(2 | 1)
    assert "id='7'" in domain.xml(0)
    assert "id='7'" not in domain.xml(2)
    off = Domain(READY, ANNOTATED)
    assert off.xml(0) is off.xml(2)
    assert off.xml(0) == TEXT
    with pytest.raises(LibvirtError, match="flags") as caught:
        domain.xml(16)
    assert caught.value.code is Code.INVALID_ARG


# What happened.

VIEWS: dict[str, Domain] = {
    "off": Domain(READY, ANNOTATED),
    "crashed": Domain(FAILED, ANNOTATED),
    "runs": Domain(RUNS, ANNOTATED),
    "stands": Domain(STANDS, ANNOTATED),
    "ends": Domain(ENDS, ANNOTATED),
    "ends from standing": Domain(STANDS, ANNOTATED).successor(ENDS),
}
LIVES = {
    # from: what happens on the way to off, crashed, runs, stands, ends
    "off": ["", "", "started", "started suspended", "started"],
    "crashed": ["", "", "started", "started suspended", "started"],
    "runs": ["shutdown stopped:0", "stopped:2", "", "suspended", ""],
    "stands": ["shutdown stopped:0", "stopped:2", "resumed", "", ""],
    "ends": ["shutdown stopped:0", "stopped:2", "", "suspended", ""],
    "ends from standing": ["shutdown stopped:0", "stopped:2", "resumed", "", ""],
}
TARGETS = ["off", "crashed", "runs", "stands", "ends"]


def told(happenings: tuple[Happening, ...]) -> str:
    words = []
    for one in happenings:
        match one:
            case Lifecycle(event=event, detail=detail):
                named = {What.STARTED, What.SUSPENDED, What.RESUMED, What.SHUTDOWN}
                words.append(event.name.lower() + ("" if event in named else f":{detail}"))
                assert detail == 0 or event not in named
            case Reboot():
                words.append("reboot")
            case MetadataChange(kind=kind, uri=uri):
                words.append(f"metadata:{kind}" + (f":{uri}" if uri else ""))
    return " ".join(words)


def transient(domain: Domain) -> Domain:
    return domain.successor(annotations={XML: TEXT, TRANSIENT: YES})


def test_the_table_has_every_pair() -> None:
    assert LIVES.keys() == VIEWS.keys()
    assert all(len(row) == len(TARGETS) for row in LIVES.values())


@pytest.mark.parametrize("was", [True, False])
@pytest.mark.parametrize("is_now", [True, False])
@pytest.mark.parametrize(("old", "new"), list(itertools.product(VIEWS, TARGETS)))
def test_every_pair_of_views(old: str, new: str, *, was: bool, is_now: bool) -> None:
    """``was``, ``is_now``: persistent."""
    before = VIEWS[old] if was else transient(VIEWS[old])
    now = before.successor(VIEWS[new].partition, ANNOTATED if is_now else {XML: TEXT, TRANSIENT: YES})
    added, removed = ("defined:0" if is_now and not was else ""), ("undefined:0" if was and not is_now else "")
    assert told(changes(before, now)) == " ".join(filter(None, [added, LIVES[old][TARGETS.index(new)], removed]))


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("old", VIEWS)
def test_what_is_gone(old: str, *, persistent: bool) -> None:
    before = VIEWS[old] if persistent else transient(VIEWS[old])
    stopped = "stopped:1" if before.active else ""
    happened = changes(before, None)
    assert told(happened) == " ".join(filter(None, [stopped, "undefined:0" if persistent else ""]))
    assert all(one.domain.id == -1 for one in happened)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("new", TARGETS)
def test_what_appears(new: str, *, persistent: bool) -> None:
    now = VIEWS[new] if persistent else transient(VIEWS[new])
    expected = " ".join(filter(None, ["defined:0" if persistent else "", LIVES["off"][TARGETS.index(new)]]))
    assert told(changes(None, now)) == expected


def test_nothing_was_and_nothing_is() -> None:
    assert changes(None, None) == ()


def test_what_vmand_made_is_not_defined_anew_by_its_guest() -> None:
    off = Domain(READY, {})
    runs = off.successor(partition(State.DEPLOYED, vsock_cid=5))
    assert off.config is not runs.config
    assert told(changes(off, runs)) == "started"
    assert told(changes(runs, runs.successor(READY))) == "shutdown stopped:0"


def test_what_is_destroyed_is_no_shutdown() -> None:
    old = Domain(RUNS, ANNOTATED)
    assert told(changes(old, old.successor(READY, destroyed=True))) == "stopped:1"


def test_ids_that_events_carry() -> None:
    off, runs = Domain(READY, ANNOTATED), Domain(RUNS, ANNOTATED)
    assert [one.domain.id for one in changes(off, off.successor(RUNS))] == [7]
    assert [one.domain.id for one in changes(runs, runs.successor(READY))] == [7, -1]  # shutdown, then stopped


def test_reboot() -> None:
    old = Domain(RUNS, ANNOTATED)
    again = partition(State.DEPLOYED, boot_count=1)
    assert told(changes(old, old.successor(again))) == "reboot"
    stands = partition(State.SUSPENDED, boot_count=1)
    assert told(changes(old, old.successor(stands))) == "reboot suspended"
    assert told(changes(Domain(READY, ANNOTATED), Domain(again, ANNOTATED))) == "started"


def test_another_guest_since_vmand_was_seen_last() -> None:
    old = Domain(RUNS, ANNOTATED)
    other = old.successor(partition(State.SUSPENDED, pid=101, boot_count=1))
    happened = changes(old, other)
    assert told(happened) == "stopped:0 started suspended"
    assert [one.domain.id for one in happened] == [-1, 7, 7]


# What it is defined as, as clients are told.

DESCRIBED = TEXT.replace("</uuid>", "</uuid><title>t</title><description>d</description>")
NOTED = TEXT.replace("</uuid>", "</uuid><metadata><a:x xmlns:a='urn:a'>1</a:x><b:y xmlns:b='urn:b'/></metadata>")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (TEXT, TEXT.replace(">/k<", ">/other<"), "defined:1"),
        (TEXT, TEXT.replace("<os>", "<!-- a word --><os>"), "defined:1"),
        (TEXT, TEXT.replace("type='vman'", "type='kvm'"), "defined:1"),
        (TEXT, DESCRIBED, "metadata:1 metadata:0"),
        (DESCRIBED, TEXT, "metadata:1 metadata:0"),
        (DESCRIBED, DESCRIBED.replace(">t<", ">u<"), "metadata:1"),
        (DESCRIBED, DESCRIBED.replace(">d<", ">e<"), "metadata:0"),
        (DESCRIBED, DESCRIBED.replace(">d<", ">e<").replace(">/k<", ">/other<"), "defined:1"),
        (TEXT, NOTED, "metadata:2:urn:a metadata:2:urn:b"),
        (NOTED, NOTED.replace(">1<", ">2<"), "metadata:2:urn:a"),
        (NOTED, NOTED.replace("<b:y xmlns:b='urn:b'/>", ""), "metadata:2:urn:b"),
        (NOTED, NOTED.replace("<b:y xmlns:b='urn:b'/>", "\n<b:y xmlns:b='urn:b'/>\n"), "defined:1"),
        ("", TEXT, "defined:1"),
        ("nonsense", TEXT, "defined:1"),
    ],
)
@pytest.mark.parametrize("state", [READY, RUNS])
def test_another_definition(state: Partition, old: str, new: str, expected: str) -> None:
    before = Domain(state, {XML: old})
    assert told(changes(before, before.successor(annotations={XML: new}))) == expected


def definitions(*steps: Mapping[str, str], state: Partition = RUNS) -> str:
    first, second = steps
    before = Domain(state, first)
    return told(changes(before, before.successor(annotations=second)))


def test_metadata_of_what_runs() -> None:
    live = TEXT.replace(">/k<", ">/live<")
    noted = live.replace("</uuid>", "</uuid><title>t</title>")
    assert definitions({XML: TEXT, LIVE: live}, {XML: TEXT, LIVE: noted}) == "metadata:1"
    assert definitions({XML: TEXT, LIVE: live}, {XML: DESCRIBED, LIVE: noted}) == "metadata:1 metadata:0"
    assert definitions({XML: TEXT, LIVE: live}, {XML: DESCRIBED, LIVE: noted}, state=READY) == "metadata:1 metadata:0"
    assert definitions({XML: TEXT}, {XML: TEXT, LIVE: DESCRIBED}) == "metadata:1 metadata:0"
    # Redefined: the guest keeps what it had.
    assert definitions({XML: TEXT}, {XML: live, LIVE: TEXT}) == "defined:1"


def test_what_else_is_annotated_is_told_to_nobody() -> None:
    assert definitions({XML: TEXT}, {XML: TEXT, AUTOSTART: YES}) == ""
    assert definitions({XML: TEXT}, {XML: TEXT, "another.tool": "x"}) == ""


def test_rename() -> None:
    before = Domain(READY, ANNOTATED)
    happened = changes(before, before.successor(partition(name="two"), {XML: TEXT.replace(">one<", ">two<")}))
    assert told(happened) == "undefined:1 defined:2"
    assert [one.domain.name for one in happened] == ["one", "two"]


def test_a_change_that_vmand_was_asked_for() -> None:
    for notes, expected in (({}, "defined:1"), (ANNOTATED, "")):
        before = Domain(READY, notes)
        assert told(changes(before, before.successor(partition(cores=3)))) == expected
