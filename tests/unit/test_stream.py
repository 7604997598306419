"""Lines and descriptors over a socket pair: which line has which descriptors, and that none is ever left open."""

import asyncio
import contextlib
import errno
import itertools
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from edgehold.errors import BadRequestError, DeniedError
from edgehold.wire.stream import MAX_FDS, LineStream, close_all

LIMIT = 64 * 1024
PATIENCE_S = 30
NO_SUCH_FD = 1 << 30


def open_fds() -> set[str]:
    """The descriptors of this process, without the one that looks: it is closed when the list is there."""
    return {one.name for one in Path("/proc/self/fd").iterdir() if one.exists() or one.is_symlink()}


@pytest_asyncio.fixture(autouse=True)
async def no_descriptor_left() -> AsyncIterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@contextlib.contextmanager
def files(count: int) -> Iterator[list[int]]:
    """Anonymous files, to be told apart by their inodes."""
    fds = [os.memfd_create(str(one)) for one in range(count)]
    try:
        yield fds
    finally:
        close_all(fds)


def inodes(fds: Sequence[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


@contextlib.contextmanager
def pair(*, limit: int = LIMIT, no_fds: str = "") -> Iterator[tuple[LineStream, socket.socket]]:
    ours, theirs = socket.socketpair()
    stream = LineStream(ours, limit=limit, no_fds=no_fds)
    try:
        with theirs:
            yield stream, theirs
    finally:
        stream.close()


async def take(stream: LineStream) -> tuple[bytes, list[int]] | None:
    """The next line, and the inodes of its descriptors, which are closed."""
    async with asyncio.timeout(PATIENCE_S):
        came = await stream.readline()
    if came is None:
        return None
    line, fds = came
    found = inodes(fds)
    close_all(fds)
    return line, found


async def takes(stream: LineStream, count: int) -> list[tuple[bytes, list[int]] | None]:
    return [await take(stream) for _ in range(count)]


LINES = (b"first\n", b"second\n", b"third\n")


@pytest.mark.parametrize("with_fds", list(itertools.product((0, 1, 2), repeat=3)))
@pytest.mark.parametrize("way", ["whole", "descriptors first", "descriptors last"])
async def test_a_line_has_what_came_with_its_bytes(with_fds: tuple[int, ...], way: str) -> None:
    with files(6) as fds, pair() as (stream, peer):
        spare = iter(fds)
        expected: list[tuple[bytes, list[int]]] = []
        for line, count in zip(LINES, with_fds, strict=True):
            own = list(itertools.islice(spare, count))
            expected.append((line, inodes(own)))
            if way == "whole":
                socket.send_fds(peer, [line], own)
            elif way == "descriptors first":
                socket.send_fds(peer, [line[:3]], own)
                peer.send(line[3:])
            else:
                peer.send(line[:3])
                socket.send_fds(peer, [line[3:]], own)
        peer.shutdown(socket.SHUT_WR)
        assert await takes(stream, 4) == [*expected, None]


async def test_the_same_whatever_the_reads_are() -> None:
    """Each byte a message of its own, read as it comes; the descriptors with any one of them."""
    text = b"ab\ncd\n"
    for at in range(len(text)):
        with files(1) as fds, pair() as (stream, peer):
            reading = asyncio.create_task(takes(stream, 2))
            for index in range(len(text)):
                if index == at:
                    socket.send_fds(peer, [text[index : index + 1]], fds)
                else:
                    peer.send(text[index : index + 1])
                for _ in range(3):
                    await asyncio.sleep(0)
            own = inodes(fds)
            assert await reading == [(b"ab\n", own if at < 3 else []), (b"cd\n", own if at >= 3 else [])]


async def test_a_read_of_several_lines_gives_the_descriptors_to_the_line_of_its_last_byte() -> None:
    with files(2) as fds, pair() as (stream, peer):
        peer.send(b"a\nb\n")
        socket.send_fds(peer, [b"c"], fds[:1])
        socket.send_fds(peer, [b"c\n"], fds[1:])
        peer.send(b"d\n")
        one, two = inodes(fds)
        assert await takes(stream, 4) == [(b"a\n", []), (b"b\n", []), (b"cc\n", [one, two]), (b"d\n", [])]


async def test_a_line_longer_than_a_read_keeps_its_descriptors() -> None:
    text = b"x" * (6 * LIMIT) + b"\n"
    with files(1) as fds, pair() as (ours, peer):
        stream = LineStream(peer.dup(), limit=8 * LIMIT)
        ours.send(b"before\n")
        ours.send(text, fds)
        ours.send(b"after\n")
        assert await take(stream) == (b"before\n", [])
        assert await take(stream) == (text, inodes(fds))
        assert await take(stream) == (b"after\n", [])
        stream.close()


async def test_received_descriptors_are_not_inherited() -> None:
    with files(1) as fds, pair() as (stream, peer):
        socket.send_fds(peer, [b"a\n"], fds)
        came = await stream.readline()
        assert came is not None
        assert [os.get_inheritable(fd) for fd in came[1]] == [False]
        close_all(came[1])


async def test_sixteen_descriptors_pass_and_one_more_ends_it() -> None:
    with files(MAX_FDS + 1) as fds, pair() as (stream, peer):
        socket.send_fds(peer, [b"all\n"], fds[:MAX_FDS])
        assert await take(stream) == (b"all\n", inodes(fds[:MAX_FDS]))
        peer.send(b"before\n")
        socket.send_fds(peer, [b"too many\n"], fds)
        peer.send(b"after\n")
        assert await take(stream) == (b"before\n", [])
        for _ in range(2):
            with pytest.raises(
                BadRequestError, match=r"more than 16 descriptors came at once, or .* the connection ends"
            ):
                await stream.readline()


@pytest.mark.parametrize("end", [b"b", b"b\n", b"b\nc", b"b\nc\n"])
async def test_the_pieces_of_a_line_bring_sixteen_together(end: bytes) -> None:
    with files(MAX_FDS) as fds, pair() as (stream, peer):
        socket.send_fds(peer, [b"a"], fds)
        reading = asyncio.create_task(stream.readline())
        for _ in range(3):
            await asyncio.sleep(0)
        socket.send_fds(peer, [end], fds[:1])
        if end in {b"b", b"b\n"}:
            with pytest.raises(BadRequestError, match="more than 16 descriptors came with one line"):
                await reading
        else:  # the last byte is another line's
            came = await reading
            assert came is not None
            assert inodes(came[1]) == inodes(fds)
            close_all(came[1])


async def test_no_room_for_another_descriptor_ends_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with files(3) as fds, pair() as (stream, peer):
        socket.send_fds(peer, [b"a\n"], fds)
        free = os.dup(peer.fileno())  # the lowest number: room for one of the three
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
        try:
            with pytest.raises(BadRequestError, match="there is no room for another in this process"):
                await stream.readline()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_peer_that_may_send_none() -> None:
    with files(1) as fds, pair(no_fds="descriptors need a licence") as (stream, peer):
        peer.send(b"a\nb\n")
        socket.send_fds(peer, [b"c\n"], fds)
        assert await takes(stream, 2) == [(b"a\n", []), (b"b\n", [])]
        with pytest.raises(DeniedError, match="descriptors need a licence; the connection ends here"):
            await stream.readline()


async def test_a_peer_that_vanishes_in_the_middle_of_a_line() -> None:
    with files(1) as fds, pair() as (stream, peer):
        socket.send_fds(peer, [b"half a li"], fds)
        peer.close()
        assert await take(stream) is None
        assert await take(stream) is None


async def test_a_reset_is_the_end() -> None:
    with pair() as (stream, peer):
        stream.send(b"never read\n")
        peer.send(b"last words\n")
        peer.close()
        assert await takes(stream, 2) == [(b"last words\n", []), None]


@pytest.mark.parametrize("text", [b"line\n", b"line\nhalf", b"half", b"line\nline\n"])
async def test_what_nobody_took_is_closed(text: bytes) -> None:
    with files(3) as fds, pair() as (stream, peer):
        socket.send_fds(peer, [b"first\n"], fds[:1])
        socket.send_fds(peer, [text], fds[1:])
        reading = asyncio.create_task(take(stream))
        assert await reading == (b"first\n", inodes(fds[:1]))
        reading = asyncio.create_task(take(stream))
        for _ in range(3):
            await asyncio.sleep(0)
        stream.close()
        with contextlib.suppress(asyncio.CancelledError):
            reading.cancel()
            await reading
        assert await stream.readline() is None


async def test_closing_wakes_the_reader() -> None:
    with pair() as (stream, _peer):
        reading = asyncio.create_task(stream.readline())
        await asyncio.sleep(0)
        stream.close()
        stream.close()
        assert await reading is None
        stream.send(b"to nobody\n")


async def test_a_cancelled_reader_loses_nothing() -> None:
    with files(1) as fds, pair() as (stream, peer):
        reading = asyncio.create_task(stream.readline())
        await asyncio.sleep(0)
        socket.send_fds(peer, [b"a\n"], fds)
        stream._readable()  # the line is here, and the reader is cancelled before it runs
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await take(stream) == (b"a\n", inodes(fds))


async def test_the_longest_line_and_one_byte_more() -> None:
    with pair(limit=5) as (stream, peer):
        peer.send(b"12345\n123456\n12345\n")
        assert await take(stream) == (b"12345\n", [])
        with pytest.raises(BadRequestError, match="the line is longer than 5 bytes; the connection ends here"):
            await stream.readline()
    with pair(limit=5) as (stream, peer):
        peer.send(b"123456")
        with pytest.raises(BadRequestError, match="the line is longer than 5 bytes; the connection ends here"):
            await stream.readline()


async def test_too_long_a_line_keeps_no_descriptor() -> None:
    for text in (b"123456", b"123456\n", b"123456\nx", b"1\n123456\n"):
        with files(2) as fds, pair(limit=5) as (stream, peer):
            socket.send_fds(peer, [b"0"], fds[:1])
            socket.send_fds(peer, [text], fds[1:])
            with pytest.raises(BadRequestError, match="the line is longer than 5 bytes"):
                await takes(stream, 3)


async def test_a_reader_that_is_busy_holds_one_read_and_no_more() -> None:
    with pair() as (stream, peer):
        peer.send(b"x\n")
        assert await take(stream) == (b"x\n", [])
        peer.setblocking(False)
        sent = 0
        while True:
            try:
                sent += peer.send(b"\n" * 4096)
            except BlockingIOError:
                for _ in range(3):
                    await asyncio.sleep(0)
                try:
                    sent += peer.send(b"\n" * 4096)
                except BlockingIOError:
                    break
        buffers = peer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert sent <= buffers + LIMIT + 2 * 4096
        peer.shutdown(socket.SHUT_WR)
        count = 0
        while await take(stream) is not None:
            count += 1
        assert count == sent


def fill(stream: LineStream, *, line: bytes) -> int:
    """Send the line until the peer has no room for more; how often."""
    count = 0
    while not stream.unsent_bytes:
        stream.send(line)
        count += 1
    return count


async def test_what_had_to_wait_comes_in_order_with_its_descriptors() -> None:
    with pair() as (stream, peer):
        count = fill(stream, line=b"x" * 1000 + b"\n")
        with files(3) as fds:
            expected = inodes(fds)
            stream.send(b"one\n", fds[:1])
            stream.send(b"none\n")
            stream.send(b"none\n")
            stream.send(b"two\n", fds[1:])
            assert stream.unsent_fds == 3
        reader = LineStream(peer.dup(), limit=LIMIT)
        for _ in range(count):
            assert await take(reader) == (b"x" * 1000 + b"\n", [])
        assert await takes(reader, 4) == [
            (b"one\n", expected[:1]),
            (b"none\n", []),
            (b"none\n", []),
            (b"two\n", expected[1:]),
        ]
        assert (stream.unsent_bytes, stream.unsent_fds) == (0, 0)
        reader.close()


async def test_what_waits_is_closed_with_the_stream_or_its_peer() -> None:
    for gone in (False, True):
        with files(2) as fds, pair() as (stream, peer):
            fill(stream, line=b"x" * 1000 + b"\n")
            stream.send(b"never\n", fds)
            stream.send(b"x" * 100_000 + b"\n")
            draining = asyncio.create_task(stream.drain())
            await asyncio.sleep(0)
            assert not draining.done()
            if gone:
                peer.close()
            else:
                stream.close()
            async with asyncio.timeout(PATIENCE_S):
                await draining
            assert (stream.unsent_bytes, stream.unsent_fds) == (0, 0)


async def test_drain_waits_for_the_reader() -> None:
    with pair() as (stream, peer):
        fill(stream, line=b"x" * 1000 + b"\n")
        await stream.drain()  # little is unsent: no reason to wait
        stream.send(b"y" * 200_000 + b"\n")
        draining = asyncio.create_task(stream.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        reader = LineStream(peer.dup(), limit=4 * LIMIT)
        while (came := await take(reader)) is not None and not came[0].startswith(b"y"):
            pass
        async with asyncio.timeout(PATIENCE_S):
            await draining
        reader.close()


async def test_a_descriptor_that_can_not_be_sent() -> None:
    with files(1) as fds, pair() as (stream, peer):
        with pytest.raises(ValueError, match="17 descriptors for one line; 16 may go with it"):
            stream.send(b"a\n", fds * 17)
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            stream.send(b"b\n", [*fds, NO_SUCH_FD])
        assert caught.value.errno == errno.EBADF
        fill(stream, line=b"x" * 1000 + b"\n")
        with pytest.raises(OSError, match="Bad file descriptor"):
            stream.send(b"c\n", [*fds, NO_SUCH_FD])
        assert stream.unsent_fds == 0
        assert peer.recv(4) == b"xxxx"


async def test_sending_to_nobody_is_quiet_and_its_last_words_are_read() -> None:
    with files(1) as fds, pair() as (stream, peer):
        peer.send(b"no, and goodbye\n")
        peer.close()
        stream.send(b"a\n", fds)
        stream.send(b"b\n")
        assert await takes(stream, 2) == [(b"no, and goodbye\n", []), None]
