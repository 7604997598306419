"""A domain as libvirt's clients see it, made of a partition and of what virtvmand annotated to it.

Immutable: what changes makes a successor, which keeps what need not be computed again and knows from its predecessor
why the guest is in its state. Pure: no I/O, no await; it must not know how the partition came here.
"""

import logging
from collections.abc import Mapping
from enum import Enum
from functools import cached_property
from typing import NamedTuple
from uuid import UUID

import msgspec

from edgehold.api.vmand import Partition, State
from virtvmand import domxml
from virtvmand.domxml import Definition
from virtvmand.errors import Code, LibvirtError
from virtvmand.xdr import encoded_domain

log = logging.getLogger(__name__)

# Annotations: what vmand keeps for us with a partition.
XML = "libvirt.xml"
"""The persistent definition: what the next start takes."""
LIVE = "libvirt.live"
"""The definition of the guest that runs, where it is another; of a transient domain the only one."""
TRANSIENT = "libvirt.transient"
AUTOSTART = "libvirt.autostart"
YES = "yes"

RUNNING, PAUSED, SHUT_OFF = 1, 3, 5
"""virDomainState, as far as a partition can be in it."""
BOOTED, UNPAUSED = 1, 5
"""Reasons of RUNNING (virDomainRunningReason)."""
BY_USER = 1
"""Reason of PAUSED."""
UNKNOWN, SHUTDOWN, DESTROYED, CRASHED = 0, 1, 2, 3
"""Reasons of SHUT_OFF (virDomainShutoffReason)."""

XML_SECURE, XML_INACTIVE, XML_UPDATE_CPU, XML_MIGRATABLE = 1, 2, 4, 8
"""virDomainXMLFlags. There are no secrets in our texts, and CPU and devices are the same everywhere."""
_XML_FLAGS = XML_SECURE | XML_INACTIVE | XML_UPDATE_CPU | XML_MIGRATABLE

_SHUTDOWN = "shutdown"
_UNDER_WAY = {"suspend": RUNNING, "reboot": RUNNING, "restore": PAUSED, _SHUTDOWN: RUNNING}
"""What a domain is while vmand carries out a command on it; with any other it is shut off."""
_LASTING = 6
# So much of what a definition without a text is made of stays when its guest comes and goes.
_KEPT_METADATA = 8
_BY_FORCE = "ended by force"
# How vmand's reason begins where a guest did not obey the button. Were it another, such an end would only be taken for
# one in order.


class Guest(Enum):
    """What a guest does, as its life cycle's events tell it."""

    OFF = "off"
    RUNS = "runs"
    STANDS = "stands"
    """Its CPUs are stopped."""


class _Life(NamedTuple):
    state: int
    reason: int
    stands: bool
    ran: int
    """The last reason of RUNNING: a guest that did not obey the button goes on as it was."""


class Domain:
    """One domain at one moment."""

    def __init__(
        self,
        partition: Partition,
        annotations: Mapping[str, str],
        *,
        before: "Domain | None" = None,
        destroyed: bool = False,
    ) -> None:
        self.partition = partition
        self.annotations = annotations
        self.name = partition.name
        self._life = _life(partition, before, destroyed=destroyed)
        self.state = (self._life.state, self._life.reason)
        """virDomainState and its reason."""
        self.active = self._life.state != SHUT_OFF
        """Whether it has a guest."""
        self.id = partition.id if self.active else -1
        self.persistent = annotations.get(TRANSIENT) != YES
        self.autostart = annotations.get(AUTOSTART) == YES
        self._texts: dict[bool, str] = {}
        self._metadata: dict[tuple[int, str | None, bool], str] = {}
        # Reading a definition costs a millisecond: it is handed on as long as it would be read from the same.
        if before is not None:
            for kept in ("config", "current"):
                if kept in vars(before) and self._source(kept) == before._source(kept):  # noqa: SLF001 - its own kind
                    vars(self)[kept] = vars(before)[kept]

    def __repr__(self) -> str:
        return f"<Domain {self.name} {self.partition.uuid} state={self.state} id={self.id}>"

    @property
    def in_shutdown(self) -> bool:
        """Whether its guest is being asked to power off."""
        return self.active and self.partition.state is State.BUSY and self.partition.command == _SHUTDOWN

    @property
    def guest(self) -> Guest:
        """What its guest does."""
        if not self.active:
            return Guest.OFF
        return Guest.STANDS if self._life.stands else Guest.RUNS

    @cached_property
    def uuid(self) -> bytes:
        """16 bytes; the partition's own."""
        return UUID(self.partition.uuid).bytes

    @cached_property
    def ref(self) -> bytes:
        """Its name, uuid and id as the XDR structure that most answers and events hold."""
        return encoded_domain(self.name, self.uuid, self.id)

    @cached_property
    def config(self) -> Definition:
        """What the next start takes; of a transient domain what its guest has."""
        return self._read(self._text())

    @cached_property
    def current(self) -> Definition:
        """What the guest has; where there is none, `config`."""
        live = self.annotations.get(LIVE)
        return self.config if live is None or not self.active else self._read(live)

    def xml(self, flags: int = 0) -> str:
        """The document that a client is shown (virDomainGetXMLDesc).

        Raises:
            LibvirtError: INVALID_ARG; a flag that this version does not know.
        """
        if flags & ~_XML_FLAGS:
            raise LibvirtError(Code.INVALID_ARG, f"unsupported flags (0x{flags & ~_XML_FLAGS:x}) of the domain's XML")
        inactive = bool(flags & XML_INACTIVE) or not self.active
        if inactive not in self._texts:
            shown = self.config if inactive else self.current
            text = domxml.domain_xml(shown, self.partition, active=self.active, inactive_view=inactive)
            self._texts[inactive] = text
        return self._texts[inactive]

    def metadata(self, kind: int, uri: str | None, *, live: bool) -> str:
        """Title, description or an element of the guest's (``live``) or the next start's definition.

        Raises:
            LibvirtError: NO_DOMAIN_METADATA; there is none.
        """
        asked = (kind, uri, live)
        if asked not in self._metadata:
            text = domxml.metadata((self.current if live else self.config).xml, kind, uri)
            if len(self._metadata) >= _KEPT_METADATA:
                self._metadata.clear()
            self._metadata[asked] = text
        return self._metadata[asked]

    def successor(
        self,
        partition: Partition | None = None,
        annotations: Mapping[str, str] | None = None,
        *,
        destroyed: bool = False,
    ) -> "Domain":
        """What becomes of it; itself where nothing did. ``destroyed``: somebody ends its guest by force."""
        now = self.partition if partition is None else partition
        kept = self.annotations if annotations is None else annotations
        if now == self.partition and kept == self.annotations:
            return self
        return Domain(now, self.annotations if kept == self.annotations else kept, before=self, destroyed=destroyed)

    def ended(self) -> "Domain":
        """What becomes of it when its partition is gone."""
        return self.successor(msgspec.structs.replace(self.partition, state=State.READY, command=""), destroyed=True)

    def defined_as_in(self, other: "Domain") -> bool:
        """Whether both have one and the same definition, without reading it."""
        return self._source("config")[:_LASTING] == other._source("config")[:_LASTING]  # noqa: SLF001 - its own kind

    def runs_as_in(self, other: "Domain") -> bool:
        """Whether both guests have one and the same definition, without reading it."""
        return self._source("current")[:_LASTING] == other._source("current")[:_LASTING]  # noqa: SLF001

    def _text(self) -> str:
        xml = self.annotations.get(XML, "")
        return xml if self.persistent else self.annotations.get(LIVE, xml)

    def _source(self, which: str) -> tuple[object, ...]:
        """All that the definition is made from."""
        one = self.partition
        text = self.annotations.get(LIVE) if which == "current" and self.active else None
        if text is None:
            text = self._text()
        if text:
            return text, one.name
        lasting = (one.name, one.mode, one.cores, one.memory_bytes, one.secure, one.strict)
        return (*lasting, one.arch, one.vsock_cid)

    def _read(self, text: str) -> Definition:
        if text:
            try:
                one = domxml.known_definition(text)
                if one.plan.uuid == self.partition.uuid:
                    return _named(one, self.name)
                log.warning("domain %s: its definition is of no use, one is made of the partition", self.name)
            except LibvirtError as error:
                log.warning(
                    "domain %s: its definition is of no use, one is made of the partition: %s", self.name, error
                )
        return domxml.synthesized(self.partition)


def _named(one: Definition, name: str) -> Definition:
    """The definition with the name that the partition has: whoever uses vmand itself may have changed it.

    Its size may be another on purpose: what was defined while a guest ran counts from the next start.
    """
    return one if one.plan.name == name else domxml.known_definition(domxml.with_name(one.xml, name))


def _life(partition: Partition, domain: Domain | None, *, destroyed: bool) -> _Life:
    before = None if domain is None else domain._life  # noqa: SLF001 - part of its making
    was_off = before is None or before.state == SHUT_OFF
    state = _state(partition, was_off=before is not None and was_off)
    if state == RUNNING and partition.command == _SHUTDOWN and before is not None and before.stands:
        state = PAUSED  # as libvirt has it: a guest that is asked to power off is what it was, until it is off
    if state == SHUT_OFF:
        return _Life(state, _why_off(partition, before, destroyed=destroyed), stands=False, ran=UNKNOWN)
    if before is None or domain is None or was_off or domain.partition.boot_count != partition.boot_count:
        stands, ran = state == PAUSED, BOOTED
    else:
        stands = state == PAUSED
        ran = UNPAUSED if before.stands and state == RUNNING else before.ran
    return _Life(state, ran if state == RUNNING else BY_USER, stands, ran)


def _state(partition: Partition, *, was_off: bool) -> int:
    match partition.state:
        case State.DEPLOYED:
            return RUNNING
        case State.SUSPENDED:
            return PAUSED
        case State.BUSY:
            state = _UNDER_WAY.get(partition.command, SHUT_OFF)
            # What FAILED is shut down too, and has no guest. A back end without processes has no pid.
            has_guest = partition.pid is not None or (bool(partition.arch) and not was_off)
            return state if has_guest or partition.command != _SHUTDOWN else SHUT_OFF
    return SHUT_OFF


def _why_off(partition: Partition, before: _Life | None, *, destroyed: bool) -> int:
    if partition.state is State.FAILED:
        return CRASHED
    if before is None:
        return UNKNOWN
    if before.state == SHUT_OFF:
        return before.reason
    by_force = destroyed or partition.command == "destroy-partition" or partition.reason.startswith(_BY_FORCE)
    return DESTROYED if by_force else SHUTDOWN
