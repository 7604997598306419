"""The control socket's codec: round trips, golden bytes, every truncation, and garbage of all kinds."""

import contextlib
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgehold.errors import BadStateError
from edgehold.wire.jsonlines import (
    MAX_LINE_BYTES,
    RefusedRequest,
    Request,
    decode_answer,
    decode_request,
    encode_error,
    encode_event,
    encode_request,
    encode_return,
)

GOLDEN = b'{"command":"create-partition","args":{"cores":2,"secure":false,"memsize":1},"id":7}\n'
DEEP = "the request is nested deeper than 16 levels"
REQUEST = Request("create-partition", {"cores": 2, "secure": False, "memsize": 1}, 7)


def refusal(line: bytes) -> RefusedRequest:
    with pytest.raises(RefusedRequest) as caught:
        decode_request(line)
    return caught.value


def test_golden_bytes() -> None:
    assert encode_request(REQUEST) == GOLDEN
    assert decode_request(GOLDEN) == REQUEST
    assert encode_return({"id": 1}, None) == b'{"return":{"id":1}}\n'
    assert encode_return(None, 7) == b'{"return":null,"id":7}\n'
    assert encode_event("partition", {"id": 1}) == b'{"event":"partition","data":{"id":1}}\n'
    assert encode_error(BadStateError("partition 1 is READY"), 7) == (
        b'{"error":{"code":"bad-state","message":"partition 1 is READY","retryable":false},"id":7}\n'
    )


def test_descriptors_travel_beside_the_line() -> None:
    assert decode_request(GOLDEN, (5, 6)) == dataclasses.replace(REQUEST, fds=(5, 6))
    assert encode_request(dataclasses.replace(REQUEST, fds=(5, 6))) == GOLDEN
    assert refusal(b'{"command":"x","fds":[5]}').error.message.startswith("fds: unknown field")


def test_truncation_at_every_byte_is_refused() -> None:
    body = GOLDEN.rstrip()
    for end in range(len(body)):
        assert refusal(body[:end]).error.code == "bad-request"


@pytest.mark.parametrize(
    ("line", "text", "one"),
    [
        (b"[]", "a message is a JSON object, not list", None),
        (b'{"id":3}', "command: a text of 1 to 64 characters is needed", 3),
        (b'{"command":""}', "command: a text of 1 to 64 characters is needed", None),
        (b'{"command":"x","args":3,"id":"a"}', "args: a JSON object is needed, not int", "a"),
        (b'{"command":"x","arg":{},"id":1}', "arg: unknown field; a request has command, args and id", 1),
        (b'{"command":"x","id":1.5}', "id: a whole number or a text of at most 64 characters", None),
        (b'{"command":"x","id":true}', "id: a whole number or a text of at most 64 characters", None),
        (b'{"command":"x","args":' + b'{"a":' * 20 + b"1" + b"}" * 21, DEEP, None),
        (b"[" * 60_000, DEEP, None),
        (b'{"command":"' + b"x" * MAX_LINE_BYTES + b'"}', f"the line is longer than {MAX_LINE_BYTES} bytes", None),
    ],
)  # fmt: skip
def test_refusals_name_the_field(line: bytes, text: str, one: object) -> None:
    refused = refusal(line)
    assert (refused.error.message, refused.id) == (text, one)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
ids = st.none() | st.integers(-(2**63) + 1, 2**63 - 1) | st.text(max_size=64)


@given(
    command=st.text(min_size=1, max_size=64),
    args=st.dictionaries(st.text(max_size=8), json_values, max_size=4),
    one=ids,
)
def test_round_trip(command: str, args: dict[str, object], one: int | str | None) -> None:
    request = Request(command, args, one)
    assert decode_request(encode_request(request)) == request


@settings(max_examples=500)
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda at, byte: GOLDEN[:at] + bytes([byte]) + GOLDEN[at + 1 :], st.integers(0, 80), st.integers(0, 255)
    )
)
def test_any_bytes_are_read_or_refused(line: bytes) -> None:
    with contextlib.suppress(RefusedRequest):
        decode_request(line)


@pytest.mark.parametrize("line", [b"", b"3", b"{}", b'{"x":1}', b"\xff"])
def test_a_server_that_is_none(line: bytes) -> None:
    with pytest.raises(Exception, match="the server's line"):
        decode_answer(line)
