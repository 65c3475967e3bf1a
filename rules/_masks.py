"""What an attention mask hides, proved from the ops that make it.

A mask is followed back to constants: `ones`, `full`, `arange` and the like. What comes out is a function of the query i
and the key j that is affine (linear in i and j) on bands of d = j - i: enough for causal masks, sliding windows and
positions, and cheap at any length. What depends on weights, inputs or the batch is unknown.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..analyzer.cost import operator_name
from ..analyzer.graph import Arg, Graph, Op, TensorRef, tensors_of
from ..analyzer.rewrite import Flow, order_of

HIDDEN = -1e4
"""Scores to which this or less is added are taken as hidden: -inf, the smallest number of a type, -1e9, -1e4."""


class Shape(StrEnum):
    """What is known of which keys a query sees."""

    ALL = "all"
    """Every query sees every key."""
    CAUSAL = "causal"
    """Query i sees the keys 0 to i, and there are as many queries as keys."""
    OTHER = "other"
    """Known, and neither: a window, or a causal mask over keys that came before."""
    UNKNOWN = "unknown"


class UnknownError(Exception):
    """A value cannot be told from the graph."""


@dataclass(frozen=True, slots=True)
class Affine:
    """constant + query * i + key * j."""

    constant: float
    query: float = 0
    key: float = 0

    @property
    def fixed(self) -> bool:
        """True for a number."""
        return self.query == self.key == 0


Coordinate = Affine | None
"""Where along a dimension; None along the batch or the heads, where masks may not differ."""

Piece = tuple[int, int, Affine]
"""Over d from the first to the second, inclusive, this."""


class Makers:
    """The op that last wrote a tensor, in-place ops included."""

    def __init__(self, graph: Graph, flow: Flow) -> None:
        self.graph = graph
        self.flow = flow
        self._writes: dict[int, list[tuple[int, int]]] = {}
        for index, op in enumerate(graph.ops):
            for tensor in graph.mutated(op):
                self._writes.setdefault(graph.tensors[tensor].storage, []).append((index, tensor))

    def writer(self, tensor: int, before: int) -> int | None:
        """Index of the op whose result a tensor holds before another op; None where that is not one op."""
        maker = self.flow.maker(tensor)
        storage = self.graph.tensors[tensor].storage
        written = [(index, t) for index, t in self._writes.get(storage, ()) if index < before]
        if written and written[-1][1] == tensor:
            return written[-1][0]
        if maker is None or (written and (written[-1][0] > maker or not self.graph.is_view(self.graph.ops[maker]))):
            return None
        return maker

    def is_written(self, tensor: int) -> bool:
        """True where an op writes into the tensor's memory after it was made."""
        return self.graph.tensors[tensor].storage in self._writes


def shape_of(pieces: Sequence[tuple[int, int, bool]], queries: int, keys: int) -> Shape:
    """What bands of visible keys amount to."""
    if all(visible for _, _, visible in pieces):
        return Shape.ALL
    causal = all(visible == (last <= 0) for first, last, visible in pieces if not first <= 0 < last)
    straddles = any(first <= 0 < last for first, last, _ in pieces)
    return Shape.CAUSAL if causal and not straddles and queries == keys else Shape.OTHER


class Reader:
    """Values of tensors over the scores of one attention: (queries, keys)."""

    def __init__(self, makers: Makers, queries: int, keys: int) -> None:
        self.makers = makers
        self.graph = makers.graph
        self.queries = queries
        self.keys = keys
        self._known: dict[tuple[int, tuple[Coordinate, ...]], list[Piece]] = {}

    def over_scores(self, tensor: int, before: int) -> list[Piece]:
        """A tensor that broadcasts to (..., queries, keys).

        Raises:
            UnknownError: it is not known.
        """
        rank = len(self.graph.tensors[tensor].shape)
        coordinates = (None,) * max(0, rank - 2) + (Affine(0, query=1), Affine(0, key=1))[2 - min(rank, 2) :]
        return self.read(tensor, self.broadcast(tensor, coordinates), before)

    def number(self, tensor: int, before: int) -> float:
        """The value of a tensor of one element.

        Raises:
            UnknownError: it is not known.
        """
        shape = self.graph.tensors[tensor].shape
        if any(size != 1 for size in shape):
            raise UnknownError
        values = {value for _, _, value in self.read(tensor, (Affine(0),) * len(shape), before)}
        if len(values) != 1 or not next(iter(values)).fixed:
            raise UnknownError
        return next(iter(values)).constant

    def read(self, tensor: int, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
        """The value of a tensor at a place.

        Raises:
            UnknownError: it is not known.
        """
        key = (tensor, at)
        lasting = not self.makers.is_written(tensor)
        if lasting and key in self._known:
            return self._known[key]
        writer = self.makers.writer(tensor, before)
        if writer is None or writer >= before:
            raise UnknownError
        op = self.graph.ops[writer]
        operator = operator_name(op.target)
        operator = operator.removesuffix("_") if op.mutates else operator
        if operator not in _READ or (op.mutates and operator not in _IN_PLACE):
            raise UnknownError
        pieces = _joined(_READ[operator](self, op, at, writer))
        if lasting:
            self._known[key] = pieces
        return pieces

    def operand(self, op: Op, name: str, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
        """An argument of an elementwise op: a number, or a tensor that broadcasts."""
        value = op.args.get(name)
        if isinstance(value, TensorRef):
            return self.read(value.tensor, self.broadcast(value.tensor, at), before)
        return self.constant(_number(value))

    def constant(self, value: float) -> list[Piece]:
        """A number everywhere."""
        return [(1 - self.queries, self.keys - 1, Affine(value))]

    def along(self, coordinate: Coordinate) -> Affine:
        """A coordinate as a value."""
        if coordinate is None:
            raise UnknownError
        return coordinate

    def at_least_zero(self, first: int, last: int, value: Affine) -> list[tuple[int, int, bool]]:
        """Where in a band a value is not negative."""
        slope = self._slope(value)
        if slope is None:
            low, high = self._range(value)
            if low >= 0 or high < 0:
                return [(first, last, low >= 0)]
            raise UnknownError
        if slope == 0 or math.isinf(value.constant):
            return [(first, last, value.constant >= 0)]
        if slope > 0:
            edge = math.ceil(-value.constant / slope)
            return [
                (a, b, ok)
                for a, b, ok in ((first, min(last, edge - 1), False), (max(first, edge), last, True))
                if a <= b
            ]
        edge = math.floor(value.constant / -slope)
        return [
            (a, b, ok) for a, b, ok in ((first, min(last, edge), True), (max(first, edge + 1), last, False)) if a <= b
        ]

    def is_positive(self, value: Affine) -> bool:
        """True where a value is negative nowhere."""
        return self._range(value)[0] >= 0

    def _slope(self, value: Affine) -> float | None:
        if self.queries == 1:
            return value.key
        if self.keys == 1:
            return -value.query
        return value.key if value.query == -value.key else None

    def _range(self, value: Affine) -> tuple[float, float]:
        ends = [step * (size - 1) for step, size in ((value.query, self.queries), (value.key, self.keys))]
        return value.constant + sum(min(0, e) for e in ends), value.constant + sum(max(0, e) for e in ends)

    def broadcast(self, tensor: int, at: tuple[Coordinate, ...]) -> tuple[Coordinate, ...]:
        """A place in what a tensor broadcasts to, as a place in the tensor."""
        shape = self.graph.tensors[tensor].shape
        used = at[len(at) - len(shape) :] if shape else ()
        return tuple(Affine(0) if size == 1 else c for size, c in zip(shape, used, strict=True))


def _number(value: Arg) -> float:
    if isinstance(value, bool | int | float):
        return float(value)
    if value in ("inf", "-inf"):
        return float(str(value))
    raise UnknownError


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for first, last, value in sorted(pieces, key=lambda piece: piece[0]):
        if joined and joined[-1][2] == value:
            joined[-1] = (joined[-1][0], last, value)
        else:
            joined.append((first, last, value))
    return joined


_Read = Callable[[Reader, Op, tuple[Coordinate, ...], int], list[Piece]]


def _pairs(one: list[Piece], other: list[Piece]) -> list[tuple[int, int, Affine, Affine]]:
    return [(max(a, c), min(b, d), x, y) for a, b, x in one for c, d, y in other if max(a, c) <= min(b, d)]


def _filled(name: str | None, default: float = 0) -> _Read:
    def read(reader: Reader, op: Op, _at: tuple[Coordinate, ...], _before: int) -> list[Piece]:
        return reader.constant(default if name is None else _number(op.args.get(name)))

    return read


def _arange(reader: Reader, op: Op, at: tuple[Coordinate, ...], _before: int) -> list[Piece]:
    start, step = (_number(op.args.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    place = reader.along(at[0])
    value = Affine(start + step * place.constant, step * place.query, step * place.key)
    return [(1 - reader.queries, reader.keys - 1, value)]


def _triangle(sign: int) -> _Read:
    def read(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
        diagonal = _number(op.args.get("diagonal", 0))
        row, column = reader.along(at[-2]), reader.along(at[-1])
        inside = Affine(
            sign * (diagonal + row.constant - column.constant),
            sign * (row.query - column.query),
            sign * (row.key - column.key),
        )
        kept = reader.operand(op, "self", at, before)
        return [
            (a, b, value if seen else Affine(0))
            for first, last, value in kept
            for a, b, seen in reader.at_least_zero(first, last, inside)
        ]

    return read


def _same(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    pieces = reader.operand(op, "input" if "input" in op.args else "self", at, before)
    made = reader.graph.tensors[op.outputs[0]].dtype
    if made == "bool":
        return _compare(reader, pieces, reader.constant(0), "ne")
    if made.startswith(("int", "uint")) and any(v.constant % 1 for _, _, v in pieces if math.isfinite(v.constant)):
        raise UnknownError
    return pieces


def _dropped(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    if op.args.get("train"):
        raise UnknownError
    return _same(reader, op, at, before)


def _arithmetic(combine: Callable[[Affine, Affine, float], Affine]) -> _Read:
    def read(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
        one, other = (reader.operand(op, name, at, before) for name in ("self", "other"))
        alpha = _number(op.args.get("alpha", 1))
        return [(a, b, combine(x, y, alpha)) for a, b, x, y in _pairs(one, other)]

    return read


def _plus(one: Affine, other: Affine, alpha: float) -> Affine:
    return Affine(one.constant + alpha * other.constant, one.query + alpha * other.query, one.key + alpha * other.key)


def _times(one: Affine, other: Affine) -> Affine:
    if not one.fixed:
        one, other = other, one
    if not one.fixed:
        raise UnknownError
    factor = one.constant
    if factor == 0 and math.isinf(other.constant):
        return Affine(math.nan)
    return Affine(factor * other.constant, factor * other.query, factor * other.key)


def _over(one: Affine, other: Affine) -> Affine:
    if not other.fixed or other.constant == 0:
        raise UnknownError
    return _times(one, Affine(1 / other.constant))


def _root(power: float) -> _Read:
    def read(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
        pieces = reader.operand(op, "self", at, before)
        if any(not v.fixed or v.constant <= 0 for _, _, v in pieces):
            raise UnknownError
        return [(a, b, Affine(v.constant**power)) for a, b, v in pieces]

    return read


def _negated(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    return [(a, b, _times(Affine(-1), v)) for a, b, v in reader.operand(op, "self", at, before)]


def _compare(reader: Reader, one: list[Piece], other: list[Piece], how: str) -> list[Piece]:
    return [
        (a, b, Affine(float(answer)))
        for first, last, x, y in _pairs(one, other)
        for a, b, answer in _compared(reader, first, last, x, y, how)
    ]


def _compared(reader: Reader, first: int, last: int, x: Affine, y: Affine, how: str) -> list[tuple[int, int, bool]]:
    if math.isinf(x.constant) or math.isinf(y.constant):
        if not (x.fixed and y.fixed):
            raise UnknownError
        return [(first, last, _HOW[how](x.constant, y.constant))]
    if how in ("lt", "gt"):
        opposite = _compared(reader, first, last, x, y, "ge" if how == "lt" else "le")
        return [(a, b, not answer) for a, b, answer in opposite]
    if how in ("eq", "ne"):
        above = _compared(reader, first, last, x, y, "ge")
        return [
            (c, d, (answer and also) == (how == "eq"))
            for a, b, answer in above
            for c, d, also in _compared(reader, a, b, x, y, "le")
        ]
    difference = _plus(x, y, -1) if how == "ge" else _plus(y, x, -1)
    return reader.at_least_zero(first, last, difference)


_HOW: dict[str, Callable[[float, float], bool]] = {
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
}


def _comparison(how: str) -> _Read:
    def read(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
        one, other = (reader.operand(op, name, at, before) for name in ("self", "other"))
        return _compare(reader, one, other, how)

    return read


def _logic(combine: Callable[[bool, bool], bool]) -> _Read:
    def read(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
        one, other = (_truth(reader, reader.operand(op, name, at, before)) for name in ("self", "other"))
        return [(a, b, Affine(float(combine(x.constant != 0, y.constant != 0)))) for a, b, x, y in _pairs(one, other)]

    return read


def _truth(reader: Reader, pieces: list[Piece]) -> list[Piece]:
    return _compare(reader, pieces, reader.constant(0), "ne")


def _not(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    value = op.args["self"]
    boolean = isinstance(value, TensorRef) and reader.graph.tensors[value.tensor].dtype == "bool"
    if not boolean and operator_name(op.target).startswith("aten.bitwise_not"):
        raise UnknownError
    return _compare(reader, reader.operand(op, "self", at, before), reader.constant(0), "eq")


def _chosen(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    condition = _truth(reader, reader.operand(op, "condition", at, before))
    return _either(condition, reader.operand(op, "self", at, before), reader.operand(op, "other", at, before))


def _masked(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    mask = _truth(reader, reader.operand(op, "mask", at, before))
    return _either(mask, reader.operand(op, "value", at, before), reader.operand(op, "self", at, before))


def _either(condition: list[Piece], one: list[Piece], other: list[Piece]) -> list[Piece]:
    return [
        (max(first, a), min(last, b), value)
        for first, last, truth in condition
        for a, b, value in (one if truth.constant else other)
        if max(first, a) <= min(last, b)
    ]


def _resized(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    """Views that only add or drop dimensions of size 1."""
    source, made = _source(op), reader.graph.tensors[op.outputs[0]]
    shape = reader.graph.tensors[source].shape
    real = [c for c, size in zip(at, made.shape, strict=True) if size != 1]
    if [size for size in shape if size != 1] != [size for size in made.shape if size != 1]:
        raise UnknownError
    left = iter(real)
    return reader.read(source, tuple(Affine(0) if size == 1 else next(left) for size in shape), before)


def _expanded(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    return reader.operand(op, "self", at, before)


def _reordered(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    order = order_of(op, len(at))
    if order is None:
        raise UnknownError
    places = dict(zip(order, at, strict=True))
    return reader.read(_source(op), tuple(places[d] for d in range(len(at))), before)


def _sliced(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    source = _source(op)
    shape = reader.graph.tensors[source].shape
    dim = int(_number(op.args.get("dim", 0))) % len(shape)
    given = op.args.get("start")
    start = 0 if given is None else int(_number(given))
    start = min(start if start >= 0 else max(0, start + shape[dim]), shape[dim])
    return reader.read(source, _moved(at, dim, start, int(_number(op.args.get("step", 1)))), before)


def _moved(at: tuple[Coordinate, ...], dim: int, start: int, step: int = 1) -> tuple[Coordinate, ...]:
    place = at[dim]
    if place is None:
        return at
    moved = Affine(start + step * place.constant, step * place.query, step * place.key)
    return (*at[:dim], moved, *at[dim + 1 :])


def _selected(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    source = _source(op)
    shape = reader.graph.tensors[source].shape
    dim, index = (int(_number(op.args.get(name, 0))) for name in ("dim", "index"))
    dim %= len(shape)
    return reader.read(source, (*at[:dim], Affine(index % shape[dim]), *at[dim:]), before)


def _indexed(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    """Indexing with tensors along neighbouring dimensions."""
    source, given = _source(op), op.args.get("indices")
    indices = [v.tensor if isinstance(v, TensorRef) else None for v in given] if isinstance(given, tuple) else []
    used = [d for d, index in enumerate(indices) if index is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        raise UnknownError
    shapes = [reader.graph.tensors[t].shape for t in indices if t is not None]
    rank = max(map(len, shapes))
    inner = at[used[0] : used[0] + rank]
    places = tuple(_place(reader, t, inner, before) for t in indices if t is not None)
    return reader.read(source, (*at[: used[0]], *places, *at[used[0] + rank :]), before)


def _place(reader: Reader, index: int, at: tuple[Coordinate, ...], before: int) -> Coordinate:
    """Where an index leads; None where that is not one affine place, counted from the front."""
    try:
        pieces = reader.read(index, reader.broadcast(index, at), before)
    except UnknownError:
        return None
    integer = reader.graph.tensors[index].dtype.startswith(("int", "uint"))
    return pieces[0][2] if len(pieces) == 1 and integer and reader.is_positive(pieces[0][2]) else None


def _source(op: Op) -> int:
    value = op.args.get("self")
    if not isinstance(value, TensorRef):
        raise UnknownError
    return value.tensor


def _concatenated(reader: Reader, op: Op, at: tuple[Coordinate, ...], before: int) -> list[Piece]:
    """Parts side by side; those without elements play no part."""
    across = min(1, len(at) - 1) if operator_name(op.target) == "aten.hstack" else 0
    dim = int(_number(op.args.get("dim", across))) % len(at)
    pieces = reader.constant(math.nan)
    start = 0
    for part in tensors_of(op.args.get("tensors")):
        size = reader.graph.tensors[part].shape[dim]
        if size:
            inside = reader.read(part, _moved(at, dim, -start), before)
            if start:
                place = reader.along(at[dim])
                behind = _compare(
                    reader, [(a, b, place) for a, b, _ in reader.constant(0)], reader.constant(start), "ge"
                )
                inside = _either(behind, inside, pieces)
            pieces = inside
        start += size
    return pieces


_PLAIN = ("alias", "detach", "clone", "contiguous", "to", "_to_copy", "type_as", "lift_fresh", "lift_fresh_copy")

_READ: dict[str, _Read] = {
    "aten.ones": _filled(None, 1),
    "aten.ones_like": _filled(None, 1),
    "aten.new_ones": _filled(None, 1),
    "aten.zeros": _filled(None, 0),
    "aten.zeros_like": _filled(None, 0),
    "aten.new_zeros": _filled(None, 0),
    "aten.zero": _filled(None, 0),
    "aten.full": _filled("fill_value"),
    "aten.full_like": _filled("fill_value"),
    "aten.new_full": _filled("fill_value"),
    "aten.fill": _filled("value"),
    "aten.scalar_tensor": _filled("s"),
    "aten.arange": _arange,
    "aten.tril": _triangle(1),
    "aten.triu": _triangle(-1),
    "aten.dropout": _dropped,
    **{f"aten.{name}": _same for name in _PLAIN},
    "aten.add": _arithmetic(_plus),
    "aten.sub": _arithmetic(lambda one, other, alpha: _plus(one, other, -alpha)),
    "aten.rsub": _arithmetic(lambda one, other, alpha: _plus(other, one, -alpha)),
    "aten.mul": _arithmetic(lambda one, other, _: _times(one, other)),
    "aten.div": _arithmetic(lambda one, other, _: _over(one, other)),
    "aten.neg": _negated,
    "aten.sqrt": _root(0.5),
    "aten.rsqrt": _root(-0.5),
    "aten.reciprocal": _root(-1),
    **{f"aten.{how}": _comparison(how) for how in _HOW},
    **{f"aten.{name}": _not for name in ("bitwise_not", "logical_not")},
    **{f"aten.{name}": _logic(lambda x, y: x and y) for name in ("bitwise_and", "logical_and", "__and__")},
    **{f"aten.{name}": _logic(lambda x, y: x or y) for name in ("bitwise_or", "logical_or", "__or__")},
    "aten.where": _chosen,
    **{f"aten.{name}": _concatenated for name in ("cat", "concat", "concatenate", "hstack")},
    "aten.masked_fill": _masked,
    **{f"aten.{name}": _resized for name in ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten")},
    "aten.expand": _expanded,
    "aten.expand_as": _expanded,
    **{f"aten.{name}": _reordered for name in ("transpose", "permute", "movedim", "mT", "t")},
    "aten.slice": _sliced,
    "aten.narrow": _sliced,
    "aten.select": _selected,
    "aten.index": _indexed,
}

_IN_PLACE = frozenset(
    f"aten.{name}"
    for name in (
        "tril",
        "triu",
        "fill",
        "zero",
        "add",
        "sub",
        "mul",
        "div",
        "masked_fill",
        "neg",
        "logical_not",
        "bitwise_not",
    )
)


def visible_where_zero(pieces: list[Piece]) -> list[tuple[int, int, bool]]:
    """Which keys an additive mask leaves visible.

    Raises:
        UnknownError: it is a bias as well.
    """
    if any(not v.fixed or not (v.constant == 0 or v.constant <= HIDDEN) for _, _, v in pieces):
        raise UnknownError
    return [(a, b, v.constant == 0) for a, b, v in pieces]


def visible_where(pieces: list[Piece], value: bool) -> list[tuple[int, int, bool]]:
    """Which keys a boolean mask leaves visible, where it says `value` of those."""
    if any(not v.fixed for _, _, v in pieces):
        raise UnknownError
    return [(a, b, (v.constant != 0) == value) for a, b, v in pieces]


def both(one: list[tuple[int, int, bool]], other: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """What two masks leave visible together."""
    return [(max(a, c), min(b, d), x and y) for a, b, x in one for c, d, y in other if max(a, c) <= min(b, d)]
