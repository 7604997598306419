"""HTTP on a unix socket: errors, roles, health, metrics, limits."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge

from edgehold.errors import BadStateError, UnavailableError
from edgehold.wire import http
from edgehold.wire.peer import Peer, Role, Roles


class Rig:
    def __init__(self, session: aiohttp.ClientSession, path: Path) -> None:
        self.session = session
        self.path = path
        self.sick = False

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, str]:
        async with self.session.request(method, f"http://x{path}", **more) as response:
            return response.status, await response.text()


async def thing(request: web.Request) -> web.Response:
    name = http.number(request, "id")
    if request.method == "POST":
        return http.answer({"got": len(await request.read())})
    raise BadStateError(f"thing {name} is asleep")


class Strangers(Roles):
    """As if a user of the group read had connected."""

    def role_of(self, peer: Peer) -> Role:
        return Role.READ if peer.uid >= 0 else Role.NONE


@pytest_asyncio.fixture(params=[Roles, Strangers])
async def rig(tmp_path: Path, request: Any) -> AsyncIterator[Rig]:
    registry = CollectorRegistry()
    Gauge("edgehold_things", "Things.", registry=registry).set(3)
    path = tmp_path / "api.sock"
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        one = Rig(session, path)

        def health() -> None:
            if one.sick:
                raise UnavailableError("the sampler is late")

        routes: list[http.Route] = [("GET", "/v1/things/{id}", thing), ("POST", "/v1/things/{id}", thing)]
        app = http.application(routes, roles=request.param(), registry=registry, health=health)
        async with http.serve(app, path):
            yield one
    assert not path.exists()


async def test_errors_are_the_wire_form(rig: Rig) -> None:
    status, text = await rig.ask("GET", "/v1/things/7")
    assert (status, json.loads(text)) == (
        409,
        {"code": "bad-state", "message": "thing 7 is asleep", "retryable": False},
    )
    assert (await rig.ask("GET", "/v1/things/x"))[0] == 404
    status, text = await rig.ask("GET", "/nothing")
    assert (status, json.loads(text)["code"]) == (404, "not-found")


async def test_health_and_metrics(rig: Rig) -> None:
    assert await rig.ask("GET", "/healthz") == (200, "ok\n")
    rig.sick = True
    status, text = await rig.ask("GET", "/healthz")
    assert (status, json.loads(text)["message"]) == (503, "the sampler is late")
    status, text = await rig.ask("GET", "/metrics")
    assert status == 200
    assert "edgehold_things 3.0" in text


async def test_roles_and_limits(rig: Rig) -> None:
    status, text = await rig.ask("POST", "/v1/things/7", data=b"x" * 100)
    if status == 403:
        assert "needs the role operate" in text
        return
    assert (status, text) == (200, '{"got":100}')
    assert (await rig.ask("POST", "/v1/things/7", data=b"x" * (http.MAX_BODY_BYTES + 1)))[0] == 413


async def test_a_peer_that_speaks_no_http_is_told_so_and_fills_no_log(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_unix_connection(str(rig.path))
    writer.write(b"\x00nonsense\r\n\r\n")
    assert b"400" in await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
