"""The terminal report: goldens, and what must hold at every width and for every name."""

import re
from dataclasses import replace

import pytest
from fxroof.analyzer.estimate import derating
from fxroof.analyzer.render import terminal
from fxroof.analyzer.render._hotspots import hotspots
from fxroof.analyzer.render.registry import Options, render
from fxroof.hardware.catalog import load
from hypothesis import given, settings
from hypothesis import strategies as st
from render.sample import memory, partial, renamed, report
from rich.cells import cell_len

ANSI = re.compile(r"\x1b\[[0-9;]*m")
SEVERAL = report(several=True)


def shown(given_report=SEVERAL, **options):
    return render(given_report, "terminal", Options(**options))


@pytest.mark.parametrize("width", [80, 120, 200])
def test_one_gpu(golden, width):
    golden(f"one_gpu_{width}.txt", shown(report(), width=width))


def test_several_gpus(golden):
    golden("several_gpus_100.txt", shown(width=100, top=3))


def test_by_module(golden):
    golden("by_module_100.txt", shown(report(), width=100, by="module"))


def test_a_phase_that_failed(golden):
    golden("partial_100.txt", shown(partial(), width=100))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(60, 220), text=st.text(min_size=1, max_size=300))
def test_a_failure_keeps_to_the_width(width, text):
    lines = shown(renamed(partial(), text), width=width).split("\n")
    assert max(map(cell_len, lines)) <= width
    assert all(line.isprintable() for line in lines)


def test_ascii(golden):
    text = shown(report(), width=80, unicode=False)
    assert text.isascii()
    golden("ascii_80.txt", text)


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(60, 220),
    top=st.integers(1, 70),
    by=st.sampled_from(["op", "module"]),
    unicode=st.booleans(),
    colour=st.booleans(),
)
def test_no_line_exceeds_the_width(width, top, by, unicode, colour):
    text = shown(width=width, top=top, by=by, unicode=unicode, colour=colour)
    assert max(map(cell_len, ANSI.sub("", text).splitlines())) <= width


@settings(max_examples=80, deadline=None)
@given(width=st.integers(60, 220), text=st.text(min_size=1, max_size=60), colour=st.booleans())
def test_text_from_the_model_cannot_break_the_page(width, text, colour):
    page = shown(renamed(report(), text), width=width, colour=colour)
    lines = ANSI.sub("", page).split("\n")
    assert max(map(cell_len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert sum(":" in line and line.endswith(":27") for line in lines) == 2  # the sdpa row of each phase


@pytest.mark.parametrize("text", ["[red]", "[/]", "[bold]x[/bold]", "[link=file:///etc/passwd]x[/link]", ":smile:"])
@pytest.mark.parametrize("colour", [False, True])
def test_markup_in_names_is_text(text, colour):
    page = ANSI.sub("", shown(renamed(report(), text), width=200, colour=colour))
    assert page.count(text) > 10


def test_control_characters_in_names_are_shown_as_escapes():
    page = shown(renamed(report(), "a\x1b[31mb\nc\u202ed"), width=200)
    assert "\\x1b[31mb\\nc\\u202ed" in page
    assert "\x1b" not in page


@pytest.mark.parametrize("width", range(60, 221, 4))
def test_every_row_shows_its_line_number(width):
    rows = hotspots(report().runs[0].phases[0], "op")[:10]
    table = shown(report(), width=width).split("decode ·")[0]
    for row in rows:
        if row.place:
            assert re.search(rf":{row.place.rpartition(':')[2]}$", table, re.MULTILINE), row


def test_colour_changes_nothing_but_colour():
    coloured = shown(width=120, colour=True)
    assert "\x1b[" in coloured
    assert ANSI.sub("", coloured) == shown(width=120)
    assert "\x1b" not in shown(width=120)


def test_lines_end_without_blanks():
    assert not [line for line in shown(width=100).splitlines() if line != line.rstrip()]


def test_marks_of_the_table_are_in_the_picture():
    page = shown(report(), width=100).split("decode ·")[0]
    picture, table = page.split("hotspots:")
    marks = [line[0] for line in table.splitlines() if re.match("[A-Z] ", line)]
    assert marks == list("ABCDEFGHI")[: len(marks)]
    assert len(marks) >= 8
    without_flops = re.search(r"([A-Z, ]+): no FLOPs", picture)
    drawn = {c for line in picture.splitlines() if "│" in line or "┤" in line for c in re.split("[│┤]", line)[1]}
    absent = set(without_flops[1]) if without_flops else set()
    assert set(marks) - absent <= drawn


def test_shares_of_all_rows_sum_to_one():
    for by in ("op", "module"):
        for phase in report().runs[0].phases:
            assert sum(row.share for row in hotspots(phase, by)) == pytest.approx(1)


def test_decode_counts_new_tokens_whatever_rows_go_through_the_model():
    original = report()
    prefix = replace(original.runs[0].phases[1], tokens=10_000)  # a model without a cache
    changed = replace(original, runs=(replace(original.runs[0], phases=(prefix,)),))
    expected = f"{float(f'{2 / prefix.seconds.bound:.3g}'):,.0f} tokens/s"
    assert expected in shown(changed, width=120)


def test_a_phase_without_work_or_ridge_still_renders():
    original = report()
    empty = replace(
        original.runs[0].phases[0],
        ops=(),
        ridge=None,
        matmul_path="",
        seconds=replace(original.runs[0].phases[0].seconds, floor=0.0, bound=0.0),
        bound_share={},
        tokens_per_second=0.0,
    )
    run = replace(original.runs[0], phases=(empty,), memory=memory(None))
    page = shown(replace(original, runs=(run,)), width=80)
    assert "no matmul peak is published" in page
    assert "capacity unknown" in page


def test_unpriced_ops_are_named_with_what_they_were_charged():
    assert "mylib.mystery.default ×2, charged 8.40 MB" in shown(report(), width=120)


def test_assumptions_are_said_once_and_named_where_they_hold_for_one_gpu():
    page = shown(width=120)
    assert page.count("times are bounds from vendor peaks") == 1
    assert "x100: known of x100 only" in page


@pytest.mark.parametrize(
    ("key", "kernels"),
    [("b200", "h100_sxm's, taken over"), ("a100_sxm_80gb", "its own"), ("mi300x", None), ("tpu_v5e", None)],
)
def test_the_main_figures_of_estimates_are_told_and_the_others_counted(key, kernels):
    original = report()
    (run,) = original.runs
    gpu = load(key).gpu
    known = derating(gpu).figures
    page = shown(
        replace(original, runs=(replace(run, gpu=replace(run.gpu, key=key), derating=known),)), width=200
    ).partition("reached ")[2]
    for name in ("memory when reading", "bfloat16 products", "attention beside products", "launch of an op"):
        assert page.count(name) == 1
    assert " 0 s" not in page
    assert "float16 products" not in page.replace("bfloat16 products", "")  # no phase of the sample multiplies them
    told = page.count("%") + len(re.findall(r" (?:B|.B|.?s|.B/s)(?: ·|$)", page, re.MULTILINE))
    unseen = [figure for figure in known if figure.value and figure.dtype in ("", "bfloat16")]
    assert f"{len(unseen) - told} more with -f json" in page
    assert ("fitted figures of kernels: " + kernels in page) if kernels else ("fitted" not in page)


def test_every_main_figure_is_one_of_estimates():
    assert {figure.name for figure in derating(load("b200").gpu).figures} >= terminal._MAIN
