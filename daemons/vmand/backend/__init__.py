"""What vmand asks of whatever runs guests: a small interface, so that another kind of hypervisor fits below it.

A back end keeps no truth of its own: it is told the `Record` of a partition, acts, and says what it finds. It ends a
guest's process only after it has verified that the process is the one of the record.
"""

from asyncio import Task
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from edgehold.api.vmand import Vcpu
from vmand.model import Found, Images, Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Where a guest's process is, once it runs."""

    pid: int
    start_ticks: int
    unit: str
    accelerator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a guest was found to do, and why."""

    found: Found
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What this back end can give on this host."""

    backend: str
    accelerator: str
    accelerator_reason: str
    launcher: str


Changed = Callable[[int, str], None]
"""(partition, run): look at the guest, something happened to it."""
Output = Callable[[int, str], None]
"""(partition, text): lines of the guest's console."""

Ended = Callable[[Task[Any]], None]
"""A task that watches a guest has ended: where it failed, that is a bug and nobody watches any more."""


class Backend(Protocol):
    """Runs guests. Methods raise `EdgeholdError`; those marked idempotent may be asked for any remains."""

    def begin(self, *, changed: Changed, output: Output, ended: Ended) -> None:
        """Called once before everything else."""

    async def host(self) -> Host:
        """What this host can give. The first call may take seconds: acceleration is tried, not assumed."""

    def memory_free(self) -> int:
        """Bytes that could be reserved now."""

    async def reserve(self, record: Record) -> None:
        """Take the partition's memory; it outlives every process. Leaves nothing behind when it fails."""

    async def release(self, record: Record) -> None:
        """Give the partition's memory back. Idempotent."""

    async def start(self, record: Record, images: Images) -> Running:
        """Run a guest: its CPUs run when this returns. What fails half-way is left for `end`."""

    async def adopt(self, record: Record) -> Finding:
        """Find the guest that an earlier vmand started, and watch it from now on."""

    async def look(self, record: Record) -> Finding:
        """What the guest does now."""

    async def suspend(self, record: Record) -> None:
        """Stop the guest's CPUs."""

    async def restore(self, record: Record) -> None:
        """Let the guest's CPUs go on."""

    async def reboot(self, record: Record) -> None:
        """Reset the guest by force and load its kernel again."""

    async def press_power(self, record: Record) -> None:
        """Press the power button once."""

    async def wait_off(self, record: Record, timeout_s: float) -> bool:
        """Wait until the guest is off or gone; False when the time is over."""

    async def end(self, record: Record) -> None:
        """End the guest's process by force and remove what belongs to the run. Idempotent."""

    async def vcpus(self, record: Record) -> list[Vcpu]:
        """The threads that run the guest's CPUs."""

    def console(self, record: Record) -> str:
        """The last output of the guest's console. What its watchers have not been given yet is given to them first."""

    async def sweep(self, records: Collection[Record]) -> None:
        """Remove processes, directories and memory in our own places that belong to none of these partitions.

        The run of a partition that is among them is left alone, whatever the partition's state.
        """

    async def close(self) -> None:
        """Let go of all guests; they live on."""
