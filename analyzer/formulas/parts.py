"""Ops that launch several kernels: copies of arguments first, the op itself, what is done to its result."""

from collections.abc import Mapping
from dataclasses import replace

from ..cost import Call, Cost, Part, operator_name
from ..graph import TensorRef


def in_parts(call: Call, cost: Cost, copied: Mapping[str, int], bias: str = "") -> Cost:
    """The cost as several kernels: copies of arguments, the product, and the bias added to it."""
    if not copied and not bias:
        return cost
    indices = {name: tensor_index(call, name) for name in copied}
    added = (tensor_index(call, bias),) if bias else ()
    read = {access.tensor: access for access in cost.traffic if access.read}
    kernels = [
        Part(
            name=f"copy {name} for {operator_name(call.op.target).removeprefix('aten.')}",
            cost=Cost(traffic=(read[index],) if index in read else (), scratch_written=copied[name]),
        )
        for name, index in indices.items()
    ]
    between = call.output.nbytes if bias else 0
    rest = [a for a in cost.traffic if a.written or a.tensor not in (*indices.values(), *added)]
    ends = [a for a in cost.traffic if bias and (a.written or a.tensor in added)]
    total = sum(copied.values())
    product = replace(
        cost,
        vector={} if bias else cost.vector,
        traffic=tuple(a for a in rest if not (bias and a.written)),
        scratch_read=total,
        scratch_written=between,
    )
    kernels.append(Part(name=call.op.target, cost=product))
    if bias:
        kernels.append(Part(name="add bias", cost=Cost(vector=cost.vector, traffic=tuple(ends), scratch_read=between)))
    moved = total + between
    return replace(cost, scratch_read=moved, scratch_written=moved, parts=tuple(kernels))


def tensor_index(call: Call, name: str) -> int:
    """Index in the graph of a tensor argument; KeyError when it is absent or no tensor."""
    ref = call.op.args[name]
    if not isinstance(ref, TensorRef):
        raise KeyError(name)
    return ref.tensor
