"""Elementwise ops follow each other and hand their results over through memory.

**What it checks.** Two or more elementwise ops (arithmetic, activations, casts, copies, broadcasts, gathers, with views
in between), run eagerly, of which one takes what another made and which a fusing compiler would do in one kernel; with
them the sums, norms and softmax over rows that it would do in the same kernel. What rules of their own recognise is
theirs: norms with the making of their weights, attention with the making of masks that it can do without, activations
and rotary embeddings that are spelt out, copies of keys and values, copies that nobody needs, what is computed again.

**Why it costs.** An elementwise op does one or two operations for the 4 to 12 bytes that it reads and writes, where a
GPU could do a hundred: its time is its traffic. Each op of a chain writes a whole activation for the next one to read
back, and each is a launch.

**How it is estimated.** The chain becomes one kernel, planned as Inductor plans it (see docs/fusion.md): what comes
from outside is read once, what is needed outside is written once, and nothing in between. The arithmetic stays. What a
compiler would compute again in several kernels is computed once here, since the ops around the chain stay as they are.

**Remedy.** Compile the function or the module that holds these lines; where they lie in several, the model.

    Block.forward = torch.compile(Block.forward)

Compiling the whole model fuses all of its chains. Intermediate results then stay in float32 where eager mode rounds
each of them to 16 bits.

**When to ignore.** When the model is compiled later on; when shapes change at every call and compiling again would take
longer than is saved.

**Example.**

    y = F.silu(gate) * up

**References.** Ansel et al., "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and
Graph Compilation" (ASPLOS 2024); Williams et al., "Roofline: An Insightful Visual Performance Model for Multicore
Architectures" (2009).
"""

from collections.abc import Iterator, Set
from dataclasses import replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Severity, Situation, rule
from ..analyzer.graph import Op, Role, TensorRef, needed
from . import (
    dead_or_redundant_compute,
    decomposed_activation,
    decomposed_norm,
    dtype_pingpong,
    layout_copy,
    materialized_attention_scores,
    repeated_kv_heads,
)
from ._chains import chains, compiled, fused
from ._rotary import rotations


@rule("FUS001", "unfused-elementwise-chain", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """Every chain, at the last op that does arithmetic; a compiled phase has none."""
    if situation.analysis.execution != "eager":
        return
    for chain in chains(situation, _recognised(situation)):
        yield Match(
            op=chain.anchor,
            message="elementwise ops hand their results over through memory, where one kernel would do",
            evidence={"ops": len(chain.ops), "bytes": chain.bytes, "fused_bytes": chain.fused_bytes},
            remedy=compiled(situation.graph, chain),
            rewrite=fused(chain),
        )


def _recognised(situation: Situation) -> set[int]:
    """Ops that rules of their own remedy."""
    own = {index for norm in situation.once(decomposed_norm.found) for index in (*norm.ops, *norm.weight_ops)}
    for naive, plan, _ in situation.once(materialized_attention_scores.found):
        own.update((*naive.ops, *plan.key.ops, *plan.value.ops))
    for _, _, plan in situation.once(repeated_kv_heads.found):
        own.update((*plan.key.ops, *plan.value.ops))
    own.update(
        index for product in situation.once(repeated_kv_heads.found_in_products) for index in product.operand.ops
    )
    for activation in situation.once(decomposed_activation.spelt_out):
        own.update(activation.ops)
    own.update(index for ops in situation.once(rotations) for index in ops)
    own.update(index for roundtrip in situation.once(dtype_pingpong.roundtrips) for index in roundtrip.ops)
    own.update(situation.once(layout_copy.found))
    own.update(index for ops in situation.once(dead_or_redundant_compute.repeated) for index in ops)
    return own | _of_dropped_masks(situation) | _complex(situation) | _appended(situation)


def _of_dropped_masks(situation: Situation) -> set[int]:
    """Ops that make masks for attention alone that does not need them as one kernel."""
    graph = situation.graph
    dropped = {
        (mask.before, mask.tensor)
        for naive, plan, _ in situation.once(materialized_attention_scores.found)
        for mask in naive.masks
        if mask not in plan.masks
    }
    if not dropped:
        return set()
    takers = {index for index, _ in dropped}
    ops = [_without(op, index, dropped) if index in takers else op for index, op in enumerate(graph.ops)]
    live = needed(ops, graph.tensors, graph.outputs, graph, graph.idle)
    return {index for index, stays in enumerate(live) if not stays}


def _without(op: Op, index: int, dropped: Set[tuple[int, int]]) -> Op:
    """An op that takes no mask."""
    args = {
        name: None if isinstance(value, TensorRef) and (index, value.tensor) in dropped else value
        for name, value in op.args.items()
    }
    return replace(op, args=args)


def _complex(situation: Situation) -> set[int]:
    """Ops on complex numbers, for which Inductor has no code."""
    graph = situation.graph
    return {
        index
        for index, op in enumerate(graph.ops)
        if any(graph.tensors[tensor].dtype.startswith("complex") for tensor in (*op.inputs, *op.outputs))
    }


def _appended(situation: Situation) -> set[int]:
    """Ops that join old keys and values to new ones."""
    graph = situation.graph
    return {
        index
        for index, op in enumerate(graph.ops)
        if operator_name(op.target) in _JOINS and any(graph.role(tensor) is Role.KV_CACHE for tensor in op.inputs)
    }


_JOINS = ("aten.cat", "aten.concat", "aten.concatenate")
