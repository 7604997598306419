"""Counters of one network interface of the host, in the network that vmand is in.

Asked of the kernel by name (rtnetlink(7)): /sys shows the network of whoever mounted it, and /proc/net/dev always all
interfaces. Source: linux/netlink.h, linux/rtnetlink.h, linux/if_link.h.
"""

import socket
import struct
from typing import NamedTuple

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_GET, _NEW = 18, 16  # RTM_GETLINK, RTM_NEWLINK
_REQUEST = 1
_NAME, _STATS64 = 3, 23  # IFLA_IFNAME, IFLA_STATS64
_COUNTERS = struct.Struct("=8Q")
_TYPE_MASK = 0x3FFF
_ENOUGH = 65536
"""The kernel's answers of one interface are some kilobytes."""


class Counters(NamedTuple):
    """The beginning of struct rtnl_link_stats64, as the host counts: ``rx`` came from the interface."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_errors: int
    tx_errors: int
    rx_dropped: int
    tx_dropped: int


def counters(name: str) -> Counters | None:
    """Of the interface of this name; None where there is none, or the kernel does not say."""
    text = name.encode() + b"\0"
    body = _LINK.pack(0, 0, 0, 0, 0) + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(text), _NAME) + text
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
            route.send(_HEADER.pack(_HEADER.size + len(body), _GET, _REQUEST, 1, 0) + body)
            # The kernel has answered when send returns.
            return parsed(route.recv(_ENOUGH, socket.MSG_DONTWAIT))
    except OSError:
        return None


def parsed(answer: bytes) -> Counters | None:
    """The counters in an answer; None in one that has none."""
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[1] != _NEW:
        return None
    at = _HEADER.size + _LINK.size
    while at + _ATTRIBUTE.size <= len(answer):
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        if length < _ATTRIBUTE.size:
            return None
        if kind & _TYPE_MASK == _STATS64 and at + _ATTRIBUTE.size + _COUNTERS.size <= len(answer):
            return Counters(*_COUNTERS.unpack_from(answer, at + _ATTRIBUTE.size))
        at += (length + 3) & ~3
    return None
