"""A guest that works, in the machine that tests share."""

from dataclasses import dataclass

from edgehold.testing.capability import guest_image
from tests.system.conftest import ARCH
from tests.system.house import ROOT, Machine, until
from tests.system.world import BOOT_S, CMDLINE, INITRD, KERNEL, attachments, jobs, partition, partitions

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


def none(machine: Machine) -> None:
    """End whatever guests and partitions there are."""
    for name, one in partitions(machine).items():
        if one["state"] != "READY":
            machine.run("vmanctl", "shutdown", name, "-force")
        machine.run("vmanctl", "destroy", name)


def working(machine: Machine) -> Guest:
    """The one that works, or a new one that has done its first job."""
    before = partitions(machine).get(NAME)
    if before is None or before["state"] != "DEPLOYED":
        none(machine)
        kernel, initrd = guest_image(ROOT, ARCH)
        machine.put({KERNEL: kernel, INITRD: initrd})
        share = ("-cores", "1", "-memsize", "0.125", "-mode", "shared", "-name", NAME)
        machine.run("vmanctl", "start", *share, "-kernel", KERNEL, "-initrd", INITRD, "-cmdline", CMDLINE)
    until(lambda: jobs(machine, NAME), what="the guest's first job", timeout_s=BOOT_S)
    shown = partition(machine, NAME)
    return Guest(machine, int(shown["id"]), int(shown["pid"]), str(shown["unit"]))
