"""Where `deadlined run` keeps its journals, and how what a killed one left gets into the journal of whoever looks next.

Each run has a directory of its own below one that all runs of its user share, named by its process: the directory of
one that lives is never touched. Rows move into the finder's journal before they vanish from the old one, so nothing is
lost between.

Nobody takes over another user's: what a row says a thread had before is set by whoever believes it, and root would hand
out any priority, to any thread, that a user had written down. Root's may be believed: the daemon, which is a user of
its own, takes them over where it has the right to.
"""

import logging
import os
import shutil
from pathlib import Path

from deadlined.journal import Journal
from edgehold.clock import Clock
from edgehold.errors import EdgeholdError, FailedError, UnavailableError
from edgehold.kernel import procfs
from edgehold.kernel.procfs import GoneError

log = logging.getLogger(__name__)

# Not below /run/deadlined: systemd clears the RuntimeDirectory= of a daemon at each stop, and a run outlives it.
OF_ROOT = Path("/run/deadlined-run")


def base() -> Path:
    """The directory that all runs of this user share: below /run for root, of his session for anybody else.

    Raises:
        UnavailableError: he has no session.
    """
    if os.geteuid() == 0:
        return OF_ROOT
    if directory := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(directory) / "deadlined/run"
    raise UnavailableError(
        "XDG_RUNTIME_DIR is not set: deadlined keeps there what to restore if it is killed; log in, or run it as root",
        retryable=False,
    )


def own(where: Path) -> Path:
    """This process' directory. Not made here."""
    return where / f"{os.getpid()}.{procfs.stat(os.getpid()).start_ticks}"


def adopt(journal: Journal, clock: Clock, *where: Path) -> int:
    """Take over what killed runs left; recovering the journal then restores it. Returns how many runs those were.

    ``where``: `base`, if this user has one, and root's.

    Raises:
        FailedError: the journal can't be written; nothing is lost.
    """
    found = 0
    for directory in (one for place in where or _places() for one in _directories(place)):
        if _lives(directory.name):
            continue
        try:
            left = Journal(directory, boot_id=procfs.boot_id(), or_root=True)
        except EdgeholdError as error:  # somebody else looks at it now, or it is no journal of ours
            log.warning("%s is left alone: %s", directory, error)
            continue
        try:
            # A thread that has both is held: its gap is one of before.
            journal.release([(tid, start, until) for (tid, start), until in left.gaps(clock.monotonic_ns()).items()])
            journal.hold(left.held())
            found += 1
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            left.close()
    return found


def _places() -> tuple[Path, ...]:
    try:
        own = base()
    except UnavailableError:
        return (OF_ROOT,)
    return tuple(dict.fromkeys((own, OF_ROOT)))


def _directories(where: Path) -> list[Path]:
    """Those of runs; none where there is no such place, or it is root's and we are an ordinary user."""
    try:
        return sorted(where.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def remove(journal: Journal, directory: Path) -> None:
    """A run is over: its directory goes, unless a thread could not be restored. Before the journal is closed."""
    try:
        if journal.held():
            log.error("threads are left in SCHED_DEADLINE; `deadlined recover` tries again")
            return
    except FailedError:
        log.exception("the journal can't be read and stays")
        return
    shutil.rmtree(directory, ignore_errors=True)


def _lives(name: str) -> bool:
    """Whether the run of this directory's name is alive."""
    pid, _, start = name.partition(".")
    if not (pid.isdigit() and start.isdigit()):
        return True  # not one of ours
    try:
        found = procfs.stat(int(pid))
    except GoneError:
        return False
    return found.start_ticks == int(start) and not found.ended
