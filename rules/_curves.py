"""Functions of one number that programs spell out, recognised by their values: however they are written, the same.

A chain of elementwise ops on one tensor and on numbers computes a function of a number. It is evaluated at a few points
and compared with the functions that libraries have an op for.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass

from ..analyzer.cost import operator_name
from ..analyzer.graph import Arg, Graph, Op, Role, TensorRef
from ..analyzer.rewrite import Flow

CASTS = ("aten.to", "aten._to_copy", "aten.float", "aten.type_as", "aten.half", "aten.bfloat16")
"""Ops that return what they are given in another type."""

POINTS = (-7.3, -5.2, -3.4, -2.9, -2.2, -1.1, -0.37, -0.05, 0.05, 0.41, 1.3, 2.2, 2.7, 3.2, 3.6, 5.8, 7.1)
"""Where functions are compared: on both sides of every bend, and where the two kinds of GELU differ most."""

_CLOSE = 1e-5
"""Difference up to which two functions are one: constants are often written with five digits."""

Values = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A function of one number that a program computes.

    Attributes:
        source: the tensor it is computed of.
        last: the op that returns it.
        ops: all its ops, ascending.
        name: of the function.
    """

    source: int
    last: int
    ops: tuple[int, ...]
    name: str


def curves(graph: Graph, flow: Flow, known: Mapping[str, Callable[[float], float]]) -> Iterator[Curve]:
    """Every function among the known ones that is spelt out in several ops, in the order of the program."""
    wanted = {name: tuple(function(x) for x in POINTS) for name, function in known.items()}
    reader = _Reader(graph, flow, wanted)
    taken: set[int] = set()
    for index, op in enumerate(graph.ops):
        if operator_name(op.target).removesuffix("_") in _TELLING and index not in taken:
            found = reader.around(index)
            if found is not None and taken.isdisjoint(found.ops):
                taken.update(found.ops)
                yield found


class _Reader:
    def __init__(self, graph: Graph, flow: Flow, wanted: Mapping[str, Values]) -> None:
        self.graph, self.flow, self.wanted = graph, flow, wanted

    def around(self, index: int) -> Curve | None:
        """The largest known function that an op is a part of."""
        found = [curve for source in self._sources(index) for curve in self._from(source, index)]
        return max(found, key=lambda curve: (len(curve.ops), -curve.last), default=None)

    def _sources(self, index: int) -> list[int]:
        """Tensors of which the op's result may be a function: what it takes, and what that was made of."""
        found: list[int] = []
        waiting = [(tensor, 0) for tensor in self.graph.ops[index].inputs]
        while waiting:
            tensor, steps = waiting.pop(0)
            if tensor in found:
                continue
            found.append(tensor)
            maker = self.flow.maker(tensor)
            if maker is not None and steps < _STEPS and _function(self.graph.ops[maker]) is not None:
                waiting += [(before, steps + 1) for before in self.graph.ops[maker].inputs]
        return found

    def _from(self, source: int, through: int) -> Iterator[Curve]:
        """Known functions of a tensor that an op is a part of."""
        tensor = self.graph.tensors[source]
        if "float" not in tensor.dtype or self.graph.role(source) is Role.WEIGHT or 0 in tensor.shape:
            return
        values: dict[int, Values] = {source: POINTS}
        made: dict[int, int] = {}  # by tensor, the op that returned it last
        before: dict[int, set[int]] = {}  # by op, those that made what it takes
        waiting = set(self.flow.users(source))
        while waiting and len(before) < _MOST:
            index = min(waiting)
            waiting.remove(index)
            op = self.graph.ops[index]
            before[index] = {made[t] for t in op.inputs if t in made}
            result = None if self._is_idle(op) or not values.keys() >= set(op.inputs) else self._value(op, values)
            if result is None:
                continue
            curve = self._curve(source, index, result, before)
            if curve is not None and through in curve.ops:
                yield curve
            (out,) = op.outputs
            if out != source:
                values[out], made[out] = result, index
                waiting |= set(self.flow.users(out)) - before.keys()

    def _value(self, op: Op, values: Mapping[int, Values]) -> Values | None:
        function = _function(op)
        if function is None or len(op.outputs) != 1:
            return None
        if len({self.graph.tensors[t].shape for t in (*op.inputs, *op.outputs)}) != 1:
            return None
        try:
            return tuple([function(_at(op, values, i)) for i in range(len(POINTS))])
        except (ArithmeticError, ValueError, TypeError):
            return None

    def _curve(self, source: int, last: int, result: Values, before: Mapping[int, Set[int]]) -> Curve | None:
        name = next((name for name, values in self.wanted.items() if _same(values, result)), None)
        (out,) = self.graph.ops[last].outputs
        if name is None or self.graph.tensors[out].dtype != self.graph.tensors[source].dtype:
            return None
        ops: set[int] = set()
        waiting = {last}
        while waiting:
            index = waiting.pop()
            ops.add(index)
            waiting |= before[index] - ops
        computing = [index for index in ops if operator_name(self.graph.ops[index].target) not in CASTS]
        if len(computing) < _FEWEST or not self._is_alone(source, last, ops):
            return None
        return Curve(source=source, last=last, ops=tuple(sorted(ops)), name=name)

    def _is_alone(self, source: int, last: int, ops: Set[int]) -> bool:
        """Whether nobody else takes what lies in between, and the source is not overwritten before all took it."""
        graph = self.graph
        home = graph.tensors[source].storage
        for index in range(min(ops), last):
            if home in {graph.tensors[t].storage for t in graph.mutated(graph.ops[index])}:
                return False
        (result,) = graph.ops[last].outputs
        for index in ops - {last}:
            (out,) = graph.ops[index].outputs
            users = {user for user in self.flow.users(out) if not self._is_idle(graph.ops[user])}
            if out == result:  # the last op writes there
                users = {user for user in users if user < last}
            elif out in self.flow.results:
                return False
            if not users <= ops:
                return False
        overwritten = {graph.tensors[t].storage for t in graph.mutated(graph.ops[last])}
        return home not in overwritten or graph.mutated(graph.ops[last]) == (source,)

    def _is_idle(self, op: Op) -> bool:
        """True for an op that returns what it was given."""
        return not op.mutates and set(op.outputs) <= set(op.inputs)


_STEPS = 6
"""Ops before a telling one that may belong to the same function."""

_MOST = 24
"""Ops of one tensor that are looked at."""

_FEWEST = 2


def _at(op: Op, values: Mapping[int, Values], point: int) -> "_Args":
    """The arguments of an op at one of the points."""
    return {n: values[v.tensor][point] if isinstance(v, TensorRef) else v for n, v in op.args.items()}


def _same(one: Values, other: Values) -> bool:
    return all(abs(a - b) <= _CLOSE * (1 + abs(a)) for a, b in zip(one, other, strict=True))


_Args = Mapping[str, Arg]
_Function = Callable[[_Args], float]


def _function(op: Op) -> _Function | None:
    """What an elementwise op computes of its arguments."""
    name = operator_name(op.target).removeprefix("aten.").removesuffix("_")
    return _FUNCTIONS.get(name)


def _number(args: _Args, name: str, default: float | None = None) -> float:
    value = args.get(name, default)
    if value is None:
        value = default
    if not isinstance(value, int | float):
        raise TypeError(name)
    return float(value)


def _of(function: Callable[[float], float]) -> _Function:
    return lambda args: function(_number(args, "self"))


def _with(function: Callable[[float, float], float], other: str = "other") -> _Function:
    return lambda args: function(_number(args, "self"), _number(args, other))


def _divided(args: _Args) -> float:
    if args.get("rounding_mode") is not None:
        raise TypeError("rounding_mode")
    return _number(args, "self") / _number(args, "other")


def _clamped(args: _Args) -> float:
    low = _number(args, "min", _number(args, "min_val", -math.inf))
    high = _number(args, "max", _number(args, "max_val", math.inf))
    return min(max(_number(args, "self"), low), high)


def _softplus(args: _Args) -> float:
    beta = _number(args, "beta", 1.0)
    return softplus(_number(args, "self") * beta) / beta


def _chosen(args: _Args) -> float:
    return _number(args, "self") if _number(args, "condition") else _number(args, "other")


def sigmoid(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    """Its integral."""
    return math.log1p(math.exp(x))


_FUNCTIONS: Mapping[str, _Function] = {
    "add": lambda args: _number(args, "self") + _number(args, "alpha", 1) * _number(args, "other"),
    "sub": lambda args: _number(args, "self") - _number(args, "alpha", 1) * _number(args, "other"),
    "rsub": lambda args: _number(args, "other") - _number(args, "alpha", 1) * _number(args, "self"),
    "mul": _with(lambda a, b: a * b),
    "div": _divided,
    "pow": _with(lambda a, b: math.pow(a, b), "exponent"),
    "maximum": _with(max),
    "minimum": _with(min),
    "gt": _with(lambda a, b: float(a > b)),
    "ge": _with(lambda a, b: float(a >= b)),
    "lt": _with(lambda a, b: float(a < b)),
    "le": _with(lambda a, b: float(a <= b)),
    "where": _chosen,
    "clamp": _clamped,
    "clamp_min": _clamped,
    "clamp_max": _clamped,
    "hardtanh": _clamped,
    "softplus": _softplus,
    "relu6": _of(lambda x: min(max(x, 0.0), 6.0)),
    "hardsigmoid": _of(lambda x: min(max(x + 3.0, 0.0), 6.0) / 6.0),
    "relu": _of(lambda x: max(x, 0.0)),
    "neg": _of(lambda x: -x),
    "abs": _of(abs),
    "square": _of(lambda x: x * x),
    "sqrt": _of(math.sqrt),
    "reciprocal": _of(lambda x: 1 / x),
    "exp": _of(math.exp),
    "expm1": _of(math.expm1),
    "log": _of(math.log),
    "log1p": _of(math.log1p),
    "tanh": _of(math.tanh),
    "erf": _of(math.erf),
    "sigmoid": _of(sigmoid),
    "special_expit": _of(sigmoid),
    **dict.fromkeys((name.removeprefix("aten.") for name in CASTS), _of(lambda x: x)),
}

_TELLING = frozenset(
    f"aten.{name}"
    for name in (
        "tanh", "erf", "sigmoid", "special_expit", "exp", "expm1", "relu6", "hardtanh", "clamp", "hardsigmoid",
        "minimum",
    )
)  # fmt: skip
"""Of every known function, one op that it cannot be spelt without."""
