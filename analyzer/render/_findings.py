"""Findings for people: what is wrong, where, why, what to write instead, and what that saves."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import PurePath

from rich.text import Text

from ..analysis import PhaseAnalysis
from ..finding import Alternative, Finding, Severity, Step
from ..report import Report, Run
from . import _units as units
from ._layout import Column, clean, fact, table, title
from ._savings import FOR_AS_MANY, Part, reasons, saving
from .registry import Options

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "blue"}


def findings(report: Report, run: Run, options: Options) -> Iterator[Text]:
    """The findings of a run, the largest saving first, and the waterfall of each phase that they change."""
    width = options.width
    counted = [finding for finding in run.findings if not finding.suppressed]
    many = "s" if len(counted) != 1 else ""
    yield title(f"{len(counted)} finding{many} on {clean(report.title(run))}", width, heavy=True)
    groups = _by_remedy(counted)
    for first, *others in groups[: options.top]:
        yield from _finding(first, run, width)
        for other in others:
            yield from fact("also", [*_where(other), *_savings(other, run)], width)
        yield Text()
    more = [f"{f.code} at {_place(f)}" for group in groups[options.top :] for f in group]
    yield from fact("and", more, width)
    if more:
        yield Text()
    for failure in run.rule_failures:
        where = f"{failure.code} in {failure.phase}" if failure.phase else failure.code
        yield from fact(
            "rule", [Text(f"{clean(where)} could not be run: {clean(failure.message)}", style="red")], width
        )
    hidden = [finding for finding in run.findings if finding.suppressed]
    if hidden:
        known = [f"{f.code} at {clean(f.file)}:{f.line}, {clean(f.suppressed)}" for f in hidden]
        yield from fact("known", known, width)
    for place in run.unused_suppressions:
        yield from fact("unused", [f"{clean(place)}: the comment suppresses nothing"], width)
    for name, steps in run.waterfall.items():
        if len(steps) > _ENDS + 1:
            yield from _waterfall(name, steps, run, width)
            yield Text()


_ENDS = 2
"""Bars of a waterfall that are no remedy: as written, and the floor."""


def _by_remedy(found: Iterable[Finding]) -> list[list[Finding]]:
    """Findings that say the same of several lines, together."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.code, finding.message, finding.remedy.text), []).append(finding)
    return list(groups.values())


def _finding(finding: Finding, run: Run, width: int) -> Iterator[Text]:
    heading = Text(f"{finding.code} {finding.name}", style=_STYLES[finding.severity])
    sure = [f"{finding.confidence.value} confidence"] if finding.confidence != "high" else []
    yield from fact("", [heading, *sure], width, label_width=0)
    yield from fact("saves", _savings(finding, run), width)
    yield from fact("where", _where(finding), width)
    yield from fact("what", [clean(finding.message)], width)
    yield from fact("why", reasons(finding), width)
    yield from fact("remedy", [clean(finding.remedy.text)], width)
    for line in finding.remedy.code.splitlines():
        yield Text(f"           {clean(line)}", style="dim")
    others = [_alternative(other, run) for other in finding.alternatives]
    yield from fact("or", others, width)


def _alternative(other: Alternative, run: Run) -> str:
    parts = [
        ", ".join(_saved(phase, other.saving_seconds, other.saving_bound_seconds))
        for phase in run.phases
        if phase.name in other.saving_seconds
    ]
    return f"{clean(other.name)}: {'; '.join(parts)}"


def _where(finding: Finding) -> list[str]:
    times = f" ×{finding.count}" if finding.count > 1 else ""
    return [_place(finding), *([clean(finding.module) + times] if finding.module else [])]


def _place(finding: Finding) -> str:
    return f"{clean(finding.file)}:{finding.line}" if finding.file else "the whole phase"


def _savings(finding: Finding, run: Run) -> Iterator[str]:
    for phase in run.phases:
        if phase.name in finding.saving_seconds:
            yield from _saved(phase, finding.saving_seconds, finding.saving_bound_seconds)
    if finding.saving_per == "token" and finding.saving_seconds:
        yield FOR_AS_MANY


def _saved(phase: PhaseAnalysis, estimates: Mapping[str, float], bounds: Mapping[str, float]) -> Iterator[str]:
    saved = saving(phase, estimates, bounds)
    hidden = saved.estimate is None and saved.bound is not None and phase.execution == "eager"
    yield f"{clean(phase.name)} {_part(saved.estimate)}{' while launches set the pace' if hidden else ''}"
    yield f"of its bound {_part(saved.bound)}"


def _part(part: Part | None) -> str:
    return "nothing" if part is None else f"{part.seconds} ({part.share})"


def _waterfall(name: str, steps: tuple[Step, ...], run: Run, width: int) -> Iterator[Text]:
    yield title(f"{clean(name)}: one remedy after the other", width)
    rows = [(_step(step, run), units.seconds(step.bound), _estimate(step)) for step in steps]
    # what an earlier remedy does already is named in the list above, and would be a row without news here
    news = [row for before, row in pairwise(rows) if row[1:] != before[1:] or row is rows[-1]]
    cells = [list(column) for column in zip(rows[0], *news, strict=True)]
    columns = [
        Column(header="", cells=cells[0], least=12),
        Column(header="bound", cells=cells[1], right=True),
        Column(header="estimate", cells=cells[2], right=True),
    ]
    yield from table(columns, width)
    if rest := len(rows) - 1 - len(news):
        yield Text(f"{rest} more: nothing on top of these", style="dim")


def _estimate(step: Step) -> str:
    return units.seconds(step.estimate) if step.estimate is not None else ""


def _step(step: Step, run: Run) -> str:
    if step.finding is None:
        return clean(step.code).replace("-", " ", 1)
    found = run.findings[step.finding]
    place = f" {clean(PurePath(found.file).name)}:{found.line}" if found.file else ""
    return f"{clean(step.code)}{place}"
