"""An activation is spelt out in elementwise ops, each of which goes through memory.

**What it checks.** Elementwise ops that together compute a function of one tensor for which PyTorch has an op: GELU in
both forms, SiLU, sigmoid, softplus, Mish, hard swish, hard sigmoid, log-sigmoid, ELU, and the gated linear unit of two
halves. They are recognised by the values they compute, in whatever spelling. Activations that PyTorch has no op for,
such as `x * sigmoid(1.702 * x)`, are chains like any other (FUS001).

**Why it costs.** Run eagerly, each step reads and writes the widest activation of the block: GELU in its tanh form is
eight kernels where one would do.

**How it is estimated.** The steps become the one op, which reads its input and writes its result. It computes in
float32 inside, so that casts around the steps go too.

**Remedy.**

    x = F.gelu(x, approximate="tanh")

**When to ignore.** When the model is compiled, which fuses the steps too; when results must be kept to the bit: the op
rounds once, the steps each time.

**Example.**

    x = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))

**References.** Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)" (2016); Elfwing et al., "Sigmoid-Weighted
Linear Units for Neural Network Function Approximation in Reinforcement Learning" (2017); Misra, "Mish: A Self
Regularized Non-Monotonic Activation Function" (2019); Dauphin et al., "Language Modeling with Gated Convolutional
Networks" (2016).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, TensorRef
from ..analyzer.rewrite import Draft
from ._curves import curves, sigmoid, softplus


@rule("FUS004", "decomposed-activation", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every activation that is spelt out, at the op that ends it; a compiled phase has none."""
    if situation.analysis.execution != "eager":
        return
    for found in situation.once(spelt_out):
        moved = [situation.analysis.ops[index] for index in found.ops]
        yield Match(
            op=found.last,
            message=f"{found.known.words} is spelt out in {len(found.ops)} ops",
            evidence={"ops": len(found.ops), "bytes": sum(op.bytes_read + op.bytes_written for op in moved)},
            remedy=Remedy(text="Use the op that PyTorch has for it.", code=f"x = {found.known.code}"),
            rewrite=_fused(found),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A function that PyTorch has an op for.

    Attributes:
        words: its name in a sentence.
        op: the op's name.
        code: how it is called.
        args: of the op beyond its input.
        of: the function of one number; None where it is none.
    """

    words: str
    op: str
    code: str
    args: dict[str, Arg] = field(default_factory=dict)
    of: Callable[[float], float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An activation that is spelt out: what it takes, the op that ends it, and all its ops, ascending."""

    source: int
    last: int
    ops: tuple[int, ...]
    known: Known


def spelt_out(situation: Situation) -> tuple[Activation, ...]:
    """Every activation that is spelt out."""
    graph, flow = situation.graph, situation.flow
    functions = {known.code: known.of for known in _KNOWN if known.of is not None}
    by_code = {known.code: known for known in _KNOWN}
    found = [
        Activation(source=curve.source, last=curve.last, ops=curve.ops, known=by_code[curve.name])
        for curve in curves(graph, flow, functions)
    ]
    return tuple(sorted((*found, *_gated(situation)), key=lambda activation: activation.last))


def _gated(situation: Situation) -> Iterator[Activation]:
    """Products of one half of a tensor with the sigmoid of the other."""
    graph, flow = situation.graph, situation.flow
    for index, op in enumerate(graph.ops):
        if operator_name(op.target) != "aten.sigmoid":
            continue
        user = flow.only_user(op.outputs[0])
        halves = flow.maker(op.inputs[0])
        if user is None or halves is None or operator_name(graph.ops[user].target) != "aten.mul":
            continue
        split = graph.ops[halves]
        other = [t for t in graph.ops[user].inputs if t != op.outputs[0]]
        if operator_name(split.target) not in _SPLITS or split.outputs != (*other, op.inputs[0]):
            continue
        one, two = (graph.tensors[t].shape for t in split.outputs)
        if one == two:
            yield Activation(
                source=split.inputs[0],
                last=user,
                ops=(index, user),
                known=replace(_GLU, args={"dim": split.args["dim"]}),
            )


_SPLITS = ("aten.chunk", "aten.split", "aten.split_with_sizes")


def _fused(found: Activation) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim(found.ops):
            return
        last = draft.graph.ops[found.last]
        source = TensorRef(tensor=found.source)
        in_place = draft.graph.mutated(last) == (found.source,)
        draft.remove(found.ops)
        draft.replace(
            found.last,
            replace(
                last,
                target=f"aten.{found.known.op}{'_' if in_place else ''}.default",
                args={"self": source, **found.known.args},
                mutates=("self",) if in_place else (),
            ),
        )

    return rewrite


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _hard_sigmoid(x: float) -> float:
    return min(max(x + 3, 0), 6) / 6


def _elu(x: float) -> float:
    return x if x > 0 else math.expm1(x)


_KNOWN = (
    Known(
        words="GELU in its tanh form",
        op="gelu",
        code='F.gelu(x, approximate="tanh")',
        args={"approximate": "tanh"},
        of=_gelu_tanh,
    ),
    Known(words="GELU", op="gelu", code="F.gelu(x)", args={"approximate": "none"}, of=_gelu),
    Known(words="SiLU", op="silu", code="F.silu(x)", of=lambda x: x * sigmoid(x)),
    Known(words="the logistic sigmoid", op="sigmoid", code="torch.sigmoid(x)", of=sigmoid),
    Known(words="softplus", op="softplus", code="F.softplus(x)", args={"beta": 1, "threshold": 20}, of=softplus),
    Known(words="Mish", op="mish", code="F.mish(x)", of=lambda x: x * math.tanh(softplus(x))),
    Known(words="hard swish", op="hardswish", code="F.hardswish(x)", of=lambda x: x * _hard_sigmoid(x)),
    Known(words="hard sigmoid", op="hardsigmoid", code="F.hardsigmoid(x)", of=_hard_sigmoid),
    Known(words="log-sigmoid", op="log_sigmoid", code="F.logsigmoid(x)", of=lambda x: -softplus(-x)),
    Known(words="ELU", op="elu", code="F.elu(x)", args={"alpha": 1, "scale": 1, "input_scale": 1}, of=_elu),
)
_GLU = Known(words="a gated linear unit", op="glu", code="F.glu(x, dim=-1)")
