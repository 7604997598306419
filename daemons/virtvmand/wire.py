"""Packets of libvirt's RPC (virnetprotocol): the header, a reader that bounds what it holds, errors. Pure: no I/O.

A packet is a length that includes itself, six words, and a payload; all big-endian. Programs, types and statuses are
libvirt's numbers.
"""

import struct
from typing import NamedTuple

from virtvmand.errors import LibvirtError
from virtvmand.xdr import layout

REMOTE, KEEPALIVE = 0x20008086, 0x6B656570
CALL, REPLY, MESSAGE, STREAM = range(4)
OK, ERROR, CONTINUE = range(3)
PING, PONG = 1, 2
VERSION = 1
HEADER_BYTES = 28
MAX_STREAM_BYTES = 256 * 1024 - 4 - 24
"""Of a stream in one packet: the payload that clients of any age take."""
# Level 2 is an error; a domain, a network, three texts and two numbers could follow, which nobody needs.
_ERROR = layout("code:i32 domain:i32 message:str? level:i32 dom:domain? str1:str? str2:str? str3:str? int1:i32 int2:i32 net:network?")  # fmt: skip  # noqa: E501
_HEADER = struct.Struct(">IIIiiIi")
_LENGTH = struct.Struct(">I")


class WireError(ValueError):
    """What came can't be a packet, or is longer than this peer may send: the connection can't go on."""


class Packet(NamedTuple):
    """One packet."""

    program: int
    version: int
    procedure: int
    kind: int
    serial: int
    status: int
    payload: bytes


class Framer:
    """Takes bytes as they come, gives packets. It holds at most one packet and what came behind it in one read.

    ``limit``: the longest packet in bytes, checked before anything is kept for it; it may be changed at any time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._at = 0

    @property
    def held_bytes(self) -> int:
        """What came and was not taken yet."""
        return len(self._buffer) - self._at

    def feed(self, data: bytes) -> None:
        """Keep what came."""
        if self._at:
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def next(self) -> Packet | None:
        """The next packet, or None where it is not there yet.

        Raises:
            WireError: says why.
        """
        buffer, at = self._buffer, self._at
        if len(buffer) - at < 4:
            return None
        length = _LENGTH.unpack_from(buffer, at)[0]
        if not HEADER_BYTES <= length <= self.limit:
            raise WireError(f"a packet of {length} bytes; {HEADER_BYTES} to {self.limit} are allowed here")
        if len(buffer) - at < length:
            return None
        _length, program, version, procedure, kind, serial, status = _HEADER.unpack_from(buffer, at)
        self._at = at + length
        payload = bytes(buffer[at + HEADER_BYTES : at + length])
        return Packet(program, version, procedure, kind, serial, status, payload)


def encode(packet: Packet) -> bytes:
    """The packet as bytes."""
    program, version, procedure, kind, serial, status, payload = packet
    length = HEADER_BYTES + len(payload)
    return _HEADER.pack(length, program, version, procedure, kind, serial, status) + payload


def reply(call: Packet, status: int, payload: bytes) -> bytes:
    """The answer to a call, as bytes."""
    length = HEADER_BYTES + len(payload)
    return _HEADER.pack(length, call.program, call.version, call.procedure, REPLY, call.serial, status) + payload


def error_payload(error: LibvirtError) -> bytes:
    """A refusal: its code and its whole text; the client shows the text as it is."""
    return _ERROR.encode((int(error.code), 0, str(error), 2, None, None, None, None, 0, 0, None))


def read_error(payload: bytes) -> tuple[int, str]:
    """Code and text of a refusal.

    Raises:
        XdrError: it can't be read.
    """
    values = _ERROR.decode(payload)
    return values[0], values[2] or ""
