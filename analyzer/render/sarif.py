"""SARIF 2.1.0, the exchange format of static analysis: code scanning, editors and viewers read it."""

import hashlib
import re
from collections.abc import Iterable
from importlib.metadata import metadata
from typing import Any
from urllib.parse import quote

import msgspec

from ..finding import Finding, Rule, Severity
from ..limits import Verdict
from ..report import Report, Run
from ..review import load_rules
from ._anchors import Anchor, anchor, package_files, shown, source_anchor, uri
from ._budgets import broken, sentence
from ._layout import clean
from ._seen import failed, in_brackets, names, saves
from .registry import Options, renderer

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
_SOURCES, _PACKAGES = "%SRCROOT%", "%PACKAGES%"
_BASES = {
    _SOURCES: "The working directory of the analysis.",
    _PACKAGES: "The folder that Python packages are installed in.",
}

_Json = dict[str, Any]


@renderer("sarif")
def render(report: Report, options: Options) -> str:  # noqa: ARG001  # JSON has no width, colour or top
    """A log with a run for each GPU, each with the rules that found something there."""
    packages = package_files(report)
    runs: list[_Json] = []
    taken: dict[str, int] = {}
    for run in report.runs:
        name = _name(report, run)
        taken[name] = number = taken.get(name, 0) + 1
        runs.append(_run(report, run, f"{name}-{number}" if number > 1 else name, packages))
    log = {
        "$schema": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json",
        "version": "2.1.0",
        "runs": runs or [_of_nothing(report)],
    }
    return msgspec.json.format(msgspec.json.encode(log), indent=1).decode() + "\n"


def _name(report: Report, run: Run) -> str:
    """What a run is called in addresses: scenario, where there are several, and GPU."""
    scenario = [run.scenario.name] if len({other.scenario.name for other in report.runs}) > 1 else []
    return "-".join(quote(clean(part), safe="") for part in (*scenario, run.gpu.key))


def _run(report: Report, run: Run, title: str, packages: frozenset[str]) -> _Json:
    codes = list(dict.fromkeys(finding.code for finding in run.findings))
    results = [
        _result(report, run, finding, codes.index(finding.code), name, packages)
        for finding, name in zip(run.findings, names(run), strict=True)
    ]
    over = [verdict for verdict in broken(report) if verdict.run == report.title(run)]
    results += [_budget_result(report, verdict, len(codes)) for verdict in over]
    model = report.traces[run.traced].model.name
    driver = _driver(report) | {"rules": [*_rules(run.findings, codes), *([_BUDGET] if over else [])]}
    return {
        "tool": {"driver": driver},
        "automationDetails": {
            # what comes before the last slash is the category that code scanning keeps apart from others
            "id": f"fxroof/{quote(clean(model), safe='')}/{title}/",
            "description": {"text": _message(f"{model} on {run.gpu.name}")},
        },
        "invocations": [_invocation(report, run)],
        "originalUriBaseIds": {name: {"description": {"text": text}} for name, text in _BASES.items()},
        "results": results,
    }


def _of_nothing(report: Report) -> _Json:
    """A run that says that no phase could be analysed on any GPU."""
    return {"tool": {"driver": _driver(report)}, "invocations": [_invocation(report, None)], "results": []}


def _driver(report: Report) -> _Json:
    about = {"name": "fxroof", "version": clean(report.fxroof_version)}
    pages = dict(entry.split(", ", 1) for entry in metadata("fxroof").get_all("Project-URL") or ())
    return about | {"informationUri": next(iter(pages.values()))} if pages else about


def _rules(findings: Iterable[Finding], codes: list[str]) -> list[_Json]:
    known = {rule.code: rule for rule in load_rules()[0]}
    first = {finding.code: finding for finding in reversed(list(findings))}
    return [_rule(first[code], known.get(code)) for code in codes]


def _rule(finding: Finding, rule: Rule | None) -> _Json:
    """A rule's page; of a rule that is not installed here, as of a report from elsewhere, its name alone."""
    page = "\n".join(map(clean, rule.doc.splitlines())) if rule else clean(finding.name)
    summary, *paragraphs = (paragraph.replace("\n", " ") for paragraph in page.split("\n\n"))
    described = " ".join((summary, *paragraphs[:1])).replace("**", "").replace("`", "")
    return {
        "id": clean(finding.code),
        "name": clean(finding.name),
        "shortDescription": {"text": summary},
        "fullDescription": {"text": described},
        "help": {"text": page, "markdown": page},
        "defaultConfiguration": {"level": _LEVELS[rule.severity if rule else finding.severity]},
        "properties": {"tags": ["performance"]},
    }


def _result(
    report: Report, run: Run, finding: Finding, index: int, fingerprint: str, packages: frozenset[str]
) -> _Json:
    remedy = f" Remedy: {finding.remedy.text}" if finding.remedy.text else ""
    result: _Json = {
        "ruleId": clean(finding.code),
        "ruleIndex": index,
        "level": _LEVELS[finding.severity],
        "message": {"text": _message(f"{finding.message}{in_brackets(saves(finding, run))}.{remedy}")},
        "partialFingerprints": {"fxroof/v1": fingerprint},
        "properties": _figures(finding),
    }
    place = anchor(finding, report)
    if place:
        location = _location(place, finding.file in packages)
        if finding.module:
            location["logicalLocations"] = [{"fullyQualifiedName": clean(finding.module), "kind": "module"}]
        result["locations"] = [location]
    if finding.library_file:
        inner = shown(finding.library_file), finding.library_line
        related = _location(inner, finding.library_file in packages)
        result["relatedLocations"] = [related | {"id": 1, "message": {"text": "The line of the library that runs it."}}]
    if finding.suppressed:
        result["suppressions"] = [{"kind": "inSource", "justification": clean(finding.suppressed)}]
    return result


_BUDGET: _Json = {
    "id": "budget-broken",
    "name": "budget-broken",
    "shortDescription": {"text": "A figure is beyond the limit that the project sets itself."},
    "fullDescription": {"text": "A figure of a run is beyond the limit that the project's settings, or --budget, set."},
    "help": {"text": "Make the model keep to the limit, or change the limit."},
    "defaultConfiguration": {"level": "error"},
    "properties": {"tags": ["performance"]},
}


def _budget_result(report: Report, verdict: Verdict, index: int) -> _Json:
    budget = verdict.budget
    known = "\n".join((budget.metric, budget.of, budget.text, budget.scenario))
    source = source_anchor(report)
    return {
        "ruleId": _BUDGET["id"],
        "ruleIndex": index,
        "level": "error",
        "message": {"text": _message(f"{sentence(verdict)}.")},
        "partialFingerprints": {
            "fxroof/v1": hashlib.sha256(known.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        },
    } | ({"locations": [_location(source, packaged=False)]} if source else {})


def _location(place: Anchor, packaged: bool) -> _Json:
    file, line = place
    address = {"uri": uri(file)}
    if not address["uri"].startswith("file:"):
        address["uriBaseId"] = _PACKAGES if packaged else _SOURCES
    return {"physicalLocation": {"artifactLocation": address, "region": {"startLine": max(line, 1)}}}


def _figures(finding: Finding) -> _Json:
    return {
        "confidence": finding.confidence.value,
        "phases": [clean(name) for name in finding.phases],
        "operator": clean(finding.op),
        "places": finding.count,
        "savingSeconds": {clean(name): value for name, value in finding.saving_seconds.items()},
        "savingBoundSeconds": {clean(name): value for name, value in finding.saving_bound_seconds.items()},
        "savingPer": clean(finding.saving_per),
        "evidence": {clean(name): clean(v) if isinstance(v, str) else v for name, v in finding.evidence.items()},
    }


def _invocation(report: Report, run: Run | None) -> _Json:
    notes: list[_Json] = []
    source = source_anchor(report)
    where = {"locations": [_location(source, packaged=False)]} if source else {}
    for failure in report.failures:
        text = _message(f"{failure.phase} was not analysed: {failure.message} {failure.hint}".rstrip())
        notes.append({"level": "error", "message": {"text": text}} | where)
    unrun = run.rule_failures if run else ()
    notes += [{"level": "warning", "message": {"text": _message(failed(failure))}} for failure in unrun]
    return {"executionSuccessful": not report.failures, "toolExecutionNotifications": notes}


def _message(text: str) -> str:
    """A plain text in which viewers find neither links nor places to fill in."""
    return _PLACEHOLDER.sub(r"{{\1}}", clean(text).replace("](", "]\\("))


_PLACEHOLDER = re.compile(r"\{(\d+)\}")
