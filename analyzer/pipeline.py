"""The public call: a model, GPUs and a scenario -> a Report. torch is imported only when there is a model to trace."""

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..hardware.catalog import CATALOG_VERSION, Resolved
from ..hardware.catalog import load as load_gpu
from .analysis import Coverage, PhaseAnalysis, analyze_phase, coverage
from .cost import Cost, operator_name
from .errors import CoverageError
from .graph import Graph, Role
from .report import GpuInfo, ModelInfo, Report, Run, fxroof_version
from .scenario import Scenario

if TYPE_CHECKING:
    from torch import nn

    from .load import Model

LEAST_COVERAGE = 0.9
"""Share of ops below which totals mean nothing and the analysis is refused."""

Progress = Callable[[str], None]


def analyze(
    model: "str | nn.Module",
    *,
    gpus: Sequence[str],
    scenario: Scenario | None = None,
    phase: str = "all",
    dtype: str = "as-is",
    attention: str = "sdpa",
    progress: Progress = lambda _: None,
) -> Report:
    """Trace a model once and price it on every GPU.

    Args:
        model: a target as on the command line, or a module the caller already has.
        gpus: catalogue keys, device names or paths to TOML files.
        scenario: batch and lengths.
        phase: `prefill`, `decode`, `forward`, or `all` that the model has.
        dtype: `as-is`, `bf16`, `fp16` or `fp32`.
        attention: `sdpa` or `eager`, for transformers models.
        progress: told what is being done, for a status line.

    Raises:
        FxroofError: the model cannot be loaded, traced or priced.
        CatalogError: a GPU is unknown.
    """
    resolved = [load_gpu(name) for name in gpus]  # before the slow part: a typing error should not cost a trace
    progress("importing torch")
    from .load import from_module, load

    progress("building the model on the meta device")
    loaded = (
        load(model, dtype=dtype, attention=attention) if isinstance(model, str) else from_module(model, dtype=dtype)
    )
    return _traced(loaded, resolved, scenario or Scenario(), phase, progress)


def analyze_model(
    model: "Model", *, gpus: Sequence[str], scenario: Scenario | None = None, phase: str = "all"
) -> Report:
    """As `analyze`, for a model that is already loaded."""
    return _traced(model, [load_gpu(name) for name in gpus], scenario or Scenario(), phase, lambda _: None)


def reprice(report: Report, *, gpus: Sequence[str]) -> Report:
    """The same graphs on other GPUs; needs no torch. Errors as `analyze`."""
    resolved = [load_gpu(name) for name in gpus]
    return _report(report.model, report.graphs, report.scenario, resolved, report.torch_version)


def _traced(model: "Model", resolved: Sequence[Resolved], scenario: Scenario, phase: str, progress: Progress) -> Report:
    import torch

    from .trace import trace
    from .workload import plan

    graphs: dict[str, Graph] = {}
    with _without_collection():
        workload = plan(model, scenario, phase)
        for program in workload.programs:
            progress(f"tracing {program.phase.name}")
            graphs[program.phase.name] = trace(
                program.module, program.args, phase=program.phase, cache=program.cache, prefix=program.prefix
            )
    dtypes: Counter[str] = Counter()
    for parameter in model.module.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    info = ModelInfo(
        name=model.name,
        source=model.source,
        parameters=model.parameters,
        parameter_bytes=model.parameter_bytes,
        dtypes=dict(dtypes.most_common()),
        cache_kind=workload.cache_kind,
        notes=(*model.notes, *workload.notes),
    )
    progress("pricing")
    return _report(info, graphs, workload.scenario, resolved, str(torch.__version__))


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    # a trace allocates millions of objects that all live to its end: looking for garbage among them costs a tenth
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _report(
    model: ModelInfo,
    graphs: Mapping[str, Graph],
    scenario: Scenario,
    resolved: Iterable[Resolved],
    torch_version: str,
) -> Report:
    return Report(
        fxroof_version=fxroof_version(),
        torch_version=torch_version,
        catalog_version=CATALOG_VERSION,
        model=model,
        scenario=scenario,
        graphs=dict(graphs),
        runs=tuple(_run(graphs, scenario, gpu) for gpu in resolved),
    )


def _run(graphs: Mapping[str, Graph], scenario: Scenario, resolved: Resolved) -> Run:
    gpu = resolved.gpu
    analysed = [analyze_phase(graph, gpu) for graph in graphs.values()]
    phases = tuple(phase for phase, _ in analysed)
    covered = coverage(phases)
    _refuse_if_uncovered(covered)
    return Run(
        scenario=scenario,
        gpu=GpuInfo(
            key=gpu.key,
            name=gpu.name,
            note=resolved.note or "",
            memory_bandwidth=float(gpu.memory_bandwidth),
            memory_bytes=gpu.memory_usable_bytes,
            cache_bytes=gpu.cache_bytes or 0,
            matmul_peaks={dtype: float(peak) for dtype, peak in gpu.tensor.items()},
            ridges={dtype: ridge for dtype in gpu.tensor if (ridge := gpu.ridge(dtype)) is not None},
            confidence=gpu.confidence,
        ),
        coverage=covered,
        phases=phases,
        assumptions=tuple(_assumptions(graphs, analysed, resolved)),
    )


def _refuse_if_uncovered(covered: Coverage) -> None:
    if covered.fraction < LEAST_COVERAGE:
        names = ", ".join(f"{u.target} (x{u.count}, {u.example})" for u in covered.unpriced[:8])
        raise CoverageError(
            f"Only {covered.fraction:.0%} of the graph's ops have a formula, so its totals would mean little. "
            f"Without one: {names}.",
            "Each operator needs a formula in analyzer/formulas; please report these names.",
        )


def _assumptions(
    graphs: Mapping[str, Graph],
    analysed: Sequence[tuple[PhaseAnalysis, tuple[Cost, ...]]],
    resolved: Resolved,
) -> Iterable[str]:
    gpu = resolved.gpu
    yield "times are bounds from vendor peaks (dense); no launch overhead, no achieved-fraction derating"
    yield (
        "eager execution: every op reads its operands from device memory and writes its result there; a run whose small "
        "tensors stay in the cache from op to op can beat that, never the floor"
    )
    yield "float32 matmuls run without TF32, convolutions with it (PyTorch's defaults)"
    backends = {c.backend: c.note for _, costs in analysed for c in costs if c.backend}
    for backend, note in backends.items():
        yield f"attention backend: {backend}" + (f" ({note})" if note else "")
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
    if gpu.memory_usable_is_estimate:
        yield "usable memory is estimated from the label"
    if any(
        operator_name(o.target) == "aten.cat" and _grows_cache(g, o.outputs) for g in graphs.values() for o in g.ops
    ):
        yield "the KV cache grows by concatenation: each step reads and writes all of it"


def _grows_cache(graph: Graph, outputs: Iterable[int]) -> bool:
    return graph.phase == "decode" and any(graph.role(i) is Role.OUTPUT for i in outputs)
