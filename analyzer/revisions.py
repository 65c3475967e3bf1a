"""The target at another git revision: checked out into a folder of its own, analysed by a process of its own. No torch.

with checked_out("main", Path.cwd()) as place:
    base = analysed(["mymodel.py", "--gpu", "b200"], place, "main")
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from . import redirect
from .errors import FxroofError
from .report import Report, read_report


class RevisionError(FxroofError):
    """A git revision cannot be had, or the target cannot be analysed there."""


class NotAnalysedError(RevisionError):
    """The revision is there, and the target cannot be analysed in it: perhaps it came later."""


@contextlib.contextmanager
def checked_out(revision: str, here: Path, *, overlay: Sequence[Path] = ()) -> Iterator[Path]:
    """The folder that stands for `here` in a checkout of a revision; gone afterwards, however the block ends.

    The checkout is a git worktree of its own in a temporary folder: the working tree, its index and its branches stay
    as they are, and none of the repository's hooks runs.

    Args:
        revision: a commit, or a branch or tag that leads to one.
        here: a folder in the working tree.
        overlay: files of the working tree that are to be at the same place in the checkout, whatever the revision has
            there.

    Raises:
        RevisionError: there is no git, no repository, or no such revision.
        NotAnalysedError: the revision has no such folder.
    """
    top = _top(here)
    inside = here.resolve().relative_to(top)
    commit = _commit(revision, here)
    with tempfile.TemporaryDirectory(prefix="fxroof-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary).resolve()
        tree = folder / (top.name or "repository")
        try:
            _git(here, *_BARE_CHECKOUT, "worktree", "add", "--detach", "--force", str(tree), commit)
            place = tree / inside
            if not place.is_dir():
                raise NotAnalysedError(f"{revision} has no folder {inside}.")
            _overlay(overlay, top, tree)
            (folder / _IMPORTS).mkdir()
            redirect.written(_move(top, tree), folder / _IMPORTS)
            with _explaining_what_lacks(tree):
                yield place
        finally:
            with contextlib.suppress(RevisionError):  # an add that was cut short has tidied up already
                _git(here, "worktree", "remove", "--force", "--force", str(tree), undisturbed=True)


def analysed(arguments: Sequence[str], folder: Path, what: str) -> Report:
    """The report of `fxroof analyze` with these arguments, run in a folder by a process of its own.

    What it says on standard error is passed on as it comes. A report that lacks a phase is a report. In a folder that
    `checked_out` gave, all code of the repository comes from the checkout, also where the working tree is installed.

    Args:
        arguments: of the command line.
        folder: to run it in.
        what: what errors call it, such as the revision.

    Raises:
        NotAnalysedError: it gives no report; the message is its own.
    """
    imports = next((place / _IMPORTS for place in folder.parents if (place / _IMPORTS).is_dir()), None)
    environment = _environment()
    if imports is not None:
        move = redirect.read(imports)
        arguments = [_moved(argument, move) for argument in arguments]
        environment = redirect.environment(imports, environment)
    with tempfile.TemporaryDirectory(prefix="fxroof-", ignore_cleanup_errors=True) as temporary:
        out = Path(temporary) / "report.json"
        # -P: what lies in the folder is taken neither for fxroof nor for what it imports
        command = [sys.executable, "-P", "-m", "fxroof.analyzer", "analyze", "-f", f"json={out}", "--exit-zero"]
        code, said = _run([*command, *arguments], folder, environment)
        if not out.is_file():
            raise _no_report(what, code, said)
        return read_report(out)


_IMPORTS = ".fxroof-imports"

_ELSEWHERE = frozenset(
    f"GIT_{name}"
    for name in (
        "DIR", "WORK_TREE", "INDEX_FILE", "COMMON_DIR", "PREFIX", "NAMESPACE", "OBJECT_DIRECTORY",
        "ALTERNATE_OBJECT_DIRECTORIES", "QUARANTINE_PATH", "GRAFT_FILE", "SHALLOW_FILE", "IMPLICIT_WORK_TREE",
    )
)  # fmt: skip
"""Variables that a git hook runs with, which would lead to another repository or index than the folder's."""

_BARE_CHECKOUT = (
    "-c", f"core.hooksPath={os.devnull}",
    # files of Git LFS stay the pointers that they are: fetching them may take long, or need what is not installed
    "-c", "filter.lfs.smudge=", "-c", "filter.lfs.process=", "-c", "filter.lfs.required=false",
)  # fmt: skip

_GIT_SECONDS = 600


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}


def _git(folder: Path, *arguments: str, undisturbed: bool = False) -> str:
    """What git prints, without the last newline; a Ctrl-C of the terminal does not reach it `undisturbed`.

    Raises:
        RevisionError: git is not there, or says that it cannot.
    """
    try:
        done = subprocess.run(  # noqa: S603  # git, with arguments that no shell reads
            ["git", *arguments],  # noqa: S607  # the one that the user uses
            cwd=folder,
            env={**_environment(), "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
            timeout=_GIT_SECONDS,
            start_new_session=undisturbed,
        )
    except FileNotFoundError as error:
        if shutil.which("git"):
            raise RevisionError(f"{folder}: no such folder.") from error
        raise RevisionError("git is not installed.", f"Install it, or {_TWO_REPORTS}.") from error
    except subprocess.TimeoutExpired as error:
        raise RevisionError(f"git {_verb(arguments)} was not done after {_GIT_SECONDS} seconds.") from error
    except (OSError, ValueError) as error:  # a null character in an argument, no permission to run git
        raise RevisionError(f"git {_verb(arguments)} cannot be run: {error}.") from error
    if done.returncode:
        raise RevisionError(f"git {_verb(arguments)}: {_fatal(done.stderr) or f'exit code {done.returncode}'}.")
    return done.stdout.removesuffix("\n")


def _verb(arguments: Sequence[str]) -> str:
    return next((a for before, a in zip(("", *arguments), arguments, strict=False) if "-c" not in (before, a)), "")


def _fatal(said: str) -> str:
    """The line that says what is wrong, among those that git prints."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith(("fatal:", "error:"))]
    return (wrong or lines or [""])[-1].removeprefix("fatal: ").removeprefix("error: ").rstrip(".")


_TWO_REPORTS = "compare two reports that you have: fxroof diff base.json head.json"


def _top(here: Path) -> Path:
    try:
        return Path(_git(here, "rev-parse", "--show-toplevel")).resolve()
    except RevisionError as error:
        if "dubious ownership" in error.message:
            raise RevisionError(
                f"{here.resolve()}: git does not trust this repository, which another user owns.",
                f"If you do: git config --global --add safe.directory {here.resolve()}",
            ) from error
        if "not a git repository" not in error.message and "work tree" not in error.message:
            raise
        raise RevisionError(
            f"{here.resolve()}: not in the working tree of a git repository.", f"Go there, or {_TWO_REPORTS}."
        ) from error


def _commit(revision: str, here: Path) -> str:
    named = revision.strip()
    if not named or named.startswith("-") or not named.isprintable():
        raise RevisionError(f"{revision!r} is no git revision.", "Name a commit, a branch or a tag, such as main.")
    try:
        return _git(here, "rev-parse", "--verify", "--quiet", f"{named}^{{commit}}")
    except RevisionError as error:
        raise RevisionError(f"{named}: this repository has no such revision.", _to_have_it(named, here)) from error


def _to_have_it(revision: str, here: Path) -> str:
    if _git(here, "rev-parse", "--is-shallow-repository") == "true":
        return (
            f"The clone is shallow. Fetch the commit (git fetch --depth=1 origin {revision}), or clone all history: "
            "fetch-depth: 0 of actions/checkout, GIT_DEPTH: 0 on GitLab."
        )
    remotes = _git(here, "for-each-ref", "--format=%(refname:short)", f"refs/remotes/*/{revision}")
    if remotes:
        return f"Did you mean {remotes.splitlines()[0]}?"
    return f"If it is on the server only, fetch it: git fetch origin {revision}"


def _overlay(files: Sequence[Path], top: Path, tree: Path) -> None:
    for file in files:
        real = file.parent.resolve() / file.name
        if not real.is_relative_to(top):
            raise RevisionError(f"{file}: lies outside the repository {top}.", "Keep it in the repository.")
        inside = real.relative_to(top)
        there = tree / inside
        if not there.parent.resolve().is_relative_to(tree):  # the revision has a link where we have a folder
            raise RevisionError(f"{inside}: the revision has a link in its place, which leads elsewhere.")
        try:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            shutil.copyfile(real, there)
        except OSError as error:
            raise RevisionError(f"{file}: cannot be put into the checkout: {error.strerror}.") from error


def _move(top: Path, tree: Path) -> redirect.Move:
    return redirect.Move(top=top, tree=tree, copies=dict(_copies(top, tree)))


def _copies(top: Path, tree: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that `pip install .` copied from the repository, and where the checkout may have them."""
    for distribution in importlib.metadata.distributions():
        try:
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
            address = urlsplit(origin.get("url", ""))
            source = Path(unquote(address.path)).resolve()
        except (ValueError, AttributeError, OSError):  # another tool's file
            continue
        if address.scheme != "file" or not source.is_relative_to(top):
            continue
        if origin.get("dir_info", {}).get("editable"):
            continue  # imported from where it lies
        project = tree / source.relative_to(top)
        places = (str(project / "src"), str(project))
        for file in distribution.files or ():
            name = file.parts[0].removesuffix(".py")
            if file.suffix == ".py" and name.isidentifier() and name != "fxroof":
                yield name, places


def _moved(argument: str, move: redirect.Move) -> str:
    """An argument that names a place in the repository by its whole path, as that place in the checkout."""
    option, equals, value = argument.partition("=")
    if argument.startswith("-") and equals:
        return f"{option}={move.of(value) or value}"
    return move.of(argument) or argument


@contextlib.contextmanager
def _explaining_what_lacks(tree: Path) -> Iterator[None]:
    """Say with a failure what a checkout does not have that the working tree may have."""
    try:
        yield
    except NotAnalysedError as error:
        lacking = list(_lacking(tree))
        if not lacking:
            raise
        hint = f"The checkout has no {' and no '.join(lacking)}. If the target needs them, {_TWO_REPORTS}."
        raise NotAnalysedError(error.message, f"{error.hint} {hint}".lstrip()) from error


def _lacking(tree: Path) -> Iterator[str]:
    with contextlib.suppress(RevisionError):
        listed = _git(tree, "config", "--file", ".gitmodules", "--get-regexp", r"^submodule\..*\.path$")
        yield f"submodules ({', '.join(line.split(' ', 1)[1] for line in listed.splitlines())})"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if "filter=lfs" in (tree / ".gitattributes").read_text(encoding="utf-8"):
            yield "files that Git LFS keeps, only their pointers"


_TAIL = 1 << 16
_GRACE = 5.0
"""Seconds that an interrupted analysis has to tidy up."""


def _run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of a process and the end of what it said on standard error, which is passed on."""
    try:
        child = subprocess.Popen(  # noqa: S603  # our own module in our own interpreter
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except (OSError, ValueError) as error:
        raise RevisionError(f"{sys.executable or 'Python'} cannot be started: {error}.") from error
    assert child.stderr is not None  # noqa: S101  # narrows the type of what PIPE gives
    said = bytearray()
    try:
        while data := os.read(child.stderr.fileno(), _TAIL):
            _pass_on(data)
            said += data
            del said[:-_TAIL]
        code = child.wait()
    finally:
        _stop(child)
        child.stderr.close()
    if code in (128 + signal.SIGINT, -signal.SIGINT):
        raise KeyboardInterrupt  # it was for both
    return code, said.decode("utf-8", "replace")


def _pass_on(data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # our own standard error may be closed, or none
        sys.stderr.flush()
        if hasattr(sys.stderr, "buffer"):
            sys.stderr.buffer.write(data)
        else:  # a notebook's
            sys.stderr.write(data.decode("utf-8", "replace"))
        sys.stderr.flush()


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """See that it has ended: after a Ctrl-C of the terminal it ends by itself, else it is sent one."""
    for wait, send in ((_GRACE / 10, signal.SIGINT), (_GRACE, signal.SIGKILL)):
        try:
            child.wait(wait)
        except subprocess.TimeoutExpired:
            child.send_signal(send)
    child.wait()


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_MESSAGE = re.compile(r"^error: (?P<message>.*?)(?:^hint: (?P<hint>.*))?\Z", re.MULTILINE | re.DOTALL)


def _no_report(what: str, code: int, said: str) -> NotAnalysedError:
    """The last message of a process that ended without a report, as an error of ours."""
    plain = _COLOUR.sub("", said)
    last = _MESSAGE.search(plain, max(plain.rfind("\nerror: ") + 1, 0))
    if last is None:
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return NotAnalysedError(f"{what}: the analysis ended with {ending} and no report.", "What it printed says why.")
    return NotAnalysedError(f"{what}: {last['message'].strip()}", (last["hint"] or "").strip())
