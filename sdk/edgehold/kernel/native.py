"""The only importer of the compiled extension: C's -errno becomes `OSError`, C's structures become named tuples.

It must not decide anything: what a call means is said in sched.py, sampler.py and vmanager.py.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from edgehold._kernel import ffi, lib

# struct eh_schedstat of ext/cdef.h; its size is asserted there.
_SCHEDSTAT = struct.Struct("=QQQQii")
# struct vman_event of ext/uapi/vmanager.h; its size is asserted in ext/vmanager.c.
_VMAN_EVENT = struct.Struct("=IIIIQQ")


class RawAttr(NamedTuple):
    """struct sched_attr without its size (sched_setattr(2)). Times in nanoseconds."""

    policy: int
    flags: int
    nice: int
    priority: int
    runtime_ns: int
    deadline_ns: int
    period_ns: int


class RawLeft(NamedTuple):
    """How a thread left SCHED_DEADLINE: see `sched_leave`."""

    state: str
    """The state letter (proc_pid_stat(5)) by which the way was chosen."""
    step_errno: int
    """0, or why the step before (shrink or grow) was refused; only a refused shrink stops the leaving."""
    fallback: bool
    """The wanted policy was refused and the thread is in SCHED_OTHER instead."""
    errno: int
    """0, or why the wanted policy was refused."""
    stayed: bool = False
    """It sleeps and ``if_asleep`` was refused: nothing was changed."""


class RawSchedstat(NamedTuple):
    """One thread's /proc/…/schedstat, in nanoseconds since the thread began, and when it was read."""

    executed_ns: int
    run_delay_ns: int
    timeslices: int
    time_ns: int
    """CLOCK_MONOTONIC right after the read."""
    errno: int
    """0, or why it could not be read (ESRCH: the thread is gone); the other fields then say nothing."""


def _fail(call: str, tid: int, errno: int) -> OSError:
    who = f"thread {tid}" if tid else "this thread"
    return OSError(errno, f"{call} of {who}: {os.strerror(errno)}")


def _to_c(attr: RawAttr) -> Any:
    raw = ffi.new("struct eh_sched_attr *")
    raw.policy, raw.flags, raw.nice, raw.priority, raw.runtime_ns, raw.deadline_ns, raw.period_ns = attr
    return raw


def sched_setattr(tid: int, attr: RawAttr) -> None:
    """Set a thread's policy; 0 is the calling thread. Raises `OSError` with the call's name in its text."""
    if (result := lib.eh_sched_setattr(tid, _to_c(attr))) < 0:
        raise _fail("sched_setattr", tid, -result)


def sched_getattr(tid: int) -> RawAttr:
    """A thread's policy; 0 is the calling thread. Raises `OSError` with the call's name in its text."""
    raw = ffi.new("struct eh_sched_attr *")
    if (result := lib.eh_sched_getattr(tid, raw)) < 0:
        raise _fail("sched_getattr", tid, -result)
    return RawAttr(raw.policy, raw.flags, raw.nice, raw.priority, raw.runtime_ns, raw.deadline_ns, raw.period_ns)


def sched_leave(
    tid: int, stat_fd: int, *, if_asleep: RawAttr | None, if_running: RawAttr | None, wanted: RawAttr
) -> RawLeft:
    """Read the thread's state, take the step that the state asks for, set ``wanted``: three calls back to back.

    ``stat_fd`` is the thread's open ``/proc/<tid>/stat``. A refused ``wanted`` ends in SCHED_OTHER and is told in the
    result, so that a step never stays alone. A sleeping thread for which ``if_asleep`` is refused stays as it is: to
    leave all the same is to call again with ``if_asleep=None``.

    Raises:
        OSError: the thread is gone, or nothing at all could be changed.
    """
    left = ffi.new("struct eh_left *")
    result = lib.eh_sched_leave(
        tid,
        stat_fd,
        ffi.NULL if if_asleep is None else _to_c(if_asleep),
        ffi.NULL if if_running is None else _to_c(if_running),
        _to_c(wanted),
        left,
    )
    if result < 0 and not left.fallback:
        raise _fail("sched_setattr", tid, -result)
    return RawLeft(chr(left.state), left.step_error, bool(left.fallback), -result, bool(left.stayed))


class SchedstatBatch:
    """Descriptors and results of a batched read, in memory that C and Python share. Grows, never shrinks."""

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._fds = ffi.new("int[]", size)
        self._out = ffi.new("struct eh_schedstat[]", size)

    def read(self, fds: list[int]) -> Iterator[RawSchedstat]:
        """Read all in one call, without the GIL. The results come in the order of the descriptors."""
        count = len(fds)
        if count > self._size:
            self._size = max(count, 2 * self._size)
            self._fds = ffi.new("int[]", self._size)
            self._out = ffi.new("struct eh_schedstat[]", self._size)
        self._fds[0:count] = fds
        lib.eh_schedstat_read(self._fds, self._out, count)
        data = bytes(ffi.buffer(self._out, count * _SCHEDSTAT.size)) if count else b""
        for executed, delay, slices, time, errno, _reserved in _SCHEDSTAT.iter_unpack(data):
            yield RawSchedstat(executed, delay, slices, time, errno)


def timer_open() -> int:
    """A descriptor that becomes readable at the time that `timer_set` says (timerfd_create(2)). Raises `OSError`."""
    if (result := lib.eh_timer_open()) < 0:
        raise OSError(-result, f"timerfd_create: {os.strerror(-result)}")
    return result


def timer_set(fd: int, at_ns: int) -> None:
    """Fire at this time of CLOCK_MONOTONIC in nanoseconds, and not before; 0: never. Raises `OSError`."""
    if (result := lib.eh_timer_set(fd, at_ns)) < 0:
        raise OSError(-result, f"timerfd_settime: {os.strerror(-result)}")


def set_mempolicy(mode: int, node: int | None) -> None:
    """Set the calling thread's memory policy, with one node or none (set_mempolicy(2)). Raises `OSError`."""
    if (result := lib.eh_set_mempolicy(mode, -1 if node is None else node)) < 0:
        raise _fail("set_mempolicy", 0, -result)


# /dev/vmanager (ext/uapi/vmanager.h). A mask of cores is an integer with bit N set for core N.


class RawVmanInfo(NamedTuple):
    """struct vman_info without its size. Memory in bytes."""

    abi: int
    caps: int
    cpu_possible: int
    mem_total: int
    mem_free: int
    mem_align: int
    max_partitions: int
    num_partitions: int
    fw_version: int
    backend: int


class RawVmanCreated(NamedTuple):
    """The results in struct vman_create."""

    id: int
    fd: int
    """The caller's from now on; -1 where none was asked for."""
    cpu_mask: int
    mem_base: int


class RawVmanImage(NamedTuple):
    """struct vman_image, one that is present. Bytes; 0: to the file's end, an address of the driver's choice."""

    fd: int
    offset: int = 0
    length: int = 0
    load_addr: int = 0


class RawVmanStatus(NamedTuple):
    """struct vman_status without its size. Memory in bytes, times in nanoseconds."""

    id: int
    state: int
    last_error: int
    flags: int
    memsize: int
    mem_base: int
    cpu_mask: int
    boot_count: int
    deployed_ns: int
    generation: int
    name: bytes
    uuid: bytes
    fw_code: int


class RawVmanEvent(NamedTuple):
    """struct vman_event without its size."""

    id: int
    old_state: int
    new_state: int
    generation: int
    time_ns: int


def vman_constant(name: str) -> int:
    """A constant of the header by its name without ``VMAN_``, ioctl numbers included."""
    return int(getattr(lib, f"VMAN_{name}"))


def _vman_check(name: str, result: int) -> int:
    if result < 0:
        raise OSError(-result, f"VMAN_{name}: {os.strerror(-result)}")
    return result


def _from_words(words: Any) -> int:
    return sum(int(word) << 64 * at for at, word in enumerate(words))


def vman_info(fd: int) -> RawVmanInfo:
    """VMAN_GET_INFO. This and the following raise `OSError` with the call's name in its text, and release the GIL."""
    raw = ffi.new("struct vman_info *")
    _vman_check("GET_INFO", lib.eh_vman_info(fd, raw))
    return RawVmanInfo(
        raw.abi,
        raw.caps,
        _from_words(raw.cpu_possible),
        raw.mem_total,
        raw.mem_free,
        raw.mem_align,
        raw.max_partitions,
        raw.num_partitions,
        raw.fw_version,
        raw.backend,
    )


def vman_create(
    fd: int, *, partition: int, uuid: bytes, name: bytes, flags: int, memsize: int, cpu_mask: int, ncpus: int
) -> RawVmanCreated:
    """VMAN_CREATE."""
    raw = ffi.new("struct vman_create *")
    raw.id, raw.flags, raw.memsize, raw.ncpus = partition, flags, memsize, ncpus
    raw.uuid, raw.name = uuid, name
    raw.cpu_mask = [cpu_mask >> 64 * at & (1 << 64) - 1 for at in range(len(raw.cpu_mask))]
    _vman_check("CREATE", lib.eh_vman_create(fd, raw))
    return RawVmanCreated(raw.id, raw.fd, _from_words(raw.cpu_mask), raw.mem_base)


def vman_destroy(fd: int, partition: int) -> None:
    """VMAN_DESTROY."""
    _vman_check("DESTROY", lib.eh_vman_destroy(fd, partition))


def vman_open(fd: int, partition: int) -> int:
    """VMAN_OPEN: the partition's descriptor, the caller's from now on."""
    return _vman_check("OPEN", lib.eh_vman_open(fd, partition))


def vman_next(fd: int, partition: int) -> int:
    """VMAN_NEXT: the smallest id that exists above this one; ENOENT where there is none."""
    raw = ffi.new("uint32_t *", partition)
    _vman_check("NEXT", lib.eh_vman_next(fd, raw))
    return int(raw[0])


def vman_deploy(fd: int, *, images: list[RawVmanImage | None], cmdline: bytes, flags: int, timeout_ms: int) -> None:
    """VMAN_DEPLOY; images in the order of the header's VMAN_IMG_*."""
    raw = ffi.new("struct vman_deploy *")
    raw.flags, raw.timeout_ms = flags, timeout_ms
    for at, image in enumerate(images):
        if image is not None:
            slot = raw.img[at]
            slot.fd, slot.offset, slot.len, slot.load_addr = image
            slot.flags = vman_constant("IMAGE_PRESENT")
    text = ffi.new("char[]", cmdline)  # has to live as long as the call
    if cmdline:
        raw.cmdline_ptr, raw.cmdline_len = int(ffi.cast("uintptr_t", text)), len(cmdline)
    _vman_check("DEPLOY", lib.eh_vman_deploy(fd, raw))


def vman_ctl(fd: int, name: str, *, flags: int = 0, timeout_ms: int = 0) -> int:
    """One of VMAN_SHUTDOWN, REBOOT, SUSPEND, RESTORE, SCRUB, named so; the state after it."""
    state = ffi.new("uint32_t *")
    _vman_check(name, lib.eh_vman_ctl(fd, vman_constant(name), flags, timeout_ms, state))
    return int(state[0])


def vman_status(fd: int) -> RawVmanStatus:
    """VMAN_STATUS."""
    raw = ffi.new("struct vman_status *")
    _vman_check("STATUS", lib.eh_vman_status(fd, raw))
    return RawVmanStatus(
        raw.id,
        raw.state,
        raw.last_error,
        raw.flags,
        raw.memsize,
        raw.mem_base,
        _from_words(raw.cpu_mask),
        raw.boot_count,
        raw.deployed_ns,
        raw.generation,
        ffi.string(raw.name),
        bytes(raw.uuid),
        raw.fw_code,
    )


def vman_events(data: bytes) -> Iterator[RawVmanEvent]:
    """The events that one read(2) gave. Steps by each one's own size, which a newer driver may have made larger.

    Raises:
        ValueError: the bytes are not whole events.
    """
    at = 0
    while at < len(data):
        try:
            size, *fields = _VMAN_EVENT.unpack_from(data, at)
        except struct.error:
            size = 0
        if not _VMAN_EVENT.size <= size <= len(data) - at:
            raise ValueError(f"{len(data)} bytes of events from /dev/vmanager are no whole events")
        yield RawVmanEvent(*fields)
        at += size
