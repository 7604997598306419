"""The host's cores as the kernel shows them in sysfs: which share an SMT core, on which NUMA node, isolated by whom.

Sources: Documentation/admin-guide/cputopology.rst, Documentation/ABI/stable/sysfs-devices-node, and
Documentation/ABI/testing/sysfs-devices-system-cpu. Functions take the directory, so that tests have trees of their own.
"""

import os
import re
from pathlib import Path

from edgehold.errors import FailedError
from vmand.model import parse_cores
from vmand.placement import Topology

DEVICES = Path("/sys/devices/system")
_NODE = re.compile(r"node([0-9]+)")


def read(root: Path = DEVICES) -> Topology:
    """The cores that are online now, and how they belong together. Raises as `online`."""
    present = online(root)
    siblings = {}
    for core in present:
        topology = root / f"cpu/cpu{core}/topology"
        # The second is the first's name before Linux 5.3.
        shared = _cores(topology / "core_cpus_list") or _cores(topology / "thread_siblings_list")
        siblings[core] = (shared & present) | {core}
    nodes: dict[int, int] = {}
    for entry in _entries(root / "node"):
        if found := _NODE.fullmatch(entry):
            nodes |= dict.fromkeys(_cores(root / "node" / entry / "cpulist") & present, int(found[1]))
    return Topology(siblings=siblings, node=nodes)


def online(root: Path = DEVICES) -> frozenset[int]:
    """The cores that are online now.

    Raises:
        FailedError: the kernel does not tell.
    """
    found = _cores(root / "cpu/online")
    if not found:
        raise FailedError(f"{root}/cpu/online names no core; is sysfs mounted?")
    return found


def isolated_by_boot(root: Path = DEVICES) -> frozenset[int]:
    """Cores that the kernel's command line keeps the scheduler away from (isolcpus=)."""
    return _cores(root / "cpu/isolated")


def nohz_full(root: Path = DEVICES) -> frozenset[int]:
    """Cores whose timer stops while one task runs (nohz_full=); empty where the kernel can't or was not told to."""
    return _cores(root / "cpu/nohz_full")


def write(path: Path, text: str) -> None:
    """Write a file of the kernel's, in one piece; it is never made.

    Raises:
        OSError: the kernel refused; its errno says why.
    """
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # it names the file, as open's do
    finally:
        os.close(fd)


def _cores(path: Path) -> frozenset[int]:
    """A file with a list of cores; empty where there is no such file."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise FailedError(f"{path}: {error.strerror}") from error
    if not text[:1].isdigit():  # "(null)": of nohz_full= where there is none
        return frozenset()
    return parse_cores(text)


def _entries(path: Path) -> list[str]:
    try:
        return os.listdir(path)  # noqa: PTH208 - names are enough
    except OSError:
        return []  # a kernel without NUMA
