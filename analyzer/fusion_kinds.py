"""What kind of loop a compiler makes of an op: the operators by family of formula, with the exceptions by name."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

from .cost import find_formula, operator_name
from .formulas import (
    creation,
    indexing,
    losses,
    movement,
    normalization,
    pointwise,
    pooling,
    reduction,
    resampling,
)
from .graph import Arg, Op


class Kind(Enum):
    """The loops an op becomes."""

    POINTWISE = auto()
    """One value per result element: inlined where it is used."""
    REDUCTION = auto()
    """Inputs combined along dimensions."""
    NORM = auto()
    """Statistics of a row, then a value per element from the row and its statistics."""
    GROUP_NORM = auto()
    """As `NORM`, with scale and shift of every channel computed in between."""
    LOSS = auto()
    """Statistics of a row, then a sum over rows."""
    EXTERN = auto()
    """A kernel of its own: a library's, or one that cannot be merged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trait:
    """How a compiler sees an operator.

    Attributes:
        kind: the loops it becomes.
        instructions: rough length of its code, loads left out.
        neutral: the number that leaves the other operand as it is; such calls are removed.
        uses: times its code asks for its first argument.
        moved: true when a result element comes from another place of the input: shifted, gathered, windowed.
        window: true when an input element is asked for by several result elements.
        by_input: true when its code repeats for every argument.
        varies: true when the kind depends on the arguments of a call.
        passes: times its statistics go over the input where they cannot keep it on chip.
    """

    kind: Kind
    instructions: int = 1
    neutral: int | None = None
    uses: int = 1
    moved: bool = False
    window: bool = False
    by_input: bool = False
    passes: int = 1
    varies: bool = False

    def length(self, op: Op) -> int:
        """Instructions of one call."""
        if self.neutral is not None and op.args.get("other") == self.neutral:
            return 0
        return self.instructions * len(op.inputs) if self.by_input else self.instructions


@functools.lru_cache(maxsize=4096)
def trait(target: str) -> Trait:
    """The trait of a target such as `aten.silu.default`; operators nobody knows are kernels of their own."""
    operator = operator_name(target)
    name = operator.removeprefix("aten.").rstrip("_") if operator.startswith("aten.") else ""
    kind = _kind(target, name)
    family = _family(target)
    return Trait(
        kind=kind,
        instructions=_INSTRUCTIONS.get(name, 1),
        uses=2 if name in _USED_TWICE else 1,
        moved=name in _MOVED or family in (indexing.__name__, pooling.__name__, resampling.__name__),
        window=family in (pooling.__name__, resampling.__name__),
        passes=2 if name in _TWO_PASSES else 1,
        neutral=_NEUTRAL.get(name),
        varies=kind in (Kind.REDUCTION, Kind.NORM) or operator in _ADAPTIVE,
        by_input=name in ("cat", "stack"),
    )


def kind_of(op: Op, what: Trait) -> Kind:
    """The kind of one call: some operators are of one kind or another by their arguments."""
    kind = what.kind
    if not what.varies:
        return kind
    name = operator_name(op.target)
    if kind is Kind.REDUCTION and "other" in op.args:
        return Kind.POINTWISE  # the maximum of two tensors
    if kind is Kind.REDUCTION and op.args.get("reduction", 1) == 0:
        return Kind.POINTWISE  # a loss that is not summed
    if name in _ADAPTIVE and _all_ones(op.args.get("output_size")):
        return Kind.REDUCTION
    if kind is Kind.NORM and name in _BATCH_NORMS and not (op.args.get("training") or op.args.get("use_input_stats")):
        return Kind.POINTWISE
    return kind


def _all_ones(size: Arg) -> bool:
    return size == 1 or (isinstance(size, tuple) and all(s == 1 for s in size))


def _kind(target: str, name: str) -> Kind:
    if name in _EXTERN or target.startswith("fxroof.read_later."):
        return Kind.EXTERN
    kind = _BY_FAMILY.get(_family(target), Kind.EXTERN)
    if kind is Kind.NORM:
        if name in ("group_norm", "native_group_norm"):
            return Kind.GROUP_NORM
        return Kind.REDUCTION if name == "cosine_similarity" else Kind.NORM
    if kind is Kind.REDUCTION and name in ("cross_entropy_loss",):
        return Kind.LOSS
    if kind is Kind.REDUCTION and name in ("diff",):
        return Kind.POINTWISE
    return kind


def _family(target: str) -> str:
    formula = find_formula(target)
    function = formula.func if isinstance(formula, partial) else formula
    return getattr(function, "__module__", "")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BY_FAMILY: Mapping[str, Kind] = {
    pointwise.__name__: Kind.POINTWISE,
    creation.__name__: Kind.POINTWISE,
    movement.__name__: Kind.POINTWISE,
    indexing.__name__: Kind.POINTWISE,
    pooling.__name__: Kind.POINTWISE,
    resampling.__name__: Kind.POINTWISE,
    reduction.__name__: Kind.REDUCTION,
    losses.__name__: Kind.REDUCTION,
    normalization.__name__: Kind.NORM,
}

_NEUTRAL = {"mul": 1, "div": 1, "add": 0, "sub": 0}

_ADAPTIVE = frozenset(
    {
        "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d",
        "aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d",
    }
)  # fmt: skip

_BATCH_NORMS = frozenset(
    {
        "aten.batch_norm", "aten.native_batch_norm", "aten.cudnn_batch_norm", "aten._batch_norm_impl_index",
        "aten._batch_norm_no_update", "aten._native_batch_norm_legit",
        "aten._native_batch_norm_legit_no_training", "aten.instance_norm",
    }
)  # fmt: skip

_EXTERN = _words(
    """
    item _local_scalar_dense _assert_async _functional_assert_async cartesian_prod combinations pad_sequence
    col2im max_unpool2d max_unpool3d embedding_bag _embedding_bag _embedding_bag_forward_only nonzero_static
    masked_scatter randperm weight_norm _weight_norm _weight_norm_interface renorm segment_reduce block_diag
    linalg_matrix_norm linalg_norm _chunk_cat flatten_dense_tensors grid_sampler_3d
    """
)

_MOVED = _words(
    """
    cat concat concatenate stack _stack hstack vstack dstack row_stack column_stack pad constant_pad_nd _pad_circular
    _pad_enum reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    roll flip fliplr flipud rot90 repeat tile repeat_interleave fft_fftshift fft_ifftshift pixel_shuffle
    pixel_unshuffle channel_shuffle native_channel_shuffle im2col diag diagflat diag_embed slice_scatter select_scatter
    diagonal_scatter as_strided_scatter diff glu
    """
)

_USED_TWICE = _words(
    """
    silu gelu mish softplus hardswish elu selu celu layer_norm native_layer_norm rms_norm _fused_rms_norm
    softmax _softmax _safe_softmax log_softmax _log_softmax special_softmax special_log_softmax group_norm
    native_group_norm cross_entropy_loss glu
    """
)

_TWO_PASSES = _words(
    """
    var var_mean std std_mean layer_norm native_layer_norm group_norm native_group_norm instance_norm batch_norm
    softmax _softmax _safe_softmax log_softmax _log_softmax special_softmax special_log_softmax logsumexp
    cross_entropy_loss
    """
)

_INSTRUCTIONS: Mapping[str, int] = {
    "silu": 6, "gelu": 10, "mish": 8, "softplus": 8, "hardswish": 8, "elu": 7,
    "layer_norm": 7, "native_layer_norm": 7, "rms_norm": 6, "_fused_rms_norm": 6, "batch_norm": 9,
    "softmax": 3, "_softmax": 3, "log_softmax": 3, "_log_softmax": 3, "group_norm": 3, "native_group_norm": 3,
    "cat": 4, "stack": 4, "glu": 6, "embedding": 3, "index": 3, "gather": 3, "index_select": 3, "pad": 5,
}  # fmt: skip
