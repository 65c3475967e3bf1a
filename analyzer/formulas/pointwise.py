"""Elementwise arithmetic: a table of work per result element.

Vector FLOPs count additions, multiplications, divisions, comparisons and selections; special operations count
evaluations of a transcendental function, one each (softplus is an exp and a log1p). Half types compute in
float32, as PyTorch's kernels do; complex numbers are counted by their real parts (a product is 6 FLOPs).
Every operand is read once at the size it really has, every result written once.
"""

from collections.abc import Mapping
from functools import partial

from ..cost import Call, Cost, Status, formula, operator_name, unpriced
from ..graph import ITEM_BITS
from .arithmetic import is_complex, item_bytes, number, promoted, vector
from .parts import Buffer, Kernels

_WORK: Mapping[tuple[float, float], str] = {
    (0, 0): "complex positive",
    (1, 0): """
        abs absolute neg negative sign sgn signbit ceil floor trunc fix relu relu6 hardtanh hardshrink
        threshold clamp clamp_min clamp_max clip maximum minimum fmax fmin copysign nextafter frexp bernoulli
        mul multiply true_divide reciprocal square deg2rad rad2deg angle conj_physical _conj_physical
        eq ne lt le gt ge not_equal less less_equal greater greater_equal
        logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
        bitwise_left_shift bitwise_right_shift __and__ __iand__ __or__ __ior__ __xor__ __ixor__
        __lshift__ __ilshift__ __rshift__ __irshift__ isnan isposinf isneginf isreal
    """,
    (2, 0): """
        _add_relu leaky_relu prelu _prelu_kernel softshrink floor_divide frac heaviside
    """,
    (3, 0): "lerp addcdiv nan_to_num hardsigmoid linalg_cross cross",
    (4, 0): "hardswish remainder fmod",
    (0, 1): """
        exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh
        atanh
        arcsin arccos arctan arcsinh arccosh arctanh atan2 arctan2 erf erfc erfinv lgamma digamma polygamma i0
        igamma igammac special_exp2 special_expm1 special_log1p special_erf special_erfc special_erfinv
        special_erfcx special_gammaln special_digamma special_psi special_polygamma special_i0 special_i0e
        special_i1 special_i1e special_ndtri special_zeta special_gammainc special_gammaincc special_airy_ai
        special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_spherical_bessel_j0
        special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
        special_modified_bessel_k1 special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1
    """,
    (1, 1): "ldexp xlogy special_xlogy",
    (2, 1): "logit special_logit special_entr special_xlog1py special_ndtr",
    (3, 1): "sigmoid special_expit silu elu selu sinc special_sinc hypot",
    (4, 1): "celu glu",
    (2, 2): "polar",
    (3, 2): "special_log_ndtr",
    (4, 2): "softplus log_sigmoid log_sigmoid_forward",
    (5, 2): "logaddexp logaddexp2",
    (1, 3): "mish",
}

_COMPLEX: Mapping[tuple[float, float], str] = {
    (0, 0): "complex positive",
    (1, 0): "conj_physical _conj_physical",
    (2, 0): "neg negative add sub subtract rsub masked_fill where",
    (3, 0): "eq ne not_equal isnan isinf isfinite isreal logical_not",
    (6, 0): "mul multiply square reciprocal",
    (7, 0): "logical_and logical_or logical_xor",
    (8, 0): "addcmul",
    (10, 0): "lerp",
    (11, 0): "div divide true_divide",  # times the conjugate, over the squared modulus
    (13, 0): "addcdiv",
    (14, 0): "linalg_cross cross",
    (0, 1): "angle",
    (3, 1): "abs absolute",
    (5, 1): "sgn",
    (2, 2): "polar",
    (2, 3): "exp",
    (3, 3): "log",
    (5, 3): "log2 log10",
    (11, 3): "sigmoid",
    (17, 3): "silu",
    (2, 4): "sin cos sinh cosh",  # sin(a + ib) = sin a cosh b + i cos a sinh b
    (15, 8): "tan tanh",
}
_COMPLEX_WORK = {name: work for work, names in _COMPLEX.items() for name in names.split()}


def elementwise(call: Call, flops: float, special: float = 0.0) -> Cost:
    """Work per result element, by the complex table when any operand is complex."""
    dtype = promoted([*call.inputs, *call.outputs])
    if is_complex(dtype):
        name = operator_name(call.op.target).removeprefix("aten.").removesuffix("_")
        if name not in _COMPLEX_WORK:
            return unpriced(call)
        flops, special = _COMPLEX_WORK[name]
    count = call.output.numel
    return call.cost(vector=vector(dtype, flops * count), special=special * count)


for (_flops, _special), _names in _WORK.items():
    formula(*(f"aten.{name}" for name in _names.split()))(partial(elementwise, flops=_flops, special=_special))


@formula("aten.add", "aten.sub", "aten.subtract", "aten.rsub")
def add(call: Call) -> Cost:
    """An addition, and a multiplication when `alpha` is not 1."""
    return elementwise(call, 1 + (number(call, "alpha", 1) != 1))


@formula("aten.div", "aten.divide")
def div(call: Call) -> Cost:
    """A division, and a rounding when asked for."""
    return elementwise(call, 1 + bool(call.arg("rounding_mode")))


@formula("aten.addcmul")
def addcmul(call: Call) -> Cost:
    """The sum self + value * tensor1 * tensor2; the factor is skipped when it is 1."""
    return elementwise(call, 2 + (number(call, "value", 1) != 1))


@formula("aten.round", "aten.special_round")
def rounding(call: Call) -> Cost:
    """Rounding; to decimals it is scaled before and after."""
    return elementwise(call, 3 if number(call, "decimals", 0) else 1)


@formula("aten.gelu")
def gelu(call: Call) -> Cost:
    """x/2 (1 + erf(x / sqrt 2)): 4 FLOPs and an erf; the tanh approximation takes 8 and a tanh."""
    return elementwise(call, 8 if call.arg("approximate") == "tanh" else 4, 1)


@formula("aten.float_power")
def float_power(call: Call) -> Cost:
    """A power of float64, to which operands of another type are copied first."""
    cost = power(call)
    others = [name for name in ("self", "exponent") if (t := call.optional(name)) and t.dtype != call.output.dtype]
    if call.op.mutates or not others or cost.status is not Status.PRICED:
        return cost
    run = Kernels(call)
    wide = item_bytes(call.output)
    copies = [run.kernel("_to_copy", run.given(name), call.tensor(name).numel * wide) for name in others]
    run.kernel("pow", (*copies, *run.others(*others)), run.result(), flops=cost.vector_flops, special=cost.special)
    return run.cost()


@formula("aten.pow")
def power(call: Call) -> Cost:
    """Exponents 2 and 3 are products, -1 and -2 divisions too; any other power is one transcendental.

    Integers are raised by repeated squaring: at most two products a bit of the exponent.
    """
    exponent = call.arg("exponent")
    products = {0.0: 0, 1.0: 0, 2.0: 1, 3.0: 2, -1.0: 1, -2.0: 2}
    if is_complex(promoted([*call.inputs, *call.outputs])):
        if exponent != 2:
            return unpriced(call)
        return call.cost(vector=vector(call.output.dtype, 6 * call.output.numel))
    if isinstance(exponent, int | float):
        if exponent in products:
            return elementwise(call, products[exponent])
        if isinstance(exponent, int) and "int" in call.output.dtype:
            return elementwise(call, 2 * exponent.bit_length())
    return elementwise(call, 0, 1)


@formula("aten.mvlgamma", "aten.special_multigammaln")
def mvlgamma(call: Call) -> Cost:
    """A sum of p log-gamma values."""
    terms = call.integer("p", 1)
    return elementwise(call, terms, terms)


@formula("aten.masked_fill")
def masked_fill(call: Call) -> Cost:
    """A selection per element; out of place the input is copied first (TensorAdvancedIndexing.cpp)."""
    cost = elementwise(call, 1)
    if call.op.mutates:
        return cost
    run = Kernels(call)
    result = run.kernel("clone", run.given("self"), run.result())
    run.kernel("masked_fill_", (result, *run.others("self")), result, flops=cost.vector_flops, dtype=_dtype(cost))
    return run.cost()


@formula("aten.where")
def where(call: Call) -> Cost:
    """A selection; a number becomes a tensor of one element first, in a kernel of its own (TensorCompare.cpp).

    Given only a condition it is `nonzero`, whose result's size depends on data: unpriced.
    """
    if len(call.outputs) != 1 or len(call.op.args) < 3:
        return unpriced(call)
    cost = elementwise(call, 1)
    numbers = sum(call.optional(name) is None for name in ("self", "other"))
    if call.op.mutates or not numbers:
        return cost
    run = Kernels(call)
    made = [run.kernel("fill_", (), item_bytes(call.output)) for _ in range(numbers)]
    run.kernel("where", (*run.others(), *made), run.result(), flops=cost.vector_flops, dtype=_dtype(cost))
    return run.cost()


@formula("aten.isfinite", "aten.isinf")
def finite(call: Call) -> Cost:
    """Magnitudes compared with infinity; a finite number is equal to itself too (TensorCompare.cpp).

    Integers are not looked at: the result is filled.
    """
    source = call.tensor("self")
    if is_complex(source.dtype):
        return elementwise(call, 2)
    if "float" not in source.dtype:
        return call.cost(reads={"self": 0})
    run, count = Kernels(call, source.dtype), source.numel
    x = run.argument("self")
    size = run.kernel("abs", (x,), source.nbytes, flops=count)
    if call.op.target.startswith("aten.isinf"):
        run.kernel("eq", (size,), run.result(), flops=count)
        return run.cost()
    known, bounded = (run.kernel(name, (of,), count, flops=count / 2) for name, of in (("eq", x), ("ne", size)))
    run.kernel("mul", (known, bounded), run.result())
    return run.cost()


@formula("aten.isclose")
def isclose(call: Call) -> Cost:
    """Equal, or a difference within the tolerance and finite: a kernel for every step (TensorCompare.cpp)."""
    run, out = Kernels(call), call.output
    left, right = run.argument("self"), run.argument("other")
    dtype, count = promoted(call.inputs), out.numel
    if "float" not in dtype or call.flag("equal_nan"):
        return elementwise(call, 7)
    wide, narrow = count * ITEM_BITS[dtype] // 8, count
    tolerance = call.tensor("other")

    def step(name: str, reads: tuple[Buffer, ...], writes: Buffer | int, flops: int = count) -> Buffer:
        return run.kernel(name, reads, writes, flops=flops, dtype=dtype)

    close = step("eq", (left, right), run.result())
    scaled = step("mul", (right,), tolerance.nbytes, tolerance.numel)
    allowed = step("add", (step("abs", (scaled,), tolerance.nbytes, tolerance.numel),), tolerance.nbytes, 0)
    error = step("abs", (step("sub", (left, right), wide),), wide, 0)
    size = step("abs", (error,), wide, 0)
    finite = step("mul", (step("eq", (error, error), narrow, 0), step("ne", (size,), narrow, 0)), narrow, 0)
    within = step("le", (error, allowed), narrow)
    step("bitwise_and_", (within, finite), within)
    step("bitwise_or_", (close, within), close)
    return run.cost()


@formula("aten.rrelu", "aten.rrelu_with_noise")
def rrelu(call: Call) -> Cost:
    """In inference a leaky ReLU; in training the slope is drawn and kept."""
    return elementwise(call, 2)


@formula(
    "aten.dropout",
    "aten.native_dropout",
    "aten.feature_dropout",
    "aten.alpha_dropout",
    "aten.feature_alpha_dropout",
)
def dropout(call: Call) -> Cost:
    """In inference nothing runs; in training 2 FLOPs an element and a mask of a byte each, kept for later."""
    if not call.flag("train"):
        return Cost(status=Status.FREE)
    count = call.output.numel
    mask = 0 if len(call.outputs) > 1 else count
    return call.cost(vector=vector(call.output.dtype, 2 * count), scratch_written=mask)


def _dtype(cost: Cost) -> str:
    return next(iter(cost.vector), "")
