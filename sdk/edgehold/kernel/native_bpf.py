"""The extension's BPF iterator: C's -errno becomes `OSError`, a record becomes a named tuple.

It must not decide anything: what a refusal means, and when to use the iterator at all, is said in taskiter.py.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from edgehold._kernel import ffi, lib

# struct eh_task of ext/bpf_cdef.h; its size is asserted in ext/bpf.c.
_TASK = struct.Struct("=iIQQQQqQII")
_WHY_SIZE = 1024
# The names of eh_layout.fields, in its order.
_FIELDS = (
    "pid", "normal_prio", "state", "start_boottime", "sum_exec_runtime", "run_delay", "pcount", "dl_runtime",
    "dl_period", "dl_throttled",
)  # fmt: skip


class RawTask(NamedTuple):
    """struct eh_task without what is reserved: one thread in SCHED_DEADLINE. Times in nanoseconds."""

    tid: int
    """As the initial pid namespace has it."""
    state: int
    """The kernel's bits: 0 runs or wants to (throttled included), 0x80: ended."""
    start_boottime_ns: int
    executed_ns: int
    run_delay_ns: int
    timeslices: int
    dl_runtime_ns: int
    """What is left of the budget, as old as the last tick; 0 and less: used up."""
    period_ns: int
    """Of its reservation."""
    throttled: bool


class RawField(NamedTuple):
    """Where a field of struct task_struct is; all 0 where this kernel lacks an optional one."""

    offset: int
    bytes: int
    shift: int
    bits: int


class RawLayout(NamedTuple):
    """What `btf_layout` found."""

    iterator_id: int
    fields: dict[str, RawField]


class TaskRecords:
    """Room for ``size`` records, in memory that C and Python share; the first ``count`` of them say something."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self.pointer: Any = ffi.new("struct eh_task[]", size)
        """``struct eh_task *``: valid as long as this object lives and has not grown."""

    def grow(self, size: int) -> None:
        """Other memory, of at least this size; what was in the old one is gone."""
        self.size = max(size, self.size)
        self.count = 0
        self.pointer = ffi.new("struct eh_task[]", self.size)

    def __iter__(self) -> Iterator[RawTask]:
        data = bytes(ffi.buffer(self.pointer, self.count * _TASK.size)) if self.count else b""
        for tid, state, start, executed, delay, slices, runtime, deadline, throttled, _reserved in _TASK.iter_unpack(
            data
        ):
            yield RawTask(tid, state, start, executed, delay, slices, runtime, deadline, bool(throttled))


class Bpf:
    """A loaded program with its iterator (ext/bpf.c)."""

    def __init__(self) -> None:
        """Load it.

        Raises:
            OSError: with the reason as the kernel has it: ENOENT no BTF, EPROTO and ENOTSUP not the BTF that is needed,
                EPERM no privilege, others: bpf(2).
        """
        self._raw: Any = ffi.new("struct eh_bpf *")
        why = ffi.new("char[]", _WHY_SIZE)
        if (result := lib.eh_bpf_open(self._raw, why, _WHY_SIZE)) < 0:
            raise OSError(-result, ffi.string(why).decode(errors="replace"))

    @property
    def knows_throttled(self) -> bool:
        """Whether `RawTask.throttled` is told by this kernel."""
        return bool(self._raw.flags & lib.EH_BPF_THROTTLED)

    def read(self, records: TaskRecords) -> None:
        """One pass over all threads, without the GIL. Raises `OSError`: ENOSPC where there are more than fit."""
        records.count = 0
        if (result := lib.eh_bpf_read(self._raw, records.pointer, records.size)) < 0:
            raise OSError(-result, f"BPF iterator over threads: {os.strerror(-result)}")
        records.count = result

    def close(self) -> None:
        """Unload it."""
        lib.eh_bpf_close(self._raw)


def btf_layout(data: bytes) -> RawLayout:
    """Where what the program reads is, in a kernel whose BTF is given. Raises `OSError`: EPROTO, ENOTSUP."""
    raw = ffi.new("struct eh_layout *")
    why = ffi.new("char[]", _WHY_SIZE)
    text = ffi.new("char[]", data)
    if (result := lib.eh_btf_layout(text, len(data), raw, why, _WHY_SIZE)) < 0:
        raise OSError(-result, ffi.string(why).decode(errors="replace"))
    fields = {
        name: RawField(field.offset, field.bytes, field.shift, field.bits)
        for name, field in zip(_FIELDS, raw.fields, strict=True)
    }
    return RawLayout(raw.iterator_id, fields)
