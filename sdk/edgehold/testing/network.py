"""A network of a test's own: a namespace with a bridge, from which nothing reaches the host's.

Namespaces belong to threads (unshare(2)): a thread of its own makes one and works in it, what it starts inherits it,
and it is gone when all of them have ended.
"""

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edgehold.testing.capability import missing, need_root

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_SIOCSIFMTU, _SIOCBRADDBR = 0x8922, 0x89A0  # linux/sockios.h

T = TypeVar("T")


def need_taps() -> None:
    """The test makes taps in a network of its own."""
    need_root()
    if not Path("/dev/net/tun").exists():
        missing("no /dev/net/tun")


def in_own_network(work: Callable[[], T]) -> T:
    """Call it in a thread that has a network of its own, in which nothing exists yet; what it returns or raises."""
    results: list[T] = []
    raised: list[BaseException] = []
    refused: list[str] = []

    def body() -> None:
        try:
            # use_errno: between the call and the look at errno Python itself may call the C library.
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(_CLONE_NEWNET) != 0:
                refused.append(os.strerror(ctypes.get_errno()))
                return
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - it is raised again below, in the caller's thread
            raised.append(error)

    thread = threading.Thread(target=body, name="own network")
    thread.start()
    thread.join()
    if refused:
        missing(f"no network namespace can be made here: {refused[0]}")
    if raised:
        raise raised[0]
    return results[0]


def interfaces() -> set[str]:
    """The names of all interfaces of this thread's network."""
    return {name for _index, name in socket.if_nameindex()}


def asked(request: int, name: str, union: bytes = b"") -> bytes:
    """One request of netdevice(7) about an interface; the union of the answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        return fcntl.ioctl(control.fileno(), request, struct.pack("16s24s", name.encode(), union))[16:]


def make_bridge(name: str, *, mtu: int = 1500) -> None:
    """A bridge without ports."""
    asked(_SIOCBRADDBR, name)
    asked(_SIOCSIFMTU, name, struct.pack("i", mtu))
