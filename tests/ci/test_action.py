"""The action's own shell steps, run as a runner runs them, with files and an API that stand for GitHub's."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ci.github_api import BOT, TOKEN, GitHub, serving
from ci.repository import FAST, LAYERS, MODEL, SLOW, commit, git
from fxroof.analyzer.render import _diff
from fxroof.analyzer.report import to_json
from render.sample import report
from support import ROOT

pytestmark = pytest.mark.xdist_group("action")  # the two runs are made once

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}

TARGET = '-models; touch pwned/my $(touch pwned) "model".py'
SETTINGS = """
[tool.fxroof]
phase = "decode"
select = ["FUS006"]

[[tool.fxroof.scenarios]]
name = "short"
input-len = 64
output-len = 16
"""


class Job:
    """A job of a workflow that uses the action once.

    Attributes:
        out: what the steps printed on standard output.
        err: and on standard error.
        codes: exit code by step; those that were skipped are missing.
        outputs: of the action's second step.
        summary: of the job.
    """

    def __init__(
        self,
        folder: Path,
        temporary: Path,
        inputs: Mapping[str, str],
        *,
        pull_request: Mapping[str, Any] | None = None,
        api: str = "http://127.0.0.1:1",
        **more: str,
    ) -> None:
        temporary.mkdir()
        self.folder = folder
        self.inputs = {name: one["default"] for name, one in ACTION["inputs"].items()}
        assert set(inputs) <= set(self.inputs)
        self.inputs |= {"python": sys.executable, "package": "none", **inputs}
        self.event = {"pull_request": pull_request} if pull_request else {}
        self.codes: dict[str, int] = {}
        self.outputs: dict[str, str] = {}
        self.out = self.err = ""
        self._files = {name: temporary / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "GIT_"))},
            **{name: str(file) for name, file in self._files.items()},
            "RUNNER_TEMP": str(temporary),
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_REPOSITORY": "octo/model",
            "GITHUB_API_URL": api,
            "no_proxy": "127.0.0.1",
            **more,
        }

    @property
    def summary(self) -> str:
        file = self._files["GITHUB_STEP_SUMMARY"]
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def run(self) -> "Job":
        for name, step in STEPS.items():
            failed = any(self.codes.values())
            condition = step.get("if", "success()")
            if self._holds(condition) and (not failed or "always()" in condition):
                self._step(name, step)
        return self

    def _step(self, name: str, step: Mapping[str, Any]) -> None:
        assert step["shell"] == "bash"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.folder / self._text(step.get("working-directory", ".")),
            env={**self._environment, **{key: self._text(value) for key, value in step.get("env", {}).items()}},
            capture_output=True,
            text=True,
            check=False,
        )
        self.codes[name] = done.returncode
        self.out += done.stdout
        self.err += done.stderr
        if step.get("id") and self._files["GITHUB_OUTPUT"].exists():
            lines = self._files["GITHUB_OUTPUT"].read_text().splitlines()
            self.outputs = dict(line.split("=", 1) for line in lines)

    def _text(self, value: str) -> str:
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda match: self._first(match[1]), value)

    def _first(self, expression: str) -> str:
        return next(filter(None, map(self._value, expression.split(" || "))), "")

    def _holds(self, condition: str) -> bool:
        return all(self._term(term) for term in condition.split(" && "))

    def _term(self, term: str) -> bool:
        if term in ("always()", "success()"):
            return True
        compared = re.fullmatch(r"(\S+) (==|!=) '(.*)'", term)
        if compared is None:
            return bool(self._value(term))
        return (self._value(compared[1]) == compared[3]) is (compared[2] == "==")

    def _value(self, name: str) -> str:
        found: Any = {
            "inputs": self.inputs,
            "github": {"token": TOKEN, "event": self.event},
            "steps": {"fxroof": {"outputs": self.outputs}},
        }
        for part in name.split("."):
            found = found.get(part, {}) if isinstance(found, dict) else {}
        return "" if found == {} else str(found)


@pytest.fixture(scope="module")
def github() -> Iterator[GitHub]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two branches that change the model, `slower` and `harmless`, and the merge of one of them."""
    folder = tmp_path_factory.mktemp("origin") / "model"
    commit(folder, {"README.md": "words"})
    git(folder, "tag", "stale")
    files = {TARGET: MODEL, "src/mylayers/__init__.py": "", "src/mylayers/mlp.py": LAYERS, "pyproject.toml": SETTINGS}
    base = commit(folder, files)
    for name, layers in (("slower", LAYERS.replace(FAST, SLOW)), ("harmless", f"# the feed-forward part\n\n{LAYERS}")):
        git(folder, "checkout", "--quiet", "-b", name, base)
        commit(folder, {"src/mylayers/mlp.py": layers})
    git(folder, "checkout", "--quiet", "-b", "merge", base)
    git(folder, "merge", "--quiet", "--no-ff", "--no-edit", "slower")
    return folder


def _pull_request(origin: Path, branch: str, github: GitHub, temporary: Path, *, head: str, base: str) -> Job:
    """As actions/checkout leaves it: the newest commit alone."""
    clone = temporary / "work"
    git(temporary, "clone", "--quiet", "--depth=1", f"--branch={branch}", f"file://{origin}", str(clone))
    sides = {name: {"sha": git(origin, "rev-parse", of)} for name, of in (("head", head), ("base", base))}
    return Job(
        clone,
        temporary / "runner",
        {"target": TARGET, "gpu": "h100,\n b200 ,", "sarif": "out file.sarif"},
        pull_request={"number": 7, **sides},
        api=github.url,
        PYTHONPATH=str(clone / "src"),
    ).run()


@pytest.fixture(scope="module")
def slower(origin: Path, github: GitHub, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """What is checked out is the merge; the base that the event names is older than what it was merged into."""
    return _pull_request(origin, "merge", github, tmp_path_factory.mktemp("slower"), head="slower", base="stale")


@pytest.fixture(scope="module")
def harmless(slower: Job, origin: Path, github: GitHub, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The next push to the same pull request; what is checked out is its own commit."""
    return _pull_request(origin, "harmless", github, tmp_path_factory.mktemp("next"), head="harmless", base="main")


def test_a_slower_change_is_stopped(slower, github):
    assert slower.codes == {"Analyse": 1, "Comment": 0}, slower.err
    assert slower.out.startswith("fails: decode +")
    assert re.search(r"^::warning file=src/mylayers/mlp.py,line=\d+,title=FUS006", slower.out, re.MULTILINE)
    assert slower.summary.startswith("<!-- fxroof -->\n")
    assert "**fails: decode +" in slower.summary
    assert slower.out.endswith("comment created\n")


def test_a_harmless_change_is_let_through(harmless):
    assert harmless.codes == {"Analyse": 0, "Comment": 0}, harmless.err
    assert harmless.out.startswith("passes: ")
    assert "**passes: " in harmless.summary
    assert harmless.out.endswith("comment updated\n")


def test_there_is_one_comment_and_it_says_what_the_last_push_did(slower, harmless, github):
    (comment,) = github.comments
    assert comment["body"] == harmless.summary
    assert [method for method, _ in github.asked if method != "GET"] == ["POST", "PATCH"]


def test_both_gpus_are_compared(slower):
    for part in ("h100_sxm", "b200"):
        assert re.search(rf"decode.time breaks \+2% on {part}", slower.summary)


def test_the_files_that_it_names_are_there(slower):
    assert Path(slower.outputs["markdown"]).read_text(encoding="utf-8") == slower.summary
    assert {file.name for file in Path(slower.outputs["reports"]).iterdir()} == {"base.json", "head.json", "fxroof.md"}
    assert (slower.folder / "out file.sarif").read_text(encoding="utf-8").count('"ruleId"') >= 1


def test_nothing_that_was_given_ran(slower, harmless):
    for job in (slower, harmless):
        assert list(job.folder.rglob("*pwned")) == [job.folder / "-models; touch pwned"]
        assert git(job.folder, "status", "--porcelain", "--untracked-files=all") == '?? "out file.sarif"'
        assert len(git(job.folder, "worktree", "list").splitlines()) == 1


def test_a_read_only_token_warns_and_fails_nothing(slower, tmp_path):
    """As in a pull request from a fork."""
    with serving() as fork:
        fork.read_only = True
        job = Job(tmp_path, tmp_path / "runner", {}, pull_request={"number": 7}, api=fork.url)
        job.outputs = slower.outputs
        job._step("Comment", STEPS["Comment"])
    assert job.codes == {"Comment": 0}
    (warning,) = job.out.splitlines()
    assert warning.startswith("::warning title=fxroof::error: The comment could not be put there: 403 Resource not")
    assert "%0Ahint: The job needs permissions: pull-requests: write" in warning
    assert fork.comments == []


def test_a_push_without_a_base_is_analysed_alone(slower, github, tmp_path):
    """A saved report is a target, too: it takes no tracing."""
    shutil.copy(Path(slower.outputs["reports"]) / "head.json", tmp_path / "-head.json")
    asked = len(github.asked)
    job = Job(tmp_path, tmp_path / "runner", {"target": "-head.json", "fail-on": "warning"}, api=github.url).run()
    assert job.codes == {"Analyse": 1}, job.err
    assert "FUS006" in job.summary
    assert "::warning " in job.out
    assert len(github.asked) == asked
    assert (Path(job.outputs["reports"]) / "head.json").is_file()
    job = Job(tmp_path, tmp_path / "other", {"target": "-head.json"}).run()
    assert job.codes == {"Analyse": 0}, job.err


HOSTILE = ('"; touch pwned; #', "$(touch pwned)", "' || touch pwned", "--help")


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_given_reaches_fxroof_as_data(tmp_path, text):
    job = Job(tmp_path, tmp_path / "runner", {"target": text, "gpu": text, "sarif": f"{text}.sarif"}).run()
    assert job.codes == {"Analyse": 2}
    assert f"no GPU is called {text!r}" in job.err
    assert {file.name for file in tmp_path.iterdir()} == {"runner"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fail-on": "never --exit-zero"}, "'never --exit-zero' is not one of"),
        ({"fail-on": "$(touch pwned)"}, "'$(touch pwned)' is not one of"),
        ({"arguments": "--batch-size=8 --tp 2"}, "'8 --tp 2' is not a valid integer"),
        ({"arguments": "--phase=decode\n\n--batch-size=$(touch pwned)"}, "'$(touch pwned)' is not a valid integer"),
        ({"sarif": "$(touch pwned)/x"}, "there is no folder"),
    ],
)
def test_other_inputs_are_data_too(tmp_path, given, said):
    job = Job(tmp_path, tmp_path / "runner", {"target": "a.py", "gpu": "h100", **given}).run()
    assert job.codes == {"Analyse": 2}
    assert said in job.err
    assert {file.name for file in tmp_path.iterdir()} == {"runner"}


@pytest.mark.parametrize("base", ["nowhere", "$(touch pwned)", "--upload-pack=touch pwned"])
def test_a_base_that_cannot_be_had_stops_the_job(tmp_path, base):
    folder = tmp_path / "model"
    commit(folder, {"fxroof.toml": 'targets = ["model.json"]', "model.json": to_json(report())})
    job = Job(folder, tmp_path / "runner", {"base": base}).run()
    assert job.codes == {"Analyse": 2}
    assert "revision" in job.err
    assert {file.name for file in folder.iterdir()} == {".git", "fxroof.toml", "model.json"}


def test_a_push_that_cannot_be_analysed_replaces_what_an_earlier_one_did(tmp_path):
    with serving() as github:
        github.add(f"{_diff.TAG}\n**passes**", BOT)
        given = {"target": "a.py", "gpu": "nosuch"}
        job = Job(tmp_path, tmp_path / "runner", given, pull_request={"number": 7}, api=github.url).run()
    assert job.codes == {"Analyse": 2, "Comment": 0}
    (comment,) = github.comments
    assert comment["body"].startswith(f"{_diff.TAG}\n")
    assert "**stopped: " in comment["body"]
    assert comment["body"] == job.summary


def test_a_merge_group_has_a_base_too(tmp_path):
    job = Job(tmp_path, tmp_path / "runner", {})
    job.event = {"merge_group": {"base_sha": "0123"}}
    assert job._text(STEPS["Analyse"]["env"]["FXROOF_EVENT_BASE"]) == "0123"


def test_a_comment_that_is_not_wanted_is_not_written(slower, github, tmp_path):
    shutil.copy(Path(slower.outputs["reports"]) / "head.json", tmp_path / "head.json")
    asked = len(github.asked)
    given = {"target": "head.json", "comment": "false", "working-directory": "."}
    job = Job(tmp_path, tmp_path / "runner", given, pull_request={"number": 7}, api=github.url).run()
    assert job.codes == {"Analyse": 0}, job.err
    assert len(github.asked) == asked


# --- installing


@pytest.mark.parametrize("text", ["$(touch pwned)", '"; touch pwned; #', "--help"])
def test_a_package_is_data(tmp_path, text):
    job = Job(tmp_path, tmp_path / "runner", {"package": text}, PIP_NO_INDEX="1")
    job._step("Install", STEPS["Install"])
    assert job.codes["Install"] != 0
    assert {file.name for file in tmp_path.iterdir()} == {"runner"}


def test_it_installs_itself_with_what_configs_need(tmp_path):
    """Of a copy, since building leaves files; and as far as --dry-run, since it is installed here already."""
    copy = tmp_path / "action"
    for name in ("analyzer", "hardware", "rules"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    job = Job(tmp_path, tmp_path / "runner", {"package": ""}, GITHUB_ACTION_PATH=str(copy))
    run = STEPS["Install"]["run"].replace(" --quiet", " --dry-run --no-index --no-build-isolation")
    job._step("Install", {**STEPS["Install"], "run": run})
    assert job.codes == {"Install": 0}, job.err
    assert re.search(r"^Would install fxroof-", job.out, re.MULTILINE)
    assert re.search(r"^Requirement already satisfied: transformers", job.out, re.MULTILINE)


# --- what the file says


def test_nothing_of_github_is_put_into_a_script():
    for step in STEPS.values():
        assert "${{" not in step["run"]


def test_every_input_is_used_and_described():
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    for name, one in ACTION["inputs"].items():
        assert f"inputs.{name}" in text
        assert one["description"].strip()
