"""The modules that are traced: around the user's model, taking and returning plain tensors.

torch.export has no tree for caches and other objects, so tensors are taken out of what a forward takes and returns,
wherever they lie, and put back into copies of it.
"""

import contextlib
import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .inputs import Arguments
from .meta import tracing
from .residence import hand_on, take_over
from .trace import CACHE, RESULT
from .values import tell


class Wrapper(nn.Module):
    """Around a user's model, to give it its inputs and say what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.known: Sequence[torch.Tensor | None] = ()

    def tell(self, inputs: Sequence[torch.Tensor]) -> None:
        """Say what the inputs of this call hold."""
        for given, real in zip(inputs, self.known, strict=False):
            if real is not None:
                tell(given, real)


class Call(Wrapper):
    """Calls the model and returns every tensor of its result, the cache it hands back apart from the rest.

    With a `template`, inputs after the tokens are tensors to rebuild the cache argument around.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        names: Sequence[str] = (),
        fixed: Mapping[str, Any] | None = None,
        cache_argument: str = "",
        template: Any = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.fixed = dict(fixed or {})
        self.cache_argument = cache_argument
        self.template = [template]  # in a list, so that a template that is a module is not registered

    def forward(self, *inputs: Any) -> dict[str, tuple[torch.Tensor, ...]]:
        """Inputs by position, then those of `names`; or tokens and the tensors of the cache."""
        self.tell(inputs)
        if self.template[0] is not None:
            take_over(inputs[1:])
            state = refilled(self.template[0], inputs[1:])
            result = self.model(inputs[0], **{self.cache_argument: state}, **self.fixed)
        else:
            positional = inputs[: len(inputs) - len(self.names)]
            named = dict(zip(self.names, inputs[len(positional) :], strict=True))
            result = self.model(*positional, **named, **self.fixed)
        parted = _parted(result, self.cache_argument)
        if self.template[0] is not None:
            hand_on(parted[CACHE])
        return parted


class Replay(Wrapper):
    """Calls the model with given arguments, whose tensors, however deep they lie, are its inputs."""

    def __init__(self, model: nn.Module, given: Arguments, cache_argument: str = "") -> None:
        super().__init__()
        self.model = model
        self.given = [given]  # in a list, so that modules among the arguments are not registered
        self.cache_argument = cache_argument

    def forward(self, *inputs: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        """Tensors in the order of `tensors_in`."""
        self.tell(inputs)
        given = self.given[0]
        args, kwargs = refilled((given.args, dict(given.kwargs)), inputs)
        return _parted(self.model(*args, **kwargs), self.cache_argument)


class Features(Wrapper):
    """The encoder of images that a transformers language model brings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images to what the language model takes in their place."""
        result = self.model.get_image_features(pixel_values=image)  # type: ignore[operator]  # a method of transformers
        return tuple(tensors_in(getattr(result, "pooler_output", None)) or tensors_in(result))


class Encoder(Wrapper):
    """The encoder of a transformers encoder-decoder model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Tokens, sound or an image to hidden states."""
        self.tell((source,))
        states: torch.Tensor = self.model.get_encoder()(source)[0]  # type: ignore[operator]  # a method of transformers
        return states


class Decoder(Wrapper):
    """The decoder of a transformers encoder-decoder model, over what its encoder made; with a cache or making it."""

    def __init__(self, model: nn.Module, template: Any = None) -> None:
        super().__init__()
        self.model = model
        self.state = [template]  # in a list, as above

    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor, *cache: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, ...]]:
        """Decoder tokens, what the encoder made, and the tensors of the cache."""
        self.tell((tokens,))
        return _parted(self.run(tokens, states, refilled(self.state[0], cache)), "past_key_values")

    def run(self, tokens: torch.Tensor, states: torch.Tensor, cache: Any = None) -> Any:
        """The model's own result."""
        from transformers.modeling_outputs import BaseModelOutput

        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
        )


def _parted(result: Any, cache_argument: str) -> dict[str, tuple[torch.Tensor, ...]]:
    cache = cache_tensors(returned_cache(result, cache_argument)) if cache_argument else []
    carried = {id(t) for t in cache}
    return {RESULT: tuple(t for t in tensors_in(result) if id(t) not in carried), CACHE: tuple(cache)}


def cache_tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a cache that hold something of each token, counters left out."""
    return [t for t in tensors_in(value) if t.dim()]


def returned_cache(result: Any, argument: str) -> Any:
    """The cache in what a model returned: the field of the argument's name, or the last part that is not the first."""
    if isinstance(result, Mapping):
        return result.get(argument)
    if (field_value := getattr(result, argument, None)) is not None:
        return field_value
    if isinstance(result, tuple | list) and len(result) > 1:
        return next((part for part in reversed(result[1:]) if tensors_in(part)), None)
    return None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor inside nested containers and plain objects, each once, in a fixed order; modules left out."""
    found: dict[int, torch.Tensor] = {}
    _collect(value, found, set())
    return list(found.values())


def refilled(template: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """A copy of a nested object with its tensors replaced, in the order of `tensors_in`."""
    old = tensors_in(template)
    memo: dict[int, Any] = {id(o): n for o, n in zip(old, tensors, strict=True)}
    return copy.deepcopy(template, memo)


def runs(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether a forward gets through on the meta device."""
    try:
        with tracing(), contextlib.redirect_stdout(sys.stderr):
            module(*args, **(kwargs or {}))
    except Exception:  # whatever user code raises means that this guess was wrong
        return False
    return True


def emptied(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on meta; whole numbers keep their values."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    real = getattr(tensor, VALUE, None if tensor.is_meta or tensor.is_floating_point() else tensor)
    if real is not None:
        setattr(made, VALUE, real)
    return made


def some_tokens(batch_size: int, length: int) -> torch.Tensor:
    """Token ids on meta whose values are known."""
    # any ids but the first few, which often mean padding, start and end
    return with_value((torch.arange(batch_size * length) % 89 + 7).view(batch_size, length))


def with_value(real: torch.Tensor) -> torch.Tensor:
    """A tensor on meta that remembers what it holds."""
    tensor = torch.empty(real.shape, dtype=real.dtype, device="meta")
    setattr(tensor, VALUE, real)
    return tensor


VALUE = "fxroof_value"
"""Attribute of an example input that holds what it contains, for control flow that looks at it."""


def _collect(value: Any, found: dict[int, torch.Tensor], seen: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        found.setdefault(id(value), value)
        return
    if id(value) in seen or isinstance(
        value, nn.Module | type | str | bytes | int | float | torch.dtype | torch.device
    ):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found, seen)
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, found, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        for item in vars(value).values():
            _collect(item, found, seen)
