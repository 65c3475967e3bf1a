"""Loops over tokens: a forward that has one unrolls into a graph that grows with the prompt, so the prompt must not."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import some_tokens
from .errors import WorkloadError
from .meta import tracing
from .scenario import Scenario
from .trace import NODE_LIMIT

_TOO_MANY = NODE_LIMIT // 2
"""Ops beyond which a default prompt is shortened."""
_ENOUGH = NODE_LIMIT // 4
"""Ops of a shortened one: a minute of tracing."""
_SHORT, _LONGER = 8, 16


class UnrolledError(Exception):
    """A forward made more ops than any model without a loop over tokens."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Run a forward on meta until it has made too many ops.

    Raises:
        UnrolledError: it has.
    """
    with _Count(_TOO_MANY):
        yield


def shortened(
    module: nn.Module, scenario: Scenario, fixed: Mapping[str, Any], *, cached: bool
) -> tuple[Scenario, tuple[str, ...]]:
    """The scenario with a prompt that can be unrolled; as it is where the forward has no loop.

    Args:
        module: whose forward takes tokens.
        scenario: batch and lengths.
        fixed: further arguments of forward.
        cached: whether a decode step runs one token, rather than all so far.

    Raises:
        WorkloadError: the user chose lengths that are too long.
    """
    counts = [_ops(module, length, fixed) for length in (_SHORT, _LONGER)]
    slope = (counts[1] - counts[0]) / (_LONGER - _SHORT)
    length = scenario.input_len if cached else scenario.context_len + 1
    expected = counts[1] + slope * (length - _LONGER)
    if slope <= 0 or expected <= (NODE_LIMIT if scenario.lengths_given else _TOO_MANY):
        return scenario, ()
    longest = int((_ENOUGH - counts[1]) / slope) + _LONGER
    fitted = max(_LONGER, longest if cached else longest - scenario.output_len // 2 - 1)
    if scenario.lengths_given:
        raise WorkloadError(
            f"The forward loops over tokens in Python: {length:,} of them unroll into about {expected:,.0f} operations "
            f"(limit {NODE_LIMIT:,}).",
            f"Use a shorter prompt: --input-len {fitted}.",
        )
    note = (
        f"the forward loops over tokens in Python, about {slope:.0f} operations each: the prompt is shortened to "
        f"{fitted} tokens"
    )
    return dataclasses.replace(scenario, input_len=fitted), (note,)


def _ops(module: nn.Module, length: int, fixed: Mapping[str, Any]) -> int:
    count = _Count()
    # a forward that fails does so again in the trace, with a message
    with tracing(), contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Exception), count:
        module(some_tokens(1, length), **fixed)
    return count.ops


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    def __init__(self, limit: int = sys.maxsize) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.ops, self.limit = 0, limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        if self.ops > self.limit:
            raise UnrolledError
        return func(*args, **(kwargs or {}))
