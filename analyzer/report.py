"""The Report: one model, its graphs, and a run for every scenario and GPU. JSON out and in.

`to_json` and `from_json` are exact inverses; docs/json.md describes the fields, units are in field names or in
`docs/json.md`: seconds, bytes, FLOPs.
"""

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import msgspec

from .analysis import Coverage, PhaseAnalysis
from .checked import fault
from .errors import ReportFileError
from .estimate import Derated
from .finding import Finding, Step
from .garbage import without_collection
from .graph import Graph
from .jsonfile import content, decoded, encoded
from .limits import Verdict
from .memory import CacheGrowth, Memory
from .review import RuleFailure
from .scenario import Scenario
from .serving import Serving

SCHEMA_VERSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The model as reports name it; parameters tied to each other count once. `cache` is None where it is not known.

    Parameters are those of the whole model; what one GPU of several holds of them is `parameter_bytes_per_gpu`, None
    where one GPU runs the model. `cache` is one GPU's.
    """

    name: str
    source: str
    parameters: int
    parameter_bytes: int
    dtypes: dict[str, int]
    cache_kind: str
    notes: tuple[str, ...] = ()
    cache: CacheGrowth | None = None
    parameter_bytes_per_gpu: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuInfo:
    """The GPU of a run: what was asked for and the figures that were used.

    Attributes:
        key: catalogue key.
        name: product name.
        note: how the name asked for was understood.
        memory_bandwidth: byte/s.
        memory_bytes: usable device memory; None where the file of a user's own part gives none.
        cache_bytes: on-chip cache that can keep data from step to step.
        matmul_peaks: FLOP/s by dtype, dense, those the part has.
        ridges: FLOP/byte by dtype.
        confidence: of the catalogue's main figures.
    """

    key: str
    name: str
    note: str
    memory_bandwidth: float
    memory_bytes: int | None
    cache_bytes: int
    matmul_peaks: dict[str, float]
    ridges: dict[str, float]
    confidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFailure:
    """A phase that was asked for and could not be analysed, and why: an error's message and hint."""

    phase: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A model in a scenario, as it was traced.

    Attributes:
        model: which, and how it was found.
        scenario: as it was run: lengths may have been shortened to the model's.
        graphs: by phase.
        failures: phases that have none.
    """

    model: ModelInfo
    scenario: Scenario
    graphs: dict[str, Graph]
    failures: tuple[PhaseFailure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One model in one scenario on one GPU.

    Attributes:
        traced: index in the report's `traces`.
        scenario: the situation.
        gpu: the part.
        coverage: how much was understood.
        phases: each phase.
        findings: what the rules found, the largest saving first.
        waterfall: by phase, from the program as written through each remedy to the floor.
        rule_failures: rules that could not be run.
        unused_suppressions: comments in the user's code that suppress nothing, as `file:line`.
        assumptions: what was taken for granted.
        memory: what must fit.
        serving: the phases put together; None for a model that makes no tokens.
        derating: the figures that make estimates of bounds, each with its source.
    """

    traced: int = 0
    scenario: Scenario
    gpu: GpuInfo
    coverage: Coverage
    phases: tuple[PhaseAnalysis, ...]
    findings: tuple[Finding, ...] = ()
    waterfall: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    rule_failures: tuple[RuleFailure, ...] = ()
    unused_suppressions: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    memory: Memory | None = None
    serving: Serving | None = None
    derating: tuple[Derated, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report:
    """What `fxroof analyze` found, and everything needed to price it again for another GPU without torch.

    `print(report)` shows what the terminal shows, and so does a notebook.

    Attributes:
        schema_version: of this shape.
        fxroof_version: that wrote it.
        torch_version: that traced.
        catalog_version: of the GPU figures.
        traces: each model in each scenario that was asked for; one unless a project's settings name several.
        runs: each of those on each GPU.
        verdicts: what became of the project's budgets.
    """

    schema_version: int = SCHEMA_VERSION
    fxroof_version: str
    torch_version: str
    catalog_version: str
    traces: tuple[Traced, ...]
    runs: tuple[Run, ...]
    verdicts: tuple[Verdict, ...] = ()

    @property
    def model(self) -> ModelInfo:
        """The first model."""
        return self.traces[0].model

    @property
    def graphs(self) -> dict[str, Graph]:
        """The first model's graphs."""
        return self.traces[0].graphs

    @property
    def failures(self) -> tuple[PhaseFailure, ...]:
        """Phases that could not be analysed, each named with what tells its model and scenario from the others."""
        return tuple(
            replace(failure, phase=" ".join((*self.distinct(index), failure.phase)))
            for index, traced in enumerate(self.traces)
            for failure in traced.failures
        )

    def distinct(self, traced: int) -> tuple[str, ...]:
        """The names of a model and its scenario, so far as they tell it from the others of the report."""
        model, scenario = self.traces[traced].model, self.traces[traced].scenario
        found = []
        if len({other.model.source for other in self.traces}) > 1:
            alike = {other.model.source for other in self.traces if other.model.name == model.name}
            found.append(model.name if len(alike) == 1 else model.source)
        if len({other.scenario.name for other in self.traces}) > 1:
            found.append(scenario.name)
        return tuple(found)

    def title(self, run: Run) -> str:
        """What a run is called: its GPU, and what tells its model and scenario from others."""
        return " ".join((*self.distinct(run.traced), run.gpu.key))

    def __str__(self) -> str:
        from .render.registry import Options, render  # the one look upwards: an object that shows itself

        return render(self, "terminal", Options())

    def __repr__(self) -> str:
        bounds = (f"{run.gpu.key} {p.name} {_short(p.seconds.bound)}" for run in self.runs for p in run.phases)
        failed = (f"{failure.phase} failed" for failure in self.failures)
        return f"<fxroof report of {self.model.name}: {', '.join([*bounds, *failed]) or 'no phases'}>"

    def _repr_html_(self) -> str:
        return f'<pre style="line-height: 1.2">{html.escape(str(self))}</pre>'


def _short(seconds: float) -> str:
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def merged(reports: Iterable[Report]) -> Report:
    """Reports of several models or scenarios as one, in the order given; versions are the first's."""
    first, *others = reports
    traces, runs = list(first.traces), list(first.runs)
    for report in others:
        runs += [replace(run, traced=run.traced + len(traces)) for run in report.runs]
        traces += report.traces
    verdicts = (*first.verdicts, *(verdict for report in others for verdict in report.verdicts))
    return replace(first, traces=tuple(traces), runs=tuple(runs), verdicts=verdicts)


def fxroof_version() -> str:
    """Version of the installed package."""
    return version("fxroof")


def to_json(report: Report) -> str:
    """The report as JSON text, the same bytes for the same report."""
    return encoded(report)


def from_json(text: str | bytes, source: str = "report") -> Report:
    """Read a report that `to_json` wrote.

    Raises:
        ReportFileError: not JSON, not a report, of another schema version, or damaged.
    """

    def failed(what: str) -> Callable[[str], ReportFileError]:
        return lambda why: ReportFileError(f"{source}: {what}: {why}.", _REWRITE)

    head = decoded(text, _Head, failed("not a JSON object"))
    try:
        schema = msgspec.json.decode(head.schema_version, type=Annotated[int, msgspec.Meta(ge=0, le=10**9)])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ReportFileError(f"{source}: not an fxroof report (no schema_version).", _REWRITE) from error
    if schema != SCHEMA_VERSION:
        newer = schema > SCHEMA_VERSION
        raise ReportFileError(
            f"{source}: schema version {schema}; this fxroof reads version {SCHEMA_VERSION}."
            f" The report is of {'a newer' if newer else 'an older'} fxroof.",
            "Update fxroof, or write the report again with this one."
            if newer
            else "Write the report again with this fxroof.",
        )
    with without_collection():
        found = decoded(text, Report, failed("damaged report"))
        wrong = fault(found)
    if wrong:
        raise failed("damaged report")(wrong)
    return found


class _Head(msgspec.Struct):
    schema_version: msgspec.Raw = msgspec.Raw(b"null")


def read_report(path: Path) -> Report:
    """Read a saved report from a file; errors as `from_json`."""
    try:
        octets = content(path)
    except OSError as error:
        raise ReportFileError(f"{path}: cannot be read: {error.strerror}.") from error
    return from_json(octets, str(path))


def is_report(path: Path) -> bool:
    """Whether a file is meant to be a saved report, damaged or not: its name ends in `.json`."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        octets = content(path)
        return decoded(octets, _Head, ReportFileError).schema_version != _Head().schema_version
    except OSError:
        return False
    except ReportFileError:
        return b'"schema_version"' in octets[:_BEGINNING]


_BEGINNING = 200
"""Bytes of a file in which a report says what it is."""

_REWRITE = "Write one with: fxroof analyze mymodel.py --gpu b200 -f json -o report.json"
