"""Settings: what is wrong is named by file and dotted key, and what is right is merged in order."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from edgehold import settings
from edgehold.errors import SettingsError


@dataclass(frozen=True)
class Pool:
    cores: tuple[int, ...] = ()
    memory_gb: Annotated[float, msgspec.Meta(gt=0)] = 1.0


@dataclass(frozen=True)
class Settings:
    name: str = "node"
    pool: Pool = field(default_factory=Pool)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults_without_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DIRECTORY", tmp_path)
    assert settings.load(Settings, "vmand") == Settings()


def test_drop_ins_merge_in_order(tmp_path: Path) -> None:
    main = write(tmp_path / "a.toml", 'name = "one"\n[pool]\ncores = [1, 2]\nmemory_gb = 2.5\n')
    write(tmp_path / "a.toml.d/20.toml", 'name = "three"\n')
    write(tmp_path / "a.toml.d/10.toml", 'name = "two"\n[pool]\ncores = [3]\n')
    assert settings.load(Settings, "a", path=main) == Settings("three", Pool((3,), 2.5))


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("nmae = 'x'", "nmae", "unknown key; known here: name, pool"),
        ("[pool]\ncoers = [1]", "pool.coers", "unknown key; known here: cores, memory_gb"),
        ("name = 3", "name", "Expected `str`, got `int`"),
        ("pool = 3", "pool", "Expected `object`, got `int`"),
        ("[pool]\ncores = ['one']", "pool.cores[0]", "Expected `int`, got `str`"),
        ("[pool]\nmemory_gb = 0", "pool.memory_gb", "Expected `float` > 0.0"),
        ("[pool]\nmemory_gb = true", "pool.memory_gb", "Expected `float`, got `bool`"),
    ],
)
def test_refusal_names_file_and_key(tmp_path: Path, text: str, key: str, reason: str) -> None:
    main = write(tmp_path / "a.toml", "")
    drop_in = write(tmp_path / "a.toml.d/50.toml", text)
    with pytest.raises(SettingsError) as caught:
        settings.load(Settings, "a", path=main)
    assert str(caught.value) == f"{drop_in}: {key}: {reason}"


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    main = write(tmp_path / "a.toml", "name = ")
    with pytest.raises(SettingsError, match=r"a\.toml: Invalid value"):
        settings.load(Settings, "a", path=main)


def test_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        settings.load(Settings, "a", path=tmp_path / "none.toml")
