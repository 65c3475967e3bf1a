"""docs/ci.md: its examples are read and run, and it names all that there is to set."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import yaml
from ci.repository import commit, git
from fxroof.analyzer.budgets import METRICS, budgets
from fxroof.analyzer.cli import main
from fxroof.analyzer.config import ScenarioSettings, Settings, read
from fxroof.analyzer.render import _diff
from fxroof.analyzer.render.registry import formats
from fxroof.analyzer.report import to_json
from render.sample import report
from support import ROOT

TEXT = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
YAML = {text.splitlines()[0].removeprefix("# "): yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"}
WORKFLOWS = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml" and ".github/workflows" in text]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def _scripts() -> list[str]:
    """The shell scripts of all examples."""
    found = [text for kind, text in BLOCKS if kind == "sh"]
    steps = [step for workflow in WORKFLOWS for job in workflow["jobs"].values() for step in job["steps"]]
    found += [step["run"] for step in steps if "run" in step]
    return [*found, "\n".join(YAML[".gitlab-ci.yml"]["fxroof"]["script"])]


def _commands() -> list[str]:
    """Every command line of fxroof, in examples and in prose."""
    lines = [line for script in _scripts() for line in script.splitlines()]
    written = [" ".join(code.split()) for code in re.findall(r"`(fxroof [^`]+)`", PROSE)]
    return [line.strip() for line in lines if line.strip().startswith("fxroof ")] + written


@pytest.mark.parametrize("line", _commands())
def test_every_command_line_is_accepted(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no settings
    name, *arguments = shlex.split(line.replace(" || code=$?", "").replace("--base REV", "--base main"))[1:]
    command: click.Command = main.commands[name]
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    context = command.make_context(name, arguments)
    if context.params.get("revision"):  # the rest is for analyze
        main.commands["analyze"].make_context("analyze", list(context.params["arguments"]))


def _run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = [line for line in script.splitlines() if not line.startswith("pip ")]
    bin_ = Path(
        shutil.which("fxroof", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or ""
    ).parent
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", "\n".join(kept)],
        cwd=folder,
        env={**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The target is a saved report, which takes no tracing."""
    folder = tmp_path / "project"
    commit(folder, {"fxroof.toml": 'targets = ["model.json"]\nfail-on = "never"\n', "model.json": to_json(report())})
    commit(folder, {"README.md": "words"})
    return folder


def test_the_workflow_without_the_action_runs(project, tmp_path):
    steps = WORKFLOWS[1]["jobs"]["fxroof"]["steps"]
    step = next(step for step in steps if "fxroof diff" in step.get("run", ""))
    assert step["env"] == {"BASE": "${{ github.event.pull_request.base.sha }}"}
    environment = {"BASE": git(project, "rev-parse", "HEAD^"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    done = _run(step["run"], project, **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary").read_text(encoding="utf-8").startswith("<!-- fxroof -->")
    (upload,) = (step for step in steps if "upload-sarif" in step.get("uses", ""))
    assert (project / upload["with"]["sarif_file"]).is_file()


def test_the_gitlab_job_runs(project):
    job = YAML[".gitlab-ci.yml"]["fxroof"]
    done = _run("\n".join(job["script"]), project, CI_MERGE_REQUEST_DIFF_BASE_SHA=git(project, "rev-parse", "HEAD^"))
    assert done.returncode == 0, done.stderr
    for file in (*job["artifacts"]["paths"], *job["artifacts"]["reports"].values()):
        assert (project / file).stat().st_size, file


def test_the_baseline_is_made_as_shown(project):
    (script,) = (text for kind, text in BLOCKS if kind == "sh" and "baseline" in text)
    done = _run(script, project)
    assert done.returncode == 0, done.stderr
    for more, counted in (("", "2 findings: "), ("--baseline .fxroof-baseline.json", "no findings; 3 suppressed")):
        assert counted in _run(f"fxroof analyze -f concise {more}", project).stdout


def test_examples_use_the_action_and_the_hooks_as_they_are():
    (used,) = (step for step in WORKFLOWS[0]["jobs"]["fxroof"]["steps"] if "/fxroof@" in step.get("uses", ""))
    assert set(used["with"]) <= set(ACTION["inputs"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    known = {hook["id"] for hook in hooks}
    (repository,) = YAML[".pre-commit-config.yaml"]["repos"]
    assert {hook["id"] for hook in repository["hooks"]} <= known
    assert all(f"`{name}`" in PROSE for name in known)


def test_the_pre_commit_settings_are_valid(tmp_path):
    (text,) = (text for kind, text in BLOCKS if kind == "yaml" and ".pre-commit-config.yaml" in text)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    for kind, file in (("config", tmp_path / "config.yaml"), ("manifest", ROOT / ".pre-commit-hooks.yaml")):
        done = subprocess.run(
            [sys.executable, "-m", "pre_commit", f"validate-{kind}", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def _section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def _names(text: str) -> set[str]:
    """What stands in the first column of the tables."""
    cells = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_input_and_output_of_the_action_is_described():
    assert _names(_section("GitHub")) == set(ACTION["inputs"])
    assert all(f"`{name}`" in _section("GitHub") for name in ACTION["outputs"])


def test_every_setting_is_described():
    assert _names(_section("Settings")) == {field.encode_name for field in msgspec.structs.fields(Settings)}
    (scenarios,) = (line for line in TEXT.splitlines() if line.startswith("| `scenarios` |"))
    assert {f"`{field.encode_name}`" for field in msgspec.structs.fields(ScenarioSettings)} <= set(
        re.findall(r"`[^`]+`", scenarios)
    )


def test_every_metric_is_described_with_limits_that_mean_something():
    assert _names(_section("Budgets")) == set(METRICS)
    limits: list[str] = []
    for line in _section("Budgets").splitlines():
        metrics = re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else []
        limits = re.findall(r'`"([^"]+)"`', line) or limits  # "the same"
        for metric in metrics:
            assert ("at least" in line) is METRICS[metric].at_least
            for limit in limits:
                budgets({metric: limit})


def test_every_format_is_described():
    assert {"terminal", "json"} <= _names(_section("Formats")) == set(formats())
    for line in _section("Formats").splitlines():
        names = re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else []
        assert {name in _diff.FORMATS for name in names} <= {"`diff`" in line}


def test_the_example_settings_mean_something(tmp_path):
    (text,) = (text for kind, text in BLOCKS if kind == "toml")
    (tmp_path / "fxroof.toml").write_text(text, encoding="utf-8")
    found = read(tmp_path / "fxroof.toml")
    table: dict[str, Any] = tomllib.loads(text)
    assert len(found.budgets) == 6
    assert {one.scenario for one in found.budgets} == {"", "chat", "long"}
    assert [one.kind for one in found.budgets if one.metric == "decode.kernels"] == ["crossing"]
    (tmp_path / "pyproject.toml").write_text(
        re.sub(
            r"^\[+(?=[a-z])", lambda match: f"{match[0]}tool.fxroof.", f"[tool.fxroof]\n{text}", flags=re.MULTILINE
        ).replace("[tool.fxroof.tool.fxroof]", "[tool.fxroof]"),
        encoding="utf-8",
    )
    assert read(tmp_path / "pyproject.toml").settings == found.settings
    assert found.settings.targets == tuple(table["targets"])
