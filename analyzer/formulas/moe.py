"""Grouped matrix products, one per expert.

Rows are sorted by expert and `offs` says where each group ends, so every row meets one expert: 2 * rows * k *
n FLOPs however the rows are spread. What depends on data is how many experts' weights are read. The least is
what a single token uses, k = rows / tokens, since every token may choose the same. On average, with choices
spread evenly, tokens draw E * (1 - (1 - k/E)^tokens) distinct experts.
"""

from ..cost import Call, Cost, formula
from ..graph import Tensor
from .arithmetic import multiply_adds, reach, vector


@formula("aten._grouped_mm", "aten._scaled_grouped_mm", "aten._scaled_grouped_mm_v2")
def grouped_mm(call: Call) -> Cost:
    """Rows by experts (2-d x 3-d, 3-d x 2-d), a batch (3-d x 3-d), or groups of the inner dimension."""
    left, right, out = call.tensor("self"), call.tensor("mat2"), call.output
    packed = 2 if left.dtype == "float4_e2m1fn_x2" else 1
    ranks = len(left.shape), len(right.shape)
    work = left.shape[-2] * left.shape[-1] * right.shape[-1] * packed
    if ranks == (3, 3):
        work *= left.shape[0]
    reads, expected = {}, {}
    if ranks == (2, 3):
        reads["mat2"], expected["mat2"] = experts_read(call, right, rows=left.shape[0])
    elif ranks == (3, 2):
        reads["self"], expected["self"] = experts_read(call, left, rows=right.shape[1])
    scaled = out.numel if "scale_a" in call.op.args else 0
    bias = out.numel if call.optional("bias") else 0
    return call.cost(
        matmul=multiply_adds(left.dtype, work),
        vector=vector(out.dtype, scaled + bias),
        reads=reads,
        expected_reads=expected,
    )


def experts_read(call: Call, weights: Tensor, rows: int) -> tuple[int, int]:
    """Bytes read of a stack of experts' matrices, at least and on average, by rows that each meet one expert."""
    experts = weights.shape[0]
    tokens, chosen = call.graph.tokens, 1
    if tokens > 0 and rows % tokens == 0:
        chosen = rows // tokens
    else:
        tokens = rows
    least = min(chosen, experts, rows)
    average = experts * (1 - (1 - least / experts) ** tokens) if experts else 0.0
    whole = reach(call, weights)
    return whole * least // max(experts, 1), round(whole * average / max(experts, 1))
