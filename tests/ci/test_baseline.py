"""Findings that are put up with, by what they are known by."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from fxroof.analyzer.baseline import KNOWN, applied, entries, pruned, read, to_text
from fxroof.analyzer.cli import main
from fxroof.analyzer.report import to_json
from render.sample import report


def moved(report, *, lines=7, layers=3):
    """The same findings on other lines, for more layers."""
    runs = tuple(
        replace(run, findings=tuple(replace(f, line=f.line + lines, count=f.count + layers) for f in run.findings))
        for run in report.runs
    )
    return replace(report, runs=runs)


def counted(report):
    return [f.code for run in report.runs for f in run.findings if not f.suppressed]


def test_what_is_known_does_not_count_wherever_its_line_is():
    known = entries(report())
    assert counted(report())
    assert not counted(applied(moved(report()), known))
    hidden = [f.suppressed for f in applied(report(), known).runs[0].findings if f.suppressed]
    assert set(hidden) == {KNOWN, "on purpose"}


def test_one_more_of_its_like_counts():
    whole = report()
    run = whole.runs[0]
    twice = replace(whole, runs=(replace(run, findings=(*run.findings, replace(run.findings[0], line=99))),))
    assert counted(applied(twice, entries(whole))) == [run.findings[0].code]


def test_the_file_is_sorted_and_read_back(tmp_path):
    file = tmp_path / "known.json"
    file.write_text(to_text(entries(report(several=True))))
    assert read(file) == entries(report(several=True))
    lines = json.loads(file.read_text())["findings"]
    assert lines == sorted(lines, key=lambda e: (e["rule"], e["module"], e["op"], e["phase"], e["gpu"]))
    assert not any(key in line for line in lines for key in ("line", "file", "seconds"))


def test_pruning_keeps_other_gpus():
    known = entries(report(several=True))
    run = report().runs[0]
    less = replace(report(), runs=(replace(run, findings=run.findings[:1]),))
    left = pruned(known, less)
    assert {e[0] for e in left if e[4] == "x100"} == {run.findings[0].code}
    assert {e for e in left if e[4] == "y50_sxm"} == {e for e in known if e[4] == "y50_sxm"}


def test_the_commands(tmp_path):
    saved, file = tmp_path / "report.json", tmp_path / "known.json"
    saved.write_text(to_json(report()))

    def run(*args):
        return CliRunner().invoke(main, [str(a) for a in args])

    before = run("analyze", saved, "--fail-on", "warning")
    assert before.exit_code == 1
    assert run("baseline", "write", saved, "--baseline", file).exit_code == 0
    assert run("analyze", saved, "--fail-on", "info", "--baseline", file).exit_code == 0
    assert run("baseline", "prune", saved, "--baseline", file).exit_code == 0
    assert read(file) == entries(report())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is no baseline"),
        ('{"version": 9, "findings": []}', "version 9"),
        ("[]", "is no baseline"),
    ],
)
def test_what_is_no_baseline_is_refused_before_anything_runs(tmp_path, content, said):
    file = tmp_path / "known.json"
    if content is not None:
        file.write_text(content)
    result = CliRunner().invoke(main, ["analyze", "absent.py", "--gpu", "b200", "--baseline", str(file)])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
