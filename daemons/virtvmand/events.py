"""What libvirt's clients are told when a domain becomes another. Pure: tables and comparisons.

Two views of a domain are compared, and nothing else is asked: so the events after an outage of vmand are those of the
difference, whatever happened in between. Numbers are virDomainEventType and the details of each (libvirt-domain.h).
"""

from dataclasses import dataclass
from enum import IntEnum

from virtvmand import xmltree
from virtvmand.domain import CRASHED, SHUTDOWN, Domain, Guest
from virtvmand.domxml import Definition
from virtvmand.errors import LibvirtError


class What(IntEnum):
    """virDomainEventType, as far as it happens to partitions."""

    DEFINED = 0
    UNDEFINED = 1
    STARTED = 2
    SUSPENDED = 3
    RESUMED = 4
    STOPPED = 5
    SHUTDOWN = 6


ADDED, UPDATED, RENAMED_TO = 0, 1, 2
"""Details of DEFINED."""
REMOVED, RENAMED_FROM = 0, 1
"""Details of UNDEFINED."""
STOPPED_SHUTDOWN, STOPPED_DESTROYED, STOPPED_CRASHED = 0, 1, 2
"""Details of STOPPED."""
FIRST = 0
"""The only detail that we have of the others: booted, paused, unpaused, finished."""
DESCRIPTION, TITLE, ELEMENT = 0, 1, 2
"""Kinds of metadata (virDomainMetadataType)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """Something that happened to a domain; ``domain`` as clients are shown it with that."""

    domain: Domain


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle(Happening):
    """It was defined, began, ended …"""

    event: What
    detail: int = FIRST


@dataclass(frozen=True, slots=True, kw_only=True)
class Reboot(Happening):
    """Its guest began anew without an end of its virtual machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataChange(Happening):
    """Its title, its description or an element of its metadata (``uri``: of this namespace) is another."""

    kind: int
    uri: str | None = None


_GUEST: dict[tuple[Guest, Guest], tuple[What, ...]] = {
    (Guest.OFF, Guest.RUNS): (What.STARTED,),
    (Guest.OFF, Guest.STANDS): (What.STARTED, What.SUSPENDED),
    (Guest.RUNS, Guest.STANDS): (What.SUSPENDED,),
    (Guest.STANDS, Guest.RUNS): (What.RESUMED,),
}
"""What leads from one to the other; an end has reasons, see `_end`."""


def changes(old: Domain | None, new: Domain | None) -> tuple[Happening, ...]:
    """What happened between two views of one domain; None where it was not or is not there. In order."""
    if old is None:
        return () if new is None else (*_defined(new, ADDED), *_guest(Guest.OFF, new))
    gone = new is None
    now = old.ended() if new is None else new
    return (*_definition(old, now), *_lives(old, now), *_undefined(old, now, gone=gone))


def _definition(old: Domain, new: Domain) -> tuple[Happening, ...]:
    if not old.persistent:
        return _defined(new, ADDED)
    if not new.persistent:
        return ()
    if old.name != new.name:
        before = Lifecycle(domain=old, event=What.UNDEFINED, detail=RENAMED_FROM)
        return (before, *_defined(new, RENAMED_TO))
    if not old.defined_as_in(new):
        other = _other_metadata(old.config, new.config)
        if other is None:
            return _defined(new, UPDATED)
    else:
        other = ()
    return tuple(MetadataChange(domain=new, kind=kind, uri=uri) for kind, uri in _with_live(other, old, new))


def _with_live(
    other: tuple[tuple[int, str | None], ...], old: Domain, new: Domain
) -> tuple[tuple[int, str | None], ...]:
    """And what is another only in what the guest has."""
    if not (old.active and new.active) or old.runs_as_in(new):
        return other
    return tuple(dict.fromkeys((*other, *(_other_metadata(old.current, new.current) or ()))))


def _defined(domain: Domain, detail: int) -> tuple[Happening, ...]:
    return (Lifecycle(domain=domain, event=What.DEFINED, detail=detail),) if domain.persistent else ()


def _undefined(old: Domain, new: Domain, *, gone: bool) -> tuple[Happening, ...]:
    if old.persistent and (gone or not new.persistent):
        return (Lifecycle(domain=new, event=What.UNDEFINED, detail=REMOVED),)
    return ()


def _lives(old: Domain, new: Domain) -> tuple[Happening, ...]:
    if not old.active:
        return _guest(Guest.OFF, new)
    if not new.active:
        return _end(old, new)
    before, now = old.partition, new.partition
    if before.pid is not None and now.pid is not None and before.pid != now.pid:  # vmand was away in between
        stopped = Lifecycle(domain=old.ended(), event=What.STOPPED, detail=STOPPED_SHUTDOWN)
        return (stopped, *_guest(Guest.OFF, new))
    again = (Reboot(domain=new),) if before.boot_count != now.boot_count else ()
    return (*again, *_guest(old.guest, new))


def _guest(before: Guest, new: Domain) -> tuple[Happening, ...]:
    return tuple(Lifecycle(domain=new, event=what) for what in _GUEST.get((before, new.guest), ()))


def _end(old: Domain, new: Domain) -> tuple[Happening, ...]:
    match new.state[1]:
        case reason if reason == SHUTDOWN:  # the guest is off, and its virtual machine for one moment still there
            off = Lifecycle(domain=old, event=What.SHUTDOWN)
            return (off, Lifecycle(domain=new, event=What.STOPPED, detail=STOPPED_SHUTDOWN))
        case reason if reason == CRASHED:
            return (Lifecycle(domain=new, event=What.STOPPED, detail=STOPPED_CRASHED),)
    return (Lifecycle(domain=new, event=What.STOPPED, detail=STOPPED_DESTROYED),)


def _other_metadata(old: Definition, new: Definition) -> tuple[tuple[int, str | None], ...] | None:
    """Kinds and namespaces of metadata that are another; None where anything else is too, or nothing at all."""
    try:
        (rest, before), (new_rest, now) = _parts(old.xml), _parts(new.xml)
    except LibvirtError:
        return None
    if rest != new_rest:
        return None
    other = tuple(key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key))
    return other or None


def _parts(xml: str) -> tuple[tuple[bytes, ...], dict[tuple[int, str | None], tuple[bytes, ...]]]:
    """A document in pieces of its text: what is no metadata; metadata by kind and namespace."""
    document = xmltree.parse(xml, most=xmltree.MAX_OWN_BYTES)
    root, data = document.root, document.data
    rest = [data[root.begin : root.inner]]
    described: dict[tuple[int, str | None], tuple[bytes, ...]] = {}
    for child in root.children:
        kind = _KINDS.get(child.tag) if child.namespace is None else None
        if kind is None:
            rest.append(data[child.begin : child.end])
            continue
        for one in child.children if kind == ELEMENT else (child,):
            key = (kind, one.namespace if kind == ELEMENT else None)
            described[key] = (*described.get(key, ()), data[one.begin : one.end])
    return tuple(rest), described


_KINDS = {"description": DESCRIPTION, "title": TITLE, "metadata": ELEMENT}
