"""XDR (RFC 4506) as libvirt's RPC uses it: layouts as short texts, compiled into codecs. Pure: no I/O, no await.

``layout("dom:domain flags:u32")`` reads and writes two values. A type is one of

- ``i32 u32 i64 u64 f64``: numbers, big-endian; everything shorter travels as ``i32`` or ``u32``
- ``str``: a count, UTF-8, zeroes up to a multiple of four; ``uuid``: 16 bytes; ``opaque<N>``: at most N bytes
- ``char[N]``: a text in exactly N bytes, each a word of its own (libvirt's ``char model[32]``); ``char<N>``: counted
- ``T?``: 0, or 1 and a T, None or a value; ``T<N>``: a count, at most N, and so many T, as a list
- a name of `STRUCTS`: its fields, as a tuple; ``param``: a `Param`

Nothing is allocated for what a count promises before the bytes are there.
"""

import re
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

MAX_STRING = 4 * 1024 * 1024
_WORD = struct.Struct(">I")
_ID = struct.Struct(">i")
_FIELD = re.compile(r"(?P<name>\w+):(?P<type>\S+)")
_TYPE = re.compile(r"(?P<base>\w+?)(?:(?P<optional>\?)|<(?P<most>\d+)>|\[(?P<exact>\d+)\])?")
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")

STRUCTS = {
    "domain": "name:str uuid:uuid id:i32",
    "network": "name:str uuid:uuid",
    "storage_pool": "name:str uuid:uuid",
    "nwfilter": "name:str uuid:uuid",
    "domain_snapshot": "name:str dom:domain",
    "interface": "name:str mac:str",
    "node_device": "name:str",
    "secret": "uuid:uuid usageType:i32 usageID:str",
    "vcpu": "number:u32 state:i32 cpu_time:u64 cpu:i32",
    "memory_stat": "tag:i32 val:u64",
    "node_stat": "field:str value:u64",
    "domain_stats": "dom:domain params:param<262144>",
    "ip_address": "type:i32 addr:str prefix:u32",
    "domain_interface": "name:str hwaddr:str? addrs:ip_address<2048>",
}
"""Structures by name (remote_protocol's ``nonnull_domain`` and so on)."""


class XdrError(ValueError):
    """Bytes that are not what the layout says, or a value that the layout can't carry."""


class Domain(NamedTuple):
    """How a client names a domain. Only the uuid counts: name and id may be those of earlier."""

    name: str
    uuid: bytes
    id: int


INT, UINT, LLONG, ULLONG, DOUBLE, BOOLEAN, STRING = range(1, 8)
"""Kinds of a typed parameter (virTypedParameterType)."""


class Param(NamedTuple):
    """A typed parameter."""

    field: str
    kind: int
    value: int | float | str


Put = Callable[[bytearray, Any], None]
Take = Callable[[bytes, int], tuple[Any, int]]


class Codec(NamedTuple):
    """Writes a value at the end of a buffer; reads one at an offset and says where it ends."""

    put: Put
    take: Take
    least: int
    """Bytes that the shortest value takes: what a count may promise."""


class Layout:
    """The arguments of a call, or the values of an answer."""

    def __init__(self, text: str) -> None:
        fields = [_FIELD.fullmatch(one) for one in text.split()]
        if None in fields:
            raise ValueError(f"a layout is NAME:TYPE ...: {text!r}")
        self.text = text
        self._codecs = tuple(codec(one["type"]) for one in fields if one)
        self.least = sum(one.least for one in self._codecs)

    def encode(self, values: Sequence[Any]) -> bytes:
        """The values as bytes.

        Raises:
            XdrError: a value does not fit the layout; the text names it.
        """
        out = bytearray()
        if len(values) != len(self._codecs):
            raise XdrError(f"{len(values)} values for {self.text!r}")
        for one, value in zip(self._codecs, values, strict=True):
            one.put(out, value)
        return bytes(out)

    def decode(self, data: bytes) -> tuple[Any, ...]:
        """The values of all the bytes.

        Raises:
            XdrError: something is missing, too long or left over.
        """
        values, at = self.take(data, 0)
        if at != len(data):
            raise XdrError(f"{len(data) - at} bytes are left over after {self.text or 'nothing'!r}")
        return values

    def put(self, out: bytearray, values: Sequence[Any]) -> None:
        """Append the values."""
        for one, value in zip(self._codecs, values, strict=True):
            one.put(out, value)

    def take(self, data: bytes, at: int) -> tuple[tuple[Any, ...], int]:
        """The values from an offset, and where they end."""
        values = []
        for one in self._codecs:
            value, at = one.take(data, at)
            values.append(value)
        return tuple(values), at


@cache
def layout(text: str) -> Layout:
    """The codec of a layout."""
    return Layout(text)


@cache
def codec(text: str) -> Codec:
    """The codec of a type."""
    found = _TYPE.fullmatch(text)
    if found is None:
        raise ValueError(f"no type: {text!r}")
    base = found["base"]
    if found["exact"]:
        return _characters(int(found["exact"]), exact=True)
    if found["most"]:
        most = int(found["most"])
        return _characters(most) if base == "char" else _opaque(most) if base == "opaque" else _array(codec(base), most)
    one = _BASE[base] if base in _BASE else _struct(base)
    return _optional(one) if found["optional"] else one


def encoded_domain(name: str, uuid: bytes, domain_id: int) -> bytes:
    """A ``domain`` as bytes, which answers are made of."""
    return layout(STRUCTS["domain"]).encode((name, uuid, domain_id))


def _missing(what: str) -> XdrError:
    return XdrError(f"the bytes end within {what}")


def _number(form: str) -> Codec:
    shape = struct.Struct(f">{form}")
    pack, unpack, size = shape.pack, shape.unpack_from, shape.size

    def put(out: bytearray, value: Any) -> None:
        try:
            out += pack(value)
        except struct.error as error:
            raise XdrError(f"{value!r}: {error}") from None

    def take(data: bytes, at: int) -> tuple[Any, int]:
        if at + size > len(data):
            raise _missing("a number")
        return unpack(data, at)[0], at + size

    return Codec(put, take, size)


def _count(data: bytes, at: int, most: int, least: int, what: str) -> tuple[int, int]:
    """A count that is possible: not above its maximum, and not of more than there are bytes."""
    if at + 4 > len(data):
        raise _missing(what)
    count = _WORD.unpack_from(data, at)[0]
    if count > most:
        raise XdrError(f"{what}: {count} is more than {most}")
    if count * least > len(data) - at - 4:
        raise _missing(what)
    return count, at + 4


def _bytes(out: bytearray, value: bytes, most: int, what: str) -> None:
    if len(value) > most:
        raise XdrError(f"{what}: {len(value)} is more than {most}")
    out += _WORD.pack(len(value))
    out += value
    out += _PAD[len(value) % 4]


def _counted(data: bytes, at: int, most: int, what: str) -> tuple[bytes, int]:
    count, at = _count(data, at, most, 1, what)
    end = at + count
    padded = end + -count % 4
    if padded > len(data):
        raise _missing(what)
    return data[at:end], padded


def _put_string(out: bytearray, value: Any) -> None:
    _bytes(out, value.encode(errors="replace"), MAX_STRING, "a text")


def _take_string(data: bytes, at: int) -> tuple[str, int]:
    raw, at = _counted(data, at, MAX_STRING, "a text")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise XdrError("a text is not UTF-8") from None
    if "\0" in text:
        raise XdrError("a text has a NUL in it")
    return text, at


def _opaque(most: int) -> Codec:
    return Codec(
        lambda out, value: _bytes(out, value, most, "opaque bytes"),
        lambda data, at: _counted(data, at, most, "opaque bytes"),
        4,
    )


def _put_uuid(out: bytearray, value: Any) -> None:
    if len(value) != 16:
        raise XdrError(f"a uuid has 16 bytes, not {len(value)}")
    out += value


def _take_uuid(data: bytes, at: int) -> tuple[bytes, int]:
    if at + 16 > len(data):
        raise _missing("a uuid")
    return data[at : at + 16], at + 16


def _characters(most: int, *, exact: bool = False) -> Codec:
    """``char``: XDR has no bytes below a word, so each character takes one. A NUL ends them, also counted ones: clients
    copy up to it."""

    def put(out: bytearray, value: Any) -> None:
        raw = value.encode("ascii", errors="replace")
        if len(raw) >= most:
            raise XdrError(f"characters: {len(raw)} is more than {most - 1}")
        if not exact:
            out += _WORD.pack(len(raw) + 1)
        for one in raw.ljust(most if exact else len(raw) + 1, b"\0"):
            out += _WORD.pack(one)

    def take(data: bytes, at: int) -> tuple[str, int]:
        count = most
        if not exact:
            count, at = _count(data, at, most, 4, "characters")
        if at + 4 * count > len(data):
            raise _missing("characters")
        raw = bytes(one & 0xFF for one in struct.unpack_from(f">{count}I", data, at))
        return raw.rstrip(b"\0").decode("ascii", errors="replace"), at + 4 * count

    return Codec(put, take, 4 * most if exact else 4)


def _optional(one: Codec) -> Codec:
    def put(out: bytearray, value: Any) -> None:
        out += _WORD.pack(value is not None)
        if value is not None:
            one.put(out, value)

    def take(data: bytes, at: int) -> tuple[Any, int]:
        there, at = _count(data, at, 1, one.least, "an optional value")
        return one.take(data, at) if there else (None, at)

    return Codec(put, take, 4)


def _array(one: Codec, most: int) -> Codec:
    def put(out: bytearray, value: Any) -> None:
        if len(value) > most:
            raise XdrError(f"a list: {len(value)} is more than {most}")
        out += _WORD.pack(len(value))
        for each in value:
            one.put(out, each)

    def take(data: bytes, at: int) -> tuple[list[Any], int]:
        count, at = _count(data, at, most, one.least, "a list")
        values = []
        for _ in range(count):
            value, at = one.take(data, at)
            values.append(value)
        return values, at

    return Codec(put, take, 4)


def _struct(name: str) -> Codec:
    fields = layout(STRUCTS[name])

    def put(out: bytearray, value: Any) -> None:
        if isinstance(value, bytes):  # encoded before, and kept
            out += value
        else:
            fields.put(out, value)

    return Codec(put, _take_domain if name == "domain" else fields.take, fields.least)


def _take_domain(data: bytes, at: int) -> tuple[Domain, int]:
    """As the layout says; it is in nearly every call."""
    name, at = _take_string(data, at)
    end = at + 20
    if end > len(data):
        raise _missing("a domain")
    return Domain(name, data[at : end - 4], _ID.unpack_from(data, end - 4)[0]), end


def _put_param(out: bytearray, value: Any) -> None:
    _put_string(out, value.field)
    out += _WORD.pack(value.kind)
    _PARAM[value.kind].put(out, value.value)


def _take_param(data: bytes, at: int) -> tuple[Param, int]:
    field, at = _take_string(data, at)
    kind, at = _BASE["i32"].take(data, at)
    if kind not in _PARAM:
        raise XdrError(f"a typed parameter of kind {kind}")
    value, at = _PARAM[kind].take(data, at)
    return Param(field, kind, value), at


_BASE = {
    "i32": _number("i"),
    "u32": _number("I"),
    "i64": _number("q"),
    "u64": _number("Q"),
    "f64": _number("d"),
    "str": Codec(_put_string, _take_string, 4),
    "uuid": Codec(_put_uuid, _take_uuid, 16),
    "param": Codec(_put_param, _take_param, 12),
}
_KINDS: dict[int, str] = {
    INT: "i32",
    UINT: "u32",
    LLONG: "i64",
    ULLONG: "u64",
    DOUBLE: "f64",
    BOOLEAN: "i32",
    STRING: "str",
}
_PARAM = {kind: _BASE[name] for kind, name in _KINDS.items()}
