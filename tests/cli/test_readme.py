"""The README shows what the command prints, and names commands that work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- output of: (?P<command>[^>]+) -->\n```\n(?P<text>.*?)```\n<!-- end of output -->", re.DOTALL)


def test_readme_shows_the_real_output(request: pytest.FixtureRequest) -> None:
    text = README.read_text(encoding="utf-8")
    shown = BLOCK.search(text)
    assert shown is not None
    done = subprocess.run(
        [sys.executable, "-m", "fxroof.analyzer", *shown["command"].split()[1:], "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "100", "PYTHONIOENCODING": "utf-8", "PATH": "/usr/bin:/bin"},
    )
    printed = re.sub(r"^versions .*\n", "", done.stdout, flags=re.MULTILINE)  # differ from machine to machine
    if request.config.getoption("--update-goldens"):
        start, end = shown.span("text")
        README.write_text(text[:start] + printed + text[end:], encoding="utf-8")
    else:
        assert shown["text"] == printed


def test_options_in_the_readme_exist() -> None:
    from click.testing import CliRunner
    from fxroof.analyzer.cli import main

    known = "".join(
        CliRunner().invoke(main, [name, "--help"]).output
        for name in ("analyze", "diff", "baseline", "init", "measure", "calibrate")
    )
    for option in set(re.findall(r"--[a-z][a-z-]+", README.read_text(encoding="utf-8"))):
        assert option in known or option in ("--debug", "--dist"), option


def test_settings_in_the_readme_are_read(tmp_path: Path) -> None:
    from fxroof.analyzer.config import read

    blocks = re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "fxroof.toml").write_text(block)
        assert read(tmp_path / "fxroof.toml").settings.targets


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    assert "<!-- test command -->" in README.read_text()


def test_changelog_and_licence_are_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert Path(ROOT / "CHANGELOG.md").is_file()
