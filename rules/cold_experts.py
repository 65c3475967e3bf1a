"""The weights of many experts are read, each for a handful of tokens.

**What it checks.** Grouped products of a mixture of experts that wait for memory, where an expert that is read meets
fewer rows than half of what would keep the arithmetic busy (the ridge).

**Why it costs.** Each token chooses its own experts, so a batch soon reads nearly all of them, and each meets only
rows x chosen / experts of the rows. An expert's weights are read whole for those few. Dense layers reach the ridge at
a batch that experts reach at experts / chosen times as many.

**How it is estimated.** The experts' weights become 8 bits wide, then 4, as WGT001 does for dense layers: scales of
the experts that are read are counted, activations stay. For a larger batch the model is traced again and the time of
the same products is compared, for as many tokens.

**Remedy.** Narrower experts; more sequences a step; or the experts dealt out over GPUs, which gather the tokens of all.

    fxroof analyze MODEL --gpu NAME --ep 8 --batch-size 64

**When to ignore.** One user at a time, with quality that allows no narrower weights.

**References.** Rajbhandari et al., "DeepSpeed-MoE" (ICML 2022); DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024),
section 3.4 on expert parallelism for decoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..analyzer.analysis import PhaseAnalysis, analyze_phase
from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, Stated, rule
from ..analyzer.graph import ITEM_BITS, Arg, Graph, Op, Role, TensorRef
from ..analyzer.rewrite import Draft
from ..analyzer.roofline import Bound
from ._widths import Width, widths
from .batch_below_ridge import wider_batch

_REMEDY = Remedy(
    text="Narrow the experts' weights, serve more sequences in a step, or deal the experts out over GPUs.",
    code="fxroof analyze ... --ep 8 --batch-size 64",
)
_LEAST_BITS = 16
_OF_RIDGE = 0.5
"""Rows an expert, as a share of the ridge, from which arithmetic begins to count beside its weights."""


@rule("MOE001", "cold-experts", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """Every product of tokens with experts that waits for its experts."""
    graph = situation.graph
    cold = [index for index, op in enumerate(graph.ops) if _is_cold(situation, index, op)]
    wider = _wider(situation, cold) if cold else None
    for place, index in enumerate(cold):
        op = graph.ops[index]
        stack = graph.tensors[_experts(op)]
        rows = graph.tensors[op.inputs[0]].shape[0]
        read = _expected_experts(situation, index)
        first, *others = widths(situation.gpu)
        alternatives: dict[str, Rewrite | Stated] = {width.name: _narrowed(index, op, width) for width in others}
        if wider is not None and place == 0:
            alternatives[wider[0]] = wider[1]
        yield Match(
            op=index,
            message=f"of {stack.shape[0]} experts some {read:.0f} are read, each for about {rows / read:.1f} rows",
            evidence={"expert_bytes": _expert_bytes(situation, index), "dtype": stack.dtype},
            remedy=_REMEDY,
            rewrite=_narrowed(index, op, first),
            alternatives=alternatives,
        )


def _is_cold(situation: Situation, index: int, op: Op) -> bool:
    if operator_name(op.target) != "aten._grouped_mm":
        return False
    graph, found = situation.graph, situation.analysis.ops[index]
    stack = graph.tensors[_experts(op)]
    rows = graph.tensors[op.inputs[0]].shape
    stacked = len(stack.shape) == 3 and len(rows) == 2  # rows x inner, experts x inner x outer
    if not stacked or graph.role(_experts(op)) is not Role.WEIGHT or ITEM_BITS[stack.dtype] < _LEAST_BITS:
        return False
    ridge = found.ridge or 0.0
    per_expert = rows[0] / max(_expected_experts(situation, index), 1.0)
    return found.bound is Bound.MEMORY and per_expert < _OF_RIDGE * ridge


def _experts(op: Op) -> int:
    stack = op.args["mat2"]
    return stack.tensor if isinstance(stack, TensorRef) else -1


def _expert_bytes(situation: Situation, index: int) -> int:
    """Bytes of experts that are read on average."""
    wanted = _experts(situation.graph.ops[index])
    return sum(a.expected_read or a.read for a in situation.costs[index].traffic if a.tensor == wanted)


def _expected_experts(situation: Situation, index: int) -> float:
    stack = situation.graph.tensors[_experts(situation.graph.ops[index])]
    return _expert_bytes(situation, index) * stack.shape[0] / max(stack.touched_bytes, 1)


def _narrowed(index: int, op: Op, width: Width) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim((index,)):
            return
        given = draft.graph.tensors[_experts(op)]
        experts, inner, outer = given.shape
        name = draft.graph.storages[given.storage].name
        stored = draft.tensor((experts, -(-inner // width.per_byte), outer), width.dtype, role=Role.WEIGHT, name=name)
        groups = -(-inner // width.group(inner))
        scales = draft.tensor((experts, groups, outer), width.scale, role=Role.WEIGHT, name=f"{name}.scales")
        args: dict[str, Arg] = {**op.args, "mat2": TensorRef(tensor=stored), "scale_b": TensorRef(tensor=scales)}
        draft.replace(index, replace(op, args=args))

    return rewrite


def _wider(situation: Situation, cold: Sequence[int]) -> tuple[str, Stated] | None:
    """What a larger batch saves on these products, for as many tokens."""
    batch = situation.scenario.batch_size
    wanted, _ = wider_batch(situation)
    if wanted < 2 * batch:
        return None
    graph = situation.retraced(replace(situation.scenario, batch_size=wanted), "decode")
    if graph is None or graph.new_tokens != wanted:
        return None
    wide, _ = analyze_phase(graph, situation.gpu, situation.analysis.execution)
    targets = {situation.graph.ops[index].target for index in cold}
    now, then = (_spent(*pair, targets) for pair in ((situation.graph, situation.analysis), (graph, wide)))
    share = batch / wanted
    return f"batch {wanted:,}, on as many tokens", (now[0] - share * then[0], now[1] - share * then[1])


def _spent(graph: Graph, phase: PhaseAnalysis, targets: set[str]) -> Stated:
    names = {op.name for op in graph.ops if op.target in targets}
    kernels = [k for k in phase.executions.of(phase.execution).kernels if not names.isdisjoint(k.ops)]
    return sum(k.seconds.bound for k in kernels), sum(k.seconds.estimate for k in kernels)
