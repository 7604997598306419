"""A node's first boot: what it takes, what it refuses and why, and that it goes on."""

import importlib.util
import stat
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgehold.settings import load as load_settings

SCRIPT = Path(__file__).parents[2] / "images/node/firstboot/firstboot.py"
MACHINE_ID = "0123456789abcdef0123456789abcdef"


def script() -> ModuleType:
    """The script: it is no package's, and stands alone on a node."""
    spec = importlib.util.spec_from_file_location("edgehold_firstboot", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


firstboot: Any = script()


@dataclass
class Host:
    """A node's files, as far as the first boot knows them."""

    root: Path
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for one in ("etc", "proc/sys/kernel", "credentials"):
            (self.root / one).mkdir(parents=True)
        (self.root / "etc/machine-id").write_text(f"{MACHINE_ID}\n")
        (self.root / "proc/sys/kernel/hostname").write_text("localhost")
        (self.root / "etc/shadow").write_text("root:$6$set$already:1::::::\n")

    def boot(self, **given: str | bytes) -> bool:
        """Run it with these given, `name` as `edgehold.name`; whether nothing was refused."""
        for old in (self.root / "credentials").iterdir():
            old.unlink()
        for name, value in given.items():
            data = value.encode() if isinstance(value, str) else value
            (self.root / "credentials" / (name if "." in name else f"edgehold.{name}")).write_bytes(data)
        self.lines.clear()
        one = firstboot.FirstBoot(root=self.root, credentials=self.root / "credentials", say=self.lines.append)
        one.run()
        assert any(line.startswith("<3>") for line in self.lines) is one.refused
        return not one.refused

    @property
    def node(self) -> dict[str, Any]:
        return tomllib.loads((self.root / "etc/edgehold/node.toml").read_text())

    @property
    def names(self) -> tuple[str, str]:
        """In the file, and in the kernel."""
        return (self.root / "etc/hostname").read_text(), (self.root / "proc/sys/kernel/hostname").read_text()

    @property
    def done(self) -> bool:
        return (self.root / "var/lib/edgehold-node/done").exists()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "root")


def test_all_that_is_given(host: Host) -> None:
    assert host.boot(name="Node-17\n", broker="mqtts://broker.example", peers="node-18, 10.0.0.3\nFE80:0::1\nnode-18")
    assert host.node == {
        "name": "node-17",
        "broker": "mqtts://broker.example:8883",
        "peers": ["node-18", "10.0.0.3", "fe80::1"],
    }
    assert host.names == ("node-17\n", "node-17")
    assert host.done
    assert host.lines == ["<6>name node-17, broker mqtts://broker.example:8883, peers node-18 10.0.0.3 fe80::1"]
    assert stat.S_IMODE((host.root / "etc/edgehold/node.toml").stat().st_mode) & 0o600 == 0o600
    assert not list((host.root / "etc").rglob(".*"))


def test_nothing_given(host: Host) -> None:
    """The node still has a name of its own, and comes up."""
    assert host.boot()
    assert host.node == {"name": "edgehold-01234567", "peers": []}
    assert host.names == ("edgehold-01234567\n", "edgehold-01234567")
    assert host.done


def test_a_host_that_has_a_name_keeps_it(host: Host) -> None:
    (host.root / "etc/hostname").write_text("mill\n")
    assert host.boot(broker="mqtt://10.0.0.1:1884")
    assert host.node == {"name": "mill", "broker": "mqtt://10.0.0.1:1884", "peers": []}
    (host.root / "etc/hostname").write_text("localhost\n")
    (host.root / "etc/edgehold/node.toml").unlink()
    assert host.boot()
    assert host.names[0] == "edgehold-01234567\n"


def test_a_container_whose_kernel_takes_no_name(host: Host) -> None:
    kernel = host.root / "proc/sys/kernel/hostname"
    kernel.unlink()
    kernel.mkdir()
    assert host.boot(name="node-17")
    assert "the name node-17 holds from the next boot on" in host.lines[0]
    assert (host.root / "etc/hostname").read_text() == "node-17\n"
    assert host.done


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("name", "", "is no host name"),
        ("name", "-node", "is no host name"),
        ("name", "node_17", "is no host name"),
        ("name", "node 17", "is no host name"),
        ("name", "node..17", "is no host name"),
        ("name", "a" * 64, "is no host name"),
        ("name", ".".join(["abc"] * 17), "at most 64"),
        ("name", "10.0.0.1", "is no host name"),
        ("name", "nöde", "is no host name"),
        ("name", b"\xff\xfe", "it is no UTF-8 text"),
        ("name", "x" * 65537, "larger than 65536 bytes"),
        ("name", 'a"\nbroker = "b', "is no host name"),
        ("name", "\x1b[2Jnode", r"'\x1b[2Jnode'"),
        ("broker", "", "is no broker's address; right is mqtts://HOST"),
        ("broker", "broker.example", "is no broker's address"),
        ("broker", "http://broker.example", "is no broker's address"),
        ("broker", "mqtt://broker.example:0", "is no broker's address"),
        ("broker", "mqtt://broker.example:65536", "is no broker's address"),
        ("broker", "mqtt://broker.example:x", "is no broker's address"),
        ("broker", "mqtt://broker.example/path", "is no broker's address"),
        ("broker", "mqtt://broker.example?q", "is no broker's address"),
        ("broker", "mqtt://:1883", "is no broker's address"),
        ("broker", "mqtt://[fe80::1%eth0]", "is no host name"),
        ("broker", "mqtt://bro_ker", "is no host name"),
        ("broker", "mqtt://[::1", "is no broker's address"),
        ("peers", "node-18, 10.0.0.999", "is no host name"),
        ("peers", 'fe80::1%"', "is no host name"),
        ("peers", " ".join(f"n{i}" for i in range(1025)), "1025 peers; at most 1024"),
    ],
)
def test_a_wrong_value_is_named_and_the_rest_is_done(host: Host, name: str, value: str | bytes, why: str) -> None:
    given: dict[str, str | bytes] = {"name": "node-17", "broker": "mqtt://b", "peers": "p"}
    assert not host.boot(**given | {name: value})
    [line] = [one for one in host.lines if one.startswith("<3>")]
    assert line.startswith(f"<3>credential edgehold.{name}: ")
    assert why in line
    assert line.endswith("; correct it where the node is given it, then reboot")
    assert line.isprintable()
    right = {"name": "node-17", "broker": "mqtt://b:1883", "peers": ["p"]}
    rest = {key: one for key, one in right.items() if key != name}
    assert host.node.items() >= rest.items()
    assert host.node.get(name, []) in ([], "edgehold-01234567")
    assert not host.done
    # The cure, as it is said.
    assert host.boot(**given)
    assert host.node == right
    assert host.done


def test_a_password_in_the_brokers_address_is_refused_and_not_repeated(host: Host) -> None:
    assert not host.boot(broker="mqtts://me:secret@broker.example")
    assert "secret" not in "".join(host.lines)
    assert "user or a password" in host.lines[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = node", "Invalid value"),
        ("nmae = 'node'", "nmae: unknown key; known are name, broker, peers"),
        ("name = 17", "name: not a text"),
        ("peers = 'p'", "peers: not a list of texts"),
        ("peers = [1]", "peers: not a list of texts"),
        ("name = ['a']", "name: not a text"),
        ("broker = 'b'", "is no broker's address"),
    ],
)
def test_a_file_that_a_person_spoilt_stays(host: Host, text: str, why: str) -> None:
    file = host.root / "etc/edgehold/node.toml"
    file.parent.mkdir()
    file.write_text(text)
    assert not host.boot(name="node-17")
    assert why in host.lines[0]
    assert str(file) in host.lines[0]
    assert file.read_text() == text
    assert host.names == ("node-17\n", "node-17")


def test_what_is_there_is_kept_and_a_credential_wins(host: Host) -> None:
    assert host.boot(name="node-17", broker="mqtt://b", peers="p q")
    assert host.boot(name="node-18")
    assert host.node == {"name": "node-18", "broker": "mqtt://b:1883", "peers": ["p", "q"]}
    assert host.boot(peers="")
    assert host.node["peers"] == []


def test_daemons_can_read_it(host: Host) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Node:
        name: str
        broker: str = ""
        peers: tuple[str, ...] = ()

    assert host.boot(name="node-17", broker="mqtts://[FE80::1]:1", peers="p")
    node = load_settings(Node, "node", path=host.root / "etc/edgehold/node.toml")
    assert node == Node(name="node-17", broker="mqtts://[fe80::1]:1", peers=("p",))


def test_no_credentials_directory(host: Host) -> None:
    firstboot.FirstBoot(root=host.root, credentials=None, say=host.lines.append).run()
    assert host.done


@pytest.mark.parametrize("wrong", ["secret", "$6$salt$ha:sh567890", "$6$salt$hash567890\nroot:x", ""])
def test_a_password_is_never_repeated(host: Host, wrong: str) -> None:
    (host.root / "etc/shadow").write_text("root:*:1::::::\n")
    assert not host.boot(**{"passwd.hashed-password.root": wrong})
    assert "passwd.hashed-password.root: it is no password's hash" in host.lines[0]
    assert not any("secret" in line or "$6$" in line for line in host.lines)


def test_a_root_that_has_a_password_keeps_it(host: Host) -> None:
    assert host.boot(**{"passwd.hashed-password.root": "$6$salt$hash567890"})
    assert "has a password already" in host.lines[0]
