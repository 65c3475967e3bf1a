"""Changes a graph as a remedy would change the program, so that the changed program can be priced like any other.

Plain data in, plain data out. What follows a changed tensor follows its layout: a view of it is a view of the new one,
and a `reshape` or `contiguous` is a copy where the new layout needs one and free where it does not.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

from .cost import operator_name
from .errors import FxroofError
from .graph import (
    ITEM_BITS,
    Arg,
    Graph,
    Op,
    Role,
    Storage,
    Tensor,
    TensorRef,
    is_assertion,
    is_read_back,
    needed,
    tensor_of,
)
from .repetition import Part
from .sdpa import Attention, dense_stride, traced_output_stride


class RewriteError(FxroofError):
    """A remedy cannot be carried through: the op that stands in the way is named."""


class Draft:
    """A graph being changed. Indices of ops are those of the graph it began with; tensors are added at the end.

    With a `part`, only the layers in it come out at the end, whatever was changed in the others.
    """

    def __init__(self, graph: Graph, part: Part | None = None) -> None:
        self.graph = graph
        self.part = part
        self.tensors = list(graph.tensors)
        self.storages = list(graph.storages)
        self._inserted: dict[int, list[Op]] = {}
        self._replaced: dict[int, Op] = {}
        self._substituted: dict[int, int] = {}
        self._removed: set[int] = set()
        self._claimed: set[int] = set()
        self._afterwards: list[Callable[[Graph], Graph]] = []
        self.shared: dict[tuple[str, int, str], int] = {}
        """Tensors that rewrites made once for several places, by what was done, of which tensor, to which type."""
        self.joined: dict[int, tuple[int, set[int]]] = {}
        """For ops that became one: the index where it stands, and those of them whose weights are as they were."""

    def claim(self, ops: Iterable[int]) -> bool:
        """Whether these ops are still as they were; they are taken then, and what comes later leaves them alone."""
        wanted = set(ops)
        if wanted & self._claimed:
            return False
        self._claimed |= wanted
        return True

    def tensor(
        self,
        shape: tuple[int, ...],
        dtype: str,
        *,
        stride: tuple[int, ...] | None = None,
        role: Role = Role.ACTIVATION,
        name: str = "",
    ) -> int:
        """A new tensor in memory of its own; contiguous unless strides are given."""
        strides = contiguous(shape) if stride is None else stride
        reach = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if 0 not in shape else 0
        nbytes = max(reach, prod(shape)) * ITEM_BITS[dtype] // 8
        self.storages.append(Storage(nbytes=nbytes, role=role, name=name or f"new_{len(self.storages)}"))
        self.tensors.append(Tensor(storage=len(self.storages) - 1, dtype=dtype, shape=shape, stride=strides))
        return len(self.tensors) - 1

    def view(self, base: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> int:
        """A view of a tensor; `offset` counts elements from where the tensor begins."""
        of = self.tensors[base]
        self.tensors.append(replace(of, shape=shape, stride=stride, offset=of.offset + offset))
        return len(self.tensors) - 1

    def insert(self, before: int, op: Op) -> None:
        """Put an op before one of the graph's; several are put in the order they come."""
        self._inserted.setdefault(before, []).append(op)

    def replace(self, index: int, op: Op) -> None:
        """Put an op where another was; what nobody needs any more disappears by itself."""
        self._replaced[index] = op

    def now(self, index: int) -> Op:
        """The op that stands at an index, after what was done so far."""
        return self._replaced.get(index, self.graph.ops[index])

    def remove(self, indices: Iterable[int]) -> None:
        """Take ops out whose results another op makes from now on; what none makes anew goes if nobody needs it."""
        self._removed.update(indices)

    def substitute(self, old: int, new: int) -> None:
        """Have all that used a tensor use another of the same shape, whatever its layout."""
        self._substituted[old] = new

    def afterwards(self, change: Callable[[Graph], Graph]) -> None:
        """Have the graph that comes of all rewrites changed as a whole, such as in the type of its numbers."""
        self._afterwards.append(change)

    def standing_for(self, tensor: int) -> int:
        """The tensor that a rewrite has put in the place of another, or that one itself."""
        return self._substituted.get(tensor, tensor)

    def retype(self, tensors: Iterable[int], dtype: str) -> None:
        """Have the memory of tensors hold another type; these, and what rewrites made of them, keep their layouts."""
        chosen = set(tensors)
        homes = {self.tensors[i].storage for i in chosen}
        made = range(len(self.graph.tensors), len(self.tensors))
        chosen |= {i for i in made if self.tensors[i].storage in homes}
        for storage in homes:
            old = next(self.tensors[i].dtype for i in chosen if self.tensors[i].storage == storage)
            nbytes = self.storages[storage].nbytes * ITEM_BITS[dtype] // ITEM_BITS[old]
            self.storages[storage] = replace(self.storages[storage], nbytes=nbytes)
        for index in chosen:
            self.tensors[index] = replace(self.tensors[index], dtype=dtype)

    def finish(self) -> Graph:
        """The changed graph, without the ops whose results nobody needs any more.

        Raises:
            RewriteError: a view of a changed tensor cannot be followed.
        """
        ops: list[Op] = []
        moved: dict[int, int] = {}
        idle = self.graph.idle
        put = (*(op for ops in self._inserted.values() for op in ops), *self._replaced.values())
        anew = {self.tensors[i].storage for op in put for i in op.outputs}
        unasked: set[int] = set()
        before = -1
        for index in range(len(self.graph.ops)) if self.part is None else self.part.ops:
            op = self.graph.ops[index]
            if self.part is not None and index != before + 1:
                moved.update({gone: moved.get(like, like) for gone, like in self.part.stands_for.items()})
            before = index
            ops += [self._carried(new, moved) for new in self._inserted.get(index, ())]
            gone = op.mutates or is_read_back(op) or self._is_made_anew(op, anew)
            if index in self._removed and index not in self._replaced:
                if gone:
                    continue
                if self._substituted.keys() >= set(op.outputs):  # all that it returns, if it returns anything
                    standing = [(tensor, self._substituted[tensor]) for tensor in op.outputs]
                    moved.update({old: moved.get(new, new) for old, new in standing})
                    continue
            if index in idle and index not in self._removed:
                unasked.add(len(ops))
            ops.append(self._carried(self._replaced.get(index, op), moved))
            for tensor in op.outputs:
                if tensor in self._substituted:
                    moved[tensor] = self._substituted[tensor]
        outputs = tuple(moved.get(tensor, tensor) for tensor in self.graph.outputs)
        for old, new in zip(self.graph.outputs, outputs, strict=True):
            self._keep_role(old, new)
        live = needed(ops, self.tensors, outputs, self.graph, unasked)
        kept = self._without_assertions_about_removed(op for op, wanted in zip(ops, live, strict=True) if wanted)
        self._refuse_what_nobody_makes(kept)
        changed = replace(
            self.graph,
            ops=kept,
            tensors=tuple(self.tensors),
            storages=tuple(self.storages),
            outputs=outputs,
        )
        for change in self._afterwards:
            changed = change(changed)
        return changed

    def _is_made_anew(self, op: Op, anew: set[int]) -> bool:
        return not self._is_alias(op) and any(self.tensors[i].storage in anew for i in op.outputs)

    def _without_assertions_about_removed(self, ops: Iterable[Op]) -> tuple[Op, ...]:
        kept = tuple(ops)
        gone = {self.tensors[i].storage for index in self._removed for i in self.graph.ops[index].outputs}
        gone.difference_update(self.tensors[i].storage for op in kept for i in op.outputs)
        if not gone:
            return kept
        return tuple(
            op for op in kept if not (is_assertion(op) and gone & {self.tensors[i].storage for i in op.inputs})
        )

    def _refuse_what_nobody_makes(self, ops: Iterable[Op]) -> None:
        """A remedy may lean on an op that another one took out, or on a layer that was left out."""
        gone = [self.graph.ops[index] for index in self._removed]
        missing: set[int] = set()  # storages
        if self.part is not None:
            made_by_rewrites = range(len(self.graph.tensors), len(self.tensors))
            missing = {
                self.tensors[i].storage
                for i in made_by_rewrites
                if self.storages[self.tensors[i].storage].role is Role.ACTIVATION
            }
            missing |= self.part.gone
        missing |= {
            self.tensors[i].storage for op in gone if not (op.mutates or self._is_alias(op)) for i in op.outputs
        }
        for op in ops if missing else ():
            if self._is_alias(op) and not op.mutates:
                continue
            if not is_assertion(op) and not missing.isdisjoint([self.tensors[i].storage for i in op.inputs]):
                raise RewriteError(f"The rewrite of {op.name} ({op.target}) needs an op that was left out.")
            missing.difference_update([self.tensors[i].storage for i in op.outputs])

    def _carried(self, op: Op, moved: dict[int, int]) -> Op:
        """The op on the tensors that took the place of its own; its results move where layout makes them."""
        if moved.keys().isdisjoint(op.inputs):
            return op
        args = {name: on(value, moved) for name, value in op.args.items()}
        changed = replace(op, args=args)
        if op.mutates:
            return replace(changed, outputs=tuple([moved.get(tensor, tensor) for tensor in op.outputs]))
        results = self.results(op, moved)
        moved.update({old: new for old, new in zip(op.outputs, results, strict=True) if new != old})
        return replace(changed, outputs=results)

    def results(self, op: Op, moved: Mapping[int, int]) -> tuple[int, ...]:
        """What an op returns on the tensors that took the place of its own: new tensors where layout makes them.

        Raises:
            RewriteError: a view of a changed tensor cannot be followed.
        """
        first = op.inputs[0] if op.inputs else -1
        if first not in moved:
            return self._same_or_refuse(op)
        source, old = self.tensors[moved[first]], self.tensors[first]
        operator = operator_name(op.target)
        if operator in _RELAYOUT:
            return tuple([self._relaid(op, moved[first], _RELAYOUT[operator], old, made) for made in op.outputs])
        if op.outputs == (first,):
            return (moved[first],)
        if is_elementwise(op) and len(op.outputs) == 1 and not self._is_alias(op):
            made = self.tensors[op.outputs[0]]
            if made.shape == source.shape:
                return (self._made_like(op.outputs[0], dense_stride(source.shape, source.stride)),)
        if operator == "aten.scaled_dot_product_attention":
            made = self.tensors[op.outputs[0]]
            stride = attended_stride(replace(op, args={n: on(v, moved) for n, v in op.args.items()}), self.tensors)
            return op.outputs if stride in (None, made.stride) else (self._made_like(op.outputs[0], stride),)
        return self._same_or_refuse(op)

    def _made_like(self, tensor: int, stride: tuple[int, ...]) -> int:
        """A tensor of other strides in new memory, which is for what the old one's is for."""
        made = self.tensors[tensor]
        kept = self.storages[made.storage]
        return self.tensor(made.shape, made.dtype, stride=stride, role=kept.role, name=kept.name)

    def _relaid(self, op: Op, base: int, relayout: "_Relayout", old: Tensor, result: int) -> int:
        made = self.tensors[result]
        found = relayout(self.tensors[base], old, made, op)
        if found is None:
            kept = self.storages[made.storage]
            return self.tensor(made.shape, made.dtype, role=kept.role, name=op.name)
        if (found[0], found[1], found[2]) == (self.tensors[base].shape, self.tensors[base].stride, 0):
            return base
        return self.view(base, *found)

    def _is_alias(self, op: Op) -> bool:
        homes = {self.tensors[i].storage for i in op.inputs}
        return any(self.tensors[i].storage in homes for i in op.outputs)

    def _same_or_refuse(self, op: Op) -> tuple[int, ...]:
        homes = {self.graph.tensors[i].storage for i in op.inputs if i < len(self.graph.tensors)}
        if any(self.tensors[i].storage in homes for i in op.outputs):
            raise RewriteError(f"The rewrite cannot follow the view that {op.name} ({op.target}) makes.")
        return op.outputs

    def _keep_role(self, before: int, after: int) -> None:
        old, new = self.tensors[before].storage, self.tensors[after].storage
        if old != new and self.storages[new].role is Role.ACTIVATION:
            self.storages[new] = replace(self.storages[new], role=self.storages[old].role)


def attended_stride(op: Op, tensors: Sequence[Tensor] | Mapping[int, Tensor]) -> tuple[int, ...] | None:
    """Strides of what attention returns, which follow its query's; None where they are not known."""
    query, key, value, mask = (
        tensors[given] if given is not None else None
        for given in (tensor_of(op.args.get(name)) for name in ("query", "key", "value", "attn_mask"))
    )
    if query is None or key is None or value is None or len(query.shape) != _HEADED:
        return None
    dropout = op.args.get("dropout_p")
    return traced_output_stride(
        Attention(
            query=query,
            key=key,
            value=value,
            mask=mask,
            causal=bool(op.args.get("is_causal")),
            gqa=bool(op.args.get("enable_gqa")),
            dropout=dropout if isinstance(dropout, float) else 0.0,
        )
    )


_HEADED = 4


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose last dimension varies fastest."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


Layout = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides, and elements from where the tensor that is looked at begins."""
_Relayout = Callable[[Tensor, Tensor, Tensor, Op], Layout | None]
"""From the new source, the old source and the old result of a view to the layout of the new result."""


def reshaped(source: Tensor, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of a view of another shape, or None where the layout allows none: `at::detail::computeStride`."""
    if 0 in source.shape:
        return contiguous(shape)
    merged: list[tuple[int, int]] = []  # sizes and strides of the fewest dimensions that have this memory
    for size, step in zip(source.shape, source.stride, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    strides: list[int] = []
    left = list(reversed(merged))
    room, step = left.pop(0) if left else (1, 1)
    for size in reversed(shape):
        if size == 1:
            strides.append(step)
            continue
        if room == 1 and left:
            room, step = left.pop(0)
        if room % size:
            return None
        strides.append(step)
        room, step = room // size, step * size
    return tuple(reversed(strides))


def order_of(op: Op, rank: int) -> tuple[int, ...] | None:
    """For each dimension of what a view returns, the dimension of its source; None where it does more than reorder."""
    operator = operator_name(op.target)
    if operator == "aten.permute":
        dims = op.args.get("dims")
        given = tuple(d % rank for d in dims if isinstance(d, int)) if isinstance(dims, tuple) else ()
        return given if len(given) == rank else None
    if operator in ("aten.movedim", "aten.moveaxis"):
        return _order_of_move(op.args.get("source"), op.args.get("destination"), rank)
    if operator not in _SWAPS or rank < _MATRIX:
        return None
    one, other = (op.args.get(name, default) for name, default in zip(_SWAPS[operator], (-2, -1), strict=True))
    if not isinstance(one, int) or not isinstance(other, int):
        return None
    order = list(range(rank))
    order[one % rank], order[other % rank] = order[other % rank], order[one % rank]
    return tuple(order)


_MATRIX = 2
_SWAPS = {
    "aten.transpose": ("dim0", "dim1"),
    "aten.swapdims": ("dim0", "dim1"),
    "aten.swapaxes": ("axis0", "axis1"),
    "aten.mT": ("", ""),
    "aten.t": ("", ""),
}


def _order_of_move(source: Arg, destination: Arg, rank: int) -> tuple[int, ...] | None:
    one, other = ((value,) if isinstance(value, int) else value for value in (source, destination))
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return None
    moved = {d % rank: s % rank for s, d in zip(one, other, strict=True) if isinstance(s, int) and isinstance(d, int)}
    left = iter([d for d in range(rank) if d not in moved.values()])
    return tuple([moved[d] if d in moved else next(left) for d in range(rank)])


def _regrouped(source: Tensor, _old: Tensor, made: Tensor, _op: Op) -> Layout | None:
    stride = reshaped(source, made.shape)
    return None if stride is None else (made.shape, stride, 0)


def _dense(source: Tensor, _old: Tensor, _made: Tensor, _op: Op) -> Layout | None:
    real = [(size, step) for size, step in zip(source.shape, source.stride, strict=True) if size != 1]
    packed = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(real))
    return (source.shape, source.stride, 0) if packed and (not real or real[-1][1] == 1) else None


def _reordered(source: Tensor, _old: Tensor, _made: Tensor, op: Op) -> Layout | None:
    order = order_of(op, len(source.shape))
    if order is None:
        raise RewriteError(f"The rewrite cannot follow the view that {op.name} ({op.target}) makes.")
    return tuple(source.shape[d] for d in order), tuple(source.stride[d] for d in order), 0


def _expanded(source: Tensor, _old: Tensor, made: Tensor, _op: Op) -> Layout:
    missing = len(made.shape) - len(source.shape)
    given = zip((1,) * missing + source.shape, (0,) * missing + source.stride, made.shape, strict=True)
    return made.shape, tuple(0 if size == 1 != wanted else step for size, step, wanted in given), 0


def _sliced(source: Tensor, old: Tensor, made: Tensor, op: Op) -> Layout:
    """Part of one dimension: `slice`, `narrow`, and what `chunk` and `split` return."""
    dim = _integer(op, "dim", 0) % len(old.shape)
    start = (made.offset - old.offset) // old.stride[dim] if old.stride[dim] else 0
    step = made.stride[dim] // old.stride[dim] if old.stride[dim] and made.shape[dim] > 1 else 1
    stride = (*source.stride[:dim], source.stride[dim] * step, *source.stride[dim + 1 :])
    return made.shape, stride, start * source.stride[dim]


def _selected(source: Tensor, old: Tensor, made: Tensor, op: Op) -> Layout:
    dim = _integer(op, "dim", 0) % len(old.shape)
    start = (made.offset - old.offset) // old.stride[dim] if old.stride[dim] else 0
    return made.shape, (*source.stride[:dim], *source.stride[dim + 1 :]), start * source.stride[dim]


def _integer(op: Op, name: str, default: int) -> int:
    value = op.args.get(name)
    return value if isinstance(value, int) else default


_RELAYOUT: Mapping[str, _Relayout] = {
    **dict.fromkeys(
        (
            "aten.view", "aten.reshape", "aten.flatten", "aten.unflatten", "aten._unsafe_view", "aten.unsqueeze",
            "aten.squeeze", "aten.view_as", "aten.reshape_as",
        ),
        _regrouped,
    ),
    **dict.fromkeys((*_SWAPS, "aten.permute", "aten.movedim", "aten.moveaxis"), _reordered),
    **dict.fromkeys(
        ("aten.slice", "aten.narrow", "aten.chunk", "aten.split", "aten.split_with_sizes", "aten.tensor_split"),
        _sliced,
    ),
    **dict.fromkeys(("aten.select", "aten.unbind"), _selected),
    **dict.fromkeys(("aten.expand", "aten.expand_as"), _expanded),
    "aten.contiguous": _dense,
}  # fmt: skip

_ELEMENTWISE = frozenset(
    f"aten.{name}"
    for name in (
        "to", "_to_copy", "type_as", "float", "clone", "dropout", "mul", "add", "sub", "div", "rsub", "neg", "abs",
        "reciprocal", "pow", "square", "sqrt", "rsqrt", "exp", "log", "sin", "cos", "tanh", "sigmoid", "erf", "silu",
        "gelu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "mish", "softplus", "hardswish", "hardsigmoid",
        "hardtanh", "clamp", "clamp_min", "clamp_max", "nan_to_num", "masked_fill", "logical_not", "bitwise_not",
        "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge",
    )
)  # fmt: skip
"""Ops whose result has the layout of what they are given."""


def is_elementwise(op: Op) -> bool:
    """True where a result has the layout of the first argument, if that is as large."""
    return operator_name(op.target) in _ELEMENTWISE


def relaid(op: Op, source: Tensor, old: Tensor, made: Tensor) -> Layout | None:
    """The layout in which a view, `reshape` or `contiguous` sees a source whose layout is no longer the old one.

    Args:
        op: what makes the view.
        source: what it is given now.
        old: what it was given.
        made: what it returned then.

    Returns:
        None where it has to copy.

    Raises:
        RewriteError: the op is none of these.
    """
    relayout = _RELAYOUT.get(operator_name(op.target))
    if relayout is None:
        raise RewriteError(f"The rewrite cannot follow the view that {op.name} ({op.target}) makes.")
    return relayout(source, old, made, op)


def on(value: Arg, moved: Mapping[int, int]) -> Arg:
    """An argument on the tensors that took the place of its own."""
    if isinstance(value, TensorRef):
        return TensorRef(tensor=moved.get(value.tensor, value.tensor))
    if isinstance(value, tuple):
        return tuple(TensorRef(tensor=moved.get(v.tensor, v.tensor)) if isinstance(v, TensorRef) else v for v in value)
    return value


class Flow:
    """Who makes and who uses what, for rules that recognise structure."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @functools.cached_property
    def _makers(self) -> dict[int, int]:
        makers: dict[int, int] = {}
        for index, op in enumerate(self.graph.ops):
            for tensor in op.outputs:
                makers.setdefault(tensor, index)
        return makers

    @functools.cached_property
    def _users(self) -> dict[int, list[int]]:
        users: dict[int, list[int]] = {}
        for index, op in enumerate(self.graph.ops):
            for tensor in () if is_assertion(op) else op.inputs:
                users.setdefault(tensor, []).append(index)
        return users

    def maker(self, tensor: int) -> int | None:
        """The op that returned a tensor; None for what was given."""
        return self._makers.get(tensor)

    def users(self, tensor: int) -> tuple[int, ...]:
        """The ops that take a tensor itself."""
        return tuple(self._users.get(tensor, ()))

    @functools.cached_property
    def results(self) -> frozenset[int]:
        """Tensors that the phase returns."""
        return frozenset(self.graph.outputs)

    def only_user(self, tensor: int) -> int | None:
        """The one op that takes a tensor, if there is just one and the phase does not return it."""
        users = self.users(tensor)
        return users[0] if len(users) == 1 and tensor not in self.results else None
