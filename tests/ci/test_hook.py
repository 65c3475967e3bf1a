"""The hooks for pre-commit, run by pre-commit itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ci.repository import commit, git, put
from fxroof.analyzer.report import to_json
from render.sample import report
from support import ROOT

pytestmark = pytest.mark.xdist_group("hook")

MANIFEST = ".pre-commit-hooks.yaml"


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project as pre-commit sees it: the hooks install nothing, so their file is all that it looks at."""
    folder = tmp_path_factory.mktemp("hooks") / "fxroof"
    commit(folder, {MANIFEST: (ROOT / MANIFEST).read_text(encoding="utf-8")})
    return folder


def _tried(hooks: Path, folder: Path, hook: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    fxroof = shutil.which("fxroof", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert fxroof is not None
    return subprocess.run(
        [sys.executable, "-m", "pre_commit", "try-repo", str(hooks), hook, "--verbose", "--color=never"],
        cwd=folder,
        env={
            **environment,
            "PATH": f"{Path(fxroof).parent}{os.pathsep}{os.environ['PATH']}",
            "PRE_COMMIT_HOME": str(folder.parent / "store"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("limit", "code"), [("1 ns", 1), ("1 min", 0)])
def test_a_broken_budget_keeps_a_commit_from_being_made(hooks, tmp_path, limit, code):
    """A saved report is a target that takes no tracing."""
    settings = f'targets = ["model.json"]\n[budgets]\ndecode.time = "{limit}"\n'
    commit(tmp_path / "project", {"fxroof.toml": settings, "model.json": to_json(report())})
    put(tmp_path / "project", {"model.py": "x = 1"})
    git(tmp_path / "project", "add", "model.py")
    done = _tried(hooks, tmp_path / "project", "fxroof")
    assert done.returncode == code, done.stdout + done.stderr
    assert "2 findings: 1 warning, 1 info; 1 suppressed" in done.stdout
    assert ("budget: x100: decode.time is 207 µs, limit 1 ns: broken" in done.stdout) is (code == 1)


def test_a_commit_that_touches_no_model_is_not_looked_at(hooks, tmp_path):
    commit(tmp_path / "project", {"fxroof.toml": 'targets = ["missing.py"]\ngpus = ["h100"]\n'})
    put(tmp_path / "project", {"README.md": "words"})
    git(tmp_path / "project", "add", "README.md")
    for hook in ("fxroof", "fxroof-diff"):
        done = _tried(hooks, tmp_path / "project", hook)
        assert done.returncode == 0
        assert "(no files to check)Skipped" in done.stdout


def test_the_other_hook_compares_with_the_last_commit(hooks, tmp_path):
    commit(tmp_path / "project", {"model.py": "", "fxroof.toml": 'targets = ["model.py"]\n'})
    put(tmp_path / "project", {"model.py": "x = 1"})
    git(tmp_path / "project", "add", "model.py")
    done = _tried(hooks, tmp_path / "project", "fxroof-diff")
    assert done.returncode == 1
    assert "exit code: 2" in done.stdout.lower()
    assert "Missing option '--gpu'" in done.stdout  # said by the analysis that it has started


def test_the_hooks_use_what_is_installed_and_hand_over_no_files():
    for hook in yaml.safe_load((ROOT / MANIFEST).read_text(encoding="utf-8")):
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False
        assert hook["require_serial"] is True
