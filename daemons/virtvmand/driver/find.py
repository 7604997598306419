"""Which domains there are, and the kinds of objects of which there are none."""

from collections.abc import Callable, Iterable

from virtvmand.call import Client
from virtvmand.domain import Domain
from virtvmand.driver.context import Context

_Test = Callable[[Domain], bool]
# virConnectListAllDomainsFlags: tests of one group are alternatives, and each group that is asked for must hold.
_GROUPS: tuple[dict[int, _Test], ...] = (
    {1: lambda one: one.active, 2: lambda one: not one.active},
    {4: lambda one: one.persistent, 8: lambda one: not one.persistent},
    {
        16: lambda one: one.state[0] == 1,
        32: lambda one: one.state[0] == 3,
        64: lambda one: one.state[0] == 5,
        128: lambda one: one.state[0] not in {1, 3, 5},
    },
    {256: lambda _one: False, 512: lambda _one: True},  # a managed save image: there is none
    {1024: lambda one: one.autostart, 2048: lambda one: not one.autostart},
    {4096: lambda _one: False, 8192: lambda _one: True},  # snapshots
    {16384: lambda _one: False, 32768: lambda _one: True},  # checkpoints
)
_WORD = 4


def selected(domains: Iterable[Domain], flags: int) -> list[Domain]:
    """Those that a client's flags ask for."""
    wanted = [[test for flag, test in group.items() if flags & flag] for group in _GROUPS]
    tests = [group for group in wanted if group]
    return [one for one in domains if all(any(test(one) for test in group) for group in tests)]


class Find:
    """Lists and look-ups."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def connect_list_all_domains(self, _client: Client, need_results: int, flags: int) -> bytes:
        found = selected(self._context.mirror.all(), flags)
        count = len(found).to_bytes(_WORD, "big")
        if not need_results:
            return bytes(_WORD) + count
        return count + b"".join([one.ref for one in found]) + count

    def domain_lookup_by_id(self, _client: Client, domain_id: int) -> bytes:
        return self._context.mirror.by_id(domain_id).ref

    def domain_lookup_by_name(self, _client: Client, name: str) -> bytes:
        return self._context.mirror.by_name(name).ref

    def domain_lookup_by_uuid(self, _client: Client, uuid: bytes) -> bytes:
        return self._context.mirror.by_uuid(uuid).ref

    def connect_num_of_domains(self, _client: Client) -> tuple[int]:
        return (len(selected(self._context.mirror.all(), 1)),)

    def connect_list_domains(self, _client: Client, most: int) -> tuple[list[int]]:
        return ([one.id for one in selected(self._context.mirror.all(), 1)][: max(most, 0)],)

    def connect_num_of_defined_domains(self, _client: Client) -> tuple[int]:
        return (len(selected(self._context.mirror.all(), 2)),)

    def connect_list_defined_domains(self, _client: Client, most: int) -> tuple[list[str]]:
        return ([one.name for one in selected(self._context.mirror.all(), 2)][: max(most, 0)],)


class Absent:
    """Objects of other kinds: there are none, and none can come."""

    def connect_list_all_networks(self, _client: Client, _need: int, _flags: int) -> tuple[list[bytes], int]:
        return ([], 0)

    connect_list_all_storage_pools = connect_list_all_networks
    connect_list_all_interfaces = connect_list_all_networks
    connect_list_all_node_devices = connect_list_all_networks
    connect_list_all_nwfilters = connect_list_all_networks
    connect_list_all_secrets = connect_list_all_networks

    def node_num_of_devices(self, _client: Client, _cap: str | None, _flags: int) -> tuple[int]:
        return (0,)

    def node_list_devices(self, _client: Client, _cap: str | None, _most: int, _flags: int) -> tuple[list[str]]:
        return ([],)

    def connect_num_of_interfaces(self, _client: Client) -> tuple[int]:
        return (0,)
