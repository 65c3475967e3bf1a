"""Which line of which file a finding is shown at, and that file as an address."""

import re
from pathlib import PurePath
from urllib.parse import quote

from .. import places
from ..finding import Finding
from ..report import Report
from ._layout import clean

Anchor = tuple[str, int]
"""File and line."""


def anchor(finding: Finding, report: Report) -> Anchor | None:
    """A finding's own line; the first of the model's file for what belongs to no line; None where that is no file."""
    return (shown(finding.file), finding.line) if finding.file else source_anchor(report)


def source_anchor(report: Report) -> Anchor | None:
    """The first line of the file that the model was loaded from; None where it is no file."""
    match = _SOURCE_FILE.fullmatch(report.model.source)
    return (shown(match["file"]), 1) if match else None


_SOURCE_FILE = re.compile(r"(?!hf:)(?P<file>.+\.(?:py|json|pt2))(?::[^/:]*)?", re.DOTALL)


def shown(file: str) -> str:
    """The path below the working directory where it lies there, with slashes."""
    return PurePath(places.shown(file)).as_posix()


def written(place: Anchor | None, otherwise: str) -> str:
    """`file.py:12` in printable characters; the other text where there is no place."""
    return clean(f"{place[0]}:{place[1]}" if place else otherwise)


def uri(file: str) -> str:
    """A path as `shown` gives it as a URI reference: relative, or `file://` where it is absolute."""
    try:
        octets = file.encode("utf-8", "surrogateescape")  # file names that are no UTF-8 get their own octets back
    except UnicodeEncodeError:
        octets = clean(file).encode()
    drive = "" if file.startswith("/") else "/"
    absolute = PurePath(file).is_absolute()
    return f"file://{drive}{quote(octets, safe='/:')}" if absolute else quote(octets, safe="/")


def package_files(report: Report) -> frozenset[str]:
    """Files of installed packages, whose paths are relative to the folder that the packages lie in."""
    return frozenset(
        span.file
        for traced in report.traces
        for graph in traced.graphs.values()
        for op in graph.ops
        for span in (op.span, op.user_span)
        if span is not None and span.library
    )
