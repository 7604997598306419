"""Our packages on arm64: installed by apt in a running Debian 12 of that architecture, and then used.

A whole emulated machine, once: the installation alone takes minutes, as each of its programs is emulated.
"""

import json
from collections.abc import Iterator

import pytest

from tests.system.vm import Vm, booted
from tests.system.vmimage import need_machine

pytestmark = pytest.mark.slow

DAEMONS = ("vmand", "virtvmand", "deadlined")
PATIENCE_S = 600.0
INSTALL_S = 1800.0
"""It took six minutes beside other load on two cores."""


@pytest.fixture(scope="module")
def booted_vm() -> Iterator[Vm]:
    """The machine, with our packages installed. What they depend on was there before: there is no network."""
    with booted(need_machine("arm64", installed=False, cpus=2, memory_mib=1024), timeout_s=PATIENCE_S) as vm:
        vm.run("systemctl", "is-system-running", "--wait", check=False, timeout_s=PATIENCE_S)
        vm.shell("apt-get -qq install -y --no-install-recommends /root/debs/*.deb 2>&1", timeout_s=INSTALL_S)
        yield vm
        vm.power_off()


@pytest.fixture
def vm(booted_vm: Vm) -> Vm:
    """The machine, with every daemon active."""
    for daemon in DAEMONS:
        booted_vm.wait("systemctl", "is-active", daemon, timeout_s=PATIENCE_S)
    return booted_vm


def test_all_units_are_active(vm: Vm) -> None:
    assert vm.run("uname", "-m").output == "aarch64\n"
    assert vm.run("systemctl", "--failed", "--no-legend").output == ""
    assert vm.run("dpkg", "--audit").output == ""
    for unit in ("virtvmand.socket", "virtvmand-ro.socket", *DAEMONS):
        assert vm.run("systemctl", "is-enabled", unit, check=False).output == "enabled\n"
    assert json.loads(vm.run("vmanctl", "--json", "list").output) == []
    assert "aarch64" in vm.run("vmanctl", "doctor", check=False).output


def test_the_extension_sets_a_policy(vm: Vm) -> None:
    """sched_setattr(2) through the system's own Python, outside of any virtual environment."""
    program = """
from edgehold import _kernel
from edgehold.kernel import sched

assert _kernel.__file__.startswith("/usr/lib/python3/dist-packages/edgehold/"), _kernel.__file__
before = sched.get()
asked = sched.SchedAttr.deadline(runtime_ns=2_000_000, period_ns=10_000_000)
sched.set_attr(0, asked)
got = sched.get()
assert (got.policy, got.runtime_ns, got.period_ns) == (sched.Policy.DEADLINE, 2_000_000, 10_000_000), got
sched.restore(0, before)
assert sched.get() == before, (sched.get(), before)
print("done")
"""
    assert vm.run("python3", "-c", program, timeout_s=PATIENCE_S).output == "done\n"


def test_a_units_thread_is_held(vm: Vm) -> None:
    vm.run("systemd-run", "--unit", "busy", "python3", "-c", "while True: pass")
    attached = vm.run("deadlinectl", "--json", "attach", "--unit", "busy.service", "--cap", "0.3")
    thread = vm.run("systemctl", "show", "-P", "MainPID", "busy").output.strip()
    vm.wait("sh", "-c", f"chrt -p {thread} | grep SCHED_DEADLINE", timeout_s=PATIENCE_S)
    vm.run("deadlinectl", "detach", str(json.loads(attached.output)["id"]))
    assert "SCHED_OTHER" in vm.run("chrt", "-p", thread).output
    vm.run("systemctl", "stop", "busy")
