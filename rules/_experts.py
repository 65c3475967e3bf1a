"""Finds mixtures of experts in which every expert computes every token, from the `topk` that chooses to the sum.

Shapes: N tokens, E experts of which k are chosen for each token; x (N, C), flattened over whatever leads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf, nan, prod

from ..analyzer.cost import operator_name
from ..analyzer.finding import Situation
from ..analyzer.graph import Arg, Op, Role, TensorRef, tensor_of
from ..analyzer.rewrite import is_elementwise
from ._masks import HIDDEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A matrix product of a body: the weights of its experts, each (out, in) if `transposed`, and their biases.

    One tensor of three dimensions stands for all experts, or one of two for each.
    """

    weights: tuple[int, ...]
    biases: tuple[int, ...] = ()
    transposed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMixture:
    """A mixture of experts that computes every expert for every token.

    Attributes:
        source: x.
        indices: experts chosen, (..., k).
        gates: what their results are multiplied by, (..., k).
        experts: E.
        chosen: k.
        body: ops of one expert in order, from `entry` to `result`.
        entry: what the body is given.
        result: what it returns.
        products: those of the body's ops that multiply, by index.
        scaled_before: true where what experts are given is multiplied by the gates, not what they return.
        last: the op whose result is the sum over experts.
        sums: ops that add up in place or not, and what they begin with; `last` among them.
        ops: all ops that are left out.
    """

    source: int
    indices: int
    gates: int
    experts: int
    chosen: int
    body: tuple[int, ...]
    entry: int
    result: int
    products: dict[int, Product]
    scaled_before: bool
    last: int
    sums: tuple[int, ...]
    ops: tuple[int, ...]


def found(situation: Situation) -> tuple[DenseMixture, ...]:
    """All of a phase."""
    graph = situation.graph
    mixtures: list[DenseMixture] = []
    for index, op in enumerate(graph.ops):
        if operator_name(op.target) != "aten.topk" or len(op.outputs) != _VALUES_AND_INDICES:
            continue
        router = _Router(situation, index)
        mixture = router.looped() or router.batched() if router.chooses else None
        if mixture is not None and router.keeps_to_itself(mixture):
            mixtures.append(mixture)
    return tuple(mixtures)


_VALUES_AND_INDICES = 2
_FEWEST = 4
"""Experts below which a mixture looks like any pair of branches."""


class _Router:
    """A `topk` over experts, and what is derived from its choice."""

    def __init__(self, situation: Situation, index: int) -> None:
        self.situation, self.graph, self.flow = situation, situation.graph, situation.flow
        op = self.graph.ops[index]
        scores = self.graph.tensors[op.inputs[0]]
        dim, k = op.args.get("dim", -1), op.args.get("k")
        self.index = index
        self.values, self.indices = op.outputs
        self.experts = scores.shape[-1] if scores.shape else 0
        self.chosen = k if isinstance(k, int) else 0
        self.tokens = prod(scores.shape[:-1])
        last = isinstance(dim, int) and dim % max(len(scores.shape), 1) == len(scores.shape) - 1
        self.chooses = last and 0 < self.chosen < self.experts and self.experts >= _FEWEST
        if self.chooses:
            self.gate = self._masks()

    def _masks(self) -> set[int]:
        """Tensors that are zero for the experts that were not chosen."""
        zero: set[int] = set()
        hidden: set[int] = set()  # minus infinity there, which softmax and sigmoid turn into zero
        choice = {self.indices}
        waiting = [self.indices]
        while waiting:
            tensor = waiting.pop()
            for user in self.flow.users(tensor):
                op = self.graph.ops[user]
                kind = self._mask_of(op, tensor, choice, zero, hidden)
                if kind is None or any(self._is_computed(i) for i in op.inputs):
                    continue
                waiting += [i for i in op.outputs if i not in kind]
                kind.update(op.outputs)
        return zero

    def _mask_of(self, op: Op, tensor: int, choice: set[int], zero: set[int], hidden: set[int]) -> set[int] | None:
        """Which of these sets the result of an op on a tensor of one of them belongs to."""
        name = operator_name(op.target).removesuffix("_")
        of = next(kind for kind in (choice, zero, hidden) if tensor in kind)
        if name.removeprefix("aten.") in _VIEWS:
            return of
        if of is choice:
            if name in ("aten.eq", "aten.one_hot"):
                return zero
            if name in ("aten.scatter", "aten.scatter_add") and tensor_of(op.args.get("index")) == tensor:
                return {0.0: zero, -inf: hidden}.get(self._filled(op.args.get("self")))
            return None
        if of is hidden:
            return zero if name in ("aten.softmax", "aten.sigmoid") else None
        if name == "aten.where" and tensor_of(op.args.get("condition")) == tensor:
            return {0.0: zero, -inf: hidden}.get(self._filled(op.args.get("other")))
        if name == "aten.div" and tensor_of(op.args.get("self")) != tensor:
            return None
        return zero if name in ("aten.mul", "aten.div", "aten.sum", "aten.any") else None

    def _filled(self, value: Arg) -> float:
        """The number that a tensor is full of; not a number where it is not."""
        if isinstance(value, TensorRef):
            maker = self.flow.maker(value.tensor)
            if maker is None:
                return nan
            op = self.graph.ops[maker]
            name = operator_name(op.target)
            if name in _ZEROS:
                return 0.0
            value = op.args.get("fill_value", op.args.get("s")) if name in _FILLED else None
        number = float(value) if isinstance(value, int | float) or value in ("-inf", "inf") else nan
        return -inf if number <= HIDDEN else number

    def _is_computed(self, tensor: int) -> bool:
        """Whether a tensor has rows of something else than choices."""
        of = self.graph.tensors[tensor]
        width, tokens = (of.shape or (1,))[-1], self.tokens
        choices = {1, self.experts, self.chosen, self.experts * self.chosen}
        return width > max(self.experts, self.chosen) and of.numel not in {tokens * size for size in choices}

    def gates(self) -> int:
        """The weights of the chosen: the last tensor of their shape that follows from the values alone."""
        shape = self.graph.tensors[self.values].shape
        known, best = {self.values}, self.values
        for index in range(self.index + 1, min(self.index + _REACH, len(self.graph.ops))):
            op = self.graph.ops[index]
            name = operator_name(op.target).removesuffix("_")
            if not known & set(op.inputs) or name not in _RESCALING or not set(op.inputs) <= known:
                continue
            known.update(op.outputs)
            if op.outputs and self.graph.tensors[op.outputs[0]].shape == shape:
                best = op.outputs[0]
        return best

    def looped(self) -> DenseMixture | None:
        """One expert after the other, or side by side in a `stack`."""
        shares = self._shares()
        if len(shares) != self.experts:
            return None
        bodies = [self._body(result) for _, result in shares]
        first = bodies[0]
        if first is None or any(body is None or body[0] != first[0] for body in bodies):
            return None
        kinds = self.graph.kinds
        lists = [body[1] for body in bodies if body is not None]
        if any([kinds[i] for i in ops] != [kinds[i] for i in lists[0]] for ops in lists):
            return None
        products: dict[int, Product] = {}
        for place, index in enumerate(lists[0]):
            if operator_name(self.graph.ops[index].target) == "aten.linear":
                calls = [self.graph.ops[ops[place]].args for ops in lists]
                weights = [tensor_of(args["weight"]) for args in calls]
                biases = [tensor_of(args.get("bias")) for args in calls]
                products[index] = Product(
                    weights=tuple([w for w in weights if w is not None]),
                    biases=tuple([b for b in biases if b is not None]),
                )
        used = {w for product in products.values() for w in product.weights}
        if not products or len(used) != self.experts * len(products):
            return None
        end = self._sum([index for index, _ in shares])
        if end is None or not self._is_token_wise(first[0]):
            return None
        return DenseMixture(
            source=first[0],
            indices=self.indices,
            gates=self.gates(),
            experts=self.experts,
            chosen=self.chosen,
            body=tuple(lists[0]),
            entry=first[0],
            result=shares[0][1],
            products=products,
            scaled_before=False,
            last=end[0],
            sums=end[1],
            ops=tuple(sorted({*end[1], *(i for i, _ in shares), *(i for ops in lists for i in ops)})),
        )

    def keeps_to_itself(self, mixture: DenseMixture) -> bool:
        """Whether nobody but the sum uses what experts return."""
        inside = set(mixture.ops)
        total = self.graph.ops[mixture.last].outputs[0]
        waiting = [i for index in mixture.ops if index != mixture.last for i in self.graph.ops[index].outputs]
        seen = {total}
        while waiting:
            tensor = waiting.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            if tensor in self.flow.results:
                return False
            for user in set(self.flow.users(tensor)) - inside:
                if not self.graph.is_view(self.graph.ops[user]):
                    return False
                waiting += self.graph.ops[user].outputs
        return True

    def _shares(self) -> list[tuple[int, int]]:
        """Products of a gate and what an expert returns: the op, and what it returns."""
        shares: list[tuple[int, int]] = []
        for gate in sorted(self.gate):
            if self.graph.tensors[gate].numel != self.tokens:
                continue
            for user in self.flow.users(gate):
                op = self.graph.ops[user]
                others = [i for i in op.inputs if i != gate]
                if operator_name(op.target) != "aten.mul" or len(others) != 1 or others[0] in self.gate:
                    continue
                if self.graph.tensors[others[0]].numel > self.tokens:
                    shares.append((user, others[0]))
        return sorted(set(shares))

    def _body(self, result: int) -> tuple[int, list[int]] | None:
        """What an expert is given, and its ops, from what it returns."""
        ops: set[int] = set()
        entries: set[int] = set()
        waiting = [result]
        while waiting:
            tensor = waiting.pop()
            maker = self.flow.maker(tensor)
            if maker in ops:
                continue
            if len(self.flow.users(tensor)) >= self.experts or maker is None:
                entries.add(tensor)
                continue
            op = self.graph.ops[maker]
            if len(ops) > _LONGEST or not self._is_of_a_body(op):
                return None
            ops.add(maker)
            waiting += [i for i in op.inputs if self.graph.role(i) is not Role.WEIGHT]
        return (entries.pop(), sorted(ops)) if len(entries) == 1 and ops else None

    def _is_of_a_body(self, op: Op) -> bool:
        """A product with weights, or what treats every row alike."""
        if op.mutates or op.branch or op.repeat != 1:
            return False
        name = operator_name(op.target)
        if name == "aten.linear":
            weight = tensor_of(op.args["weight"])
            return weight is not None and self.graph.role(weight) is Role.WEIGHT
        if name == "aten.bmm":
            weight = tensor_of(op.args["mat2"])
            return weight is not None and self.graph.role(weight) is Role.WEIGHT
        if name in _PARTS:
            rank = len(self.graph.tensors[op.inputs[0]].shape)
            return self.graph.is_view(op) and op.args.get("dim") in (-1, rank - 1)
        return is_elementwise(op)

    def _is_token_wise(self, tensor: int) -> bool:
        shape = self.graph.tensors[tensor].shape
        return len(shape) > 1 and prod(shape[:-1]) == self.tokens

    def _sum(self, shares: list[int]) -> tuple[int, tuple[int, ...]] | None:
        """The op that adds the last share, and all that add; None where more than shares is added."""
        parts = {self.graph.ops[i].outputs[0] for i in shares}
        adding: list[int] = []
        total: int | None = None
        for share in shares:
            user = self.flow.only_user(self.graph.ops[share].outputs[0])
            if user is None:
                return None
            if user in adding:  # which adds the first two
                continue
            op = self.graph.ops[user]
            rest = {i for i in op.inputs if i not in parts}
            if operator_name(op.target) not in ("aten.add", "aten.add_") or op.args.get("alpha", 1) != 1:
                return None
            if total is None:
                begun = self._begun(rest)
                if begun is None:
                    return None
                adding += begun
            elif rest != {total}:
                return None
            total = op.outputs[0]
            adding.append(user)
        return (adding[-1], tuple(adding)) if adding else None

    def _begun(self, rest: Iterable[int]) -> list[int] | None:
        """The op that makes the zeros that a sum begins with; nothing where it begins with the first share."""
        rest = list(rest)
        if not rest:
            return []
        maker = self.flow.maker(rest[0])
        if len(rest) != 1 or maker is None:
            return None
        name = operator_name(self.graph.ops[maker].target)
        return [maker] if name in _ZEROS else None

    def batched(self) -> DenseMixture | None:
        """All experts in batched products over copies of the tokens."""
        for index in range(self.index + 1, min(self.index + _REACH, len(self.graph.ops))):
            if self._is_over_all(self.graph.ops[index]):
                return self._from_first_product(index)
        return None

    def _is_over_all(self, op: Op) -> bool:
        if operator_name(op.target) != "aten.bmm":
            return False
        rows, weight = (tensor_of(op.args[name]) for name in ("self", "mat2"))
        if rows is None or weight is None or self.graph.role(weight) is not Role.WEIGHT:
            return False
        return self.graph.tensors[rows].shape[:2] == (self.experts, self.tokens)

    def _from_first_product(self, index: int) -> DenseMixture | None:
        graph = self.graph
        entry = graph.ops[index].inputs[0]
        before = self._before(entry)
        if before is None:
            return None
        source, scaled, first_ops = before
        body = list(self._forward(entry))
        if not body:
            return None
        result = graph.ops[body[-1]].outputs[0]
        after = self._after(result, scaled=scaled)
        if after is None or (scaled and not self._keeps_zeros(entry, body)):
            return None
        last, last_ops = after
        products = {
            i: Product(weights=(graph.ops[i].inputs[1],), transposed=False)
            for i in body
            if operator_name(graph.ops[i].target) == "aten.bmm"
        }
        return DenseMixture(
            source=source,
            indices=self.indices,
            gates=self.gates(),
            experts=self.experts,
            chosen=self.chosen,
            body=tuple(body),
            entry=entry,
            result=result,
            products=products,
            scaled_before=scaled,
            last=last,
            sums=(last,),
            ops=tuple(sorted({*first_ops, *body, *last_ops})),
        )

    def _before(self, entry: int) -> tuple[int, bool, list[int]] | None:
        """The tokens that were copied for every expert, whether they were scaled by gates, and the ops of that."""
        ops: list[int] = []
        scaled = False
        tensor = entry
        while True:
            maker = self.flow.maker(tensor)
            if maker is None:
                return None
            op = self.graph.ops[maker]
            ops.append(maker)
            name = operator_name(op.target)
            if name == "aten.mul" and not scaled:
                others = [i for i in op.inputs if i not in self.gate]
                if len(others) != 1 or len(op.inputs) != _VALUES_AND_INDICES:
                    return None
                scaled, tensor = True, others[0]
            elif name in ("aten.repeat", "aten.expand"):
                source = op.inputs[0]
                while self.graph.tensors[source].shape[0] == 1 and len(self.graph.tensors[source].shape) > _MATRIX:
                    under = self.flow.maker(source)
                    if under is None or not self.graph.is_view(self.graph.ops[under]):
                        break
                    source = self.graph.ops[under].inputs[0]
                shape = self.graph.tensors[source].shape
                copies = self.graph.tensors[op.outputs[0]].numel // max(self.graph.tensors[source].numel, 1)
                fits = prod(shape[:-1]) == self.tokens and copies == self.experts
                return (source, scaled, ops) if fits else None
            elif name in ("aten.view", "aten.reshape", "aten.contiguous", "aten.to"):
                tensor = op.inputs[0]
            else:
                return None

    def _forward(self, entry: int) -> Iterator[int]:
        """The ops of the body: from the first product to the last."""
        reached = {entry}
        seen: list[int] = []
        last = -1
        start = self.flow.users(entry)[0]
        for index in range(start, min(start + _LONGEST, len(self.graph.ops))):
            op = self.graph.ops[index]
            given = {i for i in op.inputs if self.graph.role(i) is not Role.WEIGHT}
            if not given & reached:
                continue
            if not given <= reached or not self._is_of_a_body(op):
                break
            seen.append(index)
            reached.update(op.outputs)
            if operator_name(op.target) == "aten.bmm":
                last = index
        yield from (i for i in seen if i <= last)

    def _keeps_zeros(self, entry: int, body: list[int]) -> bool:
        """Whether a body returns zeros for zeros: an expert that was given nothing must return nothing."""
        zeros = {entry}
        for index in body:
            op = self.graph.ops[index]
            name = operator_name(op.target)
            given = [i in zeros for i in op.inputs]
            numbers = [op.args.get(side) for side in ("self", "other") if isinstance(op.args.get(side), int | float)]
            if name in ("aten.mul", "aten.bmm"):
                kept = any(given)
            elif name in ("aten.add", "aten.sub"):
                kept = all(given) and not any(numbers)
            else:
                kept = all(given) and (name in _ZERO_AT_ZERO or self.graph.is_view(op))
            if kept:
                zeros.update(op.outputs)
        return self.graph.ops[body[-1]].outputs[0] in zeros

    def _after(self, result: int, *, scaled: bool) -> tuple[int, list[int]] | None:
        """The sum over experts, and the ops up to it; gates are multiplied in on the way unless they were before."""
        ops: list[int] = []
        tensor = result
        while True:
            user = self.flow.only_user(tensor)
            if user is None:
                users = [u for u in self.flow.users(tensor) if not self.graph.is_view(self.graph.ops[u])]
                if len(users) != 1 or tensor in self.flow.results:
                    return None
                (user,) = users
            op = self.graph.ops[user]
            ops.append(user)
            name = operator_name(op.target)
            if name == "aten.mul" and not scaled and any(i in self.gate for i in op.inputs):
                scaled = True
            elif name == "aten.sum" and scaled and op.args.get("dim") in ((0,), 0) and not op.args.get("keepdim"):
                shape = self.graph.tensors[op.inputs[0]].shape
                return (user, ops) if shape[0] == self.experts and prod(shape[1:-1]) == self.tokens else None
            elif not self.graph.is_view(op):
                return None
            tensor = op.outputs[0]


_MATRIX = 2
_REACH = 400
"""Ops after a `topk` among which its experts are looked for, if they are batched."""
_LONGEST = 40
"""Ops of one expert."""
_PARTS = ("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.slice", "aten.narrow", "aten.tensor_split")
_ZEROS = ("aten.zeros", "aten.zeros_like", "aten.new_zeros")
_FILLED = ("aten.full", "aten.full_like", "aten.new_full", "aten.scalar_tensor")
_VIEWS = (
    "view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "t", "expand", "select", "slice", "unbind",
    "chunk", "split", "flatten", "contiguous", "clone", "to", "type_as",
)  # fmt: skip
_RESCALING = frozenset(
    f"aten.{name}" for name in (*_VIEWS, "sum", "div", "mul", "add", "softmax", "sigmoid", "clamp", "clamp_min")
)
"""Ops that make weights of the chosen values."""
_ZERO_AT_ZERO = frozenset(
    f"aten.{name}"
    for name in ("silu", "gelu", "relu", "relu6", "tanh", "neg", "abs", "square", "to", "type_as", "clone")
)
