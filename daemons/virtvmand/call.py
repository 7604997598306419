"""What a handler of a procedure is, and what it gets to know of the client that called."""

import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgehold.wire.peer import Peer


@dataclass(frozen=True, slots=True)
class Streamed:
    """An answer without values after which a stream begins: what the socket gives and takes, which is ours to close."""

    sock: socket.socket


Values = Sequence[Any] | bytes | Streamed | None
"""What a handler returns: the values of the answer's layout, its bytes, a stream, or nothing where it has none."""
Handler = Callable[..., Values | Awaitable[Values]]
"""``handler(client, *arguments)``; a coroutine where it waits. Raises `LibvirtError` or `EdgeholdError` to refuse."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a client wants to hear: one kind of event, of one domain (its uuid) or of all."""

    event: int
    domain: bytes | None


class Client(Protocol):
    """The client's side of a conversation, as far as handlers need it."""

    peer: Peer
    read_only: bool
    callbacks: dict[int, Subscription]

    def open(self, *, read_only: bool) -> None:
        """Let it call everything from now on.

        Raises:
            LibvirtError: it may already.
        """

    def keep_alive(self) -> None:
        """Ask now and then whether it is still there, and cut it off where it is not."""

    def send_event(self, procedure: int, payload: bytes) -> None:
        """Tell it of something."""
