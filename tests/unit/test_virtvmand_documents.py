"""docs/libvirt.md and virtvmand(8) say what the code does: settings, options, elements, states, refusals, limits."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgehold.api.vmand import Disk, Mode, Nic, Partition, State
from edgehold.service import daemon_arguments
from virtvmand import connection, keeper, server, xmltree
from virtvmand.config import Config
from virtvmand.definition import Plan, read_definition
from virtvmand.domain import Domain
from virtvmand.driver import refused, run
from virtvmand.elements import KEPT, REFUSED, USED

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "libvirt.md").read_text()
MANUAL = (DOCS / "man" / "virtvmand.8").read_text().replace("\\-", "-")
_KIB = 1024


def between(name: str) -> list[str]:
    """The lines of the page between two marks."""
    return PAGE.partition(f"<!-- {name}: begin -->\n")[2].partition(f"<!-- {name}: end -->")[0].splitlines()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    text = PAGE.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# Settings and options.


def keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings' keys with their defaults; a table's are ``TABLE.KEY``."""
    for one in dataclasses.fields(kind):
        default = getattr(kind(), one.name)
        if dataclasses.is_dataclass(default):
            yield from keys(type(default), f"{one.name}.")
        else:
            yield prefix + one.name, default


def shown(value: Any) -> str:
    """A default as the documents write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value == ():
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings() -> dict[str, str]:
    return {key: shown(default) for key, default in keys(Config)}


def test_the_page_has_all_settings() -> None:
    told: dict[str, str] = {}
    for names, default, _text in rows("## Settings: `/etc/edgehold/virtvmand.toml`, then `virtvmand.toml.d/*.toml`"):
        told |= dict.fromkeys((one.strip(" `") for one in names.split(",")), default.strip("`"))
    assert told == _settings()


def test_the_manual_page_has_all_settings() -> None:
    assert dict(re.findall(r'^\.BR ([a-z_.0-9]+) " \((.*)\)"$', MANUAL, re.MULTILINE)) == _settings()


def test_the_manual_page_has_all_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["virtvmand", "--help"])
    with pytest.raises(SystemExit):
        daemon_arguments("virtvmand", "")
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    options = MANUAL.partition("\n.SH OPTIONS\n")[2].partition("\n.SH ")[0]
    synopsis = MANUAL.partition("\n.SH SYNOPSIS\n")[2].partition("\n.SH ")[0]
    assert set(re.findall(r"--[a-z-]+", options)) == set(re.findall(r"--[a-z-]+", synopsis)) == known


# Domain XML.


def _grouped(table: Mapping[str, str], head: str) -> list[str]:
    """A row for each reason, with all that has it, in the order of the code."""
    groups: dict[str, list[str]] = {}
    for path, why in table.items():
        groups.setdefault(why, []).append(f"`{path}`")
    return [head, "| --- | --- |", *(f"| {', '.join(paths)} | {why} |" for why, paths in groups.items())]


def _used() -> list[str]:
    """A row for each element, with its attributes."""
    attributes: dict[str, list[str]] = {}
    for path, what in USED.items():
        element, at, name = path.partition("@")
        attributes.setdefault(element, []).extend([f"`{name}`: {what}"] if at else [])
    texts = {element: USED.get(element, "") for element in attributes}
    lines = (f"| `{element}` | {texts[element]} | {'<br>'.join(more)} |" for element, more in attributes.items())
    return ["| element | effect | attributes |", "| --- | --- | --- |", *lines]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("used", _used()),
        ("kept", _grouped(KEPT, "| element | what holds instead |")),
        ("not", _grouped(REFUSED, "| element | why |")),
        ("refused", _grouped(refused.REASONS, "| call | why |")),
    ],
)
def test_the_tables_of_the_page_are_those_of_the_code(name: str, table: Iterable[str]) -> None:
    assert between(name) == list(table), "paste what the code has:\n" + "\n".join(table)


def test_the_whole_definition_of_the_page_is_accepted() -> None:
    xml = PAGE.partition("```xml\n")[2].partition("```")[0]
    plan = read_definition(xml, uuid="9f0a3d3e-6f1c-4a57-8d23-0f4a6f1b2c3d").plan
    assert plan == Plan(
        name="web",
        uuid="9f0a3d3e-6f1c-4a57-8d23-0f4a6f1b2c3d",
        cores=2,
        memory_bytes=1 << 30,
        mode=Mode.SHARED,
        kernel="/srv/web/vmlinuz",
        initrd="/srv/web/initramfs.gz",
        cmdline="root=/dev/vda ro",
        disks=(Disk(path="/srv/web/root.qcow2", format="qcow2"),),
        nics=(Nic(bridge="br0", mac=plan.nics[0].mac),),
        vsock=True,
        agent=True,
    )


# States, limits, journal.


def test_the_table_of_states_is_the_code() -> None:
    seen = set()
    for state, commands, domain, reason, active in rows("### States"):
        for command in commands.split(","):
            word = command.strip(" `")
            guest: dict[str, Any] = {"pid": 1, "arch": "x86_64"} if active == "yes" else {}
            partition = Partition(
                id=7, uuid="9f0a3d3e-6f1c-4a57-8d23-0f4a6f1b2c3d", name="one", mode=Mode.SHARED, cores=1,
                memory_bytes=64 << 20, state=State(state), command=word, **guest,
            )  # fmt: skip
            one = Domain(partition, {})
            told = tuple(int(re.findall(r"\((\d+)\)", cell)[0]) for cell in (domain, reason))
            assert (one.state, one.active) == (told, active == "yes"), (state, word)
            seen.add((state, word))
    assert {state for state, _command in seen} == {one.value for one in State}


def test_the_limits_are_those_of_the_code() -> None:
    told = {what: tuple(map(int, re.findall(r"\d+", most))) for what, most in rows("## Limits")}
    assert told == {
        "a definition": (xmltree.MAX_BYTES // _KIB, xmltree.MAX_ELEMENTS, xmltree.MAX_DEPTH, 96),
        "a packet before the connection is open": (connection.LIMIT_BEFORE_OPEN // _KIB,),
        "a packet of one that may only look": (connection.LIMIT_READ_ONLY // _KIB,),
        "a packet": (connection.LIMIT // _KIB // _KIB,),
        "calls under way on a connection": (connection.MAX_CALLS,),
        "streams (consoles) on a connection": (connection.MAX_STREAMS,),
        "event registrations on a connection": (connection.MAX_CALLBACKS,),
        "what a client leaves unread before nothing more is read of it": (connection.UNREAD_PAUSE_BYTES // _KIB,),
        "what a client leaves unread before it is cut off": (
            connection.UNREAD_MOST_BYTES // _KIB // _KIB,
            connection.UNREAD_MOST_S,
        ),
        "connections": (server.MAX_CONNECTIONS, server.ROOT_CONNECTIONS),
        "connections of one user": (server.MAX_CONNECTIONS_OF_A_USER,),
    }


def test_the_journals_ids_are_told() -> None:
    told = {cell.strip("`") for cell, *_rest in rows("## Metrics and the journal")}
    assert told == {run.COMMAND_ID, keeper.AUTOSTART_ID}
