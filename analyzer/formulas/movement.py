"""Data movement without arithmetic.

These are asked only when they really move data: a `reshape`, `contiguous` or `to` whose result shares its
input's storage is a view and free. A copy reads the bytes that its source really occupies (an expanded source
is small) and writes its whole result; casting is no FLOP. Where the result is smaller than the source only
that much is read.
"""

from math import prod

from ..cost import Call, Cost, formula, operator_name
from ..graph import Tensor
from .arithmetic import item_bytes, reach, vector
from .parts import Kernels


@formula(
    "aten.clone",
    "aten.contiguous",
    "aten.to",
    "aten._to_copy",
    "aten._autocast_to_full_precision",
    "aten._autocast_to_reduced_precision",
    "aten._cast_Byte",
    "aten._cast_Char",
    "aten._cast_Double",
    "aten._cast_Float",
    "aten._cast_Half",
    "aten._cast_Int",
    "aten._cast_Long",
    "aten._cast_Short",
    "aten.chalf",
    "aten.type_as",
    "aten.lift_fresh_copy",
    "aten.reshape",
    "aten.reshape_as",
    "aten._reshape_copy",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.ravel",
    "aten.resolve_conj",
    "aten.resolve_neg",
    "aten.repeat",
    "aten.tile",
    "aten.repeat_interleave",
    "aten.roll",
    "aten.flip",
    "aten.fliplr",
    "aten.flipud",
    "aten.rot90",
    "aten.fft_fftshift",
    "aten.fft_ifftshift",
    "aten.pixel_shuffle",
    "aten.pixel_unshuffle",
    "aten.channel_shuffle",
    "aten.native_channel_shuffle",
    "aten.im2col",
    "aten.reflection_pad1d",
    "aten.reflection_pad2d",
    "aten.reflection_pad3d",
    "aten.replication_pad1d",
    "aten.replication_pad2d",
    "aten.replication_pad3d",
    "aten.max_unpool2d",
    "aten.max_unpool3d",
    "aten.alias_copy",
    "aten.as_strided_copy",
    "aten.detach_copy",
    "aten.diagonal_copy",
    "aten.expand_copy",
    "aten.narrow_copy",
    "aten.permute_copy",
    "aten.select_copy",
    "aten.slice_copy",
    "aten.split_copy",
    "aten.split_with_sizes_copy",
    "aten.squeeze_copy",
    "aten.t_copy",
    "aten.transpose_copy",
    "aten.unbind_copy",
    "aten.unfold_copy",
    "aten.unsqueeze_copy",
    "aten.view_as_complex_copy",
    "aten.view_as_real_copy",
    "aten.view_copy",
    "aten._conj_copy",
    "aten._neg_view_copy",
)
def copy_of_one(call: Call) -> Cost:
    """Elements of `self` in another place; a second tensor that only gives a shape or a dtype is not read."""
    made = sum(t.numel for t in call.outputs)
    reads = {"other": 0} if "other" in call.op.args else {}
    name = next((n for n in ("self", "input") if call.optional(n)), None)
    if name is not None:
        reads[name] = reach(call, call.tensor(name), made)
    return call.cost(reads=reads)


@formula("aten.pad", "aten.constant_pad_nd", "aten._pad_circular", "aten._pad_enum")
def pad(call: Call) -> Cost:
    """Round a constant, the result is filled whole and the input copied into it (PadNd.cpp); one copy where it is cut.

    In circles the input is copied in, then a strip for every side. Other modes are one kernel.
    """
    source, sides = call.tensor("self"), call.integers("pad")
    circular = call.op.target.startswith("aten._pad_circular") or call.arg("mode") == "circular"
    constant = call.op.target.startswith("aten.constant") or call.arg("mode") == "constant"
    if call.op.mutates or not (circular or constant) or (constant and max(sides, default=0) <= 0):
        return copy_of_one(call)
    run = Kernels(call)
    if constant:
        run.kernel("fill_", (), run.result())
    kept = _kept(source, sides)
    run.kernel("copy_", (run.argument("self", prod(kept)),), run.result(prod(kept)))
    if circular:
        _copy_strips(run, call.output, sides)
    return run.cost()


@formula("aten.diag", "aten.diagflat", "aten.diag_embed")
def diagonal(call: Call) -> Cost:
    """Zeros, then a copy into the diagonal (TensorShape.cpp); `diag` of a matrix is one copy out of it."""
    source = call.tensor("self")
    if call.op.mutates or (operator_name(call.op.target) == "aten.diag" and len(source.shape) > 1):
        return copy_of_one(call)
    run = Kernels(call)
    run.kernel("zeros", (), run.result())
    run.kernel("copy_", run.given("self"), run.result(source.numel))
    return run.cost()


@formula("aten.block_diag")
def block_diagonal(call: Call) -> Cost:
    """Zeros, then a copy of every block."""
    run = Kernels(call)
    run.kernel("zeros", (), run.result())
    for block, source in zip(call.tensors("tensors"), run.others(), strict=True):
        run.kernel("copy_", (source,), run.result(block.numel))
    return run.cost()


@formula("aten.tril", "aten.triu")
def triangle(call: Call) -> Cost:
    """The triangle that is kept is read, the whole result written."""
    source, diagonal = call.tensor("self"), call.integer("diagonal", 0)
    rows, columns = source.shape[-2:]
    lower = call.op.target.startswith("aten.tril")
    below = sum(min(max(r + diagonal + lower, 0), columns) for r in range(rows))
    kept = below if lower else rows * columns - below
    matrices = source.numel // max(rows * columns, 1)
    return call.cost(reads={"self": reach(call, source, matrices * kept)})


@formula(
    "aten.cat",
    "aten.concat",
    "aten.concatenate",
    "aten.stack",
    "aten._stack",
    "aten.hstack",
    "aten.vstack",
    "aten.dstack",
    "aten.row_stack",
    "aten.column_stack",
    "aten.cartesian_prod",
    "aten.combinations",
    "aten.pad_sequence",
    "aten._chunk_cat",
    "aten.flatten_dense_tensors",
)
def concatenation(call: Call) -> Cost:
    """Every input is read and the whole result written."""
    return call.cost()


@formula("aten.copy")
def copy(call: Call) -> Cost:
    """`self.copy_(src)`: the source is read and the target written, not read."""
    return call.cost(reads={"self": 0})


@formula("aten.slice_scatter", "aten.select_scatter", "aten.diagonal_scatter", "aten.as_strided_scatter")
def scatter_view(call: Call) -> Cost:
    """A copy of `self` with one view overwritten: the whole is copied, then the view is written again."""
    if call.op.mutates:
        return call.cost(writes=reach(call, call.output) + call.tensor("src").numel * item_bytes(call.output))
    run = Kernels(call)
    run.kernel("clone", run.given("self"), run.result())
    run.kernel("copy_", run.given("src"), run.result(call.tensor("src").numel))
    return run.cost()


@formula("aten.fill_diagonal")
def fill_diagonal(call: Call) -> Cost:
    """The diagonal is written and nothing is read."""
    target = call.tensor("self")
    return call.cost(reads={"self": 0}, writes=min(target.shape) * item_bytes(target))


@formula("aten.col2im")
def col2im(call: Call) -> Cost:
    """Every column element is added to the position it came from."""
    source = call.tensor("self")
    return call.cost(vector=vector(source.dtype, source.numel))


@formula("aten.item", "aten._local_scalar_dense")
def read_back(call: Call) -> Cost:
    """One element is read and handed to the host."""
    return call.cost(waits=True)


@formula("aten._assert_async", "aten._functional_assert_async", "fxroof.read_later")
def one_element(call: Call) -> Cost:
    """One element is read."""
    return call.cost()


def _kept(source: Tensor, sides: tuple[int, ...]) -> list[int]:
    """The shape of what negative padding leaves of a tensor; sides are given from the last dimension on."""
    shape = list(source.shape)
    for order in range(len(sides) // 2):
        shape[-1 - order] += min(sides[2 * order], 0) + min(sides[2 * order + 1], 0)
    return shape


def _copy_strips(run: Kernels, out: Tensor, sides: tuple[int, ...]) -> None:
    for order, width in enumerate(sides):
        if width > 0:
            strip = run.result(out.numel // max(out.shape[-1 - order // 2], 1) * width)
            run.kernel("copy_", (strip,), strip)
