"""Events: who wants to hear of what, and what they are told."""

import itertools
from collections.abc import Callable, Iterable

from virtvmand.call import Client, Subscription
from virtvmand.connection import MAX_CALLBACKS
from virtvmand.errors import Code, LibvirtError
from virtvmand.events import Happening, Lifecycle, MetadataChange, Reboot
from virtvmand.table import NUMBERS, PROCEDURES
from virtvmand.xdr import Domain as Named

# virDomainEventID: the kinds that happen to partitions. Clients may ask for any other and never hear of it.
_LIFECYCLE, _REBOOT, _METADATA_CHANGE = 0, 1, 23
_MOST_EVENTS = 64


class Tell:
    """Registrations, and the messages themselves. ``clients``: those that are connected now."""

    def __init__(self, clients: Callable[[], Iterable[Client]]) -> None:
        self._clients = clients
        self._numbers = itertools.count(1)

    def connect_domain_event_callback_register_any(self, client: Client, event: int, dom: Named | None) -> tuple[int]:
        if not 0 <= event < _MOST_EVENTS:
            raise LibvirtError(Code.INVALID_ARG, f"event: there is no kind {event}")
        number = self._register(client, Subscription(event, None if dom is None else dom.uuid))
        return (number,)

    def connect_domain_event_callback_deregister_any(self, client: Client, number: int) -> None:
        if client.callbacks.pop(number, None) is None:
            raise LibvirtError(Code.INVALID_ARG, f"callback: there is no {number} on this connection")

    def connect_node_device_event_register_any(self, client: Client, event: int, _device: object) -> tuple[int]:
        return (self._register(client, Subscription(-1 - event, None)),)

    connect_secret_event_register_any = connect_node_device_event_register_any

    def happened(self, happening: Happening) -> None:
        """Tell everybody who asked for it."""
        event, procedure, values = _message(happening)
        uuid, rest = happening.domain.uuid, b""
        for client in list(self._clients()):
            for number, wish in client.callbacks.items():
                if wish.event == event and wish.domain in {None, uuid}:
                    # Only the number differs, which comes first.
                    rest = rest or PROCEDURES[procedure].returns.encode((0, happening.domain.ref, *values))[4:]
                    client.send_event(procedure, number.to_bytes(4, "big") + rest)

    def _register(self, client: Client, wish: Subscription) -> int:
        if len(client.callbacks) >= MAX_CALLBACKS:
            raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_CALLBACKS} callbacks are registered; take one back first")
        if (
            wish.event >= 0 and wish in client.callbacks.values()
        ):  # libvirt's library registers once for all who want it
            raise LibvirtError(Code.INVALID_ARG, f"event {wish.event}: registered on this connection already")
        number = next(self._numbers)
        client.callbacks[number] = wish
        return number


def _message(happening: Happening) -> tuple[int, int, tuple[object, ...]]:
    """Kind of event, procedure, and what follows callback and domain."""
    match happening:
        case Lifecycle(event=event, detail=detail):
            return _LIFECYCLE, NUMBERS["domain_event_callback_lifecycle"], (int(event), detail)
        case Reboot():
            return _REBOOT, NUMBERS["domain_event_callback_reboot"], ()
        case MetadataChange(kind=kind, uri=uri):
            return _METADATA_CHANGE, NUMBERS["domain_event_callback_metadata_change"], (kind, uri)
    raise TypeError(f"no event: {happening!r}")
