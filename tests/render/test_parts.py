"""Units, folding, shortening, the registry, the catalogue's tables and the documented schema."""

import dataclasses
import pkgutil
import re
import typing
from pathlib import Path

import pytest
from fxroof.analyzer import render as package
from fxroof.analyzer.render import _catalog, _units
from fxroof.analyzer.render._hotspots import hotspots
from fxroof.analyzer.render._layout import Column, keep_end, keep_line, table, wrapped
from fxroof.analyzer.render.registry import Options, formats, render, renderer
from fxroof.analyzer.report import Report, from_json
from fxroof.hardware.catalog import CATALOG_VERSION, all_gpus, load
from hypothesis import given
from hypothesis import strategies as st
from render.sample import op, report, summed
from rich.cells import cell_len

DOCS = Path(__file__).parents[2] / "docs" / "json.md"
PREFIX = {"n": 1e-9, "µ": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (_units.seconds(1.234e-3), "1.23 ms"),
        (_units.seconds(45.6e-6), "45.6 µs"),
        (_units.seconds(0.9996e-3), "1.00 ms"),
        (_units.seconds(0), "0 s"),
        (_units.byte_count(12.34e9), "12.3 GB"),
        (_units.byte_count(999), "999 B"),
        (_units.byte_count(999_999), "1.00 MB"),
        (_units.flops(4.2e12), "4.20 TFLOP"),
        (_units.count(8_030_261_248), "8.03 B"),
        (_units.count(124_439_808), "124 M"),
        (_units.rate(3.35e12, "B/s"), "3.35 TB/s"),
        (_units.rate(8e12, "B/s"), "8 TB/s"),
        (_units.rate(989.4e12, "FLOP/s"), "989.4 TFLOP/s"),
        (_units.rate(2250e12, "FLOP/s"), "2,250 TFLOP/s"),
        (_units.percent(0.136), "13.6%"),
        (_units.percent(0.0027), "0.27%"),
        (_units.percent(1e-9), "<0.01%"),
        (_units.percent(1.0), "100%"),
        (_units.percent(0), "0%"),
        (_units.per_second(221_295), "221,000"),
        (_units.per_second(4.5678), "4.57"),
        (_units.ratio(3.671), "3.67×"),
    ],
)
def test_numbers_as_people_read_them(shown, expected):
    assert shown == expected


@given(st.floats(1e-9, 9e17))
def test_a_scaled_number_reads_back_within_its_three_digits(value):
    number, unit = _units.scaled(value, "s").split(" ")
    assert float(number.replace(",", "")) * PREFIX[unit.removesuffix("s")] == pytest.approx(value, rel=5.1e-3)


def test_layers_fold_and_only_numbers_that_differ_become_stars():
    ops = [
        op(f"{i}{j}", "aten.conv2d.default", module=f"layer{i}.{j}.conv{2}", line=54, matmul=1e9, read=1e6)
        for i in (1, 2)
        for j in range(3)
    ]
    (row,) = hotspots(summed("forward", 0, tuple(ops)), "op")
    assert (row.module, row.calls, row.place) == ("layer*.*.conv2", 6, "models/small_gpt.py:54")


def test_ops_of_other_lines_shapes_or_operators_stay_apart():
    ops = [
        op("a", "aten.add.Tensor", module="l.0", line=1, read=1e6),
        op("b", "aten.add.Tensor", module="l.1", line=2, read=1e6),
        op("c", "aten.mul.Tensor", module="l.2", line=1, read=1e6),
        op("d", "aten.add.Tensor", module="l.3", line=1, read=1e6, shape="2x2"),
    ]
    phase = summed("forward", 0, tuple(ops))
    assert [row.module for row in hotspots(phase, "op")] == ["l.0", "l.1", "l.2", "l.3"]
    assert [(row.module, row.op, row.calls) for row in hotspots(phase, "module")] == [("l.*", "2 operators", 4)]


def test_a_place_keeps_its_line_number():
    place = "transformers/models/llama/modeling_llama.py:164"
    assert keep_line(place, 100) == place
    assert keep_line(place, 32) == "…/llama/modeling_llama.py:164"
    assert keep_line(place, 24) == "…/modeling_llama.py:164"
    assert keep_line(place, 21) == "modeling_llama.py:164"
    assert keep_line(place, 12) == "…lama.py:164"


@given(st.text(max_size=40), st.integers(1, 50))
def test_shortened_text_fits(text, width):
    for shorten in (keep_end, keep_line):
        assert cell_len(shorten(text, width)) <= width
    assert all(cell_len(line) <= max(width, 2) for line in wrapped(text, width))


def test_columns_go_in_the_order_of_their_priority():
    columns = [
        Column(header=name, cells=["x" * 10], drop=drop) for name, drop in (("kept", 0), ("first", 2), ("second", 1))
    ]
    headers = {width: table(columns, width)[0].plain.split() for width in (34, 33, 21)}
    assert headers == {34: ["kept", "first", "second"], 33: ["kept", "second"], 21: ["kept"]}


def test_every_public_module_of_the_package_is_a_renderer():
    modules = {m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}
    assert set(formats()) == modules - {"registry"}


def test_a_format_has_one_renderer():
    with pytest.raises(ValueError, match="two renderers for json"):
        renderer("json")(lambda report, options: "")


def test_json_reads_back_as_the_same_report():
    original = report(several=True)
    assert from_json(render(original, "json", Options())) == original


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_the_catalogue_fits_and_names_every_part(width):
    page = _catalog.catalog(all_gpus(), CATALOG_VERSION, Options(width=width))
    assert max(map(cell_len, page.splitlines())) <= width
    keys = [line.split()[0] for line in page.splitlines()[1 : len(all_gpus()) + 1]]
    assert keys == [gpu.key for gpu in all_gpus()]


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.key)
def test_a_part_shows_every_figure_with_its_source(gpu):
    page = _catalog.part(gpu, None, Options(width=120))
    assert max(map(cell_len, page.splitlines())) <= 120
    for figure in gpu.figures:
        (line,) = re.findall(rf"^  {figure.key} .*$", page, re.MULTILINE)
        assert figure.confidence in line
        assert figure.source_id in line
        assert figure.unit in line
    for source in {figure.source_id for figure in gpu.figures}:
        assert f"- {source} (" in page


def test_a_part_says_what_its_name_was_taken_for():
    resolved = load("h100")
    assert "h100 means h100_sxm" in _catalog.part(resolved.gpu, resolved.note, Options())


def dataclasses_of(kind, found):
    if dataclasses.is_dataclass(kind) and kind not in found:
        found.append(kind)
        for hint in typing.get_type_hints(kind).values():
            dataclasses_of(hint, found)
    for inner in typing.get_args(kind):
        dataclasses_of(inner, found)
    return found


def test_every_field_of_the_report_is_documented_and_no_other():
    text = DOCS.read_text(encoding="utf-8")
    documented = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        documented[section.split("\n", 1)[0].strip()] = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    kinds = dataclasses_of(Report, [])
    assert documented == {kind.__name__: [f.name for f in dataclasses.fields(kind)] for kind in kinds}


def test_fields_with_a_unit_state_it():
    text = DOCS.read_text(encoding="utf-8")
    for name, unit in re.findall(r"^\| `(\w+)` \| ([^|]*)\|", text, re.MULTILINE):
        if "bytes" in name:
            assert unit.strip() == "byte", name
        if "seconds" in name:
            assert unit.strip() == "s", name
