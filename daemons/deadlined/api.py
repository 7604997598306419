"""The REST API: routes, and bodies to and from the contract's messages. It decides nothing."""

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from edgehold.api.deadlined import AttachRequest
from edgehold.errors import BadRequestError
from edgehold.wire.http import Route, answer, body, number

if TYPE_CHECKING:
    from deadlined.service import Service

_DECODER = msgspec.json.Decoder(AttachRequest)


def decode(text: bytes) -> AttachRequest:
    """The body of an attach.

    Raises:
        BadRequestError: the text names the field.
    """
    try:
        return _DECODER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is no request to attach: {error}") from None


def _last(request: web.Request) -> int | None:
    text = request.query.get("last")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadRequestError(f"last={text[:40]!r}: not a number of samples")
    return int(text)


def routes(service: "Service") -> list[Route]:
    """What the application serves, beside /healthz and /metrics."""

    async def attach(request: web.Request) -> web.Response:
        return answer(await service.attach(decode(await body(request))), status=201)

    async def list_attachments(_request: web.Request) -> web.Response:
        return answer(service.attachments())

    async def detail(request: web.Request) -> web.Response:
        return answer(service.detail(number(request, "attachment"), _last(request)))

    async def detach(request: web.Request) -> web.Response:
        service.detach(number(request, "attachment"))
        return web.Response(status=204)

    async def capacity(_request: web.Request) -> web.Response:
        return answer(await service.capacity())

    return [
        ("POST", "/v1/attachments", attach),
        ("GET", "/v1/attachments", list_attachments),
        ("GET", "/v1/attachments/{attachment}", detail),
        ("DELETE", "/v1/attachments/{attachment}", detach),
        ("GET", "/v1/capacity", capacity),
    ]
