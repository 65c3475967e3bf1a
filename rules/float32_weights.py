"""Weights are kept in 32 bits: twice the bytes to read, and products that miss the fast matrix units.

**What it checks.** At least half of the bytes of weights that the phase reads are float32 or float64, whether they are
multiplied as they are or cast in every step, as under `torch.autocast`.

**Why it costs.** A decode step takes as long as its weights need to arrive, so that it takes twice as long as with 16
bits. Where arithmetic sets the pace, float32 products run on vector units unless TF32 is allowed, and the 16-bit ones
on units many times as fast. Activations and the KV cache are twice as large as well.

**How it is estimated.** The phase is priced as the model cast to bfloat16 would run it (float16 where the GPU lacks
bfloat16, or where the program casts to it): weights, buffers, inputs, caches and all that follows from them. What the
program asks for in float32, such as the inside of a norm or a softmax, stays, and is cast there and back.

**Remedy.** Load the weights in 16 bits, or cast the model once after loading.

    model = model.to(torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)

**When to ignore.** Where results are needed to more than 3 significant digits, such as in scientific simulation; in
training, where an optimiser wants a copy in float32. For float16, check that no activation exceeds 65504.

**References.** Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training" (2019); PyTorch documentation,
"Automatic Mixed Precision package".
"""

from collections import Counter
from collections.abc import Iterator

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Severity, Situation, rule
from ..analyzer.graph import ITEM_BITS, Graph, Role
from ..hardware.gpu import Gpu
from ._retype import cast_throughout

_WIDE = ("float32", "float64")
_LEAST_SHARE = 0.5
"""Of the bytes of weights: below it, a few layers were left wide on purpose."""


@rule("WGT002", "float32-weights", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """The phase as a whole, where most bytes of its weights are wide."""
    graph = situation.graph
    read = _weight_bytes(graph)
    wide = max(_WIDE, key=lambda dtype: read[dtype])
    total = sum(read.values())
    if not total or read[wide] < _LEAST_SHARE * total:
        return
    narrow = _narrow(graph, situation.gpu)
    yield Match(
        op=None,
        message=f"{read[wide] / total:.0%} of the weight bytes are {wide}",
        evidence={
            "wide_weight_bytes": read[wide],
            "narrow_weight_bytes": read[wide] * ITEM_BITS[narrow] // ITEM_BITS[wide],
            "weight_bytes": total,
        },
        remedy=Remedy(
            text="Load the weights in 16 bits, or cast the model once after loading.",
            code=f"model = model.to(torch.{narrow})",
        ),
        rewrite=cast_throughout(wide, narrow),
    )


def _weight_bytes(graph: Graph) -> Counter[str]:
    """Bytes of the weights that ops use, by type."""
    used = {tensor for op in graph.ops for tensor in op.inputs}
    homes = {graph.tensors[tensor].storage: graph.tensors[tensor].dtype for tensor in used}
    found: Counter[str] = Counter()
    for home, dtype in homes.items():
        if graph.storages[home].role is Role.WEIGHT:
            found[dtype] += graph.storages[home].nbytes
    return found


def _narrow(graph: Graph, gpu: Gpu) -> str:
    """The 16-bit type: the one that the program casts weights to in every step, else what the GPU multiplies fast."""
    casts = Counter(
        graph.tensors[op.outputs[0]].dtype
        for op in graph.ops
        if operator_name(op.target) in ("aten.to", "aten._to_copy")
        and op.outputs
        and graph.role(op.inputs[0]) is Role.WEIGHT
    )
    if casts["float16"] > casts["bfloat16"]:
        return "float16"
    return "float16" if "float16" in gpu.tensor and "bfloat16" not in gpu.tensor else "bfloat16"
