"""What is said to the service manager, over real sockets."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edgehold.errors import SettingsError
from edgehold.systemd import activation, credentials, journal
from edgehold.systemd.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_notify_over_path_and_abstract_socket(tmp_path: Path, *, abstract: bool) -> None:
    name = f"@edgehold-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1) if abstract else name)
        Notifier({"NOTIFY_SOCKET": name}).ready("serving")
        assert manager.recv(100) == b"READY=1\nSTATUS=serving"


def test_notify_without_a_manager_is_silent(tmp_path: Path) -> None:
    Notifier({}).ready()
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, 5.0),
    ],
)
def test_watchdog_interval(environ: dict[str, str], seconds: float | None) -> None:
    assert Notifier(environ).watchdog_s == seconds


def test_activation_passes_named_sockets(tmp_path: Path) -> None:
    """In a child, since descriptor 3 onwards belong to the test runner here."""
    path = tmp_path / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    pid = os.fork()
    if pid == 0:
        os.dup2(listener.fileno(), 3)
        environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "control"}
        sockets = activation.listen_sockets(environ)
        good = list(sockets) == ["control"] and sockets["control"][0].getsockname() == str(path)
        os._exit(0 if good and not environ and not os.get_inheritable(3) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    listener.close()


@pytest.mark.parametrize(
    "environ", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}]
)
def test_activation_of_somebody_else(environ: dict[str, str]) -> None:
    assert activation.listen_sockets(environ) == {}


def test_credentials(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"s3cret")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert credentials.read("token", environ) == b"s3cret"
    with pytest.raises(SettingsError, match="LoadCredential=other:"):
        credentials.read("other", environ)
    with pytest.raises(SettingsError, match="was given none"):
        credentials.read("token", {})
    with pytest.raises(SettingsError, match="not a credential's name"):
        credentials.read("../token", environ)


def record(message: str, **extra: object) -> logging.LogRecord:
    one = logging.LogRecord("vmand.service", logging.WARNING, "file.py", 7, message, (), None, "function")
    vars(one).update(extra)
    return one


def test_journal_golden_bytes() -> None:
    data = journal.encode(record("guest died", partition=3, message_id="ab" * 16), "vmand")
    assert data == (
        b"MESSAGE=guest died\nPRIORITY=4\nSYSLOG_IDENTIFIER=vmand\nLOGGER=vmand.service\nCODE_FILE=file.py\n"
        b"CODE_LINE=7\nCODE_FUNC=function\nPARTITION=3\nMESSAGE_ID=" + b"ab" * 16 + b"\n"
    )


def test_journal_length_prefixes_line_breaks() -> None:
    assert journal.field("MESSAGE", "a\nb") == b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\n"


@pytest.mark.parametrize("size", [100, 4 * 1024 * 1024])
def test_journal_large_records_travel_as_a_memory_file(tmp_path: Path, size: int) -> None:
    address = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        handler = journal.JournalHandler("test", address)
        handler.emit(record("x" * size))
        handler.close()
        data, fds, _flags, _address = socket.recv_fds(manager, 65536, 1)
        for fd in fds:
            data += os.pread(fd, size + 1000, 0)
            os.close(fd)
    assert data.startswith(b"MESSAGE=" + b"x" * size)


def test_text_from_a_peer_begins_no_line_of_its_own() -> None:
    code = (
        "import logging; from edgehold.systemd.journal import setup; setup('x');"
        "logging.warning('id %s', 'a\\nCRITICAL forged', extra={'partition': 'b\\nforged'})"
    )
    env = os.environ | {"JOURNAL_STREAM": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stderr.count("\n") == 1
    assert r"id a\nCRITICAL forged  partition=b\nforged" in done.stderr
