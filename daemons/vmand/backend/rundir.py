"""The directory of a run: what QEMU reads is copied into it, its sockets and its log are in it, nothing else is.

It belongs to the partition's own user, whom a guest may have become: so what is in it is made, and removed, by
descriptor, never by a name that may mean another file by then.
"""

import asyncio
import contextlib
import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from edgehold.errors import BadRequestError, EdgeholdError, FailedError, NoCapacityError, TimedOutError
from vmand.backend.removal import remove_tree
from vmand.backend.users import uids_from
from vmand.model import MIB, Record, plain

_NAME = re.compile(r"[1-9][0-9]{0,18}")
_PIECE = 1 * MIB
_COPY_S = 120.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LOG_BYTES = 1024 * 1024
# capabilities(7), by number: what it takes to have files of another user and to end its processes, and what it takes
# to start one where systemd does not.
_NEEDED = {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_KILL": 5}
_STARTING = {"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8}
_RAISING = {"CAP_SYS_RESOURCE": 24}


class RunDirs:
    """``base/ID`` for each partition that has a run. ``uid_first``: see the settings; 0 means vmand's own user.

    ``places``: other directories to which the partitions' users must be able to walk. ``units``: systemd starts their
    processes.
    """

    def __init__(self, base: Path, uid_first: int, *, places: Sequence[Path] = (), units: bool = False) -> None:
        self.base = base
        self._first = uid_first
        self._needed = _NEEDED if units else _NEEDED | _STARTING
        self._places = (base, *places)

    def begin(self) -> None:
        """Make the base, where it is not there yet.

        Raises:
            FailedError: it can't be made, it is somebody else's, or others may write to it.
        """
        try:
            self.base.mkdir(mode=0o711, parents=True, exist_ok=True)
            with self._open() as base:
                found = os.fstat(base)
                if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise FailedError(
                        f"{self.base}: it belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}; "
                        "it must be vmand's own, and nobody else may write to it"
                    )
                os.fchmod(base, 0o711)
        except OSError as error:
            raise FailedError(f"{self.base}: {error.strerror}") from error

    @property
    def uids(self) -> range:
        """All uids that are partitions' own; empty where vmand could not have started anything as another user."""
        return uids_from(self._first)

    @property
    def privileged(self) -> bool:
        """Whether guests' processes can change users and drop capabilities."""
        return os.geteuid() == 0 and not _lacking(self._needed)

    @property
    def reason(self) -> str:
        """Why QEMUs run as vmand's own user; empty where each has one of its own."""
        if not self._first:
            return "uid_first is 0 in the settings"
        if os.geteuid() != 0:
            return "vmand does not run as root"
        if lacking := _lacking(self._needed):
            return f"vmand has no {', '.join(lacking)}"
        for kind in ("uid_map", "gid_map"):
            if not _mapped(Path("/proc/self") / kind, self.uids):
                return f"uid_first: {self._first} is outside the user namespace that vmand runs in (/proc/self/{kind})"
        for place in self._places:
            if closed := _closed(place):
                return f"{closed} is closed to other users, so that they can't get to {place}; chmod o+x opens it"
        return ""

    def user(self, record: Record) -> int | None:
        """The uid, and gid, of a partition's QEMU; None where it is vmand's own user, and `reason` says why."""
        return None if self.reason else self.uids[record.slot]

    def path(self, partition: int) -> Path:
        """The directory of a partition's run."""
        return self.base / str(partition)

    def ids(self) -> list[int]:
        """The partitions that have one."""
        try:
            return sorted(int(one) for one in os.listdir(self.base) if _NAME.fullmatch(one))  # noqa: PTH208 - names
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FailedError(f"{self.base}: {error.strerror}") from error

    def make(self, record: Record) -> Path:
        """An empty directory for a run, mode 0700, the user's. What was there is removed.

        Raises:
            FailedError: it can't be made.
            NoCapacityError: the file system is full.
        """
        self.begin()
        self.remove(record.id)
        path = self.path(record.id)
        uid = self.user(record)
        try:
            with self._open() as base:
                os.mkdir(path.name, 0o700, dir_fd=base)
                if uid is not None:
                    os.chown(path.name, uid, uid, dir_fd=base, follow_symlinks=False)
        except OSError as error:
            _refuse(path, error)
        return path

    def create(self, record: Record, name: str, *, mode: int, uid: int | None = None) -> int:
        """A new file in the directory, open for writing; ``uid`` None: vmand's own.

        Raises:
            FailedError: it can't be made, or is there.
            NoCapacityError: the file system is full.
        """
        try:
            with self._open(record.id) as directory:
                fd = os.open(name, _NEW, mode, dir_fd=directory)
        except OSError as error:
            _refuse(self.path(record.id) / name, error)
        try:
            if uid is not None:
                os.fchown(fd, uid, uid)
        except OSError as error:
            os.close(fd)
            _refuse(self.path(record.id) / name, error)
        return fd

    async def put(self, record: Record, name: str, fd: int, *, limit: int) -> Path:
        """A copy of an open file, 0400 and the user's: whoever has the original can't change what QEMU reads.

        ``limit`` in bytes. The file's own position is neither used nor moved.

        Raises:
            BadRequestError: it is empty or longer than the limit by now.
            NoCapacityError: the file system of the runtime directory is full.
            TimedOutError: reading it takes minutes; its file system hangs.
            FailedError: it can't be read.
        """
        source = os.dup(fd)
        try:
            target = self.create(record, name, mode=0o400, uid=self.user(record))
        except EdgeholdError:
            os.close(source)
            raise
        path = self.path(record.id) / name
        try:
            async with asyncio.timeout(_COPY_S):
                size = await _in_thread(lambda: _copy(source, target, limit))
        except TimeoutError:
            raise TimedOutError(
                f"{name}: it can't be read within {_COPY_S:g} s; does its file system answer?"
            ) from None
        except OSError as error:
            _refuse(path, error)
        if not 0 < size <= limit:
            raise BadRequestError(f"{name}: it has {size} bytes or more by now; 1 to {limit // MIB} MiB are allowed")
        return path

    def seal(self, record: Record) -> None:
        """Nothing can be made, renamed or removed in it by QEMU from now on: for when its sockets are there.

        Raises:
            FailedError: it is not there any more.
        """
        uid = self.user(record)
        if uid is None:
            return
        try:
            with self._open(record.id) as directory:
                os.fchown(directory, os.geteuid(), uid)
                os.fchmod(directory, 0o750)
        except OSError as error:
            raise FailedError(f"{self.path(record.id)}: {error.strerror}") from error

    def drop(self, partition: int, names: Iterable[str]) -> None:
        """Remove files of a run that are needed no more.

        Raises:
            FailedError: one can't be removed.
        """
        try:
            with self._open(partition) as directory:
                for name in names:
                    os.unlink(name, dir_fd=directory)
        except OSError as error:
            raise FailedError(f"{self.path(partition)}: {error.strerror}") from error

    def shorten(self, partition: int, name: str) -> None:
        """Empty a log that has grown long: what QEMU prints must not fill the file system for the others."""
        try:
            with self._open(partition) as directory:
                fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            return
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_size > _MAX_LOG_BYTES:
                os.ftruncate(fd, 0)
        except OSError:
            return
        finally:
            os.close(fd)

    def remove(self, partition: int) -> None:
        """Remove the directory with all that is in it. Idempotent. A directory with very many files takes seconds.

        Raises:
            FailedError: something in it can't be removed.
        """
        try:
            with self._open() as base:
                remove_tree(base, str(partition))
        except FileNotFoundError:
            return
        except OSError as error:
            raise FailedError(f"{self.path(partition)} can't be removed: {error.strerror}") from error

    @contextlib.contextmanager
    def _open(self, partition: int | None = None) -> Iterator[int]:
        """A descriptor of the base, or of the directory of a run in it."""
        base = os.open(self.base, _DIRECTORY)
        try:
            if partition is None:
                yield base
                return
            fd = os.open(str(partition), _DIRECTORY, dir_fd=base)
            try:
                yield fd
            finally:
                os.close(fd)
        finally:
            os.close(base)


def last_line(log_file: Path) -> str:
    """The last line of a log as the end of a sentence. Only of vmand's own file: QEMU could have put another there."""
    try:
        fd = os.open(log_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
            return ""
        lines = os.pread(fd, 4096, max(0, found.st_size - 4096)).decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    finally:
        os.close(fd)
    return f": {plain(lines[-1], 300)}" if lines else ""


def _refuse(path: Path, error: OSError) -> NoReturn:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        raise NoCapacityError(
            f"{path}: no space is left in the file system of runtime_dir, where a guest's files are copied to; "
            "enlarge it, or use smaller images"
        ) from error
    raise FailedError(f"{path}: {error.strerror}") from error


def may_raise_limits() -> bool:
    """Whether vmand may give a process more than its own hard limits are (setrlimit(2))."""
    return not _lacking(_RAISING)


def _lacking(needed: Mapping[str, int]) -> list[str]:
    """The capabilities that vmand would need and has not (proc_pid_status(5), CapEff)."""
    lines = Path("/proc/self/status").read_bytes().splitlines()
    effective = next((int(one.split()[1], 16) for one in lines if one.startswith(b"CapEff:")), 0)
    return [name for name, bit in needed.items() if not effective >> bit & 1]


def _mapped(path: Path, wanted: range) -> bool:
    """Whether a map of a user namespace (user_namespaces(7)) has all these ids: inside, outside, how many."""
    for line in path.read_text(encoding="ascii").splitlines():
        first, _outside, count = map(int, line.split())
        if first <= wanted[0] and wanted[-1] < first + count:
            return True
    return False


def _closed(place: Path) -> str:
    """The first directory on the way to a place that other users can't search; empty where there is none.

    The place itself counts once it is there.
    """
    real = Path(os.path.realpath(place))
    for one in (*reversed(real.parents), real):
        try:
            if not one.stat().st_mode & stat.S_IXOTH:
                return str(one)
        except FileNotFoundError:
            return ""  # made later, by vmand
        except OSError as error:
            return f"{one} ({error.strerror})"
    return ""


def _copy(source: int, target: int, limit: int) -> int:
    """Copy at most ``limit`` bytes and close both; how many there were, ``limit + 1`` for more."""
    done = 0
    try:
        while piece := os.pread(source, min(_PIECE, limit + 1 - done), done):
            done += len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(target, view) :]
    finally:
        os.close(source)
        os.close(target)
    return done


def _in_thread(work: Callable[[], int]) -> asyncio.Future[int]:
    """Run in a thread of its own, which may hang: neither the other copies nor the end of vmand wait for it."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def tell(result: int, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = 0, None
        try:
            result = work()
        except BaseException as caught:  # noqa: BLE001 - raised again where it is waited for
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="copy", daemon=True).start()
    return future
