"""Gathers and scatters: what is touched is charged, not the whole table.

A gather reads as many elements as it returns, at most the table. A scatter in place writes the elements it
hits and reads them only if it accumulates; out of place it first copies the whole tensor, as PyTorch does.
Indices are read. Which rows are hit is not known without data, so repeated indices count repeatedly, up to
the table.
"""

from dataclasses import replace
from math import prod

from ..cost import Call, Cost, formula, operator_name
from ..graph import Tensor, TensorRef
from .arithmetic import broadcast, reach, vector
from .parts import Kernels


@formula("aten.embedding")
def embedding(call: Call) -> Cost:
    """A row of the table per index."""
    return _gather(call, "weight")


@formula(
    "aten.index",
    "aten._unsafe_index",
    "aten._unsafe_masked_index",
    "aten.index_select",
    "aten.gather",
    "aten.take",
    "aten.take_along_dim",
)
def gather(call: Call) -> Cost:
    """An element of `self` per result element."""
    return _gather(call, "self")


@formula("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: Call) -> Cost:
    """A row per index, added (or compared) into its bag; weighted rows take a multiplication too."""
    table, indices = call.tensor("weight"), call.tensor("indices")
    elements = indices.numel * table.shape[-1]
    weighted = call.optional("per_sample_weights") is not None
    return call.cost(
        vector=vector(table.dtype, elements * (1 + weighted)), reads={"weight": reach(call, table, elements)}
    )


@formula("aten.index_put", "aten._unsafe_index_put", "aten._index_put_impl_")
def index_put(call: Call) -> Cost:
    """Elements that the indices select; one value under one boolean mask is a masked fill of the whole.

    Other boolean masks become indices first, whose number the host reads back (IndexingUtils.h).
    """
    target, values = call.tensor("self"), call.tensor("values")
    indices = call.arg("indices")
    picks = [
        call.graph.tensors[i.tensor] if isinstance(i, TensorRef) else None
        for i in (indices if isinstance(indices, tuple) else ())
    ]
    if any(p is not None and p.dtype in ("bool", "uint8") for p in picks):
        if values.numel == 1:
            return _filled_under_mask(call)
        hit = min(values.numel, target.numel)
        return replace(_scatter(call, hit, accumulate=call.flag("accumulate")), waits=True)
    return _scatter(call, _selected(target, picks), accumulate=call.flag("accumulate"))


@formula("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(call: Call) -> Cost:
    """An element per index; the source may be larger than the index and is read only where it is used."""
    hit = call.tensor("index").numel
    source = call.optional("src")
    adding = call.op.target.startswith(("aten.scatter_add", "aten.scatter_reduce"))
    reads = {"src": reach(call, source, hit)} if source else {}
    return _scatter(call, hit, accumulate=adding or call.arg("reduce") is not None, reads=reads)


@formula("aten.index_copy", "aten.index_add", "aten.index_reduce", "aten.put")
def index_copy(call: Call) -> Cost:
    """An element per element of the source."""
    adding = call.op.target.startswith(("aten.index_add", "aten.index_reduce"))
    return _scatter(call, call.tensor("source").numel, accumulate=adding or call.flag("accumulate"))


@formula("aten.index_fill")
def index_fill(call: Call) -> Cost:
    """The slices that the index names."""
    target = call.tensor("self")
    length = target.shape[call.integer("dim", 0)] if target.shape else 1
    return _scatter(call, target.numel // max(length, 1) * call.tensor("index").numel)


@formula("aten.masked_scatter")
def masked_scatter(call: Call) -> Cost:
    """The whole source, in the places that the mask names; places are numbered first, an addition each."""
    target, mask, source = call.tensor("self"), call.tensor("mask"), call.tensor("source")
    hit = min(source.numel, target.numel)
    return _scatter(call, hit, reads={"source": reach(call, source, hit)}, flops=vector("int64", mask.numel))


@formula("aten.one_hot")
def one_hot(call: Call) -> Cost:
    """Zeros, then a one per index (Onehot.cpp)."""
    run = Kernels(call)
    run.kernel("zeros", (), run.result())
    run.kernel("scatter_", run.given("self"), run.result(call.tensor("self").numel))
    return run.cost()


@formula("aten.nonzero_static")
def nonzero_static(call: Call) -> Cost:
    """A comparison per element; the result has a given size."""
    source = call.tensor("self")
    return call.cost(vector=vector(source.dtype, source.numel))


def _filled_under_mask(call: Call) -> Cost:
    target = call.tensor("self")
    if call.op.mutates:
        return call.cost(vector=vector(target.dtype, target.numel))
    run = Kernels(call)
    result = run.kernel("clone", run.given("self"), run.result())
    run.kernel("masked_fill_", (result, *run.others("self")), result, flops=target.numel)
    return run.cost()


def _gather(call: Call, name: str) -> Cost:
    return call.cost(reads={name: reach(call, call.tensor(name), call.output.numel)})


def _scatter(
    call: Call,
    hit: int,
    *,
    accumulate: bool = False,
    reads: dict[str, int] | None = None,
    flops: dict[str, float] | None = None,
) -> Cost:
    target = call.tensor("self")
    touched = reach(call, target, hit)
    work = vector(target.dtype, hit if accumulate else 0) if flops is None else flops
    if "self" in call.op.mutates:
        before = touched if accumulate else 0
        return call.cost(vector=work, reads={**(reads or {}), "self": before}, writes=touched)
    if call.op.mutates:
        return call.cost(vector=work, reads=reads, writes=reach(call, call.output) + touched)
    run, name = Kernels(call), operator_name(call.op.target).removeprefix("aten.")
    for _ in range(2 if name == "scatter_reduce" else 1):  # whose caller and callee both copy
        run.kernel("copy_" if name.startswith(_COPIES_ITSELF) else "clone", run.given("self"), run.result())
    hit_again = run.result(hit)
    run.kernel(
        name if name.startswith(_COPIES_ITSELF) else "_index_put_impl_" if "index_put" in name else f"{name}_",
        (*run.others("self", reads=reads), *((hit_again,) if accumulate else ())),
        hit_again,
        flops=sum(work.values()),
        dtype=next(iter(work), ""),
    )
    return run.cost()


_COPIES_ITSELF = ("scatter", "index_copy", "index_add", "index_reduce")
"""Structured kernels, which copy `self` into their result before they begin (TensorAdvancedIndexing.cpp)."""


def _selected(target: Tensor, picks: list[Tensor | None]) -> int:
    """Elements that integer indices select: their broadcast shape times the dimensions left alone."""
    picked = prod(broadcast(p for p in picks if p is not None))
    indexed = {d for d, p in enumerate(picks) if p is not None}
    return picked * prod(size for d, size in enumerate(target.shape) if d not in indexed)
