"""What must hold of fused kernels whatever the program: random programs, and the models of the other tests."""

from collections import Counter
from math import prod

import networkx as nx
import pytest
from fxroof.analyzer.cost import Status, bytes_by_role
from fxroof.analyzer.fusion import compiled_kernels
from fxroof.analyzer.graph import Graph, Op, Role, Storage, Tensor, TensorRef, dataflow
from fxroof.analyzer.kernels import Kernel, eager_kernels
from fxroof.analyzer.pricing import price
from fxroof.hardware import catalog
from hypothesis import given, settings
from hypothesis import strategies as st
from support import traced

H100 = catalog.load("h100_sxm").gpu
ROWS, WIDTH = 64, 32
MODELS = ("gptfast", "mixtral-8x7b", "mamba2-2.7b", "resnet18")


class Program:
    """A graph written op by op; every result is fresh memory."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []

    def tensor(self, shape: tuple[int, ...], role: Role = Role.ACTIVATION) -> int:
        self.storages.append(Storage(nbytes=4 * prod(shape), role=role, name=f"s{len(self.storages)}"))
        stride = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
        self.tensors.append(Tensor(storage=len(self.storages) - 1, dtype="float32", shape=shape, stride=stride))
        return len(self.tensors) - 1

    def call(program, target: str, shape: tuple[int, ...], /, **args: object) -> int:  # `self` is an argument of ops
        result = program.tensor(shape)
        bound = {n: TensorRef(tensor=v) if n in ("self", "other", "input", "weight") else v for n, v in args.items()}
        program.ops.append(Op(name=f"op{len(program.ops)}", target=f"aten.{target}", args=bound, outputs=(result,)))  # type: ignore[arg-type]  # made up
        return result

    def graph(self, inputs: list[int], outputs: list[int]) -> Graph:
        return Graph(
            phase="forward",
            storages=tuple(self.storages),
            tensors=tuple(self.tensors),
            ops=tuple(self.ops),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
        )


@st.composite
def programs(draw: st.DrawFn) -> Graph:
    """Elementwise ops, sums over rows and over columns, and products with a weight, in any order."""
    made = Program()
    inputs = [made.tensor((ROWS, WIDTH), Role.INPUT) for _ in range(draw(st.integers(1, 3)))]
    weight = made.tensor((WIDTH, WIDTH), Role.WEIGHT)
    known = {(ROWS, WIDTH): list(inputs), (ROWS, 1): [], (1, WIDTH): []}
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(("unary", "binary", "binary", "binary", "rows", "columns", "linear")))
        full = known[ROWS, WIDTH]
        one = draw(st.sampled_from(full))
        match kind:
            case "unary":
                full.append(made.call(draw(st.sampled_from(("exp.default", "tanh.default"))), (ROWS, WIDTH), self=one))
            case "binary":
                other = draw(st.sampled_from([*full, *known[ROWS, 1], *known[1, WIDTH]]))
                full.append(made.call("mul.Tensor", (ROWS, WIDTH), self=one, other=other))
            case "rows":
                known[ROWS, 1].append(made.call("sum.dim_IntList", (ROWS, 1), self=one, dim=(-1,), keepdim=True))
            case "columns":
                known[1, WIDTH].append(made.call("sum.dim_IntList", (1, WIDTH), self=one, dim=(0,), keepdim=True))
            case "linear":
                full.append(made.call("linear.default", (ROWS, WIDTH), input=one, weight=weight, bias=None))
    everything = [t for tensors in known.values() for t in tensors if t not in inputs]
    outputs = draw(st.lists(st.sampled_from(everything), min_size=1, max_size=3, unique=True))
    return made.graph(inputs, outputs)


def total(graph: Graph, kernels: tuple[Kernel, ...]) -> int:
    return sum(k.repeat * sum(map(sum, bytes_by_role(graph, k.cost).values())) for k in kernels)


def check(graph: Graph) -> None:
    costs = price(graph, H100)
    kernels = compiled_kernels(graph, costs)
    flow = dataflow(graph)
    needed = needed_ops(graph, flow)
    covered = {i for k in kernels for i in k.ops}
    paid = {i for i, cost in enumerate(costs) if cost.status is not Status.FREE}
    assert needed & paid <= covered <= paid, "every op that is needed and not free is in a kernel"

    done: set[int] = set()
    for kernel in kernels:
        done.update(kernel.ops)
        before = {u for v in kernel.ops for u in flow.predecessors(v)}
        assert before & covered <= done, "a kernel runs after what it reads is computed"

    matmul = Counter(i for k in kernels for i in k.ops if costs[i].matmul)
    assert all(kernels_of == max(len(costs[i].parts), 1) for i, kernels_of in matmul.items())

    written = Counter(a.tensor for k in kernels for a in k.cost.traffic if a.written)
    homes = Counter(graph.tensors[t].storage for t in written.elements())
    fresh = {graph.tensors[o].storage for i in covered for o in graph.ops[i].outputs}
    overwritten = {graph.tensors[t].storage for op in graph.ops for t in graph.mutated(op)}
    for output in {graph.tensors[t].storage for t in graph.outputs} & (fresh - overwritten):
        assert homes[output] == 1, "what the caller gets is written, once"


def needed_ops(graph: Graph, flow: "nx.DiGraph[int]") -> set[int]:
    """Ops that what the caller gets depends on."""
    results = {graph.tensors[t].storage for t in graph.outputs}
    last = {graph.tensors[t].storage: i for i, op in enumerate(graph.ops) for t in op.outputs if not graph.is_view(op)}
    roots = {last[s] for s in results if s in last}
    return roots | {u for root in roots for u in nx.ancestors(flow, root)}


@given(programs())
@settings(max_examples=150, deadline=None)
def test_any_program(graph: Graph) -> None:
    check(graph)
    costs = price(graph, H100)
    needed = needed_ops(graph, dataflow(graph))
    eager = tuple(k for k in eager_kernels(graph, costs) if set(k.ops) <= needed)
    assert total(graph, compiled_kernels(graph, costs)) <= total(graph, eager)


@pytest.mark.parametrize("name", MODELS)
def test_any_model(name: str) -> None:
    for graph in traced(name).graphs.values():
        check(graph)
        costs = price(graph, H100)
        assert total(graph, compiled_kernels(graph, costs)) < total(graph, eager_kernels(graph, costs))
