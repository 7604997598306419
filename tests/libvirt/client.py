"""libvirt-python in a process of its own, told what to do: the system's Python runs this file, not ours.

Reads a JSON command a line, ``{"id": 1, "do": "open", ...}``, and answers each, in any order, with
``{"id": 1, "ok": ...}`` or ``{"id": 1, "error": [code, domain, text]}``; says ``{"event": [...]}`` when something
happens. The end of its input is its end. It imports nothing of ours.
"""

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import libvirt  # type: ignore[import-not-found]  # Debian's python3-libvirt

_LOCK = threading.Lock()
_KNOWN: dict[str, Any] = {"libvirt": libvirt}


def say(**message: Any) -> None:
    """One line."""
    with _LOCK:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def plain(value: Any) -> Any:
    """What JSON can carry of a result."""
    if isinstance(value, libvirt.virDomain):
        return {"name": value.name(), "uuid": value.UUIDString(), "id": value.ID()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, str | int | float | bool) else type(value).__name__


def do_open(uri: str, name: str, read_only: bool = False) -> None:
    """A connection of this name."""
    _KNOWN[name] = (libvirt.openReadOnly if read_only else libvirt.open)(uri)


def do_call(on: str, method: str, args: list[Any], name: str = "") -> Any:
    """Call a method of what has the name ``on``; its result may be given a name. ``@name`` is what has a name."""
    known = [_KNOWN[one[1:]] if isinstance(one, str) and one.startswith("@") else one for one in args]
    result = getattr(_KNOWN[on], method)(*known)
    if name:
        _KNOWN[name] = result
    return plain(result)


def do_forget(name: str) -> None:
    """Drop the object."""
    del _KNOWN[name]


def do_listen(on: str, event: int, domain: str = "") -> int:
    """Say each event of a kind (virDomainEventID), of one or of all domains."""

    def heard(_connection: Any, of: Any, *rest: Any) -> None:
        say(event=["domain", on, event, of.name(), *(plain(one) for one in rest[:-1])])

    return int(_KNOWN[on].domainEventRegisterAny(_KNOWN.get(domain), event, heard, None))


def do_watch_end(on: str) -> None:
    """Say when the connection has ended, and why (virConnectCloseReason)."""
    _KNOWN[on].registerCloseCallback(lambda _connection, reason, _opaque: say(event=["closed", on, reason]), None)


def do_console(on: str, domain: str, name: str, device: str | None = None, flags: int = 0) -> None:
    """Open a domain's console as a stream of this name, and say what comes."""
    stream = _KNOWN[on].newStream(libvirt.VIR_STREAM_NONBLOCK)
    _KNOWN[domain].openConsole(device, stream, flags)
    _KNOWN[name] = stream

    def came(stream: Any, events: int, _opaque: Any) -> None:
        if events & libvirt.VIR_STREAM_EVENT_READABLE:
            try:
                data = stream.recv(65536)
            except libvirt.libvirtError as error:
                stream.eventRemoveCallback()
                say(event=["ended", name, error.get_error_code(), str(error)])
                return
            if data == b"":
                stream.eventRemoveCallback()
                say(event=["ended", name, 0, ""])
            elif data != -2:  # nothing there after all
                say(event=["data", name, data.decode(errors="replace")])
        elif events & (libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP):
            stream.eventRemoveCallback()
            say(event=["ended", name, -1, ""])

    wanted = libvirt.VIR_STREAM_EVENT_READABLE | libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP
    stream.eventAddCallback(wanted, came, None)


def do_type(name: str, text: str) -> None:
    """Type at a console."""
    data = text.encode()
    while data:
        sent = _KNOWN[name].send(data)
        if sent > 0:
            data = data[sent:]


def do_leave(name: str, how: str) -> None:
    """``finish`` or ``abort`` a stream."""
    stream = _KNOWN[name]
    with contextlib.suppress(libvirt.libvirtError):  # it had ended
        stream.eventRemoveCallback()
    getattr(stream, how)()


_COMMANDS: dict[str, Callable[..., Any]] = {
    "open": do_open, "call": do_call, "forget": do_forget, "listen": do_listen, "watch_end": do_watch_end,
    "console": do_console, "type": do_type, "leave": do_leave,
}  # fmt: skip


def answer(command: dict[str, Any]) -> None:
    """Carry out one command."""
    number = command.pop("id")
    try:
        say(id=number, ok=_COMMANDS[command.pop("do")](**command))
    except libvirt.libvirtError as error:
        say(id=number, error=[error.get_error_code(), error.get_error_domain(), str(error)])
    except Exception:  # noqa: BLE001 - the test that asked must see it
        say(id=number, error=[-1, -1, traceback.format_exc()])


def run_events() -> None:
    """libvirt's own event loop."""
    while True:
        libvirt.virEventRunDefaultImpl()


def main() -> None:
    """Until the end of input."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it would print each
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=run_events, daemon=True).start()
    pool = ThreadPoolExecutor(16)
    for line in sys.stdin:
        pool.submit(answer, json.loads(line))
    os._exit(0)  # a call to a server that hangs would be waited for


if __name__ == "__main__":
    main()
