"""A directory of our own: made, refused where it could be somebody else's, locked against a second instance."""

import os
from pathlib import Path

import pytest

from edgehold.directories import owned
from edgehold.errors import UnavailableError


def test_it_is_made_with_its_mode_and_locked(tmp_path: Path) -> None:
    path = tmp_path / "a/b"
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with owned(path, mode=0o700, who="vmand"):
        assert path.stat().st_mode & 0o777 == 0o700
        with pytest.raises(UnavailableError, match="another vmand uses it"), owned(path, mode=0o700, who="vmand"):
            pass
    with owned(path, mode=0o755, who="vmand"):
        assert path.stat().st_mode & 0o777 == 0o755
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_one_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with (
        pytest.raises(UnavailableError, match=r"others may write to it \(mode 0777\)"),
        owned(tmp_path, mode=0o700, who="x"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make one of somebody else's")
def test_one_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(UnavailableError, match="it belongs to uid 65534"), owned(tmp_path, mode=0o700, who="x"):
        pass


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UnavailableError), owned(tmp_path / "link", mode=0o700, who="x"):
        pass
    (tmp_path / "real/.lock").symlink_to(tmp_path / "target")
    with pytest.raises(UnavailableError), owned(tmp_path / "real", mode=0o700, who="x"):
        pass
    assert not (tmp_path / "target").exists()


def test_an_error_inside_the_block_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), owned(tmp_path / "a", mode=0o700, who="x"):
        raise BlockingIOError
