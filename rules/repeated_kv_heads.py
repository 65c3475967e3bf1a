"""Keys and values are copied once for every query head that shares them.

**What it checks.** `scaled_dot_product_attention` on keys and values whose heads were repeated for it, by
`repeat_interleave` or by `expand` and a `reshape`, `contiguous` or `clone` that makes the copy.

**Why it costs.** Grouped-query attention keeps few KV heads so that a step reads little. Repeating them reads the
cache, writes it query heads / KV heads times as large, and has attention read that: at a long context this is most of
what a decode step moves. Kernels take fewer KV heads than query heads as they are.

**How it is estimated.** The copies go and the call gets `enable_gqa=True`: bytes saved = 2 x group x KV, with group =
query heads / KV heads, priced on the kernel that this GPU picks then. Where it has no kernel that takes grouped heads
with the mask given, the rule is silent.

**Remedy.**

    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

**When to ignore.** GPUs or versions of PyTorch whose fused kernels refuse `enable_gqa`, which then falls to an unfused
path.

**Example.**

    k = k.repeat_interleave(n_heads // n_kv_heads, dim=1)
    v = v.repeat_interleave(n_heads // n_kv_heads, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)

**References.** Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
(2023); PyTorch documentation of `torch.nn.functional.scaled_dot_product_attention`, `enable_gqa`.
"""

from collections.abc import Iterator

from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.rewrite import Draft
from ._attention import Finder
from ._call import Plan, Writer, fused, plan_of

_REMEDY = Remedy(
    text="Pass keys and values as they are, with enable_gqa=True.",
    code="out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1, enable_gqa=True)",
)


@rule("ATT003", "repeated-kv-heads", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every call on keys and values that were repeated for it."""
    finder = Finder(situation)
    graph = situation.graph
    for index, _ in finder.calls():
        written = plan_of(graph, index)
        plan = fused(finder, written)
        if plan is None or plan.gqa == written.gqa:
            continue
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


def _grouped(index: int, plan: Plan) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim({index, *plan.key.ops, *plan.value.ops}):
            writer = Writer(draft, index)
            call, made = writer.attention(plan)
            (old,) = draft.graph.ops[index].outputs
            writer.end(old, [call], made)

    return rewrite
