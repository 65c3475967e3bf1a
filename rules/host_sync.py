"""Python waits in the middle of a step for a value that the GPU has yet to compute.

**What it checks.** Values that are read back to the host: `.item()`, `.tolist()`, `float(x)`; `x[mask] = values`, whose
mask becomes a list of indices of a length that the host must know; `bincount`, whose result has the size of the largest
value. What follows from known inputs alone, such as positions, is computed while tracing and is not seen here, nor are
reads whose value nobody uses; tensors that are copied to the host are the business of MEM003.

**Why it costs.** Eager PyTorch runs ahead of the GPU, which hides the time that launches take. A value that is read
back makes the host wait until the GPU has caught up, then the GPU waits for the host to launch again; a CUDA graph ends
there, and what a compiler fuses does too.

**How it is estimated.** The launch after a value that is read back starts when the GPU was done and the value had
arrived. Where the value only enters arithmetic, the arithmetic takes the tensor itself, and nothing is read. A masked
assignment becomes `torch.where`, and a `bincount` of fixed size `torch.histc`. Where Python needs the number, the
saving is that of reading it without waiting. The bound does not know of waiting.

**Remedy.** Keep the value on the GPU.

    x = x * scale.amax()                        # not scale.amax().item()
    x = torch.where(mask[..., None], token, x)  # not x[mask] = token

Where Python needs it, read it once a step, or after the step: `value.to("cpu", non_blocking=True)`.

**When to ignore.** Reads at the end of a step, where the host needs the result anyway.

**References.** PyTorch documentation, "CUDA semantics", asynchronous execution; PyTorch documentation, "Performance
Tuning Guide", avoid unnecessary CPU-GPU synchronization; `torch.cuda.set_sync_debug_mode`, which finds these at run
time.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.finding import Confidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, Graph, Op, Role, TensorRef, is_read_back
from ..analyzer.rewrite import Draft, is_elementwise

_ON_DEVICE = Remedy(
    text="Compute with the tensor itself: the value need not leave the GPU.",
    code="x = x * scale.amax()  # not scale.amax().item()",
)
_LATER = Remedy(
    text="Read it once, after the step, or without waiting.",
    code='value = value.to("cpu", non_blocking=True)  # and look at it after the step',
)
_WHERE = Remedy(
    text="Choose between old and new on the GPU.",
    code="x = torch.where(mask[..., None], values, x)  # not x[mask] = values",
)
_HISTOGRAM = Remedy(
    text="Count into as many bins as are known beforehand.",
    code="counts = torch.histc(index, bins=n, min=0, max=n - 1)  # not torch.bincount(index, minlength=n)",
)


@rule("LCH002", "host-sync", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every op whose result the host waits for."""
    for index, op in enumerate(situation.graph.ops):
        if not situation.costs[index].waits:
            continue
        if is_read_back(op):
            yield from _read(situation, index)
        elif op.target.startswith("aten.bincount"):
            yield from _counted(situation, index)
        elif op.target.startswith(("aten.index_put", "aten._index_put_impl_")):
            yield from _assigned(situation, index)


def _read(situation: Situation, index: int) -> Iterator[Match]:
    graph = situation.graph
    op = graph.ops[index]
    users = _users(graph, index)
    on_device = bool(users) and all(_takes_a_tensor(graph.ops[user], op.number) for user in users)
    yield Match(
        op=index,
        message="the host waits for a value that it reads back",
        evidence={"reads": op.repeat},
        remedy=_ON_DEVICE if on_device else _LATER,
        confidence=Confidence.HIGH if on_device else Confidence.MEDIUM,
        rewrite=_kept_on_device(index, users) if on_device else _read_later(index),
    )


def _users(graph: Graph, index: int) -> list[int]:
    """Ops that take the number, or one computed from it."""
    number = graph.ops[index].number
    if not number:
        return []
    symbol = re.compile(rf"\b{re.escape(number)}\b")

    def takes(value: Arg) -> bool:
        values = value if isinstance(value, tuple) else (value,)
        return any(isinstance(v, str) and symbol.search(v) for v in values)

    later = range(index + 1, len(graph.ops))
    return [i for i in later if any(map(takes, graph.ops[i].args.values())) and graph.ops[i].outputs]


def _takes_a_tensor(op: Op, number: str) -> bool:
    """Whether a pointwise op takes the number itself, where it could take a tensor of no dimensions."""
    places = {name for name, value in op.args.items() if isinstance(value, str) and number in value}
    return is_elementwise(op) and all(op.args[name] == number and name in _NUMBERS for name in places) and bool(places)


_NUMBERS = ("other", "value", "min", "max")
"""Arguments of pointwise ops that are a number or a tensor."""


def _kept_on_device(index: int, users: list[int]) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim((index, *users)):
            return
        op = draft.graph.ops[index]
        value = TensorRef(tensor=op.inputs[0])
        draft.remove((index,))
        for user in users:
            taking = draft.graph.ops[user]
            args = {name: value if given == op.number else given for name, given in taking.args.items()}
            draft.replace(user, replace(taking, args=args))

    return rewrite


def _read_later(index: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim((index,)):
            draft.replace(index, replace(draft.graph.ops[index], target="fxroof.read_later.default"))

    return rewrite


def _counted(situation: Situation, index: int) -> Iterator[Match]:
    graph = situation.graph
    op = graph.ops[index]
    bins = op.args.get("minlength")
    if op.args.get("weights") is not None or graph.tensors[op.outputs[0]].shape != (bins,):
        return

    def rewrite(draft: Draft) -> None:
        if draft.claim((index,)) and isinstance(bins, int):
            args: dict[str, Arg] = {"self": op.args["self"], "bins": bins, "min": 0, "max": bins - 1}
            draft.replace(index, replace(op, target="aten.histc.default", args=args))

    yield Match(
        op=index,
        message="the host waits for the largest value that bincount finds",
        evidence={"reads": op.repeat},
        remedy=_HISTOGRAM,
        rewrite=rewrite,
    )


def _assigned(situation: Situation, index: int) -> Iterator[Match]:
    """`x[mask] = values` of as many values as a row has."""
    graph = situation.graph
    op = graph.ops[index]
    indices, given, target = op.args.get("indices"), op.args.get("values"), op.args.get("self")
    if not isinstance(indices, tuple) or not isinstance(given, TensorRef) or not isinstance(target, TensorRef):
        return
    picks = [pick for pick in indices if isinstance(pick, TensorRef)]
    if len(picks) != 1 or indices[0] != picks[0] or graph.tensors[picks[0].tensor].dtype != "bool":
        return
    mask, values, whole = (graph.tensors[ref.tensor] for ref in (picks[0], given, target))
    row = whole.shape[len(mask.shape) :]
    if op.args.get("accumulate") or _without_ones(values.shape) != _without_ones(row[len(row) - len(values.shape) :]):
        return
    if len(values.shape) > len(row) or not _is_replaceable(situation, index, target.tensor):
        return

    def rewrite(draft: Draft) -> None:
        if not draft.claim((index,)):
            return
        widened = draft.view(picks[0].tensor, (*mask.shape, *[1] * len(row)), (*mask.stride, *[1] * len(row)))
        args: dict[str, Arg] = {"condition": TensorRef(tensor=widened), "self": given, "other": target}
        # what was written in place still is, which costs the same
        draft.replace(index, replace(op, target="aten.where.self", args=args, mutates=("other",) * bool(op.mutates)))

    yield Match(
        op=index,
        message="the host waits for the number of places that a mask selects",
        evidence={"reads": op.repeat},
        remedy=_WHERE,
        rewrite=rewrite,
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _is_replaceable(situation: Situation, index: int, target: int) -> bool:
    """Whether what is written to is read afterwards as this very tensor alone, and is nobody else's."""
    graph = situation.graph
    if not graph.ops[index].mutates:
        return True
    home = graph.tensors[target].storage
    if graph.role(target) not in (Role.ACTIVATION, Role.OUTPUT):
        return False
    later = {i for op in graph.ops[index + 1 :] for i in op.inputs} | set(graph.outputs)
    return not any(graph.tensors[i].storage == home and i != target for i in later)
