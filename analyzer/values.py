"""Values of small tensors, followed beside a trace that has none.

A forward may look at a tensor: `if mask.all()`, `positions.max().item()`, `counts.tolist()`. Where the value follows
from constants and from inputs that are known (token ids, positions), it is computed here on real memory, and the trace
takes the branch that the GPU would take. What depends on weights or activations stays unknown.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

ASSUMPTIONS = {"balanced-routing": "top-k picks spread evenly over the experts"}
"""What may be assumed where values are needed and not known."""

_assumed: ContextVar[frozenset[str]] = ContextVar("assumed", default=frozenset())
_active: ContextVar["Values | None"] = ContextVar("values", default=None)

_LARGEST_INTEGERS = 1 << 20
_LARGEST_FLOATS = 1 << 12

_QUESTIONS = frozenset(
    {
        torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__,
        torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__contains__, torch.equal, torch.Tensor.equal,
        torch.is_nonzero, torch.Tensor.is_nonzero, torch.allclose, torch.Tensor.allclose, torch.Tensor.numpy,
    }
)  # fmt: skip

# their results' shapes depend on values: with those known, the trace gets tensors of the right shape
_VALUE_SHAPED = frozenset(
    {
        torch.nonzero, torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere, torch.unique,
        torch.Tensor.unique, torch.unique_consecutive, torch.Tensor.unique_consecutive, torch.bincount,
        torch.Tensor.bincount,
    }
)  # fmt: skip

_CONSTANTS = frozenset(
    {
        torch.zeros, torch.ones, torch.full, torch.arange, torch.eye, torch.tensor, torch.linspace,
        torch.tril_indices, torch.triu_indices, torch.scalar_tensor, torch.as_tensor,
        torch.zeros_like, torch.ones_like, torch.full_like,
    }
)  # fmt: skip


def _where(condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.where(condition)


_LIKE: Mapping[Any, Callable[..., Any]] = {
    torch.zeros_like: torch.zeros,
    torch.ones_like: torch.ones,
    torch.full_like: torch.full,
}
_NEW: Mapping[Any, Callable[..., Any]] = {
    torch.Tensor.new_zeros: torch.zeros,
    torch.Tensor.new_ones: torch.ones,
    torch.Tensor.new_full: torch.full,
}
_TOPK = frozenset({torch.topk, torch.Tensor.topk})


@contextlib.contextmanager
def assuming(names: frozenset[str]) -> Iterator[None]:
    """Assume what `ASSUMPTIONS` names while tracing."""
    token = _assumed.set(names)
    try:
        yield
    finally:
        _assumed.reset(token)


@contextlib.contextmanager
def following() -> Iterator["Values"]:
    """Follow values inside; `tell` reaches the innermost follower."""
    values = Values(_assumed.get())
    token = _active.set(values)
    try:
        yield values
    finally:
        _active.reset(token)


def tell(tensor: torch.Tensor, real: torch.Tensor) -> None:
    """Say what an input of the traced program holds."""
    values = _active.get()
    if values is not None:
        values.learn(tensor, real)


class Values:
    """What is known of the tensors of one trace."""

    def __init__(self, assumed: frozenset[str] = frozenset()) -> None:
        self.balanced = "balanced-routing" in assumed
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def learn(self, tensor: torch.Tensor, real: torch.Tensor) -> None:
        """Remember a tensor's value; the tensor is kept alive, since its id stands for it."""
        limit = _LARGEST_FLOATS if real.is_floating_point() or real.is_complex() else _LARGEST_INTEGERS
        if real.numel() <= limit and real.shape == tensor.shape:
            self._known[id(tensor)] = (tensor, real)

    def call(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a call of the trace: answered from known values where it asks for one, else made and followed."""
        if args and isinstance(args[0], torch.Tensor) and id(args[0]) not in self._known and func not in _TOPK:
            return self._of_unknown(func, args, kwargs)
        if func in _QUESTIONS:
            known = self._real(args, kwargs)
            return func(*args, **kwargs) if known is None else _on_real_memory(func, *known)
        if func is torch.where and len(args) == 1 and not kwargs:
            return self._shaped_by_value(_where, args, kwargs)
        if func in _VALUE_SHAPED:
            return self._shaped_by_value(func, args, kwargs)
        if func is torch.Tensor.__getitem__:
            args = (args[0], self._mask_as_index(args[1]))
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def created(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], made: torch.Tensor) -> None:
        """Remember what a factory made, when that is a constant."""
        if func not in _CONSTANTS or made.numel() > _LARGEST_INTEGERS:
            return
        plain = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "memory_format", "requires_grad")}
        if func in _LIKE:
            func, args = _LIKE[func], (tuple(made.shape), *args[1:])
            plain["dtype"] = made.dtype
        known = self._real(args, plain)
        if known is not None:
            self._learn_all(made, _attempt(func, *known))

    def copied(self, tensor: torch.Tensor, made: torch.Tensor) -> None:
        """Remember of a copy what is known of a tensor."""
        if id(tensor) in self._known:
            self.learn(made, self._known[id(tensor)][1])

    def _of_unknown(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        # nearly every call of a trace is on activations: do no more than what may still concern known values
        if func in _NEW:
            result = func(*args, **kwargs)
            self._follow(func, args, kwargs, result)
            return result
        if func is torch.Tensor.__getitem__:
            args = (args[0], self._mask_as_index(args[1]))
        return func(*args, **kwargs)

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if func in _NEW:
            plain = {"dtype": result.dtype}
            self._learn_all(result, _attempt(_NEW[func], (tuple(result.shape), *args[2:]), plain))
            return
        if func in _TOPK and self.balanced:
            self.learn(result[1], _spread(result[1].shape, args[0].shape[-1]))
            return
        writes = _writes(func, kwargs)
        if not writes and not any(isinstance(r, torch.Tensor) for r in pytree.tree_leaves(result)):
            return
        known = self._real(args, {k: v for k, v in kwargs.items() if k != "device"})
        if known is None:
            if writes:
                self._forget(args[0])
            return
        self._learn_all(result, _attempt(func, *known))

    def _shaped_by_value(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        known = self._real(args, kwargs)
        real = None if known is None else _attempt(func, *known)
        if real is None:
            return func(*args, **kwargs)
        made = pytree.tree_map_only(torch.Tensor, lambda r: torch.empty(r.shape, dtype=r.dtype, device="meta"), real)
        self._learn_all(made, real)
        return made

    def _mask_as_index(self, index: Any) -> Any:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and id(index) in self._known:
            return self._shaped_by_value(_where, (index,), {})
        return index

    def _learn_all(self, result: Any, real: Any) -> None:
        if real is None:
            return
        pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(real), strict=False)
        for made, value in pairs:
            if isinstance(made, torch.Tensor) and isinstance(value, torch.Tensor):
                self.learn(made, value)

    def _forget(self, tensor: Any) -> None:
        if id(tensor) in self._known:
            memory = self._known[id(tensor)][1].untyped_storage().data_ptr()
            self._known = {
                key: pair for key, pair in self._known.items() if pair[1].untyped_storage().data_ptr() != memory
            }

    def _real(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The arguments with tensors replaced by their values; None when one is unknown."""
        for arg in itertools.chain(args, kwargs.values()):
            if isinstance(arg, torch.Tensor) and id(arg) not in self._known:
                return None
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in self._known:
                    return None
                leaves[position] = self._known[id(leaf)][1]
            elif isinstance(leaf, torch.device):
                leaves[position] = torch.device("cpu")
        real: tuple[Any, dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
        return real


def _spread(shape: torch.Size, experts: int) -> torch.Tensor:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return (torch.arange(shape.numel()) % experts).reshape(shape)


def _on_real_memory(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        return func(*args, **kwargs)


def _attempt(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        return _on_real_memory(func, args, kwargs)
    except Exception:  # following is a service: what cannot be followed is merely unknown
        return None


def _writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name != "__invert__") or "out" in kwargs
