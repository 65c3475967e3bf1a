"""Budgets and what became of them, as data: part of the JSON report."""

from dataclasses import dataclass
from typing import Literal

Of = Literal["floor", "bound", "estimate"]
Kind = Literal["absolute", "share", "change", "crossing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit that a project sets itself.

    Attributes:
        metric: such as `decode.tpot`.
        limit: in the metric's base unit (seconds, bytes, FLOPs, a share); for `share`, a share of the base.
        kind: `absolute`; `share` and `change`, what may be added to a base; `crossing`, absolute, but broken only
            by a run whose base kept to it.
        text: as the user wrote it.
        of: which time, for metrics that are one.
        gpu: the one that it is for; empty for all.
        scenario: the one that it is for; empty for all.
    """

    metric: str
    limit: float
    kind: Kind = "absolute"
    text: str
    of: Of = "estimate"
    gpu: str = ""
    scenario: str = ""

    @property
    def needs_base(self) -> bool:
        """Whether it says nothing of a run alone."""
        return self.kind != "absolute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a budget in one run.

    Attributes:
        budget: the limit.
        run: title of the run.
        unit: of the figures: `seconds`, `bytes`, `flops`, `share`, `per second` or `count`.
        value: what was found; None where the run has no such figure.
        base: the same in the base; None without one.
        limit: what the value is held against; None for a budget that needs a base without one.
        kept: whether the value keeps to it; None where that cannot be told.
        why: why it cannot be told, or why it is kept all the same.
    """

    budget: Budget
    run: str
    unit: str
    value: float | None
    base: float | None
    limit: float | None
    kept: bool | None
    why: str = ""
