"""What a report must be beyond its types: numbers that there can be, and references that lead somewhere.

A report out of a file passes here once, so that whoever prices, compares or renders it need not expect less.
"""

import functools
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from math import prod
from operator import attrgetter
from sys import float_info
from typing import TYPE_CHECKING, Any, Union, cast, get_args, get_origin, get_type_hints

from .analysis import PhaseAnalysis
from .execution import Execution
from .finding import Alternative, Finding
from .graph import ITEM_BITS, Graph, Op, Storage, Tensor, TensorRef
from .limits import Budget, Verdict
from .memory import CachePart, Memory
from .roofline import Bound
from .scenario import Scenario

if TYPE_CHECKING:
    from .report import Report, Run

LARGEST = 1e60
"""No figure is larger: beyond it sums and products of figures would leave what a float can hold."""

MOST_ELEMENTS = 2**63
"""torch counts elements in 64 bits, and nothing that figures are computed of is more."""


def fault(report: "Report") -> str:
    """What is wrong with a report, and where: `runs[0].traced: there is no trace 3`; empty where nothing is."""
    return _wrong_number(report) or next(chain(_traces(report), _runs(report)), "")


_SIGNED: dict[type, frozenset[str]] = {
    Alternative: frozenset({"saving_seconds", "saving_bound_seconds"}),
    Budget: frozenset({"limit"}),
    CachePart: frozenset({"fixed_bytes"}),
    Finding: frozenset({"saving_seconds", "saving_bound_seconds"}),
    Memory: frozenset({"headroom_bytes"}),
    Verdict: frozenset({"value", "base", "limit"}),
}
"""Fields that can be below 0: remedies may cost, memory may be missing."""

_APART: dict[type, frozenset[str]] = {
    Finding: frozenset({"evidence"}),
    Graph: frozenset({"tensors", "ops", "inputs", "outputs"}),
}
"""Fields that are looked at below: rules may show any number, ops take any, and tensors are many and alike."""


_GIVEN = (Graph, Scenario, Storage)
"""Classes of what was given; the other figures are computed of it."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the numbers of a class are.

    Attributes:
        plain: names of fields that are a number.
        values: reads them.
        optional: names of fields that are a number or nothing.
        dicts: names of fields that are numbers by name.
        inner: names of fields that hold objects, one, several, or by name.
        signed: names of those that can be below 0.
        most: the largest number.
    """

    plain: tuple[str, ...]
    values: Callable[[object], Any]
    optional: tuple[str, ...]
    dicts: tuple[str, ...]
    inner: tuple[str, ...]
    signed: frozenset[str]
    most: float


@functools.cache
def _plan(kind: type) -> _Plan:
    hints = get_type_hints(kind)
    apart = _APART.get(kind, frozenset())
    found: dict[str, list[str]] = {"plain": [], "optional": [], "dicts": [], "inner": []}
    signed = _SIGNED.get(kind, frozenset())
    for field in fields(cast("Any", kind)):
        hint = hints[field.name]
        if field.name not in apart:
            group = "inner" if _holds_objects(hint) else _group(hint)
            # a lone field that can be below 0 is looked at by itself
            found.get("optional" if group == "plain" and field.name in signed else group, []).append(field.name)
    plain = tuple(found["plain"])
    return _Plan(
        plain=plain,
        values=attrgetter(*plain) if len(plain) > 1 else functools.partial(_few, plain),
        optional=tuple(found["optional"]),
        dicts=tuple(found["dicts"]),
        inner=tuple(found["inner"]),
        signed=signed,
        most=MOST_ELEMENTS if kind in _GIVEN else LARGEST,
    )


def _few(names: tuple[str, ...], value: object) -> tuple[float, ...]:
    return tuple(getattr(value, name) for name in names)


def _group(hint: Any) -> str:
    if hint in (int, float):
        return "plain"
    if get_origin(hint) in (Union, types.UnionType) and set(get_args(hint)) & {int, float}:
        return "optional"
    if get_origin(hint) is dict and _group(get_args(hint)[1]):
        return "dicts"
    return ""


def _holds_objects(hint: Any) -> bool:
    return is_dataclass(hint) or any(map(_holds_objects, get_args(hint)))


def _wrong_number(value: Any) -> str:
    """The path of the first number below 0 or too large, and what is wrong with it."""
    kind: type = type(value)
    plan = _plan(kind)
    if plan.plain:
        numbers = plan.values(value)
        if min(numbers) < 0 or max(numbers) > plan.most:
            return next(_numbers(zip(plan.plain, numbers, strict=True), 0.0, plan.most))
    for name in plan.optional:
        least = -plan.most if name in plan.signed else 0.0
        if wrong := next(_numbers([(name, getattr(value, name))], least, plan.most), ""):
            return wrong
    for name in plan.dicts:
        least = -plan.most if name in plan.signed else 0.0
        if wrong := next(_numbers(getattr(value, name).items(), least, plan.most), ""):
            return f"{name}.{wrong}"
    for name in plan.inner:
        if wrong := _wrong_inside(getattr(value, name)):
            return f"{name}{wrong}"
    return ""


def _wrong_inside(held: Any) -> str:
    if isinstance(held, tuple):
        for index, item in enumerate(held):
            if wrong := _wrong_number(item) if is_dataclass(item) else _wrong_inside(item):
                return f"[{index}].{wrong}"
    elif isinstance(held, dict):
        for key, item in held.items():
            if wrong := _wrong_inside(item):
                return f".{key}{wrong}"
    elif is_dataclass(held) and (wrong := _wrong_number(held)):
        return f".{wrong}"
    return ""


def _numbers(named: Iterable[tuple[str, Any]], least: float, most: float) -> Iterator[str]:
    for name, number in named:
        if isinstance(number, int | float) and not least <= number <= most:
            yield f"{name} is too large a number" if abs(number) > most else f"{name} is {number:.6g}, below 0"


def _traces(report: "Report") -> Iterator[str]:
    if not report.traces:
        yield "traces: there is none"
    for index, traced in enumerate(report.traces):
        where = f"traces[{index}]"
        yield from _scenario(f"{where}.scenario", traced.scenario)
        for name, graph in traced.graphs.items():
            if graph.phase != name:
                yield f"{where}.graphs.{name}: is the graph of {graph.phase!r}"
            for wrong in _graph(graph):
                yield f"{where}.graphs.{name}.{wrong}"


def _scenario(where: str, scenario: Scenario) -> Iterator[str]:
    for name in ("batch_size", "input_len", "tp", "ep", "step_len"):
        if getattr(scenario, name) < 1:
            yield f"{where}.{name}: is {getattr(scenario, name)}, below 1"
    if scenario.prefix_len >= scenario.input_len:
        yield f"{where}.prefix_len: leaves nothing of the prompt"


def _graph(graph: Graph) -> Iterator[str]:
    for name in ("turns", "expert_ranks"):
        if getattr(graph, name) < 1:
            yield f"{name}: is {getattr(graph, name)}, below 1"
    yield from _tensors(graph)
    there = range(len(graph.tensors))
    for name in ("inputs", "outputs"):
        yield from _leading_nowhere(name, getattr(graph, name), there)
    names = {op.name for op in graph.ops}
    if len(names) != len(graph.ops):
        yield "ops: two have the same name"
    for index, op in enumerate(graph.ops):
        for wrong in _op(op, there, names):
            yield f"ops[{index}].{wrong}"


def _tensors(graph: Graph) -> Iterator[str]:
    known: set[tuple[object, ...]] = set()
    for index, tensor in enumerate(graph.tensors):
        layout = (tensor.dtype, tensor.shape, tensor.stride, tensor.offset)
        if layout not in known:
            known.add(layout)
            if wrong := _wrong_layout(tensor):
                yield f"tensors[{index}].{wrong}"
        if not 0 <= tensor.storage < len(graph.storages):
            yield f"tensors[{index}].storage: there is no storage {tensor.storage}"


def _wrong_layout(tensor: Tensor) -> str:
    if tensor.dtype not in ITEM_BITS:
        return f"dtype: {tensor.dtype!r} is none"
    if len(tensor.shape) != len(tensor.stride):
        return f"stride: {len(tensor.stride)} for a shape of {len(tensor.shape)} dimensions"
    if min((0, tensor.offset, *tensor.shape, *tensor.stride)) < 0:
        return "shape: is below 0, or its stride or offset"
    if prod(size for size in tensor.shape if size) > MOST_ELEMENTS or max((0, *tensor.stride)) > MOST_ELEMENTS:
        return "shape: has more elements than there can be"
    return ""


def _op(op: Op, there: range, names: Collection[str]) -> Iterator[str]:
    if not 1 <= op.repeat <= MOST_ELEMENTS:
        yield f"repeat: is {op.repeat if op.repeat < 1 else 'too large a number'}"
    yield from _leading_nowhere("outputs", op.outputs, there)
    for name, value in op.args.items():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, TensorRef):
                yield from _leading_nowhere(f"args.{name}", (item.tensor,), there)
            elif isinstance(item, int) and abs(item) > MOST_ELEMENTS:
                yield f"args.{name}: is too large a number"
    for name in op.mutates:
        if name not in op.args:
            yield f"mutates: there is no argument {name!r}"
    if op.kernel and op.kernel not in names:
        yield f"kernel: there is no op {op.kernel!r}"
    for part in op.branch:
        condition, _, number = part.rpartition(":")
        if condition not in names or number not in ("0", "1"):
            yield f"branch: {part!r} is none"


def _leading_nowhere(name: str, tensors: Iterable[int], there: range) -> Iterator[str]:
    for tensor in tensors:
        if tensor not in there:
            yield f"{name}: there is no tensor {tensor}"


def _runs(report: "Report") -> Iterator[str]:
    for index, run in enumerate(report.runs):
        if run.traced >= len(report.traces):
            yield f"runs[{index}].traced: there is no trace {run.traced}"
        else:
            for wrong in _run(run, report.traces[run.traced].graphs):
                yield f"runs[{index}].{wrong}"


def _run(run: "Run", traced: Collection[str]) -> Iterator[str]:
    yield from _scenario("scenario", run.scenario)
    if not run.gpu.memory_bandwidth:
        yield "gpu.memory_bandwidth: is 0"
    if run.memory is not None and run.memory.usable_bytes == 0:
        yield "memory.usable_bytes: is 0"
    if run.serving is not None and run.serving.weights_bound_until not in ("", "kv_cache", "compute"):
        yield f"serving.weights_bound_until: {run.serving.weights_bound_until!r} is nothing that takes over"
    names = [phase.name for phase in run.phases]
    if len(set(names)) != len(names):
        yield "phases: two have the same name"
    for index, phase in enumerate(run.phases):
        if phase.name not in traced:
            yield f"phases[{index}].name: there is no graph of {phase.name!r}"
        for wrong in _phase(phase):
            yield f"phases[{index}].{wrong}"
    for index, finding in enumerate(run.findings):
        for name, value in finding.evidence.items():
            if isinstance(value, int) and abs(value) > float_info.max:
                yield f"findings[{index}].evidence.{name}: is too large a number"
    for name, steps in run.waterfall.items():
        for index, step in enumerate(steps):
            if step.finding is not None and step.finding >= len(run.findings):
                yield f"waterfall.{name}[{index}].finding: there is no finding {step.finding}"


def _phase(phase: PhaseAnalysis) -> Iterator[str]:
    if phase.execution not in ("eager", "compiled"):
        yield f"execution: {phase.execution!r} is none"
    if phase.turns < 1:
        yield f"turns: is {phase.turns}, below 1"
    yield from _shares("bound_share", phase.bound_share)
    names = {op.name for op in phase.ops}
    if len(names) != len(phase.ops):
        yield "ops: two have the same name"
    for name in ("eager", "compiled"):
        for wrong in _execution(phase.executions.of(name), names):
            yield f"executions.{name}.{wrong}"


def _execution(execution: Execution, names: set[str]) -> Iterator[str]:
    yield from _shares("estimate_share", execution.estimate_share)
    for index, kernel in enumerate(execution.kernels):
        if not kernel.ops or not names.issuperset(kernel.ops):
            yield f"kernels[{index}].ops: {'there is none' if not kernel.ops else 'one is not among the phase’s'}"


def _shares(field: str, shares: dict[str, float]) -> Iterator[str]:
    for name, share in shares.items():
        if name not in _CLASSES:
            yield f"{field}: {name!r} is no class"
        elif share > _WHOLE:
            yield f"{field}.{name}: is {share:.6g}, more than all"


_CLASSES = frozenset(bound.value for bound in Bound)
_WHOLE = 1.001
"""A share of all, rounding included."""
