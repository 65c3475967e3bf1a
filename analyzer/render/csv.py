"""Every op of every phase of every run as a row of comma-separated values, for spreadsheets and data frames."""

import csv
from io import StringIO

from ..analysis import OpAnalysis
from ..report import Report
from ._layout import clean
from .registry import Options, renderer

_COLUMNS = (
    *("model", "gpu", "scenario", "phase", "name", "target", "module", "file", "line", "library_file", "library_line"),
    *("status", "shape", "dtype", "backend", "repeat", "flops", "flops_executed", "special"),
    *("bytes_read", "bytes_written", "intensity", "ridge", "bound", "seconds"),
    *("tensor_seconds", "vector_seconds", "special_seconds", "memory_seconds", "l2_seconds", "link_seconds", "note"),
)


@renderer("csv")
def render(report: Report, options: Options) -> str:  # noqa: ARG001  # all rows, whatever `top` says
    """A header, then the fields of docs/json.md's `OpAnalysis` in base units; text is quoted, numbers are not."""
    out = StringIO()
    rows = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for run in report.runs:
        for phase in run.phases:
            model = report.traces[run.traced].model.name
            start = _text(model), _text(run.gpu.key), _text(run.scenario.name), _text(phase.name)
            rows.writerows((*start, *_row(op)) for op in phase.ops)
    return out.getvalue()


def _row(op: OpAnalysis) -> tuple[str | float | None, ...]:
    lanes = op.lanes
    return (
        *(_text(op.name), _text(op.target), _text(op.module), _text(op.file), op.line),
        *(_text(op.library_file), op.library_line, op.status.value, _text(op.shape), _text(op.dtype)),
        *(_text(op.backend), op.repeat, op.flops, op.flops_executed, op.special, op.bytes_read, op.bytes_written),
        *(op.intensity, op.ridge, op.bound.value, op.seconds),
        *(lanes.tensor, lanes.vector, lanes.special, lanes.memory, lanes.l2, lanes.link, _text(op.note)),
    )


def _text(value: str) -> str:
    shown = value if value.isprintable() else clean(value)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""What makes a spreadsheet run a cell instead of showing it; tabs and line breaks are escapes by then."""
