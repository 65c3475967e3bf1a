"""The formats a report can be written in. A renderer registers itself: adding one touches only its file."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..report import Report

By = Literal["op", "module"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to render; a format ignores what does not concern it.

    Attributes:
        width: columns that no line exceeds.
        colour: whether ANSI colours may be used.
        unicode: whether anything beyond ASCII may be used.
        top: rows of the hotspot table.
        by: what a row of the hotspot table is.
    """

    width: int = 100
    colour: bool = False
    unicode: bool = True
    top: int = 10
    by: By = "op"


Renderer = Callable[[Report, Options], str]

_renderers: dict[str, Renderer] = {}


def renderer(name: str) -> Callable[[Renderer], Renderer]:
    """Register a function as the renderer of a format.

    Raises:
        ValueError: the format has a renderer already.
    """

    def register(function: Renderer) -> Renderer:
        if name in _renderers:
            raise ValueError(f"two renderers for {name}: {_renderers[name]} and {function}")
        _renderers[name] = function
        return function

    return register


def formats() -> tuple[str, ...]:
    """The names of all formats."""
    _load_renderers()
    return tuple(sorted(_renderers))


def render(report: Report, name: str, options: Options) -> str:
    """The report in a format; KeyError when there is no such format."""
    _load_renderers()
    return _renderers[name](report, options)


@functools.cache
def _load_renderers() -> None:
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
