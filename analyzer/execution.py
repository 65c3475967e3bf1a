"""Kernels on a GPU, one after the other: what each must take (bound) and what it is likely to take (estimate).

These dataclasses are part of the JSON report.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum

from ..hardware.gpu import Gpu
from .cost import Cost
from .estimate import Busy, Derating, Launch, busy, queued
from .graph import Graph, Role
from .kernels import Kernel
from .l2 import Kept, Touch, fold, kept_at_best, kept_by_reuse
from .roofline import Bound, Placement, place


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTimes:
    """Seconds of a kernel, all its turns together."""

    bound: float
    estimate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelAnalysis:
    """One launch, or the turns of one in a loop.

    Attributes:
        name: what it does.
        ops: names of the graph's ops that it computes.
        flops: FLOPs executed.
        bytes_hbm: bytes that are likely to cross the memory bus: those of the estimate.
        bytes_l2: bytes read and written, those that the cache serves included.
        seconds: bound and estimate.
        bound: what limits it: `memory`, `compute`, `special`, `link`; `latency` where launch and latency are more than
            half of the estimate.
    """

    name: str
    ops: tuple[str, ...]
    flops: float
    bytes_hbm: float
    bytes_l2: int
    seconds: KernelTimes
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One way of running a phase.

    Attributes:
        bound: seconds; no run of these kernels is faster.
        estimate: seconds that a run is likely to take.
        bytes_hbm: bytes that are likely to cross the memory bus: those of the estimate.
        bytes_l2: bytes read and written, those that the cache serves included.
        estimate_share: share of the estimate by class.
        kernels: in order.
    """

    bound: float
    estimate: float
    bytes_hbm: float
    bytes_l2: int
    estimate_share: dict[str, float]
    kernels: tuple[KernelAnalysis, ...]


@dataclass(frozen=True, slots=True)
class Executed:
    """An execution, and the placement of each of its kernels."""

    execution: Execution
    placements: tuple[Placement, ...]


def execute(graph: Graph, kernels: Sequence[Kernel], gpu: Gpu, reached: Derating, *, eager: bool) -> Executed:
    """Run kernels one after the other.

    Args:
        graph: the phase.
        kernels: its kernels in the order they are launched.
        gpu: the part.
        reached: what it reaches, for the estimate.
        eager: true where the host launches each op from Python; else launches are recorded in a CUDA graph.
    """
    loads = _loads(graph, kernels)
    folded = fold([load.touches for load in loads], [load.kind for load in loads])
    typical = [(kernels[i], loads[i]) for i in folded.kept]
    # the others gain nothing by what is found in the cache
    useful = [place(kernel.cost, load.moved, load.moved, gpu).bound is Bound.MEMORY for kernel, load in typical]
    most = gpu.cache_bytes or 0
    placed = [
        _Timed.of(kernel, load, best, likely, most, gpu, reached)
        for (kernel, load), best, likely in zip(
            typical, kept_at_best(folded, most, useful), kept_by_reuse(folded, reached.l2_bytes.value), strict=True
        )
    ]
    timed = [placed[i] for i in folded.source]
    again = [False, *(a.ops == b.ops for a, b in pairwise(kernels))][: len(kernels)]
    times = queued(_launches(kernels, [t.busy.seconds for t in timed], again, reached, eager=eager))
    names = [op.name for op in graph.ops]
    analyses = tuple(
        [
            KernelAnalysis(
                name=kernel.name,
                ops=tuple([names[i] for i in kernel.ops]),
                flops=on.flops,
                bytes_hbm=on.bytes_hbm,
                bytes_l2=on.bytes_l2,
                seconds=KernelTimes(bound=on.bound, estimate=seconds),
                bound=Bound.LATENCY if seconds > 2 * on.lane else on.limit,
            )
            for kernel, on, seconds in zip(kernels, timed, times, strict=True)
        ]
    )
    return Executed(
        Execution(
            bound=fsum([t.bound for t in timed]),
            estimate=fsum(times),
            bytes_hbm=fsum([t.bytes_hbm for t in timed]),
            bytes_l2=sum([t.bytes_l2 for t in timed]),
            estimate_share=_shares(analyses),
            kernels=analyses,
        ),
        tuple([t.placement for t in timed]),
    )


def _launches(
    kernels: Sequence[Kernel], busy: Sequence[float], again: Sequence[bool], reached: Derating, *, eager: bool
) -> list[Launch]:
    """The kernels as they are queued; a value that is read back cuts a CUDA graph in two, each launched by the host."""
    launches: list[Launch] = []
    waited = False
    for index, kernel in enumerate(kernels):
        waits = kernel.cost.waits
        if eager:
            host = reached.launch_again.value if again[index] else reached.launch.value
        else:
            host = reached.launch.value if waits or waited else 0.0
        launches.append(Launch(busy[index], host, kernel.repeat, reached.read_back.value if waits else None))
        waited = waits
    return launches


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """A kernel on the GPU; all but `placement` and `busy` for all its turns together.

    `lane` is the time of the slowest lane in the estimate, `limit` that lane's class.
    """

    placement: Placement
    busy: Busy
    bound: float
    lane: float
    limit: Bound
    flops: float
    bytes_hbm: float
    bytes_l2: int

    @staticmethod
    def of(
        kernel: Kernel, load: "_Load", best: Kept, likely: Kept, cache: int, gpu: Gpu, reached: Derating
    ) -> "_Timed":
        cost, times = kernel.cost, kernel.repeat
        placement = place(cost, load.moved, sum(load.from_memory(best, cache, times)), gpu)
        read, written = load.from_memory(likely, reached.l2_bytes.value, times, expected=True)
        took = busy(cost, read, written, load.moved + load.extra, gpu, reached)
        lane, limit = took.lanes.slowest
        return _Timed(
            placement=placement,
            busy=took,
            bound=times * placement.seconds,
            lane=times * lane,
            limit=limit,
            flops=float(times * (cost.executed_matmul_flops + cost.vector_flops)),
            bytes_hbm=times * (read + written),
            bytes_l2=times * (load.moved + load.extra),
        )


def _shares(kernels: Sequence[KernelAnalysis]) -> dict[str, float]:
    seconds: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        seconds[kernel.bound.value] += kernel.seconds.estimate
    whole = fsum(seconds.values())
    return {name: value / whole for name, value in sorted(seconds.items()) if value}


@dataclass(frozen=True, slots=True)
class _Load:
    """What one turn of a kernel moves.

    Attributes:
        kind: equal for kernels of equal cost and equal touches.
        touches: bytes by buffer.
        read: bytes read in all.
        written: bytes written in all.
        inside: bytes among each of those that go through a buffer of the kernel's own.
        extra: bytes that are read on average beyond `read`.
    """

    kind: int
    touches: tuple[Touch, ...]
    read: int
    written: int
    inside: tuple[int, int]
    extra: int

    @property
    def moved(self) -> int:
        return self.read + self.written

    def from_memory(self, kept: Kept, cache: float, repeat: int, *, expected: bool = False) -> tuple[float, float]:
        """Bytes a turn read from and written to device memory; a loop finds in the cache what fits of its last turn."""
        more = self.extra if expected else 0
        read = self.read + more - kept.read - min(self.inside[0], cache)
        written = self.written - kept.written - min(self.inside[1], cache)
        if repeat == 1:
            return max(0.0, read), max(0.0, written)
        moved = self.moved + more
        again = max(0.0, moved - cache) * (repeat - 1) / repeat
        share = (self.read + more) / moved if moved else 0.0
        return max(0.0, read) / repeat + again * share, max(0.0, written) / repeat + again * (1 - share)


def _loads(graph: Graph, kernels: Sequence[Kernel]) -> list[_Load]:
    buffers = _Buffers(graph, kernels)
    work = _Work()
    kinds: dict[object, int] = {}
    loads: list[_Load] = []
    own = _Own(-1)
    for index, kernel in enumerate(kernels):
        cost = kernel.cost
        moved: dict[int, list[int]] = {}
        extra = 0
        for access in cost.traffic:
            if access.expected_read is not None:
                extra += max(0, access.expected_read - access.read)
            for buffer, share in buffers.behind[access.tensor]:
                read = access.read if share == 1.0 else int(access.read * share)
                written = access.written if share == 1.0 else int(access.written * share)
                if buffer in moved:
                    moved[buffer][0] = min(moved[buffer][0] + read, buffers.sizes[buffer])
                    moved[buffer][1] += written
                else:
                    moved[buffer] = [read, written]
        inside = (0, 0)
        if cost.scratch_read or cost.scratch_written:
            inside = own.touch(kernels, index, moved)
        lasting = buffers.lasting
        touches = tuple([Touch(buffer, r, w, buffer in lasting) for buffer, (r, w) in moved.items()])
        sizes = tuple([size for sizes in moved.values() for size in sizes])
        read, written = sum(sizes[::2]) + inside[0], sum(sizes[1::2]) + inside[1]
        kind = (work.of(cost), sizes, inside, extra, kernel.repeat)
        loads.append(_Load(kinds.setdefault(kind, len(kinds)), touches, read, written, inside, extra))
    return loads


class _Work:
    """Numbers for what kernels compute, equal where it is equal."""

    def __init__(self) -> None:
        self.by_identity: dict[tuple[object, ...], int] = {}
        self.by_value: dict[tuple[object, ...], int] = {}

    def of(self, cost: Cost) -> int:
        # ops of one kind share these mappings, which costs keep alive
        shared = (
            id(cost.matmul), id(cost.vector), id(cost.gemms), id(cost.attended), cost.special, cost.tf32, cost.backend,
            cost.quantises,
        )  # fmt: skip
        known = self.by_identity.get(shared)
        if known is None or cost.exchange:
            value = (
                *cost.matmul.items(), None, *cost.vector.items(), cost.special, cost.tf32, cost.backend, cost.gemms,
                cost.attended, cost.exchange, cost.quantises,
            )  # fmt: skip
            known = self.by_identity[shared] = self.by_value.setdefault(value, len(self.by_value))
        return known


class _Own:
    """Buffers that ops allocate for themselves, handed from one of their kernels to the next."""

    def __init__(self, first: int) -> None:
        self.next = first
        self.made: list[list[int]] = []
        self.ops: tuple[int, ...] = ()

    def touch(self, kernels: Sequence[Kernel], index: int, moved: dict[int, list[int]]) -> tuple[int, int]:
        """Note what a kernel reads and writes of them; returns what stays inside the kernel."""
        kernel = kernels[index]
        if kernel.ops != self.ops:
            self.ops, self.made = kernel.ops, []
        wanted = kernel.cost.scratch_read
        for made in reversed(self.made):
            taken = min(wanted, made[1])
            if taken:
                moved[made[0]] = [taken, 0]
                wanted -= taken
        written = kernel.cost.scratch_written
        if written and index + 1 < len(kernels) and kernels[index + 1].ops == kernel.ops:
            moved[self.next] = [0, written]
            self.made.append([self.next, written])
            self.next -= 1
            written = 0
        return wanted, written


_LASTING = frozenset({Role.WEIGHT, Role.KV_CACHE, Role.OUTPUT})


class _Buffers:
    """Which stretches of memory tensors lie in: a storage, or parts of one that do not overlap."""

    def __init__(self, graph: Graph, kernels: Sequence[Kernel]) -> None:
        used = dict.fromkeys(access.tensor for kernel in kernels for access in kernel.cost.traffic)
        self.sizes = {index: storage.nbytes for index, storage in enumerate(graph.storages)}
        slices: defaultdict[int, dict[tuple[int, int], int]] = defaultdict(dict)
        places: dict[int, tuple[int, int]] = {}
        for index in used:
            tensor = graph.tensors[index]
            touched = tensor.touched_bytes
            if touched < self.sizes[tensor.storage]:
                places[index] = (tensor.offset, touched)
                slices[tensor.storage][places[index]] = touched
        apart: dict[int, dict[tuple[int, int], int]] = {}
        for storage, found in slices.items():
            if len(found) > 1 and sum(found.values()) <= self.sizes[storage]:
                apart[storage] = {place: len(self.sizes) + order for order, place in enumerate(found)}
                self.sizes.update({buffer: place[1] for place, buffer in apart[storage].items()})
        kept = {graph.tensors[index].storage for index in (*graph.inputs, *graph.outputs)}
        kept |= {index for index, storage in enumerate(graph.storages) if storage.role in _LASTING}
        self.lasting = kept | {buffer for storage in kept & apart.keys() for buffer in apart[storage].values()}
        self.behind: dict[int, tuple[tuple[int, float], ...]] = {}
        for index in used:
            storage = graph.tensors[index].storage
            if storage not in apart:
                self.behind[index] = ((storage, 1.0),)
            elif index in places:
                self.behind[index] = ((apart[storage][places[index]], 1.0),)
            else:
                whole = self.sizes[storage]
                shares = [(buffer, place[1] / whole) for place, buffer in apart[storage].items()]
                rest = 1.0 - sum(share for _, share in shares)
                self.behind[index] = (*shares, *(((storage, rest),) if rest > 0 else ()))
