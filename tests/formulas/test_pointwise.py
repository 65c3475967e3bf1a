"""Elementwise arithmetic, normalisations and reductions.

Oracle for the work per element: PyTorch's own decompositions into primitive operations, counted.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from formulas.one_op import aten, cost_of, graph_of, meta
from fxroof.analyzer import cost as registry
from fxroof.analyzer.cost import Status, find_formula
from fxroof.analyzer.pricing import price
from hypothesis import given
from hypothesis import strategies as st
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

TRANSCENDENTAL = {
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin", "cos", "tan", "sinh", "cosh",
    "tanh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "atan2", "erf", "erfc", "erf_inv", "erfcx", "pow",
    "lgamma", "digamma", "hypot", "ndtri", "bessel_i0", "bessel_i0e", "bessel_i1", "bessel_i1e", "bessel_j0",
    "bessel_j1", "spherical_bessel_j0", "zeta",
}  # fmt: skip
ARITHMETIC = {
    "abs", "add", "sub", "mul", "div", "neg", "sign", "reciprocal", "maximum", "minimum", "fmax", "fmin", "floor",
    "ceil", "trunc", "round", "eq", "ne", "lt", "le", "gt", "ge", "where", "copysign", "nextafter", "remainder", "fmod",
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "shift_left", "shift_right_arithmetic", "signbit",
    "frexp",
}  # fmt: skip
UNARY = [
    "abs", "neg", "sign", "signbit", "ceil", "floor", "trunc", "relu", "relu6", "hardtanh", "reciprocal",
    "square", "deg2rad", "rad2deg", "isnan", "isinf", "isposinf", "isneginf", "leaky_relu", "softshrink",
    "hardshrink", "frac", "nan_to_num", "hardsigmoid", "hardswish", "exp", "exp2", "expm1", "log", "log2",
    "log10", "log1p", "sqrt", "rsqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "lgamma", "digamma", "i0", "special_i0e", "special_i1",
    "special_i1e", "special_ndtri", "special_erfcx", "logit", "special_entr", "sigmoid", "silu", "elu", "selu",
    "sinc", "celu", "softplus", "mish", "log_sigmoid_forward", "gelu",
]  # fmt: skip
BINARY = [
    "maximum", "minimum", "fmax", "fmin", "nextafter", "atan2", "logaddexp", "logaddexp2", "addcmul", "addcdiv",
]  # fmt: skip

NO_FIXED_WORK = {"gcd", "lcm"}  # Euclid's steps depend on the numbers
POLYNOMIALS = "chebyshev_polynomial hermite_polynomial laguerre_polynomial legendre_polynomial"  # degree is data


def primitives(target: Any, *args: torch.Tensor) -> Counter[str]:
    graph = make_fx(lambda *a: target(*a), decomposition_table=decomposition_table)(*args).graph
    return Counter(str(n.target).split(".")[1] for n in graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_work_per_element_is_that_of_the_decomposition(name: str) -> None:
    packet = getattr(aten, name)
    target = getattr(packet, "default" if "default" in packet.overloads() else packet.overloads()[0])
    operands = 3 if name.startswith("addc") else 2 if name in BINARY else 1
    args = [torch.rand(8) for _ in range(operands)]
    cost, counted = cost_of(target, *args), primitives(target, *args)
    assert cost.special == 8 * sum(counted[p] for p in TRANSCENDENTAL)
    # scaling by a `beta` of 1 and the like is left out of a decomposition; it spells out selections instead
    assert cost.vector_flops <= 8 * (sum(counted[p] for p in ARITHMETIC) + 2)


def test_tanh_gelu_is_its_formula() -> None:
    counted = primitives(lambda x: aten.gelu.default(x, approximate="tanh"), torch.rand(8))
    cost = cost_of(aten.gelu.default, torch.rand(8), approximate="tanh")
    assert (cost.special, cost.vector_flops) == (8, 8 * sum(counted[p] for p in ARITHMETIC))


def test_every_forward_pointwise_operator_of_torch_is_priced() -> None:
    missing = set()
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        name, _, overload = rest.partition(".")
        if namespace != "aten" or "backward" in name or name.rstrip("_") in NO_FIXED_WORK:
            continue
        if any(p in name for p in POLYNOMIALS.split()):
            continue
        target = getattr(getattr(aten, name), overload or "default", None)
        if target is None or torch.Tag.pointwise not in target.tags:
            continue
        if find_formula(str(target)) is None:
            missing.add(name)
    assert missing <= {"equal"}  # a Python bool comes back


def test_every_formula_names_an_operator_of_torch() -> None:
    cost_of(aten.neg.default, meta(1))  # loads the formulas
    known = {name.split(".")[0].replace("::", ".") for name in torch._C._dispatch_get_all_op_names()}
    ours = {n for n in registry._formulas if n.startswith("aten.")}
    assert sorted(n for n in ours if n not in known and f"{n}_" not in known) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_types_compute_in_float32(dtype: torch.dtype) -> None:
    source = meta(8, dtype=dtype)
    for cost in (
        cost_of(aten.silu.default, source),
        cost_of(aten.softmax.int, source, 0),
        cost_of(aten.rms_norm.default, source, [8]),
        cost_of(aten.sum.default, source),
        cost_of(aten.gt.Scalar, source, 0.0),
    ):
        assert set(cost.vector) == {"float32"}


def test_other_types_compute_in_their_own() -> None:
    assert set(cost_of(aten.add.Tensor, meta(8, dtype=torch.int64), meta(8, dtype=torch.int64)).vector) == {"int64"}
    assert set(cost_of(aten.mul.Tensor, meta(8, dtype=torch.float64), meta(8)).vector) == {"float64"}
    # a 0-d tensor does not widen the others
    assert set(cost_of(aten.mul.Tensor, meta(8), meta(dtype=torch.float64)).vector) == {"float32"}
    assert set(cost_of(aten.bitwise_and.Tensor, *[meta(8, dtype=torch.bool)] * 2).vector) == {"bool"}


def test_complex_numbers_are_counted_by_their_parts() -> None:
    source = meta(8, dtype=torch.complex64)
    assert cost_of(aten.mul.Tensor, source, source).vector == {"float32": 48}
    assert cost_of(aten.add.Tensor, source, source).vector == {"float32": 16}
    assert cost_of(aten.polar.default, meta(8), meta(8)).special == 16
    assert cost_of(aten.acos.default, source).status is Status.UNPRICED


@pytest.mark.parametrize(
    ("exponent", "flops", "special"),
    [(2, 1, 0), (3, 2, 0), (-1, 1, 0), (-2, 2, 0), (0.5, 0, 1), (-0.5, 0, 1), (2.5, 0, 1), (4, 0, 1)],
)
def test_powers(exponent: float, flops: int, special: int) -> None:
    cost = cost_of(aten.pow.Tensor_Scalar, meta(8), exponent)
    assert (cost.vector_flops, cost.special) == (8 * flops, 8 * special)


def test_casts_and_copies_are_no_flops() -> None:
    for cost in (
        cost_of(aten.to.dtype, meta(8), torch.bfloat16),
        cost_of(aten.clone.default, meta(8)),
        cost_of(aten.copy_.default, meta(8), meta(8)),
    ):
        assert (cost.vector_flops, cost.special) == (0, 0)
        assert cost.traffic


def test_a_value_is_broadcast_over_the_result_it_makes() -> None:
    cost = cost_of(aten.add.Tensor, meta(4, 1), meta(1, 5))
    assert cost.vector_flops == 20
    assert [a.read for a in cost.traffic if a.read] == [16, 20]


@given(rows=st.integers(1, 6), width=st.integers(1, 6))
def test_reductions_work_on_their_input(rows: int, width: int) -> None:
    source = meta(rows, width)
    for target, args in (
        (aten.sum.dim_IntList, ([1],)),
        (aten.amax.default, ([1],)),
        (aten.argmax.default, (1,)),
        (aten.any.dim, (1,)),
        (aten.cumsum.default, (1,)),
        (aten.cumprod.default, (1,)),
        (aten.max.dim, (1,)),
        (aten.topk.default, (1, 1)),
    ):
        assert cost_of(target, source, *args).vector_flops == rows * width, target
    assert cost_of(aten.max.other, source, source).vector_flops == rows * width


@given(rows=st.integers(1, 6), width=st.integers(1, 6))
def test_softmax(rows: int, width: int) -> None:
    cost = cost_of(aten.softmax.int, meta(rows, width), -1)
    assert (cost.vector_flops, cost.special) == (4 * rows * width, rows * width)


def spelled_out(target: Any, *args: Any) -> tuple[int, int]:
    """Vector FLOPs and transcendentals of a decomposition: per result element, or per input element of a sum."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def run(*given: torch.Tensor) -> Any:
        rest = iter(given)
        return target(*(next(rest) if isinstance(a, torch.Tensor) else a for a in args))

    flops = special = 0
    for node in make_fx(run, decomposition_table=decomposition_table)(*tensors).graph.nodes:
        name = str(node.target).split(".")[1] if node.op == "call_function" else ""
        if name in TRANSCENDENTAL:
            special += node.meta["val"].numel()
        elif name in ARITHMETIC:
            flops += node.meta["val"].numel()
        elif name in ("sum", "amax"):
            flops += node.all_input_nodes[0].meta["val"].numel()
        elif name == "var":  # subtract the mean (a sum of its own), square, add; divide
            flops += 3 * node.all_input_nodes[0].meta["val"].numel() + node.meta["val"].numel()
    return flops, special


@pytest.mark.parametrize(("rows", "width"), [(6, 10), (1, 7), (9, 2)])
def test_norms_and_reductions_do_the_work_of_their_decompositions(rows: int, width: int) -> None:
    source, weight, bias = torch.rand(rows, width), torch.rand(width), torch.rand(width)
    for target, args in (
        (aten.native_layer_norm.default, (source, [width], weight, bias, 1e-5)),
        (aten.native_layer_norm.default, (source, [width], None, None, 1e-5)),
        (aten._fused_rms_norm.default, (source, [width], weight, 1e-5)),
        (aten._softmax.default, (source, 1, False)),
        (aten._log_softmax.default, (source, 1, False)),
        (aten.linalg_vector_norm.default, (source, 2, [1])),
        (aten.mean.dim, (source, [1])),
    ):
        cost = cost_of(target, *args)
        assert (cost.vector_flops, cost.special) == spelled_out(target, *args), target


def test_group_norm_does_the_work_of_its_decomposition() -> None:
    args = (torch.rand(6, 10, 4), torch.rand(10), torch.rand(10), 6, 10, 4, 2, 1e-5)
    cost, (flops, special) = (
        cost_of(aten.native_group_norm.default, *args),
        spelled_out(aten.native_group_norm.default, *args),
    )
    negated_means = 6 * 2
    assert (cost.vector_flops, cost.special) == (flops - negated_means, special)


def test_a_fourier_transform_is_five_n_log_n() -> None:
    wide = meta(3, 64, dtype=torch.complex64)
    assert cost_of(aten.fft_fft.default, wide).vector == {"float32": 3 * 5 * 64 * 6}
    assert cost_of(aten.fft_rfft.default, meta(3, 64)).vector == {"float32": 3 * 2.5 * 64 * 6}
    half = meta(3, 33, dtype=torch.complex64)
    assert cost_of(aten.fft_irfft.default, half, 64).vector == {"float32": 3 * 2.5 * 64 * 6}
    square = meta(3, 8, 8, dtype=torch.complex64)
    assert cost_of(aten.fft_fft2.default, square).vector == {"float32": 3 * 5 * 64 * 6}


@pytest.mark.parametrize("size", [(7, 5), (8, 8), (6, 4), (1, 1)])
def test_adaptive_pooling_meets_every_window(size: tuple[int, int]) -> None:
    source, out = meta(2, 3, 16, 11), (2 * 3 * size[0] * size[1])
    cost = cost_of(aten.adaptive_avg_pool2d.default, source, list(size))
    ones = torch.ones(1, 1, 16, 11, requires_grad=True)
    windows = torch.nn.functional.adaptive_max_pool2d(ones, size, return_indices=True)[1].numel()
    assert windows == size[0] * size[1]
    # the gradient of an average spreads 1/(window size): its reciprocal counts the window
    counted = sum(
        int(torch.autograd.grad(y, ones, retain_graph=True)[0].count_nonzero())
        for y in torch.nn.functional.adaptive_avg_pool2d(ones, size).flatten()
    )
    assert cost.vector_flops == 6 * counted + out


def test_max_pooling_writes_positions_nobody_asked_for() -> None:
    plain = cost_of(aten.max_pool2d.default, meta(2, 3, 8, 8), [2, 2])
    asked = cost_of(aten.max_pool2d_with_indices.default, meta(2, 3, 8, 8), [2, 2])
    assert plain.scratch_written == sum(a.written for a in asked.traffic) - sum(a.written for a in plain.traffic)


def test_nothing_is_priced_by_default() -> None:
    unknown = cost_of(aten.masked_select.default, torch.rand(8), torch.rand(8) > 0.5)
    assert unknown.status is Status.UNPRICED
    assert unknown.traffic


def test_a_view_of_another_storage_is_no_free_op() -> None:
    graph = graph_of(aten.reshape.default, meta(4, 6).t(), [-1])
    (cost,) = price(graph, None)  # type: ignore[arg-type]  # no part
    assert cost.status is Status.PRICED
