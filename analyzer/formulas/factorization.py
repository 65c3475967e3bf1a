"""Direct solvers on batches of matrices, by the operation counts of LAPACK (LAWN 41), leading term.

The work is mostly matrix products in the operands' own dtype and filed as such. Eigenvalues and singular
values iterate until they converge; they are left unpriced.
"""

from ..cost import Call, Cost, formula
from ..graph import Tensor
from .arithmetic import multiply_adds


@formula("aten.linalg_cholesky", "aten.linalg_cholesky_ex", "aten.cholesky")
def cholesky(call: Call) -> Cost:
    """n^3 / 3 FLOPs."""
    return _cubic(call, _matrix(call), 1 / 3)


@formula(
    "aten.linalg_lu",
    "aten.linalg_lu_factor",
    "aten.linalg_lu_factor_ex",
    "aten.linalg_det",
    "aten.det",
    "aten.linalg_slogdet",
    "aten.slogdet",
    "aten.logdet",
)
def lu(call: Call) -> Cost:
    """For m >= n, m n^2 - n^3 / 3 FLOPs: 2/3 n^3 when square."""
    source = _matrix(call)
    rows, columns = max(source.shape[-2:]), min(source.shape[-2:])
    batch = source.numel // max(rows * columns, 1)
    return _work(call, source, batch * (rows * columns**2 - columns**3 / 3))


@formula("aten.linalg_inv", "aten.linalg_inv_ex", "aten.inverse", "aten.cholesky_inverse")
def inverse(call: Call) -> Cost:
    """2 n^3 FLOPs by LU; 2/3 n^3 from a Cholesky factor."""
    return _cubic(call, _matrix(call), 2 / 3 if call.op.target.startswith("aten.cholesky") else 2)


@formula("aten.linalg_solve", "aten.linalg_solve_ex")
def solve(call: Call) -> Cost:
    """LU, then two triangular solves: 2/3 n^3 + 2 n^2 FLOPs a right-hand side."""
    matrix, right = call.tensor("A"), call.tensor("B")
    n = matrix.shape[-1]
    return _work(call, matrix, 2 / 3 * matrix.numel * n + 2 * n * right.numel)


@formula("aten.linalg_solve_triangular", "aten.triangular_solve")
def solve_triangular(call: Call) -> Cost:
    """n^2 FLOPs a right-hand side."""
    matrix = call.tensor("A") if call.optional("A") else call.tensor("self")
    return _work(call, matrix, matrix.shape[-1] * call.output.numel)


@formula("aten.cholesky_solve", "aten.linalg_lu_solve")
def solve_factored(call: Call) -> Cost:
    """Two triangular solves: 2 n^2 FLOPs a right-hand side."""
    matrix = call.optional("input2") or call.tensor("LU")
    return _work(call, matrix, 2 * matrix.shape[-1] * call.output.numel)


@formula("aten.linalg_qr", "aten.geqrf")
def qr(call: Call) -> Cost:
    """2 m n^2 - 2/3 n^3 FLOPs for m >= n, and as much again to form Q."""
    source = _matrix(call)
    rows, columns = max(source.shape[-2:]), min(source.shape[-2:])
    batch = source.numel // max(rows * columns, 1)
    formed = 1 if call.op.target.startswith("aten.geqrf") or call.arg("mode") == "r" else 2
    return _work(call, source, formed * batch * (2 * rows * columns**2 - 2 / 3 * columns**3))


def _matrix(call: Call) -> Tensor:
    return call.inputs[0]


def _cubic(call: Call, matrix: Tensor, factor: float) -> Cost:
    return _work(call, matrix, factor * matrix.numel * matrix.shape[-1])


def _work(call: Call, matrix: Tensor, flops: float) -> Cost:
    return call.cost(matmul=multiply_adds(matrix.dtype, flops / 2))
