"""``vmanctl console`` in a pseudo-terminal: a dialogue, and a terminal that is as it was, however it ends."""

import asyncio
import os
import select
import signal
import socket
import subprocess
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from edgehold.api.vmand import Event
from edgehold.errors import BadStateError
from tests.unit.vmanctl_fake import DEADLINE_S, FakeVmand, Terminal, ended, fake_vmand, start
from tests.unit.vmanctl_fake import vmanctl as run


@pytest_asyncio.fixture
async def vmand() -> AsyncIterator[FakeVmand]:
    async with fake_vmand() as one:
        yield one


@pytest_asyncio.fixture
async def terminal() -> AsyncIterator[Terminal]:
    one = Terminal()
    yield one
    one.close()


class Guest:
    """The other side of a console."""

    def __init__(self, vmand: FakeVmand) -> None:
        self._here, there = socket.socketpair()
        self._here.setblocking(False)
        vmand.hand_out(there.fileno())
        self._there: socket.socket | None = there

    def attached(self) -> None:
        """Somebody has the other end: only that one has it."""
        if self._there is not None:
            self._there.close()
            self._there = None

    def prints(self, data: bytes) -> None:
        self._here.setblocking(True)
        self._here.sendall(data)
        self._here.setblocking(False)

    async def reads(self, expected: bytes) -> None:
        loop, data = asyncio.get_running_loop(), b""
        async with asyncio.timeout(DEADLINE_S):
            while len(data) < len(expected):
                data += await loop.sock_recv(self._here, 4096)
        assert data == expected

    async def is_left(self) -> None:
        """Until nobody has the other end."""
        async with asyncio.timeout(DEADLINE_S):
            assert await asyncio.get_running_loop().sock_recv(self._here, 4096) == b""

    def close(self) -> None:
        self.attached()
        self._here.close()


@pytest.fixture
def guest(vmand: FakeVmand) -> Iterator[Guest]:
    one = Guest(vmand)
    yield one
    one.close()


async def attach(vmand: FakeVmand, guest: Guest, terminal: Terminal, *words: str) -> Process:
    fd = terminal.fd
    process = await start(vmand.socket, "console", "web", *words, stdin=fd, stdout=fd, stderr=fd)
    await terminal.until("ends it, the guest goes on")
    await terminal.is_raw()
    guest.attached()
    return process


async def test_a_dialogue(vmand: FakeVmand, guest: Guest, terminal: Terminal) -> None:
    guest.prints(b"the last output\r\n# ")
    process = await attach(vmand, guest, terminal)
    assert vmand.asked == [("attach-console", {"id": "web"})]
    await terminal.until("the last output\r\n# ")
    terminal.type(b"ls\r\x03\x1a\x04\x11\x13")  # ^C ^Z ^D ^Q ^S are the guest's
    await guest.reads(b"ls\r\x03\x1a\x04\x11\x13")
    guest.prints("größe \x1b[1m\r\n".encode())
    await terminal.until("größe \x1b[1m\r\n")
    terminal.type(b"exit\r\x1dnot this")
    await guest.reads(b"exit\r")
    await guest.is_left()
    assert (await ended(process)).status == 0
    await terminal.until("the guest goes on")
    assert terminal.attributes() == terminal.before


async def test_another_key(vmand: FakeVmand, guest: Guest, terminal: Terminal) -> None:
    process = await attach(vmand, guest, terminal, "--escape", "^q")
    assert "; ^Q ends it" in terminal.shown
    terminal.type(b"\x1d\x11")
    await guest.reads(b"\x1d")
    assert (await ended(process)).status == 0


async def test_the_guest_ends(vmand: FakeVmand, guest: Guest, terminal: Terminal) -> None:
    process = await attach(vmand, guest, terminal)
    guest.prints(b"power-off\r\n" * 2000)
    guest.prints(b"the end\r\n")
    guest.close()
    await terminal.until("the end\r\n")
    await terminal.until("the console has ended; vmanctl status web says why")
    assert (await ended(process)).status == 0
    assert terminal.shown.count("power-off\r\n") == 2000
    assert terminal.attributes() == terminal.before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
async def test_a_signal_leaves_the_terminal_as_it_was(
    vmand: FakeVmand, guest: Guest, terminal: Terminal, number: signal.Signals
) -> None:
    process = await attach(vmand, guest, terminal)
    process.send_signal(number)
    assert (await ended(process)).status == 128 + number
    assert terminal.attributes() == terminal.before
    await guest.is_left()


async def test_a_reader_that_left_leaves_the_terminal_as_it_was(
    vmand: FakeVmand, guest: Guest, terminal: Terminal
) -> None:
    read, write = os.pipe()
    fd = terminal.fd
    process = await start(vmand.socket, "console", "web", stdin=fd, stdout=write, stderr=fd)
    os.close(write)
    await terminal.is_raw()
    os.close(read)
    guest.prints(b"nobody reads this\r\n")
    assert (await ended(process)).status == 1
    assert terminal.attributes() == terminal.before


async def test_the_terminal_hangs_up(vmand: FakeVmand, guest: Guest, terminal: Terminal) -> None:
    process = await attach(vmand, guest, terminal)
    terminal.hang_up()
    done = await ended(process)
    assert done.status == 129
    await guest.is_left()


@pytest.mark.parametrize("stuck", ["the guest", "the screen"])
async def test_the_key_is_heard_when_a_side_is_stuck(
    vmand: FakeVmand, guest: Guest, terminal: Terminal, stuck: str
) -> None:
    process = await attach(vmand, guest, terminal)
    if stuck == "the guest":
        for _ in range(200):  # far more than the socket and the program hold
            terminal.type(b"x" * 2048)
            await asyncio.to_thread(_until_read, terminal.fd)
    else:
        terminal.look_away()
        guest.prints(b"y" * 50_000)
        await asyncio.to_thread(_until_full, terminal.fd)
    terminal.type(b"\x1d")
    await asyncio.to_thread(_until_read, terminal.fd)
    terminal.watch()
    assert (await ended(process)).status == 0
    assert terminal.attributes() == terminal.before


def _until_read(fd: int) -> None:
    _until(lambda: not select.select([fd], [], [], 0)[0])


def _until_full(fd: int) -> None:
    _until(lambda: not select.select([], [fd], [], 0)[1])


def _until(condition: Callable[[], bool]) -> None:
    import time

    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


async def test_a_refusal(vmand: FakeVmand, terminal: Terminal) -> None:
    vmand.answers["attach-console"] = BadStateError("partition 2 is READY; no guest is there to talk to")
    fd = terminal.fd
    done = await ended(await start(vmand.socket, "console", "2", stdin=fd, stdout=fd, stderr=fd))
    assert done.status == 1
    await terminal.until("bad-state: partition 2 is READY")
    done = await run(vmand.socket, "console", "2")
    assert (done.status, "stdin is no terminal" in done.err) == (64, True)


async def test_the_tail(vmand: FakeVmand) -> None:
    vmand.answers["console"] = {"text": "one\r\ntwo\r\nthree\r\n"}
    assert (await run(vmand.socket, "console", "2", "--tail")).out == "one\r\ntwo\r\nthree\n"
    assert (await run(vmand.socket, "console", "2", "--tail", "--lines=2")).out == "two\r\nthree\n"
    assert (await run(vmand.socket, "console", "2", "--tail", "--json")).out.strip().endswith('three\\r\\n"\n}')


async def test_the_tail_follows_until_the_partition_is_gone(vmand: FakeVmand) -> None:
    vmand.answers["subscribe"] = {"text": "before\n"}
    process = await start(vmand.socket, "console", "2", "--tail", "--follow")
    await vmand.asked_for("subscribe")
    assert vmand.asked == [("subscribe", {"id": 2, "console": True})]
    (connection,) = vmand.connections
    connection.send_event("partition", Event(kind="console", partition=2, time_s=1.0, text="after"))
    connection.send_event("partition", Event(kind="gone", partition=2, time_s=2.0))
    done = await ended(process)
    assert (done.status, done.out, done.err) == (0, "before\nafter", "")


async def test_a_vmand_that_goes_away_is_told(vmand: FakeVmand) -> None:
    process = await start(vmand.socket, "console", "2", "--follow", stdout=subprocess.PIPE)
    await vmand.asked_for("subscribe")
    for connection in vmand.connections:
        connection._stream.close()
    done = await ended(process)
    assert (done.status, "unavailable" in done.err) == (75, True)
