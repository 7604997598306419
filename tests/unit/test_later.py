"""What is loaded at the first connection: nobody else waits for it."""

import asyncio
import contextlib
import threading
from pathlib import Path

import aiohttp
from prometheus_client import CollectorRegistry

from edgehold.wire import later
from edgehold.wire.peer import Roles


async def test_others_are_served_while_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    loads, loaded, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    def registry() -> CollectorRegistry:
        loop.call_soon_threadsafe(loads.set)
        assert loaded.wait(20), "the loop stands still"
        return CollectorRegistry()

    serving = asyncio.create_task(later.serve_health(path, Roles(), registry))
    async with asyncio.timeout(40), aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        while not path.is_socket():  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0)
        asked = asyncio.create_task(session.get("http://x/healthz"))
        await loads.wait()
        assert not asked.done()
        loaded.set()
        async with await asked as answer:
            assert answer.status == 200
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    assert not path.exists()
