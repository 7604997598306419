"""Clients that are not libvirt's: who may do what, what breaks the rules of the wire, and how much one may take.

The domains are two partitions that never start; nothing here may change them.
"""

import asyncio
import contextlib
import grp
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from edgehold.api.vmand import Mode
from edgehold.testing.capability import missing, need_command, need_root
from edgehold.testing.partitions import PrivateVmand, private_vmand
from edgehold.testing.virtvmand import PrivateVirtvmand, private_virtvmand
from tests.integration.rawrpc import (
    READ_ONLY,
    ClosedError,
    RawClient,
    RefusedError,
    arguments,
    as_user,
    call,
    connected_as,
    domain,
    frame,
    refusal,
)
from virtvmand import wire
from virtvmand.table import BEFORE_OPEN, NUMBERS, PROCEDURES
from virtvmand.wire import Packet
from virtvmand.xdr import Domain

LOOKS, OPERATES = "users", "games"
"""Groups of every Debian host; the daemon's settings give them roles."""
NAMES = ("one", "two")
MEMORY_GIB = 16 / 1024
_CHANGES = sorted(one.number for one in PROCEDURES.values() if one.changes)
_PING = frame([28, wire.KEEPALIVE, 1, wire.PING, wire.MESSAGE, 0, 0])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vmand() -> AsyncIterator[PrivateVmand]:
    need_command("qemu-system-x86_64", "qemu-system-x86")
    need_root()
    async with private_vmand(settings={"accelerator": "tcg"}) as one:
        async with await one.client() as client:
            for name in NAMES:
                await client.create_partition(cores=1, memsize_gb=MEMORY_GIB, mode=Mode.SHARED, name=name)
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(vmand: PrivateVmand) -> AsyncIterator[PrivateVirtvmand]:
    for name in (LOOKS, OPERATES):
        try:
            grp.getgrnam(name)
        except KeyError:
            missing(f"no group {name!r} on this host")
    access = {"read": [LOOKS], "operate": [OPERATES]}
    async with private_virtvmand(vmand, settings={"access": access}) as one:
        yield one


@pytest_asyncio.fixture
async def daemon(shared: PrivateVirtvmand, vmand: PrivateVmand) -> AsyncIterator[PrivateVirtvmand]:
    """It and the partitions are as they were, whatever the test does."""
    before = await partitions(vmand)
    fds = descriptors(shared)
    yield shared
    assert shared.running, shared.log_text()[-3000:]
    assert "Traceback" not in shared.log_text()
    assert await partitions(vmand) == before
    async with asyncio.timeout(20):
        while descriptors(shared) > fds:  # noqa: ASYNC110 - another process'
            await asyncio.sleep(0.01)


async def partitions(vmand: PrivateVmand) -> list[object]:
    async with await vmand.client() as client:
        found = await client.list_partitions()
        return [(one, await client.annotations(one.id)) for one in found]


def descriptors(daemon: PrivateVirtvmand) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))  # noqa: PTH208 - names are enough


async def look(path: Path, *, within_s: float = 5.0) -> float:
    """What a well-behaved client gets, on a connection of its own; how long it took in seconds."""
    begin = time.monotonic()
    async with asyncio.timeout(within_s), await RawClient.connect(path) as client:
        domains, count = await client.call("connect_list_all_domains", 1, 0)
        assert [one.name for one in domains] == list(NAMES)
        assert count == len(NAMES)
    return time.monotonic() - begin


# Who may do what


async def refused_everything_that_changes(client: RawClient, code: int) -> None:
    dom = await domain(client, NAMES[0])
    for number in _CHANGES:
        for payload in (arguments(number, dom), b""):
            answer = await client.ask(call(number, 1000 + number, payload))
            assert refusal(answer) == code, PROCEDURES[number].name
    assert (await client.call("domain_is_active", dom)) == (0,)


async def test_the_read_only_socket_changes_nothing(daemon: PrivateVirtvmand) -> None:
    for path, flags in ((daemon.read_only_socket, READ_ONLY), (daemon.read_only_socket, 0), (daemon.socket, READ_ONLY)):
        async with await RawClient.connect(path, flags=flags) as client:
            await refused_everything_that_changes(client, 29)


async def test_a_user_who_may_look_changes_nothing(daemon: PrivateVirtvmand) -> None:
    for path in (daemon.socket, daemon.read_only_socket):
        async with await connected_as(path, LOOKS) as client:
            await refused_everything_that_changes(client, 29)


async def test_a_user_who_may_operate_does_so(daemon: PrivateVirtvmand) -> None:
    async with await connected_as(daemon.socket, OPERATES) as client:
        dom = await domain(client, NAMES[0])
        with pytest.raises(RefusedError, match="is not running"):
            await client.call("domain_suspend", dom)
    async with await connected_as(daemon.read_only_socket, OPERATES) as client:
        with pytest.raises(RefusedError, match="may only look"):
            await client.call("domain_suspend", dom)


@pytest.mark.parametrize("name", ["connect_open", "connect_list_all_domains", "domain_create", "auth_list"])
async def test_a_user_without_a_role_is_told_so_and_cut_off(daemon: PrivateVirtvmand, name: str) -> None:
    for path in (daemon.socket, daemon.read_only_socket):
        async with await connected_as(path, "", flags=None) as client:
            answer = await client.ask(call(NUMBERS[name], 1, b""))
            assert refusal(answer) == 88
            assert await client.until_closed(timeout_s=5) == []


async def test_secrets_are_not_shown_to_who_may_only_look(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.read_only_socket) as client:
        dom = await domain(client, NAMES[0])
        assert "<name>one</name>" in (await client.call("domain_get_xml_desc", dom, 0))[0]
        with pytest.raises(RefusedError) as caught:
            await client.call("domain_get_xml_desc", dom, 1)
        assert caught.value.code == 29


async def test_nothing_is_answered_before_open(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        dom = Domain(NAMES[0], bytes(16), -1)
        for number, one in PROCEDURES.items():
            if number not in BEFORE_OPEN and not one.event:
                answer = await client.ask(call(number, number, arguments(number, dom)))
                assert refusal(answer) == 45, one.name
        assert await client.call("auth_list") == ([0],)
        await client.call("connect_open", None, 0)
        with pytest.raises(RefusedError) as caught:
            await client.call("connect_open", None, 0)
        assert caught.value.code == 55
        await domain(client, NAMES[0])


async def test_a_second_open_at_once_wins_nothing(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        first, second = client.packet("connect_open", None, READ_ONLY), client.packet("connect_open", None, 0)
        await client.send(wire.encode(first) + wire.encode(second))
        answers = [await client.next(), await client.next()]
        assert [one.status for one in sorted(answers, key=lambda one: one.serial)] == [wire.OK, wire.ERROR]
        assert refusal(await client.ask(call(NUMBERS["domain_create"], 9))) == 29


@pytest.mark.parametrize("uri", ["vman:///session", "qemu:///system", "vman:///system/x", "\x7f", "x" * 5000])
async def test_another_uri(daemon: PrivateVirtvmand, uri: str) -> None:
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        with pytest.raises(RefusedError) as caught:
            await client.call("connect_open", uri, 0)
        assert caught.value.code in {8, 45}


# The rules of the wire


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"program": 0x20008087}, 39),
        ({"program": 0x20008088}, 39),
        ({"program": 0}, 39),
        ({"version": 2}, 39),
        ({"version": 0}, 39),
        ({"procedure": 0}, 3),
        ({"procedure": -1}, 3),
        ({"procedure": 2**31 - 1}, 3),
        ({"procedure": 318}, 3),
        ({"procedure": 362}, 3),
        ({"payload": b"\0\0\0\0"}, 39),
        ({"payload": b"\0"}, 39),
    ],
)
async def test_what_is_not_known_is_refused_in_its_own_words(
    daemon: PrivateVirtvmand, fields: dict[str, Any], code: int
) -> None:
    async with await RawClient.connect(daemon.socket) as client:
        asked = client.packet("connect_get_type")._replace(**fields)
        answer = await client.ask(asked)
        assert refusal(answer) == code
        assert answer[:3] == asked[:3]
        await domain(client, NAMES[0])


@pytest.mark.parametrize("kind", [1, 2, 4, 5, 6, 7, -1, 2**31 - 1])
async def test_a_type_that_clients_do_not_send_ends_it(daemon: PrivateVirtvmand, kind: int) -> None:
    async with await RawClient.connect(daemon.socket) as client:
        await client.send(wire.encode(client.packet("connect_get_type", kind=kind)))
        with contextlib.suppress(ClosedError):
            assert not [one for one in await client.until_closed() if one.status == wire.OK]
    await look(daemon.socket)


@pytest.mark.parametrize("length", [0, 4, 27, 1024 * 1024 + 1, 32 * 1024 * 1024, 0x7FFFFFFF, 0xFFFFFFFF])
async def test_a_length_that_can_not_be_ends_it(daemon: PrivateVirtvmand, length: int) -> None:
    before = daemon.rss_kib()
    async with await RawClient.connect(daemon.socket) as client:
        await client.send(length.to_bytes(4, "big"))
        assert await client.until_closed() == []
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        await client.send((16 * 1024 + 1).to_bytes(4, "big"))
        assert await client.until_closed() == []
    assert daemon.rss_kib() - before < 1024


async def test_streams_that_are_not_there(daemon: PrivateVirtvmand) -> None:
    """Data of a stream that has ended may still be under way, so a stranger's serial is no reason to end it all."""
    async with await RawClient.connect(daemon.socket) as client:
        for status in (wire.CONTINUE, wire.OK, wire.ERROR, 77):
            for procedure in (NUMBERS["domain_open_console"], 0, -1):
                packet = Packet(wire.REMOTE, 1, procedure, wire.STREAM, 5, status, b"x" * 1000)
                await client.send(wire.encode(packet))
        assert (await domain(client, NAMES[0])).name == NAMES[0]
        assert [one.kind for one in client.others] == []


async def test_pings_are_answered_at_any_time(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        for _ in range(2):
            await client.send(_PING)
            pong = await client.next()
            assert pong == Packet(wire.KEEPALIVE, 1, wire.PONG, wire.MESSAGE, 0, wire.OK, b"")
        await client.send(frame([28, wire.KEEPALIVE, 1, wire.PONG, wire.MESSAGE, 0, 0]))
        await client.send(frame([28, wire.KEEPALIVE, 1, 99, wire.MESSAGE, 0, 0]))
        await client.call("connect_open", None, 0)


async def test_packets_in_pieces_and_joined(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket, flags=None) as client:
        data = wire.encode(client.packet("connect_open", "vman:///system", 0))
        for at in range(len(data)):
            await client.send(data[at : at + 1])
        assert (await client.reply(1)).status == wire.OK
        calls = [client.packet("connect_get_type") for _ in range(500)]
        await client.send(b"".join(map(wire.encode, calls)))
        assert [(await client.next()).serial for _ in calls] == [one.serial for one in calls]


# How much one may take


async def test_a_thousand_callbacks(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket) as client:
        register = "connect_domain_event_callback_register_any"
        named = [("x", at.to_bytes(16, "big"), -1) for at in range(1000)]
        answers = [await client.ask(client.packet(register, 0, one)) for one in named]
        numbers = {one.payload for one in answers if one.status == wire.OK}
        assert len(numbers) == 256
        assert [refusal(one) for one in answers[256:]] == [9] * (1000 - 256)
        take_back = "connect_domain_event_callback_deregister_any"
        for number in numbers:
            await client.call(take_back, int.from_bytes(number, "big"))
        with pytest.raises(RefusedError, match="there is no"):
            await client.call(take_back, int.from_bytes(answers[0].payload, "big"))
        await client.call(register, 0, None)
        with pytest.raises(RefusedError, match="registered on this connection already"):
            await client.call(register, 0, None)


@pytest.mark.parametrize("unit", ["ping", "call", "refusal"])
async def test_a_flood_of_small_packets_is_read_as_it_is_worked_off(daemon: PrivateVirtvmand, unit: str) -> None:
    """A client that reads all answers and sends faster than we work must wait, instead of being held in memory."""
    count, most = 120_000, 0
    before = daemon.rss_kib()
    async with await RawClient.connect(daemon.socket) as client:
        sent = {
            "ping": _PING,
            "call": wire.encode(client.packet("connect_get_type")),
            "refusal": wire.encode(client.packet("connect_get_type", program=1)),
        }[unit]
        sending = asyncio.create_task(client.send(sent * count))
        for at in range(count):
            await client.next()
            if at % 5000 == 0:
                most = max(most, daemon.rss_kib())
                if at % 20_000 == 0:
                    await look(daemon.socket)
        await sending
    assert most - before < 2048, f"{before} KiB before, {most} KiB at most"


@pytest.mark.parametrize("length", [-(2**31), -1, 2049, 2**31 - 1])
async def test_a_map_of_cpus_is_no_longer_than_any_host_needs(daemon: PrivateVirtvmand, length: int) -> None:
    before = daemon.rss_kib()
    async with await RawClient.connect(daemon.read_only_socket) as client:
        dom = await domain(client, NAMES[0])
        for asked in (
            client.packet("domain_get_vcpu_pin_info", dom, 2**31 - 1, length, 0),
            client.packet("domain_get_vcpus", dom, 2**31 - 1, length),
        ):
            assert refusal(await client.ask(asked)) == 8
    assert daemon.rss_kib() - before < 1024


async def test_a_domain_that_is_named_often_is_counted_once(daemon: PrivateVirtvmand) -> None:
    async with await RawClient.connect(daemon.socket) as client:
        dom = await domain(client, NAMES[0])
        (records,) = await client.call("connect_get_all_domain_stats", [dom] * 2048, 0, 0)
        assert [one.name for one, _params in records] == [dom.name]
        with pytest.raises(RefusedError, match="16385 is more than 2048"):
            await refused_list(client, dom, 16385)


async def refused_list(client: RawClient, dom: Domain, count: int) -> None:
    """More domains than the layout allows, which our own encoder would refuse too."""
    one = PROCEDURES[NUMBERS["connect_get_all_domain_stats"]].arguments.encode([[dom], 0, 0])
    payload = count.to_bytes(4, "big") + one[4:-8] * count + bytes(8)
    answer = await client.ask(client.packet("connect_get_all_domain_stats", [], 0, 0)._replace(payload=payload))
    raise RefusedError(*wire.read_error(answer.payload))


async def test_no_user_takes_all_connections(daemon: PrivateVirtvmand) -> None:
    async with contextlib.AsyncExitStack() as stack:

        async def more(group: str, count: int, user: int) -> int:
            """How many of so many connections of one user are kept open."""
            kept = 0
            for _ in range(count):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                stack.callback(sock.close)
                with as_user(group):
                    os.seteuid(0)
                    os.seteuid(user)
                    sock.connect(str(daemon.socket))
                sock.setblocking(False)
                client = RawClient(sock)
                with contextlib.suppress(ClosedError):
                    await client.call("connect_open", None, 0)
                    kept += 1
            return kept

        assert await more(LOOKS, 80, 63_001) == 64
        assert await more(OPERATES, 70, 63_002) == 64
        await look(daemon.socket)
        assert await more(LOOKS, 70, 63_003) == 64
        assert await more(LOOKS, 70, 63_004) == 256 - 32 - 3 * 64
        await look(daemon.socket)  # root's are kept for root
    async with asyncio.timeout(20):
        while True:  # when they are gone there is room again
            with contextlib.suppress(ClosedError):
                async with await connected_as(daemon.socket, LOOKS) as client:
                    await domain(client, NAMES[0])
                    break


async def test_five_hundred_that_come_and_go(daemon: PrivateVirtvmand) -> None:
    before = daemon.rss_kib()
    garbage = (b"", b"\0", _PING, b"\0\0\0\x1c" + b"\xff" * 24, b"GET / HTTP/1.1\r\n\r\n", b"\0\0\1\0" + b"x" * 99)
    for at in range(500):
        async with await RawClient.connect(daemon.socket, flags=0 if at % 3 == 0 else None) as client:
            with contextlib.suppress(ClosedError):
                await client.send(garbage[at % len(garbage)])
                if at % 3 == 0:
                    await client.call("connect_domain_event_callback_register_any", 0, None)
    await look(daemon.socket)
    assert daemon.rss_kib() - before < 2048


def test_every_structure_is_known_here() -> None:
    """`arguments` gives each procedure what it takes; a new kind of argument shows here."""
    dom = Domain("x", bytes(16), 1)
    for number, one in PROCEDURES.items():
        assert one.arguments.decode(arguments(number, dom)) is not None
