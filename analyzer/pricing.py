"""Graph x Gpu -> a Cost for every op. Formulas are found by looking into the `formulas` package."""

import functools
import importlib
import pkgutil

from ..hardware.gpu import Gpu
from . import formulas
from .cost import Call, Cost, Status, find_formula, unpriced
from .graph import Graph, Op


def price(graph: Graph, gpu: Gpu) -> tuple[Cost, ...]:
    """The cost of every op, in the graph's order.

    An op is free when its results live where its inputs live and it writes nothing; priced when a formula exists for
    its operator; else unpriced: charged its inputs and outputs, and named in the report.
    """
    _load_formulas()
    return tuple(_price(graph, op, gpu) for op in graph.ops)


def _price(graph: Graph, op: Op, gpu: Gpu) -> Cost:
    if graph.is_view(op):
        return _FREE
    call = Call(graph, op, gpu)
    formula = find_formula(op.target)
    return formula(call) if formula is not None else unpriced(call)


_FREE = Cost(status=Status.FREE)


@functools.cache
def _load_formulas() -> None:
    for module in pkgutil.iter_modules(formulas.__path__):
        importlib.import_module(f"{formulas.__name__}.{module.name}")
