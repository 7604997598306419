"""What doctor finds in facts: each level, each cure, and the texts of files as the kernel writes them."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgehold.api.vmand import Check, CoresGrade, MemoryGrade
from vmand.backend import doctor
from vmand.backend.doctor import Facts
from vmand.backend.hugepages import Pool
from vmand.placement import Topology

MIB = 1 << 20
GIB = 1 << 30

FOUR = Topology(siblings={one: frozenset({one}) for one in range(4)}, node={})
BEST = Facts(
    release="6.12.9-1",
    cmdline="quiet nohz_full=1-3 rcu_nocbs=1-3 irqaffinity=0",
    topology=FOUR,
    nohz_full=frozenset({1, 2, 3}),
    cgroup2="/sys/fs/cgroup",
    cpuset2=True,
    pools=(Pool(page_bytes=2 * MIB, total=512, free=500),),
    hugetlbfs=("/dev/hugepages",),
    devices=frozenset(doctor.DEVICES),
    interfaces=frozenset({"br0"}),
    clocks=("rtc0",),
    pool=frozenset({1, 2, 3}),
    cores_grade=CoresGrade.ISOLATED,
    memory_grade=MemoryGrade.HUGETLB,
    memory_dir="/dev/shm/vmand",
    memory_free_bytes=8 * GIB,
    accelerator="kvm",
    accelerator_reason="a tiny guest ran",
    archs=frozenset({"x86_64", "aarch64"}),
    systemd=True,
    uid_first=1_900_000_000,
    bridges=("br0",),
)


def one(facts: Facts, subject: str) -> Check:
    return next(found for found in doctor.checks(facts) if found.subject == subject)


def test_a_host_that_can_do_everything() -> None:
    found = doctor.checks(BEST)
    assert [check.subject for check in found if check.level != "good"] == ["secure"]
    assert len({check.subject for check in found}) == len(found)
    assert all(check.found for check in found)
    assert not any(check.cure for check in found if check.level == "good")


def test_a_host_of_which_nothing_is_known() -> None:
    found = doctor.checks(Facts())
    assert all(check.cure for check in found if check.level != "good")
    assert one(Facts(), "cores").level == "missing"


@pytest.mark.parametrize(
    ("subject", "changed", "level", "said", "cure"),
    [
        ("cores", {"pool": frozenset()}, "missing", "no core can be given", "pool.cores"),
        ("cores", {"release": "6.1.0-56-cloud-amd64"}, "good", "a cpuset of the whole guest (Linux 6.1.0", ""),
        ("cores", {}, "good", "cores 1-3 can be isolated: a cpuset of the vCPUs alone", ""),
        (
            "cores",
            {"cores_grade": CoresGrade.PINNED, "cores_reason": "the cpuset is v1's", "cpuset1": True},
            "limited",
            "can be pinned but not isolated; the cpuset is v1's",
            "boot with cgroup_no_v1=cpuset, so that cgroup v2 gets the cpuset controller",
        ),
        ("cores", {"cores_grade": CoresGrade.PINNED, "cgroup2": ""}, "limited", "", "mount cgroup2"),
        ("cores", {"cores_grade": CoresGrade.PINNED, "cpuset2": False}, "limited", "", "CONFIG_CPUSETS"),
        ("boot", {}, "good", "started with nohz_full=1-3 rcu_nocbs=1-3 irqaffinity=0", ""),
        (
            "boot",
            {"cmdline": "quiet"},
            "limited",
            "without isolcpus, nohz_full",
            "on the kernel's command line: nohz_full=1-3 rcu_nocbs=1-3 irqaffinity=0",
        ),
        (
            "boot",
            {"cmdline": "nohz_full=1-3 irqaffinity=all rcu_nocbs=all", "pool": frozenset({2, 3})},
            "limited",
            "",
            "on the kernel's command line: irqaffinity=0-1",
        ),
        (
            "boot",
            {"cmdline": "", "cores_grade": CoresGrade.PINNED, "pool": frozenset({3})},
            "limited",
            "",
            "isolcpus=3 nohz_full=3 rcu_nocbs=3 irqaffinity=0-2 (isolcpus only where",
        ),
        (
            "boot",
            {"cmdline": "isolcpus=domain,managed_irq,1-3 nohz_full=1-3 rcu_nocbs=1-3 irqaffinity=0"}
            | {"cores_grade": CoresGrade.PINNED},
            "good",
            "isolcpus=domain,managed_irq,1-3",
            "",
        ),
        ("boot", {"nohz_full": frozenset()}, "good", "it took nohz_full for cores none", ""),
        ("boot", {"boot_isolated": frozenset({2})}, "good", "isolcpus= takes cores 2 from shared partitions", ""),
        (
            "smt",
            {"topology": Topology(siblings={0: frozenset({0, 1}), 1: frozenset({0, 1})}, node={})},
            "limited",
            "cores share SMT cores (0-1)",
            "nosmt",
        ),
        ("numa", {}, "good", "one memory node", ""),
        (
            "numa",
            {"topology": replace(FOUR, node={0: 0, 1: 0, 2: 1, 3: 1})},
            "good",
            "node 0: cores 1, node 1: cores 2-3); a dedicated partition has its cores on one, so at most 2",
            "",
        ),
        ("interrupts", {"steer": False}, "limited", "left where they are", "steer = true"),
        (
            "interrupts",
            {"steer_reason": "3 can't be moved", "steer_failed": True},
            "limited",
            "3 can't be moved",
            "irqaffinity=0",
        ),
        ("memory", {}, "good", "hugetlb at best; 500 of 512 pages of 2 MiB are free, hugetlbfs on /dev/hugepages", ""),
        (
            "memory",
            {"memory_grade": MemoryGrade.LOCKED, "memory_reason": "no huge pages: none is free"}
            | {"pools": (Pool(page_bytes=2 * MIB, total=100, free=0),), "hugetlbfs": ()},
            "limited",
            "locked at best: no huge pages: none is free; 0 of 100 pages of 2 MiB are free, no hugetlbfs is mounted",
            "sysctl vm.nr_hugepages=2148, or hugepages=2148 on the kernel's command line; mount -t hugetlbfs",
        ),
        (
            "memory",
            {"memory_grade": MemoryGrade.LOCKED, "hugepages": False, "swaps": ("/dev/sda2",)},
            "limited",
            "swap is in use: /dev/sda2",
            "hugepages = true in the settings; against swapping: swapoff -a, or a tmpfs mounted with noswap on ",
        ),
        (
            "memory",
            {"memory_grade": MemoryGrade.PLAIN, "pools": (), "swaps": ("/s",), "release": "6.1.0"},
            "limited",
            "this kernel has no huge pages",
            "a kernel with CONFIG_HUGETLBFS; against swapping: swapoff -a",
        ),
        ("kvm", {"accelerator": "tcg"}, "limited", "guests are emulated: a tiny guest ran", "nested virtualisation"),
        ("kvm", {"accelerator": "tcg", "devices": frozenset()}, "limited", "", "switched on in its firmware"),
        (
            "kvm",
            {"accelerator": "tcg", "accelerator_reason": "set by accelerator in the settings"},
            "limited",
            "",
            "accelerator = auto",
        ),
        ("qemu-x86_64", {"archs": frozenset()}, "missing", "x86_64", "apt-get install qemu-system-x86"),
        ("qemu-aarch64", {"archs": frozenset({"x86_64"})}, "missing", "aarch64", "apt-get install qemu-system-arm"),
        ("systemd", {"systemd": False}, "limited", "systemd does not run here", "launcher = auto"),
        ("systemd", {"systemd": False, "systemd_reason": "launcher is process"}, "limited", "launcher is process", ""),
        ("user", {}, "good", "from uid 1900000000 on", ""),
        ("user", {"uid_first": 0}, "limited", "uid_first is 0 in the settings", "uid_first"),
        ("user", {"users_reason": "vmand is not root"}, "limited", "own user: vmand is not root", "as root"),
        ("network", {"bridges": ()}, "missing", "name no bridge", 'bridges = ["br0"]'),
        ("network", {"devices": frozenset()}, "missing", "no /dev/net/tun", "modprobe tun"),
        ("network", {"interfaces": frozenset()}, "missing", "no such bridge: br0", "ip link add br0 type bridge"),
        ("network", {"bridges": ("br0", "qbr*")}, "good", "br0, qbr*", ""),
        ("network", {"bridges": ("br0", "lan")}, "limited", "no such bridge: lan", "ip link add lan type bridge"),
        ("vsock", {"devices": frozenset()}, "missing", "/dev/vhost-vsock", "modprobe vhost_vsock"),
        ("secure", {}, "missing", "no secure world", "vmanager_device"),
        ("secure", {"backend": "vmanager"}, "good", "the firmware decides", ""),
        ("rtc", {"clocks": ()}, "limited", "no real-time clock", "time-sync.target"),
    ],
)
def test_a_finding(subject: str, changed: dict[str, object], level: str, said: str, cure: str) -> None:
    found = one(replace(BEST, **changed), subject)  # type: ignore[arg-type]
    assert found.level == level
    assert said in found.found
    assert cure in found.cure
    assert bool(found.cure) or level == "good"


def test_without_a_pool_nothing_is_said_of_its_cores() -> None:
    subjects = {found.subject for found in doctor.checks(replace(BEST, pool=frozenset()))}
    assert not subjects & {"boot", "interrupts"}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


HOST = {
    "proc/self/mountinfo": (
        "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
        "32 23 0:29 / /dev/hugepages rw - hugetlbfs none rw,pagesize=2M\n"
        "33 23 0:30 / /c/cpuset rw - cgroup cgroup rw,cpuset\n"
    ),
    "proc/sys/kernel/osrelease": "6.12.1\n",
    "proc/cmdline": "quiet nohz_full=1\n",
    "proc/swaps": "Filename\n/dev/sda2 partition 1 0 -2\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu memory\n",
    "sys/devices/system/cpu/online": "0-1\n",
    "sys/devices/system/cpu/isolated": "1\n",
    "sys/devices/system/cpu/nohz_full": "(null)\n",
    "sys/devices/system/node/node0/cpulist": "0-1\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "8\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "7\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages": "1\n",
    "sys/class/net/br0/bridge/bridge_id": "x",
    "sys/class/net/eth0/address": "x",
    "sys/class/rtc/rtc0/name": "rtc_cmos",
    "dev/vhost-vsock": "",
}


def test_facts_are_read_from_the_kernel_s_files(tmp_path: Path) -> None:
    facts = doctor.gather(tree(tmp_path, HOST))
    assert facts.release == "6.12.1"
    assert facts.cmdline == "quiet nohz_full=1"
    assert facts.topology.online == {0, 1}
    assert facts.boot_isolated == {1}
    assert facts.nohz_full == frozenset()
    assert (facts.cgroup2, facts.cpuset2, facts.cpuset1) == ("/sys/fs/cgroup", True, True)
    assert facts.pools == (Pool(page_bytes=2 * MIB, total=8, free=6),)
    assert facts.hugetlbfs == ("/dev/hugepages",)
    assert facts.swaps == ("/dev/sda2",)
    assert facts.devices == {"/dev/vhost-vsock"}
    assert facts.interfaces == {"br0"}
    assert facts.clocks == ("rtc0",)


def test_this_host_can_be_read() -> None:
    facts = doctor.gather()
    assert facts.topology.online
    assert doctor.checks(facts)
