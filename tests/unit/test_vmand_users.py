"""Two vmands never share users: what runs as a partition's user is ended with the partition."""

import contextlib
from pathlib import Path

import pytest

from edgehold.errors import FailedError, UnavailableError
from vmand.backend.users import claimed


def test_a_range_is_claimed_once_and_free_again(tmp_path: Path) -> None:
    lock = tmp_path / "uids.lock"
    with claimed(range(5000, 6024), lock=lock):
        for other in (range(5000, 6024), range(4000, 5001), range(6023, 7047)):
            with pytest.raises(UnavailableError, match="uid_first: another vmand"), claimed(other, lock=lock):
                pass
        with claimed(range(6024, 7048), lock=lock), claimed(range(3976, 5000), lock=lock):
            pass
    with claimed(range(5000, 6024), lock=lock):
        pass


def test_no_users_need_no_claim(tmp_path: Path) -> None:
    with claimed(range(0), lock=tmp_path / "none" / "uids.lock"):
        pass


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_not_a_file_of_ours_is_refused(tmp_path: Path, make: object) -> None:
    lock = tmp_path / "uids.lock"
    make(lock)  # type: ignore[operator]
    with contextlib.suppress(IsADirectoryError), pytest.raises(FailedError), claimed(range(1, 5), lock=lock):
        pass
