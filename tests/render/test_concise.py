"""One line a finding and one a phase, in a form that editors and build servers read."""

import re
from dataclasses import replace

import pytest
from fxroof.analyzer.render.registry import Options, render
from render.hostile import TEXT, hostile
from render.sample import partial, report


def shown(given, **options):
    return render(given, "concise", Options(**options))


def test_one_gpu(golden):
    golden("concise.txt", shown(report()))


def test_several_gpus(golden):
    golden("concise_several.txt", shown(report(several=True)))


def test_a_phase_that_failed(golden):
    golden("concise_partial.txt", shown(partial()))


def test_findings_are_lines_that_editors_follow():
    lines = shown(report()).splitlines()
    found = [match for line in lines if (match := re.fullmatch(r"([^:]+):(\d+): ([A-Z]{3}\d{3}) .+", line))]
    assert [(m[1], m[2], m[3]) for m in found] == [
        ("models/small_gpt.py", "24", "KVC001"),
        ("models/small_gpt.py", "1", "WGT001"),
    ]


def test_no_findings_is_said():
    original = report()
    clean = replace(original, runs=(replace(original.runs[0], findings=(), rule_failures=()),))
    assert shown(clean).splitlines()[-1] == "no findings"
    assert len(shown(clean).splitlines()) == 3


def test_what_one_gpu_of_several_shows_names_it():
    given = report(several=True)
    given = replace(given, runs=(given.runs[0], replace(given.runs[1], findings=())))
    assert "(saves on x100 decode 17.0 µs, 8.2%)" in shown(given)


def test_ascii_where_nothing_else_can_be_shown():
    text = shown(report(), unicode=False)
    assert text.isascii()
    assert "17.0 us" in text


def test_the_width_cuts_nothing():
    assert shown(report(), width=60) == shown(report(), width=200)


@pytest.mark.parametrize("text", [TEXT, "::error::owned", " ::add-mask::x", "##[error]x", "##vso[task.complete]"])
def test_a_build_server_finds_no_command_in_the_log(text):
    page = shown(hostile(text, several=True))
    expected = 2 + 2 + 1 + 1 + 2 * 2 + 1  # findings, comments, the failed phase, the failed rule, phases, the count
    assert len(page.splitlines()) == expected
    for line in page.splitlines():
        assert line.isprintable()
        assert not line.lstrip().startswith("::")
        assert "##[" not in line
        assert "##vso[" not in line
