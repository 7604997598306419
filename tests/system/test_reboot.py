"""A host that was switched off, in good order or not: what comes back by itself, as what, and what does not."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.libvirt.virsh import definition
from tests.system import world
from tests.system.house import Machine, machine, until

AUTO, IDLE = "auto", "idle.service"
"""A domain that starts with the host, and a unit that is held by the name of its cgroup."""
_IDLE_UNIT = "[Service]\nExecStart=/usr/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"


@pytest.fixture(scope="module")
def host(suite: str, debs: dict[str, Path]) -> Iterator[Machine]:
    """In use."""
    with machine(suite) as one:
        one.install(*debs.values(), "libvirt-clients")
        world.furnish(one)
        domain = definition(AUTO, boot=(Path(world.KERNEL), Path(world.INITRD)), cmdline=world.CMDLINE)
        one.put({"/srv/auto.xml": domain, f"/etc/systemd/system/{IDLE}": _IDLE_UNIT})
        one.sh(f"""
            virsh -q -c {world.URI} define /srv/auto.xml
            virsh -q -c {world.URI} autostart {AUTO}
            systemctl enable --now {IDLE}
            deadlinectl attach --cgroup /system.slice/{IDLE} --cap 0.1 --budget-ms 5""")
        yield one


def power_cut(host: Machine) -> str:
    """Every process ends at once."""
    host.cut()
    return host.boot()


@pytest.mark.parametrize("how", [Machine.reboot, power_cut])
def test_what_comes_back(host: Machine, how: Callable[[Machine], str]) -> None:
    """Definitions; of guests those that are to; what deadlined held by a name that lasts, and nothing else."""
    lasting = attachments(host)
    assert {target["kind"] for target, _ in lasting.values()} == {"unit", "partition", "cgroup"}
    pid = host.main_pid(IDLE)
    host.run("deadlinectl", "attach", "--pid", str(pid), "--dry-run")
    assert len(attachments(host)) == len(lasting) + 1
    assert world.partition(host, world.STEADY)["state"] == "DEPLOYED"
    before = {name: fixed(one) for name, one in world.partitions(host).items()}
    described = host.run("virsh", "-c", world.URI, "desc", world.WEB).output

    state = how(host)
    assert state == "running", host.run("systemctl", "--failed", check=False).output
    world.settled(host)

    after = world.partitions(host)
    assert {name: fixed(one) for name, one in after.items()} == before
    assert after[world.STEADY]["state"] == "FAILED"
    assert after[world.STEADY]["reason"]
    assert [after[name]["state"] for name in (world.SPARE, world.WEB)] == ["READY", "READY"]
    assert host.run("virsh", "-c", world.URI, "desc", world.WEB).output == described
    assert attachments(host) == lasting
    until(lambda: world.domains(host)[AUTO] == "running", what=f"{AUTO} starts with the host", timeout_s=world.BOOT_S)
    assert world.domains(host)[world.WEB] == "shut off"

    # What was lost is what went with the host: all of it can be used again.
    host.sh(f"""
        vmanctl shutdown {world.STEADY}
        vmanctl deploy -kernel {world.KERNEL} -initrd {world.INITRD} -cmdline '{world.CMDLINE}' {world.STEADY}
        vmanctl deploy -kernel {world.KERNEL} -initrd {world.INITRD} -cmdline '{world.CMDLINE}' {world.SPARE}
        vmanctl shutdown --force {world.SPARE}""")
    world.held(host)
    assert world.partition(host, world.SPARE)["state"] == "READY"


def fixed(partition: Mapping[str, Any]) -> list[Any]:
    """What a partition keeps for life."""
    return [partition[key] for key in ("id", "uuid", "mode", "cores", "cpus", "memory_bytes")]


def attachments(host: Machine) -> dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Targets and policies by their ids."""
    return {number: (one["target"], one["policy"]) for number, one in world.attachments(host).items()}
