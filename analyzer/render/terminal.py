"""The report for people: what limits each phase, and which lines of the user's file the time goes to."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_letters

from rich.text import Text

from ..analysis import Coverage, PhaseAnalysis, UnpricedOp
from ..limits import Verdict
from ..memory import Memory
from ..report import ModelInfo, Report, Run, Traced
from ..roofline import Bound
from ..scenario import Scenario
from . import _budgets as budgets
from . import _units as units
from ._findings import findings
from ._hotspots import Hotspot, hotspots
from ._layout import Cell, Column, beside, bullets, clean, fact, keep_start, printed, table, title
from ._roofline import Point, Roof, picture
from .registry import Options, renderer

_STYLES = {
    Bound.MEMORY: "cyan",
    Bound.COMPUTE: "yellow",
    Bound.SPECIAL: "magenta",
    Bound.LINK: "blue",
    Bound.LATENCY: "red",
    Bound.FREE: "dim",
}
_FILLS = {Bound.MEMORY: "█", Bound.COMPUTE: "▒", Bound.SPECIAL: "░", Bound.LINK: "▚", Bound.LATENCY: "▪"}
_MEANING = {
    "prefill": "the whole prompt at once, the time to first token (TTFT)",
    "decode": "one new token a sequence, the time per output token (TPOT)",
    "forward": "one pass",
}
_SIDE_BY_SIDE = 150
_FACTS_WIDTH = 84


@renderer("terminal")
def render(report: Report, options: Options) -> str:
    """Header, comparison of the GPUs if there are several, then each run in detail."""
    lines = [*_header(report, options.width), Text()]
    if report.failures:
        lines += [*_failures(report, options.width), Text()]
    if verdicts := budgets.told(report.verdicts):
        lines += [*_budgets(verdicts, options.width), Text()]
    if len(report.runs) > 1:
        lines += [*_comparison(report, options.width), Text()]
    for run in report.runs:
        lines += _run(report, run, options)
    for run in report.runs:
        lines += [*findings(report, run, options), Text()]
    lines += _caveats(report, options.width)
    return printed(lines, options)


def _header(report: Report, width: int) -> Iterator[Text]:
    before = ""
    for index, traced in enumerate(report.traces):
        model = traced.model
        if model.source != before or not index:
            yield from fact("model", [Text(clean(model.name), style="bold"), *_size(model)], width)
            yield from fact("source", [clean(model.source)] if model.source else [], width)
        before = model.source
        name = [clean(traced.scenario.name)] if len(report.traces) > 1 else []
        runs = [run for run in report.runs if run.traced == index]
        yield from fact("scenario", [*name, *_scenario(traced, runs)], width)


def _size(model: ModelInfo) -> Iterator[str]:
    yield f"{units.count(model.parameters)} parameters"
    names = list(model.dtypes)
    total = sum(model.dtypes.values()) or 1  # parameters may be of no elements
    if len(names) > 1:
        stored = ", ".join(f"{units.percent(n / total)} {clean(name)}" for name, n in model.dtypes.items())
    else:
        stored = "".join(map(clean, names))
    yield f"{units.byte_count(model.parameter_bytes)} of weights" + (f" in {stored}" if stored else "")
    if model.parameter_bytes_per_gpu is not None:
        yield f"{units.byte_count(model.parameter_bytes_per_gpu)} a GPU"


def _scenario(traced: Traced, runs: Sequence[Run]) -> Iterator[str]:
    scenario = traced.scenario
    phases = {phase.name for run in runs for phase in run.phases}
    yield f"batch {scenario.batch_size:,}"
    if scenario.gpus > 1:
        shares = {"tensors": scenario.tp, "experts": scenario.ep}
        yield f"{scenario.gpus:,} GPUs share " + " and ".join(name for name, n in shares.items() if n > 1)
    if scenario.prefix_len:
        yield f"{scenario.prefix_len:,} of the prompt cached"
    if scenario.prompt_turns > 1:
        yield f"prefill in {scenario.prompt_turns:,} chunks"
    if {"prefill", "decode"} & phases:
        if scenario.source_len:
            yield f"{scenario.source_len:,} encoder positions"
        yield f"{scenario.input_len:,} prompt token{'s' if scenario.input_len != 1 else ''}"
        yield f"{scenario.output_len:,} generated"
        if "decode" in phases:
            yield f"decode priced at context {scenario.context_len:,}"
        yield f"KV cache: {clean(traced.model.cache_kind)}"


def _failures(report: Report, width: int) -> Iterator[Text]:
    yield title("not analysed", width, heavy=True)
    for failure in report.failures:
        yield from fact(clean(failure.phase), [Text(clean(failure.message), style="red")], width)
        yield from fact("", [clean(failure.hint)] if failure.hint else [], width)


def _budgets(verdicts: Sequence[Verdict], width: int) -> Iterator[Text]:
    yield title("budgets", width, heavy=True)
    columns = [
        Column(header="run", cells=[clean(verdict.run) for verdict in verdicts], least=10, keep="end"),
        Column(header="budget", cells=[budgets.name(verdict) for verdict in verdicts], least=12),
        Column(header="is", cells=[budgets.value(verdict) for verdict in verdicts], right=True),
        Column(header="limit", cells=[clean(verdict.budget.text) for verdict in verdicts], right=True),
        Column(header="", cells=[_state(verdict) for verdict in verdicts], least=8),
    ]
    yield from table(columns, width)


def _state(verdict: Verdict) -> Text:
    if verdict.kept is None:
        return Text(clean(verdict.why), style="yellow")
    return Text("kept", style="green") if verdict.kept else Text("broken", style="bold red")


def _comparison(report: Report, width: int) -> Iterator[Text]:
    what = "GPUs" if len(report.traces) == 1 else "runs"
    yield title(f"{what} compared, each phase at its bound and as estimated", width, heavy=True)
    rows = [
        (phase, run)
        for name in dict.fromkeys(p.name for run in report.runs for p in run.phases)
        for run in report.runs
        for phase in run.phases
        if phase.name == name
    ]
    first: dict[tuple[str, int], float] = {}
    for phase, run in rows:
        first.setdefault((phase.name, run.traced), phase.seconds.bound)
    columns = [
        Column(header="phase", cells=_without_repeats([phase.name for phase, _ in rows])),
        Column(
            header="GPU",
            cells=[Text(clean(report.title(run)), style="bold") for _, run in rows],
            least=10,
            keep="end",
        ),
        Column(header="bound", cells=[units.seconds(p.seconds.bound) for p, _ in rows], right=True),
        Column(
            header="vs first",
            cells=[units.ratio(p.seconds.bound / one) if (one := first[p.name, run.traced]) else "" for p, run in rows],
            right=True,
            drop=2,
        ),
        Column(header="floor", cells=[units.seconds(p.seconds.floor) for p, _ in rows], right=True, drop=4),
        Column(header="estimate", cells=[units.seconds(p.seconds.estimate) for p, _ in rows], right=True),
        Column(header="tokens/s", cells=[_throughput(p, run) for p, run in rows], right=True, drop=1),
        Column(header="class", cells=[_class(p.bound) for p, _ in rows]),
        Column(header="MFU", cells=[units.percent(p.mfu) for p, _ in rows], right=True, drop=6),
        Column(header="MBU", cells=[units.percent(p.mbu) for p, _ in rows], right=True, drop=5),
        Column(header="fits?", cells=[_fit(run.memory) for _, run in rows], drop=3),
    ]
    yield from table(columns, width)


def _run(report: Report, run: Run, options: Options) -> Iterator[Text]:
    yield title(f"{clean(report.title(run))}  {clean(run.gpu.name)}", options.width, heavy=True)
    yield from fact("peaks", _peaks(run), options.width)
    yield from _memory(run, options.width)
    yield from _serving(run, options.width)
    yield from fact("note", [clean(run.gpu.note)] if run.gpu.note else [], options.width)
    yield Text()
    for phase in run.phases:
        yield from _phase(phase, run, options)
        yield Text()


def _peaks(run: Run) -> Iterator[Cell]:
    yield units.rate(run.gpu.memory_bandwidth, "B/s")
    for path, ridge in dict.fromkeys((p.matmul_path, p.ridge) for p in run.phases if p.ridge):
        if ridge:
            yield f"{units.rate(ridge * run.gpu.memory_bandwidth, 'FLOP/s')} dense {path}".rstrip()
            yield f"ridge {units.digits(ridge, trim=True)} FLOP/B"
    if run.gpu.confidence != "high":
        yield f"catalogue figures of {clean(run.gpu.confidence)} confidence"


def _memory(run: Run, width: int) -> Iterator[Text]:
    memory = run.memory
    if memory is None:
        return
    yield from fact("memory", _verdict(memory), width)
    parts = {
        "weights": memory.weights_bytes,
        f"KV cache at {memory.context_len:,} tokens": memory.kv_cache_bytes,
        f"activations of {clean(memory.activations_phase)}": memory.activations_bytes,
        "CUDA": memory.overhead_bytes,
    }
    yield from fact("", [" + ".join(f"{name} {units.byte_count(n)}" for name, n in parts.items() if n)], width)
    yield from fact("", _limits(memory, run.scenario), width)


def _serving(run: Run, width: int) -> Iterator[Text]:
    served, scenario = run.serving, run.scenario
    if served is None:
        return
    batch, gpus = scenario.batch_size, scenario.gpus
    rows = {
        "TTFT": (served.ttft, units.seconds),
        "TPOT": (served.tpot, units.seconds),
        "request": (served.request, units.seconds),
        "tokens/s per user": (served.tokens_per_second_per_user, units.per_second),
        "tokens/s per GPU": (served.tokens_per_second_per_gpu if batch > 1 or gpus > 1 else None, units.per_second),
    }
    shown = [(name, times, unit) for name, (times, unit) in rows.items() if times]
    execution = next((phase.execution for phase in run.phases), "")
    yield from fact("serving", [Text(f"{execution:<18}{'floor':>10}{'bound':>10}{'estimate':>10}", style="dim")], width)
    for name, times, unit in shown:
        values = "".join(f"{unit(value):>10}" for value in (times.floor, times.bound, times.estimate))
        yield from fact("", [f"{name:<18}{values}"], width)
    yield from fact("", _definitions(run), width)
    if served.weights_bound_batch:
        after = {"kv_cache": "the KV cache is read longer", "compute": "arithmetic takes longer"}
        until = after[served.weights_bound_until]
        yield from fact(
            "", [f"weights set the pace of decode up to batch {served.weights_bound_batch:,}; then {until}"], width
        )


def _definitions(run: Run) -> Iterator[str]:
    served, scenario = run.serving, run.scenario
    turns = max((phase.turns for phase in run.phases), default=1)
    encoder = "encoder + " if any(phase.name == "encoder" for phase in run.phases) else ""
    if served and served.ttft:
        yield f"TTFT = {encoder}{f'{turns:,} × ' if turns > 1 else ''}prefill"
    if served and served.tpot:
        yield f"TPOT = decode step at context {scenario.context_len:,}"
    if served and served.request:
        yield f"request = TTFT + {max(scenario.output_len - 1, 0):,} × TPOT"


def _verdict(memory: Memory) -> Iterator[Cell]:
    needed = units.byte_count(memory.total_bytes)
    if memory.usable_bytes is None or memory.headroom_bytes is None:
        yield f"capacity unknown; {needed} are needed"
    elif memory.fits:
        yield f"fits: {needed} of {units.byte_count(memory.usable_bytes)}"
        yield f"{units.byte_count(memory.headroom_bytes)} left"
    else:
        missing = f"{units.byte_count(memory.usable_bytes)} usable"
        yield Text(f"does not fit: {needed}, {missing}; times as if it did", style="red")


def _limits(memory: Memory, scenario: Scenario) -> Iterator[str]:
    if memory.max_batch_size:
        yield f"largest batch {memory.max_batch_size:,} at these lengths"
    if memory.max_context_len:
        yield f"longest context {memory.max_context_len:,} at batch {scenario.batch_size:,}"
    if memory.min_gpus is not None and memory.min_gpus > 1:
        yield f"fewest of these GPUs {memory.min_gpus:,}"


def _fit(memory: Memory | None) -> Cell:
    if memory is None or memory.usable_bytes is None:
        return "unknown"
    share = units.percent(memory.total_bytes / memory.usable_bytes)
    return f"yes, {share}" if memory.fits else Text(f"no, {share}", style="red")


def _phase(phase: PhaseAnalysis, run: Run, options: Options) -> Iterator[Text]:
    meaning = _MEANING.get(phase.name)
    if phase.turns > 1:
        meaning = (
            f"the mean one of {phase.turns:,} chunks of the prompt, which together are the time to first token (TTFT)"
        )
    elif phase.name == "prefill" and run.scenario.prefix_len:
        meaning = "what of the prompt is not cached, the time to first token (TTFT)"
    yield title(f"{clean(phase.name)} · {meaning}" if meaning else clean(phase.name), options.width)
    rows = hotspots(phase, options.by)
    marks = dict(zip(rows[: options.top], ascii_letters[26:] + ascii_letters[:26], strict=False))
    wide = options.width >= _SIDE_BY_SIDE
    facts = list(_facts(phase, run, _FACTS_WIDTH if wide else options.width))
    drawing = _picture(phase, run, marks, options, options.width - _FACTS_WIDTH - 4 if wide else options.width)
    yield from beside(facts, drawing, _FACTS_WIDTH + 4) if wide else [*facts, Text(), *drawing]
    yield Text()
    yield from _hotspot_table(rows, marks, options, compiled=phase.execution == "compiled")


def _facts(phase: PhaseAnalysis, run: Run, width: int) -> Iterator[Text]:
    yield from fact("time", [_TIME_COLUMNS], width)
    for name in ("eager", "compiled"):
        yield from fact("", [_execution(phase, name)], width)
    yield from fact("speed", _speed(phase, run), width)
    yield from fact("floor", _floor(phase), width)
    yield from fact("bound", _shares(phase.bound_share), width)
    chosen = phase.executions.of(phase.execution)
    yield from fact("estimate", _shares(chosen.estimate_share), width)
    yield from fact("FLOPs", _work(phase), width)
    yield from fact("bytes", _traffic(phase), width)
    yield from fact("intensity", [_side(phase)], width)
    yield from fact("used", _used(phase), width)


_TIME_COLUMNS = Text(f"{'':<10}{'floor':>10}{'bound':>10}{'estimate':>10}{'kernels':>9}", style="dim")


def _execution(phase: PhaseAnalysis, name: str) -> Text:
    """One way of running the phase; the one that the rest is about in bold."""
    execution = phase.executions.of(name)
    launches = sum(1 for _ in execution.kernels)
    times = "".join(
        f"{units.seconds(value):>10}" for value in (phase.seconds.floor, execution.bound, execution.estimate)
    )
    return Text(f"{name:<10}{times}{launches:>9,}", style="bold" if name == phase.execution else "")


def _used(phase: PhaseAnalysis) -> Iterator[str]:
    yield f"MFU {units.percent(phase.mfu)} at the bound, {units.percent(phase.mfu_estimate)} in the estimate"
    yield f"MBU {units.percent(phase.mbu)} and {units.percent(phase.mbu_estimate)}"


def _speed(phase: PhaseAnalysis, run: Run) -> Iterator[str]:
    bound, estimate = phase.seconds.bound, phase.seconds.estimate
    if not bound or not estimate:
        return
    if phase.name == "decode":
        noun, count = "tokens/s", run.scenario.batch_size
    elif phase.tokens:
        noun, count = ("positions/s" if phase.name == "encoder" else "prompt tokens/s"), phase.tokens
    else:
        noun, count = "passes/s", 1
    yield f"at most {units.per_second(count / bound)} {noun}, likely {units.per_second(count / estimate)}"
    if phase.name == "decode" and count > 1:
        yield f"per user {units.per_second(1 / bound)}, likely {units.per_second(1 / estimate)}"


def _throughput(phase: PhaseAnalysis, run: Run) -> str:
    """Tokens a second; a decode step makes one a sequence, however many rows go through the model."""
    if not phase.tokens or not phase.seconds.bound:
        return ""
    tokens = run.scenario.batch_size if phase.name == "decode" else phase.tokens
    return units.per_second(tokens / phase.seconds.bound)


def _floor(phase: PhaseAnalysis) -> Iterator[str]:
    floor = phase.floor
    moved = {
        "weights": floor.weight_bytes,
        "cache read": floor.cache_read_bytes,
        "cache written": floor.cache_written_bytes,
        "input": floor.input_bytes,
        "output": floor.output_bytes,
    }
    listed = " + ".join(
        f"{name} {units.byte_count(n)}" for name, n in moved.items() if n >= max(moved.values()) / 1000 and n
    )
    kept = f" − {units.byte_count(floor.kept_on_chip_bytes)} on chip" if floor.kept_on_chip_bytes else ""
    if phase.seconds.floor:
        yield f"bound = {units.ratio(phase.seconds.bound / phase.seconds.floor)} floor"
    yield f"matmuls {units.seconds(floor.compute_seconds)}"
    yield f"memory {units.seconds(floor.memory_seconds)}" + (f" = {listed}{kept}" if listed else "")


def _shares(shares: Mapping[str, float]) -> Iterator[Text]:
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        bound = Bound(name)
        text = Text(_FILLS.get(bound, "▪") * max(round(share * 20), 1), style=_STYLES[bound])
        yield text.append(f" {name} {units.percent(share)}", style="default")


def _work(phase: PhaseAnalysis) -> Iterator[str]:
    work = phase.flops
    if work.matmul_executed == work.matmul:
        yield f"{units.flops(work.matmul)} matmul"
    else:
        executed = units.flops(work.matmul_executed)
        yield f"{units.flops(work.matmul)} matmul, attention dense ({executed} as executed)"
    yield f"{units.flops(work.vector)} elementwise"
    if work.special:
        yield f"{units.scaled(work.special, '').strip()} exp, rsqrt, ..."
    yield "1 multiply-add = 2 FLOPs"


def _traffic(phase: PhaseAnalysis) -> Iterator[str]:
    moved = phase.bytes
    yield f"{units.byte_count(moved.total)}"
    roles = {
        "weights": moved.weight,
        "KV cache": moved.kv_cache,
        "activations": moved.activation,
        "input": moved.input,
        "output": moved.output,
        "constants": moved.constant,
    }
    for name, n in sorted(roles.items(), key=lambda item: -item[1]):
        if n:
            yield f"{name} {units.byte_count(n)}"


def _side(phase: PhaseAnalysis) -> str:
    intensity = f"{units.digits(phase.intensity)} FLOP/byte"
    if not phase.ridge:
        return f"{intensity}; no matmul peak is published for its dtype"
    side, other = ("below", "memory") if phase.intensity < phase.ridge else ("above", "compute")
    return f"{intensity}, {side} the ridge of {units.digits(phase.ridge, trim=True)}: on the {other} side"


def _picture(phase: PhaseAnalysis, run: Run, marks: dict[Hotspot, str], options: Options, width: int) -> list[Text]:
    if not phase.ridge or not phase.seconds.bound:
        return []
    roof = Roof(
        peak=phase.ridge * run.gpu.memory_bandwidth,
        bandwidth=run.gpu.memory_bandwidth,
        path=phase.matmul_path,
    )
    points = [
        Point(mark=mark, intensity=row.intensity, performance=row.flops / row.seconds, style=_STYLES[row.bound])
        for row, mark in marks.items()
        if row.seconds
    ]
    executed = phase.flops.matmul_executed + phase.flops.vector
    whole = Point(mark="", intensity=phase.intensity, performance=executed / phase.seconds.bound)
    lines = picture(roof, [*points, whole], min(width, 110), 14, unicode=options.unicode)
    absent = [mark for row, mark in marks.items() if not row.flops]
    caption = ["● rows of the table below", "◆ the whole phase"]
    if absent:
        caption.append(f"{_listed(absent)}: no FLOPs, only bytes, so not drawn")
    return lines + [Text(line.plain, style="dim") for line in fact("", caption, width, label_width=14)]


def _listed(marks: Sequence[str]) -> str:
    return ", ".join(marks)


def _hotspot_table(
    rows: Sequence[Hotspot], marks: dict[Hotspot, str], options: Options, *, compiled: bool
) -> Iterator[Text]:
    shown = list(rows[: options.top])
    rest = rows[options.top :]
    unit, factor = _time_unit(shown)
    others = Hotspot(
        module=f"{sum(row.calls for row in rest):,} other ops",
        op="",
        calls=0,
        shape="",
        dtype="",
        flops=sum(row.flops for row in rest),
        bytes=sum(row.bytes for row in rest),
        intensity=0.0,
        bound=Bound.FREE,
        seconds=sum(row.seconds for row in rest),
        estimate=sum(row.estimate for row in rest),
        share=sum(row.share for row in rest),
        place="",
    )
    listed = [*shown, *([others] if rest else [])]

    def dimmed(row: Hotspot, cell: str) -> Text:
        return Text(cell, style="dim" if row is others else "")

    columns = [
        Column(header="", cells=[Text(marks.get(row, ""), style=f"bold {_STYLES[row.bound]}") for row in listed]),
        Column(
            header="module",
            cells=[dimmed(row, clean(row.module) or "(root)") for row in listed],
            least=17,
            keep="end",
            gap=1,
        ),
        Column(header="", cells=[f"×{row.calls}" if row.calls > 1 else "" for row in listed], right=True, gap=1),
        Column(header="op", cells=[clean(row.op) for row in listed], least=12),
        Column(header="shapes", cells=[_dimensions(row.shape) for row in listed], least=28, drop=5),
        Column(header="dtype", cells=[clean(row.dtype) for row in listed], least=7, drop=7),
        Column(
            header="FLOP",
            cells=[dimmed(r, units.scaled(r.flops, "").strip()) for r in listed],
            right=True,
            drop=4,
        ),
        Column(header="bytes", cells=[dimmed(r, units.byte_count(r.bytes)) for r in listed], right=True, drop=3),
        Column(
            header="FLOP/B",
            cells=[dimmed(r, "" if r is others else units.digits(r.intensity)) for r in listed],
            right=True,
            drop=2,
        ),
        Column(header="class", cells=[_class(row.bound) if row is not others else "" for row in listed]),
        Column(
            header=unit,
            cells=[dimmed(r, _fixed(r.seconds * factor, shown, factor)) for r in listed],
            right=True,
        ),
        Column(header="share", cells=[dimmed(r, units.percent(r.share)) for r in listed], right=True),
        Column(
            header="likely",
            cells=[dimmed(r, _fixed(r.estimate * factor, shown, factor)) for r in listed],
            right=True,
            drop=3,
        ),
        Column(
            header="where",
            cells=[Text(clean(row.place), style="dim") for row in listed],
            least=18,
            keep="line",
        ),
    ]
    unit_of = "kernels" if compiled else "ops"
    what = f"{unit_of} of one {'source line' if options.by == 'op' else 'module'}, layers folded"
    notes = [f"hotspots: {what}", "totals over × calls", "FLOPs as executed", f"{unit} and share: of the bound"]
    yield from fact("", notes, options.width, label_width=0)
    yield from table(columns, options.width)


def _time_unit(rows: Sequence[Hotspot]) -> tuple[str, float]:
    most = max((row.seconds for row in rows), default=0.0)
    return ("s", 1.0) if most >= 10 else ("ms", 1e3) if most >= 1e-2 else ("µs", 1e6)


def _fixed(value: float, rows: Sequence[Hotspot], factor: float) -> str:
    most = max((row.seconds for row in rows), default=0.0) * factor
    return f"{value:,.{1 if most >= 100 else 2 if most >= 1 else 3}f}"


def _dimensions(shape: str) -> str:
    return clean(shape).replace("x", "×") if "scalar" not in shape else clean(shape)


def _class(bound: Bound) -> Text:
    return Text(bound.value, style=_STYLES[bound])


def _caveats(report: Report, width: int) -> Iterator[Text]:
    """Coverage and assumptions, each said once: those that hold on some of the GPUs only name them."""
    yield title("what these figures rest on", width, heavy=True)
    holders: dict[str, list[str]] = {}
    coverages: dict[tuple[float, int, int, tuple[UnpricedOp, ...]], Coverage] = {}
    for run in report.runs:
        for assumption in run.assumptions:
            holders.setdefault(assumption, []).append(report.title(run))
        known = run.coverage
        coverages[known.fraction, known.priced, known.free, known.unpriced] = known
    for coverage in coverages.values():
        yield from _coverage(coverage, width)
    yield from fact("versions", _versions(report), width)
    yield from bullets(
        (
            text if len(keys) == len(report.runs) else f"{', '.join(dict.fromkeys(keys))}: {text}"
            for text, keys in holders.items()
        ),
        width,
    )
    yield from bullets(dict.fromkeys(note for traced in report.traces for note in traced.model.notes), width)
    for run in {run.gpu.key: run for run in report.runs}.values():
        yield from fact("reached", [f"by estimates on {clean(run.gpu.key)}", *_reached(run)], width)


def _reached(run: Run) -> Iterator[str]:
    """The main figures that make estimates of bounds, those for dtypes that no phase uses left out."""
    used = {phase.matmul_path.rpartition(" ")[2] for phase in run.phases}
    told = [derated for derated in run.derating if derated.value and (not derated.dtype or derated.dtype in used)]
    main = [derated for derated in told if derated.dtype or derated.name in _MAIN]
    for derated in main:
        value = units.scaled(derated.value, derated.unit) if derated.unit else units.percent(derated.value)
        yield f"{derated.name} {value}" + (f" ({derated.source})" if derated.source == "assumed" else "")
    if len(told) > len(main):
        yield f"{len(told) - len(main)} more with -f json"
    fitted_on = {derated.fitted_on for derated in told} - {""}
    if fitted_on:
        others = ", ".join(f"{clean(key)}'s" for key in sorted(fitted_on - {run.gpu.key}))
        whose = f"{others}, taken over" if others else "its own"
        yield f"fitted figures of kernels: {whose}"


_MAIN = {
    "memory when reading",
    "memory when writing too",
    "attention beside products",
    "L2",
    "cache",
    "kernel latency",
    "launch of an op",
    "launch of its further kernels",
    "reading a value back",
}
"""Figures of estimates that the page names beside those of products; the others are of single kinds of kernels."""


def _coverage(coverage: Coverage, width: int) -> Iterator[Text]:
    unpriced = sum(op.count for op in coverage.unpriced)
    total = coverage.priced + coverage.free + unpriced
    counts: list[Cell] = [
        f"{units.percent(coverage.fraction)} of {total:,} ops",
        f"{coverage.priced:,} priced",
        f"{coverage.free:,} free (views, no kernel)",
        Text(f"{unpriced:,} unpriced", style="red" if unpriced else ""),
    ]
    yield from fact("coverage", counts, width)
    yield from bullets(
        (
            f"unpriced: {op.target} ×{op.count}, charged {units.byte_count(op.bytes)}, no FLOPs ({op.example})"
            for op in coverage.unpriced
        ),
        width,
        style="red",
    )


def _versions(report: Report) -> list[str]:
    return [
        f"fxroof {clean(report.fxroof_version)}",
        f"torch {clean(report.torch_version)}",
        f"GPU catalogue of {clean(report.catalog_version)}",
    ]


def _without_repeats(values: Iterable[str]) -> list[str]:
    shown: list[str] = []
    before = None
    for value in values:
        shown.append("" if value == before else keep_start(clean(value), 20))
        before = value
    return shown
