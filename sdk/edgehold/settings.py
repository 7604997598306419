"""Settings: TOML with drop-ins -> one frozen dataclass, checked before anything else happens.

``/etc/edgehold/NAME.toml`` first, then ``/etc/edgehold/NAME.toml.d/*.toml`` in the order of their names: tables merge,
values replace. A missing file means the defaults; an unknown key, a wrong type or a value out of range is refused with
the file and the dotted key. Secrets are not settings: they are systemd credentials.
"""

import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgehold.errors import SettingsError

T = TypeVar("T")

DIRECTORY = Path("/etc/edgehold")
_AT = re.compile(r" - at `\$\.?(?P<key>[^`]*)`$")


def files(name: str, path: Path | None = None) -> list[Path]:
    """The files that are read for a daemon, in order; those that do not exist are left out.

    Raises:
        SettingsError: a path was given by hand and does not exist.
    """
    main = path or DIRECTORY / f"{name}.toml"
    if path is not None and not path.is_file():
        raise SettingsError(f"{path}: no such file")
    drop_ins = sorted(Path(f"{main}.d").glob("*.toml"))
    return [one for one in (main, *drop_ins) if one.is_file()]


def load(kind: type[T], name: str, *, path: Path | None = None) -> T:
    """Read, merge and check the settings of one daemon.

    Raises:
        SettingsError: names the file and the dotted key, and what would be right.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for one in files(name, path):
        try:
            table = tomllib.loads(one.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"{one}: {error}") from error
        _check_keys(kind, table, one, "")
        _merge(merged, table, one, origin, "")
    try:
        return msgspec.convert(merged, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        at = _AT.search(text)
        key = at["key"] if at else ""
        where = next((origin[k] for k in _parents(key) if k in origin), None)
        what = text[: at.start()] if at else text
        raise SettingsError(f"{where or name}: {key or 'settings'}: {what}") from None


def check_absolute(key: str, value: str) -> None:
    """A setting that is a path: no working directory and no link upwards decides what it means.

    Raises:
        SettingsError: names the key.
    """
    if not Path(value).is_absolute() or ".." in Path(value).parts:
        raise SettingsError(f"{key}: {value!r} is not an absolute path without '..'")


def _parents(key: str) -> list[str]:
    """``a.b[0]`` -> ``a.b``, ``a``: an error inside a list belongs to the file that gave the list."""
    parts = re.sub(r"\[[^\]]*\]", "", key).split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _check_keys(kind: Any, table: dict[str, Any], file: Path, prefix: str) -> None:
    """Refuse keys that the dataclass does not have; the codec would pass over them in silence."""
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    for key, value in table.items():
        if key not in known:
            raise SettingsError(f"{file}: {prefix}{key}: unknown key; known here: {', '.join(sorted(known))}")
        if isinstance(value, dict) and dataclasses.is_dataclass(hints[key]):
            _check_keys(hints[key], value, file, f"{prefix}{key}.")


def _merge(into: dict[str, Any], table: dict[str, Any], file: Path, origin: dict[str, Path], prefix: str) -> None:
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        origin[dotted] = file
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, file, origin, f"{dotted}.")
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value, file, origin, f"{dotted}.")
        else:
            into[key] = value
