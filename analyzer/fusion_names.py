"""What a kernel is called: recognised from the operators in it, never from the names of modules."""

import functools
from collections.abc import Sequence

from .cost import Cost, operator_name
from .graph import Graph, Op, Role, TensorRef

_SHOWN = 4
"""Operators that a name lists at most."""


def kernel_name(graph: Graph, ops: Sequence[int], cost: Cost) -> str:
    """What the ops of one kernel do together, such as `residual + rms_norm`; else their operators."""
    names = tuple([_word(graph, graph.ops[index]) for index in ops])
    name = _name(names)
    return f"{name} ({cost.backend})" if cost.backend and len(ops) == 1 else name


def _word(graph: Graph, op: Op) -> str:
    """The operator, or what this call of it is."""
    word = _operator(op.target)
    if op.mutates or word == "cat":
        written = (*graph.mutated(op), *op.outputs)
        if any(graph.role(tensor) is Role.KV_CACHE for tensor in written):
            return _CACHE_UPDATE
    if word == "add":
        one, other = op.args.get("self"), op.args.get("other")
        if isinstance(one, TensorRef) and isinstance(other, TensorRef):
            shape = graph.tensors[one.tensor].shape
            return _SUM if len(shape) > 1 and shape == graph.tensors[other.tensor].shape else "add"
    return word


@functools.lru_cache(maxsize=4096)
def _operator(target: str) -> str:
    return operator_name(target).rpartition(".")[2].strip("_") or target


@functools.lru_cache(maxsize=4096)
def _name(words: tuple[str, ...]) -> str:
    if len(words) == 1 and words[0] in _ALONE:
        return _ALONE[words[0]]
    parts = _parts([w for w in words if w not in _CASTS])
    if parts:
        return " + ".join(parts)
    operators = list(dict.fromkeys(w.split()[-1] for w in words if w not in _CASTS)) or list(dict.fromkeys(words))
    shown = ", ".join(operators[:_SHOWN]) + (", ..." if len(operators) > _SHOWN else "")
    if len(words) == 1 and words[0] not in _REDUCTIONS | _POINTWISE:
        return shown
    return f"reduction ({shown})" if _REDUCTIONS.intersection(words) else f"pointwise ({shown})"


def _parts(words: Sequence[str]) -> list[str]:
    """Known pieces of a model in the order in which they end."""
    parts: list[str] = []
    since: list[str] = []  # the operators since the last part

    def found(part: str) -> None:
        if not parts or parts[-1] != part:
            parts.append(part)
        since.clear()

    for word in words:
        since.append(word)
        for part, signature, last in _SIGNATURES:
            if word in last and all(any(w in since for w in group) for group in signature):
                if part in _NORMS and _follows_a_sum(since):
                    found("residual")
                found(part)
                break
    return parts


def _follows_a_sum(words: list[str]) -> bool:
    """Whether a norm begins with the sum of two tensors."""
    start = next((i for i, w in enumerate(words) if w in _BEGINNINGS), 0)
    if words[start] == "mean" and words[start - 1 : start] == ["mul"]:  # of squares
        start -= 1
    return start > 0 and words[start - 1] == _SUM


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SUM = "tensor add"
_CACHE_UPDATE = "cache update"
_NORMS = frozenset({"rms_norm", "layer_norm"})
_BEGINNINGS = frozenset(
    {"rms_norm", "fused_rms_norm", "layer_norm", "native_layer_norm", "pow", "square", "mean", "var", "var_mean"}
)
_CASTS = frozenset({"to", "to_copy", "contiguous", "clone", "type_as", "copy", "expand"})
_ADDS = ("add", _SUM)

# a part, groups of operators of which one each is needed, operators that end it; the first that fits
_SIGNATURES: tuple[tuple[str, tuple[tuple[str, ...], ...], tuple[str, ...]], ...] = (
    (_CACHE_UPDATE, (), (_CACHE_UPDATE,)),
    ("embedding", (), ("embedding",)),
    ("rms_norm", (), ("rms_norm", "fused_rms_norm")),
    ("layer_norm", (), ("layer_norm", "native_layer_norm")),
    ("group_norm", (), ("group_norm", "native_group_norm")),
    ("batch_norm", (), ("batch_norm", "cudnn_batch_norm", "native_batch_norm_legit_no_training")),
    ("softmax", (), ("softmax", "safe_softmax")),
    ("log_softmax", (), ("log_softmax",)),
    ("cross_entropy", (), ("cross_entropy_loss",)),
    ("layer_norm", (("var", "var_mean"),), ("rsqrt", "sqrt")),
    ("layer_norm", (("mean",), ("sub",), ("pow", "square")), ("rsqrt", "sqrt")),
    ("rms_norm", (("pow", "square", "mul"), ("mean",)), ("rsqrt", "sqrt")),
    ("softmax", (("amax", "max"), ("exp",), ("sum",)), ("div",)),
    ("rope", (("neg",), ("cat", "stack"), ("mul",)), _ADDS),
    ("rope", (("mul",), ("sub",), _ADDS), ("stack",)),
    ("swiglu", (("silu",),), ("mul",)),
    ("gelu", (("pow",), ("tanh",)), ("mul",)),
    ("geglu", (("gelu",),), ("mul",)),
    ("glu", (), ("glu",)),
)  # fmt: skip

_ALONE = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "addbmm", "mv", "dot"), "matmul"),
    **dict.fromkeys(("grouped_mm", "scaled_mm", "scaled_grouped_mm"), "matmul"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d"), "convolution"),
    "scaled_dot_product_attention": "attention",
    "flex_attention": "attention",
    "gelu": "gelu",
    "silu": "silu",
    "relu": "relu",
}

_REDUCTIONS = _words(
    """
    sum mean amax amin max min prod var var_mean std std_mean norm linalg_vector_norm logsumexp argmax argmin any all
    cumsum nansum aminmax count_nonzero mse_loss nll_loss_nd l1_loss cosine_similarity adaptive_avg_pool2d cumprod
    """
)

_POINTWISE = (
    _words(
        """
    add sub mul div neg exp log pow sqrt rsqrt sin cos tanh sigmoid where masked_fill clamp clamp_min clamp_max abs
    maximum minimum eq ne lt le gt ge square cat stack index gather index_select arange full zeros ones pad reshape
    """
    )
    | {_SUM}
    | _CASTS
)
