"""Memory nodes of this host, and pages from one of them (set_mempolicy(2), Documentation/admin-guide/mm/numa*)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from edgehold.kernel import native

NODES = Path("/sys/devices/system/node")
# include/uapi/linux/mempolicy.h
_DEFAULT, _PREFERRED, _BIND = 0, 1, 2


def several(nodes: Path = NODES) -> bool:
    """Whether this host has more than one memory node. A kernel without NUMA has no such files, and one node."""
    try:
        text = (nodes / "has_memory").read_text(encoding="ascii").strip()  # a list, as 0-1,3
    except OSError:
        return False
    return bool(text) and not text.isdigit()


@contextlib.contextmanager
def pages_from(node: int, *, only: bool = False) -> Iterator[None]:
    """What this *thread* allocates in the block comes from the node, where it has room; ``only``: or not at all.

    ``only`` is for huge pages, which are simply refused where the node has none left. For ordinary pages the kernel
    would end processes instead (the OOM killer of a node).

    Raises:
        OSError: the kernel has no NUMA (ENOSYS), there is no such node or this cpuset may not use it (EINVAL), or a
            sandbox does not allow the call (EPERM). The block has not run.
    """
    native.set_mempolicy(_BIND if only else _PREFERRED, node)
    try:
        yield
    finally:
        native.set_mempolicy(_DEFAULT, None)
