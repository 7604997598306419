"""The REST API: routes, and bodies to and from the contract's messages. It decides nothing."""

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from deadlined import openapi
from deadlined.config import policy_of
from edgehold.api.deadlined import AttachRequest, Policy
from edgehold.errors import BadRequestError
from edgehold.wire.http import Route, answer, body, number

if TYPE_CHECKING:
    from deadlined.service import Service

_ATTACH = msgspec.json.Decoder(AttachRequest)
_FIELDS = msgspec.json.Decoder(dict[str, Any])


def decode(text: bytes) -> AttachRequest:
    """The body of an attach.

    Raises:
        BadRequestError: the text names the field.
    """
    try:
        return _ATTACH.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is no request to attach: {error}") from None


def policy(given: dict[str, Any], default: Policy) -> Policy:
    """The fields that were given, and the rest of a default. Raises `BadRequestError`: names the field."""
    try:
        return policy_of(given, default)
    except msgspec.ValidationError as error:
        raise BadRequestError(f"policy: {error}") from None


def decode_fields(text: bytes) -> dict[str, Any]:
    """The body of a change. Raises `BadRequestError`."""
    try:
        return _FIELDS.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is no policy: {error}") from None


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

    async def change(request: web.Request) -> web.Response:
        wanted = number(request, "attachment")
        return answer(service.change(wanted, decode_fields(await body(request))))

    async def detach(request: web.Request) -> web.Response:
        service.detach(number(request, "attachment"))
        return web.Response(status=204)

    async def capacity(_request: web.Request) -> web.Response:
        return answer(await service.capacity())

    async def description(_request: web.Request) -> web.Response:
        return web.Response(body=openapi.text().encode(), content_type="application/json")

    return [
        ("POST", "/v1/attachments", attach),
        ("GET", "/v1/attachments", list_attachments),
        ("GET", "/v1/attachments/{attachment}", detail),
        ("PATCH", "/v1/attachments/{attachment}", change),
        ("DELETE", "/v1/attachments/{attachment}", detach),
        ("GET", "/v1/capacity", capacity),
        ("GET", "/v1/openapi.json", description),
    ]
