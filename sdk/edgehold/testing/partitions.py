"""A private vmand for tests and the demo: its own directories, and a look for whatever it might leave behind."""

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from edgehold.api.vmand import State, VmandClient
from edgehold.testing.daemons import Daemon, private_directory

USERS = 1024
"""How many uids a vmand may use (`vmand.config`, uid_first)."""
_MEMORY = Path("/dev/shm")  # noqa: S108 - the tmpfs that every host has; a directory of our own below it


class PrivateVmand(Daemon):
    """A vmand below one directory; partitions' memory in a directory of the same name in /dev/shm."""

    def __init__(
        self,
        directory: Path,
        *,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        directory.chmod(0o711)  # QEMU of another user walks through it
        self.runtime = directory / "run"
        self.memory = _MEMORY / directory.name
        self.uid_first = 1_900_000_000 + USERS * secrets.randbelow(200_000)
        super().__init__(
            "vmand",
            directory=directory,
            settings={
                "runtime_dir": str(self.runtime),
                "state_dir": str(directory / "state"),
                "memory_dir": str(self.memory),
                "launcher": "process",
                # Users of its own: what a uid of a partition runs is ended with the partition.
                "uid_first": self.uid_first,
                # A host's interrupts and huge pages are not a test's, unless it says so.
                "steer": False,
                "hugepages": False,
                **(settings or {}),
            },
            environment=environment,
        )

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.runtime / "control.sock"

    async def client(self) -> VmandClient:
        """A new conversation."""
        return await VmandClient.connect(self.socket)

    def guests(self) -> list[int]:
        """The pids of all processes that run a guest of this vmand, whether it knows them or not."""
        own = f"path={self.runtime}/p/".encode()
        found = []
        for entry in os.listdir("/proc"):  # noqa: PTH208 - names are enough
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    if own in Path(f"/proc/{entry}/cmdline").read_bytes():
                        found.append(int(entry))
        return found

    def of_users(self) -> list[int]:
        """The pids of all processes of the users that belong to this vmand's partitions. What has ended and waits for
        its parent has nothing any more."""
        found = []
        for entry in os.listdir("/proc"):  # noqa: PTH208 - names are enough
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    owner = Path(f"/proc/{entry}").stat().st_uid
                    state = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()[0]
                    if 0 <= owner - self.uid_first < USERS and state != b"Z":
                        found.append(int(entry))
        return found

    def end_guests(self) -> None:
        """End by force what vmand left behind. Each process is verified while a pidfd holds it."""
        for pid in self.guests():
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                if pid in self.guests():
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                os.close(fd)

    def remains(self) -> list[str]:
        """What there is of guests: processes, run directories, memory files. Empty where no partition exists."""
        runs = self.runtime / "p"
        return [
            *(f"process {pid}" for pid in {*self.guests(), *self.of_users()}),
            *(str(one) for one in (runs.iterdir() if runs.is_dir() else ())),
            *(str(one) for one in (self.memory.iterdir() if self.memory.is_dir() else ()) if one.suffix == ".mem"),
        ]


@contextlib.asynccontextmanager
async def private_vmand(
    *, settings: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None, start: bool = True
) -> AsyncIterator[PrivateVmand]:
    """A running vmand. At the end its partitions are destroyed, it is stopped, and its directories are removed."""
    with private_directory("eh-vm-") as directory:
        vmand = PrivateVmand(directory, settings=settings, environment=environment)
        try:
            if start:
                await vmand.start()
            yield vmand
        finally:
            try:
                try:
                    if not vmand.running:
                        await vmand.kill()
                        await vmand.start()
                    await destroy_all(vmand)
                finally:
                    await vmand.stop()
            finally:
                # Nothing is left here unless vmand failed; a failed test must not leave guests behind.
                vmand.end_guests()
                shutil.rmtree(vmand.memory, ignore_errors=True)


async def destroy_all(vmand: PrivateVmand) -> None:
    """End every guest by force and give everything back."""
    async with await vmand.client() as client:
        for one in await client.list_partitions():
            if one.state is not State.READY:
                await client.shutdown(one.id, force=True)
            await client.destroy_partition(one.id)
