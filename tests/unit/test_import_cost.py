"""Importing the SDK costs little and pulls in nothing that was not asked for."""

import subprocess
import sys

import pytest

HEAVY = {
    "aiohttp",
    "click",
    "prometheus_client",
    "msgspec",
    "qemu",
    "sqlite3",
    "asyncio",
    "cffi",
    "logging",
    "ssl",
    "vmand",
    "deadlined",
}


def modules_after(statement: str) -> set[str]:
    code = f"import sys\nold = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import edgehold", set()),
        ("import edgehold.errors", set()),
        ("import edgehold.settings", {"msgspec"}),
        ("import edgehold.systemd.notify", set()),
        ("import edgehold.api.deadlined", {"msgspec"}),
        ("import edgehold.api.vmand", {"msgspec", "asyncio", "logging", "ssl"}),
        ("import vmand.cli", {"vmand", "click", "msgspec", "asyncio", "logging", "ssl"}),
        ("import deadlined.cli", {"deadlined", "click", "msgspec", "asyncio", "logging", "ssl"}),
    ],
)
def test_imports_bring_only_what_they_need(statement: str, allowed: set[str]) -> None:
    assert modules_after(statement) & HEAVY <= allowed


def test_import_edgehold_costs_under_60_ms_of_cpu() -> None:
    """The whole interpreter's user and system time with the import, the smallest of five."""
    code = "import edgehold, resource as r; u = r.getrusage(r.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"
    costs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(costs) < 0.060


def test_virtvmand_brings_no_tls_no_hashes_and_no_compression() -> None:
    """Libraries of some megabytes; asyncio would bring the first two, shutil the others."""
    absent = {"_ssl", "_hashlib", "_lzma", "_bz2", "aiohttp", "prometheus_client", "sqlite3", "click", "vmand"}
    assert modules_after("import virtvmand.__main__") & absent == set()
