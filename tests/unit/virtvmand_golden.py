"""Golden bytes of every layout: what real clients and a real libvirtd said, and by hand what was never heard."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from virtvmand.table import PROCEDURES, Procedure
from virtvmand.wire import CALL, ERROR, MESSAGE, REMOTE, REPLY
from virtvmand.xdr import DOUBLE, INT, STRING, ULLONG, Layout, Param

FILE = Path(__file__).parents[1] / "captures/libvirt-9.0.jsonl"
UUID = bytes(range(16))
UUID_HEX = UUID.hex()
DOMAIN = ("vm", UUID, 7)
# A text: how many bytes, the bytes, zeroes up to a word. Then the uuid as it is, then the id.
DOMAIN_HEX = f"00000002 766d0000 {UUID_HEX} 00000007"


@dataclass(frozen=True, slots=True)
class Heard:
    """One packet of the capture, with what the recorder read in its header."""

    sender: str
    program: int
    procedure: int
    kind: int
    status: int
    packet: bytes

    @property
    def payload(self) -> bytes:
        """What follows the header."""
        return self.packet[28:]


@dataclass(frozen=True, slots=True)
class Golden:
    """A layout, and bytes that it must read and write the same."""

    what: str
    layout: Layout
    data: bytes
    values: tuple[Any, ...] | None = None
    """What the bytes say; None where only the bytes are known."""


@cache
def heard() -> tuple[Heard, ...]:
    """The whole capture."""
    found = []
    for line in FILE.read_text(encoding="ascii").splitlines()[1:]:
        one = json.loads(line)
        found.append(
            Heard(
                one["from"],
                one["program"],
                one["procedure"],
                one["kind"],
                one["status"],
                bytes.fromhex(one["packet"]),
            )
        )
    return tuple(found)


def _values(one: Heard) -> Layout | None:
    """The layout of what was heard; None where it is an error, a stream's bytes or another program's."""
    if one.program != REMOTE or one.status == ERROR or one.kind not in {CALL, REPLY, MESSAGE}:
        return None
    procedure = PROCEDURES[one.procedure]
    return procedure.arguments if one.kind == CALL else procedure.returns


@cache
def goldens() -> tuple[Golden, ...]:
    """All that was heard and has a layout, then what is written by hand."""
    found = []
    for number, one in enumerate(heard(), 2):
        if (shape := _values(one)) is not None:
            found.append(
                Golden(f"line {number}: {PROCEDURES[one.procedure].name} of the {one.sender}", shape, one.payload)
            )
    for name, side, values, text in BY_HAND:
        procedure = BY_NAME[name]
        shape = procedure.arguments if side == "takes" else procedure.returns
        found.append(Golden(f"{name} {side}, by hand", shape, bytes.fromhex(text), values))
    return tuple(found)


def errors() -> list[Heard]:
    """The refusals that were heard."""
    return [one for one in heard() if one.status == ERROR and one.kind == REPLY]


def words(*numbers: int) -> str:
    """Numbers as words."""
    return " ".join(f"{one:08x}" for one in numbers)


BY_NAME: dict[str, Procedure] = {one.name: one for one in PROCEDURES.values()}
_XML = "0000000b 3c6361702078 3d2731272f 00"
_PARAMS = (
    "00000004  00000001 6e000000 00000001 fffffffe  00000001 74000000 00000004 0000000100000000"
    "  00000001 64000000 00000005 3ff8000000000000  00000001 73000000 00000007 00000005 6162636465000000"
)
BY_HAND: tuple[tuple[str, str, tuple[Any, ...], str], ...] = (
    ("connect_get_uri", "gives", ("vman:///system",), "0000000e 766d616e3a2f2f2f73797374656d0000"),
    ("connect_get_hostname", "gives", ("edge",), "00000004 65646765"),
    ("connect_get_capabilities", "gives", ("<cap x='1'/",), _XML),
    ("connect_get_domain_capabilities", "gives", ("é",), "00000002 c3a90000"),
    (
        "connect_get_domain_capabilities",
        "takes",
        (None, "x86_64", None, "kvm", 2**32 - 1),
        "00000000  00000001 00000006 7838365f36340000  00000000  00000001 00000003 6b766d00  ffffffff",
    ),
    (
        "connect_baseline_cpu",
        "takes",
        (["a", "", "bcde"], 1),
        "00000003  00000001 61000000  00000000  00000004 62636465  00000001",
    ),
    ("connect_baseline_cpu", "gives", ("",), "00000000"),
    ("connect_compare_cpu", "gives", (-1,), "ffffffff"),
    ("node_get_security_model", "gives", ("ab", ""), words(3, 0x61, 0x62, 0, 1, 0)),
    (
        "node_get_info",
        "gives",
        ("x86_64", 2**40 + 1, 4, 2000, 1, 1, 4, 1),
        words(*(ord(one) for one in "x86_64"), *[0] * 26, 256, 1, 4, 2000, 1, 1, 4, 1),
    ),
    ("node_get_cells_free_memory", "gives", ([1, 2**64 - 1],), words(2, 0, 1) + "ffffffffffffffff"),
    ("connect_list_domains", "gives", ([3, -1],), words(2, 3, 0xFFFFFFFF)),
    ("domain_get_autostart_once", "takes", (DOMAIN,), DOMAIN_HEX),
    ("domain_get_autostart_once", "gives", (1,), "00000001"),
    ("domain_set_autostart_once", "takes", (DOMAIN, 1), f"{DOMAIN_HEX} 00000001"),
    ("domain_set_autostart_once", "gives", (), ""),
    ("domain_get_messages", "gives", (["one", "four"],), "00000002 00000003 6f6e6500 00000004 666f7572"),
    ("domain_attach_device", "takes", (DOMAIN, "<a/>"), f"{DOMAIN_HEX} 00000004 3c612f3e"),
    ("domain_detach_device", "takes", (DOMAIN, "<a/>"), f"{DOMAIN_HEX} 00000004 3c612f3e"),
    ("domain_update_device_flags", "takes", (DOMAIN, "<a/>", 2), f"{DOMAIN_HEX} 00000004 3c612f3e 00000002"),
    ("domain_abort_job", "gives", (), ""),
    ("domain_open_channel", "gives", (), ""),
    (
        "domain_list_all_snapshots",
        "gives",
        ([("s", DOMAIN)], 1),
        f"00000001 00000001 73000000 {DOMAIN_HEX} 00000001",
    ),
    (
        "connect_list_all_secrets",
        "gives",
        ([(UUID, 2, "/a")], 1),
        f"00000001  {UUID_HEX} 00000002 00000002 2f610000  00000001",
    ),
    (
        "domain_event_callback_device_removed",
        "gives",
        (3, DOMAIN, "net0"),
        f"00000003 {DOMAIN_HEX} 00000004 6e657430",
    ),
    (
        "domain_event_callback_device_removal_failed",
        "gives",
        (-1, DOMAIN, ""),
        f"ffffffff {DOMAIN_HEX} 00000000",
    ),
    (
        "domain_event_callback_job_completed",
        "gives",
        (
            2,
            DOMAIN,
            [Param("n", INT, -2), Param("t", ULLONG, 2**32), Param("d", DOUBLE, 1.5), Param("s", STRING, "abcde")],
        ),
        f"00000002 {DOMAIN_HEX} {_PARAMS}",
    ),
    ("connect_event_connection_closed", "gives", (2,), "00000002"),
)  # fmt: skip
"""(procedure, ``takes`` or ``gives``, values, bytes): from RFC 4506 and the layouts, word by word."""
