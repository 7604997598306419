"""Interrupts and workqueues are moved and come back, also after a vmand that was killed."""

import errno
import json
import os
from pathlib import Path

import pytest

from vmand.backend import steering
from vmand.backend.steering import FILE, Steering

ONLINE = frozenset(range(4))
MANAGED = 7


class Host:
    """Trees of files as /proc/irq and /sys have them; one interrupt refuses every write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runtime = root / "run"
        self.runtime.mkdir()
        self.writes: list[str] = []
        self.put("sys/devices/virtual/workqueue/cpumask", "f")
        self.put("proc/irq/default_smp_affinity", "f")
        for number, cores in {1: "0-3", 5: "0", 6: "2", MANAGED: "2-3"}.items():
            self.put(f"proc/irq/{number}/smp_affinity_list", cores)
        (root / "proc/irq/8").mkdir()  # one whose descriptor has no affinity

    def put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def write(self, path: Path, text: str) -> None:
        if path.parent.name == str(MANAGED):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        path.write_text(text + "\n")
        self.writes.append(f"{path.relative_to(self.root)}={text}")

    def steering(self, boot: str = "b") -> Steering:
        root = self.root
        return Steering(runtime=self.runtime, online=ONLINE, proc=root / "proc", sys=root / "sys", boot=boot)

    def state(self) -> dict[str, str]:
        return {
            path.parent.name if path.name == "smp_affinity_list" else path.name: path.read_text()
            .strip()
            .removeprefix("0000000")
            for path in self.root.rglob("*")
            if path.is_file() and path.parent != self.runtime
        }


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(steering, "write", made.write)
    return made


def test_there_and_back(host: Host) -> None:
    before = host.state()
    one = host.steering()
    assert one.said() == ""
    one.apply(frozenset({2, 3}))
    assert host.state() == {
        "1": "0-1",
        "5": "0",
        "6": "0-1",  # it could run on 2 alone
        "7": "2-3",
        "default_smp_affinity": "3",
        "cpumask": "3",
    }
    assert one.said().startswith("interrupts and unbound kernel work are kept off cores 2-3; 1 can't be moved: the ker")
    assert "irqbalance" not in one.said()
    one.apply(frozenset())
    assert host.state() == before
    assert one.said() == ""
    assert list(host.runtime.iterdir()) == []


def test_the_file_is_there_before_the_first_change(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, text: str) -> None:
        assert json.loads((host.runtime / FILE).read_bytes())["interrupts"]["1"] == "0-3"
        host.write(path, text)

    monkeypatch.setattr(steering, "write", killed)
    host.steering().apply(frozenset({2}))
    assert host.writes


def test_cores_come_and_go(host: Host) -> None:
    before = host.state()
    one = host.steering()
    one.apply(frozenset({2}))
    assert host.state()["6"] == "0-1,3"
    one.apply(frozenset({2, 3}))
    assert host.state()["1"] == "0-1"
    one.apply(frozenset({3}))
    assert host.state()["6"] == "2"
    # It is as it was found, so it is no longer ours: what somebody else sets now is not taken back.
    host.put("proc/irq/6/smp_affinity_list", "1")
    one.apply(frozenset())
    assert host.state() == before | {"6": "1"}


def test_after_kill_9_the_next_one_restores(host: Host) -> None:
    before = host.state()
    host.steering().apply(frozenset({2, 3}))
    host.steering().apply(frozenset({3}))  # a guest of the killed one is still there
    assert host.state()["1"] == "0-2"
    host.steering().restore()
    assert host.state() == before
    assert not (host.runtime / FILE).exists()


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"boot":"b","interrupts":{"1":"x"}}', b'{"boot":"b","work":"xyz"}'])
def test_a_file_that_is_none(host: Host, text: bytes) -> None:
    before = host.state()
    (host.runtime / FILE).write_bytes(text)
    host.steering().restore()
    assert host.state() == before


def test_another_boot_knows_nothing_of_it(host: Host) -> None:
    host.steering("b").apply(frozenset({2, 3}))
    host.writes.clear()
    host.steering("c").restore()
    assert host.writes == []


def test_without_a_file_nothing_is_moved(host: Host) -> None:
    one = host.steering()
    host.runtime.rmdir()
    one.apply(frozenset({2}))
    assert host.writes == []
    assert "so interrupts stay where they are" in one.said()


def test_no_core_would_be_left(host: Host) -> None:
    one = host.steering()
    one.apply(ONLINE)
    assert host.writes == []
    assert one.said() == "no core would be left for interrupts"


def test_an_interrupt_that_came_back_is_told(host: Host) -> None:
    one = host.steering()
    one.apply(frozenset({2}))
    host.put("proc/irq/1/smp_affinity_list", "0-3")
    assert "; 1 came back or are new (does irqbalance run?" in one.said()


def test_an_interrupt_whose_device_is_gone(host: Host) -> None:
    one = host.steering()
    one.apply(frozenset({2}))
    (host.root / "proc/irq/1/smp_affinity_list").unlink()
    one.apply(frozenset({2, 3}))
    one.restore()
    assert "1" not in host.state()


def test_what_was_asked_of_workqueues_is_kept_apart_from_what_isolation_took(host: Host) -> None:
    host.put("sys/devices/virtual/workqueue/cpumask_requested", "f")
    host.put("sys/devices/virtual/workqueue/cpumask", "b")  # core 2 is in an isolated cpuset
    one = host.steering()
    one.apply(frozenset({2}))
    assert "sys/devices/virtual/workqueue/cpumask=0000000b" in host.writes
    host.put("sys/devices/virtual/workqueue/cpumask_requested", "b")
    one.restore()
    assert "sys/devices/virtual/workqueue/cpumask=0000000f" in host.writes


def test_masks_of_many_cores() -> None:
    assert steering._mask("ff,00000001") == {0, *range(32, 40)}
    assert steering._as_mask(frozenset({0, *range(32, 40)})) == "000000ff,00000001"
    assert steering._as_mask(frozenset()) == "00000000"
