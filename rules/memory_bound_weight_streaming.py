"""Products that only wait for their weights: 16 or 32 bits of each are read to multiply a handful of rows.

**What it checks.** Matrix products with a weight of 16 bits or more that device memory limits and whose weight is
at least half of what they move.

**Why it costs.** A decode step reads every weight for a few rows: 2 FLOPs a row and weight, against hundreds that
the GPU could do while one weight arrives. The time is weight bytes over bandwidth, whatever the arithmetic.

**How it is estimated.** The product becomes one over packed weights, widened in registers as they are multiplied:
weight bytes at packed width plus scales (int8 and fp8: one a row; int4: 16 bits a group of 128; nvfp4: 8 bits a
group of 16), activations as before. The widths exclude each other: each has its own saving, the first is the
rule's.

**Remedy.** Quantise the weights of these layers, with a library whose kernels read them packed.

    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantize_(model, Int8WeightOnlyConfig())

**When to ignore.** When quality does not allow it; when batches grow to where arithmetic takes over.

**References.** Dettmers et al., "LLM.int8()" (2022); Lin et al., "AWQ" (2023); NVIDIA, "Introducing NVFP4" (2025).
"""

from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import ITEM_BITS, Arg, Op, Role, TensorRef
from ..analyzer.rewrite import Draft
from ..analyzer.roofline import Bound
from ._widths import Width, widths

_CONFIGS = {"fp8 weights": "Float8WeightOnlyConfig", "int8 weights": "Int8WeightOnlyConfig"}
"""Of torchao, by the width that comes first."""
PACKED = "fxroof.linear_packed.default"
_LEAST_BITS = 16
_LEAST_SHARE = 0.5
"""Of the bytes that a product moves: below it, its weight is not what it waits for."""


@rule("WGT001", "memory-bound-weight-streaming", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """Every linear layer that waits for its weight."""
    graph = situation.graph
    for index, (op, found) in enumerate(zip(graph.ops, situation.analysis.ops, strict=True)):
        weight = op.args.get("weight")
        if operator_name(op.target) != "aten.linear" or not isinstance(weight, TensorRef):
            continue
        matrix = graph.tensors[weight.tensor]
        if graph.role(weight.tensor) is not Role.WEIGHT or ITEM_BITS[matrix.dtype] < _LEAST_BITS:
            continue
        moved = found.bytes_read + found.bytes_written
        if found.bound is not Bound.MEMORY or op.repeat * matrix.touched_bytes < _LEAST_SHARE * moved:
            continue
        first, *others = widths(situation.gpu)
        yield Match(
            op=index,
            message="the product waits for its weights to arrive",
            evidence={"weight_bytes": op.repeat * matrix.touched_bytes, "bytes": moved, "dtype": matrix.dtype},
            remedy=_remedy(first),
            rewrite=_packed(index, op, first),
            alternatives={width.name: _packed(index, op, width) for width in others},
        )


def _remedy(width: Width) -> Remedy:
    config = _CONFIGS[width.name]
    return Remedy(
        text=f"Quantise the weights of these layers ({width.name}), with kernels that read them packed.",
        code=f"from torchao.quantization import {config}, quantize_\nquantize_(model, {config}())",
    )


def _packed(index: int, op: Op, width: Width) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim((index,)):
            draft.replace(index, _narrowed(draft, op, width))
        elif index in draft.joined:
            place, wide = draft.joined[index]
            if wide == {index}:  # the last of them: one weight of several has one width
                draft.replace(place, _narrowed(draft, draft.now(place), width))
            wide.discard(index)

    return rewrite


def _narrowed(draft: Draft, op: Op, width: Width) -> Op:
    weight = op.args["weight"]
    assert isinstance(weight, TensorRef)  # noqa: S101  # what `check` found, or the join of several
    rows, inner = draft.tensors[weight.tensor].shape
    name = draft.storages[draft.tensors[weight.tensor].storage].name
    groups = -(-inner // width.group(inner))
    stored = draft.tensor((rows, -(-inner // width.per_byte)), width.dtype, role=Role.WEIGHT, name=name)
    scales = draft.tensor((rows, groups), width.scale, role=Role.WEIGHT, name=f"{name}.scales")
    args: dict[str, Arg] = {
        "x": op.args["input"],
        "weight": TensorRef(tensor=stored),
        "scales": TensorRef(tensor=scales),
        "zeros": None,
        "order": None,
        "bias": op.args.get("bias"),
        "outputs": rows,
    }
    return replace(op, target=PACKED, args=args)
