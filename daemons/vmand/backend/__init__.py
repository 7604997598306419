"""What vmand asks of whatever runs guests: a small interface, so that another kind of hypervisor fits below it.

A back end keeps no truth of its own: it is told the `Record` of a partition, acts, and says what it finds. It ends a
guest's process only after it has verified that the process is the one of the record.
"""

import socket
from asyncio import Task
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from edgehold.api.vmand import Check, CoresGrade, MemoryGrade, Nic, Usage, Vcpu
from vmand.model import Found, Images, Record


class Trait(StrEnum):
    """What a kind of back end can do. What it lacks is refused as ``unsupported`` before it is asked for it."""

    SUSPEND = "suspend"
    SHUTDOWN = "shutdown"
    """It can ask a guest to power off; without it a guest is only ended by force."""
    EXIT_EVENTS = "exit-events"
    """It tells when a guest ended; without it guests are looked at now and then."""
    VIRTIO = "virtio"
    """Disks, network interfaces, vsock and an agent's channel."""
    SECURE = "secure"
    CONSOLE = "console"
    DEVICE_TREE = "device-tree"
    """It takes a device tree for some guest; which one fits is its own check."""
    SHARED = "shared"
    """Partitions whose CPUs are not pinned, with threads on the host that can be held by a reservation."""
    PAUSED = "paused"
    """It can load a guest without its CPUs beginning."""
    SCRUB = "scrub"
    """It does not clear memory itself between two partitions: `Backend.scrub` is called before it is given again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grades:
    """What a partition has, and why not more."""

    cores: CoresGrade | None = None
    cores_reason: str = ""
    memory: MemoryGrade | None = None
    memory_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Where a guest's process is, once it runs. A back end without processes leaves pid and start_ticks 0."""

    pid: int = 0
    start_ticks: int = 0
    uid: int | None = None
    unit: str = ""
    accelerator: str
    arch: str
    vsock_cid: int | None = None
    disks: tuple[str, ...] = ()
    """Their files, as the caller called them."""
    nics: tuple[Nic, ...] = ()
    """With the addresses that they have."""


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
    best: Grades
    """The best grades that a partition can have here."""
    archs: tuple[str, ...]


class Changed(Protocol):
    """Told of a guest to which something happened."""

    def __call__(self, partition: int, run: str, found: Found | None = None, /) -> None:
        """Look at this run of this partition's guest. ``found``: what it is said to do; None: who knows."""


Output = Callable[[int, str], None]
"""(partition, text): lines of the guest's console."""

Ended = Callable[[Task[Any]], None]
"""A task that watches a guest has ended: where it failed, that is a bug and nobody watches any more."""


class Backend(Protocol):
    """Runs guests. Methods raise `EdgeholdError`; those marked idempotent may be asked for any remains."""

    traits: frozenset[Trait]

    def begin(self, *, changed: Changed, output: Output, ended: Ended) -> None:
        """Called once before everything else."""

    async def host(self) -> Host:
        """What this host can give. The first call may take seconds: acceleration is tried, not assumed."""

    async def hypervisor(self) -> str:
        """What runs guests, with its version (``QEMU 7.2.22``). Empty where it can't be told."""

    async def doctor(self) -> list[Check]:
        """What this host gives and what not, why, and what would change it."""

    def memory_free(self) -> int:
        """Bytes that could be reserved now."""

    async def reserve(self, record: Record) -> Grades:
        """Take the partition's memory; it outlives every process. Leaves nothing behind when it fails.

        Returns the memory's grade; the cores' grade is told by `grade` once a guest runs.
        """

    async def holds(self, record: Record) -> bool:
        """Whether what `reserve` took for this record is there, whole."""

    def keeps(self, before: Record, after: Record) -> bool:
        """Whether what `reserve` took for ``before`` is as good for ``after``."""

    async def scrub(self, record: Record) -> None:
        """Clear the partition's memory. Asked for before `release`, and only of a back end with `Trait.SCRUB`."""

    async def release(self, record: Record) -> None:
        """Give the partition's memory back. Idempotent."""

    async def start(self, record: Record, images: Images, *, paused: bool = False) -> Running:
        """Run a guest: its CPUs run when this returns. What fails half-way is left for `end`.

        ``paused``: they stand still until `restore`; only asked of a back end with `Trait.PAUSED`.

        Raises:
            NoCapacityError: the record is strict and its cores can't be isolated; the text says why.
        """

    async def adopt(self, record: Record) -> Finding:
        """Find the guest that an earlier vmand started, and watch it from now on."""

    async def look(self, record: Record) -> Finding:
        """What the guest does now."""

    async def grade(self, record: Record, *, repair: bool = False) -> Grades:
        """What the partition has now, read back from the kernel; cores only while a guest runs.

        ``repair``: try first to get back what was lost. Costs a millisecond or less without it.
        """

    async def suspend(self, record: Record) -> None:
        """Stop the guest's CPUs."""

    async def restore(self, record: Record) -> None:
        """Let the guest's CPUs go on."""

    async def reboot(self, record: Record) -> None:
        """Reset the guest by force and load its kernel again. Also one that has just powered itself off."""

    async def press_power(self, record: Record) -> None:
        """Press the power button once."""

    async def wait_off(self, record: Record, timeout_s: float) -> bool:
        """Wait until the guest is off or gone; False when the time is over."""

    async def end(self, record: Record) -> None:
        """End the guest's process by force and remove what belongs to the run. Idempotent."""

    async def vcpus(self, record: Record) -> list[Vcpu]:
        """The threads that run the guest's CPUs."""

    async def usage(self, record: Record) -> Usage:
        """What the guest's devices carry. Only asked of a back end with `Trait.VIRTIO`."""

    def console(self, record: Record) -> str:
        """The last output of the guest's console. What its watchers have not been given yet is given to them first."""

    def attach(self, record: Record) -> socket.socket:
        """The guest's console as a stream, blocking: its last output, what it prints from now on; what is written is
        typed. The other end reads it without waiting for it: one who does not read is cut off."""

    async def sweep(self, records: Collection[Record]) -> None:
        """Remove processes, directories and memory in our own places that belong to none of these partitions.

        The run of a partition that is among them is left alone, whatever the partition's state.
        """

    async def close(self) -> None:
        """Let go of all guests; they live on."""
