"""When the tensors of a program are let go: torch.export runs the real code, so Python itself says.

A local variable, an argument or an attribute holds a tensor for longer than data need it. Each tensor that an export
tracks is watched by a weak reference, and the node that made it is told which node ran last when it died.
"""

import contextlib
import operator
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from sys import getrefcount
from typing import Any

import torch
from torch import fx
from torch.fx.experimental import proxy_tensor

_LIVES = "fxroof_lives"
"""Key of a node's meta under which the lives of its results are."""


@dataclass(slots=True)
class Life:
    """The life of a tensor in Python.

    Attributes:
        born: its number in the order in which ops made tensors; 0 for inputs.
        died: number of the tensor that was made last when nothing held this one any more; None where it outlived all.
    """

    born: int = 0
    died: int | None = None


def lives_of(node: fx.Node) -> Sequence[Life]:
    """The lives of a node's results, in order; none where the program was not exported under `watched`."""
    lives: Sequence[Life] = node.meta.get(_LIVES, ())
    return lives


@contextlib.contextmanager
def watched(inputs: int) -> Iterator[None]:
    """Write down the lives of tensors in the nodes of an export inside.

    Args:
        inputs: how many tensors the program is given.
    """
    track = getattr(proxy_tensor, _TRACK, None)
    if track is None:  # a torch that works differently: lifetimes then follow from data alone
        yield
        return
    watch = _Watch(inputs)

    def track_and_watch(tensor: torch.Tensor, proxy: fx.Proxy, **others: Any) -> None:
        track(tensor, proxy, **others)
        watch.see(tensor, proxy.node)

    setattr(proxy_tensor, _TRACK, track_and_watch)
    try:
        yield
    finally:
        setattr(proxy_tensor, _TRACK, track)


_TRACK = "track_tensor"
"""What an export calls for each input, and each tensor that an op returns, in torch 2.11 to 2.13."""


@dataclass(slots=True)
class _Watch:
    """Counts the tensors that ops make while a program is exported, and notices which go in between."""

    inputs: int
    now: int = 0
    _graph: fx.Graph | None = None
    _given: list[tuple[torch.Tensor, fx.Node]] = field(default_factory=list)
    _held: list[tuple[torch.Tensor, Life]] = field(default_factory=list)
    _holders: list[int] = field(default_factory=list)
    _references: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def see(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Told of each tensor when it has been made."""
        self._graph = self._graph or node.graph
        if node.graph is not self._graph:
            return  # in the body of a torch.cond or the like
        if node.op == "placeholder":
            self._given.append((tensor, node))
        elif node.op == "call_function":
            self._look_at_inputs(node)
            self._see_result(tensor, node)

    def _see_result(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self.now += 1
        life = Life(self.now)

        def end(_: object) -> None:
            life.died = self.now

        maker = node.args[0] if node.target is operator.getitem else node
        if isinstance(maker, fx.Node):
            maker.meta.setdefault(_LIVES, []).append(life)
            self._references.append(weakref.ref(tensor, end))

    def _look_at_inputs(self, node: fx.Node) -> None:
        """Export holds inputs to the end: the program has let go of one when it has fewer holders than at first."""
        if not self.now:
            inputs = self._given[-self.inputs :] if self.inputs else []  # parameters come first
            self._held = [
                (tensor, given.meta.setdefault(_LIVES, [Life()])[0])
                for tensor, given in inputs
                if given not in node.all_input_nodes
            ]
            self._given, inputs = [], []  # which hold them too
            self._holders = self._count()
        elif (holders := self._count()) != self._holders:
            fewer = [now < first for now, first in zip(holders, self._holders, strict=True)]
            for _, life in compress(self._held, fewer):
                life.died = self.now
            if any(fewer):
                kept = [not gone for gone in fewer]
                self._held, self._holders = list(compress(self._held, kept)), list(compress(self._holders, kept))

    def _count(self) -> list[int]:
        return [getrefcount(tensor) for tensor, _ in self._held]


@dataclass(slots=True)
class Lifetimes:
    """Lives of tensors put together to those of the storages they lie in, counted in ops."""

    _made: list[tuple[int, int]] = field(default_factory=list)
    _died: dict[int, list[int | None]] = field(default_factory=dict)

    def add(self, lives: Sequence[Life], storages: Sequence[int], op: int) -> None:
        """The results of an op or an input, the storages they lie in, and the op's index, -1 for an input."""
        if len(lives) == len(storages) > 0:
            self._made.append((lives[-1].born, op))
            for life, storage in zip(lives, storages, strict=True):
                self._died.setdefault(storage, []).append(life.died)

    def ends(self, ops: int) -> dict[int, int]:
        """By storage, the op after which the last tensor in it was gone; the number of `ops` where one never was."""
        self._made.sort()
        numbers = [number for number, _ in self._made]

        def index(died: int | None) -> int:
            return ops if died is None else self._made[bisect_right(numbers, died) - 1][1]

        return {storage: max(map(index, died)) for storage, died in self._died.items()}
