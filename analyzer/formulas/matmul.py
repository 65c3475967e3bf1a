"""Matrix products.

A product of an (m, k) by a (k, n) matrix is m * n * k multiply-adds of 2 FLOPs each, as in
torch.utils.flop_counter, which however gives 0 for matrix-vector and dot products. Bias adds and the `alpha`
and `beta` of the addmm family are vector FLOPs, one per result element. An operand broadcast over a batch
(stride 0) is read once. `matmul` makes one batch dimension of several, and first copies operands of which that cannot
be a view: ATen's `_matmul_impl` and `should_fold` (aten/src/ATen/native/LinearAlgebra.cpp).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

from ..cost import Call, Cost, Gemm, formula, operator_name, unpriced
from ..graph import Role, Tensor, TensorRef
from .arithmetic import broadcast, is_complex, item_bytes, multiply_adds, number, products, vector, wrapped
from .attention_kernels import broadcast_shape, expanded, folds
from .parts import Buffer, Kernels, in_parts, is_contiguous, tensor_index


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
        gemms=products(out.numel // max(columns, 1), columns, inner, aligned=_aligned(source, weight, out)),
    )
    if len(source.shape) <= _MATRIX or is_contiguous(source):
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
        matmul=multiply_adds(left.dtype, call.output.numel * inner),
        gemms=products(rows, columns, inner, batch, aligned=_aligned(left, right, call.output)),
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
    """One matrix product over the listed dimensions; an operand that is no matrix as it lies is copied (Linear.cpp)."""
    left, right = call.tensor("self"), call.tensor("other")
    over, across = call.integers("dims_self"), call.integers("dims_other")
    inner, shared = (prod(t.shape[d] for d in dims) for t, dims in ((left, over), (right, across)))
    if inner != shared or not call.output.shape or call.op.mutates:
        return call.cost(matmul=multiply_adds(left.dtype, call.output.numel * inner))
    rows, columns = left.numel // max(inner, 1), right.numel // max(inner, 1)
    run = Kernels(call, left.dtype)
    operands: list[Buffer] = []
    for name, tensor, dims in (("self", left, over), ("other", right, across)):
        summed = [wrapped(d, len(tensor.shape)) for d in dims]
        groups = [summed, [d for d in range(len(tensor.shape)) if d not in summed]]
        lies_so = all(folds(*_along(tensor, group)) for group in groups)
        operand = run.argument(name)
        operands.append(operand if lies_so else run.kernel("clone", (operand,), tensor.nbytes))
    run.kernel("mm", operands, run.result(), product=Gemm(batch=1, m=rows, n=columns, k=inner))
    return run.cost()


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
    best = {(i, i): (0, 0, i) for i in range(count)}  # multiply-adds and elements of intermediates, first to last; cut
    for length in range(1, count):
        for first in range(count - length):
            last = first + length
            best[first, last] = min(
                (
                    best[first, cut][0] + best[cut + 1, last][0] + sizes[first] * sizes[cut + 1] * sizes[last + 1],
                    best[first, cut][1] + best[cut + 1, last][1] + sizes[first] * sizes[last + 1],
                    cut,
                )
                for cut in range(first, last)
            )
    run = Kernels(call, chain[0].dtype)
    matrices = run.others()

    def product(first: int, last: int) -> Buffer:
        if first == last:
            return matrices[first]
        cut = best[first, last][2]
        operands = product(first, cut), product(cut + 1, last)
        rows, inner, columns = sizes[first], sizes[cut + 1], sizes[last + 1]
        made = run.result() if last - first == count - 1 else rows * columns * item_bytes(chain[0])
        return run.kernel("mm", operands, made, product=Gemm(batch=1, m=rows, n=columns, k=inner))

    product(0, count - 1)
    return run.cost()


@formula("aten.linalg_matrix_power", "aten.matrix_power")
def matrix_power(call: Call) -> Cost:
    """Repeated squaring: a product a bit after the first, and one more a bit that is set (LinearAlgebra.cpp)."""
    matrix, power = call.tensor("self"), call.integer("n", 1)
    if power < 0:
        return unpriced(call)
    left = max(power.bit_length() - 1, 0) + max(power.bit_count() - 1, 0)
    if not left:
        return call.cost()
    run, size = Kernels(call, matrix.dtype), matrix.shape[-1]
    gemm = Gemm(batch=matrix.numel // max(size * size, 1), m=size, n=size, k=size)
    name = "mm" if len(matrix.shape) == _MATRIX else "bmm"

    def product(one: Buffer, other: Buffer) -> Buffer:
        nonlocal left
        left -= 1
        return run.kernel(name, (one, other), matrix.nbytes if left else run.result(), product=gemm)

    (square,) = run.given("self")
    if power == _CUBE:
        product(product(square, square), square)
        return run.cost()
    total: Buffer | None = None
    while power:
        if power & 1:
            total = square if total is None else product(total, square)
        power >>= 1
        square = product(square, square) if power else square
    return run.cost()


_CUBE = 3


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
        return _distances_by_product(call, left, right)
    power = 0 if p in (0, 1, 2, float("inf")) else features
    root = p not in (0, 1, float("inf"))
    return call.cost(vector=vector(left.dtype, 3 * out.numel * features), special=out.numel * (power + root))


@formula("aten.einsum")
def einsum(call: Call) -> Cost:
    """Pairs of operands contracted as PyTorch does: left to right, or along the `path` it was given.

    An index found in one operand of the pair and nowhere else is summed first; an index found in both and nowhere else
    is contracted in a batched product, before which an operand is copied that is no batch of matrices as it lies. When
    nothing is contracted the pair is multiplied elementwise. `einsum` and `sumproduct_pair` of Linear.cpp.
    """
    tensors = call.tensors("tensors")
    parsed = _subscripts(str(call.arg("equation")), tensors)
    if parsed is None:
        return unpriced(call)
    terms, result, size = parsed
    order = [*result, *sorted(set().union(*terms) - set(result))]
    run, item = Kernels(call, tensors[0].dtype), item_bytes(tensors[0])
    step = _Contraction(run, order, size, item, 6 if is_complex(tensors[0].dtype) else 1)
    operands = list(zip(run.others(), terms, strict=True))
    path = list(call.integers("path"))
    while len(operands) > 1:
        first, second = sorted((path.pop(0), path.pop(0))) if path else (0, 1)
        right, left = operands.pop(second), operands.pop(first)
        needed = set(result).union(*(term for _, term in operands))
        left, right = (step.without(one, one[1].keys() - other[1].keys() - needed) for one, other in _both(left, right))
        made = step.product(left, right, needed, run.result() if not operands else None)
        operands.insert(len(operands) if call.arg("path") is not None else 0, made)
    buffer, term = operands[0]
    if any(size[i] > 1 or len(tensors) == 1 for i in term.keys() - set(result)):
        run.kernel("sum", (buffer,), run.result(), flops=step.volume(term))
    return run.cost()


_Operand = tuple[Buffer, dict[str, int]]
"""Memory, and the stride of each index."""


@dataclass(frozen=True, slots=True)
class _Contraction:
    """Steps of an einsum: indices in the order of their dimensions, their sizes, bytes of an element, FLOPs of one."""

    run: Kernels
    order: list[str]
    size: dict[str, int]
    item: int
    flops: int

    def volume(self, indices: Iterable[str]) -> int:
        return prod(self.size[i] for i in indices)

    def without(self, operand: _Operand, indices: set[str]) -> _Operand:
        """An operand summed over indices."""
        buffer, term = operand
        alone = {i for i in indices if self.size[i] > 1}
        if not alone:
            return operand
        kept = self._dense([i for i in self.order if i in term.keys() - alone])
        nbytes = self.volume(kept) * self.item
        return self.run.kernel("sum", (buffer,), nbytes, flops=self.volume(term) * self.flops), kept

    def product(self, left: _Operand, right: _Operand, needed: set[str], result: Buffer | None) -> _Operand:
        """Two operands multiplied, and summed over what both have and nobody needs."""
        both = left[1].keys() & right[1].keys()
        contracted = [i for i in self.order if i in both - needed and self.size[i] > 1]
        made = [i for i in self.order if i in left[1].keys() | right[1].keys() and i not in contracted]
        target = result or self.volume(made) * self.item
        if not contracted:
            work = self.volume(made) * self.flops
            return self.run.kernel("mul", (left[0], right[0]), target, flops=work), self._dense(made)
        batch = [i for i in made if i in both]
        rows, columns = ([i for i in made if i in side[1] and i not in both] for side in (left, right))
        operands = [
            self._as_matrices(operand, (batch, own, contracted)) for operand, own in ((left, rows), (right, columns))
        ]
        m, n = self.volume(rows), self.volume(columns)
        gemm = Gemm(batch=self.volume(batch), m=m, n=n, k=self.volume(contracted))
        swapped = rows and columns and self.order.index(columns[-1]) < self.order.index(rows[0])
        lies = [*batch, *columns, *rows] if swapped else [*batch, *rows, *columns]
        return self.run.kernel("bmm", operands, target, product=gemm), self._dense(lies)

    def _as_matrices(self, operand: _Operand, groups: tuple[list[str], ...]) -> Buffer:
        buffer, term = operand
        if all(folds(tuple(self.size[i] for i in group), tuple(term[i] for i in group)) for group in groups):
            return buffer
        return self.run.kernel("clone", (buffer,), self.volume(term) * self.item)

    def _dense(self, indices: list[str]) -> dict[str, int]:
        strides = accumulate((self.size[i] for i in reversed(indices)), mul, initial=1)
        return dict(zip(reversed(indices), strides, strict=False))


def _both(left: _Operand, right: _Operand) -> tuple[tuple[_Operand, _Operand], tuple[_Operand, _Operand]]:
    return (left, right), (right, left)


_MATRIX = 2


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
        gemms=products(left.shape[-2], columns, left.shape[-1], batch, aligned=_aligned(*call.inputs[1:], out))
        if len(left.shape) > 1
        else (),
    )


def _aligned(*matrices: Tensor) -> bool:
    """Whether the rows of all matrices, or their columns where those are contiguous, begin at multiples of 16 bytes."""
    return all(
        size == 1 or step == 1 or step * item_bytes(tensor) % _LOADED_AT_ONCE == 0
        for tensor in matrices
        if len(tensor.shape) > 1 and 1 in tensor.stride[-2:]  # others are copied first
        for size, step in zip(tensor.shape, tensor.stride, strict=True)
    )


_LOADED_AT_ONCE = 16


def _along(tensor: Tensor, dims: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of some dimensions."""
    return tuple(tensor.shape[d] for d in dims), tuple(tensor.stride[d] for d in dims)


def _distances_by_product(call: Call, left: Tensor, right: Tensor) -> Cost:
    # Distance.cpp, _euclidean_dist
    run, item, features = Kernels(call, left.dtype), item_bytes(left), left.shape[-1]
    rows, columns = left.shape[-2], right.shape[-2]
    padded: dict[str, list[Buffer]] = {}
    for name, tensor in (("x1", left), ("x2", right)):
        (source,) = run.given(name)
        count = tensor.numel // max(features, 1)
        squares = run.kernel("pow", (source,), tensor.nbytes, flops=tensor.numel)
        norm = run.kernel("sum", (squares,), count * item, flops=tensor.numel)
        padded[name] = [source, norm, run.kernel("fill_", (), count * item)]
    padded["x1"][0] = run.kernel("mul", padded["x1"][:1], left.nbytes)
    wide = [
        run.kernel("cat", padded[name], tensor.numel // max(features, 1) * (features + 2) * item)
        for name, tensor in (("x1", left), ("x2", right))
    ]
    out = call.output
    gemm = Gemm(batch=out.numel // max(rows * columns, 1), m=rows, n=columns, k=features + 2)
    name = "mm" if len(out.shape) == _MATRIX else "bmm"
    result = run.kernel(name, wide, run.result(), product=gemm)
    run.kernel("clamp_min_", (result,), result, flops=out.numel)
    run.kernel("sqrt_", (result,), result, special=out.numel)
    return run.cost()


def _subscripts(
    equation: str, operands: tuple[Tensor, ...]
) -> tuple[list[dict[str, int]], list[str], dict[str, int]] | None:
    """Strides of the operands by index, indices of the result, index sizes; an ellipsis hides "0", "1", ...

    None when the equation does not fit the operands.
    """
    left, arrow, right = equation.replace(" ", "").replace("...", ".").partition("->")
    written = left.split(",")
    if len(written) != len(operands):
        return None
    hidden = [len(t.shape) - len(s.replace(".", "")) if "." in s else 0 for s, t in zip(written, operands, strict=True)]
    spread = max(hidden)
    size: dict[str, int] = {}
    named: list[list[str]] = []
    for text, tensor, count in zip(written, operands, hidden, strict=True):
        names = _expanded(text, range(spread - count, spread))
        if len(names) != len(tensor.shape):
            return None
        for name, length in zip(names, tensor.shape, strict=True):
            size[name] = max(size.get(name, 1), length) if length else 0
        named.append(names)
    terms: list[dict[str, int]] = []
    for names, tensor in zip(named, operands, strict=True):
        term: dict[str, int] = {}
        for name, length, step in zip(names, tensor.shape, tensor.stride, strict=True):
            # a dimension that is broadcast belongs only to the operands in which it has a length
            if length != 1 or size[name] <= 1:
                term[name] = term.get(name, 0) + step
        terms.append(term)
    if arrow:
        result = _expanded(right, range(spread))
    else:
        once = sorted(c for c in left if c.isalpha() and left.count(c) == 1)
        result = [*(str(d) for d in range(spread)), *once]
    return terms, [i for i in result if i in size], size


def _expanded(text: str, hidden: range) -> list[str]:
    return [name for c in text for name in ([str(d) for d in hidden] if c == "." else [c])]
