"""A library of the package's own comes with what it needs, whatever the program has of that."""

import sys
from pathlib import Path

import pytest

from edgehold import vendor

NAMES = ("eh_library", "eh_need")


def write(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.py").write_text(text)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The program's directory, first in the path, and ours, last."""
    own, ours = tmp_path / "own", tmp_path / "vendor"
    write(own, "eh_need", "WHOSE = 'own'\n")
    write(ours, "eh_need", "WHOSE = 'ours'\n")
    write(ours, "eh_library", "from eh_need import WHOSE\n")
    monkeypatch.setattr(vendor, "VENDOR", str(ours))
    monkeypatch.setattr(sys, "path", [str(own), *sys.path, str(ours)])
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return own, ours


@pytest.mark.parametrize(("has_it", "whose"), [(False, "ours"), (True, "own")])
def test_both_from_one_place(places: tuple[Path, Path], *, has_it: bool, whose: str) -> None:
    own, _ours = places
    if has_it:
        write(own, "eh_library", "from eh_need import WHOSE\n")
    before = list(sys.path)
    try:
        for _ in range(2):
            vendor.prepare("eh_library")
        assert whose == sys.modules["eh_library"].WHOSE
        assert sys.path == before
    finally:
        for name in NAMES:
            sys.modules.pop(name, None)


def test_what_is_nowhere() -> None:
    with pytest.raises(ModuleNotFoundError, match="eh_nowhere"):
        vendor.prepare("eh_nowhere")
