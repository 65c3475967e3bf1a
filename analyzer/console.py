"""What the command line shows: text on standard output or into a file, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from .render.registry import Options

_WIDTH_OFF_TERMINAL = 100
_LEAST_WIDTH = 40


def options(output: Path | None, **chosen: Any) -> Options:
    """How to render for a terminal, a pipe or a file."""
    from rich.console import Console

    from .render.registry import Options

    to_file = output is not None and str(output) != "-"
    console = Console()
    forced = bool(os.environ.get("FORCE_COLOR"))
    colour = console.is_terminal and not console.no_color and (forced or not to_file)
    if console.is_terminal and not to_file and sys.stdout.isatty():
        width = console.width
    else:
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isascii() and columns.isdigit() and int(columns) else _WIDTH_OFF_TERMINAL
    encoding = "utf-8" if to_file else (sys.stdout.encoding or "ascii")
    return Options(
        width=min(max(width, _LEAST_WIDTH), 1000),
        colour=colour,
        unicode=_encodes(encoding, "⠿µ━●"),
        **chosen,
    )


def deliver(text: str, output: Path | None) -> None:
    """Write to standard output, or all of a file.

    Raises:
        ReportFileError: it cannot be written; what was in the file is there still.
    """
    from .errors import ReportFileError

    if output is None or str(output) == "-":
        encoding = sys.stdout.encoding or "utf-8"
        try:
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough; click would make it exit code 1
            silence_stdout()
        except OSError as error:
            silence_stdout()
            raise ReportFileError(f"Standard output cannot be written: {error.strerror or error}.") from error
        return
    try:
        write_whole(output, text)
    except OSError as error:
        raise ReportFileError(
            f"{output}: cannot be written: {error.strerror or error}.",
            "Nothing was left there; name another file.",
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write all of a file or nothing: no reader sees half of it, and a failure leaves what was there."""
    if path.exists() and not path.is_file():  # a device or a pipe: replacing it would destroy it
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    path = path.resolve()  # what a link leads to, not the link
    temporary = path.with_name(f".fxroof-{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Progress:
    """Says on standard error what is done, from the second second on: a status line, or lines off a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._message = ""
        self._lock = threading.Lock()
        self._shown = False
        self._status: Status | None = None
        self._timer = threading.Timer(1.0, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Progress:
        if not self._quiet:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._quiet = True
            if self._status is not None:
                self._status.stop()

    def say(self, message: str) -> None:
        """Take note of what is being done."""
        with self._lock:
            self._message = message
            if self._shown:
                self._write()

    def _show(self) -> None:
        with self._lock:
            if not self._quiet:
                self._shown = True
                self._write()

    def _write(self) -> None:
        if not self._message or self._quiet:
            return
        if self._status is not None:
            self._status.update(self._message)
            return
        console = _stderr()
        if console.is_terminal and not console.is_dumb_terminal:
            self._status = console.status(self._message)
            self._status.start()
        else:
            console.print(f"fxroof: {self._message}", markup=False, highlight=False, soft_wrap=True)


def print_error(message: str, hint: str = "") -> None:
    """One message on standard error: what, where, and what to do about it."""
    from rich.text import Text

    console = _stderr()
    with contextlib.suppress(BrokenPipeError):
        for label, style, text in (("error: ", "bold red", message), ("hint: ", "bold", hint)):
            if text:
                line = Text.assemble((label, "" if console.no_color else style), _printable(text))
                console.print(line, soft_wrap=True, highlight=False)


def print_note(text: str) -> None:
    """A line on standard error that is no error."""
    with contextlib.suppress(BrokenPipeError):
        _stderr().print(_printable(text), markup=False, soft_wrap=True, highlight=False)


def silence_stdout() -> None:
    """Let nothing more be written there, for whoever read it has gone."""
    # the interpreter flushes stdout on exit and would complain about the closed pipe once more
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _encodes(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _printable(text: str) -> str:
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    # build servers take `::` at the start of a line, and `##[` anywhere, for commands
    return re.sub(r"^(\s*):(?=:)", r"\1\\x3a", shown, flags=re.MULTILINE).replace("##[", r"#\x23[")
