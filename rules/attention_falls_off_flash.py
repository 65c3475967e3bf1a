"""An argument of `scaled_dot_product_attention` rules the fast kernels out, or has them compute what a mask hides.

**What it checks.** The kernel that this GPU picks for each call: flash or cuDNN, the memory-efficient one, or the
unfused path. Where the last two run, or where a mask is given that hides nothing or is exactly causal, it looks for the
least change that removes the obstacle.

**Why it costs.** No flash kernel takes a mask; 32-bit operands, a head_dim that is odd or differs between keys and
values, three dimensions in place of four, or a last dimension that is not contiguous rule out one kernel after the
other. The unfused path writes scores to memory in float32 and computes every pair; a mask given as a tensor is read
for every tile and makes kernels compute the half that a causal mask hides.

**How it is estimated.** The same call without the obstacle, priced as the kernel that is picked then, with the casts,
paddings and copies that it takes.

**Remedy.** By obstacle:

    F.scaled_dot_product_attention(q, k, v, is_causal=True)          # the mask was causal
    F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), ...)  # 32-bit operands
    F.scaled_dot_product_attention(F.pad(q, (0, pad)), ..., scale=1 / math.sqrt(d))[..., :d]
    F.scaled_dot_product_attention(q[None], k[None], v[None])[0]     # three dimensions

A mask is replaced only where the ops that make it prove what it hides. Confidence is medium where numbers change
(16-bit) or where the module has to be written for it (padding), which are told of only where nothing else helps. What
takes copies is told of only where the faster kernel gains more than they cost.

**When to ignore.** Where float32 is needed for accuracy, or where the mask is more than causal.

**Example.**

    mask = torch.ones(n, n, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

**References.** PyTorch documentation of `torch.nn.attention.SDPBackend`; `sdp_utils.cpp` in PyTorch, which picks the
kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt
from typing import Literal

from ..analyzer.cost import Cost
from ..analyzer.estimate import derating
from ..analyzer.execution import Execution, execute
from ..analyzer.finding import Confidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.fusion import compiled_kernels
from ..analyzer.graph import Graph, Op
from ..analyzer.kernels import eager_kernels
from ..analyzer.pricing import price
from ..analyzer.rewrite import Draft, contiguous
from ..analyzer.sdpa import FLASH_ALIGNMENT, HALF, Attention
from ._attention import Finder
from ._call import Plan, Writer, plan_of
from ._masks import Shape

_Change = Literal["four dimensions", "contiguous", "repeated heads", "16-bit", "padded"]
_CHANGES: tuple[_Change, ...] = ("four dimensions", "contiguous", "repeated heads", "16-bit", "padded")
_EXACT: tuple[_Change, ...] = ("four dimensions", "contiguous", "repeated heads")
_WORDS: dict[_Change, str] = {
    "four dimensions": "pass (1, heads, length, head_dim)",
    "contiguous": "make the last dimension of query, key and value contiguous",
    "repeated heads": "repeat the KV heads, since no fused kernel takes grouped heads with these arguments",
    "16-bit": "compute attention in 16 bits",
    "padded": "pad head_dim, and cut the result",
}
_CODES: dict[_Change, str] = {
    "four dimensions": "F.scaled_dot_product_attention(q[None], k[None], v[None])[0]",
    "contiguous": "F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())",
    "repeated heads": "k, v = (t.repeat_interleave(n_heads // n_kv_heads, dim=1) for t in (k, v))",
    "16-bit": "F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(q.dtype)",
    "padded": "F.scaled_dot_product_attention(F.pad(q, (0, pad)), ..., scale=1 / math.sqrt(d))[..., :d]",
}
_RANK = {"math": 0, "efficient": 1, "flash": 2, "cudnn": 2}
_WORST, _BEST = 0, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remedied:
    """A call without its obstacles.

    Attributes:
        plan: with the mask as it should be.
        unmasked: true where the mask went.
        changes: what else is done to the operands.
        dtype: that they are cast to.
        backend: that runs then.
    """

    plan: Plan
    unmasked: bool
    changes: tuple[_Change, ...]
    dtype: str
    backend: str


@rule("ATT002", "attention-falls-off-flash", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every call whose arguments keep it from a faster kernel, where that can be helped."""
    finder = Finder(situation)
    for index, op in finder.calls():
        cost = situation.costs[index]
        found = _remedied(finder, index, cost)
        if found is None:
            continue
        yield Match(
            op=index,
            message=_message(cost, found),
            evidence={"backend": cost.backend, "remedied_backend": found.backend, "refusals": cost.note},
            remedy=_remedy(found),
            confidence=Confidence.MEDIUM if {"16-bit", "padded"} & set(found.changes) else Confidence.HIGH,
            rewrite=_without_obstacle(index, op, found),
        )


def _remedied(finder: Finder, index: int, cost: Cost) -> _Remedied | None:
    """The call with the fewest changes that lead to the best kernel; numbers change only where nothing else helps."""
    plan, unmasked = _unmasked(finder, plan_of(finder.graph, index))
    rank = _RANK.get(cost.backend, _BEST)
    if not unmasked and rank == _BEST:
        return None
    capability = finder.situation.gpu.compute_capability
    dtype = "float16" if capability is not None and capability < (8, 0) else "bfloat16"
    found = _best(finder, plan, unmasked, rank, dtype, _EXACT) or _best(finder, plan, unmasked, rank, dtype, _CHANGES)
    if found is not None and (not set(found.changes) - {"four dimensions"} or _pays(finder, index, found)):
        return found
    return _best(finder, plan, unmasked, rank, dtype, ()) if unmasked else None


def _best(
    finder: Finder, plan: Plan, unmasked: bool, rank: int, dtype: str, allowed: tuple[_Change, ...]
) -> _Remedied | None:
    best: _Remedied | None = None
    for count in range(len(allowed) + 1):
        for changes in combinations(allowed, count):
            attention = _changed(finder, plan, changes, dtype)
            if attention is None:
                continue
            backend = finder.backend(attention).name
            least = rank if best is None else _RANK[best.backend]
            if _RANK[backend] > least or (best is None and unmasked and not changes):
                best = _Remedied(plan=plan, unmasked=unmasked, changes=changes, dtype=dtype, backend=backend)
    return best


def _pays(finder: Finder, index: int, found: _Remedied) -> bool:
    """True where the faster kernel gains more than the copies around it cost."""
    situation = finder.situation
    op = finder.graph.ops[index]
    alone = replace(finder.graph, ops=(op,), inputs=op.inputs, outputs=op.outputs)
    draft = Draft(alone)
    _without_obstacle(0, op, found)(draft)
    before, after = (_seconds(graph, situation) for graph in (alone, draft.finish()))
    return after.bound <= before.bound and after.estimate < before.estimate


def _seconds(graph: Graph, situation: Situation) -> Execution:
    costs, eager = price(graph, situation.gpu), situation.analysis.execution == "eager"
    kernels = eager_kernels(graph, costs) if eager else compiled_kernels(graph, costs)
    return execute(graph, kernels, situation.gpu, derating(situation.gpu), eager=eager).execution


def _unmasked(finder: Finder, plan: Plan) -> tuple[Plan, bool]:
    """The call without a mask that hides nothing or is causal, and whether there was one."""
    if not plan.masks or plan.causal:
        return plan, False
    queries, keys = (o.described(finder.graph).shape[-2] for o in (plan.query, plan.key))
    shape = finder.shape_of_masks(plan.masks, queries, keys)
    if shape not in (Shape.ALL, Shape.CAUSAL):
        return plan, False
    return replace(plan, masks=(), causal=shape is Shape.CAUSAL), True


def _changed(finder: Finder, plan: Plan, changes: tuple[_Change, ...], dtype: str) -> Attention | None:
    """What decides on the kernel after some changes; None where one of them changes nothing."""
    attention = plan.attention(finder.graph)
    ranks = {len(o.order) for o in (plan.query, plan.key, plan.value)}
    if attention is None or (ranks != {4}) != ("four dimensions" in changes):
        return None
    query, key, value = attention.query, attention.key, attention.value
    mask, gqa = attention.mask, attention.gqa
    if "repeated heads" in changes:
        if not gqa or key.shape[1] == query.shape[1]:
            return None
        shapes = [(*t.shape[:1], query.shape[1], *t.shape[2:]) for t in (key, value)]
        key, value = (
            replace(t, shape=s, stride=contiguous(s), offset=0) for t, s in zip((key, value), shapes, strict=True)
        )
        gqa = False
    if "contiguous" in changes:
        if all(t.stride[-1] == 1 for t in (query, key, value)):
            return None
        query, key, value = (replace(t, stride=contiguous(t.shape), offset=0) for t in (query, key, value))
    if "16-bit" in changes:
        if {t.dtype for t in (query, key, value)} <= set(HALF):
            return None
        query, key, value = (replace(t, dtype=dtype) for t in (query, key, value))
        mask = None if mask is None else replace(mask, dtype=mask.dtype if mask.dtype == "bool" else dtype)
    if "padded" in changes:
        width = _width(query.shape[-1], value.shape[-1])
        if query.shape[-1] == value.shape[-1] == width:
            return None
        shapes = [(*t.shape[:-1], width) for t in (query, key, value)]
        query, key, value = (
            replace(t, shape=s, stride=contiguous(s), offset=0)
            for t, s in zip((query, key, value), shapes, strict=True)
        )
    return replace(attention, query=query, key=key, value=value, mask=mask, gqa=gqa)


def _width(*dims: int) -> int:
    return -(-max(dims) // FLASH_ALIGNMENT) * FLASH_ALIGNMENT


def _message(cost: Cost, found: _Remedied) -> str:
    words = []
    if found.unmasked:
        words.append("its mask is exactly causal" if found.plan.causal else "its mask hides nothing")
    rank = _RANK.get(cost.backend, _BEST)
    better = _RANK[found.backend] > rank
    if better and cost.note:
        words.append(cost.note)
    path = "unfused path" if rank == _WORST else f"{cost.backend} kernel"
    reach = f", {found.backend} is within reach" if better else ""
    return f"scaled_dot_product_attention runs on the {path}{reach}: {'; '.join(words)}"


def _remedy(found: _Remedied) -> Remedy:
    text = [_WORDS[change] for change in found.changes]
    code = [_CODES[change] for change in found.changes]
    if found.unmasked:
        text.insert(0, "pass is_causal=True in place of the mask" if found.plan.causal else "leave the mask out")
        code.insert(0, f"F.scaled_dot_product_attention(q, k, v{', is_causal=True' * found.plan.causal})")
    words = "; ".join(text)
    return Remedy(text=f"{words[0].upper()}{words[1:]}.", code="\n".join(code))


def _without_obstacle(index: int, op: Op, found: _Remedied) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim((index,)):
            return
        writer = Writer(draft, index)
        plan, changes = found.plan, found.changes
        query, key, value, mask = writer.operands(plan)
        shape = draft.tensors[query].shape
        gqa, scale, given = plan.gqa, plan.scale, draft.tensors[query].dtype
        if "repeated heads" in changes:
            key, value = (writer.repeated(t, shape[1] // draft.tensors[t].shape[1]) for t in (key, value))
            gqa = False
        if "contiguous" in changes:
            query, key, value = (writer.contiguous(t) for t in (query, key, value))
        if "16-bit" in changes:
            query, key, value = (writer.cast(t, found.dtype) for t in (query, key, value))
            if mask is not None and draft.tensors[mask].dtype != "bool":
                mask = writer.cast(mask, found.dtype)
        value_dim = draft.tensors[value].shape[-1]
        if "padded" in changes:
            width = _width(shape[-1], value_dim)
            query, key, value = (writer.padded(t, width) for t in (query, key, value))
            scale = 1 / sqrt(shape[-1]) if scale is None else scale
        call, made = writer.call(
            query, key, value, mask, causal=plan.causal, scale=scale, dropout=plan.dropout, gqa=gqa
        )
        ops = [call]
        made, cut = writer.cut(made, value_dim)
        made, cast = writer.cast_back(made, given)
        made, reshaped = writer.reshaped(made, draft.graph.tensors[op.outputs[0]].shape)
        ops += [new for new in (cut, cast, reshaped) if new is not None]
        writer.end(op.outputs[0], ops, made)

    return rewrite
