"""Sorting, selection, binary search and counting.

A sort is n log2 n comparisons a row, a selection n, a binary search log2 n. Inputs are charged one reading:
radix sorts and radix selection on a GPU pass over them several times, which is a property of the kernel
chosen.
"""

from math import ceil, log2

from ..cost import Call, Cost, formula
from ..graph import Tensor
from .arithmetic import reach, vector


@formula("aten.sort", "aten.argsort", "aten.msort", "aten.mode")
def sort(call: Call) -> Cost:
    """A row of n takes n log2 n comparisons along one dimension."""
    source = call.tensor("self")
    dim = 0 if call.op.target.startswith("aten.msort") else call.integer("dim", -1)
    length = source.shape[dim] if source.shape else 1
    return call.cost(vector=vector(source.dtype, source.numel * log2(max(length, 1))))


@formula("aten.topk", "aten.kthvalue", "aten.median", "aten.nanmedian")
def select(call: Call) -> Cost:
    """A comparison per element."""
    source = call.tensor("self")
    return call.cost(vector=vector(source.dtype, source.numel))


@formula("aten.searchsorted")
def searchsorted(call: Call) -> Cost:
    """A binary search per value in its row of the sorted sequence."""
    return _binary_search(call, "sorted_sequence")


@formula("aten.bucketize")
def bucketize(call: Call) -> Cost:
    """A binary search per value among the boundaries."""
    return _binary_search(call, "boundaries")


@formula("aten.histc", "aten.bincount")
def count(call: Call) -> Cost:
    """Scale to a bin (for `histc`) and add one, or the weight; `bincount` reads the largest back, its result's size."""
    source: Tensor = call.tensor("self")
    scaled = 2 if call.op.target.startswith("aten.histc") else 0
    return call.cost(vector=vector(source.dtype, (1 + scaled) * source.numel), waits=not scaled)


@formula("aten.isin")
def isin(call: Call) -> Cost:
    """Each element against each test element when those are few, else both sorted: as PyTorch chooses."""
    elements = call.optional("elements")
    tests = call.optional("test_elements")
    n, m = (elements.numel if elements else 1), (tests.numel if tests else 1)
    few = m < 10 * max(n, 1) ** 0.145
    work = n * m if few else (n + m) * log2(max(n + m, 1))
    return call.cost(vector=vector((elements or call.inputs[0]).dtype, work))


def _binary_search(call: Call, name: str) -> Cost:
    table, queries = call.tensor(name), call.output.numel
    probes = ceil(log2(table.shape[-1] + 1)) if table.shape else 1
    return call.cost(vector=vector(table.dtype, queries * probes), reads={name: reach(call, table, queries * probes)})
