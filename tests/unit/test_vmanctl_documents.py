"""The manual pages and docs/vmand.md name what the programs have: commands, options, settings."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from vmand.cli import SHORT, vmanctl
from vmand.config import Config

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted((DOCS / "man").iterdir())


def source(name: str) -> str:
    """A page's source, with its hyphens as a reader sees them."""
    return (DOCS / "man" / name).read_text().replace("\\-", "-")


def section(text: str, name: str) -> str:
    return text.partition(f"\n.SH {name}\n")[2].partition("\n.SH ")[0]


def options(text: str) -> set[str]:
    """What stands as the term of a list."""
    return set(re.findall(r"^\.TP\n\.B[IR]? (--[a-z-]+)", text, re.MULTILINE))


def test_vmanctl_1_has_all_commands_and_their_options() -> None:
    told: dict[str, set[str]] = {}
    for part in section(source("vmanctl.1"), "COMMANDS").split(".SS ")[1:]:
        names, _newline, rest = part.partition("\n")
        told |= dict.fromkeys(names.split(", "), options(rest))
    told["start"] |= told["create"] | told["deploy"]  # which it says in a sentence
    context = click.Context(vmanctl)
    found = {}
    for name in vmanctl.list_commands(context):
        command = vmanctl.get_command(context, name)
        assert command is not None
        spellings = [one for param in command.params if isinstance(param, click.Option) for one in param.opts]
        found[name] = {one for one in spellings if one.startswith("--")}
    assert told == found
    assert {short: told[short] for short in SHORT} == {short: told[name] for short, name in SHORT.items()}


def keys(kind: Any, prefix: str = "") -> dict[str, Any]:
    """The settings' keys with their defaults; a table's are ``TABLE.KEY``."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(kind):
        if dataclasses.is_dataclass(default := getattr(kind(), one.name)):
            found |= keys(type(default), f"{one.name}.")
        else:
            found[prefix + one.name] = default
    return found


def shown(value: Any) -> str:
    """A default as the documents write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_vmand_md_has_all_settings() -> None:
    rows = re.findall(r"^\| (`[a-z_.0-9`, ]+`) \| (.*?) \|", (DOCS / "vmand.md").read_text(), re.MULTILINE)
    told = {key.strip("` "): default.strip("` ") for names, default in rows for key in names.split(",")}
    told = {key: default for key, default in told.items() if key in keys(Config)}
    _compare(told)


def test_vmand_8_has_all_settings() -> None:
    _compare(dict(re.findall(r'^\.BR ([a-z_.0-9]+) " \((.*)\)"$', source("vmand.8"), re.MULTILINE)))


def _compare(told: dict[str, str]) -> None:
    assert set(told) == set(keys(Config))
    for key, default in keys(Config).items():
        if default not in {"", ()}:  # what nothing means is said in words
            assert told[key].replace("_", "") == shown(default).replace("_", ""), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize("tool", ["man", "groff", "mandoc"])
def test_the_pages_are_well_formed(page: Path, tool: str) -> None:
    commands = {
        "man": ["man", "--warnings", "-E", "UTF-8", "-l"],
        "groff": ["groff", "-man", "-ww", "-z", "-K", "utf8"],
        "mandoc": ["mandoc", "-T", "lint", "-W", "warning"],
    }
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANPAGER": "cat", "MANWIDTH": "80"}
    done = subprocess.run(
        [*commands[tool], str(page)], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert tool == "man" or done.stdout == ""
