"""What the functions inside higher-order ops say of their own cost: how often a loop turns, what a mask hides.

Both are read off the captured functions by running them on real memory, on constants alone; where anything else goes
in, the answer is that it is unknown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

Constants = Mapping[fx.Node, torch.Tensor]
"""Tensors on real memory by the node that stands for them in the program."""

MOST_TRIPS = 10_000
"""Turns after which a loop that is counted by running it is given up."""

MOST_PAIRS = 1 << 28
"""Pairs of a query and a key after which a mask is not evaluated."""

_LARGEST = 64
"""Elements of a tensor that is followed as a constant."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop that was counted: its turns, and what its known variables hold afterwards, by position."""

    trips: int
    finals: Mapping[int, Any]


def counted(
    condition: fx.GraphModule,
    body: fx.GraphModule,
    carried: Sequence[Any],
    others: Sequence[Any],
    constants: Constants,
) -> Loop | None:
    """Count the turns of a `while_loop` by running what its condition depends on.

    Args:
        condition: takes the loop variables and the others, returns whether to go on.
        body: takes the same, returns the next loop variables.
        carried: first values of the loop variables: nodes of the graph around the loop, or numbers.
        others: what the loop reads and does not change, likewise.
        constants: tensors of the program whose values are known.

    Returns:
        None where the condition depends on data, or turns more than `MOST_TRIPS` times.
    """
    asks, turns = _Function(condition), _Function(body)
    needed = asks.needs(asks.result)
    while more := {i for j in needed if j < len(carried) for i in turns.needs(turns.result[j])} - needed:
        needed |= more
    given = [*carried, *others]
    state = {i: _constant(given[i], constants) for i in needed}
    if any(value is None for value in state.values()):
        return None
    variables = sorted(i for i in needed if i < len(carried))
    try:
        for trips in range(MOST_TRIPS + 1):
            if not asks.run(asks.result, state):
                return Loop(trips, {i: state[i] for i in variables})
            state |= {i: turns.run(turns.result[i], state) for i in variables}
    except _UnknownError:
        pass
    return None


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What a block mask leaves.

    Attributes:
        pairs: (query, key) pairs that are seen, over the batch and heads of the mask.
        of: pairs of the whole.
        keys: share of the rows of keys and values that some query sees.
    """

    pairs: int
    of: int
    keys: float = 1.0


def sparsity(
    block_mask: Sequence[Any], captured: Sequence[Any], queries: int, keys: int, constants: Constants
) -> Sparsity | None:
    """What the mask of `flex_attention` leaves: by its `mask_mod`, run for every query and key, else by its blocks.

    Args:
        block_mask: the argument of the higher-order op as nodes; of its entries, 2 and 4 count the blocks of each row
            of blocks that are seen in part and in full, and the last three are block sizes and `mask_mod`.
        captured: tensors that `mask_mod` captured.
        queries: S.
        keys: T.
        constants: tensors of the program whose values are known.

    Returns:
        None where both depend on data.
    """
    *_, rows, columns, mask = block_mask
    heads: tuple[int, int] = tuple(block_mask[2].meta["val"].shape[:2])
    of = heads[0] * heads[1] * queries * keys
    seen = _seen(mask, captured, heads, queries, keys, constants) if of <= MOST_PAIRS else None
    if seen is not None and seen.pairs < of:
        return seen
    if rows >= queries and columns >= keys:
        return Sparsity(of, of)
    counts = [_constant(counted, constants) for counted in (block_mask[2], block_mask[4]) if counted is not None]
    if any(count is None for count in counts):
        return None
    blocks = sum(counts)
    return Sparsity(
        min(of, int(blocks.sum()) * rows * columns), of, min(1.0, int(blocks.max()) * columns / max(keys, 1))
    )


def _seen(
    mask: Any, captured: Sequence[Any], heads: tuple[int, int], queries: int, keys: int, constants: Constants
) -> Sparsity | None:
    known = {4 + i: _constant(value, constants) for i, value in enumerate(captured)}
    if any(value is None for value in known.values()):
        return None
    function = _Function(mask)
    batch, head = (torch.arange(n) for n in heads)
    known |= {0: batch.view(-1, 1, 1, 1), 1: head.view(1, -1, 1, 1), 3: torch.arange(keys).view(1, 1, 1, -1)}
    pairs, used = 0, torch.zeros(*heads, keys, dtype=torch.bool)
    try:
        for start in range(0, queries, _LINES):
            lines = torch.arange(start, min(start + _LINES, queries))
            seen = function.run(function.result, known | {2: lines.view(1, 1, -1, 1)})
            seen = seen.expand(*heads, len(lines), keys)
            pairs += int(seen.sum())
            used |= seen.any(2)
    except (_UnknownError, RuntimeError):
        return None
    return Sparsity(pairs, used.numel() * queries, float(used.sum()) / max(used.numel(), 1))


_LINES = 128
"""Queries for which a mask is evaluated at once."""


class _UnknownError(Exception):
    """A value that only a run can tell."""


class _Function:
    """A captured function, run node by node as far as a result needs."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        nodes = list(module.graph.nodes)
        self.holes = {node: i for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
        self.result: Any = nodes[-1].args[0]

    def needs(self, result: Any) -> set[int]:
        """Positions of the arguments that a result depends on."""
        found: set[int] = set()
        seen: set[fx.Node] = set()
        waiting = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, fx.Node)]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                if node in self.holes:
                    found.add(self.holes[node])
                waiting += node.all_input_nodes
        return found

    def run(self, result: Any, arguments: Mapping[int, Any]) -> Any:
        """A result on real memory, from the arguments it needs by position."""

        def hole(node: fx.Node) -> Any:
            if node in self.holes:
                return arguments[self.holes[node]]
            raise _UnknownError

        return _evaluated(result, hole)


def _constant(value: Any, constants: Constants) -> Any:
    """What a node of the outer graph holds if that follows from constants alone; None if unknown."""

    def hole(node: fx.Node) -> Any:
        if node in constants:
            return constants[node]
        raise _UnknownError

    try:
        return _evaluated(value, hole)
    except _UnknownError:
        return None


def _evaluated(value: Any, hole: Callable[[fx.Node], Any]) -> Any:
    done: dict[fx.Node, Any] = {}

    def of(node: fx.Node) -> Any:
        if node not in done:
            done[node] = hole(node) if node.op != "call_function" else _called(node, of)
        return done[node]

    result = fx.node.map_arg(value, of)
    if isinstance(result, torch.Tensor) and result.is_meta:
        raise _UnknownError
    return result[0] if isinstance(result, list | tuple) and len(result) == 1 else result


def _called(node: fx.Node, of: Callable[[fx.Node], Any]) -> Any:
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise _UnknownError
    if isinstance(target, torch._ops.OpOverload) and (
        target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags or "empty" in str(target)
    ):
        raise _UnknownError
    if any(_is_written(user, node) for user in node.users) or _is_large(node):
        raise _UnknownError
    kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in node.kwargs.items()}
    return target(*fx.node.map_arg(node.args, of), **fx.node.map_arg(kwargs, of))


def _is_written(user: fx.Node, node: fx.Node) -> bool:
    target = user.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and node in user.all_input_nodes


def _is_large(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.numel() > _LARGEST
