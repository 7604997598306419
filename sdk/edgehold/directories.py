"""A directory that belongs to one daemon alone: made by us or refused, and locked against a second instance.

Needed most where others may write next to it, as in /dev/shm: whoever made the directory first could otherwise own what
a privileged daemon puts into it.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from edgehold.errors import UnavailableError

_LOCK = ".lock"


@contextlib.contextmanager
def owned(path: Path, *, mode: int, who: str, or_root: bool = False) -> Iterator[None]:
    """The directory, with this mode, locked for ``who`` (the daemon's name in errors) until the block ends.

    ``or_root``: root's will do too, for who has the right to write there.

    Raises:
        UnavailableError: it is somebody else's, others may write to it, another instance has it, or it can't be made.
    """
    directory = lock = -1
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(directory)
        _check(path, found, or_root=or_root)
        if stat.S_IMODE(found.st_mode) != mode:
            os.fchmod(directory, mode)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(_LOCK, flags, 0o600, dir_fd=directory)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _close(directory, lock)
        text = f"{path}: another {who} uses it; each needs directories of its own"
        raise UnavailableError(text, retryable=False) from None
    except OSError as error:
        _close(directory, lock)
        raise UnavailableError(f"{path}: {error.strerror}; {who} needs it", retryable=False) from error
    except UnavailableError:
        _close(directory, lock)
        raise
    try:
        yield
    finally:
        _close(directory, lock)


def _check(path: Path, found: os.stat_result, *, or_root: bool) -> None:
    if found.st_uid not in ({0, os.geteuid()} if or_root else {os.geteuid()}):
        raise UnavailableError(
            f"{path}: it belongs to uid {found.st_uid}, not to us (uid {os.geteuid()}); "
            "look who made it and what for, then remove it or set another directory",
            retryable=False,
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnavailableError(
            f"{path}: others may write to it (mode {stat.S_IMODE(found.st_mode):04o}); chmod go-w it, "
            "after a look at what is in it",
            retryable=False,
        )


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
