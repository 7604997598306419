"""Random and mutated frames at vmand's control socket: no crash, no hang, memory flat. EDGEHOLD_FUZZ: how many."""

import asyncio
import contextlib
import json
import os
import random
import sys
import time

import pytest

from edgehold.testing.capability import need_command
from edgehold.testing.partitions import PrivateVmand, private_vmand

FRAMES = int(os.environ.get("EDGEHOLD_FUZZ", "100000"))
BATCH = 100
WARM_UP = 0.2
WORDS = [
    "create-partition", "deploy", "suspend", "restore", "reboot", "shutdown", "destroy-partition", "list", "status",
    "vcpus", "console", "subscribe", "id", "partition_id", "cores", "memsize", "secure", "mode", "name", "kernel",
    "initrd", "dtb", "cmdline", "timeout_s", "force", "command", "args", "shared", "dedicated", "/dev/null", "/etc",
]  # fmt: skip
VALUES: list[object] = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    0.02,
    1e300,
    2**63,
    2**64,
    "",
    "x" * 3000,
    "\0",
    "é",
    [],
    {},
    [[]],
    {"a": {"b": 1}},
]


def value(dice: random.Random) -> object:
    return dice.choice(WORDS) if dice.random() < 0.4 else dice.choice(VALUES)


def request(dice: random.Random) -> dict[str, object]:
    """A request that is more or less one."""
    args = {dice.choice(WORDS): value(dice) for _ in range(dice.randrange(5))}
    if dice.random() < 0.5:
        args["id"] = dice.randrange(1, 8)
    if dice.random() < 0.1:
        args = {"cores": 1, "memsize": 0.016, "mode": "shared"}
    one: dict[str, object] = {"command": dice.choice(WORDS) if dice.random() < 0.9 else value(dice), "args": args}
    if dice.random() < 0.7:
        one["id"] = dice.randrange(10**6)
    if dice.random() < 0.1:
        one[dice.choice(WORDS)] = value(dice)
    return one


def frame(dice: random.Random) -> bytes:
    kind = dice.random()
    if kind < 0.2:
        return dice.randbytes(dice.randrange(200)).replace(b"\n", b"")
    line = bytearray(json.dumps(request(dice)).encode())
    if kind < 0.7:
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(line))
            if dice.random() < 0.3:
                del line[at : at + dice.randrange(1, 9)]
            else:
                line[at] = dice.randrange(256)
            if not line:
                break
    if kind > 0.999:
        line = bytearray(b'{"command":"list","args":' + b"[" * dice.randrange(5000) + b"1}")
    return bytes(line).replace(b"\n", b"")


async def converse(vmand: PrivateVmand, dice: random.Random, count: int) -> int:
    """Send frames pipelined and read the answers; how many came."""
    answers = 0
    while count > 0:
        reader, writer = await asyncio.open_unix_connection(str(vmand.socket), limit=1 << 22)
        try:
            for _ in range(20):
                frames = [frame(dice) for _ in range(min(BATCH, count))]
                if not frames:
                    break
                count -= len(frames)
                writer.write(b"".join(one + b"\n" for one in frames))
                writer.write(b'{"command":"status","args":{"id":999999},"id":"mark"}\n')
                await writer.drain()
                async with asyncio.timeout(30):
                    while b'"id":"mark"' not in await reader.readline():
                        answers += 1
            if dice.random() < 0.3:
                writer.write(frame(dice))  # and half a frame
        finally:
            writer.close()
            await writer.wait_closed()
    return answers


@pytest.mark.slow
async def test_random_and_mutated_frames() -> None:
    need_command("qemu-system-x86_64", "qemu-system-x86")
    seed = int(os.environ.get("EDGEHOLD_SEED", random.SystemRandom().randrange(10**6)))
    settings = {"accelerator": "tcg", "pool": {"memory_gib": 0.125}, "log_level": "ERROR", "limits": {"partitions": 8}}
    async with private_vmand(settings=settings) as vmand:
        begin = time.monotonic()
        dices = [random.Random(seed + n) for n in range(4)]  # noqa: S311 - a seed, to repeat a failure
        share = int(FRAMES * WARM_UP / len(dices))
        await asyncio.gather(*(converse(vmand, dice, share) for dice in dices))
        warm = vmand.rss_kib()
        rest = FRAMES // len(dices) - share
        answers = sum(await asyncio.gather(*(converse(vmand, dice, rest) for dice in dices)))
        after = vmand.rss_kib()
        took = time.monotonic() - begin
        sys.stdout.write(
            f"\nseed {seed}: {FRAMES} frames, {took:.1f} s, {answers} answers, RSS {warm} -> {after} KiB\n"
        )
        assert took < 120 * max(1.0, FRAMES / 100_000)
        assert after - warm < 4 * 1024
        assert "a bug" not in vmand.log_text()
        assert "Traceback" not in vmand.log_text()
        async with await vmand.client() as client:
            assert len(await client.list_partitions()) <= 8
    assert vmand.remains() == []


async def test_a_line_that_never_ends() -> None:
    async with private_vmand() as vmand:
        reader, writer = await asyncio.open_unix_connection(str(vmand.socket))
        writer.write(b"x" * (1 << 20))
        async with asyncio.timeout(10):
            assert b"longer than" in await reader.readline()
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        async with await vmand.client() as client:
            assert await client.list_partitions() == []
