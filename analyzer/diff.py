"""Two reports of the same model, before a change and after it: what moved, where and why. No torch.

A comparison is of runs on the same GPU in the same scenario. What one side alone has is named, never guessed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .analysis import PhaseAnalysis, Times
from .budgets import judge
from .finding import Finding, Severity
from .fingerprint import Identity, identity
from .limits import Budget, Verdict
from .report import GpuInfo, Report, Run, merged
from .scenario import Scenario

DEFAULT_THRESHOLDS = ("encoder.time", "prefill.time", "decode.time", "forward.time")
"""Figures that may not grow by more than `DEFAULT_GROWTH` where a project sets no budgets."""

DEFAULT_GROWTH = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a phase or a module does, and what it takes.

    Attributes:
        flops: executed.
        bytes: read and written by its ops.
        kernels: launches, in the execution asked for.
        bound: seconds, of the kernels that it leads.
        estimate: seconds, of the same.
    """

    flops: float = 0.0
    bytes: int = 0
    kernels: int = 0
    bound: float = 0.0
    estimate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChange:
    """A module whose work differs; layers are folded. An empty side is a module that is not there."""

    module: str
    base: Work
    head: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChange:
    """A phase of a run, on both sides.

    Attributes:
        run: its title.
        phase: its name.
        base: times; None where the base has no such phase.
        head: the same.
        base_work: all of it.
        head_work: all of it.
        modules: those that differ, the largest change of the estimate first.
    """

    run: str
    phase: str
    base: Times | None
    head: Times | None
    base_work: Work
    head_work: Work
    modules: tuple[ModuleChange, ...]

    @property
    def change(self) -> float | None:
        """Growth of the estimate as a share of the base; None where a side is missing."""
        if self.base is None or self.head is None or not self.base.estimate:
            return None
        return self.head.estimate / self.base.estimate - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingChange:
    """A finding that one side alone has, with the title of its run."""

    run: str
    finding: Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """A comparison.

    Attributes:
        model: name of the head's.
        phases: every phase of every run that either side has.
        new: findings that only the head has, suppressed and known ones left out.
        gone: findings that only the base has.
        verdicts: of the budgets, on the head's runs.
        failing: why it should not be let through, a sentence each; empty for what may.
        warnings: what makes the comparison doubtful.
    """

    model: str
    phases: tuple[PhaseChange, ...]
    new: tuple[FindingChange, ...]
    gone: tuple[FindingChange, ...]
    verdicts: tuple[Verdict, ...]
    failing: tuple[str, ...]
    warnings: tuple[str, ...] = field(default=())


def diff(
    base: Report | None,
    head: Report,
    *,
    budgets: Sequence[Budget] = (),
    fail_on: str = "error",
    doubts: Sequence[str] = (),
) -> Diff:
    """Compare two reports.

    Args:
        base: before the change; None where there is none, which makes all findings new and relative budgets unknown.
        head: after it.
        budgets: limits for the head; without any, no phase may take more than 2 % longer.
        fail_on: severity from which a new finding fails: `error`, `warning`, `info` or `never`.
        doubts: what makes the comparison doubtful besides what the reports show.
    """
    before, after = ({}, _alone(head)) if base is None else _titled(base, head)
    at = {id(run): title for title, run in after.items()}
    bases = {index: before[at[id(run)]] for index, run in enumerate(head.runs) if at.get(id(run)) in before}
    verdicts = judge(head, tuple(budgets) or _default_budgets(), bases)
    new = tuple(_only(after, before if base is not None else _bare(after)))
    return Diff(
        model=head.model.name,
        phases=tuple(_phases(before, after)),
        new=new,
        gone=tuple(_only(before, after)),
        verdicts=verdicts,
        failing=(*_broken(verdicts), *_severe(new, fail_on), *_lost(base, head)),
        warnings=(*doubts, *(_warnings(base, head, before, after) if base is not None else ())),
    )


def only_new(found: Diff, head: Report) -> Report:
    """The head's report with what a reviewer has to look at alone: new findings, and the comparison's verdicts."""
    new = {id(change.finding) for change in found.new}
    runs = (replace(run, findings=tuple(f for f in run.findings if id(f) in new), waterfall={}) for run in head.runs)
    return replace(head, runs=tuple(runs), verdicts=found.verdicts)


def _alone(report: Report) -> dict[str, Run]:
    return {report.title(run): run for run in report.runs}


def _bare(runs: dict[str, Run]) -> dict[str, Run]:
    """The same runs as if nothing had been found."""
    return {title: replace(run, findings=()) for title, run in runs.items()}


def _titled(base: Report, head: Report) -> tuple[dict[str, Run], dict[str, Run]]:
    """The runs of both by what they are called where both are seen together."""
    if all(len({traced.model.source for traced in report.traces}) == 1 for report in (base, head)):
        # the same model, wherever its file lay
        base = replace(base, traces=tuple(replace(traced, model=head.model) for traced in base.traces))
    both = merged((head, base))
    titles = [both.title(run) for run in both.runs]
    split = len(head.runs)
    return dict(zip(titles[split:], base.runs, strict=True)), dict(zip(titles[:split], head.runs, strict=True))


def _default_budgets() -> tuple[Budget, ...]:
    return tuple(
        Budget(metric=name, limit=DEFAULT_GROWTH, kind="share", text=f"+{DEFAULT_GROWTH:.0%}")
        for name in DEFAULT_THRESHOLDS
    )


def _phases(before: dict[str, Run], after: dict[str, Run]) -> Iterator[PhaseChange]:
    for run in dict.fromkeys((*after, *before)):
        sides = [{p.name: p for p in runs[run].phases} if run in runs else {} for runs in (before, after)]
        for name in dict.fromkeys((*sides[1], *sides[0])):
            yield _phase(run, name, sides[0].get(name), sides[1].get(name))


def _phase(run: str, name: str, base: PhaseAnalysis | None, head: PhaseAnalysis | None) -> PhaseChange:
    one, other = (_by_module(phase) if phase else {} for phase in (base, head))
    changes = [
        ModuleChange(module=module, base=one.get(module, Work()), head=other.get(module, Work()))
        for module in dict.fromkeys((*other, *one))
        if _differs(one.get(module, Work()), other.get(module, Work()))
    ]
    changes.sort(key=lambda c: (-abs(c.head.estimate - c.base.estimate), -abs(c.head.bound - c.base.bound), c.module))
    return PhaseChange(
        run=run,
        phase=name,
        base=base.seconds if base else None,
        head=head.seconds if head else None,
        base_work=_whole(one.values()),
        head_work=_whole(other.values()),
        modules=tuple(changes),
    )


def _by_module(phase: PhaseAnalysis) -> dict[str, Work]:
    """The work of each module, numbers in their paths folded; a kernel belongs to its first op's."""
    modules = {op.name: _NUMBER.sub("*", op.module) for op in phase.ops}
    flops: defaultdict[str, float] = defaultdict(float)
    moved: Counter[str] = Counter()
    for op in phase.ops:
        flops[modules[op.name]] += op.flops_executed
        moved[modules[op.name]] += op.bytes_read + op.bytes_written
    launches: Counter[str] = Counter()
    bound: defaultdict[str, float] = defaultdict(float)
    estimate: defaultdict[str, float] = defaultdict(float)
    for kernel in phase.executions.of(phase.execution).kernels:
        module = modules.get(kernel.ops[0], "") if kernel.ops else ""
        launches[module] += 1
        bound[module] += kernel.seconds.bound
        estimate[module] += kernel.seconds.estimate
    return {
        module: Work(
            flops=flops[module],
            bytes=moved[module],
            kernels=launches[module],
            bound=bound[module],
            estimate=estimate[module],
        )
        for module in dict.fromkeys((*modules.values(), *launches))
    }


_NUMBER = re.compile(r"\d+")
_SAME = 1e-6


def _differs(one: Work, other: Work) -> bool:
    """Whether more than rounding differs."""
    if (one.bytes, one.kernels) != (other.bytes, other.kernels):
        return True
    pairs = ((one.flops, other.flops), (one.bound, other.bound), (one.estimate, other.estimate))
    return any(abs(a - b) > _SAME * max(abs(a), abs(b)) for a, b in pairs)


def _whole(parts: Iterable[Work]) -> Work:
    parts = tuple(parts)
    return Work(
        flops=sum(part.flops for part in parts),
        bytes=sum(part.bytes for part in parts),
        kernels=sum(part.kernels for part in parts),
        bound=sum(part.bound for part in parts),
        estimate=sum(part.estimate for part in parts),
    )


def _only(here: dict[str, Run], there: dict[str, Run]) -> Iterator[FindingChange]:
    """Findings of runs that both sides have, which one side alone has: as many as it has more of their like."""
    for title, run in here.items():
        if title not in there:
            continue
        known: Counter[Identity] = Counter(identity(f) for f in there[title].findings)
        for finding in run.findings:
            if known[identity(finding)]:
                known[identity(finding)] -= 1
            elif not finding.suppressed:
                yield FindingChange(run=title, finding=finding)


def _broken(verdicts: Iterable[Verdict]) -> Iterator[str]:
    for verdict in verdicts:
        if verdict.kept is False:
            yield f"{verdict.budget.metric} breaks {verdict.budget.text} on {verdict.run}"


def _severe(new: Iterable[FindingChange], fail_on: str) -> Iterator[str]:
    order = [severity.value for severity in Severity]
    failing = order[: order.index(fail_on) + 1] if fail_on in order else []
    for change in new:
        found = change.finding
        if found.severity.value in failing:
            place = f"{found.file}:{found.line}" if found.file else "the whole phase"
            yield f"new {found.severity.value} {found.code} at {place} on {change.run}"


def _lost(base: Report | None, head: Report) -> Iterator[str]:
    failed = {failure.phase for failure in base.failures} if base is not None else set()
    for failure in head.failures:
        if failure.phase not in failed:
            yield f"{failure.phase} can no longer be analysed: {failure.message}"


def _warnings(base: Report, head: Report, before: dict[str, Run], after: dict[str, Run]) -> Iterator[str]:
    for what, one, other in (
        ("fxroof", base.fxroof_version, head.fxroof_version),
        ("torch", base.torch_version, head.torch_version),
        ("the GPU catalogue", base.catalog_version, head.catalog_version),
    ):
        if one != other:
            yield f"{what} differs, {one} and {other}: a change may come from there"
    for title in sorted(after.keys() - before.keys()):
        yield f"the base has no run on {title}"
    for title in sorted(before.keys() - after.keys()):
        yield f"the head has no run on {title}"
    for title in sorted(before.keys() & after.keys()):
        was, now = before[title], after[title]
        if _figures(was.gpu) != _figures(now.gpu):
            yield f"the figures of {now.gpu.key} differ between the two"
        if _asked(was.scenario) != _asked(now.scenario):
            yield f"the scenarios of {title} differ: they do not do the same work"
    for failure in base.failures:
        yield f"the base's {failure.phase} was not analysed: {failure.message}"


def _figures(gpu: GpuInfo) -> tuple[float, dict[str, float], int]:
    return gpu.memory_bandwidth, gpu.matmul_peaks, gpu.cache_bytes


def _asked(scenario: Scenario) -> Scenario:
    return replace(scenario, lengths_given=False)
