"""What holds for every format, those to come included: nothing leaks, nothing changes, size is no obstacle."""

import subprocess
import sys
from dataclasses import replace

import pytest
from fxroof.analyzer.render.registry import Options, formats, render
from render.hostile import SURROGATES, TEXT, hostile
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
