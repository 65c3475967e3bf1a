"""Attention writes its scores to memory.

**What it checks.** A product of queries and keys, a softmax over it and a product with values, in whatever spelling
(`matmul`, `@`, `bmm`, `baddbmm`, `einsum`), with what lies between: scales, masks, dropout, casts.

**Why it costs.** Scores are as large as queries x keys for every head. Each op between the two products reads and
writes them once, in float32 where softmax was told so; a causal mask halves the useful work, yet every pair is
computed. Keys and values that were repeated for the query heads are written and read on top.

**How it is estimated.** The ops become one call of `scaled_dot_product_attention`, priced as the kernel that this GPU
picks: query, key, value and output once; FLOPs = 2 x B x Hq x pairs x (D + Dv) over the pairs that a causal mask
leaves. What only the scores needed disappears: the mask and its making, the copies of repeated heads, and the copies
behind it that the layout of its result makes needless.

**Remedy.**

    out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1, enable_gqa=True)

The mask is replaced by `is_causal=True` where the ops that make it prove that it is causal, and dropped where it hides
nothing. A mask that comes from a buffer or an input is kept: pass `is_causal=True` instead if you know that it is no
more than causal, since no flash kernel takes a mask. Where several masks stay, one `attn_mask` holds them all; a scale
other than `1 / sqrt(head_dim)` is passed as `scale`.

**When to ignore.** Where the probabilities themselves are wanted, to be shown or penalised.

**Example.**

    scores = q @ k.transpose(-2, -1) / math.sqrt(d)
    scores = scores.masked_fill(~causal, float("-inf"))
    out = scores.softmax(-1) @ v

**References.** Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023);
PyTorch documentation of `torch.nn.functional.scaled_dot_product_attention`.
"""

from collections.abc import Iterator

from ..analyzer.cost import operator_name
from ..analyzer.finding import Confidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Graph, Op, TensorRef
from ..analyzer.rewrite import Draft
from ._attention import Finder, Naive
from ._call import Plan, Writer, fused, is_default_scale
from ._masks import Shape


@rule("ATT001", "materialized-attention-scores", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every attention that is spelt out and that one fused kernel could do."""
    for naive, plan, shape in situation.once(found):
        query, key = (o.described(situation.graph).shape for o in (naive.query, naive.key))
        yield Match(
            op=naive.product,
            message=_message(shape, plan),
            evidence={
                "scores_bytes": situation.graph.tensors[naive.scores].nbytes,
                "bytes_between_products": naive.touched_bytes,
            },
            remedy=_remedy(naive, plan, query, key[-2]),
            confidence=Confidence.MEDIUM if plan.masks and shape is Shape.UNKNOWN else Confidence.HIGH,
            rewrite=_fused(naive, plan),
        )


def found(situation: Situation) -> tuple[tuple[Naive, Plan, Shape], ...]:
    """Every attention that is spelt out, the call that does the same, and what its masks hide together."""
    finder = Finder(situation)
    planned = ((naive, _planned(finder, naive)) for naive in finder.naive())
    return tuple((naive, *plan) for naive, plan in planned if plan is not None)


def _planned(finder: Finder, naive: Naive) -> tuple[Plan, Shape] | None:
    """The call that does the same, where the GPU has a kernel that keeps its scores on chip."""
    graph = finder.graph
    query, key = (o.described(graph).shape for o in (naive.query, naive.key))
    shape = finder.shape_of_masks(naive.masks, query[-2], key[-2])
    known = shape in (Shape.ALL, Shape.CAUSAL)
    masks = (
        () if known else tuple(m for m in naive.masks if finder.shape_of_masks((m,), *m.scores[-2:]) is not Shape.ALL)
    )
    plan = Plan(
        query=naive.query,
        key=naive.key,
        value=naive.value,
        masks=masks,
        causal=shape is Shape.CAUSAL,
        scale=naive.scale,
        dropout=naive.dropout,
    )
    call = fused(finder, plan)
    return None if call is None else (call, shape)


def _message(shape: Shape, plan: Plan) -> str:
    words = "attention writes its scores to memory, as large as queries x keys"
    if shape is Shape.CAUSAL:
        return f"{words}, and computes those that its causal mask hides"
    if plan.masks and shape is Shape.UNKNOWN:
        return f"{words}; whether its mask is just causal cannot be told from the ops that make it, so it is kept"
    if plan.masks:
        return f"{words}; its mask is more than causal and is kept"
    return words


def _remedy(naive: Naive, plan: Plan, query: tuple[int, ...], keys: int) -> Remedy:
    args = ["q", "k", "v"]
    text = "Call scaled_dot_product_attention"
    if plan.masks:
        args.append("attn_mask=mask")
        text += ", with is_causal=True in place of the mask if it is no more than causal"
    elif plan.causal or query[-2] == 1 < keys:
        args.append("is_causal=q.shape[-2] > 1")
    if not is_default_scale(plan.scale, query[-1]):
        args.append(f"scale={plan.scale:g}")
    if naive.query.scale * naive.key.scale != 1:
        text += ", on queries and keys that are not scaled before"
    if plan.dropout:
        args.append(f"dropout_p={plan.dropout}")
    if plan.gqa:
        args.append("enable_gqa=True")
        text += ", on keys and values that are not repeated"
    if len(plan.masks) > 1:
        text += "; join what is added and what is masked into one attn_mask"
    return Remedy(text=f"{text}.", code=f"out = F.scaled_dot_product_attention({', '.join(args)})")


def _fused(naive: Naive, plan: Plan) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim({*naive.ops, *plan.key.ops, *plan.value.ops}):
            return
        writer = Writer(draft, naive.last)
        end_with(writer, naive, *writer.attention(plan))

    return rewrite


def end_with(writer: Writer, naive: Naive, call: Op, made: int) -> None:
    """Put a call where an attention that was spelt out ended, its result in the shape and order of the old one."""
    draft = writer.draft
    (old,) = draft.graph.ops[naive.last].outputs
    straight = tuple(range(len(naive.order)))
    shape = tuple(draft.graph.tensors[old].shape[naive.order.index(d)] for d in straight)
    ops = [call]
    if draft.tensors[made].shape != shape:
        unfolded = _unfolded(draft.graph, old, draft.tensors[made].shape) if naive.order == straight else None
        if unfolded is not None:
            writer.end(unfolded, ops, made)
            return
        made, op = writer.reshaped(made, shape)
        ops += [op] if op else []
    if naive.order != straight:
        made, op = writer.permuted(made, naive.order)
        ops.append(op)
    writer.end(old, ops, made)


def _unfolded(graph: Graph, tensor: int, shape: tuple[int, ...]) -> int | None:
    """The view of a result (B * H, S, Dv) that alone is used and has a shape (B, H, S, Dv)."""
    users = [op for op in graph.ops if tensor in op.inputs and (op.outputs or op.mutates)]
    if len(users) != 1 or tensor in graph.outputs or operator_name(users[0].target) not in _VIEWS:
        return None
    (made,) = users[0].outputs
    return (
        made if graph.tensors[made].shape == shape and users[0].args.get("self") == TensorRef(tensor=tensor) else None
    )


_VIEWS = ("aten.view", "aten.reshape", "aten.unflatten")
