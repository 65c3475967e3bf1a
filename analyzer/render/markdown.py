"""Markdown for a comment on a pull request or a job summary: what limits the model, and what to do about it first."""

from collections.abc import Callable, Iterable, Iterator

from ..finding import Finding
from ..report import Report, Run
from . import _units as units
from ._anchors import shown
from ._budgets import broken, sentence
from ._markdown import block, code, code_in_html, length, shortened, text
from ._seen import (
    Seen,
    counts,
    evidence,
    failed,
    fits,
    rule_failures,
    saves,
    saves_everywhere,
    seen,
    suppressed,
    unused_suppressions,
)
from .registry import Options, renderer

TAG = "<!-- fxroof -->"
"""The first line, by which a comment is found again and updated in place."""

MOST = 65_000
"""Characters; GitHub refuses a comment of more than 65,536."""

_NAME, _TEXT, _CODE_LINES = 120, 500, 40


@renderer("markdown")
def render(report: Report, options: Options) -> str:  # noqa: ARG001  # a page has no width, and shows what fits
    """A verdict, the phases, the findings, and each finding's remedy folded away; what is too long goes last first."""
    found = seen(report)
    page = _Page([TAG, "", *_verdict(report, found), ""])
    page.table(_PHASES, (row for run in report.runs for row in _phases(report, run)), "phases")
    page.table(_FINDINGS, (_row(one) for one in found), "findings")
    page.add((_details(one) for one in found), "details")
    page.add(_notes(report), "notes")
    return page.text()


_PHASES = "| GPU | phase | bound by | floor | bound | estimate | fits |\n|---|---|---|---:|---:|---:|---|"
_FINDINGS = "| finding | severity | saves | where | what |\n|---|---|---|---|---|"


class _Page:
    """Lines up to the limit; what comes first is kept, and what was left out is said at the end."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._room = MOST - _FOR_LAST_LINE - sum(length(line) + 1 for line in lines)
        self._left_out: dict[str, int] = {}

    def table(self, head: str, rows: Iterable[str], name: str) -> None:
        kept = list(rows)
        if kept:
            self._room -= length(head) + 2
            self._lines.append(head)
            self.add(kept, name)
            self._lines.append("")

    def add(self, parts: Iterable[str], name: str) -> None:
        for part in parts:
            full = name in self._left_out or length(part) + 1 > self._room
            if full:
                self._left_out[name] = self._left_out.get(name, 0) + 1
            else:
                self._room -= length(part) + 1
                self._lines.append(part)

    def text(self) -> str:
        if self._left_out:
            listed = ", ".join(f"{n:,} {name}" for name, n in self._left_out.items())
            self._lines.append(f"Left out for length: {listed}. The whole report has them.")
        return "\n".join(self._lines).rstrip("\n") + "\n"


_FOR_LAST_LINE = 200


def _verdict(report: Report, found: list[Seen]) -> Iterator[str]:
    yield f"### fxroof: {code(shortened(report.model.name, _NAME))}"
    yield ""
    sentences = [f"**{counts(found)}.**"]
    best = next((one for one in found if saves_everywhere(one)), None)
    if best:
        most = text(shortened(saves_everywhere(best), _TEXT))
        sentences.append(f"{text(shortened(best.finding.code, _NAME))} saves most: {most}.")
    failing = [report.title(run) for run in report.runs if run.memory is not None and run.memory.fits is False]
    if failing:
        sentences.append(f"**Does not fit into** {_listed(dict.fromkeys(failing))}.")
    over = broken(report)
    if over:
        said = "; ".join(text(shortened(sentence(verdict), _TEXT)) for verdict in over[:_MOST_NAMES])
        more = f"; and {len(over) - _MOST_NAMES:,} more" if len(over) > _MOST_NAMES else ""
        sentences.append(f"**Budgets broken:** {said}{more}.")
    if report.failures:
        sentences.append(f"**Not analysed:** {_listed(failure.phase for failure in report.failures)}.")
    hidden = suppressed(report)
    if hidden:
        sentences.append(f"{hidden:,} suppressed.")
    yield " ".join(sentences)


def _listed(names: Iterable[str]) -> str:
    listed = [code(shortened(name, _NAME)) for name in names]
    return ", ".join(listed[:_MOST_NAMES]) + (f" and {len(listed) - _MOST_NAMES} more" if listed[_MOST_NAMES:] else "")


_MOST_NAMES = 5


def _phases(report: Report, run: Run) -> Iterator[str]:
    for phase in run.phases:
        cells = (
            code(shortened(report.title(run), _NAME)),
            text(shortened(phase.name, _NAME)),
            phase.bound.value,
            units.seconds(phase.seconds.floor),
            units.seconds(phase.seconds.bound),
            units.seconds(phase.seconds.estimate),
            fits(run.memory),
        )
        yield f"| {' | '.join(cells)} |"


def _row(one: Seen) -> str:
    finding = one.finding
    times = f" ×{finding.count}" if finding.count > 1 else ""
    cells = (
        text(shortened(finding.code, _NAME)),
        finding.severity.value,
        text(shortened(saves_everywhere(one), _TEXT)),
        f"{_place(finding, code)}{times}",
        text(shortened(finding.message, _TEXT)),
    )
    return f"| {' | '.join(cells)} |"


def _place(finding: Finding, show: Callable[[str], str]) -> str:
    return show(_ending(f"{shown(finding.file)}:{finding.line}")) if finding.file else "the whole phase"


def _ending(place: str) -> str:
    """The end of a path too long to show: it has the line number."""
    return place if len(place) <= _NAME else f"…{place[1 - _NAME :]}"


def _details(one: Seen) -> str:
    finding = one.finding
    name = f"{text(shortened(finding.code, _NAME))} {text(shortened(finding.name, _NAME))}"
    lines = [f"<details><summary>{name}: {_place(finding, code_in_html)}</summary>", ""]
    if finding.module:
        lines += [f"In {code(shortened(finding.module, _TEXT))}.", ""]
    if finding.remedy.text:
        lines += [text(shortened(finding.remedy.text, _TEXT)), ""]
    if finding.remedy.code:
        program = finding.remedy.code.splitlines()[:_CODE_LINES]
        lines += [block([shortened(line, _TEXT) for line in program], "python"), ""]
    if finding.evidence:
        lines += [f"Why: {text(shortened(evidence(finding), _TEXT))}.", ""]
    if len(one.runs) > 1:
        savings = [
            f"- {code(shortened(title, _NAME))}: {text(shortened(saves(known, run), _TEXT)) or 'nothing'}"
            for title, run, known in one.runs
        ]
        lines += [*savings, ""]
    return "\n".join((*lines, "</details>", ""))


def _notes(report: Report) -> Iterator[str]:
    for failure in report.failures:
        said = text(shortened(f"{failure.message} {failure.hint}".rstrip(), _TEXT))
        yield f"- {code(shortened(failure.phase, _NAME))} was not analysed: {said}"
    for failure_of_rule in rule_failures(report):
        yield f"- {text(shortened(failed(failure_of_rule), _TEXT))}"
    for place in unused_suppressions(report):
        yield f"- {code(_ending(place))}: the comment suppresses nothing"
    versions = (
        ("fxroof", report.fxroof_version),
        ("torch", report.torch_version),
        ("GPU catalogue of", report.catalog_version),
    )
    yield f"\n<sub>{', '.join(f'{name} {text(shortened(said, _NAME))}' for name, said in versions)}</sub>"
