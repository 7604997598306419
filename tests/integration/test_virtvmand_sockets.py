"""Whose sockets: systemd's where it passes some, ours else; who may use them; what a start needs."""

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgehold.testing.capability import need_root
from edgehold.testing.partitions import private_vmand
from edgehold.testing.virtvmand import PrivateVirtvmand, private_virtvmand

BEGIN_S = 30
NAMES = ("virtvmand-sock", "virtvmand-sock-ro")
# What sd_listen_fds(3) asks for: the descriptors from 3 on, and the pid of the process that is to take them.
_PASSING = """
import os, sys
fds = [int(one) for one in sys.argv[1].split(",")]
kept = [os.dup(one) for one in fds]
for n, one in enumerate(kept):
    os.dup2(one, 3 + n)
    os.set_inheritable(3 + n, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.executable, [sys.executable, "-m", "virtvmand", "--config", sys.argv[3]])
"""


@contextlib.contextmanager
def listening(directory: Path) -> Iterator[list[socket.socket]]:
    """The two sockets as a service manager makes them."""
    directory.mkdir()
    made = []
    try:
        for name in NAMES:
            one = socket.socket(socket.AF_UNIX)
            made.append(one)
            one.bind(str(directory / name))
            one.listen()
        yield made
    finally:
        for one in made:
            one.close()


def asked(path: Path) -> bytes:
    """What the server says to a PING of the keepalive program."""
    ping = bytes.fromhex("0000001c 6b656570 00000001 00000001 00000002 00000000 00000000")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(BEGIN_S)
        client.connect(str(path))
        client.sendall(ping)
        return client.recv(64)


PONG = bytes.fromhex("0000001c 6b656570 00000001 00000002 00000002 00000000 00000000")


async def test_sockets_of_a_service_manager_outlive_the_daemon() -> None:
    async with private_vmand() as vmand, private_virtvmand(vmand, start=False) as virt:
        with listening(virt.sockets) as sockets:
            fds = ",".join(str(one.fileno()) for one in sockets)
            argv = [sys.executable, "-c", _PASSING, fds, ":".join(NAMES), str(virt.config)]
            for _again in range(2):  # whoever connects while nobody runs is answered by the next one
                waiting = asyncio.create_task(asyncio.to_thread(asked, virt.socket))
                looking = asyncio.create_task(asyncio.to_thread(asked, virt.read_only_socket))
                with virt.log.open("ab") as log:
                    process = subprocess.Popen(  # noqa: ASYNC220 - it only begins
                        argv, pass_fds=[one.fileno() for one in sockets], stderr=log
                    )
                try:
                    assert await waiting == PONG, virt.log_text()
                    assert await looking == PONG
                finally:
                    process.terminate()
                    assert await asyncio.to_thread(process.wait, BEGIN_S) == 0
                assert all((virt.sockets / name).is_socket() for name in NAMES)


async def test_our_own_sockets_are_ours_alone_and_go_with_us() -> None:
    async with private_vmand() as vmand, private_virtvmand(vmand) as virt:
        for path in (virt.socket, virt.read_only_socket):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.stat().st_uid == os.geteuid()
        await virt.stop()
        assert list(virt.sockets.iterdir()) == []


async def test_groups_open_them_to_everybody_and_roles_decide() -> None:
    need_root()
    async with private_vmand() as vmand, private_virtvmand(vmand, settings={"access": {"read": ["nogroup"]}}) as virt:
        assert stat.S_IMODE(virt.socket.stat().st_mode) == 0o666


async def test_a_second_one_on_the_same_directory_does_not_start() -> None:
    async with private_vmand() as vmand, private_virtvmand(vmand) as virt:
        second = PrivateVirtvmand(virt.directory, vmand_socket=vmand.socket)
        second.log = virt.directory / "second.log"
        second.spawn()
        assert await second.wait(timeout_s=BEGIN_S) == 1
        assert "another virtvmand uses it" in second.log_text()
        assert await asyncio.to_thread(asked, virt.socket) == PONG


@pytest.mark.parametrize("remains", ["socket", "file"])
async def test_remains_of_a_dead_one_are_replaced_and_other_files_are_not(remains: str) -> None:
    async with private_vmand() as vmand, private_virtvmand(vmand, start=False) as virt:
        virt.sockets.mkdir()
        if remains == "socket":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(virt.socket))
            await virt.start()
            assert await asyncio.to_thread(asked, virt.socket) == PONG
        else:
            virt.socket.write_text("mine")
            virt.spawn()
            assert await virt.wait(timeout_s=BEGIN_S) == 1
            assert "it is there and no socket" in virt.log_text()
            assert virt.socket.read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"socket_dir": "run/libvirt"}, "socket_dir: 'run/libvirt' is not an absolute path"),
        ({"runtime_dir": "/x/" + "y" * 120}, "runtime_dir"),
        ({"mode": "some"}, "mode"),
        ({"shutdown_timeout_s": 0}, "shutdown_timeout_s"),
        ({"colour": "red"}, "colour: unknown key"),
        ({"access": {"read": ["no-such-group"]}}, "no group 'no-such-group'"),
    ],
)
async def test_wrong_settings_are_named(settings: dict[str, object], said: str) -> None:
    async with private_vmand() as vmand, private_virtvmand(vmand, settings=settings, start=False) as virt:
        virt.spawn()
        assert await virt.wait(timeout_s=BEGIN_S) == 78
        assert said in virt.log_text()
