"""Finds the layers of a model: the stretch of a sequence that repeats itself, and a graph with fewer of its turns."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .graph import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A stretch of a sequence that is the same again and again.

    Attributes:
        start: where the first turn begins.
        period: items of a turn.
        turns: how many there are.
        slack: by how much all turns could begin later and still be alike.
    """

    start: int
    period: int
    turns: int
    slack: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A graph without some of its layers.

    Attributes:
        ops: indices of those that are left, in order.
        stands_for: for tensors that layers left out made and others use, the like of each that a layer left makes.
        gone: storages that only layers left out fill.
    """

    ops: tuple[int, ...]
    stands_for: Mapping[int, int]
    gone: frozenset[int]


def longest_run(items: Sequence[int], *, left: int) -> Run | None:
    """The repetition that covers most of a sequence, beyond the first `left` of its turns."""
    gaps: Counter[int] = Counter()
    last: dict[int, int] = {}
    for index, item in enumerate(items):
        if item in last:
            gaps[index - last[item]] += 1
        last[item] = index
    best: Run | None = None
    covered = 0
    for period, _ in gaps.most_common(_PERIODS_TRIED):
        run = longest = end = 0
        for index in range(period, len(items)):
            run = run + 1 if items[index] == items[index - period] else 0
            if run > longest:
                longest, end = run, index + 1
        turns = longest // period + 1
        if longest >= period and turns > left and longest - left * period > covered:
            covered = longest - left * period
            begin = end - longest - period
            best = Run(start=begin, period=period, turns=turns, slack=longest + period - turns * period)
    return best


_PERIODS_TRIED = 24


def layers(graph: Graph, *, left: int) -> Run | None:
    """The layers of a graph, if it has more than `left` that cost the same; begun as late as they can be.

    Late, so that what a layer's end and the next one's beginning have in common is on one side of a cut.
    """
    run = longest_run(graph.kinds, left=left)
    if run is None:
        return None
    return Run(start=run.start + run.slack, period=run.period, turns=run.turns, slack=0)


def without_layers(graph: Graph, run: Run, turns: int) -> Part:
    """A graph of which only the first turns of a run are left; what follows the run follows the last of them."""
    first_gone = run.start + turns * run.period
    end = run.start + run.turns * run.period
    back = end - first_gone
    stands_for: dict[int, int] = {}
    gone: set[int] = set()
    for index in range(first_gone, end):
        op = graph.ops[index]
        homes = {graph.tensors[i].storage for i in op.inputs}
        made = {graph.tensors[i].storage for i in op.outputs}
        if not op.mutates and homes.isdisjoint(made):
            gone |= made
        # the same place in the last turn that is left
        like = first_gone - run.period + (index - first_gone) % run.period
        stands_for.update(zip(op.outputs, graph.ops[like].outputs, strict=True))
    ops = (*range(first_gone), *range(first_gone + back, len(graph.ops)))
    return Part(ops=ops, stands_for=stands_for, gone=frozenset(gone))
