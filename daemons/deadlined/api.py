"""The REST API: routes, and bodies to and from the contract's messages. It decides nothing."""

import logging
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from edgehold.api.deadlined import AttachRequest
from edgehold.errors import BadRequestError
from edgehold.wire.http import Route, answer, number

if TYPE_CHECKING:
    from deadlined.service import Service

_DECODER = msgspec.json.Decoder(AttachRequest)


def decode(body: bytes) -> AttachRequest:
    """The body of an attach.

    Raises:
        BadRequestError: the text names the field.
    """
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is no request to attach: {error}") from None


async def body_of(request: web.Request) -> bytes:
    """The whole body.

    Raises:
        BadRequestError: it broke off in the middle: the peer left, or sent what is no body. Its fault, not ours.
    """
    try:
        return await request.read()
    except (ConnectionError, web.RequestPayloadError) as error:
        raise BadRequestError(f"the body breaks off: {error}") from None


def _is_ours(record: logging.LogRecord) -> bool:
    """Not the traceback that aiohttp logs for each peer that does not speak HTTP: it is told 400, and fills no log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def quiet_about_bad_http() -> None:
    """Keep aiohttp's reports of faults in handlers, drop those of faults in requests."""
    logging.getLogger("aiohttp.server").addFilter(_is_ours)


def routes(service: "Service") -> list[Route]:
    """What the application serves, beside /healthz and /metrics."""

    async def attach(request: web.Request) -> web.Response:
        return answer(await service.attach(decode(await body_of(request))), status=201)

    async def list_attachments(_request: web.Request) -> web.Response:
        return answer(service.attachments())

    async def detail(request: web.Request) -> web.Response:
        return answer(service.detail(number(request, "attachment")))

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
