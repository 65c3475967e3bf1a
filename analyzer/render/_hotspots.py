"""Ops or kernels folded over layers: one row for what every layer repeats."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..analysis import OpAnalysis, PhaseAnalysis
from ..cost import Status, operator_name
from ..roofline import Bound
from .registry import By


@dataclass(frozen=True, slots=True, kw_only=True)
class Hotspot:
    """Ops, or fused kernels, of one kind with their total cost.

    Attributes:
        module: module path, numbers that differ between the ops replaced by `*`.
        op: operator or kernel, or how many different ones.
        calls: ops or kernels in the row.
        shape: of every one of them; of a kernel's op with most work.
        dtype: of every one of them.
        flops: executed, in total.
        bytes: read and written, in total.
        intensity: FLOPs per byte.
        bound: what most of the time is limited by.
        seconds: bound, in total.
        estimate: seconds that they are likely to take, in total.
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
    estimate: float
    share: float
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is folded into rows: an op, or a kernel of several with the op that leads it."""

    op: OpAnalysis
    name: str
    shape: str
    flops: float
    bytes: int
    bound: Bound
    seconds: float
    estimate: float


def hotspots(phase: PhaseAnalysis, by: By) -> tuple[Hotspot, ...]:
    """All rows of a phase in the execution asked for, the slowest first; ops that run no kernel are left out."""
    parts = _fused_kernels(phase) if phase.execution == "compiled" else _single_ops(phase)
    groups: dict[tuple[object, ...], list[_Part]] = {}
    for part in parts:
        key: tuple[object, ...] = (_NUMBER.sub(_ANY, part.op.module),)
        if by == "op":
            key += (part.name, part.op.target, part.shape, part.op.dtype, part.op.file, part.op.line)
        groups.setdefault(key, []).append(part)
    rows = [_row(group, phase.seconds.bound) for group in groups.values()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _single_ops(phase: PhaseAnalysis) -> Iterator[_Part]:
    estimates: defaultdict[str, float] = defaultdict(float)
    for kernel in phase.executions.eager.kernels:
        estimates[kernel.ops[0]] += kernel.seconds.estimate
    for op in phase.ops:
        if op.status is not Status.FREE:
            name = short_operator(op.target)
            yield _Part(
                op=op,
                name=f"{name} ({op.backend})" if op.backend else name,
                shape=op.shape,
                flops=op.flops_executed,
                bytes=op.bytes_read + op.bytes_written,
                bound=op.bound,
                seconds=op.seconds,
                estimate=estimates[op.name],
            )


def _fused_kernels(phase: PhaseAnalysis) -> Iterator[_Part]:
    by_name = {op.name: op for op in phase.ops}
    for kernel in phase.executions.compiled.kernels:
        ops = [by_name[name] for name in kernel.ops]
        lead = max(ops, key=lambda op: op.flops_executed)
        yield _Part(
            op=lead,
            name=short_operator(kernel.name),
            shape=lead.shape,
            flops=kernel.flops,
            bytes=kernel.bytes_l2,
            bound=kernel.bound,
            seconds=kernel.seconds.bound,
            estimate=kernel.seconds.estimate,
        )


def short_operator(target: str) -> str:
    """`aten.linear.default` -> `linear`; other namespaces stay."""
    name = operator_name(target).removeprefix("aten.")
    return "sdpa" if name == "scaled_dot_product_attention" else name


_NUMBER = re.compile(r"\d+")
_ANY = "0"
"""Stands for all numbers: a path that has `*` of its own is no path with a number in its place."""


def _row(parts: Sequence[_Part], phase_seconds: float) -> Hotspot:
    times: defaultdict[Bound, float] = defaultdict(float)
    for part in parts:
        times[part.bound] += part.seconds
    seconds = sum(part.seconds for part in parts)
    flops = sum(part.flops for part in parts)
    moved = sum(part.bytes for part in parts)
    slowest = max(parts, key=lambda part: part.seconds).op
    names = dict.fromkeys(part.name for part in parts)
    return Hotspot(
        module=_folded([part.op.module for part in parts]),
        op=next(iter(names)) if len(names) == 1 else f"{len(names)} operators",
        calls=len(parts),
        shape=_common([part.shape for part in parts]),
        dtype=_common([part.op.dtype for part in parts]),
        flops=flops,
        bytes=moved,
        intensity=flops / moved if moved else 0.0,
        bound=max(times, key=lambda bound: times[bound]),
        seconds=seconds,
        estimate=sum(part.estimate for part in parts),
        share=seconds / phase_seconds if phase_seconds else 0.0,
        place=f"{slowest.file}:{slowest.line}" if slowest.file else "",
    )


def _folded(modules: Sequence[str]) -> str:
    """One path for paths that differ in numbers only: those that differ become `*`."""
    numbers = zip(*(_NUMBER.findall(module) for module in modules), strict=True)
    shown = iter([found[0] if len(set(found)) == 1 else "*" for found in numbers])
    return _NUMBER.sub(lambda _: next(shown), modules[0])


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else ""
