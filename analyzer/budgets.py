"""Limits that a project sets itself: what a step may take, what must fit, how much may be added by a change.

A budget is a metric and a limit, `decode.tpot = "12 ms"`. A limit with a sign, `"+2%"` or `"+1 ms"`, is what may be
added to a base; `"crossing 12 ms"` is broken only by what makes a base that kept to it break it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from .analysis import PhaseAnalysis
from .errors import FxroofError
from .limits import Budget, Kind, Of, Verdict
from .report import Report, Run


class BudgetError(FxroofError):
    """A budget that says nothing; `path` leads to it in the settings."""

    def __init__(self, message: str, hint: str = "", path: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.path = path


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of a run that can have a limit.

    Attributes:
        unit: `seconds`, `bytes`, `flops`, `share`, `per second` or `count`.
        at_least: whether more is better.
        read: the figure; None where the run has none.
        timed: whether it is a floor, a bound or an estimate.
    """

    unit: str
    read: Callable[[Run, Of], float | None]
    at_least: bool = False
    timed: bool = False


def budgets(settings: Mapping[str, Any], *, scenario: str = "") -> tuple[Budget, ...]:
    """The budgets of a table: dotted or nested keys, each a text or a table with `limit`, `of`, `gpu` and `scenario`.

    Raises:
        BudgetError: a metric is unknown, or a limit is not of its kind.
    """
    return tuple(_budgets(settings, (), scenario))


def from_texts(texts: Iterable[str]) -> tuple[Budget, ...]:
    """Budgets as the command line has them, `METRIC=LIMIT`.

    Raises:
        BudgetError: as `budgets`, or there is no `=`.
    """
    found: list[Budget] = []
    for text in texts:
        name, given, limit = (part.strip() for part in text.partition("="))
        if not given:
            raise BudgetError(f"{text!r} is no budget.", "Write it as 'decode.tpot=12 ms'.")
        found += budgets({name: limit})
    return tuple(found)


def judge(report: Report, limits: Iterable[Budget], bases: Mapping[int, Run] | None = None) -> tuple[Verdict, ...]:
    """Every budget on every run that it is for.

    Args:
        report: the runs.
        limits: the budgets.
        bases: what runs are compared with, by their place in the report.
    """
    limits, bases = tuple(limits), bases or {}
    return tuple(
        _verdict(run, report.title(run), limit, bases.get(index))
        for index, run in enumerate(report.runs)
        for limit in limits
        if limit.gpu in ("", run.gpu.key) and limit.scenario in ("", run.scenario.name)
    )


def figure_of(run: Run, metric: str, of: Of = "estimate") -> float | None:
    """What a run has of a metric, in its base unit; None where it has no such figure."""
    return METRICS[metric].read(run, of)


def _verdict(run: Run, title: str, budget: Budget, base: Run | None) -> Verdict:
    metric = METRICS[budget.metric]
    value = metric.read(run, budget.of)
    before = metric.read(base, budget.of) if base is not None else None
    limit, why = _held_against(budget, value, before, base)
    kept = None
    if value is not None and limit is not None:
        kept = _keeps(metric, value, limit)
        if budget.kind == "crossing" and not kept and before is not None and not _keeps(metric, before, limit):
            kept, why = True, "the base breaks it too"
    return Verdict(
        budget=budget, run=title, unit=metric.unit, value=value, base=before, limit=limit, kept=kept, why=why
    )


def _held_against(
    budget: Budget, value: float | None, before: float | None, base: Run | None
) -> tuple[float | None, str]:
    """The limit of a value, or None and why there is none."""
    if value is None:
        return budget.limit, "this run has no such figure"
    if budget.needs_base and before is None:
        return None, "there is no base to compare with" if base is None else "the base has no such figure"
    if budget.kind == "share":
        return (before or 0.0) * (1 + budget.limit), ""
    return (before or 0.0) + budget.limit if budget.kind == "change" else budget.limit, ""


def _keeps(metric: Metric, value: float, limit: float) -> bool:
    slack = _SLACK * abs(limit)
    return value >= limit - slack if metric.at_least else value <= limit + slack


_SLACK = 1e-9
"""Two sums of the same figures may differ in their last digits."""


def _budgets(settings: Mapping[str, Any], path: tuple[str, ...], scenario: str) -> Iterator[Budget]:
    for key, value in settings.items():
        here = (*path, key)
        name = ".".join(here)
        if isinstance(value, Mapping) and "limit" not in value and name not in METRICS:
            yield from _budgets(value, here, scenario)
        elif isinstance(value, list):
            for item in value:
                yield _budget(name, item, here, scenario)
        else:
            yield _budget(name, value, here, scenario)


_FIELDS = ("limit", "of", "gpu", "scenario")


def _budget(name: str, value: object, path: tuple[str, ...], scenario: str) -> Budget:
    if name not in METRICS:
        near = [known for known in METRICS if name.rpartition(".")[2] in known] or list(METRICS)
        raise BudgetError(f"{name} is no figure that a budget can limit.", f"Known: {', '.join(near)}.", path)
    table: Mapping[str, Any] = value if isinstance(value, Mapping) else {"limit": value}
    unknown = [key for key in table if key not in _FIELDS]
    if unknown:
        raise BudgetError(f"{name}: {unknown[0]} is not known.", f"Known: {', '.join(_FIELDS)}.", path)
    text, of = table.get("limit"), table.get("of", "estimate")
    if not isinstance(text, str):
        raise BudgetError(f"{name}: {text!r} is no limit.", f"Write a text such as {_example(name)}.", path)
    if of not in ("floor", "bound", "estimate") or (of != "estimate" and not METRICS[name].timed):
        raise BudgetError(f"{name}: of = {of!r} means nothing here.", "floor, bound or estimate, for times.", path)
    limit, kind = _limit(name, text, path)
    return Budget(
        metric=name,
        limit=limit,
        kind=kind,
        text=text,
        of=of,
        gpu=str(table.get("gpu", "")),
        scenario=str(table.get("scenario", scenario)),
    )


_UNITS: dict[str, dict[str, float]] = {
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0},
    "bytes": {
        "b": 1.0,
        **{f"{p}b": 1000.0**n for n, p in enumerate("kmgtp", 1)},
        **{f"{p}ib": 1024.0**n for n, p in enumerate("kmgtp", 1)},
    },
    "flops": {"flop": 1.0, **{f"{p}flop": 1000.0**n for n, p in enumerate("kmgtpe", 1)}},
    "share": {"%": 0.01, "": 1.0},
    "per second": {"/s": 1.0, "": 1.0, "tokens/s": 1.0},
    "count": {"": 1.0},
}


def _limit(name: str, text: str, path: tuple[str, ...]) -> tuple[float, Kind]:
    match = re.fullmatch(r"\s*(crossing\s+|[+-]?)(\d[\d_,]*(?:\.\d+)?)\s*([^\d\s]*)\s*", text)
    if match is None:
        raise BudgetError(f"{name}: {text!r} is no limit.", f"Write it as {_example(name)}.", path)
    before, digits, unit = match[1].strip(), match[2].replace(",", "").replace("_", ""), match[3]
    signed = before in ("+", "-")
    value = float(f"{before}{digits}" if signed else digits)
    if not isfinite(value):
        raise BudgetError(f"{name}: {text!r} is too large a number.", f"Write it as {_example(name)}.", path)
    metric = METRICS[name]
    if signed and unit == "%":
        return value / 100, "share" if metric.unit != "share" else "change"
    factor = _UNITS[metric.unit].get(unit.lower())
    if factor is None:
        raise BudgetError(f"{name}: {text!r} is not in {metric.unit}.", f"Write it as {_example(name)}.", path)
    return value * factor, "change" if signed else "crossing" if before else "absolute"


def _example(name: str) -> str:
    return {
        "seconds": '"12 ms"',
        "bytes": '"80 GB"',
        "flops": '"1.2 TFLOP"',
        "share": '"99%"',
        "per second": '"1000 tokens/s"',
        "count": '"200"',
    }[METRICS[name].unit] + ' or "+2%"'


def _phase(run: Run, name: str) -> PhaseAnalysis | None:
    return next((phase for phase in run.phases if phase.name == name), None)


def _of_phase(name: str, read: Callable[[PhaseAnalysis, Of], float]) -> Callable[[Run, Of], float | None]:
    def figure(run: Run, of: Of) -> float | None:
        phase = _phase(run, name)
        return None if phase is None else read(phase, of)

    return figure


def _of_serving(name: str) -> Callable[[Run, Of], float | None]:
    def figure(run: Run, of: Of) -> float | None:
        times = getattr(run.serving, name) if run.serving is not None else None
        return None if times is None else float(getattr(times, of))

    return figure


def _of_memory(name: str) -> Callable[[Run, Of], float | None]:
    def figure(run: Run, _of: Of) -> float | None:
        return None if run.memory is None else float(getattr(run.memory, name))

    return figure


def _metrics() -> dict[str, Metric]:
    found = {
        "prefill.ttft": Metric(unit="seconds", read=_of_serving("ttft"), timed=True),
        "decode.tpot": Metric(unit="seconds", read=_of_serving("tpot"), timed=True),
        "request": Metric(unit="seconds", read=_of_serving("request"), timed=True),
        "decode.tokens_per_second": Metric(
            unit="per second", read=_of_serving("tokens_per_second_per_gpu"), at_least=True, timed=True
        ),
        "coverage": Metric(unit="share", read=lambda run, _of: run.coverage.fraction, at_least=True),
    }
    for part in ("total", "weights", "kv_cache", "activations"):
        found[f"memory.{part}"] = Metric(unit="bytes", read=_of_memory(f"{part}_bytes"))
    for name in ("encoder", "prefill", "decode", "forward"):
        found |= {
            f"{name}.time": Metric(
                unit="seconds", read=_of_phase(name, lambda p, of: float(getattr(p.seconds, of))), timed=True
            ),
            f"{name}.bytes": Metric(unit="bytes", read=_of_phase(name, lambda p, _of: float(p.bytes.total))),
            f"{name}.flops": Metric(unit="flops", read=_of_phase(name, lambda p, _of: p.flops.matmul)),
            f"{name}.kernels": Metric(
                unit="count",
                read=_of_phase(name, lambda p, _of: float(len(p.executions.of(p.execution).kernels))),
            ),
        }
    return found


METRICS = _metrics()
"""All figures that a budget can limit, by name."""
