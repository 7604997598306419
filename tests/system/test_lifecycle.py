"""What a person does with systemctl, one unit at a time and all together; guests and what is held do not notice."""

import pytest

from tests.system.conftest import DAEMONS, SERVICES, SOCKETS
from tests.system.guests import NAME, Guest
from tests.system.house import Machine, until
from tests.system.world import URI, attachments

_VIRSH = ("virsh", "-c", URI)
_UNITS = (*SERVICES, *SOCKETS)


@pytest.mark.parametrize("name", DAEMONS)
def test_each_unit(house: Machine, name: str) -> None:
    """Stop, start, restart: at once, and with success; a reload is refused, and changes nothing."""
    unit = f"{name}.service"
    first = house.main_pid(unit)
    house.run("systemctl", "stop", unit, timeout_s=15)
    shown = house.show(unit, "ActiveState", "Result", "ExecMainStatus", "NRestarts")
    assert shown == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0", "NRestarts": "0"}
    house.run("systemctl", "start", unit)
    second = house.main_pid(unit)
    house.run("systemctl", "restart", unit)
    third = house.main_pid(unit)
    assert len({first, second, third, 0}) == 4
    refused = house.run("systemctl", "reload", unit, check=False)
    assert refused.status != 0
    assert "not applicable" in refused.errors
    assert house.main_pid(unit) == third
    assert house.state(unit) == "active/running"


def test_all_together(house: Machine, running: Guest) -> None:
    """The target stops, starts and restarts all daemons and sockets; the guest goes on."""
    house.run("systemctl", "start", "edgehold.target")
    house.run("systemctl", "stop", "edgehold.target")
    for unit in _UNITS:
        house.wait_state(unit, "inactive/dead", timeout_s=20.0)
    assert house.state(running.unit) == "active/running"
    house.run("systemctl", "start", "edgehold.target")
    house.wait_active(*_UNITS)
    assert until(running.same, what="the guest that was there before")
    before = {unit: house.main_pid(unit) for unit in SERVICES}
    house.run("systemctl", "restart", "edgehold.target")
    for unit, pid in before.items():
        until(lambda unit=unit, pid=pid: house.main_pid(unit) not in {0, pid}, what=f"a new {unit}")  # type: ignore[misc]
    house.wait_active(*_UNITS)
    assert until(running.same, what="the guest that was there before")
    running.goes_on()


def test_guest_goes_on_without_vmand(house: Machine, running: Guest) -> None:
    """A guest is a unit of its own: it works while vmand is restarted, and while there is none."""
    house.run("systemctl", "restart", "vmand.service")
    assert running.same()
    running.goes_on()
    house.run("systemctl", "stop", "vmand.service")
    assert house.state(running.unit) == "active/running"
    assert house.show(running.unit, "Slice")["Slice"] == "vmand.slice"
    house.run("systemctl", "start", "vmand.service")
    assert running.same()
    running.goes_on()


def test_what_is_held_comes_back(house: Machine, running: Guest) -> None:
    """deadlined finds the partition's threads through vmand, as its own user; a restart attaches them again."""
    house.run("deadlinectl", "attach", "--partition", str(running.id))
    try:
        until(running.is_held, what="the vCPU is held")
        house.run("systemctl", "restart", "deadlined.service")
        until(running.is_held, what="the vCPU is held again")
        house.run("systemctl", "restart", "vmand.service")
        until(running.is_held, what="the vCPU is held after a restart of vmand")
        running.goes_on()
    finally:
        for number in attachments(house):
            house.run("deadlinectl", "detach", str(number))


def test_virsh_wakes_virtvmand(house: Machine, running: Guest) -> None:
    """The sockets are there without the daemon, and the first client starts it."""
    house.run("systemctl", "stop", "virtvmand.service")
    assert [house.state(unit) for unit in SOCKETS] == ["active/listening"] * 2
    assert "running" in house.run(*_VIRSH, "domstate", NAME).output
    assert house.state("virtvmand.service") == "active/running"
    house.run("systemctl", "stop", "virtvmand.service")
    assert house.run(*_VIRSH, "-r", "list", "--name").output.split() == [NAME]
    refused = house.run(*_VIRSH, "-r", "destroy", NAME, check=False)
    assert refused.status != 0
    assert running.same()


def test_sockets_are_for_whom_settings_name(house: Machine) -> None:
    """A user without a role is told so; a member of vmand's group operates."""
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
    member = ("setpriv", "--reuid=65534", "--regid=65534", "--groups=vmand", "--")
    reader = ("setpriv", "--reuid=65534", "--regid=65534", "--groups=deadlined", "--")
    assert house.run(*nobody, "vmanctl", "list", check=False).status != 0
    assert house.run(*nobody, "deadlinectl", "list", check=False).status != 0
    assert house.run(*nobody, *_VIRSH, "list", check=False).status != 0
    house.run(*member, "vmanctl", "create", "-cores", "1", "-memsize", "0.0625", "-mode", "shared", "-name", "theirs")
    assert "theirs" in house.run(*reader, "vmanctl", "list").output
    assert house.run(*reader, "vmanctl", "destroy", "theirs", check=False).status != 0
    house.run(*member, "vmanctl", "destroy", "theirs")
