"""What a model took when it was run, beside what it was said to take. JSON out and in; no torch.

Seconds that were measured stand beside three that were computed: the floor and the bound, which no right measurement
is below, and the estimate.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from statistics import median, quantiles

from ..hardware.gpu import Gpu
from .analysis import OpAnalysis, PhaseAnalysis, analyze_phase
from .clocked import Clocked, ClockedCall, Machine, Stray
from .cost import Cost, Status
from .errors import ReportFileError
from .estimate import Derated, derating
from .execution import KernelAnalysis, execute
from .graph import Graph
from .jsonfile import content, decoded, encoded
from .kernels import eager_kernels
from .report import GpuInfo, ModelInfo, PhaseFailure
from .roofline import Bound
from .scenario import Scenario

MEASURED_VERSION = 1


_SURE = 0.97
"""Share of a bound below which a time is no matter of clocks that run a little faster than when peaks were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of several runs.

    Attributes:
        median: the middle one.
        least: the fastest.
        spread: distance of the quartiles over the median.
        runs: how many.
    """

    median: float
    least: float
    spread: float
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCall:
    """A call of the graph: what it took, and what it was said to take.

    Attributes:
        ops: the graph's ops that it stands for.
        target: operator of the last of them.
        module: qualified module name; empty for the root.
        file: the user's file; empty if unknown.
        line: in it.
        shape: shapes of the inputs and of the first output.
        dtype: of its operands.
        ran: operators that PyTorch ran for it that did more than look; several where it has no kernel of its own.
        seen: whether it ran.
        seconds: median of the passes, without launch on a GPU; on a CPU as PyTorch's dispatcher takes them.
        least: the fastest pass.
        bound: seconds that no run is faster than.
        estimate: seconds that it is likely to take once it is launched.
        lane: what sets the estimate: `memory`, `compute`, `special`, `link`, `latency`, or `free`.
        kernels: launched on the device; None on a CPU.
        expected_kernels: that the analysis has for it.
        because: what explains its time, as far as it was recorded.
    """

    ops: tuple[str, ...]
    target: str
    module: str
    file: str
    line: int
    shape: str
    dtype: str
    ran: tuple[str, ...]
    seen: bool
    seconds: float
    least: float
    bound: float
    estimate: float
    lane: Bound
    kernels: int | None
    expected_kernels: int
    because: tuple[str, ...] = ()

    @property
    def is_too_fast(self) -> bool:
        """Whether the fastest pass was clearly below the bound: then the bound, or the GPU's file, is wrong."""
        return self.seen and self.least < _SURE * self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPhase:
    """One phase as it ran.

    Attributes:
        name: prefill, decode, ...
        tokens: rows through the model.
        floor: seconds that no implementation is faster than.
        bound: of the eager kernels.
        estimate: of the eager kernels, launches included.
        compiled_bound: of what a compiler would fuse.
        compiled_estimate: the same, in a CUDA graph.
        eager: measured.
        compiled: measured under torch.compile; None where that was not asked for, or failed.
        compiled_mode: of torch.compile.
        compiled_failure: why it failed.
        graphs_skipped: graphs that torch.compile did not make CUDA graphs of.
        calls: every op of the graph, in order; empty where they were not timed.
        strays: what ran that is not in the graph.
        passes: runs in which ops were timed.
        clock: seconds that the clock shows for an op that does nothing.
        kernels_failure: why ops were not timed.
        peak_bytes: the most memory that tensors held; None where that is not known.
        needed_bytes: the same by fxroof's account.
    """

    name: str
    tokens: int
    floor: float
    bound: float
    estimate: float
    compiled_bound: float
    compiled_estimate: float
    eager: Timing
    compiled: Timing | None
    compiled_mode: str
    compiled_failure: str
    graphs_skipped: int
    calls: tuple[MeasuredCall, ...]
    strays: tuple[Stray, ...]
    passes: int
    clock: float
    kernels_failure: str
    peak_bytes: int | None
    needed_bytes: int

    @property
    def calls_seconds(self) -> float:
        """Seconds of all ops, those that are not in the graph included."""
        return fsum([*(call.seconds for call in self.calls), *(stray.seconds for stray in self.strays)])

    @property
    def too_fast(self) -> tuple[MeasuredCall, ...]:
        """Calls that ran faster than their bound."""
        return tuple(call for call in self.calls if call.is_too_fast)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What `fxroof measure` found.

    Attributes:
        measured_version: of this shape.
        fxroof_version: that wrote it.
        machine: where it ran.
        model: what ran.
        scenario: in which situation.
        gpu: the part that it was priced on.
        gpu_source: where that part's figures come from: `catalogue`, `file` or `calibration`.
        phases: each phase.
        failures: phases that did not run, and why.
        derating: the figures of the estimate.
    """

    measured_version: int = MEASURED_VERSION
    fxroof_version: str
    machine: Machine
    model: ModelInfo
    scenario: Scenario
    gpu: GpuInfo
    gpu_source: str
    phases: tuple[MeasuredPhase, ...]
    failures: tuple[PhaseFailure, ...] = ()
    derating: tuple[Derated, ...] = ()


def to_json(measured: Measured) -> str:
    """The measurement as JSON text."""
    return encoded(measured)


def read(path: Path) -> Measured:
    """A measurement that `to_json` wrote.

    Raises:
        ReportFileError: it cannot be read, or is none.
    """
    try:
        octets = content(path)
    except OSError as error:
        raise ReportFileError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return decoded(
        octets,
        Measured,
        lambda why: ReportFileError(
            f"{path}: no measurement of fxroof: {why}.", "`fxroof measure -f json` writes one."
        ),
    )


def timing(runs: Iterable[float]) -> Timing:
    """Seconds of several runs as their middle and spread."""
    taken = sorted(runs)
    low, _, high = quantiles(taken, n=4) if len(taken) > 1 else (taken[0],) * 3
    middle = median(taken)
    return Timing(median=middle, least=taken[0], spread=(high - low) / middle if middle else 0.0, runs=len(taken))


def beside(graph: Graph, clocked: Clocked, gpu: Gpu) -> MeasuredPhase:
    """A phase as it ran, beside the same on the roofline."""
    phase, costs = analyze_phase(graph, gpu)
    eager, compiled = phase.executions.eager, phase.executions.compiled
    return MeasuredPhase(
        name=phase.name,
        tokens=phase.tokens,
        floor=phase.seconds.floor,
        bound=eager.bound,
        estimate=eager.estimate,
        compiled_bound=compiled.bound,
        compiled_estimate=compiled.estimate,
        eager=timing(clocked.runs),
        compiled=timing(clocked.compiled_runs) if clocked.compiled_runs else None,
        compiled_mode=clocked.compiled_mode,
        compiled_failure=clocked.compiled_failure,
        graphs_skipped=clocked.graphs_skipped,
        calls=_calls(graph, phase, costs, clocked, gpu),
        strays=tuple(sorted(clocked.strays, key=lambda stray: -stray.seconds)),
        passes=clocked.passes,
        clock=clocked.clock,
        kernels_failure=clocked.kernels_failure,
        peak_bytes=clocked.peak_bytes,
        needed_bytes=clocked.needed_bytes,
    )


def _calls(
    graph: Graph, phase: PhaseAnalysis, costs: tuple[Cost, ...], clocked: Clocked, gpu: Gpu
) -> tuple[MeasuredCall, ...]:
    # without the launches of eager mode: those are not in the times of kernels
    kernels = execute(graph, eager_kernels(graph, costs), gpu, derating(gpu), eager=False).execution.kernels
    by_op: dict[str, list[KernelAnalysis]] = {}
    for kernel in kernels:
        by_op.setdefault(kernel.ops[0], []).append(kernel)
    ops = {op.name: (op, cost) for op, cost in zip(phase.ops, costs, strict=True)}
    return tuple(
        _call(
            call,
            [ops[name] for name in call.ops if name in ops],
            [kernel for name in call.ops for kernel in by_op.get(name, ())],
            clocked,
        )
        for call in clocked.calls
        if any(name in ops for name in call.ops)
    )


def _call(
    call: ClockedCall, members: list[tuple[OpAnalysis, Cost]], kernels: list[KernelAnalysis], clocked: Clocked
) -> MeasuredCall:
    last = members[-1][0]
    bound = fsum(kernel.seconds.bound for kernel in kernels)
    estimate = fsum(kernel.seconds.estimate for kernel in kernels)
    slowest = max(kernels, key=lambda kernel: kernel.seconds.estimate, default=None)
    working = tuple(name for name in call.ran if not _only_looks(name))
    return MeasuredCall(
        ops=call.ops,
        target=last.target,
        module=last.module,
        file=last.file,
        line=last.line,
        shape=last.shape,
        dtype=last.dtype,
        ran=working,
        seen=bool(call.ran) or not kernels,
        seconds=call.seconds,
        least=call.least,
        bound=bound,
        estimate=estimate,
        lane=slowest.bound if slowest else Bound.FREE,
        kernels=call.kernels,
        expected_kernels=len(kernels),
        because=tuple(_because(call, members, kernels, working, bound, estimate, clocked)),
    )


def _because(
    call: ClockedCall,
    members: list[tuple[OpAnalysis, Cost]],
    kernels: list[KernelAnalysis],
    working: tuple[str, ...],
    bound: float,
    estimate: float,
    clocked: Clocked,
) -> Iterable[str]:
    """What was recorded that explains a time, what matters most first."""
    if not call.ran:
        if kernels:
            yield "did not run as an op of its own"
        return
    if call.least < _SURE * bound:
        yield "faster than its bound: a fault of the formula or of the GPU's figures"
    if call.seconds < 3 * clocked.clock:
        yield f"as short as the clock: an op that does nothing shows {clocked.clock * 1e6:.1f} µs"
    for op, cost in members:
        if op.status is Status.UNPRICED:
            yield "no formula: charged its inputs and outputs"
        if any(not gemm.aligned for gemm in cost.gemms):
            yield "operands of a product off 16 bytes"
        if cost.gemms and (rows := max(gemm.m for gemm in cost.gemms)) <= _FEW_ROWS:
            yield f"a product of {rows} row{'s' if rows > 1 else ''}"
    if not kernels and working:
        yield "free in the analysis, but it ran"
    if len(working) > max(1, len(kernels)):
        yield f"ran as {len(working)} ops: {_listed(working)}"
    if call.kernels is not None and call.kernels > max(1, len(kernels)):
        yield f"{call.kernels} kernels, not {len(kernels)}"
    if call.faults and call.faults * _PAGE > _MANY_BYTES:
        yield f"{call.faults * _PAGE / 1e6:.3g} MB of new memory, which the system hands out page by page"
    if any(kernel.bound is Bound.LATENCY for kernel in kernels) and call.seconds < 4 * estimate:
        yield "too small for the device: latency is most of it"
    if call.seconds > 2 * call.least:
        yield "passes differ: the fastest took less than half of the median"
    for op, _ in members:
        if op.note and op.status is not Status.FREE:
            yield op.note


_PAGE = 4096
_FEW_ROWS = 8
_MANY_BYTES = 1 << 18

_LOOKS = frozenset(
    {
        "view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "expand", "permute", "as_strided",
        "detach", "alias", "_unsafe_view", "split", "split_with_sizes", "unbind", "chunk", "narrow", "lift_fresh",
        "_reshape_alias", "unfold", "diagonal", "empty", "_fused_sdp_choice", "movedim", "view_as_real",
        "view_as_complex", "empty_strided", "empty_like", "new_empty", "new_empty_strided",
    }
)  # fmt: skip
"""Operators that move no data."""


def _only_looks(target: str) -> bool:
    return target.removeprefix("aten.").split(".", 1)[0] in _LOOKS


def _listed(targets: tuple[str, ...]) -> str:
    names = list(dict.fromkeys(target.removeprefix("aten.").split(".", 1)[0] for target in targets))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
