"""What a host in use has: a guest that runs, definitions, and what deadlined holds; and how a test looks at them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from edgehold.testing.capability import guest_image
from tests.libvirt.virsh import definition
from tests.system.conftest import ARCH, SERVICES
from tests.system.house import ROOT, Machine, until

URI = "vman:///system"
STEADY, SPARE, WEB = "steady", "spare", "web"
"""A guest that runs, a partition at rest with a core of its own, and a domain of libvirt's that is off."""
JOB = "job.service"
"""A unit that deadlined holds."""
KERNEL, INITRD = "/srv/vmlinuz", "/srv/initramfs.gz"
_SERIAL = {"amd64": "ttyS0", "arm64": "ttyAMA0"}.get(ARCH, "ttyS0")
CMDLINE = f"console={_SERIAL} quiet no_timer_check tsc=reliable edgehold.job_ms=1 edgehold.period_ms=200"
_JOB_UNIT = """[Service]
ExecStart=/usr/bin/python3 -c 'import time\\nwhile True: time.sleep(0.02)'
[Install]
WantedBy=multi-user.target
"""
BOOT_S = 120.0
"""A guest's, under emulation on a busy host."""


def furnish(machine: Machine) -> None:
    """Bring all of it to a machine that has our packages."""
    kernel, initrd = guest_image(ROOT, ARCH)
    files: dict[str, Any] = {
        KERNEL: kernel,
        INITRD: initrd,
        f"/etc/systemd/system/{JOB}": _JOB_UNIT,
        "/srv/web.xml": definition(WEB, memory_mib=64),
        # No upgrade asks about files of the administrator's own.
        "/etc/edgehold/vmand.toml.d/local.toml": 'accelerator = "tcg"\n',
    }
    machine.put(files)
    machine.sh(f"""
        systemctl restart vmand
        systemctl enable --now {JOB}
        vmanctl create -cores 1 -memsize 0.0625 -name {SPARE}
        vmanctl start -cores 1 -memsize 0.125 -mode shared -name {STEADY} \\
            -kernel {KERNEL} -initrd {INITRD} -cmdline '{CMDLINE}'
        virsh -q -c {URI} define /srv/web.xml
        virsh -q -c {URI} desc {WEB} --config 'kept as an annotation'""")
    until(lambda: jobs(machine), what="the guest's job runs", timeout_s=BOOT_S)
    # Not before: a guest boots slowly within a small budget.
    machine.sh(f"""
        deadlinectl attach --unit {JOB} --weight 321 --cap 0.1 --budget-ms 5
        deadlinectl attach --partition {partition(machine, STEADY)["id"]} --cap 0.3 --budget-ms 10""")


def partitions(machine: Machine) -> dict[str, Mapping[str, Any]]:
    """What `vmanctl list` tells, by name."""
    return {one["name"]: one for one in json.loads(machine.run("vmanctl", "--json", "list").output)}


def partition(machine: Machine, name: str) -> Mapping[str, Any]:
    """One of them."""
    return partitions(machine)[name]


def attachments(machine: Machine) -> dict[int, Mapping[str, Any]]:
    """What `deadlinectl list` tells, by id."""
    return {one["id"]: one for one in json.loads(machine.run("deadlinectl", "--json", "list").output)}


def jobs(machine: Machine, name: str = STEADY) -> int:
    """The number of the last job that the guest has told of since vmand's start; 0 for none yet."""
    said = machine.run("vmanctl", "console", "--tail", name, check=False).output
    return max((int(one) for one in re.findall(r"edgehold-job n=(\d+) ", said)), default=0)


def domains(machine: Machine) -> dict[str, str]:
    """What libvirt's clients see: names and states."""
    lines = machine.run("virsh", "-q", "-c", URI, "list", "--all").output.splitlines()
    return {name: " ".join(state) for _, name, *state in (line.split() for line in lines if line.strip())}


def held(machine: Machine) -> None:
    """Wait until deadlined holds a thread of each target."""

    def all_held() -> bool:
        found = attachments(machine).values()
        return bool(found) and all(any(two["state"] == "held" for two in one["threads"]) for one in found)

    until(all_held, what="a thread of each attachment is held", timeout_s=60.0)


def settled(machine: Machine) -> None:
    """Our services are active, and nothing has failed."""
    machine.wait_active(*SERVICES)
    assert machine.system_state() == "running", machine.run("systemctl", "--failed", check=False).output


def versions(machine: Machine) -> set[str]:
    """Of our packages that are installed."""
    shown = machine.run("dpkg-query", "-W", "-f", "${Version} ${db:Status-Status}\n", "edgehold*").output
    return {line for line in shown.splitlines() if not line.endswith("not-installed")}
