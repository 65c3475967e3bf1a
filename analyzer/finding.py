"""What rules produce: findings, each with its evidence, its remedy and what that saves; and the registry of rules.

A rule is a function from a `Situation`, one phase on one GPU, to `Match`es. It is pure, prints nothing, imports no
torch and recognises structure, never names. How much a remedy saves is not the rule's business: it says how the graph
changes (`Match.rewrite`), and the changed graph is priced like any other, see `review.py`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar, cast

from ..hardware.gpu import Gpu
from .analysis import PhaseAnalysis
from .cost import Cost
from .graph import Graph
from .memory import Memory
from .rewrite import Draft, Flow
from .scenario import Scenario


class Severity(StrEnum):
    """How bad what a rule finds is, whatever it costs here."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Confidence(StrEnum):
    """How sure it is that the remedy applies to this program."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


Evidence = Mapping[str, str | int | float]
"""The numbers that made a rule fire, by name; units in the names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """What to do: a sentence, and what to write instead."""

    text: str
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One of several remedies that exclude each other, such as int8 or fp8 weights.

    Attributes:
        name: what is done.
        saving_seconds: by phase, of the estimate.
        saving_bound_seconds: by phase, of the bound.
    """

    name: str
    saving_seconds: dict[str, float]
    saving_bound_seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that wastes time or memory at one line of the user's code, however many layers repeat it.

    Attributes:
        code: of the rule, such as `ATT001`.
        name: of the rule.
        severity: error, warning or info.
        confidence: high, medium or low.
        phases: in which it was found.
        module: module path, numbers that differ between layers replaced by `*`.
        op: operator that is shown for it, without overload; empty for what belongs to no op.
        count: places in the program that the line stands for.
        file: the user's file, or the library's; empty for what belongs to no line.
        line: line in `file`; 0 where there is none.
        library_file: innermost library file, where it differs from `file`.
        library_line: line in `library_file`.
        message: what is wrong.
        evidence: the numbers that made the rule fire.
        remedy: what to do.
        saving_seconds: what that saves in each phase, by the estimate of the execution asked for.
        saving_bound_seconds: the same by the bound.
        alternatives: remedies that exclude each other; `saving_seconds` is that of the first.
        saving_per: `step`: a run of the phase takes so much less; `token`: so much less a run's worth of tokens, with
            another batch or several tokens at once.
        suppressed: why it does not count; empty if it does.
    """

    code: str
    name: str
    severity: Severity
    confidence: Confidence
    phases: tuple[str, ...]
    module: str
    op: str
    count: int
    file: str
    line: int
    library_file: str
    library_line: int
    message: str
    evidence: dict[str, str | int | float]
    remedy: Remedy
    saving_seconds: dict[str, float]
    saving_bound_seconds: dict[str, float]
    alternatives: tuple[Alternative, ...] = ()
    saving_per: str = "step"
    suppressed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One bar of a waterfall: a phase after a remedy was applied on top of those before it.

    Attributes:
        code: of the rule; `as-written` for the first bar, `floor` for the last.
        finding: index in the run's findings; None for the first and the last bar.
        bound: seconds.
        estimate: seconds; None for the floor, which is no run.
    """

    code: str
    finding: int | None
    bound: float
    estimate: float | None


_Found = TypeVar("_Found")


def _not_to_be_had(scenario: Scenario, phase: str) -> Graph | None:  # noqa: ARG001  # as all that stand in its place
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """One phase of a model on one GPU: all that a rule may look at.

    Attributes:
        graph: the phase.
        flow: who makes and who uses its tensors.
        costs: of the graph's ops.
        analysis: times and placements.
        others: the analyses of the model's other phases, by name.
        gpu: the part.
        scenario: batch and lengths.
        memory: what must fit; None where that is not known.
        retraced: a phase of the same model in another scenario, by its name; None where it cannot be had. Each is
            traced but once, when it is first asked for.
    """

    graph: Graph
    flow: Flow
    costs: Sequence[Cost]
    analysis: PhaseAnalysis
    others: Mapping[str, PhaseAnalysis]
    gpu: Gpu
    scenario: Scenario
    memory: Memory | None
    retraced: Callable[[Scenario, str], Graph | None] = _not_to_be_had
    _known: dict[object, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, find: Callable[["Situation"], _Found]) -> _Found:
        """What a function finds here, computed once however many rules ask: what one recognises, others leave alone."""
        if find not in self._known:
            self._known[find] = find(self)
        return cast("_Found", self._known[find])


Rewrite = Callable[[Draft], None]

Stated = tuple[float, float]
"""Seconds saved of the bound and of the estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One place where a rule fires.

    Attributes:
        op: the op to show, an index into the graph's ops; None for what belongs to no line.
        message: what is wrong there; the same for all places of a line.
        evidence: the numbers that made the rule fire; those that are numbers add up over the places of a line.
        remedy: what to do.
        confidence: how sure it is that the remedy applies.
        rewrite: how the remedy changes the graph; None where it does not change this graph.
        alternatives: other rewrites by name, or what they save, which exclude the first and each other.
        saving: seconds of (bound, estimate) where no rewrite of this graph says it: arithmetic on the analysis.
        per_token: true where `saving` and stated alternatives are for the tokens that a step of the phase makes as
            it is, which another batch or several tokens at once make in less than a step.
        replayed: true where the remedy launches the very same kernels by a CUDA graph.
        always: true where the finding is reported whatever it saves.
    """

    op: int | None
    message: str
    remedy: Remedy
    evidence: Evidence = field(default_factory=dict)
    confidence: Confidence = Confidence.HIGH
    rewrite: Rewrite | None = None
    alternatives: Mapping[str, "Rewrite | Stated"] = field(default_factory=dict)
    saving: "Stated | None" = None
    per_token: bool = False
    replayed: bool = False
    always: bool = False


class Check(Protocol):
    """The function of a rule."""

    def __call__(self, situation: Situation, /) -> Iterable[Match]:
        """The places in a phase where the rule fires."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A registered rule; `doc` is its page: the docstring of its module."""

    code: str
    name: str
    severity: Severity
    check: Check
    doc: str
    origin: str


_rules: dict[str, Rule] = {}


def rule(code: str, name: str, *, severity: Severity) -> Callable[[Check], Check]:
    """Register a function as a rule.

    Args:
        code: three letters and three digits.
        name: the bad pattern in kebab-case.
        severity: how bad it is.

    Raises:
        ValueError: a code or a name is registered twice, or the module says nothing about the rule.
    """

    def register(check: Check) -> Check:
        module = inspect.getmodule(check)
        doc = inspect.cleandoc(module.__doc__ or "") if module else ""
        origin = module.__name__ if module else ""
        known = next((r for r in _rules.values() if code == r.code or name == r.name), None)
        if known is not None:
            raise ValueError(f"two rules are called {code} or {name}: {known.origin} and {origin}")
        if not doc:
            raise ValueError(f"{origin} has no docstring: a rule's page")
        _rules[code] = Rule(code=code, name=name, severity=severity, check=check, doc=doc, origin=origin)
        return check

    return register


def registered() -> tuple[Rule, ...]:
    """All rules that are registered, by code."""
    return tuple(_rules[code] for code in sorted(_rules))
