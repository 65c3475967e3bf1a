"""How a model's KV cache grows with batch and context: the model itself is asked, on the meta device.

The cache of a few batches and contexts is enough, since every tensor in it is `batch x (a + b x min(context, window))`.
No architecture is known here: grouped heads, latent vectors, windows and recurrent states show in the tensors.
"""

import contextlib
import copy
import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import Call, cache_tensors, returned_cache
from .load import Model
from .memory import CacheGrowth, CachePart
from .meta import building, on_meta, tracing
from .scenario import Scenario
from .workload import Workload

_SHORT = 24
"""Context, tokens, below any window."""
_LONG = 9216
"""Context, tokens, beyond most windows."""
_PATIENCE = 2
"""Times the ops of a short context that a long one may take; a loop over tokens takes more, and is not waited for."""


def cache_growth(model: Model, workload: Workload, *, shards: int = 1) -> CacheGrowth | None:
    """How the cache of a planned workload grows; None where it cannot be told.

    Args:
        model: the model that was planned for, or one GPU's share of it.
        workload: its programs.
        shards: GPUs over which the cache is cut.
    """
    growth = _growth(model, workload)
    return None if growth is None else dataclasses.replace(growth, shards=shards)


def _growth(model: Model, workload: Workload) -> CacheGrowth | None:
    calls = [program.module for program in workload.programs if isinstance(program.module, Call)]
    call = next((call for call in calls if call.cache_argument), None)
    try:
        if call is not None:
            template = next((c.template[0] for c in calls if c.template[0] is not None), None)
            return _returned(model, workload.scenario, call, template)
        if hasattr(model.module, "setup_caches"):
            return _allocated(model.module, workload.scenario)
    except _RefusedError:
        return None
    without = workload.cache_kind == "none" or {p.phase.name for p in workload.programs} <= {"forward", "encoder"}
    return CacheGrowth() if without else None


@dataclass(frozen=True, slots=True)
class _Sample:
    """The cache tensors of one batch and context."""

    batch_size: int
    context_len: int
    shapes: tuple[tuple[int, ...], ...]
    items: tuple[int, ...]

    def nbytes(self, index: int) -> int:
        return self.items[index] * torch.Size(self.shapes[index]).numel()


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts ops, and stops where there are more than `limit`."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.ops = 0
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        if self.limit is not None and self.ops > self.limit:
            raise _RefusedError
        return func(*args, **(kwargs or {}))


class _RefusedError(Exception):
    """The model does not take a batch or a length, or takes too long for it."""


def _returned(model: Model, scenario: Scenario, call: Call, template: Any) -> CacheGrowth | None:
    """Caches that the model returns; `template` is the one of the scenario's context, where there is one."""
    batch, context = scenario.batch_size, scenario.context_len
    counted = _Counted()
    short = _cache_of(model, call, 3 if batch != 3 else 5, _SHORT, counted)
    if template is None:
        template = _cache_of(model, call, batch, context, _Counted(_PATIENCE * counted.ops))
    samples = [_sampled(short, 3 if batch != 3 else 5, _SHORT), _sampled(template, batch, context)]
    if len(samples[0].shapes) != len(samples[1].shapes):
        return None
    tensors = range(len(samples[1].shapes))
    if any(_part(samples, index).bytes_per_token for index in tensors):  # what does not grow has no window
        furthest = max(2 * context, _LONG)
        with contextlib.suppress(_RefusedError):
            far = _cache_of(model, call, batch, furthest, _Counted(_PATIENCE * counted.ops))
            samples.append(_sampled(far, batch, furthest))
    parts = Counter(_part(samples, index) for index in tensors)
    return CacheGrowth(
        parts=tuple(dataclasses.replace(part, count=count) for part, count in parts.items()),
        measured_to=samples[-1].context_len,
        # a caller holds on to a plain container until the step has returned another
        in_place=not isinstance(template, tuple | list | Mapping),
    )


def _cache_of(model: Model, call: Call, batch_size: int, context_len: int, counted: _Counted) -> Any:
    tokens = torch.empty((batch_size, context_len), dtype=torch.long, device="meta")
    try:
        with tracing(), contextlib.redirect_stdout(sys.stderr), counted:
            return returned_cache(model.module(tokens, **call.fixed), call.cache_argument)
    except Exception as error:
        raise _RefusedError from error


def _sampled(cache: Any, batch_size: int, context_len: int) -> _Sample:
    tensors = cache_tensors(cache)
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    return _Sample(batch_size, context_len, shapes, tuple(tensor.element_size() for tensor in tensors))


def _part(samples: Sequence[_Sample], index: int) -> CachePart:
    """The law of one cache tensor, from a short context of another batch, the scenario's and perhaps a long one."""
    short, middle = samples[:2]
    far = samples[-1]
    batch_dim = _dimension(short.shapes[index], middle.shapes[index], short.batch_size, middle.batch_size)
    batched = batch_dim is not None
    each = [s.nbytes(index) / (s.batch_size if batched else 1) for s in samples]
    if len(set(each)) == 1:
        return CachePart(count=1, fixed_bytes=round(each[0]), bytes_per_token=0.0, batched=batched)
    # positions are whole tokens, or fewer where several are compressed into one
    changing = [d for d, n in enumerate(short.shapes[index]) if d != batch_dim and n != far.shapes[index][d]]
    positions = short.shapes[index][changing[0]] if len(changing) == 1 else 0
    near = positions and abs(positions - short.context_len) <= _SHORT // 3
    rate = each[0] / (positions if near else short.context_len)
    fixed = each[0] - rate * short.context_len
    limit = None
    if each[-1] != fixed + rate * far.context_len:
        limit = round((each[-1] - fixed) / rate)
    return CachePart(count=1, fixed_bytes=round(fixed), bytes_per_token=rate, tokens_at_most=limit, batched=batched)


def _dimension(one: tuple[int, ...], other: tuple[int, ...], ones: int, others: int) -> int | None:
    """The dimension that is as many times larger as the batch is."""
    matches = (d for d, (n, m) in enumerate(zip(one, other, strict=True)) if n != m and n * others == m * ones)
    return next(matches, None)


def _allocated(module: nn.Module, scenario: Scenario) -> CacheGrowth:
    """Buffers that `setup_caches(batch, length)` makes, larger than those there are: the ones that follow both."""
    batch = max(scenario.batch_size, _integer(module, "max_batch_size"))
    length = 2 * max(scenario.input_len + scenario.output_len, _integer(module, "max_seq_length"))
    length += -length % 64
    base, longer, wider = (
        _buffers(module, b, n) for b, n in ((batch, length), (batch, 2 * length), (2 * batch, length))
    )
    parts = Counter[CachePart]()
    for name, nbytes in base.items():
        if wider.get(name) == 2 * nbytes and longer.get(name, 0) > nbytes:
            rate = (longer[name] - nbytes) / length / batch
            parts[CachePart(count=1, fixed_bytes=round(nbytes / batch - rate * length), bytes_per_token=rate)] += 1
    return CacheGrowth(
        parts=tuple(dataclasses.replace(part, count=count) for part, count in parts.items()), measured_to=2 * length
    )


def _integer(module: nn.Module, name: str) -> int:
    value = getattr(module, name, 0)
    return value if isinstance(value, int) else 0


def _buffers(module: nn.Module, batch_size: int, length: int) -> dict[str, int]:
    again = copy.deepcopy(module)
    try:
        with building(), contextlib.redirect_stdout(sys.stderr):
            again.setup_caches(batch_size, length)  # type: ignore[operator]  # the user's method
    except Exception as error:
        raise _RefusedError from error
    return {name: b.numel() * b.element_size() for name, b in on_meta(again, owned=True).named_buffers()}
