"""Packages on a machine without a network: what apt brings, what runs then, and how little of it is open to anybody."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.conftest import DAEMONS, SERVICES, SOCKETS, is_well
from tests.system.guests import none
from tests.system.house import Machine

# Exposure as systemd-analyze(1) counts it: 0 is nothing, 10 is a service without a single line of hardening.
_THRESHOLDS = {"vmand": 4.0, "virtvmand": 2.0, "deadlined": 2.0}
_WITHIN_S = 5.0
_OURS = ("edgehold", *DAEMONS)


def needed(debs: dict[str, Path], name: str) -> list[Path]:
    """A package of ours with all of ours that it depends on, as its control file has it."""
    found: list[str] = []
    todo = [name]
    while todo:
        one = todo.pop()
        if one in debs and one not in found:
            found.append(one)
            shown = subprocess.run(["dpkg-deb", "-f", debs[one], "Depends"], capture_output=True, text=True, check=True)
            todo.extend(word.split()[0] for word in shown.stdout.replace("|", ",").split(",") if word.strip())
    return [debs[one] for one in found]


def packages_of(machine: Machine) -> set[str]:
    return set(machine.run("dpkg-query", "-W", "-f", "${Package}\n").output.split())


def test_all_of_it(house: Machine, debs: dict[str, Path]) -> None:
    """apt took every package, and each is complete."""
    states = house.run("dpkg-query", "-W", "-f", "${Package} ${db:Status-Status} ${Version}\n", *debs).output
    assert all(line.split()[1] == "installed" for line in states.splitlines()), states
    assert len({line.split()[2] for line in states.splitlines()}) == 1, states
    assert not house.run("dpkg", "--audit").output
    assert not house.run("dpkg", "--verify", *debs).output


def test_commands_answer(house: Machine) -> None:
    """Each by its name alone, as root and as anybody."""
    for name in ("vmand", "vmanctl", "virtvmand", "deadlined", "deadlinectl"):
        assert re.search(r"\d+\.\d+\.\d+", house.run(name, "--version").output)
        assert house.run("setpriv", "--reuid=65534", "--clear-groups", "--", name, "--help").output
    for name in DAEMONS:
        assert house.run(name, "--check-config").status == 0


def test_system_python_imports_it(house: Machine) -> None:
    """The extension loads in the system's python3, and no byte code is compiled at a start."""
    script = "import edgehold.kernel.native, edgehold.api.vmand as a, sys; print(a.__cached__, a.__file__)"
    cached, source = house.run("/usr/bin/python3", "-c", script).output.split()
    assert source.startswith("/usr/lib/python3/dist-packages/edgehold/")
    assert house.run("test", "-s", cached).status == 0


def test_boot(house: Machine, record_testsuite_property: Callable[[str, object], None]) -> None:
    """After a boot: all units active within five seconds of `running`, and nobody has a word of warning about them."""
    none(house)  # vmand says that a partition's memory went with the host
    assert house.reboot() == "running"
    boot = house.run("systemctl", "show", "-p", "UserspaceTimestampMonotonic", "-p", "FinishTimestampMonotonic").output
    times = {name: int(value) / 1e6 for name, _, value in (line.partition("=") for line in boot.splitlines())}
    finished = times["FinishTimestampMonotonic"]
    record_testsuite_property(f"{house.suite}: boot_s", round(finished - times["UserspaceTimestampMonotonic"], 2))
    for unit in (*SERVICES, *SOCKETS):
        shown = house.show(unit, "ActiveState", "ActiveEnterTimestampMonotonic", "NRestarts")
        assert shown["ActiveState"] == "active", house.status(unit)
        after = int(shown["ActiveEnterTimestampMonotonic"]) / 1e6 - finished
        record_testsuite_property(f"{house.suite}: {unit}_s", round(after, 2))
        assert after <= _WITHIN_S, f"{unit} took {after:.1f} s after the boot"
        assert shown.get("NRestarts", "0") == "0", house.status(unit)
    is_well(house)
    assert warnings(house) == []


def warnings(machine: Machine) -> list[str]:
    """Since the boot: what our daemons warn of, and what systemd warns of that names a unit of ours or none at all."""
    said = []
    for one in machine.journal("-b", "-p", "warning"):
        who, message = str(one.get("SYSLOG_IDENTIFIER")), str(one["MESSAGE"])
        unit = str(one.get("UNIT", one.get("_SYSTEMD_UNIT", "")))
        if who in DAEMONS or (who == "systemd" and (not one.get("UNIT") or unit.startswith(_OURS))):
            said.append(f"{who}: {message}")
    return said


def test_units_verify(house: Machine) -> None:
    """systemd of this Debian knows every line of every unit."""
    names = [f"{one}.service" for one in DAEMONS] + [*SOCKETS, "edgehold.target", "edgehold.slice", "vmand.slice"]
    done = house.run("systemd-analyze", "verify", "--man=no", *names, check=False)
    assert (done.status, done.output + done.errors) == (0, "")


@pytest.mark.parametrize("name", DAEMONS)
def test_exposure(house: Machine, name: str, record_testsuite_property: Callable[[str, object], None]) -> None:
    """What a daemon that somebody took over could do, in systemd's own count."""
    threshold = round(_THRESHOLDS[name] * 10)  # systemd-analyze(1): tenths
    done = house.run("systemd-analyze", "security", "--no-pager", f"--threshold={threshold}", name, check=False)
    last = done.output.strip().splitlines()[-1]
    record_testsuite_property(f"{house.suite}: exposure of {name}", last)
    assert (done.status, "Overall exposure" in last) == (0, True), last


def test_files_are_closed(house: Machine) -> None:
    """State is the daemons' alone; nobody but root may write what a daemon runs or reads."""
    modes = house.run("stat", "-c", "%a %U %n", "/var/lib/vmand", "/var/lib/deadlined").output.splitlines()
    assert modes == ["700 root /var/lib/vmand", "700 deadlined /var/lib/deadlined"]
    places = ("/usr/lib/edgehold", "/usr/lib/python3/dist-packages/edgehold", "/etc/edgehold")
    assert not house.run(
        "find", *places, "-not", "-type", "l", "(", "-perm", "/022", "-o", "-not", "-user", "0", ")"
    ).output


def test_deadlined_alone(fresh: Callable[[], Machine], debs: dict[str, Path]) -> None:
    """It brings no emulator, no libvirt, no broker and no chain's library, and works."""
    machine = fresh()
    before = packages_of(machine)
    machine.install(*needed(debs, "edgehold-deadlined"))
    brought = packages_of(machine) - before
    foreign = {one for one in brought if not one.startswith("edgehold")}
    assert not [one for one in brought if any(word in one for word in ("qemu", "virt", "mosquitto", "web3", "vmand"))]
    assert not foreign, "more than Debian's own base"
    assert not machine.run("find", "/usr/lib/edgehold", "-iname", "*web3*").output
    machine.wait_active("deadlined.service")
    assert machine.reboot() == "running"
    assert machine.state("deadlined.service") == "active/running"
    assert "CPUs" in machine.run("deadlinectl", "capacity").output
    assert warnings(machine) == []
