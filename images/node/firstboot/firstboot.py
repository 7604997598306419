#!/usr/bin/python3 -sEP
"""A node's first boot: its name, its broker and its peers, from systemd's credentials (docs/node-image.md).

Runs before the network and the daemons, so it needs nothing but Python's standard library. It must not stop the boot:
nobody may be near the node. What is wrong is said with its cure and left out; all else is done; it runs again at the
next boot, until nothing is wrong. A credential wins over what is there, and what is there over a default.
"""

import contextlib
import ipaddress
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

EX_CONFIG = 78
_ERROR, _WARNING, _INFO = "<3>", "<4>", "<6>"  # sd-daemon(3): the journal's priority of a line
_MAX_BYTES = 65536
_MAX_PEERS = 1024
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")  # RFC 1123, 2.1
_HASH = re.compile(r"\$[0-9a-z]{1,16}\$[!-9;-~]{8,400}")  # crypt(5)
_PORTS = {"mqtt": 1883, "mqtts": 8883}  # IANA's
_KEYS = ("name", "broker", "peers")

T = TypeVar("T")


class RefusedError(Exception):
    """A value that can't be taken; the text says what would be right."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What node.toml says."""

    name: str = ""
    broker: str = ""
    peers: tuple[str, ...] = ()


def host_name(text: str) -> str:
    """A host's name by RFC 1123, at most 64 characters: Linux takes no more (uname(2)). In lower case.

    Raises:
        RefusedError: it is none, or looks like an address.
    """
    labels = text.split(".")
    if len(text) > 64 or not all(_LABEL.fullmatch(one) for one in labels) or labels[-1].isdigit():
        raise RefusedError(
            f"{text[:80]!a} is no host name; right are letters, digits and inner hyphens, as in node-17, at most 64"
        )
    return text.lower()


def peer(text: str) -> str:
    """A host's name, or its address, IPv6 without brackets.

    Raises:
        RefusedError: it is neither.
    """
    with contextlib.suppress(ValueError):
        if "%" not in text:  # a zone is this host's own business
            return str(ipaddress.ip_address(text))
    return host_name(text)


def peers(text: str) -> tuple[str, ...]:
    """Peers with commas, spaces or line ends between them; each once, in the order given.

    Raises:
        RefusedError: one of them is neither name nor address, or there are more than 1024.
    """
    found = tuple(dict.fromkeys(peer(one) for one in re.split(r"[,\s]+", text) if one))
    if len(found) > _MAX_PEERS:
        raise RefusedError(f"{len(found)} peers; at most {_MAX_PEERS} are taken")
    return found


def broker(text: str) -> str:
    """The broker's URL, with its port.

    Raises:
        RefusedError: it is none, or has a user, a password or a path in it.
    """
    right = "right is mqtts://HOST, mqtts://HOST:PORT, or mqtt:// for one without TLS"
    if "@" in text:  # not repeated: a password may stand there
        raise RefusedError(f"it has a user or a password in it, which are no part of an address; {right}")
    try:
        url = urlsplit(text)
        host, port = url.hostname or "", url.port
    except ValueError:
        host, port = "", None
    if not host or port == 0 or url.scheme not in _PORTS or url.path not in {"", "/"} or url.query or url.fragment:
        raise RefusedError(f"{text[:80]!a} is no broker's address; {right}")
    known = peer(host)
    return f"{url.scheme}://{f'[{known}]' if ':' in known else known}:{port or _PORTS[url.scheme]}"


def password(text: str) -> str:
    """A password's hash as crypt(5) has it. Never repeated.

    Raises:
        RefusedError: it is none.
    """
    if not _HASH.fullmatch(text):
        raise RefusedError("it is no password's hash; right is what `mkpasswd` or `openssl passwd -6` prints")
    return text


def load(text: str) -> Node:
    """An earlier node.toml, as strictly as a credential.

    Raises:
        RefusedError: it is not what `dump` writes or a person may put in its place.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusedError(str(error)) from None
    if unknown := table.keys() - set(_KEYS):
        raise RefusedError(f"{min(unknown)}: unknown key; known are {', '.join(_KEYS)}")
    for key, value in table.items():
        items = value if key == "peers" and isinstance(value, list) else [value]
        if (key == "peers") is not isinstance(value, list) or not all(isinstance(one, str) for one in items):
            raise RefusedError(f"{key}: not {'a list of texts' if key == 'peers' else 'a text'}")
    return Node(
        name=host_name(table["name"]) if "name" in table else "",
        broker=broker(table["broker"]) if "broker" in table else "",
        peers=tuple(peer(one) for one in table.get("peers", [])),
    )


def dump(node: Node) -> str:
    """node.toml. All values are plain ASCII without quotes: they were checked."""
    lines = ["# Who this node is and whom it knows. Written at the first boot (edgehold-firstboot.service)."]
    lines += [f'name = "{node.name}"']
    lines += [f'broker = "{node.broker}"'] if node.broker else []
    lines += ["peers = [" + ", ".join(f'"{one}"' for one in node.peers) + "]"]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """All or nothing, and on the disk when this returns."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class FirstBoot:
    """One run: what was refused, and where things are."""

    def __init__(self, *, root: Path, credentials: Path | None, say: Callable[[str], None]) -> None:
        self._root = root
        self._credentials = credentials
        self._say = say
        self.refused = False

    def run(self) -> None:
        """Apply what was given, keep what is there, fill in the rest."""
        file = self._root / "etc/edgehold/node.toml"
        before, readable = Node(), True
        with contextlib.suppress(FileNotFoundError):
            try:
                before = load(file.read_bytes().decode())
            except (RefusedError, UnicodeDecodeError) as error:
                readable = False
                self.refuse(f"{file}: {error}; correct it or delete it, then reboot: until then it stays as it is")
        known = self.credential("edgehold.peers", peers)
        node = Node(
            name=self.credential("edgehold.name", host_name) or before.name or self.own_name(),
            broker=self.credential("edgehold.broker", broker) or before.broker,
            peers=before.peers if known is None else known,
        )
        self.name_host(node.name)
        if readable:
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write(file, dump(node))
        self.set_password()
        told = f"name {node.name}, broker {node.broker or 'none'}, peers {' '.join(node.peers) or 'none'}"
        self._say(f"{_INFO}{told}")
        if not self.refused:
            state = self._root / "var/lib/edgehold-node"
            state.mkdir(mode=0o755, parents=True, exist_ok=True)
            write(state / "done", "")

    def refuse(self, text: str) -> None:
        """Say it, and go on."""
        self.refused = True
        self._say(f"{_ERROR}{text}")

    def credential(self, name: str, check: Callable[[str], T]) -> T | None:
        """What was given by that name; None where there is none, or a wrong one, which is said."""
        if self._credentials is None:
            return None
        try:
            with (self._credentials / name).open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise RefusedError(f"it is larger than {_MAX_BYTES} bytes")
            return check(data.decode().strip())
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            why = "it is no UTF-8 text"
        except (RefusedError, OSError) as error:
            why = str(error)
        self.refuse(f"credential {name}: {why}; correct it where the node is given it, then reboot")
        return None

    def own_name(self) -> str:
        """The name that the host has, else one from its machine id."""
        with contextlib.suppress(OSError, UnicodeDecodeError, RefusedError):
            name = host_name((self._root / "etc/hostname").read_text(encoding="ascii").strip())
            if name != "localhost":
                return name
        return f"edgehold-{(self._root / 'etc/machine-id').read_text(encoding='ascii')[:8]}"

    def name_host(self, name: str) -> None:
        """For the boots to come, and for this one: PID 1 has read the file already."""
        file = self._root / "etc/hostname"
        if not file.exists() or file.read_bytes() != f"{name}\n".encode():
            write(file, f"{name}\n")
        kernel = self._root / "proc/sys/kernel/hostname"
        try:
            if kernel.read_text(encoding="ascii").strip() != name:
                # The same as sethostname(2), which would take CAP_SYS_ADMIN.
                kernel.write_text(name, encoding="ascii")
        except OSError as error:  # a container's /proc/sys may be read-only
            self._say(f"{_WARNING}{kernel}: {error.strerror}: the name {name} holds from the next boot on")

    def set_password(self) -> None:
        """Root's, unless it has one. systemd's own tools do that for a root that has no account yet, which ours has."""
        if (given := self.credential("passwd.hashed-password.root", password)) is None:
            return
        shadow = (self._root / "etc/shadow").read_text(encoding="utf-8", errors="surrogateescape")
        entry = next((line.split(":") for line in shadow.splitlines() if line.startswith("root:")), ["root", "*"])
        if entry[1][:1] not in {"*", "!"}:
            self._say(f"{_INFO}root has a password already: passwd.hashed-password.root is passed over")
            return
        argv = ["/usr/sbin/chpasswd", "--encrypted", "--root", str(self._root)]
        argv = argv[:2] if self._root == Path("/") else argv
        done = subprocess.run(argv, input=f"root:{given}\n", text=True, capture_output=True, check=False, timeout=30)
        if done.returncode:
            self.refuse(f"credential passwd.hashed-password.root: chpasswd: {done.stderr.strip()[:200]!a}")


def main() -> int:
    """Exits 78 where something was refused, so that the unit shows as failed; all else was done."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    first = FirstBoot(
        root=Path("/"),
        credentials=Path(directory) if directory else None,
        say=lambda line: print(line, file=sys.stderr),  # noqa: T201 - the journal
    )
    first.run()
    return EX_CONFIG if first.refused else 0


if __name__ == "__main__":
    sys.exit(main())
