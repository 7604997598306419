"""The rules of the house, as tests: the import law holds, and breaking it is noticed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = Path(sys.executable).with_name("lint-imports")


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": f"{tree / 'sdk'}:{tree / 'daemons'}", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([LINT, "--no-cache"], cwd=tree, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for part in ("sdk", "daemons"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_import_law_holds(tree: Path) -> None:
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("daemons/vmand/service.py", "import deadlined.rules", "Daemons never import each other"),
        ("daemons/deadlined/service.py", "from vmand import model", "Daemons never import each other"),
        ("sdk/edgehold/cli.py", "import vmand.cli", "The SDK imports no daemon"),
        ("daemons/vmand/model.py", "import asyncio", "Models are pure"),
    ],
)
def test_a_planted_import_is_found(tree: Path, file: str, line: str, contract: str) -> None:
    planted = tree / file
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    done = lint_imports(tree)
    assert done.returncode != 0
    broken = [row for row in done.stdout.splitlines() if " BROKEN" in row]
    assert any(contract in row for row in broken), done.stdout


def test_only_one_module_may_import_the_extension(tree: Path) -> None:
    planted = tree / "daemons/deadlined/service.py"
    planted.write_text(f"{planted.read_text()}\nfrom edgehold import _kernel\n")
    ruff = [str(LINT.with_name("ruff")), "check", "--no-cache", "--output-format=concise", "--select=TID251", "."]
    done = subprocess.run(ruff, cwd=tree, capture_output=True, text=True, check=False)
    assert [line.partition(":")[0] for line in done.stdout.splitlines() if "TID251" in line] == [
        "daemons/deadlined/service.py"
    ]


def test_every_package_is_installed() -> None:
    """A package that pyproject.toml forgets works in an editable checkout and is missing from what users get."""
    import tomllib

    told = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for base in ("sdk", "daemons"):
        for init in (ROOT / base).rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(ROOT / base).parts))
    assert found == told


def test_documents_are_there_and_their_links_lead_somewhere() -> None:
    import re

    for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        assert (ROOT / name).is_file()
    listed = subprocess.run(["git", "ls-files", "--", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    for page in listed.stdout.split():
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
