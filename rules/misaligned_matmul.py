"""Rows of a matrix do not begin where the matrix units can load them.

**What it checks.** Linear layers that arithmetic limits, on matrix units, whose number of inputs or outputs is no
multiple of 16 bytes (8 numbers of 16 bits, 4 of 32), such as a head for a vocabulary of 50257.

**Why it costs.** Kernels for Hopper load whole tiles through a unit that wants every row to begin at a multiple of 16
bytes. Other rows are left to kernels for older GPUs, which reach some 60% of Hopper's peak, and load number by number.

**How it is estimated.** The weight is padded, outputs to a multiple of 64 where they are many, and the result is cut to
its width as a view. An input that has to be padded is copied, and the copy is counted. What misalignment costs is
published for Hopper alone; on other GPUs the estimate knows of no penalty, and the rule is silent.

**Remedy.** Pad the vocabulary or the layer when it is built, and cut what comes out.

    self.head = nn.Linear(dim, 64 * math.ceil(vocabulary / 64), bias=False)
    logits = self.head(x)[..., :vocabulary]

With transformers: `model.resize_token_embeddings(pad_to_multiple_of=64)`.

**When to ignore.** Compiled by Inductor, which may pad by itself (`shape_padding`); layers that memory limits.

**References.** NVIDIA, "Matrix Multiplication Background User's Guide", on alignment to 16 bytes; NVIDIA cuBLASDx
documentation, on the alignment that wgmma needs; Luo et al., "Dissecting the NVIDIA Hopper Architecture through
Microbenchmarking and Multiple Level Analysis" (arXiv 2501.12084), on mma.sync and wgmma.
"""

from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Confidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import ITEM_BITS, Arg, Graph, Op, Role, TensorRef
from ..analyzer.rewrite import Draft
from ..analyzer.roofline import Bound
from ._call import Writer

_REMEDY = Remedy(
    text="Pad the layer when it is built, and cut what comes out.",
    code=(
        "self.head = nn.Linear(dim, 64 * math.ceil(vocabulary / 64), bias=False)\n"
        "logits = self.head(x)[..., :vocabulary]"
    ),
)
_LOADED_AT_ONCE_BITS = 128
_MANY = 1024
_MULTIPLE = 64
"""What `_MANY` outputs or more are rounded up to, as the remedy says; fewer, to the next 16 bytes."""


@rule("SHP001", "misaligned-matmul", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every linear layer off 16 bytes that arithmetic limits."""
    graph = situation.graph
    for index, (op, cost, found) in enumerate(zip(graph.ops, situation.costs, situation.analysis.ops, strict=True)):
        if operator_name(op.target) != "aten.linear" or found.bound is not Bound.COMPUTE:
            continue
        if all(gemm.aligned for gemm in cost.gemms) or not _on_matrix_units(situation, index):
            continue
        sizes = _sizes(graph, op)
        if sizes is None:
            continue
        rows, inner = sizes
        wide_rows, wide_inner = _padded(graph, op, rows, many=True), _padded(graph, op, inner, many=False)
        if (wide_rows, wide_inner) == (rows, inner):
            continue
        yield Match(
            op=index,
            message=f"a product of {inner} inputs and {rows} outputs is off the multiple of 16 bytes",
            evidence={
                "inputs": inner,
                "inputs_padded": wide_inner,
                "outputs": rows,
                "outputs_padded": wide_rows,
            },
            remedy=_REMEDY,
            confidence=Confidence.MEDIUM,  # libraries choose kernels by rules of their own
            rewrite=_wider(index, wide_rows, wide_inner),
        )


def _on_matrix_units(situation: Situation, index: int) -> bool:
    cost = situation.costs[index]
    rates = [situation.gpu.matmul_rate(dtype, tf32=cost.tf32) for dtype in cost.matmul]
    return all(rate is not None and rate.unit == "tensor" for rate in rates)


def _sizes(graph: Graph, op: Op) -> tuple[int, int] | None:
    """Outputs and inputs of a layer with a weight of its own."""
    weight = op.args.get("weight")
    if not isinstance(weight, TensorRef) or graph.role(weight.tensor) is not Role.WEIGHT:
        return None
    shape = graph.tensors[weight.tensor].shape
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _padded(graph: Graph, op: Op, size: int, *, many: bool) -> int:
    least = _LOADED_AT_ONCE_BITS // ITEM_BITS[graph.tensors[op.outputs[0]].dtype]
    if size % least == 0:
        return size
    multiple = _MULTIPLE if many and size >= _MANY else least
    return -(-size // multiple) * multiple


def _wider(index: int, rows: int, inner: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim((index,)):
            return
        op = draft.graph.ops[index]
        writer = Writer(draft, index)
        source, (old,) = op.args["input"], op.outputs
        if not isinstance(source, TensorRef):
            return
        was = draft.graph.tensors[old]
        made = draft.tensor((*was.shape[:-1], rows), was.dtype)
        args: dict[str, Arg] = {
            "input": TensorRef(tensor=writer.padded(source.tensor, inner)),
            "weight": _grown(draft, op, "weight", (rows, inner)),
            "bias": _grown(draft, op, "bias", (rows,)),
        }
        product = replace(op, args={**op.args, **args}, outputs=(made,))
        part, cut = writer.cut(made, was.shape[-1])
        writer.end(old, [product] if cut is None else [product, cut], part)

    return rewrite


def _grown(draft: Draft, op: Op, name: str, shape: tuple[int, ...]) -> Arg:
    """A weight padded to a shape, once for all that use it; None where there is none."""
    given = op.args.get(name)
    if not isinstance(given, TensorRef):
        return None
    was = draft.graph.tensors[given.tensor]
    key = ("padded", given.tensor, str(shape))
    if was.shape == shape:
        return given
    if key not in draft.shared:
        home = draft.graph.storages[was.storage]
        draft.shared[key] = draft.tensor(shape, was.dtype, role=Role.WEIGHT, name=home.name)
    return TensorRef(tensor=draft.shared[key])
