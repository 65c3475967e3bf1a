"""A report with fixed figures, built by hand: what a renderer is given, independent of formulas and torch."""

from dataclasses import replace
from typing import Any

from fxroof.analyzer.analysis import (
    ByteTotals,
    Coverage,
    Executions,
    FlopTotals,
    OpAnalysis,
    PhaseAnalysis,
    Times,
    UnpricedOp,
)
from fxroof.analyzer.cost import Status
from fxroof.analyzer.estimate import Derated
from fxroof.analyzer.execution import Execution, KernelAnalysis, KernelTimes
from fxroof.analyzer.finding import Alternative, Confidence, Finding, Remedy, Severity, Step
from fxroof.analyzer.floor import Floor
from fxroof.analyzer.graph import Graph
from fxroof.analyzer.memory import Memory
from fxroof.analyzer.report import GpuInfo, ModelInfo, PhaseFailure, Report, Run, Traced
from fxroof.analyzer.review import RuleFailure
from fxroof.analyzer.roofline import Bound, Lanes
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.serving import serving

BANDWIDTH, PEAK, VECTOR, SPECIAL = 8e12, 2e15, 8e13, 1e13
LAYERS, BATCH, PROMPT, CONTEXT, WIDTH, VOCABULARY = 4, 2, 1024, 1152, 2048, 32000
SCENARIO = Scenario(batch_size=BATCH, input_len=PROMPT, output_len=256, lengths_given=True)


def op(
    name: str,
    target: str,
    *,
    module: str = "",
    line: int = 0,
    matmul: float = 0.0,
    vector: float = 0.0,
    special: float = 0.0,
    read: float = 0.0,
    written: float = 0.0,
    status: Status = Status.PRICED,
    shape: str = "",
    backend: str = "",
    file: str = "models/small_gpt.py",
    executed: float | None = None,
    scale: float = 1.0,
) -> OpAnalysis:
    done = matmul if executed is None else executed
    moved = read + written
    lanes = Lanes(
        tensor=done / PEAK * scale,
        vector=vector / VECTOR * scale,
        special=special / SPECIAL * scale,
        memory=moved / BANDWIDTH * scale,
    )
    seconds, bound = max(
        (lanes.memory, Bound.MEMORY),
        (lanes.tensor, Bound.COMPUTE),
        (lanes.vector, Bound.COMPUTE),
        (lanes.special, Bound.SPECIAL),
        key=lambda lane: lane[0],
    )
    return OpAnalysis(
        name=name,
        target=target,
        module=module,
        file=file if line else "",
        line=line,
        library_file="",
        library_line=0,
        status=status,
        shape=shape,
        dtype="bfloat16",
        flops=float(matmul + vector),
        flops_executed=float(done + vector),
        special=float(special),
        bytes_read=int(read),
        bytes_written=int(written),
        intensity=(done + vector) / moved if moved else 0.0,
        ridge=PEAK / BANDWIDTH,
        bound=bound if seconds else Bound.FREE,
        seconds=seconds,
        lanes=lanes,
        backend=backend,
    )


def phase(name: str, rows: int, keys: int, *, scale: float = 1.0) -> PhaseAnalysis:
    """Ops of a small decoder: `rows` tokens of each sequence against `keys` cached ones."""
    n, ops = BATCH * rows, []
    row = 2 * WIDTH
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        for target, line in (("aten.pow.Tensor_Scalar", 12), ("aten.mean.dim", 12)):
            ops.append(
                op(
                    f"{target}_{layer}",
                    target,
                    module=f"{block}.norm",
                    line=line,
                    vector=n * WIDTH,
                    read=n * row,
                    written=n * row,
                    shape=f"{BATCH}x{rows}x{WIDTH} -> {BATCH}x{rows}x{WIDTH}",
                    scale=scale,
                )
            )
        ops.append(op(f"view_{layer}", "aten.view.default", module=f"{block}.attn", line=20, status=Status.FREE))
        for part, line in (("attn.q_proj", 19), ("attn.k_proj", 20), ("mlp.down", 41)):
            ops.append(
                op(
                    f"{part}_{layer}",
                    "aten.linear.default",
                    module=f"{block}.{part}",
                    line=line,
                    matmul=2.0 * n * WIDTH * WIDTH,
                    read=2 * WIDTH * WIDTH + n * row,
                    written=n * row,
                    shape=f"{BATCH}x{rows}x{WIDTH}, {WIDTH}x{WIDTH} -> {BATCH}x{rows}x{WIDTH}",
                    scale=scale,
                )
            )
        scores = 4.0 * n * keys * WIDTH
        ops += [
            op(
                f"sdpa_{layer}",
                "aten.scaled_dot_product_attention.default",
                module=f"{block}.attn",
                line=27,
                matmul=scores,
                executed=scores / 2 if rows > 1 else scores,
                special=n * keys * 16,
                read=2 * BATCH * keys * row,
                written=n * row,
                shape=f"{BATCH}x16x{rows}x128, {BATCH}x16x{keys}x128, {BATCH}x16x{keys}x128 -> {BATCH}x16x{rows}x128",
                backend="cudnn",
                scale=scale,
            ),
            op(
                f"cat_{layer}",
                "aten.cat.default",
                module=f"{block}.attn",
                line=24,
                read=BATCH * keys * row,
                written=BATCH * keys * row,
                shape=f"{BATCH}x16x{keys - rows}x128, {BATCH}x16x{rows}x128 -> {BATCH}x16x{keys}x128",
                scale=scale,
            ),
        ]
    ops.append(
        op(
            "lm_head",
            "aten.linear.default",
            module="lm_head",
            line=58,
            matmul=2.0 * n * WIDTH * VOCABULARY,
            read=2 * WIDTH * VOCABULARY + n * row,
            written=2 * n * VOCABULARY,
            shape=f"{BATCH}x{rows}x{WIDTH}, {VOCABULARY}x{WIDTH} -> {BATCH}x{rows}x{VOCABULARY}",
            scale=scale,
        )
    )
    ops.append(
        op(
            "mystery",
            "mylib.mystery.default",
            module="head",
            line=60,
            read=n * row,
            status=Status.UNPRICED,
            scale=scale,
        )
    )
    return summed(name, n, tuple(ops), scale=scale)


def execution(ops: tuple[OpAnalysis, ...], *, fused: bool) -> Execution:
    """Every op a kernel, or norms together; 1.2 of the bound and 5 µs a kernel, or 1 µs."""
    groups: list[list[OpAnalysis]] = []
    for o in ops:
        joins = fused and groups and o.module.endswith("norm") and groups[-1][0].module == o.module
        if joins:
            groups[-1].append(o)
        elif o.status is not Status.FREE:
            groups.append([o])
    kernels = tuple(
        KernelAnalysis(
            name="rms_norm" if len(group) > 1 else group[0].target,
            ops=tuple(o.name for o in group),
            flops=sum(o.flops_executed for o in group),
            bytes_hbm=0.75 * sum(o.bytes_read + o.bytes_written for o in group),
            bytes_l2=sum(o.bytes_read + o.bytes_written for o in group),
            seconds=KernelTimes(
                bound=sum(o.seconds for o in group) / len(group),
                estimate=1.2 * sum(o.seconds for o in group) / len(group) + (1e-6 if fused else 5e-6),
            ),
            bound=group[0].bound if group[0].seconds > 1e-6 else Bound.LATENCY,
        )
        for group in groups
    )
    estimate = sum(k.seconds.estimate for k in kernels)
    waiting = sum(k.seconds.estimate for k in kernels if k.bound is Bound.LATENCY) / estimate
    return Execution(
        bound=sum(k.seconds.bound for k in kernels),
        estimate=estimate,
        bytes_hbm=sum(k.bytes_hbm for k in kernels),
        bytes_l2=sum(k.bytes_l2 for k in kernels),
        estimate_share={"latency": waiting, "memory": 1 - waiting},
        kernels=kernels,
    )


def summed(name: str, tokens: int, ops: tuple[OpAnalysis, ...], *, scale: float = 1.0) -> PhaseAnalysis:
    bound = sum(o.seconds for o in ops)
    read, written = sum(o.bytes_read for o in ops), sum(o.bytes_written for o in ops)
    weights = 2 * WIDTH * (WIDTH * 3 * LAYERS + VOCABULARY)
    share: dict[str, float] = {}
    for o in ops:
        share[o.bound.value] = share.get(o.bound.value, 0.0) + o.seconds / bound
    flops = sum(o.flops for o in ops)
    executed = sum(o.flops_executed for o in ops)
    compute = executed / PEAK * scale
    executions = Executions(eager=execution(ops, fused=False), compiled=execution(ops, fused=True))
    estimate = executions.eager.estimate
    return PhaseAnalysis(
        name=name,
        tokens=tokens,
        seconds=Times(floor=max(compute, weights / BANDWIDTH * scale), bound=bound, estimate=estimate),
        execution="eager",
        turns=1,
        flops=FlopTotals(matmul=flops, matmul_executed=executed, vector=1.5e7, special=3e6),
        bytes=ByteTotals(
            total=read + written,
            read=read,
            written=written,
            weight=weights,
            kv_cache=0,
            activation=read + written - weights - 8192,
            input=8192,
            output=0,
            constant=0,
        ),
        floor=Floor(
            weight_bytes=weights,
            cache_read_bytes=75497472,
            cache_written_bytes=0,
            input_bytes=8192,
            output_bytes=128000,
            kept_on_chip_bytes=50000000,
            memory_seconds=weights / BANDWIDTH * scale,
            compute_seconds=compute,
        ),
        intensity=executed / (read + written),
        ridge=PEAK / BANDWIDTH,
        bound=Bound(max(share, key=lambda key: share[key])),
        bound_share={key: value for key, value in sorted(share.items()) if value},
        mfu=compute / bound,
        mbu=(read + written) / BANDWIDTH * scale / bound,
        mfu_estimate=compute / estimate,
        mbu_estimate=(read + written) / BANDWIDTH * scale / estimate,
        tokens_per_second=tokens / bound,
        ops=ops,
        executions=executions,
        matmul_path="tensor bfloat16",
    )


def gpu(key: str, name: str, *, note: str = "", memory: int | None = 190_000_000_000) -> GpuInfo:
    return GpuInfo(
        key=key,
        name=name,
        note=note,
        memory_bandwidth=BANDWIDTH,
        memory_bytes=memory,
        cache_bytes=50_000_000,
        matmul_peaks={"bfloat16": PEAK},
        ridges={"bfloat16": PEAK / BANDWIDTH},
        confidence="high",
    )


def run(info: GpuInfo, *, scale: float = 1.0) -> Run:
    phases = (phase("prefill", PROMPT, PROMPT, scale=scale), phase("decode", 1, CONTEXT, scale=scale))
    unpriced = UnpricedOp(target="mylib.mystery.default", count=2, bytes=8396800, example="models/small_gpt.py:60")
    return Run(
        scenario=SCENARIO,
        gpu=info,
        coverage=Coverage(fraction=0.97, priced=60, free=8, unpriced=(unpriced,)),
        phases=phases,
        findings=findings(),
        waterfall={
            "decode": (
                Step(code="as-written", finding=None, bound=47.9e-6, estimate=207e-6),
                Step(code="KVC001", finding=0, bound=41.2e-6, estimate=190e-6),
                Step(code="floor", finding=None, bound=29e-6, estimate=None),
            ),
            "prefill": (
                Step(code="as-written", finding=None, bound=281e-6, estimate=487e-6),
                Step(code="floor", finding=None, bound=254e-6, estimate=None),
            ),
        },
        rule_failures=(RuleFailure(code="OWN001", phase="decode", message="KeyError: 'mask' (mine, line 7)"),),
        assumptions=("times are bounds from vendor peaks (dense)", f"known of {info.key} only"),
        memory=memory(info.memory_bytes),
        serving=serving(phases, SCENARIO),
        derating=(
            Derated(name="bfloat16 products", value=0.8, source="measured on this part", dtype="bfloat16"),
            Derated(name="kernel latency", value=1.3e-6, source="that of another part", unit="s"),
        ),
    )


def findings() -> tuple[Finding, ...]:
    return (
        Finding(
            code="KVC001",
            name="kv-cache-reallocated-by-cat",
            severity=Severity.WARNING,
            confidence=Confidence.HIGH,
            phases=("decode",),
            module="blocks.*.attn",
            op="aten.cat",
            count=LAYERS,
            file="models/small_gpt.py",
            line=24,
            library_file="",
            library_line=0,
            message="the KV cache is copied as a whole in every step to append new rows",
            evidence={"cache_bytes": 37_748_736, "new_bytes": 32_768},
            remedy=Remedy(text="Write the new rows in place.", code="cache[:, pos] = k\nk = cache[:, : pos + 1]"),
            saving_seconds={"decode": 17e-6},
            saving_bound_seconds={"decode": 6.7e-6},
        ),
        Finding(
            code="WGT001",
            name="memory-bound-weight-streaming",
            severity=Severity.INFO,
            confidence=Confidence.MEDIUM,
            phases=("prefill", "decode"),
            module="lm_head",
            op="aten.linear",
            count=1,
            file="",
            line=0,
            library_file="",
            library_line=0,
            message="the product waits for its weights to arrive",
            evidence={"dtype": "bfloat16", "seconds_waiting": 1.5e-5, "share": 0.5, "calls": 12_000},
            remedy=Remedy(text="Quantise these weights."),
            saving_seconds={"prefill": -1e-6, "decode": 0.0},
            saving_bound_seconds={"prefill": 0.0, "decode": 8e-6},
            alternatives=(
                Alternative(
                    name="int4 weights",
                    saving_seconds={"prefill": -1e-6, "decode": 9e-6},
                    saving_bound_seconds={"decode": 12e-6},
                ),
            ),
        ),
        Finding(
            code="TRC001",
            name="unpriced-operators",
            severity=Severity.ERROR,
            confidence=Confidence.HIGH,
            phases=("decode",),
            module="head",
            op="acme.mystery",
            count=1,
            file="models/small_gpt.py",
            line=60,
            library_file="",
            library_line=0,
            message="suppressed, so not shown",
            evidence={},
            remedy=Remedy(text=""),
            saving_seconds={},
            saving_bound_seconds={},
            suppressed="on purpose",
        ),
    )


def memory(usable: int | None) -> Memory:
    total = 231_735_296 + 83_886_080 + 41_000_000 + 600_000_000
    fits = None if usable is None else total <= usable
    return Memory(
        weights_bytes=231_735_296,
        kv_cache_bytes=83_886_080,
        activations_bytes=41_000_000,
        overhead_bytes=600_000_000,
        total_bytes=total,
        usable_bytes=usable,
        fits=fits,
        headroom_bytes=None if usable is None else usable - total,
        max_batch_size=None if usable is None else 1500 if fits else 0,
        max_context_len=None if usable is None else 400_000 if fits else 0,
        min_gpus=1 if fits else None,
        context_len=PROMPT + 256,
        activations_phase="prefill",
    )


MODEL = ModelInfo(
    name="SmallGPT",
    source="models/small_gpt.py:build",
    parameters=115_867_648,
    parameter_bytes=231_735_296,
    dtypes={"bfloat16": 115_867_648},
    cache_kind="passed as `cache`",
    notes=("a note about loading",),
)


def report(*, several: bool = False) -> Report:
    runs = [run(gpu("x100", "Example X100", note="x means x100 (Example X100)"))]
    if several:
        runs.append(run(gpu("y50_sxm", "Example Y50 with a rather long name", memory=100_000_000), scale=2.5))
    return Report(
        fxroof_version="1.2.3",
        torch_version="2.13.0",
        catalog_version="2026-01-01",
        traces=(Traced(model=MODEL, scenario=SCENARIO, graphs={p.name: Graph(phase=p.name) for p in runs[0].phases}),),
        runs=tuple(runs),
    )


def partial() -> Report:
    """The report of a model that could not be analysed in decode."""
    whole = report()
    failure = PhaseFailure(
        phase="decode",
        message="The model's control flow depends on tensor values at models/small_gpt.py:33: "
        "Could not guard on data-dependent expression u0 > 0",
        hint="Write that line with tensor operations such as torch.where.",
    )
    runs = tuple(replace(r, phases=r.phases[:1]) for r in whole.runs)
    return retraced(replace(whole, runs=runs), failures=(failure,))


def retraced(report: Report, **changes: Any) -> Report:
    """The report with another model, scenario, graphs or failures."""
    return replace(report, traces=(replace(report.traces[0], **changes),))


def renamed(original: Report, text: str) -> Report:
    """The report with a text of the user's put everywhere that the user's text appears."""

    def place(o: OpAnalysis) -> OpAnalysis:
        return replace(o, module=f"{o.module}.{text}", file=f"{text}/{o.file}", shape=f"{o.shape} {text}", note=text)

    runs = tuple(
        replace(r, phases=tuple(replace(p, ops=tuple(map(place, p.ops))) for p in r.phases), assumptions=(text,))
        for r in original.runs
    )
    model = replace(original.model, name=text, source=text, cache_kind=text, notes=(text,))
    failures = tuple(replace(f, phase=text, message=text, hint=text) for f in original.failures)
    return retraced(replace(original, runs=runs), model=model, failures=failures)
