"""PyTorch itself says what is alive: the program runs eagerly on meta while every storage is watched until it dies.

Sizes, aliasing and lifetimes are those of Python and torch; nothing of the traced graph or of our formulas is used,
but that attention returns the layout of the GPU's kernel and needs no scores. `torch.distributed._tools.mem_tracker`
works the same way; it counts storages by the same finalizers.
"""

import weakref
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from fxroof.analyzer.calls import Call, Decoder, refilled
from fxroof.analyzer.graph import Role
from fxroof.analyzer.meta import tracing
from fxroof.analyzer.workload import Program
from support import Traced
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 512


class Tracker(TorchDispatchMode):
    """Bytes of all storages alive, but those ignored, in blocks of the CUDA allocator; and their peak."""

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.ignored = {t.untyped_storage()._cdata for t in ignored}
        self.alive: dict[int, tuple[int, str]] = {}
        self.now = self.peak = 0
        self.at = ""
        self.largest: list[tuple[int, str]] = []

    def see(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.ignored or storage._cdata in self.alive:
            return
        nbytes = -(-storage.nbytes() // BLOCK) * BLOCK
        self.alive[storage._cdata] = (nbytes, name)
        self.now += nbytes
        weakref.finalize(storage, self._gone, storage._cdata)
        if self.now > self.peak:
            self.peak, self.at = self.now, name
            self.largest = sorted(self.alive.values(), reverse=True)[:25]

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf, str(func))
        return result


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel makes it: a result in its layout, and no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_fused if func is _ATTENTION else func)(*args, **(kwargs or {}))


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return torch.empty(shape, dtype=query.dtype, device=query.device).transpose(1, 2)


_ATTENTION = F.scaled_dot_product_attention


def tracked(traced: Traced, phase: str) -> Tracker:
    """Everything but weights that is alive while a phase runs as its caller would run it."""
    program = traced.program(phase)
    module = program.module
    assert isinstance(module, torch.nn.Module)
    written = {s.name for s in traced.graphs[phase].storages if s.role is Role.KV_CACHE}
    named = {n.removeprefix(f"{program.prefix}."): b for n, b in module.named_buffers()}
    owned = [b for n, b in named.items() if n in written]
    held = {id(b) for b in owned}
    tracker = Tracker([*module.parameters(), *(b for b in module.buffers() if id(b) not in held)])
    for buffer in owned:
        tracker.see(buffer, "cache")
    # torch's own multi-head attention calls it where no mode sees it
    with tracing(), FusedAttention(), mock.patch.object(F, "scaled_dot_product_attention", _fused):
        _run(program, tracker)
    return tracker


def _run(program: Program, tracker: Tracker) -> None:
    module: Any = program.module
    decoder = isinstance(module, Decoder)
    template = module.state[0] if decoder else module.template[0] if isinstance(module, Call) else None
    if template is None:
        for tensor in pytree.tree_leaves(program.args):
            if isinstance(tensor, torch.Tensor):
                tracker.see(tensor, "input")
        with tracker:
            module(*program.args)
        return
    # a caller of generate() holds the cache object, not the tensors that were in it
    inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in program.args]
    for tensor in inputs:
        tracker.see(tensor, "input")
    first = 2 if decoder else 1  # tokens, and what the encoder made
    given, state = inputs[:first], refilled(template, inputs[first:])
    del inputs, tensor
    with tracker:
        if decoder:
            module.run(*given, state)
        else:
            module.model(*given, **{module.cache_argument: state}, **module.fixed)
