"""Workflow commands: annotations on the lines of a pull request on GitHub."""

from collections.abc import Iterator

from ..finding import Severity
from ..report import Report
from ._anchors import Anchor, anchor, source_anchor
from ._budgets import broken, sentence
from ._layout import clean
from ._seen import (
    SEVERITIES,
    Seen,
    failed,
    in_brackets,
    rule_failures,
    saves_everywhere,
    seen,
    unused_suppressions,
)
from .registry import Options, renderer

MOST = 10
"""Annotations of each kind that GitHub shows of a step; it drops the rest without a word."""

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


@renderer("github")
def render(report: Report, options: Options) -> str:  # noqa: ARG001  # the commands have no layout
    """The most severe first, by saving among those; at most as many as GitHub shows, then how many are left out."""
    found = seen(report)
    commands = {severity: list(_commands(report, found, severity)) for severity in SEVERITIES}
    left_out = sum(max(len(listed) - MOST, 0) for listed in commands.values())
    if left_out:
        notices = commands[Severity.INFO]
        left_out += len(notices[MOST - 1 : MOST])  # gives its place to the notice that says what is left out
        text = f"{left_out:,} more are left out: GitHub shows {MOST} of each kind a step. The whole report has them."
        commands[Severity.INFO] = [*notices[: MOST - 1], _command("notice", None, "fxroof", text)]
    return "\n".join(line for listed in commands.values() for line in listed[:MOST]) + "\n"


def _commands(report: Report, found: list[Seen], severity: Severity) -> Iterator[str]:
    command = _COMMANDS[severity]
    source = source_anchor(report)
    if severity is Severity.ERROR:
        for failure in report.failures:
            text = "\n".join(clean(part) for part in (failure.message, failure.hint) if part)
            yield _command(command, source, f"fxroof: {clean(failure.phase)} was not analysed", text)
        for verdict in broken(report):
            yield _command(command, source, f"fxroof: budget of {clean(verdict.budget.metric)}", sentence(verdict))
    for one in found:
        if one.finding.severity is severity:
            title = f"{clean(one.finding.code)} {clean(one.finding.name)}"
            yield _command(command, anchor(one.finding, report), title, _message(one))
    if severity is Severity.WARNING:
        for failure_of_rule in rule_failures(report):
            yield _command(command, source, "fxroof: a rule failed", failed(failure_of_rule))
    if severity is Severity.INFO:
        for place in unused_suppressions(report):
            file, _, line = place.rpartition(":")
            where = (file, int(line)) if line.isdecimal() and len(line) < _MOST_DIGITS else source
            yield _command(command, where, "fxroof: unused comment", f"{clean(place)}: the comment suppresses nothing")


_MOST_DIGITS = 10
"""A line number of more is none."""


def _message(one: Seen) -> str:
    remedy = one.finding.remedy
    lines = [f"{one.finding.message}{in_brackets(saves_everywhere(one))}", remedy.text, *remedy.code.splitlines()]
    return "\n".join(clean(line) for line in lines if line)


def _command(command: str, place: Anchor | None, title: str, message: str) -> str:
    properties = {"title": title}
    if place:
        properties = {"file": clean(place[0]), "line": str(max(place[1], 1)), "title": title}
    listed = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{command} {listed}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
