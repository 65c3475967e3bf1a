"""What a phase takes once remedies have changed it: the changed graph goes through the same formulas and kernels.

A long model is a few layers again and again. Where pricing two short versions of it, a few layers and a few more,
gives what the whole takes as written, remedies are priced on those two and the layers between are added; else, and
wherever a remedy reaches across layers, the whole is priced.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..hardware.gpu import Gpu
from .estimate import derating
from .execution import execute
from .finding import Rewrite, Situation
from .fusion import compiled_kernels
from .graph import Graph
from .kernels import eager_kernels
from .pricing import price
from .repetition import Part, layers, without_layers
from .rewrite import Draft, RewriteError


@dataclass(frozen=True, slots=True)
class Seconds:
    """Bound and estimate of a phase, or differences of them."""

    bound: float
    estimate: float

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.bound - other.bound, self.estimate - other.estimate)

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.bound + other.bound, self.estimate + other.estimate)


@dataclass(frozen=True, slots=True)
class Change:
    """How one remedy changes the graph at one place: the op that is shown for it, None for the phase as a whole."""

    op: int | None
    rewrite: Rewrite


@dataclass(frozen=True, slots=True, kw_only=True)
class _Short:
    """A graph of a few layers, and how often what a layer adds is to be added to what it takes."""

    few: Part
    more: Part
    times: float

    def whole(self, few: Seconds, more: Seconds) -> Seconds:
        step = more - few
        return Seconds(few.bound + self.times * step.bound, few.estimate + self.times * step.estimate)


class Repricer:
    """Prices a phase under changes."""

    def __init__(self, situation: Situation) -> None:
        self.situation = situation
        times = situation.analysis.seconds
        self.as_written = Seconds(times.bound, times.estimate)
        self._short = self._shortened()

    def saving(self, changes: Iterable[Change], *, replayed: bool = False) -> Seconds | None:
        """What changes save together; None where they cannot be carried through.

        Args:
            changes: in the order in which they are made; of two that want the same op, the first has it.
            replayed: true where a CUDA graph launches the kernels.
        """
        changes = tuple(changes)
        if self._short is not None:
            try:
                few, more = (
                    self._timed(self._changed(changes, part), replayed=replayed)
                    for part in (self._short.few, self._short.more)
                )
            except RewriteError:
                pass
            else:
                return self._extrapolated - self._short.whole(few, more)
        graph = self.graph(changes)
        return None if graph is None else self.as_written - self._timed(graph, replayed=replayed)

    def graph(self, changes: Iterable[Change]) -> Graph | None:
        """The whole changed graph; None where the changes cannot be carried through."""
        try:
            return self._changed(tuple(changes), None)
        except RewriteError:
            return None

    def _shortened(self) -> _Short | None:
        graph, gpu = self.situation.graph, self.situation.gpu
        run = layers(graph, left=_MORE)
        if run is None or (run.turns - _MORE) * run.period < _WORTH_IT:
            return None
        turn = graph.ops[run.start : run.start + run.period]
        homes = {graph.tensors[i].storage for op in turn for i in (*op.inputs, *op.outputs)}
        held = sum(graph.storages[i].nbytes for i in homes)
        if _FEW * held < _SHRINKAGE * (gpu.cache_bytes or 0):
            return None  # a remedy could make the short versions fit in the cache, where the whole does not
        short = _Short(
            few=without_layers(graph, run, _FEW),
            more=without_layers(graph, run, _MORE),
            times=(run.turns - _FEW) / (_MORE - _FEW),
        )
        try:
            few, more = (self._timed(self._changed((), part), replayed=False) for part in (short.few, short.more))
        except RewriteError:
            return None
        self._extrapolated = short.whole(few, more)
        off = self._extrapolated - self.as_written
        exact = abs(off.bound) <= _EXACT * self.as_written.bound and abs(off.estimate) <= (
            _EXACT * self.as_written.estimate
        )
        return short if exact else None

    def _changed(self, changes: tuple[Change, ...], part: Part | None) -> Graph:
        draft = Draft(self.situation.graph, part)
        kept = None if part is None else frozenset(part.ops)
        for change in changes:
            if kept is None or change.op is None or change.op in kept:
                change.rewrite(draft)
        return draft.finish()

    def _timed(self, graph: Graph, *, replayed: bool) -> Seconds:
        return timed(graph, self.situation.gpu, self.situation.analysis.execution, replayed=replayed)


_FEW, _MORE = 3, 5
_WORTH_IT = 500
"""Ops that have to be left out before two short graphs are cheaper than the whole."""
_SHRINKAGE = 8
"""No remedy makes what a layer holds smaller than by this: 32 bits become 4."""
_EXACT = 1e-3


def timed(graph: Graph, gpu: Gpu, execution: str, *, replayed: bool = False) -> Seconds:
    """Bound and estimate of a graph; `replayed` where its eager kernels are launched by a CUDA graph."""
    costs = price(graph, gpu)
    eager = execution == "eager"
    kernels = eager_kernels(graph, costs) if eager else compiled_kernels(graph, costs)
    found = execute(graph, kernels, gpu, derating(gpu), eager=eager and not replayed).execution
    return Seconds(found.bound, found.estimate)
