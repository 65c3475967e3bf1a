"""Ops folded over layers: one row for what every layer repeats."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis import OpAnalysis, PhaseAnalysis
from ..cost import Status, operator_name
from ..roofline import Bound
from .registry import By


@dataclass(frozen=True, slots=True, kw_only=True)
class Hotspot:
    """Ops of one kind with their total cost.

    Attributes:
        module: module path, numbers that differ between the ops replaced by `*`.
        op: operator, or how many different ones.
        calls: ops in the row.
        shape: of every one of them.
        dtype: of every one of them.
        flops: executed, in total.
        bytes: read and written, in total.
        intensity: FLOPs per byte.
        bound: what most of the time is limited by.
        seconds: bound, in total.
        share: of the phase's bound.
        place: file and line of the user's code; of the slowest op where there are several.
    """

    module: str
    op: str
    calls: int
    shape: str
    dtype: str
    flops: float
    bytes: int
    intensity: float
    bound: Bound
    seconds: float
    share: float
    place: str


def hotspots(phase: PhaseAnalysis, by: By) -> tuple[Hotspot, ...]:
    """All rows of a phase, the slowest first; ops that run no kernel are left out."""
    groups: dict[tuple[object, ...], list[OpAnalysis]] = {}
    for op in phase.ops:
        if op.status is Status.FREE:
            continue
        key: tuple[object, ...] = (_NUMBER.sub("*", op.module),)
        if by == "op":
            key += (op.target, op.shape, op.dtype, op.file, op.line)
        groups.setdefault(key, []).append(op)
    rows = [_row(ops, phase.seconds.bound) for ops in groups.values()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def short_operator(target: str) -> str:
    """`aten.linear.default` -> `linear`; other namespaces stay."""
    name = operator_name(target).removeprefix("aten.")
    return "sdpa" if name == "scaled_dot_product_attention" else name


_NUMBER = re.compile(r"\d+")


def _row(ops: Sequence[OpAnalysis], phase_seconds: float) -> Hotspot:
    times: Counter[Bound] = Counter()
    for op in ops:
        times[op.bound] += op.seconds  # type: ignore[assignment]  # Counter counts seconds here
    seconds = sum(op.seconds for op in ops)
    flops = sum(op.flops_executed for op in ops)
    moved = sum(op.bytes_read + op.bytes_written for op in ops)
    slowest = max(ops, key=lambda op: op.seconds)
    return Hotspot(
        module=_folded([op.module for op in ops]),
        op=_operators(ops),
        calls=len(ops),
        shape=_common([op.shape for op in ops]),
        dtype=_common([op.dtype for op in ops]),
        flops=flops,
        bytes=moved,
        intensity=flops / moved if moved else 0.0,
        bound=max(times, key=lambda bound: times[bound]),
        seconds=seconds,
        share=seconds / phase_seconds if phase_seconds else 0.0,
        place=f"{slowest.file}:{slowest.line}" if slowest.file else "",
    )


def _folded(modules: Sequence[str]) -> str:
    """One path for paths that differ in numbers only: those that differ become `*`."""
    numbers = zip(*(_NUMBER.findall(module) for module in modules), strict=True)
    shown = iter([found[0] if len(set(found)) == 1 else "*" for found in numbers])
    return _NUMBER.sub(lambda _: next(shown), modules[0])


def _operators(ops: Sequence[OpAnalysis]) -> str:
    names = {short_operator(op.target): op.backend for op in ops}
    if len(names) > 1:
        return f"{len(names)} operators"
    name, backend = next(iter(names.items()))
    return f"{name} ({backend})" if backend else name


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else ""
