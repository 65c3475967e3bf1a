"""Budgets and what became of them, as data: part of the JSON report."""

from dataclasses import dataclass
from typing import Literal

Of = Literal["floor", "bound", "estimate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit that a project sets itself.

    Attributes:
        metric: such as `decode.tpot`.
        limit: in the metric's base unit (seconds, bytes, FLOPs, a share), or for relative ones a share of the base.
        relative: whether the limit is a change against a base.
        text: as the user wrote it.
        of: which time, for metrics that are one.
        gpu: the one that it is for; empty for all.
        scenario: the one that it is for; empty for all.
    """

    metric: str
    limit: float
    relative: bool
    text: str
    of: Of = "estimate"
    gpu: str = ""
    scenario: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a budget in one run.

    Attributes:
        budget: the limit.
        gpu: of the run.
        scenario: of the run.
        unit: of the figures: `seconds`, `bytes`, `flops`, `share`, `per second` or `count`.
        value: what was found; None where the run has no such figure.
        base: the same in the base; None without one.
        limit: what the value is held against; None for a relative budget without a base.
        kept: whether the value keeps to it; None where that cannot be told, and `why` says so.
        why: why it cannot be told.
    """

    budget: Budget
    gpu: str
    scenario: str
    unit: str
    value: float | None
    base: float | None
    limit: float | None
    kept: bool | None
    why: str = ""
