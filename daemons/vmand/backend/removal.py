"""Remove a directory whose owner may be hostile.

Names are never followed, each directory is taken from its owner before it is read (so that nothing is added meanwhile),
and any depth is removed with three descriptors and no recursion.
"""

import errno
import itertools
import os
import secrets
from collections.abc import Callable


def remove_tree(base: int, name: str) -> None:
    """Remove what has this name. A tree is made flat on the way: each subdirectory with content moves to its top.

    Raises:
        OSError: something can't be removed.
    """
    try:
        top = _take(base, name)
    except FileNotFoundError:
        return
    if top is None:
        os.unlink(name, dir_fd=base)
        return
    prefix, numbers = secrets.token_hex(8), itertools.count()
    try:
        waiting = _empty(top, top, lambda: f"{prefix}-{next(numbers)}")
        while waiting:
            one = waiting.pop()
            directory = _take(top, one)
            if directory is not None:
                try:
                    waiting += _empty(directory, top, lambda: f"{prefix}-{next(numbers)}")
                finally:
                    os.close(directory)
                os.rmdir(one, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=base)


def _take(parent: int, name: str) -> int | None:
    """A directory, opened, and ours from now on: its owner can't add to it while it is emptied. None: no directory."""
    try:
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except NotADirectoryError:
        return None
    try:
        same = f"/proc/self/fd/{handle}"
        if os.fstat(handle).st_uid != os.geteuid():
            os.chown(same, os.geteuid(), -1)
        os.chmod(same, 0o700)  # noqa: PTH101 - a descriptor's path
        return os.open(same, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(handle)


def _empty(directory: int, top: int, new_name: Callable[[], str]) -> list[str]:
    """Remove what can be removed at once; the rest, directories with content, gets a new name in ``top``.

    Returns the names in ``top`` of the directories that are to be emptied.
    """
    waiting: set[str] = set()
    while True:
        left = 0
        with os.scandir(directory) as entries:
            for entry in entries:
                if directory == top and entry.name in waiting:
                    continue
                left += 1
                try:
                    os.unlink(entry.name, dir_fd=directory)
                except IsADirectoryError:
                    try:
                        os.rmdir(entry.name, dir_fd=directory)
                    except OSError as error:
                        if error.errno != errno.ENOTEMPTY:
                            raise
                        name = new_name()
                        os.rename(entry.name, name, src_dir_fd=directory, dst_dir_fd=top)
                        waiting.add(name)
        if not left:  # a file system may skip entries while others are removed
            return list(waiting)
