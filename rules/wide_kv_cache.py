"""A decode step waits for keys and values that are stored in 16 bits or more.

**What it checks.** `scaled_dot_product_attention`, run as one kernel that device memory limits, on keys and values that
lie in the KV cache as it is, where the cache is at least a fifth of what the phase moves. The cache may grow by `cat`,
be written in place or be given ready (cross-attention); nothing but such writes and attention may touch it.

**Why it costs.** Each step reads the keys and values of every token so far: 2 x KV heads x head_dim x layers values a
token and sequence, a few FLOPs each. Weights are read once for all sequences, the cache is not: at large batches and
long contexts the step is the reading of the cache.

**How it is estimated.** Keys and values become 8 bits: the cache, what writes it, and the attention kernel, which
widens them on chip (2 FLOPs a value, no 16-bit copy in memory). It reads a float32 scale a KV head for keys and one for
values, fixed by calibration, so that their inverses go into the projection that makes the rows; where `cat`,
`index_copy_` or `index_put_` write the rows, a kernel that narrows them comes before. A scale for each token and head,
which some libraries keep, would add 2 to 4 bytes to head_dim. fp8 and int8 exclude each other. Copies that a `cat`
makes stay, at half their bytes. Where heads are repeated in memory or scores are spelt out, the rule is silent until
that is mended.

**Remedy.** A library whose attention reads a packed cache: vLLM, TensorRT-LLM, FlashInfer; LMDeploy for int8.

    llm = vllm.LLM(model, kv_cache_dtype="fp8")

Twice as many tokens fit in the same memory. The architectural ways, grouped-query and latent attention (GQA, MLA), save
more but have to be trained.

**When to ignore.** When quality does not allow it, which long contexts show first; when the step waits for its weights.

**Example.**

    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)  # bfloat16, 64 sequences of 8,192 tokens
    out = F.scaled_dot_product_attention(q, k, v)

**References.** Hooper et al., "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization"
(2024); vLLM documentation, "Quantized KV Cache"; Ainslie et al., "GQA: Training Generalized Multi-Query Transformer
Models from Multi-Head Checkpoints" (2023); DeepSeek-AI, "DeepSeek-V2" (2024).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Confidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import ITEM_BITS, Arg, Op, Role, TensorRef, tensors_of
from ..analyzer.rewrite import Draft
from ..analyzer.roofline import Bound
from ..hardware.gpu import Gpu
from ._attention import SDPA
from ._call import Writer

_LEAST_BITS = 16
_LEAST_SHARE = 0.2
"""Of the bytes that a step moves: below it, the cache is not what it waits for."""


@rule("KVC003", "wide-kv-cache", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """Every attention that waits for a wide cache."""
    moved = situation.analysis.bytes
    if moved.kv_cache < _LEAST_SHARE * moved.total:
        return
    reader = _Reader(situation)
    for cache in reader.caches():
        graph = situation.graph
        first, *others = _widths(situation.gpu)
        call = graph.ops[cache.calls[0]]
        keys = graph.tensors[cache.operands[0]]
        ungrouped = keys.shape[-3] == graph.tensors[call.inputs[0]].shape[-3] > 1
        yield Match(
            op=cache.calls[0],
            message=f"attention waits for keys and values of {ITEM_BITS[keys.dtype]} bits",
            evidence={
                "cache_bytes": sum(graph.tensors[t].touched_bytes for t in cache.operands),
                **_in_memory(situation, cache),
                "dtype": keys.dtype,
            },
            remedy=_remedy(first.name, ungrouped=ungrouped),
            confidence=Confidence.MEDIUM if call.args.get("attn_mask") is not None else Confidence.HIGH,
            rewrite=_narrowed(cache, first),
            alternatives={width.name: _narrowed(cache, width) for width in others},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Width:
    """What a key or a value is stored in."""

    name: str
    dtype: str


_FP8 = _Width(name="fp8 cache", dtype="float8_e4m3fn")
_INT8 = _Width(name="int8 cache", dtype="int8")


def _widths(gpu: Gpu) -> tuple[_Width, ...]:
    return (_FP8, _INT8) if "float8" in gpu.tensor else (_INT8,)


def _remedy(name: str, *, ungrouped: bool) -> Remedy:
    text = f"Keep the cache in 8 bits ({name}), with an attention kernel that reads it so."
    if ungrouped:
        text += " Every query head has keys and values of its own: models trained with fewer (GQA, MLA) cache less."
    if name == _FP8.name:
        return Remedy(text=text, code='llm = vllm.LLM(model, kv_cache_dtype="fp8")')
    return Remedy(text=text, code="pipe = lmdeploy.pipeline(model, lmdeploy.TurbomindEngineConfig(quant_policy=8))")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cache:
    """Keys and values of a layer.

    Attributes:
        calls: the attention ops that read them.
        operands: key and value of those, each once.
        tensors: all views of their memory, before and after new rows came.
        grown: of those, what a `cat` returned.
        storages: what holds them at the end of the phase.
        writes: the ops that bring new rows, each with the name of the argument that they come in.
    """

    calls: tuple[int, ...]
    operands: tuple[int, ...]
    tensors: tuple[int, ...]
    grown: tuple[int, ...]
    storages: tuple[int, ...]
    writes: tuple[tuple[int, str], ...]


class _Reader:
    """Finds caches that only attention reads."""

    def __init__(self, situation: Situation) -> None:
        self.situation = situation
        self.graph = graph = situation.graph
        self.given = {graph.tensors[i].storage for i in graph.inputs}
        self.ops: defaultdict[int, list[int]] = defaultdict(list)  # by storage of the cache
        self.tensors: defaultdict[int, list[int]] = defaultdict(list)
        self.makers: dict[int, int] = {}
        home = [tensor.storage for tensor in graph.tensors]
        held = [storage.role is Role.KV_CACHE for storage in graph.storages]
        for index, tensor in enumerate(graph.tensors):
            if held[tensor.storage]:
                self.tensors[tensor.storage].append(index)
        for index, op in enumerate(graph.ops):
            taken = {home[i] for i in op.inputs}
            made = {home[i] for i in op.outputs} - taken
            for storage in taken | made:
                if held[storage]:
                    self.ops[storage].append(index)
            for storage in made:
                self.makers.setdefault(storage, index)
        chosen = situation.analysis.executions.of(situation.analysis.execution)
        self.waiting = {name for kernel in chosen.kernels if kernel.bound is Bound.MEMORY for name in kernel.ops}

    def caches(self) -> Iterator[_Cache]:
        """Every cache that attention waits for."""
        seen: set[int] = set()
        for index, op in enumerate(self.graph.ops):
            if operator_name(op.target) != SDPA or index in seen or op.name not in self.waiting:
                continue
            cache = self._of(index)
            if cache is not None and seen.isdisjoint(cache.calls):
                seen |= set(cache.calls)
                yield cache

    def _of(self, index: int) -> _Cache | None:
        graph = self.graph
        ends = dict.fromkeys(graph.tensors[t].storage for t in _operands(graph.ops[index]))
        storages: list[int] = []
        for end in ends:
            before = self._before(end)
            if before is None:
                return None
            storages += [end, *before]
        tensors = tuple(t for storage in storages for t in self.tensors[storage])
        if len({graph.tensors[t].dtype for t in tensors}) != 1:
            return None
        if ITEM_BITS[graph.tensors[tensors[0]].dtype] < _LEAST_BITS:
            return None
        calls: list[int] = []
        writes: list[tuple[int, str]] = []
        inside = set(tensors)
        for touching in dict.fromkeys(i for storage in storages for i in self.ops[storage]):
            op = graph.ops[touching]
            if graph.is_view(op) or not (op.outputs or op.mutates):
                continue
            if operator_name(op.target) == SDPA:
                others = [t for name, t in _references(op) if name not in ("key", "value")]
                if not set(_operands(op)) <= inside or not inside.isdisjoint(others) or not self._is_fused(touching):
                    return None
                calls.append(touching)
                continue
            source = _WRITES.get(operator_name(op.target))
            if source is None or not self._brings_rows(op, source, inside):
                return None
            writes.append((touching, source))
        return _Cache(
            calls=tuple(calls),
            operands=tuple(dict.fromkeys(t for i in calls for t in _operands(graph.ops[i]))),
            tensors=tensors,
            grown=tuple(t for i, name in writes if name == "tensors" for t in graph.ops[i].outputs),
            storages=tuple(ends),
            writes=tuple(writes),
        )

    def _before(self, storage: int) -> tuple[int, ...] | None:
        """The old cache that a storage was grown from, none where rows are written in place; None for no cache."""
        graph = self.graph
        if graph.storages[storage].role is not Role.KV_CACHE:
            return None
        maker = self.makers.get(storage)
        if maker is None:
            return ()
        if operator_name(graph.ops[maker].target) not in _CATS:
            return None
        old = graph.tensors[graph.ops[maker].inputs[0]].storage
        known = old in self.given and graph.storages[old].role is Role.KV_CACHE
        return (old,) if known else None

    def _is_fused(self, index: int) -> bool:
        return self.situation.costs[index].backend != "math"

    def _brings_rows(self, op: Op, source: str, inside: set[int]) -> bool:
        """True for a write of rows from elsewhere: a `cat` of the old cache and one more, or one into the cache."""
        if source == "tensors":
            parts = tuple(tensors_of(op.args.get("tensors")))
            return len(parts) == _OLD_AND_NEW and parts[0] in inside and parts[1] not in inside
        new = op.args.get(source)
        written = self.graph.mutated(op)
        known = isinstance(new, TensorRef) and new.tensor not in inside and not op.args.get("accumulate")
        return known and len(written) == 1 and written[0] in inside


_OLD_AND_NEW = 2
_CATS = ("aten.cat", "aten.concat", "aten.concatenate")
_WRITES = {
    **dict.fromkeys(_CATS, "tensors"),
    "aten.copy_": "src",
    "aten.index_copy_": "source",
    "aten.index_put_": "values",
}
"""Ops that bring new rows, and the argument that they come in."""
_CONVERTS = "aten.copy_"
"""Narrows rows as it writes them; the others take the cache's type."""


def _operands(op: Op) -> tuple[int, ...]:
    given = (op.args.get("key"), op.args.get("value"))
    return tuple(value.tensor for value in given if isinstance(value, TensorRef))


def _references(op: Op) -> Iterator[tuple[str, int]]:
    for name, value in op.args.items():
        if isinstance(value, TensorRef):
            yield name, value.tensor


def _in_memory(situation: Situation, cache: _Cache) -> dict[str, int]:
    """What the cache takes at the end of the generation, and what 8 bits spare: its part of the run's."""
    memory, graph = situation.memory, situation.graph
    if memory is None:
        return {}
    ends = {graph.tensors[i].storage for i in graph.outputs} or set(range(len(graph.storages)))
    held = {i for i, storage in enumerate(graph.storages) if storage.role is Role.KV_CACHE}
    whole = sum(graph.storages[i].nbytes for i in (held & ends or held))
    mine = sum(graph.storages[i].nbytes for i in cache.storages)
    at_end = round(memory.kv_cache_bytes * mine / whole) if whole else 0
    bits = ITEM_BITS[graph.tensors[cache.operands[0]].dtype]
    return {"cache_bytes_at_the_end": at_end, "spared_bytes_at_the_end": at_end - at_end * 8 // bits}


def _narrowed(cache: _Cache, width: _Width) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim(cache.calls):
            return
        graph = draft.graph
        draft.retype((*cache.tensors, *map(draft.standing_for, cache.grown)), width.dtype)
        for index, name in cache.writes:
            op = graph.ops[index]
            if operator_name(op.target) != _CONVERTS:
                draft.replace(index, replace(op, args={**op.args, name: _cast(draft, index, name, width.dtype)}))
        for index in cache.calls:
            op = graph.ops[index]
            heads = graph.tensors[_operands(op)[0]].shape[-3]
            scales: dict[str, Arg] = {
                f"{name}_scale": TensorRef(
                    tensor=draft.tensor((heads,), "float32", role=Role.WEIGHT, name=f"{op.name}_{name}_scale")
                )
                for name in ("key", "value")
            }
            draft.replace(
                index, replace(op, target="fxroof.attention_packed_cache.default", args={**op.args, **scales})
            )

    return rewrite


def _cast(draft: Draft, index: int, name: str, dtype: str) -> Arg:
    """The argument of a write with its new rows in another type, by a kernel before it."""
    value = draft.graph.ops[index].args[name]
    writer = Writer(draft, index)
    if isinstance(value, tuple):
        old, new = tensors_of(value)
        return TensorRef(tensor=old), TensorRef(tensor=writer.cast(new, dtype))
    return TensorRef(tensor=writer.cast(value.tensor, dtype)) if isinstance(value, TensorRef) else value
