"""sd_notify(3): READY, STOPPING, STATUS and the watchdog's heartbeat, over a path or an abstract socket."""

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends to the socket of ``NOTIFY_SOCKET``; does nothing where there is none."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        # An abstract address starts with "@" in the variable and with NUL on the socket (unix(7)).
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self.watchdog_s = _watchdog_s(environ)

    def send(self, *fields: str) -> None:
        """Send ``KEY=value`` fields as one datagram. A manager that is gone is not an error of the daemon's."""
        if not self._address:
            return
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.sendto("\n".join(fields).encode(), self._address)
        except OSError:
            return

    def ready(self, status: str = "") -> None:
        """The daemon serves from now on."""
        self.send("READY=1", *([f"STATUS={status}"] if status else []))

    def stopping(self) -> None:
        """The daemon has begun to stop."""
        self.send("STOPPING=1")

    def watchdog(self) -> None:
        """The daemon's loop turns."""
        self.send("WATCHDOG=1")


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Seconds between heartbeats: half of WATCHDOG_USEC, or None where this process is not watched."""
    usec = environ.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or int(usec) == 0 or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 2_000_000
