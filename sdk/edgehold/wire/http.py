"""HTTP for daemons: an aiohttp application with our errors, roles, health and metrics, served on a unix socket."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import cast

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from edgehold.errors import BadRequestError, EdgeholdError, NotFoundError
from edgehold.wire.control import bind_unix
from edgehold.wire.peer import Peer, Role, Roles, peer_of, require

MAX_BODY_BYTES = 64 * 1024
MAX_CONNECTIONS = 256
"""Of all users together; the last `ROOT_CONNECTIONS` of them are root's and the daemon's own user's."""
ROOT_CONNECTIONS = 16
MAX_CONNECTIONS_OF_A_USER = 64
REQUEST_ID = "c1c6b0f2a5b84f0a9f6d2f3f5f0f6a11"
"""MESSAGE_ID of a request that changes something."""

# The creation time of each counter as a gauge of its own doubles the page and tells nobody anything here.
disable_created_metrics()  # type: ignore[no-untyped-call]

PEER: web.RequestKey[Peer] = web.RequestKey("peer", Peer)
Health = Callable[[], None]
Route = tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]

_STATUS = {
    "bad-request": 400,
    "denied": 403,
    "not-found": 404,
    "bad-state": 409,
    "no-capacity": 409,
    "failed": 502,
    "unsupported": 501,
    "timeout": 504,
    "unavailable": 503,
}


def answer(value: object, *, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def refusal(error: EdgeholdError, *, status: int | None = None) -> web.Response:
    """An error as its wire form, with the HTTP status that fits its code."""
    return answer(error.to_wire(), status=status or _STATUS.get(error.code, 500))


def application(
    routes: Iterable[Route], *, roles: Roles, registry: CollectorRegistry, health: Health
) -> web.Application:
    """An application with ``/healthz`` and ``/metrics`` beside the daemon's own routes.

    GET and HEAD need the role read, everything else operate; ``/healthz`` only the socket's file mode. ``health``
    raises an `EdgeholdError` that says what is wrong, or returns.
    """

    @web.middleware
    async def boundary(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            connection = request.get_extra_info("socket")
            if connection is not None and connection.family == socket.AF_UNIX and request.path != "/healthz":
                peer = peer_of(connection)
                request[PEER] = peer
                needed = Role.READ if request.method in {"GET", "HEAD"} else Role.OPERATE
                require(roles.role_of(peer), needed, f"{request.method} {request.path}")
            answered = await handler(request)
        except EdgeholdError as error:
            _note(request, error.code)
            return refusal(error)
        except web.HTTPException as error:
            code = {404: "not-found", 405: "bad-request"}.get(error.status, "bad-request")
            text = f"{request.method} {request.path[:200]}: {error.reason}"
            refused = refusal(EdgeholdError(text, code=code), status=error.status)
            if allowed := error.headers.get("Allow"):  # RFC 9110, 15.5.6
                refused.headers["Allow"] = allowed
            return refused
        _note(request, "done")
        return answered

    async def healthz(_request: web.Request) -> web.Response:
        health()
        return web.Response(text="ok\n")

    async def metrics(request: web.Request) -> web.Response:
        encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encoder(registry), headers={"Content-Type": content_type})

    app = web.Application(middlewares=[boundary], client_max_size=MAX_BODY_BYTES)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/metrics", metrics)
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
    return app


def number(request: web.Request, name: str) -> int:
    """A number from the path.

    Raises:
        NotFoundError: it is none, so nothing has that name.
    """
    text = request.match_info[name]
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise NotFoundError(f"{name} {text[:40]!r}: not a number")
    return int(text)


def _note(request: web.Request, outcome: str) -> None:
    """Who asked for a change, and what came of it. What could not even be read changes nothing and fills no log."""
    if request.method not in {"GET", "HEAD"} and outcome != "bad-request" and PEER in request:
        peer = request[PEER]
        fields = {"message_id": REQUEST_ID, "outcome": outcome, "peer_uid": peer.uid, "peer_pid": peer.pid}
        _log.info("%s %s by %s: %s", request.method, request.path[:200], peer, outcome, extra=fields)


async def body(request: web.Request) -> bytes:
    """The whole body, at most `MAX_BODY_BYTES`.

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


_log = logging.getLogger(__name__)
_log.addFilter(_is_ours)


class _Doors:
    """Counts connections when they are made: who may do nothing must not hold all the descriptors of a daemon."""

    def __init__(self, handlers: Callable[[], asyncio.BaseProtocol]) -> None:
        self.handlers = handlers
        self._open: dict[asyncio.Transport, int | None] = {}
        """Whose each is; None: not a unix socket's."""
        self._told_full = False

    def admits(self, transport: asyncio.Transport) -> bool:
        """Count the connection; not if it is one too many."""
        # Not is_closing(): one that is closed has its descriptor until the peer has read what is left.
        self._open = {one: uid for one, uid in self._open.items() if one.get_extra_info("socket").fileno() >= 0}
        sock = transport.get_extra_info("socket")
        uid = peer_of(sock).uid if sock.family == socket.AF_UNIX else None
        ours = uid in {0, os.geteuid()}
        full = len(self._open) >= (MAX_CONNECTIONS if ours else MAX_CONNECTIONS - ROOT_CONNECTIONS)
        if uid is not None and not ours:
            full |= list(self._open.values()).count(uid) >= MAX_CONNECTIONS_OF_A_USER
        if full and not self._told_full:
            _log.warning("refusing connections, %d are open; told once until one is accepted again", len(self._open))
        self._told_full = full
        if not full:
            self._open[transport] = uid
        return not full


class _Door(asyncio.Protocol):
    """A connection until it is admitted."""

    def __init__(self, doors: _Doors) -> None:
        self._doors = doors

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = cast("asyncio.Transport", transport)  # create_server's are
        if not self._doors.admits(connection):
            connection.abort()
            return
        handler = self._doors.handlers()
        connection.set_protocol(handler)
        handler.connection_made(connection)


@contextlib.asynccontextmanager
async def serve(app: web.Application, listener: socket.socket | Path, *, mode: int = 0o660) -> AsyncIterator[None]:
    """Serve the application on a listening socket, or on a unix socket made at the path, until the block ends.

    A connection that is one too many (`MAX_CONNECTIONS`, `MAX_CONNECTIONS_OF_A_USER`) is closed at once.
    """
    sock = bind_unix(listener, mode=mode) if isinstance(listener, Path) else listener
    runner = web.AppRunner(app, access_log=None, logger=_log, handle_signals=False, shutdown_timeout=2.0)
    await runner.setup()
    doors = _Doors(cast("web.Server", runner.server))  # set up, it has one
    server: asyncio.Server | None = None
    try:
        server = await asyncio.get_running_loop().create_server(lambda: _Door(doors), sock=sock, backlog=128)
        yield
    finally:
        if server is not None:
            server.close()
        await runner.cleanup()
        sock.close()
        if isinstance(listener, Path):
            listener.unlink(missing_ok=True)  # noqa: ASYNC240 - a name in a tmpfs, at the very end
