"""The control socket's messages as bytes: one JSON object a line. Pure: no I/O, no state.

request  ``{"command": NAME, "args": {…}, "id": N}``   args and id may be left out
answer   ``{"return": …, "id": N}`` or ``{"error": {"code", "message", "retryable"}, "id": N}``
event    ``{"event": NAME, "data": {…}}``

Descriptors travel beside the line that they belong to; an argument that means one is its index among them.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from edgehold.errors import BadRequestError, EdgeholdError

MAX_LINE_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_NAME = 64
# A request id is echoed, so its size is bounded like everything that a peer makes us hold.
MAX_ID = 64

RequestId = int | str | None


@dataclass(frozen=True, slots=True)
class Request:
    """One request that is well-formed; whether its command exists is the handler's business."""

    command: str
    args: dict[str, Any] = field(default_factory=dict)
    id: RequestId = None
    fds: tuple[int, ...] = ()
    """The descriptors that came with it. The server closes them when the handler is done: what is kept is a dup(2)."""


def _depth(value: Any, limit: int) -> None:
    if limit < 0:
        raise BadRequestError(f"the request is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for one in value.values():
            _depth(one, limit - 1)
    elif isinstance(value, list):
        for one in value:
            _depth(one, limit - 1)


def _decode(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise BadRequestError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the line is not JSON: {error}") from None
    except RecursionError:
        raise BadRequestError(f"the request is nested deeper than {MAX_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise BadRequestError(f"a message is a JSON object, not {type(value).__name__}")
    _depth(value, MAX_DEPTH)
    return value


def request_id(value: dict[str, Any]) -> RequestId:
    """The request's id, so that even a refusal can carry it."""
    one = value.get("id")
    if one is None or (isinstance(one, int) and not isinstance(one, bool) and abs(one) < 2**63):
        return one
    if isinstance(one, str) and len(one) <= MAX_ID:
        return one
    raise BadRequestError(f"id: a whole number or a text of at most {MAX_ID} characters")


def decode_request(line: bytes, fds: tuple[int, ...] = ()) -> Request:
    """Read one request; ``fds`` came with its line.

    Raises:
        RefusedRequest: it is not well-formed; the text names the field, the id is kept where it could be read.
    """
    one: RequestId = None
    try:
        value = _decode(line)
        one = request_id(value)
        command = value.get("command")
        if not isinstance(command, str) or not 0 < len(command) <= MAX_NAME:
            raise BadRequestError(f"command: a text of 1 to {MAX_NAME} characters is needed")
        args = value.get("args", {})
        if not isinstance(args, dict):
            raise BadRequestError(f"args: a JSON object is needed, not {type(args).__name__}")
        unknown = sorted(set(value) - {"command", "args", "id"})
        if unknown:
            raise BadRequestError(f"{unknown[0][:MAX_NAME]}: unknown field; a request has command, args and id")
    except BadRequestError as error:
        raise RefusedRequest(error, one) from None
    return Request(command, args, one, fds)


class RefusedRequest(Exception):  # noqa: N818 - it is an answer, not a failure
    """A request that could not be read, with the id to answer it by."""

    def __init__(self, error: EdgeholdError, one: RequestId) -> None:
        super().__init__(str(error))
        self.error = error
        self.id = one


def encode_request(request: Request) -> bytes:
    """One request as a line; its descriptors are the sender's business.

    Raises:
        BadRequestError: the line would be longer than a peer accepts.
    """
    message: dict[str, Any] = {"command": request.command}
    if request.args:
        message["args"] = request.args
    if request.id is not None:
        message["id"] = request.id
    line = msgspec.json.encode(message)
    if len(line) >= MAX_LINE_BYTES:
        raise BadRequestError(f"the request is longer than {MAX_LINE_BYTES} bytes")
    return line + b"\n"


def encode_return(value: Any, one: RequestId) -> bytes:
    """A successful answer as a line."""
    return msgspec.json.encode({"return": value} if one is None else {"return": value, "id": one}) + b"\n"


def encode_error(error: EdgeholdError, one: RequestId) -> bytes:
    """A refusal as a line."""
    wire = error.to_wire()
    return msgspec.json.encode({"error": wire} if one is None else {"error": wire, "id": one}) + b"\n"


def encode_event(name: str, data: Any) -> bytes:
    """An event as a line."""
    return msgspec.json.encode({"event": name, "data": data}) + b"\n"


def decode_answer(line: bytes) -> dict[str, Any]:
    """Read what a server sent: an answer or an event. The server is trusted with size, not with form."""
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the server's line is not JSON: {error}") from None
    if not isinstance(value, dict) or not {"return", "error", "event"} & set(value):
        raise BadRequestError("the server's line is neither an answer nor an event")
    return value
