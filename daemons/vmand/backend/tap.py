"""A guest's network interface on the host's side: a tap in a bridge that the settings allow.

It is not persistent: it is there as long as somebody has its descriptor (QEMU, from the deploy to its end), so that
nothing is left over whatever dies. Names and requests: Linux' Documentation/networking/tuntap.rst, netdevice(7).
"""

import errno
import fcntl
import hashlib
import os
import re
import socket
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NoReturn

from edgehold.api.vmand import Nic
from edgehold.errors import BadRequestError, DeniedError, FailedError, UnsupportedError
from vmand.model import Record, tap_name

TUN = "/dev/net/tun"

_TUNSETIFF = 0x400454CA  # linux/if_tun.h; the rest linux/sockios.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCGIFMTU, _SIOCSIFMTU = 0x8921, 0x8922
_SIOCSIFHWADDR = 0x8924
_SIOCBRADDIF = 0x89A2
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
_IFF_UP = 0x1
_ARPHRD_ETHER = 1
_IFREQ_BYTES = 40  # struct ifreq of 64-bit machines: a name, and a union of 24 bytes
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """An open tap; whoever has it closes it, and with the last descriptor it is gone."""

    fd: int
    name: str
    mtu: int
    """Of its bridge, in bytes."""


def check(nics: Sequence[Nic], *, bridges: Collection[str], limit: int) -> None:
    """Refuse what this host can't give, before anything is started.

    Raises:
        BadRequestError: too many, or an address is malformed or given twice.
        DeniedError: the settings do not allow the bridge.
        UnsupportedError: there is no such bridge, or no taps here.
    """
    if len(nics) > limit:
        raise BadRequestError(f"nics: {len(nics)} are more than the {limit} that the settings allow ([limits] nics)")
    seen: set[str] = set()
    for n, nic in enumerate(nics):
        key = f"nics[{n}]"
        if not any(fnmatchcase(nic.bridge, one) for one in bridges):
            allowed = f"these are: {', '.join(sorted(bridges))}" if bridges else "none is"
            raise DeniedError(
                f"{key}: the bridge {nic.bridge[:64]!r} is not allowed; {allowed} (bridges in vmand's settings)"
            )
        try:
            socket.if_nametoindex(nic.bridge)
        except OSError:
            raise _no_bridge(key, nic.bridge) from None
        if nic.mac:
            _check_mac(key, nic.mac, seen)
    if nics and not os.path.exists(TUN):  # noqa: PTH110 - a constant
        raise _no_tun("nics")


def mac(record: Record, n: int, nic: Nic) -> str:
    """The address of the guest's n-th interface: the caller's, or one that stays the same for this partition.

    Made ones begin with 02: administered locally, for one station, and no vendor's (IEEE 802c).
    """
    made = b"\x02" + hashlib.sha256(f"{record.uuid}/{n}".encode()).digest()[:5]
    return nic.mac.lower() or made.hex(":")


def open_tap(record: Record, n: int, nic: Nic) -> Tap:
    """Make the guest's n-th interface, put it into its bridge and set it up.

    Raises:
        UnsupportedError: no taps here, no such bridge, or vmand may not; the text has the cure.
        FailedError: the kernel refused.
    """
    key, name = f"nics[{n}]", tap_name(record.slot, n)
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
            raise _no_tun(key) from None
        _refuse(key, f"{TUN} can't be opened", error)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL  # EXCL: never somebody else's of this name
        _request(key, "no tap can be made", fd, _TUNSETIFF, _ifreq(name, struct.pack("H", flags)))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as control:  # netdevice(7): of any family
            return Tap(fd=fd, name=name, mtu=_join(key, control.fileno(), name, nic.bridge, mac(record, n, nic)))
    except BaseException:
        os.close(fd)
        raise


def _join(key: str, control: int, name: str, bridge: str, guest: str) -> int:
    """Into the bridge, and up; the MTU in bytes."""
    # A bridge takes the lowest address of its ports for its own, and the smallest MTU: a guest must change neither.
    address = b"\xfe" + bytes.fromhex(guest.replace(":", ""))[1:]
    answer = _request(key, f"no bridge {bridge}", control, _SIOCGIFMTU, _ifreq(bridge))
    (mtu,) = struct.unpack_from("i", answer, 16)
    what = f"the tap {name} can't be set up"
    _request(key, what, control, _SIOCSIFHWADDR, _ifreq(name, struct.pack("H6s", _ARPHRD_ETHER, address)))
    _request(key, what, control, _SIOCSIFMTU, _ifreq(name, struct.pack("i", mtu)))
    index = struct.pack("i", socket.if_nametoindex(name))
    _request(key, f"the tap {name} can't join the bridge {bridge}", control, _SIOCBRADDIF, _ifreq(bridge, index))
    (flags,) = struct.unpack_from("H", _request(key, what, control, _SIOCGIFFLAGS, _ifreq(name)), 16)
    _request(key, what, control, _SIOCSIFFLAGS, _ifreq(name, struct.pack("H", flags | _IFF_UP)))
    return int(mtu)


def _ifreq(name: str, union: bytes = b"") -> bytes:
    return struct.pack(f"16s{_IFREQ_BYTES - 16}s", name.encode(), union)


def _request(key: str, what: str, fd: int, request: int, argument: bytes) -> bytes:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        _refuse(key, what, error)


def _refuse(key: str, what: str, error: OSError) -> NoReturn:
    cures = {
        errno.EPERM: "vmand needs CAP_NET_ADMIN for network interfaces of guests",
        errno.EACCES: "vmand needs read and write access to it",
        errno.ENODEV: "make it first: ip link add NAME type bridge",
        errno.EOPNOTSUPP: "it is no bridge",
    }
    if error.errno in cures:
        raise UnsupportedError(f"{key}: {what}: {error.strerror}; {cures[error.errno]}") from error
    if error.errno == errno.EBUSY:
        raise FailedError(
            f"{key}: {what}: an interface of its name exists; which program made it? (ip link)"
        ) from error
    raise FailedError(f"{key}: {what}: {error.strerror}") from error


def _no_tun(key: str) -> UnsupportedError:
    return UnsupportedError(
        f"{key}: this host makes no taps, there is no {TUN}; load the kernel's module: modprobe tun"
    )


def _no_bridge(key: str, bridge: str) -> UnsupportedError:
    return UnsupportedError(f"{key}: there is no bridge {bridge}; make it first: ip link add {bridge} type bridge")


def _check_mac(key: str, text: str, seen: set[str]) -> None:
    address = text.lower()
    if not _MAC.fullmatch(address):
        raise BadRequestError(f"{key}: mac: {text[:64]!r} is not six bytes as 02:00:00:00:00:01")
    if int(address[:2], 16) & 1 or address == "00:00:00:00:00:00":
        raise BadRequestError(f"{key}: mac: {address} is not the address of one station; its first byte must be even")
    if address in seen:
        raise BadRequestError(f"{key}: mac: {address} is given twice; leave it out to have one made")
    seen.add(address)
