"""Everything known about one phase on one GPU, without opinions. These dataclasses are also the JSON report's shape."""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from ..hardware.gpu import Gpu
from .cost import Cost, Status, bytes_by_role
from .estimate import derating
from .execution import Execution, execute
from .floor import Floor, floor
from .fusion import compiled_kernels
from .graph import Graph, Op, Role
from .kernels import Kernel, eager_kernels
from .pricing import price
from .roofline import Bound, Lanes, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds.

    Attributes:
        floor: no implementation of the phase is faster.
        bound: no run of these kernels is faster.
        estimate: what a run is likely to take.
    """

    floor: float
    bound: float
    estimate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Executions:
    """The ways of running a phase.

    Attributes:
        eager: the kernels that PyTorch launches op by op, from Python.
        compiled: the kernels that a fusing compiler makes of them, launched by a CUDA graph.
    """

    eager: Execution
    compiled: Execution

    def of(self, name: str) -> Execution:
        """The execution called `eager` or `compiled`."""
        return self.compiled if name == "compiled" else self.eager


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopTotals:
    """Work of a phase.

    Attributes:
        matmul: FLOPs of matrix products, attention counted dense: comparable with other counters.
        matmul_executed: the same as executed: causal kernels skip what the mask hides.
        vector: FLOPs of elementwise work and reductions.
        special: transcendental results.
    """

    matmul: float
    matmul_executed: float
    vector: float
    special: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTotals:
    """Bytes across the memory bus, in all and by the role of the memory."""

    total: int
    read: int
    written: int
    weight: int
    kv_cache: int
    activation: int
    input: int
    output: int
    constant: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpAnalysis:
    """One op of the graph on the roofline, run eagerly; in a loop, all its turns together.

    Attributes:
        name: the fx node's name.
        target: operator and overload.
        module: qualified module name; empty for the root.
        file: the user's file, or the library's where the call never passed through theirs; empty if unknown.
        line: line in `file`; 0 if unknown.
        library_file: innermost library file, where it differs from `file`.
        library_line: line in `library_file`.
        status: priced, free or unpriced.
        shape: shapes of the inputs and of the first output, as text.
        dtype: dtype of the operands of its matmul, else of its first output.
        flops: matmul (dense) and vector FLOPs.
        flops_executed: the same with causal attention as executed; `intensity` and `seconds` use these.
        special: transcendental results.
        bytes_read: bytes read, those that a cache serves included.
        bytes_written: bytes written, those that stay in a cache included.
        intensity: executed FLOPs per byte.
        ridge: intensity where arithmetic takes over from memory; None where the part publishes no rate.
        bound: `memory`, `compute`, `special`, `link` or `free`.
        seconds: the bound of this op.
        lanes: seconds by unit.
        backend: implementation chosen where PyTorch has several.
        note: what was assumed.
        repeat: times it runs.
    """

    name: str
    target: str
    module: str
    file: str
    line: int
    library_file: str
    library_line: int
    status: Status
    shape: str
    dtype: str
    flops: float
    flops_executed: float
    special: float
    bytes_read: int
    bytes_written: int
    intensity: float
    ridge: float | None
    bound: Bound
    seconds: float
    lanes: Lanes
    backend: str = ""
    note: str = ""
    repeat: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseAnalysis:
    """One phase on one GPU.

    Attributes:
        name: prefill, decode or forward.
        tokens: rows through the model; 0 for non-token models.
        seconds: floor, and bound and estimate of the execution asked for.
        execution: which that is, `eager` or `compiled`.
        turns: times the phase runs for one prompt, the chunks that it is cut into; all other figures are of one turn.
        flops: work.
        bytes: bytes that the ops read and write, run eagerly; what crosses the bus is in `executions`.
        floor: what the floor is made of.
        intensity: executed FLOPs per byte over the phase.
        ridge: that of the dtype with most matmul work.
        matmul_path: unit and dtype whose peak makes that ridge, such as `tensor bfloat16`; empty where there is none.
        bound: class that most of the time is spent in.
        bound_share: share of the bound's time by class.
        mfu: share of the matmul peak reached when running at the bound.
        mbu: share of the memory bandwidth used when running at the bound.
        mfu_estimate: the same in the estimate.
        mbu_estimate: the same in the estimate.
        tokens_per_second: new tokens per second at the bound; 0 for non-token models. In prefill prompt tokens.
        ops: every op of every layer, in order.
        executions: the kernels of each way of running it.
    """

    name: str
    tokens: int
    seconds: Times
    execution: str
    turns: int
    flops: FlopTotals
    bytes: ByteTotals
    floor: Floor
    intensity: float
    ridge: float | None
    bound: Bound
    bound_share: dict[str, float]
    mfu: float
    mbu: float
    mfu_estimate: float
    mbu_estimate: float
    tokens_per_second: float
    ops: tuple[OpAnalysis, ...]
    executions: Executions
    matmul_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpricedOp:
    """Calls of an operator that has no formula, with the bytes that were charged for them."""

    target: str
    count: int
    bytes: int
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of the graphs was understood.

    Attributes:
        fraction: share of ops that are priced or proved free.
        priced: ops with a formula.
        free: ops that move no data.
        unpriced: operators without a formula.
    """

    fraction: float
    priced: int
    free: int
    unpriced: tuple[UnpricedOp, ...]


def analyze_phase(graph: Graph, gpu: Gpu, execution: str = "eager") -> tuple[PhaseAnalysis, tuple[Cost, ...]]:
    """Price a graph on a GPU, run its kernels there, and place every op on the roofline.

    Args:
        graph: the phase.
        gpu: the part.
        execution: the one whose bound and estimate are the phase's: `eager` or `compiled`.
    """
    costs = price(graph, gpu)
    reached = derating(gpu)
    launched = eager_kernels(graph, costs)
    fused = compiled_kernels(graph, costs)
    eager = execute(graph, launched, gpu, reached, eager=True)
    compiled = execute(graph, fused, gpu, reached, eager=False)
    placements = _by_op(launched, eager.placements)
    ops, by_role = _ops(graph, costs, placements)
    executions = Executions(eager=eager.execution, compiled=compiled.execution)
    chosen = (fused, compiled.placements) if execution == "compiled" else (launched, eager.placements)
    return _phase(graph, gpu, costs, ops, by_role, executions, execution, *chosen), costs


def _by_op(kernels: Sequence[Kernel], placements: Sequence[Placement]) -> dict[int, Placement]:
    """Where each op stands: its kernels one after the other."""
    by_op: dict[int, Placement] = {}
    several: defaultdict[int, list[Placement]] = defaultdict(list)
    for kernel, placement in zip(kernels, placements, strict=True):
        if kernel.ops[0] in by_op:
            several[kernel.ops[0]].append(placement)
        else:
            by_op[kernel.ops[0]] = placement
    for index, others in several.items():
        by_op[index] = _in_turn((by_op[index], *others))
    return by_op


def _in_turn(placements: Sequence[Placement]) -> Placement:
    longest = max(placements, key=lambda placement: placement.seconds)
    lanes = functools.reduce(lambda a, b: a + b, (placement.lanes for placement in placements))
    return Placement(
        lanes=lanes,
        seconds=fsum(placement.seconds for placement in placements),
        bound=longest.bound,
        intensity=longest.intensity,
        ridge=next((placement.ridge for placement in placements if placement.ridge), None),
        unrated=tuple(dict.fromkeys(name for placement in placements for name in placement.unrated)),
        widened={asked: used for placement in placements for asked, used in placement.widened.items()},
    )


def _ops(
    graph: Graph, costs: Sequence[Cost], placements: dict[int, Placement]
) -> tuple[tuple[OpAnalysis, ...], dict[Role, tuple[int, int]]]:
    """Every op's analysis, and bytes (read, written) by role over all of them."""
    totals: dict[Role, list[int]] = {role: [0, 0] for role in Role}
    known: dict[tuple[object, ...], tuple[dict[Role, tuple[int, int]], dict[str, Any]]] = {}
    ops: list[OpAnalysis] = []
    for index, (op, kind, cost) in enumerate(zip(graph.ops, graph.kinds, costs, strict=True)):
        placement = placements.get(index, _NOWHERE)
        # ops of one kind differ where work was moved into a kernel or a branch was dropped, which the status shows
        key = (kind, id(placement), cost.status, cost.note)
        if key not in known:
            roles = bytes_by_role(graph, cost)
            known[key] = roles, _measures(graph, op, cost, placement, roles)
        roles, measures = known[key]
        for role, (read, written) in roles.items():
            totals[role][0] += op.repeat * read
            totals[role][1] += op.repeat * written
        ops.append(_op(op, measures))
    return tuple(ops), {role: (read, written) for role, (read, written) in totals.items()}


def coverage(phases: Iterable[PhaseAnalysis]) -> Coverage:
    """Coverage over all phases of a run."""
    counts: Counter[Status] = Counter()
    unpriced: dict[str, UnpricedOp] = {}
    for phase in phases:
        for op in phase.ops:
            counts[op.status] += 1
            if op.status is Status.UNPRICED:
                known = unpriced.get(op.target)
                unpriced[op.target] = UnpricedOp(
                    target=op.target,
                    count=(known.count if known else 0) + 1,
                    bytes=(known.bytes if known else 0) + op.bytes_read + op.bytes_written,
                    example=known.example if known else (f"{op.file}:{op.line}" if op.file else op.name),
                )
    total = sum(counts.values())
    understood = counts[Status.PRICED] + counts[Status.FREE]
    return Coverage(
        fraction=understood / total if total else 1.0,
        priced=counts[Status.PRICED],
        free=counts[Status.FREE],
        unpriced=tuple(sorted(unpriced.values(), key=lambda u: (-u.bytes, u.target))),
    )


def _phase(
    graph: Graph,
    gpu: Gpu,
    costs: Sequence[Cost],
    ops: tuple[OpAnalysis, ...],
    by_role: dict[Role, tuple[int, int]],
    executions: Executions,
    execution: str,
    kernels: Sequence[Kernel],
    placements: Sequence[Placement],
) -> PhaseAnalysis:
    bound, estimate = executions.of(execution).bound, executions.of(execution).estimate
    least = floor(graph, costs, gpu)
    read, written = (sum(pair[i] for pair in by_role.values()) for i in (0, 1))
    total = read + written
    work = [(op.repeat, cost) for op, cost in zip(graph.ops, costs, strict=True) if cost.status is not Status.FREE]
    executed = fsum(n * c.executed_matmul_flops for n, c in work)
    vector = fsum(n * c.vector_flops for n, c in work)
    shares: defaultdict[str, float] = defaultdict(float)
    in_memory: list[float] = []
    for kernel, placement in zip(kernels, placements, strict=True):
        shares[placement.bound.value] += kernel.repeat * placement.seconds
        in_memory.append(kernel.repeat * placement.lanes.memory)
    matmuls: defaultdict[tuple[str, bool], float] = defaultdict(float)
    for repeat, cost in work:
        for dtype, flops in cost.matmul.items():
            matmuls[dtype, cost.tf32] += repeat * flops
    main = max(matmuls, key=lambda key: matmuls[key], default=None)
    rate = gpu.matmul_rate(main[0], tf32=main[1]) if main else None
    on_bus = executions.of(execution).bytes_hbm / gpu.memory_bandwidth
    return PhaseAnalysis(
        name=graph.phase,
        tokens=graph.tokens,
        seconds=Times(floor=least.seconds, bound=bound, estimate=estimate),
        execution=execution,
        turns=graph.turns,
        flops=FlopTotals(
            matmul=fsum(n * c.matmul_flops for n, c in work),
            matmul_executed=executed,
            vector=vector,
            special=fsum(n * c.special for n, c in work),
        ),
        bytes=ByteTotals(
            total=total,
            read=read,
            written=written,
            **{role.value: sum(by_role[role]) for role in Role},
        ),
        floor=least,
        intensity=(executed + vector) / total if total else 0.0,
        ridge=rate.flops_per_second / gpu.memory_bandwidth if rate else None,
        matmul_path=f"{rate.unit} {rate.dtype}" if rate else "",
        bound=Bound(max(shares, key=lambda key: shares[key], default="free")) if bound else Bound.FREE,
        bound_share={key: value / bound for key, value in sorted(shares.items()) if value} if bound else {},
        mfu=least.compute_seconds / bound if bound else 0.0,
        mbu=fsum(in_memory) / bound if bound else 0.0,
        mfu_estimate=least.compute_seconds / estimate if estimate else 0.0,
        mbu_estimate=on_bus / estimate if estimate else 0.0,
        tokens_per_second=graph.new_tokens / bound if bound else 0.0,
        ops=ops,
        executions=executions,
    )


def _measures(
    graph: Graph, op: Op, cost: Cost, placement: Placement, roles: dict[Role, tuple[int, int]]
) -> dict[str, Any]:
    """What ops of one kind have in common."""
    times = op.repeat
    dtype = next(iter(cost.matmul), None) or (graph.tensors[op.outputs[0]].dtype if op.outputs else "")
    return {
        "target": op.target,
        "status": cost.status,
        "shape": _shape(graph, op),
        "dtype": dtype,
        "flops": float(times * (cost.matmul_flops + cost.vector_flops)),
        "flops_executed": float(times * (cost.executed_matmul_flops + cost.vector_flops)),
        "special": float(times * cost.special),
        "bytes_read": times * sum(read for read, _ in roles.values()),
        "bytes_written": times * sum(written for _, written in roles.values()),
        "intensity": placement.intensity,
        "ridge": placement.ridge,
        "bound": placement.bound,
        "seconds": times * placement.seconds,
        "lanes": placement.lanes.times(op.repeat),
        "backend": cost.backend,
        "note": "; ".join(filter(None, (cost.note, _unrated(placement), _widened(placement)))),
        "repeat": times,
    }


def _op(op: Op, measures: dict[str, Any]) -> OpAnalysis:
    anchor, inner = op.anchor, op.span
    outside = inner is not None and inner != anchor
    return OpAnalysis(
        name=op.name,
        module=op.module,
        file=anchor.file if anchor else "",
        line=anchor.line if anchor else 0,
        library_file=inner.file if outside and inner else "",
        library_line=inner.line if outside and inner else 0,
        **measures,
    )


_NOWHERE = Placement(lanes=Lanes(), seconds=0.0, bound=Bound.FREE, intensity=0.0, ridge=None)


def _shape(graph: Graph, op: Op) -> str:
    given = ", ".join([_sizes(graph.tensors[i].shape) for i in op.inputs[:3]]) + (", ..." if len(op.inputs) > 3 else "")
    return f"{given} -> {_sizes(graph.tensors[op.outputs[0]].shape)}" if op.outputs else given


@functools.lru_cache(maxsize=4096)
def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _unrated(placement: Placement) -> str:
    return f"no published rate for {', '.join(placement.unrated)}" if placement.unrated else ""


def _widened(placement: Placement) -> str:
    return ", ".join(f"{asked} computed as {used}" for asked, used in placement.widened.items())
