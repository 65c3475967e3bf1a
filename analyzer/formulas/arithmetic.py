"""Which dtype work is done in, and how much memory a tensor reaches: shared by the formulas."""

from collections.abc import Iterable
from itertools import zip_longest

from ..cost import Call, Gemm
from ..graph import ITEM_BITS, Tensor

_REAL = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


def is_complex(dtype: str) -> bool:
    """True for complex dtypes."""
    return dtype in _REAL


def opmath(dtype: str) -> str:
    """The dtype that kernels compute in: float32 for narrower floats, the parts' for complex numbers."""
    real = _REAL.get(dtype, dtype)
    narrow = real.startswith(("float", "bfloat")) and ITEM_BITS[real] < 32
    return "float32" if narrow else real


def vector(dtype: str, flops: float) -> dict[str, float]:
    """Vector FLOPs on elements of a dtype, filed under the dtype computed in."""
    return {opmath(dtype): flops} if flops else {}


def multiply_adds(dtype: str, count: float) -> dict[str, float]:
    """Matmul FLOPs by operand dtype: 2 a multiply-add, 8 for complex numbers, filed under their parts."""
    if not count:
        return {}
    return {_REAL[dtype]: 8.0 * count} if is_complex(dtype) else {dtype: 2.0 * count}


def products(m: int, n: int, k: int, batch: int = 1, *, aligned: bool = True, groups: int = 0) -> tuple[Gemm, ...]:
    """The shape of `batch` products of an (m, k) by a (k, n) matrix; empty where there is nothing to multiply."""
    some = batch and m and n and k
    return (Gemm(batch=batch, m=m, n=n, k=k, aligned=aligned, groups=groups),) if some else ()


def promoted(tensors: Iterable[Tensor]) -> str:
    """The dtype of elementwise arithmetic on these tensors; 0-d tensors yield to others, as in torch."""
    known = list(tensors)
    ranked = [t for t in known if t.shape] or known
    return max((t.dtype for t in ranked), key=_rank)


def _rank(dtype: str) -> tuple[int, int]:
    kind = 3 if is_complex(dtype) else 2 if "float" in dtype else 0 if dtype == "bool" else 1
    return kind, ITEM_BITS[dtype]


def broadcast(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """The shape that tensors of these shapes broadcast to."""
    columns = zip_longest(*(reversed(t.shape) for t in tensors), fillvalue=1)
    return tuple(0 if 0 in sizes else max(sizes) for sizes in columns)[::-1]


def item_bytes(tensor: Tensor) -> int:
    """Bytes of one element."""
    return ITEM_BITS[tensor.dtype] // 8


def reach(call: Call, tensor: Tensor, elements: int | None = None) -> int:
    """Bytes of memory behind a tensor: at most its storage and, when given, at most that many elements."""
    whole = min(tensor.touched_bytes, call.graph.storages[tensor.storage].nbytes)
    return whole if elements is None else min(whole, elements * item_bytes(tensor))


def number(call: Call, name: str, default: float) -> float:
    """A numeric argument; `default` when absent or None."""
    value = call.arg(name)
    return value if isinstance(value, int | float) else default


def wrapped(dim: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return dim + ndim if dim < 0 else dim
