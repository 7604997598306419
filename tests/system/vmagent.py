"""Runs inside a machine of tests/system/vm.py: commands come as JSON lines through a virtio-serial port.

Only the standard library of the machine's own python3, and nothing of the product: it must work where that does not.
A request is ``{"id", "argv", "input", "timeout_s"}`` or ``{"id", "write", "data", "mode"}`` or ``{"id", "read"}``;
bytes are base64. Requests run side by side, so that a slow command holds up no other. The first line says who is there.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

_PORT = Path("/dev/virtio-ports/edgehold-test")
_POLL_S = 0.1
_TIMED_OUT = 124
_NOT_FOUND = 127


class Agent:
    """One conversation."""

    def __init__(self, port: BinaryIO) -> None:
        self._port = port
        self._lock = threading.Lock()

    def say(self, answer: dict[str, Any]) -> None:
        """One line, whole."""
        line = json.dumps(answer).encode() + b"\n"
        with self._lock:
            while line:
                line = line[self._port.write(line) or 0 :]

    def serve(self) -> None:
        """Until the machine ends: that nobody is at the other end reads as the end of the file."""
        self.say({"ready": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()})
        rest = b""
        while True:
            data = os.read(self._port.fileno(), 65536)
            if not data:
                time.sleep(_POLL_S)
                continue
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                threading.Thread(target=self._answer, args=(json.loads(line),), daemon=True).start()

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            result = _do(request)
        except (OSError, ValueError) as error:
            result = {"error": str(error)}
        self.say({"id": request["id"], **result})


def _do(request: dict[str, Any]) -> dict[str, Any]:
    if "write" in request:
        path = Path(request["write"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(request["data"]))
        path.chmod(request["mode"])
        return {}
    if "read" in request:
        return {"data": base64.b64encode(Path(request["read"]).read_bytes()).decode()}
    return _run(request)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    try:
        process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/root",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        return {"status": _NOT_FOUND, "out": "", "err": base64.b64encode(str(error).encode()).decode()}
    late = False
    try:
        out, err = process.communicate(base64.b64decode(request["input"]), request["timeout_s"])
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    code = process.returncode
    status = _TIMED_OUT if late else code if code >= 0 else 128 - code
    return {"status": status, "out": base64.b64encode(out).decode(), "err": base64.b64encode(err).decode()}


def main() -> int:
    """Wait for the port, then serve it."""
    while not _PORT.exists():
        time.sleep(_POLL_S)
    os.environ.update(HOME="/root", LC_ALL="C.UTF-8", PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
    with _PORT.open("r+b", buffering=0) as port:
        Agent(port).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
