"""Logging: to the journal by its native protocol where the process' stderr is the journal, else to stderr as text.

``log.info("…", extra={"partition": 3})`` becomes the field ``PARTITION=3``; ``extra={"message_id": …}`` the
MESSAGE_ID by which an operator finds all lines of a kind. Protocol: systemd's JOURNAL_NATIVE_PROTOCOL.
"""

import errno
import logging
import os
import socket
import struct
import sys
import traceback
from pathlib import Path

SOCKET = "/run/systemd/journal/socket"

# What logging itself puts on a record; everything else came by extra=.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def field(name: str, value: str) -> bytes:
    """One field; a value with a line break goes length-prefixed, as the protocol asks."""
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def _key(name: str) -> str:
    """A field's name: upper case letters, digits and underscores, not beginning with either of the latter two."""
    key = "".join(c if c.isascii() and c.isalnum() else "_" for c in name.upper()).lstrip("_0123456789")
    return key[:64] or "FIELD"


def extra_fields(record: logging.LogRecord) -> dict[str, str]:
    """What the caller gave by ``extra=``."""
    return {name: str(value) for name, value in vars(record).items() if name not in _STANDARD}


def encode(record: logging.LogRecord, identifier: str) -> bytes:
    """A record as one datagram of the native protocol."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
    level = min((n for n in _PRIORITY if n >= record.levelno), default=logging.CRITICAL)
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(_PRIORITY[level]),
        "SYSLOG_IDENTIFIER": identifier,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
    }
    fields.update({_key(name): value for name, value in extra_fields(record).items()})
    return b"".join(field(name, value) for name, value in fields.items())


class JournalHandler(logging.Handler):
    """Sends each record to the journal's socket."""

    def __init__(self, identifier: str, address: str = SOCKET) -> None:
        super().__init__()
        self._identifier = identifier
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = encode(record, self._identifier)
            try:
                self._socket.sendto(data, self._address)
            except OSError as error:
                if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                    raise
                self._send_memfd(data)
        except Exception:  # noqa: BLE001 - logging must not end the daemon; logging's own hook decides
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _send_memfd(self, data: bytes) -> None:
        """A record larger than a datagram travels as a sealed memory file."""
        import fcntl  # noqa: PLC0415 - rare

        fd = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, data)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
            self._socket.sendmsg([b""], rights, 0, self._address)
        finally:
            os.close(fd)


def _visible(text: str) -> str:
    """Control characters as escapes, and not more than a screen of it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:4000])


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # What a peer sent may stand in a message: it must not begin a line of its own. A traceback's lines are ours.
        record.message = _visible(record.getMessage())
        text = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.message}"
        extra = " ".join(f"{name}={value}" for name, value in extra_fields(record).items() if name != "message_id")
        line = f"{text}  {_visible(extra)}" if extra else text
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def stderr_is_journal() -> bool:
    """Whether ``JOURNAL_STREAM`` names this very stderr (systemd.exec(5))."""
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM", "") == f"{stat.st_dev}:{stat.st_ino}" and Path(SOCKET).exists()


def setup(name: str, level: str = "INFO") -> None:
    """Send all logging of this process to the journal, or to stderr."""
    handler: logging.Handler
    if stderr_is_journal():
        handler = JournalHandler(name)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level)
