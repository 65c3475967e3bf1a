"""Inputs that the user gives: `--input x=1x3x224x224:bf16`, and what the hook `example_inputs` returns."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .candidates import user_error
from .errors import WorkloadError
from .meta import building

SYNTAX = (
    "Write a tensor as name=1x3x224x224:bf16 (the type may be left out, `scalar` is the shape of a single value) "
    "and any other argument as name=int:5, name=float:0.5, name=bool:true, name=str:text or name=none:."
)
HOOK = (
    "Give each with --input name=1x3x224x224:bf16, or add a function to the file: "
    "example_inputs(phase, batch_size, input_len, context_len), returning the arguments of forward as a tuple or a "
    "dict, or None where the model has no such phase."
)
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "fp8": "float8_e4m3fn"}
_DTYPES = {n: v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}
_WHOLE_NUMBERS = re.compile(
    r"(^|_)(ids?|idx|ind(ex|ices)|tokens?|labels?|mask|pos(itions?)?|lengths?|targets?|classes|y)$", re.IGNORECASE
)
_ONE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)\s*=\s*)?(?P<value>.+)", re.DOTALL)
_PLAIN: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False, "1": True, "0": False}[text.lower()],
    "str": str,
    "none": lambda _: None,
}


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments for one call of forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def from_texts(name: str, module: nn.Module, texts: Sequence[str]) -> Arguments:
    """The arguments that `--input` options say.

    Args:
        name: the model's, for messages.
        module: whose forward takes them.
        texts: one option's value each.

    Raises:
        WorkloadError: unreadable, unknown to forward, or forward needs more.
    """
    positional: list[Any] = []
    named: dict[str, Any] = {}
    known = _parameters(module)
    floating = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for text in texts:
        key, value = _parsed(text, floating)
        if not key:
            positional.append(value)
        elif key in named:
            raise WorkloadError(f"--input {key} is given twice.")
        elif key not in known and not _takes(module, inspect.Parameter.VAR_KEYWORD):
            raise WorkloadError(
                f"--input {text}: forward of {name} has no argument {key!r}.",
                f"{_did_you_mean(key, known)}It takes {signature(module)}.",
            )
        else:
            named[key] = value
    for key, parameter in known.items():  # by position where forward allows nothing else
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and key in named:
            positional.append(named.pop(key))
    arguments = Arguments(tuple(positional), named)
    _check(name, module, arguments, "--input")
    return arguments


def from_hook(
    name: str, module: nn.Module, hook: Callable[..., Any], phase: str, lengths: Sequence[int]
) -> Arguments | None:
    """The arguments that the user's hook returns for a phase; None where the model has no such phase.

    Args:
        name: the model's, for messages.
        module: whose forward takes them.
        hook: `example_inputs(phase, batch_size, input_len, context_len)`.
        phase: what is asked for.
        lengths: batch size, prompt tokens, tokens in the cache.

    Raises:
        WorkloadError: the hook failed, or returned what forward cannot take.
    """
    call = f"example_inputs({phase!r}, {', '.join(map(str, lengths))})"
    try:
        with building():
            given = hook(phase, *lengths)
    except Exception as error:
        known = user_error(f"{call} failed", error, None)
        raise WorkloadError(known.message, known.hint) from error
    if given is None:
        return None
    arguments = _as_arguments(given)
    if arguments is None:
        raise WorkloadError(
            f"{call} returned {_kind(given)}; it should return the arguments of forward{signature(module)}.",
            "Return a tuple (by position), a dict (by name), or None where the model has no such phase.",
        )
    _check(name, module, arguments, call)
    return arguments


def signature(module: nn.Module) -> str:
    """Forward's arguments as the user wrote them."""
    return str(inspect.signature(module.forward).replace(return_annotation=inspect.Signature.empty))


def _parsed(text: str, floating: torch.dtype) -> tuple[str, Any]:
    match = _ONE.fullmatch(text.strip())
    if match is None:
        raise WorkloadError(f"--input {text!r} is empty.", SYNTAX)
    key, value = match["name"] or "", match["value"].strip()
    kind, colon, rest = value.partition(":")
    if colon and kind in _PLAIN:
        try:
            return key, _PLAIN[kind](rest)
        except (ValueError, KeyError):
            raise WorkloadError(f"--input {text}: {rest!r} is no {kind}.", SYNTAX) from None
    return key, _tensor(text, key, kind, rest if colon else "", floating)


def _tensor(text: str, key: str, shape: str, dtype: str, floating: torch.dtype) -> torch.Tensor:
    if shape == "scalar":
        sizes: tuple[int, ...] = ()
    elif re.fullmatch(r"\d{1,18}(x\d{1,18})*", shape):
        sizes = tuple(int(size) for size in shape.split("x"))
    else:
        raise WorkloadError(f"--input {text}: {shape!r} is no shape.", SYNTAX)
    if 0 in sizes:
        raise WorkloadError(f"--input {text}: a size is 0, so there is nothing to compute.", SYNTAX)
    if dtype:
        found = _DTYPES.get(_SHORT.get(dtype, dtype))
        if found is None:
            near = difflib.get_close_matches(dtype, [*_SHORT, *_DTYPES], n=3)
            raise WorkloadError(
                f"--input {text}: unknown type {dtype!r}.", f"Did you mean {' or '.join(near)}?" if near else SYNTAX
            )
    else:
        found = torch.int64 if _WHOLE_NUMBERS.search(key) else floating
    try:
        return torch.empty(sizes, dtype=found, device="meta")
    except RuntimeError as error:
        raise WorkloadError(f"--input {text}: such a tensor is too large to address.") from error


def _as_arguments(given: Any) -> Arguments | None:
    match given:
        case torch.Tensor():
            return Arguments((given,))
        case tuple() as args, dict() as kwargs if all(isinstance(k, str) for k in kwargs) and isinstance(given, tuple):
            return Arguments(args, kwargs)
        case tuple() | list() if given:
            return Arguments(tuple(given))
        case Mapping() if given and all(isinstance(k, str) for k in given):
            return Arguments((), dict(given))
    return None


def _check(name: str, module: nn.Module, arguments: Arguments, origin: str) -> None:
    try:
        inspect.signature(module.forward).bind(*arguments.args, **arguments.kwargs)
    except TypeError as error:
        raise WorkloadError(
            f"{origin} does not fit forward of {name}: {error}.", f"It takes {signature(module)}. {SYNTAX}"
        ) from error


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list | Mapping) and not value:
        return f"an empty {type(value).__name__}"
    return f"a {type(value).__name__}"


def _did_you_mean(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {near[0]}? " if near else ""


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {n: p for n, p in inspect.signature(module.forward).parameters.items() if p.kind not in kinds}


def _takes(module: nn.Module, kind: Any) -> bool:
    return any(p.kind is kind for p in inspect.signature(module.forward).parameters.values())
