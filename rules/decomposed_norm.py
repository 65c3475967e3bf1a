"""A normalisation is spelt out in elementwise ops and a mean, each of which goes through memory.

**What it checks.** `x * rsqrt(mean(x^2) + eps)`, or the same of `x - mean(x)`, over the last dimension, with the
powers, casts, divisions and square roots in whatever spelling, with or without a weight and a bias; a cast behind them
that returns to the type of `x` belongs to the norm.

**Why it costs.** Run eagerly, each step reads and writes the whole activation, in float32 where it was cast: some
eight times the traffic of one kernel, and some eight launches.

**How it is estimated.** The steps become one `rms_norm` or `layer_norm`, which reads its input and weight and
writes its result. What is used elsewhere too stays. There is no fused kernel for an input and a weight of different
types: the cast that makes them one is counted, and so is that of a result which another type is wanted of.

**Remedy.** The library's fused op computes in float32 inside, whatever its input.

    x = F.rms_norm(x, (dim,), self.weight, self.eps)

Where input and weight differ in type, `self.weight.to(x.dtype)`; where the weight is computed in float32, such as the
`1 + self.weight` of Gemma, which would lose its last bits in 16, the norm is in float32 too:

    x = F.rms_norm(x.float(), (dim,), 1 + self.weight.float(), self.eps).type_as(x)

**When to ignore.** When the model is compiled, which fuses it too; when the order of casts must be kept to the bit.

**References.** Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Ba et al., "Layer Normalization"
(2016).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import ITEM_BITS, Arg, Graph, Op, Role, TensorRef, tensor_of
from ..analyzer.rewrite import Draft, Flow
from ..analyzer.sdpa import dense_stride


@rule("FUS002", "decomposed-norm", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every normalisation that is spelt out, at the op that ends it."""
    for norm in situation.once(found):
        moved = [situation.analysis.ops[i] for i in norm.ops]
        yield Match(
            op=norm.last,
            message=f"{'a layer norm' if norm.centred else 'an RMS norm'} is spelt out in {len(norm.ops)} ops",
            evidence={"ops": len(norm.ops), "bytes": sum(op.bytes_read + op.bytes_written for op in moved)},
            remedy=_remedy(situation, norm),
            rewrite=_fused(norm),
        )


def found(situation: Situation) -> tuple["Norm", ...]:
    """Every normalisation that is spelt out, in the order of the program."""
    reader = _Reader(situation.graph, situation.flow)
    norms = (reader.norm(index) for index in range(len(situation.graph.ops)))
    return tuple(norm for norm in norms if norm is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A normalisation, and the call that does the same.

    Attributes:
        source: what is normalised.
        weight: a row, before it was widened for the product alone; None for none.
        bias: a row; None for none.
        eps: what is added to the mean of the squares.
        centred: true for a layer norm.
        last: the op that ends it.
        ops: all of them, ascending.
        weight_ops: those that do nothing but make the weight and the bias, views included.
        dtype: what the call computes: its input and rows are cast to it, and its result from it.
    """

    source: int
    weight: int | None
    bias: int | None
    eps: float
    centred: bool
    last: int
    ops: tuple[int, ...]
    weight_ops: tuple[int, ...]
    dtype: str


class _Reader:
    """Recognises the pieces of a norm from who makes and who uses what."""

    def __init__(self, graph: Graph, flow: Flow) -> None:
        self.graph, self.flow = graph, flow

    def norm(self, index: int) -> Norm | None:
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
        operands = {tensor_of(scaled.args.get("self")), tensor_of(scaled.args.get("other"))}
        # what is scaled may be the tensor before it was widened for the squares: the product widens it too
        if operands not in ({inside, op.outputs[0]}, {self.before_casts(inside)[0], op.outputs[0]}):
            return None
        ops = [index, shifted, mean, square, user]
        source, centred = inside, False
        centre = self.centre(inside)
        if centre is not None:
            source, centred = centre[0], True
            ops += centre[1:]
        narrow, casts = self.before_casts(source)
        last, weight, bias, after = self.affine(user, self.dtype(narrow), centred=centred)
        dtype = self.widest(narrow, self.graph.ops[last].outputs[0], weight, bias)
        ops += after
        if self.dtype(narrow) == dtype:
            source = narrow
            ops += casts
        return Norm(
            source=source,
            weight=self.unwidened(weight, dtype),
            bias=self.unwidened(bias, dtype),
            eps=eps,
            centred=centred,
            last=last,
            ops=tuple(sorted(set(ops))),
            weight_ops=tuple(sorted(self.ops_of(weight, ops) | self.ops_of(bias, ops))),
            dtype=dtype,
        )

    def dtype(self, tensor: int) -> str:
        """The type of a tensor's elements."""
        return self.graph.tensors[tensor].dtype

    def unwidened(self, row: int | None, dtype: str) -> int | None:
        """A weight or bias before it was widened for the arithmetic, if it is of the type of the input then."""
        narrow = row if row is None else self.before_casts(row)[0]
        return narrow if narrow is not None and self.dtype(narrow) == dtype else row

    def widest(self, source: int, result: int, *rows: int | None) -> str:
        """The type with most bits, of the input, the result, and what is computed for a weight or bias."""
        computed = [row for row in rows if row is not None and self.is_computed(row)]
        return max(map(self.dtype, (source, result, *computed)), key=ITEM_BITS.__getitem__)

    def is_computed(self, row: int) -> bool:
        """Whether a weight or bias is more than one that is stored, widened or not."""
        return self.graph.role(self.before_casts(row)[0]) is Role.ACTIVATION

    def ops_of(self, row: int | None, norm: Sequence[int]) -> set[int]:
        """The ops that make a weight or bias and nothing else."""
        found: set[int] = set()
        users = set(norm)
        waiting = [] if row is None else [row]
        while waiting:
            tensor = waiting.pop()
            index = self.flow.maker(tensor)
            if index is None or index in users or tensor in self.graph.ops[index].inputs:
                continue
            if tensor not in self.flow.results and users.issuperset(self.flow.users(tensor)):
                found.add(index)
                users.add(index)
                waiting += self.graph.ops[index].inputs
        return found

    def made(self, value: Arg, *operators: str) -> int | None:
        """The op of one of these operators that made a value."""
        tensor = tensor_of(value)
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
        base, other = tensor_of(op.args.get("self")), op.args.get("other", op.args.get("exponent"))
        if base is None:
            return None
        twice = {"aten.pow": other == _SQUARE, "aten.mul": tensor_of(other) == base, "aten.square": True}
        return (base, index) if twice[operator_name(op.target)] else None

    def centre(self, tensor: int) -> tuple[int, int, int] | None:
        """For `x - mean(x)`: x, and the two ops."""
        index = self.made(TensorRef(tensor=tensor), "aten.sub")
        if index is None:
            return None
        op = self.graph.ops[index]
        mean = self.mean(op.args.get("other"))
        base = tensor_of(op.args.get("self"))
        if mean is None or base is None or tensor_of(self.graph.ops[mean].args.get("self")) != base:
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
        """The one op that takes a tensor, those that return it as it is aside."""
        users = [i for i in self.flow.users(tensor) if tensor not in self.graph.ops[i].outputs]
        return users[0] if len(users) == 1 and tensor not in self.flow.results else None

    def affine(self, index: int, dtype: str, *, centred: bool) -> tuple[int, int | None, int | None, list[int]]:
        """What follows the scaling: a cast, a weight, a bias, a cast back; the op that ends it, both, and the ops."""
        last = index
        ops: list[int] = []
        weight: int | None = None
        bias: int | None = None
        while True:
            user = self.user(self.graph.ops[last].outputs[0])
            if user is None:
                break
            op = self.graph.ops[user]
            name = operator_name(op.target)
            row = self.row(op, self.graph.ops[last].outputs[0])
            if name in _CASTS and weight is None:
                pass
            elif name in _CASTS and self.dtype(op.outputs[0]) == dtype:
                return user, weight, bias, [*ops, user]
            elif name == "aten.mul" and weight is None and row is not None:
                weight = row
            elif name == "aten.add" and centred and weight is not None and bias is None and row is not None:
                bias = row
            else:
                break
            last = user
            ops.append(user)
        if weight is None:  # of several casts those up to the first that returns to the type of the input
            path = [index, *ops]
            end = next((n for n, i in enumerate(path) if self.dtype(self.graph.ops[i].outputs[0]) == dtype), 0)
            last, ops = path[end], path[1 : end + 1]
        return last, weight, bias, ops

    def row(self, op: Op, tensor: int) -> int | None:
        """The other operand, where it is one number for each element of the last dimension."""
        values = [tensor_of(op.args.get("self")), tensor_of(op.args.get("other"))]
        others = [v for v in values if v is not None and v != tensor]
        if tensor not in values or len(others) != 1:
            return None
        width = self.graph.tensors[tensor].shape[-1]
        return others[0] if self.graph.tensors[others[0]].shape == (width,) else None


_HALF = 0.5
_SQUARE = 2
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.type")


def _remedy(situation: Situation, norm: Norm) -> Remedy:
    reader = _Reader(situation.graph, situation.flow)
    x = reader.dtype(reader.before_casts(norm.source)[0])
    widened = "" if x == norm.dtype else _to(norm.dtype)
    rows = {"weight": norm.weight} | ({"bias": norm.bias} if norm.centred else {})
    text = "Use the fused op, which computes in float32 inside"
    if all(row is None for row in rows.values()):
        args = ["eps=self.eps"]
    else:
        args = [_row(reader, row, name, widened or ".to(x.dtype)", norm.dtype) for name, row in rows.items()]
        own = [name for name in rows if any(arg.split(".")[0] == name for arg in args)]
        text += f"; {' and '.join(own)} as computed now" if own else ""
        args.append("self.eps")
    result = reader.dtype(reader.graph.ops[norm.last].outputs[0])
    back = "" if result == norm.dtype else ".type_as(x)" if result == x else _to(result)
    call = f"F.{'layer' if norm.centred else 'rms'}_norm({', '.join([f'x{widened}', '(dim,)', *args])})"
    return Remedy(text=f"{text}.", code=f"x = {call}{back}")


def _row(reader: _Reader, row: int | None, name: str, cast: str, dtype: str) -> str:
    """A weight or a bias as code, in the type of the call."""
    if row is None:
        return "None"
    stored = reader.before_casts(row)[0]
    if not reader.is_computed(row):
        return f"self.{name}" + ("" if reader.dtype(stored) == dtype else cast)
    code, wanted = name, reader.dtype(row) != dtype
    shifted = reader.made(TensorRef(tensor=row), "aten.add")
    if shifted is not None:
        number, base = reader.scalar(shifted), tensor_of(reader.operand(shifted))
        if number is not None and base is not None and not reader.is_computed(base):
            widened = reader.dtype(reader.before_casts(base)[0]) != reader.dtype(row)
            code = f"{number:g} + self.{name}{_to(reader.dtype(row)) if widened else ''}"
            return f"({code}){cast}" if wanted else code
    return f"{code}{cast}" if wanted else code


def _to(dtype: str) -> str:
    return ".float()" if dtype == "float32" else f".to(torch.{dtype})"


def _fused(norm: Norm) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim(norm.ops):
            return
        last = draft.graph.ops[norm.last]
        (old,) = last.outputs
        width = draft.graph.tensors[norm.source].shape[-1]
        args: dict[str, Arg] = {
            "input": TensorRef(tensor=_cast(draft, norm, norm.source)),
            "normalized_shape": (width,),
            "weight": None if norm.weight is None else TensorRef(tensor=_cast(draft, norm, norm.weight)),
        }
        if norm.centred:
            args |= {
                "bias": None if norm.bias is None else TensorRef(tensor=_cast(draft, norm, norm.bias)),
                "eps": norm.eps,
                "cudnn_enable": True,
            }
        else:
            args |= {"eps": norm.eps}
        target = "aten.layer_norm.default" if norm.centred else "aten.rms_norm.default"
        call, result = replace(last, target=target, args=args), draft.graph.tensors[old]
        if result.dtype == norm.dtype:
            draft.replace(norm.last, call)
            return
        made = draft.tensor(result.shape, norm.dtype, stride=result.stride)
        draft.insert(norm.last, replace(call, name=f"{last.name}_norm", outputs=(made,)))
        draft.replace(norm.last, _casting(last, made, result.dtype, old))

    return rewrite


def _cast(draft: Draft, norm: Norm, tensor: int) -> int:
    """A tensor in the type that the call computes in."""
    given = draft.graph.tensors[tensor]
    if given.dtype == norm.dtype:
        return tensor
    made = draft.tensor(given.shape, norm.dtype, stride=dense_stride(given.shape, given.stride))
    like = draft.graph.ops[norm.last]
    op = _casting(like, tensor, norm.dtype, made)
    draft.insert(norm.last, replace(op, name=f"{like.name}_cast_{made}"))
    return made


def _casting(like: Op, tensor: int, dtype: str, made: int) -> Op:
    args: dict[str, Arg] = {"self": TensorRef(tensor=tensor), "dtype": dtype}
    return replace(like, target="aten.to.dtype", args=args, outputs=(made,))
