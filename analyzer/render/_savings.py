"""What a remedy saves, and what made a rule fire, in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from ..analysis import PhaseAnalysis
from ..finding import Finding
from . import _units as units
from ._layout import clean

FOR_AS_MANY = "on as many tokens"
"""What is said of savings of another way of running the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A saving that is worth showing.

    Attributes:
        seconds: `1.20 ms`.
        share: of what the phase takes: `12.0%`.
    """

    seconds: str
    share: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What a remedy saves of a phase's estimate and of its bound; None where it is nothing."""

    estimate: Part | None
    bound: Part | None


def saving(phase: PhaseAnalysis, estimates: Mapping[str, float], bounds: Mapping[str, float]) -> Saving:
    """What a remedy saves of one phase, given what it saves of each."""
    estimate, bound = estimates.get(phase.name, 0.0), bounds.get(phase.name, 0.0)
    hidden = abs(estimate) < _HIDDEN * bound
    return Saving(
        estimate=None if hidden else _part(estimate, phase.seconds.estimate),
        bound=_part(bound, phase.seconds.bound),
    )


_HIDDEN = 0.01
"""Share of what the bound saves below which the estimate saves nothing: something else is waited for."""


def _part(saved: float, whole: float) -> Part | None:
    share = abs(saved) / whole if whole > 0 else 0.0
    if share < _NOTHING:
        return None
    sign = "-" if saved < 0 else ""
    return Part(seconds=sign + units.seconds(abs(saved)), share=sign + units.percent(share))


_NOTHING = 1e-4
"""Share of a phase below which a saving is nothing: two decimals of a percentage would not show it."""


def reasons(finding: Finding) -> list[str]:
    """The numbers that made a rule fire, each with its name."""
    return [f"{clean(name).replace('_', ' ')} {_value(name, value)}" for name, value in finding.evidence.items()]


def _value(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return clean(value)
    if not isfinite(value):
        return str(value)
    if "bytes" in name:
        return units.byte_count(value)
    if "seconds" in name:
        return units.seconds(value)
    return f"{value:,}" if isinstance(value, int) else units.digits(value, trim=True)
