"""Inputs that transformers' models take beside text, read off their configs: images, sound, and their combinations."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .scenario import Scenario

_SECONDS_OF_SOUND = 30
_SAMPLES_PER_SECOND = 16_000
_FRAMES = 3000  # what 30 seconds of sound become
_IMAGE = 224


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of the transformers library, or made like one."""
    return all(hasattr(module, name) for name in ("config", "main_input_name", "can_generate", "get_encoder"))


def candidates(module: Any, names: tuple[str, ...], scenario: Scenario) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs by name to try, the likeliest first: what the model calls its main input alone, then all kinds together.

    Args:
        module: the transformers model.
        names: what its forward takes.
        scenario: batch size, and the length of text.
    """
    main = module.main_input_name
    known = [n for n in _SHAPES if n in names]
    for chosen in dict.fromkeys([(main,) if main in known else (), tuple(known)]):
        for shapes in itertools.product(*(shapes_of(module, name, scenario) for name in chosen)) if chosen else ():
            yield dict(zip(chosen, shapes, strict=True))


def shapes_of(module: Any, name: str, scenario: Scenario) -> Iterator[torch.Tensor]:
    """Shapes that an input of this name may have, as tensors on meta."""
    if name not in _SHAPES:
        return
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for shape in _SHAPES[name](module.config, scenario):
        kind = torch.int64 if name == "input_ids" else dtype
        yield torch.empty(scenario.batch_size, *shape, dtype=kind, device="meta")


def _text(_: Any, scenario: Scenario) -> list[tuple[int, ...]]:
    return [(scenario.input_len,)]


def _image(config: Any, _: Scenario) -> list[tuple[int, ...]]:
    channels = _first(config, ("num_channels", "in_channels", "in_chans"), 3)
    size = _first(config, ("image_size",), _IMAGE)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return [(channels, height, width)]


def _spectrum(config: Any, _: Scenario) -> list[tuple[int, ...]]:
    bands = _first(config, ("num_mel_bins", "input_feat_per_channel", "num_mel_filters"), 80)
    positions = _first(config, ("max_source_positions",), _FRAMES // 2)
    return [(bands, 2 * positions), (bands, _FRAMES), (_FRAMES, bands)]


def _sound(config: Any, _: Scenario) -> list[tuple[int, ...]]:
    length, bands = _first(config, ("max_length",), 0), _first(config, ("num_mel_bins",), 0)
    pieces: list[tuple[int, ...]] = [(length, bands)] if length and bands else []
    return [*pieces, (_SECONDS_OF_SOUND * _SAMPLES_PER_SECOND,)]


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """A field of the config or of the part of it that describes the modality."""
    owners = [config, *(getattr(config, n, None) for n in ("vision_config", "encoder", "audio_config"))]
    found = (getattr(owner, name, None) for name in names for owner in owners if owner is not None)
    return next((value for value in found if value), default)


_SHAPES = {"input_ids": _text, "pixel_values": _image, "input_features": _spectrum, "input_values": _sound}
