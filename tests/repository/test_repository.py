"""The checks on the project itself: types, lint, layers, packaging."""

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = ("analyzer", "hardware", "rules")


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def passes(*command: str) -> None:
    done = run(sys.executable, "-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types() -> None:
    passes("mypy")


def test_lint() -> None:
    passes("ruff", "check", ".")


def test_format() -> None:
    passes("ruff", "format", "--check", ".")


def test_layers() -> None:
    done = run(sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_with_code_is_packaged() -> None:
    folders = {
        "fxroof." + ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_package_files_are_empty_but_for_their_docstring() -> None:
    for top in TOP:
        for path in (ROOT / top).rglob("__init__.py"):
            assert re.fullmatch(r'""".*"""\n', path.read_text(), re.DOTALL), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_all_code_and_the_whole_catalogue(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for top in TOP:
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".toml") or path.name == "py.typed":
                assert f"fxroof/{path.relative_to(ROOT)}" in names
    foreign = {n for n in names if not n.startswith(("fxroof/analyzer/", "fxroof/hardware/", "fxroof/rules/"))}
    assert {n.split("/")[0] for n in foreign} == {f"fxroof-{PYPROJECT['project']['version']}.dist-info"}


def test_wheel_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # what needs no torch must work without it: a newcomer may look at the catalogue first
    done = run(str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel))
    assert done.returncode == 0, done.stderr
    done = run(str(python), "-m", "pip", "install", "-q", "click", "msgspec", "networkx", "rich")
    assert done.returncode == 0, done.stderr
    fxroof = str(tmp_path / "env" / "bin" / "fxroof")
    done = run(fxroof, "gpus", "b200", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7.7" in done.stdout
    assert run(fxroof, "--version", cwd=tmp_path).stdout.split()[-1] == PYPROJECT["project"]["version"]
