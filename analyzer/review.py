"""Runs rules over the phases of a run: folds what they find by source line, prices each remedy and all in turn.

A remedy changes the graph; the changed graph goes through the same formulas, kernels and roofline, and the difference
is the saving. Nothing is clamped: a negative saving is a defect to see.
"""

import difflib
import fnmatch
import functools
import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from math import isfinite
from pathlib import Path

from .. import rules as own_rules
from .cost import operator_name
from .errors import FxroofError
from .finding import Alternative, Confidence, Finding, Match, Remedy, Rule, Situation, Step, registered
from .floor import floor
from .pricing import price
from .savings import Change, Repricer, Seconds
from .suppressions import Suppressions

LEAST_SAVING = 0.01
"""Share of a phase's estimate below which a finding is not worth its line, and a loss is not noticed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleFailure:
    """A rule that could not be run, and why: the others still report."""

    code: str
    phase: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What the rules found in a run.

    Attributes:
        findings: the largest saving first.
        waterfall: by phase, from the program as written through each remedy to the floor.
        failures: rules that could not be run.
        unused_suppressions: comments that suppress nothing, as `file:line`.
    """

    findings: tuple[Finding, ...]
    waterfall: dict[str, tuple[Step, ...]]
    failures: tuple[RuleFailure, ...]
    unused_suppressions: tuple[str, ...]


@dataclass(slots=True)
class _Group:
    """All that one rule found at one source line, by phase."""

    rule: Rule
    suppressed: str = ""
    matches: dict[str, list[Match]] = field(default_factory=dict)
    savings: dict[str, Seconds] = field(default_factory=dict)
    alternatives: dict[str, dict[str, Seconds]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rules run: each item is a code, the beginning of one, or a name.

    Attributes:
        select: those alone; empty for all.
        extend: besides those that `select` names.
        ignore: not these, whatever selects them.
        files: Python files with rules of the user's own.
        modules: pairs of a pattern of module paths, such as `blocks.*.attn`, and a rule that is not to look there.
    """

    select: tuple[str, ...] = ()
    extend: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()


@functools.cache
def load_rules(files: tuple[str, ...] = ()) -> tuple[tuple[Rule, ...], tuple[RuleFailure, ...]]:
    """All rules: fxroof's own, those of installed packages (entry point `fxroof.rules`), and those of files.

    What does not import among the last two is named, and the others are there.
    """
    for module in pkgutil.iter_modules(own_rules.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{own_rules.__name__}.{module.name}")
    failures: list[RuleFailure] = []
    for plugin in sorted(entry_points(group=PLUGINS), key=lambda entry: (entry.name, entry.value)):
        _attempt(plugin.load, f"{plugin.name} = {plugin.value}", failures)
    for file in files:
        _attempt(functools.partial(_load_file, file), file, failures)
    return registered(), tuple(failures)


PLUGINS = "fxroof.rules"
"""Entry point group of packages that bring rules: each names a module that registers them when imported."""


def _attempt(load: Callable[[], object], name: str, failures: list[RuleFailure]) -> None:
    try:
        load()
    except Exception as error:  # the code of others may raise anything
        failures.append(RuleFailure(code=name, phase="", message=f"{type(error).__name__}: {error}"))


def _load_file(file: str) -> None:
    name = f"fxroof_rules_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def selected(rules: Sequence[Rule], selection: Selection) -> tuple[Rule, ...]:
    """The rules that a selection names.

    Raises:
        RuleSelectionError: an item names no rule.
    """
    for item in (*selection.select, *selection.extend, *selection.ignore, *(item for _, item in selection.modules)):
        if not any(_named(rule, item) for rule in rules):
            known = sorted({rule.code for rule in rules})
            near = difflib.get_close_matches(item, [*known, *(rule.name for rule in rules)], n=2)
            raise RuleSelectionError(
                f"{item} names no rule.",
                f"Did you mean {' or '.join(near)}?" if near else f"Rules: {', '.join(known)}.",
            )
    return tuple(
        rule
        for rule in rules
        if (not selection.select or any(_named(rule, item) for item in (*selection.select, *selection.extend)))
        and not any(_named(rule, item) for item in selection.ignore)
    )


class RuleSelectionError(FxroofError):
    """An option names a rule that does not exist."""


def _named(rule: Rule, item: str) -> bool:
    return rule.name == item or (item != "" and rule.code.startswith(item.upper()))


def review(
    situations: Mapping[str, Situation],
    rules: Iterable[Rule],
    *,
    least_saving: float = LEAST_SAVING,
    suppressions: Suppressions | None = None,
    modules: Sequence[tuple[str, str]] = (),
) -> Review:
    """Run rules over every phase of a run.

    Args:
        situations: by phase.
        rules: those that were selected.
        least_saving: share of a phase's estimate, or of its bound, that a finding has to save in one phase at least.
        suppressions: comments in the user's code; what they name is listed and not counted.
        modules: as in `Selection`.
    """
    failures: list[RuleFailure] = []
    comments = suppressions or {}
    used: set[tuple[str, int]] = set()
    rules = tuple(rules)
    groups = _grouped(situations, rules, failures, comments, used, modules)
    repricers = {name: Repricer(situation) for name, situation in situations.items()}
    for group in groups:
        _price(group, repricers)
    kept = sorted((group for group in groups if _is_worth_its_line(group, situations, least_saving)), key=_rank)
    for group in kept:
        _price_alternatives(group, repricers)
    return Review(
        findings=tuple(_finding(group, situations) for group in kept),
        waterfall={
            name: tuple(_waterfall(name, kept, situation, repricers[name])) for name, situation in situations.items()
        },
        failures=tuple(failures),
        unused_suppressions=tuple(f"{file}:{line}" for file, line in sorted(comments.keys() - used)),
    )


def _rank(group: _Group) -> tuple[bool, float, float, str]:
    """Changes of the program first, then other ways of running it; among each the largest saving first."""
    savings = group.savings.values()
    return (
        _per_token(group),
        -sum(s.estimate for s in savings),
        -sum(s.bound for s in savings),
        group.rule.code,
    )


def _per_token(group: _Group) -> bool:
    return any(match.per_token for matches in group.matches.values() for match in matches)


def _grouped(
    situations: Mapping[str, Situation],
    rules: Iterable[Rule],
    failures: list[RuleFailure],
    comments: Suppressions,
    used: set[tuple[str, int]],
    modules: Sequence[tuple[str, str]],
) -> Sequence[_Group]:
    groups: dict[tuple[str, str, int], _Group] = {}
    for rule in rules:
        elsewhere = [pattern for pattern, item in modules if _named(rule, item)]
        for name, situation in situations.items():
            try:
                matches = [_usable(match, situation) for match in rule.check(situation)]
            except Exception as error:  # a rule of others may raise anything
                where = traceback.extract_tb(error.__traceback__)[-1]
                message = f"{type(error).__name__}: {error} ({rule.origin}, line {where.lineno})"
                failures.append(RuleFailure(code=rule.code, phase=name, message=message))
                continue
            for match in matches:
                if elsewhere and _lies_in(situation, match, elsewhere):
                    continue
                line = _line(situation, match)
                known = comments.get(line)
                reason = ""
                if known is not None and (rule.code in known.codes or rule.name in known.codes):
                    used.add(line)
                    reason = known.reason or f"ignored at {line[0]}:{line[1]}"
                group = groups.setdefault((rule.code, *line), _Group(rule, reason))
                group.matches.setdefault(name, []).append(match)
    return tuple(groups.values())


def _usable(match: Match, situation: Situation) -> Match:
    """A match as reports can hold it: the rules of others may say anything.

    Raises:
        ValueError: it is about no op, or saves no number of seconds.
    """
    if match.op is not None and not 0 <= match.op < len(situation.graph.ops):
        raise ValueError(f"there is no op {match.op}")
    for stated in (match.saving, *match.alternatives.values()):
        if isinstance(stated, tuple) and not all(map(isfinite, stated)):
            raise ValueError(f"a saving of {stated}")
    if all(_is_figure(value) for value in match.evidence.values()):
        return match
    return replace(match, evidence={n: v if _is_figure(v) else f"{v}" for n, v in match.evidence.items()})


def _is_figure(value: object) -> bool:
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max  # JSON has no infinity, and what is no number is not smaller either
    return isinstance(value, str)


def _lies_in(situation: Situation, match: Match, patterns: Iterable[str]) -> bool:
    """Whether a match lies in a module that a pattern names, or in a part of one."""
    path = situation.graph.ops[match.op].module if match.op is not None else ""
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(path, f"{p}.*") for p in patterns)


def _line(situation: Situation, match: Match) -> tuple[str, int]:
    anchor = situation.graph.ops[match.op].anchor if match.op is not None else None
    return (anchor.file, anchor.line) if anchor else ("", 0)


def _price(group: _Group, repricers: Mapping[str, Repricer]) -> None:
    for name, matches in group.matches.items():
        changes = _changes(matches)
        replayed = any(match.replayed for match in matches)
        if changes or replayed:
            saving = repricers[name].saving(changes, replayed=replayed)
            if saving is not None:
                group.savings[name] = saving
        for match in matches:
            if match.saving is not None:
                group.savings[name] = group.savings.get(name, Seconds(0.0, 0.0)) + Seconds(*match.saving)


def _price_alternatives(group: _Group, repricers: Mapping[str, Repricer]) -> None:
    for name, matches in group.matches.items():
        for other in dict.fromkeys(key for match in matches for key in match.alternatives):
            offered = [(m.op, m.alternatives[other]) for m in matches if other in m.alternatives]
            changes = [Change(op, offer) for op, offer in offered if not isinstance(offer, tuple)]
            saving = repricers[name].saving(changes) if changes else Seconds(0.0, 0.0)
            if saving is not None:
                stated = [Seconds(*offer) for _, offer in offered if isinstance(offer, tuple)]
                group.alternatives.setdefault(other, {})[name] = sum(stated, saving)


def _changes(matches: Iterable[Match]) -> list[Change]:
    return [Change(match.op, match.rewrite) for match in matches if match.rewrite is not None]


def _is_worth_its_line(group: _Group, situations: Mapping[str, Situation], least: float) -> bool:
    if any(match.always for matches in group.matches.values() for match in matches):
        return True
    return any(_is_enough(saving, situations[name], least) for name, saving in group.savings.items())


def _is_enough(saving: Seconds, situation: Situation, least: float) -> bool:
    """Whether the estimate says so, or the bound does and the estimate gets no noticeably longer."""
    times = situation.analysis.seconds
    if saving.estimate >= least * times.estimate:
        return True
    return saving.bound >= least * times.bound and saving.estimate > -LEAST_SAVING * times.estimate


def _finding(group: _Group, situations: Mapping[str, Situation]) -> Finding:
    phase, matches = next(iter(group.matches.items()))
    graph = situations[phase].graph
    first = matches[0]
    op = graph.ops[first.op] if first.op is not None else None
    anchor, inner = (op.anchor, op.span) if op else (None, None)
    outside = inner is not None and inner != anchor
    modules = [graph.ops[match.op].module for match in matches if match.op is not None]
    return Finding(
        code=group.rule.code,
        name=group.rule.name,
        severity=group.rule.severity,
        confidence=max((m.confidence for m in matches), key=list(Confidence).index),
        phases=tuple(group.matches),
        module=folded(modules),
        op=operator_name(op.target) if op else "",
        count=max(len(found) for found in group.matches.values()),
        file=anchor.file if anchor else "",
        line=anchor.line if anchor else 0,
        library_file=inner.file if outside and inner else "",
        library_line=inner.line if outside and inner else 0,
        message=first.message,
        evidence=_evidence(matches),
        remedy=Remedy(text=first.remedy.text, code=first.remedy.code),
        saving_seconds={name: saving.estimate for name, saving in group.savings.items()},
        saving_bound_seconds={name: saving.bound for name, saving in group.savings.items()},
        alternatives=tuple(
            Alternative(
                name=name,
                saving_seconds={phase: saving.estimate for phase, saving in savings.items()},
                saving_bound_seconds={phase: saving.bound for phase, saving in savings.items()},
            )
            for name, savings in group.alternatives.items()
        ),
        saving_per="token" if _per_token(group) else "step",
        suppressed=group.suppressed,
    )


def _evidence(matches: Sequence[Match]) -> dict[str, str | int | float]:
    """Numbers of all places added up; words of the first."""
    total: dict[str, str | int | float] = dict(matches[0].evidence)
    for match in matches[1:]:
        for name, value in match.evidence.items():
            known = total.get(name)
            if isinstance(value, int | float) and isinstance(known, int | float):
                total[name] = known + value
    return total


_NUMBER = re.compile(r"\d+")


def folded(modules: Sequence[str]) -> str:
    """One path for paths of modules: numbers that differ become `*`; of paths that differ in words, all."""
    by_words: dict[str, list[str]] = {}
    for module in modules:
        by_words.setdefault(_NUMBER.sub("0", module), []).append(module)
    return ", ".join(map(_one_path, by_words.values()))


def _one_path(modules: Sequence[str]) -> str:
    numbers = zip(*(_NUMBER.findall(module) for module in modules), strict=True)
    shown = iter([found[0] if len(set(found)) == 1 else "*" for found in numbers])
    return _NUMBER.sub(lambda _: next(shown), modules[0])


def _waterfall(name: str, groups: Sequence[_Group], situation: Situation, repricer: Repricer) -> Iterator[Step]:
    """The phase as written, with each remedy on top of those before it, and the floor of what is left.

    Where two remedies change the same op, the one that saves more takes it: nothing is counted twice.
    """
    start = repricer.as_written
    yield Step(code="as-written", finding=None, bound=start.bound, estimate=start.estimate)
    applied: list[Change] = []
    replayed = False
    for index, group in enumerate(groups):
        matches = group.matches.get(name, ())
        changes = _changes(matches)
        launched = any(match.replayed for match in matches)
        if group.suppressed or name not in group.savings or not (changes or launched):
            continue
        saving = repricer.saving((*applied, *changes), replayed=replayed or launched)
        if saving is not None:
            applied += changes
            replayed = replayed or launched
            after = start - saving
            yield Step(code=group.rule.code, finding=index, bound=after.bound, estimate=after.estimate)
    # remedies may lower the floor too: narrower weights are fewer bytes that must be read
    last = repricer.graph(applied) if applied else None
    least = floor(last, price(last, situation.gpu), situation.gpu).seconds if last else situation.analysis.seconds.floor
    yield Step(code="floor", finding=None, bound=least, estimate=None)
