"""A byte stream between a client and a socket of the host: libvirt's streams, as consoles use them.

Data travels in packets with the procedure and the serial of the call that opened the stream; an empty one is its end.
The client finishes the stream or gives it up, and that is confirmed. What a slow client does not take is not read from
the socket either.
"""

import asyncio
import socket
from collections.abc import Callable

from virtvmand.errors import Code, LibvirtError
from virtvmand.wire import CONTINUE, ERROR, MAX_STREAM_BYTES, OK, error_payload

Send = Callable[[int, bytes], None]
"""(status, payload) of a packet of this stream."""

# What was typed and the guest has not taken: more than anybody types, so the client is cut off instead of held.
_MAX_TYPED_BYTES = 256 * 1024


class Stream(asyncio.Protocol):
    """One stream. It owns the socket."""

    def __init__(self, sock: socket.socket, *, send: Send) -> None:
        self._sock = sock
        self._send = send
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[object] | None = None
        self._early = bytearray()
        self._paused = False
        self._over = False

    def begin(self) -> None:
        """Let data flow, after the answer of the call that opened it."""
        if self._over:
            self._sock.close()
            return
        loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        # create_connection returns after one turn of the loop; nothing of it can fail on a connected socket.
        connecting = loop.create_connection(lambda: self, sock=self._sock)
        self._connecting = loop.create_task(connecting, name="begin of a stream")

    # From the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type; a socket's transport is one
        self._transport = transport
        if self._over:
            transport.abort()
            return
        if self._paused:
            transport.pause_reading()
        self._type(bytes(self._early))

    def data_received(self, data: bytes) -> None:
        for at in range(0, len(data), MAX_STREAM_BYTES):
            self._send(CONTINUE, data[at : at + MAX_STREAM_BYTES])

    def eof_received(self) -> None:
        """The guest has ended."""

    def connection_lost(self, _exc: Exception | None) -> None:
        self._transport = None
        if not self._over:
            self._over = True
            # The end of the data is a piece without any: the client then says that it has finished, which is confirmed.
            self._send(CONTINUE, b"")

    # From the client

    def received(self, status: int, payload: bytes) -> bool:
        """A packet of the client. Returns whether the stream is over for both sides."""
        if status == CONTINUE:
            return not self._over and bool(payload) and not self._type(payload)
        self.close()
        self._send(OK, b"")  # also to one who gave it up: anything else is an error to him (seen with libvirtd)
        return True

    def pause(self) -> None:
        """The client has much to read: read no more for it."""
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """It has room again."""
        self._paused = False
        if self._transport is not None:
            self._transport.resume_reading()

    def close(self) -> None:
        """Let go of the socket, whatever is still under way."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()
        elif self._connecting is None:
            self._sock.close()

    def _type(self, data: bytes) -> bool:
        """Type it; False where the stream was given up instead."""
        transport = self._transport
        waiting = len(self._early) if transport is None else transport.get_write_buffer_size()
        if waiting + len(data) > _MAX_TYPED_BYTES:
            self._over = True
            refusal = LibvirtError(Code.OPERATION_FAILED, "the guest does not take what is typed on its console")
            self._send(ERROR, error_payload(refusal))
            self.close()
            return False
        if transport is None:  # typed before the socket is ready
            self._early += data
        else:
            transport.write(data)
        return True
