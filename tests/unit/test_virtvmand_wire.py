"""Packets: the header's golden bytes, what real ones say, every way to cut them up, and lengths that are lies."""

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.virtvmand_golden import Heard, errors, heard
from virtvmand import wire
from virtvmand.errors import Code, LibvirtError
from virtvmand.wire import Framer, Packet, WireError, encode, error_payload, read_error
from virtvmand.xdr import XdrError

LIMIT = 32 * 1024 * 1024 + 4
"""The longest that libvirt's own peers take."""
# length, program, version, procedure, kind, serial, status: each a word, and the payload.
GOLDEN = bytes.fromhex("00000020 20008086 00000001 0000003c 00000000 00000007 00000000 0000000a")
CALL = Packet(wire.REMOTE, 1, 60, wire.CALL, 7, wire.OK, b"\0\0\0\n")
PING = bytes.fromhex("0000001c 6b656570 00000001 00000001 00000002 00000000 00000000")
# code, domain, there is a text of 9 bytes, level; no domain, no texts, two zeroes, no network.
REFUSAL = bytes.fromhex(
    "0000002a 00000000  00000001 00000009 6e6f20646f6d61696e 000000  00000002"
    "  00000000  00000000 00000000 00000000  00000000 00000000  00000000"
)


def packets(data: bytes, *, limit: int = LIMIT) -> list[Packet]:
    framer = Framer(limit)
    framer.feed(data)
    return list(iter(framer.next, None))


def test_golden_bytes() -> None:
    assert encode(CALL) == GOLDEN
    assert packets(GOLDEN) == [CALL]
    ping = Packet(wire.KEEPALIVE, 1, wire.PING, wire.MESSAGE, 0, wire.OK, b"")
    assert encode(ping) == PING
    assert packets(PING) == [ping]


def test_numbers_with_a_sign() -> None:
    """Procedure, kind and status may be anything in 32 bits; what they mean is looked up later."""
    data = bytes.fromhex("0000001c ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff")
    assert packets(data) == [Packet(2**32 - 1, 2**32 - 1, -1, -1, 2**32 - 1, -1, b"")]
    assert encode(packets(data)[0]) == data


@pytest.mark.parametrize("one", heard(), ids=lambda one: f"{one.sender}-{one.procedure}-{one.kind}-{one.status}")
def test_what_was_heard(one: Heard) -> None:
    (packet,) = packets(one.packet)
    assert packet.version == wire.VERSION
    assert (packet.program, packet.procedure, packet.kind, packet.status) == (
        one.program,
        one.procedure,
        one.kind,
        one.status,
    )
    assert packet.payload == one.payload
    assert encode(packet) == one.packet


def test_the_capture_has_every_kind() -> None:
    kinds = {(one.sender, one.kind, one.status) for one in heard()}
    assert {
        ("client", wire.CALL, wire.OK),
        ("server", wire.REPLY, wire.OK),
        ("server", wire.REPLY, wire.ERROR),
    } <= kinds
    assert {("server", wire.MESSAGE, wire.OK), ("server", wire.STREAM, wire.CONTINUE)} <= kinds
    assert {("client", wire.STREAM, wire.CONTINUE), ("client", wire.STREAM, wire.OK)} <= kinds
    keepalive = {(one.sender, one.procedure) for one in heard() if one.program == wire.KEEPALIVE}
    assert keepalive == {(side, what) for side in ("client", "server") for what in (wire.PING, wire.PONG)}


def test_a_refusal() -> None:
    plain = error_payload(LibvirtError(Code.NO_DOMAIN, "no domain"))
    assert plain == REFUSAL
    assert read_error(plain) == (42, "no domain")
    for end in range(len(plain)):
        with pytest.raises(XdrError):
            read_error(plain[:end])


@pytest.mark.parametrize("one", errors(), ids=lambda one: str(one.procedure))
def test_refusals_that_were_heard(one: Heard) -> None:
    values = wire._ERROR.decode(one.payload)
    assert wire._ERROR.encode(values) == one.payload
    code, text = read_error(one.payload)
    assert code > 0
    assert text
    assert values[3] == 2  # an error, not a warning
    for end in range(len(one.payload)):
        with pytest.raises(XdrError):
            read_error(one.payload[:end])


def test_half_packets_wait() -> None:
    for end in range(len(GOLDEN)):
        framer = Framer(LIMIT)
        framer.feed(GOLDEN[:end])
        assert framer.next() is None
        assert framer.held_bytes == end
        framer.feed(GOLDEN[end:])
        assert framer.next() == CALL
        assert framer.held_bytes == 0


def test_byte_by_byte() -> None:
    data = b"".join(one.packet for one in heard())
    framer = Framer(LIMIT)
    found = []
    for at in range(len(data)):
        framer.feed(data[at : at + 1])
        while (one := framer.next()) is not None:
            found.append(one)
    assert [encode(one) for one in found] == [one.packet for one in heard()]
    assert framer.held_bytes == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_in_pieces_of_any_size(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - reproducible on purpose
    told = dice.sample(heard(), 20)
    data = b"".join(one.packet for one in told)
    framer = Framer(LIMIT)
    found = []
    at = 0
    while at < len(data):
        size = dice.choice((1, 3, 4, 27, 28, 29, 100, 1000))
        framer.feed(data[at : at + size])
        at += size
        if dice.randrange(2):  # they need not be taken at once
            while (one := framer.next()) is not None:
                found.append(encode(one))
    found += [encode(one) for one in iter(framer.next, None)]
    assert found == [one.packet for one in told]


@pytest.mark.parametrize("length", [0, 1, 4, 27, LIMIT + 1, LIMIT + 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_length_that_is_a_lie_is_refused_by_its_four_bytes(length: int) -> None:
    framer = Framer(LIMIT)
    framer.feed(struct.pack(">I", length))
    with pytest.raises(WireError, match=f"a packet of {length} bytes; 28 to {LIMIT} are allowed here"):
        framer.next()
    assert framer.held_bytes == 4


def test_the_longest_is_allowed() -> None:
    for limit in (28, 100, 4096):
        data = encode(CALL._replace(payload=b"x" * (limit - 28)))
        assert [one.payload for one in packets(data, limit=limit)] == [b"x" * (limit - 28)]
        with pytest.raises(WireError, match=f"28 to {limit} are allowed"):
            packets(encode(CALL._replace(payload=b"x" * (limit - 27))), limit=limit)


def test_the_limit_counts_from_the_next_packet() -> None:
    framer = Framer(40)
    framer.feed(GOLDEN + GOLDEN)
    assert framer.next() == CALL
    framer.limit = 28
    with pytest.raises(WireError):
        framer.next()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    framer = Framer(1000)
    framer.feed(data)
    taken = 0
    try:
        while (one := framer.next()) is not None:
            taken += len(encode(one))
    except WireError:
        pass
    assert taken + framer.held_bytes == len(data)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Packet,
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(-(2**31), 2**31 - 1),
        st.binary(max_size=99),
    )
)
def test_round_trip(packet: Packet) -> None:
    assert packets(encode(packet) * 2) == [packet, packet]
