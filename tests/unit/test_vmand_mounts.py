"""What is mounted where, read from the kernel's text."""

import os
from pathlib import Path

import pytest

from vmand.backend import mounts

MOUNTS = r"""22 1 254:1 / / rw - ext4 /dev/vda1 rw
25 22 0:22 / /dev/shm rw shared:3 - tmpfs tmpfs rw,size=1024k,noswap
26 25 254:1 /x /dev/shm/disk\040one rw - xfs /dev/vdb rw
27 22 0:25 / /srv rw - ext4 /dev/vdc rw
28 22 0:26 / /srv ro,relatime master:1 propagate_from:2 - hugetlbfs none rw,pagesize=2M
"""


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTS)
    return path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/x", "ext4"),
        ("/dev/shm/vmand", "tmpfs"),
        ("/dev/shmx", "ext4"),
        ("/dev/shm/disk one/m", "xfs"),
        ("/srv/m", "hugetlbfs"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str, mountinfo: Path) -> None:
    assert mounts.filesystem(Path(path), mountinfo) == kind


def test_options_of_the_mount_and_of_the_file_system(mountinfo: Path) -> None:
    found = mounts.mounts(mountinfo)
    assert found[4].options == {"ro", "relatime", "rw", "pagesize=2M"}
    assert found[4].device == os.makedev(0, 26)
    assert "noswap" in found[1].options
    assert found[2].point == "/dev/shm/disk one"


def test_a_mount_is_on_top_where_its_point_leads_to_it(tmp_path: Path) -> None:
    one = mounts.Mount(point=str(tmp_path), kind="x", device=tmp_path.stat().st_dev, options=frozenset())
    assert one.on_top
    other = mounts.Mount(point=str(tmp_path), kind="x", device=1, options=frozenset())
    assert not other.on_top
    assert not mounts.Mount(point="/none", kind="x", device=1, options=frozenset()).on_top


def test_the_kernel_s_own_text_is_understood() -> None:
    assert {one.kind for one in mounts.mounts()} & {"proc"}
    assert mounts.filesystem(Path("/proc")) == "proc"


def test_a_path_that_is_on_no_mount_that_we_see(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("")
    assert mounts.filesystem(Path("/x"), tmp_path / "mountinfo") == ""


@pytest.mark.parametrize(
    ("text", "areas"),
    [
        ("Filename\tType\tSize\tUsed\tPriority\n", ()),
        ("Filename\tType\n/dev/sda2   partition 1 0 -2\n/swap\\040file file 1 0 -3\n", ("/dev/sda2", r"/swap\040file")),
        ("", ()),
    ],
)
def test_swap_areas(text: str, areas: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "swaps").write_text(text)
    assert mounts.active_swaps(tmp_path / "swaps") == areas


def test_a_kernel_without_swap_has_no_such_file(tmp_path: Path) -> None:
    assert mounts.active_swaps(tmp_path / "swaps") == ()
