"""Types of the command line's options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click


class _Formats(click.ParamType[tuple[str, "Path | None"]]):
    """A renderer, looked up only when a format is given, and the file that it writes: `sarif=out.sarif`."""

    name = "format"

    def __init__(self, known: Callable[[], Iterable[str]]) -> None:
        self._known = known

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002  # click's signature
        return f"[{'|'.join(self._known())}][=FILE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path | None]:
        if isinstance(value, tuple):
            return value
        name, given, file = str(value).partition("=")
        if name not in self._known():
            self.fail(f"{name!r} is not one of {', '.join(self._known())}.", param, ctx)
        if given and not file:
            self.fail(f"{value!r} names no file: for example {name}=out.txt.", param, ctx)
        return name, Path(file) if file else None

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002  # click's signature
        param: click.Parameter,  # noqa: ARG002  # click's signature
        incomplete: str,
    ) -> list[click.shell_completion.CompletionItem]:
        return [click.shell_completion.CompletionItem(name) for name in self._known() if name.startswith(incomplete)]


def _report_formats() -> Iterable[str]:
    from .render.registry import formats

    return formats()


def _diff_formats() -> Iterable[str]:
    from .render._diff import FORMATS

    return FORMATS


class _Memory(click.ParamType[int]):
    """A size such as `16GB` or `512 MiB` -> bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B?", str(value).strip(), re.IGNORECASE)
        if match is None and str(value).strip() != "0":
            self.fail(f"{value!r} is no size: for example 16GB, 512MiB, or 0 for no limit.", param, ctx)
        if match is None:
            return 0
        power = "KMGT".index(match[2].upper()) + 1
        return max(int(float(match[1]) * (1024 if match[3] else 1000) ** power), 1)


class _Share(click.ParamType[float]):
    """A share such as `1%` or `0.01`, as a number."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", text)
        if match is None:
            self.fail(f"{value!r} is no share: for example 1% or 0.01.", param, ctx)
        return float(match[1]) / (100 if match[2] else 1)


class _RuleNames(click.ParamType[tuple[str, ...]]):
    """Codes, beginnings of codes or names of rules, with commas between them."""

    name = "rule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        if not all(names):
            self.fail(f"{value!r} names a rule too few: for example ATT001,FUS.", param, ctx)
        return names


class _ModuleRules(click.ParamType[tuple[tuple[str, str], ...]]):
    """A pattern of module paths and the rules that are not to look there, `blocks.*.attn=ATT001,FUS`."""

    name = "module=rule"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, str], ...]:
        if isinstance(value, tuple):
            return value
        pattern, _, rules = str(value).rpartition("=")
        if not pattern:
            self.fail(f"{value!r} is not MODULE=RULES: for example blocks.*.attn=ATT001,FUS.", param, ctx)
        return tuple((pattern, rule) for rule in RULE_NAMES.convert(rules, param, ctx))


REPORT_FORMATS = _Formats(_report_formats)
DIFF_FORMATS = _Formats(_diff_formats)
SIZE = _Memory()
SHARE = _Share()
RULE_NAMES = _RuleNames()
MODULE_RULES = _ModuleRules()


def complete_gpu(
    ctx: click.Context,  # noqa: ARG001  # click's signature
    param: click.Parameter,  # noqa: ARG001  # click's signature
    incomplete: str,
) -> list[click.shell_completion.CompletionItem]:
    """Catalogue keys that begin so."""
    from ..hardware.catalog import names

    return [click.shell_completion.CompletionItem(name) for name in names() if name.startswith(incomplete)]
