"""Which tensors a forward keeps on the host, and copies between host and device as ops that a trace can see.

A trace has one device, so that `.cpu()` and `.cuda()` do nothing in it. This says beside the trace where each block of
memory lies: on the device, unless the program has put it on the host. A move between the two becomes an op, and one to
where a tensor is already becomes none.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

HOST = torch.device("cpu")
"""What a tensor on the host answers when asked for its device; this very object, since any other may be a default."""

Slot = tuple[int, str]
"""What lasts from step to step: a parameter or buffer, by the identity of its module and its name there; or a tensor
of the cache that is handed from one call to the next, by its position."""

_active: ContextVar["Residence | None"] = ContextVar("residence", default=None)


@contextlib.contextmanager
def residing(residence: "Residence") -> Iterator[None]:
    """Have `take_over` and `hand_on` speak of this one."""
    token = _active.set(residence)
    try:
        yield
    finally:
        _active.reset(token)


def current() -> "Residence | None":
    """The one of the trace that is under way."""
    return _active.get()


def take_over(cache: Iterable[torch.Tensor]) -> None:
    """Say which tensors a step begins with that the step before handed on."""
    if (residence := _active.get()) is not None:
        residence.begin_with(cache)


def hand_on(cache: Sequence[torch.Tensor]) -> None:
    """Say which tensors go to the next step, in the same order."""
    if (residence := _active.get()) is not None:
        residence.end_with(cache)


class Residence:
    """Where the memory of one trace lies.

    Args:
        away: what is on the host when the forward begins.
    """

    def __init__(self, away: frozenset[Slot] = frozenset()) -> None:
        self._away = away
        self._homes: dict[int, tuple[torch.UntypedStorage, bool]] = {}  # those on the host: said so, or by default
        self._moved: dict[Slot, int] = {}
        self._taken = 0

    def begin(self, module: nn.Module) -> None:
        """Put on the host what is there when the forward of a module begins."""
        for child in module.modules() if self._away else ():
            for name, tensor in _held(child):
                if (id(child), name) in self._away:
                    self.put(tensor, host=True)
                    self._note((id(child), name), tensor)

    def begin_with(self, cache: Iterable[torch.Tensor]) -> None:
        """Put on the host what is there of a cache that the forward is given."""
        for position, tensor in enumerate(cache):
            self._taken = position + 1
            if (_CACHED, str(position)) in self._away:
                self.put(tensor, host=True)

    def end_with(self, cache: Sequence[torch.Tensor]) -> None:
        """Note where the cache is that a forward hands on in place of the one it was given."""
        if len(cache) == self._taken:
            for position, tensor in enumerate(cache):
                self._note((_CACHED, str(position)), tensor)

    @property
    def left(self) -> frozenset[Slot]:
        """What is on the host in the end: the next step begins with it there."""
        return frozenset(slot for slot, home in self._moved.items() if home in self._homes)

    @property
    def has_host(self) -> bool:
        """Whether anything is on the host at all."""
        return bool(self._homes)

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is the host's."""
        return bool(self._homes) and _home(tensor) in self._homes

    def are_apart(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether one tensor is on the host and one on the device."""
        return self.is_on_host(one) != self.is_on_host(other)

    def put(self, tensor: torch.Tensor, *, host: bool, said: bool = True) -> None:
        """Note where a tensor is; `said` where the program names the host, rather than no device at all."""
        home = _home(tensor)
        if home is None:
            return
        if host:
            self._homes[home] = (tensor.untyped_storage(), said)  # a storage's address is its name only while it lives
        else:
            self._homes.pop(home, None)

    def moved(self, tensor: torch.Tensor, *, host: bool, non_blocking: bool) -> torch.Tensor:
        """The tensor on the host or on the device: itself where it is there already, else a copy."""
        if self.is_on_host(tensor) == host or _home(tensor) is None:
            return tensor
        ops: Any = torch.ops.fxroof
        made: torch.Tensor = (ops.to_host if host else ops.to_device)(tensor, non_blocking)
        self.put(made, host=host)
        return made

    def move_module(self, module: nn.Module, *, host: bool, non_blocking: bool) -> None:
        """Copy what a module holds; its tensors stay the same to the trace, so that weights stay weights."""
        ops: Any = torch.ops.fxroof
        for child in module.modules():
            for name, tensor in _held(child):
                self._note((id(child), name), tensor)
                if self.is_on_host(tensor) != host and _home(tensor) is not None:
                    (ops.move_to_host if host else ops.move_to_device)(tensor, non_blocking)
                    self.put(tensor, host=host)

    def created(self, func: Callable[..., Any], args: Any, device: Any, made: torch.Tensor) -> None:
        """Note where a factory puts what it makes: on the host if no device is asked for, as PyTorch does."""
        like = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if device is not None:
            self.put(made, host=self.is_host(device), said=device is not HOST)
        elif func is torch.from_numpy:
            self.put(made, host=True)
        elif like is not None:
            self.put(made, host=self.is_on_host(like))
        elif defaults_to_host():
            self.put(made, host=True, said=False)

    def follow(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note where the results of an op are: where the tensors are that it takes.

        On the device no op takes tensors of both, but indices and single numbers. Where one seems to, what was made
        without naming a device is on it, by a default that is not seen here, or weights are on the host that never
        were moved there.
        """
        if not self._homes:
            return
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        hosts = [t for t in given if self.is_on_host(t)]
        if not hosts:
            return
        others = [t for t in given if not self.is_on_host(t)]
        if others and (func in _INDEXING or not all(isinstance(t, nn.Parameter) for t in others)):
            self._on_device_after_all(hosts)
            return
        said = any(self._homes[home][1] for t in hosts if (home := _home(t)) is not None)
        if others and not said:
            self._on_device_after_all(hosts)
            return
        for made in pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor) and not self.is_on_host(made):
                self.put(made, host=True, said=said)

    def is_host(self, device: Any) -> bool:
        """Whether a device that the program asks for is the host.

        `"cpu"` is where it is written in the function that asks. An attribute or a setting that holds it is the
        device that the program was set up for, since there is no GPU here.
        """
        if isinstance(device, torch.Tensor):
            return self.is_on_host(device)
        if device is HOST:
            return True
        named = device.split(":")[0] if isinstance(device, str) else getattr(device, "type", "")
        return named == "cpu" and _is_written_by_caller()

    def _note(self, slot: Slot, tensor: torch.Tensor) -> None:
        home = _home(tensor)
        if home is not None:
            self._moved[slot] = home

    def _on_device_after_all(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            home = _home(tensor)
            if home is not None and not self._homes[home][1]:
                del self._homes[home]


_CACHED = 0
_INDEXING = frozenset({torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.index_put_})


def _held(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for store in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in list(store.items()) if tensor is not None)


def _home(tensor: torch.Tensor) -> int | None:
    """The address of a tensor's storage; None under torch.vmap and for subclasses that have none."""
    try:
        with torch._C.DisableTorchFunction():
            home: int = tensor.untyped_storage()._cdata
            return home
    except (NotImplementedError, RuntimeError):
        return None


def default_to(device: Any) -> None:
    """In place of `torch.set_default_device`, whose effect lasts as long as the process too."""
    global _default  # a setting of the process
    _default = device


_default: Any = None


def defaults_to_host() -> bool:
    """Whether what is made without naming a device is on the host."""
    return _default is None and torch.get_default_device().type == "cpu"


def _is_written_by_caller() -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        frame = frame.f_back
    return frame is not None and _names_the_host(frame.f_code)


@functools.lru_cache(maxsize=1024)
def _names_the_host(code: CodeType) -> bool:
    words = {word for const in code.co_consts for word in (const if isinstance(const, tuple) else (const,))}
    return any(word in words for word in ("cpu", "cpu:0")) and "is_available" not in code.co_names


_NOT_THE_CALLER = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


# torch.ops.fxroof.to_host and others: nothing to compute, but shapes


def _define(schema: str, function: Callable[..., Any]) -> None:
    name = _LIBRARY.define(schema)
    for key in ("Meta", "CPU"):
        _LIBRARY.impl(name, function, key)
    # a copy is made whether anyone looks at it or not
    has_side_effect(getattr(torch.ops.fxroof, name.removeprefix("fxroof::")).default)


def _copy(tensor: torch.Tensor, _: bool) -> torch.Tensor:
    return tensor.clone()


def _nothing(*_: Any) -> None:
    pass


_LIBRARY: Any = torch.library.Library("fxroof", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own
for _where in ("host", "device"):
    _define(f"to_{_where}(Tensor self, bool non_blocking) -> Tensor", _copy)
    _define(f"move_to_{_where}(Tensor self, bool non_blocking) -> ()", _nothing)
