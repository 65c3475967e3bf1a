"""Findings that a project knows and has put up with: a file of what they are known by, which a report is held against.

An entry is rule, folded module path, operator, phase and GPU, never a line or a measured value, and how many there are.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import msgspec

from .errors import FxroofError
from .finding import Finding
from .jsonfile import content, decoded, encodable, encoded
from .report import Report, Run

VERSION = 1
KNOWN = "known: in the baseline"

Entry = tuple[str, str, str, str, str]
"""Rule, module, operator, phase, GPU."""


_MOST = 10**9


class BaselineError(FxroofError):
    """A file that should be a baseline cannot be read."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rule: str
    module: str
    op: str
    phase: str
    gpu: str
    count: Annotated[int, msgspec.Meta(ge=1, le=_MOST)] = 1


class _Head(msgspec.Struct):
    version: Annotated[int, msgspec.Meta(ge=0, le=_MOST)]


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    findings: tuple[_Line, ...]


def entries(report: Report) -> Counter[Entry]:
    """What a report's findings are known by; those that are suppressed in the source need no baseline."""
    found: Counter[Entry] = Counter()
    for run in report.runs:
        for finding in run.findings:
            if not finding.suppressed or finding.suppressed == KNOWN:
                found.update(_entries(finding, run))
    return found


def to_text(known: Mapping[Entry, int]) -> str:
    """The file's text, sorted, so that a change of it is a change of what is known."""
    lines = tuple(
        _Line(rule=rule, module=module, op=op, phase=phase, gpu=gpu, count=count)
        for (rule, module, op, phase, gpu), count in sorted(known.items())
        if count > 0
    )
    return encoded(_File(version=VERSION, findings=lines))


def read(file: Path) -> Counter[Entry]:
    """The entries of a file.

    Raises:
        BaselineError: it cannot be read, or is no baseline.
    """
    try:
        octets = content(file)
    except OSError as error:
        raise BaselineError(f"{file}: cannot be read: {error.strerror}.", _REWRITE) from error

    def failed(why: str) -> BaselineError:
        return BaselineError(f"{file}: is no baseline: {why}.", _REWRITE)

    version = decoded(octets, _Head, failed).version
    if version != VERSION:
        raise BaselineError(f"{file}: baseline version {version}; this fxroof reads version {VERSION}.", _REWRITE)
    found = decoded(octets, _File, failed)
    known: Counter[Entry] = Counter()
    for line in found.findings:
        known[line.rule, line.module, line.op, line.phase, line.gpu] += line.count
    return known


_REWRITE = "Write one with: fxroof baseline write"


def applied(report: Report, known: Mapping[Entry, int]) -> Report:
    """The report with those findings suppressed that a baseline has in every phase in which they were found."""
    return replace(report, runs=tuple(_applied(run, known) for run in report.runs))


def pruned(known: Mapping[Entry, int], report: Report) -> Counter[Entry]:
    """The baseline without what a report no longer shows; other GPUs and phases than the report's stay."""
    there = entries(report)
    seen = {(run.gpu.key, phase.name) for run in report.runs for phase in run.phases}
    return Counter(
        {
            entry: min(count, there[entry]) if (entry[4], entry[3]) in seen else count
            for entry, count in known.items()
            if (entry[4], entry[3]) not in seen or there[entry]
        }
    )


def _entries(finding: Finding, run: Run) -> Iterable[Entry]:
    known = (finding.code, finding.module, finding.op)
    return [cast("Entry", tuple(map(encodable, (*known, phase, run.gpu.key)))) for phase in finding.phases]


def _applied(run: Run, known: Mapping[Entry, int]) -> Run:
    left = Counter(known)
    findings = []
    for finding in run.findings:
        wanted = _entries(finding, run)
        if not finding.suppressed and all(left[entry] > 0 for entry in wanted):
            left.subtract(wanted)
            findings.append(replace(finding, suppressed=KNOWN))
        else:
            findings.append(finding)
    return replace(run, findings=tuple(findings))
