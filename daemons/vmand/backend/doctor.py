"""What this host gives to partitions, why not more, and what would change it: facts in, findings out.

`gather` only reads /proc and /sys; `checks` is pure. What vmand itself found out (grades, accelerator, users) is told
by whoever calls, so that doctor never says other than ``capabilities`` and ``status``.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgehold.api.vmand import Check, CoresGrade, MemoryGrade
from vmand.backend import mounts, topology
from vmand.backend.hugepages import Pool, pools, size_text
from vmand.model import GIB, MIB
from vmand.placement import Topology, as_list

_ROOT = Path("/")
_RELEASE = re.compile(r"(\d+)\.(\d+)")
# From here on a cpuset below any cgroup can be a partition (cgroup-v2.rst, cpuset.cpus.exclusive).
_REMOTE_PARTITIONS = (6, 7)
_NOSWAP = (6, 4)  # tmpfs(5), noswap
_PACKAGES = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}
_HUGE = 2 * MIB
_BOOT = ("isolcpus", "nohz_full", "rcu_nocbs", "irqaffinity")
Level = Literal["good", "limited", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the host. The first half is `gather`'s, the second is what vmand itself found or was told."""

    release: str = ""
    """The kernel's, as uname(2) has it."""
    cmdline: str = ""
    """The kernel's command line."""
    topology: Topology = field(default_factory=lambda: Topology(siblings={}, node={}))
    boot_isolated: frozenset[int] = frozenset()
    """isolcpus=, as the kernel took it."""
    nohz_full: frozenset[int] = frozenset()
    cgroup2: str = ""
    """Where cgroup v2 is mounted; empty: nowhere."""
    cpuset2: bool = False
    """Its root has the cpuset controller."""
    cpuset1: bool = False
    """cgroup v1 has the cpuset controller, which v2 then can't have."""
    pools: tuple[Pool, ...] = ()
    hugetlbfs: tuple[str, ...] = ()
    """Where one is mounted."""
    swaps: tuple[str, ...] = ()
    devices: frozenset[str] = frozenset()
    """Those of `DEVICES` that exist."""
    interfaces: frozenset[str] = frozenset()
    """Bridges that exist."""
    clocks: tuple[str, ...] = ()
    """The host's real-time clocks, as ``rtc0``."""

    pool: frozenset[int] = frozenset()
    """Cores for dedicated partitions."""
    cores_grade: CoresGrade = CoresGrade.SHARED
    cores_reason: str = ""
    memory_grade: MemoryGrade = MemoryGrade.PLAIN
    memory_reason: str = ""
    memory_dir: str = ""
    memory_free_bytes: int = 0
    hugepages: bool = True
    """The setting."""
    accelerator: str = ""
    accelerator_reason: str = ""
    archs: frozenset[str] = frozenset()
    """Guest architectures whose emulator is there."""
    systemd: bool = False
    """Guests become transient units."""
    systemd_reason: str = ""
    """Why not, if it is not that systemd does not run."""
    uid_first: int = 0
    """The setting; 0: guests run as vmand's own user."""
    users_reason: str = ""
    """Why QEMUs can't run as users of their own although the setting says so; empty: they do."""
    bridges: tuple[str, ...] = ()
    """The setting."""
    steer: bool = True
    """The setting."""
    steer_reason: str = ""
    """What of the interrupts and workqueues is moved and what could not be; empty while nothing is to be moved."""
    steer_failed: bool = False
    """Something could not be moved."""
    backend: str = "qemu"


DEVICES = ("/dev/kvm", "/dev/vhost-vsock", "/dev/net/tun")


def gather(root: Path = _ROOT) -> Facts:
    """What /proc and /sys below ``root`` tell.

    Raises:
        OSError: they can't be read.
        FailedError: sysfs names no cores.
    """
    proc, sysfs = root / "proc", root / "sys"
    mounted = mounts.mounts(proc / "self/mountinfo")
    unified = next((one.point for one in mounted if one.kind == "cgroup2"), "")
    controllers = _text(root / unified.lstrip("/") / "cgroup.controllers").split() if unified else []
    found = topology.read(sysfs / "devices/system")
    return Facts(
        release=_text(proc / "sys/kernel/osrelease"),
        cmdline=_text(proc / "cmdline"),
        topology=found,
        boot_isolated=topology.isolated_by_boot(sysfs / "devices/system"),
        nohz_full=topology.nohz_full(sysfs / "devices/system"),
        cgroup2=unified,
        cpuset2="cpuset" in controllers,
        cpuset1=any(one.kind == "cgroup" and "cpuset" in one.options for one in mounted),
        pools=tuple(pools(sysfs)),
        hugetlbfs=tuple(one.point for one in mounted if one.kind == "hugetlbfs"),
        swaps=mounts.active_swaps(proc / "swaps"),
        devices=frozenset(one for one in DEVICES if os.path.exists(root / one[1:])),  # noqa: PTH110 - a text
        interfaces=frozenset(one.parent.name for one in (sysfs / "class/net").glob("*/bridge")),
        clocks=tuple(sorted(one.name for one in (sysfs / "class/rtc").glob("rtc*"))),
    )


def checks(facts: Facts) -> list[Check]:
    """Every finding, in the order in which a person would look."""
    return [one for look in _LOOKS for one in look(facts)]


def _cores(facts: Facts) -> Iterable[Check]:
    pool = as_list(facts.pool)
    if not facts.pool:
        cure = "set pool.cores, on a host with at least two whole cores: core 0 and its SMT siblings stay with Linux"
        yield _check("cores", "missing", "no core can be given to a dedicated partition; mode shared works", cure)
        return
    if facts.cores_grade is CoresGrade.ISOLATED:
        how = "a cpuset of the vCPUs alone" if _kernel(facts) >= _REMOTE_PARTITIONS else "a cpuset of the whole guest"
        yield _check("cores", "good", f"cores {pool} can be isolated: {how} (Linux {facts.release})" + _why(facts))
        return
    found = f"cores {pool} can be {facts.cores_grade.value} but not isolated{_why(facts)}"
    yield _check("cores", "limited", found, _isolation_cure(facts))


def _why(facts: Facts) -> str:
    return f"; {facts.cores_reason}" if facts.cores_reason else ""


def _isolation_cure(facts: Facts) -> str:
    if facts.cpuset1:
        text = "boot with cgroup_no_v1=cpuset, so that cgroup v2 gets the cpuset controller"
        return text if facts.cgroup2 else f"{text}, and mount cgroup2 on /sys/fs/cgroup"
    if not facts.cgroup2:
        return "mount cgroup2 on /sys/fs/cgroup (systemd.unified_cgroup_hierarchy=1 on the kernel's command line)"
    if not facts.cpuset2:
        return "a kernel with CONFIG_CPUSETS, or let this container's host pass the cpuset controller on"
    return "see the reason"


def _boot(facts: Facts) -> Iterable[Check]:
    """Parameters of the kernel's command line (Documentation/admin-guide/kernel-parameters.txt)."""
    if not facts.pool:
        return
    pool = as_list(facts.pool)
    rest = as_list(facts.topology.online - facts.pool) or "0"
    given = {name: value for name, _equals, value in (word.partition("=") for word in facts.cmdline.split())}
    wanted = {"nohz_full": pool, "rcu_nocbs": pool, "irqaffinity": rest}
    if facts.cores_grade is not CoresGrade.ISOLATED:
        wanted = {"isolcpus": pool, **wanted}
    seen = [f"{name}={given[name]}" for name in _BOOT if name in given]
    missing = [f"{name}={value}" for name, value in wanted.items() if not _covers(given.get(name, ""), name, value)]
    found = (
        f"the kernel was started with {' '.join(seen)}"
        if seen
        else f"the kernel was started without {', '.join(_BOOT)}"
    )
    if "nohz_full" in given and not facts.nohz_full >= facts.pool:
        found += f"; it took nohz_full for cores {as_list(facts.nohz_full) or 'none'}"
    if facts.boot_isolated and facts.cores_grade is CoresGrade.ISOLATED:
        found += f"; isolcpus= takes cores {as_list(facts.boot_isolated)} from shared partitions for ever: not needed"
    if not missing:
        yield _check("boot", "good", found)
        return
    found += "; timer ticks, RCU callbacks and interrupts at boot may disturb dedicated cores"
    cure = f"on the kernel's command line: {' '.join(missing)}"
    if facts.cores_grade is not CoresGrade.ISOLATED:
        cure += " (isolcpus only where the cores can't be isolated otherwise: shared partitions lose them for ever)"
    yield _check("boot", "limited", found, cure)


def _covers(value: str, name: str, wanted: str) -> bool:
    """Whether a list of cores, perhaps after isolcpus' flags, holds all that is wanted; irqaffinity's no more."""
    if value == "all":  # cpu lists, Documentation/admin-guide/kernel-parameters.rst
        return name != "irqaffinity"
    cores, wish = _list(value), _list(wanted)
    return bool(cores) and (cores <= wish if name == "irqaffinity" else wish <= cores)


def _list(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first.isdigit() and len(part) <= 11 and (last.isdigit() or not dash):
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _smt(facts: Facts) -> Iterable[Check]:
    groups = sorted({one for one in facts.topology.siblings.values() if len(one) > 1}, key=min)
    if not groups:
        yield _check("smt", "good", "each core is a whole one: nothing shares it")
        return
    found = f"cores share SMT cores ({' '.join(as_list(one) for one in groups[:8])}{' …' if len(groups) > 8 else ''})"
    found += "; only whole ones are given, but the vCPUs on one still slow each other"
    yield _check("smt", "limited", found, "nosmt on the kernel's command line, at the price of half the cores")


def _numa(facts: Facts) -> Iterable[Check]:
    nodes: dict[int, set[int]] = {}
    for core in facts.pool:
        nodes.setdefault(facts.topology.node.get(core, 0), set()).add(core)
    if len(set(facts.topology.node.values())) < 2:
        yield _check("numa", "good", "one memory node: all memory is as near")
        return
    each = ", ".join(f"node {node}: cores {as_list(cores)}" for node, cores in sorted(nodes.items()))
    largest = max((len(cores) for cores in nodes.values()), default=0)
    found = f"several memory nodes ({each or 'no core of the pool'}); a dedicated partition has its cores on one"
    yield _check("numa", "good", f"{found}, so at most {largest}, and its memory there if there is room")


def _memory(facts: Facts) -> Iterable[Check]:
    reason = f": {facts.memory_reason}" if facts.memory_reason else ""
    found = f"a new partition's memory is {facts.memory_grade.value} at best{reason}"
    level: Level = "good" if facts.memory_grade is MemoryGrade.HUGETLB else "limited"
    cures = [] if level == "good" else list(_huge_cures(facts))
    if facts.swaps and facts.memory_grade is not MemoryGrade.HUGETLB:
        where = f", or a tmpfs mounted with noswap on {facts.memory_dir}" if _kernel(facts) >= _NOSWAP else ""
        cures.append(f"against swapping: swapoff -a{where}")
    yield _check("memory", level, f"{found}; {_pools(facts)}; {_swap(facts)}", "; ".join(cures))


def _huge_cures(facts: Facts) -> Iterable[str]:
    if not facts.pools:
        yield "a kernel with CONFIG_HUGETLBFS"
        return
    if not facts.hugepages:
        yield "hugepages = true in the settings"
    if not any(one.free for one in facts.pools):
        # Half of what could be given: the rest stays for guests with other sizes and for the host.
        count = max(facts.memory_free_bytes // 2 // GIB * GIB // _HUGE, 64)
        total = next((one.total for one in facts.pools if one.page_bytes == _HUGE), 0)
        yield f"sysctl vm.nr_hugepages={total + count}, or hugepages={total + count} on the kernel's command line"
    if not facts.hugetlbfs:
        yield "mount -t hugetlbfs -o mode=0755 none /dev/hugepages"


def _pools(facts: Facts) -> str:
    if not facts.pools:
        return "this kernel has no huge pages"
    each = ", ".join(f"{one.free} of {one.total} pages of {size_text(one.page_bytes)} are free" for one in facts.pools)
    where = f"hugetlbfs on {', '.join(facts.hugetlbfs)}" if facts.hugetlbfs else "no hugetlbfs is mounted"
    return f"{each}, {where}"


def _swap(facts: Facts) -> str:
    return f"swap is in use: {', '.join(facts.swaps)}" if facts.swaps else "no swap is in use"


def _kvm(facts: Facts) -> Iterable[Check]:
    reason = f": {facts.accelerator_reason}" if facts.accelerator_reason else ""
    if facts.accelerator == "kvm":
        yield _check("kvm", "good", f"guests run with KVM{reason}")
        return
    if "/dev/kvm" not in facts.devices:
        cure = "a host whose CPU can virtualise, with that switched on in its firmware, and the kvm module"
    elif facts.accelerator_reason.startswith("set by"):
        cure = "accelerator = auto in the settings"
    else:
        cure = "a host that runs on the bare machine, or one with nested virtualisation"
    yield _check("kvm", "limited", f"guests are emulated{reason}; they are slower by an order of magnitude", cure)


def _qemu(facts: Facts) -> Iterable[Check]:
    for arch, package in _PACKAGES.items():
        if arch in facts.archs:
            yield _check(f"qemu-{arch}", "good", f"guests for {arch} can run")
        else:
            cure = f"apt-get install {package}, or name its path in the settings"
            yield _check(f"qemu-{arch}", "missing", f"no emulator for {arch}: such a kernel is refused", cure)


def _systemd(facts: Facts) -> Iterable[Check]:
    if facts.systemd:
        yield _check("systemd", "good", "each guest is a transient unit (systemctl list-units 'vmand-p-*')")
        return
    why = facts.systemd_reason or "systemd does not run here"
    found = f"guests are detached processes, not units: {why}; no resource accounting of systemd's"
    yield _check("systemd", "limited", found, "a host whose first process is systemd, and launcher = auto")


def _user(facts: Facts) -> Iterable[Check]:
    if facts.uid_first and not facts.users_reason:
        found = f"each guest's process is a user of its own, from uid {facts.uid_first} on"
        yield _check("user", "good", found)
        return
    why = facts.users_reason or "uid_first is 0 in the settings"
    found = f"guests' processes run as vmand's own user: {why}; one that breaks out of QEMU is that user"
    yield _check("user", "limited", found, "run vmand as root, with a range of uids that nobody has (uid_first)")


def _vsock(facts: Facts) -> Iterable[Check]:
    if "/dev/vhost-vsock" in facts.devices:
        yield _check("vsock", "good", "guests can have a vsock address")
        return
    cure = "modprobe vhost_vsock (CONFIG_VHOST_VSOCK), and again at each boot: /etc/modules-load.d"
    yield _check("vsock", "missing", "no /dev/vhost-vsock: deploy with vsock is refused", cure)


def _network(facts: Facts) -> Iterable[Check]:
    if not facts.bridges:
        found = "the settings name no bridge: a guest with a network interface is refused"
        yield _check(
            "network", "missing", found, 'bridges = ["br0"] in the settings, after: ip link add br0 type bridge'
        )
        return
    if "/dev/net/tun" not in facts.devices:
        yield _check("network", "missing", "no /dev/net/tun: network interfaces are refused", "modprobe tun")
        return
    # A pattern is for bridges that come and go, as Neutron's.
    names = [one for one in facts.bridges if not set(one) & set("*?[")]
    if absent := [one for one in names if one not in facts.interfaces]:
        cure = "; ".join(f"ip link add {one} type bridge && ip link set {one} up" for one in absent)
        level: Level = "missing" if len(absent) == len(facts.bridges) else "limited"
        yield _check("network", level, f"no such bridge: {', '.join(absent)} (bridges in the settings)", cure)
        return
    yield _check("network", "good", f"guests can be put into {', '.join(facts.bridges)}")


def _interrupts(facts: Facts) -> Iterable[Check]:
    if not facts.pool:
        return
    if not facts.steer:
        found = "interrupts are left where they are, also on dedicated cores"
        yield _check("interrupts", "limited", found, "steer = true in the settings")
        return
    said = facts.steer_reason or "interrupts and unbound kernel work leave the cores of deployed dedicated partitions"
    if facts.steer_failed:
        cure = f"irqaffinity={as_list(facts.topology.online - facts.pool) or '0'} on the kernel's command line"
        yield _check("interrupts", "limited", said, cure)
        return
    yield _check("interrupts", "good", said)


def _secure(facts: Facts) -> Iterable[Check]:
    if facts.backend == "vmanager":
        yield _check("secure", "good", "the firmware decides which partitions are secure")
        return
    found = "QEMU has no secure world: a secure partition is refused, never pretended"
    yield _check("secure", "missing", found, "a board whose firmware makes partitions (vmanager_device)")


def _rtc(facts: Facts) -> Iterable[Check]:
    if facts.clocks:
        yield _check("rtc", "good", f"the host has a real-time clock ({facts.clocks[0]}), guests begin with its time")
        return
    found = "the host has no real-time clock: after a start its time, and that of guests, is wrong until it is set"
    yield _check(
        "rtc", "limited", found, "a clock with a battery, or set the time before vmand starts (time-sync.target)"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _kernel(facts: Facts) -> tuple[int, int]:
    found = _RELEASE.match(facts.release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _check(subject: str, level: Level, found: str, cure: str = "") -> Check:
    return Check(subject=subject, level=level, found=found, cure=cure)


_LOOKS: tuple[Callable[[Facts], Iterable[Check]], ...] = (
    _cores,
    _boot,
    _smt,
    _numa,
    _interrupts,
    _memory,
    _kvm,
    _qemu,
    _systemd,
    _user,
    _network,
    _vsock,
    _secure,
    _rtc,
)
