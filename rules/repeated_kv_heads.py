"""Keys and values are copied once for every query head that shares them.

**What it checks.** `scaled_dot_product_attention` on keys and values whose heads were repeated for it, by
`repeat_interleave` or by `expand` and a `reshape`, `contiguous` or `clone` that makes the copy. The same of `matmul`
before and behind a softmax that no fused kernel can do, such as one over capped scores; where one can, that is ATT001.

**Why it costs.** Grouped-query attention keeps few KV heads so that a step reads little. Repeating them reads the
cache, writes it query heads / KV heads times as large, and has attention read that: at a long context this is most of
what a decode step moves. Kernels take fewer KV heads than query heads as they are.

**How it is estimated.** The copies go and the call gets `enable_gqa=True`: bytes saved = 2 x group x KV, with group =
query heads / KV heads, priced on the kernel that this GPU picks then. Where it has no kernel that takes grouped heads
with the mask given, the rule is silent. A `matmul` takes the query heads that share a KV head as further rows: a view
of the query (a copy where its layout has none), the same FLOPs, and keys and values as they are.

**Remedy.**

    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

Before a softmax of its own:

    scores = (q.reshape(B, kv_heads, group * S, D) @ k.mT).view(B, heads, S, T)
    out = (probs.view(B, kv_heads, group * S, T) @ v).view(B, heads, S, D)

**When to ignore.** GPUs or versions of PyTorch whose fused kernels refuse `enable_gqa`, which then falls to an unfused
path.

**Example.**

    k = k.repeat_interleave(n_heads // n_kv_heads, dim=1)
    v = v.repeat_interleave(n_heads // n_kv_heads, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)

**References.** Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
(2023); PyTorch documentation of `torch.nn.functional.scaled_dot_product_attention`, `enable_gqa`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import TensorRef
from ..analyzer.rewrite import Draft
from . import materialized_attention_scores
from ._attention import Finder, Operand
from ._call import Plan, Writer, fused, plan_of

_REMEDY = Remedy(
    text="Pass keys and values as they are, with enable_gqa=True.",
    code="out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1, enable_gqa=True)",
)
_IN_PRODUCTS = Remedy(
    text="Multiply the query heads that share a KV head as rows of one product, with keys and values as they are.",
    code="scores = (q.reshape(B, kv_heads, group * S, D) @ k.mT).view(B, heads, S, T)\n"
    "out = (probs.view(B, kv_heads, group * S, T) @ v).view(B, heads, S, D)",
)


@rule("ATT003", "repeated-kv-heads", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every call, and every product around a softmax, on keys and values that were repeated for it."""
    graph = situation.graph
    for index, written, plan in situation.once(found):
        heads, kv_heads = (o.described(graph).shape[-3] for o in (plan.query, plan.key))
        copied = sum(graph.tensors[o.tensor].nbytes for o in (written.key, written.value))
        yield Match(
            op=plan.key.ops[-1] if plan.key.ops else index,
            message=f"{kv_heads} KV heads are copied for {heads} query heads before attention",
            evidence={
                "copied_bytes": copied,
                "kv_bytes": sum(graph.tensors[o.tensor].nbytes for o in (plan.key, plan.value)),
            },
            remedy=_REMEDY,
            rewrite=_grouped(index, plan),
        )
    for products in _attentions(situation.once(found_in_products)):
        operands = [product.operand for product in products]
        heads, kv_heads = graph.tensors[products[0].left].shape[1], operands[0].described(graph).shape[1]
        yield Match(
            op=operands[0].ops[-1],
            message=f"{kv_heads} KV heads are copied for {heads} query heads before attention",
            evidence={
                "copied_bytes": sum(graph.tensors[product.right].nbytes for product in products),
                "kv_bytes": sum(graph.tensors[operand.tensor].nbytes for operand in operands),
            },
            remedy=_IN_PRODUCTS,
            rewrite=_as_rows(products),
        )


def found(situation: Situation) -> tuple[tuple[int, Plan, Plan], ...]:
    """Every such call, as it is written and as it is without the copies."""
    finder = Finder(situation)
    written = ((index, plan_of(situation.graph, index)) for index, _ in finder.calls())
    planned = ((index, plan, fused(finder, plan)) for index, plan in written)
    return tuple((index, plan, call) for index, plan, call in planned if call is not None and call.gqa != plan.gqa)


def _grouped(index: int, plan: Plan) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim({index, *plan.key.ops, *plan.value.ops}):
            writer = Writer(draft, index)
            call, made = writer.attention(plan)
            (old,) = draft.graph.ops[index].outputs
            writer.end(old, [call], made)

    return rewrite


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product of (B, Hq, ...) matrices with keys or values that were repeated for it.

    Attributes:
        op: index.
        left: query or probabilities (B, Hq, S, D or T).
        right: what it is multiplied with (B, Hq, D or T, T or Dv).
        operand: the keys or values (B, Hkv, T, D or Dv) that this was made of.
        keys: true for keys, false for values.
    """

    op: int
    left: int
    right: int
    operand: Operand
    keys: bool


def found_in_products(situation: Situation) -> tuple[Product, ...]:
    """Every product around a softmax on repeated keys or values that is not in an attention one kernel could do."""
    fusable = situation.once(materialized_attention_scores.found)
    taken = {i for naive, _, _ in fusable for i in (naive.product, naive.last)}
    finder = Finder(situation)
    ops = situation.graph.ops
    found = (_product(finder, i) for i, op in enumerate(ops) if operator_name(op.target) == _MATMUL and i not in taken)
    return tuple(product for product in found if product is not None)


_MATMUL = "aten.matmul"
_SOFTMAX = ("aten.softmax", "aten._softmax", "aten.special_softmax", "aten._safe_softmax")
_BATCHED = 4
_KEYS = (0, 1, 3, 2)
_VALUES = (0, 1, 2, 3)
_FARTHEST = 24
"""Ops between a product and a softmax."""


def _product(finder: Finder, index: int) -> Product | None:
    graph = finder.graph
    op = graph.ops[index]
    left, right = op.args.get("self"), op.args.get("other")
    if not isinstance(left, TensorRef) or not isinstance(right, TensorRef):
        return None
    query, matrix = graph.tensors[left.tensor], graph.tensors[right.tensor]
    if len(query.shape) != _BATCHED or len(matrix.shape) != _BATCHED or query.shape[:2] != matrix.shape[:2]:
        return None
    keys = _is_before_softmax(finder, index, left.tensor)
    if keys is None:
        return None
    whole = Operand(tensor=right.tensor, order=_KEYS if keys else _VALUES)
    operand = finder.without_repeats(whole)
    shape = operand.described(graph).shape
    if operand == whole or operand.scale != 1.0 or shape[0] != query.shape[0]:
        return None
    grouped = shape[1] < query.shape[1] and query.shape[1] % shape[1] == 0
    return Product(op=index, left=left.tensor, right=right.tensor, operand=operand, keys=keys) if grouped else None


def _is_before_softmax(finder: Finder, index: int, left: int) -> bool | None:
    """Whether the softmax nearest to a product comes after it; None where there is none near."""
    graph, flow = finder.graph, finder.flow

    def after(op: int) -> Iterable[int]:
        return (user for made in graph.ops[op].outputs for user in flow.users(made))

    def before(op: int) -> Iterable[int]:
        makers = (flow.maker(taken) for taken in graph.ops[op].inputs)
        return (maker for maker in makers if maker is not None)

    def distance(start: Iterable[int], step: Callable[[int], Iterable[int]]) -> int:
        ways = (n for n, i in enumerate(_reached(start, step)) if operator_name(graph.ops[i].target) in _SOFTMAX)
        return next(ways, _FARTHEST)

    maker = flow.maker(left)
    ahead, behind = distance(after(index), after), distance(() if maker is None else (maker,), before)
    return None if ahead == behind == _FARTHEST else ahead < behind


def _reached(start: Iterable[int], step: Callable[[int], Iterable[int]]) -> Iterator[int]:
    """Ops from some on, the nearest first, not many."""
    waiting = list(start)
    seen = set(waiting)
    for _ in range(_FARTHEST):
        if not waiting:
            return
        op = waiting.pop(0)
        yield op
        further = [i for i in step(op) if i not in seen]
        seen |= set(further)
        waiting += further


def _attentions(products: Iterable[Product]) -> Iterator[tuple[Product, ...]]:
    """Keys and the values that follow them together."""
    keys: Product | None = None
    for product in products:
        if product.keys:
            if keys is not None:
                yield (keys,)
            keys = product
        else:
            yield (product,) if keys is None else (keys, product)
            keys = None
    if keys is not None:
        yield (keys,)


def _as_rows(products: Iterable[Product]) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        for product in products:
            if draft.claim({product.op, *product.operand.ops}):
                _multiply_as_rows(draft, product)

    return rewrite


def _multiply_as_rows(draft: Draft, product: Product) -> None:
    writer = Writer(draft, product.op)
    op = draft.graph.ops[product.op]
    (old,) = op.outputs
    result, left = draft.tensors[old], draft.tensors[product.left]
    batch, kv_heads, _, _ = product.operand.described(draft.graph).shape
    rows = left.shape[1] // kv_heads * left.shape[2]
    order = tuple(product.operand.order[d] for d in (_KEYS if product.keys else _VALUES))
    right = product.operand.tensor
    if order != _VALUES:
        right, turned = writer.permuted(right, order)
        draft.insert(product.op, turned)
    query = writer.reshape(product.left, (batch, kv_heads, rows, left.shape[-1]))
    made = draft.tensor((batch, kv_heads, rows, result.shape[-1]), result.dtype)
    args = {**op.args, "self": TensorRef(tensor=query), "other": TensorRef(tensor=right)}
    multiplied = replace(op, name=f"{op.name}_grouped", args=args, outputs=(made,))
    viewed, view = writer.reshaped(made, result.shape)
    writer.end(old, [multiplied, *([view] if view else [])], viewed)
