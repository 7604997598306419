"""Which program runs guests here, in its own words: a version that is read once, and nothing where it can't be told."""

import os
from pathlib import Path

import pytest

from vmand.backend import machines
from vmand.backend.machines import Machines
from vmand.config import Config

SAYS = "echo 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)'"


def program(directory: Path, script: str) -> Path:
    path = directory / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def for_program(path: Path) -> Machines:
    return Machines(Config(qemu=str(path), qemu_aarch64=str(path), accelerator="tcg"))


@pytest.mark.parametrize(
    ("script", "version"),
    [
        (SAYS, "QEMU 7.2.22"),
        ("echo hello", ""),
        ("exit 1", ""),
        ("exec sleep 60", ""),
        (f"{SAYS}; exit 3", "QEMU 7.2.22"),
    ],
)
async def test_the_version(tmp_path: Path, script: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_VERSION_S", 0.2 if "sleep" in script else 20)
    assert await for_program(program(tmp_path, script)).version() == version


async def test_no_program_has_no_version(tmp_path: Path) -> None:
    assert await for_program(tmp_path / "none").version() == ""
    broken = program(tmp_path, "")
    broken.write_bytes(b"\x7fELF")
    assert await for_program(broken).version() == ""


async def test_it_is_asked_once_until_it_is_another_program(tmp_path: Path) -> None:
    path = program(tmp_path, f"echo >> {tmp_path}/asked; {SAYS}")
    one = for_program(path)
    for _again in range(2):
        assert await one.version() == "QEMU 7.2.22"
    assert (tmp_path / "asked").read_text() == "\n"
    program(tmp_path, SAYS.replace("7.2.22", "8.0.1"))
    os.utime(path, ns=(1, 1))
    assert await one.version() == "QEMU 8.0.1"
