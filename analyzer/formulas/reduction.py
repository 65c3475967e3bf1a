"""Reductions and scans: work is per element of the input, not of the result.

Each input element is combined once with what was gathered so far. Inputs are read once and results written
once; sums of half types accumulate in float32. Complex numbers are counted by their real parts.
"""

from functools import partial
from math import prod

from ..cost import Call, Cost, formula, unpriced
from .arithmetic import broadcast, is_complex, item_bytes, promoted, vector
from .parts import Kernels
from .pointwise import elementwise


def _reduce(call: Call, flops: float, special: float = 0.0, finish: float = 0.0, roots: float = 0.0) -> Cost:
    """FLOPs and transcendentals per input element; `finish` and `roots` are those per result element."""
    source, results = call.inputs[0], call.output.numel
    parts = 2 if is_complex(source.dtype) else 1
    chosen = call.output.dtype == "bool" or (call.output.dtype == "int64" and "float" in source.dtype)
    dtype = source.dtype if chosen else promoted([source, call.output])
    return call.cost(
        vector=vector(dtype, parts * (flops * source.numel + finish * results)),
        special=special * source.numel + roots * results,
    )


formula(
    "aten.sum",
    "aten.nansum",
    "aten.sum_to_size",
    "aten.prod",
    "aten.all",
    "aten.any",
    "aten._is_all_true",
    "aten._is_any_true",
    "aten.amax",
    "aten.amin",
    "aten.argmax",
    "aten.argmin",
    "aten.count_nonzero",
    "aten.cumsum",
    "aten.cumprod",
    "aten.cummax",
    "aten.cummin",
    "aten._cummax_helper",
    "aten._cummin_helper",
    "aten.segment_reduce",
)(partial(_reduce, flops=1))
formula("aten.aminmax", "aten._aminmax")(partial(_reduce, flops=2))
formula("aten.mean")(partial(_reduce, flops=1, finish=1))
formula("aten.var", "aten.var_mean")(partial(_reduce, flops=4, finish=2))  # mean, subtract, square, add
formula("aten.std", "aten.std_mean")(partial(_reduce, flops=4, finish=2, roots=1))
formula("aten.logcumsumexp", "aten._logcumsumexp")(partial(_reduce, flops=5, special=2))  # logaddexp


@formula("aten.logsumexp", "aten.special_logsumexp")
def logsumexp(call: Call) -> Cost:
    """The largest of a row, exponentials of what is less, their sum, its logarithm: a kernel each (ReduceOps.cpp).

    Largest values that are infinite are set to 0 in between.
    """
    source, out = call.tensor("self"), call.output
    count, rows = source.numel, out.numel
    if not count or is_complex(source.dtype) or "float" not in source.dtype:
        return _reduce(call, 3, special=1, finish=1, roots=1)
    run = Kernels(call)
    x, result = run.argument("self"), run.result()
    largest = run.kernel("amax", (x,), result.nbytes, flops=count)
    size = run.kernel("abs", (largest,), result.nbytes)
    infinite = run.kernel("eq", (size,), rows)
    run.kernel("masked_fill_", (largest, infinite), largest)
    less = run.kernel("sub", (x, largest), x.nbytes, flops=count)
    run.kernel("exp_", (less,), less, special=count)
    run.kernel("sum", (less,), result, flops=count)
    run.kernel("log_", (result,), result, special=rows)
    run.kernel("add_", (result, largest), result, flops=rows)
    return run.cost()


@formula("aten.nanmean")
def nanmean(call: Call) -> Cost:
    """Numbers that are not NaN counted, those summed, one divided by the other (ReduceOps.cpp)."""
    source, rows = call.tensor("self"), call.output.numel
    run, count = Kernels(call, source.dtype), source.numel
    x = run.argument("self")
    unknown = run.kernel("ne", (x,), count, flops=count)
    known = run.kernel("logical_not", (unknown,), unknown.nbytes)
    number = run.kernel("sum", (known,), rows * _INDEX_BYTES)
    total = run.kernel("nansum", (x,), rows * item_bytes(call.output), flops=count)
    run.kernel("div", (total, number), run.result(), flops=rows)
    return run.cost()


_INDEX_BYTES = 8


@formula("aten.max", "aten.min")
def extreme(call: Call) -> Cost:
    """A comparison per input element, or per result element when two tensors are compared."""
    return elementwise(call, 1) if "other" in call.op.args else _reduce(call, 1)


@formula("aten.norm", "aten.linalg_vector_norm", "aten.frobenius_norm")
def norm(call: Call) -> Cost:
    """2 FLOPs an element (|x|, max, or x * x, add) and a root per result; other powers are transcendental."""
    return _norm(call, call.arg("ord", call.arg("p")))


@formula("aten.linalg_norm", "aten.linalg_matrix_norm")
def matrix_norm(call: Call) -> Cost:
    """Vector and Frobenius norms; norms by singular values are left unpriced."""
    order, dims = call.arg("ord"), call.integers("dim")
    if order in (None, "fro"):
        return _norm(call, 2)
    if len(dims) == 1 or len(call.inputs[0].shape) == 1:
        return _norm(call, order)
    return _norm(call, 1) if order in (1, -1, float("inf"), float("-inf")) else unpriced(call)


@formula("aten.dist")
def dist(call: Call) -> Cost:
    """A difference, written and read, and its norm: 3 FLOPs an element."""
    run, count = Kernels(call), prod(broadcast(call.inputs))
    difference = run.kernel("sub", run.others(), count * item_bytes(call.output), flops=count)
    run.kernel("norm", (difference,), run.result(), flops=2 * count, special=1)
    return run.cost()


@formula("aten.pairwise_distance")
def pairwise_distance(call: Call) -> Cost:
    """A difference, eps added to it, the norm of that: 4 FLOPs an element of the broadcast operands (Distance.cpp)."""
    run, count = Kernels(call), prod(broadcast(call.inputs))
    difference = run.kernel("sub", run.others(), count * item_bytes(call.output), flops=count)
    moved = run.kernel("add", (difference,), difference.nbytes, flops=count)
    run.kernel("norm", (moved,), run.result(), flops=2 * count, special=call.output.numel)
    return run.cost()


@formula("aten.trace")
def trace(call: Call) -> Cost:
    """A sum over the diagonal, of which alone is read."""
    source = call.tensor("self")
    count = min(source.shape)
    return call.cost(
        vector=vector(promoted([source, call.output]), count),
        reads={"self": source.touched_bytes * count // max(source.numel, 1)},
    )


@formula("aten.diff")
def diff(call: Call) -> Cost:
    """Differences of neighbours, n times over."""
    return call.cost(vector=vector(call.output.dtype, call.output.numel * call.integer("n", 1)))


def _norm(call: Call, order: object) -> Cost:
    source = call.inputs[0]
    if is_complex(source.dtype) and order in (None, 2, 2.0):
        return call.cost(vector=vector(source.dtype, 4 * source.numel), special=call.output.numel)
    if order in (None, 2):
        return _reduce(call, 2, roots=1)
    if order in (0, 1, -1, float("inf"), float("-inf"), "inf", "-inf"):
        return _reduce(call, 2)
    return _reduce(call, 2, special=1, roots=1)
