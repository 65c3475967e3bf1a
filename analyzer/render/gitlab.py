"""GitLab's Code Quality report: findings in the widget of a merge request and beside its lines."""

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

from ..finding import Severity
from ..report import Report
from ._anchors import Anchor, anchor, source_anchor
from ._budgets import broken, sentence
from ._layout import clean
from ._seen import failed, in_brackets, rule_failures, saves_everywhere, seen
from .registry import Options, renderer

_SEVERITIES = {Severity.ERROR: "critical", Severity.WARNING: "major", Severity.INFO: "info"}


@renderer("gitlab")
def render(report: Report, options: Options) -> str:  # noqa: ARG001  # JSON has no width, colour or top
    """A JSON array; fingerprints are unique, and the same from report to report while the finding stays."""
    issues = []
    taken: dict[str, int] = {}
    for issue in _issues(report):
        known = issue["fingerprint"]
        taken[known] = taken.get(known, 0) + 1
        issues.append(issue | {"fingerprint": _digest(f"{known} {taken[known]}")} if taken[known] > 1 else issue)
    return msgspec.json.format(msgspec.json.encode(issues), indent=1).decode() + "\n"


def _issues(report: Report) -> Iterator[dict[str, Any]]:
    source = source_anchor(report) or (report.model.source or report.model.name, 1)
    for failure in report.failures:
        text = f"{clean(failure.phase)} was not analysed: {clean(failure.message)}"
        name = _digest(f"not-analysed {clean(failure.phase)}")
        yield _issue("not-analysed", text, name, "blocker", source)
    for verdict in broken(report):
        budget = verdict.budget
        name = _digest(f"budget {clean(verdict.run)} {budget.metric} {budget.of} {clean(budget.text)}")
        yield _issue("budget-broken", sentence(verdict), name, "critical", source)
    for one in seen(report):
        finding = one.finding
        text = f"{clean(finding.message)}{in_brackets(saves_everywhere(one))}"
        place = anchor(finding, report) or source
        yield _issue(clean(finding.code), text, one.fingerprint, _SEVERITIES[finding.severity], place)
    for failure_of_rule in rule_failures(report):
        name = _digest(f"rule-failed {clean(failure_of_rule.code)} {clean(failure_of_rule.phase)}")
        yield _issue("rule-failed", failed(failure_of_rule), name, "minor", source)


def _issue(check: str, text: str, fingerprint: str, severity: str, place: Anchor) -> dict[str, Any]:
    file, line = place
    return {
        "description": text,
        "check_name": check,
        "fingerprint": fingerprint,
        "severity": severity,
        "location": {"path": clean(file), "lines": {"begin": max(line, 1)}},
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
