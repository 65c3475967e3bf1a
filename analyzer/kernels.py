"""Graph -> kernels: the units of execution that are placed on the roofline.

Eager PyTorch launches a kernel for every op that is not free, or several; a kernel here is a set of ops with one cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .cost import Cost, Status
from .graph import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One launch: the ops it covers (indices into `Graph.ops`), what they cost together, and how often it is made."""

    name: str
    ops: tuple[int, ...]
    cost: Cost
    repeat: int = 1


def eager_kernels(graph: Graph, costs: Sequence[Cost]) -> tuple[Kernel, ...]:
    """The kernels of each op that is not free, one after the other."""
    kernels: list[Kernel] = []
    for index, (op, cost) in enumerate(zip(graph.ops, costs, strict=True)):
        if cost.parts:
            kernels += [Kernel(name=part.name, ops=(index,), cost=part.cost, repeat=op.repeat) for part in cost.parts]
        elif cost.status is not Status.FREE:
            kernels.append(Kernel(name=op.target, ops=(index,), cost=cost, repeat=op.repeat))
    return tuple(kernels)
