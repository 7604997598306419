"""What sysfs tells of cores."""

import errno
from pathlib import Path

import pytest

from edgehold.errors import FailedError
from vmand.backend import topology


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_siblings_and_nodes(tmp_path: Path) -> None:
    files = {"cpu/online": "0-2,4", "cpu/possible": "0-7", "node/possible": "0-1", "node/has_cpu": "0-1"}
    for core, siblings in {0: "0,4", 1: "1", 2: "2,6", 4: "0,4"}.items():  # 6 is offline
        files[f"cpu/cpu{core}/topology/core_cpus_list"] = siblings
    files |= {"node/node0/cpulist": "0-1,4-5", "node/node1/cpulist": "2-3,6-7"}
    found = topology.read(tree(tmp_path, files))
    assert found.online == {0, 1, 2, 4}
    assert found.siblings == {0: {0, 4}, 1: {1}, 2: {2}, 4: {0, 4}}
    assert found.node == {0: 0, 1: 0, 4: 0, 2: 1}


def test_an_old_kernel_without_nodes(tmp_path: Path) -> None:
    files = {"cpu/online": "0-1"} | {f"cpu/cpu{core}/topology/thread_siblings_list": "0-1" for core in (0, 1)}
    found = topology.read(tree(tmp_path, files))
    assert found.siblings == {0: {0, 1}, 1: {0, 1}}
    assert found.node == {}


def test_without_any_topology_each_core_is_its_own(tmp_path: Path) -> None:
    assert topology.read(tree(tmp_path, {"cpu/online": "0-1"})).siblings == {0: {0}, 1: {1}}


def test_a_tree_without_cores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="is sysfs mounted"):
        topology.read(tmp_path)


@pytest.mark.parametrize(("text", "cores"), [("", set()), ("(null)", set()), ("2-3,7", {2, 3, 7})])
def test_what_the_command_line_isolates(tmp_path: Path, text: str, cores: set[int]) -> None:
    root = tree(tmp_path, {"cpu/isolated": text, "cpu/nohz_full": text})
    assert topology.isolated_by_boot(root) == cores
    assert topology.nohz_full(root) == cores


def test_files_that_this_kernel_does_not_have(tmp_path: Path) -> None:
    assert topology.isolated_by_boot(tmp_path) == topology.nohz_full(tmp_path) == frozenset()


def test_this_host() -> None:
    found = topology.read()
    assert found.online
    for core, siblings in found.siblings.items():
        assert core in siblings
        assert all(found.siblings[one] == siblings for one in siblings)


def test_a_write_makes_no_file_and_names_it_in_its_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        topology.write(path, "1")
    path.write_text("a long text")
    topology.write(path, "2-3")
    assert path.read_text() == "2-3"
    with pytest.raises(OSError, match="oom_score_adj") as caught:
        topology.write(Path("/proc/self/oom_score_adj"), "what")
    assert caught.value.errno == errno.EINVAL
