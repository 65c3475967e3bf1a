"""Budgets for people and machines: what became of each in one phrase."""

from collections.abc import Callable, Iterable

from ..limits import Verdict
from ..report import Report
from . import _units as units
from ._layout import clean


def broken(report: Report) -> list[Verdict]:
    """The verdicts of budgets that a run breaks."""
    return [verdict for verdict in report.verdicts if verdict.kept is False]


def told(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The verdicts worth a line: not those that wait for a base to be compared with."""
    return [v for v in verdicts if v.kept is not None or not v.budget.needs_base]


def sentence(verdict: Verdict) -> str:
    """`b200: decode.tpot is 14.2 ms, limit 12 ms: broken`."""
    state = {True: "kept", False: "broken", None: "not judged"}[verdict.kept]
    why = f" ({clean(verdict.why)})" if verdict.why else ""
    now = f" is {value(verdict)}" if verdict.value is not None else ""
    before = f", was {amount(verdict.base, verdict.unit)}" if verdict.base is not None else ""
    return f"{clean(verdict.run)}: {name(verdict)}{now}{before}, limit {clean(verdict.budget.text)}: {state}{why}"


def name(verdict: Verdict) -> str:
    """The metric: `decode.tpot (bound)`."""
    of = f" ({verdict.budget.of})" if verdict.budget.of != "estimate" else ""
    return f"{clean(verdict.budget.metric)}{of}"


def value(verdict: Verdict) -> str:
    """What was found; empty where the run has no such figure."""
    return "" if verdict.value is None else amount(verdict.value, verdict.unit)


def amount(value: float, unit: str) -> str:
    """A figure of a metric in its unit."""
    shows: dict[str, Callable[[float], str]] = {
        "seconds": units.seconds,
        "bytes": units.byte_count,
        "flops": units.flops,
        "share": units.percent,
    }
    return shows.get(unit, whole)(value)


def whole(value: float) -> str:
    """A count."""
    return f"{value:,.0f}"
