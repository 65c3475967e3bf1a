"""Every new token is computed by running the model over all tokens before it again.

**What it checks.** A decode step of a language model that pushes more than one token a sequence through the model and
is given no cache, while its attention lets no token see those after it.

**Why it costs.** Keys and values of earlier tokens do not change when one is added, yet each step computes them, and
everything else, anew: FLOPs and activations of a whole prompt for one token. Generating n tokens costs n prompts.

**How it is estimated.** The model is traced again over a single token; its attention is then given keys and values of
the whole context, which are read from a cache that lies ready, with one new row written in each. That program is priced
as any other. Masks are left out: a single query sees all that is there.

**Remedy.** Keep each layer's keys and values, write one row a step, and attend to all rows.

    self.k_cache[:, :, pos : pos + n], self.v_cache[:, :, pos : pos + n] = k, v
    k, v = self.k_cache[:, :, : pos + n], self.v_cache[:, :, : pos + n]

**When to ignore.** Where only prompts are scored and nothing is generated.

**References.** Pope et al., "Efficiently Scaling Transformer Inference" (2022), section 3.3; Shazeer, "Fast
Transformer Decoding: One Write-Head is All You Need" (2019).
"""

from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.analysis import analyze_phase
from ..analyzer.finding import Confidence, Match, Remedy, Severity, Situation, rule
from ..analyzer.graph import Arg, Graph, Op, Role, TensorRef
from ..analyzer.rewrite import Draft, Flow, RewriteError
from ..analyzer.savings import timed
from ._attention import Finder, Naive
from ._call import Plan, Writer, plan_of
from ._masks import Shape
from .materialized_attention_scores import end_with

_REMEDY = Remedy(
    text="Keep each layer's keys and values, write one row a step, and attend to all rows.",
    code=(
        "self.k_cache[:, :, pos : pos + n], self.v_cache[:, :, pos : pos + n] = k, v\n"
        "k, v = self.k_cache[:, :, : pos + n], self.v_cache[:, :, : pos + n]"
    ),
)


@rule("KVC002", "no-kv-cache", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """The decode step as a whole, anchored at its first attention."""
    graph, scenario = situation.graph, situation.scenario
    if graph.phase != "decode" or graph.tokens <= graph.new_tokens * scenario.step_len:
        return
    if any(storage.role is Role.KV_CACHE for storage in graph.storages):
        return
    first = _first_attention(situation)
    if first is None:
        return
    op, confidence = first
    single = situation.retraced(
        replace(scenario, input_len=1, output_len=0, prefix_len=0, chunk=0, lengths_given=True), "prefill"
    )
    if single is None or single.tokens != graph.new_tokens:
        return
    cached = _cached(_with_graph(situation, single), graph.tokens // graph.new_tokens)
    if cached is None:
        return
    after = timed(cached, situation.gpu, situation.analysis.execution)
    times = situation.analysis.seconds
    yield Match(
        op=op,
        message="without a KV cache, each new token is a forward over all tokens before it",
        evidence={
            "tokens_computed": graph.tokens,
            "tokens_gained": graph.new_tokens,
            "seconds_per_step": times.estimate,
            "seconds_per_cached_step": after.estimate,
        },
        remedy=_REMEDY,
        confidence=confidence,
        saving=(times.bound - after.bound, times.estimate - after.estimate),
    )


def _first_attention(situation: Situation) -> tuple[int, Confidence] | None:
    """The first attention, and how sure it is that all are causal; None where one is not, or none is there."""
    finder = Finder(situation)
    found: list[tuple[int, Shape]] = []
    for naive in finder.naive():
        queries, keys = (o.described(situation.graph).shape[-2] for o in (naive.query, naive.key))
        found.append((naive.product, finder.shape_of_masks(naive.masks, queries, keys)))
    for index, op in finder.calls():
        plan = plan_of(situation.graph, index)
        queries, keys = (o.described(situation.graph).shape[-2] for o in (plan.query, plan.key))
        shape = finder.shape_of_masks(plan.masks, queries, keys)
        found.append((index, Shape.CAUSAL if op.args.get("is_causal") else shape))
    if not found or any(shape is Shape.ALL for _, shape in found):
        return None
    sure = all(shape is Shape.CAUSAL for _, shape in found)
    return min(found)[0], Confidence.HIGH if sure else Confidence.MEDIUM


def _with_graph(situation: Situation, graph: Graph) -> Situation:
    """The same situation of another graph."""
    analysis, costs = analyze_phase(graph, situation.gpu, situation.analysis.execution)
    return replace(situation, graph=graph, flow=Flow(graph), costs=costs, analysis=analysis)


def _cached(situation: Situation, length: int) -> Graph | None:
    """A program over one token whose attention reads keys and values of `length` tokens from a cache."""
    finder = Finder(situation)
    draft = Draft(situation.graph)
    for naive in finder.naive():
        if not draft.claim(naive.ops):
            return None
        plan = Plan(query=naive.query, key=naive.key, value=naive.value, scale=naive.scale)
        _attend(Writer(draft, naive.last), plan, length, naive)
    for index, _ in finder.calls():
        if not draft.claim((index,)):
            return None
        plan = replace(plan_of(situation.graph, index), masks=(), causal=False)
        _attend(Writer(draft, index), plan, length, None)
    try:
        return draft.finish()
    except RewriteError:
        return None


def _attend(writer: Writer, plan: Plan, length: int, naive: Naive | None) -> None:
    query, key, value, _ = writer.operands(plan)
    key, value = (_from_cache(writer, rows, length) for rows in (key, value))
    call, made = writer.call(query, key, value, None, scale=plan.scale, gqa=plan.gqa)
    if naive is not None:
        end_with(writer, naive, call, made)
        return
    (old,) = writer.like.outputs
    made, reshape = writer.reshaped(made, writer.draft.tensors[old].shape)
    writer.end(old, [call, *([reshape] if reshape else [])], made)


def _from_cache(writer: Writer, rows: int, length: int) -> int:
    """A cache (B, H, L, D) that lies ready, into whose last row the new one (B, H, 1, D) is written."""
    draft = writer.draft
    new = draft.tensors[rows]
    cache = draft.tensor((*new.shape[:2], length, new.shape[3]), new.dtype, role=Role.KV_CACHE)
    whole = draft.tensors[cache]
    row = draft.view(cache, new.shape, whole.stride, (length - 1) * whole.stride[2])
    args: dict[str, Arg] = {"self": TensorRef(tensor=row), "src": TensorRef(tensor=rows), "non_blocking": False}
    write = Op(
        name=f"{writer.like.name}_row_{cache}",
        target="aten.copy_.default",
        module=writer.like.module,
        module_type=writer.like.module_type,
        args=args,
        outputs=(row,),
        mutates=("self",),
        span=writer.like.span,
        user_span=writer.like.user_span,
        repeat=writer.like.repeat,
        branch=writer.like.branch,
    )
    draft.insert(writer.index, write)
    return cache
