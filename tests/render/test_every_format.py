"""What holds for every format, those to come included: nothing leaks, nothing changes, size is no obstacle."""

import csv
import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from math import inf, nan
from xml.etree import ElementTree

import pytest
from fxroof.analyzer.diff import diff
from fxroof.analyzer.render import _diff
from fxroof.analyzer.render.registry import Options, formats, render
from fxroof.analyzer.report import from_json
from markdown_it import MarkdownIt
from render.hostile import SHORT, SURROGATES, TEXT, everywhere, hostile
from render.sample import op, partial, report, retraced, summed

KEEPS_DATA_AS_IT_IS = {"json"}
"""Formats that are read back into the same report: text is escaped by the format and comes out again."""

FORBIDDEN = {*map(chr, range(0x20)), "\x7f", *map(chr, range(0x80, 0xA0)), "\u2028", "\u2029"} - {"\n"}
DIRECTIONS = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f"}


@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("several", [False, True])
def test_hostile_text_leaves_no_control_character(name, several):
    text = render(hostile(several=several), name, Options(width=120))
    assert text.endswith("\n")
    forbidden = FORBIDDEN if name in KEEPS_DATA_AS_IT_IS else FORBIDDEN | DIRECTIONS
    # of the separators, JSON may hold those that JavaScript once took for line breaks
    assert not set(text) & (forbidden - {"\u2028", "\u2029"} if name in KEEPS_DATA_AS_IT_IS else forbidden)


@pytest.mark.parametrize("name", sorted(set(formats()) - KEEPS_DATA_AS_IT_IS))
def test_what_is_no_text_at_all_can_be_written(name):
    render(hostile(TEXT + SURROGATES), name, Options()).encode()


def _lines(text):
    """As terminals and build servers see lines: no other character ends one."""
    return text.split("\n")


@pytest.mark.parametrize("text", SHORT)
def test_short_text_everywhere_is_no_more_than_text(text):
    given = everywhere(report(several=True), text)
    plain = {name: render(given, name, Options()) for name in formats()}
    assert from_json(plain["json"]) == given
    json.loads(plain["gitlab"])
    ElementTree.fromstring(plain["junit"])  # noqa: S314  # it is our own
    header, *rows = csv.reader(StringIO(plain["csv"]))
    assert {len(row) for row in rows} == {len(header)}
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "@", "\t", "-@"))]
    assert all(line.startswith("::") for line in _lines(plain["github"].rstrip("\n")))
    assert not [line for line in _lines(plain["github"]) if re.match(r"::(?!error |warning |notice )", line)]
    for name in ("terminal", "concise"):
        assert not [line for line in _lines(plain[name]) if line.lstrip().startswith("::") or "##[" in line]
    compared = diff(report(several=True), given)
    shown = {name: show(compared, given, Options()) for name, show in _diff.FORMATS.items()}
    assert not [line for line in _lines(shown["terminal"]) if line.lstrip().startswith("::") or "##[" in line]
    json.loads(shown["json"])
    for name in set(plain) - KEEPS_DATA_AS_IT_IS:
        assert not set(plain[name]) & (FORBIDDEN | DIRECTIONS)
    for name in set(shown) - KEEPS_DATA_AS_IT_IS:
        assert not set(shown[name]) & (FORBIDDEN | DIRECTIONS)
    for page in (plain["markdown"], shown["markdown"]):
        assert _markup(page) <= _own_markup()


def _markup(page):
    """The HTML elements that a page of Markdown makes, its own and those of Markdown."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return set(re.findall(r"<(?!/)[^>\s]+", parser.render(page)))


@functools.cache
def _own_markup():
    base, other = report(several=True), everywhere(report(several=True), "x")
    own = _markup(_diff.markdown(diff(base, other))) | _markup(render(other, "markdown", Options()))
    assert not own & {"a", "img", "em", "s", "del", "script", "b"}
    return own


@pytest.mark.parametrize("name", formats())
def test_the_same_report_is_the_same_text(name):
    assert render(report(several=True), name, Options()) == render(report(several=True), name, Options())


@pytest.mark.parametrize("name", formats())
def test_a_report_without_runs_findings_or_phases_renders(name):
    whole = partial()
    nothing = replace(whole, runs=())
    no_phases = replace(whole, runs=tuple(replace(r, phases=(), findings=(), waterfall={}) for r in whole.runs))
    no_file = retraced(whole, model=replace(whole.model, source=""))
    for given in (nothing, no_phases, no_file):
        assert render(given, name, Options()).endswith("\n")


@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("value", [inf, -inf, nan, 1e308, 5e-324, 10**40, -1, True])
def test_evidence_of_any_number_renders(name, value):
    whole = report()
    evidence = {"x": value, "x_bytes": value, "x_seconds": value, "x_flops": value}
    odd = tuple(replace(finding, evidence=evidence) for finding in whole.runs[0].findings)
    assert render(replace(whole, runs=(replace(whole.runs[0], findings=odd),)), name, Options()).endswith("\n")


@pytest.mark.parametrize("name", formats())
def test_paths_with_stars_of_their_own_are_told_from_folded_ones(name):
    ops = tuple(op(f"mul_{i}", "aten.mul.Tensor", module=path, line=1, read=1e6) for i, path in enumerate(STARS))
    whole = report()
    run = replace(whole.runs[0], phases=(summed("decode", 2, ops),))
    assert render(replace(whole, runs=(run,)), name, Options()).endswith("\n")


STARS = ("blocks.*", "blocks.1", "blocks.22", "blocks.0.*", "blocks.*.1")


@pytest.mark.parametrize("name", formats())
def test_long_text_takes_no_longer_than_it_is(name):
    render(hostile("a." * 20_000), name, Options())  # for minutes, were each character looked at once a character


@pytest.mark.parametrize("name", formats())
def test_many_ops_render(name):
    ops = tuple(
        op(f"mul_{i}", "aten.mul.Tensor", module=f"blocks.{i}.a{i % 97}", line=1 + i % 500, vector=1e6, read=1e6)
        for i in range(20_000)
    )
    original = report()
    run = replace(original.runs[0], phases=(summed("decode", 2, ops),))
    text = render(replace(original, runs=(run,)), name, Options())
    assert text.endswith("\n")


def test_rendering_imports_no_torch():
    code = (
        "import sys; from render.sample import report; "
        "from fxroof.analyzer.render.registry import Options, formats, render\n"
        "for name in formats(): render(report(), name, Options())\n"
        "assert 'torch' not in sys.modules"
    )
    folder = __file__.rpartition("render")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
