"""Several products read the same activation one after the other.

**What it checks.** Two to six linear layers of one dtype that take the very same tensor, such as queries, keys and
values, or the gate and the up projection of an MLP, in one repetition of a layer, with plain weights that nothing but
linear layers use. Layers that share an input, as decoder layers do that all read what the encoder returned, are kept
apart. Where more read one tensor, or every expert computes every token (MOE002), the rule is silent.

**Why it costs.** Each product is launched on its own, waits for memory on its own, and reads the activation again. A
small one, such as the keys of grouped-query attention, has too few tiles to fill the GPU.

**How it is estimated.** The weights become one matrix, and the products one, whose result is cut into views: as many
FLOPs and weight bytes as before, fewer launches and latencies, one read of the activation, other tiles and waves.
Where what follows needs its own memory, the copy that this takes is counted. Where only some have a bias, the joined
one has zeros for the others, and their bytes are counted.

**Remedy.** Keep one weight, and split the result.

    q, k, v = self.qkv_proj(x).split([q_size, kv_size, kv_size], dim=-1)
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)

A checkpoint is converted by `torch.cat([q.weight, k.weight, v.weight])`; biases likewise, with zeros for a missing one.

**When to ignore.** When adapters or quantisation treat the parts differently, or tensor parallelism cuts them by heads
of different number.

**References.** NVIDIA, "Megatron-LM", fused QKV (`linear_qkv`); vLLM, `QKVParallelLinear` and
`MergedColumnParallelLinear`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import ITEM_BITS, Arg, Graph, Op, Role, TensorRef
from ..analyzer.rewrite import Draft, contiguous
from ._experts import found as dense_mixtures
from .memory_bound_weight_streaming import PACKED

_MOST = 6
_ALIGNED_BITS = 128
"""Where each part begins in a row of the result, as kernels load it: 16 bytes."""


@rule("WGT006", "separate-projections", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """Every set of linear layers on one tensor, at the first of them."""
    graph = situation.graph
    for group in _siblings(situation):
        first = graph.ops[group[0]]
        source = graph.tensors[first.inputs[0]]
        yield Match(
            op=group[0],
            message=f"{len(group)} products read the same activation one after the other",
            evidence={
                "products": len(group),
                "columns": sum(graph.tensors[graph.ops[i].outputs[0]].shape[-1] for i in group),
                "activation_bytes_read_again": (len(group) - 1) * source.touched_bytes,
            },
            remedy=_remedy([graph.tensors[graph.ops[i].outputs[0]].shape[-1] for i in group]),
            rewrite=_joined(tuple(group)),
        )


def _remedy(sizes: Sequence[int]) -> Remedy:
    names = ", ".join("abcdef"[: len(sizes)])
    equal = len(set(sizes)) == 1
    parts = f"chunk({len(sizes)}, dim=-1)" if equal else f"split({list(sizes)}, dim=-1)"
    return Remedy(
        text="Keep one weight for all of them, and split what it returns.", code=f"{names} = self.joined(x).{parts}"
    )


def _siblings(situation: Situation) -> Iterator[Sequence[int]]:
    graph = situation.graph
    experts = {index for mixture in situation.once(dense_mixtures) for index in mixture.ops}
    by_source: dict[tuple[object, ...], list[int]] = defaultdict(list)
    written: dict[int, int] = defaultdict(int)
    for index, op in enumerate(graph.ops):
        for tensor in graph.mutated(op):
            written[graph.tensors[tensor].storage] += 1
        if operator_name(op.target) == "aten.linear" and index not in experts and _is_plain(situation, op):
            source, weight = op.inputs[0], graph.tensors[op.inputs[1]]
            times = written[graph.tensors[source].storage]  # what is written between two is not the same tensor
            key = (source, times, weight.dtype, _layer(op.module), op.repeat, op.branch, op.kernel)
            by_source[key].append(index)
    return (group for group in by_source.values() if 1 < len(group) <= _MOST)


def _layer(module: str) -> tuple[str, ...]:
    """The path of the repetition that a module is part of: up to its last number."""
    names = module.split(".")
    return tuple(names[: max((i + 1 for i, name in enumerate(names) if name.isdecimal()), default=0)])


def _is_plain(situation: Situation, op: Op) -> bool:
    """Whether a linear layer could share a matrix with another: its weight is its own, and its columns are aligned."""
    graph = situation.graph
    source, weight, bias = (op.args.get(name) for name in ("input", "weight", "bias"))
    if not isinstance(source, TensorRef) or not isinstance(weight, TensorRef):
        return False
    matrix = graph.tensors[weight.tensor]
    if not _is_own(graph, weight.tensor) or len(matrix.shape) != _MATRIX or len(op.inputs) != 2 + (bias is not None):
        return False
    if isinstance(bias, TensorRef) and not _is_own(graph, bias.tensor):
        return False
    if matrix.shape[0] * ITEM_BITS[matrix.dtype] % _ALIGNED_BITS or matrix.dtype != graph.tensors[source.tensor].dtype:
        return False
    users = situation.flow.users(weight.tensor)
    return all(operator_name(graph.ops[i].target) == "aten.linear" for i in users)


_MATRIX = 2


def _is_own(graph: Graph, tensor: int) -> bool:
    """A weight that fills its memory as it lies."""
    found = graph.tensors[tensor]
    whole = graph.storages[found.storage].nbytes == found.nbytes
    return graph.role(tensor) is Role.WEIGHT and whole and found.stride == contiguous(found.shape)


def _joined(group: tuple[int, ...]) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        ops = [draft.now(i) for i in group]
        packed = all(op.target == PACKED for op in ops) and len({_dtype(draft, op) for op in ops}) == 1
        if draft.claim(group):
            draft.joined |= dict.fromkeys(group, (group[0], set(group)))
        elif not packed:
            return
        graph = draft.graph
        results = [op.outputs[0] for op in ops]
        sizes = tuple(graph.tensors[result].shape[-1] for result in results)
        like = graph.tensors[results[0]]
        shape = (*like.shape[:-1], sum(sizes))
        made = draft.tensor(shape, like.dtype)
        args: dict[str, Arg] = dict(ops[0].args)
        for name in ("weight", "bias", "scales"):
            if any(op.args.get(name) is not None for op in ops):
                args[name] = TensorRef(tensor=_concatenated(draft, ops, name))
        if packed:
            args["outputs"] = sum(sizes)
        draft.replace(group[0], replace(ops[0], args=args, outputs=(made,)))
        stride = contiguous(shape)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = tuple(
            draft.view(made, (*shape[:-1], size), stride, start) for size, start in zip(sizes, starts, strict=True)
        )
        split: dict[str, Arg] = {"self": TensorRef(tensor=made), "split_sizes": sizes, "dim": -1}
        name = f"{ops[0].name}_split"
        draft.insert(
            group[0] + 1,
            replace(ops[0], name=name, target="aten.split_with_sizes.default", args=split, outputs=parts),
        )
        for result, part in zip(results, parts, strict=True):
            draft.substitute(result, part)

    return rewrite


def _dtype(draft: Draft, op: Op) -> str:
    weight = op.args["weight"]
    return draft.tensors[weight.tensor].dtype if isinstance(weight, TensorRef) else ""


def _concatenated(draft: Draft, ops: Sequence[Op], name: str) -> int:
    """One weight made of those of several layers, once for all that use them, with zeros for a bias that is missing."""
    sizes = [draft.tensors[op.outputs[0]].shape[-1] for op in ops]
    values = [op.args.get(name) for op in ops]
    given = [value.tensor for value in values if isinstance(value, TensorRef)]
    parts = [
        str(value.tensor) if isinstance(value, TensorRef) else f"{size} zeros"
        for value, size in zip(values, sizes, strict=True)
    ]
    key = (f"concatenated: {', '.join(parts)}", given[0], name)
    if key not in draft.shared:
        like = draft.tensors[given[0]]
        home = draft.storages[like.storage]
        draft.shared[key] = draft.tensor((sum(sizes), *like.shape[1:]), like.dtype, role=Role.WEIGHT, name=home.name)
    return draft.shared[key]
