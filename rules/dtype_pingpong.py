"""Numbers are widened to float32 for one op and rounded straight back.

**What it checks.** Casts from 16 bits to 32 that are undone at once: with nothing in between, round one elementwise op
or one norm of the library, or round one matrix product. Nothing else takes part: no operand has 32 bits of its own, and
the wide result goes nowhere but into the cast back.

**Why it costs.** The cast writes twice the bytes that it reads, the op moves 32 bits where 16 would do, and the cast
back reads them again: some five times the traffic of the op alone, for the same numbers. PyTorch's kernels compute
elementwise ops and norms of 16-bit tensors in float32 and round once, which is what the casts ask for. A product of
16-bit operands is summed in float32 too; in float32 it misses the tensor cores unless TF32 is allowed, and its weights
are widened anew at every call.

**How it is estimated.** The casts go and the op takes what they were given and returns what they returned. A wide
tensor that other ops need stays.

**Remedy.** Leave out the casts.

    x = F.silu(x)                # not F.silu(x.float()).to(x.dtype)
    y = F.linear(x, self.weight)  # not F.linear(x.float(), self.weight.float()).to(x.dtype)

**When to ignore.** Chains of several ops in float32 are left alone, since each op would round. Sums of products may
come in another order than in float32; reductions in 16 bits between blocks of a product can be forbidden by
`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False`.

**References.** PyTorch documentation, "Numerical accuracy" and "CUDA semantics"; Micikevicius et al., "Mixed Precision
Training" (2018).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Confidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.rewrite import Draft, on
from . import decomposed_activation, decomposed_norm, materialized_attention_scores
from ._rotary import rotations

_REMEDY = Remedy(text="Leave out the casts: the op computes in float32 inside.", code="x = F.silu(x)")
_PRODUCT = Remedy(text="Leave out the casts: products are summed in float32.", code="y = F.linear(x, self.weight)")
_NOTHING = Remedy(text="Leave out both casts.")


@rule("FUS006", "dtype-pingpong", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every cast up that is undone at once, at the op between the casts, or at the cast back."""
    for found in situation.once(roundtrips):
        if situation.analysis.execution != "eager" and not found.product:
            continue
        moved = [situation.analysis.ops[index] for index in found.ops]
        yield Match(
            op=found.down if found.op is None else found.op,
            message=_message(found),
            evidence={"casts": len(found.casts), "bytes": sum(op.bytes_read + op.bytes_written for op in moved)},
            remedy=_NOTHING if found.op is None else _PRODUCT if found.product else _REMEDY,
            confidence=Confidence.MEDIUM if found.product else Confidence.HIGH,
            rewrite=_uncast(found),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Roundtrip:
    """Casts up and down again.

    Attributes:
        op: the one op between them; None where there is none.
        ups: by tensor that was widened, what it was before.
        down: the cast back.
        casts: all casts that go.
        product: true where the op is a matrix product.
    """

    op: int | None
    ups: Mapping[int, int]
    down: int
    casts: tuple[int, ...]
    product: bool

    @property
    def ops(self) -> tuple[int, ...]:
        """The casts and what is between them."""
        return self.casts if self.op is None else tuple(sorted((*self.casts, self.op)))


def roundtrips(situation: Situation) -> tuple[Roundtrip, ...]:
    """Every cast up that is undone at once and that is no part of what another rule recognises."""
    own = {index for norm in situation.once(decomposed_norm.found) for index in norm.ops}
    own.update(index for ops in situation.once(rotations) for index in ops)
    own.update(index for activation in situation.once(decomposed_activation.spelt_out) for index in activation.ops)
    own.update(index for naive, *_ in situation.once(materialized_attention_scores.found) for index in naive.ops)
    reader = _Reader(situation)
    found = (reader.ending_at(index) for index in range(len(situation.graph.ops)))
    return tuple(trip for trip in found if trip is not None and own.isdisjoint(trip.ops))


class _Reader:
    def __init__(self, situation: Situation) -> None:
        self.graph, self.flow = situation.graph, situation.flow
        self.overwritten = {self.graph.tensors[t].storage for op in self.graph.ops for t in self.graph.mutated(op)}

    def ending_at(self, down: int) -> Roundtrip | None:
        """The roundtrip that a cast back ends."""
        cast = self._cast(down)
        if cast is None or self.graph.tensors[cast[1]].dtype not in _NARROW:
            return None
        wide, narrow = cast
        maker = self.flow.maker(wide)
        if self.graph.tensors[wide].dtype != _WIDE or maker is None:
            return None
        up = self._cast(maker)
        if up is not None:
            return self._of_nothing(maker, up[0], down, wide, narrow)
        return self._of_one(maker, down, wide, narrow)

    def _of_nothing(self, up: int, source: int, down: int, wide: int, narrow: int) -> Roundtrip | None:
        """Up and straight down: the result is what it began with."""
        tensors = self.graph.tensors
        if tensors[source].dtype != tensors[narrow].dtype or narrow in self.flow.results:
            return None
        if {tensors[source].storage, tensors[narrow].storage} & self.overwritten:
            return None
        casts = (up, down) if self.flow.only_user(wide) == down else (down,)
        return Roundtrip(op=None, ups={narrow: source}, down=down, casts=casts, product=False)

    def _of_one(self, index: int, down: int, wide: int, narrow: int) -> Roundtrip | None:
        """Round one op that computes in float32 whatever it is given."""
        op, tensors = self.graph.ops[index], self.graph.tensors
        name = operator_name(op.target)
        product = name in _PRODUCTS
        if not (product or name in _INSIDE) or op.mutates or self.flow.only_user(wide) != down:
            return None
        if op.args.get("rounding_mode") is not None:
            return None
        dtype = tensors[narrow].dtype
        ups: dict[int, int] = {}
        casts: list[int] = []
        for tensor in op.inputs:
            if tensors[tensor].dtype in (dtype, "bool"):
                continue
            maker = self.flow.maker(tensor)
            cast = None if maker is None else self._cast(maker)
            if maker is None or cast is None or tensors[cast[0]].dtype != dtype:
                return None
            if tensors[cast[0]].storage in self.overwritten:
                return None
            ups[tensor] = cast[0]
            casts += [maker] if self.flow.only_user(tensor) == index else []
        if not ups:
            return None
        return Roundtrip(op=index, ups=ups, down=down, casts=(*casts, down), product=product)

    def _cast(self, index: int) -> tuple[int, int] | None:
        """What a cast between types of floating point is given, and what it returns."""
        op = self.graph.ops[index]
        if operator_name(op.target) not in _CASTS or op.mutates or self.graph.is_view(op) or len(op.outputs) != 1:
            return None
        source, (made,) = op.inputs[0], op.outputs
        one, other = self.graph.tensors[source], self.graph.tensors[made]
        return (source, made) if one.shape == other.shape and {one.dtype, other.dtype} <= _FLOATS else None


_WIDE = "float32"
_NARROW = frozenset({"float16", "bfloat16"})
_FLOATS = _NARROW | {_WIDE}
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.half", "aten.bfloat16", "aten.type")
_PRODUCTS = frozenset({"aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm"})
_INSIDE = frozenset(
    f"aten.{name}"
    for name in (
        "add", "sub", "mul", "div", "neg", "abs", "relu", "silu", "gelu", "sigmoid", "tanh", "exp", "log", "log1p",
        "sqrt", "rsqrt", "reciprocal", "erf", "sin", "cos", "softplus", "mish", "hardswish", "hardsigmoid",
        "leaky_relu", "elu", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "square", "layer_norm",
        "rms_norm", "group_norm",
    )
)  # fmt: skip
"""Ops whose kernels compute 16-bit tensors in float32 and round once."""


def _message(found: Roundtrip) -> str:
    if found.op is None:
        return "a tensor is cast to float32 and straight back"
    if found.product:
        return "operands of 16 bits are multiplied in float32, and the result is rounded straight back"
    return "casts to float32 and back surround one op, which computes in float32 anyway"


def _uncast(found: Roundtrip) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim(found.ops):
            return
        draft.remove(found.ops)
        if found.op is None:
            ((narrow, source),) = found.ups.items()
            draft.substitute(narrow, draft.standing_for(source))
            return
        op, down = draft.graph.ops[found.op], draft.graph.ops[found.down]
        args = {name: on(value, found.ups) for name, value in op.args.items()}
        draft.replace(found.down, replace(op, args=args, outputs=down.outputs))

    return rewrite
