"""What outlives a restart: written as a whole or not at all, and read back as it was."""

import errno
import json
import os
from pathlib import Path

import pytest

from deadlined.keep import Keep, Kept
from edgehold.api.deadlined import Policy, Rule, Target, TargetKind
from edgehold.errors import FailedError


def kept(number: int, name: str = "nginx.service") -> Kept:
    return Kept(
        id=number, target=Target(kind=TargetKind.UNIT, name=name), policy=Policy(rule=Rule.FIXED, period_ns="auto")
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "attachments.json"


def test_a_successor_has_what_was_kept(path: Path) -> None:
    first = Keep(path)
    assert first.all() == []
    for number in (12, 3):
        first.put(kept(number))
    assert Keep(path).all() == first.all() == [kept(3), kept(12)]
    first.put(kept(3, "other.service"))
    first.drop(12)
    first.drop(99)  # nobody's
    assert Keep(path).all() == [kept(3, "other.service")]
    first.drop(3)
    assert Keep(path).all() == []


def test_nothing_but_the_file_is_left(path: Path) -> None:
    keep = Keep(path)
    keep.put(kept(1))
    keep.drop(1)
    assert [one.name for one in path.parent.iterdir()] == ["attachments.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    keep = Keep(path)
    keep.put(kept(1))

    def full(*_values: object, **_names: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full) if call == "fsync" else patch.setattr(Path, "replace", full)
        with pytest.raises(FailedError, match=r"attachments\.json: No space left on device; .* make room"):
            keep.put(kept(2))
        with pytest.raises(FailedError):
            keep.drop(1)
    assert keep.all() == Keep(path).all() == [kept(1)]
    keep.put(kept(2))
    assert Keep(path).all() == [kept(1), kept(2)]


def test_no_directory(path: Path) -> None:
    keep = Keep(path.parent / "none" / "attachments.json")
    with pytest.raises(FailedError, match="No such file or directory"):
        keep.put(kept(1))
    assert keep.all() == []


def entry(**changed: object) -> bytes:
    one = {"id": 1, "target": {"kind": "unit", "name": "a.service"}, "policy": {}}
    return json.dumps([one | changed]).encode()


def test_what_is_left_out_has_its_default(path: Path) -> None:
    path.write_bytes(entry())
    assert [one.policy for one in Keep(path).all()] == [Policy()]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"{}",
        b"[{}]",
        b"\xff\xfe",
        b"[null]",
        entry(id="1"),
        entry(target={"kind": "unit"}),
        entry(target={"kind": "thread", "id": 0}),
        entry(policy={"cap": 7}),
        entry(policy={"unheard": 1}),
    ],
)
def test_a_broken_file_is_put_aside(path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(text)
    keep = Keep(path)
    assert keep.all() == []
    assert "put aside as .broken" in caplog.text
    assert Path(f"{path}.broken").read_bytes() == text
    keep.put(kept(1))
    assert Keep(path).all() == [kept(1)]


def test_a_file_cut_anywhere_is_whole_or_broken(path: Path) -> None:
    Keep(path).put(kept(1))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert Keep(path).all() == []


def test_one_that_can_t_be_read_is_no_empty_one(path: Path) -> None:
    path.mkdir()
    with pytest.raises(FailedError, match=r"attachments\.json: Is a directory"):
        Keep(path)
