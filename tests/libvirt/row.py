"""A line that virsh is given and what it must say."""

from dataclasses import dataclass

QUIET = "11111111-2222-4333-8444-555555555555"
LIVELY = "22222222-2222-4333-8444-555555555555"
NEVER = "99999999-2222-4333-8444-555555555555"
HUNG_UP = r"End of file|Cannot recv|Broken pipe|keepalive|socket is closed|cause is unknown|^error: internal error"
"""What is never an answer."""
_NOT_ASKED = r"requires <|doesn't support option|unknown command|unexpected data"
"""virsh's own words for a line that says nothing to a server."""


@dataclass(frozen=True, slots=True)
class Row:
    """One command line.

    ``says``: patterns (re.MULTILINE) that must all be found in what virsh prints, stdout and stderr, with one space for
    many. ``lacks``: none of these may be.
    """

    line: str
    says: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    status: int | None = 0
    """None: versions of virsh differ in it."""
    keep: str = ""
    """What it prints stands for this name in later rows."""
    until: bool = False
    """It is asked again until it says so."""
    shown: tuple[str, str] = ("", "")
    """Before it, the guest of this name must have printed this (a pattern, re.DOTALL)."""
    read_only: bool = False


def ok(line: str, *says: str, lacks: tuple[str, ...] = (), keep: str = "", shown: tuple[str, str] = ("", "")) -> Row:
    """Does what it is asked for."""
    return Row(line, says, lacks, keep=keep, shown=shown)


def no(line: str, *says: str) -> Row:
    """Is refused, with a text that says why."""
    return Row(line, (r"^error: .{12,}", *says), (HUNG_UP, _NOT_ASKED), status=1)


def none(line: str) -> Row:
    """There is none: newer versions of virsh print nothing instead of our error."""
    return Row(line, (r"\A(error: metadata not found.*)?\Z",), status=None)


def soon(line: str, *says: str, lacks: tuple[str, ...] = ()) -> Row:
    """Does, after a while."""
    return Row(line, says, lacks, until=True)


def looking(row: Row) -> Row:
    """The same on a read-only connection."""
    return Row(row.line, row.says, row.lacks, row.status, read_only=True)
