"""Matrix products. Oracle: torch.utils.flop_counter on the same call, run on meta."""

from collections.abc import Callable
from itertools import pairwise, product
from math import prod
from typing import Any

import pytest
import torch
from formulas.one_op import aten, cost_of, graph_of, meta, traffic_of
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

SIZES = st.integers(1, 9)


def counted(function: Callable[..., Any], *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return int(counter.get_total_flops())


@given(m=SIZES, k=SIZES, n=SIZES, batch=SIZES)
def test_products_of_plain_matrices(m: int, k: int, n: int, batch: int) -> None:
    a, b = meta(m, k), meta(k, n)
    wide_a, wide_b = meta(batch, m, k), meta(batch, k, n)
    for target, args in (
        (aten.mm.default, (a, b)),
        (aten.bmm.default, (wide_a, wide_b)),
        (aten.addmm.default, (meta(n), a, b)),
        (aten.baddbmm.default, (meta(batch, m, n), wide_a, wide_b)),
        (aten.linear.default, (wide_a, meta(n, k), meta(n))),
    ):
        cost = cost_of(target, *args)
        assert cost.matmul_flops == counted(target, *args), target
        assert list(cost.matmul) == ["float32"]


@given(m=st.integers(2, 9), k=st.integers(2, 9), n=SIZES)
def test_products_over_chosen_dimensions(m: int, k: int, n: int) -> None:
    # of length 1 torch sums a dimension instead of contracting it
    a = meta(3, m, k)
    for target, args in (
        (aten.inner.default, (a, meta(n, k))),
        (aten.tensordot.default, (a, meta(k, m, n), [1, 2], [1, 0])),
    ):
        assert cost_of(target, *args).matmul_flops == counted(target, *args), target


@given(m=SIZES, k=SIZES, n=SIZES, left=st.lists(st.sampled_from([1, 3]), max_size=3), right=st.lists(
    st.sampled_from([1, 3]), max_size=3
))  # fmt: skip
def test_matmul_broadcasts(m: int, k: int, n: int, left: list[int], right: list[int]) -> None:
    a, b = meta(*left, m, k), meta(*right, k, n)
    assert cost_of(aten.matmul.default, a, b).matmul_flops == counted(torch.matmul, a, b)


@given(batch=st.lists(SIZES, max_size=2), k=SIZES, n=SIZES)
def test_vectors_count_as_the_matrix_they_are(batch: list[int], k: int, n: int) -> None:
    a, b = meta(*batch, k), meta(k, n)
    assert cost_of(aten.matmul.default, meta(*batch, n, k), meta(k)).matmul_flops == 2 * prod(batch) * n * k
    assert cost_of(aten.matmul.default, meta(k), b).matmul_flops == 2 * k * n
    assert cost_of(aten.linear.default, a, meta(n, k)).matmul_flops == 2 * prod(batch) * k * n


@given(sizes=st.lists(SIZES, min_size=3, max_size=7))
def test_chains_are_multiplied_in_the_cheapest_order(sizes: list[int]) -> None:
    chain = [meta(m, n) for m, n in pairwise(sizes)]
    assert cost_of(aten.linalg_multi_dot.default, chain).matmul_flops == counted(torch.linalg.multi_dot, chain)


@given(n=st.integers(0, 40))
def test_matrix_powers(n: int) -> None:
    cost = cost_of(aten.linalg_matrix_power.default, meta(2, 5, 5), n)
    assert cost.matmul_flops == counted(torch.linalg.matrix_power, meta(2, 5, 5), n)


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[tuple[int, ...]]]:
    letters = "abcdef"
    lengths = {c: draw(st.integers(1, 5)) for c in letters}
    terms = draw(st.lists(st.lists(st.sampled_from(letters), max_size=4, unique=True), min_size=1, max_size=4))
    used = sorted({c for term in terms for c in term})
    result = draw(st.permutations(draw(st.lists(st.sampled_from(used), unique=True)) if used else []))
    hidden = draw(st.sampled_from(["", "", "..."]))
    shapes = [(*((2, 3) if hidden else ()), *(lengths[c] for c in term)) for term in terms]
    equation = ",".join(hidden + "".join(t) for t in terms)
    return f"{equation}->{hidden}{''.join(result)}", shapes


@given(equations())
def test_einsum(drawn: tuple[str, list[tuple[int, ...]]]) -> None:
    equation, shapes = drawn
    operands = [meta(*shape) for shape in shapes]
    cost = cost_of(aten.einsum.default, equation, operands)
    assert cost.matmul_flops == counted(lambda: aten.einsum.default(equation, operands))


@given(st.permutations(range(3)))
def test_einsum_follows_its_path(order: list[int]) -> None:
    operands = [meta(10, 100), meta(100, 5), meta(5, 50)]
    path = [*order[:2], 0, 1]
    assume(set(order[:2]) != {0, 2})  # an outer product: nothing is contracted in the first step
    cost = cost_of(aten.einsum.default, "ij,jk,kl->il", operands, path=path)
    assert cost.matmul_flops == counted(lambda: aten.einsum.default("ij,jk,kl->il", operands, path=path))


@pytest.mark.parametrize("equation", ["ij,jk", "i,j", "ba,ca", "...i,...i"])
def test_einsum_without_an_arrow(equation: str) -> None:
    operands = [meta(*(4,) * len(term.replace("...", "xx"))) for term in equation.split(",")]
    cost = cost_of(aten.einsum.default, equation, operands)
    assert cost.matmul_flops == counted(lambda: aten.einsum.default(equation, operands))


def test_einsum_that_contracts_nothing_is_vector_work() -> None:
    cost = cost_of(aten.einsum.default, "i,j->ij", [meta(6), meta(7)])
    assert (cost.matmul, cost.vector) == ({}, {"float32": 42})


def test_cdist_uses_a_matrix_product_beyond_25_rows() -> None:
    assert cost_of(aten.cdist.default, meta(20, 8), meta(20, 8)).matmul == {}
    assert cost_of(aten.cdist.default, meta(40, 8), meta(3, 8)).matmul == {"float32": 2 * 40 * 3 * (8 + 2)}


def test_operand_dtype_decides_the_column() -> None:
    cost = cost_of(aten.mm.dtype, meta(4, 5, dtype=torch.bfloat16), meta(5, 6, dtype=torch.bfloat16), torch.float32)
    assert cost.matmul == {"bfloat16": 240}
    fp8 = meta(16, 32, dtype=torch.float8_e4m3fn), meta(48, 32, dtype=torch.float8_e4m3fn).t()
    scaled = cost_of(aten._scaled_mm.default, *fp8, meta(), meta(), out_dtype=torch.bfloat16)
    assert scaled.matmul == {"float8_e4m3fn": 2 * 16 * 32 * 48}


def test_complex_products_are_four_real_ones() -> None:
    cost = cost_of(aten.mm.default, meta(4, 5, dtype=torch.complex64), meta(5, 6, dtype=torch.complex64))
    assert cost.matmul == {"float32": 4 * 240}


def test_beta_of_zero_reads_no_bias() -> None:
    args = (meta(4, 6), meta(4, 5), meta(5, 6))
    with_bias, without = traffic_of(aten.addmm.default, *args), traffic_of(aten.addmm.default, *args, beta=0)
    assert with_bias[0] - without[0] == 4 * 6 * 4
    assert cost_of(aten.addmm.default, *args, beta=0).vector == {}


def test_an_expanded_operand_is_read_once() -> None:
    a = meta(4, 5).expand(7, 4, 5)
    read, written = traffic_of(aten.bmm.default, a, meta(7, 5, 6))
    assert (read, written) == (4 * (20 + 7 * 30), 4 * 7 * 24)


@given(batch=st.integers(1, 64))
def test_weights_are_read_once_whatever_the_batch(batch: int) -> None:
    weight = meta(32, 16)
    once, many = (traffic_of(aten.linear.default, meta(b, 16), weight) for b in (1, batch))
    assert many[0] - once[0] == (batch - 1) * 16 * 4
    assert many[1] == batch * once[1]


def test_half_precision_halves_the_bytes() -> None:
    for target, shapes in (
        (aten.mm.default, [(8, 9), (9, 7)]),
        (aten.linear.default, [(3, 8, 9), (7, 9), (7,)]),
    ):
        full = traffic_of(target, *(meta(*s) for s in shapes))
        half = traffic_of(target, *(meta(*s, dtype=torch.bfloat16) for s in shapes))
        assert full == (2 * half[0], 2 * half[1])


def test_out_spelling_costs_what_the_plain_one_does() -> None:
    a, b = meta(4, 5), meta(5, 6)
    assert traffic_of(aten.mm.out, a, b, out=meta(4, 6)) == traffic_of(aten.mm.default, a, b)
    assert traffic_of(aten.add.out, a, a, out=meta(4, 5)) == traffic_of(aten.add.Tensor, a, a)


def test_int4_weights_are_read_packed() -> None:
    rows, inner, columns = 3, 1024, 256
    with FakeTensorMode():  # its meta kernel asks for a fake tensor's device
        packed = torch.empty(columns // 8, inner // (8 * 16), 32, 4, dtype=torch.int32)
        scales = torch.empty(inner // 32, columns, 2, dtype=torch.bfloat16)
        source = torch.empty(rows, inner, dtype=torch.bfloat16)
        cost = cost_of(aten._weight_int4pack_mm.default, source, packed, 32, scales)
        read, written = traffic_of(aten._weight_int4pack_mm.default, source, packed, 32, scales)
    assert cost.matmul == {"bfloat16": 2 * rows * inner * columns}
    assert read == inner * columns // 2 + inner // 32 * columns * 4 + rows * inner * 2
    assert written == rows * columns * 2


@given(experts=st.integers(1, 12), chosen=st.integers(1, 4), tokens=st.integers(1, 12), k=SIZES, n=SIZES)
def test_experts_are_priced_between_one_tokens_and_all(experts: int, chosen: int, tokens: int, k: int, n: int) -> None:
    k, n = 8 * k, 8 * n
    rows = tokens * chosen
    args = (meta(rows, k, dtype=torch.bfloat16), meta(experts, k, n, dtype=torch.bfloat16))
    graph = graph_of(aten._grouped_mm.default, *args, meta(experts, dtype=torch.int32), tokens=tokens)
    cost = cost_of(aten._grouped_mm.default, *args, meta(experts, dtype=torch.int32), tokens=tokens)
    assert cost.matmul == {"bfloat16": 2 * rows * k * n}
    weights = graph.ops[0].args["mat2"].tensor  # type: ignore[union-attr]  # an argument that is one tensor
    (access,) = (a for a in cost.traffic if a.tensor == weights)
    expert = k * n * 2
    assert access.read == min(chosen, experts) * expert
    assert access.expected_read is not None
    assert access.read <= access.expected_read <= min(experts, rows) * expert


def test_expected_experts_are_the_mean_over_all_choices() -> None:
    experts, tokens, expert = 4, 3, 8 * 8 * 2
    args = (meta(tokens, 8, dtype=torch.bfloat16), meta(experts, 8, 8, dtype=torch.bfloat16))
    cost = cost_of(aten._grouped_mm.default, *args, meta(experts, dtype=torch.int32), tokens=tokens)
    draws = [len(set(choice)) for choice in product(range(experts), repeat=tokens)]
    (access,) = (a for a in cost.traffic if a.expected_read is not None)
    assert access.expected_read == round(expert * sum(draws) / len(draws))


def half(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.bfloat16)


def small(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int8)


LSTM = [meta(32, 6), meta(32, 8), meta(32), meta(32)]
STATE = [meta(1, 2, 8), meta(1, 2, 8)]


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.linear.default, (meta(3, 5, 8), meta(6, 8))),
        (aten.addmm.default, (meta(6), meta(5, 8), meta(8, 6))),
        (aten.tensordot.default, (meta(2, 3, 4), meta(4, 3, 5), [1, 2], [1, 0])),
        (aten.einsum.default, ("bhid,bhjd->bhij", [meta(2, 3, 4, 5), meta(2, 3, 6, 5)])),
        (aten.linalg_multi_dot.default, ([meta(2, 3), meta(3, 4), meta(4, 5)],)),
        (aten.linalg_matrix_power.default, (meta(2, 5, 5), 6)),
        (aten.cdist.default, (meta(40, 8), meta(30, 8))),
        (aten._int_mm.default, (small(32, 16), small(16, 8))),
        (aten._weight_int8pack_mm.default, (half(4, 16), small(8, 16), half(8))),
        (aten._grouped_mm.default, (half(24, 16), half(4, 16, 8), meta(4, dtype=torch.int32))),
        (aten._grouped_mm.default, (half(4, 6, 16), half(4, 16, 8))),
        (aten.conv2d.default, (meta(2, 4, 6, 6), meta(8, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], 2)),
        (aten.conv_transpose2d.input, (meta(2, 4, 6, 6), meta(4, 3, 3, 3), None, [1, 1], [0, 0], [0, 0], 2)),
        (aten.conv_tbc.default, (meta(9, 2, 4), meta(3, 4, 5), meta(5))),
        (aten.lstm.input, (meta(7, 2, 6), STATE, LSTM, True, 1, 0.0, False, False, False)),
        (aten.lstm.input, (meta(2, 7, 6), STATE, LSTM, True, 1, 0.0, False, False, True)),
        (aten.lstm_cell.default, (meta(2, 6), [meta(2, 8), meta(2, 8)], *LSTM)),
    ],
    ids=lambda v: str(v) if "aten" in str(v) else "",
)
def test_products_say_their_shapes(target: Any, args: tuple[Any, ...]) -> None:
    cost = cost_of(target, *args)
    assert cost.gemms
    assert sum(2 * g.batch * g.m * g.n * g.k for g in cost.gemms) == cost.executed_matmul_flops
