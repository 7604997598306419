"""A vmand that answers what a test tells it to, vmanctl as a process, and a terminal for it."""

import asyncio
import contextlib
import os
import pty
import subprocess
import sys
import termios
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgehold.api.vmand import CoresGrade, MemoryGrade, Mode, Partition, State
from edgehold.errors import EdgeholdError
from edgehold.testing.daemons import private_directory
from edgehold.wire.control import Answer, Connection, ControlServer, bind_unix
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Roles

DEADLINE_S = 60.0
PARTITION = Partition(
    id=2,
    name="web",
    uuid="5b0a1f2e-0000-4000-8000-000000000002",
    state=State.DEPLOYED,
    mode=Mode.DEDICATED,
    cores=2,
    memory_bytes=512 << 20,
    cpus=(2, 3),
    node=0,
    cores_grade=CoresGrade.ISOLATED,
    memory_grade=MemoryGrade.HUGETLB,
    accelerator="kvm",
    arch="x86_64",
    pid=4711,
)


class FakeVmand:
    """Answers each command with what stands in ``answers``: a value, or an error that it raises."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.answers: dict[str, Any] = {"status": PARTITION, "list": [PARTITION], "subscribe": {"text": ""}}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.connections: list[Connection] = []
        self.came = asyncio.Event()

    async def handle(self, connection: Connection, request: Request) -> Any:
        self.asked.append((request.command, request.args))
        self.connections.append(connection)
        self.came.set()
        answer = self.answers.get(request.command, {})
        if isinstance(answer, EdgeholdError):
            raise answer
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            return {}
        return answer() if callable(answer) else answer

    def hand_out(self, fd: int) -> None:
        """What ``attach-console`` answers."""
        self.answers["attach-console"] = lambda: Answer({}, (os.dup(fd),))

    async def asked_for(self, command: str, times: int = 1) -> None:
        """Until somebody asked."""
        async with asyncio.timeout(DEADLINE_S):
            while [name for name, _args in self.asked].count(command) < times:
                self.came.clear()
                await self.came.wait()


@contextlib.asynccontextmanager
async def fake_vmand() -> AsyncIterator[FakeVmand]:
    """One that listens."""
    with private_directory("eh-ctl-") as directory:
        vmand = FakeVmand(directory / "control.sock")
        server = ControlServer(vmand.handle, roles=Roles())
        await server.listen(bind_unix(vmand.socket))
        try:
            yield vmand
        finally:
            await server.close()


@dataclass(frozen=True, slots=True)
class Done:
    """What a vmanctl that has ended said."""

    status: int
    out: str
    err: str


def environment(socket: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """vmanctl's own: nothing of whoever runs the tests."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}
    return {**kept, "VMAND_SOCKET": str(socket), "LC_ALL": "C.UTF-8", "TERM": "vt100", **(more or {})}


async def start(
    socket: Path,
    *words: object,
    more: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> Process:
    """Run vmanctl as a child."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "vmand.cli",
        *map(str, words),
        env=environment(socket, more),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
    )


async def ended(process: Process) -> Done:
    """Until it has ended."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Done(process.returncode, (out or b"").decode(), (err or b"").decode())


async def vmanctl(socket: Path, *words: object, more: Mapping[str, str] | None = None) -> Done:
    """Run it to its end; its stdin is no terminal."""
    return await ended(await start(socket, *words, more=more))


class Terminal:
    """A pseudo-terminal: a person types on one end, a program has the other (``fd``)."""

    def __init__(self) -> None:
        self._master, self.fd = pty.openpty()
        os.set_blocking(self._master, False)
        termios.tcsetwinsize(self.fd, (24, 80))
        self.before = self.attributes()
        self.text = self.shown = ""
        self._came = asyncio.Event()
        self.watch()

    def watch(self) -> None:
        """Look at the screen (again)."""
        asyncio.get_running_loop().add_reader(self._master, self._read)

    def look_away(self) -> None:
        """Let the screen stand still."""
        asyncio.get_running_loop().remove_reader(self._master)

    def attributes(self) -> list[Any]:
        """As termios(3) has them."""
        return termios.tcgetattr(self.fd)

    def type(self, keys: bytes) -> None:
        """Press keys."""
        assert os.write(self._master, keys) == len(keys)

    async def until(self, text: str) -> None:
        """Until this stands on the screen; what was shown before it is forgotten with it."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while text not in self.text:
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise AssertionError(f"{text!r} was not shown; this was: {self.text[-2000:]!r}") from None
        self.text = self.text.partition(text)[2]

    async def is_raw(self) -> None:
        """Until a program has made it raw."""
        async with asyncio.timeout(DEADLINE_S):
            while self.attributes()[3] & (termios.ICANON | termios.ECHO):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.01)

    def hang_up(self) -> None:
        """Close the person's end."""
        if self._master >= 0:
            self.look_away()
            os.close(self._master)
            self._master = -1

    def close(self) -> None:
        """Both ends."""
        self.hang_up()
        os.close(self.fd)

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the other end is closed everywhere
            self.look_away()
            return
        text = data.decode(errors="replace")
        self.text += text
        self.shown += text
        self._came.set()
