"""What only a whole kernel shows of the installed daemons: limits that cgroups enforce, isolated cores, a firmware.

One machine for all, with cgroup v2 alone and Debian 12's own kernel; each test leaves it as it found it.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgehold.testing.capability import guest_image
from edgehold.testing.vmanager import build_module
from tests.system.vm import Vm, booted
from tests.system.vmimage import need_machine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DAEMONS = ("vmand", "virtvmand", "deadlined")
CGROUP = "/sys/fs/cgroup"
OURS = f"{CGROUP}/edgehold.slice"
PATIENCE_S = 300.0
"""For what takes a second on a real machine: this one is emulated, and its host is busy."""
MEMORY_S = 120.0
# An emulated guest in an emulated machine: each answer of its QEMU takes its time.
SETTINGS = b'accelerator = "tcg"\nstart_timeout_s = 120.0\nqmp_timeout_s = 60.0\n'
BUSY = ("python3", "-c", "while True: pass")


@pytest.fixture(scope="module")
def booted_vm() -> Iterator[Vm]:
    """The machine, with four CPUs: two of them for a partition, two for all others."""
    kernel, initrd = guest_image(ROOT)
    files: dict[str, bytes | Path] = {
        "/srv/guest/vmlinuz": kernel,
        "/srv/guest/initramfs.gz": initrd,
        "/etc/edgehold/vmand.toml.d/test.toml": SETTINGS,
    }
    machine = need_machine("amd64", installed=True, cpus=4, memory_mib=1536, files=files)
    with booted(machine) as vm:
        state = vm.run("systemctl", "is-system-running", "--wait", check=False, timeout_s=PATIENCE_S).output.strip()
        assert state == "running", vm.run("systemctl", "--failed").output
        yield vm
        vm.power_off()


@pytest.fixture
def vm(booted_vm: Vm) -> Iterator[Vm]:
    """The machine, with every daemon as it should be, before and after."""
    for daemon in DAEMONS:
        booted_vm.wait("systemctl", "is-active", daemon, timeout_s=PATIENCE_S)
    yield booted_vm
    for daemon in DAEMONS:
        assert shown(booted_vm, daemon, "ActiveState") == "active", journal(booted_vm, daemon)


def shown(vm: Vm, unit: str, name: str) -> str:
    """A property of a unit."""
    return vm.run("systemctl", "show", "-P", name, unit).output.strip()


def journal(vm: Vm, unit: str) -> str:
    """Its last lines."""
    return vm.run("journalctl", "-u", unit, "-n", "20", "--no-pager").output


def content(vm: Vm, path: str) -> str:
    """A file's, without the last newline. A pattern is one file's."""
    return vm.shell(f"cat {path}").output.strip()


def partition(vm: Vm, number: str) -> dict[str, Any]:
    """What vmanctl tells of a partition."""
    told = json.loads(vm.run("vmanctl", "--json", "status", number).output)
    assert isinstance(told, dict)
    return told


def until_graded(vm: Vm, number: str, grade: str) -> dict[str, Any]:
    """Wait for this grade of the cores."""
    end = time.monotonic() + PATIENCE_S
    while (told := partition(vm, number))["cores_grade"] != grade:
        assert time.monotonic() < end, f"not {grade}: {told}\n{journal(vm, 'vmand')}"
        time.sleep(1)
    return told


def cpu_share(vm: Vm, group: str, seconds: int) -> float:
    """How many CPUs a cgroup uses, by the machine's own clock."""
    script = (
        f"look() {{ awk '/^usage_usec/ {{ print $2 }}' {group}/cpu.stat; cut -d' ' -f1 /proc/uptime; }}; "
        f"look; sleep {seconds}; look"
    )
    used, begun, used_then, ended = (float(word) for word in vm.shell(script).output.split())
    return (used_then - used) / 1e6 / (ended - begun)


def joined(group: str, program: str) -> str:
    """A line of a shell that runs a program of Python's as one more process of a cgroup."""
    return f"sh -c 'echo $$ >{group}/cgroup.procs && exec python3 /dev/fd/3' 3<<'PROGRAM'\n{program}\nPROGRAM"


@pytest.fixture
def busy(vm: Vm) -> Iterator[str]:
    """A unit that uses a core. systemd passes the cpu controller to it, because it has a weight."""
    vm.run("systemd-run", "--unit", "busy", "-p", "CPUWeight=100", *BUSY)
    yield "busy.service"
    vm.run("systemctl", "stop", "busy")


def test_all_units_are_active(vm: Vm) -> None:
    assert vm.run("systemctl", "--failed", "--no-legend").output == ""
    for socket in ("virtvmand.socket", "virtvmand-ro.socket"):
        assert shown(vm, socket, "ActiveState") == "active"
    assert json.loads(vm.run("vmanctl", "--json", "list").output) == []
    # Nothing that a unit asks for is unknown to this systemd, or can't be had.
    said = vm.run("journalctl", "-b", "-o", "cat", "--no-pager", "_PID=1").output.splitlines()
    assert [line for line in said if "ignoring" in line and any(daemon in line for daemon in DAEMONS)] == []


def test_cores_are_isolated_under_systemd(vm: Vm) -> None:
    """A restart of vmand, its death and whatever systemd does to its own cgroups leave the isolation as it is."""
    number = vm.run("vmanctl", "create", "--cores", "2", "--memsize", "0.125", "--strict").output.strip()
    deploy = ("vmanctl", "deploy", "--kernel", "/srv/guest/vmlinuz", "--initrd", "/srv/guest/initramfs.gz")
    vm.run(*deploy, "--cmdline", "quiet", number, timeout_s=PATIENCE_S)
    # Its virtual CPUs then use nothing, and whether its cores are its own is the same.
    vm.run("vmanctl", "suspend", number, timeout_s=PATIENCE_S)
    first = partition(vm, number)
    group = f"{CGROUP}/vmand-p-{number}-*.service"

    def is_isolated() -> None:
        told = partition(vm, number)
        assert (told["state"], told["cores_grade"]) == ("SUSPENDED", "isolated"), told
        assert (told["pid"], told["boot_count"]) == (first["pid"], 1), told
        assert content(vm, f"{group}/cpuset.cpus.partition") == "isolated"
        assert content(vm, f"{CGROUP}/cpuset.cpus.effective") == "0,3"

    assert first["cpus"] == [1, 2]
    is_isolated()
    vm.run("systemctl", "restart", "vmand", timeout_s=PATIENCE_S)
    is_isolated()
    vm.run("systemctl", "kill", "--signal", "KILL", "vmand")
    vm.wait("vmanctl", "status", number, timeout_s=PATIENCE_S)
    is_isolated()
    vm.run("systemctl", "daemon-reload")
    is_isolated()
    vm.run("systemctl", "daemon-reexec")
    is_isolated()

    # Somebody gives these cores to others: the loss is told with who it was, and made good when they are free again.
    vm.run("systemd-run", "--unit", "intruder", "--slice", "intruder.slice", "sleep", "infinity")
    vm.run("systemctl", "set-property", "--runtime", "intruder.slice", "AllowedCPUs=1-2")
    lost = until_graded(vm, number, "pinned")
    assert "intruder.slice" in lost["cores_reason"]
    vm.run("systemctl", "stop", "intruder.slice")
    until_graded(vm, number, "isolated")
    is_isolated()

    vm.run("vmanctl", "shutdown", "--force", number, timeout_s=PATIENCE_S)
    vm.run("vmanctl", "destroy", number)
    assert content(vm, f"{CGROUP}/cpuset.cpus.effective") == "0-3"
    assert vm.shell(f"ls -d {group}", check=False).status != 0


def test_limits_of_the_units_are_in_force(vm: Vm) -> None:
    for daemon in DAEMONS:
        group = f"{OURS}/{daemon}.service"
        # An eater would otherwise be slowed to a crawl, for hours, with the daemon, instead of ended.
        assert content(vm, f"{group}/memory.high") == "max"
        assert content(vm, f"{group}/pids.max") == shown(vm, daemon, "TasksMax") != "infinity"
        assert not content(vm, f"{group}/cpu.max").startswith("max"), daemon
        pid = shown(vm, daemon, "MainPID")
        assert "Seccomp:\t2\n" in content(vm, f"/proc/{pid}/status")
    for daemon in ("virtvmand", "deadlined"):
        limit = content(vm, f"{OURS}/{daemon}.service/memory.max")
        assert limit == shown(vm, daemon, "MemoryMax") != "infinity"
    # The memory of partitions counts there.
    for group in (OURS, f"{OURS}/vmand.service"):
        assert content(vm, f"{group}/memory.max") == content(vm, f"{group}/memory.high") == "max"
    assert content(vm, f"{OURS}/cpu.max") == "300000 100000"
    assert content(vm, f"{OURS}/pids.max") == shown(vm, "edgehold.slice", "TasksMax")


@pytest.mark.parametrize("daemon", ["virtvmand", "deadlined"])
def test_what_eats_memory_is_ended_and_starts_again(vm: Vm, daemon: str) -> None:
    """One more process of the unit takes all that it may have: what a daemon with a leak would do."""
    others = {one: shown(vm, one, "MainPID") for one in DAEMONS if one != daemon}
    pid, restarts = shown(vm, daemon, "MainPID"), int(shown(vm, daemon, "NRestarts"))
    eater = "kept = []\nwhile True: kept.append(b'x' * (1 << 20))"
    ended = vm.shell(joined(f"{OURS}/{daemon}.service", eater), check=False, timeout_s=MEMORY_S)
    assert ended.status == 137, ended
    vm.wait("sh", "-c", f"test $(systemctl show -P NRestarts {daemon}) -gt {restarts}", timeout_s=PATIENCE_S)
    vm.wait("systemctl", "is-active", daemon, timeout_s=PATIENCE_S)
    assert shown(vm, daemon, "MainPID") != pid
    assert "oom-kill" in journal(vm, daemon)
    assert {one: shown(vm, one, "MainPID") for one in others} == others


def test_what_forks_is_stopped(vm: Vm) -> None:
    forks = """
import os, signal
children = []
try:
    while len(children) < 1000:
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
except OSError as error:
    print(len(children), error.strerror)
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    most = int(shown(vm, "virtvmand", "TasksMax"))
    count, why = vm.shell(joined(f"{OURS}/virtvmand.service", forks)).output.strip().split(" ", 1)
    assert most - 8 <= int(count) < most
    assert why == "Resource temporarily unavailable"


def test_no_daemon_sends_to_a_network(vm: Vm) -> None:
    """vmand has the host's own network, for bridges: nothing of its unit gets a packet through."""
    send = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    try:
        one.sendto(b"x", ("127.0.0.1", 9))
    except PermissionError:
        print("refused")
    else:
        print("sent")
"""
    assert vm.shell(joined(f"{OURS}/vmand.service", send)).output == "refused\n"
    assert vm.run("python3", "-c", send).output == "sent\n"


def test_all_daemons_together_leave_a_core_to_the_host(vm: Vm) -> None:
    busy = "for one in 1 2 3 4; do (while :; do :; done) & done; wait"
    vm.run("systemd-run", "--slice", "edgehold.slice", "--unit", "together", "sh", "-c", busy)
    try:
        share = cpu_share(vm, OURS, 15)
    finally:
        vm.run("systemctl", "kill", "--signal", "KILL", "together")
    assert share < 3.1
    assert share > 1, "nothing was held back: the host gave the machine too little time"
    assert "nr_throttled 0\n" not in content(vm, f"{OURS}/cpu.stat")


def test_a_units_thread_is_held(vm: Vm, busy: str) -> None:
    told = json.loads(vm.run("deadlinectl", "--json", "attach", "--unit", busy, "--cap", "0.3").output)
    thread = shown(vm, busy, "MainPID")
    vm.wait("sh", "-c", f"chrt -p {thread} | grep SCHED_DEADLINE", timeout_s=PATIENCE_S)
    # It wants all that it may have.
    vm.wait("sh", "-c", f"chrt -p {thread} | grep 30000000/100000000/100000000", timeout_s=PATIENCE_S)
    vm.run("systemctl", "daemon-reload")
    assert "SCHED_DEADLINE" in vm.run("chrt", "-p", thread).output
    vm.run("deadlinectl", "detach", str(told["id"]))
    assert "SCHED_OTHER" in vm.run("chrt", "-p", thread).output


def test_a_units_limit_holds(vm: Vm, busy: str) -> None:
    group = f"{CGROUP}/system.slice/{busy}"
    assert cpu_share(vm, group, 5) > 0.3
    told = json.loads(vm.run("deadlinectl", "--json", "limit", "--unit", busy, "--cpus", "0.2").output)
    assert content(vm, f"{group}/cpu.max") == "20000 100000"
    # A limit only takes away: less than it is what the machine's host leaves.
    assert cpu_share(vm, group, 10) < 0.25
    vm.run("deadlinectl", "detach", str(told["id"]))
    assert content(vm, f"{group}/cpu.max").startswith("max ")


def test_a_firmwares_partitions_are_driven(vm: Vm, tmp_path: Path) -> None:
    """/dev/vmanager, by a module with a model of a firmware: the hardened unit opens it and what it makes."""
    vm.write("/root/vmanager_model.ko", build_module(tmp_path / "module").read_bytes())
    vm.run("systemctl", "stop", "vmand")
    vm.run("insmod", "/root/vmanager_model.ko")
    try:
        vm.run("systemctl", "start", "vmand", timeout_s=PATIENCE_S)
        number = vm.run("vmanctl", "create", "--cores", "1", "--memsize", "0.0625").output.strip()
        vm.run("vmanctl", "deploy", "--kernel", "/srv/guest/vmlinuz", "--cmdline", "vman.obey=100", number)
        told = partition(vm, number)
        assert (told["state"], told["accelerator"], told["cores_grade"]) == ("DEPLOYED", "firmware", "isolated"), told
        vm.run("test", "-c", f"/dev/vman{number}")
        vm.run("systemctl", "restart", "vmand", timeout_s=PATIENCE_S)
        assert partition(vm, number)["state"] == "DEPLOYED"
        for command, state in (("suspend", "SUSPENDED"), ("restore", "DEPLOYED"), ("shutdown", "READY")):
            vm.run("vmanctl", command, number)
            assert partition(vm, number)["state"] == state
        vm.run("vmanctl", "destroy", number)
    finally:
        vm.run("systemctl", "stop", "vmand")
        vm.run("rmmod", "vmanager_model")
        vm.run("systemctl", "start", "vmand", timeout_s=PATIENCE_S)
    # Not "Call Trace": the kernel prints one for each process that a memory limit ended, as tests before did.
    said = vm.shell("dmesg | grep -E 'BUG|WARNING|Oops'", check=False)
    assert said.output == ""
