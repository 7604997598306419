"""The attachments that outlive a restart, of the daemon and of the host: those whose target has a name that lasts.

One small file, replaced as a whole: written, synced and renamed before a request is acknowledged. Threads and processes
are not in it: their ids mean nothing after a boot, and may mean a stranger after a restart.
"""

import logging
import os
from pathlib import Path

import msgspec

from edgehold.api.deadlined import Policy, Target
from edgehold.errors import FailedError

log = logging.getLogger(__name__)


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One attachment."""

    id: int
    target: Target
    policy: Policy


class Keep:
    """The file and its content."""

    def __init__(self, path: Path) -> None:
        """Read it. One whose content is broken is put aside and told; nothing is attached from it then.

        Raises:
            FailedError: it can't be read.
        """
        self._path = path
        self._kept: dict[int, Kept] = {}
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise FailedError(
                f"{path}: {error.strerror}; deadlined keeps there what to attach after a restart"
            ) from error
        try:
            self._kept = {one.id: one for one in msgspec.json.decode(text, type=list[Kept])}
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.error("%s can't be read (%s) and is put aside as .broken; attach again what is to be held", path, error)  # noqa: TRY400
            path.replace(f"{path}.broken")

    def all(self) -> list[Kept]:
        """What is to be attached, by id."""
        return [self._kept[number] for number in sorted(self._kept)]

    def put(self, one: Kept) -> None:
        """Keep it from now on, instead of what has its id. Raises `FailedError`: nothing changed."""
        self._write({**self._kept, one.id: one})

    def drop(self, number: int) -> None:
        """Forget it, if it is kept. Raises `FailedError`: it still is."""
        if number in self._kept:
            self._write({key: one for key, one in self._kept.items() if key != number})

    def _write(self, kept: dict[int, Kept]) -> None:
        new = self._path.with_suffix(".new")
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode([kept[key] for key in sorted(kept)])))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise FailedError(
                f"{self._path}: {error.strerror}; deadlined keeps there what to attach after a restart: make room, or "
                "set another state_dir"
            ) from error
        self._kept = kept
