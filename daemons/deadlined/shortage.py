"""The host is short of descriptors or memory for the moment: a reason to look again later, never to end.

What is known stays known meanwhile. Anything else that a system call may say is for whoever called to judge.
"""

import errno

from deadlined.holder import no_descriptor
from edgehold.kernel import procfs
from edgehold.kernel.procfs import GoneError


def is_short(error: OSError) -> bool:
    """Whether time alone may cure this error (EMFILE, ENFILE, ENOMEM)."""
    return procfs.is_exhausted(error) or error.errno == errno.ENOMEM


def text(error: OSError) -> str:
    """Such an error in the user's terms."""
    if procfs.is_exhausted(error):
        return no_descriptor().message
    return "the host has no memory left to look at its threads; tried again in each cycle"


def belongs(tid: int, pid: int) -> bool:
    """Whether the thread is the process's: it may have ended since somebody told of it, and its id be another's.

    Raises:
        OSError: nothing can be told for the moment; see `is_short`.
    """
    try:
        return procfs.process_of(tid) == pid
    except GoneError:
        return False
