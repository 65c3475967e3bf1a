"""JUnit XML, read back by a parser of that format, and what build servers' schemas allow of it."""

from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from fxroof.analyzer.finding import Severity
from fxroof.analyzer.render.registry import Options, render
from junitparser import Error, Failure, JUnitXml, Skipped
from render.hostile import hostile
from render.sample import partial, report

ALLOWED = {
    "testsuites": ({"name"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors", "skipped"}, {"properties", "testcase"}),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"name", "classname"}, {"failure", "error", "skipped", "system-out"}),
    "failure": ({"message", "type"}, set()),
    "error": ({"message", "type"}, set()),
    "skipped": ({"message"}, set()),
    "system-out": (set(), set()),
}
"""Attributes and children that fxroof writes; all are in the schema of Jenkins' xUnit plugin (junit-10.xsd)."""


def shown(given):
    return render(given, "junit", Options())


def suites(given):
    text = shown(given)
    for element in ET.fromstring(text).iter():  # noqa: S314  # what fxroof wrote itself
        attributes, children = ALLOWED[element.tag]
        assert set(element.attrib) <= attributes
        assert {child.tag for child in element} <= children
    found = list(JUnitXml.fromstring(text.encode()))
    for suite in found:
        kinds = [type(result) for case in suite for result in case.result]
        counted = (len(list(suite)), kinds.count(Failure), kinds.count(Error), kinds.count(Skipped))
        assert (suite.tests, suite.failures, suite.errors, suite.skipped) == counted
        names = [(case.classname, case.name) for case in suite]
        assert len(set(names)) == len(names)
    return found


def test_one_gpu(golden):
    golden("junit.xml", shown(report()))


@pytest.mark.parametrize("several", [False, True])
def test_a_suite_for_each_gpu_and_phase(several):
    names = [f"{key} {of}" for key in ("x100", "y50_sxm")[: 1 + several] for of in ("prefill", "decode", "rules")]
    assert [suite.name for suite in suites(report(several=several))] == names


def test_warnings_fail_infos_pass_and_the_suppressed_are_skipped():
    decode = suites(report())[1]
    results = {case.name[:6]: [type(result) for result in case.result] for case in decode}
    assert results == {"KVC001": [Failure], "WGT001": [], "TRC001": [Skipped]}
    assert "k = cache[:, : pos + 1]" in next(iter(decode)).result[0].text


def test_errors_fail_too():
    original = report()
    error = replace(original.runs[0].findings[0], severity=Severity.ERROR)
    given = replace(original, runs=(replace(original.runs[0], findings=(error,)),))
    assert [suite.failures for suite in suites(given)] == [0, 1, 0]


def test_a_phase_without_findings_passes():
    original = report()
    given = replace(original, runs=(replace(original.runs[0], findings=(), rule_failures=()),))
    assert [[(case.name, case.result) for case in suite] for suite in suites(given)] == [[("no findings", [])]] * 2


def test_a_phase_that_failed_is_an_error():
    last = suites(partial())[-1]
    assert (last.name, last.errors) == ("not analysed", 1)


def test_findings_of_one_name_are_told_apart():
    original = report()
    first = original.runs[0].findings[0]
    given = replace(original, runs=(replace(original.runs[0], findings=(first, replace(first, line=30))),))
    assert [case.name[-3:] for case in suites(given)[1]] == ["ttn", "(2)"]


def test_hostile_text_stays_text():
    plain, found = suites(hostile("x")), suites(hostile())
    assert [len(list(suite)) for suite in found] == [len(list(suite)) for suite in plain]
    message = next(iter(found[1])).result[0].message
    assert "</script><img src=x" in message
    assert "\\x00 ::error::owned\\n" in message
