"""sd_listen_fds(3): the sockets that systemd opened for this process."""

import os
import socket
from collections.abc import MutableMapping

_FIRST = 3  # SD_LISTEN_FDS_START


def listen_sockets(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[socket.socket]]:
    """The passed sockets by their ``FileDescriptorName=`` (default: ``unknown``, as systemd has it).

    The variables are removed and the descriptors closed on exec, so that children don't take them for theirs.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    sockets: dict[str, list[socket.socket]] = {}
    for index in range(int(count)):
        fd = _FIRST + index
        os.set_inheritable(fd, False)
        name = names[index] if index < len(names) and names[index] else "unknown"
        sockets.setdefault(name, []).append(socket.socket(fileno=fd))
    return sockets
