"""What must fit in device memory: weights, KV cache, activations, and what CUDA takes for itself. Pure arithmetic.

Weights and cache are there at once; the activations added to them are the most that one phase needs at any moment, by
liveness over its ops. The cache is counted at the end of the generation, when it is largest.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from math import ceil, prod

from ..hardware.gpu import Gpu
from .cost import Cost
from .graph import Graph, Op, Role
from .scenario import Scenario

BLOCK = 512
"""Bytes to which PyTorch's CUDA caching allocator rounds every tensor (kMinBlockSize)."""

_MEBI = 2**20
_CONTEXT = 512 * _MEBI
"""Bytes a process's CUDA context and loaded kernels take before the first tensor.

Lazily loaded (the default since CUDA 11.7) PyTorch maintainers and users report 274 to 426 MiB: pytorch #86509, #107667
and #109888, unsloth-zoo #1053; the kernels that a model then calls are loaded on top.
"""

_FURTHEST = 2**40

_RESIDENT = (Role.WEIGHT, Role.CONSTANT)
"""Roles of what is there as long as the model is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePart:
    """Cache tensors of one kind, and how their size follows from the batch and the context.

    Attributes:
        count: how many there are, usually one or two a layer.
        fixed_bytes: bytes a sequence whatever the context; below 0 where a cache holds less than the context.
        bytes_per_token: further bytes a sequence for each token of context.
        tokens_at_most: context beyond which it stays as it is: a window; None where none was seen.
        batched: false where its size does not follow the batch.
    """

    count: int
    fixed_bytes: int
    bytes_per_token: float
    tokens_at_most: int | None = None
    batched: bool = True

    def nbytes(self, batch_size: int, context_len: int) -> int:
        """Bytes of these tensors: batch x (fixed + per token x min(context, window))."""
        tokens = context_len if self.tokens_at_most is None else min(context_len, self.tokens_at_most)
        each = max(0, round(self.fixed_bytes + self.bytes_per_token * tokens))
        return self.count * each * (batch_size if self.batched else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGrowth:
    """The KV cache of one GPU as a formula of batch and context, measured on the tensors that the model itself makes.

    Attributes:
        parts: cache tensors by kind.
        measured_to: longest context that was measured; windows beyond it are not known.
        in_place: true where a step replaces the tensors inside the cache it was given, so that an old tensor goes when
            its successor is made; false where the caller keeps the old cache until the step returns a new one.
        shards: GPUs over which the cache is cut; 1 where one GPU, or every GPU, holds all of it.
    """

    parts: tuple[CachePart, ...] = ()
    measured_to: int = 0
    in_place: bool = True
    shards: int = 1

    def nbytes(self, batch_size: int, context_len: int) -> int:
        """Bytes of the cache on one GPU when every sequence has `context_len` tokens."""
        return sum(part.nbytes(batch_size, context_len) for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a scenario needs of one GPU's memory, bytes.

    Attributes:
        weights_bytes: parameters and buffers as stored, tied ones once: one GPU's share where several run the model.
        kv_cache_bytes: cache at the end of the generation, `context_len` tokens a sequence.
        activations_bytes: the most that the phases need at one moment beyond weights and cache, inputs and results
            included; also what a cache that grows by copying needs while it is copied.
        overhead_bytes: CUDA context and cuBLAS workspaces: an assumption.
        total_bytes: the sum of these four.
        usable_bytes: device memory that programs can use; None if unknown.
        fits: whether `total_bytes` are at most `usable_bytes`; None if that is unknown.
        headroom_bytes: what is left; below 0 what is missing.
        max_batch_size: largest batch that fits at these lengths; 0 where one sequence does not; None where the cache's
            growth is unknown.
        max_context_len: longest prompt and generation together that fit at this batch; None where memory sets no limit
            or the cache's growth is unknown. The model's own limit of positions is not considered.
        min_gpus: fewest of these GPUs when the weights and cache of the whole model are spread evenly and the rest is
            on each, as large as in this run; None if unknown, or if no number is enough.
        context_len: prompt and generation together.
        activations_phase: phase whose activations are largest; empty where nothing was traced.
    """

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    overhead_bytes: int
    total_bytes: int
    usable_bytes: int | None
    fits: bool | None
    headroom_bytes: int | None
    max_batch_size: int | None
    max_context_len: int | None
    min_gpus: int | None
    context_len: int
    activations_phase: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """Bytes alive at one moment of a phase, weights left out, by how they grow with the tokens of a sequence.

    Attributes:
        fixed: bytes that do not.
        linear: bytes in proportion to the tokens, at the traced length.
        quadratic: bytes in proportion to their square (scores, masks), at the traced length.
        op: the op that was running.
    """

    fixed: int
    linear: int
    quadratic: int
    op: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes at the traced length."""
        return self.fixed + self.linear + self.quadratic

    def at(self, factor: float) -> int:
        """Bytes when sequences are `factor` times as long."""
        return ceil(self.fixed + self.linear * factor + self.quadratic * factor * factor)


def memory(
    graphs: Mapping[str, Graph],
    costs: Mapping[str, Sequence[Cost]],
    gpu: Gpu,
    scenario: Scenario,
    *,
    parameter_bytes: int,
    growth: CacheGrowth | None,
) -> Memory:
    """What the scenario needs of the GPU's memory.

    Args:
        graphs: the phases.
        costs: those of each phase's ops, in order, for the buffers that kernels allocate for themselves.
        gpu: the GPU.
        scenario: batch and lengths that the graphs were traced for.
        parameter_bytes: of the whole model, as stored.
        growth: how the cache grows; None where that is unknown, and the cache is then what the graphs hold.
    """
    context = scenario.input_len + scenario.output_len
    resident = _resident(graphs)
    weights = resident if scenario.gpus > 1 else max(parameter_bytes, resident)
    shards = growth.shards if growth else 1
    held = max((sum(_final_cache(graph).values()) for graph in graphs.values()), default=0)
    cache = held if growth is None else max(growth.nbytes(scenario.batch_size, context), *map(_owned, graphs.values()))
    peaks = {
        name: activation_peaks(graph, costs[name], scenario, in_place=growth is None or growth.in_place)
        for name, graph in graphs.items()
    }
    highest = {name: max((m.nbytes for m in moments), default=0) for name, moments in peaks.items()}
    activations = max(highest.values(), default=0)
    overhead = overhead_bytes(gpu)
    total = weights + cache + activations + overhead
    usable = gpu.memory_usable_bytes
    known = CacheGrowth() if growth is None and not held else growth
    needs = _Needs(weights=weights, overhead=overhead, scenario=scenario, growth=known, peaks=peaks) if known else None
    return Memory(
        weights_bytes=weights,
        kv_cache_bytes=cache,
        activations_bytes=activations,
        overhead_bytes=overhead,
        total_bytes=total,
        usable_bytes=usable,
        fits=None if usable is None else total <= usable,
        headroom_bytes=None if usable is None else usable - total,
        max_batch_size=_largest(needs.of_batch, usable) if needs and usable else None,
        max_context_len=_largest(needs.of_context, usable) if needs and usable else None,
        min_gpus=_fewest_gpus(max(parameter_bytes, weights) + cache * shards, activations + overhead, usable),
        context_len=context,
        activations_phase=max(highest, key=lambda name: highest[name]) if highest else "",
    )


def overhead_bytes(gpu: Gpu) -> int:
    """CUDA context and the workspaces of cuBLAS and cuBLASLt, one of each: an assumption, the same for other vendors.

    Workspaces as PyTorch allocates them for one stream (aten/src/ATen/cuda/CublasHandlePool.cpp, CUDABlas.cpp): 32 MiB
    from Hopper on, 8.125 MiB before; cuBLASLt 32 MiB from Hopper on, at most 4 MiB before.
    """
    major = gpu.compute_capability[0] if gpu.compute_capability else 0
    return _CONTEXT + (64 * _MEBI if major >= 9 or not major else 8 * _MEBI + 128 * 1024 + 4 * _MEBI)


def moments(graph: Graph, costs: Sequence[Cost], *, in_place: bool = True) -> Iterator[Live]:
    """Bytes alive while each op runs: inputs, cache, activations and the op's own buffers; weights left out.

    A storage is allocated by the op that makes it. It is freed when the program let go of it while it was traced, and
    after its last use where that was not seen. What the program was given lives to the end, except a cache updated
    `in_place`, whose tensors go when they are replaced.
    """
    sweep = _sweep(graph, costs, in_place, _Length())
    for op, (fixed, linear, quadratic, cached) in zip(graph.ops, sweep, strict=True):
        yield Live(fixed=fixed + cached, linear=linear, quadratic=quadratic, op=op.name)


def activation_peaks(
    graph: Graph, costs: Sequence[Cost], scenario: Scenario, *, in_place: bool = True
) -> tuple[Live, ...]:
    """The moments of a phase at which most is alive beyond weights and cache, at some length of the sequences.

    Of the cache only what exceeds its size at the end of the phase is counted: old and new at once while it grows.
    """
    kept = sum(_rounded(n) for n in _final_cache(graph).values())
    highest = (-1, -1, -1)
    found: dict[tuple[int, int, int], str] = {}
    sweep = _sweep(graph, costs, in_place, _Length.of(graph, scenario))
    for op, (fixed, linear, quadratic, cached) in zip(graph.ops, sweep, strict=True):
        if cached > kept:
            linear += cached - kept
        if fixed > highest[0] or linear > highest[1] or quadratic > highest[2]:  # else another is above it
            moment = fixed, linear, quadratic
            found.setdefault(moment, op.name)
            highest = max(highest, moment, key=sum)
    return tuple(
        Live(fixed=fixed, linear=linear, quadratic=quadratic, op=found[fixed, linear, quadratic])
        for fixed, linear, quadratic in _undominated(found)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needs:
    """What batches and lengths other than the traced ones need."""

    weights: int
    overhead: int
    scenario: Scenario
    growth: CacheGrowth
    peaks: Mapping[str, tuple[Live, ...]]

    def of_batch(self, batch_size: int) -> int:
        """Bytes in all at these lengths; activations in proportion to the batch."""
        context = self.scenario.input_len + self.scenario.output_len
        share = batch_size / self.scenario.batch_size
        activations = max((moment.nbytes for moments in self.peaks.values() for moment in moments), default=0)
        return self.weights + self.overhead + self.growth.nbytes(batch_size, context) + ceil(activations * share)

    def of_context(self, context_len: int) -> int:
        """Bytes in all at this batch, prompt and generation keeping their proportion."""
        factor = context_len / (self.scenario.input_len + self.scenario.output_len)
        activations = max((moment.at(factor) for moments in self.peaks.values() for moment in moments), default=0)
        cache = self.growth.nbytes(self.scenario.batch_size, context_len)
        return self.weights + self.overhead + cache + activations


def _largest(need: Callable[[int], int], usable: int) -> int | None:
    """The largest number whose need is met; None if there is no limit."""
    if need(1) > usable:
        return 0
    low, high = 1, 2
    while need(high) <= usable:
        low, high = high, 2 * high
        if high > _FURTHEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= usable else (low, middle)
    return low


def _fewest_gpus(spread: int, replicated: int, usable: int | None) -> int | None:
    if usable is None or replicated >= usable:
        return None
    return max(1, -(-spread // (usable - replicated)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Length:
    """How the length of the sequences shows in shapes: a dimension of one of these sizes grows with it.

    Attributes:
        sizes: sizes of a dimension that counts tokens.
        batch_size: sequences.
        widths: sizes that weights also have, so that a last dimension of such a size may be no count of tokens.
    """

    sizes: frozenset[int] = frozenset()
    batch_size: int = 1
    widths: frozenset[int] = frozenset()

    @classmethod
    def of(cls, graph: Graph, scenario: Scenario) -> "_Length":
        """Prompts in prefill, the context in decode, with and without the new token."""
        batch = scenario.batch_size
        whole = graph.tokens // batch if batch else 0
        lengths = {whole} if whole > 1 else {scenario.context_len, scenario.context_len + 1}
        weights = (t for t in graph.tensors if graph.storages[t.storage].role is Role.WEIGHT)
        return cls(
            sizes=frozenset(n * b for n in lengths for b in (1, batch)) - {0, 1},
            batch_size=batch,
            widths=frozenset(size for tensor in weights for size in tensor.shape),
        )

    def power(self, shape: tuple[int, ...]) -> int:
        """How a tensor's size follows the length: 0, 1 or 2. A width that looks like a length is taken for a width."""
        found = sum(size in self.sizes for size in shape)
        if (
            found > 1
            and shape[-1] in self.widths
            and (len(shape) == 2 or (len(shape) == 3 and shape[0] == self.batch_size))
        ):
            found -= 1
        return min(found, 2)

    def scratch_power(self, graph: Graph, op: Op, scratch: int) -> int:
        """The same of an op's own buffers: of as many rows as its first input has, as wide as the length or narrow."""
        given = [graph.tensors[i].shape for i in op.inputs]
        widest = max((size for shape in given for size in shape if size in self.sizes), default=0)
        if not scratch or not widest or not given[0]:
            return 0
        rows = prod(given[0][:-1])
        return min(2, self.power(given[0]) + (scratch >= rows * widest * _LEAST_ITEM))


_WIDENING = frozenset(
    f"aten.{name}.{overload}" for name in ("softmax", "log_softmax") for overload in ("int", "Dimname")
)
"""Operators that may change the type of their input."""

_LEAST_ITEM = 2
"""Bytes of an attention score at least."""


def _sweep(graph: Graph, costs: Sequence[Cost], in_place: bool, length: _Length) -> Iterator[tuple[int, int, int, int]]:
    """While each op runs: bytes alive outside the cache that are fixed, linear and quadratic, and bytes of cache."""
    changes = _changes(graph, in_place, _powers(graph, length))
    during = islice(zip(*map(accumulate, changes), strict=True), 1, len(graph.ops) + 1)
    for op, cost, alive in zip(graph.ops, costs, during, strict=True):
        if cost.scratch_written or op.target in _WIDENING:
            scratch = _rounded(max(cost.scratch_written, _converted(graph, op)))
            now = list(alive)
            now[length.scratch_power(graph, op, scratch)] += scratch
            yield now[0], now[1], now[2], now[3]
        else:
            yield alive


_GIVEN = -1
"""Index of the moment before the first op."""

_CACHE = 3
"""Stands for the cache where other bytes are told apart by the power of the length that they grow with."""


def _changes(graph: Graph, in_place: bool, powers: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """By power and for `_CACHE`: bytes there before the first op, then those that come or, below 0, go with each op."""
    moments = len(graph.ops) + 3  # before, after, and when all is gone
    changes = ([0] * moments, [0] * moments, [0] * moments, [0] * moments)
    for storage, (first, last) in _lifetimes(graph, in_place=in_place).items():
        block = graph.storages[storage]
        of_kind = changes[_CACHE if block.role is Role.KV_CACHE else powers[storage]]
        nbytes = _rounded(block.nbytes)
        of_kind[first + 1] += nbytes
        of_kind[last + 2] -= nbytes
    return changes


def _lifetimes(graph: Graph, *, in_place: bool) -> dict[int, tuple[int, int]]:
    """First and last op of each storage's life, weights left out; from `_GIVEN` to the number of ops."""
    end = len(graph.ops)
    home = [tensor.storage for tensor in graph.tensors]
    given, kept = {home[i] for i in graph.inputs}, {home[i] for i in graph.outputs}
    born = _born(graph, home)
    numbers: dict[str | None, int] = {op.name: index for index, op in enumerate(graph.ops)}
    numbers[""] = end
    lives: dict[int, tuple[int, int]] = {}
    unseen: list[int] = []
    for storage, block in enumerate(graph.storages):
        role, first = block.role, born.get(storage, _GIVEN)
        if role in _RESIDENT or (first != _GIVEN and graph.ops[first].kernel):
            continue
        replaced = in_place and role is Role.KV_CACHE and storage in given
        if storage in kept or (storage in given and not replaced):
            lives[storage] = first, end
        elif (last := numbers.get(block.ends_with)) is not None and (storage in born or replaced):
            lives[storage] = first, max(first, last)
        else:
            unseen.append(storage)
    if unseen:
        used = {home[i]: index for index, op in enumerate(graph.ops) for i in (*op.inputs, *op.outputs)}
        for storage in unseen:
            first = born.get(storage, _GIVEN)
            if storage in used:  # else a rewrite has left it behind
                lives[storage] = first, used[storage] if first != _GIVEN or storage in given else end
    return lives


def _born(graph: Graph, home: Sequence[int]) -> dict[int, int]:
    """By storage, the op that makes it; the others were there before. `home` is the storage of each tensor."""
    born: dict[int, int] = {}
    for index, op in enumerate(graph.ops):
        for tensor in op.outputs:
            storage = home[tensor]
            if storage not in born:
                born[storage] = _GIVEN if storage in map(home.__getitem__, op.inputs) else index
    return born


def _converted(graph: Graph, op: Op) -> int:
    """Bytes of the copy that a softmax to a wider type makes of its input; only float16 to float32 is one CUDA kernel.

    aten/src/ATen/native/SoftMax.cpp, softmax(input, dim, dtype).
    """
    if op.target not in _WIDENING or not op.outputs:
        return 0
    given, made = graph.tensors[op.inputs[0]].dtype, graph.tensors[op.outputs[0]]
    return 0 if given in (made.dtype, "float16") else made.nbytes


def _powers(graph: Graph, length: _Length) -> list[int]:
    """How the size of each storage follows the length, by the largest tensor in it."""
    powers, largest = [0] * len(graph.storages), [0] * len(graph.storages)
    sizes = [storage.nbytes for storage in graph.storages]
    power = functools.cache(length.power)  # layers are alike: few shapes
    for tensor in graph.tensors if length.sizes else ():
        storage = tensor.storage
        if largest[storage] < sizes[storage] and (nbytes := tensor.touched_bytes) > largest[storage]:
            largest[storage] = nbytes
            powers[storage] = power(tensor.shape)
    return powers


def _undominated(moments: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those that can be the highest at some length, of bytes that are fixed, linear and quadratic in it."""
    best: list[tuple[int, int, int]] = []
    for moment in sorted(moments, key=lambda m: (-sum(m), -m[2], -m[1])):
        fixed, linear, quadratic = moment
        if not any(b[0] >= fixed and b[1] >= linear and b[2] >= quadratic for b in best):
            best.append(moment)
    return best


def _final_cache(graph: Graph) -> dict[int, int]:
    """Bytes of cache left at the end of a phase by storage: returned tensors, or buffers that the model owns."""
    returned = {
        graph.tensors[i].storage: graph.tensors[i].touched_bytes
        for i in graph.outputs
        if graph.role(i) is Role.KV_CACHE
    }
    return returned or {s: graph.storages[s].nbytes for s in _cache_storages(graph)}


def _cache_storages(graph: Graph) -> set[int]:
    return {index for index, storage in enumerate(graph.storages) if storage.role is Role.KV_CACHE}


def _owned(graph: Graph) -> int:
    """Bytes of cache buffers that the model allocates once, used or not."""
    given = {graph.tensors[i].storage for i in graph.inputs}
    born = _born(graph, [tensor.storage for tensor in graph.tensors])
    own = (s for s in _cache_storages(graph) - given if born.get(s, _GIVEN) == _GIVEN)
    return sum(graph.storages[s].nbytes for s in own)


def _resident(graphs: Mapping[str, Graph]) -> int:
    """Bytes of parameters and buffers, in whichever phase they show, those that hold the cache left out."""
    found: dict[str, int] = {}
    for graph in graphs.values():
        for storage in graph.storages:
            if storage.role in _RESIDENT:
                found[storage.name] = max(found.get(storage.name, 0), storage.nbytes)
    return sum(found.values())


def _rounded(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
