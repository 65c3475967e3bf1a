"""A normalisation is spelt out in elementwise ops and a mean, each of which goes through memory.

**What it checks.** `x * rsqrt(mean(x^2) + eps)`, or the same of `x - mean(x)`, over the last dimension, with the
powers, casts, divisions and square roots in whatever spelling, with or without a weight and a bias.

**Why it costs.** Run eagerly, each step reads and writes the whole activation, in float32 where it was cast: some
eight times the traffic of one kernel, and some eight launches.

**How it is estimated.** The steps become one `rms_norm` or `layer_norm`, which reads its input and weight and
writes its result. What is used elsewhere too stays.

**Remedy.** The library's fused op computes in float32 inside, whatever its input.

    x = F.rms_norm(x, (dim,), self.weight, self.eps)

**When to ignore.** When the model is compiled, which fuses it too; when the order of casts must be kept to the bit.

**References.** Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Ba et al., "Layer Normalization"
(2016).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, Graph, Op, TensorRef
from ..analyzer.rewrite import Draft, Flow

_RMS = Remedy(
    text="Use the fused op, which computes in float32 inside.",
    code="x = F.rms_norm(x, (dim,), self.weight, self.eps)",
)
_LAYER = Remedy(
    text="Use the fused op, which computes in float32 inside.",
    code="x = F.layer_norm(x, (dim,), self.weight, self.bias, self.eps)",
)


@rule("FUS002", "decomposed-norm", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every normalisation that is spelt out, at the op that ends it."""
    reader = _Reader(situation.graph, situation.flow)
    for index in range(len(situation.graph.ops)):
        norm = reader.norm(index)
        if norm is None:
            continue
        moved = [situation.analysis.ops[i] for i in norm.ops]
        yield Match(
            op=norm.last,
            message=f"{'a layer norm' if norm.centred else 'an RMS norm'} is spelt out in {len(norm.ops)} ops",
            evidence={"ops": len(norm.ops), "bytes": sum(op.bytes_read + op.bytes_written for op in moved)},
            remedy=_LAYER if norm.centred else _RMS,
            rewrite=_fused(norm),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Norm:
    """A normalisation: what it takes, the op that ends it, and all its ops."""

    source: int
    weight: int | None
    bias: int | None
    eps: float
    centred: bool
    last: int
    ops: tuple[int, ...]


class _Reader:
    """Recognises the pieces of a norm from who makes and who uses what."""

    def __init__(self, graph: Graph, flow: Flow) -> None:
        self.graph, self.flow = graph, flow

    def norm(self, index: int) -> _Norm | None:
        """The norm whose reciprocal root is this op, or whose root is."""
        op = self.graph.ops[index]
        name = operator_name(op.target)
        if name not in ("aten.rsqrt", "aten.sqrt", "aten.pow"):
            return None
        if name == "aten.pow" and op.args.get("exponent") != -_HALF:
            return None
        shifted = self.made(op.args.get("self"), "aten.add")
        if shifted is None:
            return None
        eps, mean = self.scalar(shifted), self.mean(self.operand(shifted))
        if eps is None or mean is None:
            return None
        squared = self.squared(mean)
        if squared is None:
            return None
        inside, square = squared
        user = self.user(op.outputs[0])
        wanted = ("aten.div",) if name == "aten.sqrt" else ("aten.mul",)
        if user is None or operator_name(self.graph.ops[user].target) not in wanted:
            return None
        scaled = self.graph.ops[user]
        if {_tensor(scaled.args.get("self")), _tensor(scaled.args.get("other"))} != {inside, op.outputs[0]}:
            return None
        ops = [index, shifted, mean, square, user]
        source, centred = inside, False
        centre = self.centre(inside)
        if centre is not None:
            source, centred = centre[0], True
            ops += centre[1:]
        source, casts = self.before_casts(source)
        last, weight, bias, after = self.affine(user, centred=centred)
        return _Norm(
            source=source,
            weight=weight,
            bias=bias,
            eps=eps,
            centred=centred,
            last=last,
            ops=tuple(sorted({*ops, *casts, *after})),
        )

    def made(self, value: Arg, *operators: str) -> int | None:
        """The op of one of these operators that made a value."""
        tensor = _tensor(value)
        index = None if tensor is None else self.flow.maker(tensor)
        if index is None or operator_name(self.graph.ops[index].target) not in operators:
            return None
        return index

    def operand(self, index: int) -> Arg:
        """The tensor of a sum of a tensor and a number."""
        args = self.graph.ops[index].args
        return args.get("self") if isinstance(args.get("self"), TensorRef) else args.get("other")

    def scalar(self, index: int) -> float | None:
        """The number of such a sum."""
        args = self.graph.ops[index].args
        found = [v for v in (args.get("self"), args.get("other")) if isinstance(v, float | int)]
        return float(found[0]) if len(found) == 1 else None

    def mean(self, value: Arg) -> int | None:
        """A mean over the last dimension that keeps it."""
        index = self.made(value, "aten.mean")
        if index is None:
            return None
        op = self.graph.ops[index]
        rank = len(self.graph.tensors[op.inputs[0]].shape)
        dims = op.args.get("dim")
        over = dims if isinstance(dims, tuple) else (dims,)
        return index if op.args.get("keepdim") and over in ((-1,), (rank - 1,)) else None

    def squared(self, mean: int) -> tuple[int, int] | None:
        """What is squared under a mean, and the op that squares it."""
        index = self.made(self.graph.ops[mean].args.get("self"), "aten.pow", "aten.mul", "aten.square")
        if index is None:
            return None
        op = self.graph.ops[index]
        base, other = _tensor(op.args.get("self")), op.args.get("other", op.args.get("exponent"))
        if base is None:
            return None
        twice = {"aten.pow": other == _SQUARE, "aten.mul": _tensor(other) == base, "aten.square": True}
        return (base, index) if twice[operator_name(op.target)] else None

    def centre(self, tensor: int) -> tuple[int, int, int] | None:
        """For `x - mean(x)`: x, and the two ops."""
        index = self.made(TensorRef(tensor=tensor), "aten.sub")
        if index is None:
            return None
        op = self.graph.ops[index]
        mean = self.mean(op.args.get("other"))
        base = _tensor(op.args.get("self"))
        if mean is None or base is None or _tensor(self.graph.ops[mean].args.get("self")) != base:
            return None
        return base, index, mean

    def before_casts(self, tensor: int) -> tuple[int, list[int]]:
        """What was widened to this tensor, and the op that did it."""
        index = self.made(TensorRef(tensor=tensor), *_CASTS)
        if index is None:
            return tensor, []
        before = self.graph.ops[index].inputs[0]
        narrow, wide = self.graph.tensors[before], self.graph.tensors[tensor]
        return (before, [index]) if "float" in narrow.dtype and wide.dtype == "float32" else (tensor, [])

    def user(self, tensor: int) -> int | None:
        """The one op that takes a tensor."""
        return self.flow.only_user(tensor)

    def affine(self, index: int, *, centred: bool) -> tuple[int, int | None, int | None, list[int]]:
        """What follows the scaling: a cast, a weight, a bias; the op that ends it, both, and the ops."""
        last = index
        ops: list[int] = []
        weight: int | None = None
        bias: int | None = None
        while True:
            user = self.user(self.graph.ops[last].outputs[0])
            if user is None:
                return last, weight, bias, ops
            op = self.graph.ops[user]
            name = operator_name(op.target)
            row = self.row(op, self.graph.ops[last].outputs[0])
            if name in _CASTS and weight is None:
                pass
            elif name == "aten.mul" and weight is None and row is not None:
                weight = row
            elif name == "aten.add" and centred and weight is not None and bias is None and row is not None:
                bias = row
            else:
                return last, weight, bias, ops
            last = user
            ops.append(user)

    def row(self, op: Op, tensor: int) -> int | None:
        """The other operand, where it is one number for each element of the last dimension."""
        values = [_tensor(op.args.get("self")), _tensor(op.args.get("other"))]
        others = [v for v in values if v is not None and v != tensor]
        if tensor not in values or len(others) != 1:
            return None
        width = self.graph.tensors[tensor].shape[-1]
        return others[0] if self.graph.tensors[others[0]].shape == (width,) else None


_HALF = 0.5
_SQUARE = 2
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.type")


def _tensor(value: Arg) -> int | None:
    return value.tensor if isinstance(value, TensorRef) else None


def _fused(norm: _Norm) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim(norm.ops):
            return
        last = draft.graph.ops[norm.last]
        width = draft.graph.tensors[norm.source].shape[-1]
        args: dict[str, Arg] = {
            "input": TensorRef(tensor=norm.source),
            "normalized_shape": (width,),
            "weight": None if norm.weight is None else TensorRef(tensor=norm.weight),
        }
        if norm.centred:
            args |= {
                "bias": None if norm.bias is None else TensorRef(tensor=norm.bias),
                "eps": norm.eps,
                "cudnn_enable": True,
            }
        else:
            args |= {"eps": norm.eps}
        target = "aten.layer_norm.default" if norm.centred else "aten.rms_norm.default"
        draft.replace(norm.last, replace(last, target=target, args=args))

    return rewrite
