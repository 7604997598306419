"""What a guest's QEMU may still do: the limits and the chain of programs that gives up everything else. Pure.

A guest that takes its QEMU over has what that process has: a user that owns nothing but the files of its partition, no
capability, no way to new privileges, bounded threads, files and locked memory, no environment. systemd 252 refuses a
``User=`` that no user database knows; so setpriv(1) changes the user, with systemd as without it.
"""

from dataclasses import dataclass

from vmand.model import MIB, Record

# QEMU's own threads beside the vCPUs: main, RCU, the pool for blocking I/O (64 at most), devices' workers.
_OWN_THREADS = 96
# Descriptors: sockets, disks, and with KVM two event descriptors a queue, a queue a vCPU, of some devices.
_OPEN_FILES = 8192
# QEMU's heap, its libraries, the translated code (tb-size in command.py), and firmware.
_OWN_BYTES = 768 * MIB
_PER_THREAD_BYTES = 8 * MIB  # a stack (glibc: RLIMIT_STACK)
_LOG_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one QEMU may use (setrlimit(2)) beside its guest's memory, which vmand allocated."""

    threads: int
    file_bytes: int | None
    """How long a file may become that it writes: its log, or a disk. None: any length."""
    locked_bytes: int
    own_bytes: int
    """Memory that is its own: not the guest's."""
    open_files: int = _OPEN_FILES


def limits(record: Record, *, file_bytes: int | None, image_bytes: int, lock_memory: bool) -> Limits:
    """The limits of a partition's QEMU.

    ``file_bytes``: the size of the largest disk that it may write to; 0 without one, None where it is not known.
    ``image_bytes``: of its kernel, RAM disk and device tree together, which it may hold twice while it loads them.
    """
    threads = record.cores + _OWN_THREADS
    # Page tables are charged to the process too: 8 bytes a page of 4 KiB, and with KVM once more for the guest.
    tables = record.memory_bytes // 256
    own = _OWN_BYTES + 2 * image_bytes + tables + record.cores * 2 * _PER_THREAD_BYTES
    if lock_memory:  # mlockall(2) with MCL_FUTURE: every stack is there whole
        own += threads * _PER_THREAD_BYTES
    return Limits(
        threads=threads,
        file_bytes=None if file_bytes is None else max(file_bytes, _LOG_BYTES),
        locked_bytes=record.memory_bytes + own if lock_memory else 0,
        own_bytes=own,
    )


def setpriv(*, uid: int | None, group: int | None, privileged: bool) -> list[str]:
    """setpriv(1) with its options, to be followed by the command.

    ``uid``: also the gid; None keeps vmand's own user. ``group``: one more group, that of /dev/kvm. ``privileged``:
    vmand may change users and drop capabilities.
    """
    argv = ["setpriv"]
    if uid is not None:
        argv += ["--reuid", str(uid), "--regid", str(uid)]
    if privileged:
        argv += ["--groups", str(group)] if group is not None else ["--clear-groups"]
        argv += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
    return [*argv, "--no-new-privs", "--"]


def emptied() -> list[str]:
    """env(1) with its options, to be followed by the command: no environment, and a file that is as long as it may be
    is an error of the write, not the end of QEMU (setrlimit(2), RLIMIT_FSIZE)."""
    return ["env", "--ignore-environment", "--ignore-signal=XFSZ"]


def prlimit(bounds: Limits, *, uid: int | None, privileged: bool) -> list[str]:
    """prlimit(1) with its options, to be followed by the command.

    Where vmand is not privileged, only what can be lowered in any case: the rest stays as it is for vmand's user. The
    number of processes counts for a user as a whole, so it is set only for a user of the partition's own.
    """
    argv = ["prlimit", "--core=0", "--msgqueue=0"]
    if privileged:
        argv += ["--rtprio=0", f"--nofile={bounds.open_files}", f"--memlock={bounds.locked_bytes}"]
        argv.append(f"--fsize={'unlimited' if bounds.file_bytes is None else bounds.file_bytes}")
    if privileged and uid is not None:
        argv.append(f"--nproc={bounds.threads}")
    return [*argv, "--"]
