"""A process of the system's Python with python3-libvirt in it (`tests.libvirt.client`), as an object to ask.

async with libvirt_python() as python:
    await python.do("open", uri=uri, name="c")
    domain = await python.call("c", "lookupByName", "web", name="d")
"""

import asyncio
import contextlib
import json
import subprocess
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from edgehold.testing.capability import missing
from edgehold.testing.daemons import private_directory
from tests.libvirt.virsh import environment

SYSTEM_PYTHON = "/usr/bin/python3"  # python3-libvirt is Debian's, for Debian's Python
CLIENT = Path(__file__).with_name("client.py")
DEADLINE_S = 60.0
LINE_BYTES = 16 << 20

LIFECYCLE, REBOOT = 0, 1
"""virDomainEventID."""


def need_libvirt_python() -> None:
    """The system's Python has the module."""
    asked = [SYSTEM_PYTHON, "-I", "-c", "import libvirt"]
    if not Path(SYSTEM_PYTHON).exists() or subprocess.run(asked, capture_output=True, check=False).returncode:
        missing(f"{SYSTEM_PYTHON} has no module libvirt (Debian package python3-libvirt)")


class RefusedError(Exception):
    """A libvirtError: its ``code`` and ``domain`` are numbers of virErrorNumber and virErrorDomain."""

    def __init__(self, code: int, domain: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.domain = domain


class LibvirtPython:
    """Commands in flight and events that came."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._came = asyncio.Event()
        self.events: list[list[Any]] = []

    async def read(self) -> None:
        """Until it ends."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if "event" in message:
                self.events.append(message["event"])
                self._came.set()
                continue
            future = self._waiting.pop(message["id"])
            if future.done():
                continue
            if "error" in message:
                future.set_exception(RefusedError(*message["error"]))
            else:
                future.set_result(message["ok"])

    def send(self, do: str, /, **args: Any) -> asyncio.Future[Any]:
        """A command; the future is its answer."""
        assert self._process.stdin is not None
        self._number += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[self._number] = future
        self._process.stdin.write(json.dumps({"id": self._number, "do": do, **args}).encode() + b"\n")
        return future

    async def do(self, do: str, /, **args: Any) -> Any:
        """A command and its answer.

        Raises:
            RefusedError: libvirt's own error.
            TimeoutError: it hangs.
        """
        async with asyncio.timeout(DEADLINE_S):
            return await self.send(do, **args)

    async def call(self, on: str, method: str, *args: Any, name: str = "") -> Any:
        """A method of a known object; see `do`."""
        return await self.do("call", on=on, method=method, args=args, name=name)

    async def until(self, right: Callable[[list[list[Any]]], bool], what: str) -> None:
        """Until the events are right.

        Raises:
            AssertionError: they were not in time.
        """
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not right(self.events):
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise AssertionError(f"{what}; heard: {self.events}") from None

    async def heard(self, *event: Any) -> None:
        """Until this event came; see `until`."""
        await self.until(lambda events: list(event) in events, f"{event} did not come")

    def text(self, name: str) -> str:
        """What a console has printed so far."""
        return "".join(one[2] for one in self.events if one[:2] == ["data", name])

    async def printed(self, name: str, text: str) -> None:
        """Until a console has printed it; see `until`."""
        await self.until(lambda _events: text in self.text(name), f"{name} did not print {text!r}")

    def domain_events(self, connection: str) -> list[list[Any]]:
        """Each as kind, domain's name, details."""
        return [one[2:] for one in self.events if one[:2] == ["domain", connection]]


@contextlib.asynccontextmanager
async def libvirt_python() -> AsyncIterator[LibvirtPython]:
    """One for the block; killed at its end, as a client may be at any time."""
    with private_directory("eh-lp-") as home:
        process = await asyncio.create_subprocess_exec(
            SYSTEM_PYTHON, "-I", str(CLIENT),
            env=environment(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=LINE_BYTES,
        )  # fmt: skip
        python = LibvirtPython(process)
        reading = asyncio.create_task(python.read())
        try:
            yield python
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            await asyncio.wait({reading})
            assert process.stdin is not None
            process.stdin.close()
            reading.result()
