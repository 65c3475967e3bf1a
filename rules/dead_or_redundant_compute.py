"""Work whose result nobody needs: unused, computed again, or dropout at inference.

**What it checks.** Ops whose results reach neither what the phase returns, nor a cache, nor the host. Ops computed
again from the same arguments, with nothing changed in between and nothing random in them: rotary tables or a causal
mask made anew in every layer. Dropout that is on: `F.dropout(x, p)` without `training=self.training`, or a `dropout_p`
of attention that is not 0 at inference.

**Why it costs.** Eager PyTorch runs what it is told. Each of these reads, writes and launches as any other op, and work
that is repeated in each layer is paid once a layer. Dropout at inference also makes results random and wrong.

**How it is estimated.** Unused ops go, with all that only they needed. Of equal results the first is used everywhere;
what is merely filled with a number again is left alone. Dropout passes on what it is given, and attention runs without
it.

**Remedy.** Remove it; compute shared tables once, before the layers, and pass them on; give dropout the mode it is in.

    cos, sin = self.rotary(position_ids)  # once a step
    for layer in self.layers:
        x = layer(x, cos, sin)

    x = F.dropout(x, self.p, training=self.training)

**When to ignore.** Results that code outside the traced forward reads, such as hooks; dropout that is meant, as for
uncertainty estimates. A compiled model drops what is unused by itself, but not all that is repeated.

**References.** Aho, Lam, Sethi and Ullman, "Compilers: Principles, Techniques, and Tools" (2006), section 9.1; PyTorch
documentation of `torch.nn.functional.dropout` and `torch.nn.functional.scaled_dot_product_attention`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from ..analyzer.cost import Status, operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, Graph, Op, TensorRef
from ..analyzer.rewrite import Draft
from ._rotary import rotations
from .decomposed_norm import found as norms

_UNUSED = Remedy(text="Remove it, or use what it computes.")
_REPEATED = Remedy(
    text="Compute it once and pass it on.",
    code="cos, sin = self.rotary(position_ids)  # once a step\nfor layer in self.layers:\n    x = layer(x, cos, sin)",
)
_DROPOUT = Remedy(
    text="Tell dropout the mode that the module is in, and call model.eval() before inference.",
    code="x = F.dropout(x, self.p, training=self.training)",
)
_ATTENTION = Remedy(
    text="Attention drops nothing at inference.",
    code="out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)",
)


@rule("FUS007", "dead-or-redundant-compute", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Unused results, results computed again, and dropout."""
    yield from _unused(situation)
    yield from _repeated(situation)
    yield from _dropout(situation)


def _unused(situation: Situation) -> Iterator[Match]:
    # what a condition of a loop or a function inside a kernel returns is used where the graph does not show it
    graph = situation.graph
    idle = {i for i in graph.idle if _is_plain(graph.ops[i])}
    for ops in _connected(situation, idle):
        paid = [i for i in ops if situation.costs[i].status is not Status.FREE]
        if paid and not _is_asked_for(graph, ops[-1]) and not _is_a_mere_number(graph, paid):
            yield Match(
                op=ops[-1],
                message="nobody needs what is computed here",
                evidence=_size(situation, ops),
                remedy=_UNUSED,
                rewrite=_without(ops),
            )


def _is_asked_for(graph: Graph, index: int) -> bool:
    """Whether the host may have read a result: the trace answers `if mask.all():` itself where it knows the values."""
    found = [graph.tensors[i] for i in graph.ops[index].outputs]
    return any(tensor.dtype == "bool" and tensor.numel == 1 for tensor in found)


def _is_a_mere_number(graph: Graph, ops: Iterable[int]) -> bool:
    """Whether nothing but a few numbers is made: no line is worth changing for that."""
    made = [(bool(graph.ops[i].inputs), graph.tensors[t].nbytes) for i in ops for t in graph.ops[i].outputs]
    return not any(inputs for inputs, _ in made) and sum(nbytes for _, nbytes in made) < _FEW_BYTES


_FEW_BYTES = 4096
"""Below it a kernel costs its launch and nothing else."""


def _repeated(situation: Situation) -> Iterator[Match]:
    graph = situation.graph
    again = situation.once(_Values).again
    for ops in situation.once(repeated):
        yield Match(
            op=next(i for i in reversed(ops) if situation.costs[i].status is not Status.FREE),
            message="the same is computed again from the same arguments",
            evidence=_size(situation, ops),
            remedy=_REPEATED,
            rewrite=_hoisted(
                ops, {old: new for i in ops for old, new in zip(graph.ops[i].outputs, again[i], strict=True)}
            ),
        )


def repeated(situation: Situation) -> tuple[tuple[int, ...], ...]:
    """Groups of ops that compute again what others did."""
    graph = situation.graph
    found: list[tuple[int, ...]] = []
    spelt_out = {
        *chain.from_iterable(situation.once(rotations)),
        *chain.from_iterable(norm.ops for norm in situation.once(norms)),
    }
    for ops in _connected(situation, situation.once(_Values).again.keys()):
        if not spelt_out.isdisjoint(ops):  # whose remedy takes it along
            continue
        # to read what was filled once is no better than to fill it again
        if not all(situation.costs[i].status is Status.FREE or not graph.ops[i].inputs for i in ops):
            found.append(ops)
    return tuple(found)


def _dropout(situation: Situation) -> Iterator[Match]:
    graph = situation.graph
    for index, op in enumerate(graph.ops):
        name = operator_name(op.target).removesuffix("_")
        if name == _SDPA:
            p = op.args.get("dropout_p")
            if isinstance(p, float | int) and p > 0:
                yield Match(
                    op=index,
                    message=f"attention drops {p:.0%} of its weights at inference",
                    evidence={"p": p},
                    remedy=_ATTENTION,
                    rewrite=_keeping_all(index),
                    always=True,
                )
        elif name in _DROPOUTS and op.args.get("train") and _is_above_zero(op.args.get("p")):
            yield Match(
                op=index,
                message="dropout is on at inference",
                evidence=_size(situation, (index,)),
                remedy=_DROPOUT,
                rewrite=_passed_on(index),
                always=True,
            )


_SDPA = "aten.scaled_dot_product_attention"
_DROPOUTS = frozenset({"aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout"})
_RANDOM = (
    "aten.rand", "aten.bernoulli", "aten.multinomial", "aten.normal", "aten.poisson", "aten.binomial", "aten.empty",
    "aten.new_empty", "aten.native_dropout", "aten.rrelu", "aten._fused_dropout", "aten.gumbel", "aten._standard_gamma",
    "aten._sample_dirichlet", "higher_order.", "triton.",
)  # fmt: skip
"""Beginnings of operators whose results differ from call to call, or of which nothing is known."""


def _is_above_zero(p: Arg) -> bool:
    return isinstance(p, float | int) and p > 0


def _is_plain(op: Op) -> bool:
    return not op.branch and not op.kernel and op.repeat == 1


def _size(situation: Situation, ops: Iterable[int]) -> dict[str, int | float]:
    done = [i for i in ops if situation.costs[i].status is not Status.FREE]
    moved = [situation.analysis.ops[i] for i in done]
    return {"ops": len(done), "bytes": sum(op.bytes_read + op.bytes_written for op in moved)}


class _Values:
    """Which ops compute what an earlier one computed.

    Attributes:
        again: by op, the results of the earlier one that are equal to its own, in order.
    """

    def __init__(self, situation: Situation) -> None:
        self.graph = situation.graph
        self.again: dict[int, tuple[int, ...]] = {}
        written = {self.graph.tensors[i].storage for op in self.graph.ops for i in self.graph.mutated(op)}
        returned = {self.graph.tensors[i].storage for i in self.graph.outputs}
        # what is written to later is not shared, nor two results that the caller may write to
        self.apart = written | returned
        self.written = written
        self.versions: dict[int, int] = defaultdict(int)
        self.first: dict[int, int] = {}  # by tensor, the first one of equal value
        known: dict[object, tuple[int, ...]] = {}
        for index, op in enumerate(self.graph.ops):
            for tensor in self.graph.mutated(op):
                self.versions[self.graph.tensors[tensor].storage] += 1
            if not self._may_be_shared(op):
                continue
            results = known.setdefault(self._named(op), op.outputs)
            if results != op.outputs and self._are_alike(results, op.outputs):
                self.first.update(zip(op.outputs, (self.first.get(i, i) for i in results), strict=True))
                self.again[index] = results

    def _may_be_shared(self, op: Op) -> bool:
        if not op.outputs or op.mutates or not _is_plain(op) or op.target.startswith(_RANDOM):
            return False
        if op.args.get("train") or (op.target.startswith(_SDPA) and op.args.get("dropout_p")):
            return False
        return all(self.graph.tensors[i].storage not in self.written for i in op.outputs)

    def _named(self, op: Op) -> object:
        # what two lines make of numbers alone is equal by the coincidence of this scenario's sizes
        line = None if op.inputs or op.span is None else (op.span.file, op.span.line)
        return op.target, tuple([(name, self._value(value)) for name, value in op.args.items()]), line

    def _value(self, value: Arg) -> object:
        if isinstance(value, TensorRef):
            tensor = self.first.get(value.tensor, value.tensor)
            home = self.graph.tensors[tensor].storage
            return ("tensor", tensor, self.versions.get(home, 0))
        if isinstance(value, tuple):
            return tuple([self._value(v) for v in value])
        return type(value), value

    def _are_alike(self, ones: tuple[int, ...], others: tuple[int, ...]) -> bool:
        tensors = self.graph.tensors
        return len(ones) == len(others) and all(
            (tensors[a].shape, tensors[a].stride, tensors[a].dtype)
            == (tensors[b].shape, tensors[b].stride, tensors[b].dtype)
            and tensors[b].storage not in self.apart
            for a, b in zip(ones, others, strict=True)
        )


def _connected(situation: Situation, ops: Iterable[int]) -> list[tuple[int, ...]]:
    """Ops that hang together by what they hand on, in order."""
    flow, graph = situation.flow, situation.graph
    group: dict[int, int] = {}
    for index in sorted(ops):
        near = {group[m] for i in graph.ops[index].inputs if (m := flow.maker(i)) in group}
        group[index] = min(near, default=index)
        if len(near) > 1:
            group.update({i: group[index] for i, g in group.items() if g in near})
    found: dict[int, list[int]] = {}
    for index in sorted(group):
        found.setdefault(group[index], []).append(index)
    return [tuple(members) for members in found.values()]


def _without(ops: tuple[int, ...]) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim(ops):
            draft.remove(ops)

    return rewrite


def _hoisted(ops: tuple[int, ...], equal: dict[int, int]) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim(ops):
            for old, new in equal.items():
                draft.substitute(old, draft.standing_for(new))

    return rewrite


def _passed_on(index: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim((index,)):
            return
        op = draft.graph.ops[index]
        if op.mutates:
            draft.remove((index,))
        else:
            draft.substitute(op.outputs[0], op.inputs[0])

    return rewrite


def _keeping_all(index: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim((index,)):
            op = draft.graph.ops[index]
            draft.replace(index, replace(op, args={**op.args, "dropout_p": 0.0}))

    return rewrite
