"""QEMU's monitor of one guest: kept connected as long as the process lives, every answer waited for with a deadline.

QEMU serves one monitor client at a time. The connection is made, and made again, by one task; commands wait for it.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from edgehold.errors import FailedError, TimedOutError, UnavailableError
from vmand.model import Found, plain

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

T = TypeVar("T")
log = logging.getLogger(__name__)
# The library logs as errors what is ordinary here: a monitor that is not there yet, or any more.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)

CONNECTED = "CONNECTED"
"""Our own event: what happened while nobody listened is not known, so look."""
_RETRY_S = 0.01
_RETRY_MAX_S = 1.0
_MAX_EVENTS = 1000
_TELLING = ("SHUTDOWN", "STOP", "RESUME", "GUEST_PANICKED")
"""QEMU's events that may change what the guest does; whoever hears of one looks."""

STATUS: dict[str, Found] = {
    "running": Found.RUNNING,
    "suspended": Found.RUNNING,  # the guest sleeps (ACPI S3) until something wakes it: its own affair
    "debug": Found.PAUSED,
    "paused": Found.PAUSED,
    "prelaunch": Found.PAUSED,
    "inmigrate": Found.PAUSED,
    "postmigrate": Found.PAUSED,
    "finish-migrate": Found.PAUSED,
    "save-vm": Found.PAUSED,
    "restore-vm": Found.PAUSED,
    "colo": Found.PAUSED,
    "shutdown": Found.OFF,
    "guest-panicked": Found.FAILED,
    "internal-error": Found.FAILED,
    "io-error": Found.FAILED,
    "watchdog": Found.FAILED,
}
"""QEMU's run states (qapi/run-state.json) as we see them; one that is not here changes nothing."""
REASONS = {
    "guest-panicked": "the guest panicked",
    "internal-error": "QEMU reports an internal error: the guest can't go on",
    "io-error": "QEMU reports an I/O error of a disk",
    "watchdog": "the guest's watchdog fired",
}


class _Status(msgspec.Struct, frozen=True):
    """Of StatusInfo (qapi/run-state.json)."""

    status: str


class VcpuThread(msgspec.Struct, frozen=True, rename="kebab"):
    """Of CpuInfoFast (qapi/machine.json)."""

    cpu_index: int
    thread_id: int


class Monitor:
    """The conversation with one QEMU."""

    def __init__(self, path: Path, *, who: str, timeout_s: float, on_event: Callable[[str], None]) -> None:
        self._path = path
        self._who = who
        self._timeout_s = timeout_s
        self._on_event = on_event
        self._client: QMPClient | None = None
        self._connected = asyncio.Event()
        self._sending = asyncio.Lock()
        self._dead = False
        self.task = asyncio.create_task(self._stay_connected(), name=f"monitor of {who}")

    async def wait_connected(self, timeout_s: float) -> None:
        """Until QEMU has greeted.

        Raises:
            TimedOutError: it did not in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise TimedOutError(f"QEMU of {self._who} does not greet on its monitor within {timeout_s:g} s") from None

    async def call(
        self,
        command: str,
        arguments: dict[str, object] | None = None,
        *,
        limit_s: float = math.inf,
        fd: int | None = None,
    ) -> Any:
        """One command, its answer, waited for as long as the settings say and at most ``limit_s``.

        ``fd`` goes with a command that takes a descriptor (``add-fd``, ``getfd``); it stays the caller's to close.

        Raises:
            TimedOutError: no answer in time: QEMU hangs, or gets too little of the CPU.
            UnavailableError: the connection broke before the answer.
            FailedError: QEMU refused.
        """
        from qemu.qmp import ExecuteError, QMPError  # noqa: PLC0415 - 4 MB that a vmand without guests need not hold

        timeout_s = min(self._timeout_s, limit_s)
        if not self._connected.is_set():
            await self.wait_connected(timeout_s)
        client = self._client
        if client is None:
            raise UnavailableError(f"QEMU of {self._who} closed its monitor")
        try:
            async with asyncio.timeout(timeout_s):
                if fd is None:
                    return await client.execute(command, arguments)
                # QEMU keeps one descriptor for the next command that asks for one: no other may be sent in between.
                async with self._sending:
                    client.send_fd_scm(fd)
                    return await client.execute(command, arguments)
        except TimeoutError:
            raise TimedOutError(
                f"QEMU of {self._who} did not answer to {command} within {timeout_s:g} s; "
                "it hangs or has too little CPU; shutdown with force ends it"
            ) from None
        except ExecuteError as error:
            raise FailedError(f"QEMU of {self._who} refused {command}: {plain(str(error), 300)}") from error
        except (QMPError, OSError) as error:  # OSError: of the descriptor's own message, which is not queued
            raise UnavailableError(f"QEMU of {self._who} closed its monitor during {command}") from error

    async def ask(
        self,
        command: str,
        kind: type[T],
        arguments: dict[str, object] | None = None,
        *,
        limit_s: float = math.inf,
    ) -> T:
        """One command whose answer is of this kind. Raises as `call`; QEMU may have been taken over and say anything.

        Raises:
            FailedError: the answer is of another kind.
        """
        answer = await self.call(command, arguments, limit_s=limit_s)
        try:
            return msgspec.convert(answer, kind)
        except (msgspec.ValidationError, RecursionError) as error:
            what = plain(str(error), 100)
            raise FailedError(f"QEMU of {self._who} answers {command} as no QEMU does: {what}") from error

    async def status(self, *, limit_s: float = math.inf) -> tuple[Found | None, str]:
        """What the guest does, and QEMU's own word for it."""
        word = (await self.ask("query-status", _Status, limit_s=limit_s)).status
        return STATUS.get(word), word

    async def vcpus(self, *, limit_s: float = math.inf) -> list[VcpuThread]:
        """The threads that QEMU says are its vCPUs'."""
        return await self.ask("query-cpus-fast", list[VcpuThread], limit_s=limit_s)

    def give_up(self) -> None:
        """QEMU is dead: who waits for it need not wait any longer."""
        self._dead = True
        self._connected.set()

    async def close(self) -> None:
        """Let go; QEMU goes on."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def _stay_connected(self) -> None:
        pause_s = _RETRY_S
        while not self._dead:
            if await self._converse():
                pause_s = _RETRY_S
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.3, _RETRY_MAX_S)

    async def _converse(self) -> bool:
        """One connection, from its greeting to its end; whether there was one."""
        from qemu.qmp import ConnectError  # noqa: PLC0415 - see call

        from vmand.backend.qmpclient import Client  # noqa: PLC0415

        client = Client(self._who)
        try:
            await client.connect(str(self._path))
        except ConnectError:
            return False
        since = time.monotonic()
        reader = asyncio.create_task(self._events(client), name=f"events of {self._who}")
        end = asyncio.create_task(self._end(client), name=f"end of {self._who}")
        try:
            self._client = client
            self._connected.set()
            self._on_event(CONNECTED)
            try:
                done, _ = await asyncio.wait({reader, end}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a bug in one of them is a bug in this one
            finally:
                for task in (reader, end):
                    task.cancel()
                await asyncio.gather(reader, end, return_exceptions=True)
        finally:
            self._client = None
            if not self._dead:
                self._connected.clear()
            with contextlib.suppress(Exception):  # the library raises here what ended the connection: known already
                await client.disconnect()
        return time.monotonic() - since > _RETRY_MAX_S  # one that closes at once is waited for longer and longer

    @staticmethod
    async def _end(client: "QMPClient") -> None:
        from qemu.qmp import Runstate  # noqa: PLC0415 - see call

        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()

    async def _events(self, client: "QMPClient") -> None:
        """Each kind of event once, however often it came meanwhile: whoever hears of one looks for himself.

        Ends where more came at once than any QEMU says.
        """
        while True:
            with client.listener(_TELLING) as listener:
                heard = 0
                while heard < _MAX_EVENTS:  # then another listener: the library keeps all that one has had
                    came = [await listener.get(), *listener.clear()]
                    for name in dict.fromkeys(str(one["event"]) for one in came):
                        self._on_event(plain(name, 64))
                    if len(came) > _MAX_EVENTS:
                        log.warning("QEMU of %s says more than it can have to say; its monitor is closed", self._who)
                        return
                    heard += len(came)
