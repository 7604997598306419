"""The back end that runs each partition's guest in a QEMU of its own."""

import asyncio
import dataclasses
import logging
import os
import socket
from collections.abc import Collection
from pathlib import Path

from edgehold.api.vmand import Check, CoresGrade, MemoryGrade, Mode, Usage, Vcpu
from edgehold.errors import EdgeholdError, FailedError
from edgehold.kernel import numa
from vmand.backend import Changed, Ended, Finding, Grades, Host, Output, Running, Trait, devices, doctor, dtb, dtbcheck
from vmand.backend import images as opened_images
from vmand.backend.command import LOG, Files, MemoryBacking, qemu_argv
from vmand.backend.cores import Cores, usable
from vmand.backend.cpuset import Cpusets
from vmand.backend.guest import Guest
from vmand.backend.launcher import Launcher, use_systemd
from vmand.backend.machines import Machines
from vmand.backend.memory import MemoryFiles
from vmand.backend.process import Process
from vmand.backend.rundir import RunDirs
from vmand.backend.steering import Steering
from vmand.backend.topology import isolated_by_boot
from vmand.backend.usage import usage_of
from vmand.config import Config
from vmand.model import LIVE, MIB, Found, Images, OpenFile, Record, plain
from vmand.placement import LINUX, Topology

log = logging.getLogger(__name__)

# A start does not wait longer for a QEMU that hangs: its record stays as it is, and it is looked at again later.
_FIRST_LOOK_S = 2.0
# What a guest of which nothing is known yet may take to say which threads it has, when its grade is read.
_THREADS_S = 1.0


class QemuBackend:
    """Guests by partition id, and the places that belong to them."""

    traits = frozenset(Trait) - {Trait.SECURE, Trait.SCRUB}

    def __init__(self, config: Config, *, topology: Topology, pool: frozenset[int]) -> None:
        self._config = config
        self._pool = pool
        cpusets = Cpusets(boot_isolated=isolated_by_boot())
        self._housekeeping = usable(topology, cpusets, isolated_by_boot()) - pool or frozenset({LINUX})
        self._steering = Steering(runtime=config.runtime, online=topology.online)
        self._cores = Cores(
            topology=topology,
            pool=pool,
            housekeeping=self._housekeeping,
            cpusets=cpusets,
            steering=self._steering if config.steer else None,
        )
        self._memory = MemoryFiles(config.memory, hugepages=config.hugepages)
        units = use_systemd(config.launcher)
        self._dirs = RunDirs(config.runtime / "p", config.uid_first, places=(config.memory,), units=units)
        self._launcher = Launcher(config, self._dirs)
        self._machines = Machines(config)
        self._guests: dict[int, Guest] = {}
        self._changed: Changed = lambda _id, _run, _found=None: None
        self._output: Output = lambda _id, _text: None
        self._ended: Ended = lambda _task: None
        self._last_console: dict[int, str] = {}

    def begin(self, *, changed: Changed, output: Output, ended: Ended) -> None:
        self._changed, self._output, self._ended = changed, output, ended
        self._dirs.begin()
        if not self._config.steer:
            self._steering.restore()  # what an earlier vmand moved whose settings said so

    async def host(self) -> Host:
        accelerator, reason = await self._machines.accelerator()
        best_cores, cores_reason = self._cores.best()
        best_memory, memory_reason = self._memory.best()
        return Host(
            backend="qemu",
            accelerator=accelerator,
            accelerator_reason=reason,
            launcher="systemd" if self._launcher.systemd else "process",
            best=Grades(cores=best_cores, cores_reason=cores_reason, memory=best_memory, memory_reason=memory_reason),
            archs=self._machines.archs(),
        )

    async def hypervisor(self) -> str:
        return await self._machines.version()

    def memory_free(self) -> int:
        return self._memory.free_bytes(self._config.pool.headroom_mib * MIB)

    async def reserve(self, record: Record) -> Grades:
        headroom = self._config.pool.headroom_mib * MIB
        await self._memory.take(record.uuid, record.memory_bytes, node=record.node, headroom=headroom)
        return await self.grade(record)

    async def holds(self, record: Record) -> bool:
        return self._memory.has(record.uuid, record.memory_bytes, uid=self._dirs.user(record))

    def keeps(self, before: Record, after: Record) -> bool:
        near = after.node is None or after.node == before.node or not numa.several()
        return before.memory_bytes == after.memory_bytes and near

    async def release(self, record: Record) -> None:
        self._memory.give_back(record.uuid)
        self._last_console.pop(record.id, None)

    async def scrub(self, record: Record) -> None:
        """Nothing: a new file of a tmpfs or hugetlbfs is zeroes."""

    async def doctor(self) -> list[Check]:
        facts = await asyncio.to_thread(doctor.gather)
        host = await self.host()
        return doctor.checks(
            dataclasses.replace(
                facts,
                pool=self._pool,
                cores_grade=host.best.cores or CoresGrade.SHARED,
                cores_reason=host.best.cores_reason,
                memory_grade=host.best.memory or MemoryGrade.PLAIN,
                memory_reason=host.best.memory_reason,
                memory_dir=str(self._config.memory),
                memory_free_bytes=self.memory_free(),
                hugepages=self._config.hugepages,
                accelerator=host.accelerator,
                accelerator_reason=host.accelerator_reason,
                archs=frozenset(host.archs),
                systemd=self._launcher.systemd,
                uid_first=self._config.uid_first,
                users_reason=self._dirs.reason,
                bridges=self._config.bridges,
                steer=self._config.steer,
                steer_reason=self._steering.said(),
            )
        )

    async def start(self, record: Record, images: Images, *, paused: bool = False) -> Running:
        user = self._dirs.user(record)
        machine = await self._machines.machine(images.arch)
        self._cores.prepare(record)
        blob = await asyncio.to_thread(_device_tree, record, images)
        directory = await asyncio.to_thread(self._dirs.make, record)
        self._last_console.pop(record.id, None)
        files, copies = await self._copies(record, images, blob)
        self._memory.hand_over(record.uuid, user)
        backing = MemoryBacking(path=self._memory.path(record.uuid), lock=self._memory.needs_lock(record.uuid))
        argv = qemu_argv(machine, record, images, files=files, memory=backing, directory=directory)
        process = await self._launcher.spawn(
            argv,
            record,
            directory=directory,
            cpus=self._housekeeping if record.mode is Mode.DEDICATED else os.sched_getaffinity(0),
            kvm=machine.accelerator == "kvm",
            lock_memory=backing.lock,
            slice_name=(self._cores.unit_slice if record.mode is Mode.DEDICATED else "") or None,
            memory=backing.path,
            disks=images.disks,
            own_cores=self._cores.cores_of(record),
        )
        guest = self._hold(record, process)
        with opened_images.named(copies):
            await guest.connect(self._config.start_timeout_s)
            self._dirs.seal(record)
            # QEMU has read them, and a reset needs them no more: the runtime directory is memory of the host.
            self._dirs.drop(record.id, [path.name for path in copies])
            await devices.plug(guest.monitor.call, record, images)
        if record.mode is Mode.DEDICATED:
            tids = await guest.threads()
            group = self._launcher.cgroup(process)
            await self._cores.dedicate(record, pid=process.identity.pid, tids=tids, group=group)
        if not paused:
            await guest.monitor.call("cont")
        finding = await guest.look()
        if finding.found not in ({Found.PAUSED} if paused else {Found.RUNNING, Found.OFF}):
            raise FailedError(f"the guest does not run: {finding.reason or finding.found.value}")
        one = process.identity
        return Running(
            pid=one.pid,
            start_ticks=one.start_ticks,
            uid=user,
            unit=one.unit,
            accelerator=machine.accelerator,
            arch=machine.arch,
            vsock_cid=devices.vsock_cid(record, images),
            disks=tuple(disk.file.name for disk in images.disks),
            nics=devices.addressed(record, images),
        )

    async def adopt(self, record: Record) -> Finding:
        process = Process.open(
            record.pid or 0, record.run, started=record.start_ticks, unit=record.unit, uid=record.uid
        )
        if process is None:
            return Finding(found=Found.GONE, reason="its process ended while vmand was away")
        self._cores.adopt(record)
        return await self._hold(record, process).look(limit_s=_FIRST_LOOK_S)

    async def look(self, record: Record) -> Finding:
        guest = self._guests.get(record.id)
        if guest is None:  # a start could not adopt it
            return await self.adopt(record)
        if guest.run != record.run:
            return Finding(found=Found.GONE, reason="its process ended")
        return await guest.look()

    async def grade(self, record: Record, *, repair: bool = False) -> Grades:
        if record.run:
            self._dirs.shorten(record.id, LOG)
        memory, memory_reason = self._memory.grade(record.uuid, record.memory_bytes, pid=record.pid)
        if memory is record.memory_grade is MemoryGrade.LOCKED:
            memory_reason = record.memory_reason  # why it got no huge pages is known best from its create
        if record.state not in LIVE:
            return Grades(memory=memory, memory_reason=memory_reason)
        cores, cores_reason = record.cores_grade, record.cores_reason
        guest = self._guests.get(record.id)
        if guest is not None and guest.run == record.run and record.pid is not None:
            tids: tuple[int, ...] = ()
            if record.mode is Mode.DEDICATED:
                try:
                    tids = await guest.threads(limit_s=_THREADS_S)
                except EdgeholdError as error:  # what can't be looked at is not claimed
                    reason = plain(f"its threads can't be known: {error.message}")
                    return Grades(
                        cores=CoresGrade.SHARED, cores_reason=reason, memory=memory, memory_reason=memory_reason
                    )
            if repair:
                self._cores.repair(record, pid=record.pid, tids=tids)
            cores, cores_reason = self._cores.read(record, pid=record.pid, tids=tids)
        return Grades(cores=cores, cores_reason=cores_reason, memory=memory, memory_reason=memory_reason)

    async def suspend(self, record: Record) -> None:
        await self._guest(record).monitor.call("stop")

    async def restore(self, record: Record) -> None:
        await self._guest(record).monitor.call("cont")

    async def reboot(self, record: Record) -> None:
        await self._guest(record).reboot()

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
            await self._launcher.end(record)
        self._cores.release(record)
        await asyncio.to_thread(self._dirs.remove, record.id)
        if self._memory.has(record.uuid, record.memory_bytes, uid=self._dirs.user(record)):
            self._memory.hand_over(record.uuid, None)

    async def vcpus(self, record: Record) -> list[Vcpu]:
        return await self._guest(record).vcpus()

    async def usage(self, record: Record) -> Usage:
        return await usage_of(self._guest(record).monitor.ask, record)

    def console(self, record: Record) -> str:
        guest = self._guests.get(record.id)
        if guest is None:
            return self._last_console.get(record.id, "")
        guest.console.flush()
        return guest.console.text

    def attach(self, record: Record) -> socket.socket:
        return self._guest(record).console.attach()

    async def sweep(self, records: Collection[Record]) -> None:
        # Whatever its state: the process of a known run is ended by a command, or by what was found, never by a sweep.
        runs, slots = {one.run for one in records if one.run}, {one.slot for one in records if one.run}
        await self._launcher.sweep(runs, slots=slots)
        live = {one.id for one in records if one.run}
        for one in set(self._dirs.ids()) - live:
            await asyncio.to_thread(self._dirs.remove, one)
        self._cores.sweep(live)
        for name in self._memory.sweep({one.uuid for one in records}):
            log.warning("removed memory that belongs to no partition: %s", name)

    async def close(self) -> None:
        await self._machines.close()
        await asyncio.gather(*(guest.close() for guest in self._guests.values()))
        self._guests.clear()
        self._memory.close()

    def _guest(self, record: Record) -> Guest:
        guest = self._guests.get(record.id)
        if guest is None or guest.run != record.run:
            raise FailedError(f"partition {record.id} has no guest process any more")
        return guest

    def _hold(self, record: Record, process: Process) -> Guest:
        guest = Guest(
            record,
            process,
            self._dirs.path(record.id),
            qmp_timeout_s=self._config.qmp_timeout_s,
            changed=lambda found: self._changed(record.id, record.run, found),
            output=lambda text: self._output(record.id, text),
            ended=self._ended,
        )
        self._guests[record.id] = guest
        return guest

    async def _copies(self, record: Record, images: Images, blob: bytes | None) -> tuple[Files, dict[Path, OpenFile]]:
        """The images where QEMU may read them, and what the caller calls each."""
        limit = self._config.limits.image_mib * MIB
        made: dict[str, Path] = {}
        names: dict[Path, OpenFile] = {}
        for key, file in (("kernel", images.kernel), ("initrd", images.initrd)):
            if file is not None:
                made[key] = await self._dirs.put(record, key, file.fd, limit=limit)
                names[made[key]] = file
        if blob is not None and images.dtb is not None:
            made["dtb"] = self._dirs.path(record.id) / "dtb"
            fd = self._dirs.create(record, "dtb", mode=0o400, uid=self._dirs.user(record))
            with os.fdopen(fd, "wb") as copy:
                copy.write(blob)
            names[made["dtb"]] = images.dtb
        return Files(kernel=made["kernel"], initrd=made.get("initrd"), dtb=made.get("dtb")), names


def _device_tree(record: Record, images: Images) -> bytes | None:
    """The device tree as QEMU is to load it, checked against the partition."""
    if images.dtb is None:
        return None
    blob = dtb.read(images.dtb)
    dtbcheck.check(dtb.parse(blob), cores=record.cores, memory_bytes=record.memory_bytes)
    return dtb.packed(blob)
