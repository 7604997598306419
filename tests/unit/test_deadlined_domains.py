"""Which libvirts deadlined asks, and what it says where it can't."""

import sys
from pathlib import Path

import pytest

from deadlined import domainask
from deadlined.domainask import Conversation, check_uri
from deadlined.domains import DomainSource, LibvirtLink
from deadlined.partitions import VmandLink
from edgehold.errors import BadRequestError, EdgeholdError, NoCapacityError, UnsupportedError


async def test_a_host_has_few_libvirts() -> None:
    link = LibvirtLink(VmandLink(Path("/nowhere")), vmand_socket=Path("/nowhere"))
    for number in range(8):
        uri = f"qemu:///system?socket=/nowhere/{number}"
        link._sources[uri] = {DomainSource("one", uri, link)}
    with pytest.raises(NoCapacityError, match="8 URIs at most"):
        await link.open("one", "qemu:///system?socket=/nowhere/8")


async def test_without_libvirts_module_it_says_which_package(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation("qemu:///system", answer_s=60.0)
    monkeypatch.setattr(domainask, "interpreter", lambda: sys.executable)  # ours does not have it
    with pytest.raises(UnsupportedError, match="apt install python3-libvirt"):
        await conversation.ask(["one"])
    await conversation.close()
    monkeypatch.setattr(domainask, "interpreter", lambda: "/nowhere/python3")
    with pytest.raises(UnsupportedError, match="python3-libvirt is not installed"):
        await conversation.ask(["one"])


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("qemu:///system", None),
        ("qemu:///session", None),
        ("qemu+unix:///system", None),
        ("qemu+unix:///system?socket=/run/libvirt/libvirt-sock&mode=direct", None),
        ("vman:///system?socket=/run/libvirt/virtvmand-sock-ro", None),
        ("", BadRequestError),
        ("nonsense", BadRequestError),
        ("/system", BadRequestError),
        ("qemu:///nonsense", BadRequestError),
        ("qemu:///embed?root=/tmp", BadRequestError),
        ("qemu:///system#", None),
        ("qemu:///system#x", BadRequestError),
        ("qemu:///system?socket=relative", BadRequestError),
        ("qemu:///system?socket=/a%00b", BadRequestError),
        ("qemu:///system?socket", BadRequestError),
        ("qemu:///system?mode=bold", BadRequestError),
        ("qemu:///system?command=/tmp/evil", BadRequestError),
        ("qemu+unix:///system?socket=/x&netcat=/tmp/evil", BadRequestError),
        ("vman:///session", BadRequestError),
        ("qemu://[::1/system", BadRequestError),
        ("qemu+ext:///system?command=/tmp/evil", UnsupportedError),
        ("qemu+ssh://host/system", UnsupportedError),
        ("qemu+ssh:///system", UnsupportedError),
        ("qemu://host/system", UnsupportedError),
        ("qemu+tcp://localhost/system", UnsupportedError),
        ("test:///default", UnsupportedError),
        ("test:////etc/shadow", UnsupportedError),
        ("lxc:///system", UnsupportedError),
        ("xen:///system", UnsupportedError),
    ],
)
def test_only_this_hosts_guests_are_asked_for(uri: str, kind: type[EdgeholdError] | None) -> None:
    if kind is None:
        check_uri(uri)
        return
    with pytest.raises(EdgeholdError) as refused:
        check_uri(uri)
    assert type(refused.value) is kind
    assert repr(uri) in refused.value.message
