"""One running QEMU: its process, its monitor and its console, held together."""

import asyncio
import logging
import math
from collections.abc import Callable
from pathlib import Path

from edgehold.api.vmand import Vcpu
from edgehold.errors import EdgeholdError, FailedError
from edgehold.kernel.procfs import GoneError, threads
from vmand.backend import Ended, Finding
from vmand.backend.command import CONSOLE, LOG, MONITOR
from vmand.backend.console import Console
from vmand.backend.process import Process
from vmand.backend.qmp import REASONS, Monitor
from vmand.backend.rundir import last_line
from vmand.model import Found, Record, plain

log = logging.getLogger(__name__)

_QUIT_S = 1.0
_SAID = {"STOP": Found.PAUSED, "RESUME": Found.RUNNING}
"""Events that say what the guest does; the others are looked at."""


class Guest:
    """Made for a process that runs already; everything else connects in the background."""

    def __init__(
        self,
        record: Record,
        process: Process,
        directory: Path,
        *,
        qmp_timeout_s: float,
        changed: Callable[[Found | None], None],
        output: Callable[[str], None],
        ended: Ended,
    ) -> None:
        self.run = record.run
        self.process = process
        self._directory = directory
        self._changed = changed
        self._off = asyncio.Event()
        self._threads: tuple[int, ...] = ()
        who = f"partition {record.id}"
        self.console = Console(directory / CONSOLE, output, who=who)
        self.monitor = Monitor(directory / MONITOR, who=who, timeout_s=qmp_timeout_s, on_event=self._event)
        for task in (self.console.task, self.monitor.task):
            task.add_done_callback(ended)
        process.on_end(self._ended)

    async def connect(self, timeout_s: float) -> None:
        """Wait for monitor and console of a QEMU that has just been started.

        Raises:
            FailedError: it ended instead; the text has the last line of its log.
            TimedOutError: it did not come up in time.
        """

        async def both() -> None:
            await self.monitor.wait_connected(timeout_s)
            await self.console.wait_connected(timeout_s)

        up, ended = asyncio.create_task(both()), asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait({up, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise FailedError(f"QEMU did not start: {self.cause}")
            await up
        finally:
            for task in (up, ended):
                task.cancel()
            await asyncio.gather(up, ended, return_exceptions=True)

    @property
    def cause(self) -> str:
        """How the process ended."""
        return f"{self.process.cause}{last_line(self._directory / LOG)}"

    async def look(self, *, limit_s: float = math.inf) -> Finding:
        """What the guest does now; QEMU is given at most ``limit_s`` to say so.

        Raises:
            TimedOutError: QEMU does not say so in time.
        """
        if self.process.ended:
            return Finding(found=Found.GONE, reason=self.cause)
        try:
            found, word = await self.monitor.status(limit_s=limit_s)
        except EdgeholdError:
            if await self.process.wait(0.2):  # its monitor closed because it died
                return Finding(found=Found.GONE, reason=self.cause)
            raise
        if found is None:
            raise FailedError(f"QEMU is in the state {plain(word, 64)}, which vmand does not know")
        return Finding(found=found, reason=REASONS.get(word, ""))

    async def vcpus(self, *, limit_s: float = math.inf) -> list[Vcpu]:
        """The vCPUs' threads. Where one thread runs several vCPUs it is named once."""
        found: dict[int, Vcpu] = {}
        told = await self.monitor.vcpus(limit_s=limit_s)
        try:
            own = frozenset(threads(self.process.identity.pid))
        except GoneError as error:
            raise FailedError(f"its threads can't be known: {error}") from error
        for one in told:
            if one.thread_id not in own:  # whoever is told these ids moves and holds their threads
                raise FailedError(f"QEMU says that vCPU {one.cpu_index} is thread {one.thread_id}: it is not its own")
            found.setdefault(one.thread_id, Vcpu(index=one.cpu_index, tid=one.thread_id))
        return sorted(found.values(), key=lambda one: one.index)

    async def threads(self, *, limit_s: float = math.inf) -> tuple[int, ...]:
        """The vCPUs' threads, by vCPU; they stay the same for QEMU's whole life.

        Raises:
            TimedOutError: QEMU does not say.
        """
        if not self._threads:
            self._threads = tuple(one.tid for one in await self.vcpus(limit_s=limit_s))
        return self._threads

    async def reboot(self) -> None:
        """Reset, and let it go on where it had powered itself off."""
        found, _word = await self.monitor.status()
        self._off.clear()
        await self.monitor.call("system_reset")
        if found is not Found.RUNNING:
            await self.monitor.call("cont")

    async def wait_off(self, timeout_s: float) -> bool:
        """Until the guest is off or the process has ended."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._off.wait()
        except TimeoutError:
            return False
        return True

    async def end(self) -> None:
        """End the process by force.

        Raises:
            TimedOutError: even SIGKILL did not end it.
        """
        if not self.process.ended:
            try:
                async with asyncio.timeout(_QUIT_S):
                    await self.monitor.call("quit")  # lets QEMU close disks in order
                    await self.process.wait()
            except (TimeoutError, EdgeholdError) as error:
                log.debug("QEMU does not quit: %s", error)
        await self.process.kill()
        await self.console.drain(_QUIT_S)
        await self.close()

    async def close(self) -> None:
        """Let go of the process; it lives on."""
        await self.monitor.close()
        await self.console.close()
        self.process.close()

    def _event(self, name: str) -> None:
        log.debug("QEMU event %s", name)
        if name == "SHUTDOWN":
            self._off.set()
        self._changed(_SAID.get(name))

    def _ended(self) -> None:
        self._off.set()
        self.monitor.give_up()
        self._changed(None)
