"""The kernels that one call of scaled dot product attention launches, with the layouts of the buffers between them.

Shapes as in `sdpa`. A mask hides keys from queries in bands along the diagonal: `Band`.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from ..graph import Tensor
from ..sdpa import FLASH_ALIGNMENT, HALF, Attention, BackendName, contiguous_stride, dense_stride


def executed_pairs(queries: int, keys: int, *, left: int | None = None, right: int | None = None) -> int:
    """(query, key) pairs with i - left <= j <= i + right; None is no limit.

    A causal mask aligned top-left has right = 0; aligned bottom-right, right = keys - queries. A kernel that
    skips whole tiles executes more pairs, never fewer.
    """
    upto = queries * keys if right is None else _ramp(queries, keys, right + 1)
    return upto - (0 if left is None else _ramp(queries, keys, -left))


@dataclass(frozen=True, slots=True)
class Band:
    """Keys that a query sees: see `executed_pairs`."""

    left: int | None = None
    right: int | None = None

    def pairs(self, queries: int, keys: int) -> int:
        """(query, key) pairs inside the band."""
        return executed_pairs(queries, keys, left=self.left, right=self.right)

    def keys_read(self, queries: int, keys: int) -> int:
        """Keys that at least one query sees."""
        last = keys if self.right is None else _clamp(queries + self.right, keys)
        return last - (0 if self.left is None else _clamp(-self.left, keys))

    @property
    def edges(self) -> int:
        """How many ends of what a query sees move with it."""
        return (self.left is not None) + (self.right is not None)

    def seen(self, queries: int, keys: int) -> int:
        """Keys that the query sees which sees most of them."""
        last = keys if self.right is None else _clamp(queries + self.right, keys)
        if self.left is None:
            return last
        return min(last, self.left + 1 + (keys if self.right is None else self.right))


def _ramp(queries: int, keys: int, shift: int) -> int:
    """Sum over i < queries of i + shift, kept between 0 and keys."""
    end = _clamp(keys - shift, queries)
    start = min(_clamp(1 - shift, queries), end)
    return (end - start) * (start + end - 1 + 2 * shift) // 2 + (queries - end) * keys


def _clamp(value: int, most: int) -> int:
    return max(0, min(value, most))


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """A tensor (..., rows, D) cut to its first rows."""
    return replace(tensor, shape=(*tensor.shape[:-2], rows, tensor.shape[-1]))


def broadcast_shape(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that two shapes broadcast to."""
    rank = max(len(one), len(other))
    one, other = (1,) * (rank - len(one)) + one, (1,) * (rank - len(other)) + other
    return tuple(b if a == 1 else a for a, b in zip(one, other, strict=True))


def band_of(attention: Attention) -> Band:
    """The band of `is_causal`, aligned top-left."""
    return Band(right=0 if attention.causal else None)


def bottom_right(attention: Attention) -> Band:
    """The causal band whose last query sees the last key."""
    return Band(right=attention.key.shape[-2] - attention.query.shape[-2])


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel of an op that launches several: the tensors it reads and those it writes.

    Buffers that the op allocates for itself are tensors of storage `SCRATCH`, its result is of storage
    `RESULT`.
    """

    name: str
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of distinct memory read."""
        return sum(tensor.touched_bytes for tensor in self.reads)

    @property
    def bytes_written(self) -> int:
        """Bytes written."""
        return sum(tensor.touched_bytes for tensor in self.writes)


SCRATCH = -1
RESULT = -2


def math_steps(attention: Attention, *, converts_mask: bool = True) -> tuple[Step, ...]:
    """The kernels of the math path in torch 2.13, with no gradients, in order.

    With c the dtype computed in, float32 for 16-bit inputs (unless the user allows 16-bit reductions there):

    | kernel                | when                   | reads                     | writes                    |
    |-----------------------|------------------------|---------------------------|---------------------------|
    | mask to float         | bool mask, `F.sdpa`    | mask                      | mask, query dtype         |
    | cast query, key, value| 16-bit                 | each                      | each, c                   |
    | scale query           | always                 | query, c                  | query, c                  |
    | causal mask: 3        | is_causal              | ones; tril                | ones; tril (bool); mask, c|
    | repeat key, value     | enable_gqa, Hkv != Hq  | each, c                   | each with Hq heads, c     |
    | scale key             | always                 | key, c                    | key, c                    |
    | copy query, key       | (B, H) not one stride  | each, c                   | each, contiguous, c       |
    | query x key           | always                 | query, key, c             | scores, c                 |
    | add mask              | any mask               | scores, mask              | scores                    |
    | softmax               | always                 | scores                    | probabilities, c          |
    | masked: 2             | always                 | scores; bool scores       | bool scores; bool rows    |
    | zero masked rows      | always                 | bool rows, probabilities  | probabilities             |
    | dropout               | dropout_p > 0          | probabilities             | probabilities, kept (bool)|
    | cast probabilities    | 16-bit                 | probabilities, c          | probabilities, query dtype|
    | copy value            | (B, H) not one stride  | value, c                  | value, contiguous, c      |
    | probabilities x value | always                 | probabilities, value, c   | output, c                 |
    | cast output           | 16-bit                 | output, c                 | output                    |

    The square root of the scale goes on the query and on the key. The cast probabilities are a second result
    that `F.sdpa` drops. The copies are those of `matmul`, which folds all batch dimensions into one: a
    token-major query (B, S, H, D memory) with B > 1, or heads that were expanded, are copied.

    Args:
        attention: the call; query, key and value of equal rank.
        converts_mask: true for `F.sdpa`, which makes a boolean mask additive before it calls the math path.
    """
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    given = query.dtype
    computed = "float32" if given in HALF else given
    kernels = _Kernels()
    if mask is not None and mask.dtype == "bool" and converts_mask:
        mask = kernels.copy("mask to float", mask, given)
    if computed != given:
        query = kernels.copy("cast query", query, computed)
        key = kernels.copy("cast key", key, computed)
        value = kernels.copy("cast value", value, computed)
    query = kernels.copy("scale query", query)
    if attention.causal:
        mask = kernels.causal_mask(query.shape[-2], key.shape[-2], computed)
    if attention.gqa:
        key, value = _repeat_heads(kernels, attention, key, value)
    key = kernels.copy("scale key", transposed(key, -2, -1))
    probabilities = kernels.softmax(kernels.matmul("query x key", query, key), mask)
    if attention.dropout > 0:
        kept = _scratch(probabilities.shape, "bool")
        kernels.run("dropout", (probabilities,), probabilities, kept)
    if computed != given:
        kernels.copy("cast probabilities", probabilities, given)
    output = kernels.matmul("probabilities x value", probabilities, value)
    if computed != given:
        kernels.copy("cast output", output, given)
    return kernels.to_result()


def fused_steps(attention: Attention, backend: BackendName) -> tuple[Step, ...]:
    """The kernels of a fused backend on NVIDIA and AMD: what `F.sdpa` prepares, then the kernel itself.

    A boolean mask becomes an additive one of the query's dtype, at the mask's own size. The memory-efficient
    kernel wants a mask whose strides are multiples of 8 and gets a padded copy else; flash wants a head_dim
    that is a multiple of 8 and gets padded copies of query, key and value else.

    A causal kernel never reads keys past the last query. Scores stay on chip. Logsumexp, which flash writes
    even in inference (4 bytes a query and head), is left out.
    """
    kernels = _Kernels()
    mask = attention.mask
    if mask is not None and mask.dtype == "bool":
        mask = kernels.copy("mask to float", mask, attention.query.dtype)
    if mask is not None and backend == "efficient" and not _aligned(mask, _MASK_ALIGNMENT):
        mask = kernels.pad("pad mask", mask, _MASK_ALIGNMENT)
    query, key, value = attention.query, attention.key, attention.value
    if backend == "flash" and query.shape[-1] % FLASH_ALIGNMENT:
        query = kernels.pad("pad query", query, FLASH_ALIGNMENT)
        key = kernels.pad("pad key", key, FLASH_ALIGNMENT)
        value = kernels.pad("pad value", value, FLASH_ALIGNMENT)
    seen = band_of(attention).keys_read(query.shape[-2], key.shape[-2])
    operands = (query, first_rows(key, seen), first_rows(value, seen))
    reads = operands if mask is None else (*operands, mask)
    kernels.run("attention", reads, _scratch(_output_shape(attention), attention.query.dtype))
    return kernels.to_result()


def metal_steps(attention: Attention, backend: BackendName) -> tuple[Step, ...]:
    """The kernels on Apple's GPUs: repeated heads, contiguous copies for the vector kernel, then attention.

    The graph that runs for more than 8 queries is taken to write the scores once and to read them once, in
    the query's dtype: less than what it does if Metal fuses nothing.
    """
    kernels = _Kernels()
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    if mask is not None and mask.dtype == "bool":
        mask = kernels.copy("mask to float", mask, query.dtype)
    if attention.gqa:
        key, value = _repeat_heads(kernels, attention, key, value)
    masks = () if mask is None else (mask,)
    if backend == "math":
        batch = broadcast_shape(query.shape[:-2], key.shape[:-2])
        scores = _scratch((*batch, query.shape[-2], key.shape[-2]), query.dtype)
        kernels.run("query x key", (query, key, *masks), scores)
        kernels.run("probabilities x value", (scores, value), _scratch(_output_shape(attention), query.dtype))
    else:
        key, value = (
            t if t.stride == contiguous_stride(t.shape) else kernels.contiguous(f"copy {name}", t)
            for name, t in (("key", key), ("value", value))
        )
        kernels.run("attention", (query, key, value, *masks), _scratch(_output_shape(attention), query.dtype))
    return kernels.to_result()


_MASK_ALIGNMENT = 8


class _Kernels:
    """Follows an op through its kernels, with the layouts that PyTorch gives to the buffers between them."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def run(self, name: str, reads: tuple[Tensor, ...], *writes: Tensor) -> Tensor:
        self.steps.append(Step(name, reads, writes))
        return writes[0]

    def copy(self, name: str, source: Tensor, dtype: str | None = None) -> Tensor:
        """An elementwise kernel: the result is dense in the order of the source's strides."""
        stride = dense_stride(source.shape, source.stride)
        return self.run(name, (source,), _scratch(source.shape, dtype or source.dtype, stride))

    def contiguous(self, name: str, source: Tensor) -> Tensor:
        return self.run(name, (source,), _scratch(source.shape, source.dtype))

    def pad(self, name: str, source: Tensor, alignment: int) -> Tensor:
        """Fill a wider buffer, then copy into it; the slice of the given width is returned."""
        width = source.shape[-1]
        # a width already aligned is padded all the same when other strides were not
        wide = (*source.shape[:-1], width + alignment - width % alignment)
        stride = contiguous_stride(wide)
        self.run(name, (), _scratch(wide, source.dtype))
        return self.run(name, (source,), _scratch(source.shape, source.dtype, stride))

    def causal_mask(self, queries: int, keys: int, dtype: str) -> Tensor:
        ones = self.run("causal mask", (), _scratch((queries, keys), "bool"))
        tril = self.run("causal mask", (ones,), _scratch((queries, keys), "bool"))
        return self.copy("causal mask", tril, dtype)

    def matmul(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        batch = broadcast_shape(left.shape[:-2], right.shape[:-2])
        left, right = (self._folded(name, expanded(tensor, batch)) for tensor in (left, right))
        return self.run(name, (left, right), _scratch((*batch, left.shape[-2], right.shape[-1]), left.dtype))

    def softmax(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax over the last dimension, with zeros in rows that are masked as a whole."""
        if mask is not None:
            self.run("add mask", (scores, mask), scores)
        probabilities = self.run("softmax", (scores,), scores)
        hidden = self.run("masked", (scores,), _scratch(scores.shape, "bool"))
        rows = self.run("masked", (hidden,), _scratch((*scores.shape[:-1], 1), "bool"))
        return self.run("zero masked rows", (rows, probabilities), probabilities)

    def to_result(self) -> tuple[Step, ...]:
        """The steps, where what the last one writes is the op's result."""
        *steps, last = self.steps
        return (*steps, replace(last, writes=tuple(replace(t, storage=RESULT) for t in last.writes)))

    def _folded(self, name: str, operand: Tensor) -> Tensor:
        if folds(operand.shape[:-2], operand.stride[:-2]):
            return operand
        return self.contiguous(f"copy for {name}", operand)


def _repeat_heads(kernels: _Kernels, attention: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    heads = attention.query.shape[-3]
    if key.shape[-3] == heads == value.shape[-3]:
        return key, value
    key, value = (
        kernels.run(f"repeat {name}", (t,), _scratch((*t.shape[:-3], heads, *t.shape[-2:]), t.dtype))
        for name, t in (("key", key), ("value", value))
    )
    return key, value


def _scratch(shape: tuple[int, ...], dtype: str, stride: tuple[int, ...] | None = None) -> Tensor:
    return Tensor(storage=SCRATCH, dtype=dtype, shape=shape, stride=stride or contiguous_stride(shape))


def _output_shape(attention: Attention) -> tuple[int, ...]:
    return (*attention.query.shape[:-1], attention.value.shape[-1])


def transposed(tensor: Tensor, one: int, other: int) -> Tensor:
    """The view with two dimensions swapped."""
    shape, stride = list(tensor.shape), list(tensor.stride)
    shape[one], shape[other] = shape[other], shape[one]
    stride[one], stride[other] = stride[other], stride[one]
    return replace(tensor, shape=tuple(shape), stride=tuple(stride))


def expanded(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    """The view with its batch dimensions broadcast: a matrix (..., m, n) to (*batch, m, n)."""
    missing = len(batch) + 2 - len(tensor.shape)
    shape = (1,) * missing + tensor.shape
    stride = (0,) * missing + tensor.stride
    steps = tuple(
        0 if size == 1 and wanted != 1 else step
        for size, step, wanted in zip(shape[:-2], stride[:-2], batch, strict=True)
    )
    return replace(tensor, shape=(*batch, *shape[-2:]), stride=(*steps, *stride[-2:]))


def folds(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """True when several dimensions can be seen as one of a single stride."""
    real = [(size, step) for size, step in zip(shape, stride, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(real))


def _aligned(tensor: Tensor, alignment: int) -> bool:
    return tensor.stride[-1] == 1 and not any(step % alignment for step in tensor.stride[:-1])
