"""Writes a call of scaled dot product attention into a graph that is being changed, with the views that it takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Literal

from ..analyzer.cost import operator_name
from ..analyzer.graph import Arg, Graph, Op, Tensor, TensorRef
from ..analyzer.rewrite import Draft, contiguous, reshaped
from ..analyzer.sdpa import Attention, dense_stride, traced_output_stride
from ._attention import SDPA, Finder, MaskStep, Operand, operand_of

_BATCHED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A call to be written.

    Attributes:
        query: with any number of leading dimensions.
        key: the same.
        value: the same.
        masks: those that stay.
        causal: the `is_causal` argument.
        scale: of the scores.
        dropout: probability.
        gqa: the `enable_gqa` argument.
    """

    query: Operand
    key: Operand
    value: Operand
    masks: tuple[MaskStep, ...] = ()
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    gqa: bool = False

    def attention(self, graph: Graph) -> Attention | None:
        """What decides on the kernel; None where operands or masks cannot be brought to four dimensions."""
        query, key, value = (four(t, grouped=self.grouped(graph)) for t in self._described(graph))
        if query is None or key is None or value is None:
            return None
        batch = query.shape[0]
        key, value = (_with_batch(t, batch) for t in (key, value))
        if query.shape[0] != key.shape[0] or key.shape[:-1] != value.shape[:-1]:
            return None
        scores = (*query.shape[:-1], key.shape[-2])
        shapes = [mask_shape(graph.tensors[mask.tensor].shape, mask.scores, scores) for mask in self.masks]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes):
            return None
        mask = self._mask(graph, known, query.dtype) if known else None
        return Attention(
            query=query, key=key, value=value, mask=mask, causal=self.causal, gqa=self.gqa, dropout=self.dropout
        )

    def grouped(self, graph: Graph) -> bool:
        """True for a query (B, Hkv, group, S, D) that meets keys and values (B, Hkv, 1, T, D)."""
        query, key, value = (t.shape for t in self._described(graph))
        return len(query) == _BATCHED + 1 and key[2] == value[2] == 1 < query[2]

    def _described(self, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        return self.query.described(graph), self.key.described(graph), self.value.described(graph)

    def _mask(self, graph: Graph, shapes: Sequence[tuple[int, ...]], dtype: str) -> Tensor:
        """The one mask that those that stay become."""
        first = self.masks[0]
        given = graph.tensors[first.tensor]
        if len(self.masks) == 1 and (first.passed or first.kind == "keep" or given.dtype == dtype):
            stride = reshaped(given, shapes[0])
            if stride is not None:
                return replace(given, shape=shapes[0], stride=given.stride if given.shape == shapes[0] else stride)
        rank = max(map(len, shapes))
        shape = tuple(max(sizes) for sizes in zip(*((1,) * (rank - len(s)) + s for s in shapes), strict=True))
        additive = any(step.kind == "add" for step in self.masks)
        return Tensor(storage=-1, dtype=dtype if additive else "bool", shape=shape, stride=contiguous(shape))


def fused(finder: Finder, plan: Plan) -> Plan | None:
    """The call without repeated heads, or with them where the kernels want that; None where scores go through memory.

    Heads may be repeated by the product itself, which broadcasts.
    """
    for candidate in _with_heads(finder, plan):
        attention = candidate.attention(finder.graph)
        if attention is not None and finder.backend(attention).name != "math":
            return candidate
    return None


def _with_heads(finder: Finder, plan: Plan) -> Iterator[Plan]:
    graph = finder.graph
    key, value = finder.without_repeats(plan.key), finder.without_repeats(plan.value)
    heads = [o.described(graph).shape[-3] if len(o.order) > 2 else 1 for o in (plan.query, key, value)]
    if heads[1] == heads[2] != heads[0]:
        yield replace(plan, key=key, value=value, gqa=True)
    yield plan


def plan_of(graph: Graph, index: int) -> Plan:
    """A call that is in the program, as a plan."""
    op = graph.ops[index]
    query, key, value = (operand_of(graph, op, name) for name in ("query", "key", "value"))
    mask, scale, dropout = (op.args.get(name) for name in ("attn_mask", "scale", "dropout_p"))
    masks: tuple[MaskStep, ...] = ()
    if isinstance(mask, TensorRef):
        scores = (*query.described(graph).shape[:-1], key.described(graph).shape[-2])
        kind: Literal["add", "keep"] = "keep" if graph.tensors[mask.tensor].dtype == "bool" else "add"
        masks = (MaskStep(kind=kind, tensor=mask.tensor, before=index, scores=scores, passed=True),)
    return Plan(
        query=query,
        key=key,
        value=value,
        masks=masks,
        causal=bool(op.args.get("is_causal")),
        scale=float(scale) if isinstance(scale, int | float) else None,
        dropout=float(dropout) if isinstance(dropout, int | float) else 0.0,
        gqa=bool(op.args.get("enable_gqa")),
    )


def four(tensor: Tensor, *, grouped: bool = False) -> Tensor | None:
    """A tensor (..., L, D) as (B, H, L, D) without a copy; None where its layout does not allow that.

    The last dimension before those is the heads; or the last two are, where heads are grouped.
    """
    rank = len(tensor.shape)
    if rank < _BATCHED:
        missing = _BATCHED - rank
        outer = prod(tensor.shape)
        return replace(tensor, shape=(1,) * missing + tensor.shape, stride=(outer,) * missing + tensor.stride)
    if rank == _BATCHED:
        return tensor
    heads = rank - (_BATCHED if grouped else _BATCHED - 1)
    shape = (prod(tensor.shape[:heads]), prod(tensor.shape[heads:-2]), *tensor.shape[-2:])
    stride = reshaped(tensor, shape)
    return None if stride is None else replace(tensor, shape=shape, stride=stride)


def mask_shape(shape: tuple[int, ...], scores: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a mask for some scores needs for scores (B, H, S, T); None where it would have to grow."""
    shape = (1,) * (2 - len(shape)) + shape
    if len(shape) == 2:
        return shape
    if scores == wanted:
        return (1,) * (_BATCHED - len(shape)) + shape
    leading = shape[:-2]
    if all(size == 1 for size in leading):
        return (1, 1, *shape[-2:])
    if len(scores) <= _BATCHED - 1 and leading == scores[:-2]:
        return (*wanted[:2], *shape[-2:])
    if len(scores) > _BATCHED and leading[-1] in (1, wanted[1]):
        outer = (1,) * (len(scores) - len(shape)) + leading[:-1]
        if prod(outer) == wanted[0] or prod(outer) == 1:
            return (prod(outer), leading[-1], *shape[-2:])
    return None


class Writer:
    """Writes the ops of a plan in the place of one op."""

    def __init__(self, draft: Draft, index: int) -> None:
        self.draft = draft
        self.index = index
        self.like = draft.graph.ops[index]
        self._count = 0

    def op(self, target: str, args: Mapping[str, Arg], made: int, *, before: int | None = None) -> int:
        """Insert an op that returns a tensor."""
        self.draft.insert(self.index if before is None else before, self._new(target, args, made))
        return made

    def attention(self, plan: Plan) -> tuple[Op, int]:
        """The call, to be put where it belongs, and its result (B, H, S, Dv)."""
        query, key, value, mask = self.operands(plan)
        return self.call(
            query, key, value, mask, causal=plan.causal, scale=plan.scale, dropout=plan.dropout, gqa=plan.gqa
        )

    def operands(self, plan: Plan) -> tuple[int, int, int, int | None]:
        """Query, key, value and mask in four dimensions."""
        grouped = plan.grouped(self.draft.graph)
        query, key, value = (self._four(self._ordered(o), grouped) for o in (plan.query, plan.key, plan.value))
        batch = self.draft.tensors[query].shape[0]
        key, value = (self._batched(t, batch) for t in (key, value))
        tensors = self.draft.tensors
        return query, key, value, self._mask(plan, (*tensors[query].shape[:-1], tensors[key].shape[-2]))

    def end(self, old: int, ops: Sequence[Op], made: int) -> None:
        """Put the last ops where the old one was, and have their result used in place of its own."""
        for op in ops[:-1]:
            self.draft.insert(self.index, op)
        self.draft.replace(self.index, ops[-1])
        self.draft.substitute(old, made)

    def call(
        self,
        query: int,
        key: int,
        value: int,
        mask: int | None,
        *,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        gqa: bool = False,
    ) -> tuple[Op, int]:
        """A call on tensors that are as it takes them, and its result."""
        tensors = self.draft.tensors
        attention = Attention(
            query=tensors[query],
            key=tensors[key],
            value=tensors[value],
            mask=None if mask is None else tensors[mask],
            causal=causal,
            gqa=gqa,
            dropout=dropout,
        )
        shape = (*tensors[query].shape[:-1], tensors[value].shape[-1])
        made = self.draft.tensor(shape, tensors[query].dtype, stride=traced_output_stride(attention))
        default = is_default_scale(scale, tensors[query].shape[-1])
        args: dict[str, Arg] = {
            "query": TensorRef(tensor=query),
            "key": TensorRef(tensor=key),
            "value": TensorRef(tensor=value),
            "attn_mask": None if mask is None else TensorRef(tensor=mask),
            "dropout_p": dropout,
            "is_causal": causal,
            "scale": None if default else scale,
            "enable_gqa": gqa,
        }
        return self._new(f"{SDPA}.default", args, made), made

    def reshape(self, tensor: int, shape: tuple[int, ...]) -> int:
        """A tensor in another shape: a view where its layout allows."""
        made, op = self.reshaped(tensor, shape)
        if op is not None:
            self.draft.insert(self.index, op)
        return made

    def reshaped(self, tensor: int, shape: tuple[int, ...]) -> tuple[int, Op | None]:
        """The same with the op that does it, not yet put anywhere; none where the shape is right."""
        given = self.draft.tensors[tensor]
        if given.shape == shape:
            return tensor, None
        stride = reshaped(given, shape)
        made = self.draft.tensor(shape, given.dtype) if stride is None else self.draft.view(tensor, shape, stride)
        return made, self._new("aten.reshape.default", {"self": TensorRef(tensor=tensor), "shape": shape}, made)

    def permuted(self, tensor: int, order: tuple[int, ...]) -> tuple[int, Op]:
        """A view with its dimensions in another order, and the op, not yet put anywhere."""
        given = self.draft.tensors[tensor]
        shape, stride = (tuple(v[d] for d in order) for v in (given.shape, given.stride))
        made = self.draft.view(tensor, shape, stride)
        return made, self._new("aten.permute.default", {"self": TensorRef(tensor=tensor), "dims": order}, made)

    def cast(self, tensor: int, dtype: str, *, before: int | None = None) -> int:
        """A tensor in another type."""
        made, op = self.cast_back(tensor, dtype)
        if op is not None:
            self.draft.insert(self.index if before is None else before, op)
        return made

    def cast_back(self, tensor: int, dtype: str) -> tuple[int, Op | None]:
        """The same with the op that does it, not yet put anywhere; none where the type is right."""
        given = self.draft.tensors[tensor]
        if given.dtype == dtype:
            return tensor, None
        made = self.draft.tensor(given.shape, dtype, stride=dense_stride(given.shape, given.stride))
        args: dict[str, Arg] = {
            "self": TensorRef(tensor=tensor),
            "dtype": dtype,
            "non_blocking": False,
            "copy": False,
            "memory_format": None,
        }
        return made, self._new("aten.to.dtype", args, made)

    def contiguous(self, tensor: int) -> int:
        """A tensor whose last dimension is innermost."""
        given = self.draft.tensors[tensor]
        if given.stride == contiguous(given.shape):
            return tensor
        args: dict[str, Arg] = {"self": TensorRef(tensor=tensor), "memory_format": 0}
        return self.op("aten.contiguous.default", args, self.draft.tensor(given.shape, given.dtype))

    def padded(self, tensor: int, width: int) -> int:
        """A tensor with zeros behind its last dimension."""
        given = self.draft.tensors[tensor]
        missing = width - given.shape[-1]
        if not missing:
            return tensor
        args: dict[str, Arg] = {
            "self": TensorRef(tensor=tensor),
            "pad": (0, missing),
            "mode": "constant",
            "value": None,
        }
        return self.op("aten.pad.default", args, self.draft.tensor((*given.shape[:-1], width), given.dtype))

    def cut(self, tensor: int, width: int) -> tuple[int, Op | None]:
        """The front of a tensor's last dimension, and the op, not yet put anywhere; none where nothing is cut."""
        given = self.draft.tensors[tensor]
        if given.shape[-1] == width:
            return tensor, None
        made = self.draft.view(tensor, (*given.shape[:-1], width), given.stride)
        args: dict[str, Arg] = {"self": TensorRef(tensor=tensor), "dim": -1, "start": 0, "end": width, "step": 1}
        return made, self._new("aten.slice.Tensor", args, made)

    def repeated(self, tensor: int, times: int) -> int:
        """A tensor (B, H, L, D) with its heads repeated."""
        given = self.draft.tensors[tensor]
        shape = (given.shape[0], given.shape[1] * times, *given.shape[2:])
        args: dict[str, Arg] = {"self": TensorRef(tensor=tensor), "repeats": times, "dim": 1, "output_size": None}
        return self.op("aten.repeat_interleave.self_int", args, self.draft.tensor(shape, given.dtype))

    def _new(self, target: str, args: Mapping[str, Arg], made: int) -> Op:
        self._count += 1
        name = f"{self.like.name}_{operator_name(target).removeprefix('aten.')}_{self._count}"
        return replace(self.like, name=name, target=target, args=dict(args), outputs=(made,), mutates=())

    def _maker(self, tensor: int) -> int | None:
        ops = self.draft.graph.ops
        return next((i for i in range(self.index - 1, -1, -1) if tensor in ops[i].outputs), None)

    def _ordered(self, operand: Operand) -> int:
        if operand.order == tuple(range(len(operand.order))):
            return operand.tensor
        made, op = self.permuted(operand.tensor, operand.order)
        self.draft.insert(self.index, op)
        return made

    def _four(self, tensor: int, grouped: bool) -> int:
        found = four(self.draft.tensors[tensor], grouped=grouped)
        return tensor if found is None else self.reshape(tensor, found.shape)

    def _batched(self, tensor: int, batch: int) -> int:
        wide = _with_batch(self.draft.tensors[tensor], batch)
        if wide.shape == self.draft.tensors[tensor].shape:
            return tensor
        made = self.draft.view(tensor, wide.shape, wide.stride)
        args: dict[str, Arg] = {"self": TensorRef(tensor=tensor), "size": wide.shape, "implicit": False}
        return self.op("aten.expand.default", args, made)

    def _mask(self, plan: Plan, scores: tuple[int, ...]) -> int | None:
        """One mask of all that stay; what several layers need is made once."""
        dtype = self.draft.graph.tensors[plan.query.tensor].dtype
        found: tuple[int, bool] | None = None
        for step in plan.masks:
            made = self._prepared(step, dtype)
            found = made if found is None else self._combined(found, made)
        if found is None:
            return None
        shapes = [mask_shape(self.draft.graph.tensors[m.tensor].shape, m.scores, scores) for m in plan.masks]
        if len(shapes) == 1 and shapes[0] is not None:
            return self.reshape(found[0], shapes[0])
        made_shape = mask_shape(self.draft.tensors[found[0]].shape, plan.masks[-1].scores, scores)
        return found[0] if made_shape is None else self.reshape(found[0], made_shape)

    def _prepared(self, step: MaskStep, dtype: str) -> tuple[int, bool]:
        """A mask as the call takes it, and whether it is boolean: true for what is kept."""
        given = self.draft.graph.tensors[step.tensor]
        if step.kind == "add":
            same = step.passed or given.dtype == dtype
            return (step.tensor if same else self._shared(step.tensor, "aten.to.dtype", dtype)), False
        if step.kind == "keep":
            return step.tensor, True
        maker = self._maker(step.tensor)
        op = self.draft.graph.ops[maker] if maker is not None else None
        value = op.args.get("self") if op is not None else None
        if op is not None and isinstance(value, TensorRef):
            operator = operator_name(op.target)
            boolean = self.draft.graph.tensors[value.tensor].dtype == "bool"
            if boolean and operator in ("aten.logical_not", "aten.bitwise_not"):
                return value.tensor, True
            if operator == "aten.eq" and op.args.get("other") == 0:
                return self._shared(value.tensor, "aten.ne.Scalar", "bool"), True
        return self._shared(step.tensor, "aten.logical_not.default", "bool"), True

    def _combined(self, one: tuple[int, bool], other: tuple[int, bool]) -> tuple[int, bool]:
        shapes = [self.draft.tensors[t].shape for t, _ in (one, other)]
        rank = max(map(len, shapes))
        shape = tuple(map(max, zip(*((1,) * (rank - len(s)) + s for s in shapes), strict=True)))
        first, second = one[0], other[0]
        if one[1] and other[1]:
            made = self.draft.tensor(shape, "bool")
            args: dict[str, Arg] = {"self": TensorRef(tensor=first), "other": TensorRef(tensor=second)}
            return self.op("aten.logical_and.default", args, made), True
        if not one[1] and not other[1]:
            made = self.draft.tensor(shape, self.draft.tensors[first].dtype)
            args = {"self": TensorRef(tensor=first), "other": TensorRef(tensor=second), "alpha": 1}
            return self.op("aten.add.Tensor", args, made), False
        kept, added = (first, second) if one[1] else (second, first)
        made = self.draft.tensor(shape, self.draft.tensors[added].dtype)
        args = {"condition": TensorRef(tensor=kept), "self": TensorRef(tensor=added), "other": "-inf"}
        return self.op("aten.where.ScalarOther", args, made), False

    def _shared(self, tensor: int, target: str, dtype: str) -> int:
        key = (target, tensor, dtype)
        if key not in self.draft.shared:
            given = self.draft.tensors[tensor]
            maker = self._maker(tensor)
            before = 0 if maker is None else maker + 1
            if target == "aten.to.dtype":
                made = self.cast(tensor, dtype, before=before)
            else:
                args: dict[str, Arg] = {"self": TensorRef(tensor=tensor)}
                if target == "aten.ne.Scalar":
                    args["other"] = 0
                made = self.op(target, args, self.draft.tensor(given.shape, dtype), before=before)
            self.draft.shared[key] = made
        return self.draft.shared[key]


def is_default_scale(scale: float | None, head_dim: int) -> bool:
    """Whether a call scales its scores so where it is not told how."""
    return scale is None or abs(scale * sqrt(head_dim) - 1) < _SAME_SCALE


_SAME_SCALE = 1e-3


def _with_batch(tensor: Tensor, batch: int) -> Tensor:
    if tensor.shape[0] == batch or tensor.shape[0] != 1:
        return tensor
    return replace(tensor, shape=(batch, *tensor.shape[1:]), stride=(0, *tensor.stride[1:]))
