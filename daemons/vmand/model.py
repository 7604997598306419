"""What a partition is, which command is legal in which state, and the arithmetic of cores and memory.

Pure: no I/O, no await. Sources: the vManager's internal API (NANCY D3.4 §3.2.1) for the table; FAILED is ours.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from edgehold.api.vmand import CoresGrade, MemoryGrade, Mode, Nic, Partition, State
from edgehold.errors import BadRequestError, NoCapacityError
from edgehold.fsm import Transitions

MIB = 1024 * 1024
GIB = 1024 * MIB
# Memory is given in huge-page sized pieces, so that another kind of memory behind it changes no size.
GRANULE_BYTES = 2 * MIB
MIN_MEMORY_BYTES = 16 * MIB
MAX_MEMORY_GIB = 64 * 1024
MAX_CMDLINE = 2048
MAX_ANNOTATIONS = 8
MAX_ANNOTATION_BYTES = 96 * 1024
NAME = re.compile(r"(?![0-9]+\Z)[A-Za-z0-9._][A-Za-z0-9._-]{0,31}")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_KEY = re.compile(r"[a-z0-9._-]{1,64}")

CREATE = "create-partition"
DEPLOY = "deploy"
SUSPEND = "suspend"
RESTORE = "restore"
REBOOT = "reboot"
SHUTDOWN = "shutdown"
DESTROY = "destroy-partition"
CHANGE = "change-partition"

TABLE: Transitions[State] = Transitions(
    "partition",
    {
        # Paused, it leads to SUSPENDED.
        DEPLOY: (frozenset({State.READY}), State.DEPLOYED),
        SUSPEND: (frozenset({State.DEPLOYED}), State.SUSPENDED),
        RESTORE: (frozenset({State.SUSPENDED}), State.DEPLOYED),
        REBOOT: (frozenset({State.DEPLOYED}), State.DEPLOYED),
        # The document allows DEPLOYED alone. From FAILED it is our way back to a partition that can be deployed; one
        # that is SUSPENDED goes on first, so that its guest can power off in order.
        SHUTDOWN: (frozenset({State.DEPLOYED, State.SUSPENDED, State.FAILED}), State.READY),
        DESTROY: (frozenset({State.READY, State.SUSPENDED, State.FAILED}), None),
        CHANGE: (frozenset({State.READY}), State.READY),
    },
)
LONG = frozenset({DEPLOY, SHUTDOWN, DESTROY, CHANGE})
"""Commands that take long enough for the state BUSY to be told to those who watch."""
OF_A_RUN = frozenset({SUSPEND, RESTORE, REBOOT})
"""Commands whose effect is a running guest's: it ends with a power cut, and the journal need not outlive it."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """A file that is open and was checked; whoever opened it closes it."""

    fd: int
    name: str
    """What the caller called it, for errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDisk:
    """A disk's file: open for what it is to be used for, locked against a second use (fcntl(2), OFD locks)."""

    file: OpenFile
    format: str
    readonly: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """What is loaded into a partition and what its guest is given."""

    kernel: OpenFile
    initrd: OpenFile | None = None
    dtb: OpenFile | None = None
    cmdline: str = ""
    disks: tuple[OpenDisk, ...] = ()
    nics: tuple[Nic, ...] = ()
    vsock: bool = False
    agent: bool = False
    arch: str = ""
    """``x86_64`` or ``aarch64``: what the kernel's image is for."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A partition as the journal keeps it: what `Partition` shows, and what is needed to find its guest again."""

    id: int = 0
    uuid: str
    name: str
    mode: Mode
    cores: int
    memory_bytes: int
    slot: int = 0
    """The smallest number that no other partition has: its user, its vsock address and its taps' names follow."""
    secure: bool = False
    strict: bool = False
    state: State = State.READY
    cpus: tuple[int, ...] = ()
    node: int | None = None
    cores_grade: CoresGrade | None = None
    cores_reason: str = ""
    memory_grade: MemoryGrade | None = None
    memory_reason: str = ""
    run: str = ""
    """The uuid of the present or intended run of a guest; it stands in the command line of the guest's process."""
    pid: int | None = None
    start_ticks: int = 0
    """When the process started, in clock ticks since boot (field 22 of /proc/PID/stat): pids come back, this not."""
    uid: int | None = None
    """The user of the process."""
    unit: str = ""
    arch: str = ""
    vsock_cid: int | None = None
    disks: tuple[str, ...] = ()
    """The files of the guest's disks, as whoever deployed it called them."""
    nics: tuple[Nic, ...] = ()
    """The guest's network interfaces, with the addresses that they have."""
    accelerator: str = ""
    boot_count: int = 0
    reason: str = ""
    last_output: str = ""
    """The last lines that a guest printed which FAILED."""
    pending: str = ""
    """The command whose outcome is not written yet."""
    leave: bool = False
    """The pending shutdown must not end the guest by force, whatever becomes of vmand."""

    def at_rest(self, state: State, *, reason: str = "") -> "Record":
        """The same partition with no guest and no command under way."""
        return msgspec.structs.replace(
            self,
            state=state,
            reason=reason,
            last_output=self.last_output if state is State.FAILED else "",
            pending="",
            leave=False,
            run="",
            pid=None,
            start_ticks=0,
            uid=None,
            unit="",
            arch="",
            vsock_cid=None,
            disks=(),
            nics=(),
            accelerator="",
            cores_grade=None,
            cores_reason="",
        )

    def public(self) -> Partition:
        """What callers see."""
        return Partition(
            id=self.id,
            name=self.name,
            uuid=self.uuid,
            state=State.BUSY if self.pending else self.state,
            command=self.pending,
            mode=self.mode,
            cores=self.cores,
            memory_bytes=self.memory_bytes,
            secure=self.secure,
            strict=self.strict,
            cpus=self.cpus,
            node=self.node,
            cores_grade=self.cores_grade,
            cores_reason=self.cores_reason,
            memory_grade=self.memory_grade,
            memory_reason=self.memory_reason,
            arch=self.arch,
            vsock_cid=self.vsock_cid,
            taps=tuple(tap_name(self.slot, n) for n in range(len(self.nics))),
            accelerator=self.accelerator,
            pid=self.pid if self.state in LIVE else None,
            user=self.uid if self.state in LIVE else None,
            unit=self.unit,
            boot_count=self.boot_count,
            reason=self.reason,
            last_output=self.last_output,
        )


def tap_name(slot: int, n: int) -> str:
    """What the host's side of the n-th network interface is called, of the guest in the partition of this slot."""
    return f"vm{slot}-{n}"


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
    if not NAME.fullmatch(name):
        raise BadRequestError(
            f"name: {name[:64]!r} is not 1 to 32 of the characters A-Z a-z 0-9 . _ -, not all digits (that is an id) "
            "and not beginning with - (that is an option)"
        )
    if name in others:
        raise BadRequestError(f"name: {name!r} is taken by another partition; choose another or leave it out")


def check_uuid(uuid: str, others: Collection[str]) -> None:
    """A partition's uuid where the caller gives one: it names files, so it is written in one way alone.

    Raises:
        BadRequestError: it is malformed or taken.
    """
    if not UUID.fullmatch(uuid) or uuid == _NO_UUID:
        raise BadRequestError(
            f"uuid: {uuid[:64]!r} is none as RFC 9562 writes it (lower case, 8-4-4-4-12 digits, not all zero)"
        )
    if uuid in others:
        raise BadRequestError(f"uuid: {uuid} is another partition's; give another or leave it out")


def annotated(before: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The annotations that follow; None removes a key.

    Raises:
        BadRequestError: a key is malformed, there are too many, or they are too long; names the key or the bound.
    """
    after = {key: value for key, value in {**before, **changes}.items() if value is not None}
    for key in changes:
        if not _KEY.fullmatch(key):
            raise BadRequestError(f"annotations: the key {key[:80]!r} is not 1 to 64 of the characters a-z 0-9 . _ -")
    if len(after) > MAX_ANNOTATIONS:
        raise BadRequestError(f"annotations: {len(after)} keys are more than {MAX_ANNOTATIONS}; remove one with null")
    size = sum(len(key.encode()) + len(value.encode()) for key, value in after.items())
    if size > MAX_ANNOTATION_BYTES:
        largest = max(after, key=lambda key: len(after[key]))
        raise BadRequestError(
            f"annotations: {size} bytes in all are more than {MAX_ANNOTATION_BYTES}; the longest is {largest!r}"
        )
    return after


def check_cmdline(cmdline: str) -> None:
    """The guest kernel's command line.

    Raises:
        BadRequestError: too long, or with control characters.
    """
    if len(cmdline.encode()) > MAX_CMDLINE:
        raise BadRequestError(f"cmdline: longer than {MAX_CMDLINE} bytes")
    if any(ord(c) < 32 or ord(c) == 127 for c in cmdline):
        raise BadRequestError("cmdline: control characters are not allowed in a kernel's command line")


def plain(text: str, limit: int = 600) -> str:
    """A guest's, QEMU's or the kernel's words as part of a line of ours: no control characters, and bounded."""
    return "".join(one if one.isprintable() else " " for one in text[: 4 * limit]).strip()[:limit]


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
