"""Grouped matrix products, one per expert.

Rows are sorted by expert and `offs` says where each group ends, so every row meets one expert: 2 * rows * k *
n FLOPs however the rows are spread. What depends on data is how many experts' weights are read. The least is
what a single token uses, k = rows / tokens, since every token may choose the same. On average, with choices
spread evenly, tokens draw E * (1 - (1 - k/E)^tokens) distinct experts.

Where N GPUs share the experts, each holding E/N of them whole, all rows come along and those that meet other GPUs'
experts are skipped. Which GPU has how many depends on data; the busiest has at least 1/N of the rows and, where every
token chooses the same k, k/N of those experts. On average a GPU has that share of the rows and of the distinct experts.
"""

from ..cost import Call, Cost, formula
from ..graph import Tensor
from .arithmetic import multiply_adds, products, reach, vector


@formula("aten._grouped_mm", "aten._scaled_grouped_mm", "aten._scaled_grouped_mm_v2")
def grouped_mm(call: Call) -> Cost:
    """Rows by experts (2-d x 3-d, 3-d x 2-d), a batch (3-d x 3-d), or groups of the inner dimension."""
    left, right, out = call.tensor("self"), call.tensor("mat2"), call.output
    packed = 2 if left.dtype == "float4_e2m1fn_x2" else 1
    ranks = len(left.shape), len(right.shape)
    rows = own_rows(call, left.shape[-2]) if ranks == (2, 3) else left.shape[-2]
    work = rows * left.shape[-1] * right.shape[-1] * packed
    if ranks == (3, 3):
        work *= left.shape[0]
    reads, expected = {}, {}
    writes: int | None = None
    if ranks == (2, 3):
        reads["mat2"], expected["mat2"] = experts_read(call, right, rows=left.shape[0])
        reads["self"], writes = own_bytes(call, left), own_bytes(call, out)
        scales = call.optional("scale_b")
        if scales is not None:  # those of the experts that are read
            reads["scale_b"], expected["scale_b"] = experts_read(call, scales, rows=left.shape[0])
    elif ranks == (3, 2):
        reads["self"], expected["self"] = experts_read(call, left, rows=right.shape[1])
    results = out.numel * rows // max(left.shape[-2], 1)
    scaled = results if "scale_a" in call.op.args else 0
    bias = results if call.optional("bias") else 0
    return call.cost(
        matmul=multiply_adds(left.dtype, work),
        vector=vector(out.dtype, scaled + bias),
        reads=reads,
        writes=writes,
        expected_reads=expected,
        gemms=products(
            rows,
            right.shape[-1],
            left.shape[-1] * packed,
            left.shape[0] if ranks == (3, 3) else 1,
            groups=experts_met(call, right, left.shape[0]) if ranks == (2, 3) else 0,
        ),
    )


def own_rows(call: Call, rows: int) -> int:
    """Of rows that each meet one expert, those that meet one of this GPU's."""
    return -(-rows // call.graph.expert_ranks)


def own_bytes(call: Call, tensor: Tensor) -> int:
    """Bytes of a tensor's rows that meet one of this GPU's experts."""
    rows = tensor.shape[0]
    return reach(call, tensor) * own_rows(call, rows) // max(rows, 1)


def experts_read(call: Call, weights: Tensor, rows: int) -> tuple[int, int]:
    """Bytes read of a stack of experts' matrices, at least and on average, by rows that each meet one expert.

    Args:
        call: the op.
        weights: the experts that this GPU holds, one a row of the first dimension.
        rows: all rows, those that meet other GPUs' experts included.
    """
    least, average = _drawn(call, weights, rows)
    experts, whole = weights.shape[0], reach(call, weights)
    return whole * least // max(experts, 1), round(whole * average / max(experts, 1))


def experts_met(call: Call, weights: Tensor, rows: int) -> int:
    """Experts of this GPU that have any row, on average; arguments as of `experts_read`."""
    return max(1, round(_drawn(call, weights, rows)[1]))


def _drawn(call: Call, weights: Tensor, rows: int) -> tuple[int, float]:
    """Experts that have any row, at least and on average."""
    experts, ranks = weights.shape[0], call.graph.expert_ranks
    tokens, chosen = call.graph.tokens, 1
    if tokens > 0 and rows % tokens == 0:
        chosen = rows // tokens
    else:
        tokens = rows
    drawn = min(chosen, experts * ranks, rows)
    least = -(-drawn // ranks)
    return least, experts * (1 - (1 - drawn / (experts * ranks)) ** tokens) if experts else 0.0
