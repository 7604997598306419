"""State machines as data: a table of (command, state) -> next state, and the refusal for everything else.

The table is the single truth: services ask it before they act, tests walk every pair of it, documents are compared
with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from edgehold.errors import BadStateError

S = TypeVar("S", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Transitions(Generic[S]):
    """For each command the states in which it is allowed, and the state that it leads to (None: gone)."""

    what: str
    table: Mapping[str, tuple[frozenset[S], S | None]]

    def check(self, command: str, state: S, *, who: str = "") -> S | None:
        """The next state.

        Raises:
            BadStateError: the command is not allowed in this state; the text names the state and those that allow it.
        """
        allowed, target = self.table[command]
        if state in allowed:
            return target
        states = " or ".join(sorted(one.value for one in allowed))
        way = sorted(name for name, (start, end) in self.table.items() if state in start and end in allowed)
        hint = f" ({way[0]} leads there)" if way else ""
        raise BadStateError(f"{self.what}{who and ' ' + who} is {state.value}; {command} needs {states}{hint}")

    def allows(self, command: str, state: S) -> bool:
        """Whether the command is legal in this state."""
        return state in self.table[command][0]
