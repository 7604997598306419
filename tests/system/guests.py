"""A guest that works, in a machine that tests share: there for one test, gone after it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from edgehold.testing.capability import guest_image
from tests.system.conftest import ARCH
from tests.system.house import ROOT, Machine, until
from tests.system.world import BOOT_S, CMDLINE, INITRD, KERNEL, attachments, jobs, partition

NAME = "one"
"""Of its partition, which is shared."""


@dataclass(frozen=True)
class Guest:
    """A shared partition with a running guest."""

    machine: Machine
    id: int
    pid: int
    unit: str

    def same(self) -> bool:
        """vmand says that it runs, and it is the process that it was."""
        one = partition(self.machine, NAME)
        return (one["state"], one["pid"], one["unit"]) == ("DEPLOYED", self.pid, self.unit)

    def goes_on(self) -> None:
        """It has done more since now."""
        before = jobs(self.machine, NAME)
        until(lambda: jobs(self.machine, NAME) > before, what=f"another job of the guest after {before}")

    def is_held(self) -> bool:
        """deadlined holds the thread of its vCPU."""
        threads = [two for one in attachments(self.machine).values() for two in one["threads"]]
        return [one["state"] for one in threads] == ["held"]


@contextlib.contextmanager
def working(machine: Machine) -> Iterator[Guest]:
    """Start one, and wait for its first job."""
    if machine.run("test", "-e", INITRD, check=False).status != 0:
        kernel, initrd = guest_image(ROOT, ARCH)
        machine.put({KERNEL: kernel, INITRD: initrd})
    share = ("-cores", "1", "-memsize", "0.125", "-mode", "shared", "-name", NAME)
    machine.run("vmanctl", "start", *share, "-kernel", KERNEL, "-initrd", INITRD, "-cmdline", CMDLINE)
    try:
        shown = partition(machine, NAME)
        until(lambda: jobs(machine, NAME), what="the guest's first job", timeout_s=BOOT_S)
        yield Guest(machine, int(shown["id"]), int(shown["pid"]), str(shown["unit"]))
    finally:
        machine.run("vmanctl", "shutdown", NAME, "-force")
        machine.run("vmanctl", "destroy", NAME)
