"""One row an op, as spreadsheets and data frames read it."""

import csv
from dataclasses import fields
from io import StringIO

import pytest
from fxroof.analyzer.analysis import OpAnalysis
from fxroof.analyzer.render.registry import Options, render
from render.hostile import TEXT, hostile
from render.sample import report


def shown(given):
    return render(given, "csv", Options())


def rows(given):
    return list(csv.DictReader(StringIO(shown(given)), quoting=csv.QUOTE_NONNUMERIC, strict=True))


def test_one_gpu(golden):
    golden("ops.csv", shown(report()))


def test_every_op_of_every_phase_of_every_run():
    given = report(several=True)
    expected = [(run, phase, op) for run in given.runs for phase in run.phases for op in phase.ops]
    found = rows(given)
    assert len(found) == len(expected)
    for row, (run, phase, op) in zip(found, expected, strict=True):
        assert (row["gpu"], row["phase"], row["name"]) == (run.gpu.key, phase.name, op.name)
        for name in ("line", "repeat", "flops", "flops_executed", "bytes_read", "bytes_written", "seconds", "ridge"):
            assert row[name] == getattr(op, name)
        assert (row["memory_seconds"], row["tensor_seconds"]) == (op.lanes.memory, op.lanes.tensor)


def test_every_field_of_an_op_has_a_column():
    columns = set(rows(report())[0])
    assert {field.name for field in fields(OpAnalysis)} - {"lanes"} <= columns


@pytest.mark.parametrize("text", [TEXT, "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '"', '",=1', "＝1"])
def test_no_cell_is_a_formula(text):
    original = rows(report())
    found = rows(hostile(text))
    assert len(found) == len(original)
    for row in found:
        assert None not in row
        for value in row.values():
            assert isinstance(value, float) or (
                not value.startswith(("=", "+", "-", "@", "＝")) and value.isprintable()
            )


def test_what_begins_like_a_formula_is_kept_behind_an_apostrophe():
    assert {row["note"] for row in rows(hostile("=1+1"))} == {"'=1+1"}
