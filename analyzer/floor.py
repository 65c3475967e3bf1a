"""The floor of a phase: what any implementation of it must move and compute, in steady state.

Weights touched, cache read, new cache rows and results written, inputs read, each once, less what the GPU's caches can
keep from the step before; and every necessary matmul FLOP once. What the program does beyond that (copies,
intermediates, growing the cache by concatenation) is not in the floor.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..hardware.gpu import Gpu
from .cost import Cost, operator_name
from .graph import Arg, Graph, Op, Role, TensorRef

# ops that only move data: what they return is as new as what they were given
_COPIES = frozenset(
    {
        "aten.clone", "aten.contiguous", "aten.to", "aten._to_copy", "aten.reshape", "aten.flatten", "aten.copy",
        "aten.expand_copy", "aten.slice_copy", "aten.narrow_copy", "aten.detach_copy", "aten.lift_fresh_copy",
        "aten.roll", "aten.index_select", "aten.repeat_interleave", "aten.type_as",
        "fxroof.to_host", "fxroof.to_device",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Compulsory traffic in bytes and the seconds it and the matmuls take at the vendor's peaks."""

    weight_bytes: int
    cache_read_bytes: int
    cache_written_bytes: int
    input_bytes: int
    output_bytes: int
    kept_on_chip_bytes: int
    memory_seconds: float
    compute_seconds: float

    @property
    def total_bytes(self) -> int:
        """Bytes that must cross the memory bus in a step."""
        moved = (
            self.weight_bytes + self.cache_read_bytes + self.cache_written_bytes + self.input_bytes + self.output_bytes
        )
        return moved - self.kept_on_chip_bytes

    @property
    def seconds(self) -> float:
        """Time that no implementation of the phase can beat."""
        return max(self.memory_seconds, self.compute_seconds)


def floor(graph: Graph, costs: Sequence[Cost], gpu: Gpu) -> Floor:
    """The floor of a phase on a GPU; `costs` are those of the graph's ops, in order.

    What lies on a branch of a condition is left out: a run may take the other.
    """
    compulsory = [(op.repeat, cost) for op, cost in zip(graph.ops, costs, strict=True) if not op.branch]
    costs = [cost for _, cost in compulsory]
    makers = _makers(graph)
    reads = _distinct_reads(graph, costs)
    weights = sum(n for s, n in reads.items() if graph.storages[s].role is Role.WEIGHT)
    inputs = sum(n for s, n in reads.items() if graph.storages[s].role is Role.INPUT)
    # only what was there before the step must be read: a cache grown in it is made of that and of new rows
    old = _read_before_written(graph, costs)
    cache = sum(n for s, n in old.items() if s not in makers)
    cache_read = int(cache * graph.cache_fill)
    fresh = _fresh_outputs(graph, makers)
    cache_written = _written_in_place(graph, costs, makers) + fresh[Role.KV_CACHE]
    written = sum(fresh.values()) - fresh[Role.KV_CACHE]
    moved = weights + inputs + cache_read + cache_written + written
    kept = min(gpu.cache_bytes or 0, moved)
    compute = 0.0
    for repeat, cost in compulsory:
        for dtype, flops in cost.matmul.items():
            rate = gpu.matmul_rate(dtype, tf32=cost.tf32)
            compute += repeat * flops / rate.flops_per_second if rate else 0.0
    return Floor(
        weight_bytes=weights,
        cache_read_bytes=cache_read,
        cache_written_bytes=cache_written,
        input_bytes=inputs,
        output_bytes=written,
        kept_on_chip_bytes=kept,
        memory_seconds=(moved - kept) / gpu.memory_bandwidth,
        compute_seconds=compute,
    )


def _distinct_reads(graph: Graph, costs: Sequence[Cost]) -> dict[int, int]:
    """Bytes of each storage read at all, however many ops read them."""
    by_tensor: dict[int, int] = {}
    for cost in costs:
        for access in cost.traffic:
            by_tensor[access.tensor] = max(by_tensor.get(access.tensor, 0), access.read)
    by_storage: dict[int, int] = {}
    for tensor, read in by_tensor.items():
        storage = graph.tensors[tensor].storage
        by_storage[storage] = min(by_storage.get(storage, 0) + read, graph.storages[storage].nbytes)
    return by_storage


def _read_before_written(graph: Graph, costs: Sequence[Cost]) -> dict[int, int]:
    """Bytes of each part of the cache that are read, rows that the step itself wrote before left out."""
    written: Counter[int] = Counter()
    read: dict[int, dict[int, int]] = {}
    caches = {index for index, storage in enumerate(graph.storages) if storage.role is Role.KV_CACHE}
    within = {index for index, tensor in enumerate(graph.tensors) if tensor.storage in caches}
    for cost in costs:
        touched = [access for access in cost.traffic if access.tensor in within]
        for access in touched:
            storage = graph.tensors[access.tensor].storage
            known = read.setdefault(storage, {})
            known[access.tensor] = max(known.get(access.tensor, 0), access.read - written[storage])
        for access in touched:
            written[graph.tensors[access.tensor].storage] += access.written
    return {s: min(sum(max(0, n) for n in by.values()), graph.storages[s].nbytes) for s, by in read.items()}


def _makers(graph: Graph) -> dict[int, Op]:
    """The op that made each storage of the step's own."""
    makers: dict[int, Op] = {}
    given = {graph.tensors[i].storage for i in graph.inputs}
    for op in graph.ops:
        if not graph.is_view(op):
            taken = {graph.tensors[i].storage for i in op.inputs}
            for tensor in op.outputs:
                storage = graph.tensors[tensor].storage
                if storage not in taken and storage not in given:
                    makers.setdefault(storage, op)
    return makers


def _written_in_place(graph: Graph, costs: Sequence[Cost], makers: Mapping[int, Op]) -> int:
    by_storage: dict[int, int] = {}
    for cost in costs:
        for access in cost.traffic:
            storage = graph.tensors[access.tensor].storage
            if access.written and graph.storages[storage].role is Role.KV_CACHE and storage not in makers:
                written = by_storage.get(storage, 0) + access.written
                by_storage[storage] = min(written, graph.storages[storage].nbytes)
    return sum(by_storage.values())


def _fresh_outputs(graph: Graph, makers: Mapping[int, Op]) -> Counter[Role]:
    """Bytes of the results that were computed in this step, by role: a cache grown by one row counts that row."""
    fresh: Counter[Role] = Counter()
    seen: set[int] = set()
    for tensor in graph.outputs:
        storage = graph.tensors[tensor].storage
        if storage not in seen:
            seen.add(storage)
            fresh[graph.storages[storage].role] += _fresh(graph, makers, tensor)
    return fresh


def _fresh(graph: Graph, makers: Mapping[int, Op], tensor: int) -> int:
    whole = graph.tensors[tensor].touched_bytes
    storage = graph.tensors[tensor].storage
    op = makers.get(storage)
    if op is None:
        return 0  # an input or a weight handed back
    operator = operator_name(op.target)
    if operator == "aten.cat":
        return min(whole, sum(_fresh(graph, makers, i) for i in _refs(op.args.get("tensors"))))
    source = op.args.get("self", op.args.get("input"))
    if operator in _COPIES and isinstance(source, TensorRef):
        return min(whole, _fresh(graph, makers, source.tensor))
    return whole


def _refs(value: Arg) -> list[int]:
    return [v.tensor for v in value if isinstance(v, TensorRef)] if isinstance(value, tuple) else []
