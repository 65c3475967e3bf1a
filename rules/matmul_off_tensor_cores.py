"""Products run on vector units, because their type has no matrix units on this GPU or is not allowed to use them.

**What it checks.** Matrix products that arithmetic limits and that this GPU computes on its vector units: float32 ones
where it has units for TF32, which PyTorch does not use for products unless told to (for convolutions it does), and
bfloat16 ones on a GPU that multiplies only float16. Products of an attention that one kernel could do are ATT001's.

**Why it costs.** Vector units are some 4 to 15 times slower: an H100 multiplies float32 at 67 TFLOP/s, TF32 at 495 and
bfloat16 at 989.

**How it is estimated.** float32: the same product with operands rounded to TF32 as they are loaded, so the same bytes,
at the rate of the matrix units. bfloat16: the whole graph in float16, as many bytes. What a model whose weights are
float32 saves in bfloat16 throughout is another finding, WGT002.

**Remedy.** Allow TF32: operands keep float32's range and 10 bits of mantissa, sums are float32.

    torch.set_float32_matmul_precision("high")

On a GPU without bfloat16 (Volta, Turing): `model.to(torch.float16)`.

**When to ignore.** Where products need all 24 bits, such as in solvers or small routers whose near ties matter. float16
overflows beyond 65504.

**References.** PyTorch documentation, `torch.set_float32_matmul_precision`, and "TensorFloat-32 (TF32) on Ampere (and
later) devices"; NVIDIA, "A100 Tensor Core GPU Architecture" (2020).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..analyzer.cost import ALLOWS_TF32, CUBLAS, Cost, operator_name
from ..analyzer.finding import Evidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, Graph
from ..analyzer.rewrite import Draft
from ..analyzer.roofline import Bound
from ..hardware.gpu import Gpu, Rate
from . import materialized_attention_scores
from ._retype import cast_throughout

_TF32 = Remedy(
    text="Allow TF32 for float32 products.",
    code='torch.set_float32_matmul_precision("high")',
)
_FLOAT16 = Remedy(
    text="Use float16, the 16-bit type that this GPU has matrix units for.",
    code="model = model.to(torch.float16)",
)


@rule("DTY001", "matmul-off-tensor-cores", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every float32 product that vector units limit, or all bfloat16 ones together, where matrix units could do it."""
    gpu, graph, costs = situation.gpu, situation.graph, situation.costs
    if "float16" in gpu.tensor and "bfloat16" not in gpu.tensor:
        limited = list(_limited(situation, "bfloat16"))
        if limited:
            yield Match(
                op=None,
                message="bfloat16 products run on vector units",
                evidence=_evidence(gpu, "bfloat16", gpu.matmul_rate("float16"), _flops(graph, costs, limited)),
                remedy=_FLOAT16,
                rewrite=cast_throughout("bfloat16", "float16"),
            )
    if "tfloat32" in gpu.tensor:
        limited = list(_limited(situation, "float32"))
        fused = _in_attention(situation) if limited else set()
        for index in limited:
            if operator_name(graph.ops[index].target) not in CUBLAS or index in fused:
                continue
            yield Match(
                op=index,
                message="a float32 product runs on vector units",
                evidence=_evidence(
                    gpu, "float32", gpu.matmul_rate("float32", tf32=True), _flops(graph, costs, [index])
                ),
                remedy=_TF32,
                rewrite=_rounding(index),
            )


def _in_attention(situation: Situation) -> set[int]:
    """Ops of attention that one fused kernel could do."""
    return {index for naive, *_ in situation.once(materialized_attention_scores.found) for index in naive.ops}


def _limited(situation: Situation, dtype: str) -> Iterator[int]:
    """Products of a type that take as long as vector units need for them."""
    rate = situation.gpu.matmul_rate(dtype)
    if rate is None or rate.unit == "tensor":
        return
    for index, (cost, found) in enumerate(zip(situation.costs, situation.analysis.ops, strict=True)):
        if found.bound is Bound.COMPUTE and cost.matmul and not cost.tf32:
            work = cost.executed_matmul_flops
            if 2 * cost.matmul.get(dtype, 0.0) > work and work > cost.vector_flops:
                yield index


def _flops(graph: Graph, costs: Sequence[Cost], indices: Sequence[int]) -> float:
    return sum(graph.ops[i].repeat * costs[i].executed_matmul_flops for i in indices)


def _evidence(gpu: Gpu, dtype: str, faster: Rate | None, flops: float) -> Evidence:
    slow = gpu.matmul_rate(dtype)
    return {
        "flops": flops,
        "runs_on": slow.describe() if slow else "",
        "could_run_on": faster.describe() if faster else "",
    }


def _rounding(index: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim((index,)):
            op = draft.graph.ops[index]
            args: dict[str, Arg] = {**op.args, ALLOWS_TF32: True}
            draft.replace(index, replace(op, args=args))

    return rewrite
