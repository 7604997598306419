"""Opening and closing a connection, and who we are."""

import re
from collections.abc import Awaitable
from typing import Any
from urllib.parse import urlsplit

from virtvmand.call import Client, Values
from virtvmand.driver.context import Context
from virtvmand.errors import Code, LibvirtError

URI = "vman:///system"
API_VERSION = 10_000_000
"""The version of libvirt whose calls we answer, major * 1,000,000 + minor * 1,000 + micro. The wire is the same in 9.0
to 11.3; Nova takes 10.0 for recent enough."""
READ_ONLY = 1
"""Flag of connect_open (VIR_CONNECT_RO)."""
_KEEPALIVE = 10
# Typed parameters with texts, keepalive, events by callback id, the close callback, and that callback's own bit.
_FEATURES = frozenset({9, _KEEPALIVE, 14, 15, 16})
_READY_S = 5.0
_NUMBERS = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


class Session:
    """The connection itself."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def auth_list(self, _client: Client) -> tuple[list[int]]:
        return ([0],)  # none: the kernel has told us who it is

    def connect_supports_feature(self, client: Client, feature: int) -> tuple[int]:
        if feature == _KEEPALIVE:
            client.keep_alive()
        return (int(feature in _FEATURES),)

    async def connect_open(self, client: Client, name: str | None, flags: int) -> None:
        uri = urlsplit(name or URI)
        if uri.scheme.partition("+")[0] != "vman" or uri.path != "/system":
            raise LibvirtError(Code.INVALID_ARG, f"{name}: this is {URI}; no other driver and no other path is here")
        await self._context.mirror.ready(_READY_S)
        client.open(read_only=bool(flags & READ_ONLY))

    def connect_close(self, _client: Client) -> None:
        """The client closes the socket next."""

    def connect_get_uri(self, _client: Client) -> tuple[str]:
        return (URI,)

    def connect_register_close_callback(self, _client: Client) -> None:
        """A client sees by itself that the connection ended."""

    def connect_unregister_close_callback(self, _client: Client) -> None:
        """See above."""

    def connect_set_identity(self, _client: Client, _params: list[Any], _flags: int) -> None:
        """Only the kernel's word counts for who a client is."""

    def connect_get_type(self, _client: Client) -> tuple[str]:
        return ("vman",)

    def connect_get_version(self, _client: Client) -> Values | Awaitable[Values]:
        known = self._context.mirror.known_host
        return self._version() if known is None else (hypervisor_version(known.hypervisor),)

    async def _version(self) -> tuple[int]:
        return (hypervisor_version((await self._context.mirror.host()).hypervisor),)

    def connect_get_lib_version(self, _client: Client) -> tuple[int]:
        return (API_VERSION,)

    def connect_is_secure(self, _client: Client) -> tuple[int]:
        return (1,)  # a unix socket


def hypervisor_version(text: str) -> int:
    """``QEMU 7.2.22`` as libvirt writes versions; 0 where there is none, which clients show as it is."""
    found = _NUMBERS.search(text)
    if found is None:
        return 0
    major, minor, micro = (int(one or 0) for one in found.groups())
    return major * 1_000_000 + minor * 1_000 + micro
