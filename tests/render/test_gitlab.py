"""GitLab's Code Quality report against its schema."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fxroof.analyzer.render.registry import Options, render
from jsonschema import Draft202012Validator
from render.hostile import hostile
from render.sample import partial, report

SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "schemas" / "gitlab.json").read_text(encoding="utf-8"))


def shown(given):
    return render(given, "gitlab", Options())


def issues(given):
    found = json.loads(shown(given))
    Draft202012Validator(SCHEMA).validate(found)
    assert len({issue["fingerprint"] for issue in found}) == len(found)
    return found


def test_one_gpu(golden):
    golden("gitlab.json", shown(report()))


@pytest.mark.parametrize("several", [False, True])
def test_it_is_what_gitlab_reads(several):
    assert [issue["check_name"] for issue in issues(report(several=several))] == ["KVC001", "WGT001", "rule-failed"]


def test_hostile_text_stays_in_its_field():
    found = issues(hostile(several=True))
    assert [issue["severity"] for issue in found] == ["blocker", "major", "info", "minor"]
    assert all(issue["description"].isprintable() and issue["location"]["path"].isprintable() for issue in found)


def test_a_phase_that_failed_is_an_issue():
    first = issues(partial())[0]
    assert (first["check_name"], first["severity"]) == ("not-analysed", "blocker")


def test_a_fingerprint_outlives_lines_and_figures_and_is_never_given_twice():
    original = report()
    first = original.runs[0].findings[0]
    moved = replace(first, line=99, saving_seconds={"decode": 1e-6}, count=1)

    def prints(*findings, key="x100"):
        run = replace(original.runs[0], findings=findings, rule_failures=())
        return [issue["fingerprint"] for issue in issues(replace(original, runs=(run,)))]

    assert prints(first) == prints(moved)
    assert len(set(prints(first, moved))) == 2
    # on another GPU the rule fires at one more line before: the same name would stand for two lines
    runs = (original.runs[0], replace(original.runs[0], findings=(replace(first, line=1), first)))
    assert len(issues(replace(original, runs=runs))) == 5


def test_no_findings_is_an_empty_list():
    original = report()
    assert issues(replace(original, runs=(replace(original.runs[0], findings=(), rule_failures=()),))) == []
