"""What a partition is, which command is legal in which state, and the arithmetic of cores and memory.

Pure: no I/O, no await. Sources: the vManager's internal API (NANCY D3.4 §3.2.1) for the table; FAILED is ours.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum

import msgspec

from edgehold.api.vmand import Mode, Partition, State
from edgehold.errors import BadRequestError, NoCapacityError
from edgehold.fsm import Transitions

MIB = 1024 * 1024
GIB = 1024 * MIB
# Memory is given in huge-page sized pieces, so that another kind of memory behind it changes no size.
GRANULE_BYTES = 2 * MIB
MIN_MEMORY_BYTES = 16 * MIB
MAX_MEMORY_GIB = 64 * 1024
MAX_CMDLINE = 2048
_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")

CREATE = "create-partition"
DEPLOY = "deploy"
SUSPEND = "suspend"
RESTORE = "restore"
REBOOT = "reboot"
SHUTDOWN = "shutdown"
DESTROY = "destroy-partition"

TABLE: Transitions[State] = Transitions(
    "partition",
    {
        DEPLOY: (frozenset({State.READY}), State.DEPLOYED),
        SUSPEND: (frozenset({State.DEPLOYED}), State.SUSPENDED),
        RESTORE: (frozenset({State.SUSPENDED}), State.DEPLOYED),
        REBOOT: (frozenset({State.DEPLOYED}), State.DEPLOYED),
        # The document allows DEPLOYED alone; from FAILED it is our way back to a partition that can be deployed.
        SHUTDOWN: (frozenset({State.DEPLOYED, State.FAILED}), State.READY),
        DESTROY: (frozenset({State.READY, State.SUSPENDED, State.FAILED}), None),
    },
)
LIVE = frozenset({State.DEPLOYED, State.SUSPENDED})
"""The states in which a guest has a process."""


class Found(StrEnum):
    """What a guest is found to do when the back end looks."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    """It powered itself off."""
    FAILED = "failed"
    """It panicked, or its virtual machine can't go on."""
    GONE = "gone"
    """Its process does not exist any more."""


AFTER: dict[Found, State] = {
    Found.RUNNING: State.DEPLOYED,
    Found.PAUSED: State.SUSPENDED,
    Found.OFF: State.READY,
    Found.FAILED: State.FAILED,
    Found.GONE: State.FAILED,
}
"""The state that follows from what was found in a partition with a guest."""


class Images(msgspec.Struct, frozen=True, kw_only=True):
    """What is loaded into a partition: absolute paths of checked files, and the guest kernel's command line."""

    kernel: str
    initrd: str = ""
    dtb: str = ""
    cmdline: str = ""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A partition as the journal keeps it: what `Partition` shows, and what is needed to find its guest again."""

    id: int = 0
    uuid: str
    name: str
    mode: Mode
    cores: int
    memory_bytes: int
    state: State = State.READY
    cpus: tuple[int, ...] = ()
    run: str = ""
    """The uuid of the present or intended run of a guest; it stands in the command line of the guest's process."""
    pid: int | None = None
    start_ticks: int = 0
    """When the process started, in clock ticks since boot (field 22 of /proc/PID/stat): pids come back, this not."""
    unit: str = ""
    accelerator: str = ""
    boot_count: int = 0
    reason: str = ""
    pending: str = ""
    """The command whose outcome is not written yet."""

    def at_rest(self, state: State, *, reason: str = "") -> "Record":
        """The same partition with no guest and no command under way."""
        return msgspec.structs.replace(
            self, state=state, reason=reason, pending="", run="", pid=None, start_ticks=0, unit="", accelerator=""
        )

    def public(self) -> Partition:
        """What callers see."""
        return Partition(
            id=self.id,
            name=self.name,
            uuid=self.uuid,
            state=self.state,
            mode=self.mode,
            cores=self.cores,
            memory_bytes=self.memory_bytes,
            cpus=self.cpus,
            accelerator=self.accelerator,
            pid=self.pid if self.state in LIVE else None,
            unit=self.unit,
            boot_count=self.boot_count,
            reason=self.reason,
        )


def memory_bytes(memsize_gib: float) -> int:
    """``memsize`` (GiB, may be a fraction) in bytes, rounded up to the granule of 2 MiB.

    Raises:
        BadRequestError: smaller or larger than any partition may be.
    """
    if not memsize_gib <= MAX_MEMORY_GIB:
        raise BadRequestError(f"memsize: {memsize_gib:g} GiB is more than {MAX_MEMORY_GIB}; it is given in GiB")
    size = -(-int(memsize_gib * GIB) // GRANULE_BYTES) * GRANULE_BYTES
    if size < MIN_MEMORY_BYTES:
        raise BadRequestError(f"memsize: {memsize_gib:g} GiB is less than {MIN_MEMORY_BYTES // MIB} MiB")
    return size


def check_memory(wanted: int, free: int) -> None:
    """Refuse to give more than is left.

    Raises:
        NoCapacityError: says how much is.
    """
    if wanted > free:
        raise NoCapacityError(f"memory: {wanted // MIB} MiB are wanted and {max(free, 0) // MIB} MiB are left")


def check_name(name: str, others: Collection[str]) -> None:
    """A partition's name: given by the caller, unique on this host.

    Raises:
        BadRequestError: it is malformed or taken.
    """
    if not _NAME.fullmatch(name):
        raise BadRequestError(f"name: {name[:64]!r} is not 1 to 32 of the characters A-Z a-z 0-9 . _ -")
    if name in others:
        raise BadRequestError(f"name: {name!r} is taken by another partition; choose another or leave it out")


def check_cmdline(cmdline: str) -> None:
    """The guest kernel's command line.

    Raises:
        BadRequestError: too long, or with control characters.
    """
    if len(cmdline.encode()) > MAX_CMDLINE:
        raise BadRequestError(f"cmdline: longer than {MAX_CMDLINE} bytes")
    if any(ord(c) < 32 or ord(c) == 127 for c in cmdline):
        raise BadRequestError("cmdline: control characters are not allowed in a kernel's command line")


def free_cores(pool: Iterable[int], taken: Iterable[int]) -> tuple[int, ...]:
    """What a dedicated partition may still be given. Core 0 stays with Linux, whatever the settings say."""
    return tuple(sorted(set(pool) - set(taken) - {0}))


def pick_cores(free: Sequence[int], count: int) -> tuple[int, ...]:
    """The first ``count`` free cores.

    Raises:
        NoCapacityError: fewer are left; says which.
    """
    if count > len(free):
        left = f"{len(free)} are left: cores {', '.join(map(str, free))}" if free else "none is left"
        if len(free) == 1:
            left = f"1 is left: core {free[0]}"
        raise NoCapacityError(
            f"cores: {count} {'is' if count == 1 else 'are'} wanted for a dedicated partition and {left}; "
            "use fewer, destroy a partition, or create it with mode shared"
        )
    return tuple(free[:count])


def parse_cores(text: str) -> frozenset[int]:
    """``1-3,5`` as the kernel writes lists of CPUs.

    Raises:
        ValueError: it is malformed; the text says how it should look.
    """
    cores: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not (first.isdigit() and (not dash or last.isdigit())) or int(last or first) < int(first) or len(part) > 11:
            raise ValueError(f"{part!r} is not a core or a range of cores; write for example 1-3,5")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)
