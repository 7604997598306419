"""A private virtvmand for tests and benchmarks, and what it takes that libvirt's clients find it.

Clients find it by a ``socket=`` in the URI, or, for the plain ``vman:///system``, in a mount namespace of their own in
which /run/libvirt is its directory: the host's /run is neither needed nor touched.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgehold.testing.daemons import Daemon, private_directory
from edgehold.testing.partitions import PrivateVmand

PLAIN_URI = "vman:///system"
"""What users write: libvirt's client library makes /run/libvirt/virtvmand-sock of it."""

# Mounts must not reach the host. Where the root is no mount point, as in a chroot, its propagation can't be changed
# (mount(2), EINVAL), but /dev/shm is one everywhere: below it, which nobody else sees, a copy of the whole tree is made
# that is a mount point, and that becomes the root.
_NAMESPACE = """set -e
mount --make-rprivate /dev/shm
mount -t tmpfs -o mode=755 edgehold /dev/shm
mkdir /dev/shm/root
mount --rbind / /dev/shm/root
mount --make-rprivate /dev/shm/root
mount -t tmpfs -o mode=755 edgehold /dev/shm/root/run
mkdir /dev/shm/root/run/libvirt
mount --bind "$0" /dev/shm/root/run/libvirt
exec chroot /dev/shm/root "$@"
"""


class PrivateVirtvmand(Daemon):
    """A virtvmand below one directory, in front of the vmand that listens on ``vmand_socket``."""

    def __init__(
        self,
        directory: Path,
        *,
        vmand_socket: Path,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.runtime = directory / "virt"
        self.sockets = directory / "libvirt"
        super().__init__(
            "virtvmand",
            directory=directory,
            settings={
                "vmand_socket": str(vmand_socket),
                "runtime_dir": str(self.runtime),
                "socket_dir": str(self.sockets),
                **(settings or {}),
            },
            environment=environment,
        )

    @property
    def socket(self) -> Path:
        """Where clients may change something."""
        return self.sockets / "virtvmand-sock"

    @property
    def read_only_socket(self) -> Path:
        """Where clients may only look."""
        return self.sockets / "virtvmand-sock-ro"

    @property
    def uri(self) -> str:
        """What a client connects to."""
        return f"{PLAIN_URI}?socket={self.socket}"

    @property
    def read_only_uri(self) -> str:
        """What a client connects to that opens read-only (``virsh -r``)."""
        return f"{PLAIN_URI}?socket={self.read_only_socket}"


def with_run_libvirt(sockets: Path, argv: Sequence[str]) -> list[str]:
    """The words that run a command with ``sockets`` as /run/libvirt, seen by it alone. Needs root.

    Everything else is where it was, except that /run is empty otherwise. Source: mount_namespaces(7).
    """
    # A path of ours may lead through the working directory of a process that left it.
    directory = os.path.realpath(sockets)
    return ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", _NAMESPACE, directory, *argv]


@contextlib.asynccontextmanager
async def private_virtvmand(
    vmand: PrivateVmand,
    *,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    start: bool = True,
) -> AsyncIterator[PrivateVirtvmand]:
    """A running virtvmand in front of a vmand. At the end it is stopped, and its directory is removed."""
    with private_directory("eh-lv-") as directory:
        directory.chmod(0o711)  # clients of another user walk through it
        daemon = PrivateVirtvmand(directory, vmand_socket=vmand.socket, settings=settings, environment=environment)
        try:
            if start:
                await daemon.start()
            yield daemon
        finally:
            await daemon.stop()
