"""What a domain is and does."""

from edgehold.kernel.procfs import GoneError
from virtvmand.call import Client
from virtvmand.domain import LIVE as LIVE_XML
from virtvmand.domain import Domain
from virtvmand.driver.context import Context
from virtvmand.errors import Code, LibvirtError
from virtvmand.guestinfo import CpuTimes
from virtvmand.xdr import Domain as Named
from virtvmand.xdr import Layout, layout

SECURE = 1
"""Flag of domain_get_xml_desc."""
_STATE = layout("state:i32 reason:i32")
_INFO: Layout = layout("state:u32 maxMem:u64 memory:u64 nrVirtCpu:u32 cpuTime:u64")
_NO_JOB = (0,) * 12
LIVE, CONFIG = 1, 2
"""Flags of many calls (virDomainModificationImpact): what the guest has; what the next start takes. Neither: the former
where a guest runs, else the latter."""


def kib(domain: Domain) -> int:
    """A domain's memory as libvirt counts it."""
    return domain.partition.memory_bytes // 1024


def cpu_time_ns(domain: Domain, times: CpuTimes) -> int:
    """CPU time of the guest's process since its start; 0 where none runs, as libvirt has it."""
    pid = domain.partition.pid
    if not domain.active or pid is None:
        return 0
    try:
        return times.of(pid)
    except GoneError:
        return 0


def must_be_active(domain: Domain) -> None:
    """Refuse what needs a guest.

    Raises:
        LibvirtError: none runs.
    """
    if not domain.active:
        raise LibvirtError(Code.OPERATION_INVALID, f"domain '{domain.name}' is not running")


class Look:
    """Questions about one domain that memory and /proc answer."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._find = context.find
        self._times = context.times

    def domain_get_state(self, _client: Client, dom: Named, _flags: int) -> bytes:
        return _STATE.encode(self._find(dom).state)

    def domain_get_info(self, _client: Client, dom: Named) -> bytes:
        one = self._find(dom)
        memory = kib(one)
        return _INFO.encode((one.state[0], memory, memory, one.partition.cores, cpu_time_ns(one, self._times)))

    def domain_get_xml_desc(self, client: Client, dom: Named, flags: int) -> tuple[str]:
        if flags & SECURE and client.read_only:
            raise LibvirtError(Code.OPERATION_DENIED, "a description with secrets: this connection may only look")
        return (self._find(dom).xml(flags),)

    def domain_is_active(self, _client: Client, dom: Named) -> tuple[int]:
        return (int(self._find(dom).active),)

    def domain_is_persistent(self, _client: Client, dom: Named) -> tuple[int]:
        return (int(self._find(dom).persistent),)

    def domain_is_updated(self, _client: Client, dom: Named) -> tuple[int]:
        one = self._find(dom)
        return (int(one.active and one.persistent and LIVE_XML in one.annotations),)

    def domain_get_os_type(self, _client: Client, dom: Named) -> tuple[str]:
        return (self._find(dom).current.os_type,)

    def domain_get_autostart(self, _client: Client, dom: Named) -> tuple[int]:
        return (int(self._find(dom).autostart),)

    def domain_has_managed_save_image(self, _client: Client, dom: Named, _flags: int) -> tuple[int]:
        self._find(dom)
        return (0,)

    def domain_get_messages(self, _client: Client, dom: Named, _flags: int) -> tuple[list[str]]:
        one = self._find(dom).partition
        told = [one.reason, *(f"cores are not isolated: {why}" for why in [one.cores_reason] if why)]
        return ([text for text in told if text],)

    def domain_get_control_info(self, _client: Client, dom: Named, _flags: int) -> tuple[int, int, int]:
        one = self._find(dom)
        must_be_active(one)
        return (1 if one.partition.command else 0, 0, 0)  # a job is under way, or none

    def domain_get_max_memory(self, _client: Client, dom: Named) -> tuple[int]:
        return (kib(self._find(dom)),)

    def domain_get_max_vcpus(self, _client: Client, dom: Named) -> tuple[int]:
        return (self._find(dom).partition.cores,)

    def domain_get_vcpus_flags(self, _client: Client, dom: Named, flags: int) -> tuple[int]:
        one = self._find(dom)
        if flags & LIVE:
            must_be_active(one)
        return (one.config.plan.cores if flags & CONFIG else one.partition.cores,)

    def domain_get_job_info(self, _client: Client, dom: Named) -> tuple[int, ...]:
        self._find(dom)
        return _NO_JOB

    def domain_snapshot_num(self, _client: Client, dom: Named, _flags: int) -> tuple[int]:
        self._find(dom)
        return (0,)

    def domain_list_all_snapshots(
        self, _client: Client, dom: Named, _need: int, _flags: int
    ) -> tuple[list[bytes], int]:
        self._find(dom)
        return ([], 0)
