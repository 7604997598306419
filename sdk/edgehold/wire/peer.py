"""Who is at the other end of a unix socket, and what that one may do.

The kernel vouches for the peer's ids (SO_PEERCRED, SO_PEERGROUPS: unix(7)); file modes of the socket come first, roles
after: ``read`` may look, ``operate`` may change.
"""

import grp
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from edgehold.errors import DeniedError, SettingsError

_SO_PEERGROUPS = 59  # asm-generic/socket.h; not in the socket module
_MAX_GROUPS = 256  # socket.getsockopt refuses to read more than 1 KiB
_UCRED = struct.Struct("iII")
_GID = struct.calcsize("I")


class Role(IntEnum):
    """What a peer may do; each includes those below."""

    NONE = 0
    READ = 1
    OPERATE = 2


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected, as it was when it did."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]

    def __str__(self) -> str:
        return f"uid={self.uid} pid={self.pid}"


def peer_of(connection: socket.socket) -> Peer:
    """The credentials of a connected unix socket's peer."""
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS * _GID)
    except OSError:  # ERANGE, more groups than that: the primary one counts
        raw = b""
    groups = struct.unpack(f"{len(raw) // _GID}I", raw[: len(raw) // _GID * _GID])
    return Peer(pid, uid, gid, frozenset({gid, *groups}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A daemon's settings: which groups may look and which may change; root and the daemon's own user always may."""

    read: tuple[str, ...] = ()
    operate: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Roles:
    """Which groups may read and operate. Root and the daemon's own user may always operate."""

    read: frozenset[int] = frozenset()
    operate: frozenset[int] = frozenset()

    @classmethod
    def from_groups(cls, *, read: Iterable[str], operate: Iterable[str]) -> "Roles":
        """Look the groups up by name.

        Raises:
            SettingsError: a group does not exist on this host.
        """
        return cls(frozenset(map(_gid, read)), frozenset(map(_gid, operate)))

    def role_of(self, peer: Peer) -> Role:
        """The largest role that the peer has."""
        if peer.uid in {0, os.geteuid()} or peer.groups & self.operate:
            return Role.OPERATE
        return Role.READ if peer.groups & self.read else Role.NONE


def socket_mode(roles: Roles) -> int:
    """The mode of a daemon's socket: where groups have roles anybody may connect and the roles decide; else only us."""
    return 0o666 if roles.read or roles.operate else 0o600


def require(role: Role, needed: Role, what: str) -> None:
    """Refuse what the role does not include.

    Raises:
        DeniedError: the text says which role is needed.
    """
    if role < needed:
        raise DeniedError(
            f"{what} needs the role {needed.name.lower()}, and this user has {role.name.lower()}; "
            "run it as root or join a group that the daemon's settings give that role"
        )


def _gid(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise SettingsError(f"access: no group {name!r} on this host; create it or name another") from None
