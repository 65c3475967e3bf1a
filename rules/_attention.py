"""Recognises attention spelt out in matrix products and a softmax, and the heads that were repeated for it.

Shapes: query (B, Hq, S, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), scores (B, Hq, S, T), output (B, Hq, S, Dv).
Everything is followed through views, casts and what leaves a tensor as it is; names of modules play no part.
"""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

from ..analyzer.cost import operator_name
from ..analyzer.finding import Situation
from ..analyzer.graph import Arg, Graph, Op, Role, Tensor, TensorRef, tensor_of, tensors_of
from ..analyzer.rewrite import order_of
from ..analyzer.sdpa import Attention, Backend, choose_backend
from ._masks import (
    HIDDEN,
    Makers,
    Reader,
    Shape,
    UnknownError,
    both,
    shape_of,
    visible_where,
    visible_where_zero,
)

SDPA = "aten.scaled_dot_product_attention"
FUSED = ("cudnn", "flash")
"""Backends that need no scores in memory and skip what a causal mask hides."""

_SOFTMAX = ("aten.softmax", "aten._softmax", "aten.special_softmax", "aten._safe_softmax")
_VIEWS = (
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten.unsqueeze",
    "aten.squeeze",
)
_COPIES = ("aten.contiguous", "aten.clone")
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.half", "aten.bfloat16")
_BATCHED = 4
_MATRIX = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """Query, key or value: a tensor of the program whose dimensions in some order are (..., length, head_dim).

    Attributes:
        tensor: index.
        order: for each dimension wanted, the tensor's dimension.
        scale: what it is multiplied with on the way into the product.
        ops: those on the way that attention takes over.
    """

    tensor: int
    order: tuple[int, ...]
    scale: float = 1.0
    ops: tuple[int, ...] = ()

    def described(self, graph: Graph) -> Tensor:
        """The tensor with its dimensions in the order wanted."""
        tensor = graph.tensors[self.tensor]
        return replace(
            tensor,
            shape=tuple(tensor.shape[d] for d in self.order),
            stride=tuple(tensor.stride[d] for d in self.order),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskStep:
    """Something that hides scores or adds to them.

    Attributes:
        kind: an additive mask, or a boolean one that says what to hide or what to keep.
        tensor: the mask.
        before: the op that takes it.
        scores: shape of the scores there.
        passed: true for the mask of a call, which is passed on as it is.
    """

    kind: Literal["add", "hide", "keep"]
    tensor: int
    before: int
    scores: tuple[int, ...]
    passed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Naive:
    """One attention spelt out.

    Attributes:
        query: (..., S, D).
        key: (..., T, D).
        value: (..., T, Dv).
        scale: of the scores.
        masks: in the order they come.
        dropout: probability.
        scores: what query x key returns.
        probabilities: what softmax returns.
        product: index of query x key.
        softmax: index.
        last: index of probabilities x value.
        ops: everything between, first to last.
        order: for each dimension of the result, that of (..., S, Dv).
        touched_bytes: bytes of all tensors of the size of the scores that go through memory.
    """

    query: Operand
    key: Operand
    value: Operand
    scale: float
    masks: tuple[MaskStep, ...]
    dropout: float
    scores: int
    probabilities: int
    product: int
    softmax: int
    last: int
    ops: tuple[int, ...]
    order: tuple[int, ...]
    touched_bytes: int


class _NoMatchError(Exception):
    """This is no attention that a fused kernel could do."""


@dataclass(frozen=True, slots=True)
class _Before:
    """What lies between query x key and softmax."""

    product: int
    scores: int
    scale: float
    masks: tuple[MaskStep, ...]
    ops: tuple[int, ...]


class Finder:
    """Finds attention in one phase."""

    def __init__(self, situation: Situation) -> None:
        self.situation = situation
        self.graph = situation.graph
        self.flow = situation.flow
        self.makers = Makers(situation.graph, situation.flow)
        self._readers: dict[tuple[int, int], Reader] = {}

    def naive(self) -> Iterator[Naive]:
        """Every attention that is spelt out, in the order of the program."""
        for index, op in enumerate(self.graph.ops):
            if operator_name(op.target) in _SOFTMAX:
                try:
                    yield self._around(index, op)
                except (_NoMatchError, UnknownError):
                    continue

    def calls(self) -> Iterator[tuple[int, Op]]:
        """Every call of scaled dot product attention."""
        return ((i, op) for i, op in enumerate(self.graph.ops) if operator_name(op.target) == SDPA)

    def reader(self, queries: int, keys: int) -> Reader:
        """Values over scores of a size."""
        return self._readers.setdefault((queries, keys), Reader(self.makers, queries, keys))

    def shape_of_masks(self, masks: Sequence[MaskStep], queries: int, keys: int) -> Shape:
        """What masks hide together."""
        reader = self.reader(queries, keys)
        visible = [(1 - queries, keys - 1, True)]
        try:
            for mask in masks:
                pieces = reader.over_scores(mask.tensor, mask.before)
                found = visible_where_zero(pieces) if mask.kind == "add" else visible_where(pieces, mask.kind == "keep")
                visible = both(visible, found)
        except UnknownError:
            return Shape.UNKNOWN
        return shape_of(visible, queries, keys)

    def backend(self, attention: Attention) -> Backend:
        """The kernel that the GPU of the situation picks."""
        return choose_backend(attention, self.situation.gpu)

    def _around(self, index: int, op: Op) -> Naive:
        graph = self.graph
        given = _tensor(op, "self")
        shape = graph.tensors[given].shape
        dim = op.args.get("dim")
        if len(shape) < _MATRIX or not isinstance(dim, int) or dim % len(shape) != len(shape) - 1:
            raise _NoMatchError
        before = self._backward(given, index)
        last, dropout, chain = self._forward(op.outputs[0], index)
        probabilities = chain[-1][1] if chain else op.outputs[0]
        query, key = self._factors(before.product, before.scores)
        value, order = self._right_factor(last, probabilities)
        inside = (*before.ops, index, *(i for i, _ in chain), last)
        self._check_users(inside)
        product = self.graph.ops[before.product]
        scale = before.scale * _alpha(product)
        dtype = graph.tensors[value.tensor].dtype
        query, key = (self._without_casts(o, dtype) for o in (query, key))
        query, key, value = self._unfolded(query, key, value)
        found = {graph.tensors[o.tensor].dtype for o in (query, key, value)}
        if len(found) != 1 or self._is_weight(key) or self._is_weight(value):
            raise _NoMatchError
        sized = {t for i in inside[:-1] for t in graph.ops[i].outputs}
        return Naive(
            query=query,
            key=key,
            value=value,
            scale=scale * query.scale * key.scale,
            masks=before.masks,
            dropout=dropout,
            scores=before.scores,
            probabilities=op.outputs[0],
            product=before.product,
            softmax=index,
            last=last,
            ops=tuple(dict.fromkeys((*inside, *query.ops, *key.ops, *value.ops))),
            order=order,
            touched_bytes=sum(graph.tensors[t].nbytes for t in sized),
        )

    # what comes before softmax

    def _backward(self, tensor: int, before: int) -> _Before:
        writer = self.makers.writer(tensor, before)
        if writer is None:
            raise _NoMatchError
        op = self.graph.ops[writer]
        operator = operator_name(op.target)
        plain = operator.removesuffix("_") if op.mutates else operator
        shape = self.graph.tensors[tensor].shape
        if op.mutates and _tensor(op, op.mutates[0]) != tensor:
            raise _NoMatchError
        if plain in ("aten.matmul", "aten.bmm", "aten.einsum", "aten.mm"):
            return _Before(writer, tensor, 1.0, (), (writer,))
        if plain == "aten.baddbmm":
            masks = self._of_baddbmm(op, writer, shape)
            return _Before(writer, tensor, 1.0, masks, (writer,))
        if plain in ("aten.mul", "aten.div"):
            return self._scaled(op, plain, writer)
        if plain in ("aten.add", "aten.sub"):
            return self._added(op, plain, writer, shape)
        if plain in ("aten.masked_fill", "aten.where"):
            return self._hidden(op, plain, writer, shape)
        if plain in _CASTS or plain in _COPIES or _is_idle(op):
            return _extended(self._backward(_first(op), writer), writer)
        if plain in ("aten.max", "aten.maximum", "aten.clamp", "aten.clamp_min") and self._is_no_limit(op, writer):
            return _extended(self._backward(_tensor(op, "self"), writer), writer)
        source = self.graph.tensors[_first(op)].shape if op.inputs else ()
        if plain in _VIEWS and source[-_MATRIX:] == shape[-_MATRIX:]:
            return _extended(self._backward(_first(op), writer), writer)
        raise _NoMatchError

    def _is_no_limit(self, op: Op, index: int) -> bool:
        """True where only what is hidden would be below a limit."""
        return op.args.get("max") is None and self._is_low(op.args.get("other", op.args.get("min")), index)

    def _of_baddbmm(self, op: Op, index: int, shape: tuple[int, ...]) -> tuple[MaskStep, ...]:
        beta = op.args.get("beta", 1)
        if beta == 0:
            return ()
        if beta != 1:
            raise _NoMatchError
        mask = MaskStep(kind="add", tensor=_tensor(op, "self"), before=index, scores=shape)
        if all(size == 1 for size in self.graph.tensors[mask.tensor].shape):
            raise _NoMatchError
        return (mask,)

    def _scaled(self, op: Op, operator: str, index: int) -> _Before:
        factor = self._number_of(op.args.get("other"), index)
        if operator == "aten.div":
            if factor == 0 or op.args.get("rounding_mode") is not None:
                raise _NoMatchError
            factor = 1 / factor
        found = self._backward(_tensor(op, "self"), index)
        if factor <= 0 or any(self._is_bias(mask) for mask in found.masks):
            raise _NoMatchError
        return _Before(found.product, found.scores, found.scale * factor, found.masks, (*found.ops, index))

    def _is_bias(self, mask: MaskStep) -> bool:
        if mask.kind != "add":
            return False
        queries, keys = mask.scores[-_MATRIX:]
        return self.shape_of_masks((mask,), queries, keys) is Shape.UNKNOWN

    def _added(self, op: Op, operator: str, index: int, shape: tuple[int, ...]) -> _Before:
        if op.args.get("alpha", 1) != 1 or not isinstance(op.args.get("other"), TensorRef):
            if op.args.get("other") == 0:
                return _extended(self._backward(_tensor(op, "self"), index), index)
            raise _NoMatchError
        names = ("self", "other") if operator == "aten.add" else ("self",)
        for name in names:
            tensor = _tensor(op, name)
            if self.graph.tensors[tensor].shape != shape:
                continue
            try:
                found = self._backward(tensor, index)
            except (_NoMatchError, UnknownError):
                continue
            other = _tensor(op, "other" if name == "self" else "self")
            if operator == "aten.sub":
                raise _NoMatchError
            mask = MaskStep(kind="add", tensor=other, before=index, scores=shape)
            return _Before(found.product, found.scores, found.scale, (*found.masks, mask), (*found.ops, index))
        raise _NoMatchError

    def _hidden(self, op: Op, operator: str, index: int, shape: tuple[int, ...]) -> _Before:
        if operator == "aten.masked_fill":
            kind: Literal["hide", "keep"] = "hide"
            scores, filler, mask = op.args.get("self"), op.args.get("value"), _tensor(op, "mask")
        else:
            kind, mask = "keep", _tensor(op, "condition")
            scores, filler = op.args.get("self"), op.args.get("other")
            if not self._is_low(filler, index):
                kind, scores, filler = "hide", filler, scores
        if not isinstance(scores, TensorRef) or not self._is_low(filler, index):
            raise _NoMatchError
        found = self._backward(scores.tensor, index)
        step = MaskStep(kind=kind, tensor=mask, before=index, scores=shape)
        return _Before(found.product, found.scores, found.scale, (*found.masks, step), (*found.ops, index))

    def _is_low(self, value: Arg, index: int) -> bool:
        try:
            return self._number_of(value, index) <= HIDDEN
        except (_NoMatchError, UnknownError):
            return False

    def _number_of(self, value: Arg, index: int) -> float:
        if isinstance(value, TensorRef):
            return self.reader(1, 1).number(value.tensor, index)
        if isinstance(value, bool | int | float):
            return float(value)
        if value == "-inf":
            return -math.inf
        raise _NoMatchError

    # what comes after softmax

    def _forward(self, tensor: int, after: int) -> tuple[int, float, list[tuple[int, int]]]:
        """The product with the value, the dropout, and the ops between with what they return."""
        chain: list[tuple[int, int]] = []
        dropout = 0.0
        while True:
            users = [i for i in self.flow.users(tensor) if i > after]
            idle = [i for i in users if self._leads_nowhere(i, {tensor})]
            chain += [(i, tensor) for i in idle]
            users = [i for i in users if i not in idle]
            if len(users) != 1:
                raise _NoMatchError
            index = users[0]
            op = self.graph.ops[index]
            operator = operator_name(op.target)
            if operator in ("aten.matmul", "aten.bmm", "aten.einsum", "aten.mm"):
                return index, dropout, chain
            if op.mutates or len(op.outputs) != 1 or _first(op) != tensor:
                raise _NoMatchError
            made = op.outputs[0]
            if operator == "aten.dropout":
                dropout = self._number_of(op.args.get("p"), index)
            elif operator in _VIEWS:
                if self.graph.tensors[made].shape[-_MATRIX:] != self.graph.tensors[tensor].shape[-_MATRIX:]:
                    raise _NoMatchError
            elif operator not in _CASTS and operator not in _COPIES:
                raise _NoMatchError
            chain.append((index, made))
            tensor, after = made, index

    def _check_users(self, inside: Sequence[int]) -> None:
        """Nobody else may look at scores or probabilities."""
        known, made = set(inside), {tensor for index in inside[:-1] for tensor in self.graph.ops[index].outputs}
        users = {i for tensor in made for i in self.flow.users(tensor)} - known
        if not made.isdisjoint(self.flow.results) or not all(self._leads_nowhere(i, made) for i in users):
            raise _NoMatchError

    def _leads_nowhere(self, index: int, tensors: Set[int]) -> bool:
        """True for an op that returns one of some tensors, and for a view that nobody uses but to get back to them."""
        op = self.graph.ops[index]
        if op.mutates:
            return False
        if tensors >= set(op.outputs):  # an assertion returns nothing
            return True
        if not self.graph.is_view(op) or not self.flow.results.isdisjoint(op.outputs):
            return False
        users = {i for made in op.outputs for i in self.flow.users(made)}
        return all(tensors >= set(self.graph.ops[i].outputs) for i in users)

    # the factors

    def _factors(self, product: int, scores: int) -> tuple[Operand, Operand]:
        op = self.graph.ops[product]
        operator = operator_name(op.target)
        if operator == "aten.einsum":
            return self._factors_of_einsum(op, product)
        names = {"aten.baddbmm": ("batch1", "batch2"), "aten.matmul": ("self", "other")}
        one, other = names.get(operator, ("self", "mat2"))
        query, key = _tensor(op, one), _tensor(op, other)
        ranks = [len(self.graph.tensors[t].shape) for t in (query, key)]
        if ranks[0] != ranks[1] or ranks[0] < _MATRIX or ranks[0] != len(self.graph.tensors[scores].shape):
            raise _NoMatchError
        straight = tuple(range(ranks[0]))
        turned = (*straight[:-_MATRIX], ranks[0] - 1, ranks[0] - 2)
        return self._operand(query, straight, product), self._operand(key, turned, product)

    def _factors_of_einsum(self, op: Op, index: int) -> tuple[Operand, Operand]:
        one, other, result, tensors = self._letters(op)
        if len(result) < _MATRIX or one[1] & other[1]:
            raise _NoMatchError
        queries, keys = result[-2], result[-1]
        if queries in one[0] and keys in other[0]:
            first, second = 0, 1
        elif queries in other[0] and keys in one[0]:
            first, second = 1, 0
        else:
            raise _NoMatchError
        letters = (one[0], other[0])
        batch = result[:-2]
        inner = set(letters[0]) & set(letters[1]) - set(result)
        wanted = [(*batch, letter, *inner) for letter in (queries, keys)]
        if len(inner) != 1 or any(set(w) != set(letters[i]) for w, i in zip(wanted, (first, second), strict=True)):
            raise _NoMatchError
        query, key = (
            self._operand(tensors[i], tuple(letters[i].index(x) for x in w), index)
            for w, i in zip(wanted, (first, second), strict=True)
        )
        return query, key

    def _letters(self, op: Op) -> tuple[tuple[str, set[str]], tuple[str, set[str]], str, tuple[int, int]]:
        """Letters of both operands and of the result, `...` spelt out; letters that an operand has twice."""
        equation, tensors = op.args.get("equation"), tuple(tensors_of(op.args.get("tensors")))
        if not isinstance(equation, str) or len(tensors) != _MATRIX or "->" not in equation:
            raise _NoMatchError
        left, result = equation.replace(" ", "").split("->")
        parts = left.split(",")
        ranks = [len(self.graph.tensors[t].shape) for t in tensors]
        rests = {rank - len(p) + 3 for rank, p in zip(ranks, parts, strict=True) if "..." in p}
        rest = "0123456789"[: rests.pop()] if len(rests) == 1 else ""
        one, other, result = (p.replace("...", rest) for p in (*parts, result))
        doubled = [{x for x in p if p.count(x) > 1} for p in (one, other)]
        if doubled[0] or doubled[1] or [len(one), len(other)] != ranks:
            raise _NoMatchError
        return (one, doubled[0]), (other, doubled[1]), result, (tensors[0], tensors[1])

    def _right_factor(self, last: int, probabilities: int) -> tuple[Operand, tuple[int, ...]]:
        """The value, and for each dimension of the result that of (..., S, Dv)."""
        op = self.graph.ops[last]
        rank = len(self.graph.tensors[probabilities].shape)
        if operator_name(op.target) == "aten.einsum":
            return self._value_of_einsum(op, last, probabilities)
        value = _tensor(op, "other" if operator_name(op.target) == "aten.matmul" else "mat2")
        straight = tuple(range(rank))
        if _tensor(op, "self") != probabilities or len(self.graph.tensors[value].shape) != rank:
            raise _NoMatchError
        return self._operand(value, straight, last), straight

    def _value_of_einsum(self, op: Op, last: int, probabilities: int) -> tuple[Operand, tuple[int, ...]]:
        one, other, result, tensors = self._letters(op)
        if probabilities not in tensors or tensors[0] == tensors[1]:
            raise _NoMatchError
        swapped = tensors[1] == probabilities
        weights, value = (other[0], one[0]) if swapped else (one[0], other[0])
        tensor = tensors[0] if swapped else tensors[1]
        batch, queries, keys = weights[:-2], weights[-2], weights[-1]
        inner = set(value) - set(weights)
        if len(inner) != 1 or set(value) != {*batch, keys, *inner}:
            raise _NoMatchError
        (dim,) = inner
        if set(result) != {*batch, queries, dim} or len(result) != len(weights):
            raise _NoMatchError
        wanted = f"{batch}{queries}{dim}"
        operand = self._operand(tensor, tuple(value.index(x) for x in f"{batch}{keys}{dim}"), last)
        return operand, tuple(wanted.index(x) for x in result)

    def _operand(self, tensor: int, order: tuple[int, ...], before: int) -> Operand:
        """An operand, followed back through reorderings that undo its own and through scales."""
        best = Operand(tensor=tensor, order=order)
        now, position = best, before
        while True:
            step = self._step_back(now, position)
            if step is None:
                return best
            now, position = step
            if now.order == tuple(range(len(order))) or now.scale != best.scale:
                best = now

    def _step_back(self, operand: Operand, before: int) -> tuple[Operand, int] | None:
        writer = self.makers.writer(operand.tensor, before)
        if writer is None or self.makers.is_written(operand.tensor):
            return None
        op = self.graph.ops[writer]
        operator = operator_name(op.target)
        order = order_of(op, len(operand.order))
        if order is not None:
            moved = tuple(order[d] for d in operand.order)
            return replace(operand, tensor=_first(op), order=moved, ops=operand.ops), writer
        if operator in ("aten.mul", "aten.div") and self._is_mine(operand.tensor):
            try:
                factor = self._number_of(op.args.get("other"), writer)
            except (_NoMatchError, UnknownError):
                return None
            if factor <= 0 or op.args.get("rounding_mode") is not None:
                return None
            factor = 1 / factor if operator == "aten.div" else factor
            tensor = _tensor(op, "self")
            return replace(operand, tensor=tensor, scale=operand.scale * factor, ops=(*operand.ops, writer)), writer
        return None

    def _is_mine(self, tensor: int) -> bool:
        users = [i for i in self.flow.users(tensor) if self.graph.ops[i].outputs or self.graph.ops[i].mutates]
        return len(users) == 1 and tensor not in self.flow.results

    def _without_casts(self, operand: Operand, dtype: str) -> Operand:
        """A query or key that was cast up for the product alone, before the cast."""
        tensor = self.graph.tensors[operand.tensor]
        maker = self.flow.maker(operand.tensor)
        if tensor.dtype == dtype or maker is None or operator_name(self.graph.ops[maker].target) not in _CASTS:
            return operand
        source = _first(self.graph.ops[maker])
        if self.graph.tensors[source].dtype != dtype or self.graph.tensors[source].shape != tensor.shape:
            return operand
        before = replace(operand, tensor=source, ops=(*operand.ops, maker))
        again = self._operand(before.tensor, before.order, maker)
        return replace(again, scale=again.scale * before.scale, ops=(*before.ops, *again.ops))

    def _unfolded(self, query: Operand, key: Operand, value: Operand) -> tuple[Operand, Operand, Operand]:
        """Operands (B * H, length, D) as the (B, H, length, D) that they were made of, if all were."""
        if len(query.order) != _BATCHED - 1:
            return query, key, value
        one, other, third = (self._before_fold(o) for o in (query, key, value))
        if one is None or other is None or third is None:
            return query, key, value
        leading = {o.described(self.graph).shape[:2] for o in (one, other, third)}
        return (one, other, third) if len(leading) == 1 else (query, key, value)

    def _before_fold(self, operand: Operand) -> Operand | None:
        now: tuple[Operand, int] | None = (operand, len(self.graph.ops))
        while now is not None:
            found, before = now
            writer = self.makers.writer(found.tensor, before)
            op = self.graph.ops[writer] if writer is not None else None
            if op is not None and writer is not None and operator_name(op.target) in _VIEWS and found.order[0] == 0:
                shape, source = self.graph.tensors[found.tensor].shape, self.graph.tensors[_first(op)].shape
                if len(source) == _BATCHED and source[2:] == shape[1:] and source[0] * source[1] == shape[0]:
                    order = (0, 1, *(d + 1 for d in found.order[1:]))
                    copied = () if self.graph.is_view(op) else (writer,)
                    return self._settled(
                        replace(found, tensor=_first(op), order=order, ops=(*found.ops, *copied)), writer
                    )
            now = self._step_back(found, before)
        return None

    def _settled(self, operand: Operand, before: int) -> Operand:
        again = self._operand(operand.tensor, operand.order, before)
        return replace(again, scale=again.scale * operand.scale, ops=(*operand.ops, *again.ops))

    def without_repeats(self, operand: Operand) -> Operand:
        """Key or value before its heads were repeated for this attention alone."""
        if len(operand.order) != _BATCHED:
            return operand
        now: tuple[Operand, int] | None = (operand, len(self.graph.ops))
        while now is not None:
            found, before = now
            writer = self.makers.writer(found.tensor, before)
            if writer is None or self.makers.is_written(found.tensor) or not self._is_mine(found.tensor):
                return operand
            before_it = self._before_repeat(found, writer)
            if before_it is not None:
                return self._settled(before_it, writer)
            op = self.graph.ops[writer]
            if operator_name(op.target) in _COPIES and self._is_mine(found.tensor):
                now = replace(found, tensor=_first(op), ops=(*found.ops, writer)), writer
            else:
                now = self._step_back(found, before)
        return operand

    def _before_repeat(self, operand: Operand, writer: int) -> Operand | None:
        op = self.graph.ops[writer]
        operator = operator_name(op.target)
        head = operand.order[-3]
        made = self.graph.tensors[operand.tensor]
        if operator == "aten.repeat_interleave" and op.args.get("dim") in (head, head - _BATCHED):
            if not isinstance(op.args.get("repeats"), int):
                return None
            return replace(operand, tensor=_first(op), ops=(*operand.ops, writer))
        if operator == "aten.repeat":
            source = self.graph.tensors[_first(op)].shape
            alone = len(source) == _BATCHED and source[head] == 1
            same = (
                all(a == b for d, (a, b) in enumerate(zip(source, made.shape, strict=True)) if d != head)
                if alone
                else False
            )
            return replace(operand, tensor=_first(op), ops=(*operand.ops, writer)) if same else None
        if operator == "aten.expand":
            source = self.graph.tensors[_first(op)].shape
            alone = len(source) == _BATCHED and source[head] == 1 < made.shape[head]
            return replace(operand, tensor=_first(op), ops=(*operand.ops, writer)) if alone else None
        if operator not in _VIEWS:
            return None
        return self._before_expand(operand, _first(op), writer, head)

    def _before_expand(self, operand: Operand, tensor: int, writer: int, head: int) -> Operand | None:
        """Heads repeated by unsqueeze, expand and reshape."""
        made, ops = self.graph.tensors[operand.tensor], [writer]
        wide = self.graph.tensors[tensor].shape
        if len(wide) != len(made.shape) + 1:
            return None
        merged = (*wide[:head], wide[head] * wide[head + 1], *wide[head + 2 :])
        maker = self.flow.maker(tensor)
        while maker is not None and operator_name(self.graph.ops[maker].target) in _COPIES:
            ops.append(maker)
            tensor = _first(self.graph.ops[maker])
            maker = self.flow.maker(tensor)
        if merged != made.shape or maker is None or operator_name(self.graph.ops[maker].target) != "aten.expand":
            return None
        ops.append(maker)
        narrow = _first(self.graph.ops[maker])
        shape = self.graph.tensors[narrow].shape
        if (
            len(shape) != len(wide)
            or shape[head + 1] != 1
            or (*shape[: head + 1], *shape[head + 2 :])
            != (
                *wide[: head + 1],
                *wide[head + 2 :],
            )
        ):
            return None
        maker = self.flow.maker(narrow)
        if maker is None or operator_name(self.graph.ops[maker].target) not in (*_VIEWS, "aten.slice"):
            return None
        source = _first(self.graph.ops[maker])
        while len(self.graph.tensors[source].shape) > len(made.shape):
            maker = self.flow.maker(source)
            if maker is None:
                return None
            source = _first(self.graph.ops[maker])
        if self.graph.tensors[source].shape != (*shape[: head + 1], *shape[head + 2 :]):
            return None
        return replace(operand, tensor=source, ops=(*operand.ops, *ops))

    def _is_weight(self, operand: Operand) -> bool:
        return self.graph.role(operand.tensor) is Role.WEIGHT


def operand_of(graph: Graph, op: Op, name: str) -> Operand:
    """An argument of a call as it stands."""
    tensor = _tensor(op, name)
    return Operand(tensor=tensor, order=tuple(range(len(graph.tensors[tensor].shape))))


def _extended(found: _Before, index: int) -> _Before:
    return _Before(found.product, found.scores, found.scale, found.masks, (*found.ops, index))


def _alpha(product: Op) -> float:
    value = product.args.get("alpha", 1) if operator_name(product.target) == "aten.baddbmm" else 1
    return float(value) if isinstance(value, int | float) else 1.0


def _is_idle(op: Op) -> bool:
    """True for an op that returns what it was given, such as dropout at inference."""
    return len(op.outputs) == 1 and op.outputs[0] == _first(op) and not op.mutates


def _first(op: Op) -> int:
    if not op.inputs:
        raise _NoMatchError
    return op.inputs[0]


def _tensor(op: Op, name: str) -> int:
    tensor = tensor_of(op.args.get(name))
    if tensor is None:
        raise _NoMatchError
    return tensor
