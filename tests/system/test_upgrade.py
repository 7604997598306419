"""Another version of the packages on a host in use: guests go on, nothing is lost, and nobody is asked."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import newer, world
from tests.system.conftest import SERVICES
from tests.system.house import Machine, machine, until

# What unattended upgrades pass: keep the administrator's own text.
_KEEP = ("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold")
_EDIT = "# The administrator's own line.\n"
_STATE = {"vmand": "/var/lib/vmand/vmand.db", "deadlined": "/var/lib/deadlined/journal.db"}


class Host:
    """A host in use, and two versions of the packages."""

    def __init__(self, on: Machine, older: dict[str, Path], later: dict[str, Path]) -> None:
        self.machine = on
        self.older, self.later = _names(older), _names(later)
        on.put({f"/root/debs/{one.name}": one for one in (*older.values(), *later.values())})

    def apt(self, packages: list[str], *options: str, check: bool = True) -> str:
        """``apt-get install`` of package files; all that it and dpkg said."""
        words = ("-y", "-q", "--allow-downgrades", "--no-install-recommends", "-o", "APT::Sandbox::User=root")
        done = self.machine.run("apt-get", *words, *options, "install", *packages, check=check, timeout_s=240.0)
        return done.output + done.errors

    def version(self) -> str:
        """What the client command says of itself."""
        found = re.search(r"\d+\.\d+\.\d+", self.machine.run("vmanctl", "--version").output)
        assert found is not None
        return found[0]

    def at(self, packages: list[str]) -> None:
        """Be at one of the versions, complete and well."""
        if packages != self.now():
            self.apt(packages, *_KEEP)
        self.well()

    def now(self) -> list[str]:
        """The packages of the version that is installed."""
        return self.later if self.version() == newer.VERSION else self.older

    def other(self) -> list[str]:
        """Those of the version that is not."""
        return self.older if self.now() is self.later else self.later

    def well(self) -> None:
        """Every package is complete, every unit of ours is active."""
        assert self.machine.run("dpkg", "--audit").output == ""
        world.settled(self.machine)


def _names(packages: dict[str, Path]) -> list[str]:
    return [f"/root/debs/{one.name}" for one in packages.values()]


@pytest.fixture(scope="module")
def host(suite: str, debs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """With the older version, a guest that runs and all else that `world` has."""
    with machine(suite) as one:
        one.install(*debs.values(), "libvirt-clients")
        world.furnish(one)
        world.held(one)
        yield Host(one, debs, newer.newer(debs, tmp_path_factory.mktemp("newer")))


class Before:
    """What must be the same afterwards; made before."""

    def __init__(self, host: Host) -> None:
        on = self._on = host.machine
        self.steady = world.partition(on, world.STEADY)
        self.began = self._unit_began()
        self.daemons = [on.main_pid(unit) for unit in SERVICES]
        self.jobs = until(lambda: world.jobs(on), what="the guest works", timeout_s=world.BOOT_S)
        self.partitions = self._partitions()
        self.attachments = self._attachments()
        self.definitions = self._definitions()
        assert self.steady["state"] == "DEPLOYED"
        assert len(self.attachments) == 2

    def guest_goes_on(self) -> None:
        """It is the same process, and it works on: its jobs are counted from the guest's boot."""
        steady = world.partition(self._on, world.STEADY)
        same = ("state", "pid", "unit", "boot_count", "uuid")
        assert [steady[one] for one in same] == [self.steady[one] for one in same]
        assert self._unit_began() == self.began
        until(lambda: world.jobs(self._on) > self.jobs, what=f"a job after {self.jobs}", timeout_s=world.BOOT_S)

    def all_is_there(self) -> None:
        """Nothing of what the daemons keep is another."""
        assert self._partitions() == self.partitions
        assert self._attachments() == self.attachments
        assert self._definitions() == self.definitions
        world.held(self._on)

    def restarted(self) -> None:
        """Each daemon is another process."""
        for unit, old in zip(SERVICES, self.daemons, strict=True):
            assert self._on.main_pid(unit) not in (0, old), self._on.status(unit)

    def _unit_began(self) -> str:
        return self._on.show(self.steady["unit"], "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"]

    def _partitions(self) -> dict[str, list[object]]:
        keys = ("id", "uuid", "state", "mode", "cores", "memory_bytes", "cpus")
        return {name: [one[key] for key in keys] for name, one in world.partitions(self._on).items()}

    def _attachments(self) -> dict[int, list[object]]:
        return {number: [one["target"], one["policy"]] for number, one in world.attachments(self._on).items()}

    def _definitions(self) -> dict[str, str]:
        xml = {
            name: self._on.run("virsh", "-c", world.URI, "dumpxml", "--inactive", name).output
            for name in world.domains(self._on)
        }
        return {name: re.sub(r" id='[^']*'", "", text) for name, text in xml.items()}


def test_upgrade(host: Host) -> None:
    """By apt, unattended: a guest never stops, what was edited stays, daemons are the new ones."""
    on = host.machine
    host.at(host.older)
    # An autostart that was done, and ended by hand, is not done again by a new virtvmand.
    on.sh(f"virsh -q -c {world.URI} autostart {world.WEB}; cat >>{newer.CONFFILE} <<'END'\n{_EDIT}END")
    before = Before(host)
    said = host.apt(host.later, *_KEEP)
    host.well()
    assert host.version() == newer.VERSION
    assert {line.split("~")[0] for line in world.versions(on)} == {newer.VERSION}
    before.guest_goes_on()
    before.restarted()
    before.all_is_there()
    assert world.domains(on)[world.WEB] == "shut off"
    edited = on.read(newer.CONFFILE)
    assert _EDIT in edited
    assert newer.NEW_TEXT not in edited
    assert newer.NEW_TEXT in on.read(f"{newer.CONFFILE}.dpkg-dist")
    assert "warn" not in said.lower(), said
    on.sh(f"virsh -q -c {world.URI} autostart --disable {world.WEB}; rm {newer.CONFFILE}.dpkg-dist")


def test_downgrade(host: Host) -> None:
    """Back to the older version, which reads what the newer one has written."""
    host.at(host.later)
    before = Before(host)
    host.apt(host.older, *_KEEP)
    host.well()
    assert host.version() != newer.VERSION
    before.guest_goes_on()
    before.restarted()
    before.all_is_there()


def test_an_interrupted_upgrade(host: Host) -> None:
    """dpkg is killed when all is unpacked and the first of our packages is about to be configured."""
    on = host.machine
    host.at(host.older)
    before = Before(host)
    killer = """#!/bin/sh
while read -r line; do
    case $line in "processing: configure: edgehold-"*) kill -KILL "$1" ;; esac
done
"""
    on.put({"/root/killer": killer}, mode="755")
    # dpkg runs it by a shell, whose parent is dpkg.
    said = host.apt(host.later, *_KEEP, "-o", "Dpkg::Options::=--status-logger=exec /root/killer $PPID", check=False)
    assert "dpkg exited unexpectedly" in said
    assert on.run("dpkg", "--audit").output != ""
    assert on.sh("dpkg-query -W -f '${db:Status-Status}\\n' edgehold-vmand").output == "unpacked\n"
    world.settled(on)
    before.guest_goes_on()
    on.run("dpkg", "--configure", "-a", "--force-confdef", "--force-confold", timeout_s=240.0)
    host.well()
    assert host.version() == newer.VERSION
    before.guest_goes_on()
    before.restarted()
    before.all_is_there()


def test_a_question_nobody_answers(host: Host) -> None:
    """dpkg asks about an edited file where it was not told what to do. Without a terminal that ends at once, with
    daemons and guests as they were, and is put right by telling it."""
    on = host.machine
    if _EDIT not in on.read(newer.CONFFILE):
        on.put({newer.CONFFILE: on.read(newer.CONFFILE) + _EDIT})
    before = Before(host)
    said = host.apt(host.other(), check=False)
    assert "end of file on stdin at conffile prompt" in said
    assert on.run("dpkg", "--audit").output != ""
    world.settled(on)
    before.guest_goes_on()
    on.run("dpkg", "--configure", "-a", "--force-confold", timeout_s=240.0)
    host.well()
    assert _EDIT in on.read(newer.CONFFILE)
    before.guest_goes_on()
    before.all_is_there()
    on.run("rm", "-f", f"{newer.CONFFILE}.dpkg-dist", f"{newer.CONFFILE}.dpkg-new")


@pytest.mark.parametrize("name", _STATE)
def test_state_of_a_newer_version(host: Host, name: str) -> None:
    """A daemon whose state a newer one has written refuses it, says what to do, and changes nothing."""
    on, path = host.machine, _STATE[name]
    host.well()
    before = Before(host)
    on.run("systemctl", "stop", name)
    set_version = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); old = db.execute('PRAGMA user_version').fetchone()[0];"
        "db.execute(f'PRAGMA user_version={int(sys.argv[2])}'); db.close(); print(old)"
    )
    old = on.run("python3", "-c", set_version, path, "1000").output.strip()
    kept = on.run("sha256sum", path).output
    started = on.run("systemctl", "start", name, check=False)
    assert started.status != 0
    until(lambda: on.state(f"{name}.service") == "failed/failed", what=f"{name} gives up", timeout_s=60.0)
    shown = on.show(f"{name}.service", "ExecMainStatus", "NRestarts")
    said = on.status(name)
    assert f"written by a newer {name} (version 1000" in said
    assert "install that one again" in said
    assert on.run("sha256sum", path).output == kept
    assert shown == {"ExecMainStatus": "78", "NRestarts": "0"}, said
    on.run("python3", "-c", set_version, path, old)
    on.run("systemctl", "reset-failed", name)
    on.run("systemctl", "start", name)
    host.well()
    before.guest_goes_on()
    before.all_is_there()
