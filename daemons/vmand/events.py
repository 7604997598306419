"""Who wants to hear of which partition, and the events that they get."""

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from edgehold.api.vmand import Event, State
from edgehold.clock import Clock
from vmand.model import Record

NAME = "partition"


class Listener(Protocol):
    """A connection, as far as events go."""

    def send_event(self, name: str, data: object) -> None:
        """Queue an event; never waits."""


@dataclass(slots=True)
class _Wishes:
    """What one listener asked for: partition (None: all) -> whether its console too."""

    wanted: dict[int | None, bool] = field(default_factory=dict)

    def state(self, partition: int) -> bool:
        return None in self.wanted or partition in self.wanted

    def console(self, partition: int) -> bool:
        return self.wanted.get(partition, False) or self.wanted.get(None, False)


class Hub:
    """Hands events to listeners. A listener's wishes add up; asking again for the same changes nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._listeners: dict[Listener, _Wishes] = {}

    def subscribe(self, listener: Listener, partition: int | None, *, console: bool) -> bool:
        """Add a wish. Returns whether the listener is new here."""
        new = listener not in self._listeners
        wishes = self._listeners.setdefault(listener, _Wishes())
        wishes.wanted[partition] = console or wishes.wanted.get(partition, False)
        return new

    def forget(self, listener: Listener) -> None:
        """The listener went away."""
        self._listeners.pop(listener, None)

    def state(self, record: Record) -> None:
        """A partition came into a state."""
        state = State.BUSY if record.pending else record.state
        reason = record.pending or record.reason
        now = record.public()
        time_s = self._clock.wall_s()
        self._send(Event(kind="state", partition=record.id, time_s=time_s, state=state, reason=reason, now=now))

    def grade(self, record: Record) -> None:
        """What a partition has of its cores and its memory is another by now."""
        told = [f"cores: {record.cores_reason}"] if record.cores_reason else []
        told += [f"memory: {record.memory_reason}"] if record.memory_reason else []
        self._send(
            Event(
                kind="grade",
                partition=record.id,
                time_s=self._clock.wall_s(),
                reason="; ".join(told),
                cores_grade=record.cores_grade,
                memory_grade=record.memory_grade,
                now=record.public(),
            )
        )

    def annotated(self, record: Record) -> None:
        """Other annotations are kept with a partition; whoever wants them asks."""
        time_s = self._clock.wall_s()
        self._send(Event(kind="annotated", partition=record.id, time_s=time_s, now=record.public()))

    def gone(self, partition: int) -> None:
        """A partition was destroyed."""
        self._send(Event(kind="gone", partition=partition, time_s=self._clock.wall_s()))

    def console(self, partition: int, text: str) -> None:
        """A guest printed something."""
        self._send(Event(kind="console", partition=partition, time_s=self._clock.wall_s(), text=text))

    def _send(self, event: Event) -> None:
        line: msgspec.Raw | None = None
        for listener, wishes in list(self._listeners.items()):
            wanted = wishes.console if event.kind == "console" else wishes.state
            if wanted(event.partition):
                line = line or msgspec.Raw(msgspec.json.encode(event))  # once for all who listen
                listener.send_event(NAME, line)
