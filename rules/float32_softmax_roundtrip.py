"""Scores are widened to float32 for the softmax, and narrowed again behind it.

**What it checks.** A softmax over the last dimension that is told to compute in float32, or whose 16-bit input is cast
to float32 for it alone, and of whose result nothing but its cast back to the 16-bit type is used. Where the attention
around it could be one fused kernel, ATT001 speaks and this rule is silent.

**Why it costs.** Scores are as large as queries x keys for every head. The round trip writes and reads them in 32 bits
where 16 would do, and takes a kernel or two more: some three times the bytes of the softmax alone.

**How it is estimated.** One softmax that reads and writes 16 bits in the place of the two or three ops.

**Remedy.** PyTorch's softmax of a 16-bit tensor computes in float32 inside, and rounds once at its end: the result is
that of the round trip.

    probs = F.softmax(scores, dim=-1)

**When to ignore.** On the CPU; where a custom kernel or a hook wants the probabilities in float32 in between.

**References.** PyTorch, `aten/src/ATen/native/cuda/SoftMax.cu` (`accscalar_t`); PyTorch documentation of
`torch.nn.functional.softmax`, `dtype`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, TensorRef
from ..analyzer.rewrite import Draft
from . import materialized_attention_scores

_REMEDY = Remedy(
    text="Leave out both casts: softmax computes in float32 inside.",
    code="probs = F.softmax(scores, dim=-1)",
)


@rule("ATT004", "float32-softmax-roundtrip", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every softmax between two casts."""
    graph = situation.graph
    for trip in situation.once(found):
        moved = [situation.analysis.ops[i] for i in trip.ops]
        narrow = graph.tensors[trip.result]
        yield Match(
            op=trip.softmax,
            message=f"scores go through memory in float32 for the softmax, between tensors of {narrow.dtype}",
            evidence={
                "bytes": sum(op.bytes_read + op.bytes_written for op in moved),
                "needed_bytes": 2 * narrow.nbytes,
            },
            remedy=_REMEDY,
            rewrite=_narrow(trip),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """A softmax in float32 between 16-bit tensors: what it is given, what comes of it, and all its ops."""

    source: int
    softmax: int
    result: int
    ops: tuple[int, ...]


def found(situation: Situation) -> tuple[RoundTrip, ...]:
    """Every softmax between two casts that is no part of an attention that one kernel could do."""
    trips = [
        trip
        for index, op in enumerate(situation.graph.ops)
        if operator_name(op.target) in _SOFTMAX and (trip := _around(situation, index)) is not None
    ]
    if not trips:
        return ()
    fused = {naive.softmax for naive, *_ in situation.once(materialized_attention_scores.found)}
    return tuple(trip for trip in trips if trip.softmax not in fused)


_SOFTMAX = ("aten.softmax", "aten.special_softmax")
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.half", "aten.bfloat16")
_NARROW = ("bfloat16", "float16")


def _around(situation: Situation, index: int) -> RoundTrip | None:
    graph, flow = situation.graph, situation.flow
    op = graph.ops[index]
    given, wide = op.args.get("self"), op.outputs[0]
    dim = op.args.get("dim")
    rank = len(graph.tensors[wide].shape)
    if not isinstance(given, TensorRef) or dim not in (-1, rank - 1) or graph.tensors[wide].dtype != "float32":
        return None
    source, ops = given.tensor, [index]
    if graph.tensors[source].dtype == "float32":
        cast = flow.maker(source)
        if cast is None or operator_name(graph.ops[cast].target) not in _CASTS or graph.ops[cast].inputs[0] == source:
            return None
        if _user(situation, source) == index:
            ops.append(cast)
        source = graph.ops[cast].inputs[0]
    back = _user(situation, wide)
    if back is None or operator_name(graph.ops[back].target) not in _CASTS or graph.ops[back].inputs[0] != wide:
        return None
    result = graph.ops[back].outputs[0]
    if graph.tensors[source].dtype not in _NARROW or graph.tensors[result].dtype != graph.tensors[source].dtype:
        return None
    if any(graph.ops[i].repeat != op.repeat or graph.ops[i].branch != op.branch for i in (*ops, back)):
        return None
    return RoundTrip(source=source, softmax=index, result=result, ops=tuple(sorted((*ops, back))))


def _user(situation: Situation, tensor: int) -> int | None:
    """The one op that uses a tensor, those that leave it as it is aside, such as a dropout at inference."""
    ops = situation.graph.ops
    users = [i for i in situation.flow.users(tensor) if ops[i].mutates or ops[i].outputs != (tensor,)]
    return users[0] if len(users) == 1 and tensor not in situation.flow.results else None


def _narrow(trip: RoundTrip) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim(trip.ops):
            return
        op, was = draft.graph.ops[trip.softmax], draft.graph.tensors[trip.result]
        made = draft.tensor(was.shape, was.dtype, stride=was.stride)
        args: dict[str, Arg] = {**op.args, "self": TensorRef(tensor=trip.source), "dtype": None}
        draft.replace(trip.softmax, replace(op, args=args, outputs=(made,)))
        draft.substitute(trip.result, made)

    return rewrite
