"""Logits are computed for every position of the prompt, and only those of the last choose the next token.

**What it checks.** In a phase that prepares or continues generation, a product with a weight that has at least as many
rows as columns, at every position of the sequence, whose result only goes through ops that treat each position alone
(casts, scaling, soft caps) and is returned, or of which the program itself keeps the last position. In decode that is
so only for models without a KV cache.

**Why it costs.** The head has one row for every word of the vocabulary: it is often the largest product of the model.
Batch x positions x vocabulary numbers are computed and written, and read and written again where they are cast or
capped; at a long prompt they can be the largest tensor of all.

**How it is estimated.** The hidden states are cut to their last position before the head, and before what treats each
position alone on the way to it, such as the final norm. All that follows runs on one position a sequence.

**Remedy.** Slice before the head.

    logits = self.lm_head(self.norm(x[:, -1:]))

With transformers: `model(input_ids, logits_to_keep=1)`, as `generate` does.

**When to ignore.** When the prompt itself is scored (perplexity, log probabilities of a given text), or drafted tokens
are verified.

**References.** transformers documentation, `logits_to_keep` of `CausalLM.forward`; Karpathy, nanoGPT, "inference-time
mini-optimization: only forward the lm_head on the very last position" (model.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, Graph, Op, Role, Tensor, TensorRef
from ..analyzer.rewrite import Draft, Flow, contiguous, on
from ..analyzer.sdpa import dense_stride

_REMEDY = Remedy(
    text="Slice the hidden states to the last position before the head.",
    code="logits = self.lm_head(self.norm(x[:, -1:]))  # with transformers: model(..., logits_to_keep=1)",
)


@rule("WGT005", "lm-head-on-every-position", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every head whose result is returned, or cut to its last position after it was computed."""
    graph = situation.graph
    if graph.phase != "prefill" and not (graph.phase == "decode" and _keeps_nothing(graph)):
        return
    rows = _rows(graph)
    if rows is None:
        return
    finder = _Finder(graph, situation.flow, rows)
    for index, op in enumerate(graph.ops):
        source = _SOURCES.get(operator_name(op.target))
        if source is None:
            continue
        head = finder.head(index, source)
        if head is None:
            continue
        logits = graph.tensors[op.outputs[0]]
        yield Match(
            op=index,
            message=f"the head computes logits for {rows[1]} positions of a sequence, and the last is used",
            evidence={
                "logits_bytes": logits.nbytes,
                "needed_bytes": logits.nbytes // rows[1],
                "positions": rows[1],
                "vocabulary": logits.shape[-1],
            },
            remedy=_REMEDY,
            rewrite=_on_last(head, rows[1]),
        )


_SOURCES = {"aten.linear": "input", "aten.matmul": "self", "fxroof.linear_packed": "x"}
"""Products that a head may be, and the argument that takes hidden states."""
_LONGEST = 64
"""Ops between the last that mixes positions and the head, at most: a norm spelt out has some ten."""

_POSITIONWISE = frozenset(
    f"aten.{name}"
    for name in (
        "to", "_to_copy", "type_as", "float", "add", "sub", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt",
        "tanh", "sigmoid", "gelu", "silu", "relu", "clamp", "exp", "log", "dropout", "layer_norm", "rms_norm",
        "_fused_rms_norm", "clone", "contiguous", "detach",
    )
)  # fmt: skip
_OVER_LAST = frozenset({"aten.mean", "aten.var", "aten.sum", "aten.softmax", "aten.log_softmax"})


def _keeps_nothing(graph: Graph) -> bool:
    return all(storage.role is not Role.KV_CACHE for storage in graph.storages)


def _rows(graph: Graph) -> tuple[int, int] | None:
    """Sequences, and positions of each, of the tokens that the phase is given; None for one position."""
    for tensor in graph.inputs:
        given = graph.tensors[tensor]
        if given.dtype in ("int64", "int32") and len(given.shape) == _MATRIX and given.numel == graph.tokens:
            return (given.shape[0], given.shape[1]) if given.shape[1] > 1 else None
    return None


_MATRIX = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """A head with what treats each position alone around it.

    Attributes:
        entry: hidden states (B, S, d) that are cut.
        before: ops from there to the head, in order.
        index: the head.
        after: ops from there to what is returned, in order.
        cut: the op that keeps the last position today; None where all are returned.
    """

    entry: int
    before: tuple[int, ...]
    index: int
    after: tuple[int, ...]
    cut: int | None

    @property
    def ops(self) -> tuple[int, ...]:
        return (*self.before, self.index, *self.after)


class _Finder:
    """Finds heads in one phase of B sequences of S positions."""

    def __init__(self, graph: Graph, flow: Flow, rows: tuple[int, int]) -> None:
        self.graph, self.flow, self.rows = graph, flow, rows

    def head(self, index: int, source: str) -> _Head | None:
        """The head that an op is, if it is one."""
        op = self.graph.ops[index]
        hidden = op.args.get(source)
        if len(op.outputs) != 1 or not isinstance(hidden, TensorRef) or not self._has_rows(hidden.tensor):
            return None
        logits, inner = self.graph.tensors[op.outputs[0]], self.graph.tensors[hidden.tensor].shape[-1]
        if not self._has_rows(op.outputs[0]) or logits.shape[-1] <= inner or op.repeat > 1 or op.branch:
            return None
        others = [t for t in op.inputs if t != hidden.tensor]
        if not others or any(self.graph.role(t) is not Role.WEIGHT for t in others):
            return None
        found = self._after(index)
        if found is None:
            return None
        after, cut = found
        entry, before = self._before(hidden.tensor, index)
        return _Head(entry=entry, before=before, index=index, after=after, cut=cut)

    def _after(self, index: int) -> tuple[tuple[int, ...], int | None] | None:
        """The ops that follow a head up to what is returned, and the cut among them; None where others use it."""
        inside: list[int] = []
        tensor = self.graph.ops[index].outputs[0]
        while tensor not in self.flow.results:
            users = [i for i in self.flow.users(tensor) if i not in inside and not self._is_nothing(i)]
            if len(set(users)) != 1 or len(inside) == _LONGEST:
                return None
            op = self.graph.ops[users[0]]
            if self._keeps_last(op):
                return tuple(inside), users[0]
            if not self._is_alone(op, softmax=True) or op.inputs[0] != tensor:
                return None
            inside.append(users[0])
            tensor = op.outputs[0]
        if any(not self._is_nothing(i) for i in self.flow.users(tensor)):
            return None
        return tuple(inside), None

    def _before(self, hidden: int, index: int) -> tuple[int, tuple[int, ...]]:
        """The one tensor that a head and the ops before it follow from, as far back as that goes, and those ops."""
        known: tuple[int, tuple[int, ...]] = hidden, ()
        inside, needed = [index], {hidden}
        while len(inside) < _LONGEST:
            made = {t: self.flow.maker(t) for t in needed}
            makers = {t: m for t, m in made.items() if m is not None}
            if len(makers) < len(needed):
                break
            tensor = max(makers, key=lambda t: makers[t])
            op = self.graph.ops[makers[tensor]]
            users = [i for i in self.flow.users(tensor) if i not in inside and not self._is_nothing(i)]
            if users or tensor in self.flow.results or not self._is_alone(op):
                break
            inside.append(makers[tensor])
            needed = (needed - {tensor}) | {t for t in op.inputs if self._has_rows(t)}
            if len(needed) == 1:
                known = (next(iter(needed)), tuple(sorted(inside[1:])))
        return known

    def _has_rows(self, tensor: int) -> bool:
        shape = self.graph.tensors[tensor].shape
        return len(shape) == _MATRIX + 1 and shape[:_MATRIX] == self.rows

    def _is_alone(self, op: Op, *, softmax: bool = False) -> bool:
        """Whether an op treats each position by itself, and needs nothing that has positions in another form."""
        name = operator_name(op.target)
        if op.mutates or len(op.outputs) != 1 or not self._has_rows(op.outputs[0]) or op.repeat > 1 or op.branch:
            return False
        if name in _OVER_LAST:
            over = op.args.get("dim")
            dims = over if isinstance(over, tuple) else (over,)
            if dims not in ((-1,), (_MATRIX,)) or ("softmax" in name) != softmax:
                return False
        elif name not in _POSITIONWISE and (name != "aten.slice" or op.args.get("dim") not in (-1, _MATRIX)):
            return False
        return all(self._has_rows(t) or self._is_row(t) for t in op.inputs)

    def _is_row(self, tensor: int) -> bool:
        shape = self.graph.tensors[tensor].shape
        return all(size == 1 for size in shape[:-1])

    def _is_nothing(self, index: int) -> bool:
        """A cast or a view that leaves a tensor as it is."""
        op = self.graph.ops[index]
        return not op.mutates and op.outputs == op.inputs[:1]

    def _keeps_last(self, op: Op) -> bool:
        name = operator_name(op.target)
        last = self.rows[1] - 1
        if op.args.get("dim") not in (1, -_MATRIX) or not op.outputs:
            return False
        if name == "aten.select":
            return op.args.get("index") in (-1, last)
        given, made = self.graph.tensors[op.inputs[0]], self.graph.tensors[op.outputs[0]]
        at = made.offset - given.offset
        return name == "aten.slice" and made.shape[1] == 1 and at == last * given.stride[1]


def _on_last(head: _Head, positions: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim(head.ops if head.cut is None else (*head.ops, head.cut)):
            return
        cutter = _Cutter(draft, positions)
        first = min(head.ops)
        cutter.cut(head.entry, first)
        for index in head.ops:
            cutter.run(index)
        graph = draft.graph
        if head.cut is not None:
            cutter.end(head.cut)
        else:
            last = graph.ops[head.ops[-1]].outputs[0]
            draft.substitute(last, cutter.made[last])

    return rewrite


class _Cutter:
    """Runs ops on the last position of what they ran on."""

    def __init__(self, draft: Draft, positions: int) -> None:
        self.draft, self.positions = draft, positions
        self.made: dict[int, int] = {}

    def cut(self, tensor: int, before: int) -> None:
        """Cut a tensor (B, S, ...) to its last position, before an op."""
        given = self.draft.graph.tensors[tensor]
        shape = (given.shape[0], 1, *given.shape[2:])
        self.made[tensor] = self.draft.view(tensor, shape, given.stride, (self.positions - 1) * given.stride[1])
        args: dict[str, Arg] = {
            "self": TensorRef(tensor=tensor),
            "dim": 1,
            "start": -1,
            "end": self.positions,
            "step": 1,
        }
        like = self.draft.graph.ops[before]
        op = replace(
            like, name=f"{like.name}_last", target="aten.slice.Tensor", args=args, outputs=(self.made[tensor],)
        )
        self.draft.insert(before, op)

    def run(self, index: int) -> None:
        """Put an op on what was cut in the place of itself."""
        op = self.draft.graph.ops[index]
        (old,) = op.outputs
        self.draft.replace(index, self._on(op, self._result(op, old)))

    def end(self, index: int) -> None:
        """What kept the last position keeps the only one."""
        op = self.draft.graph.ops[index]
        (old,) = op.outputs
        source = self.made[op.inputs[0]]
        given, was = self.draft.tensors[source], self.draft.graph.tensors[old]
        stride = given.stride if len(was.shape) == len(given.shape) else (given.stride[0], *given.stride[2:])
        made = self.draft.view(source, was.shape, stride)
        place = {"index": 0} if "index" in op.args else {"start": 0, "end": 1}
        self.draft.replace(index, replace(self._on(op, made), args={**self._on(op, made).args, **place}))
        self.draft.substitute(old, made)

    def _result(self, op: Op, old: int) -> int:
        graph, draft = self.draft.graph, self.draft
        was = graph.tensors[old]
        shape = (was.shape[0], 1, *was.shape[2:])
        if old in op.inputs:
            return self.made[old]
        first = op.inputs[0]
        if graph.is_view(op) and first in self.made:
            given = draft.tensors[self.made[first]]
            self.made[old] = draft.view(self.made[first], shape, given.stride, was.offset - graph.tensors[first].offset)
        else:
            self.made[old] = draft.tensor(shape, was.dtype, stride=_dense(shape, was))
        return self.made[old]

    def _on(self, op: Op, made: int) -> Op:
        return replace(op, args={name: on(value, self.made) for name, value in op.args.items()}, outputs=(made,))


def _dense(shape: tuple[int, ...], was: Tensor) -> tuple[int, ...]:
    return contiguous(shape) if was.stride == contiguous(was.shape) else dense_stride(shape, was.stride)
