"""The last wave of tiles leaves most multiprocessors idle, where a neighbouring shape would fill it.

**What it checks.** Matrix products with weights that arithmetic limits in the estimate, of which one at least loses a
tenth of its time: the same products take less a row at a batch, or where prompts are cut at a length of the chunks,
that is at most a quarter away (one sequence away, where the batch is small).

**Why it costs.** A product is cut into tiles of its result, one a thread block, and blocks run in waves of one a
multiprocessor. The last wave takes as long as a full one, however few tiles are left for it: 136 tiles on 132
multiprocessors take two waves, as long as 264 would. Tiles at the edge are computed in full as well.

**How it is estimated.** Every such product of the phase is priced at the neighbouring number of rows by the function
that prices it as it is: the fastest tile and split, whole waves. The saving is per unit of work: time now - time there
x rows now / rows there, over all of those products, those included that lose by the change. No run of this phase is
that much faster; the same rows are, in steps of the other size. The bound knows of no tiles and does not change.

**Remedy.** The batch, or the length of the chunks, that the finding names.

    fxroof analyze MODEL --gpu NAME --batch-size 60

Where the width of a layer is yours to choose, one that makes tiles a multiple of multiprocessors does
the same.

**When to ignore.** Kernels that share the last wave among all multiprocessors by cutting the inner dimension
(Stream-K), which libraries pick for some shapes; batches that others decide.

**Example.**

    model = nn.Linear(4096, 4352)  # on 132 multiprocessors
    model(x)                       # 1,024 rows: 4 x 34 tiles of 256 x 128, 4 more than a wave

**References.** NVIDIA, "Matrix Multiplication Background User's Guide", sections on tile and wave quantization;
Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU" (PPoPP
2023).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor

from ..analyzer.cost import Cost
from ..analyzer.estimate import Busy, Derating, busy, derating
from ..analyzer.finding import Confidence, Match, Remedy, Severity, Situation, rule
from ..analyzer.graph import Graph, Role
from ..analyzer.roofline import Bound
from ..hardware.gpu import Gpu

_OF_SAVING = 0.25
"""Share of the saving that lies in the products that lose noticeably."""
_LEAST_LOSS = 0.1
"""Share of its time that such a product loses."""
_REACH = 0.25
"""How far from the present size others are tried, as a share of it."""
_STEP = 64
"""Tokens between the chunks that are tried; and into how many steps a large batch is divided."""
_AS_GOOD = 0.01
"""Share of the time within which the nearest size is preferred to the best."""


@rule("SHP002", "wave-tail", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """The phase as a whole, at the product that loses most."""
    batch = _batch(situation)
    products = _products(situation, batch)
    if not products:
        return
    now = sum(product.seconds(1.0) for product in products)
    tried = [(now - sum(product.seconds(n.rows) for product in products), n) for n in _neighbours(situation, batch)]
    best = max((saving for saving, _ in tried), default=0.0)
    if best <= 0:
        return
    as_good = [(saving, n) for saving, n in tried if saving >= best - _AS_GOOD * now]
    saving, neighbour = min(as_good, key=lambda found: (abs(found[1].rows - 1), -found[0]))
    losses = {product: product.seconds(1.0) - product.seconds(neighbour.rows) for product in products}
    bad = [product for product in products if losses[product] >= _LEAST_LOSS * product.seconds(1.0)]
    if sum(losses[product] for product in bad) < _OF_SAVING * saving or not bad:
        return  # the line to name is not where the time is lost
    worst = max(bad, key=losses.__getitem__)
    gemm = worst.cost.gemms[0]
    yield Match(
        op=worst.op,
        message=f"tiles fill the last wave badly: {neighbour.instead} would take less for each row",
        evidence={
            "product": f"{gemm.m} x {gemm.n} x {gemm.k}",
            "seconds": worst.seconds(1.0) / worst.times,
            "lost_seconds": losses[worst] / worst.times,
            "multiprocessors": situation.gpu.sm_count or 0,
            "products_alike": worst.times,
            "products": sum(product.times for product in products),
            "seconds_of_products": now,
        },
        remedy=Remedy(
            text=f"Use {neighbour.instead}: the saving is per unit of work, of as many rows as now.",
            code=neighbour.code,
        ),
        confidence=Confidence.MEDIUM,
        saving=(0.0, saving),
        per_token=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Neighbour:
    """Another size of step: its rows, as a share of those now, and how to have it."""

    rows: float
    instead: str
    code: str


def _neighbours(situation: Situation, batch: int) -> Iterator[_Neighbour]:
    near = range(ceil((1 - _REACH) * batch), floor((1 + _REACH) * batch) + 1, max(1, batch // _STEP))
    for other in sorted({*near, batch - 1, batch + 1} - {0, batch}):
        yield _Neighbour(
            rows=other / batch,
            instead=f"a batch of {other:,} in place of {batch:,}",
            code=f"fxroof analyze MODEL --gpu NAME --batch-size {other}",
        )
    scenario = situation.scenario
    if situation.graph.turns == 1 or not scenario.chunk:
        return
    for chunk in range(ceil((1 - _REACH) * scenario.chunk), floor((1 + _REACH) * scenario.chunk) + 1):
        length = replace(scenario, chunk=chunk).prompt_len
        if chunk % _STEP == 0 and length != scenario.prompt_len:
            yield _Neighbour(
                rows=length / scenario.prompt_len,
                instead=f"prompts in chunks of {chunk:,} in place of {scenario.chunk:,}",
                code=f"fxroof analyze MODEL --gpu NAME --chunk {chunk}",
            )


def _batch(situation: Situation) -> int:
    graph = situation.graph
    if graph.tokens:
        return situation.scenario.batch_size
    leading = {graph.tensors[i].shape[0] for i in graph.inputs if graph.tensors[i].shape}
    return leading.pop() if len(leading) == 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Product:
    """Products that cost the same.

    Attributes:
        op: the first of them.
        times: how many there are.
        cost: of one.
        fixed: bytes of its weight.
        moved: bytes read and written in all.
        gpu: the part.
        reached: what it reaches.
    """

    op: int
    times: int
    cost: Cost
    fixed: int
    moved: int
    gpu: Gpu
    reached: Derating

    @property
    def limit(self) -> Bound:
        """What limits one, all it moves taken from device memory."""
        return self._alone(1.0).lanes.slowest[1]

    def seconds(self, rows: float) -> float:
        """Seconds that all take for as many rows as now, in steps of so many times as many."""
        scaled = round(self.cost.gemms[0].m * rows) / self.cost.gemms[0].m
        return self.times * self._alone(rows).working / scaled

    def _alone(self, rows: float) -> Busy:
        """One with so many times as many rows."""
        gemm = self.cost.gemms[0]
        scaled = round(gemm.m * rows)
        share = scaled / gemm.m
        matmul = {dtype: flops * share for dtype, flops in self.cost.matmul.items()}
        cost = replace(self.cost, matmul=matmul, vector={}, gemms=(replace(gemm, m=scaled),))
        moved = self.fixed + (self.moved - self.fixed) * share
        return busy(cost, moved, 0.0, moved, self.gpu, self.reached)


def _products(situation: Situation, batch: int) -> Sequence[_Product]:
    """Products of rows that follow the batch with a weight, which arithmetic limits."""
    graph, gpu = situation.graph, situation.gpu
    reached = derating(gpu)
    chosen = situation.analysis.executions.of(situation.analysis.execution)
    busiest = {name for kernel in chosen.kernels if kernel.bound is Bound.COMPUTE for name in kernel.ops}
    found: dict[int, int] = {}
    times: Counter[int] = Counter()
    for index, (op, cost, kind) in enumerate(zip(graph.ops, situation.costs, graph.kinds, strict=True)):
        if len(cost.gemms) != 1 or op.name not in busiest or not gpu.sm_count:
            continue
        if cost.gemms[0].batch == 1 and cost.gemms[0].m % batch == 0 and _weight_bytes(graph, cost):
            found.setdefault(kind, index)
            times[kind] += op.repeat
    products = [
        _Product(
            op=index,
            times=times[kind],
            cost=situation.costs[index],
            fixed=_weight_bytes(graph, situation.costs[index]),
            moved=sum(access.read + access.written for access in situation.costs[index].traffic),
            gpu=gpu,
            reached=reached,
        )
        for kind, index in found.items()
    ]
    return [product for product in products if product.limit is Bound.COMPUTE]


def _weight_bytes(graph: Graph, cost: Cost) -> int:
    return sum(access.read for access in cost.traffic if graph.role(access.tensor) is Role.WEIGHT)
