"""Everything known about one phase on one GPU, without opinions. These dataclasses are also the JSON report's shape."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum

from ..hardware.gpu import Gpu
from .cost import Cost, Status, bytes_by_role
from .floor import Floor, floor
from .graph import Graph, Op, Role
from .kernels import eager_kernels
from .pricing import price
from .roofline import Bound, Lanes, Placement, place


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds.

    Attributes:
        floor: no implementation of the phase is faster.
        bound: no run of these kernels from device memory is faster.
    """

    floor: float
    bound: float


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
    """One op of the graph on the roofline; in a loop, all its turns together.

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
        bytes_read: bytes from device memory.
        bytes_written: bytes to device memory.
        intensity: executed FLOPs per byte.
        ridge: intensity where arithmetic takes over from memory; None where the part publishes no rate.
        bound: `memory`, `compute`, `special`, `latency` or `free`.
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
        seconds: floor and bound.
        flops: work.
        bytes: traffic.
        floor: what the floor is made of.
        intensity: executed FLOPs per byte over the phase.
        ridge: that of the dtype with most matmul work.
        matmul_path: unit and dtype whose peak makes that ridge, such as `tensor bfloat16`; empty where there is none.
        bound: class that most of the time is spent in.
        bound_share: share of the bound's time by class.
        mfu: share of the matmul peak reached when running at the bound.
        mbu: share of the memory bandwidth used when running at the bound.
        tokens_per_second: new tokens per second at the bound; 0 for non-token models. In prefill prompt tokens.
        ops: every op of every layer, in order.
    """

    name: str
    tokens: int
    seconds: Times
    flops: FlopTotals
    bytes: ByteTotals
    floor: Floor
    intensity: float
    ridge: float | None
    bound: Bound
    bound_share: dict[str, float]
    mfu: float
    mbu: float
    tokens_per_second: float
    ops: tuple[OpAnalysis, ...]
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


def analyze_phase(graph: Graph, gpu: Gpu) -> tuple[PhaseAnalysis, tuple[Cost, ...]]:
    """Price a graph on a GPU and place every op on its roofline."""
    costs = price(graph, gpu)
    by_role: dict[Role, tuple[int, int]] = dict.fromkeys(Role, (0, 0))
    placements: dict[int, tuple[Placement, int, int]] = {}
    alike: dict[tuple[object, ...], Placement] = {}
    for kernel in eager_kernels(graph, costs):
        roles = bytes_by_role(graph, kernel.cost)
        for role, (read, written) in roles.items():
            before = by_role[role]
            by_role[role] = (before[0] + kernel.repeat * read, before[1] + kernel.repeat * written)
        read, written = (sum(pair[i] for pair in roles.values()) for i in (0, 1))
        cost = kernel.cost
        work = (*cost.matmul.items(), cost.tf32, *cost.vector.items(), cost.special, read, written)
        if work not in alike:  # layers are
            alike[work] = place(cost, read, written, gpu)
        placements[kernel.ops[0]] = (alike[work], read, written)
    ops = tuple(_op(graph, op, costs[i], placements.get(i)) for i, op in enumerate(graph.ops))
    return _phase(graph, gpu, costs, ops, by_role), costs


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
) -> PhaseAnalysis:
    bound = fsum(op.seconds for op in ops)
    least = floor(graph, costs, gpu)
    read, written = (sum(pair[i] for pair in by_role.values()) for i in (0, 1))
    total = read + written
    work = [(op.repeat, cost) for op, cost in zip(graph.ops, costs, strict=True) if cost.status is not Status.FREE]
    executed = fsum(n * c.executed_matmul_flops for n, c in work)
    vector = fsum(n * c.vector_flops for n, c in work)
    shares: Counter[str] = Counter()
    for op in ops:
        shares[op.bound.value] += op.seconds  # type: ignore[assignment]  # Counter counts seconds here
    matmuls: Counter[tuple[str, bool]] = Counter()
    for repeat, cost in work:
        for dtype, flops in cost.matmul.items():
            matmuls[dtype, cost.tf32] += repeat * flops  # type: ignore[assignment]  # Counter counts FLOPs here
    main = max(matmuls, key=lambda key: matmuls[key], default=None)
    rate = gpu.matmul_rate(main[0], tf32=main[1]) if main else None
    return PhaseAnalysis(
        name=graph.phase,
        tokens=graph.tokens,
        seconds=Times(floor=least.seconds, bound=bound),
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
        mbu=fsum(op.lanes.memory for op in ops) / bound if bound else 0.0,
        tokens_per_second=graph.new_tokens / bound if bound else 0.0,
        ops=ops,
    )


def _op(graph: Graph, op: Op, cost: Cost, placed: tuple[Placement, int, int] | None) -> OpAnalysis:
    placement, read, written = placed or (_NOWHERE, 0, 0)
    anchor, inner = op.anchor, op.span
    times = op.repeat
    outside = inner is not None and inner != anchor
    dtype = next(iter(cost.matmul), None) or (graph.tensors[op.outputs[0]].dtype if op.outputs else "")
    return OpAnalysis(
        name=op.name,
        target=op.target,
        module=op.module,
        file=anchor.file if anchor else "",
        line=anchor.line if anchor else 0,
        library_file=inner.file if outside and inner else "",
        library_line=inner.line if outside and inner else 0,
        status=cost.status,
        shape=_shape(graph, op),
        dtype=dtype,
        flops=float(times * (cost.matmul_flops + cost.vector_flops)),
        flops_executed=float(times * (cost.executed_matmul_flops + cost.vector_flops)),
        special=float(times * cost.special),
        bytes_read=times * read,
        bytes_written=times * written,
        intensity=placement.intensity,
        ridge=placement.ridge,
        bound=placement.bound,
        seconds=times * placement.seconds,
        lanes=placement.lanes.times(op.repeat),
        backend=cost.backend,
        note="; ".join(filter(None, (cost.note, _unrated(placement), _widened(placement)))),
        repeat=times,
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
