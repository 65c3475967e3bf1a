"""Each decode step copies the whole KV cache to make room for one token.

**What it checks.** A `cat`, in whatever spelling, of a tensor that was in the KV cache before the step and of new
rows, whose result goes back to the caller as the new cache.

**Why it costs.** The cache of every layer is read and written once more a step, and both copies are in memory while it
grows. Attention then reads it a third time. The cost grows with batch x context, as the cache does.

**How it is estimated.** The `cat` becomes a copy of the new rows into a buffer that is large enough already, and
attention reads that buffer: bytes saved = 2 x cache - 2 x new rows, priced on the kernels that remain.

**Remedy.** Allocate the cache once and write the new rows in place (a static cache), or in pages.

    self.k_cache[:, :, pos : pos + n] = k
    k = self.k_cache[:, :, : pos + n]

With transformers: `model.generate(..., cache_implementation="static")`. A static cache that is attended to as a whole,
with a mask, trades the copy for reading positions that are still empty: slice it to the positions in use.

**When to ignore.** A few steps at a short context, or a batch that changes its members at every step.

**References.** PyTorch blog, "Accelerating Generative AI II: GPT, Fast" (2023); vLLM, "Efficient Memory Management for
Large Language Model Serving with PagedAttention" (SOSP 2023).
"""

from collections.abc import Iterator

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, Op, Role, TensorRef, tensors_of
from ..analyzer.rewrite import Draft, contiguous

_REMEDY = Remedy(
    text="Allocate the cache once and write the new rows in place.",
    code="self.k_cache[:, :, pos : pos + n] = k\nk = self.k_cache[:, :, : pos + n]",
)


@rule("KVC001", "kv-cache-reallocated-by-cat", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every `cat` of old cache and new rows whose result is the new cache."""
    graph = situation.graph
    for index, op in enumerate(graph.ops):
        if operator_name(op.target) not in ("aten.cat", "aten.concat", "aten.concatenate"):
            continue
        parts = tuple(tensors_of(op.args.get("tensors")))
        old = [t for t in parts if graph.role(t) is Role.KV_CACHE and t in graph.inputs]
        grown = op.outputs[0]
        if len(old) != 1 or len(parts) != _OLD_AND_NEW or parts[0] != old[0] or grown not in situation.flow.results:
            continue
        copied = graph.tensors[grown].nbytes
        yield Match(
            op=index,
            message="the KV cache is copied as a whole in every step to append new rows",
            evidence={"cache_bytes": copied, "new_bytes": graph.tensors[parts[1]].nbytes},
            remedy=_REMEDY,
            rewrite=_in_place(index, op, parts[0], parts[1]),
        )


_OLD_AND_NEW = 2


def _in_place(index: int, op: Op, old: int, new: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim((index,)):
            return
        before, grown = draft.tensors[old], draft.tensors[op.outputs[0]]  # which may have become narrower
        value = op.args.get("dim", 0)
        dim = (value if isinstance(value, int) else 0) % len(grown.shape)
        stride = contiguous(grown.shape)
        name = draft.graph.storages[before.storage].name
        buffer = draft.tensor(grown.shape, grown.dtype, stride=stride, role=Role.KV_CACHE, name=name)
        rows = draft.view(buffer, draft.graph.tensors[new].shape, stride, before.shape[dim] * stride[dim])
        args: dict[str, Arg] = {"self": TensorRef(tensor=rows), "src": TensorRef(tensor=new), "non_blocking": False}
        write = Op(
            name=f"{op.name}_in_place",
            target="aten.copy_.default",
            module=op.module,
            module_type=op.module_type,
            args=args,
            outputs=(rows,),
            mutates=("self",),
            span=op.span,
            user_span=op.user_span,
            repeat=op.repeat,
            branch=op.branch,
        )
        draft.insert(index, write)
        draft.substitute(op.outputs[0], buffer)

    return rewrite
