"""Whom deadlined never holds. Looks at this process only."""

import os
import pwd
import threading

import pytest

from deadlined.deny import Deny, DenySettings
from edgehold.kernel import cgroup, procfs
from edgehold.kernel.procfs import GoneError

ME = threading.get_native_id()


def why(**globs: tuple[str, ...]) -> str:
    return Deny(DenySettings(**globs)).why(ME)


def test_nothing_is_denied_by_default() -> None:
    assert not Deny(DenySettings()).why(2**30)
    assert not Deny(DenySettings()).why_group("/system.slice")


def test_by_user() -> None:
    user = pwd.getpwuid(os.geteuid()).pw_name
    number = str(os.geteuid())
    assert f"belongs to user {user}, whom deny.users excludes ({user[0]}*)" in why(users=("nobody-here", f"{user[0]}*"))
    assert f"({number})" in why(users=(number,))
    assert not why(users=("nobody-here", f"{number}1", user.upper()))


def test_by_name() -> None:
    name = procfs.stat(ME).name
    assert why(names=("x?x", name)) == f"thread {ME} is called {name}, which deny.names excludes ({name})"
    assert why(names=(f"{name[0]}*",))
    assert not why(names=(f"{name}x", name.swapcase()))


def test_by_the_name_of_the_process() -> None:
    name = procfs.stat(os.getpid()).name
    said: list[str] = []

    def thread() -> None:
        with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm:  # noqa: PTH123
            comm.write("other) (a\nb")
        said.extend(Deny(DenySettings(names=(glob,))).why(threading.get_native_id()) for glob in (name, "other) (a*"))

    one = threading.Thread(target=thread)
    one.start()
    one.join()
    assert said[0] == f"process {os.getpid()} is called {name}, which deny.names excludes ({name})"
    assert said[1].startswith("thread ")


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        ({"": "/system.slice/sshd.service"}, "sshd.service"),
        ({"name=systemd": "/system.slice/sshd.service/x"}, "sshd.service"),
        ({"": "/", "name=systemd": "/", "cpu": "/docker/sshd-1"}, "sshd-1"),
        ({"": "/system.slice/other.service", "memory": "/sshd"}, ""),
    ],
)
def test_by_unit(paths: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memberships", lambda _tid: paths)
    said = why(units=("getty@*", "sshd*"))
    assert (f"{found} is a unit or cgroup that deny.units excludes (sshd*)" in said) is bool(found)
    assert bool(said) is bool(found)


def test_a_thread_that_ended() -> None:
    for one in ({"users": ("x",)}, {"names": ("x",)}, {"units": ("x",)}):
        with pytest.raises(GoneError):
            Deny(DenySettings(**one)).why(2**30)
