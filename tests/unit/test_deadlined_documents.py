"""The manual pages and docs/deadlined.md name what the programs have: commands, options, settings, fields, metrics.

That the pages are well formed, test_vmanctl_documents.py tests for all of them.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, cast

import click
import pytest
from msgspec import Struct

from deadlined import api, cli_run
from deadlined.cli import deadlinectl
from deadlined.config import Settings
from deadlined.metrics import Metrics
from edgehold.api.deadlined import Actuator, Policy, Rule, TargetKind, ThreadState

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "deadlined.md").read_text(encoding="utf-8")


def source(name: str) -> str:
    """A page's source, with its hyphens as a reader sees them."""
    return (DOCS / "man" / name).read_text(encoding="utf-8").replace("\\-", "-")


def section(text: str, name: str) -> str:
    return text.partition(f"\n.SH {name}\n")[2].partition("\n.SH ")[0]


def options(text: str) -> set[str]:
    """What stands as the term of a list."""
    return set(re.findall(r"^\.TP\n\.B[IR]? (--[a-z-]+)", text, re.MULTILINE))


def commands() -> dict[str, click.Command]:
    context = click.Context(deadlinectl)
    found = {name: deadlinectl.get_command(context, name) for name in deadlinectl.list_commands(context)}
    return {name: one for name, one in found.items() if one is not None}


def spellings(command: click.Command) -> set[str]:
    """All of its options."""
    given = [param for param in command.params if isinstance(param, click.Option)]
    return {one for param in given for one in (*param.opts, *param.secondary_opts) if one.startswith("--")}


def rows(heading: str) -> list[list[str]]:
    """The first table below a line of docs/deadlined.md, without its head and its backquotes."""
    text = TEXT.partition(heading)[2]
    assert text, heading
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_deadlinectl_1_has_all_commands_and_their_options() -> None:
    told: dict[str, set[str]] = {}
    for part in section(source("deadlinectl.1"), "COMMANDS").split(".SS ")[1:]:
        name, _newline, rest = part.partition("\n")
        told[name] = options(rest)
    assert told == {name: spellings(one) for name, one in commands().items()}


def test_deadlined_8_has_its_commands_and_their_options() -> None:
    parts = section(source("deadlined.8"), "COMMANDS").split(".SS ")[1:]
    told = {name: options(rest) for name, _newline, rest in (part.partition("\n") for part in parts)}
    assert told == {"run": spellings(cli_run.run), "recover": spellings(cli_run.recover)}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings with their defaults; those of a table are ``TABLE.KEY``."""
    if isinstance(value, Struct):
        fields = list(value.__struct_fields__)
    else:
        fields = [one.name for one in dataclasses.fields(value)]
    found: dict[str, Any] = {}
    for name in fields:
        one = getattr(value, name)
        if dataclasses.is_dataclass(one) or isinstance(one, Struct):
            found |= flat(one, f"{name}.")
        else:
            found[prefix + name] = one
    return found


POLICY = {f"policy.{name}": value for name, value in flat(Policy()).items()}


def shown(value: Any) -> str:
    """A default as the documents write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _compare(told: dict[str, str], found: dict[str, Any]) -> None:
    assert set(told) == set(found)
    for key, default in found.items():
        assert told[key] == (shown(default) if default not in {"", ()} else "none"), key


def test_the_settings() -> None:
    """[policy] has a table of its own."""
    told = {key: default.strip("`") for keys, default, *_more in rows("## Settings") for key in names(keys)}
    found = {key: value for key, value in flat(Settings()).items() if not key.startswith("policy")}
    _compare(told, found)


def test_deadlined_8_has_all_settings() -> None:
    told = dict(re.findall(r'^\.BR ([a-z_.]+) " \((.*)\)"$', source("deadlined.8"), re.MULTILINE))
    _compare(told, {key: value for key, value in flat(Settings()).items() if not key.startswith("policy")} | POLICY)


def test_the_fields_of_a_policy() -> None:
    table = rows("`[policy]` has these keys")
    told = {names(field)[0]: default.strip("`") for field, _option, default, _meaning in table}
    _compare({f"policy.{name}": default for name, default in told.items()}, POLICY)
    assert {names(option)[0] for _field, option, *_more in table} <= spellings(commands()["attach"])


def test_the_targets_and_actuators() -> None:
    told = {option for _what, cell, _threads in rows("## What can be held") for option in re.findall(r"--[a-z]+", cell)}
    assert told <= spellings(commands()["attach"])
    assert len(told) == len(TargetKind) + 1  # --uri
    assert [names(cell)[0] for cell, *_more in rows("## What enforces a budget")] == [one.value for one in Actuator]
    for rule in Rule:
        assert f"\n**{rule.value}**" in TEXT


def test_the_requests() -> None:
    told = {tuple(one.split()) for cell, _answer in rows("## REST")[:-1] for one in names(cell)}
    told |= {tuple(one.split()) for one in names(rows("## REST")[-1][0])}
    served = {(method, path) for method, path, _handler in api.routes(cast("Any", None))}
    assert told == served | {("GET", "/healthz"), ("GET", "/metrics")}


def test_the_metrics() -> None:
    told = {names(cell)[0] for cell, _meaning in rows("## Metrics")}
    metrics = Metrics()
    metrics.tell(list, lambda: 1.0)
    found = {
        f"{family.name}_total" if family.type == "counter" else family.name for family in metrics.registry.collect()
    }
    assert told == found


@pytest.mark.parametrize("state", ThreadState)
def test_each_state_is_explained(state: ThreadState) -> None:
    assert re.search(rf"\b{state.value}\b", TEXT)


@pytest.mark.parametrize("name", sorted({*re.findall(r"\]\(([^):#]+)", TEXT)}))
def test_links_lead_somewhere(name: str) -> None:
    assert (DOCS / name).exists()
