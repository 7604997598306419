"""Clients that say nothing, half of something, or never read: each costs little, is cut off, and nobody else waits.

A real guest prints without end, so that consoles that nobody reads have something to hold.
"""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from edgehold.api.vmand import Mode
from edgehold.testing.capability import need_root
from edgehold.testing.partitions import PrivateVmand
from edgehold.testing.virtvmand import PrivateVirtvmand, private_virtvmand
from tests.integration.rawrpc import ClosedError, RawClient, RefusedError, domain, frame, refusal
from tests.libvirt.guest import printed, type_until
from virtvmand import wire
from virtvmand.table import NUMBERS
from virtvmand.wire import Packet

CMDLINE = "quiet no_timer_check tsc=reliable panic=-1 edgehold.shell=ttyS0"
SMALL = 4096
"""A receive buffer of the kernel's that is full soon."""
MAX_GROWTH_KIB = 12 * 1024
"""By all of them together."""
# The daemon's limits are 30 s (nothing opened, nothing read, nothing answered); a busy host is slow.
CUT_OFF_S = 75.0
OTHERS_S = 2.0
_CONSOLE = NUMBERS["domain_open_console"]
_PING = frame([28, wire.KEEPALIVE, 1, wire.PING, wire.MESSAGE, 0, 0])


@pytest_asyncio.fixture
async def daemon(vmand: PrivateVmand, image: tuple[Path, Path]) -> AsyncIterator[PrivateVirtvmand]:
    """In front of a vmand with a guest that has a shell on its console, two that wait for their first instruction,
    and a partition that is off."""
    need_root()
    async with await vmand.client() as client:
        for name, paused in (("guest", False), ("second", True), ("third", True)):
            partition = await client.create_partition(cores=1, memsize_gb=0.125, mode=Mode.SHARED, name=name)
            await client.deploy(partition, kernel=image[0], initrd=image[1], cmdline=CMDLINE, paused=paused)
        await client.create_partition(cores=1, memsize_gb=16 / 1024, mode=Mode.SHARED, name="off")
    async with private_virtvmand(vmand) as one:
        yield one
        assert one.running, one.log_text()[-3000:]
        assert "Traceback" not in one.log_text()


async def open_console(client: RawClient, name: str = "guest") -> int:
    """The serial of a console's stream."""
    packet = client.packet("domain_open_console", await domain(client, name), None, 0)
    answer = await client.ask(packet)
    if answer.status == wire.ERROR:
        raise RefusedError(*wire.read_error(answer.payload))
    return packet.serial


def streamed(serial: int, status: int, payload: bytes = b"") -> bytes:
    return wire.encode(Packet(wire.REMOTE, 1, _CONSOLE, wire.STREAM, serial, status, payload))


async def ended(client: RawClient) -> None:
    """Until the server has cut this client off; nothing that it said is read before that.

    A peer's end shows without reading: poll(2) says POLLHUP, and what is written is refused.
    """
    async with asyncio.timeout(CUT_OFF_S):
        while True:
            try:
                client.sock.send(_PING)
            except BlockingIOError:
                pass
            except ConnectionError:
                return
            await asyncio.sleep(0.2)


async def says_nothing(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        assert await client.until_closed(timeout_s=CUT_OFF_S) == []


async def says_half_a_header(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        await client.send(_PING[:13])
        assert await client.until_closed(timeout_s=CUT_OFF_S) == []


async def says_a_byte_now_and_then(daemon: PrivateVirtvmand) -> None:
    """Never as much as a call that opens."""
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        with contextlib.suppress(ClosedError):
            async with asyncio.timeout(CUT_OFF_S):
                for byte in itertools.chain(frame([16_000, wire.REMOTE, 1, 1, 0, 1, 0]), itertools.repeat(0)):
                    await client.send(bytes([byte]))
                    await asyncio.sleep(0.1)


async def does_not_answer_pings(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket) as client:
        assert await client.call("connect_supports_feature", 10) == (1,)
        heard = await client.until_closed(timeout_s=CUT_OFF_S)
        assert [(one.program, one.procedure, one.kind) for one in heard] == [
            (wire.KEEPALIVE, wire.PING, wire.MESSAGE)
        ] * 5


async def answers_pings(daemon: PrivateVirtvmand) -> None:
    """And is not cut off: more of them come than the one above lived for."""
    async with await RawClient.connect(daemon.socket) as client:
        await client.call("connect_supports_feature", 10)
        for _ in range(7):
            ping = await client.next()
            assert ping.procedure == wire.PING
            await client.send(wire.encode(ping._replace(procedure=wire.PONG)))
        await domain(client, "off")


async def never_asked_for_pings(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket) as client:
        with pytest.raises(TimeoutError):
            await client.next(timeout_s=36)
        await domain(client, "off")


async def calls_and_does_not_read(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, receive_bytes=SMALL) as client:
        guest = await domain(client, "guest")
        call = wire.encode(client.packet("domain_get_xml_desc", guest, 0))
        with contextlib.suppress(ClosedError, TimeoutError):
            async with asyncio.timeout(10):
                while True:
                    await client.send(call * 100)
        await ended(client)


async def calls_one_by_one_and_does_not_read(daemon: PrivateVirtvmand) -> None:
    """So that there is nothing left to work off when its answers are too many; then it sends without end."""
    async with await RawClient.connect(daemon.socket, receive_bytes=SMALL) as client:
        guest = await domain(client, "guest")
        call = wire.encode(client.packet("domain_get_xml_desc", guest, 0))
        with contextlib.suppress(ClosedError, TimeoutError):
            async with asyncio.timeout(10):
                for _ in range(2000):
                    await client.send(call)
                    await asyncio.sleep(0.001)
                for _ in range(64):
                    await client.send(_PING * (1024 * 1024 // len(_PING)))
        await ended(client)


async def says_half_a_call(daemon: PrivateVirtvmand) -> None:
    """As much as it may: a definition that is all there but for a byte."""
    async with await RawClient.connect(daemon.socket) as client:
        await client.send(wire.encode(client.packet("domain_define_xml", "x" * 900_000))[:-1])
        assert await client.until_closed(timeout_s=CUT_OFF_S) == []


async def always_has_half_a_call_under_way(daemon: PrivateVirtvmand) -> None:
    """And finishes each soon: it is answered, for longer than the one above lives."""
    async with await RawClient.connect(daemon.socket) as client:
        call = wire.encode(client.packet("connect_get_type", serial=1))
        await client.send(call[:20])
        until = time.monotonic() + 35
        while time.monotonic() < until:
            await client.send(call[20:] + call[:20])
            assert (await client.reply(1)).status == wire.OK
            await asyncio.sleep(0.05)


async def asks_for_slow_things_and_does_not_read(daemon: PrivateVirtvmand) -> None:
    """Calls that vmand is asked for: 16 are under way at once, the others wait."""
    async with await RawClient.connect(daemon.socket, receive_bytes=SMALL) as client:
        off = await domain(client, "off")
        call = wire.encode(client.packet("domain_set_autostart", off, 0))
        with contextlib.suppress(ClosedError, TimeoutError):
            async with asyncio.timeout(10):
                while True:
                    await client.send(call * 100)
        await ended(client)


async def subscribes_and_does_not_read(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, receive_bytes=SMALL) as client:
        await client.call("connect_domain_event_callback_register_any", 23, None)
        uri = "urn:" + "x" * 8000  # which each message has
        async with await RawClient.connect(daemon.socket) as other:
            off = await domain(other, "off")
            for at in range(200):
                await other.call("domain_set_metadata", off, 2, f"<x n='{at}'/>", "k", uri, 2)
        await ended(client)


async def looks_at_a_console_and_does_not_read(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, receive_bytes=SMALL) as client:
        await open_console(client)
        await open_console(client)
        await ended(client)


async def types_what_nobody_takes(daemon: PrivateVirtvmand) -> None:
    """Megabytes into a console: the stream is ended, the connection is not."""
    async with await RawClient.connect(daemon.socket) as client:
        serial = await open_console(client)
        reading = asyncio.create_task(read_until_the_end_of(client, serial))
        with contextlib.suppress(ClosedError):
            for _ in range(200):
                if reading.done():
                    break
                await client.send(streamed(serial, wire.CONTINUE, b"#" * 50_000))
        await reading
        await domain(client, "off")


async def read_until_the_end_of(client: RawClient, serial: int) -> None:
    while True:
        one = await client.next(timeout_s=CUT_OFF_S)
        if (one.kind, one.serial) == (wire.STREAM, serial) and one.status != wire.CONTINUE:
            return


HANGING: tuple[Callable[[PrivateVirtvmand], Coroutine[Any, Any, None]], ...] = (
    says_nothing,
    says_half_a_header,
    says_a_byte_now_and_then,
    does_not_answer_pings,
    answers_pings,
    never_asked_for_pings,
    calls_and_does_not_read,
    calls_one_by_one_and_does_not_read,
    says_half_a_call,
    always_has_half_a_call_under_way,
    asks_for_slow_things_and_does_not_read,
    subscribes_and_does_not_read,
    looks_at_a_console_and_does_not_read,
    types_what_nobody_takes,
)


@pytest.mark.slow
async def test_clients_that_hang(vmand: PrivateVmand, daemon: PrivateVirtvmand) -> None:
    """All at once, because each is given half a minute; somebody else is answered all the time."""
    await printed(vmand, "guest")
    await type_until(vmand, "guest", b"yes edgehold &\n", "edgehold\r\nedgehold\r\nedgehold")
    slowest = 0.0
    before, most = daemon.rss_kib(), 0

    async def others() -> None:
        nonlocal slowest, most
        async with await RawClient.connect(daemon.socket) as client:
            while True:
                begin = time.monotonic()
                assert (await domain(client, "guest")).id > 0
                slowest = max(slowest, time.monotonic() - begin)
                most = max(most, daemon.rss_kib())
                await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(others())
        await asyncio.wait([group.create_task(one(daemon), name=one.__name__) for one in HANGING])
        watching.cancel()
    print(f"\nothers waited {slowest * 1000:.0f} ms at most; RSS {before} -> {most} KiB")  # noqa: T201 - a figure
    assert slowest < OTHERS_S
    assert most - before < MAX_GROWTH_KIB, f"{before} KiB before, {most} KiB at most"


async def test_sixteen_streams(daemon: PrivateVirtvmand) -> None:
    """Of two guests, because vmand lets eight look at one console."""
    before = len(os.listdir(f"/proc/{daemon.pid}/fd"))  # noqa: PTH208 - names are enough
    async with await RawClient.connect(daemon.socket) as client:
        serials = [await open_console(client, name) for name in ("guest", "second") for _ in range(8)]
        with pytest.raises(RefusedError, match="8 are attached"):
            await open_console(client, "guest")
        with pytest.raises(RefusedError, match="16 streams are open") as caught:
            await open_console(client, "third")
        assert caught.value.code == 9
        again = client.packet("domain_open_console", await domain(client, "guest"), None, 0, serial=serials[0])
        assert refusal(await client.ask(again)) == 9
        await client.send(streamed(serials[0], wire.OK))
        await read_until_the_end_of(client, serials[0])
        await client.send(streamed(serials[1], wire.ERROR))
        await read_until_the_end_of(client, serials[1])
        assert await open_console(client) > 0
        with pytest.raises(RefusedError) as caught:
            await open_console(client, "off")
        assert caught.value.code == 55
    for _ in range(50):  # one that is gone before its console is there
        async with await RawClient.connect(daemon.socket) as client:
            guest = await domain(client, "guest")
            await client.send(wire.encode(client.packet("domain_open_console", guest, None, 0)))
    async with asyncio.timeout(20):
        while len(os.listdir(f"/proc/{daemon.pid}/fd")) > before:  # noqa: ASYNC110, PTH208 - another process'
            await asyncio.sleep(0.02)
