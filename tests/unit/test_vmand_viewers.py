"""A console's viewers: they see what was printed and what comes, what they type arrives, and nobody waits for them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edgehold.errors import NoCapacityError
from vmand.backend import console as module
from vmand.backend.console import Console

Guest = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def talk(tmp_path: Path) -> AsyncIterator[tuple[Console, Guest]]:
    """A console, and the serial line of its guest."""
    came: asyncio.Queue[Guest] = asyncio.Queue()
    path = tmp_path / "console.sock"
    server = await asyncio.start_unix_server(lambda reader, writer: came.put_nowait((reader, writer)), path)
    console = Console(path, lambda _text: None, who="a guest")
    guest = await came.get()
    await console.wait_connected(20)
    yield console, guest
    guest[1].close()
    await console.close()
    server.close()


async def say(guest: Guest, console: Console, text: bytes) -> None:
    """Let the guest print, until it has come."""
    before = console.text
    guest[1].write(text)
    async with asyncio.timeout(20):
        while not console.text.endswith(text.decode()) or console.text == before:  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0)


async def read(stream: socket.socket, count: int) -> bytes:
    stream.setblocking(False)
    data = b""
    async with asyncio.timeout(20):
        while len(data) < count:
            part = await asyncio.get_running_loop().sock_recv(stream, count - len(data))
            if not part:
                break
            data += part
    return data


async def test_what_was_printed_then_what_comes(talk: tuple[Console, Guest]) -> None:
    console, guest = talk
    await say(guest, console, b"before\r\n")
    with contextlib.closing(console.attach()) as one, contextlib.closing(console.attach()) as two:
        await say(guest, console, b"after")
        assert await read(one, 13) == await read(two, 13) == b"before\r\nafter"
        one.close()
        await say(guest, console, b"!")
        assert await read(two, 1) == b"!"


async def test_what_is_typed_arrives(talk: tuple[Console, Guest]) -> None:
    console, guest = talk
    with contextlib.closing(console.attach()) as one:
        one.sendall(b"poweroff\r\x03")
        async with asyncio.timeout(20):
            assert await guest[0].readexactly(10) == b"poweroff\r\x03"


async def test_a_viewer_that_does_not_read_is_cut_off(
    talk: tuple[Console, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    console, guest = talk
    monkeypatch.setattr(module, "_UNREAD_BYTES", 1000)
    with contextlib.closing(console.attach()) as idle, contextlib.closing(console.attach()) as other:
        for number in range(200):
            await say(guest, console, f"{number:04} {'x' * 4000}".encode())
            await read(other, 4005)
        assert len(await read(idle, 200 * 4005)) < 200 * 4005  # and then its end
        await say(guest, console, b"still there")
        assert await read(other, 11) == b"still there"


async def test_a_guest_that_does_not_read_holds_its_typist_not_our_memory(
    talk: tuple[Console, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    console, guest = talk
    monkeypatch.setattr(module, "_TYPE_AGAIN_S", 0.001)
    with contextlib.closing(console.attach()) as one:
        one.setblocking(False)
        sent = 0
        quiet = 0
        async with asyncio.timeout(20):
            while quiet < 50:  # until nothing more goes in
                with contextlib.suppress(BlockingIOError):
                    sent += one.send(b"y" * 4096)
                    quiet = -1
                quiet += 1
                await asyncio.sleep(0.002)
        writer = console._writer
        assert writer is not None
        assert writer.transport.get_write_buffer_size() <= 3 * module._TYPED_BYTES
        async with asyncio.timeout(20):
            assert len(await guest[0].readexactly(sent)) == sent


async def test_the_end_of_the_guest_ends_its_viewers(talk: tuple[Console, Guest]) -> None:
    console, guest = talk
    await say(guest, console, b"bye")
    with contextlib.closing(console.attach()) as one:
        guest[1].close()
        assert await read(one, 100) == b"bye"


async def test_letting_go_ends_the_viewers(talk: tuple[Console, Guest]) -> None:
    console, _guest = talk
    with contextlib.closing(console.attach()) as one:
        await console.close()
        assert await read(one, 1) == b""


async def test_viewers_are_bounded(talk: tuple[Console, Guest]) -> None:
    console, _guest = talk
    viewers = [console.attach() for _ in range(module.VIEWERS)]
    with pytest.raises(NoCapacityError, match="one of them must leave"):
        console.attach()
    for one in viewers:
        one.close()


async def test_viewers_that_left_hold_no_place_while_the_guest_takes_no_input(
    talk: tuple[Console, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    console, _guest = talk
    monkeypatch.setattr(console, "_type", lambda _data: False)
    viewers = [console.attach() for _ in range(module.VIEWERS)]
    for one in viewers:
        one.sendall(b"y")
    async with asyncio.timeout(20):
        while any(viewer._again is None for viewer in console._viewers):  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0)
    stays = viewers.pop()
    for one in viewers:
        one.close()
    with contextlib.closing(stays), contextlib.ExitStack() as stack:
        for _ in viewers:
            stack.enter_context(contextlib.closing(console.attach()))
        with pytest.raises(NoCapacityError, match="one of them must leave"):
            console.attach()
