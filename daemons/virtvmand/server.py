"""The sockets that libvirt's clients connect to, and who of them may do what.

The socket decides first (what comes through the read-only one may only look), then the peer's role.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Iterable, Mapping

from edgehold.wire.peer import Peer, Role, Roles, peer_of
from virtvmand.call import Handler
from virtvmand.connection import Connection

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
ROOT_CONNECTIONS = 32
MAX_CONNECTIONS_OF_A_USER = 64
_NOBODY = "this user may not look at this host's domains: the settings of virtvmand give roles to groups (access)"


class Server:
    """Accepts on any number of listening sockets."""

    def __init__(self, handlers: Mapping[int, Handler], *, roles: Roles) -> None:
        self._handlers = handlers
        self._roles = roles
        self._servers: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._told_full = False
        self.outcomes: Counter[tuple[int, str]] = Counter()
        """Calls by procedure and outcome: ``done``, ``refused``, ``failed``."""

    @property
    def connections(self) -> Iterable[Connection]:
        """Those that are open."""
        return self._connections

    async def listen(self, listener: socket.socket, *, read_only: bool) -> None:
        """Accept on a bound and listening socket; this object owns it from now on."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        # Not create_unix_server: since Python 3.13 that one removes the socket at its close, which may be systemd's.
        self._servers.append(await loop.create_server(lambda: _Gate(self, read_only=read_only), sock=listener))

    async def close(self) -> None:
        """Stop accepting and end every conversation."""
        for server in self._servers:
            server.close()
        open_ones = list(self._connections)
        for one in open_ones:
            one.close()
        for one in open_ones:
            await one.finish()

    def admit(self, peer: Peer, *, read_only: bool) -> Connection | None:
        """A conversation for a new peer, or None where there are too many."""
        if self._is_full(peer):
            return None
        role = self._roles.role_of(peer)
        one = Connection(
            handlers=self._handlers,
            peer=peer,
            read_only=read_only or role < Role.OPERATE,
            denied="" if role >= Role.READ else _NOBODY,
            outcomes=self.outcomes,
            ended=self._connections.discard,
        )
        self._connections.add(one)
        return one

    def _is_full(self, peer: Peer) -> bool:
        """No user may take all connections from the others; root gets in when the rest is taken."""
        of_peer = sum(one.peer.uid == peer.uid for one in self._connections)
        room = MAX_CONNECTIONS if peer.uid == 0 else MAX_CONNECTIONS - ROOT_CONNECTIONS
        full = len(self._connections) >= room or (peer.uid != 0 and of_peer >= MAX_CONNECTIONS_OF_A_USER)
        if full and not self._told_full:
            log.warning("refusing connections, %d are open; told once until one is accepted", len(self._connections))
        self._told_full = full
        return full


class _Gate(asyncio.Protocol):
    """A connection of which nothing is known yet: who it is, the kernel says once it is there."""

    def __init__(self, server: Server, *, read_only: bool) -> None:
        self._server = server
        self._read_only = read_only

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type; a socket's transport is one
        one = self._server.admit(peer_of(transport.get_extra_info("socket")), read_only=self._read_only)
        if one is None:
            transport.abort()
        else:
            transport.set_protocol(one)
            one.connection_made(transport)
