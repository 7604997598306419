"""A guest's network interface: what is refused before anything starts, and the tap itself in a network of our own."""

import fcntl
import os
import socket
from pathlib import Path

import pytest

from edgehold.api.vmand import Mode, Nic
from edgehold.errors import BadRequestError, DeniedError, EdgeholdError, FailedError, UnsupportedError
from edgehold.testing.network import asked, in_own_network, interfaces, make_bridge, need_taps
from vmand.backend import tap
from vmand.model import Record

RECORD = Record(
    id=7, uuid="5b2f0c1e-0000-4000-8000-000000000001", name="n", mode=Mode.SHARED, cores=1, memory_bytes=1, slot=5
)
_SIOCGIFHWADDR, _SIOCBRDELIF = 0x8927, 0x89A3  # linux/sockios.h
LO = "lo"
"""An interface that every host has; it is no bridge."""


def nic(bridge: str = LO, mac: str = "") -> Nic:
    return Nic(bridge=bridge, mac=mac)


def test_good_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "TUN", "/dev/null")
    tap.check((), bridges=(), limit=0)
    tap.check((nic(),), bridges=("br0", f"{LO[0]}*"), limit=1)
    tap.check((nic(), nic(), nic(mac="02:00:00:00:00:01"), nic(mac="0A:00:00:00:00:01")), bridges=(LO,), limit=4)


@pytest.mark.parametrize(
    ("wanted", "bridges", "kind", "why"),
    [
        ((nic(), nic()), (LO,), BadRequestError, "nics: 2 are more than the 1 "),
        ((nic("br0"),), (), DeniedError, r"nics\[0\]: the bridge 'br0' is not allowed; none is \(bridges in vmand"),
        ((nic("br0"),), ("b", "a"), DeniedError, r"'br0' is not allowed; these are: a, b "),
        (
            (nic("ehnone"),),
            ("ehnone",),
            UnsupportedError,
            "there is no bridge ehnone; make it first: ip link add ehnone",
        ),
        ((nic(LO * 20),), (LO * 20,), UnsupportedError, "there is no bridge"),
        ((nic(mac="02:00:00:00:00"),), (LO,), BadRequestError, "is not six bytes"),
        ((nic(mac="02-00-00-00-00-01"),), (LO,), BadRequestError, "is not six bytes"),
        ((nic(mac="02:00:00:00:00:01\n"),), (LO,), BadRequestError, "is not six bytes"),
        ((nic(mac="ff:ff:ff:ff:ff:ff"),), (LO,), BadRequestError, "its first byte must be even"),
        ((nic(mac="01:00:5e:00:00:01"),), (LO,), BadRequestError, "its first byte must be even"),
        ((nic(mac="00:00:00:00:00:00"),), (LO,), BadRequestError, "not the address of one station"),
    ],
)
def test_refusals(wanted: tuple[Nic, ...], bridges: tuple[str, ...], kind: type[EdgeholdError], why: str) -> None:
    with pytest.raises(kind, match=why):
        tap.check(wanted, bridges=bridges, limit=1)


def test_an_address_is_given_once() -> None:
    with pytest.raises(BadRequestError, match=r"nics\[1\]: mac: 0a:00:00:00:00:01 is given twice"):
        tap.check((nic(mac="0a:00:00:00:00:01"), nic(mac="0A:00:00:00:00:01")), bridges=(LO,), limit=2)


def test_a_host_without_taps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tap, "TUN", str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match=r"nics: this host makes no taps, .* modprobe tun"):
        tap.check((nic(),), bridges=(LO,), limit=1)
    with pytest.raises(UnsupportedError, match=r"nics\[0\]: this host makes no taps"):
        tap.open_tap(RECORD, 0, nic())


def test_made_addresses_stay_and_differ() -> None:
    made = [tap.mac(RECORD, n, nic()) for n in range(8)]
    assert made == [tap.mac(RECORD, n, nic("br0")) for n in range(8)]
    assert len(set(made)) == 8
    assert all(one.startswith("02:") and len(one) == 17 for one in made)
    assert tap.mac(RECORD, 0, nic(mac="0A:00:00:00:00:01")) == "0a:00:00:00:00:01"


def test_a_tap_is_in_its_bridge_as_long_as_it_is_open() -> None:
    need_taps()

    def work() -> None:
        make_bridge("ehbr", mtu=1400)
        before = interfaces()
        made = tap.open_tap(RECORD, 1, nic("ehbr"))
        try:
            assert (made.name, made.mtu) == ("vm5-1", 1400)
            assert interfaces() - before == {"vm5-1"}
            address = asked(_SIOCGIFHWADDR, "vm5-1")[2:8]
            assert address.hex(":") == "fe" + tap.mac(RECORD, 1, nic())[2:]
            assert asked(tap._SIOCGIFFLAGS, "vm5-1")[0] & tap._IFF_UP
            with pytest.raises(FailedError, match=r"nics\[1\]: .* an interface of its name exists"):
                tap.open_tap(RECORD, 1, nic("ehbr"))
            assert asked(tap._SIOCGIFMTU, "ehbr")[:4] == (1400).to_bytes(4, "little")
            index = socket.if_nametoindex("vm5-1").to_bytes(4, "little")
            asked(_SIOCBRDELIF, "ehbr", index)  # refused for what is not in this bridge
        finally:
            os.close(made.fd)
        assert interfaces() == before

    in_own_network(work)


def test_nothing_is_left_of_a_tap_that_finds_no_bridge() -> None:
    need_taps()

    def work() -> None:
        make_bridge("ehbr", mtu=1500)
        before = interfaces()
        with pytest.raises(UnsupportedError, match=r"nics\[0\]: no bridge ehgone: .*ip link add NAME type bridge"):
            tap.open_tap(RECORD, 0, nic("ehgone"))
        other = tap.open_tap(RECORD, 1, nic("ehbr"))
        try:
            with pytest.raises(UnsupportedError, match=r"can't join the bridge vm5-1: .*it is no bridge"):
                tap.open_tap(RECORD, 0, nic("vm5-1"))
        finally:
            os.close(other.fd)
        assert interfaces() == before

    in_own_network(work)


def test_taps_need_a_privilege(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "TUN", "/dev/null")

    def refuse(_fd: int, _request: int, _argument: bytes) -> bytes:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(UnsupportedError, match=r"no tap can be made: .*CAP_NET_ADMIN"):
        tap.open_tap(RECORD, 0, nic())
