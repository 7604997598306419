"""The back end that runs each partition's guest in a QEMU of its own."""

import asyncio
import contextlib
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from edgehold.api.vmand import Mode, Vcpu
from edgehold.errors import FailedError
from vmand.backend import Changed, Ended, Finding, Host, Output, Running
from vmand.backend import launcher as launch
from vmand.backend.command import LOG, qemu_argv
from vmand.backend.guest import Guest
from vmand.backend.kvm import Accelerators
from vmand.backend.launcher import Process
from vmand.backend.memory import MemoryFiles
from vmand.config import Config
from vmand.model import MIB, Found, Images, Record, parse_cores

log = logging.getLogger(__name__)

# A start does not wait longer for a QEMU that hangs: its record stays as it is, and it is looked at again later.
_FIRST_LOOK_S = 2.0
_RUN_DIR = re.compile(r"[0-9]{1,10}")


def pool_cores(config: Config) -> frozenset[int]:
    """The cores that dedicated partitions may get on this host: those of the settings that exist, never core 0.

    Raises:
        ValueError: the setting is malformed or names a core that vmand may not use.
    """
    usable = os.sched_getaffinity(0)
    if not config.pool.cores:
        return frozenset(usable - {0})
    wanted = parse_cores(config.pool.cores)
    if missing := sorted(wanted - usable):
        raise ValueError(f"core {missing[0]} does not exist here or vmand may not use it; usable: {sorted(usable)}")
    return frozenset(wanted - {0})


def _unit(record: Record) -> str:
    """The unit of a run: made of what the intent holds, so that it is known before systemd is asked for it."""
    return f"vmand-p-{record.id}-{record.run[:8]}.service"


class QemuBackend:
    """Guests by partition id, and the places that belong to them."""

    def __init__(self, config: Config, *, pool: frozenset[int]) -> None:
        self._config = config
        self._housekeeping = frozenset(os.sched_getaffinity(0) - pool) or frozenset({0})
        self._memory = MemoryFiles(config.memory)
        self._runs = config.runtime / "p"
        self._systemd = launch.use_systemd(config.launcher)
        self._accelerators = Accelerators(config.qemu, config.accelerator, cache=config.runtime / "kvm.json")
        self._guests: dict[int, Guest] = {}
        self._changed: Changed = lambda _id, _run: None
        self._output: Output = lambda _id, _text: None
        self._ended: Ended = lambda _task: None
        self._last_console: dict[int, str] = {}

    def begin(self, *, changed: Changed, output: Output, ended: Ended) -> None:
        self._changed, self._output, self._ended = changed, output, ended
        for directory in (self._config.memory, self._runs):
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise FailedError(f"{directory}: {error.strerror}") from error

    async def host(self) -> Host:
        accelerator, reason = await self._accelerators.chosen()
        return Host(
            backend="qemu",
            accelerator=accelerator,
            accelerator_reason=reason,
            launcher="systemd" if self._systemd else "process",
        )

    def memory_free(self) -> int:
        return self._memory.free_bytes(self._config.pool.headroom_mib * MIB)

    async def reserve(self, record: Record) -> None:
        await self._memory.take(record.uuid, record.memory_bytes)

    async def release(self, record: Record) -> None:
        self._memory.give_back(record.uuid)
        self._last_console.pop(record.id, None)

    async def start(self, record: Record, images: Images) -> Running:
        if not self._memory.has(record.uuid, record.memory_bytes):
            raise FailedError(
                f"the memory of partition {record.id} is gone (was the host started anew, or the tmpfs emptied?); "
                "destroy the partition and create it again"
            )
        accelerator, _reason = await self._accelerators.chosen()
        directory = self._fresh_directory(record.id)
        self._last_console.pop(record.id, None)
        argv = qemu_argv(
            self._config.qemu,
            record,
            images,
            accelerator=accelerator,
            memory=self._memory.path(record.uuid),
            directory=directory,
        )
        process = await self._spawn(argv, record, directory)
        guest = self._hold(record, process)
        await guest.connect(self._config.start_timeout_s)
        if record.mode is Mode.DEDICATED:
            await guest.pin(record.cpus)
        await guest.monitor.call("cont")
        finding = await guest.look()
        if finding.found not in {Found.RUNNING, Found.OFF}:
            raise FailedError(f"the guest does not run: {finding.reason or finding.found.value}")
        one = process.identity
        return Running(pid=one.pid, start_ticks=one.start_ticks, unit=one.unit, accelerator=accelerator)

    async def adopt(self, record: Record) -> Finding:
        process = Process.open(record.pid or 0, record.run, started=record.start_ticks, unit=record.unit)
        if process is None:
            return Finding(found=Found.GONE, reason="its process ended while vmand was away")
        return await self._hold(record, process).look(limit_s=_FIRST_LOOK_S)

    async def look(self, record: Record) -> Finding:
        guest = self._guests.get(record.id)
        if guest is None:  # a start could not adopt it
            return await self.adopt(record)
        if guest.run != record.run:
            return Finding(found=Found.GONE, reason="its process ended")
        return await guest.look()

    async def suspend(self, record: Record) -> None:
        await self._guest(record).monitor.call("stop")

    async def restore(self, record: Record) -> None:
        await self._guest(record).monitor.call("cont")

    async def reboot(self, record: Record) -> None:
        await self._guest(record).monitor.call("system_reset")

    async def press_power(self, record: Record) -> None:
        await self._guest(record).monitor.call("system_powerdown")

    async def wait_off(self, record: Record, timeout_s: float) -> bool:
        return await self._guest(record).wait_off(timeout_s)

    async def end(self, record: Record) -> None:
        guest = self._guests.get(record.id)
        if guest is not None:
            await guest.end()
            self._last_console[record.id] = guest.console.text
            self._guests.pop(record.id, None)
        if record.run:
            await self._end_remains({record.run})
            if self._systemd or record.unit:
                # Also a unit that systemd was asked for and whose QEMU is not there yet: a command that was cut off.
                await launch.stop_unit(record.unit or _unit(record))
        shutil.rmtree(self._runs / str(record.id), ignore_errors=True)

    async def vcpus(self, record: Record) -> list[Vcpu]:
        return await self._guest(record).vcpus()

    def console(self, record: Record) -> str:
        guest = self._guests.get(record.id)
        if guest is None:
            return self._last_console.get(record.id, "")
        guest.console.flush()
        return guest.console.text

    async def sweep(self, records: Collection[Record]) -> None:
        # Whatever its state: the process of a known run is ended by a command, or by what was found, never by a sweep.
        keep = {one.run for one in records if one.run}
        strangers = {run for _pid, run in self._processes() if run not in keep}
        await self._end_remains(strangers)
        live = {str(one.id) for one in records if one.run}
        try:
            entries = list(self._runs.iterdir())
        except OSError as error:
            raise FailedError(f"{self._runs}: {error.strerror}") from error
        for entry in entries:
            if _RUN_DIR.fullmatch(entry.name) and entry.name not in live:
                shutil.rmtree(entry, ignore_errors=True)
        for name in self._memory.sweep({one.uuid for one in records}):
            log.warning("removed memory that belongs to no partition: %s", name)

    async def close(self) -> None:
        await self._accelerators.close()
        await asyncio.gather(*(guest.close() for guest in self._guests.values()))
        self._guests.clear()

    def _guest(self, record: Record) -> Guest:
        guest = self._guests.get(record.id)
        if guest is None or guest.run != record.run:
            raise FailedError(f"partition {record.id} has no guest process any more")
        return guest

    def _hold(self, record: Record, process: Process) -> Guest:
        guest = Guest(
            record,
            process,
            self._runs / str(record.id),
            qmp_timeout_s=self._config.qmp_timeout_s,
            changed=lambda: self._changed(record.id, record.run),
            output=lambda text: self._output(record.id, text),
            ended=self._ended,
        )
        self._guests[record.id] = guest
        return guest

    def _fresh_directory(self, partition: int) -> Path:
        directory = self._runs / str(partition)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise FailedError(f"{directory}: {error.strerror}") from error
        return directory

    async def _spawn(self, argv: list[str], record: Record, directory: Path) -> Process:
        cpus = self._housekeeping if record.mode is Mode.DEDICATED else os.sched_getaffinity(0)
        if not self._systemd:
            return launch.spawn(argv, log_file=directory / LOG, cpus=cpus)
        return await launch.spawn_unit(
            argv,
            run=record.run,
            log_file=directory / LOG,
            cpus=cpus,
            unit=_unit(record),
            slice_name=self._config.slice,
        )

    def _processes(self) -> list[tuple[int, str]]:
        """Every QEMU that was started for a partition of this vmand, alive or adopted or forgotten."""
        return launch.find(f"path={self._runs}/")

    async def _end_remains(self, runs: Collection[str]) -> None:
        for pid, run in self._processes() if runs else ():
            if run in runs and (process := Process.open(pid, run)) is not None:
                log.warning("ending the remains of a run", extra={"run": run, "pid": pid})
                with contextlib.closing(process):
                    await process.kill()
