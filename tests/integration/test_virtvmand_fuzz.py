"""Random and mutated packets at virtvmand's socket: no crash, no hang, memory flat, everybody else answered rightly.

``EDGEHOLD_FUZZ``: how many packets; ``EDGEHOLD_SEED``: which. They begin as what real clients said and as calls of
every procedure about partitions that are there; no definition has a kernel, so that no guest ever starts.
"""

import asyncio
import os
import random
import socket
import struct
import sys
import time
from typing import Any

import pytest

from edgehold.api.vmand import Mode, Partition
from edgehold.testing.capability import need_command
from edgehold.testing.partitions import PrivateVmand, private_vmand
from edgehold.testing.virtvmand import PrivateVirtvmand, private_virtvmand
from tests.integration.rawrpc import READ_ONLY, RawClient
from tests.unit.virtvmand_golden import heard
from virtvmand import wire
from virtvmand.table import NUMBERS, PROCEDURES
from virtvmand.wire import Framer
from virtvmand.xdr import BOOLEAN, DOUBLE, INT, LLONG, STRING, STRUCTS, UINT, ULLONG, Param, layout

PACKETS = int(os.environ.get("EDGEHOLD_FUZZ", "1000000"))
SEED = int(os.environ.get("EDGEHOLD_SEED", "1"))
WARM_UP = 0.2
CONNECTIONS = 4
MAX_GROWTH_KIB = 6 * 1024
ANSWER_S = 60.0
OTHERS_S = 5.0
ANCHOR = "anchor"
"""A partition whose uuid the fuzzer never says."""
NAMES = ("f0", "f1", "f2", "f3")
_HEADER = struct.Struct(">IIIiiIi")
_WORDS = (0, 1, 2, 3, 4, 16, 255, 16384, 0x3FFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_NUMBERS = (0, 1, 2, 3, 4, 5, 7, 10, 14, 16, 23, 100, 2**31 - 1)
_TEXTS = (*NAMES, ANCHOR, "", "a", "vman:///system", "x86_64", "kvm", "urn:one", "<one/>", "<a", "é" * 50, "x" * 3000)
_DEFINITION = """<domain type='kvm'><name>{}</name>{}<memory unit='MiB'>{}</memory><vcpu>1</vcpu>
<metadata><edgehold:partition xmlns:edgehold='urn:edgehold:partition:1' mode='shared'/></metadata>
<os><type arch='x86_64'>hvm</type></os><devices><serial type='pty'/></devices></domain>"""
# What costs vmand a journal's entry or memory: rarely, and the rest all the more often.
_COSTS = ("define", "create_xml", "undefine", "rename", "set_memory", "set_vcpus", "set_metadata", "set_autostart")
_SERIALS = 2**31
"""Serials of marks begin here; those of packets are below."""


class Maker:
    """Makes packets from a seed."""

    def __init__(self, seed: int, uuids: list[bytes]) -> None:
        self._dice = random.Random(seed)  # noqa: S311 - reproducible on purpose
        self._uuids = uuids
        said = [one for one in heard() if one.sender == "client"]
        self._cheap = [(one.program, one.procedure, one.kind, one.status, one.payload) for one in said]
        self._costly: list[tuple[int, int, int, int, bytes]] = []
        for number, one in PROCEDURES.items():
            costs = any(word in one.name for word in _COSTS)
            for _ in range(12):
                values = self._values(one.takes)
                made = (wire.REMOTE, number, wire.CALL, wire.OK, one.arguments.encode(values))
                (self._costly if costs else self._cheap).append(made)

    def batch(self, *, serial: int) -> tuple[bytes, int, bool]:
        """Some packets as bytes, how many they are, and whether the conversation goes on after them."""
        dice = self._dice
        count = dice.choice((1, 5, 20, 100, 100, 100))
        data = b"".join(self._packet(serial + at) for at in range(count))
        if dice.random() < 0.97:
            return data, count, True
        # The last one breaks the rules of the wire, or is not all there.
        last = bytearray(self._packet(serial + count))
        match dice.randrange(5):
            case 0:
                last[:4] = dice.choice((0, 4, 27, len(last) + 4, 2**20 + 1, 2**25, 2**31, 2**32 - 1)).to_bytes(4, "big")
            case 1:
                last[16:20] = dice.choice((1, 2, 4, 5, 6, 99, 2**32 - 1)).to_bytes(4, "big")
            case 2:
                del last[dice.randrange(len(last)) :]
            case 3:
                last = bytearray(dice.randbytes(dice.randrange(300)))
            case _:
                last += dice.randbytes(dice.randrange(1, 60))
        return data + bytes(last), count + 1, False

    def _packet(self, serial: int) -> bytes:
        dice = self._dice
        costly = dice.random() < 0.01
        program, procedure, kind, status, payload = dice.choice(self._costly if costly else self._cheap)
        version = 1
        how = dice.random()
        if how < 0.3 or (costly and how < 0.6):
            pass
        elif how < 0.85:
            payload = self._mutated(payload)
        elif how < 0.92:  # another's arguments
            payload = dice.choice(self._cheap)[4]
        elif kind == wire.CALL:  # of another type these would end the conversation
            match dice.randrange(4):
                case 0:
                    program = dice.choice((0, wire.KEEPALIVE, wire.REMOTE + 1, wire.REMOTE + 2, 2**32 - 1))
                case 1:
                    version = dice.choice((0, 2, 2**32 - 1))
                case 2:
                    procedure = dice.choice((0, -1, dice.randrange(500), 2**31 - 1))
                case _:
                    status = dice.choice((1, 2, 3, -1))
        return _HEADER.pack(28 + len(payload), program, version, procedure, kind, serial, status) + payload

    def _mutated(self, payload: bytes) -> bytes:
        dice, raw = self._dice, bytearray(payload)
        for _ in range(dice.choice((1, 1, 2, 4))):
            size = len(raw)
            match dice.randrange(6):
                case 0 | 1 if size >= 4:  # a count, a length, a number
                    at = 4 * dice.randrange(size // 4)
                    raw[at : at + 4] = dice.choice(_WORDS).to_bytes(4, "big")
                case 2 if size:
                    raw[dice.randrange(size)] ^= 1 << dice.randrange(8)
                case 3 if size:
                    del raw[dice.randrange(size) :]
                case 4 if size >= 16:
                    at = dice.randrange(size)
                    raw[at:at] = raw[at : at + dice.randrange(40)]
                case _:
                    raw += dice.randbytes(dice.choice((1, 4, 8, 40)))
        return bytes(raw)

    def _values(self, takes: str) -> list[Any]:
        return [self._value(one.partition(":")[2]) for one in takes.split()]

    def _value(self, kind: str) -> Any:  # noqa: PLR0911 - a case each
        dice = self._dice
        if kind.endswith("?"):
            return None if dice.randrange(2) else self._value(kind[:-1])
        if kind.startswith("opaque"):
            return dice.randbytes(dice.randrange(9))
        if kind.endswith(">"):
            return [self._value(kind.partition("<")[0]) for _ in range(dice.choice((0, 1, 2, 16)))]
        if kind == "uuid":
            return dice.choice(self._uuids)
        if kind == "domain":
            return (dice.choice(NAMES), dice.choice(self._uuids), dice.choice((-1, 1, 2)))
        if kind == "param":
            which = dice.choice((INT, UINT, LLONG, ULLONG, DOUBLE, BOOLEAN, STRING))
            return Param(dice.choice(_TEXTS), which, dice.choice(_TEXTS) if which == STRING else dice.choice(_NUMBERS))
        if kind in STRUCTS:
            return tuple(self._values(STRUCTS[kind]))
        if kind == "str":
            return self._definition() if dice.random() < 0.5 else dice.choice(_TEXTS)
        return dice.choice(_NUMBERS)

    def _definition(self) -> str:
        dice, name = self._dice, self._dice.randrange(len(NAMES))
        uuid = f"<uuid>{self._uuids[name].hex()}</uuid>" if dice.randrange(2) else ""
        text = _DEFINITION.format(NAMES[name], uuid, dice.choice((16, 16, 32, 0, 10**6)))
        for _ in range(dice.choice((0, 0, 1, 5))):
            at = dice.randrange(len(text))
            text = text[:at] + dice.choice(("<", ">", "'", "&", "&#0;", "\n", "é", "", "<vcpu/>")) + text[at + 1 :]
        return text


class Fuzz:
    """Sends batches over several connections; an own one looks whether others are answered rightly."""

    def __init__(self, daemon: PrivateVirtvmand, uuids: list[bytes]) -> None:
        self._daemon = daemon
        self._makers = [Maker(SEED * 1000 + at, uuids) for at in range(CONNECTIONS)]
        self._left = 0
        self.answers = self.refusals = self.cut_off = 0
        self.slowest_s = 0.0

    async def run(self, count: int) -> None:
        """So many packets."""
        self._left = count
        async with await RawClient.connect(self._daemon.socket) as client, asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch(client))
            await asyncio.gather(*[group.create_task(self._worker(one)) for one in self._makers])
            watching.cancel()

    async def _watch(self, client: RawClient) -> None:
        while True:
            begin = time.monotonic()
            await check(client)
            self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
            await asyncio.sleep(0.1)

    async def _worker(self, maker: Maker) -> None:
        at = 0
        while self._left > 0:
            path, flags = self._daemon.socket, 0
            if at % 7 == 3:
                path, flags = self._daemon.read_only_socket, READ_ONLY
            async with await RawClient.connect(path, flags=None if at % 11 == 5 else flags) as client:
                await self._converse(maker, client, opened=at % 11 != 5)
            at += 1

    async def _converse(self, maker: Maker, client: RawClient, *, opened: bool) -> None:
        """Until a batch ends the conversation, or for 30 of them."""
        answers = Answers(client.sock)
        for at in range(30):
            data, count, goes_on = maker.batch(serial=at * 1000)
            self._left -= count
            # A call that is answered at once, by whose answer all before it were taken.
            mark = NUMBERS["domain_lookup_by_name" if opened else "auth_list"]
            payload = layout("name:str").encode((ANCHOR,)) if opened else b""
            if goes_on:
                data += _HEADER.pack(28 + len(payload), wire.REMOTE, 1, mark, wire.CALL, _SERIALS + at, 0) + payload
            sending = asyncio.create_task(client.send(data))
            try:
                if goes_on:
                    await answers.until(_SERIALS + at, mark)
                    await sending
                else:
                    await asyncio.gather(sending, return_exceptions=True)
                    client.sock.shutdown(socket.SHUT_WR)
                    await answers.until_closed()
                    self.cut_off += 1
                    break
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            assert self._daemon.running, self._daemon.log_text()[-3000:]
            if self._left <= 0:
                break
        self.answers += answers.count
        self.refusals += answers.refusals


class Answers:
    """What the server says, all of which must be packets that a client understands."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._framer = Framer(32 * 1024 * 1024 + 4)
        self.count = self.refusals = 0

    async def until(self, serial: int, procedure: int) -> None:
        """Until the answer with this serial, which must be a good one."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_S):
            while True:
                while (one := self._framer.next()) is not None:
                    self._count(one)
                    if one.serial == serial and one.kind == wire.REPLY:
                        assert (one.procedure, one.status) == (procedure, wire.OK), one
                        return
                data = await loop.sock_recv(self._sock, 1 << 18)
                assert data, "the server ended a conversation that kept the rules of the wire"
                self._framer.feed(data)

    async def until_closed(self) -> None:
        """Until the server's end."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_S):
            while True:
                try:
                    data = await loop.sock_recv(self._sock, 1 << 18)
                except ConnectionError:
                    return
                if not data:
                    return
                self._framer.feed(data)
                while (one := self._framer.next()) is not None:
                    self._count(one)

    def _count(self, packet: wire.Packet) -> None:
        self.count += 1
        if packet.kind == wire.REPLY and packet.status == wire.ERROR:
            self.refusals += 1
            if self.refusals % 50 == 0:
                code, text = wire.read_error(packet.payload)
                assert code > 1, text  # 1 is a bug of ours
        elif packet.kind == wire.REPLY and self.count % 50 == 0:
            PROCEDURES[packet.procedure].returns.decode(packet.payload)


async def check(client: RawClient) -> None:
    """What a client that keeps to the rules sees is right."""
    async with asyncio.timeout(OTHERS_S):
        domains, count = await client.call("connect_list_all_domains", 1, 0)
        assert count == len(domains) <= 8
        (found,) = await client.call("domain_lookup_by_name", ANCHOR)
        assert found in domains
        assert await client.call("domain_get_state", found, 0) == (5, 0)
        (text,) = await client.call("domain_get_xml_desc", found, 0)
        assert f"<name>{ANCHOR}</name>" in text


async def prepared(vmand: PrivateVmand) -> list[bytes]:
    """Partitions to play with; their uuids."""
    async with await vmand.client() as client:
        for name in (ANCHOR, *NAMES):
            await client.create_partition(cores=1, memsize_gb=16 / 1024, mode=Mode.SHARED, name=name)
        found = {one.name: bytes.fromhex(one.uuid.replace("-", "")) for one in await client.list_partitions()}
    return [found[name] for name in NAMES]


@pytest.mark.slow
async def test_random_and_mutated_packets() -> None:
    need_command("qemu-system-x86_64", "qemu-system-x86")
    settings = {"accelerator": "tcg", "pool": {"memory_gib": 0.25}, "log_level": "ERROR", "limits": {"partitions": 8}}
    async with (
        private_vmand(settings=settings) as vmand,
        private_virtvmand(vmand, settings={"log_level": "ERROR"}) as daemon,
    ):
        fuzz = Fuzz(daemon, await prepared(vmand))
        begin = time.monotonic()
        await fuzz.run(int(PACKETS * WARM_UP))
        warm = daemon.rss_kib()
        await fuzz.run(int(PACKETS * (1 - WARM_UP)))
        after, took = daemon.rss_kib(), time.monotonic() - begin
        sys.stdout.write(
            f"\nseed {SEED}: {PACKETS} packets, {took:.1f} s ({PACKETS / took:.0f}/s), {fuzz.answers} answers, "
            f"{fuzz.refusals} refusals, {fuzz.cut_off} conversations broken; others waited at most "
            f"{fuzz.slowest_s * 1000:.0f} ms; RSS {warm} -> {after} KiB\n"
        )
        assert after - warm < MAX_GROWTH_KIB
        assert daemon.log_text() == ""
        assert "Traceback" not in vmand.log_text()
        async with await vmand.client() as client, await RawClient.connect(daemon.socket) as other:
            await check(other)
            assert sorted(names(await client.list_partitions())) == sorted(
                one.name for one in (await other.call("connect_list_all_domains", 1, 0))[0]
            )
        assert vmand.guests() == []


def names(partitions: list[Partition]) -> list[str]:
    return [one.name for one in partitions]
