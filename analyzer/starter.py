"""The settings that `fxroof init` writes: commented, and such that they work for the model that was analysed."""

import ast
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .budgets import METRICS, figure_of
from .report import Report, Run

_ROOM = 1.1
"""Budgets leave a tenth more than what the model takes today."""

_GROWTH = "+2%"
"""And a change may make a phase so much slower."""

_BUDGETED = ("prefill.ttft", "decode.tpot", "forward.time", "encoder.time", "memory.total")

_BASES = {"Module", "LightningModule", "PreTrainedModel"}
"""Last names of the base classes by which a file is known to define a model."""


def model_files(folder: Path) -> list[Path]:
    """Python files of a folder, and of those directly in it, that define a subclass of `Module`; none is run."""
    files = (file for pattern in ("*.py", "*/*.py") for file in sorted(folder.glob(pattern)))
    return [file for file in files if not file.name.startswith(("test_", ".")) and _defines_model(file)]


def settings_text(target: str, report: Report, init: str = "") -> str:
    """Settings that ask for what a report shows, with budgets that its figures keep to.

    Args:
        target: as the settings are to name it.
        report: of that target, in each scenario that the settings are to have, on each GPU.
        init: the expression that builds the model; empty where none is needed.
    """
    return "\n".join(_lines(target, report, init)) + "\n"


def _lines(target: str, report: Report, init: str) -> Iterator[str]:
    gpus = list(dict.fromkeys(run.gpu.key for run in report.runs))
    yield "# Settings of fxroof: `fxroof analyze` without a target uses them; the command line wins over them."
    yield "# In pyproject.toml they are [tool.fxroof], [[tool.fxroof.scenarios]] and [tool.fxroof.budgets]."
    yield ""
    yield "# What to analyse; several are reported together. Files are looked for beside this file."
    yield f"targets = [{_text(target)}]"
    if init:
        yield f"init = {_text(init)}"
    yield ""
    yield "# GPUs to price for: `fxroof gpus` lists all."
    yield f"gpus = [{', '.join(map(_text, gpus))}]"
    yield ""
    yield "# Findings of this severity and above end with exit code 1: error, warning, info or never."
    yield 'fail-on = "error"'
    yield ""
    yield "# Rules to leave out, everywhere or in some modules: `fxroof rule` lists all."
    yield "# ignore = []"
    yield '# per-module-ignores = { "*.attention" = ["ATT003"] }'
    yield ""
    yield "# Findings that are known and do not count: `fxroof baseline write report.json` writes the file."
    yield '# baseline = ".fxroof-baseline.json"'
    yield from _scenarios(report)
    yield ""
    yield "# Limits: beyond one of them, fxroof ends with exit code 1. These leave a tenth more than the model takes"
    yield "# today, as estimated. Limits against the base of a comparison, `fxroof diff --base main`, are written"
    yield '# "+2%" or "+1 ms"; "crossing 12 ms" is broken only by a change that brings about the crossing.'
    yield "[budgets]"
    yield from _budgets(report)
    yield '# decode.bytes = "+2%"' if _has(report.runs, "decode") else '# forward.bytes = "+2%"'


def _scenarios(report: Report) -> Iterator[str]:
    generates = _has(report.runs, "decode")
    yield ""
    yield "# Situations to analyse, each with a name; without any, the one of the command line."
    for traced in report.traces:
        scenario = traced.scenario
        yield "[[scenarios]]"
        yield f"name = {_text(scenario.name)}"
        yield f"batch-size = {scenario.batch_size}"
        if generates:
            yield f"input-len = {scenario.input_len}    # prompt tokens of each sequence"
            yield f"output-len = {scenario.output_len}    # tokens generated for each"
        yield ""
    yield "# [[scenarios]]"
    yield '# name = "rag"'
    yield "# input-len = 16384" if generates else "# batch-size = 64"
    if generates:
        yield "# output-len = 512"
    yield '# budgets.prefill.ttft = "2 s"    # of this scenario alone'


def _budgets(report: Report) -> Iterator[str]:
    several = len(report.runs) > 1
    for name in _BUDGETED:
        found = [(run, value) for run in report.runs if (value := figure_of(run, name))]
        growth = [_text(_GROWTH)] if METRICS[name].unit == "seconds" else []
        if not several:
            limits = ([_text(_limit(name, value)), *growth] for _, value in found)
            yield from (f"{name} = {_listed(limit)}" for limit in limits)
        elif found:
            yield f"{name} = ["
            for run, value in found:
                of = f"gpu = {_text(run.gpu.key)}, scenario = {_text(run.scenario.name)}"
                yield f"  {{ limit = {_text(_limit(name, value))}, {of} }},"
            yield from (f"  {text}," for text in growth)
            yield "]"
    covered = min((run.coverage.fraction for run in report.runs), default=1.0)
    yield f'coverage = "{math.floor(covered * 100)}%"    # of the ops, how many have a formula'


def _listed(limits: Sequence[str]) -> str:
    return limits[0] if len(limits) == 1 else f"[{', '.join(limits)}]"


def _limit(name: str, value: float) -> str:
    """A little more than a figure, in two digits and a unit that people use."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if METRICS[name].unit == "seconds" else _SIZES
    roomy = value * _ROOM
    unit, factor = next(((u, f) for u, f in units if roomy >= f), units[-1])
    digits = roomy / factor
    step = 10.0 ** (math.floor(math.log10(digits)) - 1)
    return f"{round(math.ceil(digits / step) * step, 9):g} {unit}"


_SIZES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def _has(runs: Sequence[Run], phase: str) -> bool:
    return any(known.name == phase for run in runs for known in run.phases)


def _text(value: str) -> str:
    """A TOML string: JSON's, with the one control character escaped that JSON leaves alone."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _defines_model(file: Path) -> bool:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # not one that could be analysed
        return False
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return any(name in _BASES for node in classes for name in _last_names(node.bases))


def _last_names(bases: Iterable[ast.expr]) -> Iterator[str]:
    for base in bases:
        if isinstance(base, ast.Name):
            yield base.id
        elif isinstance(base, ast.Attribute):
            yield base.attr
