"""JUnit XML: findings as failed tests, for build servers that show test results and little else."""

from xml.etree import ElementTree as ET

from ..finding import Finding, Severity
from ..limits import Verdict
from ..report import PhaseFailure, Report, Run
from . import _units as units
from ._anchors import anchor, source_anchor, written
from ._budgets import sentence
from ._layout import clean
from ._seen import evidence, failed, fits, in_brackets, saves
from .registry import Options, renderer


@renderer("junit")
def render(report: Report, options: Options) -> str:  # noqa: ARG001  # XML has no width, colour or top
    """A suite for each phase on each GPU; errors and warnings fail, what is suppressed is skipped."""
    root = ET.Element("testsuites", {"name": f"fxroof {clean(report.model.name)}"})
    for run in report.runs:
        for name in dict.fromkeys(phase.name for phase in run.phases):
            root.append(_phase(report, run, name))
        if run.rule_failures:
            root.append(_rules(report, run))
    if report.verdicts:
        root.append(_suite("budgets", [_budget(report, verdict) for verdict in report.verdicts]))
    if report.failures:
        root.append(_suite("not analysed", [_failure(report, failure) for failure in report.failures]))
    ET.indent(root, " ")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _phase(report: Report, run: Run, phase: str) -> ET.Element:
    cases = [_case(report, run, finding) for finding in run.findings if phase in finding.phases]
    if not cases:
        cases = [_test(report, "no findings")]
    for number, case in _repeated(cases):
        case.set("name", f"{case.get('name')} ({number})")
    return _suite(f"{clean(report.title(run))} {clean(phase)}", cases, _properties(run, phase))


def _case(report: Report, run: Run, finding: Finding) -> ET.Element:
    module = f" in {clean(finding.module)}" if finding.module else ""
    place = anchor(finding, report)
    case = _test(report, f"{clean(finding.code)} {clean(finding.name)}{module}", place[0] if place else "")
    message = f"{clean(finding.message)}{in_brackets(saves(finding, run))}"
    details = "\n".join((f"{written(place, report.model.name)}: {message}", *_details(finding)))
    if finding.suppressed:
        ET.SubElement(case, "skipped", {"message": clean(finding.suppressed)})
    elif finding.severity is Severity.INFO:
        ET.SubElement(case, "system-out").text = details
    else:
        kind = {"message": message, "type": f"{clean(finding.code)} {finding.severity.value}"}
        ET.SubElement(case, "failure", kind).text = details
    return case


def _details(finding: Finding) -> list[str]:
    lines = [evidence(finding), clean(finding.remedy.text)]
    code = [f"    {clean(line)}" for line in finding.remedy.code.splitlines()]
    return [line for line in (*lines, *code) if line]


def _repeated(cases: list[ET.Element]) -> list[tuple[int, ET.Element]]:
    """Tests that are called as one before them, each with its number: servers tell tests by class and name."""
    known: dict[tuple[str | None, str | None], int] = {}
    found = []
    for case in cases:
        key = case.get("classname"), case.get("name")
        known[key] = known.get(key, 0) + 1
        if known[key] > 1:
            found.append((known[key], case))
    return found


def _rules(report: Report, run: Run) -> ET.Element:
    """What could not be run is not known to be bad: skipped, not failed."""
    cases = []
    for failure in run.rule_failures:
        case = _test(report, f"{clean(failure.code)} {clean(failure.phase)}".strip())
        ET.SubElement(case, "skipped", {"message": failed(failure)})
        cases.append(case)
    return _suite(f"{clean(report.title(run))} rules", cases)


def _failure(report: Report, failure: PhaseFailure) -> ET.Element:
    case = _test(report, clean(failure.phase))
    error = ET.SubElement(case, "error", {"message": clean(failure.message), "type": "not-analysed"})
    error.text = clean(failure.hint)
    return case


def _budget(report: Report, verdict: Verdict) -> ET.Element:
    budget = verdict.budget
    of = f" {budget.of}" if budget.of != "estimate" else ""
    case = _test(report, f"{clean(verdict.run)} {clean(budget.metric)}{of} {clean(budget.text)}")
    if verdict.kept is None:
        ET.SubElement(case, "skipped", {"message": clean(verdict.why)})
    elif not verdict.kept:
        ET.SubElement(case, "failure", {"message": sentence(verdict), "type": "budget-broken"})
    return case


def _test(report: Report, name: str, file: str = "") -> ET.Element:
    place = source_anchor(report)
    of = file or (place[0] if place else report.model.name)
    return ET.Element("testcase", {"name": name, "classname": clean(of)})


def _suite(name: str, cases: list[ET.Element], properties: ET.Element | None = None) -> ET.Element:
    numbers = {"tests": len(cases)}
    for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        numbers[attribute] = sum(case.find(kind) is not None for case in cases)
    suite = ET.Element("testsuite", {"name": name} | {key: str(number) for key, number in numbers.items()})
    if properties is not None:
        suite.append(properties)
    suite.extend(cases)
    return suite


def _properties(run: Run, phase: str) -> ET.Element:
    properties = ET.Element("properties")
    times = next(known.seconds for known in run.phases if known.name == phase)
    figures = {
        "floor": units.seconds(times.floor),
        "bound": units.seconds(times.bound),
        "estimate": units.seconds(times.estimate),
        "fits": fits(run.memory),
    }
    for name, value in figures.items():
        ET.SubElement(properties, "property", {"name": name, "value": value})
    return properties
