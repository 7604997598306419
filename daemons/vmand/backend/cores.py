"""A dedicated partition's cores while its guest runs: vCPUs pinned one to one, isolated where possible, read back.

A grade is what the kernel says now, never what was once asked for: other programs change affinities and cpusets.
"""

import asyncio
import errno
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from edgehold.api.vmand import CoresGrade, Mode
from edgehold.errors import FailedError, NoCapacityError
from edgehold.kernel.procfs import GoneError, threads
from vmand.backend.cpuset import Cpusets
from vmand.backend.steering import Steering
from vmand.backend.topology import online
from vmand.model import Record
from vmand.placement import Topology, as_list

log = logging.getLogger(__name__)

# A unit's cgroup gets its cpuset some time after systemd has answered; and the kernel gives the cores of a cgroup that
# was removed back some time after rmdir(2).
_READY_TRIES, _READY_EVERY_S = 100, 0.05


def usable(topology: Topology, cpusets: Cpusets, boot_isolated: frozenset[int]) -> frozenset[int]:
    """The cores that vmand may use: those of its affinity, and those which the kernel took out of it because a
    partition of ours or the kernel's command line isolates them."""
    return (frozenset(os.sched_getaffinity(0)) | cpusets.held() | boot_isolated) & topology.online


class Cores:
    """The cores of all dedicated partitions whose guests run. A shared partition's are nobody's, and SHARED."""

    def __init__(
        self,
        *,
        topology: Topology,
        pool: frozenset[int],
        housekeeping: frozenset[int],
        cpusets: Cpusets,
        steering: Steering | None,
    ) -> None:
        """``housekeeping``: where the other threads of a QEMU run. ``steering``: None leaves interrupts alone."""
        self._topology = topology
        self._pool = pool
        self._housekeeping = housekeeping
        self._cpusets = cpusets
        self._steering = steering
        self._deployed: dict[int, frozenset[int]] = {}
        self._why_not: dict[int, str] = {}
        """Why the last try to isolate a partition's cores failed."""

    @property
    def unit_slice(self) -> str:
        """The slice in which a unit must be for its cores to be isolated (systemd.slice(5)); empty: any will do."""
        return "-.slice" if not self._cpusets.why_not() and self._cpusets.whole_process else ""

    def best(self) -> tuple[CoresGrade, str]:
        """What a dedicated partition could get here, and why not better."""
        if not self._pool:
            return CoresGrade.SHARED, "no core can be given: core 0, with its SMT siblings, stays with Linux"
        if why := self._cpusets.why_not():
            return CoresGrade.PINNED, why
        return CoresGrade.ISOLATED, self._note("one of its cores")

    def cores_of(self, record: Record) -> frozenset[int]:
        """All that must be its own: where it has a part of an SMT core, the rest is left idle.

        A unit in `unit_slice` gets them as ``AllowedCPUs=``, and an affinity within them.
        """
        return self._topology.whole(record.cpus)

    def prepare(self, record: Record) -> None:
        """Before the guest's process is started: refuse what is known to be impossible, clear what earlier runs left.

        Raises:
            NoCapacityError: the record is strict and no cores can be isolated on this host.
        """
        grade, why = self.best()
        if record.mode is Mode.DEDICATED and record.strict and grade is not CoresGrade.ISOLATED:
            raise _refusal(record, why)
        self._cpusets.clear(record.id)

    async def dedicate(self, record: Record, *, pid: int, tids: Sequence[int], group: Path | None = None) -> None:
        """Pin vCPU i (thread ``tids[i]``) to ``record.cpus[i]`` and isolate the cores. Before the guest's CPUs run.

        ``group``: the cgroup of the guest's unit. None: it is found, or made where the process is in no unit of ours.

        Raises:
            FailedError: the threads can't even be pinned.
            NoCapacityError: the record is strict and its cores could not be isolated; says why.
        """
        if record.mode is not Mode.DEDICATED:
            return
        group = group or self._cpusets.group_of(pid)
        for _ in range(_READY_TRIES):
            if self._cpusets.ready(group, self.cores_of(record)):
                break
            await asyncio.sleep(_READY_EVERY_S)
        self._pin(record, pid, tids)
        if not self._cpusets.why_not():
            self._isolate(record, group, pid, tids)
        self._deployed[record.id] = self.cores_of(record)
        self._steer()
        grade, why = self.read(record, pid=pid, tids=tids)
        if grade is not CoresGrade.ISOLATED:
            if record.strict:
                raise _refusal(record, why)
            log.info("the cores of partition %d are %s, not isolated: %s", record.id, grade.value, why)

    def adopt(self, record: Record) -> None:
        """A guest of an earlier vmand runs: its cores are kept free of interrupts as well."""
        if record.mode is Mode.DEDICATED:
            self._deployed[record.id] = self.cores_of(record)
            self._steer()

    def read(self, record: Record, *, pid: int, tids: Sequence[int]) -> tuple[CoresGrade, str]:
        """What the partition's cores are now, and why not better. One system call a vCPU and five small files."""
        if record.mode is not Mode.DEDICATED:
            return CoresGrade.SHARED, ""
        if why := _not_pinned(record, tids):
            return CoresGrade.SHARED, why
        if why := self._cpusets.why_not() or self._not_isolated(record, pid, tids):
            return CoresGrade.PINNED, why
        return CoresGrade.ISOLATED, self._note(f"core {as_list(self._others(record))}")

    def repair(self, record: Record, *, pid: int, tids: Sequence[int]) -> tuple[CoresGrade, str]:
        """Try once to get back what was lost; what holds after that, as `read`.

        Each try costs the host some milliseconds. Nothing is tried while a core is offline: what the others have is
        kept by that, and once the core is back, all of it can be had again.
        """
        if record.mode is Mode.DEDICATED and self.cores_of(record) <= online():
            try:
                if not self._cpusets.why_not() and self._cpusets_differ(record, pid, tids):
                    self._isolate(record, self._cpusets.group_of(pid), pid, tids)
                else:
                    self._pin(record, pid, tids)
            except FailedError as error:
                return CoresGrade.SHARED, str(error)
        return self.read(record, pid=pid, tids=tids)

    def release(self, record: Record) -> None:
        """The guest's process is gone: its cores are everybody's again. Idempotent."""
        self._why_not.pop(record.id, None)
        if record.run:
            self._cpusets.release(record.id, record.run)
        if self._deployed.pop(record.id, None) is not None:
            self._steer()

    def sweep(self, ids: Collection[int]) -> None:
        """Remove cgroups of partitions that are not among these, and put interrupts back that nobody needs moved."""
        self._cpusets.sweep(ids)
        for gone in set(self._deployed) - set(ids):
            del self._deployed[gone]
        self._steer()

    def _isolate(self, record: Record, group: Path | None, pid: int, tids: Sequence[int]) -> None:
        """Isolate, and pin again: the kernel forgets affinities when a thread changes its cpuset."""
        self._why_not.pop(record.id, None)
        group = group or self._cpusets.own(record.id, record.run)
        try:
            self._cpusets.repair(group, pid=pid, tids=tids, cores=self.cores_of(record))
        except FailedError as error:
            self._why_not[record.id] = str(error)
        self._pin(record, pid, tids)

    def _pin(self, record: Record, pid: int, tids: Sequence[int]) -> None:
        if len(tids) != len(record.cpus):
            raise FailedError(f"partition {record.id} has {len(record.cpus)} cores and {len(tids)} vCPU threads")
        try:
            for cpu, tid in zip(record.cpus, tids, strict=True):
                os.sched_setaffinity(tid, {cpu})
        except ProcessLookupError:
            raise FailedError(f"a vCPU thread of partition {record.id} ended") from None
        except OSError as error:
            # EINVAL: the core is in none of the cpusets that the thread may use.
            why = "it is offline, or another isolated cpuset has it" if error.errno == errno.EINVAL else error.strerror
            raise FailedError(f"partition {record.id} can't be pinned to core {cpu}: {why}") from error
        try:
            rest = threads(pid)
        except (OSError, GoneError) as error:
            raise FailedError(f"the threads of process {pid} can't be listed: {error}") from error
        for tid in rest:
            if tid not in tids:
                self._put_aside(record, tid)

    def _put_aside(self, record: Record, tid: int) -> None:
        for cores in (self._housekeeping, self._others(record)):
            try:
                os.sched_setaffinity(tid, cores)
            except ProcessLookupError:
                return  # it ended
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue  # it is inside the isolated cpuset and can't leave it
                log.warning("thread %d of partition %d stays where it is: %s", tid, record.id, error.strerror)
            return

    def _not_isolated(self, record: Record, pid: int, tids: Sequence[int]) -> str:
        why = self._cpusets_differ(record, pid, tids)
        return (why and self._why_not.get(record.id)) or why

    def _cpusets_differ(self, record: Record, pid: int, tids: Sequence[int]) -> str:
        group = self._cpusets.group_of(pid)
        if group is None:
            return "its threads are in no cgroup of its own"
        return self._cpusets.check(group, tids=tids, cores=self.cores_of(record))

    def _others(self, record: Record) -> frozenset[int]:
        """Where the other threads of its QEMU run when they are in its cpuset: beside the first vCPU, or on what the
        vCPUs leave of its last SMT core."""
        return (self.cores_of(record) - set(record.cpus)) or frozenset(record.cpus[:1])

    def _note(self, where: str) -> str:
        if not self._cpusets.whole_process:
            return ""
        return f"QEMU's other threads share {where} with the guest (Linux before 6.7 can't keep them apart)"

    def _steer(self) -> None:
        if self._steering is not None:
            self._steering.apply(frozenset().union(*self._deployed.values()))


def _not_pinned(record: Record, tids: Sequence[int]) -> str:
    if len(tids) != len(record.cpus):
        return f"{len(tids)} vCPU threads were found for {len(record.cpus)} cores"
    for index, (cpu, tid) in enumerate(zip(record.cpus, tids, strict=True)):
        try:
            cores = os.sched_getaffinity(tid)
        except OSError as error:
            return f"vCPU {index}: its thread {tid} can't be looked at: {error.strerror}"
        if cores != {cpu} and cpu not in online():
            return f"core {cpu} of vCPU {index} is offline"
        if cores != {cpu}:
            return f"vCPU {index} may run on cores {as_list(cores)}, not on core {cpu} alone: its affinity was changed"
    return ""


def _refusal(record: Record, why: str) -> NoCapacityError:
    return NoCapacityError(
        f"cores: partition {record.id} is strict and its cores can't be isolated: {why}; "
        "remove the reason, or create it without strict"
    )
