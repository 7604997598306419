"""What a guest's command line, its files and the KVM probe look like."""

import shutil
import subprocess
from pathlib import Path

import pytest

from edgehold.api.vmand import Mode
from edgehold.errors import BadRequestError, UnsupportedError
from edgehold.testing.capability import missing
from vmand.backend import images, kvm, kvmprobe, launcher
from vmand.backend.command import kernel_cmdline, qemu_argv
from vmand.model import Images, Record

RECORD = Record(id=7, uuid="u", name="n", mode=Mode.SHARED, cores=3, memory_bytes=64 << 20, run="r-u-n")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("", "console=ttyS0"),
        ("quiet", "quiet console=ttyS0"),
        ("console=hvc0 quiet", "console=hvc0 quiet"),
        ("x.console=y", "x.console=y console=ttyS0"),
    ],
)
def test_a_console_is_added_only_where_none_is_named(given: str, made: str) -> None:
    assert kernel_cmdline(given) == made


def test_the_command_line_names_run_and_places() -> None:
    argv = qemu_argv(
        "qemu",
        RECORD,
        Images(kernel="/k", initrd="/i"),
        accelerator="tcg",
        memory=Path("/m/a,b.mem"),
        directory=Path("/run/x/p/7"),
    )
    assert launcher.run_of(argv) == "r-u-n"
    assert "-S" in argv
    joined = " ".join(argv)
    assert "mem-path=/m/a,,b.mem," in joined
    assert "path=/run/x/p/7/qmp.sock," in joined
    assert "-m 64M" in joined
    assert "cpus=3" in joined
    assert argv[argv.index("-append") + 1] == "console=ttyS0"
    assert argv[argv.index("-initrd") + 1] == "/i"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(b"k")
    return path


def check(kernel: Path | str, *, initrd: str = "", dtb: str = "", cmdline: str = "") -> Images:
    return images.check(kernel=str(kernel), initrd=initrd, dtb=dtb, cmdline=cmdline, limit_mib=1)


def test_good_images(kernel: Path) -> None:
    assert check(kernel, cmdline="quiet") == Images(kernel=str(kernel), cmdline="quiet")


def test_bad_images_are_named_with_the_cure(kernel: Path, tmp_path: Path) -> None:
    import os

    with pytest.raises(BadRequestError, match=r"kernel: .*not an absolute path"):
        check("Image")
    with pytest.raises(BadRequestError, match=r"kernel: .*not an absolute path"):
        check("/a\0b")
    with pytest.raises(BadRequestError, match=r"kernel: .*No such file"):
        check(tmp_path / "none")
    with pytest.raises(BadRequestError, match=r"initrd: .*not a regular file"):
        check(kernel, initrd=str(tmp_path))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(BadRequestError, match=r"initrd: .*not a regular file"):
        check(kernel, initrd=str(fifo))
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(BadRequestError, match="has 0 bytes"):
        check(empty)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(BadRequestError, match="1 to 1 MiB are allowed"):
        check(large)
    with pytest.raises(UnsupportedError, match="takes no device tree"):
        check(kernel, dtb="/d")


def test_the_probe_is_its_source(tmp_path: Path) -> None:
    """Assembling kvmprobe.S anew gives the bytes that are run."""
    if shutil.which("as") is None or shutil.which("ld") is None:
        missing("as and ld are not installed (Debian package binutils)")
    source = Path(kvm.__file__).parent / "kvmprobe.S"
    subprocess.run(["as", "--64", "-o", tmp_path / "p.o", source], check=True)
    subprocess.run(
        ["ld", "-Ttext=0xF0000", "--oformat", "binary", "-o", tmp_path / "p.bin", tmp_path / "p.o"], check=True
    )
    assert (tmp_path / "p.bin").read_bytes() == kvm.image()
    assert len(kvm.image()) == 65536
    assert kvm.image().startswith(kvmprobe.CODE)


@pytest.mark.parametrize(
    ("status", "letters", "complaint", "expected"),
    [
        (33, "RPLHSTU", "", ""),
        (None, "RPLH", "", "at the CPU's own speed"),
        (None, "", "", "within 5 s a tiny guest did not run in real mode"),
        (0, "RPLHST", "", "CPU was reset when it should run user mode"),
        (1, "", "no permission", "QEMU can't use it: no permission"),
        (-6, "", "", "QEMU can't use it: status -6"),
        (None, "RPLHSTU", "", "leave"),
    ],
)
def test_verdicts(status: int | None, letters: str, complaint: str, expected: str) -> None:
    verdict = kvm.verdict(status, letters, complaint)
    assert expected in verdict
    assert bool(verdict) == bool(expected)
