"""A QEMU that was taken over says what it likes on its monitor: vmand lives, believes nothing, and does not grow."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from edgehold.errors import FailedError
from vmand.backend.qmp import Monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}
STOP = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n'


class Liar:
    """A monitor's other end: answers as it is told to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self.flood = False
        self.conversations = 0
        self.heard: list[str] = []

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.conversations += 1
        try:
            writer.write(json.dumps(GREETING).encode() + b"\r\n")
            decoder = json.JSONDecoder()
            text = ""
            while data := await reader.read(4096):
                text += data.decode()
                while text:
                    asked, end = decoder.raw_decode(text)
                    text = text[end:].lstrip()
                    answer = {"return": self.answers.get(asked["execute"], {})}
                    writer.write(json.dumps(answer | ({"id": asked["id"]} if "id" in asked else {})).encode() + b"\r\n")
                while self.flood:
                    writer.write(STOP * 2000)
                    await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def liar(tmp_path: Path) -> AsyncIterator[Liar]:
    one = Liar(tmp_path / "s")
    server = await asyncio.start_unix_server(one.converse, one.path)
    yield one
    server.close()


@pytest.fixture
async def monitor(liar: Liar) -> AsyncIterator[Monitor]:
    one = Monitor(liar.path, who="partition 1", timeout_s=20, on_event=liar.heard.append)
    yield one
    await one.close()


@pytest.mark.parametrize(
    "answer", [None, 5, [], {}, {"status": 7}, {"status": ["running"]}, {"status": None}, "running", [[[[]]]]]
)
async def test_an_answer_of_another_kind(liar: Liar, monitor: Monitor, answer: object) -> None:
    liar.answers["query-status"] = answer
    with pytest.raises(FailedError, match="as no QEMU does"):
        await monitor.status()
    assert not monitor.task.done()


@pytest.mark.parametrize("answer", [None, {}, [5], [{"cpu-index": 0}], [{"cpu-index": "0", "thread-id": 1}]])
async def test_threads_that_are_none(liar: Liar, monitor: Monitor, answer: object) -> None:
    liar.answers["query-cpus-fast"] = answer
    with pytest.raises(FailedError, match="as no QEMU does"):
        await monitor.vcpus()


async def test_words_are_words(liar: Liar, monitor: Monitor) -> None:
    liar.answers["query-status"] = {"status": "x" * 100_000}
    found, word = await monitor.status()
    assert (found, len(word)) == (None, 100_000)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - a liar has no event to wait for
            await asyncio.sleep(0.005)


async def test_a_flood_of_events_is_cut_off_and_told_once_in_a_while(liar: Liar, monitor: Monitor) -> None:
    await monitor.wait_connected(20)
    liar.flood = True
    await asyncio.gather(monitor.status(), return_exceptions=True)
    await until(lambda: liar.conversations >= 4)  # cut off each time, and tried again
    assert liar.heard.count("STOP") <= 20 * liar.conversations
    liar.flood = False
    await until(lambda: not monitor.task.done() and monitor._client is not None)
    liar.answers["query-status"] = {"status": "running"}
    async with asyncio.timeout(30):
        while True:
            try:
                assert (await monitor.status())[1] == "running"
                break
            except Exception:  # noqa: BLE001, S112 - the last of the floods may still be cut off
                continue
