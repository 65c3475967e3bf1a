"""Recognises rotary embeddings that are spelt out: pairs of elements, turned by an angle that tables give.

A pair (a, b) becomes (a cos - b sin, b cos + a sin). Programs write it on whole rows, with halves or neighbours swapped
and one of them negated; on the halves or neighbours themselves, joined at the end; or as a product of complex numbers.
"""

from collections.abc import Iterator, Sequence, Set

from ..analyzer.cost import operator_name
from ..analyzer.finding import Situation
from ..analyzer.graph import Op, Role, Tensor, TensorRef, tensors_of
from . import decomposed_norm, materialized_attention_scores

_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.half", "aten.bfloat16")
_JOINS = ("aten.cat", "aten.concat", "aten.concatenate", "aten.stack")
_PAIR = 2


def rotations(situation: Situation) -> tuple[tuple[int, ...], ...]:
    """The ops of every rotary embedding that is spelt out, with the casts around it; tables are made by others.

    Casts that end a norm or begin an attention that is spelt out belong to those.
    """
    own = {index for norm in situation.once(decomposed_norm.found) for index in norm.ops}
    own.update(index for naive, *_ in situation.once(materialized_attention_scores.found) for index in naive.ops)
    return tuple(_Reader(situation, own).rotations())


class _NoMatchError(Exception):
    """This is no rotation."""


_Term = tuple[int, int, int]
"""A product with its sign: (sign, factor, factor)."""


class _Reader:
    def __init__(self, situation: Situation, own: Set[int]) -> None:
        self.graph, self.flow = situation.graph, situation.flow
        self.own = own  # ops that others recognise
        self.results = {self.graph.tensors[t].storage for t in self.graph.outputs}
        self.taken: dict[int, Set[int]] = {}

    def rotations(self) -> Iterator[tuple[int, ...]]:
        taken: set[int] = set()
        for index, op in enumerate(self.graph.ops):
            name = operator_name(op.target)
            try:
                if name in ("aten.add", "aten.sub"):
                    ops = self._of_rows(index)
                elif name in _JOINS:
                    ops = self._of_halves(index, op)
                elif name == "aten.mul" and self._tensor(op.outputs[0]).dtype.startswith("complex"):
                    ops = self._of_complex(index, op)
                else:
                    continue
            except _NoMatchError:
                continue
            if taken.isdisjoint(ops):
                found = self._with_casts(ops, index)
                taken |= found
                yield tuple(sorted(found))

    # the three spellings

    def _of_rows(self, index: int) -> set[int]:
        """Ops of `x * cos + turned(x) * sin`, where `turned` swaps the halves or neighbours and negates one."""
        ops: set[int] = set()
        terms = self._terms(index, ops)
        if len(terms) != _PAIR:
            raise _NoMatchError
        for (_, x, _), (_, turned, _) in (
            (self._swapped(a, i), self._swapped(b, j)) for a, b in (terms, terms[::-1]) for i in (0, 1) for j in (0, 1)
        ):
            parts = self._parts(turned)
            if parts is None:
                continue
            join, (one, other) = parts
            halves, negated = [], []
            for part in (one, other):
                minus = self._made(part, "aten.neg")
                halves.append(part if minus is None else self.graph.ops[minus].inputs[0])
                negated += [] if minus is None else [minus]
            if len(negated) == 1 and self._are_halves(halves[0], halves[1], x):
                return {*ops, join, *negated}
        raise _NoMatchError

    def _of_halves(self, index: int, op: Op) -> set[int]:
        """Ops of `join(a * cos - b * sin, b * cos + a * sin)`."""
        ops = {index}
        parts = tuple(tensors_of(op.args.get("tensors")))
        if len(parts) != _PAIR:
            raise _NoMatchError
        terms = [self._terms_of(part, ops) for part in parts]
        if any(len(t) != _PAIR for t in terms):
            raise _NoMatchError
        for first in self._orders(terms[0]):
            (plus, a, c), (minus, b, s) = first
            for (one, b2, c2), (other, a2, s2) in self._orders(terms[1]):
                if plus * one == minus * other or not self._are_halves(a, b, None):
                    continue
                if self._are_one(a, a2) and self._are_one(b, b2) and self._share(c, c2) and self._share(s, s2):
                    return ops
        raise _NoMatchError

    def _of_complex(self, index: int, op: Op) -> set[int]:
        """Ops of `view_as_real(view_as_complex(x) * table)`."""
        if len(op.inputs) != _PAIR or self._storage(op.outputs[0]) in self.results:
            raise _NoMatchError
        x, table = sorted(op.inputs, key=lambda t: -self._tensor(t).numel)
        if self._tensor(table).touched_bytes >= self._tensor(x).touched_bytes or self.graph.role(table) is Role.WEIGHT:
            raise _NoMatchError
        viewed = self._made(x, "aten.view_as_complex")
        users = [operator_name(self.graph.ops[user].target) for user in self.flow.users(op.outputs[0])]
        if viewed is None or set(users) != {"aten.view_as_real"}:
            raise _NoMatchError
        return {index}

    # pieces

    def _terms(self, index: int, ops: set[int]) -> list[_Term]:
        """An op as a sum of products."""
        op = self.graph.ops[index]
        name = operator_name(op.target)
        if op.mutates or len(ops) > _MOST:
            raise _NoMatchError
        if name in ("aten.add", "aten.sub"):
            one, other = op.args.get("self"), op.args.get("other")
            if op.args.get("alpha", 1) != 1 or not isinstance(one, TensorRef) or not isinstance(other, TensorRef):
                raise _NoMatchError
            left, right = self._terms_of(one.tensor, ops), self._terms_of(other.tensor, ops)
            sign = -1 if name == "aten.sub" else 1
            ops.add(index)
            return [*left, *((sign * s, a, b) for s, a, b in right)]
        if name == "aten.neg":
            ops.add(index)
            return [(-s, a, b) for s, a, b in self._terms_of(op.inputs[0], ops)]
        if name == "aten.mul" and len(op.inputs) == _PAIR:
            ops.add(index)
            sign, factors = 1, []
            for tensor in op.inputs:
                minus = self._made(tensor, "aten.neg")
                factors.append(tensor if minus is None else self.graph.ops[minus].inputs[0])
                sign *= 1 if minus is None else -1
                ops |= set() if minus is None else {minus}
            return [(sign, factors[0], factors[1])]
        raise _NoMatchError

    def _terms_of(self, tensor: int, ops: set[int]) -> list[_Term]:
        maker = self._paid_maker(tensor, ops)
        if maker is None:
            raise _NoMatchError
        return self._terms(maker, ops)

    def _swapped(self, term: _Term, which: int) -> _Term:
        sign, one, other = term
        return (sign, other, one) if which else term

    def _orders(self, terms: Sequence[_Term]) -> Iterator[tuple[_Term, _Term]]:
        """Two products in either order, each with its factors in either order."""
        for one, other in (terms, terms[::-1]):
            for i in (0, 1):
                for j in (0, 1):
                    yield self._swapped(one, i), self._swapped(other, j)

    def _parts(self, tensor: int) -> tuple[int, list[int]] | None:
        """The op that joined a tensor of two parts, and those."""
        index = self._paid_maker(tensor, set())
        if index is None or operator_name(self.graph.ops[index].target) not in _JOINS:
            return None
        parts = list(tensors_of(self.graph.ops[index].args.get("tensors")))
        return (index, parts) if len(parts) == _PAIR else None

    def _are_halves(self, one: int, other: int, whole: int | None) -> bool:
        """Whether two tensors are different parts, of one shape, of the same rows, and those the `whole`."""
        a, b = self._tensor(self._settled(one)), self._tensor(self._settled(other))
        if a.shape != b.shape or self._root(one) != self._root(other) or a.numel == 0:
            return False
        if a.storage == b.storage and a.offset == b.offset:
            return False
        if whole is None:
            return True
        return self._root(whole) == self._root(one) and self._tensor(whole).numel == _PAIR * a.numel

    def _are_one(self, one: int, other: int) -> bool:
        a, b = self._tensor(one), self._tensor(other)
        return (a.storage, a.offset, a.shape, a.stride) == (b.storage, b.offset, b.shape, b.stride)

    def _share(self, one: int, other: int) -> bool:
        return self._storage(one) == self._storage(other)

    def _settled(self, tensor: int) -> int:
        """A tensor before the casts that were made of it."""
        maker = self.flow.maker(tensor)
        while maker is not None and operator_name(self.graph.ops[maker].target) in _CASTS:
            tensor = self.graph.ops[maker].inputs[0]
            if tensor in self.graph.ops[maker].outputs:
                break
            maker = self.flow.maker(tensor)
        return tensor

    def _root(self, tensor: int) -> int:
        """The storage that a tensor was taken from, through views and casts."""
        for _ in range(_MOST):
            maker = self.flow.maker(tensor)
            if maker is None:
                break
            op = self.graph.ops[maker]
            if tensor in op.inputs or not (self.graph.is_view(op) or operator_name(op.target) in _CASTS):
                break
            tensor = op.inputs[0]
        return self._storage(tensor)

    def _made(self, tensor: int, operator: str) -> int | None:
        """The op of this operator that made a tensor, through views."""
        for _ in range(_MOST):
            maker = self.flow.maker(tensor)
            if maker is None:
                return None
            op = self.graph.ops[maker]
            if operator_name(op.target) == operator:
                return maker
            if tensor in op.inputs or not self.graph.is_view(op):
                return None
            tensor = op.inputs[0]
        return None

    def _paid_maker(self, tensor: int, ops: set[int]) -> int | None:
        """The op that made a tensor, through views and casts; the casts are added to the ops."""
        for _ in range(_MOST):
            maker = self.flow.maker(tensor)
            if maker is None:
                return None
            op = self.graph.ops[maker]
            if tensor in op.inputs:
                return None
            if not self.graph.is_view(op):
                if operator_name(op.target) not in _CASTS:
                    return maker
                ops.add(maker)
            tensor = op.inputs[0]
        return None

    # what belongs to it besides

    def _with_casts(self, ops: Set[int], last: int) -> set[int]:
        """A rotation with the casts before and after it, and the join with elements that are not turned."""
        found = set(ops)
        while True:
            more = (self._casts_before(found) | self._after(found, last)) - self.own
            if not more:
                return found
            found |= more
            last = max(last, *more)

    def _casts_before(self, ops: Set[int]) -> set[int]:
        casts: set[int] = set()
        for index in ops:
            for tensor in self.graph.ops[index].inputs:
                maker = self._cast_behind(tensor)
                if maker is not None and maker not in ops and self._takers(self.graph.ops[maker].outputs[0]) <= ops:
                    casts.add(maker)
        return casts

    def _cast_behind(self, tensor: int) -> int | None:
        for _ in range(_MOST):
            maker = self.flow.maker(tensor)
            if maker is None or tensor in self.graph.ops[maker].inputs:
                return None
            op = self.graph.ops[maker]
            if not self.graph.is_view(op):
                return maker if operator_name(op.target) in _CASTS else None
            tensor = op.inputs[0]
        return None

    def _after(self, ops: Set[int], last: int) -> set[int]:
        (out,) = self.graph.ops[last].outputs
        takers = self._takers(out)
        if len(takers) != 1 or self._storage(out) in self.results:
            return set()
        (user,) = takers
        op = self.graph.ops[user]
        name = operator_name(op.target)
        if name in _CASTS and "float" in self._tensor(op.outputs[0]).dtype:
            return {user}
        if name in _JOINS and len(op.inputs) == _PAIR:
            rest = next((t for t in op.inputs if self._storage(t) != self._storage(out)), None)
            roots = {self._root(t) for index in ops for t in self.graph.ops[index].inputs}
            if rest is not None and self._root(rest) in roots:
                return {user}
        return set()

    def _takers(self, tensor: int) -> Set[int]:
        """Ops that take a tensor, through views; found once, since all layers share the tables."""
        if tensor not in self.taken:
            self.taken[tensor] = self._found_takers(tensor)
        return self.taken[tensor]

    def _found_takers(self, tensor: int) -> Set[int]:
        found: set[int] = set()
        waiting, seen = [tensor], {tensor}
        while waiting:
            for user in self.flow.users(waiting.pop()):
                op = self.graph.ops[user]
                if not self.graph.is_view(op):
                    found.add(user)
                    continue
                new = [t for t in op.outputs if t not in seen]
                seen.update(new)
                waiting += new
        return found

    def _tensor(self, tensor: int) -> Tensor:
        return self.graph.tensors[tensor]

    def _storage(self, tensor: int) -> int:
        return self.graph.tensors[tensor].storage


_MOST = 12
"""Views and casts in a row, and ops of a sum of products, that are followed."""
