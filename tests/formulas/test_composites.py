"""Composite ops: their kernels are those that PyTorch dispatches to, and each moves what it is given and returns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from formulas.eager import Launched, inside, launched
from formulas.one_op import add_up, graph_of, moved
from fxroof.analyzer.cost import Cost
from fxroof.analyzer.fusion import compiled_kernels
from fxroof.analyzer.graph import Graph
from fxroof.analyzer.pricing import price
from fxroof.hardware.catalog import load
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten
H100 = load("h100_sxm").gpu


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def half(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.bfloat16)


def ids(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def mask(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.bool)


X, Y = meta(4, 8, 16), meta(4, 8, 16)
IMAGE = meta(2, 4, 6, 6)
ROWS = meta(30, 8)

CASES: list[tuple[Any, ...]] = [
    (aten.masked_fill.Scalar, X, mask(4, 8, 16), 0.0),
    (aten.masked_fill.Scalar, half(2, 4, 8, 8), mask(8, 8), 0.0),
    (aten.masked_fill.Scalar, meta(8, 8), mask(2, 1, 8, 8), 0.0),
    (aten.where.ScalarOther, mask(4, 8, 16), X, 0.0),
    (aten.where.ScalarSelf, mask(8, 1), 1.0, X),
    (aten.where.Scalar, mask(8, 4), 1.0, 0.0),
    (aten.isfinite.default, X),
    (aten.isinf.default, half(4, 8)),
    (aten.isinf.default, ids(4, 8)),
    (aten.float_power.Tensor_Scalar, X, 2.0),
    (aten.float_power.Tensor_Tensor, X, meta(16)),
    (aten.isclose.default, X, Y),
    (aten.isclose.default, X, meta(16)),
    (aten.constant_pad_nd.default, X, [1, 2]),
    (aten.constant_pad_nd.default, X, [1, -1, 0, 3]),
    (aten.constant_pad_nd.default, X, [-1, 0]),
    (aten.pad.default, IMAGE, [1, 1, 2, 2]),
    (aten.pad.default, IMAGE, [1, 1, 2, 0], "circular"),
    (aten.pad.default, IMAGE, [1, 1, 2, 2], "reflect"),
    (aten.diag.default, meta(7)),
    (aten.diag.default, meta(7, 7)),
    (aten.diag_embed.default, meta(3, 7)),
    (aten.block_diag.default, [meta(3, 4), meta(2, 2)]),
    (aten.slice_scatter.default, X, meta(4, 3, 16), 1, 2, 5),
    (aten.select_scatter.default, X, meta(8, 16), 0, 1),
    (aten.diagonal_scatter.default, meta(8, 8), meta(8)),
    (aten.logsumexp.default, X, [-1]),
    (aten.logsumexp.default, half(4, 8, 16), [0, 1], True),
    (aten.nanmean.default, X, [-1]),
    (aten.dist.default, X, Y),
    (aten.pairwise_distance.default, X, Y),
    (aten.cosine_similarity.default, X, Y, -1),
    (aten.cosine_similarity.default, half(4, 8), half(4, 8), 1),
    (aten.rms_norm.default, half(4, 8, 16), [16], meta(16)),
    (aten.rms_norm.default, X, [16], half(16)),
    (aten.rms_norm.default, half(4, 8, 16), [8, 16], meta(8, 16)),
    (aten.instance_norm.default, X, meta(8), meta(8), None, None, True, 0.1, 1e-5, True),
    (aten.instance_norm.default, X, None, None, None, None, True, 0.1, 1e-5, True),
    (aten.instance_norm.default, X, meta(8), meta(8), meta(8), meta(8), False, 0.1, 1e-5, True),
    (aten.softmax.int, half(4, 8), -1, torch.float32),
    (aten.softmax.int, half(4, 8), -1),
    (aten.log_softmax.int, half(4, 8), -1, torch.float32),
    (aten._safe_softmax.default, X, -1),
    (aten.cross_entropy_loss.default, meta(6, 10), ids(6)),
    (aten.cross_entropy_loss.default, meta(6, 10), ids(6), meta(10), 0),
    (aten.cross_entropy_loss.default, meta(6, 10, 5), ids(6, 5)),
    (aten.cross_entropy_loss.default, meta(6, 10), meta(6, 10)),
    (aten.cross_entropy_loss.default, meta(6, 10), meta(6, 10), None, 2),
    (aten.l1_loss.default, X, Y),
    (aten.l1_loss.default, X, Y, 0),
    (aten.kl_div.default, X, Y),
    (aten.kl_div.default, X, Y, 0),
    (aten.binary_cross_entropy_with_logits.default, X, Y),
    (aten.binary_cross_entropy_with_logits.default, X, Y, None, None, 0),
    (aten.binary_cross_entropy_with_logits.default, X, Y, Y, meta(16)),
    (aten.index_put.default, X, [ids(3)], meta(3, 8, 16)),
    (aten.index_fill.int_Scalar, X, 0, ids(3), 1.0),
    (aten.put.default, X, ids(3), meta(3)),
    (aten.einsum.default, "bid,bjd,bkd->bijk", [meta(2, 3, 4), meta(2, 5, 4), meta(2, 6, 4)]),
    (aten.tensordot.default, meta(2, 3, 4), meta(4, 3, 5), [1, 2], [1, 0]),
    (aten.tensordot.default, meta(2, 3, 4), meta(4, 5), [-1], [0]),
    (aten.linalg_multi_dot.default, [meta(2, 3), meta(3, 4), meta(4, 5), meta(5, 2)]),
    (aten.linalg_multi_dot.default, [meta(3), meta(3, 4), meta(4)]),
    (aten.linalg_matrix_power.default, meta(4, 4), 5),
    (aten.linalg_matrix_power.default, meta(2, 4, 4), 3),
    (aten.linalg_matrix_power.default, meta(4, 4), 8),
    (aten.cdist.default, ROWS, ROWS + 0),
    (aten.cdist.default, meta(2, 30, 8), meta(2, 40, 8)),
    (aten.masked_scatter.default, X, mask(4, 8, 16), meta(4, 8, 16)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c[0]))
def test_kernels_are_those_that_are_dispatched(case: tuple[Any, ...]) -> None:
    agree(*case)


def test_a_target_in_logarithms() -> None:
    agree(aten.kl_div.default, X, Y, 2, log_target=True)


EINSUMS = [
    "bhid,bhjd->bhij", "bnd,dhk->bnhk", "bihd,bjhd->bhij", "i,j->ij", "bij,bjk->bik", "bhij,bjhd->bihd", "ij,ij->i",
    "ij->i", "bi,ij,bj->b", "bhwc,hkc->bhwk", "abc,abd->cd", "nkctv,kvw->nctw", "bqhd,bkhd->bhqk", "...ij,...kj->...ik",
    "ij,jk,kl->il", "ij,kl->i", "jb,ja->ab", "xij,jyk->ixk", "ab,cd", "hwc,hwd->cd",
]  # fmt: skip


@pytest.mark.parametrize("equation", EINSUMS)
@given(data=st.data())
def test_einsum(equation: str, data: st.DataObject) -> None:
    sizes = {i: data.draw(st.integers(1, 4), label=i) for i in sorted(set(equation)) if i.isalpha()}
    operands = []
    for term in equation.split("->")[0].split(","):
        shape = [*([2] * ("..." in term)), *(sizes[i] for i in term if i.isalpha())]
        order = data.draw(st.permutations(range(len(shape))))
        operands.append(meta(*(shape[d] for d in order)).permute([order.index(d) for d in range(len(shape))]))
    agree(aten.einsum.default, equation, operands)


def agree(target: Any, *args: Any, **kwargs: Any) -> None:
    graph = graph_of(target, *args, **kwargs)
    (cost,) = price(graph, H100)
    seen = launched(target, *args, **kwargs)
    assert len(cost.parts) == (len(seen) if len(seen) > 1 else 0)
    assert sorted(map(comparable, kernels(graph, cost, seen))) == sorted(map(comparable, seen))
    add_up(graph, cost)


VALUES = torch.rand(4, 8, 16)
INDEX = torch.tensor([0, 2, 1])
COLUMNS = INDEX[:, None, None].expand(3, 8, 16).contiguous()


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("target", [aten.mse_loss.default, aten.huber_loss.default, aten.smooth_l1_loss.default])
def test_a_loss_is_reduced_by_a_kernel_of_its_own(target: Any, reduction: int) -> None:
    (reduced,) = inside(target, VALUES, VALUES + 1, reduction)
    graph = graph_of(target, X, Y, reduction)
    (cost,) = price(graph, H100)
    each, last = kernels(graph, cost, [])
    assert each == Launched(target.__name__.split(".")[0], 2 * X.nbytes, X.nbytes)
    # where the result is given to it, it is among the arguments
    assert last == reduced._replace(read=X.nbytes)
    add_up(graph, cost)
    assert not price(graph_of(target, X, Y, 0), H100)[0].parts


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.scatter.src, (0, COLUMNS, VALUES)),
        (aten.scatter.value, (0, COLUMNS, 1.0)),
        (aten.scatter_add.default, (0, COLUMNS, VALUES)),
        (aten.scatter_reduce.two, (0, COLUMNS, VALUES, "sum")),
        (aten.index_copy.default, (0, INDEX, VALUES[:3])),
    ],
    ids=lambda v: str(v) if "aten" in str(v) else "",
)
def test_a_scatter_copies_first(target: Any, args: tuple[Any, ...]) -> None:
    graph = graph_of(target, VALUES, *args)
    (cost,) = price(graph, H100)
    *copied, scattered = kernels(graph, cost, [])
    assert copied == inside(target, VALUES, *args)
    assert scattered.name == target.__name__.split(".")[0]
    assert scattered.written == 3 * 8 * 16 * 4
    add_up(graph, cost)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("target", [aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default])
def test_a_plain_recurrent_cell(target: Any, biased: bool) -> None:
    biases = [meta(5), meta(5)] if biased else []
    agree(target, meta(2, 3), meta(2, 5), meta(5, 3), meta(5, 5), *biases)


def test_gates_of_a_recurrent_cell_are_one_kernel_after_two_products() -> None:
    x, state = meta(2, 3), meta(2, 8)
    for target, states, gates in ((aten.lstm_cell.default, [state, state + 0], 4), (aten.gru_cell.default, state, 3)):
        weights = meta(gates * 8, 3), meta(gates * 8, 8), meta(gates * 8), meta(gates * 8)
        graph = graph_of(target, x, states, *weights)
        (cost,) = price(graph, H100)
        *products, fused = kernels(graph, cost, [])
        made = 2 * gates * 8 * 4
        assert products == [
            Launched("mm", x.nbytes + weights[0].nbytes, made),
            Launched("mm", state.nbytes + weights[1].nbytes, made),
        ]
        results = len(graph.ops[0].outputs) * state.nbytes
        biases = 2 * gates * 8 * 4
        assert fused[1:] == (2 * made + state.nbytes + biases, results)
        add_up(graph, cost)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_reads_its_input_twice(affine: bool) -> None:
    x = meta(2, 8, 5, 5)
    weights = (meta(8), meta(8)) if affine else (None, None)
    graph = graph_of(aten.group_norm.default, x, 4, *weights)
    (cost,) = price(graph, H100)
    names, statistics, channels = ([p.name.split(" for group")[0] for p in cost.parts], 2 * 2 * 4 * 4, 2 * 2 * 8 * 4)
    assert names == ["moments", *(["scale and shift of channels"] if affine else []), "scale and shift"]
    assert sum(a.read for p in cost.parts for a in p.cost.traffic if a.tensor == 0) == 2 * x.nbytes
    assert cost.scratch_written == statistics + (channels if affine else 0)
    add_up(graph, cost)
    (apart,) = price(graph_of(aten.group_norm.default, x.to(memory_format=torch.channels_last), 4), H100)
    assert next(p.name for p in apart.parts) == "copy input for group_norm"


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.masked_fill.Scalar, (X, mask(8, 16), 0.0)),
        (aten.constant_pad_nd.default, (X, [1, 2])),
        (aten.isfinite.default, (X,)),
        (aten.logsumexp.default, (X, [-1])),
        (aten.l1_loss.default, (X, Y, 0)),
        (aten.kl_div.default, (X, Y, 0)),
        (aten.softmax.int, (half(4, 8), -1, torch.float32)),
        (aten.rms_norm.default, (half(4, 8, 16), [16], meta(16))),
        (aten.cosine_similarity.default, (X, Y, -1)),
        (aten.masked_scatter.default, (X, mask(4, 8, 16), meta(4, 8, 16))),
    ],
    ids=lambda v: str(v) if "aten" in str(v) else "",
)
def test_a_compiler_makes_one_kernel_of_them_that_moves_the_least(target: Any, args: tuple[Any, ...]) -> None:
    graph = graph_of(target, *args)
    graph = replace(graph, outputs=graph.ops[0].outputs)
    costs = price(graph, H100)
    assert costs[0].parts
    (kernel,) = compiled_kernels(graph, costs)
    given = sum(t.nbytes for t in args if isinstance(t, torch.Tensor))
    assert moved(graph, kernel.cost) == (given, graph.tensors[graph.ops[0].outputs[0]].nbytes)


def test_a_compiler_merges_what_is_between_products() -> None:
    graph = graph_of(aten.cdist.default, ROWS, ROWS + 0)
    graph = replace(graph, outputs=graph.ops[0].outputs)
    before, product, after = compiled_kernels(graph, price(graph, H100))
    out = 4 * 30 * 30
    assert moved(graph, before.cost)[0] == 2 * ROWS.nbytes
    assert product.cost.matmul
    assert moved(graph, after.cost) == (out, out)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_layouts_and_shapes(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    x = meta(*(shape[d] for d in order)).permute([order.index(d) for d in range(len(shape))])
    dim = data.draw(st.integers(0, len(shape) - 1))
    sides = data.draw(
        st.lists(st.integers(0, 3), min_size=2, max_size=2 * len(shape)).filter(lambda p: len(p) % 2 == 0)
    )
    hidden = mask(*(n if data.draw(st.booleans()) else 1 for n in shape))
    agree(aten.masked_fill.Scalar, x, hidden, 0.0)
    agree(aten.where.ScalarOther, hidden, x, 0.0)
    agree(aten.logsumexp.default, x, [dim], data.draw(st.booleans()))
    agree(aten.cosine_similarity.default, x, x + 0, dim)
    agree(aten.softmax.int, x.bfloat16(), dim, torch.float32)
    if any(sides):
        agree(aten.constant_pad_nd.default, x, sides)


SCATTERING = {"_index_put_impl_", "index_fill_", "put_", "masked_scatter_", "scatter_"}
"""What writes by index; how much is tested with values, in test_bytes."""


def comparable(kernel: Launched) -> Launched:
    return kernel._replace(written=0) if kernel.name in SCATTERING else kernel


def kernels(graph: Graph, cost: Cost, seen: list[Launched]) -> list[Launched]:
    parts = [(p.name.split(" ")[0], p.cost) for p in cost.parts] or [(seen[0].name, cost)]
    return [Launched(name, *moved(graph, part)) for name, part in parts]
