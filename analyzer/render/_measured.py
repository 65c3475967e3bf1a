"""A measurement as text: each phase measured beside floor, bound and estimate, and the ops that differ most."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import fsum

from rich.text import Text

from ..cost import operator_name
from ..measured import Measured, MeasuredCall, MeasuredPhase
from . import _units as units
from ._layout import Column, bullets, clean, fact, printed, table, title, wrapped
from .registry import Options


def terminal(measured: Measured, options: Options) -> str:
    """The whole measurement."""
    return printed(_lines(measured, options), options)


def _lines(measured: Measured, options: Options) -> Iterator[Text]:
    width = options.width
    yield from _head(measured, width)
    for phase in measured.phases:
        yield Text()
        yield title(f"{clean(phase.name)} · {_tokens(phase)}", width)
        yield from _times(phase, width)
        yield from _too_fast(phase, width)
        yield from _worst(phase, options)
    yield Text()
    yield from bullets(_rests_on(measured), width, style="dim")


def _head(measured: Measured, width: int) -> Iterator[Text]:
    machine, model, scenario = measured.machine, measured.model, measured.scenario
    device = [clean(machine.name), machine.device]
    device += [f"driver {clean(machine.driver)}"] if machine.driver else []
    device += [f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"] if machine.threads else []
    yield from fact("measured", [*device, f"torch {clean(machine.torch_version)}", machine.date], width)
    yield from fact(
        "model",
        [clean(model.name), clean(model.source), f"{units.byte_count(model.parameter_bytes)} of weights"],
        width,
    )
    lengths = [f"batch {scenario.batch_size}"]
    if any(phase.tokens for phase in measured.phases):
        lengths += [f"{scenario.input_len:,} prompt tokens", f"decode at context {scenario.context_len:,}"]
    yield from fact("scenario", lengths, width)
    yield from fact("priced on", [clean(measured.gpu.name), _SOURCES.get(measured.gpu_source, "")], width)


_SOURCES = {
    "catalogue": "from the catalogue",
    "file": "from a file",
    "calibration": "measured just now, quickly: `fxroof calibrate -o mycpu.toml` measures more and keeps it",
}


def _tokens(phase: MeasuredPhase) -> str:
    if not phase.tokens:
        return "one forward"
    return f"{phase.tokens:,} token{'s' if phase.tokens > 1 else ''}"


def _times(phase: MeasuredPhase, width: int) -> Iterator[Text]:
    rows: list[tuple[str, float, float, object]] = [("eager", phase.bound, phase.estimate, phase.eager)]
    if phase.compiled is not None:
        rows.append((f"compiled, {phase.compiled_mode}", phase.compiled_bound, phase.compiled_estimate, phase.compiled))
    timings = [phase.eager, *([phase.compiled] if phase.compiled else [])]
    yield from table(
        [
            Column(header="time", cells=[name for name, *_ in rows]),
            Column(header="floor", cells=[units.seconds(phase.floor)] * len(rows), right=True),
            Column(header="bound", cells=[units.seconds(bound) for _, bound, *_ in rows], right=True),
            Column(header="estimate", cells=[units.seconds(estimate) for _, _, estimate, _ in rows], right=True),
            Column(header="measured", cells=[Text(units.seconds(t.median), style="bold") for t in timings], right=True),
            Column(
                header="of bound",
                cells=[_ratio(t.median, bound) for t, (_, bound, *_) in zip(timings, rows, strict=True)],
                right=True,
            ),
            Column(
                header="of estimate",
                cells=[_ratio(t.median, estimate) for t, (_, _, estimate, _) in zip(timings, rows, strict=True)],
                right=True,
            ),
            Column(header="fastest", cells=[units.seconds(t.least) for t in timings], right=True, drop=1),
            Column(header="spread", cells=[units.percent(t.spread) for t in timings], right=True, drop=2),
            Column(header="runs", cells=[str(t.runs) for t in timings], right=True, drop=3),
        ],
        width,
    )
    if phase.graphs_skipped:
        yield from fact("compiled", ["not all in CUDA graphs"], width)
    if phase.compiled_failure:
        yield from fact("compiled", [f"not run: {clean(phase.compiled_failure)}"], width)
    if phase.peak_bytes is not None:
        parts = [
            f"{units.byte_count(phase.peak_bytes)} at most",
            f"by our account {units.byte_count(phase.needed_bytes)}",
        ]
        yield from fact("memory", parts, width)
    if phase.kernels_failure:
        yield from fact("ops", [f"not timed: {clean(phase.kernels_failure)}"], width)
    elif phase.calls:
        yield from fact("ops", list(_summary(phase)), width)


def _summary(phase: MeasuredPhase) -> Iterator[str]:
    unseen = [call for call in phase.calls if not call.seen]
    yield f"{len(phase.calls) - len(unseen):,} of {len(phase.calls):,} of the graph's ops seen to run"
    yield f"together {units.seconds(phase.calls_seconds)}"
    if phase.strays:
        calls = sum(stray.calls for stray in phase.strays)
        yield f"{calls:,} others {units.seconds(fsum(stray.seconds for stray in phase.strays))}"
    judged = [call for call in phase.calls if call.estimate and call.seen]
    whole = fsum(call.seconds for call in judged)
    if whole:
        near = fsum(call.seconds for call in judged if 1 / _NEAR < call.seconds / call.estimate < _NEAR)
        yield f"{units.percent(near / whole)} of it within {_NEAR:g}× of the estimate"


_NEAR = 1.5


def _too_fast(phase: MeasuredPhase, width: int) -> Iterator[Text]:
    rows = sorted(_folded(phase.too_fast), key=lambda row: row.bound and row.seconds / row.bound)
    if not rows:
        return
    yield Text()
    told = (
        f"FASTER THAN THE BOUND: {len(phase.too_fast)} ops. That cannot be: a formula of fxroof, or a figure of the "
        "GPU, is wrong. Please report it if the figures are the catalogue's."
    )
    for line in wrapped(told, width):
        yield Text(line, style="bold red")
    yield from _table(rows, width)


def _worst(phase: MeasuredPhase, options: Options) -> Iterator[Text]:
    rows = sorted(_folded(phase.calls), key=lambda row: -(row.seconds - row.bound))
    shown = rows[: options.top]
    if not shown:
        return
    yield Text()
    yield Text(
        "ops by time lost to the bound: calls of one source line, layers folded, totals over × calls", style="dim"
    )
    yield from _table(shown, options.width)
    rest = rows[options.top :]
    if rest:
        calls = sum(row.calls for row in rest)
        yield Text(f"  {calls:,} other ops  {units.seconds(fsum(row.seconds for row in rest))}", style="dim")
    reasons = [(row, reason) for row in shown for reason in row.because]
    if reasons:
        told: defaultdict[str, list[str]] = defaultdict(list)
        for row, reason in reasons:
            told[reason].append(f"{row.module or 'root'} {row.op}".strip())
        yield Text("what was recorded of them", style="dim")
        lines = (f"{clean(reason)}: {_some(names)}" for reason, names in told.items())
        yield from bullets(lines, options.width)


def _some(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(map(clean, names)))
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _table(rows: "Sequence[_Row]", width: int) -> list[Text]:
    return table(
        [
            Column(header="module", cells=[clean(row.named) for row in rows], least=14, keep="end"),
            Column(header="op", cells=[clean(row.op) for row in rows], least=8),
            Column(header="shape", cells=[clean(row.shape) for row in rows], least=16, drop=5),
            Column(header="class", cells=[row.lane for row in rows], drop=3),
            Column(header="bound", cells=[units.seconds(row.bound) for row in rows], right=True, drop=2),
            Column(header="estimate", cells=[units.seconds(row.estimate) for row in rows], right=True, drop=4),
            Column(
                header="measured", cells=[Text(units.seconds(row.seconds), style="bold") for row in rows], right=True
            ),
            Column(header="of bound", cells=[_ratio(row.seconds, row.bound) for row in rows], right=True),
            Column(header="of est.", cells=[_ratio(row.seconds, row.estimate) for row in rows], right=True),
            Column(header="where", cells=[clean(row.place) for row in rows], least=12, drop=1, keep="line"),
        ],
        width,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Calls of one kind."""

    module: str
    op: str
    calls: int
    shape: str
    lane: str
    seconds: float
    bound: float
    estimate: float
    place: str
    because: tuple[str, ...]

    @property
    def named(self) -> str:
        """Its module, and how many there are."""
        return f"{self.module or '(root)'}{f' ×{self.calls}' if self.calls > 1 else ''}"


_NUMBER = re.compile(r"\d+")


def _folded(calls: Iterable[MeasuredCall]) -> list[_Row]:
    groups: dict[tuple[object, ...], list[MeasuredCall]] = {}
    for call in calls:
        key = (_NUMBER.sub("*", call.module), call.target, call.shape, call.dtype, call.file, call.line)
        groups.setdefault(key, []).append(call)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[MeasuredCall]) -> _Row:
    first = group[0]
    several = len({call.module for call in group}) > 1
    lanes: defaultdict[str, float] = defaultdict(float)
    for call in group:
        lanes[call.lane.value] += call.estimate
    return _Row(
        module=_NUMBER.sub("*", first.module) if several else first.module,
        op=operator_name(first.target).removeprefix("aten."),
        calls=len(group),
        shape=first.shape,
        lane=max(lanes, key=lambda lane: lanes[lane]),
        seconds=fsum(call.seconds for call in group),
        bound=fsum(call.bound for call in group),
        estimate=fsum(call.estimate for call in group),
        place=f"{first.file}:{first.line}" if first.file else "",
        because=tuple(dict.fromkeys(reason for call in group for reason in call.because)),
    )


def _ratio(measured: float, said: float) -> Text:
    if not said:
        return Text("-")
    ratio = measured / said
    return Text(units.ratio(ratio), style="bold red" if ratio < 1 else "")


def _rests_on(measured: Measured) -> Iterator[str]:
    on_gpu = measured.machine.device.startswith("cuda")
    yield (
        "weights are random, norms ones, caches random; forward runs in inference mode, one step after the other, and "
        "copying a cache for the next run is not counted"
    )
    yield (
        "ops are timed by the profiler, without launches"
        if on_gpu
        else "ops are timed around PyTorch's dispatcher, in passes of their own; "
        f"there an op that does nothing shows {units.seconds(max(phase.clock for phase in measured.phases))}"
    )
    yield "measured is the median; of bound and of estimate: how many times as long; below 1× of a bound is a fault"
    if not on_gpu:
        yield "a CPU shares its memory and its clocks with all that runs on it: measure while nothing else does"
