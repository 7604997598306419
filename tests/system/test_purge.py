"""Removed and purged: what stays, what comes back, and that nothing is left in the end."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from tests.system import world
from tests.system.conftest import SERVICES, SOCKETS
from tests.system.house import Machine, until

_OURS = "edgehold*"
# A listing of all that a machine has in its file systems, with the content of settings. /proc and /sys are the
# kernel's; of /dev only what programs write there is looked at.
_LISTING = """
import hashlib, json, os, stat
found = {}
for top in ("/", "/run", "/tmp", "/dev/shm", "/dev/hugepages", "/dev/mqueue"):
    device = os.stat(top).st_dev if os.path.isdir(top) else None
    for place, directories, files in os.walk(top):
        directories[:] = [one for one in directories if os.lstat(os.path.join(place, one)).st_dev == device]
        for name in (*directories, *files):
            path = os.path.join(place, name)
            try:
                one = os.lstat(path)
                what = f"{stat.filemode(one.st_mode)} {one.st_uid}:{one.st_gid}"
                if stat.S_ISLNK(one.st_mode):
                    what += " -> " + os.readlink(path)
                elif stat.S_ISREG(one.st_mode) and path.startswith("/etc/"):
                    what += " " + hashlib.sha256(open(path, "rb").read()).hexdigest()
            except FileNotFoundError:
                continue
            found[path] = what
print(json.dumps(found))
"""
# What is somebody else's: each changes with any package that comes or goes, or by itself.
_OTHERS = re.compile(
    r"/etc/(passwd|group|shadow|gshadow)-?"  # users stay: files may still belong to them
    r"|/root/.*"  # the test's own
    r"|/var/(cache|lib)/(apt|dpkg|debconf)/.*"
    r"|/var/log/(apt/.*|dpkg\.log|alternatives\.log|journal/.*)|/run/log/journal/.*"
    r"|/run/systemd/ask-password-block(/.*)?"  # of systemctl
    r"|/run/systemd/transient"  # made with the first transient unit; what is in it is looked at
)


def listing(machine: Machine) -> dict[str, str]:
    """Paths and what they are, without those of others."""
    found: dict[str, str] = json.loads(machine.run("python3", "-c", _LISTING).output)
    return {path: what for path, what in found.items() if not _OTHERS.fullmatch(path)}


def cgroups(machine: Machine) -> set[str]:
    """Of the machine, as far as they are of ours."""
    found = machine.run("find", "/sys/fs/cgroup", "-type", "d").output.splitlines()
    return {one for one in found if re.search(r"vmand|deadlined|edgehold", one)}


def units(machine: Machine) -> str:
    """What systemd knows of ours, whatever became of it."""
    return machine.run(
        "systemctl", "list-units", "--all", "--no-legend", "--plain", "*vmand*", "deadlined*", "edgehold*"
    ).output


def test_remove_and_purge(fresh: Callable[[], Machine], debs: dict[str, Path]) -> None:
    """On a host in use, with a guest that runs."""
    machine = fresh()
    bring_others(machine, debs)
    before = listing(machine)
    machine.install(*debs.values())
    world.furnish(machine)
    world.held(machine)
    partitions, attachments = definitions(machine)

    machine.run("apt-get", "-q", "-y", "remove", _OURS, timeout_s=240.0)
    nothing_runs(machine)
    state = machine.run("ls", "/var/lib/vmand/vmand.db", "/var/lib/deadlined/attachments.json", check=False)
    assert state.status == 0, "state stays"
    assert set(machine.run("ls", "/etc/edgehold").output.split()) >= {"vmand.toml", "virtvmand.toml", "deadlined.toml"}

    machine.install(*debs.values())
    world.settled(machine)
    assert definitions(machine) == (partitions, attachments)
    until(lambda: world.partition(machine, world.STEADY)["state"] == "FAILED", what="its guest has ended")
    machine.sh(f"""
        vmanctl shutdown {world.STEADY}
        vmanctl deploy -kernel {world.KERNEL} -initrd {world.INITRD} -cmdline '{world.CMDLINE}' {world.STEADY}""")
    until(lambda: world.jobs(machine), what="the guest works again", timeout_s=world.BOOT_S)

    # What the administrator has made is not ours to remove.
    machine.sh(f"systemctl disable --now {world.JOB}; rm -r /etc/systemd/system/{world.JOB} /srv/*")
    machine.sh(
        "rm -r /etc/edgehold/vmand.toml.d; echo '# edited' >>/etc/edgehold/deadlined.toml; systemctl daemon-reload"
    )
    machine.run("apt-get", "-q", "-y", "purge", _OURS, timeout_s=240.0)
    nothing_runs(machine)
    assert units(machine) == ""
    after = listing(machine)
    left = sorted(path for path, what in after.items() if before.get(path) != what)
    assert not left, "it is left, or is not what it was"
    gone = sorted(before.keys() - after.keys())
    assert not gone, "it was there before us"
    assert machine.system_state() == "running"


def bring_others(machine: Machine, debs: dict[str, Path]) -> None:
    """Install all that ours need, so that only ours come and go."""
    machine.put({f"/root/debs/{one.name}": one for one in debs.values()})
    names = [f"./debs/{one.name}" for one in debs.values()]
    simulated = machine.run("apt-get", "-s", "--no-install-recommends", "install", *names, "libvirt-clients").output
    needed = re.findall(r"(?m)^Inst (\S+)", simulated)
    machine.install(*(one for one in needed if not one.startswith("edgehold")))


def definitions(machine: Machine) -> tuple[object, object]:
    """What must come back with the packages."""
    keys = ("id", "uuid", "mode", "cores", "memory_bytes")
    return (
        {name: [one[key] for key in keys] for name, one in world.partitions(machine).items()},
        {number: [one["target"], one["policy"]] for number, one in world.attachments(machine).items()},
    )


def nothing_runs(machine: Machine) -> None:
    """No daemon, no guest and no cgroup of ours."""
    until(lambda: not cgroups(machine), what=f"no cgroup is left: {cgroups(machine)}")
    assert machine.run("pgrep", "-af", "qemu-system|/usr/s?bin/(vmand|virtvmand|deadlined)", check=False).output == ""
    for unit in (*SERVICES, *SOCKETS):
        assert machine.show(unit, "LoadState", "ActiveState") == {"LoadState": "not-found", "ActiveState": "inactive"}
