"""Hard partitions of a firmware through /dev/vmanager (ext/uapi/vmanager.h explains every call and every errno).

Every call blocks for as long as the firmware or a guest takes, without the GIL; it is for a thread. Calls of several
threads at the same time are fine, on one handle too. Errors are `OSError` with the call's name in the text: what they
mean for a person is said by whoever asked. It decides nothing and keeps no state but descriptors.
"""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from edgehold.kernel import native
from edgehold.kernel.native import RawVmanImage, vman_constant

DEVICE = Path("/dev/vmanager")
ABI = vman_constant("ABI_VERSION")
NAME_MAX = vman_constant("NAME_LEN") - 1
"""Bytes of a partition's name at most."""
CPUS_MAX = vman_constant("MAX_CPUS")
ID_MAX = vman_constant("MAX_ID")
# Room for 128 events in one read.
_EVENT_BYTES = 4096
_NO_UUID = UUID(int=0)


class State(IntEnum):
    """States of a partition (VMAN_STATE_*)."""

    NONE = vman_constant("STATE_NONE")
    """Does not exist: before its creation and after its end, in events alone."""
    READY = vman_constant("STATE_READY")
    DEPLOYED = vman_constant("STATE_DEPLOYED")
    SUSPENDED = vman_constant("STATE_SUSPENDED")
    BUSY = vman_constant("STATE_BUSY")
    """A verb is under way in the firmware."""
    FAILED = vman_constant("STATE_FAILED")


class Cap(IntFlag):
    """What the driver and its firmware can do (VMAN_CAP_*)."""

    SECURE = vman_constant("CAP_SECURE")
    SUSPEND = vman_constant("CAP_SUSPEND")
    REBOOT = vman_constant("CAP_REBOOT")
    KEEP = vman_constant("CAP_KEEP")
    EVENTS = vman_constant("CAP_EVENTS")
    GENDTB = vman_constant("CAP_GENDTB")
    SHUTDOWN = vman_constant("CAP_SHUTDOWN")
    """It can ask a guest to power off."""
    CLEARS = vman_constant("CAP_CLEARS")
    """destroy clears the memory; without it `PartitionHandle.scrub` is the caller's duty."""


class Flag(IntFlag):
    """How a partition was made, and what status adds (VMAN_CREATE_*, VMAN_STATUS_*)."""

    SECURE = vman_constant("CREATE_SECURE")
    CPUS_ANY = vman_constant("CREATE_CPUS_ANY")
    KEEP = vman_constant("CREATE_KEEP")
    NOFD = vman_constant("CREATE_NOFD")
    DIRTY = vman_constant("STATUS_DIRTY")
    """A guest was in its memory since that was cleared; status alone."""


_NO_FLAGS = Flag(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What the driver is and has. Memory in bytes."""

    abi: int
    caps: Cap
    cpus: tuple[int, ...]
    """Cores that partitions may get, taken or not."""
    memory_total: int
    memory_free: int
    """The largest piece may be smaller."""
    memory_align: int
    """A partition's memory is a multiple of it."""
    max_partitions: int
    num_partitions: int
    firmware: tuple[int, int]
    """Major and minor version; (0, 0): no firmware."""
    backend: int
    """0 a model, 1 a firmware by SMC, 2 something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One partition as the driver sees it now. Memory in bytes, times in nanoseconds."""

    id: int
    state: State
    last_error: int
    """Why the last verb or the guest failed, an errno; 0 after a success."""
    fw_code: int
    """What the firmware answered last, as it is; 0: success."""
    flags: Flag
    memory_bytes: int
    memory_base: int
    cpus: tuple[int, ...]
    boot_count: int
    """Grows at every start of a guest, reboots included."""
    deployed_ns: int
    """CLOCK_BOOTTIME of the last start; 0: never."""
    generation: int
    """Grows at every change of state and at every reboot."""
    name: str
    uuid: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A change of a partition's state."""

    id: int
    old: State
    new: State
    generation: int
    time_ns: int
    """CLOCK_BOOTTIME."""

    @property
    def lost(self) -> int:
        """How many events were lost here because the reader was too slow: it has to look at every partition."""
        return 0 if self.id else self.generation


class PartitionHandle:
    """An open partition. Closing it touches nothing; ENODEV from any call: the partition is gone."""

    def __init__(self, fd: int, partition: int) -> None:
        os.set_blocking(fd, False)  # concerns read_events alone
        self._fd = fd
        self.id = partition

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, readable (and POLLHUP once the partition is gone) where it has `Cap.EVENTS`."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor. Not while another thread is in a call on it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def deploy(
        self,
        kernel_fd: int,
        dtb_fd: int | None = None,
        initrd_fd: int | None = None,
        cmdline: str = "",
        timeout_ms: int = 0,
        *,
        make_dtb: bool = False,
    ) -> None:
        """Load the files and start the guest: its CPUs run when this returns.

        Each file is read from its beginning, wherever its offset is. ``timeout_ms``: for the firmware, 0: its default.
        ``make_dtb`` (`Cap.GENDTB`): where no device tree is given.

        Raises:
            OSError: EBUSY not READY; EBADF, ENOEXEC, EINVAL an image; ENOSPC they don't fit; ETIMEDOUT, EIO the
                firmware: the partition is FAILED; ECANCELED ended by force meanwhile.
            ValueError: the command line has a NUL in it.
        """
        if "\0" in cmdline:
            raise ValueError("a command line can't have a NUL in it")
        images = [None if fd is None else RawVmanImage(fd) for fd in (kernel_fd, dtb_fd, initrd_fd)]
        flags = vman_constant("DEPLOY_GENDTB") if make_dtb else 0
        native.vman_deploy(self._fd, images=images, cmdline=cmdline.encode(), flags=flags, timeout_ms=timeout_ms)

    def shutdown(self, *, force: bool = False, timeout_ms: int = 0) -> State:
        """Ask the guest to power off and wait until it did (`Cap.SHUTDOWN`), or end it by force at once.

        Raises:
            OSError: ETIMEDOUT the guest did not obey and goes on; EBADFD no guest, or (without force) one that does
                not run.
        """
        flags = vman_constant("SHUTDOWN_FORCE") if force else 0
        return State(native.vman_ctl(self._fd, "SHUTDOWN", flags=flags, timeout_ms=timeout_ms))

    def reboot(self, *, also_off: bool = False, timeout_ms: int = 0) -> State:
        """Stop the CPUs by force, load the last images again, start (`Cap.REBOOT`).

        ``also_off``: also a guest that has powered itself off.
        """
        flags = vman_constant("REBOOT_OFF") if also_off else 0
        return State(native.vman_ctl(self._fd, "REBOOT", flags=flags, timeout_ms=timeout_ms))

    def suspend(self, *, timeout_ms: int = 0) -> State:
        """Stop the CPUs (`Cap.SUSPEND`)."""
        return State(native.vman_ctl(self._fd, "SUSPEND", timeout_ms=timeout_ms))

    def restore(self, *, timeout_ms: int = 0) -> State:
        """Let the CPUs go on."""
        return State(native.vman_ctl(self._fd, "RESTORE", timeout_ms=timeout_ms))

    def scrub(self, *, timeout_ms: int = 0) -> State:
        """Clear the memory of a READY partition; its last images are forgotten too."""
        return State(native.vman_ctl(self._fd, "SCRUB", timeout_ms=timeout_ms))

    def status(self) -> Status:
        """What the partition is now. Does not wait for the firmware."""
        raw = native.vman_status(self._fd)
        return Status(
            id=raw.id,
            state=State(raw.state),
            last_error=raw.last_error,
            fw_code=raw.fw_code,
            flags=Flag(raw.flags),
            memory_bytes=raw.memsize,
            memory_base=raw.mem_base,
            cpus=cpus_of(raw.cpu_mask),
            boot_count=raw.boot_count,
            deployed_ns=raw.deployed_ns,
            generation=raw.generation,
            name=raw.name.decode(errors="replace"),
            uuid=UUID(bytes=raw.uuid),
        )

    def read_events(self) -> list[Event]:
        """This partition's events since the handle was opened, as `Manager.read_events`."""
        return _read_events(self._fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """A partition that has just been made, READY."""

    id: int
    cpus: tuple[int, ...]
    memory_base: int
    handle: PartitionHandle | None
    """None with `Flag.NOFD`; else the caller's."""


class Manager:
    """An open /dev/vmanager. Partitions that were made here without `Flag.KEEP` end by force when it is closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls, path: str | os.PathLike[str] = DEVICE) -> Self:
        """Open the device; events are counted from now on.

        Raises:
            OSError: ENOENT no driver; EACCES only root may; ENOTTY the path is something else.
        """
        manager = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        with contextlib.ExitStack() as undo:
            undo.callback(manager.close)
            manager.info()
            undo.pop_all()
        return manager

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, non-blocking; readable when there are events (`Cap.EVENTS`)."""
        return self._fd

    def close(self) -> None:
        """Close the device. Not while another thread is in a call on it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def info(self) -> Info:
        """What the driver is and has now."""
        raw = native.vman_info(self._fd)
        return Info(
            abi=raw.abi,
            caps=Cap(raw.caps),
            cpus=cpus_of(raw.cpu_possible),
            memory_total=raw.mem_total,
            memory_free=raw.mem_free,
            memory_align=raw.mem_align,
            max_partitions=raw.max_partitions,
            num_partitions=raw.num_partitions,
            firmware=(raw.fw_version >> 16, raw.fw_version & 0xFFFF),
            backend=raw.backend,
        )

    def create(
        self,
        *,
        memory_bytes: int,
        cpus: Iterable[int] = (),
        count: int = 0,
        partition: int = 0,
        uuid: UUID = _NO_UUID,
        name: str = "",
        flags: Flag = _NO_FLAGS,
    ) -> Created:
        """Reserve exactly these cores, or with `Flag.CPUS_ANY` any ``count``, and memory.

        ``partition``: the id that it shall have, 0: one of the driver's choice. ``name``: up to `NAME_MAX` bytes.

        Raises:
            OSError: EEXIST the id is taken; EBUSY a core is; ENOSPC cores, memory or partitions are used up;
                EOPNOTSUPP a flag without its capability; EINVAL what no driver takes.
            ValueError: the name is too long, or a core has no bit in the mask.
        """
        label = name.encode()
        if len(label) > NAME_MAX:
            raise ValueError(f"name: {name!r} is longer than {NAME_MAX} bytes")
        raw = native.vman_create(
            self._fd,
            partition=partition,
            uuid=uuid.bytes,
            name=label,
            flags=flags,
            memsize=memory_bytes,
            cpu_mask=mask_of(cpus),
            ncpus=count,
        )
        handle = None if raw.fd < 0 else PartitionHandle(raw.fd, raw.id)
        return Created(id=raw.id, cpus=cpus_of(raw.cpu_mask), memory_base=raw.mem_base, handle=handle)

    def destroy(self, partition: int) -> None:
        """Give its cores and its memory back.

        Raises:
            OSError: ENOENT no such id; EBUSY its state is neither READY nor FAILED.
        """
        native.vman_destroy(self._fd, partition)

    def open_partition(self, partition: int) -> PartitionHandle:
        """A handle of a partition, whoever made it.

        Raises:
            OSError: ENOENT no such id.
        """
        return PartitionHandle(native.vman_open(self._fd, partition), partition)

    def next(self, partition: int = 0) -> int | None:
        """The smallest id above this one, whoever made it; None at the end. Begin with 0."""
        try:
            return native.vman_next(self._fd, partition)
        except FileNotFoundError:
            return None

    def read_events(self) -> list[Event]:
        """The events that are there now, oldest first; none where there are none. Does not wait.

        Raises:
            OSError: EOPNOTSUPP without `Cap.EVENTS`.
        """
        return _read_events(self._fd)


def _read_events(fd: int) -> list[Event]:
    events: list[Event] = []
    while True:
        try:
            data = os.read(fd, _EVENT_BYTES)
        except BlockingIOError:
            return events
        if not data:  # the partition is gone
            return events
        events += [
            Event(
                id=raw.id,
                old=State(raw.old_state),
                new=State(raw.new_state),
                generation=raw.generation,
                time_ns=raw.time_ns,
            )
            for raw in native.vman_events(data)
        ]


def cpus_of(mask: int) -> tuple[int, ...]:
    """The cores of a mask, ascending."""
    return tuple(core for core in range(CPUS_MAX) if mask >> core & 1)


def mask_of(cpus: Iterable[int]) -> int:
    """Cores as a mask.

    Raises:
        ValueError: a core that the ABI has no bit for.
    """
    mask = 0
    for core in cpus:
        if not 0 <= core < CPUS_MAX:
            raise ValueError(f"core {core} is not one of 0 to {CPUS_MAX - 1}")
        mask |= 1 << core
    return mask
