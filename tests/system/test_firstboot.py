"""edgehold-node on a booted Debian: the first boot under its hardened unit, from credentials in /etc/credstore."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.house import Machine

UNIT = "edgehold-firstboot.service"
HASH = f"$6$edgehold${'x' * 86}"


@pytest.fixture
def node(fresh: Callable[[], Machine], debs: dict[str, Path]) -> Machine:
    """A machine that has the package, and has not been booted since."""
    machine = fresh()
    machine.install(debs["edgehold-common"], debs["edgehold-node"])
    machine.sh("rm -rf /var/lib/edgehold-node /etc/edgehold/node.toml; echo localhost >/etc/hostname")
    return machine


def told(machine: Machine) -> dict[str, object]:
    return tomllib.loads(machine.read("/etc/edgehold/node.toml"))


def names(machine: Machine) -> tuple[str, str]:
    """The name in the file, and the kernel's.

    /proc/sys is read-only in a container, and systemd 257 leaves it so where 252 does not: then the unit says that the
    name holds from the next boot on.
    """
    if "holds from the next boot on" in journal(machine):
        assert machine.run("uname", "-n").output != machine.read("/etc/hostname")
        assert machine.reboot() in {"running", "degraded"}
    return machine.read("/etc/hostname").strip(), machine.run("uname", "-n").output.strip()


def journal(machine: Machine) -> str:
    return "\n".join(str(one["MESSAGE"]) for one in machine.journal("-b", unit=UNIT))


def test_a_wrong_credential_then_the_right_one(node: Machine) -> None:
    node.put(
        {"/etc/credstore/edgehold.name": "node_17\n", "/etc/credstore/edgehold.broker": "mqtts://broker.example\n"}
    )
    node.put({"/etc/credstore/passwd.hashed-password.root": f"{HASH}\n"}, mode="600")
    assert node.reboot() == "degraded"
    assert node.show(UNIT, "ActiveState", "ExecMainStatus") == {"ActiveState": "failed", "ExecMainStatus": "78"}
    assert "credential edgehold.name: 'node_17' is no host name; right are " in node.status(UNIT)
    assert HASH not in journal(node)
    own = f"edgehold-{node.read('/etc/machine-id')[:8]}"
    assert names(node) == (own, own)
    assert told(node) == {"name": own, "broker": "mqtts://broker.example:8883", "peers": []}
    assert f"\nroot:{HASH}:" in "\n" + node.read("/etc/shadow")
    assert node.run("stat", "-c", "%U:%G %a", "/etc/shadow").output == "root:shadow 640\n"

    node.put({"/etc/credstore/edgehold.name": "node-17\n"})
    assert node.reboot() == "running"
    assert node.show(UNIT, "ActiveState", "Result") == {"ActiveState": "active", "Result": "success"}
    assert told(node)["name"] == "node-17"
    assert names(node) == ("node-17", "node-17")

    # Once is enough: what a person changes later stays.
    node.put({"/etc/credstore/edgehold.name": "node-18\n"})
    assert node.reboot() == "running"
    assert names(node) == ("node-17", "node-17")
    assert node.show(UNIT, "ActiveState", "ConditionResult") == {"ActiveState": "inactive", "ConditionResult": "no"}


def test_no_credential_at_all(node: Machine) -> None:
    """Nothing was refused, and nobody complains of what is not there."""
    assert node.reboot() == "running"
    own = f"edgehold-{node.read('/etc/machine-id')[:8]}"
    assert told(node) == {"name": own, "peers": []}
    assert f"name {own}, broker none, peers none" in journal(node)
    assert "credential" not in "".join(str(one["MESSAGE"]) for one in node.journal("-b", "-p", "warning", unit=UNIT))
    assert names(node) == (own, own)


def test_it_comes_before_all_that_uses_the_name(node: Machine) -> None:
    node.reboot()
    before = node.show(UNIT, "Before")["Before"].split()
    assert {"sysinit.target", "network-pre.target", "systemd-networkd.service"} <= set(before)
    cycles = [one["MESSAGE"] for one in node.journal("-b") if "ordering cycle" in str(one["MESSAGE"])]
    assert cycles == []
