"""One line a finding, as linters write them, and one line a phase: for editors, logs and `grep`."""

from collections.abc import Iterator
from dataclasses import replace

from rich.text import Text

from ..report import Report, Run
from . import _units as units
from ._anchors import anchor, source_anchor, written
from ._budgets import broken, sentence
from ._layout import clean, printed
from ._seen import (
    counts,
    failed,
    fits,
    in_brackets,
    rule_failures,
    saves_everywhere,
    seen,
    suppressed,
    unused_suppressions,
)
from .registry import Options, renderer


@renderer("concise")
def render(report: Report, options: Options) -> str:
    """`path:line: CODE message (saves decode 1.20 ms, 12.0%)`, then every phase on every GPU, then a count."""
    lines = (Text(_harmless(line)) for line in _lines(report))
    return printed(lines, replace(options, width=_NO_LIMIT, colour=False))


_NO_LIMIT = 1_000_000


def _lines(report: Report) -> Iterator[str]:
    found = seen(report)
    for one in found:
        place = written(anchor(one.finding, report), report.model.name)
        what = f"{clean(one.finding.code)} {clean(one.finding.message)}"
        yield f"{place}: {what}{in_brackets(saves_everywhere(one))}"
    for place in unused_suppressions(report):
        yield f"{clean(place)}: the comment suppresses nothing"
    source = written(source_anchor(report), report.model.name)
    for failure in report.failures:
        yield f"{source}: error: {clean(failure.phase)} was not analysed: {clean(failure.message)}"
    for verdict in broken(report):
        yield f"{source}: error: budget: {sentence(verdict)}"
    for failure_of_rule in rule_failures(report):
        yield f"{source}: error: {failed(failure_of_rule)}"
    for run in report.runs:
        yield from _phases(report, run)
    hidden = suppressed(report)
    yield counts(found) + (f"; {hidden:,} suppressed" if hidden else "")


def _phases(report: Report, run: Run) -> Iterator[str]:
    for phase in run.phases:
        times = (("floor", phase.seconds.floor), ("bound", phase.seconds.bound), ("estimate", phase.seconds.estimate))
        shown = ", ".join(f"{name} {units.seconds(value)}" for name, value in times)
        yield f"{clean(report.title(run))} {clean(phase.name)}: {shown}; fits: {fits(run.memory)}"


def _harmless(line: str) -> str:
    """The line so that no build server takes a name in it for a command: they look for `::` and `##[` in logs."""
    inside = line.replace("##", r"#\x23")
    return f"./{inside}" if inside.lstrip().startswith("::") else inside
