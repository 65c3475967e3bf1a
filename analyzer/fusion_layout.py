"""Orders of elements: what is read in the order in which it was written, and which dimensions an op reduces."""

import functools
from math import prod

from .graph import Op


@functools.lru_cache(maxsize=4096)
def is_in_order(
    shape: tuple[int, ...], stride: tuple[int, ...], result: tuple[int, ...], result_stride: tuple[int, ...]
) -> bool:
    """Whether a tensor is laid out in the order in which a result is."""
    if len(shape) != len(result):
        return _is_row_major(shape, stride) or not _is_row_major(result, result_stride)
    dims = [d for d, (size, step) in enumerate(zip(shape, stride, strict=True)) if size > 1 and step and result[d] > 1]
    return sorted(dims, key=lambda d: -stride[d]) == sorted(dims, key=lambda d: -result_stride[d])


@functools.lru_cache(maxsize=4096)
def keeps_order(
    shape: tuple[int, ...], stride: tuple[int, ...], made: tuple[int, ...], made_stride: tuple[int, ...]
) -> bool:
    """Whether a view looks at what was made in the order in which it was made."""
    if shape == made:
        return stride == made_stride
    return _is_row_major(shape, stride) or not _is_row_major(made, made_stride)


def moves_in_rows(op: Op, rank: int) -> bool:
    """Whether an op that moves elements moves them along the innermost dimension alone."""
    dim = op.args.get("dim", op.args.get("dims"))
    dims = dim if isinstance(dim, tuple) else (dim,)
    return all(isinstance(d, int) and d in (-1, rank - 1) for d in dims)


def reduced_dims(op: Op, shape: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether the dimensions that are reduced are the innermost ones, and whether the innermost is among them."""
    rank = len(shape)
    dim = op.args.get("dim")
    found = dim if isinstance(dim, tuple) else (dim,) if isinstance(dim, int) else ()
    dims = {d % rank for d in found if isinstance(d, int)} if rank else set()
    sized = [d for d in range(rank) if shape[d] > 1]
    reduced = [d for d in sized if d in dims] if dims else sized
    return sized[len(sized) - len(reduced) :] == reduced, sized[-1:] == reduced[-1:]


def rows_of(op: Op, shape: tuple[int, ...]) -> tuple[int, bool]:
    """Rows that a normalization works on, and whether they are contiguous."""
    normalized = op.args.get("normalized_shape")
    if isinstance(normalized, tuple):
        width = prod(n for n in normalized if isinstance(n, int))
        return prod(shape) // max(width, 1), True
    groups = op.args.get("num_groups", op.args.get("group"))
    if isinstance(groups, int):
        return shape[0] * groups, True
    if "running_mean" in op.args:  # an instance norm, or a batch norm in training
        return (shape[0] * shape[1], True) if "use_input_stats" in op.args else (shape[1], False)
    dim = op.args.get("dim", 1)
    axis = dim % len(shape) if isinstance(dim, int) and shape else 0
    width = shape[axis] if shape else 1
    return prod(shape) // max(width, 1), all(size == 1 for size in shape[axis + 1 :])


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    steps = [step for size, step in zip(shape, stride, strict=True) if size > 1 and step]
    return steps == sorted(steps, reverse=True)
