"""The rig: a command of this host's file tree under the test kernel. Few boots, for each takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from edgehold.errors import FailedError, TimedOutError, UnsupportedError
from edgehold.testing import rig
from edgehold.testing.capability import missing

REPO = Path(__file__).resolve().parents[2]

_INSIDE = """
import os, pathlib, sys
import edgehold._kernel
print("kernel", os.uname().release)
print("controllers", pathlib.Path("/sys/fs/cgroup/cgroup.controllers").read_text().strip())
print("cpus", os.cpu_count())
print("environment", os.environ["EH_TEST"], os.environ["EDGEHOLD_RIG"])
print("directory", os.getcwd())
print("words", sys.argv[1:])
pathlib.Path(sys.argv[1]).write_text("written in the guest")
print("to standard error", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def image() -> Path:
    try:
        return rig.kernel_image()
    except UnsupportedError as error:
        missing(str(error))


def test_a_command_runs_under_the_test_kernel(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Output, status, environment, directory, a cgroup v2 with cpuset, the extension, modules; the host unchanged."""
    monkeypatch.setenv("EH_TEST", "it's\n$HOME")
    monkeypatch.chdir(REPO)
    (tmp_path / "inside.py").write_text(_INSIDE)
    file = tmp_path / "a file"
    inside = f"'{sys.executable}' -u '{tmp_path}/inside.py' '{file}' 'two words'"
    run = f"{inside} && modprobe dummy && cat '{file}'; exit 23"
    assert rig.main(["-cpus", "3", "-timeout", "300", "--", "sh", "-c", run]) == 23
    said = capsys.readouterr().out
    assert said.splitlines() == [
        f"kernel {(image / 'release').read_text().strip()}",
        "controllers cpuset cpu io memory hugetlb pids rdma misc",
        "cpus 3",
        "environment it's",
        "$HOME 1",
        f"directory {REPO}",
        f"words {[str(file), 'two words']}",
        "to standard error",
        "written in the guest",
    ]
    assert not file.exists()


@pytest.mark.usefixtures("image")
def test_a_machine_that_hangs_is_ended() -> None:
    """A shell on the console, which nobody talks to: no panic, no end."""
    with pytest.raises(TimedOutError, match="was ended after 2 s"):
        rig.Rig(cpus=1, memory_mib=512, cmdline="rdinit=/bin/sh").run(["true"], timeout_s=2)


def test_a_kernel_that_nobody_builds_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no test kernel 5\.10; there are 6\.1, 6\.12"):
        rig.Rig(kernel="5.10").run(["true"])


def test_the_last_words_of_a_machine_are_shown(tmp_path: Path) -> None:
    (tmp_path / "exchange").mkdir()
    (tmp_path / "exchange" / "output").write_text("half a result\n")
    (tmp_path / "console").write_text("".join(f"line {n}\n" for n in range(100)) + "Kernel panic\n")
    words = r"(.|\n)*half a result(.|\n)*line 99\nKernel panic$"
    with pytest.raises(FailedError, match=r"without an exit status" + words) as no:
        rig._result(tmp_path, ended=True, timeout_s=7)
    assert "line 50\n" not in str(no.value)
    with pytest.raises(TimedOutError, match=r"was ended after 7 s" + words):
        rig._result(tmp_path, ended=False, timeout_s=7)


def test_any_words_reach_the_command(tmp_path: Path) -> None:
    """What the guest's shell is given, tried in the host's: quotes, newlines, an odd name, a directory with a space."""
    directory = tmp_path / "a directory"
    directory.mkdir()
    argv = ["printf", "%s|", "it's", '"', "$HOME", "a\nb", "", "-"]
    text = rig.script([*argv], env={"PATH": "/usr/bin:/bin", "BASH_FUNC_f%%": "() { :; }"}, cwd=directory)
    done = subprocess.run(["/bin/sh", "-ec", text], stdout=subprocess.PIPE, check=True, text=True, env={})
    assert done.stdout == "it's|\"|$HOME|a\nb||-|"
    text = rig.script(["sh", "-c", "pwd; env"], env={"PATH": "/usr/bin:/bin", "A": "1"}, cwd=directory)
    done = subprocess.run(["/bin/sh", "-ec", text], stdout=subprocess.PIPE, check=True, text=True, env={})
    assert done.stdout.splitlines()[0] == str(directory)
    assert {"A=1", "EDGEHOLD_RIG=1"} <= set(done.stdout.splitlines())
