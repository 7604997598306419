"""Something that is loaded when somebody first asks for it: the HTTP server costs 17 MB of memory.

It must not import what it saves.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from edgehold.wire.control import bind_unix
from edgehold.wire.peer import Roles, socket_mode

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from prometheus_client import CollectorRegistry


async def serve_health(path: Path, roles: Roles, registry: "Callable[[], CollectorRegistry]") -> None:
    """Serve /healthz and /metrics on a unix socket for ever; `edgehold.wire.http` is imported at the first connection.

    ``registry`` imports and makes the daemon's metrics, in a thread of its own. A daemon that answers is well.
    """
    loop = asyncio.get_running_loop()
    listener = bind_unix(path, mode=socket_mode(roles))
    try:
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(listener, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(listener)
        # Some 0.3 s, in which others are to be served.
        http, numbers = await asyncio.to_thread(_load, registry)
        app = http.application([], roles=roles, registry=numbers, health=lambda: None)
        async with http.serve(app, listener):
            await asyncio.Event().wait()
    finally:
        listener.close()
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - one unlink in /run at the very end


def _load(registry: "Callable[[], CollectorRegistry]") -> "tuple[ModuleType, CollectorRegistry]":
    numbers = registry()
    from edgehold.wire import http  # noqa: PLC0415 - what this module is for

    return http, numbers


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
