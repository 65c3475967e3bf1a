"""Revisions checked out and analysed: what is found there, what is left behind, and what is said where it cannot be."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ci.repository import FAST, LAYERS, MODEL, SLOW, commit, git, put
from click.testing import CliRunner
from fxroof.analyzer import redirect
from fxroof.analyzer.cli import main
from fxroof.analyzer.report import to_json
from fxroof.analyzer.revisions import NotAnalysedError, RevisionError, analysed, checked_out
from render.sample import report

pytestmark = pytest.mark.xdist_group("revisions")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits, the first tagged `one`, and a change that is not committed."""
    folder = tmp_path_factory.mktemp("there") / "project"
    commit(folder, {"a.txt": "one", "sub/b.txt": "one", ".gitignore": "ignored\n"})
    git(folder, "tag", "one")
    commit(folder, {"a.txt": "two", "later/c.txt": "two"})
    put(folder, {"a.txt": "not committed", "ignored": "mine", "untracked": "mine"})
    return folder


@pytest.fixture
def unchanged(repository: Path) -> Iterator[None]:
    """No worktree, no file and no setting of the repository may differ afterwards."""
    before = _state(repository)
    yield
    assert _state(repository) == before


def _state(repository: Path) -> list[object]:
    files = {
        path.relative_to(repository): path.read_bytes()
        for path in repository.rglob("*")
        if path.is_file() and path.relative_to(repository).parts[:2] != (".git", "index")
    }
    return [git(repository, "worktree", "list"), git(repository, "status", "--porcelain"), files]


@pytest.mark.usefixtures("unchanged")
def test_the_folder_is_that_of_the_revision_and_gone_afterwards(repository):
    with checked_out("one", repository) as place:
        assert place != repository
        assert place.name == repository.name
        assert (place / "a.txt").read_text() == "one"
        assert {path.name for path in place.iterdir()} == {".git", ".gitignore", "a.txt", "sub"}
        with checked_out("main", repository / "sub") as other:
            assert other.name == "sub"
            assert (other.parent / "a.txt").read_text() == "two"
            assert (other / "b.txt").read_text() == "one"
    assert not place.exists()
    assert not other.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.usefixtures("unchanged")
def test_it_is_gone_however_the_block_ends(repository, error):
    with pytest.raises(error), checked_out("one", repository) as place:
        raise error
    assert not place.parent.exists()


@pytest.mark.usefixtures("unchanged")
def test_ctrl_c_leaves_nothing(repository, tmp_path):
    program = (
        "import sys; from pathlib import Path; from fxroof.analyzer.revisions import checked_out\n"
        "import time\n"
        "with checked_out('one', Path(sys.argv[1])) as place:\n"
        "    print(place, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(repository)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdout is not None
    with child:
        place = Path(child.stdout.readline().strip())
        assert (place / "a.txt").read_text() == "one"
        child.send_signal(signal.SIGINT)
    assert child.returncode != 0
    assert not place.exists()


@pytest.mark.usefixtures("unchanged")
def test_variables_of_a_git_hook_lead_nowhere_else(repository, tmp_path, monkeypatch):
    commit(tmp_path / "other", {"a.txt": "other"})
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    with checked_out("one", repository) as place:
        assert (place / "a.txt").read_text() == "one"
    assert not (tmp_path / "index").exists()


def test_hooks_and_filters_of_the_repository_do_not_run(tmp_path):
    folder = tmp_path / "project"
    commit(folder, {"a.txt": "one", ".gitattributes": "*.big filter=lfs\n", "x.big": "version a-pointer\n"})
    git(folder, "config", "filter.lfs.smudge", "no-such-command")
    git(folder, "config", "filter.lfs.process", "no-such-command")
    git(folder, "config", "filter.lfs.required", "true")
    hook = folder / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    hook.chmod(0o755)
    with checked_out("main", folder) as place:
        assert (place / "x.big").read_text() == "version a-pointer\n"
    assert not (tmp_path / "ran").exists()


def test_files_of_the_working_tree_are_put_into_the_checkout(repository):
    put(repository, {"fxroof.toml": "new = 1"})
    files = [repository / "fxroof.toml", repository / "later" / "c.txt", repository / "sub" / ".." / "a.txt"]
    with checked_out("one", repository / "sub", overlay=files) as place:
        assert (place.parent / "fxroof.toml").read_text() == "new = 1"
        assert (place.parent / "later" / "c.txt").read_text() == "two"
        assert (place.parent / "a.txt").read_text() == "not committed"
    (repository / "fxroof.toml").unlink()


def test_an_overlay_never_leaves_the_checkout(tmp_path):
    folder, outside = tmp_path / "project", tmp_path / "outside"
    outside.mkdir()
    commit(folder, {"a.txt": "one"})
    (folder / "conf").symlink_to(outside)
    commit(folder, {})
    git(folder, "tag", "linked")
    (folder / "conf").unlink()
    put(folder, {"conf/fxroof.toml": "x = 1", "../elsewhere.toml": "x = 1"})
    with (
        pytest.raises(RevisionError, match="link"),
        checked_out("linked", folder, overlay=[folder / "conf/fxroof.toml"]),
    ):
        pass
    with (
        pytest.raises(RevisionError, match="outside"),
        checked_out("linked", folder, overlay=[tmp_path / "elsewhere.toml"]),
    ):
        pass
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    "revision", ["nowhere", "one^^^", "", " ", "--help", "-x", "a\nb", "x\0y", "one:a.txt", "$(touch x)"]
)
@pytest.mark.usefixtures("unchanged")
def test_an_unknown_revision_is_one_message(repository, revision):
    with pytest.raises(RevisionError) as raised, checked_out(revision, repository):
        pass
    assert not isinstance(raised.value, NotAnalysedError)
    assert "revision" in raised.value.message
    assert raised.value.hint


def test_a_remote_branch_is_suggested(repository, tmp_path):
    clone = tmp_path / "clone"
    git(repository, "branch", "--force", "feature", "one")
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    with pytest.raises(RevisionError) as raised, checked_out("feature", clone):
        pass
    assert raised.value.hint == "Did you mean origin/feature?"
    git(repository, "branch", "-D", "feature")


def test_a_shallow_clone_says_how_to_get_the_commit(repository, tmp_path):
    clone = tmp_path / "clone"
    first = git(repository, "rev-parse", "one")
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", str(clone))
    with pytest.raises(RevisionError) as raised, checked_out(first, clone):
        pass
    assert "fetch-depth: 0" in raised.value.hint
    command = raised.value.hint.partition("(git ")[2].partition(")")[0]
    git(clone, *command.split())  # what it says helps
    with checked_out(first, clone) as place:
        assert (place / "a.txt").read_text() == "one"


def test_a_folder_that_the_revision_lacks_is_named(repository):
    with pytest.raises(NotAnalysedError, match="one has no folder later"), checked_out("one", repository / "later"):
        pass


@pytest.mark.parametrize("where", ["nothing", "nothing/missing", "bare", "bare/refs"])
def test_no_repository_is_one_message(tmp_path, where):
    (tmp_path / "nothing").mkdir()
    git(tmp_path, "init", "--quiet", "--bare", "bare")
    with pytest.raises(RevisionError) as raised, checked_out("main", tmp_path / where):
        pass
    assert str(tmp_path / where) in raised.value.message


def test_the_repository_of_another_user_is_one_message(repository, monkeypatch):
    """As in a container, where git refuses it."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    with pytest.raises(RevisionError, match="does not trust") as raised, checked_out("one", repository):
        pass
    assert "safe.directory" in raised.value.hint


def test_no_git_is_one_message(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    with pytest.raises(RevisionError, match="git is not installed") as raised, checked_out("one", repository):
        pass
    assert "fxroof diff base.json head.json" in raised.value.hint


def test_what_a_checkout_lacks_is_said_when_the_analysis_fails(tmp_path):
    commit(tmp_path / "vendor", {"x.py": ""})
    folder = tmp_path / "project"
    commit(folder, {"a.txt": "", ".gitattributes": "*.json filter=lfs diff=lfs\n"})
    git(
        folder,
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        str(tmp_path / "vendor"),
        "third/party",
    )
    commit(folder, {})
    with pytest.raises(NotAnalysedError) as raised, checked_out("main", folder):
        raise NotAnalysedError("main: no such file.", "Look.")
    assert raised.value.message == "main: no such file."
    assert raised.value.hint.startswith("Look. The checkout has no submodules (third/party) and no files that Git LFS")
    assert len(git(folder, "worktree", "list").splitlines()) == 1


# --- imports


def _imported(place: Path, code: str, path: list[Path], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, path)))
    imports = next(parent for parent in place.parents if (parent / ".fxroof-imports").is_dir()) / ".fxroof-imports"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=place,
        env=redirect.environment(imports, os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


SHOW = "import {0}; print({0}.VALUE, {0}.__file__)"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "project"
    files = {
        "src/mine/__init__.py": "from .inner import VALUE",
        "src/mine/inner.py": "VALUE = 'old'",
        "src/spaced/part.py": "VALUE = 'old'",
        "src/only_before.py": "VALUE = 'old'",
        "env/lib/site-packages/foreign.py": "VALUE = 'foreign'",
    }
    commit(folder, files)
    git(folder, "tag", "old")
    (folder / "src/only_before.py").unlink()
    new = {name: text.replace("old", "new") for name, text in files.items() if "only_before" not in name}
    commit(folder, {**new, "src/mine/added.py": "VALUE = 'new'", "env/lib/site-packages/foreign.py": "VALUE = 'kept'"})
    return folder


@pytest.mark.parametrize(
    ("module", "value"),
    [("mine", "old"), ("mine.inner", "old"), ("spaced.part", "old"), ("only_before", "old"), ("foreign", "kept")],
)
def test_imports_from_the_repository_come_from_the_checkout(packages, monkeypatch, module, value):
    path = [packages / "src", packages / "env" / "lib" / "site-packages"]
    with checked_out("old", packages) as place:
        found, file = _imported(place, SHOW.format(module), path, monkeypatch).split()
        assert found == value
        assert Path(file).is_relative_to(packages if module == "foreign" else place)


def test_what_the_revision_lacks_is_missing(packages, monkeypatch):
    with checked_out("old", packages) as place:
        said = _imported(place, "import mine.added", [packages / "src"], monkeypatch)
    assert said == "ModuleNotFoundError: No module named 'mine.added'"


@pytest.mark.parametrize("editable", [True, False])
def test_an_installed_project_comes_from_the_checkout(packages, tmp_path, monkeypatch, editable):
    """As pip leaves it: a copy of the files, or a finder that leads to them, and where they came from."""
    site = tmp_path / "site"
    info = site / "mine-1.0.dist-info"
    put(info, {"METADATA": "Name: mine\nVersion: 1.0\n"})
    put(
        info,
        {"direct_url.json": f'{{"url": "file://{packages}", "dir_info": {{"editable": {str(editable).lower()}}}}}'},
    )
    if editable:
        put(info, {"RECORD": "finder.py,,\n"})
        put(site, {"finder.py": FINDER.format(str(packages / "src" / "mine" / "__init__.py"))})
    else:
        put(info, {"RECORD": "mine/__init__.py,,\nmine/inner.py,,\n"})
        put(site, {"mine/__init__.py": "from .inner import VALUE", "mine/inner.py": "VALUE = 'new'"})
    monkeypatch.syspath_prepend(str(site))
    with checked_out("old", packages) as place:
        code = ("import finder; " if editable else "") + SHOW.format("mine")
        found, file = _imported(place, code, [site], monkeypatch).split()
        assert (found, Path(file)) == ("old", place / "src" / "mine" / "__init__.py")


FINDER = """
import sys
from importlib.util import spec_from_file_location

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return spec_from_file_location(name, {0!r}) if name == "mine" else None

sys.meta_path.append(Finder)
"""


def test_the_environments_own_start_file_still_runs(packages, tmp_path, monkeypatch):
    put(tmp_path, {"sitecustomize.py": "import builtins; builtins.STARTED = 'yes'"})
    with checked_out("old", packages) as place:
        said = _imported(
            place, "import sys; print(STARTED, sys.modules['sitecustomize'].__file__)", [tmp_path], monkeypatch
        )
        assert said == f"yes {tmp_path / 'sitecustomize.py'}"
        assert _imported(
            place, "import fxroof.analyzer.cli as c; print(c.__file__)", [], monkeypatch
        ) == redirect.__file__.replace("redirect", "cli")


# --- analysis


QUICK = ["--gpu=h100", "--phase=decode", "--input-len=64", "--output-len=16", "--select=FUS006"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose MLP is in a package of the same repository; what is not committed makes it slower."""
    folder = tmp_path_factory.mktemp("project") / "project"
    settings = "[tool.fxroof]\ntargets = ['model.py']\n"
    commit(
        folder,
        {"model.py": MODEL, "src/mylayers/__init__.py": "", "src/mylayers/mlp.py": LAYERS, "pyproject.toml": settings},
    )
    put(folder, {"src/mylayers/mlp.py": LAYERS.replace(FAST, SLOW)})
    return folder


def test_a_failing_analysis_gives_its_own_message(repository, capfd):
    with pytest.raises(NotAnalysedError) as raised, checked_out("one", repository) as place:
        analysed(["a.py", "--gpu=nosuch", "--isolated"], place, "one")
    assert (raised.value.message, raised.value.hint) == (
        "one: no GPU is called 'nosuch'",
        "run `fxroof gpus` for the list",
    )
    out, err = capfd.readouterr()
    assert err == "error: no GPU is called 'nosuch'\nhint: run `fxroof gpus` for the list\n"
    assert out == ""


def test_a_message_and_its_hint_in_colour_are_read(repository, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(NotAnalysedError) as raised:
        analysed(["a.py", "--gpu=nosuch", "--isolated"], repository, "here")
    assert "\x1b" in capfd.readouterr().err
    assert raised.value.message == "here: no GPU is called 'nosuch'"
    assert raised.value.hint == "run `fxroof gpus` for the list"


@pytest.mark.parametrize("text", ['"; touch pwned; #', "$(touch pwned)", "`touch pwned`", "--help"])
def test_arguments_are_data(repository, text):
    with pytest.raises(NotAnalysedError) as raised:
        analysed(["a.py", f"--gpu={text}", "--isolated"], repository, "here")
    assert text in raised.value.message
    assert not (repository / "pwned").exists()


def test_an_analysis_that_says_nothing_is_named(repository):
    with pytest.raises(NotAnalysedError, match="here: the analysis ended with exit code 0 and no report"):
        analysed(["--help"], repository, "here")


def test_a_null_character_is_one_message(repository):
    with pytest.raises(RevisionError, match="null"):
        analysed(["a\0b"], repository, "here")


def test_an_interrupted_analysis_ends_its_process(tmp_path):
    os.mkfifo(tmp_path / "settings.toml")  # it waits for somebody to write there
    started: list[int] = []

    def interrupt() -> None:
        with (tmp_path / "settings.toml").open("w"):  # now it reads
            started.extend(_children())
            os.kill(os.getpid(), signal.SIGINT)
            _until(lambda: not set(started) & set(_children()))

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        analysed(["a.py", "--config=settings.toml"], tmp_path, "here")
    thread.join()
    assert started
    assert not set(started) & set(_children())


def _children() -> list[int]:
    return [int(child) for file in Path("/proc/self/task").glob("*/children") for child in file.read_text().split()]


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not done() and time.monotonic() < until:
        time.sleep(0.05)


def test_the_base_is_analysed_with_the_code_of_the_base(project, monkeypatch):
    """What differs lies in a module that PYTHONPATH leads to: without redirected imports it would be the head's."""
    monkeypatch.setenv("PYTHONPATH", str(project / "src"))
    with checked_out("HEAD", project) as place:
        base = analysed([str(project / "model.py"), *QUICK], place, "HEAD")
    (run,) = base.runs
    assert not run.findings  # the working tree has FUS006: see what the action finds
    products = {op.span.file for op in base.graphs["decode"].ops if op.module.endswith("mlp.up_proj") and op.span}
    assert products == {"src/mylayers/mlp.py"}


def test_an_unknown_base_stops(tmp_path, monkeypatch):
    """It is no base that cannot be analysed: the comparison that was asked for cannot be had."""
    commit(tmp_path, {"fxroof.toml": 'targets = ["model.json"]', "model.json": to_json(report())})
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["diff", "--base", "nowhere"])
    assert done.exit_code == 2
    assert "error: nowhere: this repository has no such revision.\n" in done.stderr
    assert done.stdout == ""


def test_a_base_without_the_target_leaves_the_head_to_be_judged_alone(tmp_path, monkeypatch):
    commit(tmp_path, {"a.txt": ""})
    commit(tmp_path, {"fxroof.toml": 'targets = ["model.json"]', "model.json": to_json(report())})
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["diff", "--base", "HEAD^", "--fail-on=warning"])
    assert done.exit_code == 1
    assert "doubt      the base was not analysed: HEAD^: " in done.stdout
    assert "new warning KVC001" in " ".join(done.stdout.split())


def test_a_head_that_has_lost_a_target_does_not_pass(tmp_path, monkeypatch):
    """Also where another is as it was."""
    project = {"fxroof.toml": 'targets = ["tiny.py", "other.py"]\ngpus = ["b200"]', "tiny.py": TINY, "other.py": TINY}
    commit(tmp_path, project)
    put(tmp_path, {"other.py": f"{TINY}\n1 / 0\n"})
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["diff", "--base", "HEAD"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "other.py: running the file failed" in " ".join(done.stderr.split())


TINY = """
import torch


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x)


def example_inputs(phase, batch_size, input_len, context_len):
    return torch.zeros(2, 64)
"""
