"""What vmanctl prints for people. Pure: values in, text out."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import click

from edgehold.api.vmand import Check, DiskUse, Event, Mode, NicUse, Partition, Usage
from edgehold.cli import table

_LEVELS = {"missing": "red", "limited": "yellow", "good": "green"}
"""What a person looks for first stands first."""
_LIST = ("ID", "NAME", "STATE", "MODE", "CORES", "GIB", "MEMORY", "REASON")
# What is a text of several lines, below the table of the rest.
_BLOCK = "last_output"
_NARROWEST = 40


def said(one: Partition) -> str:
    """What became of it, in a line."""
    reason = f" ({one.reason})" if one.reason else ""
    return f"partition {one.id}: {one.state.value}{reason}"


def partitions(found: Sequence[Partition]) -> str:
    """A row for each."""
    return table(_LIST, [_row(one) for one in found])


def _row(one: Partition) -> list[object]:
    state = f"{one.state.value} ({one.command})" if one.command else one.state.value
    grade = one.memory_grade.value if one.memory_grade else "-"
    return [one.id, one.name, state, one.mode.value, _cores(one), f"{one.memory_bytes / 2**30:.2f}", grade,
            one.reason or "-"]  # fmt: skip


def _cores(one: Partition) -> str:
    """Which cores and how far they are its own; how many, where it has none of its own."""
    if one.mode is Mode.SHARED:
        return f"any {one.cores}"
    return " ".join(filter(None, [ranges(one.cpus), one.cores_grade.value if one.cores_grade else ""]))


def ranges(cores: Iterable[int]) -> str:
    """``1-3,5``, as the kernel writes lists of CPUs."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def details(value: Any) -> str:
    """Every field of a message of vmand's, a row each."""
    names = [one for one in value.__struct_fields__ if one != _BLOCK]
    text = table(["FIELD", "VALUE"], [[name, _shown(name, getattr(value, name))] for name in names])
    block = getattr(value, _BLOCK, "")
    return f"{text}\n\nits last output:\n{textwrap.indent(block, '  ')}" if block else text


def _shown(name: str, value: object) -> str:
    """A field for people: nothing is a dash, bytes are also in the unit that they were asked for in."""
    if isinstance(value, tuple):
        value = ranges(value) if all(isinstance(one, int) for one in value) else ", ".join(map(str, value))
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value} ({value / 2**30:.2f} GiB)" if value >= 2**30 else f"{value} ({value // 2**20} MiB)"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "-" if value is None or value == "" else str(value)


def usage(found: Usage) -> str:
    """A column for each device: disks first, then network interfaces."""
    tables = (_columns("DISK", found.disks), _columns("NIC", found.nics))
    return "\n\n".join(filter(None, tables)) or "no disks and no network interfaces"


def _columns(what: str, devices: Sequence[DiskUse] | Sequence[NicUse]) -> str:
    if not devices:
        return ""
    rows = [[name, *(_count(getattr(one, name)) for one in devices)] for name in devices[0].__struct_fields__]
    return table([what, *map(str, range(len(devices)))], rows)


def _count(value: object) -> str:
    return "-" if value is None else _plain(str(value))


def event(one: Event) -> str:
    """A line, or a line for each that the guest printed: partition, kind, and what is to be said of it."""
    head = f"{one.partition} {one.kind}"
    if one.kind == "console":
        # A guest's text must not look like a line of ours, nor command the terminal.
        return "\n".join(f"{head} {_plain(line)}".rstrip() for line in one.text.splitlines())
    grades = [("cores", one.cores_grade), ("memory", one.memory_grade)]
    told = [f"{what} {grade.value}" for what, grade in grades if grade]
    parts = [head, one.state.value if one.state else "", ", ".join(told), one.reason]
    return " ".join(filter(None, parts))


def _plain(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text)


def findings(found: Sequence[Check], *, width: int | None, colour: bool) -> str:
    """doctor's findings by level, what is missing first; a cure stands below its finding.

    ``width``: columns into which they are broken; None: a finding is a line.
    """
    level_width = max(map(len, _LEVELS))
    subject_width = max((len(one.subject) for one in found), default=0)
    indent = " " * (level_width + subject_width + 4)
    lines: list[str] = []
    for level, name in _LEVELS.items():
        for one in (one for one in found if one.level == level):
            shown = click.style(f"{level:{level_width}}", fg=name) if colour else f"{level:{level_width}}"
            texts = [one.found, *([f"cure: {one.cure}"] if one.cure else [])]
            broken = [part for text in texts for part in _broken(text, width, len(indent))]
            lines.append(f"{shown}  {one.subject:{subject_width}}  {broken[0]}")
            lines.extend(f"{indent}{part}" for part in broken[1:])
    return "\n".join(lines)


def _broken(text: str, width: int | None, indent: int) -> list[str]:
    if width is None:
        return [text]
    room = max(width - indent, _NARROWEST)
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
