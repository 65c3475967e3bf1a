"""A comparison of two reports: for a terminal, for a pull request, and as JSON."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from rich.text import Text

from ..diff import Diff, FindingChange, ModuleChange, PhaseChange, Work, only_new
from ..jsonfile import encoded
from ..report import Report
from . import _units as units
from ._budgets import sentence, told, whole
from ._layout import Column, bullets, clean, fact, printed, table, title
from ._markdown import code, shortened, text
from .registry import Options, render

TAG = "<!-- fxroof -->"
_NAME = 120


def terminal(diff: Diff, options: Options) -> str:
    """The verdict, each phase with what moved, findings that came and went, budgets and doubts."""
    return printed(list(_lines(diff, options)), options)


def as_json(diff: Diff) -> str:
    """All of it, in base units."""
    return encoded(diff)


def markdown(diff: Diff) -> str:
    """The same for a pull request: the verdict and the phases at once, what moved folded."""
    lines = [TAG, f"### fxroof: {code(shortened(diff.model, _NAME))}", "", f"**{text(verdict(diff))}**", ""]
    lines += [f"- {text(reason)}" for reason in diff.failing]
    lines += ["", "| run | phase | bound | estimate | change |", "|---|---|---:|---:|---:|"]
    for phase in diff.phases:
        lines.append(f"| {' | '.join((code(shortened(phase.run, _NAME)), *map(text, _times(phase))))} |")
    for phase in diff.phases:
        if phase.modules:
            name = text(f"{phase.run} {phase.phase}: what moved")
            lines += ["", f"<details><summary>{name}</summary>", "", "| module | estimate | why |", "|---|---:|---|"]
            for module in phase.modules[:_MOST]:
                cells = (code(shortened(_module(module), _NAME)), text(_moved(module)), text(_why(module)))
                lines.append(f"| {' | '.join(cells)} |")
            lines += _left_out(phase.modules, text)
            lines += ["", "</details>"]
    verdicts = [known for known in told(diff.verdicts) if known.value is not None]
    if verdicts:
        kept = sum(known.kept is True for known in verdicts)
        lines += ["", f"<details><summary>{kept:,} of {len(verdicts):,} budgets kept</summary>", ""]
        lines += [f"- {text(sentence(known))}" for known in verdicts[:_MOST]]
        lines += [*_left_out(verdicts, text), "", "</details>"]
    for heading, changes in (("New findings", diff.new), ("Findings gone", diff.gone)):
        if changes:
            lines += ["", f"**{heading}**", "", *(f"- {text(_finding(change))}" for change in changes[:_MOST])]
            lines += _left_out(changes, text)
    if diff.warnings:
        lines += ["", *(f"> {text(warning)}" for warning in diff.warnings)]
    return "\n".join(lines) + "\n"


_MOST = 20


def github(diff: Diff, head: Report) -> str:
    """Annotations of what is new: findings and broken budgets."""
    return render(only_new(diff, head), "github", Options())


def sarif(diff: Diff, head: Report) -> str:
    """All of the head, which code scanning compares with what it knows, and the verdicts of the comparison."""
    return render(replace(head, verdicts=diff.verdicts), "sarif", Options())


FORMATS: dict[str, Callable[[Diff, Report, Options], str]] = {
    "terminal": lambda diff, _, options: terminal(diff, options),
    "markdown": lambda diff, *_: markdown(diff),
    "json": lambda diff, *_: as_json(diff),
    "github": lambda diff, head, _: github(diff, head),
    "sarif": lambda diff, head, _: sarif(diff, head),
}
"""How a comparison can be written, by name."""


def verdict(diff: Diff) -> str:
    """One line: whether it may be let through, and what the largest change is."""
    changes = [(abs(phase.change), phase) for phase in diff.phases if phase.change is not None]
    largest = max(changes, key=lambda found: found[0], default=None)
    said = "no phase takes longer or shorter" if changes else "there is no base to compare with"
    if largest is not None and largest[0] > _SAME:
        phase = largest[1]
        said = f"{phase.phase} {_signed_percent(phase.change or 0.0)} on {phase.run}"
    count = len(diff.failing)
    return f"{'fails' if count else 'passes'}: {said}" + (f"; {count} reason{'s' * (count > 1)} to fail" * bool(count))


_SAME = 1e-6


def _lines(diff: Diff, options: Options) -> Iterator[Text]:
    width = options.width
    yield Text(clean(verdict(diff)), style="bold red" if diff.failing else "bold green")
    yield from bullets(map(clean, diff.failing), width)
    yield Text()
    cells = [(phase.run, *_times(phase)) for phase in diff.phases]
    headers = ("run", "phase", "bound", "estimate", "change")
    columns = [
        Column(header=name, cells=[clean(row[i]) for row in cells], right=i > 1) for i, name in enumerate(headers)
    ]
    yield from table(columns, width)
    for phase in diff.phases:
        if phase.modules:
            yield Text()
            yield from _what_moved(phase, options)
    for heading, changes in (("new findings", diff.new), ("findings gone", diff.gone)):
        if changes:
            yield Text()
            yield title(heading, width)
            yield from bullets((clean(_finding(change)) for change in changes), width)
    if verdicts := [verdict for verdict in told(diff.verdicts) if verdict.value is not None]:
        yield Text()
        yield title("budgets", width)
        yield from bullets(map(sentence, verdicts), width)
    for warning in diff.warnings:
        yield from fact("doubt", [Text(clean(warning), style="yellow")], width)


def _what_moved(phase: PhaseChange, options: Options) -> Iterator[Text]:
    yield title(f"{clean(phase.run)} {clean(phase.phase)}: what moved", options.width)
    shown = phase.modules[: options.top]
    columns = [
        Column(header="module", cells=[clean(_module(m)) for m in shown], least=12, keep="end"),
        Column(header="estimate", cells=[clean(_moved(m)) for m in shown], right=True),
        Column(header="why", cells=[clean(_why(m)) for m in shown], least=20, keep="start"),
    ]
    yield from table(columns, options.width)
    if len(phase.modules) > len(shown):
        yield Text(f"  and {len(phase.modules) - len(shown):,} more modules", style="dim")


def _times(phase: PhaseChange) -> Sequence[str]:
    change = phase.change
    missing = "only before" if phase.head is None else "only now"
    return (
        phase.phase,
        _both([side.bound if side else None for side in (phase.base, phase.head)]),
        _both([side.estimate if side else None for side in (phase.base, phase.head)]),
        missing if change is None else _signed_percent(change),
    )


def _both(sides: Sequence[float | None]) -> str:
    known = [side for side in sides if side is not None]
    if len(known) == len(sides) and abs(known[1] - known[0]) > _SAME * max(known):
        return f"{units.seconds(known[0])} -> {units.seconds(known[1])}"
    return units.seconds(known[-1]) if known else ""


def _module(change: ModuleChange) -> str:
    return change.module or "(root)"


def _moved(change: ModuleChange) -> str:
    return _signed(change.head.estimate - change.base.estimate, units.seconds)


def _why(change: ModuleChange) -> str:
    """What differs of a module's work, each as its change."""
    if change.base == Work():
        return "new"
    if change.head == Work():
        return "gone"
    parts: list[tuple[float, Callable[[float], str], str]] = [
        (change.head.bytes - change.base.bytes, units.byte_count, "bytes"),
        (change.head.flops - change.base.flops, units.flops, "FLOPs"),
        (change.head.kernels - change.base.kernels, whole, "kernels"),
    ]
    said = [f"{name} {_signed(value, show)}" for value, show, name in parts if value]
    return ", ".join(said) or "the same work in other surroundings"


def _signed(value: float, show: Callable[[float], str]) -> str:
    return f"{'+' if value >= 0 else '-'}{show(abs(value))}"


def _signed_percent(share: float) -> str:
    return f"{'+' if share >= 0 else '-'}{units.percent(abs(share))}"


def _finding(change: FindingChange) -> str:
    found = change.finding
    place = f"{found.file}:{found.line}" if found.file else "the whole phase"
    return f"{found.severity.value} {found.code} {found.name} at {place} on {change.run}: {found.message}"


def _left_out(found: Sequence[object], show: Callable[[str], str]) -> list[str]:
    return ["", show(f"and {len(found) - _MOST:,} more")] if len(found) > _MOST else []
