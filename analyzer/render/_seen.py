"""Findings for machines and reviewers: each once, however many GPUs show it, with what it saves in one phrase."""

from dataclasses import dataclass, replace

from ..analysis import PhaseAnalysis
from ..finding import Finding, Severity
from ..fingerprint import fingerprints
from ..memory import Memory
from ..report import Report, Run
from ..review import RuleFailure
from . import _units as units
from ._layout import clean
from ._savings import FOR_AS_MANY, reasons, saving

SEVERITIES = tuple(Severity)
"""The most severe first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A finding and the runs that show it.

    Attributes:
        finding: as the first run has it.
        fingerprint: what it is known by from report to report.
        runs: each with its title and the finding as that run has it: figures differ between GPUs.
        gpus: runs of the report, those included that do not show it.
    """

    finding: Finding
    fingerprint: str
    runs: tuple[tuple[str, Run, Finding], ...]
    gpus: int


def seen(report: Report) -> list[Seen]:
    """Every finding of a report that is not suppressed, the largest saving on any GPU first."""
    found: dict[tuple[str, str, int], list[tuple[str, Run, Finding]]] = {}
    for run in report.runs:
        for finding, name in zip(run.findings, names(run), strict=True):
            if not finding.suppressed:
                found.setdefault((name, finding.file, finding.line), []).append((report.title(run), run, finding))
    folded = [
        Seen(finding=runs[0][2], fingerprint=name, runs=tuple(runs), gpus=len(report.runs))
        for (name, _, _), runs in found.items()
    ]
    return sorted(folded, key=_rank)


def names(run: Run) -> tuple[str, ...]:
    """The fingerprint of each finding of a run."""
    # a lone surrogate, as of a file name that is no UTF-8, has no octets to take a hash of
    return fingerprints(replace(f, module=_encodable(f.module), op=_encodable(f.op)) for f in run.findings)


def saves(finding: Finding, run: Run) -> str:
    """What a remedy saves in each phase: `decode 1.20 ms, 12.0%; prefill ...`; empty where it is nothing."""
    parts = list(filter(None, (_saved(phase, finding) for phase in run.phases)))
    if parts and finding.saving_per == "token":
        parts[-1] += f" {FOR_AS_MANY}"
    return "; ".join(parts)


def saves_everywhere(found: Seen) -> str:
    """What a remedy saves on each GPU, on a few of them where they are many."""
    if found.gpus == 1:
        _, run, finding = found.runs[0]
        return saves(finding, run)
    parts = [f"on {clean(title)} {text}" for title, run, finding in found.runs if (text := saves(finding, run))]
    left_out = len(parts) - _MOST_GPUS
    return "; ".join([*parts[:_MOST_GPUS], *([f"more on {_counted(left_out, 'other')}"] if left_out > 0 else [])])


_MOST_GPUS = 3


def in_brackets(saving: str) -> str:
    """What is saved, to stand behind a message."""
    return f" (saves {saving})" if saving else ""


def evidence(finding: Finding) -> str:
    """The numbers that made a rule fire, in words."""
    return ", ".join(reasons(finding))


def counts(found: list[Seen]) -> str:
    """How many findings of each severity: `3 findings: 1 error, 2 warnings`."""
    by_severity = [(s.value, sum(f.finding.severity is s for f in found)) for s in SEVERITIES]
    parts = [_counted(n, name) if name != "info" else f"{n} {name}" for name, n in by_severity if n]
    return f"{_counted(len(found), 'finding')}: {', '.join(parts)}" if found else "no findings"


def suppressed(report: Report) -> int:
    """Places whose findings do not count, on whatever GPU."""
    return len({(f.code, f.file, f.line) for run in report.runs for f in run.findings if f.suppressed})


def unused_suppressions(report: Report) -> list[str]:
    """Comments in the user's code that suppress nothing on any of the GPUs, as `file:line`."""
    everywhere = [set(run.unused_suppressions) for run in report.runs]
    return sorted(set.intersection(*everywhere)) if everywhere else []


def rule_failures(report: Report) -> list[RuleFailure]:
    """Rules that could not be run, each once."""
    return list(dict.fromkeys(failure for run in report.runs for failure in run.rule_failures))


def failed(failure: RuleFailure) -> str:
    """What became of a rule, as a sentence."""
    where = f" in {clean(failure.phase)}" if failure.phase else ""
    return f"{clean(failure.code)} could not be run{where}: {clean(failure.message)}"


def fits(memory: Memory | None) -> str:
    """Whether a run fits into the GPU's memory: `yes`, `no`, `unknown`, with the share that it takes."""
    if memory is None or memory.fits is None or not memory.usable_bytes:
        return "unknown"
    return f"{'yes' if memory.fits else 'no'}, {units.percent(memory.total_bytes / memory.usable_bytes)}"


def _rank(found: Seen) -> tuple[bool, float, float, str, str, int]:
    """As the findings of a run are ranked: changes of the program before other ways of running it."""
    return (
        found.finding.saving_per == "token",
        -max(sum(finding.saving_seconds.values()) for *_, finding in found.runs),
        -max(sum(finding.saving_bound_seconds.values()) for *_, finding in found.runs),
        found.finding.code,
        found.finding.file,
        found.finding.line,
    )


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _saved(phase: PhaseAnalysis, finding: Finding) -> str:
    saved = saving(phase, finding.saving_seconds, finding.saving_bound_seconds)
    part = saved.estimate or saved.bound
    if part is None:
        return ""
    return f"{clean(phase.name)} {part.seconds}, {part.share}{' of its bound alone' if saved.estimate is None else ''}"


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' if n != 1 else ''}"
