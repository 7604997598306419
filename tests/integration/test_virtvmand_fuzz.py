"""Random and mutated packets at virtvmand's socket: no crash, no hang, memory flat, everybody else answered rightly.

``EDGEHOLD_FUZZ``: how many packets; ``EDGEHOLD_SEED``: which. They begin as what real clients said and as calls of
every procedure about partitions that are there; no definition has a kernel, so that no guest ever starts. One guest is
there, before its first instruction: it is looked at, and nothing that changes is said of it.
"""

import asyncio
import contextlib
import os
import random
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgehold.api.vmand import Mode, State, VmandClient
from edgehold.errors import EdgeholdError
from edgehold.testing.capability import guest_image, need_command
from edgehold.testing.partitions import private_vmand
from edgehold.testing.virtvmand import PrivateVirtvmand, private_virtvmand
from tests.integration.rawrpc import READ_ONLY, RawClient
from tests.unit.virtvmand_golden import heard
from virtvmand import wire
from virtvmand.table import NUMBERS, PROCEDURES
from virtvmand.wire import Framer
from virtvmand.xdr import BOOLEAN, DOUBLE, INT, LLONG, STRING, STRUCTS, UINT, ULLONG, Param, layout

ROOT = Path(__file__).parents[2]
PACKETS = int(os.environ.get("EDGEHOLD_FUZZ", "1000000"))
SEED = int(os.environ.get("EDGEHOLD_SEED", "1"))
WARM_UP = 0.2
CONNECTIONS = 4
MAX_GROWTH_KIB = 6 * 1024
ANSWER_S = 60.0
OTHERS_S = 5.0
ANCHOR, GUEST = "anchor", "guest"
"""Partitions of which nothing that changes is said."""
NAMES = ("f0", "f1", "f2", "f3")
MOST = 8
_HEADER = struct.Struct(">IIIiiIi")
_WORDS = (0, 1, 2, 3, 4, 16, 255, 16384, 0x3FFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_NUMBERS = (0, 1, 2, 3, 4, 5, 7, 10, 14, 16, 23, 100, 2**31 - 1)
# What many calls can do something with.
_GOOD: dict[str, tuple[Any, ...]] = {
    "flags:u32": (0, 0, 1, 2),
    "type:i32": (0, 1, 2),
    "memory:u64": (16384, 32768),
    "nvcpus:u32": (1, 2),
    "metadata:str?": ("<one/>", "text", None),
    "uri:str?": ("urn:one", None),
    "new_name:str?": (*NAMES, "f9"),
}
_TEXTS = (*NAMES, ANCHOR, "", "a", "vman:///system", "x86_64", "kvm", "urn:one", "<one/>", "<a", "é" * 50, "x" * 3000)
_DEFINITION = """<domain type='kvm'><name>{}</name>{}<memory unit='MiB'>{}</memory><vcpu>1</vcpu>
<metadata><edgehold:partition xmlns:edgehold='urn:edgehold:partition:1' mode='shared'/></metadata>
<os><type arch='x86_64'>hvm</type></os><devices><serial type='pty'/></devices></domain>"""
# What costs vmand a journal's entry, memory or a stream: rarely, and the rest all the more often.
_COSTS = (
    "define", "create_xml", "undefine", "rename", "set_memory", "set_vcpus", "set_metadata", "set_autostart", "console"
)  # fmt: skip
_CONSOLE = NUMBERS["domain_open_console"]
_HARMLESS = [number for number, one in PROCEDURES.items() if not one.changes or number == _CONSOLE]
_SERIALS = 2**31
"""Serials of marks begin here; those of packets are below."""


class Maker:
    """Makes packets from a seed."""

    def __init__(self, seed: int, uuids: list[bytes], guest: bytes) -> None:
        self._dice = random.Random(seed)  # noqa: S311 - reproducible on purpose
        self._uuids = uuids
        self._of_calls = uuids
        said = [one for one in heard() if one.sender == "client"]
        self._cheap = [(one.program, one.procedure, one.kind, one.status, one.payload) for one in said]
        self._costly: list[tuple[int, int, int, int, bytes]] = []
        for number, one in PROCEDURES.items():
            costs = any(word in one.name for word in _COSTS)
            self._of_calls = [*uuids, guest, guest] if number in _HARMLESS else uuids
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
        costly = dice.random() < 0.03
        program, procedure, kind, status, payload = dice.choice(self._costly if costly else self._cheap)
        version = 1
        how = dice.random()
        if how < 0.3 or (costly and how < 0.6):
            pass
        elif how < 0.85:
            payload = self._mutated(payload)
        elif how < 0.92 and procedure in _HARMLESS:  # another's arguments
            payload = dice.choice(self._cheap)[4]
        elif kind == wire.CALL:  # of another type these would end the conversation
            match dice.randrange(4):
                case 0:
                    program = dice.choice((0, wire.KEEPALIVE, wire.REMOTE + 1, wire.REMOTE + 2, 2**32 - 1))
                case 1:
                    version = dice.choice((0, 2, 2**32 - 1))
                case 2:
                    procedure = dice.choice((0, -1, 2**31 - 1, 500, *_HARMLESS))
                case _:
                    status = dice.choice((1, 2, 3, -1))
        if kind == wire.STREAM or procedure == _CONSOLE:  # few serials, so that one meets the other
            serial = dice.randrange(6)
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
        dice, found = self._dice, []
        for one in takes.split():
            good = _GOOD.get(one, ())
            found.append(dice.choice(good) if good and dice.random() < 0.7 else self._value(one.partition(":")[2]))
        return found

    def _value(self, kind: str) -> Any:  # noqa: PLR0911 - a case each
        dice = self._dice
        if kind.endswith("?"):
            return None if dice.randrange(2) else self._value(kind[:-1])
        if kind.startswith("opaque"):
            return dice.randbytes(dice.randrange(9))
        if kind.endswith(">"):
            return [self._value(kind.partition("<")[0]) for _ in range(dice.choice((0, 1, 2, 16)))]
        if kind == "uuid":
            return dice.choice(self._of_calls)
        if kind == "domain":
            return (dice.choice(NAMES), dice.choice(self._of_calls), dice.choice((-1, 1, 2)))
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
    """Sends batches over several connections; an own one looks whether others are answered rightly.

    ``uuids``: of the partitions `NAMES`, of `GUEST`, and of `ANCHOR`.
    """

    def __init__(self, daemon: PrivateVirtvmand, vmand: VmandClient, uuids: list[str]) -> None:
        self._daemon = daemon
        self._vmand = vmand
        self._uuids = uuids
        *others, guest, _anchor = [bytes.fromhex(one.replace("-", "")) for one in uuids]
        self._makers = [Maker(SEED * 1000 + at, others, guest) for at in range(CONNECTIONS)]
        self._left = 0
        self.answers = self.refusals = self.cut_off = 0
        self.slowest_s = 0.0

    async def run(self, count: int) -> None:
        """So many packets."""
        self._left = count
        async with await RawClient.connect(self._daemon.socket) as client, asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch(client))
            await asyncio.wait([group.create_task(self._worker(one)) for one in self._makers])
            watching.cancel()

    async def _watch(self, client: RawClient) -> None:
        while True:
            begin = time.monotonic()
            await check(client)
            self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
            await self._restore()
            await asyncio.sleep(0.1)

    async def _restore(self) -> None:
        """Partitions that were undefined come back, and strangers go, so that there is always something to talk of."""
        there = {one.uuid: one.id for one in await self._vmand.list_partitions()}
        for uuid, number in there.items():
            if uuid not in self._uuids:
                with contextlib.suppress(EdgeholdError):  # the fuzzer was faster
                    await self._vmand.destroy_partition(number)
        for uuid, name in zip(self._uuids, NAMES, strict=False):
            if uuid not in there:
                with contextlib.suppress(EdgeholdError):
                    await create(self._vmand, name, uuid)

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
        assert count == len(domains) <= MOST
        (found,) = await client.call("domain_lookup_by_name", ANCHOR)
        assert found in domains
        assert await client.call("domain_get_state", found, 0) == (5, 0)
        (text,) = await client.call("domain_get_xml_desc", found, 0)
        assert f"<name>{ANCHOR}</name>" in text


async def agree(client: RawClient, vmand: VmandClient) -> None:
    """Both tell of the same partitions, once what was under way has come to its end."""
    async with asyncio.timeout(OTHERS_S):
        while True:
            seen = {(one.name, one.uuid) for one in (await client.call("connect_list_all_domains", 1, 0))[0]}
            there = {(one.name, bytes.fromhex(one.uuid.replace("-", ""))) for one in await vmand.list_partitions()}
            if seen == there:
                return
            await asyncio.sleep(0.05)


async def create(vmand: VmandClient, name: str, uuid: str = "") -> int:
    """A small partition."""
    return await vmand.create_partition(cores=1, memsize_gb=16 / 1024, mode=Mode.SHARED, name=name, uuid=uuid)


async def prepared(vmand: VmandClient) -> list[str]:
    """Partitions to play with; their uuids."""
    kernel, initrd = guest_image(ROOT)
    for name in (*NAMES, GUEST, ANCHOR):
        await create(vmand, name)
    await vmand.deploy(GUEST, kernel=kernel, initrd=initrd, paused=True)
    found = {one.name: one.uuid for one in await vmand.list_partitions()}
    return [found[name] for name in (*NAMES, GUEST, ANCHOR)]


@pytest.mark.slow
async def test_random_and_mutated_packets() -> None:
    need_command("qemu-system-x86_64", "qemu-system-x86")
    settings = {
        "accelerator": "tcg",
        "pool": {"memory_gib": 0.25},
        "log_level": "ERROR",
        "limits": {"partitions": MOST},
    }
    async with (
        private_vmand(settings=settings) as vmand,
        private_virtvmand(vmand, settings={"log_level": "ERROR"}) as daemon,
        await vmand.client() as client,
    ):
        fuzz = Fuzz(daemon, client, await prepared(client))
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
        assert (await client.status(GUEST)).state is State.SUSPENDED
        async with await RawClient.connect(daemon.socket) as other:
            await check(other)
            await agree(other, client)
