"""What goes wrong on a host: killed and frozen daemons, wrong settings, a peer that is away, a full disk."""

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.system.conftest import DAEMONS, SERVICES, SOCKETS
from tests.system.guests import NAME, Guest
from tests.system.house import Machine, until
from tests.system.world import URI, attachments, partitions

_LIST = ("virsh", "-c", URI, "list", "--all", "--name")
_CREATE = ("vmanctl", "create", "-cores", "1", "-memsize", "0.0625", "-mode", "shared", "-name")
_WATCHDOG_S = 4
# Of the suite's systemd, at most: RestartSec= of the units, a start, and a busy host.
_RESTART_S = 20.0


def pids(machine: Machine) -> dict[str, int]:
    return {unit: machine.main_pid(unit) for unit in SERVICES}


def restarted(machine: Machine, before: dict[str, int], *, timeout_s: float = _RESTART_S) -> None:
    """Wait until systemd has started each of them again."""
    for unit, pid in before.items():
        until(
            lambda unit=unit, pid=pid: machine.main_pid(unit) not in {0, pid},  # type: ignore[misc]
            what=f"systemd starts {unit} again",
            timeout_s=timeout_s,
        )
    machine.wait_active(*before)
    for unit in before:
        assert int(machine.show(unit, "NRestarts")["NRestarts"]) == 1, machine.status(unit)


@contextlib.contextmanager
def held(house: Machine, running: Guest) -> Iterator[None]:
    """deadlined holds the guest's vCPU."""
    house.run("deadlinectl", "attach", "--partition", str(running.id), "--cap", "0.5")
    try:
        until(running.is_held, what="the vCPU is held")
        yield
    finally:
        for number in attachments(house):
            house.run("deadlinectl", "detach", str(number))


def all_as_it_was(house: Machine, running: Guest) -> None:
    """The guest, the attachment and what libvirt's clients see."""
    assert running.same()
    running.goes_on()
    until(running.is_held, what="the vCPU is held again")
    assert house.run(*_LIST).output.split() == [NAME]


def test_killed(house: Machine, running: Guest) -> None:
    """All three at once, by SIGKILL: systemd starts them again, and everything is as it was."""
    with held(house, running):
        before = pids(house)
        house.run("kill", "-KILL", *map(str, before.values()))
        restarted(house, before)
        all_as_it_was(house, running)


def test_frozen(house: Machine, running: Guest) -> None:
    """A daemon that does nothing any more is ended by the watchdog, which has 30 s in the units, and started again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(house, running))
        for unit in SERVICES:
            assert house.show(unit, "WatchdogUSec", "Restart") == {"WatchdogUSec": "30s", "Restart": "on-failure"}
            stack.enter_context(house.override(unit, f"[Service]\nWatchdogSec={_WATCHDOG_S}\n"))
        house.run("systemctl", "restart", *SERVICES)
        cursor, before = house.cursor(), pids(house)
        house.run("kill", "-STOP", *map(str, before.values()))
        restarted(house, before, timeout_s=_WATCHDOG_S + _RESTART_S)
        for unit in SERVICES:
            house.wait_journal(f"Watchdog timeout (limit {_WATCHDOG_S}s)!", unit=unit, after=cursor)
        all_as_it_was(house, running)
    house.run("systemctl", "restart", *SERVICES)


@pytest.mark.parametrize("name", DAEMONS)
def test_wrong_settings(house: Machine, name: str) -> None:
    """It fails once with status 78 and says why where a person looks; with right settings it starts."""
    unit, wrong = f"{name}.service", f"/etc/edgehold/{name}.toml.d/90-wrong.toml"
    house.put({wrong: 'log_level = "LOUD"\n'})
    cursor = house.cursor()
    try:
        assert house.run("systemctl", "restart", unit, check=False).status != 0
        shown = house.show(unit, "ActiveState", "Result", "ExecMainStatus", "NRestarts")
        assert shown == {"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "78", "NRestarts": "0"}
        said = [line for line in house.status(unit).splitlines()[-6:] if f" {name}[" in line]
        assert len(said) == 1, house.status(unit)
        assert wrong in said[0]
        assert "log_level" in said[0]
        assert f"{wrong}: log_level" in house.run(name, "--check-config", check=False).errors
        if name == "virtvmand":
            # A client is told at once, and does not make systemd start it again and again.
            assert house.run(*_LIST, check=False, timeout_s=30).status != 0
        time.sleep(3.0)  # longer than RestartSec=: this is about what does not happen
        starts = [one for one in house.journal(unit=unit, after=cursor) if str(one["MESSAGE"]).startswith("Starting ")]
        assert len(starts) <= (2 if name == "virtvmand" else 1), house.status(unit)
    finally:
        house.run("rm", wrong)
    house.run("systemctl", "start", unit)
    assert house.state(unit) == "active/running"
    if name == "virtvmand":
        house.wait_active(*SOCKETS)
        house.run(*_LIST)


def test_dies_again_and_again(house: Machine) -> None:
    """systemd gives up after as many starts as the unit says, and a person gets it going again."""
    limits = {}
    steps = "" if house.suite == "bookworm" else "RestartSteps=0\n"  # since systemd 254
    with contextlib.ExitStack() as stack:
        for unit in SERVICES:
            limits[unit] = int(house.show(unit, "StartLimitBurst")["StartLimitBurst"])
            # Not each try's pause: that is what the units have, and would take a minute.
            stack.enter_context(house.override(unit, f"[Service]\nRestartSec=100ms\n{steps}"))
        cursor = house.cursor()
        end = time.monotonic() + 90.0
        left = set(SERVICES)
        while left:
            for unit in tuple(left):
                if house.state(unit) in {"failed/failed", "inactive/dead"}:
                    left.discard(unit)
                elif pid := house.main_pid(unit):
                    house.run("kill", "-KILL", str(pid), check=False)
            assert time.monotonic() < end, f"started for ever: {left}"
        for unit in SERVICES:
            said = [str(one["MESSAGE"]) for one in house.journal(unit=unit, after=cursor)]
            starts = [one for one in said if one.startswith("Starting ")]
            assert len(starts) <= limits[unit], said
            assert [one for one in said if "repeated too quickly" in one], said
    house.run("systemctl", "reset-failed", *SERVICES, *SOCKETS)
    house.run("systemctl", "start", "edgehold.target")
    house.wait_active(*SERVICES, *SOCKETS)


def test_without_vmand(house: Machine, running: Guest) -> None:
    """The other two start without it, say that it is away, and go on when it is there."""
    others = ("virtvmand.service", "deadlined.service")
    cursor = house.cursor()
    house.run("systemctl", "mask", "--runtime", "--now", "vmand.service")
    try:
        house.run("systemctl", "restart", *others)
        refused = house.run(*_LIST, check=False)
        assert refused.status != 0
        assert "vmand" in refused.errors
        house.wait_journal("vmand is away", unit="virtvmand.service", after=cursor)
        refused = house.run("deadlinectl", "attach", "--partition", str(running.id), check=False)
        assert refused.status != 0
        assert "vmand" in refused.errors
        assert "CPUs" in house.run("deadlinectl", "capacity").output
        assert [house.state(unit) for unit in others] == ["active/running"] * 2
    finally:
        house.run("systemctl", "unmask", "--runtime", "vmand.service")
        house.run("systemctl", "start", "vmand.service")
    until(lambda: house.run(*_LIST, check=False).output.split() == [NAME], what="virtvmand sees the partition")
    with held(house, running):
        all_as_it_was(house, running)


@contextlib.contextmanager
def small_disk(house: Machine, name: str, options: str) -> Iterator[str]:
    """A daemon's state on a file system of its own, of 1 MiB; the path of a file that fills it up."""
    state, unit = f"/var/lib/{name}", f"{name}.service"
    kept = f"/root/{name}.kept"
    house.run("systemctl", "stop", unit)
    house.run("cp", "-a", state, kept)
    house.run("mount", "-t", "tmpfs", "-o", f"size=1m,mode=700,{options}", "small", state)
    try:
        house.run("cp", "-a", f"{kept}/.", state)
        house.run("systemctl", "start", unit)
        yield f"{state}/filler"
        house.run("systemctl", "stop", unit)
    finally:
        house.run("umount", "--lazy", state)
        house.run("rm", "-r", kept)
        house.run("systemctl", "start", unit)


def fill(house: Machine, path: str) -> None:
    done = house.sh(f"dd if=/dev/zero of={path} bs=4k || true")
    assert "No space left" in done.errors


def test_full_disk_of_vmand(house: Machine) -> None:
    """A command that can't be written down is refused with the reason; vmand goes on, and so does what it had."""
    with small_disk(house, "vmand", "uid=0") as filler:
        there = {"before", *partitions(house)}
        house.run(*_CREATE, "before")
        pid = house.main_pid("vmand.service")
        fill(house, filler)
        refused = house.run(*_CREATE, "during", check=False)
        assert refused.status != 0
        assert "full" in refused.errors or "space" in refused.errors, refused.errors
        assert set(partitions(house)) == there
        house.run("rm", filler)
        house.run(*_CREATE, "after")
        assert set(partitions(house)) == {"after", *there}
        assert house.main_pid("vmand.service") == pid
        house.run("systemctl", "restart", "vmand.service")
        assert set(partitions(house)) == {"after", *there}
        for name in ("before", "after"):
            house.run("vmanctl", "destroy", name)


def test_full_disk_of_deadlined(house: Machine) -> None:
    """Nobody new is held, with the reason; deadlined goes on."""
    user = house.run("id", "-u", "deadlined").output.strip()
    with small_disk(house, "deadlined", f"uid={user},gid={user}") as filler, sleeper(house) as sleeping:
        pid = house.main_pid("deadlined.service")
        fill(house, filler)
        attached = house.run("deadlinectl", "attach", "--unit", sleeping, check=False)
        said = attached.output + attached.errors
        assert "full" in said or "space" in said, said
        assert house.main_pid("deadlined.service") == pid
        house.run("rm", filler)
        for number in attachments(house):
            house.run("deadlinectl", "detach", str(number))
        house.run("deadlinectl", "attach", "--unit", sleeping)
        until(lambda: states(house) == ["held"], what="the thread is held")
        for number in attachments(house):
            house.run("deadlinectl", "detach", str(number))


def states(house: Machine) -> list[str]:
    return [two["state"] for one in attachments(house).values() for two in one["threads"]]


@contextlib.contextmanager
def sleeper(house: Machine) -> Iterator[str]:
    """A unit with one thread."""
    house.run("systemd-run", "--unit=sleeper.service", "sleep", "infinity")
    try:
        yield "sleeper.service"
    finally:
        house.run("systemctl", "stop", "sleeper.service")
