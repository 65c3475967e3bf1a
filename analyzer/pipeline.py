"""The public call: a model, GPUs and a scenario -> a Report. torch is imported only for modules of the caller's own.

A target's code runs in a box, see `box.py`; its graphs come back and are priced here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ..hardware.catalog import CATALOG_VERSION, Resolved
from ..hardware.catalog import load as load_gpu
from . import box
from .analysis import Coverage, PhaseAnalysis, analyze_phase, coverage
from .collectives import summary as exchanged
from .cost import Cost, operator_name
from .errors import CoverageError, FxroofError, ReportFileError
from .estimate import derating
from .finding import Rule, Situation
from .garbage import without_collection
from .graph import Graph, Role
from .handover import Again, Collected, Frame, Question, collect
from .memory import BLOCK, memory
from .report import GpuInfo, Report, Run, Traced, fxroof_version, merged
from .request import Request
from .review import LEAST_SAVING, RuleFailure, Selection, load_rules, review, selected
from .rewrite import Flow
from .scenario import Scenario
from .serving import serving
from .suppressions import read_suppressions

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from .capture import Inputs
    from .load import Model

LEAST_COVERAGE = 0.9
"""Share of ops below which totals mean nothing and the analysis is refused."""

Progress = Callable[[str], None]


def analyze(
    model: "str | nn.Module | ExportedProgram",
    example_inputs: "Inputs | None" = None,
    *,
    gpu: str | None = None,
    gpus: Sequence[str] = (),
    scenario: Scenario | None = None,
    scenarios: Sequence[Scenario] = (),
    phase: str = "all",
    dtype: str = "as-is",
    attention: str = "sdpa",
    execution: str = "eager",
    selection: Selection | None = None,
    least_saving: float = LEAST_SAVING,
    init: str = "",
    inputs: Sequence[str] = (),
    trust_remote_code: bool = False,
    assume: Sequence[str] = (),
    timeout: float = 600.0,
    memory_limit: int | None = None,
    in_process: bool = False,
    debug: bool = False,
    progress: Progress = lambda _: None,
) -> Report:
    """Build a model once, trace it in every scenario and price it on every GPU.

    Args:
        model: a target as on the command line; or a module (an fx.GraphModule is one too) or an exported program that
            the caller has, which is left as it is.
        example_inputs: arguments of forward, a tuple or by name, for a module that the caller has. Only their shapes
            and types matter.
        gpu: catalogue key, device name or path to a TOML file.
        gpus: several of those.
        scenario: batch and lengths.
        scenarios: several of those, each with a name of its own.
        phase: `prefill`, `decode`, `forward`, `encoder`, or `all` that the model has.
        dtype: `as-is`, `bf16`, `fp16` or `fp32`.
        attention: `sdpa` or `eager`, for transformers models.
        execution: `eager` or `compiled`: whose bound and estimate are those of the phases.
        selection: which rules run; all if not given.
        least_saving: share of a phase's estimate that a finding has to save.
        init: an expression in the target's namespace that builds the model.
        inputs: `name=2x3x224x224:bf16` for inputs of forward given by hand.
        trust_remote_code: run code that a model repository brings.
        assume: data that may be assumed where tracing needs values, such as `balanced-routing`.
        timeout: seconds that a target's code may take; 0 for no limit.
        memory_limit: bytes that its process may hold; 0 for no limit, None for most of what this machine has.
        in_process: run a target's code in this process, without limits.
        debug: show tracebacks of the target's code and warnings of libraries.
        progress: told what is being done, for a status line.

    Returns:
        The report; phases that failed while others did not are in its `failures`.

    Raises:
        FxroofError: the model cannot be loaded, traced or priced.
        CatalogError: a GPU is unknown.
    """
    names = _gpu_names(gpu, gpus)
    situations = _situations(scenario, scenarios)
    asked = _Asked(execution, selection or Selection(), least_saving)
    rules_of(asked.selection)  # a typing error should not cost a trace
    if not isinstance(model, str):
        resolved = [load_gpu(name) for name in names]  # before the slow part: a typing error should not cost a trace
        from .capture import from_live

        frames, again = from_live(model, example_inputs, situations[0], phase, dtype, assume)
        return _priced_each(frames, situations, phase, resolved, asked, progress, again)
    if example_inputs is not None:
        raise FxroofError(
            f"{model}: example_inputs go with a module; this is the name of one.",
            "Give inputs=['x=1x3x224x224'], or add a function example_inputs to the file.",
        )
    request = Request(
        target=model,
        init=init,
        inputs=tuple(inputs),
        scenario=situations[0],
        phase=phase,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        assume=tuple(assume),
    )
    if in_process or not box.AVAILABLE:
        resolved = [load_gpu(name) for name in names]
        progress("importing torch")
        from .capture import from_request

        frames, again = from_request(request, debug=debug)
        return _priced_each(frames, situations, phase, resolved, asked, progress, again)
    limits = box.Limits(seconds=timeout, memory=memory_limit)
    with box.Box(request, limits=limits, debug=debug) as child:
        resolved = [load_gpu(name) for name in names]  # while the child imports torch
        return _priced_each(child.frames(), situations, phase, resolved, asked, progress, child.again)


def analyze_model(
    model: "Model",
    *,
    gpus: Sequence[str],
    scenario: Scenario | None = None,
    phase: str = "all",
    selection: Selection | None = None,
) -> Report:
    """As `analyze`, for a model that is already loaded."""
    from .capture import from_model

    asked = _Asked(selection=selection or Selection())
    resolved = [load_gpu(name) for name in gpus]

    def again(question: Question) -> Iterable[Frame]:
        return from_model(model, question.scenario, question.phase)

    frames = from_model(model, scenario or Scenario(), phase)
    return _priced(collect(frames, _silent), resolved, asked, _silent, again)


def reprice(
    report: Report,
    *,
    gpus: Sequence[str],
    execution: str = "eager",
    selection: Selection | None = None,
    least_saving: float = LEAST_SAVING,
) -> Report:
    """The same graphs on other GPUs or in another execution; needs no torch. Errors as `analyze`.

    Raises:
        ReportFileError: the graphs are none that a trace gives.
    """
    resolved = [load_gpu(name) for name in gpus]
    asked = _Asked(execution, selection or Selection(), least_saving)
    try:
        return merged(
            _priced(Collected(traced=traced, torch_version=report.torch_version), resolved, asked, _silent)
            for traced in report.traces
        )
    except FxroofError:
        raise
    except Exception as error:  # arguments that no operator takes: what they must be only its formula knows
        raise ReportFileError(
            f"The report's graphs cannot be priced: {type(error).__name__}: {error}.",
            "Analyse the model itself again; if that happens with a new report too, please tell us.",
        ) from error


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of the pricing side."""

    execution: str = "eager"
    selection: Selection = field(default_factory=Selection)
    least_saving: float = LEAST_SAVING


def rules_of(selection: Selection) -> tuple[tuple[Rule, ...], tuple[RuleFailure, ...]]:
    """The rules that a selection names, and those that could not be loaded.

    Raises:
        RuleSelectionError: it names a rule that does not exist.
    """
    rules, failures = load_rules(selection.files)
    return selected(rules, selection), failures


def _gpu_names(gpu: str | None, gpus: Sequence[str]) -> tuple[str, ...]:
    several = (gpus,) if isinstance(gpus, str) else tuple(gpus)
    names = tuple(dict.fromkeys((*((gpu,) if gpu else ()), *several)))
    if not names:
        raise FxroofError("No GPU is named.", "For example: gpu='b200'; `fxroof gpus` lists all.")
    return names


def _situations(scenario: Scenario | None, scenarios: Sequence[Scenario]) -> tuple[Scenario, ...]:
    found = (*((scenario,) if scenario else ()), *scenarios) or (Scenario(),)
    names = [each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FxroofError(f"Two scenarios are called {twice!r}.", "Give each a name of its own.")
    return found


def _silent(_: str) -> None:
    pass


def _priced_each(
    frames: Iterable[Frame],
    scenarios: Sequence[Scenario],
    phase: str,
    resolved: Sequence[Resolved],
    asked: _Asked,
    progress: Progress,
    again: Again,
) -> Report:
    """The first scenario's frames priced, then those of the same model in each other scenario."""

    def reports() -> Iterator[Report]:
        for index, scenario in enumerate(scenarios):
            named = f"{scenario.name}: " if len(scenarios) > 1 else ""
            say = partial(_say, progress, named)
            try:
                found = collect(frames if index == 0 else again(Question(scenario=scenario, phase=phase)), say)
                yield _priced(found, resolved, asked, say, again)
            except FxroofError as error:
                raise type(error)(f"{named}{error.message}", error.hint) from error

    return merged(reports())


def _say(progress: Progress, named: str, message: str) -> None:
    progress(f"{named}{message}")


def _priced(
    collected: Collected, resolved: Iterable[Resolved], asked: _Asked, progress: Progress, again: Again | None = None
) -> Report:
    progress("pricing")
    retraced = _Retraced(again, progress)
    with without_collection():
        runs = tuple(_run(collected.traced, gpu, asked, retraced) for gpu in resolved)
    return Report(
        fxroof_version=fxroof_version(),
        torch_version=collected.torch_version,
        catalog_version=CATALOG_VERSION,
        traces=(collected.traced,),
        runs=runs,
    )


class _Retraced:
    """Phases of the same model in other scenarios, each traced when it is first asked for."""

    def __init__(self, again: Again | None, progress: Progress) -> None:
        self._again = again
        self._progress = progress
        self._known: dict[tuple[Scenario, str], Graph | None] = {}

    def __call__(self, scenario: Scenario, phase: str) -> Graph | None:
        asked = (scenario, phase)
        if asked not in self._known:
            self._known[asked] = self._trace(Question(scenario=scenario, phase=phase))
        return self._known[asked]

    def _trace(self, question: Question) -> Graph | None:
        if self._again is None:
            return None
        self._progress(f"tracing {question.phase} as remedies would have it")
        try:
            found = collect(self._again(question), _silent).traced
        except FxroofError:  # a remedy whose worth cannot be computed is not offered
            return None
        same = found.scenario == question.scenario
        return found.graphs.get(question.phase) if same else None


def _run(traced: Traced, resolved: Resolved, asked: _Asked, retraced: _Retraced) -> Run:
    gpu, graphs, scenario = resolved.gpu, traced.graphs, traced.scenario
    analysed = [analyze_phase(graph, gpu, asked.execution) for graph in graphs.values()]
    phases = tuple(phase for phase, _ in analysed)
    covered = coverage(phases)
    _refuse_if_uncovered(covered)
    needed = memory(
        graphs,
        dict(zip(graphs, (costs for _, costs in analysed), strict=True)),
        gpu,
        scenario,
        parameter_bytes=traced.model.parameter_bytes,
        growth=traced.model.cache,
    )
    rules, unloaded = rules_of(asked.selection)
    found = review(
        {
            name: Situation(
                graph=graph,
                flow=Flow(graph),
                costs=costs,
                analysis=phase,
                others={other.name: other for other in phases if other is not phase},
                gpu=gpu,
                scenario=scenario,
                memory=needed,
                retraced=retraced,
            )
            for (name, graph), (phase, costs) in zip(graphs.items(), analysed, strict=True)
        },
        rules,
        least_saving=asked.least_saving,
        modules=asked.selection.modules,
        suppressions=read_suppressions(
            op.anchor.file for graph in graphs.values() for op in graph.ops if op.anchor and not op.anchor.library
        ),
    )
    return Run(
        scenario=scenario,
        gpu=gpu_info(resolved),
        coverage=covered,
        phases=phases,
        assumptions=tuple(_assumptions(graphs, analysed, resolved)),
        findings=found.findings,
        waterfall=found.waterfall,
        rule_failures=(*unloaded, *found.failures),
        unused_suppressions=found.unused_suppressions,
        memory=needed,
        serving=serving(phases, scenario),
        derating=derating(gpu).figures,
    )


def gpu_info(resolved: Resolved) -> GpuInfo:
    """A part as reports show it."""
    gpu = resolved.gpu
    return GpuInfo(
        key=gpu.key,
        name=gpu.name,
        note=resolved.note or "",
        memory_bandwidth=float(gpu.memory_bandwidth),
        memory_bytes=gpu.memory_usable_bytes,
        cache_bytes=gpu.cache_bytes or 0,
        matmul_peaks={dtype: float(peak) for dtype, peak in gpu.tensor.items()},
        ridges={dtype: ridge for dtype in gpu.tensor if (ridge := gpu.ridge(dtype)) is not None},
        confidence=gpu.confidence,
    )


def _refuse_if_uncovered(covered: Coverage) -> None:
    if covered.fraction < LEAST_COVERAGE:
        names = ", ".join(f"{u.target} (x{u.count}, {u.example})" for u in covered.unpriced[:8])
        raise CoverageError(
            f"Only {covered.fraction:.0%} of the graph's ops have a formula, so its totals would mean little. "
            f"Without one: {names}.",
            "Each operator needs a formula in analyzer/formulas; please report these names.",
        )


_TOLD = ("higher_order.", "fxroof.to_", "fxroof.move_to_")
"""Beginnings of operators whose notes are assumptions of the whole run."""


def _assumptions(
    graphs: Mapping[str, Graph],
    analysed: Sequence[tuple[PhaseAnalysis, tuple[Cost, ...]]],
    resolved: Resolved,
) -> Iterable[str]:
    gpu = resolved.gpu
    yield "floor and bound: vendor peaks (dense), caches at their best, no launch; no run is faster"
    yield "estimate: shares of the peaks that are reached, LRU caches, tiles and waves, latency and launch"
    yield "eager: every op launched from Python; compiled: Inductor's kernels in a CUDA graph"
    yield "float32 matmuls run without TF32, convolutions with it (PyTorch's defaults)"
    backends = {c.backend: c.note for _, costs in analysed for c in costs if c.backend}
    for backend, note in backends.items():
        yield f"attention backend: {backend}" + (f" ({note})" if note else "")
    for name, (_, costs) in zip(graphs, analysed, strict=True):
        if told_others := exchanged(costs):
            several = any(cost.exchange and cost.exchange.gpus > 1 for cost in costs)
            how = "ring or one-shot" if several else "from and to pinned memory"
            yield f"{name}: {told_others}; bound: one way over the links at their peak; estimate: {how}"
    told = {
        c.note: f"{op.anchor or op.name}: {c.note}"
        for g, (_, costs) in zip(graphs.values(), analysed, strict=True)
        for op, c in zip(g.ops, costs, strict=True)
        if c.note and op.target.startswith(_TOLD) and not c.backend
    }
    yield from told.values()
    experts = {
        round(a.expected_read / a.read, 1)
        for _, costs in analysed
        for c in costs
        for a in c.traffic
        if a.expected_read and a.read and a.expected_read > a.read
    }
    if experts:
        yield (
            "mixture of experts: the bound reads the fewest experts that routing allows; "
            f"evenly routed tokens read up to {max(experts)}x as many expert bytes"
        )
    if any(op.note and "published rate" in op.note for phase, _ in analysed for op in phase.ops):
        yield "some dtypes have no published rate on this part; their arithmetic is left out of the bound"
    widened = {n for phase, _ in analysed for op in phase.ops for n in op.note.split("; ") if "computed as" in n}
    yield from sorted(widened)
    yield (
        "memory: KV cache at the end of the generation, activations of the phases analysed, for as long as the program "
        "was seen to hold them while it was traced; "
        f"blocks of {BLOCK} B, no fragmentation; CUDA context and cuBLAS workspaces are assumed"
    )
    yield (
        "largest batch: activations in proportion to it; fewest GPUs: weights and cache spread evenly, activations and "
        "CUDA context on each"
    )
    if gpu.memory_usable_is_estimate:
        yield "usable memory is estimated from the label"
    if any(
        operator_name(o.target) == "aten.cat" and _grows_cache(g, o.outputs) for g in graphs.values() for o in g.ops
    ):
        yield "the KV cache grows by concatenation: each step reads and writes all of it"


def _grows_cache(graph: Graph, outputs: Iterable[int]) -> bool:
    return graph.phase == "decode" and any(graph.role(i) is Role.OUTPUT for i in outputs)
