"""One client's conversation: packets in, handlers called, answers out. Everything that a client could make us hold is
bounded: packets, calls under way, streams, subscriptions, what it does not read, and how long it says nothing.

It must not know what a procedure does.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from types import CoroutineType
from typing import cast

from edgehold.errors import EdgeholdError
from edgehold.wire.peer import Peer
from virtvmand import wire
from virtvmand.call import Handler, Streamed, Subscription, Values
from virtvmand.errors import Code, LibvirtError, from_edgehold
from virtvmand.streams import Stream
from virtvmand.table import BEFORE_OPEN, PROCEDURES, Procedure, unsupported
from virtvmand.wire import Framer, Packet, WireError
from virtvmand.xdr import XdrError

log = logging.getLogger(__name__)

# No call that opens a connection is longer; of what may follow, a definition and a list of all domains are the longest.
LIMIT_BEFORE_OPEN, LIMIT_READ_ONLY, LIMIT = 16 * 1024, 256 * 1024, 1024 * 1024
MAX_CALLS, MAX_STREAMS, MAX_CALLBACKS = 16, 16, 256
# What a client has not read: above the first nothing more is read of it, above the second or after the time it is cut
# off. One answer may be longer than that; it is sent whole.
UNREAD_PAUSE_BYTES, UNREAD_MOST_BYTES, UNREAD_MOST_S = 256 * 1024, 4 * 1024 * 1024, 30.0
# Packets that are handled before other connections get their turn, and for how long: some calls take milliseconds.
_AT_ONCE, _TURN_S = 32, 0.002
_OPEN_WITHIN_S = 30.0
_WHOLE_WITHIN_S = 30.0
KEEPALIVE_EVERY_S, KEEPALIVE_COUNT = 5.0, 5


class Connection(asyncio.Protocol):
    """A conversation; a `Client` to handlers.

    ``read_only``: it came through the socket for those who only look, or its role allows no more. ``denied``: why it
    may not even look; it is told so and cut off.
    """

    def __init__(
        self,
        *,
        handlers: Mapping[int, Handler],
        peer: Peer,
        read_only: bool,
        denied: str = "",
        outcomes: Counter[tuple[int, str]],
        ended: Callable[["Connection"], None],
    ) -> None:
        self.peer = peer
        self.read_only = read_only
        self.callbacks: dict[int, Subscription] = {}
        self._handlers = handlers
        self._denied = denied
        self._outcomes = outcomes
        self._ended = ended
        self._opened = False
        self._framer = Framer(LIMIT_BEFORE_OPEN)
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._loop = asyncio.get_running_loop()
        self._calls: set[asyncio.Task[None]] = set()
        self._streams: dict[int, Stream] = {}
        self._stalled: asyncio.TimerHandle | None = None
        self._going_on = False
        self._heard = 0.0
        self._asked = 0
        self._keeper: asyncio.TimerHandle | None = None
        self._opener: asyncio.TimerHandle | None = None
        self._half: asyncio.TimerHandle | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._heard = self._loop.time()
        self._transport.set_write_buffer_limits(high=UNREAD_PAUSE_BYTES)
        self._opener = self._loop.call_later(_OPEN_WITHIN_S, self._cut_off, "it opened nothing")

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._asked = 0
        self._framer.feed(data)
        if not self._going_on:
            self._go_on()

    def pause_writing(self) -> None:
        self._stalled = self._loop.call_later(UNREAD_MOST_S, self._cut_off, "it does not read")
        self._transport.pause_reading()
        for stream in self._streams.values():
            stream.pause()

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        for stream in self._streams.values():
            stream.resume()
        if not self._going_on:
            self._go_on()

    def connection_lost(self, _exc: Exception | None) -> None:
        for timer in (self._stalled, self._keeper, self._opener, self._half):
            if timer is not None:
                timer.cancel()
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self.callbacks.clear()
        self._ended(self)

    def close(self) -> None:
        """End the conversation. What it began at vmand goes on there."""
        self._transport.abort()

    async def finish(self) -> None:
        """Wait for the calls under way, which nobody waits for any more, to be given up."""
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    # The handlers' side

    def open(self, *, read_only: bool) -> None:
        if self._opened:
            raise LibvirtError(Code.OPERATION_INVALID, "the connection is open already")
        self._opened = True
        self.read_only = self.read_only or read_only
        self._framer.limit = LIMIT_READ_ONLY if self.read_only else LIMIT
        if self._opener is not None:
            self._opener.cancel()

    def keep_alive(self) -> None:
        if self._keeper is None:
            self._keeper = self._loop.call_later(KEEPALIVE_EVERY_S, self._keep)

    def send_event(self, procedure: int, payload: bytes) -> None:
        self._send(Packet(wire.REMOTE, wire.VERSION, procedure, wire.MESSAGE, 0, wire.OK, payload))

    # Inside

    def _go_on(self) -> None:
        """Handle what came, a few packets at a time, until the client has too much to read."""
        self._going_on = False
        until = self._loop.time() + _TURN_S
        try:
            for _ in range(_AT_ONCE):
                if self._stalled is not None or self._transport.is_closing():
                    return
                if len(self._calls) >= MAX_CALLS:  # `_called` goes on; as libvirtd does, what comes next waits
                    self._transport.pause_reading()
                    return
                packet = self._framer.next()
                if packet is not None:
                    self._end_half()
                    self._take(packet)
                if packet is None or not self._framer.held_bytes:
                    self._await_more()
                    return
                if self._loop.time() > until:
                    break
        except WireError as error:
            self._cut_off(str(error))
            return
        self._going_on = True
        self._transport.pause_reading()  # or a client that sends faster than we work would fill our memory
        self._loop.call_soon(self._go_on)

    def _await_more(self) -> None:
        """No whole packet is left: read on, unless the client has too much to read. Half a one is not held for ever."""
        if self._framer.held_bytes and self._half is None:
            self._half = self._loop.call_later(_WHOLE_WITHIN_S, self._cut_off, "it sent half a packet")
        if self._stalled is None:
            self._transport.resume_reading()

    def _end_half(self) -> None:
        """The packet that was waited for is there."""
        if self._half is not None:
            self._half.cancel()
            self._half = None

    def _take(self, packet: Packet) -> None:
        if packet.program == wire.KEEPALIVE:
            if packet.procedure == wire.PING:
                self._send(packet._replace(procedure=wire.PONG, kind=wire.MESSAGE, serial=0, status=0, payload=b""))
            return
        if packet.kind == wire.STREAM and packet.program == wire.REMOTE:
            stream = self._streams.get(packet.serial)
            # Of one that has ended data may still come.
            if stream is not None and stream.received(packet.status, packet.payload):
                del self._streams[packet.serial]
            return
        if packet.kind != wire.CALL:
            raise WireError(f"a packet of type {packet.kind}, which clients do not send")
        try:
            self._call(packet)
        except (LibvirtError, EdgeholdError, XdrError) as error:
            self._refuse(packet, error)
        except Exception as error:  # noqa: BLE001 - as in `_work`
            self._bug(packet, error)

    def _call(self, packet: Packet) -> None:
        procedure = self._allowed(packet)
        arguments = procedure.arguments.decode(packet.payload)
        handler = self._handlers.get(procedure.number)
        if handler is None:
            raise LibvirtError(Code.NO_SUPPORT, f"{procedure.name}: vman:///system can't do that")
        values = handler(self, *arguments)
        if not isinstance(values, CoroutineType):
            self._answer(packet, procedure, cast("Values", values))
            return
        task = self._loop.create_task(self._work(packet, procedure, values), name=f"{procedure.name} by {self.peer}")
        self._calls.add(task)
        task.add_done_callback(self._called)

    def _allowed(self, packet: Packet) -> Procedure:
        if self._denied:
            self._loop.call_soon(self._transport.close)
            raise LibvirtError(Code.ACCESS_DENIED, self._denied)
        if packet.program != wire.REMOTE or packet.version != wire.VERSION:
            raise LibvirtError(Code.RPC, f"unknown program {packet.program:#x} version {packet.version}")
        procedure = PROCEDURES.get(packet.procedure)
        if procedure is None or procedure.event:
            raise LibvirtError(Code.NO_SUPPORT, unsupported(packet.procedure))
        if not self._opened and procedure.number not in BEFORE_OPEN:
            raise LibvirtError(Code.AUTH_FAILED, f"{procedure.name}: the connection is not open")
        if procedure.changes and self.read_only:
            raise LibvirtError(Code.OPERATION_DENIED, f"{procedure.name}: this connection may only look")
        return procedure

    def _called(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if not self._going_on and not self._transport.is_closing():
            self._go_on()

    async def _work(self, packet: Packet, procedure: Procedure, call: Awaitable[Values]) -> None:
        try:
            self._answer(packet, procedure, await call)
        except (LibvirtError, EdgeholdError, XdrError) as error:
            self._refuse(packet, error)
        except Exception as error:  # noqa: BLE001 - the connection is a boundary: a bug in a call must not end the others
            self._bug(packet, error)

    def _answer(self, packet: Packet, procedure: Procedure, values: Values) -> None:
        if isinstance(values, Streamed):
            stream = self._stream(packet, values)
            self._write(wire.reply(packet, wire.OK, b""))
            stream.begin()
        else:
            payload = values if isinstance(values, bytes) else procedure.returns.encode(values or ())
            self._write(wire.reply(packet, wire.OK, payload))
        self._outcomes[procedure.number, "done"] += 1

    def _stream(self, packet: Packet, opened: Streamed) -> Stream:
        if len(self._streams) >= MAX_STREAMS or packet.serial in self._streams or self._transport.is_closing():
            opened.sock.close()
            raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_STREAMS} streams are open on this connection; close one")

        def send(status: int, payload: bytes) -> None:
            self._send(packet._replace(kind=wire.STREAM, status=status, payload=payload))

        stream = self._streams[packet.serial] = Stream(opened.sock, send=send)
        if self._stalled is not None:
            stream.pause()
        return stream

    def _refuse(self, packet: Packet, error: Exception) -> None:
        if isinstance(error, EdgeholdError):
            error = from_edgehold(error)
        elif not isinstance(error, LibvirtError):
            error = LibvirtError(Code.RPC, f"the arguments of procedure {packet.procedure}: {error}")
        if packet.procedure in PROCEDURES:
            self._outcomes[packet.procedure, "failed" if error.code is Code.INTERNAL_ERROR else "refused"] += 1
        self._write(wire.reply(packet, wire.ERROR, wire.error_payload(error)))

    def _bug(self, packet: Packet, error: Exception) -> None:
        fields = {"peer": str(self.peer)}
        log.error("a bug: procedure %d failed", packet.procedure, exc_info=error, extra=fields)
        self._refuse(packet, LibvirtError(Code.INTERNAL_ERROR, "internal error; virtvmand's journal has the details"))

    def _send(self, packet: Packet) -> None:
        self._write(wire.encode(packet))

    def _write(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > UNREAD_MOST_BYTES:
            self._cut_off("it does not read")
            return
        self._transport.write(data)

    def _keep(self) -> None:
        """A client that said nothing for a while is asked, and cut off when it has been asked in vain too often."""
        silent = self._loop.time() - self._heard
        if silent >= KEEPALIVE_EVERY_S:
            if self._asked >= KEEPALIVE_COUNT:
                self._cut_off("it does not answer")
                return
            self._asked += 1
            self._send(Packet(wire.KEEPALIVE, wire.VERSION, wire.PING, wire.MESSAGE, 0, wire.OK, b""))
            wait = KEEPALIVE_EVERY_S
        else:
            wait = KEEPALIVE_EVERY_S - silent
        self._keeper = self._loop.call_later(wait, self._keep)

    def _cut_off(self, why: str) -> None:
        if not self._transport.is_closing():
            log.warning("cutting off a client: %s", why, extra={"peer": str(self.peer)})
        self._transport.abort()
