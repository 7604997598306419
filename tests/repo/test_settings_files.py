"""The settings files of the packages say what the code does: every setting is in them, commented out at its default.

Who edits one takes a line's comment away; so all of those lines at once must be settings that change nothing.
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import deadlined.config
import virtvmand.config
import vmand.config
from edgehold import settings

ETC = Path(__file__).parents[2] / "packaging/etc"
LOAD: dict[str, Callable[[Path], Any]] = {
    "vmand": lambda path: settings.load(vmand.config.Config, "vmand", path=path),
    "virtvmand": lambda path: settings.load(virtvmand.config.Config, "virtvmand", path=path),
    "deadlined": deadlined.config.load,
}
DEFAULT: dict[str, Any] = {
    "vmand": vmand.config.Config(),
    "virtvmand": virtvmand.config.Config(),
    "deadlined": deadlined.config.Settings(),
}
# What the packages set: the daemons' own users ask each other.
SET: dict[str, dict[str, Any]] = {
    "vmand": {"access.read": ["deadlined"], "access.operate": ["vmand"]},
    "virtvmand": {"access.read": ["deadlined"]},
    "deadlined": {},
}
# A setting, and no sentence: no blank after the sign, and a key.
COMMENTED = re.compile(r"^#(?=[a-z][a-z0-9_]* = )", re.MULTILINE)
NAMES = sorted(DEFAULT)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting by its dotted key, as TOML has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    elif isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{prefix}{key}.")
    else:
        plain = msgspec.to_builtins(value)
        yield prefix.removesuffix("."), list(plain) if isinstance(plain, tuple) else plain


def text_of(name: str) -> str:
    return (ETC / f"{name}.toml").read_text(encoding="utf-8")


def loaded(name: str, text: str, directory: Path) -> dict[str, Any]:
    """What the daemon makes of a file of this text."""
    path = directory / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return dict(leaves(LOAD[name](path)))


def test_each_daemon_has_one() -> None:
    assert sorted(one.stem for one in ETC.glob("*.toml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_as_it_comes_it_sets_what_is_meant_and_no_more(name: str, tmp_path: Path) -> None:
    assert dict(leaves(tomllib.loads(text_of(name)))) == SET[name]
    assert loaded(name, text_of(name), tmp_path) == dict(leaves(DEFAULT[name])) | SET[name]


@pytest.mark.parametrize("name", NAMES)
def test_all_of_its_comments_taken_away_it_says_the_same(name: str, tmp_path: Path) -> None:
    text = COMMENTED.sub("", text_of(name))
    wanted = dict(leaves(DEFAULT[name])) | SET[name]
    found = dict(leaves(tomllib.loads(text)))
    assert found == wanted
    # 1 and 1.0 are equal, and only one of them shows what the setting takes.
    assert {key: type(one) for key, one in found.items()} == {key: type(one) for key, one in wanted.items()}
    assert loaded(name, text, tmp_path) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_hides_in_a_sentence(name: str) -> None:
    """A line that looks like a setting and is none would be left as it is by the test above."""
    known = {key.rpartition(".")[2] for key, _ in leaves(DEFAULT[name])}
    for line in text_of(name).splitlines():
        word = re.match(r"^\s*#\s*(\w+)\s*=", line)
        if word and word[1] in known and not line.startswith("#     "):  # the lines of an example
            assert COMMENTED.match(line), line


def test_the_example_of_what_to_attach_is_right(tmp_path: Path) -> None:
    text = text_of("deadlined")
    example = "\n".join(line[6:] for line in text.splitlines() if line.startswith("#     "))
    path = tmp_path / "deadlined.toml"
    path.write_text(f"{text}\n{example}\n", encoding="utf-8")
    [one] = deadlined.config.load(path).attach
    assert (one.target.name, one.policy) == ("camera.service", {"period_ns": 40_000_000, "weight": 500})
