"""Collectives: what GPUs that share a model tell each other. See `analyzer/collectives.py` for their seconds.

Device memory sees at least the GPU's own tensor read and the result written; buffers of an algorithm are not counted.
"""

from ..cost import Call, Cost, Exchange, formula


@formula("fxroof.all_reduce")
def all_reduce(call: Call) -> Cost:
    """The sum of every GPU's tensor, in its place."""
    return call.cost(exchange=_exchange(call, "all_reduce"))


@formula("fxroof.all_gather")
def all_gather(call: Call) -> Cost:
    """Every GPU's columns, side by side."""
    return call.cost(exchange=_exchange(call, "all_gather"))


def _exchange(call: Call, kind: str) -> Exchange:
    return Exchange(kind=kind, nbytes=call.output.touched_bytes, gpus=call.integer("gpus", 1))
