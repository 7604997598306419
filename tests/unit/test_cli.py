"""The base of client commands: exit statuses, errors with a cure, tables, JSON."""

import json
import sys
from pathlib import Path

import click
import pytest

from edgehold import cli, errors


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    @cli.client_group(default_socket=Path("/run/x.sock"), variable="X_SOCKET", help_text="Talks to x.")
    def xctl() -> None: ...

    @xctl.command()
    @click.option("-cores", "--cores", type=int)
    @click.pass_obj
    def show(output: cli.Output, cores: int) -> None:
        output.show({"cores": cores}, lambda: cli.table(["CORES", "SOCKET"], [[cores, output.socket]]))

    @xctl.command()
    def refuse() -> None:
        raise errors.NoCapacityError("2 cores asked for, 1 is left")

    cli.completion_command(xctl, "xctl")
    monkeypatch.setattr(sys, "argv", ["xctl", *arguments])
    try:
        cli.main(xctl, "xctl")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    return 0


def test_both_spellings_and_both_outputs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "-cores", "2"], monkeypatch) == 0
    assert capsys.readouterr().out == "CORES  SOCKET\n    2  /run/x.sock\n"
    monkeypatch.setenv("X_SOCKET", "/tmp/y")
    assert run(["--json", "show", "--cores=3"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == {"cores": 3}


def test_json_anywhere_and_for_errors_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "--cores=3", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == {"cores": 3}
    assert run(["refuse", "--json"], monkeypatch) == 1
    assert json.loads(capsys.readouterr().err) == {
        "error": {"code": "no-capacity", "message": "2 cores asked for, 1 is left", "retryable": True}
    }


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["refuse"], 1, "xctl: no-capacity: 2 cores asked for, 1 is left (it may work later)\n"),
        (["show", "-cores", "x"], 64, "is not a valid integer"),
        (["nothing"], 64, "No such command"),
    ],
)
def test_failures(
    arguments: list[str], status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments, monkeypatch) == status
    assert text in capsys.readouterr().err


def test_help_and_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"], monkeypatch) == 0
    assert "Talks to x." in capsys.readouterr().out
    assert run(["completion", "bash"], monkeypatch) == 0
    assert "_XCTL_COMPLETE" in capsys.readouterr().out
