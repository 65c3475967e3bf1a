"""What must fit in device memory: weights, KV cache, activations, and what CUDA takes for itself. Pure arithmetic.

Weights and cache are there at once; the activations added to them are the most that one phase needs at any moment, by
liveness over its ops. The cache is counted at the end of the generation, when it is largest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

from ..hardware.gpu import Gpu
from .cost import Cost, operator_name
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

    A storage is allocated by the op that makes it. It is freed after its last use, but not before the module that it
    was passed to returns, for a call holds its arguments. What the program was given lives to the end, except a cache
    updated `in_place`, whose tensors go when they are replaced.
    """
    for moment, cached in _moments(graph, costs, in_place, _Length()):
        yield Live(fixed=moment.fixed + cached, linear=moment.linear, quadratic=moment.quadratic, op=moment.op)


def activation_peaks(
    graph: Graph, costs: Sequence[Cost], scenario: Scenario, *, in_place: bool = True
) -> tuple[Live, ...]:
    """The moments of a phase at which most is alive beyond weights and cache, at some length of the sequences.

    Of the cache only what exceeds its size at the end of the phase is counted: old and new at once while it grows.
    """
    kept = sum(_rounded(n) for n in _final_cache(graph).values())
    beyond = []
    for moment, cached in _moments(graph, costs, in_place, _Length.of(graph, scenario)):
        surplus = max(0, cached - kept)
        beyond.append(
            Live(fixed=moment.fixed, linear=moment.linear + surplus, quadratic=moment.quadratic, op=moment.op)
        )
    return _undominated(beyond)


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


_LEAST_ITEM = 2
"""Bytes of an attention score at least."""


def _moments(graph: Graph, costs: Sequence[Cost], in_place: bool, length: _Length) -> Iterator[tuple[Live, int]]:
    """While each op runs: bytes alive outside the cache, and bytes of cache."""
    born, dies = _lifetimes(graph, in_place=in_place)
    powers = _powers(graph, length)
    ends: dict[int, list[int]] = {}
    starts: dict[int, list[int]] = {}
    for storage, first in born.items():
        starts.setdefault(first, []).append(storage)
        ends.setdefault(dies[storage], []).append(storage)
    alive = [0, 0, 0]
    cached = 0

    def change(storages: Sequence[int], sign: int) -> None:
        nonlocal cached
        for storage in storages:
            nbytes = sign * _rounded(graph.storages[storage].nbytes)
            if graph.storages[storage].role is Role.KV_CACHE:
                cached += nbytes
            else:
                alive[powers[storage]] += nbytes

    change(starts.get(_GIVEN, ()), 1)
    for index, (op, cost) in enumerate(zip(graph.ops, costs, strict=True)):
        change(starts.get(index, ()), 1)
        scratch = _rounded(max(cost.scratch_written, _converted(graph, op)))
        power = length.scratch_power(graph, op, scratch)
        now = [n + (scratch if i == power else 0) for i, n in enumerate(alive)]
        yield Live(fixed=now[0], linear=now[1], quadratic=now[2], op=op.name), cached
        change(ends.get(index, ()), -1)


_GIVEN = -1
"""Index of the moment before the first op."""


def _lifetimes(graph: Graph, *, in_place: bool) -> tuple[dict[int, int], dict[int, int]]:
    """First and last op of each storage's life, weights left out; from `_GIVEN` to the number of ops."""
    end = len(graph.ops)
    kept = {graph.tensors[i].storage for i in graph.outputs}
    given = {graph.tensors[i].storage for i in graph.inputs}
    born: dict[int, int] = dict.fromkeys(given, _GIVEN)
    dies: dict[int, int] = {}
    on_chip = set()
    calls = _calls(graph.ops)
    for index, op in enumerate(graph.ops):
        used = {graph.tensors[i].storage for i in op.inputs}
        for storage in used:
            born.setdefault(storage, _GIVEN)  # a buffer of the model's
            replaced = in_place and storage in given and graph.storages[storage].role is Role.KV_CACHE
            last = index if replaced else _returns(calls[index], born[storage], index)
            dies[storage] = max(dies.get(storage, 0), last)
        for tensor in op.outputs:
            storage = graph.tensors[tensor].storage
            if storage not in born:
                born[storage] = index
                if op.kernel:
                    on_chip.add(storage)
            dies[storage] = max(dies.get(storage, 0), index)
    for storage, first in list(born.items()):
        role = graph.storages[storage].role
        if role in (Role.WEIGHT, Role.CONSTANT) or storage in on_chip:
            del born[storage]
        elif storage in kept or (first == _GIVEN and not (in_place and role is Role.KV_CACHE and storage in given)):
            dies[storage] = end
        else:
            dies.setdefault(storage, end)
    return born, dies


@dataclass(slots=True)
class _Call:
    """A module's call: indices of its first and last op."""

    start: int
    end: int


def _calls(ops: Sequence[Op]) -> list[tuple[_Call, ...]]:
    """The calls that each op was made in, outermost first; a module's consecutive ops are one call.

    A list of modules counts as one too: what goes into the first of them is usually held under another name.
    """
    within: list[tuple[_Call, ...]] = []
    path: list[str] = []
    open_calls: list[_Call] = []
    for index, op in enumerate(ops):
        parts = op.module.split(".") if op.module else []
        shared = 0
        while shared < min(len(parts), len(path)) and parts[shared] == path[shared]:
            shared += 1
        open_calls = open_calls[:shared] + [_Call(index, index) for _ in parts[shared:]]
        path = parts
        for call in open_calls:
            call.end = index
        within.append(tuple(open_calls))
    return within


def _converted(graph: Graph, op: Op) -> int:
    """Bytes of the copy that a softmax to a wider type makes of its input; only float16 to float32 is one CUDA kernel.

    aten/src/ATen/native/SoftMax.cpp, softmax(input, dim, dtype).
    """
    if operator_name(op.target) not in ("aten.softmax", "aten.log_softmax") or not op.outputs:
        return 0
    given, made = graph.tensors[op.inputs[0]].dtype, graph.tensors[op.outputs[0]]
    return 0 if given in (made.dtype, "float16") else made.nbytes


def _returns(calls: tuple[_Call, ...], born: int, used: int) -> int:
    """The op after which the outermost call that got the storage as an argument returns."""
    return next((call.end for call in calls if call.start > born), used)


def _powers(graph: Graph, length: _Length) -> dict[int, int]:
    """How the size of each storage follows the length, by the largest tensor in it."""
    largest: dict[int, int] = {}
    powers = dict.fromkeys(range(len(graph.storages)), 0)
    if length.sizes:
        for tensor in graph.tensors:
            if tensor.touched_bytes > largest.get(tensor.storage, 0):
                largest[tensor.storage] = tensor.touched_bytes
                powers[tensor.storage] = length.power(tensor.shape)
    return powers


def _undominated(moments: Sequence[Live]) -> tuple[Live, ...]:
    """Those that can be the highest at some length."""
    best: list[Live] = []
    for moment in sorted(moments, key=lambda m: (-m.nbytes, -m.quadratic, -m.linear)):
        if not any(
            b.fixed >= moment.fixed and b.linear >= moment.linear and b.quadratic >= moment.quadratic for b in best
        ):
            best.append(moment)
    return tuple(best)


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
    found = set(_cache_storages(graph)) - {graph.tensors[i].storage for i in graph.inputs}
    seen: set[int] = set()
    for op in graph.ops:
        seen |= {graph.tensors[i].storage for i in op.inputs}
        found -= {graph.tensors[i].storage for i in op.outputs} - seen
    return sum(graph.storages[s].nbytes for s in found)


def _resident(graphs: Mapping[str, Graph]) -> int:
    """Bytes of parameters and buffers, in whichever phase they show, those that hold the cache left out."""
    found: dict[str, int] = {}
    for graph in graphs.values():
        for storage in graph.storages:
            if storage.role in (Role.WEIGHT, Role.CONSTANT):
                found[storage.name] = max(found.get(storage.name, 0), storage.nbytes)
    return sum(found.values())


def _rounded(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
