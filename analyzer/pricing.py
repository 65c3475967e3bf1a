"""Graph x Gpu -> a Cost for every op. Formulas are those of the `formulas` package and those that plug-ins register."""

import functools
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from math import fsum

from ..hardware.gpu import Gpu
from . import formulas
from .cost import ALLOWS_TF32, Access, Call, Cost, Part, Status, bytes_by_role, find_formula, unpriced
from .errors import FxroofError
from .graph import Graph, Op
from .roofline import place

PLUGINS = "fxroof.formulas"
"""Entry point group of packages that bring formulas: each names a module that registers them when imported."""


class PluginError(FxroofError):
    """A package that brings formulas cannot be used."""


def price(graph: Graph, gpu: Gpu) -> tuple[Cost, ...]:
    """The cost of one run of every op, in the graph's order; an op in a loop runs `Op.repeat` times.

    An op is free when its results live where its inputs live and it writes nothing; priced when a formula exists for
    its operator; else unpriced: charged its inputs and outputs, and named in the report. An op that another op's kernel
    computes on chip adds its work there. Of the branches of a condition the cheapest is charged, since a bound must not
    exceed any run.

    Raises:
        PluginError: a package's formulas cannot be loaded.
    """
    load_formulas()
    costs = _prices(graph, gpu)
    if any(op.kernel for op in graph.ops):
        _move_work_into_kernels(graph, costs)
    if any(op.branch for op in graph.ops):
        _charge_cheapest_branches(graph, costs, gpu)
    return tuple(costs)


@functools.cache
def load_formulas() -> None:
    """Register all formulas: ours, then those of installed packages, in the order of their names.

    Raises:
        PluginError: a package's module does not import, or registers an operator that has a formula already.
    """
    for module in pkgutil.iter_modules(formulas.__path__):
        importlib.import_module(f"{formulas.__name__}.{module.name}")
    for plugin in sorted(entry_points(group=PLUGINS), key=lambda entry: (entry.name, entry.value)):
        _load_plugin(plugin)


def _load_plugin(plugin: EntryPoint) -> None:
    try:
        plugin.load()
    except Exception as error:
        package = plugin.dist.name if plugin.dist else plugin.value
        raise PluginError(
            f"The formulas of the installed package {package} (entry point {plugin.name} = {plugin.value}) "
            f"cannot be loaded: {type(error).__name__}: {error}",
            f"Repair or uninstall {package}; docs/formulas.md says what its module must do.",
        ) from error


def _prices(graph: Graph, gpu: Gpu) -> list[Cost]:
    """Each kind of op is priced once; its likes have the same cost on tensors of their own."""
    known: dict[int, tuple[tuple[int, ...], Cost]] = {}
    costs: list[Cost] = []
    for op, kind in zip(graph.ops, graph.kinds, strict=True):
        tensors = (*op.inputs, *op.outputs)
        if kind not in known:
            known[kind] = tensors, _price(graph, op, gpu)
            costs.append(known[kind][1])
        else:
            first, cost = known[kind]
            costs.append(_moved(cost, dict(zip(first, tensors, strict=True))) if cost.traffic else cost)
    return costs


def _moved(cost: Cost, tensors: Mapping[int, int]) -> Cost:
    """The same cost on other tensors; `dataclasses.replace` takes five times as long."""
    traffic = [
        Access(tensor=tensors[a.tensor], read=a.read, written=a.written, expected_read=a.expected_read)
        for a in cost.traffic
    ]
    parts = [Part(name=part.name, cost=_moved(part.cost, tensors)) for part in cost.parts]
    return Cost(
        status=cost.status,
        matmul=cost.matmul,
        vector=cost.vector,
        special=cost.special,
        traffic=tuple(traffic),
        scratch_read=cost.scratch_read,
        scratch_written=cost.scratch_written,
        dense_matmul=cost.dense_matmul,
        tf32=cost.tf32,
        backend=cost.backend,
        note=cost.note,
        gemms=cost.gemms,
        attended=cost.attended,
        exchange=cost.exchange,
        parts=tuple(parts),
        waits=cost.waits,
        quantises=cost.quantises,
    )


def _price(graph: Graph, op: Op, gpu: Gpu) -> Cost:
    if graph.is_view(op):
        return _FREE
    call = Call(graph, op, gpu)
    formula = find_formula(op.target)
    cost = formula(call) if formula is not None else unpriced(call)
    return _rounded(cost) if call.flag(ALLOWS_TF32) else cost


def _rounded(cost: Cost) -> Cost:
    """The cost where float32 operands may be rounded to TF32."""
    parts = tuple(Part(name=part.name, cost=_rounded(part.cost)) for part in cost.parts)
    return replace(cost, tf32="float32" in cost.matmul, parts=parts)


_FREE = Cost(status=Status.FREE)


def _move_work_into_kernels(graph: Graph, costs: list[Cost]) -> None:
    kernels = {op.name: index for index, op in enumerate(graph.ops)}
    for index, op in enumerate(graph.ops):
        if op.kernel:
            whole = kernels[op.kernel]
            times = op.repeat / graph.ops[whole].repeat
            costs[whole] = _with_work(costs[whole], costs[index], times)
            costs[index] = _uncharged(costs[index], f"computed in the kernel of {op.kernel}")


def _with_work(cost: Cost, inner: Cost, times: float) -> Cost:
    dense = cost.dense_matmul
    return replace(
        cost,
        matmul=_summed(cost.matmul, inner.matmul, times),
        vector=_summed(cost.vector, inner.vector, times),
        special=cost.special + inner.special * times,
        dense_matmul=None if dense is None else dense + inner.matmul_flops * times,
    )


def _summed(flops: Mapping[str, float], more: Mapping[str, float], times: float) -> dict[str, float]:
    return {dtype: flops.get(dtype, 0) + more.get(dtype, 0) * times for dtype in (*flops, *more)}


def _charge_cheapest_branches(graph: Graph, costs: list[Cost], gpu: Gpu) -> None:
    """Keep the costs of the branch that takes least time, innermost conditions first; say so on the condition."""
    conditions = {op.name: index for index, op in enumerate(graph.ops)}
    members: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, op in enumerate(graph.ops):
        for depth in range(1, len(op.branch) + 1):
            members[op.branch[:depth]].append(index)
    seconds = functools.cache(lambda index: _seconds(graph, costs[index], gpu) * graph.ops[index].repeat)
    branches: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(lambda: {"0": [], "1": []})
    for path, indices in members.items():
        condition, _, number = path[-1].rpartition(":")
        branches[*path[:-1], condition][number] = indices
    dropped: set[int] = set()
    for path in sorted(branches, key=len, reverse=True):
        times = {
            number: fsum(seconds(i) for i in indices if i not in dropped) for number, indices in branches[path].items()
        }
        kept = min(times, key=lambda number: times[number])
        for number, indices in branches[path].items():
            if number != kept:
                dropped.update(indices)
        here = conditions[path[-1]]
        costs[here] = replace(costs[here], note=_choice(times, kept))
    for index in dropped:
        costs[index] = _uncharged(costs[index], "on a branch that is not charged")


def _choice(times: dict[str, float], kept: str) -> str:
    names = {"0": "true", "1": "false"}
    longest = max(times.values())
    if longest == times[kept]:
        return "a condition on data: its branches cost the same, one is charged"
    ratio = f"{longest / times[kept]:.3g} times as long" if times[kept] else "longer"
    return f"a condition on data: its {names[kept]} branch is charged, the other takes {ratio}"


def _seconds(graph: Graph, cost: Cost, gpu: Gpu) -> float:
    moved = sum(read + written for read, written in bytes_by_role(graph, cost).values())
    return place(cost, moved, moved, gpu).seconds


def _uncharged(cost: Cost, note: str) -> Cost:
    # an op without a formula stays named: what it would have cost is not known
    status = Status.UNPRICED if cost.status is Status.UNPRICED else Status.FREE
    return Cost(status=status, note=note)
