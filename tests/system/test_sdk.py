"""The SDK for programs in the system's own Python, outside of any virtual environment: for whom, and beside what."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.house import Machine

PYTHON = "/usr/bin/python3"
VENDOR = "/usr/lib/edgehold/vendor/"
OWN = "/srv/own"
"""Directory of a program that brings libraries of its own."""
MEMBER, STRANGER = "member", "stranger"
_PROGRAM = f"{OWN}/program.py"
# What it says of each daemon is what it got, or the refusal; and where the libraries came from that it was given.
_TEXT = """import asyncio, json, sys
from edgehold.api.deadlined import DeadlinedClient
from edgehold.api.vmand import VmandClient
from edgehold.errors import EdgeholdError

async def partitions():
    async with await VmandClient.connect() as vmand:
        return [one.name for one in await vmand.list_partitions()]

async def capacity():
    async with DeadlinedClient() as deadlined:
        return (await deadlined.capacity()).cpus

async def main():
    found = {}
    for ask in (partitions, capacity):
        try:
            found[ask.__name__] = await ask()
        except EdgeholdError as error:
            found[ask.__name__] = error.to_wire()
    libraries = ("edgehold", "msgspec", "aiohttp", "yarl")
    found["files"] = {one: sys.modules[one].__file__ for one in libraries if one in sys.modules}
    print(json.dumps(found))

asyncio.run(main())
"""


@pytest.fixture
def host(house: Machine) -> Iterator[Machine]:
    """With a partition to be found, among those of other tests, a program, and two users; one may operate vmand."""
    house.put({_PROGRAM: _TEXT})
    house.sh(f"""
        chmod 755 {OWN}
        vmanctl create -cores 1 -memsize 0.0625 -mode shared -name found
        useradd --system {STRANGER}
        useradd --system --groups vmand {MEMBER}""")
    yield house
    house.sh(f"vmanctl destroy found; userdel {MEMBER}; userdel {STRANGER}; rm -r {OWN}")


def asked(host: Machine, *, user: str = "root", options: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the program says."""
    become = ("setpriv", "--reuid", user, "--regid", user, "--init-groups", "--")
    found: dict[str, Any] = json.loads(host.run(*become, PYTHON, *options, _PROGRAM).output)
    return found


def test_one_line(host: Machine) -> None:
    """As anybody would try it first; also where nothing but the system's own directories is looked at."""
    line = (
        "import asyncio; from edgehold.api.vmand import VmandClient as V\n"
        "async def names(): return [one.name for one in await (await V.connect()).list_partitions()]\n"
        "print(asyncio.run(names()))"
    )
    for options in ((), ("-I",)):
        assert "'found'" in host.run(PYTHON, *options, "-c", line).output


def test_root(host: Machine) -> None:
    """Both daemons answer, with the libraries that came with the package."""
    found = asked(host)
    assert ("found" in found["partitions"], type(found["capacity"])) == (True, int), found
    files = found["files"]
    assert files.pop("edgehold") == "/usr/lib/python3/dist-packages/edgehold/__init__.py"
    assert all(one.startswith(VENDOR) for one in files.values()), files


def test_users(host: Machine) -> None:
    """By groups; a refusal says what to do."""
    member, stranger = asked(host, user=MEMBER), asked(host, user=STRANGER)
    assert "found" in member["partitions"]
    for refused in (member["capacity"], stranger["partitions"], stranger["capacity"]):
        assert "group" in refused["message"], refused
        assert refused["code"] in ("denied", "unavailable"), refused


def test_a_library_of_the_program(host: Machine) -> None:
    """A program's own msgspec is what the SDK takes; the daemons keep theirs."""
    host.run("cp", "-r", f"{VENDOR}msgspec", f"{OWN}/msgspec")
    found = asked(host)
    assert found["files"]["msgspec"] == f"{OWN}/msgspec/__init__.py"
    assert found["files"]["aiohttp"].startswith(VENDOR)
    assert ("found" in found["partitions"], type(found["capacity"])) == (True, int), found


@pytest.mark.parametrize(
    ("package", "whose"),
    [
        pytest.param("python3-aiohttp", "/usr/lib/python3/dist-packages/", id="all of it"),
        pytest.param("python3-yarl", VENDOR, id="only what it needs"),
    ],
)
def test_debians_libraries(host: Machine, package: str, whose: str) -> None:
    """Debian's own are other versions: the SDK takes aiohttp and its needs from one place, daemons take ours alone."""
    host.install(package)
    try:
        found = asked(host)
        assert ("found" in found["partitions"], type(found["capacity"])) == (True, int), found
        assert found["files"]["aiohttp"].startswith(whose), found
        host.run("systemctl", "restart", "deadlined")
        assert host.run("deadlinectl", "list").status == 0
        maps = host.read(f"/proc/{host.main_pid('deadlined.service')}/maps")
        assert VENDOR in maps
        assert not [one for one in ("yarl", "aiohttp", "multidict") if f"dist-packages/{one}" in maps]
    finally:
        host.run("apt-get", "-q", "-y", "purge", "--autoremove", package)


def test_what_is_in_it(host: Machine) -> None:
    """It is typed, it has the extension and no fixtures of tests, and alone it costs nothing."""
    place = "/usr/lib/python3/dist-packages/edgehold"
    for file in ("py.typed", "_kernel.pyi", "_kernel.abi3.so"):
        assert host.run("test", "-e", f"{place}/{file}").status == 0
    assert host.run("test", "-e", f"{place}/testing", check=False).status != 0
    imported = "import sys; before = {*sys.modules}; import edgehold; print(sorted({*sys.modules} - before))"
    assert host.run(PYTHON, "-c", imported).output == "['edgehold']\n"
    native = "import os; from edgehold.kernel import native; print(native.__name__)"
    assert host.run(PYTHON, "-c", native).output == "edgehold.kernel.native\n"
