"""Matrix products.

A product of an (m, k) by a (k, n) matrix is m * n * k multiply-adds of 2 FLOPs each, as in
torch.utils.flop_counter, which however gives 0 for matrix-vector and dot products. Bias adds and the `alpha`
and `beta` of the addmm family are vector FLOPs, one per result element. An operand broadcast over a batch
(stride 0) is read once. `matmul` makes one batch dimension of several, and first copies operands of which that cannot
be a view: ATen's `_matmul_impl` and `should_fold` (aten/src/ATen/native/LinearAlgebra.cpp).
"""

from math import prod

from ..cost import Call, Cost, Gemm, formula, operator_name, unpriced
from ..graph import Role, Tensor, TensorRef
from .arithmetic import broadcast, is_complex, item_bytes, multiply_adds, number, vector
from .attention_kernels import broadcast_shape, expanded, folds
from .parts import in_parts, tensor_index


@formula("aten.linear")
def linear(call: Call) -> Cost:
    """The product input @ weight.T, plus bias: result elements x in_features multiply-adds.

    A non-contiguous input of three dimensions or more is taken as `matmul` does, and its bias is a kernel of its own.
    """
    source, weight, out = call.tensor("input"), call.tensor("weight"), call.output
    bias = out.numel if call.optional("bias") else 0
    inner = source.shape[-1]
    columns = weight.shape[0] if len(weight.shape) > 1 else 1
    cost = call.cost(
        matmul=multiply_adds(source.dtype, out.numel * inner),
        vector=vector(out.dtype, bias),
        gemms=_gemms(1, out.numel // max(columns, 1), columns, inner),
    )
    if len(source.shape) <= _MATRIX or _is_contiguous(source):
        return cost
    views = folds(source.shape[:-1], source.stride[:-1])
    trained = call.graph.role(tensor_index(call, "weight")) is Role.WEIGHT
    copies = not views if trained else not folds(source.shape[:-2], source.stride[:-2])
    return in_parts(call, cost, {"input": source.nbytes} if copies else {}, bias="bias" if bias else "")


@formula(
    "aten.mm",
    "aten.bmm",
    "aten.matmul",
    "aten.linalg_matmul",
    "aten.mv",
    "aten.dot",
    "aten.vdot",
    "aten.inner",
)
def matmul(call: Call) -> Cost:
    """Products over the last dimension of the first operand: result elements x k multiply-adds, any rank."""
    left = call.tensor("self")
    right = next(t for name in ("mat2", "other", "tensor", "vec") if (t := call.optional(name)) is not None)
    inner = left.shape[-1] if left.shape else 1
    columns = right.shape[-1] if len(right.shape) > 1 else 1
    rows = left.shape[-2] if len(left.shape) > 1 else 1
    batch = call.output.numel // max(rows * columns, 1)
    if len(right.shape) <= _MATRIX:
        batch, rows = 1, batch * rows
    cost = call.cost(
        matmul=multiply_adds(left.dtype, call.output.numel * inner), gemms=_gemms(batch, rows, columns, inner)
    )
    if operator_name(call.op.target) not in ("aten.matmul", "aten.linalg_matmul"):
        return cost
    return in_parts(call, cost, _copied(call, left, right))


@formula("aten.addmm", "aten._addmm_activation")
def addmm(call: Call) -> Cost:
    """The sum beta * self + alpha * mat1 @ mat2, and a GELU or ReLU on top for `_addmm_activation`."""
    out = call.output
    activated = "use_gelu" in call.op.args
    gelu = activated and call.flag("use_gelu")
    extra = (8 if gelu else 1) * out.numel if activated else 0
    return _accumulated(call, "mat1", out.numel, special=out.numel if gelu else 0, flops=extra)


@formula("aten.addmv")
def addmv(call: Call) -> Cost:
    """The sum beta * self + alpha * mat @ vec."""
    return _accumulated(call, "mat", call.output.numel)


@formula("aten.baddbmm")
def baddbmm(call: Call) -> Cost:
    """The sum beta * self + alpha * batch1 @ batch2, batch by batch."""
    return _accumulated(call, "batch1", call.output.numel)


@formula("aten.addbmm")
def addbmm(call: Call) -> Cost:
    """The sum beta * self + alpha * (batch1 @ batch2).sum(0): every batch is accumulated into one."""
    return _accumulated(call, "batch1", call.output.numel * call.tensor("batch1").shape[0])


@formula("aten.outer", "aten.ger", "aten.kron")
def outer(call: Call) -> Cost:
    """Nothing is contracted: one multiplication per result element, on vector units."""
    out = call.output
    return call.cost(vector=vector(out.dtype, out.numel * (6 if is_complex(out.dtype) else 1)))


@formula("aten.addr")
def addr(call: Call) -> Cost:
    """The sum beta * self + alpha * outer(vec1, vec2): a multiplication and an addition per element."""
    beta = number(call, "beta", 1)
    scales = (number(call, "alpha", 1) != 1) + (beta not in (0, 1))
    flops = call.output.numel * (1 + (beta != 0) + scales)
    return call.cost(vector=vector(call.output.dtype, flops), reads={"self": 0} if beta == 0 else None)


@formula("aten.tensordot")
def tensordot(call: Call) -> Cost:
    """One matrix product over the listed dimensions."""
    left = call.tensor("self")
    inner = prod(left.shape[d] for d in call.integers("dims_self"))
    return call.cost(matmul=multiply_adds(left.dtype, call.output.numel * inner))


@formula("aten.linalg_vecdot")
def vecdot(call: Call) -> Cost:
    """Dot products along one dimension of the broadcast operands."""
    left, right = call.tensor("x"), call.tensor("y")
    return call.cost(matmul=multiply_adds(left.dtype, prod(broadcast([left, right]))))


@formula("aten.linalg_multi_dot", "aten.chain_matmul")
def multi_dot(call: Call) -> Cost:
    """A chain of matrices multiplied in the cheapest order, found by dynamic programming as PyTorch does."""
    chain = call.tensors("tensors") or call.tensors("matrices")
    shapes = [t.shape for t in chain]
    if len(shapes[0]) == 1:
        shapes[0] = (1, *shapes[0])
    if len(shapes[-1]) == 1:
        shapes[-1] = (*shapes[-1], 1)
    sizes = [shapes[0][0], *(s[1] for s in shapes)]
    count = len(chain)
    best = {(i, i): (0, 0) for i in range(count)}  # multiply-adds and elements of intermediates, first to last
    for length in range(1, count):
        for first in range(count - length):
            last = first + length
            best[first, last] = min(
                (
                    best[first, cut][0] + best[cut + 1, last][0] + sizes[first] * sizes[cut + 1] * sizes[last + 1],
                    best[first, cut][1] + best[cut + 1, last][1] + sizes[first] * sizes[last + 1],
                )
                for cut in range(first, last)
            )
    work, elements = best[0, count - 1]
    between = max(elements - sizes[0] * sizes[-1], 0) * item_bytes(chain[0])
    return call.cost(matmul=multiply_adds(chain[0].dtype, work), scratch_read=between, scratch_written=between)


@formula("aten.linalg_matrix_power", "aten.matrix_power")
def matrix_power(call: Call) -> Cost:
    """Repeated squaring: a product a bit after the first, and one more a bit that is set."""
    matrix, power = call.tensor("self"), call.integer("n", 1)
    if power < 0:
        return unpriced(call)
    products = max(power.bit_length() - 1, 0) + max(power.bit_count() - 1, 0)
    between = max(products - 1, 0) * matrix.nbytes
    return call.cost(
        matmul=multiply_adds(matrix.dtype, products * matrix.numel * matrix.shape[-1]),
        scratch_read=between,
        scratch_written=between,
    )


@formula("aten.bilinear")
def bilinear(call: Call) -> Cost:
    """Per output o, x1 . W_o . x2 as PyTorch evaluates it: x1 @ W_o, written out, then times x2."""
    out, weight = call.output, call.tensor("weight")
    _, width, height = weight.shape
    between = out.numel * height * item_bytes(out)
    return call.cost(
        matmul=multiply_adds(weight.dtype, out.numel * (width + 1) * height),
        vector=vector(out.dtype, out.numel if call.optional("bias") else 0),
        scratch_read=between,
        scratch_written=between,
    )


@formula("aten.cdist")
def cdist(call: Call) -> Cost:
    """Distances between rows: |a|^2 + |b|^2 - 2ab by a matrix product, or a difference per feature and pair.

    PyTorch takes the matrix product for p = 2 when either side has more than 25 rows; it appends each norm
    and a one to the rows, hence features + 2.
    """
    left, right, out = call.tensor("x1"), call.tensor("x2"), call.output
    features, p, mode = left.shape[-1], number(call, "p", 2.0), call.integer("compute_mode", 0)
    product = p == 2 and (mode == 1 or (mode == 0 and max(left.shape[-2], right.shape[-2]) > 25))
    if product:
        norms = 2 * (left.numel + right.numel)
        return call.cost(
            matmul=multiply_adds(left.dtype, out.numel * (features + 2)),
            vector=vector(left.dtype, norms + out.numel),
            special=out.numel,
        )
    power = 0 if p in (0, 1, 2, float("inf")) else features
    root = p not in (0, 1, float("inf"))
    return call.cost(vector=vector(left.dtype, 3 * out.numel * features), special=out.numel * (power + root))


@formula("aten.einsum")
def einsum(call: Call) -> Cost:
    """Pairs of operands contracted as PyTorch does: left to right, or along the `path` it was given.

    An index found in one operand of the pair and nowhere else is summed first; an index found in both and
    nowhere else is contracted, and the pair costs the product of all its index sizes in multiply-adds. When
    nothing is contracted the pair is multiplied elementwise. Results between pairs are written and read.
    """
    operands = call.tensors("tensors")
    parsed = _subscripts(str(call.arg("equation")), operands)
    if parsed is None:
        return unpriced(call)
    terms, result, size = parsed
    dtype = operands[0].dtype
    path = list(call.integers("path"))
    products, flops, between = 0, 0, 0
    while len(terms) > 1:
        first, second = sorted((path.pop(0), path.pop(0))) if path else (0, 1)
        right, left = terms.pop(second), terms.pop(first)
        needed = result.union(*terms)
        for term, other in ((left, right), (right, left)):
            alone = {i for i in term - other - needed if size[i] > 1}
            if alone:
                flops += _volume(term, size)
                term -= alone
        contracted = {i for i in left & right - needed if size[i] > 1}
        work = _volume(left | right, size)
        products += work if contracted else 0
        flops += 0 if contracted else work
        made = (left | right) - contracted
        terms.insert(len(terms) if call.arg("path") is not None else 0, made)
        between += _volume(made, size) if len(terms) > 1 else 0
    if terms[0] - result:
        flops += _volume(terms[0], size)
    return call.cost(
        matmul=multiply_adds(dtype, products),
        vector=vector(dtype, flops * (6 if is_complex(dtype) else 1)),
        scratch_read=between * item_bytes(operands[0]),
        scratch_written=between * item_bytes(operands[0]),
    )


_MATRIX = 2


def _gemms(batch: int, m: int, n: int, k: int) -> tuple[Gemm, ...]:
    return (Gemm(batch=batch, m=m, n=n, k=k),) if batch and m and n and k else ()


def _copied(call: Call, left: Tensor, right: Tensor) -> dict[str, int]:
    """Bytes of the copies that `matmul` makes of its operands, by argument."""
    large, small, name = (left, right, "self") if len(left.shape) >= len(right.shape) else (right, left, "other")
    if len(large.shape) <= _MATRIX:
        return {}
    if len(small.shape) <= _MATRIX:
        other = call.op.args["other" if name == "self" else "self"]
        trained = isinstance(other, TensorRef) and call.graph.role(other.tensor) is Role.WEIGHT
        views = folds(large.shape[:-1], large.stride[:-1])
        if trained or (name == "self" and views):
            return {} if views else {name: large.nbytes}
        return {} if folds(large.shape[:-2], large.stride[:-2]) else {name: large.nbytes}
    batch = broadcast_shape(left.shape[:-2], right.shape[:-2])
    wide = {"self": expanded(left, batch), "other": expanded(right, batch)}
    return {n: t.nbytes for n, t in wide.items() if not folds(t.shape[:-2], t.stride[:-2])}


def _is_contiguous(tensor: Tensor) -> bool:
    real = [step for size, step in zip(tensor.shape, tensor.stride, strict=True) if size != 1]
    return folds(tensor.shape, tensor.stride) and (not real or real[-1] == 1)


def _accumulated(call: Call, operand: str, results: int, special: float = 0.0, flops: float = 0.0) -> Cost:
    left, out = call.tensor(operand), call.output
    columns = out.shape[-1] if len(left.shape) > 1 and len(out.shape) > 1 else 1
    batch = left.shape[0] if len(left.shape) > _MATRIX else 1
    alpha, beta = number(call, "alpha", 1), number(call, "beta", 1)
    scales = (alpha != 1) + (beta not in (0, 1))
    return call.cost(
        matmul=multiply_adds(left.dtype, results * left.shape[-1]),
        vector=vector(out.dtype, out.numel * ((beta != 0) + scales) + flops),
        special=special,
        reads={"self": 0} if beta == 0 else None,
        gemms=_gemms(batch, left.shape[-2], columns, left.shape[-1]) if len(left.shape) > 1 else (),
    )


def _volume(indices: set[str], size: dict[str, int]) -> int:
    return prod(size[i] for i in indices)


def _subscripts(equation: str, operands: tuple[Tensor, ...]) -> tuple[list[set[str]], set[str], dict[str, int]] | None:
    """Index sets of the operands and of the result, and index sizes; an ellipsis hides "0", "1", ...

    None when the equation does not fit the operands.
    """
    left, arrow, right = equation.replace(" ", "").replace("...", ".").partition("->")
    written = left.split(",")
    if len(written) != len(operands):
        return None
    hidden = [len(t.shape) - len(s.replace(".", "")) if "." in s else 0 for s, t in zip(written, operands, strict=True)]
    spread = max(hidden)
    size: dict[str, int] = {}
    terms: list[set[str]] = []
    for text, tensor, count in zip(written, operands, hidden, strict=True):
        names = _expanded(text, range(spread - count, spread))
        if len(names) != len(tensor.shape):
            return None
        for name, length in zip(names, tensor.shape, strict=True):
            size[name] = max(size.get(name, 1), length) if length else 0
        terms.append(set(names))
    if arrow:
        result = set(_expanded(right, range(spread)))
    else:
        result = {c for c in left if c.isalpha() and left.count(c) == 1} | {str(d) for d in range(spread)}
    # a dimension that is broadcast belongs only to the operands in which it has a length
    for term, text, tensor, count in zip(terms, written, operands, hidden, strict=True):
        names = _expanded(text, range(spread - count, spread))
        term -= {n for n, length in zip(names, tensor.shape, strict=True) if length == 1 and size[n] > 1}
    return terms, result & size.keys(), size


def _expanded(text: str, hidden: range) -> list[str]:
    return [name for c in text for name in ([str(d) for d in hidden] if c == "." else [c])]
