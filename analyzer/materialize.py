"""A model on the meta device -> the same on a device with memory: weights that nobody trained, but that can be run.

Matrices are random and scaled so that activations stay as large as they are, norms are ones, biases zeros, what is
given to the model random. Small buffers have the values that they were built with. All memory is written to: pages of
the system that never were are all one page of zeros, and reading them would be faster than memory is.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .calls import VALUE, tensors_in

_BLOCK = (1 << 20) + 7


class RealMemory:
    """Tensors of a device in place of tensors on meta, those of one storage in one storage.

    Args:
        device: where.
        kept: values of small buffers by name, as `meta.keeping` gives them.
    """

    def __init__(self, device: torch.device, kept: Mapping[str, torch.Tensor]) -> None:
        self.device = device
        self._kept = kept
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # ours, and one on meta to keep its name
        self._parameters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._blocks: dict[tuple[torch.dtype, float], torch.Tensor] = {}
        self._random = torch.Generator().manual_seed(0)

    @property
    def held_bytes(self) -> int:
        """Bytes of the storages made so far."""
        return sum(real.numel() * real.element_size() for real, _ in self._storages.values())

    @contextlib.contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Have a module hold real tensors while inside, those it began with afterwards."""
        held = [(child, dict(child._parameters), dict(child._buffers)) for child in module.modules()]
        plain = [
            (child, name, value)
            for child in module.modules()
            for name, value in vars(child).items()
            if isinstance(value, torch.Tensor)
        ]
        try:
            for path, child in module.named_modules():
                for name, parameter in child._parameters.items():
                    if parameter is not None:
                        child._parameters[name] = self._parameter(parameter, f"{path}.{name}")
                for name, buffer in child._buffers.items():
                    if buffer is not None:
                        child._buffers[name] = self.tensor(buffer, f"{path}.{name}")
            for child, name, value in plain:
                setattr(child, name, self.tensor(value, name))
            self._blocks.clear()
            yield
        finally:
            for child, parameters, buffers in held:
                child._parameters.clear()
                child._parameters.update(parameters)
                child._buffers.clear()
                child._buffers.update(buffers)
            for child, name, value in plain:
                setattr(child, name, value)

    def tensor(self, tensor: torch.Tensor, name: str = "", *, weight: bool = False) -> torch.Tensor:
        """The real twin of a tensor: a parameter, or a buffer or constant, of that name."""
        if isinstance(tensor, FakeTensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device).zero_()
        if not tensor.is_meta:
            return tensor.detach().to(self.device)
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            length = storage.nbytes() // tensor.element_size()
            made = torch.empty(length, dtype=tensor.dtype, device=self.device)
            self._fill(made, tensor, name, weight=weight)
            self._storages[storage._cdata] = made, tensor
        whole = self._storages[storage._cdata][0]
        if whole.dtype != tensor.dtype:
            whole = whole.view(tensor.dtype)
        return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def inputs(self, args: Sequence[Any], vocabulary: int | None) -> tuple[Any, ...]:
        """Real twins of example inputs: known values where they are known, else data that any model takes.

        Args:
            args: of a program.
            vocabulary: tokens that the model knows; None where it knows none.
        """
        made = tuple(
            self._input(arg, vocabulary) if isinstance(arg, torch.Tensor) else arg for arg in pytree.tree_leaves(args)
        )
        self._blocks.clear()  # no part of the model: they would be counted with what it holds
        return made

    def state(self, template: Any, tensors: Sequence[torch.Tensor]) -> Any:
        """A copy of a nested object with its tensors replaced, in the order of `tensors_in`, and its devices ours."""
        memo: dict[int, Any] = {id(old): new for old, new in zip(tensors_in(template), tensors, strict=True)}
        memo |= {id(device): self.device for device in _devices_in(template)}
        return copy.deepcopy(template, memo)

    def _parameter(self, parameter: nn.Parameter, name: str) -> nn.Parameter:
        if id(parameter) not in self._parameters:
            made = nn.Parameter(self.tensor(parameter.detach(), name, weight=True), requires_grad=False)
            self._parameters[id(parameter)] = made, parameter
        return self._parameters[id(parameter)][0]

    def _fill(self, made: torch.Tensor, tensor: torch.Tensor, name: str, *, weight: bool) -> None:
        value = self._kept.get(name)
        if value is not None and value.shape == tensor.shape and tensor.numel() == made.numel():
            made.as_strided(tensor.size(), tensor.stride()).copy_(value)
        elif not weight:
            made.zero_()
        elif not made.is_floating_point() and not made.is_complex():
            made.fill_(1)
        elif tensor.dim() < 2:
            made.fill_(0.0 if "bias" in name.rsplit(".", 1)[-1] else 1.0)
        else:
            self._randomize(made, 1.0 / math.sqrt(max(1, math.prod(tensor.shape[1:]))))

    def _randomize(self, made: torch.Tensor, scale: float) -> None:
        # a block of random numbers again and again: to draw them all takes longer than most measurements
        if (made.dtype, scale) not in self._blocks:
            drawn = torch.randn(_BLOCK, generator=self._random, device="cpu") * scale
            self._blocks[made.dtype, scale] = drawn.to(made.dtype).to(self.device)
        block = self._blocks[made.dtype, scale]
        whole = made.numel() // _BLOCK * _BLOCK
        made[:whole].view(-1, _BLOCK).copy_(block)
        made[whole:].copy_(block[: made.numel() - whole])

    def _input(self, arg: torch.Tensor, vocabulary: int | None) -> torch.Tensor:
        known = getattr(arg, VALUE, None if arg.is_meta else arg)
        if known is not None:
            if known.dim() == 2 and not known.is_floating_point() and known.dtype != torch.bool and vocabulary:
                known = known % vocabulary
            made = known.detach().to(self.device)
            return made.clone() if made is known else made
        made = torch.empty_strided(arg.size(), arg.stride(), dtype=arg.dtype, device=self.device).zero_()
        if arg.dtype == torch.bool:
            made.fill_(True)
        elif arg.is_floating_point() and made.is_contiguous():
            self._randomize(made.view(-1), 1.0)
        elif arg.is_floating_point():
            flat = torch.empty(arg.numel(), dtype=arg.dtype, device=self.device)
            self._randomize(flat, 1.0)
            made.copy_(flat.view(arg.shape))
        elif vocabulary:
            made.copy_((torch.arange(arg.numel()) % min(vocabulary, 89)).view(arg.shape))
        return made


def vocabulary_of(module: nn.Module) -> int | None:
    """Rows of the largest embedding: any smaller number is a token."""
    return max((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=None)


def _devices_in(value: Any) -> list[torch.device]:
    """Every torch.device inside nested containers and plain objects."""
    found: list[torch.device] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.device):
            found.append(item)
        if id(item) in seen or isinstance(item, torch.Tensor | nn.Module | type | str | bytes | int | float):
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, tuple | list):
            waiting += item
        elif hasattr(item, "__dict__") and not callable(item):
            waiting += vars(item).values()
    return found
