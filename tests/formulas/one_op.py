"""One ATen call as a Graph, without the tracer: schema names, storages and mutations as torch says."""

import dataclasses
from typing import Any

import pytest
import torch
from fxroof.analyzer.cost import Cost, bytes_by_role
from fxroof.analyzer.graph import Arg, Graph, Op, Role, Storage, Tensor, TensorRef
from fxroof.analyzer.pricing import price
from fxroof.hardware.catalog import load
from fxroof.hardware.gpu import Gpu
from torch.utils import _pytree as pytree

aten = torch.ops.aten

MI300X = load("mi300x").gpu
"""A part on which a convolution adds its bias itself: what one op moves is what one kernel moves."""


class OneOp:
    """Collects the tensors of one call; memory that exists before the call is input, the rest is output."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.sizes: list[Storage] = []
        self.tensors: dict[Tensor, int] = {}

    def index(self, value: torch.Tensor, role: Role) -> int:
        memory = value.untyped_storage()
        if memory._cdata not in self.storages:
            self.storages[memory._cdata] = len(self.sizes)
            self.sizes.append(Storage(nbytes=memory.nbytes(), role=role, name=role))
        tensor = Tensor(
            storage=self.storages[memory._cdata],
            dtype=str(value.dtype).removeprefix("torch."),
            shape=tuple(value.shape),
            stride=value.stride(),
            offset=value.storage_offset(),
        )
        return self.tensors.setdefault(tensor, len(self.tensors))

    def arg(self, value: Any) -> Arg:
        if isinstance(value, torch.Tensor):
            return TensorRef(tensor=self.index(value, Role.INPUT))
        if isinstance(value, list | tuple):
            return tuple(self.arg(v) for v in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return str(value).removeprefix("torch.")


def graph_of(target: Any, *args: Any, tokens: int = 0, **kwargs: Any) -> Graph:
    """The one-op graph of calling an ATen overload."""
    seen = OneOp()
    bound: dict[str, Arg] = {}
    for position, parameter in enumerate(target._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(parameter.name, parameter.default_value)
        bound[parameter.name] = seen.arg(value)
    mutates = tuple(a.name for a in target._schema.arguments if a.alias_info and a.alias_info.is_write)
    result = target(*args, **kwargs)
    outputs = tuple(seen.index(t, Role.OUTPUT) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
    op = Op(name="op", target=str(target), args=bound, outputs=outputs, mutates=mutates)
    return Graph(phase="forward", tokens=tokens, storages=tuple(seen.sizes), tensors=tuple(seen.tensors), ops=(op,))


def cost_of(target: Any, *args: Any, tokens: int = 0, gpu: Gpu = MI300X, **kwargs: Any) -> Cost:
    """The cost of calling an ATen overload; few formulas ask for the GPU."""
    (cost,) = price(graph_of(target, *args, tokens=tokens, **kwargs), gpu)
    return cost


def traffic_of(target: Any, *args: Any, tokens: int = 0, **kwargs: Any) -> tuple[int, int]:
    """Bytes read and written, several views of one storage capped by it; the op's own buffers included."""
    graph = graph_of(target, *args, tokens=tokens, **kwargs)
    (cost,) = price(graph, MI300X)
    return moved(graph, cost)


def moved(graph: Graph, cost: Cost) -> tuple[int, int]:
    """Bytes read and written by a kernel."""
    pairs = bytes_by_role(graph, cost).values()
    return sum(read for read, _ in pairs), sum(written for _, written in pairs)


def add_up(graph: Graph, cost: Cost) -> None:
    """Assert that the kernels of an op make the whole."""
    parts = [part.cost for part in cost.parts]
    if not parts:
        return
    assert sum(p.executed_matmul_flops for p in parts) == pytest.approx(cost.executed_matmul_flops)
    assert sum(p.vector_flops for p in parts) == pytest.approx(cost.vector_flops)
    assert sum(p.special for p in parts) == pytest.approx(cost.special)
    assert tuple(map(sum, zip(*(moved(graph, p) for p in parts), strict=True))) == moved(graph, cost)


def read_of(cost: Cost, graph: Graph, name: str) -> int:
    """Bytes read of one argument."""
    ref = graph.ops[0].args[name]
    assert isinstance(ref, TensorRef)
    return sum(a.read for a in cost.traffic if a.tensor == ref.tensor)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def as_numbers(cost: Cost) -> dict[str, Any]:
    """A cost as plain numbers, for comparison of two costs whose tensors are numbered differently."""
    return dataclasses.asdict(cost) | {"traffic": sorted((a.read, a.written) for a in cost.traffic)}
